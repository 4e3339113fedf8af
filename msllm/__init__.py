"""msllm: pretrain and run multi-stream language models in JAX."""

__version__ = "0.1.0"
