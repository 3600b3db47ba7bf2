"""prompt_cross_attention: the folded and the direct form give the same numbers and gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from attention_cases import cross_attention
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.correctness import Oracle
from fastprompt.ops import (
    AttentionWeights,
    choose_form,
    fold_prompts,
    folded_cross_attention,
    prompt_cross_attention,
    prompt_cross_attention_reference,
)

OPERATION = "folded_cross_attention"
FIELDS = AttentionWeights._fields
FORMS = ("folded", "direct", "auto")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Shape(NamedTuple):
    """`A` = H·d, the attention's own width; timm's blocks have A = D."""

    B: int = 2
    N: int = 9
    P: int = 5
    H: int = 3
    D: int = 24
    A: int = 24
    bias: bool = True
    per_image: bool = False


SHAPES = {
    "biases": Shape(),
    "no biases": Shape(bias=False),
    "one prompt": Shape(P=1),
    "one token": Shape(B=1, N=1),
    "empty batch": Shape(B=0),
    "one head": Shape(H=1, P=20),
    "narrower attention": Shape(A=12),
    "more prompts than width": Shape(P=30, D=12, A=12),
    "ViT-Ti": Shape(B=1, N=197, P=10, D=192, A=192),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_form = pytest.mark.parametrize("form", FORMS)


def draw(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
    """x, prompts and the attention's maps, by name."""
    B, N, P, _, D, A, bias, per_image = shape
    inputs: dict[str, Tensor | None] = {
        "x": torch.randn(B, N, D),
        "prompts": torch.randn(*((B,) if per_image else ()), P, D),
    }
    for name in FIELDS:
        outputs, width = (D, A) if name.startswith("proj") else (A, D)
        inputs[name] = torch.randn(outputs, width) / math.sqrt(width) if name.endswith("weight") else None
        if name.endswith("bias") and bias:
            inputs[name] = torch.randn(outputs) / 2
    return {name: None if x is None else x.to(device, dtype) for name, x in inputs.items()}


def call(function: Any, H: int, **options: Any) -> Any:
    """`function` as one of named tensors."""

    def named(x: Tensor, prompts: Tensor, **weights: Tensor) -> Tensor:
        return function(x, prompts, AttentionWeights(**weights), H, **options)

    return named


@by_shape
@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per image"])
@pytest.mark.parametrize("scale", [None, 0.2], ids=["default scale", "scale 0.2"])
def test_reference_is_the_definition(shape: Shape, per_image: bool, scale: float | None) -> None:
    inputs = draw(shape._replace(per_image=per_image), torch.float64)
    reference = call(prompt_cross_attention_reference, shape.H, scale=scale)
    Oracle(call(cross_attention, shape.H, scale=scale), inputs)(reference)


@pytest.mark.grid
@by_shape
@by_form
@pytest.mark.parametrize("scale", [None, 0.2], ids=["default scale", "scale 0.2"])
def test_forms_agree_in_output_and_every_gradient(
    backend: str, device: str, widest: torch.dtype, shape: Shape, form: str, scale: float | None
) -> None:
    oracle = Oracle(call(cross_attention, shape.H, scale=scale), draw(shape, widest, device))
    oracle(call(prompt_cross_attention, shape.H, scale=scale, form=form))


@pytest.mark.grid
@by_form
@pytest.mark.parametrize("shape", [SHAPES["biases"], SHAPES["no biases"]], ids=["biases", "no biases"])
@pytest.mark.parametrize(
    "trainable",
    [
        {"x"},
        {"prompts"},
        {"x", "prompts"},
        {"q_weight"},
        {"k_weight", "v_weight"},
        {"proj_weight", "prompts"},
    ],
    ids=lambda names: "+".join(sorted(names)),
)
def test_gradients_only_for_what_trains(
    backend: str, device: str, widest: torch.dtype, form: str, shape: Shape, trainable: set[str]
) -> None:
    oracle = Oracle(call(cross_attention, shape.H), draw(shape, widest, device), trainable=trainable)
    oracle(call(prompt_cross_attention, shape.H, form=form))


@pytest.mark.parametrize("form", ["direct", "auto"])
def test_prompts_per_image_take_the_direct_form(
    backend: str, device: str, widest: torch.dtype, form: str
) -> None:
    shape = Shape(per_image=True)
    Oracle(call(cross_attention, shape.H), draw(shape, widest, device))(
        call(prompt_cross_attention, shape.H, form=form)
    )


@by_form
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per image"])
def test_attention_to_no_prompts_is_the_bias_of_the_projection(
    form: str, bias: bool, per_image: bool
) -> None:
    if per_image and form == "folded":
        pytest.skip("prompts of one image each are never folded")
    shape = Shape(P=0, bias=bias, per_image=per_image)
    inputs = draw(shape, torch.float64)
    out = call(prompt_cross_attention, shape.H, form=form)(**inputs)
    assert torch.equal(out, inputs["proj_bias"].expand_as(out) if bias else torch.zeros_like(out))  # type: ignore[union-attr]
    assert torch.equal(out, call(prompt_cross_attention_reference, shape.H)(**inputs))


# Which form ---------------------------------------------------------------------------------------------------------


PROMPT_COUNTS = (1, 5, 6, 7, 8, 9, 10, 11, 12, 20)


def counted(shape: Shape, form: str, training: bool) -> int:
    inputs = draw(shape, torch.float32)
    for name in ("x", "prompts") if training else ():
        inputs[name] = inputs[name].detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = call(prompt_cross_attention, shape.H, form=form)(**inputs)
        if training:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("P", PROMPT_COUNTS, ids=lambda P: f"P={P}")
def test_auto_takes_the_form_with_fewer_counted_operations(P: int, training: bool) -> None:
    # Folded while H·P < D + P, P < 9.6, in training H·P < 2/3·D + 7/6·P, P < 6.6; and a little less.
    shape = Shape(B=4, N=50, P=P, H=6, D=48, A=48)
    best = min(("folded", "direct"), key=lambda form: counted(shape, form, training))
    assert choose_form(4 * 50, torch.empty(P, 48), 48, 6, 8, training=training) == best
    assert counted(shape, "auto", training) == counted(shape, best, training)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_both_forms_are_chosen_by_the_cases_above(training: bool) -> None:
    chosen = {choose_form(200, torch.empty(P, 48), 48, 6, 8, training=training) for P in PROMPT_COUNTS}
    assert chosen == {"folded", "direct"}


def test_few_tokens_do_not_pay_for_folding() -> None:
    prompts = torch.empty(10, 768)
    assert choose_form(1, prompts, 768, 12, 64) == "direct"
    assert choose_form(8 * 197, prompts, 768, 12, 64) == "folded"


# What it refuses ----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown form": ({"form": "fold"}, "'fold'"),
    "x of two dimensions": ({"x": torch.ones(9, 24)}, r"\(9, 24\)"),
    "prompts of another width": ({"prompts": torch.ones(5, 23)}, r"D=24; got \(5, 23\)"),
    "prompts of another batch": ({"prompts": torch.ones(3, 5, 24)}, r"B=2.*\(3, 5, 24\)"),
    "prompts of one dimension": ({"prompts": torch.ones(24)}, r"\(24,\)"),
    "prompts per image, folded": ({"prompts": torch.ones(2, 5, 24), "form": "folded"}, "direct"),
    "heads that do not divide the width": ({"num_heads": 5}, "24; got 5"),
    "no heads": ({"num_heads": 0}, "got 0"),
    "a key map of another width": (
        {"k_weight": torch.ones(24, 20)},
        r"`k_weight`.*\(24, 24\); got \(24, 20\)",
    ),
    "a value map of another width": ({"v_weight": torch.ones(20, 24)}, r"`v_weight`.*got \(20, 24\)"),
    "a projection of another width": ({"proj_weight": torch.ones(24, 20)}, r"`proj_weight`.*\(24, 20\)"),
    "prompts on another device": ({"prompts": torch.ones(5, 24, device="meta")}, "`prompts` is on meta"),
    "a bias on another device": ({"v_bias": torch.ones(24, device="meta")}, "`v_bias` is on meta"),
    "an unknown backend": ({"backend": "tpu"}, "'tpu'"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_its_value(changes: dict[str, Any], message: str) -> None:
    inputs = {**draw(Shape(), torch.float32), "num_heads": 3, **changes}
    weights = AttentionWeights(**{name: inputs.pop(name) for name in FIELDS})
    with pytest.raises(ValueError, match=message):
        prompt_cross_attention(weights=weights, **inputs)


@by_form
def test_nan_in_a_prompt_reaches_every_output(backend: str, device: str, form: str) -> None:
    inputs = draw(Shape(), torch.float32, device)
    inputs["prompts"][2] = torch.nan  # type: ignore[index]
    assert call(prompt_cross_attention, 3, form=form)(**inputs).isnan().all()


def test_folded_prompts_serve_many_batches(backend: str, device: str, widest: torch.dtype) -> None:
    inputs = draw(Shape(), widest, device)
    weights = AttentionWeights(**{name: inputs[name] for name in FIELDS})  # type: ignore[arg-type]
    once = fold_prompts(inputs["prompts"], weights, 3, 8**-0.5)  # type: ignore[arg-type]
    for B in (1, 4):
        inputs["x"] = torch.randn(B, 9, 24, dtype=widest, device=device)
        oracle = Oracle(call(cross_attention, 3), inputs, backward=False)
        oracle(lambda x, **rest: folded_cross_attention(x, once)[0])
