"""Tile sizes of the gated blend's kernels, by architecture, kernel, width and norm."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

Kernel = Literal["fwd", "bwd"]


class Key(NamedTuple):
    """An entry of the table: rows of up to `width` elements, with or without the `norm`."""

    architecture: int
    kernel: Kernel
    width: int
    norm: bool


@dataclass(frozen=True)
class Config:
    """A program of `num_warps` warps processes `rows` rows of the sequence."""

    rows: int
    num_warps: int


KERNELS: tuple[Kernel, ...] = ("fwd", "bwd")
# The widest row that a program holds in registers without spilling.
MAX_WIDTH = 4096

# By the width, rounded up to a power of two. Both kernels are bound by memory and need many 16-byte loads in flight.
# Chosen from the compiled code; not measured yet.
_BY_WIDTH = {
    128: Config(rows=4, num_warps=1),
    256: Config(rows=2, num_warps=1),
    512: Config(rows=1, num_warps=1),
    1024: Config(rows=1, num_warps=4),
    2048: Config(rows=1, num_warps=4),
    4096: Config(rows=1, num_warps=16),
}
# Architecture 0 is the interpreter, whose cost is the number of programs.
TABLE: dict[Key, Config] = {
    Key(architecture, kernel, width, norm): config if architecture else Config(rows=16, num_warps=1)
    for architecture, kernel, norm in product((80, 90, 100, 0), KERNELS, (False, True))
    for width, config in _BY_WIDTH.items()
}


def choose(architecture: int, kernel: Kernel, width: int, norm: bool) -> Config:
    """Return the configuration for rows of `width` elements, 1 to `MAX_WIDTH`."""
    return TABLE[Key(architecture, kernel, next(w for w in _BY_WIDTH if w >= width), norm)]


def override(key: Key, config: Config) -> None:
    """Use `config` for the entry `key` from now on: what a profile or a search found."""
    TABLE[key] = config


def candidates(key: Key) -> list[Config]:
    """Return the candidates for `TABLE[key]`: 4 to 32 elements per thread."""
    return [
        Config(rows, num_warps)
        for rows in (1, 2, 4, 8)
        for num_warps in (1, 2, 4, 8, 16)
        if 4 <= rows * key.width // (32 * num_warps) <= 32
    ]
