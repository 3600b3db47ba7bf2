"""Every method, fast and in its paper's form, against the numbers of the official code (tests/golden)."""

from __future__ import annotations

import copy
from typing import Any

import golden_files
import pytest
import torch
from official_states import CASES, golden, masked, output
from prompted_models import METHODS, changed, outputs_and_gradients, prompted
from timm_families import images
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastprompt
from bench.correctness import assert_same
from bench.papers import paper_model
from fastprompt import load_official_state_dict
from fastprompt.methods import cvpt
from fastprompt.ops.attention_choice import WAYS, use_way

SHORTCUTS = pytest.mark.parametrize("shortcuts", [True, False], ids=["shortcuts", "full"])
by_case = pytest.mark.parametrize("name", CASES)


def tuned(name: str, **options: Any) -> tuple[Any, dict[str, Tensor], golden_files.Case]:
    """Return the golden model in train mode, what `outputs_and_gradients` must give for it, and the case."""
    model, state, case = golden(name, **options)
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        for p in wanted.parameters():
            p.zero_()
    load_official_state_dict(wanted, {key: case.tensors[f"grad.{key}"] for key in state})
    gradients = {n: p.detach() for n, p in wanted.named_parameters() if p.requires_grad}
    load_official_state_dict(model, state)
    loss = torch.zeros((), dtype=torch.float64)
    if "labels" in case.tensors:
        model.class_to_prompt.copy_(case.tensors["class_to_prompt"])
        loss = case.tensors["metric_loss"][0]
    return model.train(), {"logits": output(case), "loss": loss, **gradients}, case


def check(model: Any, wanted: dict[str, Tensor], case: golden_files.Case) -> None:
    x, labels, cotangent = (case.tensors.get(key) for key in ("input", "labels", "cotangent"))
    assert x is not None
    golden_files.assert_official(outputs_and_gradients(model, x, labels, cotangent), wanted)


def check_inference(model: Any, case: golden_files.Case) -> None:
    x = case.tensors["input"]
    golden_files.assert_official(model.fold()(x), output(case))
    golden_files.assert_official(model.eval().forward_head(model.forward_features(x)), output(case))


@SHORTCUTS
@by_case
def test_outputs_and_gradients_equal_the_official_code(name: str, shortcuts: bool) -> None:
    model, wanted, case = tuned(name, shortcuts=shortcuts)
    check(model, wanted, case)
    check_inference(model, case)


@pytest.mark.parametrize("way", WAYS)
@by_case
def test_every_way_to_compute_attention_equals_the_official_code(name: str, way: str) -> None:
    model, wanted, case = tuned(name)
    with use_way(way):
        check(model, wanted, case)
        check_inference(model, case)


@by_case
def test_the_papers_form_equals_the_official_code(name: str) -> None:
    model, wanted, case = tuned(name, tune="prompts")
    check(paper_model(model), wanted, case)


@pytest.mark.parametrize("form", ["folded", "direct"])
@pytest.mark.parametrize("name", golden_files.names("cvpt_"))
def test_both_forms_of_cvpt_equal_the_official_code(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cvpt, "choose_form", lambda *args, **kwargs: form)
    model, wanted, case = tuned(name)
    check(model, wanted, case)
    check_inference(model, case)


def test_temperature_is_clamped_in_place_before_the_forward() -> None:
    model, _, case = tuned("gatevpt_temp_clamped")
    before = model.temperature.detach().clone()
    assert ((before < 0.01) | (before > 10)).any()
    model(case.tensors["input"]).sum().backward()
    assert torch.equal(model.temperature, before.clamp(0.01, 10))
    assert (model.temperature.grad != 0).all(), "a value at the edge receives its gradient"


def test_two_forwards_before_one_backward() -> None:
    model, _, case = tuned("gatevpt_cls")
    x = case.tensors["input"]
    (model(x[:1]).sum() + model(x[1:]).sum()).backward()
    apart = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(x).sum().backward()
    assert_same(apart, {name: model.get_parameter(name).grad for name in apart})


def test_prompts_fill_the_official_initial_interval() -> None:
    """uniform(-v, v) with v = sqrt(6 / (3 · patch height · patch width + D)): the paper's Xavier range."""
    model = fastprompt.get_prompt_model(golden_files.backbone(False), fastprompt.VPTConfig(50))
    bound = (6 / (3 * 8 * 8 + 64)) ** 0.5
    drawn = torch.cat([p.detach() for p in model.prompts])
    assert 0.99 * bound < drawn.abs().max() <= bound
    assert drawn.mean().abs() < 0.05 * bound


# The mask of DA-VPT ---------------------------------------------------------------------------------------------


@SHORTCUTS
def test_masked_prompts_give_the_official_logits(shortcuts: bool) -> None:
    """The last block has P_g prompts, the others P; its mask is as long as its own prompts."""
    model, state, x, logits = masked(shortcuts=shortcuts)
    load_official_state_dict(model, state)
    golden_files.assert_official([model(x), model.fold()(x)], [logits, logits])
    model, *_ = masked(tune="prompts")
    load_official_state_dict(model, state)
    golden_files.assert_official(paper_model(model)(x), logits)


@SHORTCUTS
@pytest.mark.parametrize("pool", ["all", "prompt"])
@pytest.mark.parametrize("family", ["vit", "vit-registers", "vit-qk-norm", "vit-layer-scale"])
def test_masked_prompts_give_the_papers_gradients(family: str, pool: str, shortcuts: bool) -> None:
    config = changed(METHODS["da-vpt"], mask_prompts=True, pool=pool)
    model = prompted(family, config, shortcuts=shortcuts).train()
    assert_same(outputs_and_gradients(model, images(4)), outputs_and_gradients(paper_model(model), images(4)))


@pytest.mark.parametrize("pool", ["backbone", "image"])
def test_a_mask_without_readers_changes_nothing_and_costs_nothing(pool: str) -> None:
    def run(mask: bool) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(1)
        model = prompted("vit", changed(METHODS["da-vpt"], mask_prompts=mask, pool=pool))
        with FlopCounterMode(display=False) as counter:
            model(images(4))
        return outputs_and_gradients(model, images(4)), counter.get_total_flops()

    (got, cost), (want, least) = run(True), run(False)
    assert cost == least
    for name, x in want.items():
        assert torch.equal(got[name], x), name
