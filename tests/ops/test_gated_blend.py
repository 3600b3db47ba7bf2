"""gated_blend: numbers and every gradient, wherever the prompt rows stand, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numerics import (
    FLOATS,
    Inputs,
    assert_as_exact_as_eager,
    assert_close,
    backends_of,
    by_dtype,
    by_layout,
    evaluate,
    saved_bytes,
)
from torch import Tensor

from fastprompt.ops import dispatch, gated_blend, gated_blend_reference

OPERATION = "gated_blend"
TENSORS = ("x", "delta", "prompt_in", "gate")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# B, N, D, start, length
SIZES = {
    "after the class token": (2, 12, 24, 1, 4),
    "no prompt rows": (2, 5, 8, 2, 0),
    "no prompt rows, at the end": (2, 5, 8, 5, 0),
    "first rows": (2, 7, 33, 0, 3),
    "last rows": (2, 7, 31, 4, 3),
    "all rows": (2, 6, 16, 0, 6),
    "one row of one": (3, 1, 5, 0, 1),
    "width 1": (2, 9, 1, 3, 2),
    "empty batch": (0, 6, 16, 1, 2),
    "ViT": (1, 207, 64, 1, 10),
}
by_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def draw(
    sizes: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", gate: float = 0.37
) -> dict[str, Tensor]:
    B, N, D, _, length = sizes
    rows = {
        name: torch.randn(B, n, D).to(device, dtype)
        for name, n in (("x", N), ("delta", N), ("prompt_in", length))
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {**rows, "gate": torch.tensor([gate], dtype=wide, device=device)}


def plain(x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int) -> Tensor:
    """The formula in plain PyTorch, in the inputs' dtype."""
    y = x + delta
    gate = gate.to(x.dtype)
    rows = gate * y[:, start : start + length] + (1 - gate) * prompt_in
    return torch.cat((y[:, :start], rows, y[:, start + length :]), 1)


def by_hand(x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int) -> Tensor:
    """A gated residual on the prompt rows, one row at a time."""
    rows = list((x + delta).unbind(1))
    for i in range(length):
        before = prompt_in[:, i]
        rows[start + i] = before + gate.squeeze() * (rows[start + i] - before)
    return torch.stack(rows, 1)


def assert_exact(inputs: Inputs, start: int, length: int, given: Inputs | None = None) -> None:
    functions = (partial(f, start=start, length=length) for f in (gated_blend, plain, gated_blend_reference))
    prompt_in = inputs["prompt_in"]
    assert prompt_in is not None
    assert_as_exact_as_eager(*functions, inputs, {"gate": tuple(prompt_in.shape)}, given)


@by_size
def test_reference_is_a_gated_residual(sizes: tuple[int, ...]) -> None:
    inputs = draw(sizes, torch.float64)
    cotangent = torch.randn(sizes[:3], dtype=torch.float64)
    results = [
        evaluate(
            partial(f, start=sizes[3], length=sizes[4]),
            inputs,
            cotangent,
            {"x", "delta"} if sizes[4] == 0 else None,
        )
        for f in (gated_blend_reference, by_hand)
    ]
    assert_close(*results, 1e-13)


@by_dtype
@by_size
def test_output_and_gradients(backend: str, device: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_exact(draw(sizes, dtype, device), *sizes[3:])


@by_dtype
@by_layout
def test_strides_do_not_matter(
    backend: str, device: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    inputs = draw((3, 9, 24, 2, 3), dtype, device)
    laid_out = {n: x if n == "gate" else layout(x[:, :, None])[:, :, 0] for n, x in inputs.items()}
    assert_exact({n: x.contiguous() for n, x in laid_out.items()}, 2, 3, given=laid_out)


@by_layout
def test_strides_of_the_incoming_gradient_do_not_matter(
    backend: str, device: str, widest: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    inputs = draw((3, 9, 24, 2, 3), widest, device)
    cotangent = layout(torch.randn(3, 9, 1, 24, dtype=widest, device=device))[:, :, 0]
    functions = (partial(f, start=2, length=3) for f in (gated_blend, gated_blend_reference))
    assert_close(*(evaluate(f, inputs, cotangent) for f in functions))


@pytest.mark.parametrize("name", backends_of(OPERATION))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    before=st.integers(0, 5),
    length=st.integers(0, 5),
    after=st.integers(0, 5),
    B=st.integers(0, 3),
    D=st.integers(1, 70),
    dtype=st.sampled_from(FLOATS),
    gate=st.floats(0, 1, width=32),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes(
    name: str,
    before: int,
    length: int,
    after: int,
    B: int,
    D: int,
    dtype: torch.dtype,
    gate: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    device = "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    assume(dispatch.why_not(OPERATION, name, torch.empty(1, 1, 1, dtype=dtype, device=device)) is None)
    with dispatch.use_backend(name):
        N = before + length + after
        assert_exact(draw((B, N, D, before, length), dtype, device, gate), before, length)


@by_dtype
def test_gate_of_zero_gives_the_rows_that_entered(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = draw((2, 12, 24, 1, 4), dtype, device, gate=0.0)
    out = gated_blend(**inputs, start=1, length=4)
    assert torch.equal(out[:, 1:5], inputs["prompt_in"])
    assert torch.equal(out[:, 5:], (inputs["x"] + inputs["delta"])[:, 5:])


@by_dtype
def test_gate_of_one_gives_the_residual_add(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = draw((2, 12, 24, 1, 4), dtype, device, gate=1.0)
    assert torch.equal(gated_blend(**inputs, start=1, length=4), inputs["x"] + inputs["delta"])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gate_keeps_its_shape_and_dtype_in_the_gradient(
    backend: str, device: str, shape: tuple[int, ...], gate_dtype: torch.dtype
) -> None:
    inputs = draw((2, 5, 8, 1, 2), torch.float32, device)
    gate = torch.full(shape, 0.25, dtype=gate_dtype, device=device, requires_grad=True)
    gated_blend(**{**inputs, "gate": gate}, start=1, length=2).square().sum().backward()
    assert gate.grad is not None
    assert (gate.grad.shape, gate.grad.dtype) == (gate.shape, gate.dtype)


def test_nan_in_a_prompt_row_stays_in_that_row(backend: str, device: str) -> None:
    inputs = draw((2, 6, 8, 1, 3), torch.float32, device)
    inputs["prompt_in"][1, 2] = torch.nan
    out = gated_blend(**inputs, start=1, length=3)
    assert out[1, 3].isnan().all()
    out[1, 3] = 0
    assert out.isfinite().all()


SUBSETS = [set(names) for size in range(1, 5) for names in combinations(TENSORS, size)]


@pytest.mark.parametrize("trainable", SUBSETS, ids=["+".join(sorted(names)) for names in SUBSETS])
def test_each_subset_of_inputs_gets_its_gradients_and_no_others(
    backend: str, device: str, widest: torch.dtype, trainable: set[str]
) -> None:
    inputs = draw((2, 6, 8, 1, 3), widest, device)
    cotangent = torch.randn(2, 6, 8, dtype=widest, device=device)
    functions = (partial(f, start=1, length=3) for f in (gated_blend, gated_blend_reference))
    assert_close(*(evaluate(f, inputs, cotangent, trainable) for f in functions))


def test_gradients_of_x_and_delta_are_separate_tensors(backend: str, device: str) -> None:
    inputs = {n: x.requires_grad_() for n, x in draw((2, 6, 8, 1, 3), torch.float32, device).items()}
    gated_blend(**inputs, start=1, length=3).sum().backward()
    x, delta = inputs["x"].grad, inputs["delta"].grad
    assert x is not None
    assert delta is not None
    kept = delta.clone()
    x.zero_()
    assert torch.equal(delta, kept)


def test_only_a_trained_gate_keeps_rows_for_the_backward(backend: str, device: str) -> None:
    inputs = draw((2, 50, 32, 1, 3), torch.float32, device)
    inputs["prompt_in"].requires_grad_()
    inputs["x"].requires_grad_()
    assert saved_bytes(lambda: gated_blend(**inputs, start=1, length=3)) == 4
    inputs["gate"].requires_grad_()
    assert (
        saved_bytes(lambda: gated_blend(**inputs, start=1, length=3)) == 4 + inputs["prompt_in"].numel() * 4
    )


def test_inputs_are_left_alone(backend: str, device: str) -> None:
    inputs = draw((2, 6, 8, 1, 3), torch.float32, device)
    before = {name: x.clone() for name, x in inputs.items()}
    evaluate(partial(gated_blend, start=1, length=3), inputs, torch.randn(2, 6, 8, device=device))
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


# What it refuses -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of two dimensions": ({"x": torch.ones(6, 8)}, ValueError, r"\(6, 8\)"),
    "delta of another size": ({"delta": torch.ones(2, 5, 8)}, ValueError, r"\(2, 5, 8\)"),
    "a negative start": ({"start": -1}, ValueError, "start=-1"),
    "a negative length": ({"length": -2}, ValueError, r"start\+length=-1"),
    "rows past the end": ({"start": 4}, ValueError, r"start\+length=7.*N=6"),
    "prompts not expanded": ({"prompt_in": torch.ones(1, 3, 8)}, ValueError, r"\(1, 3, 8\).*expand"),
    "prompts of another number": ({"prompt_in": torch.ones(2, 4, 8)}, ValueError, r"\(2, 4, 8\)"),
    "a gate of two elements": ({"gate": torch.ones(2)}, ValueError, r"\(2,\)"),
    "an integer gate": ({"gate": torch.ones(1, dtype=torch.int64)}, ValueError, "int64"),
    "delta of another dtype": (
        {"delta": torch.ones(2, 6, 8).double()},
        TypeError,
        "`delta` is torch.float64",
    ),
    "prompts of another dtype": (
        {"prompt_in": torch.ones(2, 3, 8).half()},
        TypeError,
        "`prompt_in` is torch.float16",
    ),
    "delta on another device": (
        {"delta": torch.ones(2, 6, 8, device="meta")},
        ValueError,
        "`delta` is on meta",
    ),
    "the gate on another device": ({"gate": torch.ones(1, device="meta")}, ValueError, "`gate` is on meta"),
    "integers": (
        {
            "x": torch.ones(2, 6, 8).int(),
            "delta": torch.ones(2, 6, 8).int(),
            "prompt_in": torch.ones(2, 3, 8).int(),
        },
        TypeError,
        "`x` must be floating point; got torch.int32",
    ),
    "an unknown backend": ({"backend": "tpu"}, ValueError, "'tpu'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_its_value(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {**draw((2, 6, 8, 1, 3), torch.float32), "start": 1, "length": 3}
    with pytest.raises(error, match=message):
        gated_blend(**{**arguments, **changes})
