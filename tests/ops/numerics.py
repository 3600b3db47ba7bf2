"""Backends, dtypes and memory layouts for the tests of the operations; bench/correctness.py judges the numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastprompt.ops import dispatch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def backends_of(operation: str) -> list[str]:
    """The backends with a kernel for `operation` in this process."""
    return [name for name in dispatch.BACKENDS if dispatch.why_missing(operation, name) is None]


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """What `backend` computes in, widest first; it refuses the others, which test_triton_backend.py checks."""
    if backend != "triton":
        return FLOATS
    return FLOATS[1:] if torch.cuda.is_available() else (torch.float32, torch.float16)


def skip_unless_served(operation: str, backend: str, *arguments: object) -> None:
    """Skip a shape that a kernel says it has no room for; `eager` serves all of them."""
    reason = dispatch.why_not(operation, backend, *arguments)
    if reason is not None:
        pytest.skip(reason)


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """The bytes that autograd keeps for the backward of `function()`."""
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        total += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return total


# Memory layouts: each takes a tensor [B, N, C, d] and gives one of equal values in other strides, NaN in the gaps, so
# that a kernel that reads past a row returns NaN. (`expanded` gives its first image's values to all.)


def packed(x: Tensor) -> Tensor:
    """One of three interleaved tensors, as `qkv.reshape(B, N, 3, H, d)[:, :, 1]`."""
    buffer = x.new_full((*x.shape[:2], 3, *x.shape[2:]), torch.nan)
    buffer[:, :, 1] = x
    return buffer[:, :, 1]


def transposed(x: Tensor) -> Tensor:
    """Heads before rows in memory, as SDPA's callers have them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def odd_strides(x: Tensor) -> Tensor:
    """Gaps after every row, head and element, and a start that is aligned to nothing."""
    B, N, C, d = x.shape
    buffer = x.new_full((B, N + 1, C + 1, 2 * d + 3), torch.nan)
    view = buffer[:, 1:, :C, 1 : 2 * d + 1 : 2]
    view.copy_(x)
    return view


def last_dimension_first(x: Tensor) -> Tensor:
    """head_dim outermost in memory."""
    return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def expanded(x: Tensor) -> Tensor:
    """The first image for all, with a stride of 0."""
    return x[:1].expand_as(x)


LAYOUTS = (packed, transposed, odd_strides, last_dimension_first, expanded)
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
