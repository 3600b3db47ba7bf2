"""The least time that a call takes on a chip: predicted from bytes and operations, not measured.

    python -m bench.roofline     prints the tables of docs/performance.md

Each operation counts its bytes and operations in `bench.cases`: each input is read once and each output written once.
Products run at the rate that a large bf16 matrix product reached, exponentials at that of the special-function units.
The largest of the three times is the floor: no kernel runs much faster. Tiles that stick out over the edge of a matrix
are computed too; `executed` counts those operations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench import cases

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
    """The work of one call: `bytes` to and from device memory, `operations` of products, `exponentials`.

    `executed`: operations with what tiles add at the edges.
    """

    bytes: int
    operations: int
    exponentials: int = 0
    executed: int = 0

    def times_us(self, chip: Chip) -> dict[str, float]:
        """Return the microseconds of each of the three."""
        return {
            "bytes": 1e6 * self.bytes / chip.bandwidth,
            "products": 1e6 * self.operations / chip.products,
            "exponentials": 1e6 * self.exponentials / chip.exponentials,
        }

    def floor_us(self, chip: Chip = H200) -> float:
        """Return the largest of them."""
        return max(self.times_us(chip).values())

    def bound(self, chip: Chip = H200) -> str:
        """Return the name of the largest."""
        times = self.times_us(chip)
        return max(times, key=times.__getitem__)

    def with_padding(self) -> Work:
        """Return the same with every operation that tiles execute; exponentials grow alike."""
        growth = self.executed / self.operations
        return replace(self, operations=self.executed, exponentials=round(self.exponentials * growth))


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


def tiled_table(name: str) -> str:
    """Return the floors of operation `name`, forward and backward, and what tiles add."""
    lines = [
        f"{name:<16} {'P':>3} | {'forward':>7} {'bound by':<9} {'tiled':>6} {'extra':>6} "
        f"| {'backward':>8} {'bound by':<9} {'tiled':>6} {'extra':>6}"
    ]
    for vit in MODELS:
        for P in PROMPTS:
            forward, backward = cases.load(name).floors(BATCH, vit, P)
            lines.append(f"{vit.name:<16} {P:>3} | {_tiled(forward, 7)} | {_tiled(backward, 8)}")
    return "\n".join(lines)


def floor_table() -> str:
    """Return the floors of the operations without a table of their own, forward / backward, and what bounds them."""
    others = cases.operations()[1:]
    lines = [f"{'':<10}{'P':>4}" + "".join(f" | {o.name:>{_WIDTH}}" for o in others)]
    for vit in MODELS:
        for P in PROMPTS[1:]:
            cells = (f" | {_floors(*o.floors(BATCH, vit, P)):>{_WIDTH}}" for o in others)
            lines.append(f"{vit.name:<10}{P:>4}" + "".join(cells))
    return "\n".join(lines)


_WIDTH = 24
_SHORT = {"bytes": "bytes", "products": "products", "exponentials": "exp"}


def _tiled(work: Work, width: int) -> str:
    padded = work.with_padding()
    extra = work.executed / work.operations - 1
    return f"{work.floor_us():>{width}.1f} {_SHORT[work.bound()]:<9} {padded.floor_us():>6.1f} {extra:>6.0%}"


def _floors(forward: Work, backward: Work) -> str:
    return f"{forward.floor_us():.1f} / {backward.floor_us():.1f} {_SHORT[forward.bound()]:>8}"


def main() -> None:
    print(
        f"Predicted floors in microseconds, {H200.name} ({H200.bandwidth / 1e12:.1f} TB/s, "
        f"{H200.products / 1e12:.0f} TFLOP/s), batch {BATCH}, bf16\n"
    )
    print(tiled_table(cases.NAMES[0]))
    print()
    print(floor_table())


if __name__ == "__main__":
    main()
