"""Tile sizes of the residual add with LayerNorm, by architecture, kernel and width."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

Kernel = Literal["fwd", "bwd"]


class Key(NamedTuple):
    """An entry of the table: rows of up to `width` elements."""

    architecture: int
    kernel: Kernel
    width: int


@dataclass(frozen=True)
class Config:
    """A program of `num_warps` warps processes `rows` rows of the sequence."""

    rows: int
    num_warps: int


KERNELS: tuple[Kernel, ...] = ("fwd", "bwd")
# The widest row that a program holds in registers without spilling.
MAX_WIDTH = 4096

# By the width, rounded up to a power of two. Both kernels are bound by memory: they need many 16-byte loads in flight,
# and few instructions. One warp a row executes half as many for 768 elements as four warps do, each of which repeats
# what a row needs once. Chosen from the compiled code; not measured yet.
BY_WIDTH = {
    128: Config(rows=4, num_warps=1),
    256: Config(rows=2, num_warps=1),
    512: Config(rows=1, num_warps=1),
    1024: Config(rows=1, num_warps=1),
    2048: Config(rows=1, num_warps=2),
    4096: Config(rows=1, num_warps=8),
}
# Architecture 0 is the interpreter, whose cost is the number of programs.
INTERPRETED = Config(rows=16, num_warps=1)
TABLE: dict[Key, Config] = {
    Key(architecture, kernel, width): config if architecture else INTERPRETED
    for architecture, kernel in product((80, 90, 100, 0), KERNELS)
    for width, config in BY_WIDTH.items()
}


def choose(architecture: int, kernel: Kernel, width: int) -> Config:
    """Return the configuration for rows of `width` elements, 1 to `MAX_WIDTH`."""
    return TABLE[Key(architecture, kernel, rounded(width))]


def rounded(width: int) -> int:
    """Return the width of the table's entry that serves rows of `width` elements."""
    return next(w for w in BY_WIDTH if w >= width)


def override(key: Key, config: Config) -> None:
    """Use `config` for the entry `key` from now on: what a profile or a search found."""
    TABLE[key] = config


def candidates(key: Key) -> list[Config]:
    """Return the candidates for `TABLE[key]`."""
    return sizes(key.width)


def sizes(width: int) -> list[Config]:
    """Return the candidates for rows of up to `width` elements: 4 to 64 elements per thread."""
    return [
        Config(rows, num_warps)
        for rows in (1, 2, 4, 8)
        for num_warps in (1, 2, 4, 8, 16)
        if 4 <= rows * width // (32 * num_warps) <= 64
    ]
