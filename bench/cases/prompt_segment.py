"""The prompt segment of `prompt_attention`, which joins prompts with an image segment computed by PyTorch's kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from bench.ops import Compilation, meta

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# (prompts, head_dim). Every entry of the table.
ENTRIES = ((50, 64), (100, 64), (50, 128), (100, 128))
# Shapes that make other code of them: few prompts, several tiles of prompts, head_dim in two pieces.
VARIANTS = ((10, 64), (300, 64), (20, 80), (50, 88), (10, 40), (10, 128))
EVERYTHING = (True, True, True)
SUBSETS = ((True, False, False), (False, True, True), (False, True, False), (False, False, True))


def entries() -> Iterator[Compilation]:
    """Yield the launches for each entry of the table in each dtype, with a temperature."""
    for dtype in (BF16, FP16, FP32):
        yield from _launches(ENTRIES, dtype)


def variants() -> Iterator[Compilation]:
    """Yield in bfloat16: the other shapes, and the subsets of gradients."""
    yield from _launches(VARIANTS, BF16)
    for needs in SUBSETS:
        yield from _launches([(50, 64)], BF16, needs)


def _launches(
    shapes: Iterable[tuple[int, int]], dtype: torch.dtype, needs: tuple[bool, bool, bool] = EVERYTHING
) -> Iterator[Compilation]:
    """Yield forwards and backwards; q, the gradient's part and its place are views of packed tensors."""
    from fastprompt.kernels.triton import prompt_segment as kernels

    B, N, H = 4, 197, 12
    for P, d in shapes:
        name = f"{str(dtype).removeprefix('torch.')} {N}+{P} d{d}"
        q, dq, into = meta(B, N, 3, H, d, dtype=dtype).unbind(2)
        out = meta(B, H, N, d, dtype=dtype).transpose(1, 2)
        prompts, lse, temperature = meta(2, P, H, d, dtype=dtype), meta(B, H, N), meta(1)
        if needs == EVERYTHING:
            yield name, partial(kernels.merge, q, out, lse, *prompts, temperature, None, 0.125)
        inputs = out, q, *prompts, temperature, None, out, lse, 0.125, *needs, dq
        yield name, partial(kernels.segment_backward, *inputs, into=into, products=lse)
        if needs[0]:  # frozen prompts, or many
            yield name, partial(kernels.segment_backward, *inputs[:-4], True, False, False, dq, into=into)
