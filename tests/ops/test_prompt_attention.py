"""prompt_attention: numbers and every gradient, whatever the shapes, dtypes, layouts and kinds of prompts."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import pytest
import torch
from attention_cases import KINDS, SHAPES, Shape, by_loops, concatenated, draw
from hypothesis import given
from hypothesis import strategies as st
from numerics import FLOATS, by_dtype, by_layout, expanded, saved_bytes
from torch import Tensor

from bench.correctness import Inputs, Oracle, assert_same, evaluate
from fastprompt.ops import prompt_attention, prompt_attention_reference

OPERATION = "prompt_attention"
TENSORS = ("q", "k", "v", "prompt_k", "prompt_v", "temperature")

pytestmark = pytest.mark.usefixtures("poisoned_memory")
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
WITH_PROMPTS = {name: shape for name, shape in SHAPES.items() if shape.P}
by_kind = pytest.mark.parametrize("kind", KINDS)


def assert_exact(inputs: Inputs, given: Inputs | None = None, **options: float) -> None:
    Oracle(partial(concatenated, **options), inputs)(partial(prompt_attention, **options), given)


@by_kind
@pytest.mark.parametrize("scale", [None, 0.3], ids=["default scale", "scale 0.3"])
def test_reference_is_the_definition(kind: str, scale: float | None) -> None:
    inputs = draw(Shape(B=3, Nq=4, N=3, P=2, H=2, d=5, kind=kind), torch.float64)
    cotangent = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    reference = evaluate(partial(prompt_attention_reference, scale=scale), inputs, cotangent)
    assert_same(reference, evaluate(partial(by_loops, scale=scale), inputs, cotangent))
    assert_same(reference, evaluate(partial(concatenated, scale=scale), inputs, cotangent))


@pytest.mark.grid
@by_dtype
@by_kind
@by_shape
def test_output_and_gradients(backend: str, device: str, shape: Shape, kind: str, dtype: torch.dtype) -> None:
    assert_exact(draw(shape._replace(kind=kind), dtype, device))


@by_dtype
def test_output_and_gradients_without_prompts_or_temperature(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    inputs = draw(Shape(), dtype, device, temperature=False)
    assert_exact({**inputs, "prompt_k": None, "prompt_v": None})


@pytest.mark.grid
@by_dtype
@by_kind
def test_scale(backend: str, device: str, kind: str, dtype: torch.dtype) -> None:
    assert_exact(draw(Shape(kind=kind), dtype, device, temperature=False), scale=0.4)


@pytest.mark.grid
@by_layout
@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides_do_not_matter(backend: str, device: str, kind: str, layout, dtype: torch.dtype) -> None:
    inputs = draw(Shape(kind=kind, d=40), dtype, device)
    laid_out = dict(inputs)
    for name in TENSORS[:5]:
        x = inputs[name]
        assert x is not None
        laid_out[name] = layout(x) if x.ndim == 4 else x if layout is expanded else layout(x[None])[0]
    same = {name: None if x is None else x.contiguous() for name, x in laid_out.items()}
    assert_exact(same, given=laid_out)


def test_output_and_gradients_are_contiguous(backend: str, device: str) -> None:
    inputs = draw(Shape(), torch.float32, device)
    leaves = {
        n: x if x is None else x.transpose(0, -2).contiguous().transpose(0, -2)
        for n, x in inputs.items()
        if n in TENSORS[:5]
    }
    saved: dict[str, Tensor] = {}
    for name, x in leaves.items():
        x.requires_grad_()
        leaves[name] = y = x.clone(memory_format=torch.preserve_format)
        y.register_hook(partial(saved.__setitem__, name))
    out = prompt_attention(**leaves)
    assert out.is_contiguous()
    out.sum().backward()
    assert all(gradient.is_contiguous() for gradient in saved.values())


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_table_rows_nobody_uses_get_no_gradient(
    backend: str, device: str, widest: torch.dtype, index_dtype: torch.dtype
) -> None:
    inputs = draw(Shape(B=4, H=1, kind="table"), widest, device)
    inputs["prompt_index"] = torch.tensor([3, 1, 3, 3], dtype=index_dtype, device=device)
    oracle = Oracle(concatenated, inputs)
    got = oracle.evaluate(prompt_attention)
    oracle.check(got)
    for name in ("gradient of prompt_k", "gradient of prompt_v"):
        assert (got[name][[0, 2, 4, 5]] == 0).all()


@given(
    shape=st.builds(
        Shape,
        B=st.integers(0, 3),
        Nq=st.integers(1, 9),
        N=st.integers(1, 40),
        P=st.integers(0, 12),
        H=st.integers(1, 3),
        d=st.sampled_from([1, 3, 8, 16, 20, 32]),
        kind=st.sampled_from(KINDS),
    ),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(shape: Shape, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    assert_exact(draw(shape, dtype))


# Gradients only for what trains ----------------------------------------------------------------------------------

SUBSETS = [set(names) for size in range(1, 7) for names in combinations(TENSORS, size)]


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["shared", "table"])
@pytest.mark.parametrize("trainable", SUBSETS, ids=["+".join(sorted(names)) for names in SUBSETS])
def test_each_subset_of_inputs_gets_its_gradients(
    backend: str, device: str, widest: torch.dtype, trainable: set[str], kind: str
) -> None:
    inputs = draw(Shape(B=2, Nq=5, N=3, P=2, d=8, kind=kind), widest, device)
    Oracle(concatenated, inputs, trainable=trainable)(prompt_attention)


@pytest.mark.grid
@by_dtype
@by_kind
@pytest.mark.parametrize("shape", WITH_PROMPTS.values(), ids=WITH_PROMPTS.keys())
def test_prompts_get_their_gradients_when_nothing_else_trains(
    backend: str, device: str, shape: Shape, kind: str, dtype: torch.dtype
) -> None:
    inputs = draw(shape._replace(kind=kind), dtype, device)
    Oracle(concatenated, inputs, trainable={"prompt_k", "prompt_v"})(prompt_attention)


def test_frozen_keys_and_values_are_not_kept_for_the_backward(backend: str, device: str) -> None:
    inputs = draw(Shape(Nq=40, N=40), torch.float32, device)
    sizes = {name: x.numel() * 4 for name, x in inputs.items() if x is not None}
    for name in ("prompt_k", "prompt_v"):
        inputs[name].requires_grad_()  # type: ignore[union-attr]
    only_prompts = saved_bytes(lambda: prompt_attention(**inputs))
    inputs["q"].requires_grad_()  # type: ignore[union-attr]
    with_queries = saved_bytes(lambda: prompt_attention(**inputs))
    assert with_queries - only_prompts == sizes["k"] + sizes["v"]
    output, lse = sizes["q"], 3 * 2 * 40 * 4
    assert (
        only_prompts
        == sizes["q"] + sizes["prompt_k"] + sizes["prompt_v"] + sizes["temperature"] + output + lse
    )
