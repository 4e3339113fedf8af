"""A first config for one's own data: `msllm init`."""
