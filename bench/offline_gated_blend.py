"""What to compile of the gated blend: every entry of its table, and what makes other code of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprompt.kernels.triton import gated_blend as kernels

B, N, START, LENGTH = 4, 207, 1, 10
# One for each width of the table.
WIDTHS = (96, 192, 384, 768, 1536, 4096)
EPS = 1e-6


def entries() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a name and a call for each entry of the table in each dtype: with the norm, in bfloat16 without too."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in WIDTHS:
            name = f"[{B}, {N}, {D}] {str(dtype).removeprefix('torch.')}"
            yield f"{name}, norm", partial(kernels.forward, *_blend(D, dtype), *_affine(D, dtype), EPS)
            yield f"{name}, norm", partial(kernels.backward, *_gradient(D, dtype, norm=True), [True] * 3)
            if dtype == torch.bfloat16:
                yield name, partial(kernels.forward, *_blend(D, dtype), None, None, None)
                yield name, partial(kernels.backward, *_gradient(D, dtype, norm=False), [True] * 3)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield, in bfloat16: the norm's gradient alone, prompts and gate alone, and rows odd in size."""
    dtype = torch.bfloat16
    of_norm = _gradient(768, dtype, norm=True)[:6]
    yield "no gate, norm", partial(kernels.backward, *of_norm, None, None, 0, 0, [True, False, False])
    of_blend = _gradient(768, dtype, norm=False)
    yield "prompts alone", partial(kernels.backward, *of_blend, [False, True, True])
    yield "width 1000, norm", partial(kernels.forward, *_blend(1000, dtype), *_affine(1000, dtype), EPS)
    yield "width 1000, norm", partial(kernels.backward, *_gradient(1000, dtype, norm=True), [True] * 3)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gate() -> Tensor:
    return _meta((), torch.float32)


def _blend(D: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, delta, the prompt rows of an earlier sequence, gate, start and length."""
    x, delta, before = (_meta((B, N, D), dtype) for _ in range(3))
    return x, delta, before[:, START : START + LENGTH], _gate(), START, LENGTH


def _affine(D: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return _meta((D,), dtype), _meta((D,), dtype)


def _gradient(D: int, dtype: torch.dtype, norm: bool) -> tuple[Any, ...]:
    """What the backward takes but `needs`."""
    grad_y, grad_normed, y = (_meta((B, N, D), dtype) for _ in range(3))
    mean, rstd = (_meta((B, N), torch.float32) for _ in range(2))
    of_norm = (grad_normed, y, mean, rstd, _affine(D, dtype)[0]) if norm else (None,) * 5
    return grad_y, *of_norm, _gate(), _meta((B, LENGTH, D), dtype), START, LENGTH
