"""The operators as PyTorch sees them: opcheck, gradcheck, compile, export, vmap.

Those of the blend and of folded cross-attention are in the files of these operations.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import KINDS, Shape, draw
from torch import Tensor, nn

from bench.correctness import assert_same, evaluate
from fastprompt import use_backend
from fastprompt.ops import (
    AttentionWeights,
    gated_blend,
    packed_prompt_attention,
    prompt_attention,
    prompt_attention_reference,
    prompt_cross_attention,
)

OPERATION = "prompt_attention"
WITHOUT = (
    "triton",
)  # it computes no float64; test_triton_backend.py checks its gradients by differences in float32
OPS = torch.ops.fastprompt


def attention_arguments(kind: str, dtype: torch.dtype = torch.float64, **sizes: int) -> dict[str, Any]:
    return draw(Shape(**{"B": 2, "Nq": 3, "N": 4, "P": 2, "H": 2, "d": 8, **sizes}, kind=kind), dtype)


def packed_arguments(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    inputs = attention_arguments(kind, dtype, Nq=3, N=3)
    return {"qkv": torch.stack([inputs.pop(name) for name in "qkv"], 2), **inputs}


def trained(x: Any) -> Any:
    return x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


# Registration ------------------------------------------------------------------------------------------------------

# Some inputs train, some do not: opcheck then compares what a compiled graph does with each.
OPCHECKS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    **{
        f"attention, {kind} prompts": lambda kind=kind: (
            OPS.prompt_attention.default,
            (*map(trained, attention_arguments(kind).values()), 0.3, "auto"),
        )
        for kind in KINDS
    },
    "attention, prompts train": lambda: (
        OPS.prompt_attention.default,
        (
            *(trained(x) if "prompt" in n else x for n, x in attention_arguments("shared").items()),
            0.3,
            "auto",
        ),
    ),
    "attention without prompts": lambda: (
        OPS.prompt_attention.default,
        (*(trained(torch.randn(2, 3, 2, 8)) for _ in range(3)), None, None, None, None, 0.3, "auto"),
    ),
    **{
        f"packed attention, {kind}": lambda kind=kind: (
            OPS.packed_prompt_attention.default,
            (*map(trained, packed_arguments(kind).values()), 0.3, "auto"),
        )
        for kind in KINDS
    },
}


@pytest.mark.parametrize("case", OPCHECKS.values(), ids=OPCHECKS.keys())
def test_opcheck(case: Callable[[], tuple[Any, tuple[Any, ...]]]) -> None:
    torch.library.opcheck(*case())


@pytest.mark.parametrize(
    "needs", [(True,) * 6, (False, False, False, True, True, False)], ids=["all", "prompts"]
)
def test_opcheck_of_the_gradient_of_attention(needs: tuple[bool, ...]) -> None:
    inputs = tuple(attention_arguments("table").values())
    out, lse = OPS.prompt_attention(*inputs, 0.3, "auto")
    arguments = (torch.randn_like(out), *inputs, out, lse, 0.3, list(needs), "auto")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.prompt_attention_backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_attention(backend: str, kind: str) -> None:
    inputs = attention_arguments(kind, torch.float64, Nq=2, N=2, H=1, d=3)
    index = inputs.pop("prompt_index")

    def function(*tensors: Tensor) -> Tensor:
        return prompt_attention(*tensors[:5], temperature=tensors[5], prompt_index=index)

    assert torch.autograd.gradcheck(function, tuple(map(trained, inputs.values())))


def test_gradcheck_of_packed_attention() -> None:
    inputs = packed_arguments("shared", torch.float64)
    inputs.pop("prompt_index")

    def function(*tensors: Tensor) -> Tensor:
        return packed_prompt_attention(*tensors[:3], temperature=tensors[3])

    assert torch.autograd.gradcheck(function, tuple(map(trained, inputs.values())))


SECOND = {
    "packed attention": (
        lambda *t: packed_prompt_attention(*t[:3], temperature=t[3]),
        lambda: [*packed_arguments("shared").values()][:4],
    ),
    "attention": (
        lambda *t: prompt_attention(*t[:5], temperature=t[5]),
        lambda: [*attention_arguments("shared").values()][:6],
    ),
}


@pytest.mark.parametrize(("function", "arguments"), SECOND.values(), ids=SECOND.keys())
def test_second_derivative_is_refused_and_names_the_reference(
    function: Callable[..., Tensor], arguments: Callable[[], Any]
) -> None:
    inputs = tuple(map(trained, arguments()))
    first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"_backward.*reference"):
        sum(g.square().sum() for g in first).backward()  # type: ignore[union-attr]


def test_references_have_second_derivatives() -> None:
    inputs = attention_arguments("shared", torch.float64, Nq=2, N=2, d=2)
    q = trained(inputs.pop("q"))
    assert torch.autograd.gradgradcheck(lambda q: prompt_attention_reference(q, **inputs), q)


# Compile and export ------------------------------------------------------------------------------------------------


def gated_step(
    q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, gate: Tensor, temperature: Tensor, weight: Tensor
) -> Tensor:
    """All three operations after one another, as blocks use them."""
    H, d = q.shape[2:]
    maps = AttentionWeights(weight, None, weight, None, weight, None, weight, None)
    out = prompt_attention(q, k, v, prompts, prompts * 0.5, temperature=temperature).flatten(2)
    rows = out[:, 1:3]
    out = gated_blend(out, q.flatten(2), rows, gate, 1, 2)[0]
    return out + prompt_cross_attention(out, prompts.flatten(1), maps, H, form="folded")


def step_inputs(B: int = 2) -> list[Tensor]:
    shapes = ((B, 5, 2, 4), (B, 5, 2, 4), (B, 5, 2, 4), (3, 2, 4), (1,), (1,), (8, 8))
    return [trained(torch.rand(shape, dtype=torch.float64) + 0.1) for shape in shapes]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def test_compiles_to_one_graph_with_equal_gradients(fresh_compiler: None) -> None:
    inputs = step_inputs()
    compiled = torch.compile(gated_step, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, inputs), gradients(gated_step, inputs))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiles_with_inductor(fresh_compiler: None) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, temperature: Tensor) -> Tensor:
        return prompt_attention(q, k, v, prompts, prompts, temperature=temperature) + q

    inputs = [*step_inputs()[:4], trained(torch.ones(1, dtype=torch.float64))]
    compiled = torch.compile(function, fullgraph=True)
    assert_same(gradients(compiled, inputs), gradients(function, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_with_only_prompts_training(fresh_compiler: None, kind: str) -> None:
    inputs = attention_arguments(kind)
    compiled = torch.compile(lambda **kw: prompt_attention(**kw), fullgraph=True, backend="aot_eager")
    cotangent = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    got, want = (
        evaluate(f, inputs, cotangent, {"prompt_k", "prompt_v"}) for f in (compiled, prompt_attention)
    )
    assert_same(got, want)


def test_compiles_once_for_all_batch_sizes(fresh_compiler: None) -> None:
    compiled = torch.compile(gated_step, fullgraph=True, backend="aot_eager")

    def run(B: int) -> list[Tensor]:
        inputs = step_inputs(B)
        for x in inputs[:3]:
            torch._dynamo.mark_dynamic(x, 0)
        return gradients(compiled, inputs)

    run(2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for B in (3, 5, 8):
            assert run(B)[0].shape == (B, 5, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_exports_with_a_dynamic_batch(kind: str) -> None:
    class Attention(nn.Module):
        def forward(self, inputs: dict[str, Tensor | None]) -> Tensor:
            return prompt_attention(**inputs)  # type: ignore[arg-type]

    inputs = attention_arguments(kind, B=3)
    batch = torch.export.Dim("batch", min=2)
    per_image = {"q", "k", "v", "prompt_index"} | ({"prompt_k", "prompt_v"} if kind == "per image" else set())
    dynamic = {n: {0: batch} if n in per_image and x is not None else None for n, x in inputs.items()}
    program = torch.export.export(Attention(), (inputs,), dynamic_shapes=(dynamic,))
    assert "fastprompt.prompt_attention" in str(program.graph)
    other = attention_arguments(kind, B=7)
    if kind == "table":
        other = {**other, "prompt_k": inputs["prompt_k"], "prompt_v": inputs["prompt_v"]}
        other["prompt_index"] = torch.randint(5, (7,))
    assert_same(program.module()(other), prompt_attention(**other))


def test_exports_all_operations() -> None:
    class Step(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return gated_step(*inputs)

    inputs = tuple(x.detach() for x in step_inputs())
    program = torch.export.export(Step(), inputs)
    assert_same(program.module()(*inputs), gated_step(*inputs))


# vmap -----------------------------------------------------------------------------------------------------------------


def many(name: str, count: int = 3) -> tuple[dict[str, Any], Tensor]:
    inputs = attention_arguments("shared", torch.float64)
    stacked = torch.stack([inputs[name] + 0.1 * i for i in range(count)])
    return inputs, stacked


@pytest.mark.parametrize("name", ["q", "k", "prompt_k", "prompt_v", "temperature"])
def test_vmap_is_a_loop(name: str) -> None:
    inputs, stacked = many(name)

    def function(x: Tensor) -> Tensor:
        return prompt_attention(**{**inputs, name: x})

    assert_same(torch.func.vmap(function)(stacked), torch.stack([function(x) for x in stacked]))


@pytest.mark.parametrize("name", ["q", "prompt_k", "prompt_v", "temperature"])
def test_vmap_of_grad_is_for_the_references(name: str) -> None:
    """torch.library's gradients do not serve torch.func.grad (pytorch/pytorch#170834); the docs name the way around."""
    inputs, stacked = many(name)

    def loss(x: Tensor, function: Callable[..., Tensor] = prompt_attention) -> Tensor:
        return function(**{**inputs, name: x}).square().sum()

    with use_backend("eager"), pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(torch.func.grad(loss))(stacked)
    got = torch.func.vmap(torch.func.grad(partial(loss, function=prompt_attention_reference)))(stacked)
    for x, gradient in zip(stacked, got, strict=True):
        x = x.clone().requires_grad_()
        assert_same(gradient, torch.autograd.grad(loss(x), x)[0])


def test_vmap_over_any_dimension_and_over_prompts_with_their_temperatures() -> None:
    inputs, prompt_k = many("prompt_k")
    temperatures = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)

    def function(prompt_k: Tensor, temperature: Tensor) -> Tensor:
        return prompt_attention(**{**inputs, "prompt_k": prompt_k, "temperature": temperature})

    got = torch.func.vmap(function, in_dims=(2, 0), out_dims=1)(prompt_k.movedim(0, 2), temperatures)
    want = torch.stack([function(k, t) for k, t in zip(prompt_k, temperatures, strict=True)], 1)
    assert_same(got, want)
