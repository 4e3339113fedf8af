"""Ahead-of-time reports for pods: memory, collectives and estimated step time."""
