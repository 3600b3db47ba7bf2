"""`gated_blend`: residual add with gated prompt rows, alone or with the LayerNorm that follows."""

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
from fastprompt.kernels.triton.gated_blend_config import Key

EPS = 1e-6


def work(B: int, N: int, P: int, D: int, *, norm: bool, itemsize: int = 2) -> tuple[Work, Work]:
    """Return the work of a forward and a backward; `N` counts the prompts, and the LayerNorm is frozen.

    The forward reads two tensors and the prompt rows and writes one; the backward reads the gradient and, for the gate,
    P rows, and writes a gradient for x and delta and one for P rows. With the norm the forward writes a second tensor
    and each row's mean and deviation, and the backward reads y and a second gradient.
    """
    row = itemsize * D
    forward, backward = row * B * (3 * N + P), row * B * (2 * N + 2 * P)
    if norm:
        forward += row * (B * N + 2) + 8 * B * N
        backward += row * (2 * B * N + 1) + 8 * B * N
    return Work(forward, 0), Work(backward, 0)


def floors(B: int, vit: ViT, P: int) -> tuple[Work, Work]:
    """Return the work for a block of `vit` with `P` prompts, with the norm."""
    return work(B, vit.N + P, P, vit.D, norm=True)


def case(B: int, N: int, P: int, D: int, dtype: torch.dtype, device: str, *, norm: bool = False) -> Case:
    """Return the gated residual add, with the LayerNorm that follows if `norm`; `N` counts the prompts."""

    def draw() -> Inputs:
        x, delta, prompts = (torch.randn(B, n, D, device=device, dtype=dtype) for n in (N, N, P))
        gate = torch.rand((), device=device, dtype=dtype)
        affine = {n: torch.randn(D, device=device, dtype=dtype) for n in (("weight", "bias") if norm else ())}
        return {"x": x, "delta": delta, "prompt_in": prompts, "gate": gate, **affine}

    def call(
        backend: str, x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, **affine: Tensor
    ) -> Any:
        given = ops.Norm(**affine, eps=EPS) if norm else None
        y, normed = ops.gated_blend(x, delta, prompt_in, gate, 1, P, norm=given, backend=backend)
        return (y, normed) if norm else y

    plain = partial(baselines.blend, start=1)
    return Case(
        "gated_blend_norm" if norm else "gated_blend",
        {"B": B, "N": N, "P": P, "D": D},
        dtype,
        draw,
        plain,
        ours("gated_blend", device, lambda backend: partial(call, backend)),
        {"eager": plain, **compiled(plain, device)},
        work(B, N, P, D, norm=norm, itemsize=dtype.itemsize),
        frozen=("weight", "bias"),
    )


def cases(size: Size) -> Iterator[Case]:
    """Yield the comparisons at `size`, with 50 prompts."""
    for norm in (True, False):
        yield case(size.B, size.N + 50, 50, size.D, size.dtype, size.device, norm=norm)


def reach(key: Key, images: int, widest: bool) -> Case:
    """Return a case that the table's entry `key` serves: three quarters of its width, or all of it."""
    width = key.width if widest else key.width * 3 // 4
    return case(images, 247, 50, width, torch.bfloat16, "cuda", norm=key.norm)


# Offline compilation -------------------------------------------------------------------------------------------------

WIDTHS = (96, 192, 384, 768, 1536, 4096)  # one for each width of the table


def entries() -> Iterator[Compilation]:
    """Yield the launches for each entry of the table: with the norm in each dtype, without it in bfloat16."""
    for dtype, D in product((torch.bfloat16, torch.float16, torch.float32), WIDTHS):
        yield from _launches(D, dtype, norm=True)
        if dtype == torch.bfloat16:
            yield from _launches(D, dtype, norm=False)


def variants() -> Iterator[Compilation]:
    """Yield autocast's dtypes, a width whose rows are not aligned, and the gradients of prompts and gate alone."""
    (_, forward), (_, backward) = _launches(768, torch.bfloat16, norm=True)
    x, low, (prompts, *rest) = meta(4, 207, 768), *forward.args[1:2], forward.args[2:]
    yield "autocast", partial(forward.func, x, low, prompts.float(), *rest)
    needs = [True] * 4
    yield "autocast", partial(backward.func, x, low, x, *backward.args[3:-2], torch.bfloat16, needs)
    yield from _launches(1000, torch.bfloat16, norm=True)
    _, (_, backward) = _launches(768, torch.bfloat16, norm=False)
    yield "prompts alone", partial(backward.func, *backward.args[:-1], [False, False, True, True])


def _launches(D: int, dtype: torch.dtype, norm: bool) -> Iterator[Compilation]:
    """Yield a forward and a backward for everything; the prompt rows are a view of an earlier sequence."""
    from fastprompt.kernels.triton import gated_blend as kernels

    B, N, start, P = 4, 207, 1, 10
    name = f"[{B}, {N}, {D}] {str(dtype).removeprefix('torch.')}{', norm' if norm else ''}"
    x, vector, statistics, gate = meta(B, N, D, dtype=dtype), meta(D, dtype=dtype), meta(B, N), meta()
    affine = (vector, vector, EPS) if norm else (None,) * 3
    saved = (x, x, statistics, statistics, vector) if norm else (None,) * 5
    yield name, partial(kernels.forward, x, x, x[:, start : start + P], gate, start, P, *affine)
    difference = meta(B, P, D, dtype=dtype)
    needs = [True, False, True, True]  # d(delta) is d(x)
    yield name, partial(kernels.backward, x, *saved, gate, difference, start, P, dtype, needs)


OPERATION = Operation("gated_blend", cases, floors, reach, entries, variants)
