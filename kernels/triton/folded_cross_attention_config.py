"""Tiles of folded cross-attention: the split of its H·P columns, and the sizes of programs by architecture."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, NamedTuple

Kernel = Literal["fwd", "bwd"]


@dataclass(frozen=True)
class Columns:
    """The tiles: groups of `heads` (h0, h1) times pieces of `prompts` (p0, p1), each a power of two or 0 for none."""

    heads: tuple[int, int]
    prompts: tuple[int, int]

    @property
    def total(self) -> int:
        return sum(self.heads) * sum(self.prompts)

    @property
    def tiles(self) -> int:
        return sum(1 for h, p in product(self.heads, self.prompts) if h * p)


class Key(NamedTuple):
    """An entry of the table: up to `columns` columns, matrices of elements of `itemsize` bytes."""

    architecture: int
    kernel: Kernel
    columns: int
    itemsize: int


@dataclass(frozen=True)
class Config:
    """`block_m` rows per program; steps of `block_k` of the width in the first product, of `block_d` in the second."""

    block_m: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int


# Chosen from the compiled code, without spills; not measured yet. Calls with more columns than any entry run as
# PyTorch's products: each program reads both folded matrices from L2, and wide ones cost more traffic than fusing the
# scores saves. Architecture 0 is the interpreter.
TABLE: dict[Key, Config] = {
    Key(0, "fwd", 512, 2): Config(128, 128, 128, 4, 1),
    Key(0, "fwd", 512, 4): Config(128, 128, 128, 4, 1),
    Key(0, "bwd", 512, 2): Config(128, 128, 128, 4, 1),
    Key(0, "bwd", 512, 4): Config(128, 128, 128, 4, 1),
    Key(80, "fwd", 128, 2): Config(64, 64, 64, 4, 3),
    Key(80, "fwd", 192, 2): Config(64, 32, 64, 8, 3),
    Key(80, "fwd", 128, 4): Config(16, 32, 64, 8, 2),
    Key(80, "bwd", 128, 2): Config(64, 64, 64, 4, 3),
    Key(80, "bwd", 192, 2): Config(64, 32, 64, 8, 3),
    Key(80, "bwd", 128, 4): Config(16, 32, 64, 4, 2),
    # ViT-B's columns for 10 prompts, in 160 registers and 56 KB: three programs a multiprocessor instead of two, and so
    # all 394 of a batch of 128 at a time on 132 of them.
    Key(90, "fwd", 160, 2): Config(64, 64, 32, 4, 2),
    Key(90, "fwd", 192, 2): Config(64, 64, 64, 4, 3),
    Key(90, "fwd", 256, 2): Config(64, 64, 64, 4, 2),
    Key(90, "fwd", 288, 2): Config(64, 64, 64, 8, 2),
    Key(90, "fwd", 128, 4): Config(16, 32, 64, 8, 2),
    Key(90, "bwd", 128, 2): Config(64, 64, 64, 4, 3),
    Key(90, "bwd", 256, 2): Config(64, 64, 64, 8, 3),
    Key(90, "bwd", 288, 2): Config(64, 64, 64, 8, 2),
    Key(90, "bwd", 128, 4): Config(16, 32, 64, 4, 2),
    Key(100, "fwd", 192, 2): Config(64, 64, 64, 8, 2),
    Key(100, "fwd", 256, 2): Config(64, 64, 32, 8, 1),
    Key(100, "fwd", 128, 4): Config(16, 32, 64, 8, 2),
    Key(100, "bwd", 128, 2): Config(64, 64, 64, 4, 3),
    Key(100, "bwd", 256, 2): Config(64, 64, 64, 8, 2),
    Key(100, "bwd", 128, 4): Config(16, 32, 64, 4, 2),
}

# The minimum number of columns of a product's second factor, and the cost of a tile in columns of padding.
_MIN_TILE, _TILE_COST = 16, 8


@functools.cache
def split(H: int, P: int) -> Columns:
    """Return the tiles for H heads of P prompts with the least padding: 12 heads as 8 + 4, 20 prompts as 16 + 4."""
    found = [
        Columns(heads, prompts)
        for heads, prompts in product(_sums(H), _sums(P))
        if all(h * p >= _MIN_TILE or h * p == 0 for h, p in product(heads, prompts))
    ]
    return min(found, key=lambda c: (c.total + _TILE_COST * c.tiles, c.tiles))


@functools.cache
def limit(architecture: int, itemsize: int) -> int:
    """Return the most columns that forward and backward both support."""
    return min(
        max(
            key.columns
            for key in TABLE
            if (key.architecture, key.kernel, key.itemsize) == (architecture, kernel, itemsize)
        )
        for kernel in ("fwd", "bwd")
    )


def choose(
    architecture: int,
    kernel: Kernel,
    columns: int,
    itemsize: int,
    wide_rows: bool = False,
    norm: bool = False,
) -> Config:
    """Return the smallest entry of the table that fits `columns` columns, at most :func:`limit`.

    `wide_rows`, float32 rows with 16-bit matrices, are read in steps of half as many numbers, the same number of bytes.
    With the `norm` they are also written in such steps, which leaves registers for its sums.
    """
    room = min(
        key.columns
        for key in TABLE
        if (key.architecture, key.kernel, key.itemsize) == (architecture, kernel, itemsize)
        and key.columns >= columns
    )
    chosen = TABLE[Key(architecture, kernel, room, itemsize)]
    if not wide_rows:
        return chosen
    return replace(chosen, block_k=chosen.block_k // 2, block_d=chosen.block_d // (2 if norm else 1))


def override(key: Key, config: Config) -> None:
    """Use `config` for the entry `key` from now on: what a profile or a search found."""
    TABLE[key] = config


def candidates(key: Key) -> list[Config]:
    """Return the candidates for one entry; with more rows per program, the matrices are read less often."""
    if key.itemsize == 4:
        return [Config(m, 32, d, w, s) for m, d, w, s in product((16, 32), (32, 64), (4, 8), (2, 3))]
    return [
        Config(m, k, d, warps, stages)
        for (m, warps), k, d, stages in product(((64, 4), (64, 8), (128, 8)), (32, 64), (32, 64), (1, 2, 3))
    ]


def _sums(count: int) -> list[tuple[int, int]]:
    """Return all (a, b) with b <= a, a + b >= count, a a power of two, b one too or 0, and neither all padding."""
    powers = [1 << i for i in range(max(count, _MIN_TILE).bit_length() + 1)]
    return [
        (a, b) for a in powers for b in (0, *powers) if b <= a and a + b >= count and (b == 0 or a < count)
    ]
