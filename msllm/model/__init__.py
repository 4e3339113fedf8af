"""The decoder: the model, its layers, and attention."""
