"""prompt_attention: what it refuses, and how far NaN and extreme scores reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import KINDS, Shape, concatenated, draw

from bench.correctness import Oracle, evaluate
from fastprompt.ops import prompt_attention

OPERATION = "prompt_attention"


def ones(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(shape, **options)


def both(prompts: torch.Tensor) -> dict[str, Any]:
    return {"prompt_k": prompts, "prompt_v": prompts}


def indexed(index: torch.Tensor) -> dict[str, Any]:
    return {**both(ones(5, 4, 2, 32)), "prompt_index": index}


# What replaces the good arguments q, k, v [3, 11, 2, 32], prompts [4, 2, 32]; the error; what its message names.
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q of three dimensions": ({"q": ones(3, 11, 64)}, ValueError, r"\(3, 11, 64\)"),
    "k of three dimensions": ({"k": ones(11, 2, 32)}, ValueError, r"\(11, 2, 32\)"),
    "k of another batch": ({"k": ones(2, 11, 2, 32)}, ValueError, r"B=3.*\(2, 11, 2, 32\)"),
    "k of other heads": ({"k": ones(3, 11, 4, 32)}, ValueError, r"H=2.*\(3, 11, 4, 32\)"),
    "v of another length": ({"v": ones(3, 10, 2, 32)}, ValueError, r"\(3, 10, 2, 32\)"),
    "v of another head_dim": ({"v": ones(3, 11, 2, 16)}, ValueError, r"\(3, 11, 2, 16\)"),
    "head_dim 0": ({n: ones(3, 11, 2, 0) for n in "qkv"} | both(ones(4, 2, 0)), ValueError, "head_dim is 0"),
    "prompt_k alone": ({"prompt_v": None}, ValueError, "must be given together"),
    "prompt_v alone": ({"prompt_k": None}, ValueError, "must be given together"),
    "prompts of different sizes": ({"prompt_v": ones(5, 2, 32)}, ValueError, r"\(4, 2, 32\), \(5, 2, 32\)"),
    "prompts of two dimensions": (both(ones(4, 64)), ValueError, r"\(4, 64\)"),
    "prompts of other heads": (both(ones(4, 6, 64)), ValueError, r"H=2, d=32; got \(4, 6, 64\)"),
    "prompts of another batch": (both(ones(2, 4, 2, 32)), ValueError, r"B=3.*\(2, 4, 2, 32\).*prompt_index"),
    "an index without prompts": (both(None) | {"prompt_index": ones(3).long()}, ValueError, "table"),  # type: ignore[arg-type]
    "an index into prompts that are no table": (
        {"prompt_index": ones(3).long()},
        ValueError,
        r"\(4, 2, 32\)",
    ),
    "an index of another length": (indexed(ones(2).long()), ValueError, r"\(2,\)"),
    "an index of two dimensions": (indexed(ones(3, 1).long()), ValueError, r"\(3, 1\)"),
    "an index of floats": (indexed(ones(3)), ValueError, "torch.float32"),
    "an index of booleans": (indexed(ones(3).bool()), ValueError, "torch.bool"),
    "an index of int16": (indexed(ones(3).short()), ValueError, "torch.int16"),
    "a negative index": (indexed(torch.tensor([0, -1, 2])), IndexError, "-1 to 2.*T=5"),
    "an index past the table": (indexed(torch.tensor([0, 5, 2])), IndexError, r"0 to 5.*T=5.*0\.\.4"),
    "a temperature of two elements": ({"temperature": ones(2)}, ValueError, r"\(2,\)"),
    "a temperature of no element": ({"temperature": ones(0)}, ValueError, r"\(0,\)"),
    "an integer temperature": ({"temperature": ones(1).long()}, ValueError, "int64"),
    "no key at all": ({n: ones(3, 0, 2, 32) for n in "kv"} | both(None), ValueError, "N=0"),  # type: ignore[arg-type]
    "no key and no prompts": ({n: ones(3, 0, 2, 32) for n in "kv"} | both(ones(0, 2, 32)), ValueError, "N=0"),
    "k on another device": ({"k": ones(3, 11, 2, 32, device="meta")}, ValueError, "`k` is on meta"),
    "prompts on another device": (
        {"prompt_v": ones(4, 2, 32, device="meta")},
        ValueError,
        "`prompt_v` is on meta",
    ),
    "the index on another device": (
        indexed(ones(3, device="meta").long()),
        ValueError,
        "`prompt_index` is on meta",
    ),
    "the temperature on another device": (
        {"temperature": ones(1, device="meta")},
        ValueError,
        "`temperature` is on meta",
    ),
    "v of another dtype": ({"v": ones(3, 11, 2, 32).half()}, TypeError, "`v` is torch.float16"),
    "prompts of another dtype": (
        {"prompt_k": ones(4, 2, 32).double()},
        TypeError,
        "`prompt_k` is torch.float64",
    ),
    "integers": (
        {n: ones(3, 11, 2, 32).int() for n in "qkv"} | both(ones(4, 2, 32).int()),
        TypeError,
        "torch.int32",
    ),
    "an unknown backend": ({"backend": "tpu"}, ValueError, "'tpu'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_its_value(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        prompt_attention(**{**draw(Shape(), torch.float32), **changes})
    assert "`" in str(caught.value)  # it names the operation or the argument


def test_nan_in_a_shared_prompt_reaches_every_output(backend: str, device: str) -> None:
    inputs = draw(Shape(), torch.float32, device)
    inputs["prompt_k"][1, :, 0] = torch.nan  # type: ignore[index]
    assert prompt_attention(**inputs).isnan().all()


def test_nan_in_a_prompt_value_reaches_its_own_head_and_dimension_only(backend: str, device: str) -> None:
    inputs = draw(Shape(), torch.float32, device)
    inputs["prompt_v"][2, 1, 7] = torch.nan  # type: ignore[index]
    out = prompt_attention(**inputs)
    assert out[:, :, 1, 7].isnan().all()
    out[:, :, 1, 7] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", ["per image", "table"])
@pytest.mark.parametrize("name", ["prompt_k", "prompt_v"])
def test_nan_in_the_prompts_of_one_image_leaves_the_others_alone(
    backend: str, device: str, kind: str, name: str
) -> None:
    inputs = draw(Shape(B=4, H=1, kind=kind), torch.float32, device)
    if kind == "table":
        inputs["prompt_index"] = torch.tensor([5, 2, 0, 5], device=device)
    cotangent = torch.randn(4, 11, 1, 32, device=device)
    clean = evaluate(prompt_attention, inputs, cotangent)
    inputs[name][2 if kind == "table" else 1] = torch.nan  # type: ignore[index]
    dirty = evaluate(prompt_attention, inputs, cotangent)
    others = torch.tensor([0, 2, 3], device=device)
    assert dirty["output"][1].isnan().all()
    for result in ("output", "gradient of q", "gradient of k", "gradient of v"):
        assert torch.equal(dirty[result][others], clean[result][others])
    for result in ("gradient of prompt_k", "gradient of prompt_v"):
        rows = torch.tensor([0, 5] if kind == "table" else [0, 2, 3], device=device)
        assert torch.equal(dirty[result][rows], clean[result][rows])


def test_nan_in_a_table_row_that_no_image_uses_has_no_effect(backend: str, device: str) -> None:
    inputs = draw(Shape(B=3, H=1, kind="table"), torch.float32, device)
    inputs["prompt_index"] = torch.tensor([4, 0, 4], device=device)
    cotangent = torch.randn(3, 11, 1, 32, device=device)
    clean = evaluate(prompt_attention, inputs, cotangent)
    inputs["prompt_k"][1:4] = torch.nan  # type: ignore[index]
    inputs["prompt_v"][1:4] = torch.nan  # type: ignore[index]
    dirty = evaluate(prompt_attention, inputs, cotangent)
    assert all(torch.equal(dirty[name], want) for name, want in clean.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_very_negative_prompt_score_has_no_effect(
    backend: str, device: str, kind: str, dtype: torch.dtype
) -> None:
    inputs = draw(Shape(kind=kind), dtype, device)
    q, prompt_k = inputs["q"], inputs["prompt_k"]
    assert q is not None
    assert prompt_k is not None
    q[..., 0] = 1
    prompt_k.zero_()[..., 0] = -1e6
    without = {**inputs, "prompt_k": None, "prompt_v": None, "prompt_index": None}
    oracle = Oracle(concatenated, without)
    with_prompts = evaluate(prompt_attention, inputs, oracle.cotangents)
    for name in ("gradient of prompt_k", "gradient of prompt_v"):
        assert (with_prompts.pop(name) == 0).all()
    oracle.check(with_prompts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_very_large_scores_do_not_overflow(backend: str, device: str, dtype: torch.dtype) -> None:
    # Beyond what exp holds, and with many images: in a single row, rounding decides between two keys only by chance.
    # Without the gradient of the temperature: of saturated weights it is the rounding of q·dq alone.
    inputs = draw(Shape(B=16), dtype, device)
    for name in ("q", "k", "prompt_k"):
        inputs[name] *= 12  # type: ignore[operator]
    assert torch.einsum("bqhd,bkhd->bhqk", inputs["q"], inputs["k"]).abs().max() > 300  # type: ignore[arg-type]
    trained = [name for name, x in inputs.items() if x is not None and x.is_floating_point()]
    trained.remove("temperature")
    Oracle(concatenated, inputs, trainable=trained)(prompt_attention)


@pytest.mark.parametrize("kind", KINDS)
def test_no_prompts_is_attention(backend: str, device: str, widest: torch.dtype, kind: str) -> None:
    inputs = draw(Shape(P=0, kind=kind), widest, device)
    want = prompt_attention(inputs["q"], inputs["k"], inputs["v"], temperature=inputs["temperature"])  # type: ignore[arg-type]
    assert torch.equal(prompt_attention(**inputs), want)


def test_equal_scores_give_the_mean_of_all_values(backend: str, device: str, widest: torch.dtype) -> None:
    inputs = draw(Shape(), widest, device)
    inputs["q"].zero_()  # type: ignore[union-attr]

    def mean(v: torch.Tensor, prompt_v: torch.Tensor) -> torch.Tensor:
        return ((v.sum(1) + prompt_v.sum(0)) / 15)[:, None].expand(-1, 11, -1, -1)

    values = {name: inputs.pop(name) for name in ("v", "prompt_v")}
    Oracle(mean, values)(lambda **values: prompt_attention(**inputs, **values))
