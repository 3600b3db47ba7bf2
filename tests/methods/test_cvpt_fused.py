"""CVPT where one kernel makes the cross-attention's output and norm2: the same numbers, one norm less."""

from __future__ import annotations

from typing import Any

import golden_files
import pytest
import torch
from test_cvpt_golden import prompt_model
from test_gate_vpt_fused import operators_of
from timm_families import PROMPTABLE, gradients, small

import fastprompt
from bench.correctness import assert_same
from fastprompt import blocks
from fastprompt.methods import cvpt

CONFIG = fastprompt.CVPTConfig(3)
# Those that CVPT serves; test_all_methods.py checks the reasons of the others.
FAMILIES = [f for f in PROMPTABLE if not any(cvpt._reason(block) for block in small(f).blocks)]


@pytest.fixture(autouse=True)
def folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models would take the direct form."""
    monkeypatch.setattr(cvpt, "choose_form", lambda *args: "folded")


def fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the backend `triton`; here PyTorch's operators do it."""
    monkeypatch.setattr(blocks, "has_fused_kernel", lambda operation, x: True)


def counts(model: Any) -> tuple[int, int]:
    """How often the cross-attention runs with a norm and without."""
    found = operators_of(model)
    return found["folded_cross_attention norm"], found["folded_cross_attention"]


def test_logits_and_gradients_equal_the_official_code(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse(monkeypatch)
    case = golden_files.load("cvpt_insert3")
    model = prompt_model(case).train()
    depth = len(model.base.blocks)
    assert counts(model)[1] < depth
    logits = model(case.tensors["input"])
    torch.testing.assert_close(logits, case.tensors["logits"], rtol=1e-9, atol=1e-12)
    (logits * case.tensors["cotangent"]).sum().backward()
    for p, gradient in zip(model.prompts, case.tensors["grad.Prompt_Tokens"], strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = fastprompt.get_prompt_model(small(family, depth=2), CONFIG)
    want = gradients(model, model)
    fuse(monkeypatch)
    got = gradients(model, model)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert_same(got[name], x)


@pytest.mark.parametrize(("insert", "fused"), [(1, 0), (2, 0), (3, 2), (4, 0), (5, 0)])
def test_only_before_the_mlp_is_there_a_norm_to_make(
    monkeypatch: pytest.MonkeyPatch, insert: int, fused: int
) -> None:
    fuse(monkeypatch)
    model = fastprompt.get_prompt_model(small("vit", depth=2), fastprompt.CVPTConfig(3, insert=insert))
    assert counts(model) == (fused, 2 - fused)


def test_a_cpu_runs_cross_attention_and_norm_by_themselves() -> None:
    assert counts(fastprompt.get_prompt_model(small("vit", depth=2), CONFIG)) == (0, 2)


def test_a_norm_that_trains_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastprompt.get_prompt_model(small("vit", depth=2), CONFIG)
    for block in model.base.blocks:
        block.norm2.requires_grad_(True)
    want = gradients(model, model)
    assert want["base.blocks.1.norm2.weight"].any()
    fuse(monkeypatch)
    assert counts(model) == (0, 2)
    for name, x in gradients(model, model).items():
        assert_same(x, want[name])


def test_compiles_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse(monkeypatch)
    torch._dynamo.reset()
    case = golden_files.load("cvpt_insert3")
    model = prompt_model(case)
    logits = torch.compile(model, fullgraph=True, backend="aot_eager")(case.tensors["input"])
    torch.testing.assert_close(logits, case.tensors["logits"], rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
