"""Tile sizes of prompt-augmented attention: frozen, one entry per kernel and kind of shape (`bench.tune` measures)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

Kernel = Literal["fwd", "dkdv", "dq", "bwd"]
# (architecture, kernel, widest head_dim, kind of length, bits of an element)
Key = tuple[int, Kernel, int, Literal["one", "short", "long"], int]

RESIDENT_KEYS = 256  # the most keys that a program of a resident kernel holds
ONE = 16  # the most queries that count as a few rows, such as one class token


@dataclass(frozen=True)
class Config:
    """Rows of queries and of keys in a tile (`block_n` 0: all keys at once), warps, and stages of the pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Compiled for every architecture, run on none yet (docs/performance.md). Architecture 0 is the interpreter.
TABLE: dict[Key, Config] = {
    (0, "fwd", 64, "one", 16): Config(16, 128, 4, 1),
    (0, "fwd", 64, "short", 16): Config(128, 0, 4, 1),
    (0, "fwd", 64, "long", 16): Config(128, 128, 4, 1),
    (0, "fwd", 128, "one", 16): Config(16, 128, 4, 1),
    (0, "fwd", 128, "short", 16): Config(128, 128, 4, 1),
    (0, "fwd", 128, "long", 16): Config(128, 128, 4, 1),
    (0, "dkdv", 64, "long", 16): Config(128, 128, 4, 1),
    (0, "dkdv", 128, "long", 16): Config(128, 128, 4, 1),
    (0, "dq", 64, "long", 16): Config(128, 128, 4, 1),
    (0, "dq", 128, "long", 16): Config(128, 128, 4, 1),
    (0, "bwd", 64, "short", 16): Config(128, 0, 4, 1),
    (80, "fwd", 64, "one", 16): Config(16, 64, 4, 2),
    (80, "fwd", 64, "short", 16): Config(64, 64, 4, 2),
    (80, "fwd", 64, "long", 16): Config(64, 64, 4, 2),
    (80, "fwd", 128, "one", 16): Config(16, 64, 4, 2),
    (80, "fwd", 128, "short", 16): Config(32, 32, 4, 2),
    (80, "fwd", 128, "long", 16): Config(32, 32, 4, 2),
    (80, "dkdv", 64, "long", 16): Config(32, 64, 4, 3),
    (80, "dkdv", 128, "long", 16): Config(16, 64, 8, 1),
    (80, "dq", 64, "long", 16): Config(64, 32, 4, 2),
    (80, "dq", 128, "long", 16): Config(32, 32, 4, 2),
    (90, "fwd", 64, "one", 16): Config(16, 64, 4, 2),
    (90, "fwd", 64, "short", 16): Config(64, 0, 4, 1),
    (90, "fwd", 64, "long", 16): Config(64, 64, 4, 2),
    (90, "fwd", 128, "one", 16): Config(16, 64, 4, 2),
    (90, "fwd", 128, "short", 16): Config(128, 64, 8, 2),
    (90, "fwd", 128, "long", 16): Config(128, 64, 8, 2),
    (90, "dkdv", 64, "long", 16): Config(64, 64, 4, 2),
    (90, "dkdv", 128, "long", 16): Config(64, 64, 8, 1),
    (90, "dq", 64, "long", 16): Config(64, 64, 4, 2),
    (90, "dq", 128, "long", 16): Config(64, 64, 8, 1),
    (90, "bwd", 64, "short", 16): Config(32, 0, 8, 1),
    (100, "fwd", 64, "one", 16): Config(16, 64, 4, 2),
    (100, "fwd", 64, "short", 16): Config(64, 64, 4, 2),
    (100, "fwd", 64, "long", 16): Config(64, 64, 4, 2),
    (100, "fwd", 128, "one", 16): Config(16, 64, 4, 2),
    (100, "fwd", 128, "short", 16): Config(64, 64, 4, 2),
    (100, "fwd", 128, "long", 16): Config(64, 64, 4, 2),
    (100, "dkdv", 64, "long", 16): Config(64, 64, 4, 1),
    (100, "dkdv", 128, "long", 16): Config(64, 64, 8, 1),
    (100, "dq", 64, "long", 16): Config(64, 64, 4, 1),
    (100, "dq", 128, "long", 16): Config(64, 64, 8, 1),
    (0, "fwd", 64, "one", 32): Config(16, 128, 4, 1),
    (0, "fwd", 64, "short", 32): Config(128, 0, 4, 1),
    (0, "fwd", 64, "long", 32): Config(128, 128, 4, 1),
    (0, "fwd", 128, "one", 32): Config(16, 128, 4, 1),
    (0, "fwd", 128, "short", 32): Config(128, 128, 4, 1),
    (0, "fwd", 128, "long", 32): Config(128, 128, 4, 1),
    (0, "dkdv", 64, "long", 32): Config(128, 128, 4, 1),
    (0, "dkdv", 128, "long", 32): Config(128, 128, 4, 1),
    (0, "dq", 64, "long", 32): Config(128, 128, 4, 1),
    (0, "dq", 128, "long", 32): Config(128, 128, 4, 1),
    (0, "bwd", 64, "short", 32): Config(128, 0, 4, 1),
    (80, "fwd", 64, "one", 32): Config(16, 32, 8, 1),
    (80, "fwd", 64, "short", 32): Config(64, 32, 8, 1),
    (80, "fwd", 64, "long", 32): Config(64, 32, 8, 1),
    (80, "fwd", 128, "one", 32): Config(16, 32, 8, 1),
    (80, "fwd", 128, "short", 32): Config(32, 32, 8, 1),
    (80, "fwd", 128, "long", 32): Config(32, 32, 8, 1),
    (80, "dkdv", 64, "long", 32): Config(16, 32, 8, 1),
    (80, "dkdv", 128, "long", 32): Config(32, 32, 8, 1),
    (80, "dq", 64, "long", 32): Config(16, 16, 8, 1),
    (80, "dq", 128, "long", 32): Config(16, 16, 8, 1),
}


def choose(kernel: Kernel, architecture: int, head_dim: int, queries: int, keys: int, bits: int) -> Config:
    """The entry for a shape; KeyError for the kernel "bwd" where :func:`has_resident_backward` says no."""
    length: Literal["one", "short", "long"] = "long"
    if kernel == "fwd":
        length = "one" if queries <= ONE else "short" if keys <= RESIDENT_KEYS else "long"
    elif kernel == "bwd":
        length = "short"
    return TABLE[_table(architecture, bits), kernel, 64 if head_dim <= 64 else 128, length, bits]


def has_resident_backward(architecture: int, head_dim: int, keys: int, bits: int) -> bool:
    """Whether one kernel, "bwd", makes all gradients; elsewhere two, "dkdv" and "dq", serve the shape better."""
    key: Key = (_table(architecture, bits), "bwd", 64 if head_dim <= 64 else 128, "short", bits)
    return keys <= RESIDENT_KEYS and key in TABLE


def _table(architecture: int, bits: int) -> int:
    # IEEE float32 runs on the same units everywhere.
    return 80 if bits == 32 and architecture else architecture


def head_pieces(head_dim: int) -> tuple[int, int]:
    """head_dim as one or two powers of two, 72 as 64 + 16: little of a product is padding."""
    for pieces in ((16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32), (128, 0)):
        if head_dim <= sum(pieces):
            return pieces
    raise ValueError(f"head_dim must be <= 128; got {head_dim}")


def key_pieces(keys: int) -> tuple[int, int, int]:
    """Up to 256 keys as at most three falling powers of two up to 128: 207 as 128 + 64 + 16."""
    for total in range(-(-keys // 16) * 16, RESIDENT_KEYS + 1, 16):
        pieces: list[int] = []
        for size in (128, 128, 64, 32, 16):
            if sum(pieces) + size <= total:
                pieces.append(size)
        if sum(pieces) == total and len(pieces) <= 3:
            first, second, third = pieces + [0] * (3 - len(pieces))
            return first, second, third
    raise ValueError(f"a resident kernel holds 1 to {RESIDENT_KEYS} keys; got {keys}")


def tail(keys: int, block: int) -> int:
    """The tile for what whole tiles of `block` keys leave over: a power of two from 16, or 0."""
    rest = keys % block
    return 0 if rest == 0 else max(16, 1 << (rest - 1).bit_length())


def candidates(key: Key) -> list[Config]:
    """What `bench.tune` tries for an entry; configurations that do not fit the card fail to launch and drop out."""
    _, kernel, _, length, _ = key
    sizes: list[tuple[int, int]] = list(product((32, 64, 128), (32, 64, 128)))
    if kernel == "fwd" and length == "one":
        sizes = [(16, n) for n in (32, 64, 128)]
    elif kernel == "fwd" and length == "short":
        sizes += [(64, 0), (128, 0)]
    elif kernel == "bwd":
        sizes = [(16, 0), (32, 0), (64, 0)]
    return [Config(m, n, warps, stages) for (m, n), warps, stages in product(sizes, (4, 8), (1, 2, 3))]
