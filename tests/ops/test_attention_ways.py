"""The ways to compute prompt attention: equal numbers, whichever a forward and its backward take."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import KINDS, SHAPES, Shape, concatenated, draw
from numerics import by_layout, saved_bytes
from torch import Tensor

from bench.correctness import Oracle, assert_same, evaluate
from fastprompt.ops import packed_prompt_attention, prompt_attention, vendor_attention
from fastprompt.ops.attention_choice import WAYS, use_way

HALVES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("q", "k", "v", "prompt_k", "prompt_v", "temperature")
FLOAT64 = torch.float64

pytestmark = pytest.mark.usefixtures("poisoned_memory")
by_way = pytest.mark.parametrize("way", WAYS)
by_kind = pytest.mark.parametrize("kind", KINDS)


@by_way
@pytest.mark.parametrize("temperature", [True, False], ids=["temperature", "no temperature"])
@by_kind
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_way_is_the_definition(way: str, shape: Shape, kind: str, temperature: bool) -> None:
    oracle = Oracle(concatenated, draw(shape._replace(kind=kind), FLOAT64, temperature=temperature))
    with use_way(way):
        oracle(prompt_attention)


@by_way
@by_kind
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_way_is_as_exact_as_pytorch(way: str, kind: str, dtype: torch.dtype) -> None:
    oracle = Oracle(concatenated, draw(Shape(P=7, kind=kind), dtype))
    with use_way(way):
        oracle(prompt_attention)


@by_way
@by_kind
def test_packed_is_the_same(way: str, kind: str) -> None:
    inputs = draw(Shape(kind=kind), FLOAT64)
    inputs["qkv"] = torch.stack([inputs.pop(name) for name in "qkv"], 2)  # type: ignore[arg-type]
    oracle = Oracle(lambda qkv, **rest: concatenated(*qkv.unbind(2), **rest), inputs)
    with use_way(way):
        oracle(packed_prompt_attention)


@by_way
@by_layout
def test_strides_do_not_matter(way: str, layout: Any) -> None:
    inputs = draw(Shape(kind="per image", d=40), FLOAT64)
    given = dict(inputs)
    for name in TENSORS[:5]:
        x = inputs[name]
        assert x is not None
        given[name] = layout(x)
    same = {name: None if x is None else x.contiguous() for name, x in given.items()}
    with use_way(way):
        Oracle(concatenated, same)(prompt_attention, given)


@pytest.mark.parametrize("second", WAYS)
@by_way
def test_any_backward_follows_any_forward(way: str, second: str) -> None:
    oracle = Oracle(concatenated, draw(Shape(), FLOAT64))

    class Between(torch.autograd.Function):
        """Changes the way between forward and backward."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            change.__enter__()
            return grad

    def run(**inputs: Any) -> Tensor:
        with use_way(way):
            return Between.apply(prompt_attention(**inputs))

    change = use_way(second)
    try:
        oracle(run)
    finally:
        change.__exit__(None, None, None)


@by_way
@pytest.mark.parametrize("trainable", [*TENSORS, "prompt_k prompt_v", "q prompt_v", "k v", "v temperature"])
def test_what_trains_gets_its_gradients(way: str, trainable: str) -> None:
    oracle = Oracle(concatenated, draw(Shape(), FLOAT64), trainable=trainable.split())
    with use_way(way):
        oracle(prompt_attention)


@by_way
@pytest.mark.parametrize("limit", [1, 2**11], ids=["one image", "a few images"])
@by_kind
def test_scores_of_few_images_at_a_time(
    way: str, kind: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = Oracle(concatenated, draw(Shape(B=5, kind=kind, d=8), FLOAT64))
    monkeypatch.setattr(vendor_attention, "_SCORES", limit)
    with use_way(way):
        oracle(prompt_attention)


def test_where_pytorch_has_disabled_its_kernels_products_run(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(concatenated, draw(Shape(), FLOAT64))
    ran = []
    for name in ("_forward_by_products", "_backward_by_products"):
        function = getattr(vendor_attention, name)
        monkeypatch.setattr(
            vendor_attention, name, lambda *args, f=function, name=name: (ran.append(name), f(*args))[1]
        )
    oracle(prompt_attention)
    assert not ran
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        oracle(prompt_attention)
    assert ran == ["_forward_by_products", "_backward_by_products"]


@pytest.mark.parametrize(("way", "keys"), [("split", 11), ("joined", 15)])
def test_split_joins_no_keys(way: str, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name, position in (("forward", 1), ("backward", 2)):
        function = getattr(vendor_attention, name)

        def spy(*args: Any, f: Any = function, i: int = position, **options: Any) -> Any:
            seen.append(args[i].shape[1])
            return f(*args, **options)

        monkeypatch.setattr(vendor_attention, name, spy)
    with use_way(way):
        evaluate(prompt_attention, draw(Shape(), torch.float32), torch.randn(3, 11, 2, 32))
    assert seen == [keys, keys]


def test_a_packed_backward_of_prompts_alone_keeps_the_queries_alone() -> None:
    inputs = draw(Shape(Nq=40, N=40), torch.float32)
    qkv = torch.stack([inputs.pop(name) for name in "qkv"], 2)  # type: ignore[arg-type]
    sizes = {name: x.numel() * 4 for name, x in inputs.items() if x is not None}
    for name in ("prompt_k", "prompt_v"):
        inputs[name].requires_grad_()  # type: ignore[union-attr]
    only_prompts = saved_bytes(lambda: packed_prompt_attention(qkv, **inputs))  # type: ignore[arg-type]
    queries, lse = qkv.numel() * 4 // 3, 3 * 2 * 40 * 4
    assert only_prompts == 2 * queries + lse + sum(sizes.values())
    everything = saved_bytes(lambda: packed_prompt_attention(qkv.requires_grad_(), **inputs))  # type: ignore[arg-type]
    assert everything - only_prompts == 2 * queries


def test_gradients_of_prompts_are_the_same_bits_every_time() -> None:
    inputs = draw(Shape(B=33, kind="table"), torch.float32)
    cotangent = torch.randn(33, 11, 2, 32)
    with use_way("split"):
        first, second = (evaluate(prompt_attention, inputs, cotangent) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_log_sum_exp_is_the_same_whichever_way() -> None:
    inputs = draw(Shape(P=5), FLOAT64)
    arguments = [*(inputs[n] for n in (*TENSORS[:5], "temperature", "prompt_index")), 0.3, "eager"]
    found = {}
    for way in WAYS:
        with use_way(way):
            found[way] = torch.ops.fastprompt.prompt_attention(*arguments)
    for way in WAYS:
        assert_same(found[way], found["joined"])


@by_way
def test_without_prompts_every_way_is_pytorchs_attention(way: str) -> None:
    inputs = {name: x for name, x in draw(Shape(), FLOAT64).items() if name in "qkv"}
    oracle = Oracle(partial(concatenated, scale=0.2), inputs)
    with use_way(way):
        oracle(partial(prompt_attention, scale=0.2))
