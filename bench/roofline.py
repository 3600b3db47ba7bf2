"""What each operation must move and compute, and the least time that takes on a chip: predicted, not measured.

    python -m bench.roofline     prints the tables of docs/performance.md

Each input is read once and each output written once; products are counted at the rate that a large bf16 matrix product
reached, exponentials at that of the special-function units. The largest of the three times is the floor: no kernel
runs much faster. Tiles that stick out over the edge of a matrix are computed too; `executed` counts those operations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

BATCH = 128
PROMPTS = (0, 10, 50, 100)


@dataclass(frozen=True)
class Chip:
    """Rates a second: `bandwidth` in bytes (read plus written), `products` in operations, `exponentials`."""

    name: str
    bandwidth: float
    products: float
    exponentials: float


# Bandwidth: a device-to-device copy; products: 8192 x 8192 x 8192 in bf16 on random data; both measured by PyTorch.
# Exponentials: the figure for an H100 SXM of Shah et al., "FlashAttention-3", 2024, whose processor the H200 shares.
H200 = Chip("H200", 4.3e12, 780e12, 3.9e12)


@dataclass(frozen=True)
class Work:
    """What one call must do: `bytes` to and from device memory, `operations` of products, `exponentials`.

    `executed`: operations with what tiles add at the edges.
    """

    bytes: int
    operations: int
    exponentials: int = 0
    executed: int = 0

    def times_us(self, chip: Chip) -> dict[str, float]:
        """Microseconds for each of the three."""
        return {
            "bytes": 1e6 * self.bytes / chip.bandwidth,
            "products": 1e6 * self.operations / chip.products,
            "exponentials": 1e6 * self.exponentials / chip.exponentials,
        }

    def floor_us(self, chip: Chip = H200) -> float:
        """The largest of them."""
        return max(self.times_us(chip).values())

    def bound(self, chip: Chip = H200) -> str:
        """Which one that is."""
        times = self.times_us(chip)
        return max(times, key=times.__getitem__)

    def with_padding(self) -> Work:
        """The same with every operation that tiles execute; exponentials grow alike."""
        growth = self.executed / self.operations
        return replace(self, operations=self.executed, exponentials=round(self.exponentials * growth))


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts the score matrix.

    Attributes:
        rows: query rows of a tile.
        pieces: up to `resident` keys, the columns are covered by at most three of these widths.
        columns, tail: above that, by tiles of `columns` and, for the rest, a power of two that is `tail` or more.
    """

    rows: int = 64
    pieces: tuple[int, ...] = (128, 128, 64, 32, 16)
    resident: int = 256
    columns: int = 64
    tail: int = 16

    def padded_rows(self, rows: int) -> int:
        """`rows` with what the last tile adds."""
        return -(-rows // self.rows) * self.rows

    def padded_columns(self, keys: int) -> int:
        """`keys` with what pieces or the tail add: 197 and 207 become 208, 247 becomes 256, 297 becomes 320."""
        if keys <= self.resident:
            sums = {sum(c) for n in (1, 2, 3) for c in combinations(self.pieces, n)}
            return min(s for s in sums if s >= keys)
        whole = keys // self.columns * self.columns
        rest = keys - whole
        return whole + (max(self.tail, 1 << (rest - 1).bit_length()) if rest else 0)


LOOPED = Tiles(resident=0)  # the backward in two kernels: dK and dV, then dQ
RESIDENT = Tiles(rows=32)  # the backward in one, which holds all keys; up to 256 of them


def attention(
    B: int, N: int, P: int, H: int, d: int, *, itemsize: int = 2, tiles: Tiles | None = None
) -> Work:
    """Prompt attention, forward: reads q, k, v and prompts, writes the output and one float32 log-sum-exp a row."""
    tiles = tiles or Tiles()
    return Work(
        bytes=itemsize * H * d * (4 * B * N + 2 * P) + 4 * B * H * N,
        operations=4 * B * H * d * N * (N + P),
        exponentials=B * H * N * (N + P),
        executed=4 * B * H * d * tiles.padded_rows(N) * tiles.padded_columns(N + P),
    )


def attention_backward(
    B: int, N: int, P: int, H: int, d: int, *, itemsize: int = 2, tiles: Tiles | None = None
) -> Work:
    """Its backward, everything trains: reads q, k, v, out, their gradient and prompts; writes all gradients.

    Five products are needed. With all keys resident five are executed; two kernels make scores and their gradient
    twice, which is seven.
    """
    tiles = tiles or (RESIDENT if RESIDENT.resident >= N + P else LOOPED)
    products = 5 if tiles.resident else 7
    return Work(
        bytes=itemsize * H * d * (8 * B * N + 4 * P) + 4 * B * H * N,
        operations=10 * B * H * d * N * (N + P),
        exponentials=B * H * N * (N + P),
        executed=2 * products * B * H * d * tiles.padded_rows(N) * tiles.padded_columns(N + P),
    )


def gated_blend(B: int, N: int, P: int, D: int, *, itemsize: int = 2) -> Work:
    """Residual add with gated prompt rows: reads two tensors and the prompt rows, writes one."""
    return Work(itemsize * D * B * (3 * N + P), 0)


def gated_blend_backward(B: int, N: int, P: int, D: int, *, itemsize: int = 2) -> Work:
    """Its backward: reads the gradient and, for the gate, P rows; writes a gradient for x and delta, one for P rows."""
    return Work(itemsize * D * B * (2 * N + 2 * P), 0)


def gated_blend_norm(B: int, N: int, P: int, D: int, *, itemsize: int = 2) -> Work:
    """The same and the next LayerNorm, in one pass: writes two tensors, and each row's mean and deviation."""
    return Work(itemsize * D * (B * (4 * N + P) + 2) + 8 * B * N, 0)


def gated_blend_norm_backward(B: int, N: int, P: int, D: int, *, itemsize: int = 2) -> Work:
    """Its backward, LayerNorm frozen: as :func:`gated_blend_backward`, and it reads y and a second gradient."""
    return Work(itemsize * D * (B * (4 * N + 2 * P) + 1) + 8 * B * N, 0)


def folded(
    B: int, N: int, P: int, H: int, D: int, *, itemsize: int = 2, rows: int = 64, multiple: int = 4
) -> Work:
    """Folded cross-attention with its residual add, forward: reads x and the folded prompts, writes the output.

    `multiple`: what a head's P columns are filled up to; a tile takes several heads.
    """
    tall = -(-B * N // rows) * rows
    return Work(
        bytes=itemsize * (D * (2 * B * N + 2 * H * P) + H * P + D),
        operations=4 * B * N * D * H * P,
        exponentials=B * N * H * P,
        executed=4 * tall * D * H * (-(-P // multiple) * multiple),
    )


def folded_norm(
    B: int, N: int, P: int, H: int, D: int, *, itemsize: int = 2, rows: int = 64, multiple: int = 4
) -> Work:
    """The same and the LayerNorm that follows, forward: writes two tensors, and each row's mean and deviation."""
    alone = folded(B, N, P, H, D, itemsize=itemsize, rows=rows, multiple=multiple)
    return replace(alone, bytes=alone.bytes + itemsize * D * (B * N + 2) + 8 * B * N)


def folded_backward(
    B: int, N: int, P: int, H: int, D: int, *, itemsize: int = 2, rows: int = 64, multiple: int = 4
) -> Work:
    """Its backward for x and the folded prompts: reads x and the gradient, writes dx and the prompts' gradients.

    The softmax [B, N, H, P] is kept by the forward and read here: both are counted here. Four products.
    """
    forward = folded(B, N, P, H, D, itemsize=itemsize, rows=rows, multiple=multiple)
    return Work(
        bytes=itemsize * (D * (3 * B * N + 4 * H * P) + H * P + 2 * B * N * H * P),
        operations=forward.operations * 2,
        executed=forward.executed * 2,
    )


def row_attention(B: int, N: int, P: int, H: int, D: int, *, itemsize: int = 2) -> Work:
    """One query row over unprojected rows: reads the rows once; two maps, of the query and of the output."""
    return Work(
        bytes=itemsize * D * (B * N + P + 2 * B + 2 * D),
        operations=4 * B * H * (N + P) * D + 4 * B * D * D,
        exponentials=B * H * (N + P),
    )


def row_attention_backward(B: int, N: int, P: int, H: int, D: int, *, itemsize: int = 2) -> Work:
    """Its backward: reads the rows and writes their gradient; scores, weights, and three products more."""
    return Work(
        bytes=itemsize * D * (2 * B * N + 2 * P + 3 * B + 2 * D),
        operations=10 * B * H * (N + P) * D + 4 * B * D * D,
        exponentials=B * H * (N + P),
    )


@dataclass(frozen=True)
class ViT:
    """N tokens (class token and patches, no prompts), width D, H heads, at 224 pixels."""

    name: str
    N: int
    D: int
    H: int


MODELS = (
    ViT("ViT-S/16", 197, 384, 6),
    ViT("ViT-B/16", 197, 768, 12),
    ViT("ViT-L/16", 197, 1024, 16),
    ViT("ViT-H/14", 257, 1280, 16),
)


def attention_table() -> str:
    """Floors of prompt attention, forward and backward, and what tiles add."""
    lines = [
        f"{'prompt attention':<16} {'P':>3} | {'forward':>7} {'bound by':<9} {'tiled':>6} {'extra':>6} "
        f"| {'backward':>8} {'bound by':<9} {'tiled':>6} {'extra':>6}",
    ]
    for vit in MODELS:
        for P in PROMPTS:
            size = (BATCH, vit.N, P, vit.H, vit.D // vit.H)
            lines.append(
                f"{vit.name:<16} {P:>3} | {_both(attention(*size), 7)} | {_both(attention_backward(*size), 8)}"
            )
    return "\n".join(lines)


def other_table() -> str:
    """Floors of the other operations, forward and backward."""
    lines = [
        f"{'':<10}{'P':>4} | {'blend + LayerNorm':>17} | {'folded CVPT':>27} | {'one-row attention':>17}"
    ]
    for vit in MODELS:
        for P in PROMPTS[1:]:
            B, (N, D, H) = BATCH, (vit.N, vit.D, vit.H)
            blend = gated_blend_norm(B, N + P, P, D), gated_blend_norm_backward(B, N + P, P, D)
            cross = folded(B, N, P, H, D), folded_backward(B, N, P, H, D)
            row = row_attention(B, N, P, H, D), row_attention_backward(B, N, P, H, D)
            lines.append(
                f"{vit.name:<10}{P:>4} | {_pair(*blend):>17} | {_pair(*cross):>16} {cross[0].bound():>10} "
                f"| {_pair(*row):>17}"
            )
    return "\n".join(lines)


def _both(work: Work, width: int) -> str:
    padded = work.with_padding()
    extra = work.executed / work.operations - 1
    return f"{work.floor_us():>{width}.1f} {_SHORT[work.bound()]:<9} {padded.floor_us():>6.1f} {extra:>6.0%}"


def _pair(forward: Work, backward: Work) -> str:
    return f"{forward.floor_us():.1f} / {backward.floor_us():.1f}"


_SHORT = {"bytes": "bytes", "products": "products", "exponentials": "exp"}


def main() -> None:
    print(
        f"Predicted floors in microseconds, {H200.name} ({H200.bandwidth / 1e12:.1f} TB/s, "
        f"{H200.products / 1e12:.0f} TFLOP/s), batch {BATCH}, bf16\n"
    )
    print(attention_table())
    print()
    print(other_table())


if __name__ == "__main__":
    main()
