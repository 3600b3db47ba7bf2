"""Triton kernels: one file per operation, its frozen configurations beside it."""
