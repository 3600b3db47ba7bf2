"""FlopCounterMode counts for each operation what its products cost, forward and backward, for each set that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import KINDS, Shape, draw
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastprompt.ops import FoldedPrompts, folded_cross_attention, prompt_attention


def counts(function: Callable[..., Tensor], inputs: dict[str, Any], trainable: set[str]) -> tuple[int, int]:
    leaves = {
        n: x.detach().requires_grad_(n in trainable) if x is not None and x.is_floating_point() else x
        for n, x in inputs.items()
    }
    with FlopCounterMode(display=False) as forward:
        out = function(**leaves)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


EVERYTHING = {"q", "k", "v", "prompt_k", "prompt_v", "temperature"}
PROMPTS = {"prompt_k", "prompt_v"}
# Products of the backward, each 2·B·Nq·H·d operations for every key.
PRODUCTS = {
    "everything": (EVERYTHING, 5, 9),  # scores, d(weights), dq, dk, dv over 4 keys and 5 prompts
    "queries": ({"q"}, 3, 9),
    "values": ({"v"}, 3, 9),
    "temperature": ({"temperature"}, 3, 9),
    "queries and prompts": ({"q", *PROMPTS}, 5, 9),
    "temperature and prompt keys": ({"temperature", "prompt_k"}, 4, 9),
    "prompts": (PROMPTS, 4, 5),  # scores, d(weights), dk, dv over the prompts alone
    "prompt keys": ({"prompt_k"}, 3, 5),
    "prompt values": ({"prompt_v"}, 2, 5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trainable", "products", "keys"), PRODUCTS.values(), ids=PRODUCTS.keys())
def test_counted_operations_of_attention(kind: str, trainable: set[str], products: int, keys: int) -> None:
    inputs = draw(Shape(B=2, Nq=7, N=4, P=5, H=3, d=8, kind=kind), torch.float32)
    product = 2 * 2 * 7 * 3 * 8
    assert counts(prompt_attention, inputs, trainable) == (2 * product * 9, products * product * keys)


FOLDED_PRODUCTS = {
    "everything": ({"x", "key", "bias", "value", "out_bias"}, 4),  # d(weights), dx, d(key), d(value)
    "x": ({"x"}, 2),
    "prompts": ({"key", "bias", "value"}, 3),
    "value": ({"value"}, 1),
    "output bias": ({"out_bias"}, 0),
}


@pytest.mark.parametrize(("trainable", "products"), FOLDED_PRODUCTS.values(), ids=FOLDED_PRODUCTS.keys())
def test_counted_operations_of_folded_cross_attention(trainable: set[str], products: int) -> None:
    inputs = {
        "x": torch.randn(2, 5, 6),
        "key": torch.randn(3, 4, 6),
        "bias": torch.randn(3, 4),
        "value": torch.randn(3, 4, 6),
        "out_bias": torch.randn(6),
    }
    product = 2 * (2 * 5) * (3 * 4) * 6

    def function(x: Tensor, **folded: Tensor) -> Tensor:
        return folded_cross_attention(x, FoldedPrompts(**folded))[0]

    assert counts(function, inputs, trainable) == (2 * product, products * product)
