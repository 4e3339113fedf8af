"""Loads, imports and exports models: checkpoints, Hugging Face folders and GGUF files."""
