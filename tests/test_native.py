"""The native CPU kernels, called directly, against float64."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench.correctness import assert_same
from fastprompt.kernels import native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# B, N, D, start, length
SHAPES = [
    pytest.param((2, 17, 24, 1, 4), id="prompts-after-class-token"),
    pytest.param((3, 207, 97, 100, 10), id="odd-width-prompts-in-the-middle"),
    pytest.param((8, 207, 768, 1, 10), id="several-threads"),
    pytest.param((5, 75, 1100, 74, 1), id="last-row-only"),
    pytest.param((2, 6, 5, 0, 6), id="every-row"),
    pytest.param((1, 1, 1, 0, 1), id="one-element"),
    pytest.param((4, 9, 1, 2, 3), id="width-one"),
    pytest.param((2, 7, 16, 3, 0), id="no-prompts"),
    pytest.param((0, 7, 16, 3, 2), id="no-images"),
    pytest.param((2, 0, 16, 0, 0), id="no-tokens"),
    pytest.param((2, 7, 0, 3, 2), id="no-width"),
]


@pytest.fixture(scope="module", autouse=True)
def native_library() -> None:
    reason = native.load()
    if reason is not None:
        if os.environ.get("FASTPROMPT_REQUIRE_NATIVE", "0").lower() not in ("", "0", "no", "off", "false"):
            pytest.fail(f"FASTPROMPT_REQUIRE_NATIVE is set: {reason}")
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def poison(*shapes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Fill the memory that the next tensors of these shapes are likely to get with NaN."""
    blocks = [torch.full(shape, float("nan"), dtype=dtype) for shape in shapes for _ in range(3)]
    del blocks


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def blend(x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int) -> Tensor:
    poison(tuple(x.shape), dtype=x.dtype)
    return torch.ops.fastprompt_cpu.gated_blend(x, delta, prompt_in, gate, start, length)


def blend_backward(
    grad: Tensor, gate: Tensor, difference: Tensor | None, start: int, length: int, *need: bool
) -> tuple:
    poison(tuple(grad.shape), (grad.shape[0], length, grad.shape[2]), dtype=grad.dtype)
    return torch.ops.fastprompt_cpu.gated_blend_backward(grad, gate, difference, start, length, *need)


def reference(x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int) -> Tensor:
    y = x.double() + delta.double()
    g = gate.double().reshape(())
    y[:, start : start + length] = g * y[:, start : start + length] + (1 - g) * prompt_in.double()
    return y


def assert_rounded_once(actual: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """`actual` is `exact` up to a few wide operations on terms of size `magnitude` and one rounding."""
    assert actual.is_contiguous()
    assert actual.shape == exact.shape
    arithmetic = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
    rounding = torch.finfo(actual.dtype).eps / 2
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    allowed = 4 * arithmetic * magnitude + rounding * exact.abs() + smallest
    error = (actual.double() - exact).abs()
    assert bool((error <= allowed).all()), f"off by up to {(error - allowed).max().item():.3g} too much"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_blend_is_the_exact_result_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, N, D, start, length = shape
    x, delta, prompt_in = make((B, N, D), dtype, 0), make((B, N, D), dtype, 1), make((B, length, D), dtype, 2)
    gate = torch.tensor(0.3)
    actual = blend(x, delta, prompt_in, gate, start, length)
    exact = reference(x, delta, prompt_in, gate, start, length)
    magnitude = x.double().abs() + delta.double().abs()
    magnitude[:, start : start + length] += prompt_in.double().abs()
    assert actual.dtype == dtype
    assert_rounded_once(actual, exact, magnitude)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_blend_gradients_match_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, N, D, start, length = shape
    grad, difference = make((B, N, D), dtype, 0), make((B, length, D), dtype, 1)
    gate = torch.tensor([-1.7], dtype=torch.float64)
    grad_input, grad_prompt, grad_gate = blend_backward(
        grad, gate, difference, start, length, True, True, True
    )
    wide, rows = grad.double(), grad.double()[:, start : start + length]
    exact_input = wide.clone()
    exact_input[:, start : start + length] *= gate
    assert_rounded_once(grad_input, exact_input, exact_input.abs())
    assert_rounded_once(grad_prompt, (1 - gate) * rows, ((1 - gate) * rows).abs())
    terms = rows * difference.double()
    assert grad_gate.shape == gate.shape
    assert grad_gate.dtype == gate.dtype
    assert_same([grad_gate.sum(), terms], [terms.sum(), terms])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_give_the_same_bits(dtype: torch.dtype) -> None:
    B, N, D, start, length = 3, 41, 37, 5, 6
    gate = torch.tensor(0.6)
    x, delta, prompt_in = make((B, N, D), dtype, 0), make((B, N, D), dtype, 1), make((B, length, D), dtype, 2)
    expected = blend(x, delta, prompt_in, gate, start, length)

    def layouts(tensor: Tensor) -> Iterator[Tensor]:
        yield tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # width strided
        yield tensor.permute(1, 0, 2).contiguous().permute(1, 0, 2)  # images interleaved
        yield torch.cat([tensor, tensor], dim=2)[:, :, :D]  # rows apart
        yield torch.cat([tensor[:, :1], tensor], dim=1)[:, 1:]  # images apart, offset

    for view in layouts(x):
        assert not view.is_contiguous()
        assert torch.equal(blend(view, delta, prompt_in, gate, start, length), expected)
    for view in layouts(delta):
        assert torch.equal(blend(x, view, prompt_in, gate, start, length), expected)
    for view in layouts(prompt_in):
        assert torch.equal(blend(x, delta, view, gate, start, length), expected)

    difference = make((B, length, D), dtype, 3)
    wanted = blend_backward(x, gate, difference, start, length, True, True, True)
    for grad_view, difference_view in zip(layouts(x), layouts(difference), strict=True):
        got = blend_backward(grad_view, gate, difference_view, start, length, True, True, True)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_expanded_inputs_are_read_in_place() -> None:
    B, N, D, start, length = 4, 19, 32, 1, 5
    x, prompts = make((B, N, D), torch.float32, 0), make((1, length, D), torch.float32, 1)
    zero = torch.zeros(()).expand(B, N, D)  # every stride 0, as in the gradient of a sum
    gate = torch.tensor(0.25)
    expected = blend(x, zero.contiguous(), prompts.repeat(B, 1, 1), gate, start, length)
    assert torch.equal(blend(x, zero, prompts.expand(B, -1, -1), gate, start, length), expected)
    ones = torch.ones(()).expand(B, N, D)
    difference = prompts.expand(B, -1, -1)
    got = blend_backward(ones, gate, difference, start, length, True, True, True)
    wanted = blend_backward(ones.contiguous(), gate, difference.contiguous(), start, length, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_count_changes_no_bit(dtype: torch.dtype) -> None:
    # 621 rows in two or three parts: the seam falls inside the second image's prompt rows.
    B, N, D, start, length = 3, 207, 768, 100, 10
    x, delta, prompt_in = make((B, N, D), dtype, 0), make((B, N, D), dtype, 1), make((B, length, D), dtype, 2)
    gate = torch.tensor(0.3)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = blend(x, delta, prompt_in, gate, start, length)
        results.append((out, *blend_backward(x, gate, prompt_in, start, length, True, True, True)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("gate_value", [0.0, 1.0])
def test_closed_and_open_gates_are_exact(gate_value: float) -> None:
    x, delta, prompt_in = (make(s, torch.float32, i) for i, s in enumerate([(2, 9, 8), (2, 9, 8), (2, 3, 8)]))
    out = blend(x, delta, prompt_in, torch.tensor(gate_value), 2, 3)
    assert torch.equal(out[:, 2:5], (x + delta)[:, 2:5] if gate_value else prompt_in)
    assert torch.equal(out[:, 5:], (x + delta)[:, 5:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wide_difference_serves_16_bit_gradients(dtype: torch.dtype) -> None:
    grad, difference = make((3, 8, 531), dtype, 0), make((3, 4, 531), torch.float32, 1)
    *_, grad_gate = blend_backward(
        grad, torch.tensor(0.5, dtype=torch.float64), difference, 2, 4, False, False, True
    )
    terms = grad.double()[:, 2:6] * difference.double()
    assert_same([grad_gate, terms], [terms.sum(), terms])


@pytest.mark.parametrize("need", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_gradients_that_are_not_needed_come_back_empty(need: tuple[int, ...]) -> None:
    grad, difference = make((2, 9, 12), torch.float32, 0), make((2, 3, 12), torch.float32, 1)
    gate = torch.tensor(0.4)
    everything = blend_backward(grad, gate, difference, 1, 3, True, True, True)
    got = blend_backward(grad, gate, difference if need[2] else None, 1, 3, *map(bool, need))
    for wanted, result, expected in zip(need, got, everything, strict=True):
        assert torch.equal(result, expected) if wanted else result.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_stay_where_they_are(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 3, 40, dtype=dtype)
    x[0, 0, 3], x[0, 1, 17], x[0, 2, 39] = float("inf"), float("nan"), float("-inf")
    out = blend(x, torch.zeros_like(x), torch.zeros(1, 1, 40, dtype=dtype), torch.tensor(0.5), 1, 1)
    assert torch.equal(torch.nan_to_num(out, nan=7.0), torch.nan_to_num(x, nan=7.0))


def test_subnormal_and_overflowing_halves_round_like_torch() -> None:
    x = torch.tensor([6e-8, -3e-6, 65504.0, 6.1e-5, 1.0]).half().repeat(5)[None, None]
    delta = torch.tensor([6e-8, 2e-7, 65504.0, -1e-7, 2**-11]).half().repeat(5)[None, None]
    out = blend(x, delta, torch.zeros(1, 0, 25).half(), torch.tensor(0.5), 0, 0)
    assert torch.equal(out, x + delta)


@pytest.mark.parametrize("gate_dtype", DTYPES, ids=str)
def test_gate_keeps_its_own_dtype(gate_dtype: torch.dtype) -> None:
    grad, difference = make((2, 5, 8), torch.float32, 0), make((2, 2, 8), torch.float32, 1)
    gate = torch.tensor([[0.5]], dtype=gate_dtype)
    *_, grad_gate = blend_backward(grad, gate, difference, 1, 2, False, False, True)
    exact = (grad.double()[:, 1:3] * difference.double()).sum()
    assert grad_gate.dtype == gate_dtype
    assert torch.equal(grad_gate, exact.to(gate_dtype).reshape(1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 5)}, r"`x` must be \[B, N, D\]; got \(4, 5\)"),
        ({"delta": torch.zeros(2, 5, 9)}, r"`delta` must be \(2, 5, 8\); got \(2, 5, 9\)"),
        ({"prompt_in": torch.zeros(1, 2, 8)}, r"`prompt_in` must be \(2, 2, 8\); got \(1, 2, 8\)"),
        ({"delta": torch.zeros(2, 5, 8, dtype=torch.float64)}, r"`delta` must be Float .* got Double"),
        ({"x": torch.zeros(2, 5, 8, dtype=torch.int64)}, r"`x` must be float32.* got Long"),
        ({"gate": torch.zeros(2)}, r"`gate` must hold one element; got \(2,\)"),
        ({"gate": torch.tensor(1)}, r"`gate` must be float32.* got Long"),
        ({"start": 4}, "`start`=4 and `length`=2 must name rows within the 5"),
        ({"start": -1}, "`start`=-1"),
        ({"length": -2}, "must name rows within the 5"),
        ({"start": 2**62, "length": 2**62}, "must name rows within the 5"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.zeros(2, 5, 8),
        "delta": torch.zeros(2, 5, 8),
        "prompt_in": torch.zeros(2, 2, 8),
        "gate": torch.tensor(0.5),
        "start": 1,
        "length": 2,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastprompt_cpu.gated_blend(**{**arguments, **change})


def test_gate_gradient_asks_for_the_difference() -> None:
    with pytest.raises(RuntimeError, match=r"`need_gate` needs `difference`.* got None"):
        blend_backward(torch.zeros(1, 3, 4), torch.tensor(0.5), None, 0, 1, True, True, True)
    with pytest.raises(RuntimeError, match=r"`difference` must be \(1, 1, 4\); got \(1, 2, 4\)"):
        blend_backward(torch.zeros(1, 3, 4), torch.tensor(0.5), torch.zeros(1, 2, 4), 0, 1, True, True, True)


def test_a_missing_library_is_said_once_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastprompt.ops import dispatch, gated_blend

    said: list[str] = []
    cpu = dispatch._backends["cpu"]
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "not built")
    monkeypatch.setattr(cpu, "on_missed", lambda: said.append("missing"))
    x = torch.randn(1, 3, 4)
    out = gated_blend(x, x, x[:, :1], torch.ones(1), 0, 1)[0]
    assert said == ["missing"]
    assert torch.equal(out[:, 1:], (x + x)[:, 1:])
