"""GateVPT where one kernel makes a gated block's output and the next block's norm1: the same numbers, one norm less."""

from __future__ import annotations

from collections import Counter
from typing import Any

import golden_files
import pytest
import torch
from test_gate_vpt_golden import CASES, prompt_model
from timm_families import PROMPTABLE, gradients, images, small
from torch.utils._python_dispatch import TorchDispatchMode

import fastprompt
from bench.correctness import assert_same
from fastprompt import blocks

CONFIG = fastprompt.GateVPTConfig(3, dropout=0.0)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; here PyTorch's operators do it."""
    monkeypatch.setattr(blocks, "has_fused_kernel", lambda operation, x: True)


class Operators(TorchDispatchMode):
    """Counts the operators that run, those that compute a norm too as "<name> norm"."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        normed = func.namespace == "fastprompt" and given.get("eps") is not None
        self.counts[func._opname + " norm" * normed] += 1
        return func(*args, **(kwargs or {}))


def operators_of(model: Any) -> Counter[str]:
    """What runs in one forward."""
    with Operators() as operators, torch.no_grad():
        model(images())
    return operators.counts


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", CASES)
def test_features_and_gradients_equal_the_official_code(fused: None, name: str, checkpointing: bool) -> None:
    case = golden_files.load(name)
    model = prompt_model(case).train()
    model.base.set_grad_checkpointing(checkpointing)
    features = model(case.tensors["input"])
    torch.testing.assert_close(features, case.tensors["features"], rtol=1e-9, atol=1e-12)
    (features * case.tensors["cotangent"]).sum().backward()
    for p, key in (
        (model.prompts[0], "prompt_embeddings"),
        (model.gate_logits, "gate_logit"),
        (model.temperature, "temp"),
    ):
        torch.testing.assert_close(p.grad, case.tensors[f"grad.{key}"].view_as(p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", PROMPTABLE)
def test_every_family_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = fastprompt.get_prompt_model(small(family, depth=3), CONFIG)
    want = gradients(model, model)
    monkeypatch.setattr(blocks, "has_fused_kernel", lambda operation, x: True)
    got = gradients(model, model)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert_same(got[name], x)


def test_gated_blocks_and_the_next_norm_are_one_operator(fused: None) -> None:
    model = fastprompt.get_prompt_model(small("vit", depth=3), CONFIG)
    counts = operators_of(model)
    assert (counts["gated_blend norm"], counts["gated_blend"]) == (2, 0)


def test_a_run_that_stops_makes_no_norm_for_the_block_after_it(fused: None) -> None:
    model = fastprompt.get_prompt_model(small("vit", depth=3), CONFIG)
    with Operators() as operators, torch.no_grad():
        model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)
    assert (operators.counts["gated_blend norm"], operators.counts["gated_blend"]) == (1, 1)


def test_a_cpu_runs_blend_and_norm_by_themselves() -> None:
    model = fastprompt.get_prompt_model(small("vit", depth=3), CONFIG)
    counts = operators_of(model)
    assert (counts["gated_blend norm"], counts["gated_blend"]) == (0, 2)


def test_a_norm_that_trains_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastprompt.get_prompt_model(small("vit", depth=3), CONFIG)
    for block in model.base.blocks:
        block.norm1.requires_grad_(True)
    want = gradients(model, model)
    assert want["base.blocks.1.norm1.weight"].any()
    monkeypatch.setattr(blocks, "has_fused_kernel", lambda operation, x: True)
    for name, x in gradients(model, model).items():
        assert_same(x, want[name])


def test_a_hook_on_the_norm_is_called(fused: None) -> None:
    model = fastprompt.get_prompt_model(small("vit", depth=3), CONFIG)
    seen = []
    model.base.blocks[1].norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    model(images())
    assert len(seen) == 1


def test_a_norm_after_the_branches_is_left_there(fused: None) -> None:
    model = fastprompt.get_prompt_model(small("vit-res-post", depth=3), CONFIG)
    assert operators_of(model)["gated_blend norm"] == 0


def test_compiles_as_one_graph(fused: None) -> None:
    torch._dynamo.reset()
    case = golden_files.load("gatevpt_cls")
    model = prompt_model(case)
    features = torch.compile(model, fullgraph=True, backend="aot_eager")(case.tensors["input"])
    torch.testing.assert_close(features, case.tensors["features"], rtol=1e-9, atol=1e-12)
    (features * case.tensors["cotangent"]).sum().backward()
    torch.testing.assert_close(model.gate_logits.grad, case.tensors["grad.gate_logit"], rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
