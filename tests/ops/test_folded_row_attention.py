"""folded_row_attention, the operator inside row_attention: rows that are keys and values at once, few query rows."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import NamedTuple

import pytest
import torch
from attention_cases import softmax
from numerics import backends_of, by_dtype, odd_strides, packed, saved_bytes, skip_unless_served, transposed
from torch import Tensor

from bench.correctness import Oracle
from fastprompt.ops import (
    dispatch,
    folded_row_attention,
    row_attention,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
OPERATION = "folded_row_attention"
OP = torch.ops.fastprompt.folded_row_attention


class Shape(NamedTuple):
    """Sizes of one call; M is rows read times heads."""

    B: int = 3
    M: int = 3
    N: int = 9
    P: int = 4
    D: int = 24


SHAPES = {
    "ViT-Ti": Shape(B=2, M=3, N=197, P=10, D=192),
    "ViT-S": Shape(B=1, M=6, N=50, P=1, D=384),
    "ViT-B": Shape(B=1, M=12, N=17, P=5, D=768),
    "two rows of twelve heads": Shape(M=24, D=96),
    "sixteen query rows": Shape(M=16, N=20, D=32),
    "one row": Shape(B=4, N=1, P=0),
    "one row, one prompt": Shape(B=4, N=1, P=1, M=1),
    "no prompts": Shape(N=33, P=0, D=40),
    "prompts only": Shape(N=0, P=6),
    "many prompts": Shape(N=2, P=150),
    "odd width": Shape(M=1, D=33),
    "width 1000": Shape(B=1, M=2, D=1000),
    "empty batch": Shape(B=0),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_kind = pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per image"])


def draw(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", *, per_image: bool = False
) -> dict[str, Tensor | None]:
    B, M, N, P, D = shape
    inputs: dict[str, Tensor | None] = {
        "query": torch.randn(B, M, D) / D**0.5,
        "rows": torch.randn(B, N, D),
        "prompt_rows": torch.randn(*((B,) if per_image else ()), P, D),
    }
    return {name: None if x is None else x.to(device, dtype) for name, x in inputs.items()}


def plain(query: Tensor, rows: Tensor, prompt_rows: Tensor) -> Tensor:
    """Plain PyTorch in the inputs' dtype."""
    if prompt_rows.ndim == 2:
        prompt_rows = torch.stack([prompt_rows] * len(rows)) if len(rows) else prompt_rows[None][:0]
    every = torch.cat([rows, prompt_rows], 1)
    return torch.matmul(softmax(torch.matmul(query, every.mT)).to(every.dtype), every)


@pytest.mark.grid
@by_dtype
@by_kind
@by_shape
def test_output_and_gradients(
    shape: Shape, per_image: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    inputs = draw(shape, dtype, device, per_image=per_image)
    skip_unless_served(OPERATION, backend, *inputs.values())
    Oracle(plain, inputs)(folded_row_attention)


# The kernels' tiles depend on the shape; the kind of prompts and the dtype, on nothing else.
PATHS = {
    name: (shape, i % 2 == 1, (torch.float32, torch.float16)[i // 2 % 2])
    for i, (name, shape) in enumerate(SHAPES.items())
}


@pytest.mark.parametrize(("shape", "per_image", "dtype"), PATHS.values(), ids=PATHS.keys())
def test_output_and_gradients_of_each_shape(
    shape: Shape, per_image: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    inputs = draw(shape, dtype, device, per_image=per_image)
    skip_unless_served(OPERATION, backend, *inputs.values())
    Oracle(plain, inputs)(folded_row_attention)


NAMES = ("query", "rows", "prompt_rows")
SUBSETS = [
    {n for n, k in zip(NAMES, keep, strict=True) if k} for keep in product((0, 1), repeat=3) if any(keep)
]


@by_kind
@pytest.mark.parametrize("trainable", SUBSETS, ids=lambda names: " ".join(sorted(names)))
def test_gradients_are_the_same_whichever_else_trains(
    trainable: set[str], per_image: bool, backend: str, device: str
) -> None:
    inputs = draw(Shape(B=2), torch.float32, device, per_image=per_image)
    Oracle(plain, inputs, trainable=trainable)(folded_row_attention)


@pytest.mark.skipif("triton" not in backends_of(OPERATION), reason="about the kernels")
@pytest.mark.parametrize(("N", "multiprocessors"), [(250, 4), (500, 1000)], ids=["two each", "one tile each"])
def test_programs_that_share_an_image_give_the_same(
    N: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastprompt.kernels.triton import launch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    inputs = draw(Shape(B=2, N=N), torch.float32, device)
    Oracle(plain, inputs)(partial(folded_row_attention, backend="triton"))


def test_a_row_that_outweighs_all_others_moves_no_query(backend: str, device: str) -> None:
    """Its weight is 1, its score's gradient 0; in float32 the products' rounding is 100 times what is left."""
    inputs = draw(Shape(N=1, P=0, D=768, B=1), torch.float32, device)
    query = inputs["query"].requires_grad_()  # type: ignore[union-attr]
    context = folded_row_attention(query, inputs["rows"], backend=backend)  # type: ignore[arg-type]
    cotangent = torch.randn_like(context)
    (gradient,) = torch.autograd.grad(context, query, cotangent)
    size = (cotangent * context).abs().sum(-1).max() * inputs["rows"].abs().max()  # type: ignore[union-attr]
    assert gradient.abs().max() <= torch.finfo(torch.float32).eps ** 2 * size


@pytest.mark.parametrize("layout", [packed, odd_strides, transposed], ids=lambda layout: layout.__name__)
def test_strides_do_not_matter(layout, backend: str, device: str) -> None:
    inputs = draw(Shape(B=2, N=5, D=16), torch.float32, device, per_image=True)
    given = {name: layout(x[:, :, None])[:, :, 0] for name, x in inputs.items()}  # type: ignore[index]
    Oracle(plain, inputs)(folded_row_attention, given)


def test_expanded_rows_and_gradient(backend: str, device: str) -> None:
    inputs = draw(Shape(), torch.float32, device)
    inputs["rows"] = inputs["rows"][:1].expand(3, -1, -1)  # type: ignore[index]
    cotangent = torch.randn(1, 1, 24, device=device).expand(3, 3, 24)
    Oracle(plain, inputs, cotangents=[cotangent])(folded_row_attention)


def test_large_scores_overflow_nowhere(backend: str, device: str) -> None:
    inputs = draw(Shape(N=150, P=10), torch.float32, device)
    inputs["query"] *= 300  # type: ignore[operator]
    Oracle(plain, inputs)(folded_row_attention)


def test_very_negative_scores_of_all_rows_are_a_softmax_all_the_same(backend: str, device: str) -> None:
    inputs = draw(Shape(), torch.float32, device)
    for x in inputs.values():
        x.abs_()  # type: ignore[union-attr]
    inputs["query"] *= -200  # type: ignore[operator]
    Oracle(plain, inputs)(folded_row_attention)


def test_log_sum_exp_is_that_of_the_scores(backend: str, device: str) -> None:
    def lse(query: Tensor, rows: Tensor, prompt_rows: Tensor) -> Tensor:
        every = torch.cat([rows, prompt_rows.expand(3, -1, -1)], 1)
        return (query @ every.mT).logsumexp(-1)

    inputs = draw(Shape(), torch.float32, device)
    Oracle(lse, inputs, backward=False)(lambda **i: OP(*i.values(), backend)[1])


def test_backend_by_name_goes_through_row_attention(backend: str, device: str) -> None:
    inputs: dict[str, Tensor | None] = {
        "q": torch.randn(2, 1, 2, 3, device=device),
        "rows": torch.randn(2, 5, 16, device=device),
        "prompt_rows": None,
        "k_weight": torch.randn(6, 16, device=device),
        "v_weight": torch.randn(6, 16, device=device),
        "v_bias": None,
    }
    Oracle(partial(row_attention, backend="eager"), inputs)(partial(row_attention, backend=backend))


@pytest.mark.parametrize("shape", [Shape(M=33), Shape(B=1, D=1537), Shape(B=1, M=17, D=769)], ids=str)
def test_what_the_kernel_does_not_hold_is_left_to_eager(shape: Shape, backend: str, device: str) -> None:
    inputs = draw(shape, torch.float32, device)
    reason = dispatch.why_not(OPERATION, backend, *inputs.values())
    assert (reason is not None) == (backend == "triton")
    assert reason is None or "is not supported" in reason or "are not supported" in reason
    Oracle(plain, inputs)(partial(folded_row_attention, backend="eager"))


def test_image_rows_are_not_kept_when_prompt_rows_alone_train() -> None:
    B, M, N, P, D = shape = Shape(B=2, N=50)
    query, rows, prompt_rows = draw(shape, torch.float32).values()
    kept = saved_bytes(
        lambda: folded_row_attention(query, rows, prompt_rows.requires_grad_())  # type: ignore[arg-type, union-attr]
    )
    assert kept == 4 * (2 * B * M * D + P * D + B * M)
    rows.requires_grad_()  # type: ignore[union-attr]
    kept = saved_bytes(lambda: folded_row_attention(query, rows, prompt_rows))  # type: ignore[arg-type]
    assert kept == 4 * (2 * B * M * D + B * N * D + P * D + B * M)


# Autocast, and what it refuses --------------------------------------------------------------------------------------


def test_autocast_runs_it_in_bfloat16_and_leaves_float64_alone() -> None:
    inputs = draw(Shape(), torch.float32)
    low = {name: x.bfloat16() for name, x in inputs.items()}  # type: ignore[union-attr]
    mixed = {**inputs, "rows": low["rows"]}
    wide = {name: x.double() for name, x in inputs.items()}  # type: ignore[union-attr]
    want, want_wide = folded_row_attention(**low), folded_row_attention(**wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(folded_row_attention(**mixed), want)  # type: ignore[arg-type]
        assert torch.equal(folded_row_attention(**wide), want_wide)


WRONG = {
    "query": ({"query": (3, 24)}, r"`query` must be \[B, M, D\]; got \(3, 24\)"),
    "width of rows": ({"rows": (3, 9, 25)}, r"`rows` must be \[B, N, D\] with B=3, D=24.*got \(3, 9, 25\)"),
    "batch of rows": ({"rows": (2, 9, 24)}, r"got \(2, 9, 24\)"),
    "width of prompts": ({"prompt_rows": (4, 23)}, r"`prompt_rows` must be \[P, D\].*got \(4, 23\)"),
    "batch of prompts": ({"prompt_rows": (2, 4, 24)}, r"B=3, D=24; got \(2, 4, 24\)"),
    "nothing to attend to": ({"rows": (3, 0, 24), "prompt_rows": (0, 24)}, "no row to attend to"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_shapes_are_named(change: dict[str, tuple[int, ...]], message: str) -> None:
    inputs = {**draw(Shape(), torch.float32), **{name: torch.ones(s) for name, s in change.items()}}
    with pytest.raises(ValueError, match=message):
        folded_row_attention(**inputs)  # type: ignore[arg-type]


def test_wrong_dtypes_and_devices_are_named() -> None:
    inputs = draw(Shape(), torch.float32)
    with pytest.raises(TypeError, match=r"`rows` is torch.float64 and `query` torch.float32; convert"):
        folded_row_attention(**{**inputs, "rows": inputs["rows"].double()})  # type: ignore[union-attr, arg-type]
    with pytest.raises(TypeError, match=r"`query` must be floating point; got torch.int64"):
        folded_row_attention(**{name: x.long() for name, x in inputs.items()})  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"`prompt_rows` is on meta and `query` on cpu"):
        folded_row_attention(**{**inputs, "prompt_rows": inputs["prompt_rows"].to("meta")})  # type: ignore[union-attr, arg-type]
