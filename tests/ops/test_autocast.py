"""Autocast: products run in the low dtype, sums in the widest, and gates and temperatures stay as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import Shape, cross_attention, draw
from torch import Tensor

from bench.correctness import Oracle
from fastprompt.ops import (
    AttentionWeights,
    FoldedPrompts,
    folded_cross_attention,
    prompt_attention,
    prompt_cross_attention,
)

OPERATION = "prompt_attention"
WITHOUT = ("triton",)  # autocast on a CPU computes in bfloat16, which Triton serves on GPUs alone
SMALL = Shape(B=2, Nq=3, N=4, P=2, d=8)


def test_autocast_runs_attention_in_bfloat16_but_not_the_temperature(backend: str) -> None:
    inputs = {n: x if x is None else x.requires_grad_() for n, x in draw(SMALL, torch.float32).items()}
    temperature = inputs["temperature"] = torch.tensor([1.003], requires_grad=True)  # 1.0 in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        out = prompt_attention(**inputs)
        out.float().square().sum().backward()
    low = {n: x.detach().bfloat16() if x is not None and n != "temperature" else x for n, x in inputs.items()}
    assert torch.equal(out, prompt_attention(**low))
    at_one = prompt_attention(**{**low, "temperature": torch.ones(1)})
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out, at_one)
    assert temperature.grad is not None
    assert all(x is None or x.grad.dtype == torch.float32 for x in inputs.values())


@pytest.mark.parametrize("folded", [False, True], ids=["attention", "folded cross-attention"])
def test_a_backward_inside_the_region_is_that_outside(folded: bool) -> None:
    x = torch.randn(2, 30, 3, 8)
    rest = {"key": torch.randn(3, 5, 24), "bias": torch.randn(3, 5), "value": torch.randn(3, 5, 24)}

    def gradients(inside: bool) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, *rest.values())]
        with torch.autocast("cpu", torch.bfloat16):
            if folded:
                prompts = FoldedPrompts(*leaves[1:], None)
                out = folded_cross_attention(leaves[0].flatten(2), prompts, residual=True)[0]
            else:
                out = prompt_attention(leaves[0], leaves[0], leaves[0], temperature=torch.tensor([0.7]))
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                out.backward(torch.ones_like(out) / 3)
        return [t.grad for t in leaves if t.grad is not None]

    for got, want in zip(gradients(inside=True), gradients(inside=False), strict=True):
        assert torch.equal(got, want)


def test_autocast_accepts_mixed_dtypes(backend: str) -> None:
    inputs = draw(SMALL, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = prompt_attention(
            inputs["q"].bfloat16(), inputs["k"], inputs["v"].half(), inputs["prompt_k"], inputs["prompt_v"]
        )
    assert out.dtype == torch.bfloat16


def test_autocast_leaves_float64_alone(backend: str) -> None:
    inputs = draw(SMALL, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = prompt_attention(**inputs)
    assert torch.equal(out, prompt_attention(**inputs))


@pytest.mark.parametrize("form", ["folded", "direct"])
def test_autocast_runs_cross_attention_in_bfloat16(form: str) -> None:
    inputs = {"x": torch.randn(2, 5, 8), "prompts": torch.randn(3, 8)}
    for name in AttentionWeights._fields:
        inputs[name] = torch.randn(8, 8) / 3 if name.endswith("weight") else torch.randn(8)

    def run(function: Any, x: Tensor, prompts: Tensor, **weights: Tensor) -> Tensor:
        return function(x, prompts, AttentionWeights(**weights), 2)

    with torch.autocast("cpu", torch.bfloat16):
        oracle = Oracle(partial(run, cross_attention), inputs)
        got = oracle.evaluate(partial(run, partial(prompt_cross_attention, form=form)))
        oracle.check(got)
    assert got["output"].dtype == torch.bfloat16
    assert got["gradient of x"].dtype == got["gradient of prompts"].dtype == torch.float32
