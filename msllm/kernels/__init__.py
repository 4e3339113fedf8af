"""Hand-written kernels, one package per kind of hardware."""
