"""Tile sizes of the prompt segment, by architecture, kernel and kind of shape."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

Kernel = Literal["fwd", "dq", "bwd"]


class Key(NamedTuple):
    """An entry of the table: heads of up to `head_dim`, elements of `itemsize` bytes, up to `prompts` in a tile.

    Architecture 0 is the interpreter. IEEE float32 runs on the same units everywhere: architecture 80.
    """

    architecture: int
    kernel: Kernel
    head_dim: int
    prompts: int
    itemsize: int


@dataclass(frozen=True)
class Config:
    """Rows of queries in a tile, the maximum number of prompts in one, warps, and stages of the pipeline."""

    block_m: int
    block_p: int
    num_warps: int
    num_stages: int


# Compiled for every architecture, measured on none yet.
TABLE: dict[Key, Config] = {
    Key(0, "fwd", 64, 64, 2): Config(128, 64, 4, 1),
    Key(0, "fwd", 64, 128, 2): Config(128, 64, 4, 1),
    Key(0, "fwd", 128, 64, 2): Config(128, 64, 4, 1),
    Key(0, "fwd", 128, 128, 2): Config(128, 64, 4, 1),
    Key(0, "dq", 64, 64, 2): Config(128, 64, 4, 1),
    Key(0, "dq", 64, 128, 2): Config(128, 64, 4, 1),
    Key(0, "dq", 128, 64, 2): Config(128, 64, 4, 1),
    Key(0, "dq", 128, 128, 2): Config(128, 64, 4, 1),
    Key(0, "bwd", 64, 64, 2): Config(128, 64, 4, 1),
    Key(0, "bwd", 64, 128, 2): Config(128, 64, 4, 1),
    Key(0, "bwd", 128, 64, 2): Config(128, 64, 4, 1),
    Key(0, "bwd", 128, 128, 2): Config(128, 64, 4, 1),
    Key(80, "fwd", 64, 64, 2): Config(64, 64, 4, 2),
    Key(80, "fwd", 64, 128, 2): Config(64, 64, 4, 2),
    Key(80, "fwd", 128, 64, 2): Config(32, 64, 8, 2),
    Key(80, "fwd", 128, 128, 2): Config(32, 64, 8, 2),
    Key(80, "dq", 64, 64, 2): Config(64, 64, 4, 2),
    Key(80, "dq", 64, 128, 2): Config(64, 64, 4, 2),
    Key(80, "dq", 128, 64, 2): Config(32, 64, 8, 2),
    Key(80, "dq", 128, 128, 2): Config(32, 64, 8, 2),
    Key(80, "bwd", 64, 64, 2): Config(32, 64, 4, 2),
    Key(80, "bwd", 64, 128, 2): Config(32, 128, 8, 2),
    Key(80, "bwd", 128, 64, 2): Config(16, 64, 8, 1),
    Key(80, "bwd", 128, 128, 2): Config(32, 64, 8, 2),
    Key(90, "fwd", 64, 64, 2): Config(64, 64, 4, 2),
    Key(90, "fwd", 64, 128, 2): Config(64, 64, 4, 2),
    Key(90, "fwd", 128, 64, 2): Config(64, 64, 8, 2),
    Key(90, "fwd", 128, 128, 2): Config(64, 64, 8, 2),
    Key(90, "dq", 64, 64, 2): Config(64, 64, 4, 2),
    Key(90, "dq", 64, 128, 2): Config(64, 64, 4, 2),
    Key(90, "dq", 128, 64, 2): Config(64, 64, 8, 2),
    Key(90, "dq", 128, 128, 2): Config(64, 64, 8, 2),
    Key(90, "bwd", 64, 64, 2): Config(64, 64, 4, 2),
    Key(90, "bwd", 64, 128, 2): Config(64, 128, 8, 2),
    Key(90, "bwd", 128, 64, 2): Config(32, 64, 8, 1),
    Key(90, "bwd", 128, 128, 2): Config(32, 128, 8, 1),
    Key(100, "fwd", 64, 64, 2): Config(64, 64, 4, 2),
    Key(100, "fwd", 64, 128, 2): Config(64, 64, 4, 2),
    Key(100, "fwd", 128, 64, 2): Config(64, 64, 4, 1),
    Key(100, "fwd", 128, 128, 2): Config(64, 64, 4, 1),
    Key(100, "dq", 64, 64, 2): Config(64, 64, 4, 2),
    Key(100, "dq", 64, 128, 2): Config(64, 64, 4, 2),
    Key(100, "dq", 128, 64, 2): Config(64, 64, 8, 2),
    Key(100, "dq", 128, 128, 2): Config(64, 64, 8, 2),
    Key(100, "bwd", 64, 64, 2): Config(32, 64, 4, 2),
    Key(100, "bwd", 64, 128, 2): Config(32, 128, 8, 2),
    Key(100, "bwd", 128, 64, 2): Config(32, 64, 8, 2),
    Key(100, "bwd", 128, 128, 2): Config(32, 128, 8, 2),
    Key(0, "fwd", 64, 64, 4): Config(128, 64, 4, 1),
    Key(0, "fwd", 64, 128, 4): Config(128, 64, 4, 1),
    Key(0, "fwd", 128, 64, 4): Config(128, 64, 4, 1),
    Key(0, "fwd", 128, 128, 4): Config(128, 64, 4, 1),
    Key(0, "dq", 64, 64, 4): Config(128, 64, 4, 1),
    Key(0, "dq", 64, 128, 4): Config(128, 64, 4, 1),
    Key(0, "dq", 128, 64, 4): Config(128, 64, 4, 1),
    Key(0, "dq", 128, 128, 4): Config(128, 64, 4, 1),
    Key(0, "bwd", 64, 64, 4): Config(128, 64, 4, 1),
    Key(0, "bwd", 64, 128, 4): Config(128, 64, 4, 1),
    Key(0, "bwd", 128, 64, 4): Config(128, 64, 4, 1),
    Key(0, "bwd", 128, 128, 4): Config(128, 64, 4, 1),
    Key(80, "fwd", 64, 64, 4): Config(32, 16, 8, 1),
    Key(80, "fwd", 64, 128, 4): Config(32, 16, 8, 1),
    Key(80, "fwd", 128, 64, 4): Config(16, 16, 8, 1),
    Key(80, "fwd", 128, 128, 4): Config(16, 16, 8, 1),
    Key(80, "dq", 64, 64, 4): Config(32, 16, 8, 1),
    Key(80, "dq", 64, 128, 4): Config(32, 16, 8, 1),
    Key(80, "dq", 128, 64, 4): Config(16, 16, 8, 1),
    Key(80, "dq", 128, 128, 4): Config(16, 16, 8, 1),
    Key(80, "bwd", 64, 64, 4): Config(16, 32, 8, 1),
    Key(80, "bwd", 64, 128, 4): Config(16, 32, 8, 1),
    Key(80, "bwd", 128, 64, 4): Config(16, 16, 8, 1),
    Key(80, "bwd", 128, 128, 4): Config(16, 16, 8, 1),
}


def choose(architecture: int, kernel: Kernel, head_dim: int, prompts: int, itemsize: int) -> Config:
    """Return the entry for a shape; more prompts than the widest entry has take several tiles."""
    if itemsize == 4 and architecture:
        architecture = 80
    return TABLE[
        Key(architecture, kernel, 64 if head_dim <= 64 else 128, 64 if prompts <= 64 else 128, itemsize)
    ]


def prompt_tile(prompts: int, config: Config) -> int:
    """Return the columns of a tile of prompts: a power of two from 16 up to the entry's."""
    return min(config.block_p, max(16, 1 << (prompts - 1).bit_length()))


def override(key: Key, config: Config) -> None:
    """Use `config` for the entry `key` from now on: what a profile or a search found."""
    TABLE[key] = config


def candidates(key: Key) -> list[Config]:
    """Return the candidates of `bench.tune` for an entry; configurations that do not fit the GPU fail to launch."""
    return [Config(*sizes) for sizes in product((32, 64, 128), (key.prompts,), (4, 8), (1, 2, 3))]
