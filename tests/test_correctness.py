"""The judge of numbers: it passes what rounds as plain PyTorch does, and catches everything else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.correctness import Oracle, WrongResult
from fastprompt import ops

B, N, P, H, D = 3, 21, 5, 2, 24
# The relative error that is planted. In low precision plain PyTorch itself is off by half a percent or two.
PLANTED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
by_dtype = pytest.mark.parametrize("dtype", PLANTED, ids=lambda dtype: str(dtype).removeprefix("torch."))


class Operation(NamedTuple):
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]


def attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, temperature: Tensor
) -> Tensor:
    keys, values = (
        torch.cat((x, p.expand(B, -1, -1, -1)), 1).transpose(1, 2) for x, p in ((k, prompt_k), (v, prompt_v))
    )
    scores = q.transpose(1, 2) @ keys.mT * q.shape[-1] ** -0.5 / temperature
    return (scores.softmax(-1).to(q.dtype) @ values).transpose(1, 2)


def blend(x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor) -> Tensor:
    y = x + delta
    rows = gate * y[:, 1 : 1 + P] + (1 - gate) * prompt_in
    return torch.cat((y[:, :1], rows, y[:, 1 + P :]), 1)


def folded(x: Tensor, key: Tensor, bias: Tensor, value: Tensor, out_bias: Tensor) -> Tensor:
    weights = (torch.einsum("bnd,hpd->bhnp", x, key) + bias[:, None]).softmax(-1)
    return torch.einsum("bhnp,hpd->bnd", weights, value) + out_bias


def cross(x: Tensor, prompts: Tensor, **weights: Tensor) -> Tensor:
    q = F.linear(x, weights["q_weight"], weights["q_bias"]).unflatten(-1, (H, -1)).transpose(1, 2)
    k, v = (
        F.linear(prompts, weights[f"{n}_weight"], weights[f"{n}_bias"]).unflatten(-1, (H, -1)).transpose(0, 1)
        for n in "kv"
    )
    out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.linear(out.transpose(1, 2).flatten(2), weights["proj_weight"], weights["proj_bias"])


def row(query: Tensor, rows: Tensor, prompt_rows: Tensor) -> Tensor:
    every = torch.cat((rows, prompt_rows.expand(B, -1, -1)), 1)
    return (query @ every.mT).softmax(-1) @ every


HEADS = {
    "q": (B, N, H, D),
    "k": (B, N, H, D),
    "v": (B, N, H, D),
    "prompt_k": (P, H, D),
    "prompt_v": (P, H, D),
}
MAPS = {
    n + s: (D, D) if s == "_weight" else (D,) for n in ("q", "k", "v", "proj") for s in ("_weight", "_bias")
}
OPERATIONS = {
    "prompt_attention": Operation(ops.prompt_attention, attention, {**HEADS, "temperature": (1,)}),
    "packed_prompt_attention": Operation(
        ops.packed_prompt_attention,
        lambda qkv, **rest: attention(*qkv.unbind(2), **rest),
        {"qkv": (B, N, 3, H, D), "prompt_k": (P, H, D), "prompt_v": (P, H, D), "temperature": (1,)},
    ),
    "gated_blend": Operation(
        partial(ops.gated_blend, start=1, length=P),
        blend,
        {"x": (B, N, D), "delta": (B, N, D), "prompt_in": (B, P, D), "gate": (1,)},
    ),
    "folded_cross_attention": Operation(
        lambda x, **prompts: ops.folded_cross_attention(x, ops.FoldedPrompts(**prompts)),
        folded,
        {"x": (B, N, D), "key": (H, P, D), "bias": (H, P), "value": (H, P, D), "out_bias": (D,)},
    ),
    "prompt_cross_attention": Operation(
        lambda x, prompts, **maps: ops.prompt_cross_attention(x, prompts, ops.AttentionWeights(**maps), H),
        cross,
        {"x": (B, N, D), "prompts": (P, D), **MAPS},
    ),
    "folded_row_attention": Operation(
        ops.folded_row_attention, row, {"query": (B, H, D), "rows": (B, N, D), "prompt_rows": (P, D)}
    ),
}
# Sums over everything that nearly cancel: rounded to 16 bits, their terms leave little of the result.
SUMS = tuple(f"gradient of {name}" for name in ("temperature", "gate", "q_bias", "k_bias"))
by_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


def draw(operation: Operation, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {name: torch.randn(shape) for name, shape in operation.shapes.items()}
    for name in inputs:
        if name.endswith("weight") or name in ("key", "query"):
            inputs[name] /= D**0.5
        if name in ("temperature", "gate"):
            inputs[name] = torch.tensor([0.7])
    return {name: x.to(dtype) for name, x in inputs.items()}


def damaged(name: str, x: Tensor) -> list[Tensor]:
    """Copies of a result, each with one thing wrong."""
    off = x * (1 + PLANTED[x.dtype])
    if name == "gradient of k_bias":
        off = x + PLANTED[x.dtype]  # it is zero, a sum of terms of size 1 that cancel
    one_nan = x.clone(memory_format=torch.contiguous_format)
    one_nan.view(-1)[-1] = torch.nan
    other = torch.float64 if x.dtype == torch.float32 else torch.float32
    wrong = [one_nan, x.to(other), x[..., :-1]]
    return wrong if x.dtype.itemsize == 2 and name in SUMS else [off, *wrong]


@by_dtype
@by_operation
def test_an_error_is_caught_in_any_output_or_gradient(operation: Operation, dtype: torch.dtype) -> None:
    oracle = Oracle(operation.plain, draw(operation, dtype))
    right = oracle.evaluate(operation.ours)
    oracle.check(right)
    for name, x in right.items():
        with pytest.raises(WrongResult, match=r"results \["):
            oracle.check({n: y for n, y in right.items() if n != name})
        for wrong in damaged(name, x):
            with pytest.raises(WrongResult, match=f"{name}: "):
                oracle.check({**right, name: wrong})
