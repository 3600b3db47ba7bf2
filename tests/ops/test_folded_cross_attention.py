"""folded_cross_attention: a two-layer MLP with a softmax per head, with and without the residual add and the norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from numerics import FLOATS, backends_of, by_layout, dtypes_of, saved_bytes, skip_unless_served
from test_gated_blend import EPS, affine
from torch import Tensor

from bench.correctness import Inputs, Oracle
from fastprompt.ops import (
    FoldedPrompts,
    Norm,
    dispatch,
    folded_cross_attention,
    folded_cross_attention_reference,
)

OPERATION = "folded_cross_attention"
OPS = torch.ops.fastprompt
NAMES = ("x", "key", "bias", "value", "out_bias")
# residual, norm
FORMS = {"alone": (False, False), "residual": (True, False), "norm": (True, True)}

pytestmark = pytest.mark.usefixtures("poisoned_memory")
by_form = pytest.mark.parametrize("form", FORMS)


class Shape(NamedTuple):
    B: int = 2
    N: int = 9
    P: int = 5
    H: int = 3
    D: int = 24
    bias: bool = True


# Few rows and wide ones, many prompts, numbers of heads and prompts that are no powers of two: what a kernel that works
# in tiles has to mask.
SHAPES = {
    "biases": Shape(),
    "no output bias": Shape(bias=False),
    "one prompt": Shape(B=8, P=1),
    "one prompt, one head": Shape(B=8, P=1, H=1),
    "three prompts": Shape(P=3, H=12, D=96),
    "one token": Shape(B=24, N=1),
    "one row": Shape(B=1, N=1, P=20, H=12, D=384),
    "empty batch": Shape(B=0),
    "no tokens": Shape(N=0),
    "one head": Shape(H=1, P=20),
    "one head, an odd width": Shape(H=1, P=40, D=23),
    "two heads": Shape(H=2, P=20),
    "six heads": Shape(H=6, P=10, D=96),
    "six heads, more prompts": Shape(H=6, P=24, D=96),
    "seven heads": Shape(H=7, P=7),
    "more prompts than width": Shape(P=40, D=12),
    "ViT-Ti": Shape(B=1, N=197, P=10, D=192),
    "ViT-B": Shape(B=1, N=67, P=10, H=12, D=768),
    "ViT-B, 20 prompts": Shape(B=1, N=67, P=20, H=12, D=768),
    "twelve heads, 40 prompts": Shape(P=40, H=12, D=96),
    "width 1000": Shape(D=1000),
    "two columns in the last piece": Shape(D=130),
}


def draw(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    H, P, D = shape.H, shape.P, shape.D
    inputs = {
        "x": torch.randn(shape.B, shape.N, D),
        "key": torch.randn(H, P, D) / math.sqrt(D),
        "bias": torch.randn(H, P),
        "value": torch.randn(H, P, D),
        "out_bias": torch.randn(D) if shape.bias else None,
    }
    return {name: None if x is None else x.to(device, dtype) for name, x in inputs.items()}


def softmax_mlp(
    x: Tensor, folded: FoldedPrompts, *, residual: bool = False, norm: Norm | None = None
) -> tuple[Tensor, Tensor | None]:
    """The formula in plain PyTorch, one head after the other, in the inputs' dtype."""
    key, bias, value, out_bias = folded
    y: Any = sum((x @ key[h].T + bias[h]).softmax(-1) @ value[h] for h in range(key.shape[0]))
    y = y if out_bias is None else y + out_bias
    y = x + y if residual else y
    if norm is None:
        return y, None
    weight, bias = (t if t is None else t.to(x.dtype) for t in norm[:2])  # type: ignore[assignment]
    return y, F.layer_norm(y, y.shape[-1:], weight, bias, norm.eps)


def of(function: Callable[..., Any], residual: bool = False, norm: Norm | None = None) -> Callable[..., Any]:
    """`function` of the tensors by name."""

    def call(x: Tensor, **folded: Any) -> tuple[Tensor, Tensor | None]:
        return function(x, FoldedPrompts(**folded), residual=residual, norm=norm)

    return call


def form_of(form: str, D: int, device: str = "cpu") -> dict[str, Any]:
    residual, norm = FORMS[form]
    return {"residual": residual, "norm": affine(D, device) if norm else None}


def oracle(inputs: Inputs, options: dict[str, Any], **more: Any) -> Oracle:
    return Oracle(
        of(softmax_mlp, **options), inputs, exact=of(folded_cross_attention_reference, **options), **more
    )


def assert_exact(backend: str, inputs: Inputs, options: dict[str, Any], given: Inputs | None = None) -> None:
    norm = options.get("norm")
    affine_or_none = (None, None, None) if norm is None else norm
    skip_unless_served(OPERATION, backend, *inputs.values(), options["residual"], *affine_or_none, True)
    oracle(inputs, options)(of(folded_cross_attention, **options), given)


@pytest.mark.parametrize("shape", [Shape(), Shape(bias=False), Shape(P=1, H=1)], ids=str)
@by_form
def test_reference_is_the_formula(shape: Shape, form: str) -> None:
    inputs, options = draw(shape, torch.float64), form_of(form, shape.D)
    oracle(inputs, options)(of(softmax_mlp, **options))


def cases() -> Iterator[Any]:
    """All shapes, forms and dtypes; interpreted, each shape in one form and dtype (their code is independent)."""
    for backend in backends_of(OPERATION):
        interpreted = backend == "triton" and not torch.cuda.is_available()
        for i, (name, shape) in enumerate(SHAPES.items()):
            every = [c for c in product(FORMS, FLOATS) if c[1] in dtypes_of(backend)]
            for form, dtype in [every[i % len(every)]] if interpreted else every:
                label = f"{backend}-{form}-{name}-{str(dtype).removeprefix('torch.')}"
                yield pytest.param(backend, shape, form, dtype, id=label)


@pytest.mark.parametrize(("name", "shape", "form", "dtype"), list(cases()))
def test_outputs_and_gradients(name: str, shape: Shape, form: str, dtype: torch.dtype) -> None:
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    with dispatch.use_backend(name):
        assert_exact(name, draw(shape, dtype, device), form_of(form, shape.D, device))


@pytest.mark.parametrize("names", [(), ("weight",), ("bias",)], ids=["neither", "weight", "bias"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_norm_without_weight_or_bias(
    backend: str, device: str, widest: torch.dtype, names: tuple[str, ...], residual: bool
) -> None:
    whole = affine(24, device)._asdict()
    norm = Norm(*(whole[name] if name in names else None for name in ("weight", "bias")), EPS)  # type: ignore[misc]
    assert_exact(backend, draw(Shape(), widest, device), {"residual": residual, "norm": norm})


@by_layout
@pytest.mark.parametrize("form", ["alone", "norm"])
def test_strides_do_not_matter(
    backend: str, device: str, widest: torch.dtype, layout: Any, form: str
) -> None:
    inputs, options = draw(Shape(), widest, device), form_of(form, 24, device)
    if options["norm"] is not None:
        *weights, eps = options["norm"]
        options["norm"] = Norm(*(torch.stack([t, t * torch.nan], 1)[:, 0] for t in weights), eps)
    laid_out = {
        **inputs,
        "x": layout(inputs["x"][:, :, None])[:, :, 0],
        "key": layout(inputs["key"][None])[0],
        "value": layout(inputs["value"][None])[0],
        "bias": layout(inputs["bias"][None, None])[0, 0],
    }
    same = {name: x.contiguous() for name, x in laid_out.items()}
    cotangents = [
        layout(torch.randn(2, 9, 1, 24, device=device))[:, :, 0] for _ in range(1 + (form == "norm"))
    ]
    oracle(same, options, cotangents=cotangents)(of(folded_cross_attention, **options), laid_out)


@pytest.mark.parametrize("read", [0, 1], ids=["y only", "the norm only"])
def test_one_output_may_not_be_read(backend: str, device: str, widest: torch.dtype, read: int) -> None:
    options = form_of("norm", 24, device)
    functions = [
        lambda f=f, **inputs: of(f, **options)(**inputs)[read]
        for f in (softmax_mlp, folded_cross_attention_reference, folded_cross_attention)
    ]
    Oracle(functions[0], draw(Shape(), widest, device), exact=functions[1])(functions[2])


SUBSETS = [" ".join(names) for size in range(1, 6) for names in combinations(NAMES, size)]


@by_form
@pytest.mark.parametrize("names", SUBSETS)
def test_each_subset_of_inputs_gets_its_gradients(names: str, form: str) -> None:
    options = form_of(form, 6)
    inputs = draw(Shape(B=2, N=4, P=3, H=2, D=6), torch.float64)
    oracle(inputs, options, trainable=names.split())(of(folded_cross_attention, **options))


@pytest.mark.parametrize("names", ["x", "key", "value", "out_bias", "x bias", "bias value", "key out_bias"])
@pytest.mark.parametrize("form", ["alone", "norm"])
def test_kernels_give_subsets_of_gradients(
    backend: str, device: str, widest: torch.dtype, names: str, form: str
) -> None:
    options = form_of(form, 6, device)
    inputs = draw(Shape(B=2, N=4, P=3, H=2, D=6), widest, device)
    oracle(inputs, options, trainable=names.split())(of(folded_cross_attention, **options))


@by_form
def test_large_scores_do_not_overflow(backend: str, device: str, form: str) -> None:
    inputs, options = draw(Shape(H=6, P=10), torch.float32, device), form_of(form, 24, device)
    inputs["key"] = inputs["key"] * 300
    for out in of(folded_cross_attention, **options)(**inputs):
        assert out is None or out.isfinite().all()


def test_a_very_negative_bias_switches_its_prompt_off(backend: str, device: str, widest: torch.dtype) -> None:
    inputs = draw(Shape(), widest, device)
    inputs["bias"][:, 2] = -1e30
    inputs["value"][:, 2] = 1e10
    rest = [0, 1, 3, 4]
    fewer = {n: x[:, rest] if n in ("key", "bias", "value") else x for n, x in inputs.items()}
    Oracle(of(softmax_mlp), fewer, backward=False)(lambda **_: of(folded_cross_attention)(**inputs))


def test_y_is_the_same_with_and_without_a_norm(backend: str, device: str, widest: torch.dtype) -> None:
    inputs = draw(Shape(D=130), widest, device)
    alone, none = of(folded_cross_attention, residual=True)(**inputs)
    assert none is None
    assert torch.equal(of(folded_cross_attention, **form_of("norm", 130, device))(**inputs)[0], alone)


def test_a_large_mean_costs_no_digits_of_the_variance(backend: str, device: str) -> None:
    inputs = draw(Shape(D=200), torch.float32, device)
    inputs["x"] += 300
    assert_exact(backend, inputs, {"residual": True, "norm": Norm(None, None, EPS)})


def test_value_may_have_another_width(backend: str, device: str, widest: torch.dtype) -> None:
    inputs = draw(Shape(bias=False), widest, device)
    inputs["value"] = torch.randn(3, 5, 20, device=device).to(widest)
    for norm in (None, affine(20, device)):
        assert_exact(backend, inputs, {"residual": False, "norm": norm})


# What is kept -------------------------------------------------------------------------------------------------------


@by_form
@pytest.mark.parametrize(
    ("trainable", "kept"),
    [
        (set(NAMES), {"x", "key", "value", "weights"}),
        ({"x"}, {"key", "value", "weights"}),
        ({"key", "bias", "value"}, {"x", "value", "weights"}),
        ({"value"}, {"weights"}),
        ({"out_bias"}, set()),
    ],
    ids=["everything", "x", "prompts", "value", "output bias"],
)
def test_only_what_a_gradient_needs_is_kept(trainable: set[str], kept: set[str], form: str) -> None:
    inputs, options = draw(Shape(N=100), torch.float32), form_of(form, 24)
    for name in trainable:
        inputs[name].requires_grad_()
    sizes = {name: 4 * x.numel() for name, x in inputs.items()}
    sizes["weights"] = 4 * 2 * 100 * 3 * 5
    of_norm = 4 * (2 * 100 * (24 + 2) + 24) if form == "norm" else 0  # y, mean, rstd; weight
    found = saved_bytes(lambda: of(folded_cross_attention, **options)(**inputs)[0])
    assert found == sum(sizes[name] for name in kept) + of_norm


def test_without_gradients_the_operator_returns_no_weights(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = dispatch._backends[backend].kernels[OPERATION]
    run, returned = kernel.run, []

    def spy(*args: Any) -> tuple[Tensor, ...]:
        outputs = run(*args)
        returned.append(outputs[1].shape)
        return outputs

    monkeypatch.setattr(kernel, "run", spy)
    inputs = draw(Shape(), torch.float32, device)
    of(folded_cross_attention)(**inputs)
    inputs["value"].requires_grad_()
    of(folded_cross_attention)(**inputs)
    with torch.no_grad():
        of(folded_cross_attention)(**inputs)
    assert returned == [(0,), (2, 9, 3, 5), (0,)]


# The operator -------------------------------------------------------------------------------------------------------


def test_the_operator_itself_refuses_to_train_without_weights() -> None:
    inputs = [x.requires_grad_() for x in draw(Shape(), torch.float64).values()]
    with pytest.raises(ValueError, match="`keep` must be True"):
        OPS.folded_cross_attention(*inputs, False, None, None, None, False, "eager")


@pytest.mark.parametrize("form", ["residual", "norm"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_autocast_keeps_the_residual_stream_in_its_dtype_and_norms_in_the_products(
    bias: bool, form: str
) -> None:
    inputs, options = draw(Shape(bias=bias), torch.float32), form_of(form, 24)
    leaves = {n: x if x is None else x.clone().requires_grad_() for n, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [t for t in of(folded_cross_attention, **options)(**leaves) if t is not None]
        alone, _ = of(folded_cross_attention)(**inputs)
    assert alone.dtype == torch.bfloat16
    assert [t.dtype for t in outputs] == [torch.float32, torch.bfloat16][: len(outputs)]
    assert torch.equal(outputs[0], inputs["x"] + alone)
    sum(t.square().sum() for t in outputs).backward()  # type: ignore[union-attr]
    assert all(x is None or x.grad.dtype == torch.float32 for x in leaves.values())


@pytest.mark.parametrize("form", ["residual", "norm"])
def test_a_wide_residual_stream_with_narrow_matrices(backend: str, device: str, form: str) -> None:
    """What the operators see of autocast, on every backend."""
    options = form_of(form, 24, device)
    inputs = {n: x if n == "x" else x.half() for n, x in draw(Shape(), torch.float32, device).items()}

    def plain(x: Tensor, **folded: Tensor) -> tuple[Tensor, Tensor | None]:
        y, _ = softmax_mlp(x.to(folded["key"].dtype), FoldedPrompts(**folded))
        y, norm = x + y, options["norm"]
        normed = None if norm is None else F.layer_norm(y, (24,), norm.weight, norm.bias, EPS)
        return y, None if normed is None else normed.to(folded["key"].dtype)

    exact = of(folded_cross_attention_reference, **options)
    Oracle(plain, inputs, exact=exact)(lambda **leaves: mixed(backend, options, **leaves))


def mixed(backend: str, options: dict[str, Any], **inputs: Tensor) -> tuple[Tensor, ...]:
    """The operator itself, which takes mixed dtypes."""
    norm = (None, None, None) if options["norm"] is None else options["norm"]
    y, _, normed, _, _ = OPS.folded_cross_attention(*inputs.values(), True, *norm, True, backend)
    return (y,) if options["norm"] is None else (y, normed)


# What it refuses ----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of two dimensions": ({"x": torch.ones(9, 24)}, ValueError, "fold_prompts"),
    "a key of another width": ({"key": torch.ones(3, 5, 20)}, ValueError, "fold_prompts"),
    "a bias of another shape": ({"bias": torch.ones(5, 3)}, ValueError, "fold_prompts"),
    "an output bias of another width": ({"out_bias": torch.ones(20)}, ValueError, r"\[D=24\]; got \(20,\)"),
    "a residual of another width": (
        {"value": torch.ones(3, 5, 20), "out_bias": None, "residual": True},
        ValueError,
        r"\[H, P, D=24\]; got \(3, 5, 20\)",
    ),
    "another dtype": (
        {"key": torch.ones(3, 5, 24).double()},
        TypeError,
        "`folded.key` is torch.float64 and `x` torch.float32",
    ),
    "a value on another device": (
        {"value": torch.ones(3, 5, 24, device="meta")},
        ValueError,
        "`folded.value` is on meta",
    ),
    "a weight of another width": (
        {"norm": Norm(torch.ones(7), None, EPS)},
        ValueError,
        r"`norm.weight`.*\[24\].*\(7,\)",
    ),
    "a trained bias": (
        {"norm": Norm(None, torch.ones(24, requires_grad=True), EPS)},
        NotImplementedError,
        "`folded_cross_attention`: `norm.bias`.*layer_norm",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_its_value(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {**draw(Shape(), torch.float32), **changes}
    options = {name: given.pop(name) for name in ("residual", "norm") if name in given}
    with pytest.raises(error, match=message):
        of(folded_cross_attention, **options)(**given)


@pytest.mark.skipif("triton" not in backends_of(OPERATION), reason="Triton runs nothing here")
def test_a_norm_too_wide_for_its_backward_is_refused_by_the_forward_that_trains() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = draw(Shape(B=1, N=1, P=2, H=1, D=5000), torch.float32, device)
    options = form_of("norm", 5000, device)
    function = partial(of(folded_cross_attention, **options), **inputs)
    with dispatch.use_backend("triton"):
        assert function()[1].shape == (1, 1, 5000)
        inputs["x"].requires_grad_()
        with pytest.raises(NotImplementedError, match=r"width 5000 is not supported \(1 to 4096\)"):
            function()
