"""How the gated blend's kernels are laid out, by architecture, kernel and width."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """`rows` of the sequence to one program of `num_warps` warps."""

    rows: int
    num_warps: int


Key = tuple[int, str, int]

KINDS = ("forward", "backward")
# The widest row that a program holds in registers without spilling.
MAX_WIDTH = 4096

# By the width, rounded up to a power of two. Both kernels are bound by memory: what counts is 16 bytes a load and
# enough of them under way. Chosen by what the compiler makes of them, not by times: none were measured yet.
_BY_WIDTH = {
    128: Config(rows=4, num_warps=1),
    256: Config(rows=2, num_warps=1),
    512: Config(rows=1, num_warps=1),
    1024: Config(rows=1, num_warps=4),
    2048: Config(rows=1, num_warps=4),
    4096: Config(rows=1, num_warps=16),
}
TABLE: dict[Key, Config] = {
    (architecture, kind, width): config
    for architecture in (80, 90, 100)
    for kind in KINDS
    for width, config in _BY_WIDTH.items()
} | {
    # The interpreter pays for every program.
    (0, kind, width): Config(rows=16, num_warps=1)
    for kind in KINDS
    for width in _BY_WIDTH
}


def choose(architecture: int, kind: str, width: int) -> Config:
    """The configuration for rows of `width` elements, 1 to `MAX_WIDTH`."""
    return TABLE[architecture, kind, next(w for w in _BY_WIDTH if w >= width)]


def candidates(key: Key) -> list[Config]:
    """What a tuner tries in place of `TABLE[key]`: 4 to 32 elements for each thread."""
    width = key[2]
    return [
        Config(rows, num_warps)
        for rows in (1, 2, 4, 8)
        for num_warps in (1, 2, 4, 8, 16)
        if 4 <= rows * width // (32 * num_warps) <= 32
    ]
