"""CVPT against the numbers of the official code, all five insertion places, in both forms, through the public API."""

from __future__ import annotations

from typing import Any

import golden_files
import pytest
import torch

import fastprompt
from fastprompt.methods import cvpt

CASES = golden_files.names("cvpt_")
FORMS = ["auto", "folded", "direct", "shortcuts off"]


def prompt_model(case: golden_files.Case, form: str = "auto") -> Any:
    config = case.config
    model: Any = fastprompt.get_prompt_model(
        golden_files.backbone(False, num_classes=config["num_classes"]),
        fastprompt.CVPTConfig(config["num_prompts"], insert=config["insert"]),
        shortcuts=form != "shortcuts off",
    )
    with torch.no_grad():
        for mine, theirs in zip(model.prompts, case.tensors["prompt.Prompt_Tokens"], strict=True):
            mine.copy_(theirs)
        model.base.head.weight.copy_(case.tensors["prompt.head.weight"])
        model.base.head.bias.copy_(case.tensors["prompt.head.bias"])
    return model


def check(model: Any, case: golden_files.Case) -> None:
    """Compare logits and every gradient with the official code's."""
    logits = model(case.tensors["input"])
    golden_files.assert_official(logits, case.tensors["logits"])
    (logits * case.tensors["cotangent"]).sum().backward()
    for p, gradient in zip(model.prompts, case.tensors["grad.Prompt_Tokens"], strict=True):
        golden_files.assert_official(p.grad, gradient)
    for name, p in model.base.head.named_parameters():
        golden_files.assert_official(p.grad, case.tensors[f"grad.head.{name}"])


def use(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form in ("folded", "direct"):
        monkeypatch.setattr(cvpt, "choose_form", lambda *args, **kwargs: form)


def test_all_five_cases_are_there() -> None:
    assert len(CASES) == 5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_the_official_code(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(form, monkeypatch)
    case = golden_files.load(name)
    check(prompt_model(case, form).train(), case)


@pytest.mark.parametrize("name", CASES)
def test_all_rows_of_the_last_block_give_the_same_logits(name: str) -> None:
    case = golden_files.load(name)
    model = prompt_model(case)
    logits = model.forward_head(model.forward_features(case.tensors["input"]))
    golden_files.assert_official(logits, case.tensors["logits"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_folded_model_gives_the_same_logits(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(form, monkeypatch)
    case = golden_files.load(name)
    folded = prompt_model(case, form).fold()
    golden_files.assert_official(folded(case.tensors["input"]), case.tensors["logits"])


def test_no_parameter_is_added_but_the_prompts() -> None:
    model = prompt_model(golden_files.load("cvpt_insert3"))
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"base", "prompts"}
