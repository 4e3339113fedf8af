"""The decoder: model, layers and attention."""
