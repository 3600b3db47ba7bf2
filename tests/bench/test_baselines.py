"""Competitors of single operations compute what they should, and the benchmarks keep out those that do not."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import baselines, cases, ops
from bench.cases import prompt_attention
from bench.correctness import assert_same
from fastprompt.ops import prompt_attention_reference

ATTENTION = {
    "sdpa flash": baselines.sdpa("flash"),
    "sdpa math": baselines.sdpa("math"),
    "products": baselines.products,
    "flex, not compiled": baselines.flex(compiled=False),
}


def draw(P: int, per_image: bool = False) -> dict[str, Tensor]:
    lead = (3,) if per_image else ()
    named = {n: torch.randn(3, 9, 2, 8, dtype=torch.float64) for n in "qkv"}
    prompts = {n: torch.randn(*lead, P, 2, 8, dtype=torch.float64) for n in ("prompt_k", "prompt_v")}
    return {**named, **prompts}


@pytest.mark.parametrize("P", [0, 4])
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_of_every_competitor_on_a_cpu_is_the_definition(name: str, P: int) -> None:
    inputs = draw(P)
    out = ATTENTION[name](**inputs)
    assert out.is_contiguous()
    assert_same(out, prompt_attention_reference(**inputs))


@pytest.mark.parametrize("name", sorted(baselines.SDPA))
def test_sdpa_is_held_to_the_kernel_that_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = baselines.sdpa_kernel

    def record(kernel: Any) -> Any:
        asked.append(kernel)
        return original(kernel)

    monkeypatch.setattr(baselines, "sdpa_kernel", record)
    with contextlib.suppress(RuntimeError):  # not all of them are kernels of the CPU
        baselines.sdpa(name)(**draw(2))
    assert asked == [baselines.SDPA[name]]


def test_prompts_of_one_image_each_and_temperature() -> None:
    inputs = draw(4, per_image=True)
    temperature = torch.tensor([0.7], dtype=torch.float64)
    expected = prompt_attention_reference(**inputs, temperature=temperature)
    for given in (temperature, temperature.expand(3, 2, 9, 1)):
        assert_same(baselines.products(**inputs, temperature=given), expected)


# The check before each time -----------------------------------------------------------------------------------------


def small() -> ops.Case:
    return prompt_attention.case(2, 9, 3, 2, 8, torch.float32, "cpu", ("sdpa flash", "products"))


@pytest.mark.parametrize("mode", [ops.FORWARD, ops.BOTH])
def test_the_check_passes_right_competitors(mode: str) -> None:
    case = small()
    names = ["fastprompt eager", "sdpa flash", "products"]
    errors = ops.check_correctness(case, mode, names)
    assert list(errors) == names
    assert all(error > 0 for error in errors.values())
    assert case.notes == []


WRONG = {
    "a thousandth too large": lambda out: out * 1.001,
    "one element is NaN": lambda out: out.index_fill(1, torch.tensor([3]), torch.nan),
    "a row of one head is another's": lambda out: torch.cat([out[:, 1:2], out[:, 1:]], 1),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_the_check_refuses_wrong_competitors_and_says_so(change: Any) -> None:
    case = small()
    case.ours["wrong"] = lambda **inputs: change(baselines.products(**inputs))
    assert ops.check_correctness(case, ops.FORWARD, ["wrong"]) == {}
    (note,) = case.notes
    assert "wrong: WrongResult: output" in note


def test_the_check_sees_a_wrong_gradient() -> None:
    case = small()
    case.ours["wrong"] = lambda q, **rest: baselines.products(
        q=q, **{**rest, "v": 2 * rest["v"] - rest["v"].detach()}
    )
    assert "wrong" in ops.check_correctness(case, ops.FORWARD, ["wrong"])
    assert "wrong" not in ops.check_correctness(case, ops.BOTH, ["wrong"])
    assert "wrong: WrongResult: gradient of v" in case.notes[0]


def test_a_competitor_that_raises_becomes_a_note() -> None:
    case = small()
    case.ours["broken"] = lambda **inputs: baselines.products(**inputs, nothing=1)
    rows = ops.rows(case, ops.FORWARD, 2, "cpu")
    assert {r.provider for r in rows} >= {"fastprompt eager", "sdpa flash", "products"}
    assert [n for n in case.notes if "broken: TypeError" in n]


@pytest.mark.parametrize("operation", cases.NAMES)
@pytest.mark.parametrize("mode", [ops.FORWARD, ops.BOTH])
def test_every_case_has_rows_of_ours_and_of_others(operation: str, mode: str) -> None:
    for case in cases.load(operation).cases(ops.Size(2, 9, 2, 16, torch.float32, "cpu")):
        rows = ops.rows(case, mode, 2, "cpu")
        (baseline,) = {r.baseline for r in rows}
        assert baseline in case.others, case.name
        assert len(rows) + len(case.notes) == len(case.ours) + len(case.others)
        assert all("NotImplementedError" in note for note in case.notes), case.notes
        assert all(r.ratio == 1.0 for r in rows if r.provider == baseline)
