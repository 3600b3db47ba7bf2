"""What to compile of folded cross-attention: every entry of its table, and what makes other code of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastprompt.kernels.triton import folded_cross_attention as kernels
from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton.folded_cross_attention_config import limit, split

B, N, D = 64, 197, 768
NO_NORM = (None, None, None)  # weight, bias, eps
# (heads, prompts): tiles of 128 columns, 128 + 64, 128 + 32 + 64 + 16, 128 + 64 + 64 + 32.
SHAPES = ((8, 16), (12, 16), (12, 20), (12, 24))
# In one or two tiles, which hold most of what a program has room for; and with padding.
SHAPES_TOO = ((16, 16), (12, 10), (3, 20))


def entries() -> Iterator[tuple[str, Callable[[], object]]]:
    """A name and a call for each entry of the table in each dtype: with the residual, biases and all gradients."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for H, P, name in _served(SHAPES, dtype):
            yield name, partial(kernels.forward, *_inputs(H, P, D, dtype, dtype), True, *NO_NORM, True)
            yield name, partial(kernels.backward, *_gradient(H, P, D, dtype, dtype), True, [True] * 5)
            if (
                dtype == torch.bfloat16
            ):  # what needs the most registers: the norm, with float32 rows as autocast has them
                yield f"{name}, float32 rows, norm", _normed(H, P, D, torch.float32, dtype)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """The other shapes, the norm, and float32 rows; then what inference runs, prompts alone, and an odd width."""
    for dtype in (torch.bfloat16, torch.float32):
        for H, P, name in _served(SHAPES, dtype):
            yield f"{name}, norm", _normed(H, P, D, dtype, dtype)
    low, wide = torch.bfloat16, torch.float32
    for H, P, name in _served(SHAPES_TOO, low):
        yield name, partial(kernels.forward, *_inputs(H, P, D, low, low), True, *NO_NORM, True)
        yield name, partial(kernels.backward, *_gradient(H, P, D, low, low), True, [True] * 5)
    for H, P, name in _served(SHAPES + SHAPES_TOO, low):
        name += ", float32 rows"
        yield f"{name}, norm", _normed(H, P, D, wide, low)
        yield name, partial(kernels.forward, *_inputs(H, P, D, wide, low), True, *NO_NORM, True)
        yield name, partial(kernels.backward, *_gradient(H, P, D, wide, low), True, [True] * 5)
    H, P = 12, 10
    x, *folded, _ = _inputs(H, P, D, low, low)
    yield "inference, no residual", partial(kernels.forward, x, *folded, None, False, *NO_NORM, False)
    prompts = [False, True, True, True, False]
    yield "prompts alone", partial(kernels.backward, *_gradient(H, P, D, low, low), False, prompts)
    yield "width 1000", partial(kernels.forward, *_inputs(H, P, 1000, low, low), True, *NO_NORM, True)
    yield "width 1000, norm", _normed(H, P, 1000, low, low)
    yield "width 1000", partial(kernels.backward, *_gradient(H, P, 1000, low, low), True, [True] * 5)


def _served(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> Iterator[tuple[int, int, str]]:
    """Those shapes whose columns a program has room for, with a name."""
    room = limit(launch.architecture(torch.device("meta")), dtype.itemsize)
    for H, P in shapes:
        if split(H, P).total <= room:
            yield H, P, f"H={H} P={P} {str(dtype).removeprefix('torch.')}"


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _inputs(H: int, P: int, width: int, wide: torch.dtype, low: torch.dtype) -> tuple[Tensor, ...]:
    """x in `wide`; key, bias, value and out_bias in `low`."""
    key, value = (_meta((H, P, width), low) for _ in range(2))
    return _meta((B, N, width), wide), key, _meta((H, P), low), value, _meta((width,), low)


def _normed(H: int, P: int, width: int, wide: torch.dtype, low: torch.dtype) -> Callable[[], object]:
    """A call of the forward with the norm, whose weights are in `low`."""
    norm = (_meta((width,), low) for _ in range(2))
    return partial(kernels.forward, *_inputs(H, P, width, wide, low), True, *norm, 1e-6, True)


def _gradient(H: int, P: int, width: int, wide: torch.dtype, low: torch.dtype) -> tuple[Tensor, ...]:
    """grad and x in `wide`; key, value and weights in `low`."""
    x, key, _, value, _ = _inputs(H, P, width, wide, low)
    return _meta((B, N, width), wide), x, key, value, _meta((B, N, H, P), low)
