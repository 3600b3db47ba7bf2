"""gated_blend, alone and with its norm: both outputs and every gradient, as an operator, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numerics import FLOATS, backends_of, by_dtype, by_layout, saved_bytes
from torch import Tensor

from bench.correctness import Inputs, Oracle, assert_same
from fastprompt.ops import Norm, dispatch, gated_blend, gated_blend_reference

OPERATION = "gated_blend"
EPS = 1e-6

pytestmark = pytest.mark.usefixtures("poisoned_memory")
by_norm = pytest.mark.parametrize("norm", [False, True], ids=["alone", "norm"])

Sizes = tuple[int, int, int, int, int]  # B, N, D, start, length
SMALL: Sizes = (2, 6, 8, 1, 3)
SIZES: dict[str, Sizes] = {
    "after the class token": (2, 12, 24, 1, 4),
    "no prompt rows": (2, 5, 8, 2, 0),
    "no prompt rows, at the end": (2, 5, 8, 5, 0),
    "first rows": (2, 7, 33, 0, 3),
    "last rows": (2, 7, 96, 4, 3),
    "all rows": (2, 6, 16, 0, 6),
    "one row of one": (3, 1, 5, 0, 1),
    "width 1": (2, 9, 1, 3, 2),
    "empty batch": (0, 6, 16, 1, 2),
    "ViT-B": (2, 5, 768, 1, 2),
    "width 1536": (1, 3, 1536, 1, 1),
    "many rows": (1, 207, 40, 1, 10),
    "more prompt rows than are added up at once": (30, 36, 2, 1, 35),
}
by_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def draw(sizes: Sizes, dtype: torch.dtype, device: str = "cpu", gate: float = 0.37) -> dict[str, Tensor]:
    B, N, D, _, length = sizes
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = {"x": torch.randn(B, N, D), "delta": torch.randn(B, N, D), "prompt_in": torch.randn(B, length, D)}
    return {
        **{name: t.to(device, dtype) for name, t in rows.items()},
        "gate": torch.tensor([gate], dtype=wide, device=device),
    }


def affine(D: int, device: str = "cpu") -> Norm:
    return Norm((torch.randn(D) + 1).to(device), torch.randn(D, device=device), EPS)


def plain(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor,
    gate: Tensor,
    start: int,
    length: int,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The formula in plain PyTorch, in the inputs' dtypes."""
    y = x + delta
    gate = gate.to(x.dtype)
    rows = gate * y[:, start : start + length] + (1 - gate) * prompt_in
    y = torch.cat((y[:, :start], rows, y[:, start + length :]), 1)
    if norm is None:
        return y, None
    weight, bias = (t if t is None else t.to(x.dtype) for t in norm[:2])
    return y, F.layer_norm(y, y.shape[-1:], weight, bias, norm.eps).to(delta.dtype)


def at(function: Callable[..., Any], sizes: Sizes, norm: Norm | None) -> Callable[..., Any]:
    return partial(function, start=sizes[3], length=sizes[4], norm=norm)


def oracle(inputs: Inputs, sizes: Sizes, norm: Norm | None, **options: Any) -> Oracle:
    return Oracle(at(plain, sizes, norm), inputs, exact=at(gated_blend_reference, sizes, norm), **options)


def assert_exact(inputs: Inputs, sizes: Sizes, norm: Norm | None, given: Inputs | None = None) -> None:
    oracle(inputs, sizes, norm)(at(gated_blend, sizes, norm), given)


@by_size
def test_reference_is_a_gated_residual(sizes: Sizes) -> None:
    inputs, norm = draw(sizes, torch.float64), affine(sizes[2])
    y, normed = gated_blend_reference(**inputs, start=sizes[3], length=sizes[4], norm=norm)
    rows = list((inputs["x"] + inputs["delta"]).unbind(1))
    for i in range(sizes[4]):
        before = inputs["prompt_in"][:, i]
        rows[sizes[3] + i] = before + inputs["gate"] * (rows[sizes[3] + i] - before)
    assert_same(y, torch.stack(rows, 1))
    deviation = y - y.mean(-1, keepdim=True)
    unit = deviation / (deviation.square().mean(-1, keepdim=True) + EPS).sqrt()
    assert_same(normed, unit * norm.weight + norm.bias)  # type: ignore[operator]


@by_dtype
@by_size
@by_norm
def test_outputs_and_gradients(
    backend: str, device: str, sizes: Sizes, dtype: torch.dtype, norm: bool
) -> None:
    assert_exact(draw(sizes, dtype, device), sizes, affine(sizes[2], device) if norm else None)


@pytest.mark.parametrize("names", [(), ("weight",), ("bias",)], ids=["neither", "weight", "bias"])
def test_norm_without_weight_or_bias(
    backend: str, device: str, widest: torch.dtype, names: tuple[str, ...]
) -> None:
    whole = affine(8, device)._asdict()
    norm = Norm(*(whole[name] if name in names else None for name in ("weight", "bias")), EPS)  # type: ignore[misc]
    assert_exact(draw(SMALL, widest, device), SMALL, norm)


@by_layout
@by_norm
def test_strides_do_not_matter(
    backend: str, device: str, widest: torch.dtype, layout: Callable[[Tensor], Tensor], norm: bool
) -> None:
    sizes = (3, 9, 24, 2, 3)
    inputs = draw(sizes, widest, device)
    laid_out = {n: x if n == "gate" else layout(x[:, :, None])[:, :, 0] for n, x in inputs.items()}
    same = {n: x.contiguous() for n, x in laid_out.items()}
    *weights, eps = affine(24, device)
    strided = Norm(*(torch.stack([t, t * torch.nan], 1)[:, 0] for t in weights), eps)  # type: ignore[union-attr, operator]
    cotangents = [layout(torch.randn(3, 9, 1, 24, device=device))[:, :, 0] for _ in range(1 + norm)]
    judge = oracle(same, sizes, strided if norm else None, cotangents=cotangents)
    judge(at(gated_blend, sizes, strided if norm else None), laid_out)


@pytest.mark.parametrize("read", [0, 1], ids=["y only", "the norm only"])
def test_one_output_may_not_be_read(backend: str, device: str, widest: torch.dtype, read: int) -> None:
    norm = affine(8, device)
    functions = [
        lambda f=f, **inputs: at(f, SMALL, norm)(**inputs)[read]
        for f in (plain, gated_blend_reference, gated_blend)
    ]
    Oracle(functions[0], draw(SMALL, widest, device), exact=functions[1])(functions[2])


@pytest.mark.parametrize("name", backends_of(OPERATION))
@given(
    rows=st.tuples(*[st.integers(0, 5)] * 3),
    B=st.integers(0, 3),
    D=st.integers(1, 70),
    dtype=st.sampled_from(FLOATS),
    gate=st.floats(0, 1, width=32),
    norm=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes(
    name: str,
    rows: tuple[int, int, int],
    B: int,
    D: int,
    dtype: torch.dtype,
    gate: float,
    norm: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    device = "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    probe = (*(torch.empty(1, 1, 1, dtype=dtype, device=device),) * 3, *(None,) * 6)
    if dispatch.why_not(OPERATION, name, *probe) is not None:
        return
    with dispatch.use_backend(name):
        sizes = (B, sum(rows), D, *rows[:2])
        assert_exact(draw(sizes, dtype, device, gate), sizes, affine(D, device) if norm else None)


@by_dtype
def test_gates_of_zero_and_one_give_the_rows_that_entered_and_the_residual_add(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    inputs = draw((2, 12, 24, 1, 4), dtype, device, gate=0.0)
    total = inputs["x"] + inputs["delta"]
    out, _ = gated_blend(**inputs, start=1, length=4)
    assert torch.equal(out[:, 1:5], inputs["prompt_in"])
    assert torch.equal(out[:, 5:], total[:, 5:])
    out, _ = gated_blend(**{**inputs, "gate": torch.ones_like(inputs["gate"])}, start=1, length=4)
    assert torch.equal(out, total)


@by_norm
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gate_of_any_shape_and_dtype(
    backend: str, device: str, shape: tuple[int, ...], gate_dtype: torch.dtype, norm: bool
) -> None:
    gate = torch.full(shape, 0.25, dtype=gate_dtype, device=device)
    assert_exact(
        {**draw(SMALL, torch.float32, device), "gate": gate}, SMALL, affine(8, device) if norm else None
    )


def test_nan_in_a_prompt_row_stays_in_that_row(backend: str, device: str) -> None:
    inputs = draw(SMALL, torch.float32, device)
    inputs["prompt_in"][1, 2] = torch.nan
    for out in at(gated_blend, SMALL, affine(8, device))(**inputs):
        assert out[1, 3].isnan().all()
        out[1, 3] = 0
        assert out.isfinite().all()


SUBSETS = ["x", "delta", "prompt_in", "gate", "delta gate", "prompt_in gate", "x prompt_in", "x delta gate"]


@by_norm
@pytest.mark.parametrize("names", SUBSETS)
def test_each_subset_of_inputs_gets_its_gradients(
    backend: str, device: str, widest: torch.dtype, names: str, norm: bool
) -> None:
    affine_or_none = affine(8, device) if norm else None
    judge = oracle(draw(SMALL, widest, device), SMALL, affine_or_none, trainable=names.split())
    judge(at(gated_blend, SMALL, affine_or_none))


@by_norm
def test_gradients_of_x_and_delta_are_separate_tensors(backend: str, device: str, norm: bool) -> None:
    inputs = {n: x.requires_grad_() for n, x in draw(SMALL, torch.float32, device).items()}
    at(gated_blend, SMALL, affine(8, device) if norm else None)(**inputs)[int(norm)].sum().backward()
    x, delta = inputs["x"].grad, inputs["delta"].grad
    kept = delta.clone()  # type: ignore[union-attr]
    x.zero_()  # type: ignore[union-attr]
    assert torch.equal(delta, kept)  # type: ignore[arg-type]


def test_keeps_prompt_rows_only_for_the_gate_and_y_only_for_the_norm(backend: str, device: str) -> None:
    sizes = B, N, D, start, length = (2, 50, 32, 1, 3)
    inputs = draw(sizes, torch.float32, device)
    inputs["x"].requires_grad_()

    def kept(norm: Norm | None) -> int:
        return saved_bytes(lambda: at(gated_blend, sizes, norm)(**inputs)[0])

    of_norm = 4 * (B * N * D + 2 * B * N + D)  # y, mean, rstd, weight
    assert (kept(None), kept(affine(D, device))) == (4, 4 + of_norm)
    inputs["gate"].requires_grad_()
    of_gate = 4 + 4 * B * length * D
    assert (kept(None), kept(affine(D, device))) == (of_gate, of_gate + of_norm)


# The norm --------------------------------------------------------------------------------------------------------


def test_y_is_the_same_with_and_without_a_norm(backend: str, device: str, widest: torch.dtype) -> None:
    inputs = draw((2, 12, 24, 1, 4), widest, device)
    alone, none = gated_blend(**inputs, start=1, length=4)
    assert none is None
    assert torch.equal(gated_blend(**inputs, start=1, length=4, norm=Norm(None, None, EPS))[0], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_norm_reads_y_as_rounded(backend: str, device: str, dtype: torch.dtype) -> None:
    """Rows whose differences vanish in the rounding of a large mean: their norm is the bias."""
    x = torch.full((1, 2, 8), 2.0**11, device=device, dtype=dtype)
    delta = (torch.rand(1, 2, 8, device=device) * torch.finfo(dtype).eps * 2**9).to(dtype)
    norm = affine(8, device)
    y, normed = gated_blend(x, delta, x[:, :0], torch.ones(1, device=device), 0, 0, norm=norm)
    assert torch.equal(y, x)
    assert torch.equal(normed, norm.bias.to(dtype).expand_as(normed))  # type: ignore[union-attr, arg-type]


def test_a_large_mean_costs_no_digits_of_the_variance(backend: str, device: str) -> None:
    inputs = draw((2, 3, 96, 1, 1), torch.float32, device)
    inputs["x"] += 300
    oracle(inputs, (2, 3, 96, 1, 1), Norm(None, None, EPS))(
        at(gated_blend, (2, 3, 96, 1, 1), Norm(None, None, EPS))
    )


@by_norm
def test_autocast_blends_in_the_widest_dtype_norms_in_deltas_and_keeps_the_gate(norm: bool) -> None:
    inputs = draw((2, 5, 6, 1, 2), torch.float32, gate=0.5003)  # 0.5 in bfloat16
    low = {**inputs, "delta": inputs["delta"].bfloat16()}
    low["delta"].requires_grad_()
    low["gate"].requires_grad_()
    function = at(gated_blend, (2, 5, 6, 1, 2), affine(6) if norm else None)
    with torch.autocast("cpu", torch.bfloat16):
        out = [t for t in function(**low) if t is not None]
        sum(t.sum() for t in out).backward()  # type: ignore[union-attr]
    want = [t for t in function(**{**low, "delta": low["delta"].float()}) if t is not None]
    assert torch.equal(out[0], want[0])
    assert not norm or torch.equal(out[1], want[1].bfloat16())
    assert (low["delta"].grad.dtype, low["gate"].grad.dtype) == (torch.bfloat16, torch.float32)  # type: ignore[union-attr]


@by_norm
@pytest.mark.parametrize("names", ["x delta prompt_in gate", "delta", "x"])
def test_a_wide_residual_stream_and_a_narrow_branch(
    backend: str, device: str, norm: bool, names: str
) -> None:
    """What the operator sees of autocast, on every backend: each tensor in its own dtype, and so its gradient."""
    sizes = (2, 6, 40, 1, 3)
    given = affine(40, device) if norm else None
    inputs = draw(sizes, torch.float32, device)
    inputs["delta"] = inputs["delta"].half()
    function = partial(at_operator, backend, sizes[3:], given)
    oracle(inputs, sizes, given, trainable=names.split())(function)
    y, *normed = function(**inputs)
    assert y.dtype == torch.float32
    assert all(t.dtype == torch.float16 for t in normed)


def at_operator(
    backend: str, rows: tuple[int, int], norm: Norm | None, **inputs: Tensor
) -> tuple[Tensor, ...]:
    """The operator itself, which takes mixed dtypes."""
    affine_or_none = (None, None, None) if norm is None else norm
    y, normed, *_ = torch.ops.fastprompt.gated_blend(*inputs.values(), *rows, *affine_or_none, backend)
    return (y,) if norm is None else (y, normed)


# What it refuses -------------------------------------------------------------------------------------------------

ONES = torch.ones(8)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of two dimensions": ({"x": torch.ones(6, 8)}, ValueError, r"\(6, 8\)"),
    "delta of another size": ({"delta": torch.ones(2, 5, 8)}, ValueError, r"\(2, 5, 8\)"),
    "a negative start": ({"start": -1}, ValueError, "start=-1"),
    "a negative length": ({"length": -2}, ValueError, r"start\+length=-1"),
    "rows past the end": ({"start": 4}, ValueError, r"start\+length=7.*N=6"),
    "prompts not expanded": ({"prompt_in": torch.ones(1, 3, 8)}, ValueError, r"\(1, 3, 8\).*expand"),
    "prompts of another number": ({"prompt_in": torch.ones(2, 4, 8)}, ValueError, r"\(2, 4, 8\)"),
    "a gate of two elements": ({"gate": torch.ones(2)}, ValueError, r"\(2,\)"),
    "an integer gate": ({"gate": torch.ones(1, dtype=torch.int64)}, ValueError, "int64"),
    "delta of another dtype": (
        {"delta": torch.ones(2, 6, 8).double()},
        TypeError,
        "`gated_blend`: `delta` is torch.float64",
    ),
    "prompts of another dtype": (
        {"prompt_in": torch.ones(2, 3, 8).half()},
        TypeError,
        "`prompt_in` is torch.float16",
    ),
    "delta on another device": (
        {"delta": torch.ones(2, 6, 8, device="meta")},
        ValueError,
        "`delta` is on meta",
    ),
    "the gate on another device": ({"gate": torch.ones(1, device="meta")}, ValueError, "`gate` is on meta"),
    "integers": (
        {
            "x": torch.ones(2, 6, 8).int(),
            "delta": torch.ones(2, 6, 8).int(),
            "prompt_in": torch.ones(2, 3, 8).int(),
        },
        TypeError,
        "`x` must be floating point; got torch.int32",
    ),
    "an unknown backend": ({"backend": "tpu"}, ValueError, "'tpu'"),
    "a weight of another width": (
        {"norm": Norm(torch.ones(7), None, EPS)},
        ValueError,
        r"`norm.weight`.*\[8\].*\(7,\)",
    ),
    "an integer bias": ({"norm": Norm(None, ONES.int(), EPS)}, ValueError, "`norm.bias`.*int32"),
    "a bias on another device": (
        {"norm": Norm(None, ONES.to("meta"), EPS)},
        ValueError,
        "`norm.bias` is on meta",
    ),
    "a trained weight": (
        {"norm": Norm(torch.ones(8, requires_grad=True), None, EPS)},
        NotImplementedError,
        "`norm.weight`.*detach.*layer_norm",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_its_value(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {**draw(SMALL, torch.float32), "start": 1, "length": 3}
    with pytest.raises(error, match=message):
        gated_blend(**{**arguments, **changes})


def test_a_trained_weight_is_accepted_without_gradients() -> None:
    inputs, (weight, bias, eps) = draw(SMALL, torch.float64), affine(8)
    norm = Norm(weight.requires_grad_(), bias, eps)  # type: ignore[union-attr]
    with torch.no_grad():
        assert_same(at(gated_blend, SMALL, norm)(**inputs), at(gated_blend_reference, SMALL, norm)(**inputs))
