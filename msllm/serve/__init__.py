"""A server for sessions that many people use at once: `msllm serve`."""
