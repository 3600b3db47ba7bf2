"""Triton kernels: one file per operation, and one for its table of tile sizes."""
