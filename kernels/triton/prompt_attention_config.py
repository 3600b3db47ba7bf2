"""Tile sizes of prompt-augmented attention, by architecture, kernel and kind of shape (`bench.tune` measures them)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

Kernel = Literal["fwd", "dkdv", "dq", "bwd"]
Length = Literal["one", "short", "medium", "long"]

RESIDENT_KEYS = 256  # the maximum number of keys of a program of a resident kernel, and of a "short" call
MEDIUM_KEYS = 384  # 224 pixels and many prompts; more are "long", as 384 pixels are
ONE = 16  # the maximum number of queries that count as a few rows, such as one class token


class Key(NamedTuple):
    """An entry of the table: heads of up to `head_dim`, a `length`, elements of `itemsize` bytes."""

    architecture: int
    kernel: Kernel
    head_dim: int
    length: Length
    itemsize: int


@dataclass(frozen=True)
class Config:
    """Rows of queries and of keys in a tile (`block_n` 0: all keys at once), warps, and stages of the pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Compiled for every architecture, measured on none yet (docs/performance.md). Architecture 0 is the interpreter.
# On architecture 100 heads in two pieces have one stage: Triton up to 3.8 pipelines two products on one sum wrongly
# (triton-lang/triton#10821).
TABLE: dict[Key, Config] = {
    Key(0, "fwd", 64, "one", 2): Config(16, 128, 4, 1),
    Key(0, "fwd", 64, "short", 2): Config(128, 0, 4, 1),
    Key(0, "fwd", 64, "medium", 2): Config(128, 128, 4, 1),
    Key(0, "fwd", 64, "long", 2): Config(128, 128, 4, 1),
    Key(0, "fwd", 128, "one", 2): Config(16, 128, 4, 1),
    Key(0, "fwd", 128, "short", 2): Config(128, 128, 4, 1),
    Key(0, "fwd", 128, "medium", 2): Config(128, 128, 4, 1),
    Key(0, "fwd", 128, "long", 2): Config(128, 128, 4, 1),
    Key(0, "dkdv", 64, "medium", 2): Config(128, 128, 4, 1),
    Key(0, "dkdv", 64, "long", 2): Config(128, 128, 4, 1),
    Key(0, "dkdv", 128, "medium", 2): Config(128, 128, 4, 1),
    Key(0, "dkdv", 128, "long", 2): Config(128, 128, 4, 1),
    Key(0, "dq", 64, "medium", 2): Config(128, 128, 4, 1),
    Key(0, "dq", 64, "long", 2): Config(128, 128, 4, 1),
    Key(0, "dq", 128, "medium", 2): Config(128, 128, 4, 1),
    Key(0, "dq", 128, "long", 2): Config(128, 128, 4, 1),
    Key(0, "bwd", 64, "short", 2): Config(128, 0, 4, 1),
    Key(80, "fwd", 64, "one", 2): Config(16, 64, 4, 3),
    Key(80, "fwd", 64, "short", 2): Config(128, 64, 8, 3),
    Key(80, "fwd", 64, "medium", 2): Config(128, 64, 8, 3),
    Key(80, "fwd", 64, "long", 2): Config(128, 64, 8, 3),
    Key(80, "fwd", 128, "one", 2): Config(16, 64, 4, 3),
    Key(80, "fwd", 128, "short", 2): Config(128, 32, 8, 3),
    Key(80, "fwd", 128, "medium", 2): Config(128, 32, 8, 3),
    Key(80, "fwd", 128, "long", 2): Config(128, 32, 8, 3),
    Key(80, "dkdv", 64, "medium", 2): Config(32, 64, 4, 3),
    Key(80, "dkdv", 64, "long", 2): Config(32, 64, 4, 3),
    Key(80, "dkdv", 128, "medium", 2): Config(16, 64, 8, 1),
    Key(80, "dkdv", 128, "long", 2): Config(16, 64, 8, 1),
    Key(80, "dq", 64, "medium", 2): Config(64, 32, 4, 3),
    Key(80, "dq", 64, "long", 2): Config(64, 32, 4, 3),
    Key(80, "dq", 128, "medium", 2): Config(32, 32, 4, 2),
    Key(80, "dq", 128, "long", 2): Config(32, 32, 4, 2),
    Key(90, "fwd", 64, "one", 2): Config(16, 64, 4, 3),
    Key(90, "fwd", 64, "short", 2): Config(64, 0, 4, 3),
    Key(90, "fwd", 64, "medium", 2): Config(128, 64, 8, 3),
    Key(90, "fwd", 64, "long", 2): Config(128, 64, 8, 3),
    Key(90, "fwd", 128, "one", 2): Config(16, 64, 4, 3),
    Key(90, "fwd", 128, "short", 2): Config(128, 64, 8, 3),
    Key(90, "fwd", 128, "medium", 2): Config(128, 64, 8, 3),
    Key(90, "fwd", 128, "long", 2): Config(128, 64, 8, 3),
    Key(90, "dkdv", 64, "medium", 2): Config(64, 64, 4, 3),
    Key(90, "dkdv", 64, "long", 2): Config(64, 64, 4, 3),
    Key(90, "dkdv", 128, "medium", 2): Config(64, 64, 8, 3),
    Key(90, "dkdv", 128, "long", 2): Config(64, 64, 8, 3),
    Key(90, "dq", 64, "medium", 2): Config(64, 64, 4, 3),
    Key(90, "dq", 64, "long", 2): Config(64, 64, 4, 3),
    Key(90, "dq", 128, "medium", 2): Config(128, 64, 8, 2),
    Key(90, "dq", 128, "long", 2): Config(128, 64, 8, 2),
    # Triton 3.6 spills 16 bytes, outside the loop over queries; Triton 3.9 none.
    Key(90, "bwd", 64, "short", 2): Config(32, 0, 8, 2),
    Key(100, "fwd", 64, "one", 2): Config(16, 64, 4, 3),
    Key(100, "fwd", 64, "short", 2): Config(64, 0, 4, 1),
    Key(100, "fwd", 64, "medium", 2): Config(128, 64, 8, 3),
    Key(100, "fwd", 64, "long", 2): Config(128, 64, 8, 3),
    Key(100, "fwd", 128, "one", 2): Config(16, 64, 4, 3),
    Key(100, "fwd", 128, "short", 2): Config(128, 64, 8, 1),
    Key(100, "fwd", 128, "medium", 2): Config(128, 64, 8, 1),
    Key(100, "fwd", 128, "long", 2): Config(128, 64, 8, 1),
    Key(100, "dkdv", 64, "medium", 2): Config(64, 64, 4, 1),
    Key(100, "dkdv", 64, "long", 2): Config(64, 64, 4, 1),
    Key(100, "dkdv", 128, "medium", 2): Config(64, 64, 8, 1),
    Key(100, "dkdv", 128, "long", 2): Config(64, 64, 8, 1),
    Key(100, "dq", 64, "medium", 2): Config(64, 64, 4, 1),
    Key(100, "dq", 64, "long", 2): Config(64, 64, 4, 1),
    Key(100, "dq", 128, "medium", 2): Config(64, 64, 8, 1),
    Key(100, "dq", 128, "long", 2): Config(64, 64, 8, 1),
    Key(0, "fwd", 64, "one", 4): Config(16, 128, 4, 1),
    Key(0, "fwd", 64, "short", 4): Config(128, 0, 4, 1),
    Key(0, "fwd", 64, "medium", 4): Config(128, 128, 4, 1),
    Key(0, "fwd", 64, "long", 4): Config(128, 128, 4, 1),
    Key(0, "fwd", 128, "one", 4): Config(16, 128, 4, 1),
    Key(0, "fwd", 128, "short", 4): Config(128, 128, 4, 1),
    Key(0, "fwd", 128, "medium", 4): Config(128, 128, 4, 1),
    Key(0, "fwd", 128, "long", 4): Config(128, 128, 4, 1),
    Key(0, "dkdv", 64, "medium", 4): Config(128, 128, 4, 1),
    Key(0, "dkdv", 64, "long", 4): Config(128, 128, 4, 1),
    Key(0, "dkdv", 128, "medium", 4): Config(128, 128, 4, 1),
    Key(0, "dkdv", 128, "long", 4): Config(128, 128, 4, 1),
    Key(0, "dq", 64, "medium", 4): Config(128, 128, 4, 1),
    Key(0, "dq", 64, "long", 4): Config(128, 128, 4, 1),
    Key(0, "dq", 128, "medium", 4): Config(128, 128, 4, 1),
    Key(0, "dq", 128, "long", 4): Config(128, 128, 4, 1),
    Key(0, "bwd", 64, "short", 4): Config(128, 0, 4, 1),
    Key(80, "fwd", 64, "one", 4): Config(16, 32, 8, 1),
    Key(80, "fwd", 64, "short", 4): Config(64, 16, 8, 1),
    Key(80, "fwd", 64, "medium", 4): Config(64, 16, 8, 1),
    Key(80, "fwd", 64, "long", 4): Config(64, 16, 8, 1),
    Key(80, "fwd", 128, "one", 4): Config(16, 32, 8, 1),
    Key(80, "fwd", 128, "short", 4): Config(32, 32, 8, 1),
    Key(80, "fwd", 128, "medium", 4): Config(32, 32, 8, 1),
    Key(80, "fwd", 128, "long", 4): Config(32, 32, 8, 1),
    Key(80, "dkdv", 64, "medium", 4): Config(16, 32, 8, 1),
    Key(80, "dkdv", 64, "long", 4): Config(16, 32, 8, 1),
    Key(80, "dkdv", 128, "medium", 4): Config(32, 32, 8, 1),
    Key(80, "dkdv", 128, "long", 4): Config(32, 32, 8, 1),
    Key(80, "dq", 64, "medium", 4): Config(16, 16, 8, 1),
    Key(80, "dq", 64, "long", 4): Config(16, 16, 8, 1),
    Key(80, "dq", 128, "medium", 4): Config(16, 16, 8, 1),
    Key(80, "dq", 128, "long", 4): Config(16, 16, 8, 1),
}


def choose(
    architecture: int, kernel: Kernel, head_dim: int, queries: int, keys: int, itemsize: int
) -> Config:
    """Return the entry for a shape; KeyError for the kernel "bwd" where :func:`has_resident_backward` is False."""
    length: Length = "medium" if keys <= MEDIUM_KEYS else "long"
    if kernel == "fwd" and queries <= ONE:
        length = "one"
    elif kernel in ("fwd", "bwd") and keys <= RESIDENT_KEYS:
        length = "short"
    return TABLE[_key(architecture, kernel, head_dim, length, itemsize)]


def has_resident_backward(architecture: int, head_dim: int, keys: int, itemsize: int) -> bool:
    """Return whether one kernel, "bwd", computes all gradients; otherwise two, "dkdv" and "dq", are faster."""
    return keys <= RESIDENT_KEYS and _key(architecture, "bwd", head_dim, "short", itemsize) in TABLE


def _key(architecture: int, kernel: Kernel, head_dim: int, length: Length, itemsize: int) -> Key:
    if itemsize == 4 and architecture:
        architecture = 80  # IEEE float32 runs on the same units everywhere
    return Key(architecture, kernel, 64 if head_dim <= 64 else 128, length, itemsize)


def head_pieces(head_dim: int) -> tuple[int, int]:
    """Split head_dim into one or two powers of two, 72 into 64 + 16, so that products have little padding."""
    for pieces in ((16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32), (128, 0)):
        if head_dim <= sum(pieces):
            return pieces
    raise ValueError(f"head_dim must be <= 128; got {head_dim}")


def key_pieces(keys: int) -> tuple[int, int, int]:
    """Split up to 256 keys into at most three powers of two: 207 into 128 + 64 + 16, 247 into 128 + 64 + 64.

    The last one, in which padding is masked, is never 128: of two of 64, half as many columns are masked.
    """
    for total in range(-(-keys // 16) * 16, RESIDENT_KEYS + 1, 16):
        pieces: list[int] = []
        for size in (128, 64, 64, 32, 16)[total <= 128 :]:
            if sum(pieces) + size <= total:
                pieces.append(size)
        if sum(pieces) == total and len(pieces) <= 3:
            first, second, third = pieces + [0] * (3 - len(pieces))
            return first, second, third
    raise ValueError(f"a resident kernel holds 1 to {RESIDENT_KEYS} keys; got {keys}")


def tail(keys: int, block: int) -> int:
    """Return the tile for the keys left over by whole tiles of `block`: a power of two from 16, or 0."""
    rest = keys % block
    return 0 if rest == 0 else max(16, 1 << (rest - 1).bit_length())


def override(key: Key, config: Config) -> None:
    """Use `config` for the entry `key` from now on: what a profile or a search found."""
    TABLE[key] = config


def candidates(key: Key) -> list[Config]:
    """Return the candidates of `bench.tune` for an entry; configurations that do not fit the GPU fail to launch."""
    steps = (16, 32, 64) if key.itemsize == 4 else (32, 64, 128)
    sizes: list[tuple[int, int]] = list(product(steps, steps))
    if key.kernel == "fwd" and key.length == "one":
        sizes = [(16, n) for n in steps]
    elif key.kernel == "fwd" and key.length == "short":
        sizes += [(64, 0), (128, 0)]
    elif key.kernel == "bwd":
        sizes = [(16, 0), (32, 0), (64, 0)]
    return [Config(m, n, warps, stages) for (m, n), warps, stages in product(sizes, (4, 8), (1, 2, 3))]
