"""Ahead-of-time reports for pods: memory, collectives, estimated step time."""
