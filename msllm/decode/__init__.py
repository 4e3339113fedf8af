"""Decoding row by row: sessions, their compiled program and its cache."""
