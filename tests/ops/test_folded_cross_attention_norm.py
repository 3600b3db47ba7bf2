"""folded_cross_attention_norm: both outputs and every gradient, as an operator, and what it refuses."""

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
    skip_unless_served,
)
from test_folded_cross_attention import NAMES, SHAPES, Shape, draw, softmax_mlp
from test_gated_blend_norm import affine
from torch import Tensor

from fastprompt.ops import (
    FoldedPrompts,
    folded_cross_attention,
    folded_cross_attention_norm,
    folded_cross_attention_norm_reference,
)

OPERATION = "folded_cross_attention_norm"
OPS = torch.ops.fastprompt
EPS = 1e-6

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# And widths that are cut into pieces, the last of them short.
by_shape = pytest.mark.parametrize(
    "shape",
    [*SHAPES.values(), Shape(D=1000), Shape(D=130)],
    ids=[*SHAPES, "width 1000", "two columns in the last piece"],
)


def plain(
    x: Tensor,
    key: Tensor,
    bias: Tensor,
    value: Tensor,
    out_bias: Tensor | None,
    norm: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, in the inputs' dtype."""
    y = softmax_mlp(x, key, bias, value, out_bias, residual=True)
    weights = {name: t.to(x.dtype) for name, t in norm.items()}
    return y, F.layer_norm(y, y.shape[-1:], **weights, eps=EPS)


def of(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`function` with the signature of `plain`."""

    def call(
        x: Tensor, key: Tensor, bias: Tensor, value: Tensor, out_bias: Tensor | None, norm: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return function(
            x, FoldedPrompts(key, bias, value, out_bias), norm.get("weight"), norm.get("bias"), EPS
        )

    return call


fused, reference = of(folded_cross_attention_norm), of(folded_cross_attention_norm_reference)


def both(function: Callable[..., tuple[Tensor, Tensor]], norm: dict[str, Tensor]) -> Callable[..., Tensor]:
    """y and LayerNorm(y) as one tensor [2, B, N, D]."""
    return lambda **inputs: torch.stack(function(**inputs, norm=norm))


def assert_exact(backend: str, inputs: Inputs, norm: dict[str, Tensor], given: Inputs | None = None) -> None:
    skip_unless_served(OPERATION, backend, *inputs.values(), *norm.values(), EPS, True)
    assert_as_exact_as_eager(*(both(f, norm) for f in (fused, plain, reference)), inputs, given=given)


@by_dtype
@by_shape
def test_outputs_and_gradients(backend: str, device: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_exact(backend, draw(shape, dtype, device), affine(shape.D, device))


@pytest.mark.parametrize("names", [(), ("weight",), ("bias",)], ids=["neither", "weight", "bias"])
def test_norm_without_weight_or_bias(
    backend: str, device: str, widest: torch.dtype, names: tuple[str, ...]
) -> None:
    norm = affine(24, device)
    inputs = draw(Shape(), widest, device)
    functions = (both(f, {name: norm[name] for name in names}) for f in (fused, reference))
    cotangent = torch.randn(2, 2, 9, 24, dtype=widest, device=device)
    assert_close(*(evaluate(f, inputs, cotangent) for f in functions))


@by_layout
def test_strides_do_not_matter(backend: str, device: str, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = draw(Shape(), torch.float32, device)
    laid_out = {**inputs, "x": layout(inputs["x"][:, :, None])[:, :, 0]}
    norm = {n: torch.stack([t, t * torch.nan], 1)[:, 0] for n, t in affine(24, device).items()}
    same = {**inputs, "x": laid_out["x"].contiguous()}
    assert_exact(backend, same, norm, given=laid_out)


@by_layout
def test_strides_of_the_incoming_gradients_do_not_matter(
    backend: str, device: str, widest: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    inputs, norm = draw(Shape(), widest, device), affine(24, device)
    cotangents = [layout(torch.randn(2, 9, 1, 24, dtype=widest, device=device))[:, :, 0] for _ in range(2)]
    results = []
    for function in (fused, reference):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        outputs = function(**leaves, norm=norm)
        torch.autograd.backward(outputs, cotangents)
        results.append({"output": outputs[0].detach(), **{name: x.grad for name, x in leaves.items()}})
    assert_close(*results)


@pytest.mark.parametrize("read", [0, 1], ids=["y alone", "the norm alone"])
def test_one_output_may_be_read_by_nobody(backend: str, device: str, widest: torch.dtype, read: int) -> None:
    inputs, norm = draw(Shape(), widest, device), affine(24, device)
    cotangent = torch.randn(2, 9, 24, dtype=widest, device=device)
    functions = (both(f, norm) for f in (fused, reference))
    assert_close(*(evaluate(lambda f=f, **leaves: f(**leaves)[read], inputs, cotangent) for f in functions))


@pytest.mark.parametrize(
    "trainable",
    [set(names) for size in range(1, 6) for names in combinations(NAMES, size)],
    ids=lambda names: "+".join(sorted(names)),
)
def test_each_subset_of_inputs_gets_its_gradients(
    backend: str, device: str, widest: torch.dtype, trainable: set[str]
) -> None:
    inputs, norm = draw(Shape(B=2, N=4, P=3, H=2, D=6), widest, device), affine(6, device)
    cotangent = torch.randn(2, 2, 4, 6, dtype=widest, device=device)
    functions = (both(f, norm) for f in (fused, reference))
    assert_close(*(evaluate(f, inputs, cotangent, trainable) for f in functions))


def test_y_is_what_the_form_without_a_norm_gives(backend: str, device: str, widest: torch.dtype) -> None:
    inputs = draw(Shape(D=130), widest, device)
    y, _ = fused(**inputs, norm={})
    assert torch.equal(y, folded_cross_attention(inputs.pop("x"), FoldedPrompts(**inputs), residual=True))


def test_a_large_mean_costs_no_digits_of_the_variance(backend: str, device: str) -> None:
    inputs = draw(Shape(D=200), torch.float32, device)
    inputs["x"] += 300
    _, normed = fused(**inputs, norm={})
    wide = {name: x.double() for name, x in inputs.items()}
    torch.testing.assert_close(normed.double(), reference(**wide, norm={})[1], rtol=0, atol=1e-3)


def test_keeps_y_and_two_numbers_a_row_beside_what_its_parts_keep(backend: str, device: str) -> None:
    inputs, norm = draw(Shape(N=100), torch.float32, device), affine(24, device)
    for x in inputs.values():
        x.requires_grad_()
    parts = saved_bytes(
        lambda: folded_cross_attention(
            inputs["x"], FoldedPrompts(*(inputs[name] for name in NAMES[1:])), residual=True
        )
    )
    assert saved_bytes(lambda: fused(**inputs, norm=norm)[1]) == parts + 4 * (2 * 100 * (24 + 2) + 24)


def test_inputs_are_left_alone(backend: str, device: str) -> None:
    inputs, norm = draw(Shape(), torch.float32, device), affine(24, device)
    before = {name: x.clone() for name, x in {**inputs, **norm}.items()}
    evaluate(both(fused, norm), inputs, torch.randn(2, 2, 9, 24, device=device))
    assert all(torch.equal(x, before[name]) for name, x in {**inputs, **norm}.items())


# The operator ----------------------------------------------------------------------------------------------------


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """What the operator takes up to `eps`."""
    inputs = draw(Shape(B=2, N=3, P=3, H=2, D=4), dtype).values()
    return (*(x.requires_grad_() for x in inputs), *(t.to(dtype) for t in affine(4).values()), EPS)


@pytest.mark.parametrize("trains", [True, False], ids=["trains", "nothing trains"])
def test_opcheck(trains: bool) -> None:
    given = arguments()
    if not trains:
        given = tuple(t.detach() if isinstance(t, Tensor) else t for t in given)
    torch.library.opcheck(OPS.folded_cross_attention_norm.default, (*given, trains, "auto"))


def test_gradcheck() -> None:
    *tensors, weight, bias, eps = arguments(torch.float64)

    def function(x: Tensor, *folded: Tensor) -> tuple[Tensor, Tensor]:
        return folded_cross_attention_norm(x, FoldedPrompts(*folded), weight, bias, eps)

    assert torch.autograd.gradcheck(function, tensors)


def test_the_operator_itself_refuses_to_train_without_weights() -> None:
    with pytest.raises(ValueError, match="`keep` must be True"):
        OPS.folded_cross_attention_norm(*arguments(), False, "eager")


@pytest.mark.parametrize("trainable", [{"x"}, set(NAMES)], ids=["x", "everything"])
def test_compiles_to_one_graph_with_equal_gradients(fresh_compiler: None, trainable: set[str]) -> None:
    run = both(fused, affine(24))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs, cotangent = draw(Shape(), torch.float32), torch.randn(2, 2, 9, 24)
    want = evaluate(run, inputs, cotangent, trainable)
    assert_close(evaluate(compiled, inputs, cotangent, trainable), want, 1e-5)


def test_autocast_keeps_the_residual_stream_and_its_norm_in_their_dtype() -> None:
    inputs, norm = draw(Shape(), torch.float32), affine(24)
    inputs["key"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, normed = fused(**inputs, norm=norm)
        x, *folded = inputs.values()
        alone = folded_cross_attention(x, FoldedPrompts(*folded), residual=True)
        (y + normed).square().sum().backward()
    torch.testing.assert_close(y, alone, rtol=0, atol=0)
    assert (y.dtype, normed.dtype, inputs["key"].grad.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(normed, F.layer_norm(y, (24,), **norm, eps=EPS))


def test_a_wide_residual_stream_with_narrow_matrices(backend: str, device: str) -> None:
    """What the operator sees of autocast, on every backend."""
    inputs = {n: x if n == "x" else x.half() for n, x in draw(Shape(), torch.float32, device).items()}
    norm = affine(24, device)
    y, normed, weights, mean, rstd = OPS.folded_cross_attention_norm(
        *inputs.values(), *norm.values(), EPS, True, backend
    )
    assert [t.dtype for t in (y, normed, weights, mean, rstd)] == [
        *(torch.float32, torch.float32, torch.float16, torch.float32, torch.float32)
    ]
    want = reference(**{n: x.double() for n, x in inputs.items()}, norm=norm)
    torch.testing.assert_close(y.double(), want[0], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(normed.double(), want[1], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(mean, y.mean(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rstd, (y.var(-1, correction=0) + EPS).rsqrt(), rtol=1e-5, atol=1e-5)


# What it refuses -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of two dimensions": ({"x": torch.ones(9, 24)}, ValueError, "`folded_cross_attention_norm`: `x`"),
    "a value of another width": (
        {"value": torch.ones(3, 5, 20), "out_bias": None},
        ValueError,
        r"\[H, P, D=24\]; got \(3, 5, 20\)",
    ),
    "another dtype": ({"key": torch.ones(3, 5, 24).double()}, TypeError, "`folded.key` is torch.float64"),
    "a weight of another width": ({"weight": torch.ones(7)}, ValueError, r"`weight`.*\[24\].*\(7,\)"),
    "a trained bias": (
        {"norm_bias": torch.ones(24, requires_grad=True)},
        NotImplementedError,
        "`bias`.*`folded_cross_attention` and",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_its_value(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {**draw(Shape(), torch.float32), "weight": torch.ones(24), "norm_bias": torch.ones(24), **changes}
    folded = FoldedPrompts(*(given[name] for name in NAMES[1:]))
    with pytest.raises(error, match=message):
        folded_cross_attention_norm(given["x"], folded, given["weight"], given["norm_bias"], EPS)
