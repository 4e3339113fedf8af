"""Weights and models from elsewhere: checkpoints, Hugging Face folders, GGUF files."""
