"""Without shortcuts every row runs through every block: the same numbers, for what the papers' code costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm_families import CLASSES, PROMPTABLE, images, small
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastprompt
from bench.papers import paper_model
from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, VPTConfig

P, B, LABELS = 5, 4, torch.tensor([0, 3, 0, 4])
METHODS: dict[str, PromptConfig] = {
    "vpt-deep": VPTConfig(P),
    "vpt-shallow": VPTConfig(P, deep=False),
    "vpt-partial": VPTConfig(P, blocks=1),
    "gate-vpt": GateVPTConfig(P, dropout=0.0),
    "cvpt": CVPTConfig(P),
    "da-vpt": DAVPTConfig(P, 4, (1, 1)),
}
POOLED = ["vpt-deep", "vpt-shallow", "gate-vpt", "da-vpt"]


def prompted(family: str, config: PromptConfig, **kwargs: Any) -> Any:
    model = fastprompt.get_prompt_model(small(family, **kwargs), config)
    with torch.no_grad():
        for p in model.prompts:
            p.normal_()
    return model


def with_pool(method: str, pool: str) -> PromptConfig:
    return PromptConfig.from_dict({**METHODS[method].to_dict(), "pool": pool})


def outputs_and_gradients(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    logits, loss = model(images(B), labels=LABELS)
    cotangent = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((logits * cotangent).sum() + loss, trained, allow_unused=True)
    return [logits, loss], [torch.zeros(()) if g is None else g for g in found]


def assert_both_ways_agree(model: Any) -> None:
    on = outputs_and_gradients(model)
    model.shortcuts = False
    torch.testing.assert_close(outputs_and_gradients(model), on, rtol=1e-10, atol=1e-10)
    model.eval()
    with torch.no_grad():
        logits = model(images(B))
        torch.testing.assert_close(model.fold()(images(B)), logits, rtol=1e-10, atol=1e-10)
        tokens = model.forward_features(images(B))
        model.shortcuts = True
        torch.testing.assert_close(model.forward_features(images(B)), tokens, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(images(B)), logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", PROMPTABLE)
def test_numbers_are_the_same_on_every_family(family: str, method: str) -> None:
    try:
        model = prompted(family, METHODS[method])
    except NotImplementedError:
        assert method in ("cvpt", "da-vpt")  # test_all_methods.py holds the reasons
        return
    assert_both_ways_agree(model)


@pytest.mark.parametrize("method", POOLED)
@pytest.mark.parametrize("pool", ["all", "image", "prompt"])
@pytest.mark.parametrize("family", ["vit", "vit-avg-fc-norm"])
def test_numbers_are_the_same_for_every_pool(family: str, pool: str, method: str) -> None:
    if method == "da-vpt" and family == "vit-avg-fc-norm":
        family = "vit-registers"  # the metric loss needs a class token
    assert_both_ways_agree(prompted(family, with_pool(method, pool)))


@pytest.mark.parametrize("insert", [1, 2, 4, 5])
def test_numbers_are_the_same_wherever_cvpt_inserts(insert: int) -> None:
    assert_both_ways_agree(prompted("vit", CVPTConfig(P, insert=insert)))


@pytest.mark.parametrize("method", METHODS)
def test_intermediate_features_are_the_same(method: str) -> None:
    model = prompted("vit", METHODS[method])
    on = model.forward_intermediates(images(B), return_prefix_tokens=True)
    model.shortcuts = False
    off = model.forward_intermediates(images(B), return_prefix_tokens=True)
    torch.testing.assert_close(off, on, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_drop_path_drops_the_same_branches(method: str) -> None:
    config = PromptConfig.from_dict({**METHODS[method].to_dict(), "backbone_train_mode": True})
    model = prompted("vit", config, depth=4, drop_path_rate=0.5).train()
    torch.manual_seed(0)
    on = outputs_and_gradients(model)
    model.shortcuts = False
    torch.manual_seed(0)
    torch.testing.assert_close(outputs_and_gradients(model), on, rtol=1e-10, atol=1e-10)
    torch.manual_seed(1)
    assert not torch.allclose(outputs_and_gradients(model)[0][0], on[0][0])


def operations(model: Any) -> tuple[int, int]:
    """Of the forward, and of forward and backward together.

    On the meta device, because torch 2.11 does not count what its SDPA does on the CPU.
    """
    model.to("meta").train()
    with FlopCounterMode(display=False) as counter:
        logits = model(images(B).to("meta"))
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward, counter.get_total_flops()


DEPTH, N, D = 3, 17, 48


def model_operations(method: str) -> int:
    """Of the forward for one image, by the formulas of docs/shortcuts.md for the papers' form."""

    def block(n: int) -> int:
        return 24 * n * D**2 + 4 * n**2 * D

    embedding_and_head = 2 * 16 * (3 * 8 * 8) * D + 2 * D * CLASSES
    if method == "cvpt":
        return embedding_and_head + DEPTH * (block(N) + 4 * N * D**2 + 4 * N * P * D + 4 * P * D**2)
    if method == "da-vpt":  # the guided block has 4 prompts
        return embedding_and_head + (DEPTH - 1) * block(N + P) + block(N + 4)
    return embedding_and_head + DEPTH * block(N + P)


@pytest.mark.parametrize("method", METHODS)
def test_every_row_runs_through_every_block(method: str) -> None:
    model = prompted("vit", METHODS[method], depth=DEPTH)
    on = operations(model)
    model.shortcuts = False
    off = operations(model)
    assert off[0] == B * model_operations(method)
    assert on[0] < off[0]
    assert on[1] < off[1]


@pytest.mark.parametrize("method", ["vpt-deep", "vpt-shallow"])
def test_training_costs_what_concatenation_costs(method: str) -> None:
    model = prompted("vit", METHODS[method], depth=DEPTH)
    model.shortcuts = False
    concatenating = paper_model(model)
    assert operations(model) == operations(concatenating)


def test_mean_then_norm_runs_the_whole_last_block() -> None:
    model = prompted("vit-avg-fc-norm", METHODS["vpt-deep"])
    on = operations(model)
    model.shortcuts = False
    assert operations(model)[0] > on[0]
    assert operations(model) == operations(paper_model(model))


@pytest.mark.parametrize("method", METHODS)
def test_folded_model_keeps_the_form_it_was_folded_in(method: str) -> None:
    model = prompted("vit", METHODS[method], depth=DEPTH).eval()
    model.shortcuts = False
    folded = model.fold().to("meta")
    model.shortcuts = True
    with FlopCounterMode(display=False) as counter:
        folded(images(B).to("meta"))
    once = DEPTH * 4 * P * D**2 if method == "cvpt" else 0  # keys and values of the prompts are constants
    assert counter.get_total_flops() == B * (model_operations(method) - once)


def test_the_switch_is_an_argument_and_must_be_a_bool() -> None:
    assert fastprompt.get_prompt_model(small("vit"), VPTConfig(P)).shortcuts
    assert not fastprompt.get_prompt_model(small("vit"), VPTConfig(P), shortcuts=False).shortcuts
    base = small("vit")
    with pytest.raises(TypeError, match="`shortcuts` must be True or False; got 'off'"):
        fastprompt.get_prompt_model(base, VPTConfig(P), shortcuts="off")  # type: ignore[arg-type]
    assert all(p.requires_grad for p in base.parameters()), "nothing was changed"
