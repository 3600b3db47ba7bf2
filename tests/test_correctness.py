"""The judge of numbers: it passes what rounds as plain PyTorch does, and catches everything else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.correctness import Oracle, WrongResult, assert_as_exact, assert_same, evaluate
from fastprompt import ops

B, N, P, H, D = 3, 21, 5, 2, 24
# The relative error that is planted. In bfloat16 plain PyTorch itself may be off by several percent in a gradient.
PLANTED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.2}
by_dtype = pytest.mark.parametrize("dtype", PLANTED, ids=lambda dtype: str(dtype).removeprefix("torch."))


class Operation(NamedTuple):
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]


def attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, temperature: Tensor
) -> Tensor:
    keys, values = (
        torch.cat((x, p.expand(B, -1, -1, -1)), 1).transpose(1, 2) for x, p in ((k, prompt_k), (v, prompt_v))
    )
    scores = q.transpose(1, 2) @ keys.mT * q.shape[-1] ** -0.5 / temperature
    # As PyTorch's own attention makes the weights again in its backward: large scores leave their roundings in them.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = (scores - scores.logsumexp(-1, keepdim=True)).exp().to(q.dtype)
    return (weights @ values).transpose(1, 2)


def blend(x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor) -> Tensor:
    y = x + delta
    rows = gate * y[:, 1 : 1 + P] + (1 - gate) * prompt_in
    return torch.cat((y[:, :1], rows, y[:, 1 + P :]), 1)


def folded(x: Tensor, key: Tensor, bias: Tensor, value: Tensor, out_bias: Tensor) -> Tensor:
    weights = (torch.einsum("bnd,hpd->bhnp", x, key) + bias[:, None]).softmax(-1)
    return torch.einsum("bhnp,hpd->bnd", weights, value) + out_bias


def cross(x: Tensor, prompts: Tensor, **weights: Tensor) -> Tensor:
    q = F.linear(x, weights["q_weight"], weights["q_bias"]).unflatten(-1, (H, -1)).transpose(1, 2)
    k, v = (
        F.linear(prompts, weights[f"{n}_weight"], weights[f"{n}_bias"]).unflatten(-1, (H, -1)).transpose(0, 1)
        for n in "kv"
    )
    out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.linear(out.transpose(1, 2).flatten(2), weights["proj_weight"], weights["proj_bias"])


def row(query: Tensor, rows: Tensor, prompt_rows: Tensor) -> Tensor:
    every = torch.cat((rows, prompt_rows.expand(B, -1, -1)), 1)
    return (query @ every.mT).softmax(-1) @ every


HEADS = {
    "q": (B, N, H, D),
    "k": (B, N, H, D),
    "v": (B, N, H, D),
    "prompt_k": (P, H, D),
    "prompt_v": (P, H, D),
}
MAPS = {
    n + s: (D, D) if s == "_weight" else (D,) for n in ("q", "k", "v", "proj") for s in ("_weight", "_bias")
}
OPERATIONS = {
    "prompt_attention": Operation(ops.prompt_attention, attention, {**HEADS, "temperature": (1,)}),
    "packed_prompt_attention": Operation(
        ops.packed_prompt_attention,
        lambda qkv, **rest: attention(*qkv.unbind(2), **rest),
        {"qkv": (B, N, 3, H, D), "prompt_k": (P, H, D), "prompt_v": (P, H, D), "temperature": (1,)},
    ),
    "gated_blend": Operation(
        partial(ops.gated_blend, start=1, length=P),
        blend,
        {"x": (B, N, D), "delta": (B, N, D), "prompt_in": (B, P, D), "gate": (1,)},
    ),
    "folded_cross_attention": Operation(
        lambda x, **prompts: ops.folded_cross_attention(x, ops.FoldedPrompts(**prompts)),
        folded,
        {"x": (B, N, D), "key": (H, P, D), "bias": (H, P), "value": (H, P, D), "out_bias": (D,)},
    ),
    "prompt_cross_attention": Operation(
        lambda x, prompts, **maps: ops.prompt_cross_attention(x, prompts, ops.AttentionWeights(**maps), H),
        cross,
        {"x": (B, N, D), "prompts": (P, D), **MAPS},
    ),
    "folded_row_attention": Operation(
        ops.folded_row_attention, row, {"query": (B, H, D), "rows": (B, N, D), "prompt_rows": (P, D)}
    ),
}
# Sums over everything that nearly cancel: rounded to 16 bits, their terms leave less of the result.
SUMS = tuple(f"gradient of {name}" for name in ("temperature", "gate", "q_bias", "k_bias"))
by_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


def draw(operation: Operation, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {name: torch.randn(shape) for name, shape in operation.shapes.items()}
    for name in inputs:
        if name.endswith("weight") or name in ("key", "query"):
            inputs[name] /= D**0.5
        if name in ("temperature", "gate"):
            inputs[name] = torch.tensor([0.7])
    return {name: x.to(dtype) for name, x in inputs.items()}


def damaged(name: str, x: Tensor) -> list[Tensor]:
    """Copies of a result, each with one thing wrong."""
    planted = PLANTED[x.dtype] * (2 if name in SUMS and x.dtype.itemsize == 2 else 1)
    off = x * (1 + planted)
    if name == "gradient of k_bias":
        off = x + 10 * planted  # it is zero, a sum of terms of size 1 that cancel
    one_nan = x.clone(memory_format=torch.contiguous_format)
    one_nan.view(-1)[-1] = torch.nan
    other = torch.float64 if x.dtype == torch.float32 else torch.float32
    return [off, one_nan, x.to(other), x[..., :-1]]


@by_dtype
@by_operation
def test_an_error_is_caught_in_any_output_or_gradient(operation: Operation, dtype: torch.dtype) -> None:
    inputs = draw(operation, dtype)
    # The gradient of the squared output: a sum over everything, as the gate's gradient is, is not near zero by chance.
    oracle = Oracle(operation.plain, inputs, cotangents=[operation.plain(**inputs)])
    right = oracle.evaluate(operation.ours)
    oracle.check(right)
    for name, x in right.items():
        with pytest.raises(WrongResult, match=r"results \["):
            oracle.check({n: y for n, y in right.items() if n != name})
        for wrong in damaged(name, x):
            with pytest.raises(WrongResult, match=f"{name}: "):
                oracle.check({**right, name: wrong})


def test_a_result_that_no_input_reaches_is_missing_a_gradient() -> None:
    with pytest.raises(WrongResult, match="no gradient of y"):
        evaluate(lambda x, y: 2 * x, {"x": torch.ones(2), "y": torch.ones(2)}, torch.ones(2))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def backwards_in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same sums in another order."""
    return attend(q, k.flip(-2), v.flip(-2))


@pytest.mark.parametrize("scale", [1, 100], ids=["usual", "large scores"])
@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("draw_again", range(5))
def test_another_order_of_summation_is_no_error(scale: int, count: int, draw_again: int) -> None:
    inputs = {name: scale**0.5 * torch.randn(3, count, 16) for name in "qkv"}
    Oracle(attend, inputs)(backwards_in_rows)


@pytest.mark.parametrize("draw_again", range(20))
def test_a_single_number_may_err_as_its_terms_do(draw_again: int) -> None:
    """The sum of 4,000 terms, times a temperature: its error is near zero or not, by chance."""
    inputs = {"x": torch.randn(4000), "temperature": torch.tensor([0.7])}
    oracle = Oracle(lambda x, temperature: x / temperature, inputs)
    oracle(lambda x, temperature: x * (1 / temperature))
    got = oracle.evaluate(lambda x, temperature: (x.double() / temperature.double()).float())
    terms = (inputs["x"] * oracle.cotangents[0]).norm()  # type: ignore[index]
    got["gradient of temperature"] += 1e-3 * terms
    with pytest.raises(WrongResult, match="gradient of temperature"):
        oracle.check(got)


def test_a_sum_that_cancels_to_nothing_may_have_the_roundings_of_its_terms() -> None:
    """The gradient of the score of a single key is zero, in plain PyTorch exactly."""
    inputs = {name: torch.randn(50, 1, 16) for name in "qkv"}
    oracle = Oracle(attend, inputs)
    got = oracle.evaluate(attend)
    assert not got["gradient of q"].any()
    rounding = torch.randn(50, 1, 16) * torch.finfo(torch.float32).eps
    oracle.check({**got, "gradient of q": rounding})
    with pytest.raises(WrongResult, match="gradient of q"):
        oracle.check({**got, "gradient of q": 100 * rounding})


def test_a_float64_result_of_float32_inputs_is_checked_too() -> None:
    inputs = {"x": torch.randn(50), "gate": torch.tensor(0.3, dtype=torch.float64)}
    oracle = Oracle(lambda x, gate: x * gate.float(), inputs)
    got = oracle.evaluate(lambda x, gate: (x.double() * gate).float())
    oracle.check(got)
    with pytest.raises(WrongResult, match="gradient of gate"):
        oracle.check({**got, "gradient of gate": got["gradient of gate"] + 0.01})


def test_a_check_draws_no_random_numbers_and_repeats() -> None:
    inputs = {name: torch.randn(3, 5, 16) for name in "qkv"}
    before = torch.get_rng_state()
    errors = []
    for _ in range(2):
        torch.set_rng_state(before)
        oracle = Oracle(attend, inputs)
        wrong = {name: x * 1.001 for name, x in oracle.evaluate(attend).items()}
        state = torch.get_rng_state()
        with pytest.raises(WrongResult) as caught:
            oracle.check(wrong)
        assert torch.equal(torch.get_rng_state(), state)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_what_plain_pytorch_cannot_compute_measures_nothing() -> None:
    with pytest.raises(ValueError, match="output: plain PyTorch gives NaN or infinity"):
        Oracle(lambda x: x * x, {"x": torch.tensor([300.0]).half()})


def test_same_means_equal_up_to_the_rounding_of_float64() -> None:
    x = torch.randn(7, 30, dtype=torch.float64)
    results = {"output": x, "others": [x.sum(0), None]}
    assert_same({"output": x + 1e-15, "others": (x.flip(0).sum(0), None)}, results)
    assert_same(x.sum() - x.sum(), torch.zeros((), dtype=torch.float64))
    for wrong in (x * (1 + 1e-9), x.where(x < x.max(), torch.nan), x[:6], None):
        with pytest.raises(WrongResult, match=r"output|results \["):
            assert_same({**results, "output": wrong}, results)
    # The terms of a sum that cancels are as large as the other results.
    assert_same({"output": x, "zero": x[0] * 1e-15}, {"output": x, "zero": 0 * x[0]})
    with pytest.raises(WrongResult, match="zero"):
        assert_same({"output": x, "zero": x[0] * 1e-9}, {"output": x, "zero": 0 * x[0]})
    with pytest.raises(TypeError, match="result must be float64"):
        assert_same(x.float(), x)


def test_as_exact_means_twice_the_error_of_plain_pytorch() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    plain = exact.float()
    assert_as_exact(plain * (1 + 1e-7), plain, exact)
    for wrong in (plain * (1 + 1e-6), plain.half(), plain.where(plain < plain.max(), torch.nan), plain[1:]):
        with pytest.raises(WrongResult, match="result"):
            assert_as_exact(wrong, plain, exact)
    with pytest.raises(TypeError, match="exact result must be float64"):
        assert_as_exact(plain, plain, plain)
