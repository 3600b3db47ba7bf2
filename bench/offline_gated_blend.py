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
    """A name and a call for each entry of the table in each dtype, with the norm."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in WIDTHS:
            name = f"[{B}, {N}, {D}] {str(dtype).removeprefix('torch.')}, norm"
            yield name, partial(kernels.norm_forward, *_blend(D, dtype), *_affine(D, dtype), EPS)
            yield name, partial(kernels.norm_backward, *_norm_gradient(D, dtype), True, True, True)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """In bfloat16: without the norm, without a gate, for prompts and gate alone, and of rows odd in size."""
    dtype = torch.bfloat16
    for D in WIDTHS:
        name = f"[{B}, {N}, {D}] {str(dtype).removeprefix('torch.')}"
        yield name, partial(kernels.forward, *_blend(D, dtype))
        yield name, partial(kernels.backward, *_gradient(D, dtype), True, True, True)
    D = 768
    x, delta, *_ = _blend(D, dtype)
    plain = (x, delta, _meta((B, 0, D), dtype), None, 0, 0)
    yield "no gate, norm", partial(kernels.norm_forward, *plain, *_affine(D, dtype), EPS)
    y, normed, *saved = _norm_gradient(D, dtype)
    yield (
        "no gate, norm",
        partial(kernels.norm_backward, y, normed, *saved[:4], None, None, 0, 0, True, False, False),
    )
    yield "prompts alone", partial(kernels.backward, *_gradient(D, dtype), False, True, True)
    yield "width 1000, norm", partial(kernels.norm_forward, *_blend(1000, dtype), *_affine(1000, dtype), EPS)
    yield "width 1000, norm", partial(kernels.norm_backward, *_norm_gradient(1000, dtype), True, True, True)


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


def _gradient(D: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return _meta((B, N, D), dtype), _gate(), _meta((B, LENGTH, D), dtype), START, LENGTH


def _norm_gradient(D: int, dtype: torch.dtype) -> tuple[Any, ...]:
    grad_y, grad_normed, y = (_meta((B, N, D), dtype) for _ in range(3))
    mean, rstd = (_meta((B, N), torch.float32) for _ in range(2))
    grad, gate, difference, start, length = _gradient(D, dtype)
    return grad_y, grad_normed, y, mean, rstd, _affine(D, dtype)[0], gate, difference, start, length
