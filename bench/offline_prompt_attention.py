"""What to compile of prompt-augmented attention: every entry of its table, and shapes that make other code of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastprompt.kernels.triton import prompt_attention as kernels

B, H, P = 4, 12, 10
SCALE = 0.125
# (queries, keys without prompts, head_dim). Every entry of the table, with as much left over by whole tiles as may be
FORWARD = ((1, 181, 64), (181, 181, 64), (629, 629, 64), (1, 181, 128), (181, 181, 128), (629, 629, 128))
BACKWARD = ((181, 181, 64), (629, 629, 64), (629, 629, 128))
# ... and what makes other code of them: little left over, other pieces of keys, head_dim in two pieces.
FORWARD_TOO = ((197, 197, 64), (50, 50, 64), (237, 237, 64), (197, 197, 40), (197, 197, 80), (577, 577, 88))
BACKWARD_TOO = ((577, 577, 64), (197, 197, 80), (577, 577, 88))


def entries() -> Iterator[tuple[str, Callable[[], object]]]:
    """A name and a call for each entry of the table in each dtype, with a temperature."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from _calls(FORWARD, BACKWARD, dtype)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """The other shapes, in bfloat16; the last for prompts that alone train, without a temperature."""
    yield from _calls(FORWARD_TOO, BACKWARD_TOO, torch.bfloat16)
    (q, k, v, *prompts), _ = _inputs(197, 197, 64, torch.bfloat16)
    only_prompts = [False, False, False, True, True, False]
    call = _backward((q, k[:, :0], v[:, :0], *prompts), None, only_prompts)
    yield _name(197, 0, 64, torch.bfloat16), call


def _calls(
    forward: Iterable[tuple[int, int, int]], backward: Iterable[tuple[int, int, int]], dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object]]]:
    for queries, keys, d in forward:
        inputs, temperature = _inputs(queries, keys, d, dtype)
        call = partial(kernels.forward, *inputs, temperature, None, SCALE)
        yield _name(queries, keys, d, dtype), call
    for queries, keys, d in backward:
        inputs, temperature = _inputs(queries, keys, d, dtype)
        yield _name(queries, keys, d, dtype), _backward(inputs, temperature, [True] * 6)


def _name(queries: int, keys: int, d: int, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {queries}x{keys}+{P} d{d}"


def _inputs(queries: int, keys: int, d: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    """q, k, v as views of a packed tensor where they are of one length, and shared prompts; a temperature."""
    options = {"dtype": dtype, "device": "meta"}
    if queries == keys:
        q, k, v = torch.empty(B, queries, 3, H, d, **options).unbind(2)
    else:
        q = torch.empty(B, queries, H, d, **options)
        k, v = torch.empty(B, keys, 2, H, d, **options).unbind(2)
    prompt_k, prompt_v = torch.empty(2, P, H, d, **options).unbind(0)
    return (q, k, v, prompt_k, prompt_v), torch.empty(1, device="meta")


def _backward(
    inputs: tuple[Tensor, ...], temperature: Tensor | None, needs: list[bool]
) -> Callable[[], object]:
    q = inputs[0]
    out = torch.empty(q.shape, dtype=q.dtype, device="meta")
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), device="meta")
    return partial(kernels.backward, out, *inputs, temperature, None, out, lse, SCALE, needs)
