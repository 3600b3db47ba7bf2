"""folded_cross_attention: a two-layer MLP with a softmax per head, with and without the residual add."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
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
from torch import Tensor

from fastprompt.ops import FoldedPrompts, dispatch, folded_cross_attention

OPERATION = "folded_cross_attention"
NAMES = ("x", "key", "bias", "value", "out_bias")

pytestmark = pytest.mark.usefixtures("poisoned_memory")
by_residual = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])


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
    "ViT-S": Shape(B=1, N=67, P=16, H=6, D=384),
    "ViT-B": Shape(B=1, N=67, P=10, H=12, D=768),
    "ViT-B, 20 prompts": Shape(B=1, N=67, P=20, H=12, D=768),
    "twelve heads, 24 prompts": Shape(B=1, N=9, P=24, H=12, D=96),
    "twelve heads, 40 prompts": Shape(P=40, H=12, D=96),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def draw(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
    H, P, D = shape.H, shape.P, shape.D
    inputs = {
        "x": torch.randn(shape.B, shape.N, D),
        "key": torch.randn(H, P, D) / math.sqrt(D),
        "bias": torch.randn(H, P),
        "value": torch.randn(H, P, D),
        "out_bias": torch.randn(D) if shape.bias else None,
    }
    return {name: None if x is None else x.to(device, dtype) for name, x in inputs.items()}


def folded(
    x: Tensor, key: Tensor, bias: Tensor, value: Tensor, out_bias: Tensor | None, residual: bool = False
) -> Tensor:
    return folded_cross_attention(x, FoldedPrompts(key, bias, value, out_bias), residual=residual)


def softmax_mlp(
    x: Tensor, key: Tensor, bias: Tensor, value: Tensor, out_bias: Tensor | None, residual: bool = False
) -> Tensor:
    """The formula, one head after the other."""
    out = sum((x @ key[h].T + bias[h]).softmax(-1) @ value[h] for h in range(key.shape[0]))
    out = out if out_bias is None else out + out_bias
    return x + out if residual else out  # type: ignore[return-value]


def assert_exact(backend: str, residual: bool, inputs: Inputs, given: Inputs | None = None) -> None:
    skip_unless_served(OPERATION, backend, *inputs.values(), residual, True)
    plain = partial(softmax_mlp, residual=residual)
    assert_as_exact_as_eager(partial(folded, residual=residual), plain, plain, inputs, given=given)


@by_dtype
@by_shape
@by_residual
def test_output_and_gradients(
    backend: str, device: str, shape: Shape, dtype: torch.dtype, residual: bool
) -> None:
    assert_exact(backend, residual, draw(shape, dtype, device))


@by_layout
@by_residual
def test_strides_do_not_matter(backend: str, device: str, layout: Any, residual: bool) -> None:
    inputs = draw(Shape(), torch.float32, device)
    laid_out: Inputs = {
        **inputs,
        "x": layout(inputs["x"][:, :, None])[:, :, 0],  # type: ignore[index]
        "key": layout(inputs["key"][None])[0],  # type: ignore[index]
        "value": layout(inputs["value"][None])[0],  # type: ignore[index]
        "bias": layout(inputs["bias"][None, None])[0, 0],  # type: ignore[index]
    }
    same = {name: None if x is None else x.contiguous() for name, x in laid_out.items()}
    assert_exact(backend, residual, same, laid_out)


@by_layout
def test_strides_of_the_cotangent_do_not_matter(backend: str, device: str, layout: Any) -> None:
    inputs = draw(Shape(), torch.float32, device)
    cotangent = layout(torch.randn(2, 9, 1, 24, device=device))[:, :, 0]
    run = partial(folded, residual=True)
    want = evaluate(run, inputs, cotangent.contiguous())
    assert_close(evaluate(run, inputs, cotangent), want, 1e-6)


@by_residual
@pytest.mark.parametrize(
    "trainable",
    [set(names) for size in range(1, 6) for names in combinations(NAMES, size)],
    ids=lambda names: "+".join(sorted(names)),
)
def test_each_subset_of_inputs_gets_its_gradients(
    backend: str, device: str, trainable: set[str], residual: bool
) -> None:
    inputs = draw(Shape(B=2, N=4, P=3, H=2, D=6), torch.float32, device)
    cotangent = torch.randn(2, 4, 6, device=device)
    wide = {name: None if x is None else x.double() for name, x in inputs.items()}
    want = evaluate(partial(softmax_mlp, residual=residual), wide, cotangent, trainable)
    assert_close(evaluate(partial(folded, residual=residual), inputs, cotangent, trainable), want, 1e-5)


@by_residual
def test_gradcheck(residual: bool) -> None:
    inputs = draw(Shape(B=2, N=3, P=3, H=2, D=4), torch.float64)
    leaves = tuple(x.requires_grad_() for x in inputs.values() if x is not None)
    assert torch.autograd.gradcheck(lambda *t: folded(*t, residual=residual), leaves)


@by_residual
def test_large_scores_do_not_overflow(backend: str, device: str, residual: bool) -> None:
    inputs = draw(Shape(H=6, P=10), torch.float32, device)
    inputs["key"] = inputs["key"] * 300  # type: ignore[operator]
    assert folded(**inputs, residual=residual).isfinite().all()  # type: ignore[arg-type]


def test_a_very_negative_bias_switches_its_prompt_off(backend: str, device: str) -> None:
    inputs = draw(Shape(), torch.float32, device)
    inputs["bias"][:, 2] = -1e30  # type: ignore[index]
    inputs["value"][:, 2] = 1e10  # type: ignore[index]
    rest = [0, 1, 3, 4]
    fewer = {n: x[:, rest] if n in ("key", "bias", "value") else x for n, x in inputs.items()}  # type: ignore[index]
    torch.testing.assert_close(folded(**inputs), folded(**fewer))  # type: ignore[arg-type]


# What is kept -------------------------------------------------------------------------------------------------------


def bytes_kept(trainable: set[str], residual: bool) -> tuple[int, dict[str, int]]:
    """What autograd keeps of a call, and the size of each tensor of it."""
    inputs = draw(Shape(N=100), torch.float32)
    for name in trainable:
        inputs[name].requires_grad_()  # type: ignore[union-attr]
    sizes = {name: 4 * x.numel() for name, x in inputs.items() if x is not None}
    sizes["weights"] = 4 * 2 * 100 * 3 * 5
    return saved_bytes(lambda: folded(**inputs, residual=residual)), sizes  # type: ignore[arg-type]


@by_residual
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
def test_only_what_a_gradient_needs_is_kept(trainable: set[str], kept: set[str], residual: bool) -> None:
    found, sizes = bytes_kept(trainable, residual)
    assert found == sum(sizes[name] for name in kept)


def test_without_gradients_the_operator_returns_no_weights(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation = dispatch._implementations[OPERATION][backend]
    returned = []

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        out, weights = implementation.run(*args)
        returned.append(weights.shape)
        return out, weights

    spied = dispatch.Implementation(run, implementation.can_run)
    monkeypatch.setitem(dispatch._implementations[OPERATION], backend, spied)
    inputs = draw(Shape(), torch.float32, device)
    folded(**inputs)  # type: ignore[arg-type]
    inputs["value"].requires_grad_()  # type: ignore[union-attr]
    folded(**inputs)  # type: ignore[arg-type]
    with torch.no_grad():
        folded(**inputs)  # type: ignore[arg-type]
    assert returned == [(0,), (2, 9, 3, 5), (0,)]


def test_the_operator_itself_refuses_to_train_without_weights() -> None:
    inputs = draw(Shape(), torch.float32)
    inputs["x"].requires_grad_()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="`keep` must be True"):
        torch.ops.fastprompt.folded_cross_attention(*inputs.values(), False, False, "eager")


# Autocast -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_autocast_keeps_the_residual_stream_in_its_dtype(bias: bool) -> None:
    inputs = draw(Shape(bias=bias), torch.float32)
    leaves = {n: x if x is None else x.clone().requires_grad_() for n, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        fused = folded(**leaves, residual=True)  # type: ignore[arg-type]
        alone = folded(**inputs)  # type: ignore[arg-type]
    assert (fused.dtype, alone.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(fused, inputs["x"] + alone, rtol=0, atol=0)
    cotangent = torch.randn_like(fused)
    fused.backward(cotangent)
    wide = {n: x if x is None else x.double() for n, x in inputs.items()}
    want = evaluate(partial(softmax_mlp, residual=True), wide, cotangent.double())
    for name, x in leaves.items():
        if x is not None and x.grad is not None:
            assert x.grad.dtype == torch.float32
            torch.testing.assert_close(x.grad.double(), want[f"gradient of {name}"], rtol=0.05, atol=0.05)


def test_a_wide_residual_stream_with_narrow_matrices(backend: str, device: str) -> None:
    """What the operator sees of autocast, on every backend."""
    inputs = {n: x if n == "x" or x is None else x.half() for n, x in draw(Shape(), torch.float32).items()}
    given = {n: None if x is None else x.to(device) for n, x in inputs.items()}
    out, weights = torch.ops.fastprompt.folded_cross_attention(*given.values(), True, True, backend)
    want = partial(softmax_mlp, residual=True)(**{n: x.double() for n, x in inputs.items()})  # type: ignore[union-attr]
    assert (out.dtype, weights.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(out.double().cpu(), want, rtol=5e-3, atol=5e-3)
    grad = torch.randn_like(out)
    saved = (given["x"], given["key"], given["value"], weights)
    gradients = torch.ops.fastprompt.folded_cross_attention_backward(grad, *saved, True, [True] * 5, backend)
    assert [g.dtype for g in gradients] == [grad.dtype, *[torch.float16] * 3, grad.dtype]
    wide = {n: x if x is None else x.double() for n, x in inputs.items()}
    exact = evaluate(partial(softmax_mlp, residual=True), wide, grad.double().cpu())
    for name, got in zip(NAMES, gradients, strict=True):
        torch.testing.assert_close(got.double().cpu(), exact[f"gradient of {name}"], rtol=0.02, atol=0.02)


# What it refuses ----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "x of two dimensions": ({"x": torch.ones(9, 24)}, "fold_prompts"),
    "a key of another width": ({"key": torch.ones(3, 5, 20)}, "fold_prompts"),
    "a bias of another shape": ({"bias": torch.ones(5, 3)}, "fold_prompts"),
    "a residual of another width": (
        {"value": torch.ones(3, 5, 20), "out_bias": None, "residual": True},
        r"\[H, P, D=24\]; got \(3, 5, 20\)",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folded(**{**draw(Shape(), torch.float32), **changes})


def test_another_dtype_is_refused_by_name() -> None:
    inputs = draw(Shape(), torch.float32)
    with pytest.raises(TypeError, match=r"`folded.key` is torch.float64 and `x` torch.float32"):
        folded(**{**inputs, "key": inputs["key"].double()})  # type: ignore[arg-type, union-attr]


def test_value_may_have_another_width(backend: str, device: str) -> None:
    inputs = draw(Shape(bias=False), torch.float32, device)
    inputs["value"] = torch.randn(3, 5, 20, device=device)
    assert_exact(backend, False, inputs)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@by_residual
def test_compiles_with_and_without_gradients(fresh_compiler: None, residual: bool) -> None:
    run = partial(folded, residual=residual)
    inputs = draw(Shape(), torch.float32)
    torch.testing.assert_close(compiled(run)(**inputs), run(**inputs))
    cotangent = torch.randn(2, 9, 24)
    for trainable in ({"x"}, {"key", "bias", "value"}, set(NAMES)):
        want = evaluate(run, inputs, cotangent, trainable)
        assert_close(evaluate(compiled(run), inputs, cotangent, trainable), want, 1e-5)
