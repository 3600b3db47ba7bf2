"""How much plain PyTorch may err in a low precision: the part of the project's rule that draws random roundings.

:mod:`fastprompt.ops.trust` and the tests and benchmarks (`bench/correctness.py`) judge by it:

    error <= 2 · max(plain PyTorch's error, E) + 6 · S + one rounding of the result

E and S are the root mean square and the spread of plain PyTorch's error when every intermediate result is rounded once
more, at random. They say what one run cannot: the error of a single number is as often near zero as large, and a sum
that cancels has the errors of its terms, however small it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# Operators that move numbers and round nothing.
COPIES = frozenset(f"aten::{name}" for name in ("_to_copy", "cat", "clone", "copy_", "index_select", "stack"))
# How often plain PyTorch runs with its intermediate results rounded at random, and how many deviations from the mean
# may be chance: one in 10^9 for a normal distribution, so that no seed and no machine meets it.
DRAWS = 16
DEVIATIONS = 6.0


def allowed(
    dtype: torch.dtype, size: float, count: int, usual: float, typical: float = 0.0, spread: float = 0.0
) -> float:
    """Return the largest error that a result may have.

    Args:
        dtype: of the result.
        size: the 2-norm of the exact result.
        count: its number of elements.
        usual: plain PyTorch's error.
        typical, spread: E and S of :func:`chance`.
    """
    finfo = torch.finfo(dtype)
    rounding = finfo.eps * (size + finfo.smallest_normal * math.sqrt(count))
    return 2 * max(usual, typical) + DEVIATIONS * spread + rounding


def chance(errors: Sequence[float], count: int) -> tuple[float, float]:
    """Return the root mean square and the deviation of a result's errors under random roundings."""
    squares = torch.tensor(errors, dtype=torch.float64).square()
    mean = squares.mean().item()
    # The squared norm of n independent errors varies by 2 / n of its square; that of a few large or dependent ones by
    # more, as the draws show.
    variation = (squares / mean).var().item() if mean else 0.0
    return math.sqrt(mean), math.sqrt(mean * max(variation / 2, 1 / count))


class RandomRounding(TorchDispatchMode):
    """Round each result of an operator once more, at random, and change it by up to two units of float32.

    The first has the variance of a rounding, 1/12 of a square unit in the last place: one number in twelve moves to a
    neighbour. The second stands for the sums inside the operator, which are kept in float32 at least: processors add up
    in different orders, and fused kernels make some results twice.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        return out if is_view or func._schema.name in COPIES else tree_map_only(Tensor, self._round, out)

    def _round(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            generator = self.generators.get(x.device)
            if generator is None:
                generator = self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
            u, w = torch.rand(2, *x.shape, generator=generator, dtype=torch.float64, device=x.device)
            # A little more than half a unit, so that a power of two moves as well.
            rounding = 0.51 * torch.finfo(x.dtype).eps * ((u > 23 / 24).double() - (u < 1 / 24).double())
            x.copy_(x.double() * (1 + rounding + torch.finfo(torch.float32).eps * (4 * w - 2)))
        return x
