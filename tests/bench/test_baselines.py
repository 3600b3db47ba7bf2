"""What the package is measured against computes what it should: the official code's numbers, and the definitions."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import golden_files
import pytest
import torch
from torch import Tensor, nn

from bench import baselines, ops
from fastprompt.ops import prompt_attention_reference

F64 = torch.float64


def draw(P: int, per_image: bool = False) -> dict[str, Tensor]:
    lead = (3,) if per_image else ()
    named = {n: torch.randn(3, 9, 2, 8, dtype=F64) for n in "qkv"}
    return {**named, **{n: torch.randn(*lead, P, 2, 8, dtype=F64) for n in ("prompt_k", "prompt_v")}}


@pytest.mark.parametrize("P", [0, 4])
@pytest.mark.parametrize("name", ["sdpa flash", "sdpa math", "products", "flex, not compiled"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_of_every_competitor_on_a_cpu_is_the_definition(name: str, P: int) -> None:
    inputs = draw(P)
    inputs = {n: x.float() for n, x in inputs.items()} if name.startswith("flex") else inputs
    out = ops.ATTENTION[name]()(**inputs)
    assert out.is_contiguous()
    torch.testing.assert_close(out, prompt_attention_reference(**inputs))


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
    temperature = torch.tensor([0.7], dtype=F64)
    expected = prompt_attention_reference(**inputs, temperature=temperature)
    torch.testing.assert_close(baselines.products(**inputs, temperature=temperature), expected)
    each = temperature.expand(3, 2, 9, 1)
    torch.testing.assert_close(baselines.products(**inputs, temperature=each), expected)


def check_gradients(model: nn.Module, case: golden_files.Case, expected: str, names: dict[str, str]) -> None:
    logits = model(case.tensors["input"])
    torch.testing.assert_close(logits, case.tensors[expected], rtol=1e-9, atol=1e-12)
    (logits * case.tensors["cotangent"]).sum().backward()
    found = dict(model.named_parameters())
    for name, key in names.items():
        gradient = case.tensors[f"grad.{key}"]
        torch.testing.assert_close(found[name].grad, gradient.view_as(found[name]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["gatevpt_cls", "gatevpt_temp_clamped"])
def test_gate_vpt_by_concatenation_equals_the_official_code(name: str) -> None:
    case = golden_files.load(name)
    model = baselines.ConcatGateVPT(
        golden_files.backbone(False),
        case.tensors["prompt.prompt_embeddings"][0],
        case.tensors["prompt.gate_logit"].flatten(),
        case.tensors["prompt.temp"].flatten(),
    )
    names = {"prompts.0": "prompt_embeddings", "gate_logits": "gate_logit", "temperature": "temp"}
    check_gradients(model, case, "features", names)


def test_cross_attention_to_prompts_equals_the_official_code() -> None:
    case = golden_files.load("cvpt_insert3")
    base: Any = golden_files.backbone(False, num_classes=case.config["num_classes"])
    with torch.no_grad():
        base.head.weight.copy_(case.tensors["prompt.head.weight"])
        base.head.bias.copy_(case.tensors["prompt.head.bias"])
    model = baselines.CrossVPT(base, list(case.tensors["prompt.Prompt_Tokens"]))
    check_gradients(model, case, "logits", {})
    for p, gradient in zip(model.prompts, case.tensors["grad.Prompt_Tokens"], strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)


def test_the_backward_of_the_bare_backbone_runs_through_every_block() -> None:
    model = baselines.BareBackbone(golden_files.backbone(False))
    seen: list[int] = []
    for i, block in enumerate(model.base.blocks):
        block.register_full_backward_hook(lambda *_, i=i: seen.append(i))
    model(torch.randn(2, 3, 32, 32, dtype=F64)).sum().backward()
    assert seen == [2, 1, 0]


# The gate -----------------------------------------------------------------------------------------------------------


def small(**options: Any) -> ops.Case:
    return ops.attention_case(2, 9, 3, 2, 8, torch.float32, "cpu", ("sdpa flash", "products"), **options)


@pytest.mark.parametrize("mode", [ops.FORWARD, ops.BOTH])
def test_the_gate_lets_right_competitors_through(mode: str) -> None:
    case = small()
    errors = ops.gate(case, mode)
    assert {"fastprompt eager", "sdpa flash", "products"} <= errors.keys()
    assert all(0 <= e < 1e-5 for e in errors.values())
    assert case.notes == []


WRONG = {
    "a thousandth too large": lambda out: out * 1.001,
    "one element is NaN": lambda out: out.index_fill(1, torch.tensor([3]), torch.nan),
    "a row of one head is another's": lambda out: torch.cat([out[:, 1:2], out[:, 1:]], 1),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_the_gate_keeps_wrong_competitors_out_and_says_so(change: Any) -> None:
    case = small()
    case.ours["wrong"] = lambda **inputs: change(baselines.products(**inputs))
    assert "wrong" not in ops.gate(case, ops.FORWARD)
    assert [n for n in case.notes if "wrong: WrongResult: output 0" in n]


def test_the_gate_sees_a_wrong_gradient() -> None:
    case = small()
    case.ours["wrong"] = lambda q, **rest: baselines.products(
        q=q, **{**rest, "v": 2 * rest["v"] - rest["v"].detach()}
    )
    assert "wrong" in ops.gate(case, ops.FORWARD)
    assert "wrong" not in ops.gate(case, ops.BOTH)
    assert [n for n in case.notes if "wrong: WrongResult: gradient of v" in n]


def test_a_competitor_that_raises_becomes_a_note() -> None:
    case = small()
    case.ours["broken"] = partial(baselines.products, nothing=1)
    rows = ops.rows(case, ops.FORWARD, 2, "cpu")
    assert {r.provider for r in rows} >= {"fastprompt eager", "sdpa flash", "products"}
    assert [n for n in case.notes if "broken: TypeError" in n]


def test_every_case_has_rows_of_ours_and_of_others() -> None:
    size = (torch.float32, "cpu")
    cases = (
        small(),
        ops.packed_case(2, 9, 3, 2, 8, *size, ("sdpa flash",)),
        ops.blend_case(2, 9, 3, 8, *size),
        ops.blend_norm_case(2, 9, 3, 8, *size),
        ops.folded_case(2, 9, 3, 2, 8, *size),
        ops.folded_norm_case(2, 9, 3, 2, 8, *size),
        ops.row_case(2, 9, 2, 8, *size),
    )
    for case in cases:
        for mode in (ops.FORWARD, ops.BOTH):
            rows = ops.rows(case, mode, 2, "cpu")
            (baseline,) = {r.baseline for r in rows}
            assert baseline in case.others, case.name
            assert {r.provider for r in rows} == {*case.ours, *case.others}, case.notes
            assert all(r.ratio == 1.0 for r in rows if r.provider == baseline)
