"""Tile sizes of row attention, by architecture, kernel, size and bytes of an element."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

Kernel = Literal["fwd", "bwd"]

# The size of a program's accumulators, BLOCK_M·D for BLOCK_M = 16 or 32 query rows, which must fit registers and shared
# memory. ViT-Ti has 3072, ViT-S 6144, ViT-B 12288 (24576 if the head reads two rows), ViT-L 16384, ViT-H 20480.
SIZES = (4096, 8192, 12288, 16384, 24576)


class Key(NamedTuple):
    """An entry of the table: up to `size` accumulated numbers, elements of `itemsize` bytes."""

    architecture: int
    kernel: Kernel
    size: int
    itemsize: int


@dataclass(frozen=True)
class Config:
    """Tiles of `block_n` rows, cut into pieces of at most `block_d` columns.

    In the backward, `fused`: one launch computes all gradients; otherwise d(query) has a separate launch, which needs
    fewer registers but reads the rows a second time.
    """

    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    fused: bool = True


# Chosen from the compiled code (no spills, shared memory that fits); not measured yet. Architecture 80 includes GPUs
# with 99 KB of shared memory. Other sizes are not supported: 4-byte elements without TF32 cannot use matrix units, and
# large sizes run on cuBLAS.
_AMPERE: dict[tuple[Kernel, int, int], Config] = {
    ("fwd", 4096, 2): Config(64, 64, 4, 2),
    ("fwd", 8192, 2): Config(32, 128, 8, 2),
    ("fwd", 12288, 2): Config(16, 128, 8, 2),
    ("fwd", 16384, 2): Config(16, 128, 8, 1),
    ("bwd", 4096, 2): Config(32, 64, 4, 1),
    ("bwd", 8192, 2): Config(16, 128, 8, 1),
    ("bwd", 12288, 2): Config(16, 128, 8, 1),
    ("bwd", 16384, 2): Config(16, 64, 8, 1),
    ("fwd", 4096, 4): Config(16, 64, 8, 1),
    ("fwd", 8192, 4): Config(16, 128, 8, 1),
    # 8 to 16 bytes of spill beside d(query) alone, at 64 to 80 registers: the compiler's choice for occupancy.
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
# For rows that do not start at multiples of 16 bytes, smallest size only: loads of single elements take registers.
ELEMENTWISE = Config(16, 64, 8, 1, fused=False)
_KERNELS: tuple[Kernel, ...] = ("fwd", "bwd")
TABLE: dict[Key, Config] = {
    **{Key(80, *key): config for key, config in _AMPERE.items()},
    **{Key(architecture, *key): config for architecture in (90, 100) for key, config in _HOPPER.items()},
    # Architecture 0 is the interpreter, whose cost is the number of operations; two launches cover the code of both.
    **{Key(0, *key): Config(128, 512, 1, 1, fused=key[1] > 4096) for key in product(_KERNELS, SIZES, (2, 4))},
}


def largest(architecture: int, itemsize: int) -> int:
    """Return the largest supported size."""
    return max(key.size for key in TABLE if (key.architecture, key.itemsize) == (architecture, itemsize))


def choose(architecture: int, kernel: Kernel, size: int, itemsize: int) -> Config:
    """Return the configuration for a size of up to `largest(architecture, itemsize)`."""
    return TABLE[Key(architecture, kernel, next(s for s in SIZES if size <= s), itemsize)]


def override(key: Key, config: Config) -> None:
    """Use `config` for the entry `key` from now on: what a profile or a search found."""
    TABLE[key] = config


def candidates(key: Key) -> list[Config]:
    """Return the candidates for an entry; configurations that do not fit the GPU fail to launch."""
    return [
        Config(block_n, block_d, num_warps, num_stages, fused)
        for block_n, block_d, num_warps, num_stages, fused in product(
            (16, 32, 64), (64, 128, 256), (4, 8), (1, 2, 3), (True, False)
        )
        if (fused or key.kernel == "bwd") and block_n * block_d * key.itemsize <= 1 << 14
    ]
