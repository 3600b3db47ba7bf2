"""Tile sizes of the gated blend, by architecture, kernel, width and norm."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from fastprompt.kernels.triton.residual_norm_config import (
    BY_WIDTH,
    INTERPRETED,
    KERNELS,
    Config,
    Kernel,
    rounded,
    sizes,
)


class Key(NamedTuple):
    """An entry of the table: rows of up to `width` elements, with or without the `norm`."""

    architecture: int
    kernel: Kernel
    width: int
    norm: bool


# The kernels, and so the sizes to start from, are those of the residual add with LayerNorm.
TABLE: dict[Key, Config] = {
    Key(architecture, kernel, width, norm): config if architecture else INTERPRETED
    for architecture, kernel, norm in product((80, 90, 100, 0), KERNELS, (False, True))
    for width, config in BY_WIDTH.items()
}


def choose(architecture: int, kernel: Kernel, width: int, norm: bool) -> Config:
    """Return the configuration for rows of `width` elements, 1 to `MAX_WIDTH`."""
    return TABLE[Key(architecture, kernel, rounded(width), norm)]


def override(key: Key, config: Config) -> None:
    """Use `config` for the entry `key` from now on: what a profile or a search found."""
    TABLE[key] = config


def candidates(key: Key) -> list[Config]:
    """Return the candidates for `TABLE[key]`."""
    return sizes(key.width)
