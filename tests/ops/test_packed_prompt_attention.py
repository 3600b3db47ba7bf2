"""packed_prompt_attention: prompt_attention on the parts of one tensor, with one gradient for them."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from attention_cases import KINDS, Shape, concatenated, draw
from numerics import by_dtype
from torch import Tensor

from bench.correctness import Inputs, Oracle, evaluate
from fastprompt.ops import packed_prompt_attention, prompt_attention

OPERATION = "packed_prompt_attention"
TENSORS = ("qkv", "prompt_k", "prompt_v", "temperature")
SUBSETS = [set(names) for size in range(1, 5) for names in combinations(TENSORS, size)]
SHAPES = {
    "several": Shape(),
    "one token": Shape(B=12, Nq=1, N=1),
    "no prompts": Shape(P=0, d=40),
    "head_dim 72": Shape(Nq=21, N=21, d=72),
    "ViT": Shape(B=1, Nq=197, N=197, d=64),
}
by_kind = pytest.mark.parametrize("kind", KINDS)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def pack(inputs: Inputs) -> dict[str, Tensor | None]:
    """The inputs of prompt_attention with q, k and v as one tensor."""
    parts = [inputs[name] for name in "qkv"]
    rest = {name: x for name, x in inputs.items() if name not in ("q", "k", "v")}
    return {"qkv": torch.stack(parts, 2), **rest}  # type: ignore[arg-type]


def on_parts(function: Any) -> Any:
    """`function(q, k, v, ...)` as a function of `qkv`."""
    return lambda qkv, **rest: function(*qkv.unbind(2), **rest)


plain = on_parts(concatenated)


@pytest.mark.grid
@by_dtype
@by_kind
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients(backend: str, device: str, shape: Shape, kind: str, dtype: torch.dtype) -> None:
    Oracle(plain, pack(draw(shape._replace(kind=kind), dtype, device)))(packed_prompt_attention)


def test_output_and_gradients_without_prompts_or_temperature(
    backend: str, device: str, widest: torch.dtype
) -> None:
    inputs = {"qkv": pack(draw(Shape(), widest, device))["qkv"]}
    Oracle(partial(plain, scale=0.3), inputs)(partial(packed_prompt_attention, scale=0.3))


@pytest.mark.grid
@pytest.mark.parametrize("trainable", SUBSETS, ids=["+".join(sorted(names)) for names in SUBSETS])
def test_each_subset_of_inputs_gets_its_gradients(
    backend: str, device: str, widest: torch.dtype, trainable: set[str]
) -> None:
    inputs = pack(draw(Shape(B=2, Nq=5, N=5, P=2, d=8), widest, device))
    Oracle(plain, inputs, trainable=trainable)(packed_prompt_attention)


@pytest.mark.parametrize("order", [(1, 0, 2, 3, 4), (2, 0, 3, 1, 4), (4, 3, 2, 1, 0)], ids=str)
def test_strides_do_not_matter(
    backend: str, device: str, widest: torch.dtype, order: tuple[int, ...]
) -> None:
    inputs = pack(draw(Shape(), widest, device))
    qkv = inputs["qkv"]
    assert qkv is not None
    back = [order.index(i) for i in range(5)]
    given = {**inputs, "qkv": qkv.permute(order).contiguous().permute(back)}
    Oracle(plain, inputs)(packed_prompt_attention, given)


def test_the_gradient_is_one_contiguous_tensor(backend: str, device: str) -> None:
    inputs = pack(draw(Shape(), torch.float32, device))
    qkv = inputs.pop("qkv").requires_grad_()  # type: ignore[union-attr]
    packed_prompt_attention(qkv, **inputs).sum().backward()  # type: ignore[arg-type]
    assert qkv.grad is not None
    assert qkv.grad.is_contiguous()


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"`qkv` must be \[B, N, 3, H, d\]; got \(2, 5, 2, 4\); unflatten"):
        packed_prompt_attention(torch.zeros(2, 5, 2, 4))
    with pytest.raises(ValueError, match="`prompt_k` must be"):
        packed_prompt_attention(torch.zeros(2, 5, 3, 2, 4), torch.zeros(3, 1, 4), torch.zeros(3, 1, 4))


def test_parts_and_whole_cost_the_same_operations() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = draw(Shape(), torch.float32)
    counts = []
    for function, given in ((prompt_attention, inputs), (packed_prompt_attention, pack(inputs))):
        with FlopCounterMode(display=False) as counter:
            evaluate(function, given, torch.randn(3, 11, 2, 32))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
