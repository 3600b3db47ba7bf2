"""Fused kernels behind :mod:`fastprompt.ops`; importing this package loads none of them."""
