"""The backend `triton` through the public operations: random shapes, refusals, and repeatability."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from attention_cases import KINDS, Shape, concatenated, draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import dtypes_of
from torch import Tensor

from bench.correctness import Inputs, Oracle, assert_same, evaluate
from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton import prompt_attention as kernels
from fastprompt.kernels.triton.prompt_attention_config import RESIDENT_KEYS, head_pieces, key_pieces, tail
from fastprompt.ops import dispatch, prompt_attention, prompt_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = dtypes_of("triton")
# On a GPU also so many images that each head has a program of its own, as in the interpreter it has anyway.
BATCHES = (2, 150) if DEVICE == "cuda" else (2,)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def triton_by_name() -> Iterator[None]:
    with dispatch.use_backend("triton"):
        yield


def assert_exact(inputs: Inputs, given: Inputs | None = None) -> None:
    Oracle(concatenated, inputs, exact=prompt_attention_reference)(prompt_attention, given)


def interleaved(x: Tensor) -> Tensor:
    """x as every third tensor of a larger one, NaN between."""
    buffer = x.new_full((*x.shape[:-2], 3, *x.shape[-2:]), torch.nan)
    buffer[..., 1, :, :] = x
    return buffer[..., 1, :, :]


@settings(suppress_health_check=list(HealthCheck))
@given(
    shape=st.builds(
        Shape,
        B=st.sampled_from([1, *BATCHES]),
        Nq=st.one_of(st.integers(1, 40), st.integers(100, 200)),
        N=st.one_of(st.integers(1, 40), st.integers(100, 290)),
        P=st.one_of(st.integers(0, 20), st.integers(60, 130)),
        H=st.just(1),
        d=st.sampled_from([16, 24, 32, 40, 64, 72, 80, 88, 96, 128]),
        kind=st.sampled_from(KINDS),
    ),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    temperature=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(shape: Shape, dtype: torch.dtype, strided: bool, temperature: bool, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = draw(shape, dtype, DEVICE, temperature)
    names = ("q", "k", "v", "prompt_k", "prompt_v") if strided else ()
    laid_out = {n: interleaved(x) if n in names and x is not None else x for n, x in inputs.items()}
    assert_exact(inputs, laid_out)


@pytest.mark.parametrize("keys", [40, 300], ids=["all keys at once", "tiles of keys"])
@pytest.mark.parametrize("B", BATCHES)
def test_two_runs_give_the_same_bits(keys: int, B: int) -> None:
    inputs = draw(Shape(B=B, Nq=40, N=keys, kind="shared"), DTYPES[-1], DEVICE)
    cotangent = torch.randn(B, 40, 2, 32, device=DEVICE)
    first, second = (evaluate(prompt_attention, inputs, cotangent) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize("keys", [9, 300], ids=["all keys at once", "tiles of keys"])
@pytest.mark.parametrize("factor", [-0.3, 0.0], ids=["negative", "zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_scale(keys: int, factor: float, dtype: torch.dtype) -> None:
    inputs = draw(Shape(B=BATCHES[-1], Nq=40, N=keys), dtype, DEVICE, temperature=False)
    plain, exact, ours = (
        partial(f, scale=factor) for f in (concatenated, prompt_attention_reference, prompt_attention)
    )
    Oracle(plain, inputs, exact=exact)(ours)


@pytest.mark.parametrize("keys", [40, 300], ids=["all keys at once", "tiles of keys"])
@pytest.mark.parametrize("deviation", [11, 57])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_saturated_softmax(keys: int, deviation: float, dtype: torch.dtype) -> None:
    """Rounding `out` must not show: times large scores, it would be far more than the gradient of the temperature."""
    inputs = draw(Shape(B=BATCHES[-1], Nq=40, N=keys, d=64), dtype, DEVICE)
    inputs["temperature"] = torch.tensor([1 / deviation], device=DEVICE)
    Oracle(concatenated, inputs, trainable=("temperature",))(prompt_attention)
    if (
        keys < RESIDENT_KEYS
    ):  # elsewhere the weights' gradients have the rounding of `out`, as in every flash kernel
        Oracle(concatenated, inputs)(prompt_attention)


@pytest.mark.skipif(not launch.INTERPRETED, reason="with a GPU, the number of multiprocessors is its own")
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_may_own_several_images(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 4)
    assert kernels._images_of_a_program(5, 2, 4) == 3
    assert_exact(draw(Shape(B=5, Nq=17, kind=kind), torch.float32))


@pytest.mark.parametrize("keys", [9, 300], ids=["all keys at once", "tiles of keys"])
def test_very_negative_scores_leave_no_trace_of_padding(keys: int) -> None:
    """A padded key scores 0, by which its weight overflows where all true scores lie far below."""
    inputs = draw(Shape(B=1, Nq=5, N=keys, P=3), torch.float32, DEVICE, temperature=False)
    for name in ("k", "prompt_k"):
        inputs[name] = inputs[name].abs() + 1  # type: ignore[union-attr]
    inputs["q"] = -inputs["q"].abs() - 10  # type: ignore[union-attr]
    assert_exact(inputs)


def test_an_index_outside_the_table_gives_nan_for_its_image_alone() -> None:
    inputs = draw(Shape(B=3, kind="table"), torch.float32, DEVICE)
    for wrong in (5, -1):
        inputs["prompt_index"] = torch.tensor([0, wrong, 4], device=DEVICE)
        out = prompt_attention(**inputs)  # type: ignore[arg-type]
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


def test_what_is_not_supported_is_refused_with_the_reason() -> None:
    wide = draw(Shape(d=160), torch.float32, DEVICE)
    with pytest.raises(NotImplementedError, match="head_dim 160 is not supported"):
        prompt_attention(**wide)  # type: ignore[arg-type]
    double = draw(Shape(), torch.float64, DEVICE)
    with pytest.raises(NotImplementedError, match=r"torch\.float64 is not supported"):
        prompt_attention(**double)  # type: ignore[arg-type]


@pytest.mark.skipif(not launch.INTERPRETED, reason="about the interpreter, which runs where there is no GPU")
def test_the_interpreter_is_taken_by_name_alone_and_refuses_bfloat16() -> None:
    inputs = draw(Shape(), torch.bfloat16)
    with pytest.raises(NotImplementedError, match="computes bfloat16 wrongly"):
        prompt_attention(**inputs)  # type: ignore[arg-type]
    with dispatch.use_backend("auto"):
        arguments = (*draw(Shape(), torch.float32).values(), 0.1)
        assert dispatch.select("prompt_attention", "auto", *arguments)[0] == "eager"


def test_eager_runs_float64_unless_a_backend_is_named() -> None:
    inputs = draw(Shape(), torch.float64, DEVICE)
    with dispatch.use_backend("auto"):
        got = prompt_attention(**inputs)  # type: ignore[arg-type]
    assert_same(got, prompt_attention_reference(**inputs))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "torch_allows", "want"),
    [
        ("auto", "ieee", "ieee"),
        ("auto", "tf32", "tf32"),
        ("ieee", "tf32", "ieee"),
        ("tf32x3", "ieee", "tf32x3"),
        ("tf32x3", "tf32", "tf32x3"),
    ],
)
def test_products_of_float32_are_as_asked(
    asked: str, torch_allows: str, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "FP32", asked)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=torch_allows))
    assert launch.input_precision(torch.float32) == want
    assert launch.input_precision(torch.bfloat16) == "ieee"


def test_an_unknown_precision_of_float32_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "FP32", "fp8")
    with pytest.raises(ValueError, match=r"`FASTPROMPT_FP32`: 'fp8' is not supported; use 'auto', 'ieee' or"):
        launch.input_precision(torch.float32)


# The table -------------------------------------------------------------------------------------------------------


def test_pieces_of_a_head_waste_little() -> None:
    for d in range(1, 129):
        first, second = head_pieces(d)
        assert first + second >= d
        assert first + second <= max(16, d + 15) or d > 96
        assert second < first


def test_pieces_of_keys_waste_little() -> None:
    for keys in range(1, RESIDENT_KEYS + 1):
        pieces = key_pieces(keys)
        assert keys <= sum(pieces) < keys + 32
        # Padding stands in the last piece alone, which is masked.
        last = [p for p in pieces if p][-1]
        assert sum(pieces) - last < keys
        assert last <= 64


def test_a_tail_holds_what_whole_tiles_leave() -> None:
    for keys in range(1, 400):
        rest = keys % 64
        assert (tail(keys, 64) == 0) == (rest == 0)
        assert rest <= tail(keys, 64) <= 64


def test_few_heads_are_shared_among_more_programs() -> None:
    rows = kernels._rows_of_a_program
    one = torch.device(DEVICE)
    assert rows(197, 64, 10**6, one) == 256
    assert rows(197, 64, 1, one) == 64


def test_images_of_a_program_leave_no_multiprocessor_idle_for_long() -> None:
    for B, H, multiprocessors in product((1, 2, 31, 32, 128, 512), (3, 6, 12, 16, 20), (108, 132, 148)):
        images = kernels._images_of_a_program(B, H, multiprocessors)
        programs = -(-B // images) * H
        time = images * -(-programs // multiprocessors)
        assert time <= -(-B * H // multiprocessors)
        assert 1 <= images <= B
    assert kernels._images_of_a_program(128, 12, 132) == 12  # 11 groups of 12 heads, on 132 multiprocessors
