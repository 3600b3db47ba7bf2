"""Without shortcuts every row runs through every block: the same numbers, for what the papers' code costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prompted_models import FAMILIES, LABELS, METHODS, P, changed, outputs_and_gradients, prompted
from timm_families import CLASSES, images, small
from torch.utils.flop_counter import FlopCounterMode

import fastprompt
from bench.correctness import assert_same
from bench.papers import paper_model
from fastprompt import CVPTConfig, PromptConfig, VPTConfig

B = len(LABELS)


def assert_both_ways_agree(model: Any) -> None:
    x = images(B)
    on = outputs_and_gradients(model.train(), x)
    model.shortcuts = False
    assert_same(outputs_and_gradients(model, x), on)
    model.eval()
    with torch.no_grad():
        logits, tokens = model(x), model.forward_features(x)
        assert_same(model.fold()(x), logits)
        model.shortcuts = True
        assert_same([model(x), model.forward_features(x)], [logits, tokens])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_the_same_on_every_family(family: str, method: str) -> None:
    try:
        model = prompted(family, METHODS[method])
    except NotImplementedError:
        assert method in ("cvpt", "da-vpt")  # test_all_methods.py holds the reasons
        return
    assert_both_ways_agree(model)


@pytest.mark.parametrize("method", ["vpt-deep", "vpt-shallow", "gate-vpt", "da-vpt"])
@pytest.mark.parametrize("pool", ["all", "image", "prompt"])
@pytest.mark.parametrize("family", ["vit", "vit-avg-fc-norm"])
def test_numbers_are_the_same_for_every_pool(family: str, pool: str, method: str) -> None:
    if method == "da-vpt" and family == "vit-avg-fc-norm":
        family = "vit-registers"  # the metric loss needs a class token
    assert_both_ways_agree(prompted(family, changed(METHODS[method], pool=pool)))


@pytest.mark.parametrize("insert", [1, 2, 4, 5])
def test_numbers_are_the_same_wherever_cvpt_inserts(insert: int) -> None:
    assert_both_ways_agree(prompted("vit", CVPTConfig(P, insert=insert)))


@pytest.mark.parametrize("method", METHODS)
def test_intermediate_features_are_the_same(method: str) -> None:
    model = prompted("vit", METHODS[method])
    on = model.forward_intermediates(images(B), return_prefix_tokens=True)
    model.shortcuts = False
    assert_same(model.forward_intermediates(images(B), return_prefix_tokens=True), on)


@pytest.mark.parametrize("method", METHODS)
def test_drop_path_drops_the_same_branches(method: str) -> None:
    config = changed(METHODS[method], backbone_train_mode=True)
    model = prompted("vit", config, depth=4, drop_path_rate=0.5).train()
    torch.manual_seed(0)
    on = outputs_and_gradients(model, images(B))
    model.shortcuts = False
    torch.manual_seed(0)
    assert_same(outputs_and_gradients(model, images(B)), on)
    torch.manual_seed(1)
    assert not torch.allclose(model(images(B)), on["logits"])


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
    assert operations(model) == operations(paper_model(model))


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
    config: PromptConfig = VPTConfig(P)
    assert fastprompt.get_prompt_model(small("vit"), config).shortcuts
    assert not fastprompt.get_prompt_model(small("vit"), config, shortcuts=False).shortcuts
    base = small("vit")
    with pytest.raises(TypeError, match="`shortcuts` must be True or False; got 'off'"):
        fastprompt.get_prompt_model(base, config, shortcuts="off")  # type: ignore[arg-type]
    assert all(p.requires_grad for p in base.parameters()), "nothing was changed"
