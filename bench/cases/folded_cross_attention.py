"""`folded_cross_attention`: CVPT with folded prompts and its residual add, alone or with the LayerNorm that follows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import baselines
from bench.ops import DTYPES, Case, Compilation, Inputs, Operation, Size, compiled, meta, ours
from bench.roofline import ViT, Work
from fastprompt import ops
from fastprompt.kernels.triton import folded_cross_attention_config as config

EPS = 1e-6


def work(
    B: int,
    N: int,
    P: int,
    H: int,
    D: int,
    *,
    norm: bool = False,
    itemsize: int = 2,
    rows: int = 64,
    multiple: int = 4,
) -> tuple[Work, Work]:
    """Return the work of a forward and a backward, both with the residual; the LayerNorm is frozen.

    The forward reads x and the folded prompts and writes the output: two products. The backward reads x and the
    gradient, and writes the gradients of x and the prompts: four products. The softmax [B, N, H, P], which the forward
    keeps and the backward reads, is counted with the backward. With the norm the forward writes a second tensor and
    each row's mean and deviation, and the backward reads y and a second gradient.

    Args:
        rows: the rows of a tile.
        multiple: what a head's P columns are filled up to; a tile takes several heads.
    """
    tall, wide = -(-B * N // rows) * rows, -(-P // multiple) * multiple
    forward = Work(
        bytes=itemsize * (D * (2 * B * N + 2 * H * P) + H * P + D),
        operations=4 * B * N * D * H * P,
        exponentials=B * N * H * P,
        executed=4 * tall * D * H * wide,
    )
    backward = Work(
        bytes=itemsize * (D * (3 * B * N + 4 * H * P) + H * P + 2 * B * N * H * P),
        operations=2 * forward.operations,
        executed=2 * forward.executed,
    )
    if norm:
        row = itemsize * D
        forward = replace(forward, bytes=forward.bytes + row * (B * N + 2) + 8 * B * N)
        backward = replace(backward, bytes=backward.bytes + row * (4 * B * N + 1) + 8 * B * N)
    return forward, backward


def floors(B: int, vit: ViT, P: int) -> tuple[Work, Work]:
    """Return the work for a block of `vit` with `P` prompts."""
    return work(B, vit.N, P, vit.H, vit.D)


def case(
    B: int, N: int, P: int, H: int, D: int, dtype: torch.dtype, device: str, *, norm: bool = False
) -> Case:
    """Return folded cross-attention with its residual add, and with the LayerNorm that follows if `norm`."""

    def draw() -> Inputs:
        x = torch.randn(B, N, D, device=device)
        key, value = (torch.randn(H, P, D, device=device) * D**-0.5 for _ in range(2))
        bias, out_bias = torch.randn(H, P, device=device), torch.randn(D, device=device)
        named = {"x": x, "key": key, "bias": bias, "value": value, "out_bias": out_bias}
        for name in ("weight", "norm_bias") if norm else ():
            named[name] = torch.randn(D, device=device)
        return {name: t.to(dtype) for name, t in named.items()}

    def call(backend: str, x: Tensor, *affine: Tensor, **prompts: Tensor) -> Any:
        affine = tuple(prompts.pop(name) for name in ("weight", "norm_bias") if norm)
        given = ops.Norm(*affine, EPS) if norm else None
        folded = ops.FoldedPrompts(**prompts)
        y, normed = ops.folded_cross_attention(x, folded, residual=True, norm=given, backend=backend)
        return (y, normed) if norm else y

    return Case(
        "folded_cross_attention_norm" if norm else "folded_cross_attention",
        {"B": B, "N": N, "P": P, "H": H, "D": D},
        dtype,
        draw,
        baselines.folded,
        ours("folded_cross_attention", device, lambda backend: partial(call, backend)),
        {"eager": baselines.folded, **compiled(baselines.folded, device)},
        work(B, N, P, H, D, norm=norm, itemsize=dtype.itemsize),
        frozen=("out_bias", "weight", "norm_bias"),
    )


def cases(size: Size) -> Iterator[Case]:
    """Yield the comparisons at `size`."""
    B, N, H, D = size.B, size.N, size.H, size.D
    on = (size.dtype, size.device)
    yield case(B, N, 10, H, D, *on)
    yield case(B, N, 10, H, D, *on, norm=True)
    for P in (20, 50) if size.device.startswith("cuda") else (50,):
        yield case(B, N, P, H, D, *on)


def reach(key: config.Key, images: int, widest: bool) -> Case:
    """Return a case that the table's entry `key` serves: ViT-B's heads, and as many prompts as its columns hold."""
    P = max(P for P in range(1, key.columns // 12 + 1) if config.split(12, P).total <= key.columns)
    return case(images, 197, P, 12, 768, DTYPES[key.itemsize], "cuda", norm=widest)


# Offline compilation -------------------------------------------------------------------------------------------------

NO_NORM = (None, None, None)  # weight, bias, eps
# (heads, prompts): tiles of 128 columns, 128 + 64, 128 + 32 + 64 + 16, 128 + 64 + 64 + 32.
SHAPES = ((8, 16), (12, 16), (12, 20), (12, 24))
# In one or two tiles, which hold most of what a program has room for; and with padding.
OTHER_SHAPES = ((16, 16), (12, 10), (3, 20))
LOW, WIDE = torch.bfloat16, torch.float32


def entries() -> Iterator[Compilation]:
    """Yield the launches for each entry of the table in each dtype, with the residual, biases and all gradients."""
    for dtype in (LOW, torch.float16, WIDE):
        for H, P in _served(SHAPES, dtype):
            yield from _launches(H, P, dtype)
            # What needs the most registers: the norm, with float32 rows as autocast has them.
            if dtype == LOW:
                yield from _launches(H, P, LOW, WIDE, norms=(True,), backward=False)


def variants() -> Iterator[Compilation]:
    """Yield the other shapes, the norm, and float32 rows; then what inference runs, prompts alone, and an odd width."""
    for dtype in (LOW, WIDE):
        for H, P in _served(SHAPES, dtype):
            yield from _launches(H, P, dtype, norms=(True,), backward=False)
    for H, P in _served(OTHER_SHAPES, LOW):
        yield from _launches(H, P, LOW)
    for H, P in _served(SHAPES + OTHER_SHAPES, LOW):
        yield from _launches(H, P, LOW, WIDE, norms=(True, False))
    (_, forward), (_, backward) = _launches(12, 10, LOW)
    x, key, bias, value, *_ = forward.args
    yield "as fold_prompts makes them", partial(forward.func, x, key, bias, value, None, True, *NO_NORM, True)
    yield "inference, no residual", partial(forward.func, x, key, bias, value, None, False, *NO_NORM, False)
    needs = [False, True, True, True, False]
    yield "prompts alone", partial(backward.func, *backward.args[:5], False, needs)
    yield from _launches(12, 10, LOW, D=1000, norms=(True, False))


def _served(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Yield those shapes whose columns a program has room for."""
    from fastprompt.kernels.triton import launch

    room = config.limit(launch.architecture(torch.device("meta")), dtype.itemsize)
    yield from ((H, P) for H, P in shapes if config.split(H, P).total <= room)


def _launches(
    H: int,
    P: int,
    dtype: torch.dtype,
    rows: torch.dtype | None = None,
    *,
    D: int = 768,
    norms: Sequence[bool] = (False,),
    backward: bool = True,
) -> Iterator[Compilation]:
    """Yield forwards with and without the norm, and a backward; `rows` is the dtype of x, if another one."""
    from fastprompt.kernels.triton import folded_cross_attention as kernels

    name = f"H={H} P={P} D={D} {str(dtype).removeprefix('torch.')}{', float32 rows' if rows else ''}"
    x, (key, value) = meta(64, 197, D, dtype=rows or dtype), meta(2, H, P, D, dtype=dtype)
    bias, vector = meta(H, P, dtype=dtype), meta(D, dtype=dtype)
    for norm in norms:
        affine = (vector, vector, EPS) if norm else NO_NORM
        call = partial(kernels.forward, x, key, bias, value, vector, True, *affine, True)
        yield f"{name}{', norm' if norm else ''}", call
    if backward:
        weights = meta(64, 197, H, P, dtype=dtype)
        yield name, partial(kernels.backward, x, x, key, value, weights, True, [True] * 5)


OPERATION = Operation("folded_cross_attention", cases, floors, reach, entries, variants)
