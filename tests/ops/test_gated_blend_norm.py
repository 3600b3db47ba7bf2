"""gated_blend_norm: both outputs and every gradient, as an operator, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    Inputs,
    assert_as_exact_as_eager,
    assert_close,
    by_dtype,
    by_layout,
    evaluate,
    saved_bytes,
)
from test_gated_blend import plain as plain_blend
from torch import Tensor

from fastprompt.ops import gated_blend, gated_blend_norm, gated_blend_norm_reference

OPERATION = "gated_blend_norm"
OPS = torch.ops.fastprompt
EPS = 1e-6

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# B, N, D, start, length; None for a plain residual add
SIZES = {
    "after the class token": (2, 12, 24, 1, 4),
    "no gate": (2, 5, 96, 0, None),
    "no gate, one row": (3, 1, 8, 0, None),
    "no prompt rows": (2, 5, 8, 2, 0),
    "no prompt rows, at the end": (2, 5, 8, 5, 0),
    "first rows": (2, 7, 33, 0, 3),
    "last rows": (2, 7, 96, 4, 3),
    "all rows": (2, 6, 16, 0, 6),
    "one row of one": (3, 1, 5, 0, 1),
    "width 1": (2, 9, 1, 3, 2),
    "empty batch": (0, 6, 16, 1, 2),
    "ViT-S": (2, 5, 384, 1, 2),
    "ViT-B": (2, 5, 768, 1, 2),
    "width 1000": (1, 4, 1000, 1, 2),
    "width 1536": (1, 3, 1536, 1, 1),
    "many rows": (2, 50, 40, 1, 10),
    "more prompt rows than are added up at once": (30, 36, 2, 1, 35),
}
by_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def draw(
    sizes: tuple[int, int, int, int, int | None], dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor | None]:
    B, N, D, _, length = sizes
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, delta = (torch.randn(B, N, D).to(device, dtype) for _ in range(2))
    if length is None:
        return {"x": x, "delta": delta, "prompt_in": None, "gate": None}
    prompt_in = torch.randn(B, length, D).to(device, dtype)
    return {
        "x": x,
        "delta": delta,
        "prompt_in": prompt_in,
        "gate": torch.tensor([0.37], dtype=wide, device=device),
    }


def affine(D: int, device: str = "cpu") -> dict[str, Tensor]:
    return {"weight": (torch.randn(D) + 1).to(device), "bias": torch.randn(D, device=device)}


def plain(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor | None,
    gate: Tensor | None,
    start: int,
    length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, in the inputs' dtype."""
    y = x + delta if prompt_in is None else plain_blend(x, delta, prompt_in, gate, start, length)
    weight, bias = (t if t is None else t.to(x.dtype) for t in (weight, bias))
    return y, F.layer_norm(y, y.shape[-1:], weight, bias, eps)


def both(
    function: Callable[..., tuple[Tensor, Tensor]], sizes: tuple[int, ...], **norm: Tensor
) -> Callable[..., Tensor]:
    """y and LayerNorm(y) as one tensor [2, B, N, D]."""
    norm = {"weight": None, "bias": None, **norm}

    def stacked(**inputs: Tensor) -> Tensor:
        return torch.stack(function(**inputs, start=sizes[3], length=sizes[4] or 0, **norm, eps=EPS))

    return stacked


def assert_exact(
    inputs: Inputs, sizes: tuple[int, ...], norm: dict[str, Tensor], given: Inputs | None = None
) -> None:
    functions = (both(f, sizes, **norm) for f in (gated_blend_norm, plain, gated_blend_norm_reference))
    prompt_in = inputs["prompt_in"]
    spread = None if prompt_in is None else {"gate": tuple(prompt_in.shape)}
    assert_as_exact_as_eager(*functions, inputs, spread, given)


@by_dtype
@by_size
def test_outputs_and_gradients(backend: str, device: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_exact(draw(sizes, dtype, device), sizes, affine(sizes[2], device))


@by_dtype
@pytest.mark.parametrize("names", [(), ("weight",), ("bias",)], ids=["neither", "weight", "bias"])
def test_norm_without_weight_or_bias(
    backend: str, device: str, names: tuple[str, ...], dtype: torch.dtype
) -> None:
    sizes = (2, 12, 24, 1, 4)
    norm = affine(24, device)
    assert_exact(draw(sizes, dtype, device), sizes, {name: norm[name] for name in names})


@by_dtype
@by_layout
def test_strides_do_not_matter(
    backend: str, device: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    sizes = (3, 9, 24, 2, 3)
    inputs = draw(sizes, dtype, device)
    laid_out = {n: x if n == "gate" else layout(x[:, :, None])[:, :, 0] for n, x in inputs.items()}
    norm = {n: torch.stack([t, t * torch.nan], 1)[:, 0] for n, t in affine(24, device).items()}
    assert_exact({n: x.contiguous() for n, x in laid_out.items()}, sizes, norm, given=laid_out)


@by_layout
def test_strides_of_the_incoming_gradients_do_not_matter(
    backend: str, device: str, widest: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    sizes = (3, 9, 24, 2, 3)
    inputs, norm = draw(sizes, widest, device), affine(24, device)
    cotangents = [layout(torch.randn(3, 9, 1, 24, dtype=widest, device=device))[:, :, 0] for _ in range(2)]
    results = []
    for function in (gated_blend_norm, gated_blend_norm_reference):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        outputs = function(**leaves, start=2, length=3, **norm, eps=EPS)
        torch.autograd.backward(outputs, cotangents)
        results.append({"output": outputs[0].detach(), **{name: x.grad for name, x in leaves.items()}})
    assert_close(*results)


@pytest.mark.parametrize("read", [0, 1], ids=["y alone", "the norm alone"])
@pytest.mark.parametrize("length", [3, None], ids=["gate", "no gate"])
def test_one_output_may_be_read_by_nobody(
    backend: str, device: str, widest: torch.dtype, read: int, length: int | None
) -> None:
    sizes = (2, 6, 8, 1, length)
    inputs, norm = draw(sizes, widest, device), affine(8, device)
    cotangent = torch.randn(2, 6, 8, dtype=widest, device=device)
    functions = [both(f, sizes, **norm) for f in (gated_blend_norm, gated_blend_norm_reference)]
    assert_close(*(evaluate(lambda f=f, **leaves: f(**leaves)[read], inputs, cotangent) for f in functions))


TENSORS = ("x", "delta", "prompt_in", "gate")
SUBSETS = [set(names) for size in range(1, 5) for names in combinations(TENSORS, size)]


@pytest.mark.parametrize("trainable", SUBSETS, ids=["+".join(sorted(names)) for names in SUBSETS])
def test_each_subset_of_inputs_gets_its_gradients_and_no_others(
    backend: str, device: str, widest: torch.dtype, trainable: set[str]
) -> None:
    sizes = (2, 6, 8, 1, 3)
    inputs, norm = draw(sizes, widest, device), affine(8, device)
    cotangent = torch.randn(2, 2, 6, 8, dtype=widest, device=device)
    functions = (both(f, sizes, **norm) for f in (gated_blend_norm, gated_blend_norm_reference))
    assert_close(*(evaluate(f, inputs, cotangent, trainable) for f in functions))


def test_y_is_what_gated_blend_gives(backend: str, device: str, widest: torch.dtype) -> None:
    inputs = draw((2, 12, 24, 1, 4), widest, device)
    y, _ = gated_blend_norm(**inputs, start=1, length=4, weight=None, bias=None, eps=EPS)
    assert torch.equal(y, gated_blend(**inputs, start=1, length=4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_norm_reads_y_as_rounded(backend: str, device: str, dtype: torch.dtype) -> None:
    """Rows whose differences vanish in the rounding of a large mean: their norm is the bias."""
    x = torch.full((1, 2, 8), 2.0**11, device=device)
    delta = torch.rand(1, 2, 8, device=device) * torch.finfo(dtype).eps * 2**9
    norm = affine(8, device)
    y, normed = gated_blend_norm(x.to(dtype), delta.to(dtype), None, None, 0, 0, **norm, eps=EPS)
    assert torch.equal(y, x.to(dtype))
    torch.testing.assert_close(normed, norm["bias"].to(dtype).expand_as(normed))


def test_a_large_mean_costs_no_digits_of_the_variance(backend: str, device: str) -> None:
    x, delta = (torch.randn(2, 3, 96, device=device) for _ in range(2))
    x += 300
    arguments = (None, None, 0, 0, None, None, EPS)
    _, normed = gated_blend_norm(x, delta, *arguments)
    _, want = gated_blend_norm_reference((x + delta).double(), torch.zeros_like(x).double(), *arguments)
    torch.testing.assert_close(normed.double(), want, rtol=0, atol=1e-3)


def test_gradient_of_the_gate_is_the_same_bits_in_every_run(backend: str, device: str) -> None:
    inputs = draw((4, 40, 48, 1, 30), torch.float32, device)
    function = both(gated_blend_norm, (4, 40, 48, 1, 30), **affine(48, device))
    cotangent = torch.randn(2, 4, 40, 48, device=device)
    first, second = (evaluate(function, inputs, cotangent)["gradient of gate"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gate_keeps_its_shape_and_dtype_in_the_gradient(
    backend: str, device: str, shape: tuple[int, ...], gate_dtype: torch.dtype
) -> None:
    inputs = draw((2, 5, 8, 1, 2), torch.float32, device)
    gate = torch.full(shape, 0.25, dtype=gate_dtype, device=device, requires_grad=True)
    function = both(gated_blend_norm, (2, 5, 8, 1, 2))
    function(**{**inputs, "gate": gate}).square().sum().backward()
    assert gate.grad is not None
    assert (gate.grad.shape, gate.grad.dtype) == (gate.shape, gate.dtype)
    want = torch.full((), 0.25, device=device, requires_grad=True)
    function(**{**inputs, "gate": want}).square().sum().backward()
    torch.testing.assert_close(gate.grad.float(), want.grad.expand(shape), rtol=1e-2, atol=0)


def test_nan_in_a_prompt_row_stays_in_that_row(backend: str, device: str) -> None:
    inputs = draw((2, 6, 8, 1, 3), torch.float32, device)
    inputs["prompt_in"][1, 2] = torch.nan
    out = both(gated_blend_norm, (2, 6, 8, 1, 3))(**inputs)
    assert out[:, 1, 3].isnan().all()
    out[:, 1, 3] = 0
    assert out.isfinite().all()


def test_gradients_of_x_and_delta_are_separate_tensors(backend: str, device: str) -> None:
    inputs = {n: x.requires_grad_() for n, x in draw((2, 6, 8, 1, 3), torch.float32, device).items()}
    both(gated_blend_norm, (2, 6, 8, 1, 3))(**inputs).square().sum().backward()
    x, delta = inputs["x"].grad, inputs["delta"].grad
    kept = delta.clone()
    x.zero_()
    assert torch.equal(delta, kept)


def test_saves_y_and_two_numbers_a_row_and_the_prompt_rows_only_for_the_gate(
    backend: str, device: str
) -> None:
    sizes = B, N, D, start, length = (2, 50, 32, 1, 3)
    inputs = draw(sizes, torch.float32, device)
    inputs["x"].requires_grad_()
    norm = affine(D, device)

    def run() -> Tensor:
        return gated_blend_norm(**inputs, start=start, length=length, **norm, eps=EPS)[1]

    kept = 4 * (B * N * D + 2 * B * N + D + 1)
    assert saved_bytes(run) == kept
    inputs["gate"].requires_grad_()
    assert saved_bytes(run) == kept + 4 * B * length * D


def test_inputs_are_left_alone(backend: str, device: str) -> None:
    inputs, norm = draw((2, 6, 8, 1, 3), torch.float32, device), affine(8, device)
    before = {name: x.clone() for name, x in {**inputs, **norm}.items()}
    evaluate(both(gated_blend_norm, (2, 6, 8, 1, 3), **norm), inputs, torch.randn(2, 2, 6, 8, device=device))
    assert all(torch.equal(x, before[name]) for name, x in {**inputs, **norm}.items())


# The operator ----------------------------------------------------------------------------------------------------


def arguments(gated: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """What the operator takes, without the backend."""
    inputs = draw((2, 5, 6, 1, 2), dtype)
    x, delta, prompt_in, gate = (t.requires_grad_() for t in inputs.values())
    norm = [t.to(dtype) for t in affine(6).values()]
    if not gated:
        return (x, delta, x.detach()[:, :0], None, 0, 0, *norm, EPS)
    return (x, delta, prompt_in, gate, 1, 2, *norm, EPS)


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_opcheck(gated: bool) -> None:
    torch.library.opcheck(OPS.gated_blend_norm.default, (*arguments(gated), "auto"))


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_opcheck_of_the_gradient(gated: bool) -> None:
    *inputs, start, length, weight, bias, eps = arguments(gated)
    x, delta, prompt_in, gate = (None if t is None else t.detach() for t in inputs)
    y, normed, mean, rstd = OPS.gated_blend_norm(
        x, delta, prompt_in, gate, start, length, weight, bias, eps, "auto"
    )
    needs = (True, gated, gated)
    difference = torch.randn(2, length, 6) if gated else None
    saved = (y, mean, rstd, weight, gate, difference, start, length)
    torch.library.opcheck(
        OPS.gated_blend_norm_backward.default,
        (torch.randn_like(y), torch.randn_like(y), *saved, *needs, "auto"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_gradcheck(gated: bool) -> None:
    *inputs, start, length, weight, bias, eps = arguments(gated, torch.float64)
    if not gated:
        inputs[2] = None

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return gated_blend_norm(*tensors, start, length, weight, bias, eps)

    assert torch.autograd.gradcheck(function, inputs)


def test_second_derivative_is_refused_and_names_the_reference() -> None:
    inputs = arguments(gated=True)
    y, normed = gated_blend_norm(*inputs)
    (first,) = torch.autograd.grad((y * normed).sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"gated_blend_norm_backward.*reference"):
        first.square().sum().backward()


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_compiles_to_one_graph_with_equal_gradients(fresh_compiler: None, gated: bool) -> None:
    *inputs, start, length, weight, bias, eps = arguments(gated)
    inputs = [t for t in inputs if t is not None and t.requires_grad]

    def function(*tensors: Tensor) -> Tensor:
        blend = tensors if gated else (*tensors, None, None)
        return torch.stack(gated_blend_norm(*blend, start, length, weight, bias, eps))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = (
        (f(*inputs), torch.autograd.grad(f(*inputs).square().sum(), inputs)) for f in (compiled, function)
    )
    torch.testing.assert_close(got, want)


def test_vmap_is_a_loop() -> None:
    x, delta, prompt_in, _, *rest = (
        t.detach() if isinstance(t, Tensor) else t for t in arguments(gated=True)
    )
    gates = torch.tensor([0.1, 0.5, 0.9])

    def function(gate: Tensor) -> Tensor:
        return torch.stack(gated_blend_norm(x, delta, prompt_in, gate, *rest))

    torch.testing.assert_close(torch.func.vmap(function)(gates), torch.stack([function(g) for g in gates]))


def test_autocast_blends_in_the_widest_dtype_and_keeps_the_gate() -> None:
    x, delta, prompt_in = torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.randn(2, 2, 6)
    gate = torch.tensor([0.5003], requires_grad=True)  # 0.5 in bfloat16
    delta = delta.bfloat16().requires_grad_()
    norm = {**affine(6), "eps": EPS}
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_blend_norm(x, delta, prompt_in, gate, 1, 2, **norm)
        plain_out = gated_blend_norm(x, delta, None, None, 0, 0, **norm)
        (out[0] + out[1]).sum().backward()
    assert {t.dtype for t in (*out, *plain_out)} == {torch.float32}
    torch.testing.assert_close(
        out, gated_blend_norm_reference(x, delta.float(), prompt_in, gate, 1, 2, **norm)
    )
    torch.testing.assert_close(
        plain_out, gated_blend_norm_reference(x, delta.float(), None, None, 0, 0, **norm)
    )
    assert (delta.grad.dtype, gate.grad.dtype) == (torch.bfloat16, torch.float32)


# What it refuses -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of two dimensions": ({"x": torch.ones(6, 8)}, ValueError, r"`gated_blend_norm`: .*\(6, 8\)"),
    "rows past the end": ({"start": 4}, ValueError, r"start\+length=7.*N=6"),
    "a gate without prompts": ({"prompt_in": None}, ValueError, "pass both or neither"),
    "prompts without a gate": ({"gate": None}, ValueError, "pass both or neither"),
    "rows to blend with nothing": ({"prompt_in": None, "gate": None}, ValueError, "length=3"),
    "a gate of two elements": ({"gate": torch.ones(2)}, ValueError, r"\(2,\)"),
    "a weight of another width": ({"weight": torch.ones(7)}, ValueError, r"`weight`.*\[8\].*\(7,\)"),
    "an integer bias": ({"bias": torch.ones(8).int()}, ValueError, "`bias`.*int32"),
    "a bias on another device": ({"bias": torch.ones(8, device="meta")}, ValueError, "`bias` is on meta"),
    "a trained weight": ({"weight": torch.ones(8, requires_grad=True)}, NotImplementedError, "detach"),
    "a trained bias": (
        {"bias": torch.ones(8, requires_grad=True)},
        NotImplementedError,
        "`bias`.*layer_norm",
    ),
    "delta of another dtype": (
        {"delta": torch.ones(2, 6, 8).double()},
        TypeError,
        "`gated_blend_norm`: `delta` is torch.float64",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_its_value(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {**draw((2, 6, 8, 1, 3), torch.float32), "start": 1, "length": 3, **affine(8), "eps": EPS}
    with pytest.raises(error, match=message):
        gated_blend_norm(**{**given, **changes})


def test_a_trained_weight_is_taken_where_no_gradient_is_made() -> None:
    norm = {name: t.requires_grad_() for name, t in affine(8).items()}
    inputs = draw((2, 6, 8, 1, 3), torch.float32)
    with torch.no_grad():
        out = gated_blend_norm(**inputs, start=1, length=3, **norm, eps=EPS)
    torch.testing.assert_close(out, plain(**inputs, start=1, length=3, **norm, eps=EPS))
