"""`row_attention`: one query row over unprojected rows, with the key and value maps folded away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench import baselines
from bench.ops import DTYPES, Case, Compilation, Inputs, Operation, Size, compiled, meta, ours
from bench.roofline import ViT, Work
from fastprompt import ops
from fastprompt.kernels.triton import row_attention_config as config


def work(B: int, N: int, P: int, H: int, D: int, *, itemsize: int = 2) -> tuple[Work, Work]:
    """Return the work of a forward and a backward, each with the two maps, of the query and of the output.

    The forward reads the rows once. The backward reads them and writes their gradient: scores, weights, and three
    products more.
    """
    forward = Work(
        bytes=itemsize * D * (B * N + P + 2 * B + 2 * D),
        operations=4 * B * H * (N + P) * D + 4 * B * D * D,
        exponentials=B * H * (N + P),
    )
    backward = Work(
        bytes=itemsize * D * (2 * B * N + 2 * P + 3 * B + 2 * D),
        operations=10 * B * H * (N + P) * D + 4 * B * D * D,
        exponentials=B * H * (N + P),
    )
    return forward, backward


def floors(B: int, vit: ViT, P: int) -> tuple[Work, Work]:
    """Return the work for a block of `vit` with `P` prompts."""
    return work(B, vit.N, P, vit.H, vit.D)


def case(B: int, N: int, H: int, D: int, dtype: torch.dtype, device: str) -> Case:
    """Return one query row over `N` rows; the others make keys and values and run SDPA."""

    def draw() -> Inputs:
        weights = {n: torch.randn(D, D, device=device) * D**-0.5 for n in ("k_weight", "v_weight")}
        biases = {n: torch.randn(D, device=device) for n in ("k_bias", "v_bias")}
        query, rows = torch.randn(B, 1, H, D // H, device=device), torch.randn(B, N, D, device=device)
        return {n: t.to(dtype) for n, t in {"query": query, "rows": rows, **weights, **biases}.items()}

    def call(backend: str, query: Tensor, rows: Tensor, k_bias: Tensor, **maps: Tensor) -> Tensor:
        return ops.row_attention(query, rows, None, **maps, backend=backend)  # k_bias changes no softmax

    return Case(
        "row_attention",
        {"B": B, "N": N, "H": H, "D": D},
        dtype,
        draw,
        baselines.row,
        ours("folded_row_attention", device, lambda backend: partial(call, backend)),
        {"keys and values, sdpa": baselines.row, **compiled(baselines.row, device)},
        work(B, N, 0, H, D, itemsize=dtype.itemsize),
        frozen=("k_weight", "k_bias", "v_weight", "v_bias"),
    )


def cases(size: Size) -> Iterator[Case]:
    """Yield the comparison at `size`, with 50 prompts among the rows."""
    yield case(size.B, size.N + 50, size.H, size.D, size.dtype, size.device)


def reach(key: config.Key, images: int, widest: bool) -> Case:
    """Return a case that the table's entry `key` serves: the widest ViT whose query rows, filled up to 16, fit."""
    vits = ((3, 192), (6, 384), (12, 768), (16, 1024), (16, 1280))
    H, D = max((vit for vit in vits if 16 * vit[1] <= key.size), default=vits[0])
    if widest:
        H, D = 8, key.size // 16 // 8 * 8
    return case(images, 247, H, D, DTYPES[key.itemsize], "cuda")


# Offline compilation -------------------------------------------------------------------------------------------------

# Query rows and width: the largest of each size, and in bfloat16 those in use that fill it otherwise.
SHAPES = ((12, 256), (12, 512), (12, 768), (16, 1024), (12, 1536))
OTHER_SHAPES = ((3, 192), (6, 384), (16, 1280), (24, 768))


def entries() -> Iterator[Compilation]:
    """Yield the launches for each entry of the table in each dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from _launches(SHAPES, dtype)


def variants() -> Iterator[Compilation]:
    """Yield in bfloat16: the other shapes, widths whose rows are not aligned, and the subsets of gradients."""
    yield from _launches((*OTHER_SHAPES, (12, 1000), (12, 253)), torch.bfloat16)
    _, (_, backward) = _launches([(12, 768)], torch.bfloat16)
    for needs in ([True, False, False], [False, True, False], [False, False, True], [True, True, False]):
        wanted = " ".join(n for n, need in zip(("query", "rows", "prompts"), needs, strict=True) if need)
        yield f"for {wanted}", partial(backward.func, *backward.args[:-1], needs)


def _launches(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> Iterator[Compilation]:
    """Yield forward and backward of those shapes that a program has room for."""
    from fastprompt.kernels.triton import launch
    from fastprompt.kernels.triton import row_attention as kernels

    B, N, P = 4, 197, 10
    room = config.largest(launch.architecture(torch.device("meta")), dtype.itemsize)
    for M, D in shapes:
        if (16 if M <= 16 else 32) * D <= room:
            name = f"[{B}, {M}, {D}] {str(dtype).removeprefix('torch.')}"
            query = meta(B, M, D, dtype=dtype)
            inputs = query, meta(B, N, D, dtype=dtype), meta(P, D, dtype=dtype)
            yield name, partial(kernels.forward, *inputs)
            yield name, partial(kernels.backward, query, *inputs, query, meta(B, M), [True, True, True])


OPERATION = Operation("row_attention", cases, floors, reach, entries, variants)
