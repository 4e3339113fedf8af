"""Benchmarks, one module for each `msllm bench NAME`. docs/benchmarks.md has results."""
