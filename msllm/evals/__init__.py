"""Scores and evaluations of a trained model."""
