"""row_attention: a few query rows with folded key and value maps give what prompt_attention gives on projected rows."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from attention_cases import concatenated
from numerics import by_dtype, by_layout
from torch import Tensor

from bench.correctness import Oracle, assert_same
from fastprompt.ops import row_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# B, R, N, P, H, d, D
SIZES = {
    "class token": (2, 1, 17, 4, 3, 8, 24),
    "two rows": (2, 2, 9, 3, 2, 16, 32),
    "no prompts": (2, 1, 9, 0, 3, 8, 24),
    "one token": (2, 1, 1, 2, 3, 8, 24),
    "prompts only": (2, 1, 0, 5, 3, 8, 24),
    "wider rows than heads": (2, 1, 9, 3, 2, 8, 40),
    "empty batch": (0, 1, 9, 3, 2, 8, 16),
}
by_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def draw(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    *,
    per_image: bool = False,
    bias: bool = True,
    temperature: bool = True,
) -> dict[str, Tensor | None]:
    B, R, N, P, H, d, D = sizes
    inputs: dict[str, Tensor | None] = {
        "q": torch.randn(B, R, H, d),
        "rows": torch.randn(B, N, D),
        "prompt_rows": torch.randn(*((B,) if per_image else ()), P, D),
        "k_weight": torch.randn(H * d, D) / math.sqrt(D),
        "v_weight": torch.randn(H * d, D) / math.sqrt(D),
        "v_bias": torch.randn(H * d) if bias else None,
        "temperature": torch.tensor([0.7]) if temperature else None,
    }
    return {name: None if x is None else x.to(dtype) for name, x in inputs.items()}


def projected(
    q: Tensor,
    rows: Tensor,
    prompt_rows: Tensor | None,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    *,
    scale: float | None = None,
    temperature: Tensor | None = None,
    k_bias: Tensor | None = None,
) -> Tensor:
    """Prompt attention on keys and values made of all rows, in plain PyTorch."""
    heads = q.shape[2:]
    k, v = (
        F.linear(rows, k_weight, k_bias).unflatten(-1, heads),
        F.linear(rows, v_weight, v_bias).unflatten(-1, heads),
    )
    prompts = {}
    if prompt_rows is not None:
        prompts["prompt_k"] = F.linear(prompt_rows, k_weight, k_bias).unflatten(-1, heads)
        prompts["prompt_v"] = F.linear(prompt_rows, v_weight, v_bias).unflatten(-1, heads)
    return concatenated(q, k, v, **prompts, scale=scale, temperature=temperature)


@by_size
@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per image"])
@pytest.mark.parametrize("scale", [None, 0.3], ids=["default scale", "scale 0.3"])
def test_equals_attention_on_projected_rows(
    sizes: tuple[int, ...], per_image: bool, scale: float | None
) -> None:
    inputs = draw(sizes, torch.float64, per_image=per_image)
    Oracle(partial(projected, scale=scale), inputs)(partial(row_attention, scale=scale))


def test_without_prompts_bias_and_temperature() -> None:
    inputs = draw(SIZES["class token"], torch.float64, bias=False, temperature=False)
    inputs["prompt_rows"] = None
    Oracle(projected, inputs)(row_attention)


def test_bias_of_the_key_has_no_effect() -> None:
    inputs = draw(SIZES["class token"], torch.float64)
    k_bias = 10 * torch.randn(24, dtype=torch.float64)
    assert_same(row_attention(**inputs), projected(**inputs, k_bias=k_bias))  # type: ignore[arg-type]


@by_dtype
@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per image"])
def test_output_and_gradients(per_image: bool, dtype: torch.dtype) -> None:
    inputs = draw(SIZES["class token"], dtype, per_image=per_image, temperature=False)
    Oracle(projected, inputs)(row_attention)


@by_layout
def test_strides_do_not_matter(layout) -> None:
    inputs = draw(SIZES["class token"], torch.float64)
    given = {
        **inputs,
        "q": layout(inputs["q"]),
        "rows": layout(inputs["rows"][:, :, None])[:, :, 0],  # type: ignore[index]
        "prompt_rows": layout(inputs["prompt_rows"][None, :, None])[0, :, 0],  # type: ignore[index]
    }
    same = {name: None if x is None else x.contiguous() for name, x in given.items()}
    Oracle(projected, same)(row_attention, given)


def test_autocast_runs_it_in_low_precision_and_trains_the_temperature_in_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        oracle = Oracle(projected, draw(SIZES["class token"], torch.float32))
        got = oracle.evaluate(row_attention)
        oracle.check(got)
    assert got["output"].dtype == torch.bfloat16
    assert got["gradient of temperature"].dtype == torch.float32
