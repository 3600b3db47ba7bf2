"""What to compile of row attention: every entry of its table, and what makes other code of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton import row_attention as kernels
from fastprompt.kernels.triton.row_attention_config import largest

B, N, P = 4, 197, 10
# Query rows and width: the largest of each size, and in bfloat16 those in use that fill it otherwise.
SHAPES = ((12, 256), (12, 512), (12, 768), (16, 1024), (12, 1536))
SHAPES_TOO = ((3, 192), (6, 384), (16, 1280), (24, 768))


def entries() -> Iterator[tuple[str, Callable[[], object]]]:
    """A name and a call for each entry of the table in each dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from _calls(SHAPES, dtype)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """The other shapes, in bfloat16; then the subsets of gradients, and rows odd in size."""
    yield from _calls(SHAPES_TOO, torch.bfloat16)
    M, D, dtype = 12, 768, torch.bfloat16
    for needs in ([True, False, False], [False, True, False], [False, False, True], [True, True, False]):
        wanted = " ".join(n for n, need in zip(("query", "rows", "prompts"), needs, strict=True) if need)
        yield f"for {wanted}", partial(kernels.backward, *_gradient(M, D, dtype), needs)
    for width in (1000, 253):
        yield f"width {width}", partial(kernels.forward, *_inputs(M, width, dtype))
        yield f"width {width}", partial(kernels.backward, *_gradient(M, width, dtype), [True, True, True])


def _calls(
    shapes: Iterable[tuple[int, int]], dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object]]]:
    architecture = launch.architecture(torch.device("meta"))
    for M, D in shapes:
        if (16 if M <= 16 else 32) * D > largest(architecture, dtype.itemsize):
            continue
        name = f"[{B}, {M}, {D}] {str(dtype).removeprefix('torch.')}"
        yield name, partial(kernels.forward, *_inputs(M, D, dtype))
        yield name, partial(kernels.backward, *_gradient(M, D, dtype), [True, True, True])


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _inputs(M: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return _meta(B, M, D, dtype=dtype), _meta(B, N, D, dtype=dtype), _meta(P, D, dtype=dtype)


def _gradient(M: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    inputs = _inputs(M, D, dtype)
    return torch.empty_like(inputs[0]), *inputs, torch.empty_like(inputs[0]), _meta(B, M, dtype=torch.float32)
