"""GateVPT against the numbers of the official code: forward and every gradient, through the public API."""

from __future__ import annotations

from typing import Any

import golden_files
import pytest
import torch

import fastprompt

CASES = golden_files.names("gatevpt_")
SHORTCUTS = pytest.mark.parametrize("shortcuts", [True, False], ids=["shortcuts", "full"])


def prompt_model(case: golden_files.Case, shortcuts: bool = True) -> Any:
    config = case.config
    model: Any = fastprompt.get_prompt_model(
        golden_files.backbone(case.mean_pooled),
        fastprompt.GateVPTConfig(
            config["NUM_TOKENS"],
            gate_init=config["GATE_INIT"],
            num_gates=config["GATE_NUM"],
            temperature=True,
            temperature_range=(config["TEMP_MIN"], config["TEMP_MAX"]),
            pool="all" if case.mean_pooled else "backbone",
            dropout=config["DROPOUT"],
        ),
        shortcuts=shortcuts,
    )
    with torch.no_grad():
        model.prompts[0].copy_(case.tensors["prompt.prompt_embeddings"][0])
        model.gate_logits.copy_(case.tensors["prompt.gate_logit"])
        model.temperature.copy_(case.tensors["prompt.temp"])
    return model


def check(model: Any, case: golden_files.Case) -> None:
    """Compare features and every gradient with the official code's."""
    features = model(case.tensors["input"])
    golden_files.assert_official(features, case.tensors["features"])
    (features * case.tensors["cotangent"]).sum().backward()
    for p, key in (
        (model.prompts[0], "prompt_embeddings"),
        (model.gate_logits, "gate_logit"),
        (model.temperature, "temp"),
    ):
        golden_files.assert_official(p.grad, case.tensors[f"grad.{key}"].view_as(p))


def test_all_three_cases_are_there() -> None:
    assert len(CASES) == 3


@SHORTCUTS
@pytest.mark.parametrize("name", CASES)
def test_features_and_gradients_equal_the_official_code(name: str, shortcuts: bool) -> None:
    case = golden_files.load(name)
    check(prompt_model(case, shortcuts).train(), case)


@SHORTCUTS
@pytest.mark.parametrize("name", CASES)
def test_folded_model_gives_the_same_features(name: str, shortcuts: bool) -> None:
    case = golden_files.load(name)
    folded = prompt_model(case, shortcuts).fold()
    golden_files.assert_official(folded(case.tensors["input"]), case.tensors["features"])


def test_temperature_is_clamped_in_place_before_the_forward() -> None:
    case = golden_files.load("gatevpt_temp_clamped")
    model = prompt_model(case)
    before = model.temperature.detach().clone()
    assert ((before < 0.01) | (before > 10)).any()
    model(case.tensors["input"]).sum().backward()
    assert torch.equal(model.temperature, before.clamp(0.01, 10))
    assert (model.temperature.grad != 0).all(), "a value at the edge receives its gradient"


def test_two_forwards_before_one_backward() -> None:
    case = golden_files.load("gatevpt_cls")
    model = prompt_model(case)
    x = case.tensors["input"]
    (model(x[:1]).sum() + model(x[1:]).sum()).backward()
    both = [p.grad.clone() for p in (model.prompts[0], model.gate_logits, model.temperature)]
    model.zero_grad()
    model(x).sum().backward()
    for mine, p in zip(both, (model.prompts[0], model.gate_logits, model.temperature), strict=True):
        golden_files.assert_official(mine, p.grad)
