"""Benchmarks, one module each: `msllm bench NAME`. docs/benchmarks.md has results."""
