"""Kernels written for one kind of hardware."""
