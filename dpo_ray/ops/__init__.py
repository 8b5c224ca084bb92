"""Kernels and matrix products: attention over packed rows, linear layers, float8."""
