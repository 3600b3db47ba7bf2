"""`residual_norm`: residual add, with layer scale, and the LayerNorm that follows, in one dtype and under autocast."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench import baselines
from bench.ops import Case, Compilation, Inputs, Operation, Size, compiled, meta, ours
from bench.roofline import ViT, Work
from fastprompt import ops
from fastprompt.kernels.triton.residual_norm_config import Key

EPS = 1e-6


def work(B: int, N: int, D: int, *, itemsize: int = 2, stream: int = 2) -> tuple[Work, Work]:
    """Return the work of a forward and a backward; the LayerNorm is frozen.

    The forward reads x and delta, and writes y, LayerNorm(y), and each row's mean and deviation. The backward reads
    both gradients and y, and writes the gradient of x, which is that of delta too if they have one dtype.

    Args:
        itemsize, stream: bytes of an element of delta and LayerNorm(y), and of x and y.
    """
    forward = B * N * D * (2 * stream + 2 * itemsize) + 2 * D * stream + 8 * B * N
    backward = B * N * D * (3 * stream + itemsize) + D * stream + 8 * B * N
    if stream != itemsize:
        backward += B * N * D * itemsize
    return Work(forward, 0), Work(backward, 0)


def floors(B: int, vit: ViT, P: int) -> tuple[Work, Work]:
    """Return the work for a block of `vit`, whose prompts are only keys and values."""
    return work(B, vit.N, vit.D)


def case(B: int, N: int, D: int, dtype: torch.dtype, device: str, *, autocast: bool = False) -> Case:
    """Return the residual add and its LayerNorm; with `autocast` the residual stream and weights are float32."""
    stream = torch.float32 if autocast else dtype

    def draw() -> Inputs:
        x, delta = torch.randn(2, B, N, D, device=device)
        weight, bias = torch.randn(2, D, device=device, dtype=stream)
        return {"x": x.to(stream), "delta": delta.to(dtype), "weight": weight, "bias": bias}

    def call(backend: str, x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> Any:
        with torch.autocast(x.device.type, dtype, enabled=autocast):
            return ops.residual_norm(x, delta, None, ops.Norm(weight, bias, EPS), backend=backend)

    return Case(
        "residual_norm_autocast" if autocast else "residual_norm",
        {"B": B, "N": N, "D": D},
        dtype,
        draw,
        baselines.residual,
        ours("residual_norm", device, lambda backend: partial(call, backend)),
        {"eager": baselines.residual, **compiled(baselines.residual, device)},
        work(B, N, D, itemsize=dtype.itemsize, stream=stream.itemsize),
        frozen=("weight", "bias"),
    )


def cases(size: Size) -> Iterator[Case]:
    """Yield the comparisons at `size`: under autocast, and in one dtype."""
    for autocast in (True, False) if size.dtype.itemsize == 2 else (False,):
        yield case(size.B, size.N, size.D, size.dtype, size.device, autocast=autocast)


def reach(key: Key, images: int, widest: bool) -> Case:
    """Return a case that the table's entry `key` serves: three quarters of its width, or all of it."""
    return case(
        images, 197, key.width if widest else key.width * 3 // 4, torch.bfloat16, "cuda", autocast=True
    )


# Offline compilation -------------------------------------------------------------------------------------------------

WIDTHS = (96, 192, 384, 768, 1536, 2048, 4096)  # each width of the table
LOW, WIDE = torch.bfloat16, torch.float32


def entries() -> Iterator[Compilation]:
    """Yield the launches for each width in each dtype, and what needs the most: autocast with layer scale."""
    for (rows, dtype), D in product(((WIDE, LOW), (LOW, LOW), (torch.float16,) * 2, (WIDE, WIDE)), WIDTHS):
        yield from _launches(D, rows, dtype, scale=rows != dtype)


def variants() -> Iterator[Compilation]:
    """Yield autocast without layer scale, a width whose rows are not aligned, and one gradient alone."""
    yield from _launches(768, WIDE, LOW, scale=False)
    yield from _launches(1000, WIDE, LOW, scale=True)
    _, (_, backward) = _launches(768, LOW, LOW, scale=False)
    yield "the norm's gradient alone", partial(backward.func, None, *backward.args[1:])
    yield "y's gradient alone", partial(backward.func, backward.args[0], None, *backward.args[2:])


def _launches(D: int, rows: torch.dtype, dtype: torch.dtype, *, scale: bool) -> Iterator[Compilation]:
    """Yield a forward and a backward; `rows` is the dtype of x and y."""
    from fastprompt.kernels.triton import residual_norm as kernels

    B, N = 4, 207
    name = f"[{B}, {N}, {D}] {str(dtype).removeprefix('torch.')}{', float32 rows' * (rows != dtype)}"
    name += ", scale" * scale
    x, delta, statistics = meta(B, N, D, dtype=rows), meta(B, N, D, dtype=dtype), meta(B, N)
    vector = meta(D, dtype=rows)
    scale_or_none = vector if scale else None
    yield name, partial(kernels.forward, x, delta, scale_or_none, vector, vector, EPS)
    saved = (x, statistics, statistics, vector, scale_or_none)
    yield name, partial(kernels.backward, x, delta, *saved, dtype, [True, scale or rows != dtype])


OPERATION = Operation("residual_norm", cases, floors, reach, entries, variants)
