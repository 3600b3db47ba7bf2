"""The operations, each with all that the measurements know of it in one module; the most important first.

To add an operation, write `bench/cases/<name>.py` with an `OPERATION` (`bench.ops.Operation`) and name it here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.ops import Operation

# Names only, so that `bench.gpu_check` can start its parts without importing torch.
NAMES = ("prompt_attention", "residual_norm", "gated_blend", "folded_cross_attention", "row_attention")


def load(name: str) -> Operation:
    """Return the operation `name`, one of `NAMES`."""
    return import_module(f"bench.cases.{name}").OPERATION


def operations() -> list[Operation]:
    """Return all operations."""
    return [load(name) for name in NAMES]
