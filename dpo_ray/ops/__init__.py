"""Kernels and matrix products, independent of how a model is sharded.

attention   attention over packed rows with torch's own kernels; the default on a CPU
flex        the same with flex_attention; the default on a GPU
linear      bfloat16 linear layers on a CPU
float8      float8 linear layers on a GPU
cpu         process environment of CPU workers
"""
