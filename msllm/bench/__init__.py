"""Benchmarks; docs/benchmarks.md keeps results."""
