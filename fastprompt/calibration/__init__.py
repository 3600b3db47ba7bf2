"""Measuring the kernels on the user's own GPU: checks, times, and the profile that `auto` follows."""
