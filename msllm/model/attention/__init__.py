"""Attention over the cells of tables: one visibility, several backends."""
