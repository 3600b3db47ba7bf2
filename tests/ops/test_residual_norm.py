"""residual_norm: both outputs and every gradient, in equal and in mixed dtypes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import by_dtype, by_layout, saved_bytes
from test_gated_blend import EPS, affine
from torch import Tensor

from bench.correctness import Inputs, Oracle, assert_same
from fastprompt.ops import Norm, residual_norm, residual_norm_reference

OPERATION = "residual_norm"
OPS = torch.ops.fastprompt

pytestmark = pytest.mark.usefixtures("poisoned_memory")
by_scale = pytest.mark.parametrize("scaled", [False, True], ids=["no scale", "scale"])

Sizes = tuple[int, int, int]  # B, N, D
SIZES: dict[str, Sizes] = {
    "small": (2, 5, 24),
    "an odd width": (2, 7, 33),
    "width 1": (2, 3, 1),
    "empty batch": (0, 6, 16),
    "more rows than a program has": (1, 67, 40),
    "ViT-B": (1, 3, 768),
    "width 1536": (1, 2, 1536),
}
by_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def draw(sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    return {name: torch.randn(sizes).to(device, dtype) for name in ("x", "delta")}


def frozen(D: int, device: str = "cpu", *, scaled: bool = True) -> dict[str, Any]:
    """A layer scale, or None, and a norm."""
    return {"scale": torch.rand(D, device=device) + 0.5 if scaled else None, "norm": affine(D, device)}


def plain(x: Tensor, delta: Tensor, scale: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, in the inputs' dtypes."""
    y = x + delta if scale is None else x + scale.to(delta.dtype) * delta
    weight, bias = (t if t is None else t.to(y.dtype) for t in norm[:2])
    return y, F.layer_norm(y, y.shape[-1:], weight, bias, norm.eps).to(delta.dtype)


def oracle(inputs: Inputs, options: dict[str, Any], **more: Any) -> Oracle:
    exact = partial(residual_norm_reference, **options)
    return Oracle(partial(plain, **options), inputs, exact=exact, **more)


def assert_exact(inputs: Inputs, options: dict[str, Any], given: Inputs | None = None) -> None:
    oracle(inputs, options)(partial(residual_norm, **options), given)


@by_size
def test_reference_is_the_formula(sizes: Sizes) -> None:
    inputs, options = draw(sizes, torch.float64), frozen(sizes[2])
    y, normed = residual_norm_reference(**inputs, **options)
    scale, (weight, bias, _) = options["scale"].double(), options["norm"]
    assert_same(y, inputs["x"] + scale * inputs["delta"])
    deviation = y - y.mean(-1, keepdim=True)
    assert_same(normed, deviation / (deviation.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias)


@by_dtype
@by_size
@by_scale
def test_outputs_and_gradients(
    backend: str, device: str, sizes: Sizes, dtype: torch.dtype, scaled: bool
) -> None:
    assert_exact(draw(sizes, dtype, device), frozen(sizes[2], device, scaled=scaled))


@pytest.mark.parametrize("names", ["", "weight", "bias"], ids=["neither", "weight", "bias"])
def test_norm_without_weight_or_bias(backend: str, device: str, widest: torch.dtype, names: str) -> None:
    options = frozen(24, device)
    given = {name: t if name in names else None for name, t in options["norm"]._asdict().items()}
    options["norm"] = Norm(given["weight"], given["bias"], EPS)
    assert_exact(draw((2, 5, 24), widest, device), options)


@by_layout
def test_strides_do_not_matter(
    backend: str, device: str, widest: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    options = frozen(24, device)
    *weights, eps = options["norm"]
    scale, *weights = (torch.stack([t, t * torch.nan], 1)[:, 0] for t in (options["scale"], *weights))
    options = {"scale": scale, "norm": Norm(*weights, eps)}
    inputs = draw((3, 9, 24), widest, device)
    laid_out = {name: layout(x[:, :, None])[:, :, 0] for name, x in inputs.items()}
    same = {name: x.contiguous() for name, x in laid_out.items()}
    cotangents = [layout(torch.randn(3, 9, 1, 24, device=device))[:, :, 0] for _ in range(2)]
    oracle(same, options, cotangents=cotangents)(partial(residual_norm, **options), laid_out)


@by_scale
@pytest.mark.parametrize("names", ["x", "delta"])
@pytest.mark.parametrize("read", [0, 1], ids=["y only", "the norm only"])
def test_one_input_trains_and_one_output_is_read(
    backend: str, device: str, widest: torch.dtype, read: int, names: str, scaled: bool
) -> None:
    options = frozen(24, device, scaled=scaled)
    functions = [
        lambda f=f, **inputs: f(**inputs, **options)[read]
        for f in (plain, residual_norm_reference, residual_norm)
    ]
    inputs = draw((2, 5, 24), widest, device)
    Oracle(functions[0], inputs, exact=functions[1], trainable=[names])(functions[2])


def test_gradients_of_x_and_delta_are_separate_tensors(backend: str, device: str) -> None:
    inputs = {n: x.requires_grad_() for n, x in draw((2, 5, 24), torch.float32, device).items()}
    residual_norm(**inputs, **frozen(24, device, scaled=False))[1].square().sum().backward()
    x, delta = inputs["x"].grad, inputs["delta"].grad
    kept = delta.clone()  # type: ignore[union-attr]
    x.zero_()  # type: ignore[union-attr]
    assert torch.equal(delta, kept)  # type: ignore[arg-type]


# Mixed dtypes -------------------------------------------------------------------------------------------------------

WIDE, NARROW = torch.float32, torch.float16


@by_scale
@pytest.mark.parametrize("names", ["x delta", "delta", "x"])
@pytest.mark.parametrize(("of_x", "of_delta"), [(WIDE, NARROW), (NARROW, WIDE)], ids=["wide x", "wide delta"])
def test_each_tensor_and_gradient_has_its_dtype(
    backend: str, device: str, of_x: torch.dtype, of_delta: torch.dtype, names: str, scaled: bool
) -> None:
    """What the operator sees of autocast, on every backend."""
    options = frozen(40, device, scaled=scaled)
    inputs = draw((2, 9, 40), WIDE, device)
    inputs = {"x": inputs["x"].to(of_x), "delta": inputs["delta"].to(of_delta)}
    function = partial(at_operator, backend, **options)
    oracle(inputs, options, trainable=names.split())(function)
    assert [t.dtype for t in function(**inputs)] == [WIDE, of_delta]


def at_operator(backend: str, scale: Tensor | None, norm: Norm, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The operator itself, which takes mixed dtypes."""
    y, normed, *_ = OPS.residual_norm(*inputs.values(), scale, *norm, backend)
    return y, normed


@by_scale
def test_autocast_keeps_the_stream_wide_and_gives_the_next_layer_its_dtype(scaled: bool) -> None:
    options = frozen(8, scaled=scaled)
    x, delta = torch.randn(2, 5, 8), torch.randn(2, 5, 8).bfloat16()
    leaves = [t.clone().requires_grad_() for t in (x, delta)]
    with torch.autocast("cpu", torch.bfloat16):
        y, normed = residual_norm(*leaves, **options)
        y_plain = x + delta if options["scale"] is None else torch.addcmul(x, options["scale"], delta.float())
        want = F.layer_norm(y_plain, (8,), *options["norm"])
    assert torch.equal(y, y_plain)
    assert torch.equal(normed, want.bfloat16())
    (y.sum() + normed.sum()).backward()
    assert [t.grad.dtype for t in leaves] == [torch.float32, torch.bfloat16]  # type: ignore[union-attr]


# What it keeps and refuses -------------------------------------------------------------------------------------------


@by_scale
def test_keeps_what_a_norm_keeps(backend: str, device: str, scaled: bool) -> None:
    B, N, D = 2, 50, 32
    inputs = draw((B, N, D), torch.float32, device)
    inputs["x"].requires_grad_()
    of_norm = 4 * (B * N * D + 2 * B * N + D)  # y, mean, rstd; weight
    found = saved_bytes(lambda: residual_norm(**inputs, **frozen(D, device, scaled=scaled))[0])
    assert found == of_norm + 4 * D * scaled


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_norm_reads_y_as_rounded(backend: str, device: str, dtype: torch.dtype) -> None:
    """Rows whose differences vanish in the rounding of a large mean: their norm is the bias."""
    x = torch.full((1, 2, 8), 2.0**11, device=device, dtype=dtype)
    delta = (torch.rand(1, 2, 8, device=device) * torch.finfo(dtype).eps * 2**9).to(dtype)
    norm = affine(8, device)
    y, normed = residual_norm(x, delta, None, norm)
    assert torch.equal(y, x)
    assert torch.equal(normed, norm.bias.to(dtype).expand_as(normed))  # type: ignore[union-attr, arg-type]


ONES = torch.ones(8)
NORM = Norm(ONES, ONES, EPS)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of two dimensions": ({"x": torch.ones(6, 8)}, ValueError, r"\(6, 8\).*reshape"),
    "delta of another size": ({"delta": torch.ones(2, 5, 8)}, ValueError, r"\(2, 5, 8\).*reshape"),
    "delta of another dtype": ({"delta": torch.ones(2, 6, 8).half()}, TypeError, "`delta` is torch.float16"),
    "delta on another device": (
        {"delta": torch.ones(2, 6, 8, device="meta")},
        ValueError,
        "`delta` is on meta",
    ),
    "integers": ({n: torch.ones(2, 6, 8).int() for n in ("x", "delta")}, TypeError, "torch.int32; convert"),
    "a scale of another width": ({"scale": torch.ones(7)}, ValueError, r"`scale`.*\[8\].*\(7,\)"),
    "a scale on another device": ({"scale": ONES.to("meta")}, ValueError, "`scale` is on meta"),
    "a trained scale": (
        {"scale": torch.ones(8, requires_grad=True)},
        NotImplementedError,
        "`scale` requires a gradient.*detach",
    ),
    "a trained weight": (
        {"norm": Norm(torch.ones(8, requires_grad=True), None, EPS)},
        NotImplementedError,
        "`residual_norm`: `norm.weight`.*detach",
    ),
    "a weight of another width": ({"norm": Norm(torch.ones(7), None, EPS)}, ValueError, r"\[8\].*\(7,\)"),
    "an unknown backend": ({"backend": "tpu"}, ValueError, "'tpu'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_its_value(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {**draw((2, 6, 8), torch.float32), "scale": ONES, "norm": NORM}
    with pytest.raises(error, match=message):
        residual_norm(**{**arguments, **changes})


def test_a_trained_scale_is_accepted_without_gradients() -> None:
    inputs, options = draw((2, 5, 8), torch.float64), frozen(8)
    options["scale"].requires_grad_()
    with torch.no_grad():
        assert_same(residual_norm(**inputs, **options), residual_norm_reference(**inputs, **options))
