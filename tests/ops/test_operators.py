"""The operators as PyTorch sees them: opcheck, second derivatives, compile, export, vmap, and what a run leaves behind.

Each guarantee is stated once, for every operator in every form in which the operations call it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import test_folded_cross_attention as cross
import test_folded_row_attention as row
import test_gated_blend as blend
import test_residual_norm as residual
import torch
from attention_cases import Shape, draw
from numerics import saved_bytes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from bench.correctness import Oracle, assert_same, evaluate
from fastprompt import use_backend
from fastprompt.ops import (
    AttentionWeights,
    FoldedPrompts,
    Norm,
    dispatch,
    folded_cross_attention,
    folded_row_attention,
    gated_blend,
    packed_prompt_attention,
    prompt_attention,
    prompt_attention_reference,
    prompt_cross_attention,
    residual_norm,
)

OPERATIONS = (
    "prompt_attention",
    "packed_prompt_attention",
    "residual_norm",
    "gated_blend",
    "folded_cross_attention",
    "folded_row_attention",
)
OPS = torch.ops.fastprompt
ALL_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
Tensors = dict[str, Tensor | None]


# The forms: for a batch of B with N rows each, the inputs in float64; and one tensor made of them -------------------


def attention_inputs(B: int = 2, N: int = 3, kind: str = "shared") -> Tensors:
    inputs = draw(Shape(B, N, N + 1, P=2, H=2, d=8, kind=kind), torch.float64)
    if kind == "table":  # of four rows for any batch
        inputs |= {name: inputs[name][:4] for name in ("prompt_k", "prompt_v")}  # type: ignore[index]
        inputs["prompt_index"] = inputs["prompt_index"] % 4  # type: ignore[operator]
    return inputs


def packed_inputs(B: int = 2, N: int = 3, kind: str = "shared") -> Tensors:
    inputs = attention_inputs(B, N, kind)
    q, k, v = (inputs.pop(name) for name in "qkv")
    return {"qkv": torch.stack([q, k[:, :N], v[:, :N]], 2), **inputs}  # type: ignore[index, list-item]


def residual_inputs(B: int = 2, N: int = 5, scale: bool = True) -> Tensors:
    frozen = {"norm_scale": torch.rand(6, dtype=torch.float64) + 0.5} if scale else {}
    return {**residual.draw((B, N, 6), torch.float64), **frozen, **norm_inputs(6, True)}


def blend_inputs(B: int = 2, N: int = 5, norm: bool = False) -> Tensors:
    return {**blend.draw((B, N, 6, 1, N - 3), torch.float64), **norm_inputs(6, norm)}


def cross_inputs(B: int = 2, N: int = 3, bias: bool = True, norm: bool = False) -> Tensors:
    return {**cross.draw(cross.Shape(B, N, 3, 2, 4, bias), torch.float64), **norm_inputs(4, norm)}


def norm_inputs(D: int, norm: bool) -> Tensors:
    return {f"norm_{n}": torch.randn(D, dtype=torch.float64) for n in ("weight", "bias")} if norm else {}


def row_inputs(B: int = 2, N: int = 3, per_image: bool = False) -> Tensors:
    return row.draw(row.Shape(B, 2, N, 2, 4), torch.float64, per_image=per_image)


def block_inputs(B: int = 2, N: int = 5) -> Tensors:
    shapes = {"q": (B, N, 2, 4), "prompts": (3, 2, 4), "gate": (1,), "temperature": (1,), "weight": (8, 8)}
    return {name: torch.rand(shape, dtype=torch.float64) + 0.1 for name, shape in shapes.items()}


def run_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return OPS.prompt_attention(q, k, v, None, None, None, None, 0.3, "auto")[0]


def run_residual(
    x: Tensor,
    delta: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    norm = Norm(norm_weight, norm_bias, blend.EPS)
    return torch.stack(residual_norm(x, delta, norm_scale, norm, backend=backend))


def run_blend(
    x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, backend: str = "auto", **affine: Tensor
) -> Tensor:
    norm = Norm(*affine.values(), blend.EPS) if affine else None
    outputs = gated_blend(x, delta, prompt_in, gate, 1, prompt_in.shape[1], norm=norm, backend=backend)
    return torch.stack([y for y in outputs if y is not None])


def run_cross(
    x: Tensor,
    key: Tensor,
    bias: Tensor,
    value: Tensor,
    out_bias: Tensor | None,
    residual: bool = True,
    **affine: Tensor,
) -> Tensor:
    norm = Norm(*affine.values(), blend.EPS) if affine else None
    folded = FoldedPrompts(key, bias, value, out_bias)
    outputs = folded_cross_attention(x, folded, residual=residual, norm=norm)
    return torch.stack([y for y in outputs if y is not None])


def run_block(q: Tensor, prompts: Tensor, gate: Tensor, temperature: Tensor, weight: Tensor) -> Tensor:
    """Three operations after one another, as blocks use them."""
    H, d = q.shape[2:]
    maps = AttentionWeights(weight, None, weight, None, weight, None, weight, None)
    out = prompt_attention(q, q, q * 0.3, prompts, prompts * 0.5, temperature=temperature).flatten(2)
    out = gated_blend(out, q.flatten(2), out[:, 1:3], gate, 1, 2)[0]
    return out + prompt_cross_attention(out, prompts.flatten(1), maps, H, form="folded")


class Form(NamedTuple):
    operation: str
    function: Callable[..., Tensor]
    draw: Callable[..., Tensors]


def floats(inputs: Tensors) -> dict[str, Tensor]:
    """The inputs that have a gradient; a norm is frozen."""
    found = {n: x for n, x in inputs.items() if x is not None and x.is_floating_point()}
    return {n: x for n, x in found.items() if not n.startswith("norm_")}


ATTENTION, PACKED, RESIDUAL, BLEND, CROSS, ROW = OPERATIONS
WHOLE = {
    ATTENTION: Form(ATTENTION, prompt_attention, partial(attention_inputs, kind="table")),
    PACKED: Form(PACKED, packed_prompt_attention, partial(packed_inputs, kind="per image")),
    RESIDUAL: Form(RESIDUAL, run_residual, residual_inputs),
    BLEND: Form(BLEND, run_blend, partial(blend_inputs, norm=True)),
    CROSS: Form(CROSS, run_cross, partial(cross_inputs, norm=True)),
    ROW: Form(ROW, folded_row_attention, row_inputs),
    "a block": Form(BLEND, run_block, block_inputs),
}
FORMS = {
    **WHOLE,
    "attention, shared prompts": Form(ATTENTION, prompt_attention, attention_inputs),
    "attention, per image": Form(ATTENTION, prompt_attention, partial(attention_inputs, kind="per image")),
    "attention without prompts": Form(
        ATTENTION, run_attention, lambda *sizes: {n: attention_inputs(*sizes)[n] for n in "qkv"}
    ),
    "packed, shared prompts": Form(PACKED, packed_prompt_attention, packed_inputs),
    "packed, a table": Form(PACKED, packed_prompt_attention, partial(packed_inputs, kind="table")),
    "residual add without scale": Form(RESIDUAL, run_residual, partial(residual_inputs, scale=False)),
    "blend without norm": Form(BLEND, run_blend, blend_inputs),
    "blend by eager": Form(BLEND, partial(run_blend, backend="eager"), partial(blend_inputs, norm=True)),
    "cross-attention without norm": Form(CROSS, run_cross, cross_inputs),
    "cross-attention alone": Form(CROSS, partial(run_cross, residual=False), cross_inputs),
    "cross-attention without bias": Form(CROSS, run_cross, partial(cross_inputs, bias=False, norm=True)),
    "rows, per image": Form(ROW, folded_row_attention, partial(row_inputs, per_image=True)),
    "rows without prompts": Form(
        ROW, folded_row_attention, lambda *sizes: row_inputs(*sizes) | {"prompt_rows": None}
    ),
}
# What trains decides which gradients a graph has and what it keeps for them: all inputs of each form, and these.
PARTS = {
    "attention, shared prompts": ["prompt_k", "prompt_k prompt_v"],
    "attention, per image": ["prompt_k prompt_v"],
    ATTENTION: ["prompt_k prompt_v"],
    PACKED: ["prompt_k prompt_v"],
    RESIDUAL: ["x", "delta"],
    "residual add without scale": ["x", "delta"],
    BLEND: ["x delta prompt_in"],
    "blend without norm": ["x delta prompt_in"],
    CROSS: ["", "x", "key bias value"],
    "cross-attention without norm": ["x", "key bias value"],
    "cross-attention alone": ["x", "key bias value"],
    ROW: ["query", "prompt_rows", "query prompt_rows"],
    "rows, per image": ["rows", "query rows", "rows prompt_rows"],
}
SOME_TRAIN = {
    f"{form}: {names or 'nothing'} trains": (FORMS[form], names)
    for form, parts in PARTS.items()
    for names in parts
}
CASES = {name: (form, None) for name, form in FORMS.items() if name != "a block"} | SOME_TRAIN
by_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
by_case = pytest.mark.parametrize(("form", "names"), CASES.values(), ids=CASES.keys())
by_whole_form = pytest.mark.parametrize("form", WHOLE.values(), ids=WHOLE.keys())


# Registration ------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The calls of fastprompt's operators, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "fastprompt":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


def calls_of(form: Form, names: str | None, backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators that a forward and its backward call, with what they get."""
    inputs = form.draw()
    for name in floats(inputs) if names is None else names.split():
        inputs[name].requires_grad_()  # type: ignore[union-attr]
    with use_backend(backend), Calls() as calls:
        out = form.function(**inputs)
        if out.requires_grad:
            out.square().sum().backward()
    assert len(calls.found) >= 1 + out.requires_grad
    return calls.found


@by_case
def test_opcheck(form: Form, names: str | None) -> None:
    for operator, arguments in calls_of(form, names, "auto"):
        forward = not operator._schema.name.endswith("_backward")
        leaves = tree_map_only(
            Tensor,
            lambda x, forward=forward: x.detach().requires_grad_(forward and x.requires_grad),
            arguments,
        )
        # A backward is not differentiated: its graph is that of the whole form, only its shapes depend on what trains.
        tests = ALL_TESTS if forward or names is None else ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, leaves, test_utils=tests)


@by_case
def test_counted_operations_are_those_that_eager_executes(form: Form, names: str | None) -> None:
    for operator, (*arguments, _) in calls_of(form, names, "eager"):
        _, kernel = dispatch.select(operator._opname, "eager", *arguments)
        counts = []
        for function in (partial(operator, *arguments, "eager"), partial(kernel.run, *arguments)):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                function()
            counts.append(counter.get_total_flops())
        if operator._opname.startswith((ATTENTION, PACKED)) and counts[1] == 0:
            continue  # PyTorch's own attention, which its older versions do not count
        assert counts[0] == counts[1]
        assert (counts[0] > 0) == (not operator._opname.startswith((BLEND, RESIDUAL)))


# Gradients of gradients ----------------------------------------------------------------------------------------------


@by_whole_form
def test_gradcheck(form: Form) -> None:
    inputs = form.draw()
    leaves = {name: x.requires_grad_() for name, x in floats(inputs).items()}

    def function(*tensors: Tensor) -> Tensor:
        return form.function(**{**inputs, **dict(zip(leaves, tensors, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@by_form
def test_second_derivative_is_refused_and_names_the_reference(form: Form) -> None:
    inputs = form.draw()
    leaves = [x.requires_grad_() for x in floats(inputs).values()]
    first = torch.autograd.grad(form.function(**inputs).square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"_backward.*reference"):
        sum(g.square().sum() for g in first).backward()  # type: ignore[union-attr]


def test_references_have_second_derivatives() -> None:
    inputs = attention_inputs()
    q = inputs.pop("q").requires_grad_()  # type: ignore[union-attr]
    assert torch.autograd.gradgradcheck(lambda q: prompt_attention_reference(q, **inputs), q)


# Compile and export ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "names"), SOME_TRAIN.values(), ids=SOME_TRAIN.keys())
def test_compiles_to_one_graph_with_equal_gradients(fresh_compiler: None, form: Form, names: str) -> None:
    compiled = torch.compile(form.function, fullgraph=True, backend="aot_eager")
    Oracle(form.function, form.draw(), trainable=names.split())(compiled)


@by_whole_form
def test_compiles_once_for_all_batch_sizes(fresh_compiler: None, form: Form) -> None:
    compiled = torch.compile(form.function, fullgraph=True, backend="aot_eager", dynamic=True)

    def check(B: int) -> None:
        inputs = form.draw(B)
        Oracle(form.function, inputs, trainable=floats(inputs))(compiled)

    check(11)  # unlike every other size, which the graph would take for the same
    with torch.compiler.set_stance("fail_on_recompile"):
        for B in (2, 5, 8):
            check(B)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiles_with_inductor(fresh_compiler: None) -> None:
    Oracle(prompt_attention, attention_inputs())(torch.compile(prompt_attention, fullgraph=True))


@by_form
def test_exports_with_a_dynamic_batch(form: Form) -> None:
    # `run_attention` calls the operator itself.
    function = prompt_attention if form.function is run_attention else form.function

    class Module(nn.Module):
        def forward(self, inputs: Tensors) -> Tensor:
            return function(**inputs)

    inputs, others = form.draw(3), form.draw(7)
    batched = {n for n, x in inputs.items() if x is not None and x.shape != others[n].shape}  # type: ignore[union-attr]
    batch = torch.export.Dim("batch", min=2)
    dynamic = {name: {0: batch} if name in batched else None for name in inputs}
    program = torch.export.export(Module(), (inputs,), dynamic_shapes=(dynamic,))
    assert "fastprompt." not in str(program.graph), "it runs where fastprompt is not installed"
    others = {name: others[name] if name in batched else x for name, x in inputs.items()}
    assert_same(program.module()(others), function(**others))


# vmap -----------------------------------------------------------------------------------------------------------------


@by_form
def test_vmap_is_a_loop(form: Form) -> None:
    inputs = form.draw()
    for name, x in floats(inputs).items():

        def function(x: Tensor, name: str = name) -> Tensor:
            return form.function(**{**inputs, name: x})

        stacked = torch.stack([x, x * 2, x + 0.1])
        assert_same(torch.func.vmap(function)(stacked), torch.stack([function(x) for x in stacked]))


@pytest.mark.parametrize("name", ["q", "prompt_k", "prompt_v", "temperature"])
def test_vmap_of_grad_is_for_the_references(name: str) -> None:
    """torch.library's gradients do not serve torch.func.grad (pytorch/pytorch#170834); the docs name the way around."""
    inputs = attention_inputs()
    stacked = torch.stack([inputs[name] + 0.1 * i for i in range(3)])  # type: ignore[operator]

    def loss(x: Tensor, function: Callable[..., Tensor] = prompt_attention) -> Tensor:
        return function(**{**inputs, name: x}).square().sum()

    with use_backend("eager"), pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(torch.func.grad(loss))(stacked)
    got = torch.func.vmap(torch.func.grad(partial(loss, function=prompt_attention_reference)))(stacked)
    for x, gradient in zip(stacked, got, strict=True):
        x = x.clone().requires_grad_()
        assert_same(gradient, torch.autograd.grad(loss(x), x)[0])


def test_vmap_over_any_dimension_and_over_prompts_with_their_temperatures() -> None:
    inputs = attention_inputs()
    prompt_k = torch.stack([inputs["prompt_k"] + 0.1 * i for i in range(3)])  # type: ignore[operator]
    temperatures = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)

    def function(prompt_k: Tensor, temperature: Tensor) -> Tensor:
        return prompt_attention(**{**inputs, "prompt_k": prompt_k, "temperature": temperature})

    got = torch.func.vmap(function, in_dims=(2, 0), out_dims=1)(prompt_k.movedim(0, 2), temperatures)
    want = torch.stack([function(k, t) for k, t in zip(prompt_k, temperatures, strict=True)], 1)
    assert_same(got, want)


# What a run leaves behind ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_memory")
def test_runs_repeat_to_the_last_bit_and_leave_nothing_behind(
    operation: str, backend: str, device: str
) -> None:
    form = WHOLE[operation]
    inputs = {name: x if x is None else x.to(device) for name, x in form.draw(3, 12).items()}
    inputs = {n: x.float() if x is not None and x.is_floating_point() else x for n, x in inputs.items()}
    before = {name: None if x is None else x.clone() for name, x in inputs.items()}
    assert saved_bytes(lambda: form.function(**inputs)) == 0
    cotangent = torch.randn_like(form.function(**inputs))
    first, second = (evaluate(form.function, inputs, cotangent, floats(inputs)) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    assert all(x is None or torch.equal(x, before[name]) for name, x in inputs.items())  # type: ignore[arg-type]
