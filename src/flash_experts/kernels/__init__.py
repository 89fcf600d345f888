"""Kernels for attention and experts, on CPUs and GPUs."""
