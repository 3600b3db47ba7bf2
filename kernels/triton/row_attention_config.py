"""How the kernels of row attention cut their work: one frozen table, by architecture, kernel, size and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

Kernel = Literal["fwd", "bwd"]
# (architecture, kernel, size, bytes of an element)
Key = tuple[int, Kernel, int, int]

# What a program accumulates, BLOCK_M·D for BLOCK_M = 16 or 32 query rows: registers and shared memory must hold it.
# ViT-Ti has 3072, ViT-S 6144, ViT-B 12288 (24576 where two rows are read), ViT-L 16384, ViT-H 20480.
SIZES = (4096, 8192, 12288, 16384, 24576)


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_N rows, cut into pieces of at most BLOCK_D columns.

    `fused`, for the backward: one launch makes all gradients; else d(query) has one of its own, which needs fewer
    registers but reads the rows a second time.
    """

    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    fused: bool = True


# Chosen by what the compiler makes of them (no spills, shared memory that fits), not by times: none were measured yet.
# Architecture 80 serves cards with 99 KB of shared memory too. Sizes that are not here are refused: 4-byte elements
# without TF32 run on no matrix unit, and large ones are left to cuBLAS.
_AMPERE: dict[tuple[Kernel, int, int], Config] = {
    ("fwd", 4096, 2): Config(64, 64, 4, 2),
    ("fwd", 8192, 2): Config(32, 128, 8, 2),
    ("fwd", 12288, 2): Config(32, 128, 8, 2),
    ("fwd", 16384, 2): Config(16, 128, 8, 1),
    ("bwd", 4096, 2): Config(32, 64, 4, 1),
    ("bwd", 8192, 2): Config(32, 128, 8, 1),
    ("bwd", 12288, 2): Config(16, 128, 8, 1),
    ("bwd", 16384, 2): Config(16, 64, 8, 1),
    ("fwd", 4096, 4): Config(16, 64, 8, 1),
    ("fwd", 8192, 4): Config(16, 128, 8, 1),
    ("bwd", 4096, 4): Config(16, 64, 8, 1, fused=False),
    ("bwd", 8192, 4): Config(16, 64, 8, 1, fused=False),
}
_HOPPER: dict[tuple[Kernel, int, int], Config] = {
    ("fwd", 4096, 2): Config(64, 64, 4, 3),
    ("fwd", 8192, 2): Config(64, 128, 8, 2),
    ("fwd", 12288, 2): Config(32, 128, 8, 3),
    ("fwd", 16384, 2): Config(32, 128, 8, 3),
    ("fwd", 24576, 2): Config(32, 256, 8, 2),
    ("bwd", 4096, 2): Config(32, 64, 4, 2),
    ("bwd", 8192, 2): Config(32, 128, 8, 2),
    ("bwd", 12288, 2): Config(32, 128, 8, 2),
    ("bwd", 16384, 2): Config(16, 128, 8, 2),
    ("bwd", 24576, 2): Config(16, 128, 8, 1, fused=False),
    ("fwd", 4096, 4): Config(16, 64, 8, 2),
    ("fwd", 8192, 4): Config(16, 128, 8, 2),
    ("bwd", 4096, 4): Config(16, 64, 8, 1, fused=False),
    ("bwd", 8192, 4): Config(16, 64, 8, 1, fused=False),
}
# For rows that start at no multiple of 16 bytes, of the least size alone: loading element by element takes registers.
ELEMENTWISE = Config(16, 64, 8, 1, fused=False)
_KERNELS: tuple[Kernel, ...] = ("fwd", "bwd")
TABLE: dict[Key, Config] = {
    **{(80, *key): config for key, config in _AMPERE.items()},
    **{(arch, *key): config for arch in (90, 100) for key, config in _HOPPER.items()},
    # The interpreter pays for every operation; in two launches it reaches the code of both.
    **{(0, *key): Config(128, 512, 1, 1, fused=key[1] > 4096) for key in product(_KERNELS, SIZES, (2, 4))},
}


def largest(architecture: int, itemsize: int) -> int:
    """The largest size that is served."""
    return max(size for arch, _, size, item in TABLE if (arch, item) == (architecture, itemsize))


def choose(architecture: int, kernel: Kernel, size: int, itemsize: int) -> Config:
    """The configuration for a size of up to `largest(architecture, itemsize)`."""
    return TABLE[architecture, kernel, next(s for s in SIZES if size <= s), itemsize]


def candidates(key: Key) -> list[Config]:
    """What a tuner tries for an entry; configurations that do not fit the card fail to launch and drop out."""
    _, kernel, _, itemsize = key
    return [
        Config(BLOCK_N, BLOCK_D, num_warps, num_stages, fused)
        for BLOCK_N, BLOCK_D, num_warps, num_stages, fused in product(
            (16, 32, 64), (64, 128, 256), (4, 8), (1, 2, 3), (True, False)
        )
        if (fused or kernel == "bwd") and BLOCK_N * BLOCK_D * itemsize <= 1 << 14
    ]
