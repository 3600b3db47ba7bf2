"""VPT against the numbers of the official code: forward and every gradient, through the public API."""

from __future__ import annotations

from typing import Any

import golden_files
import pytest
import torch
from torch import Tensor, nn

import fastprompt
from bench.papers import paper_model
from fastprompt import backbone

CASES = golden_files.names("vpt_")
SHORTCUTS = pytest.mark.parametrize("shortcuts", [True, False], ids=["shortcuts", "full"])
POOLS = {"original": "backbone", "img_pool": "image", "prompt_pool": "prompt"}


def golden_prompts(case: golden_files.Case, kind: str) -> list[Tensor]:
    """The prompts (kind "prompt") or their gradients ("grad"), one [P, D] for each prompted block."""
    first = case.tensors[f"{kind}.prompt_embeddings"]
    rest = case.tensors.get(f"{kind}.deep_prompt_embeddings", first[:0])
    return [*first, *rest]


def prompt_model(case: golden_files.Case, shortcuts: bool = True) -> Any:
    pool = POOLS[case.config["VIT_POOL_TYPE"]]
    if pool == "backbone" and case.mean_pooled:
        pool = "all"
    config = fastprompt.VPTConfig(case.config["NUM_TOKENS"], deep=case.config["DEEP"], pool=pool)
    model = fastprompt.get_prompt_model(golden_files.backbone(case.mean_pooled), config, shortcuts=shortcuts)
    with torch.no_grad():
        for mine, theirs in zip(model.prompts, golden_prompts(case, "prompt"), strict=True):
            mine.copy_(theirs)
    return model


def check(model: nn.Module, case: golden_files.Case) -> None:
    features = model(case.tensors["input"])
    golden_files.assert_official(features, case.tensors["features"])
    (features * case.tensors["cotangent"]).sum().backward()
    prompts: Any = model.prompts
    for p, gradient in zip(prompts, golden_prompts(case, "grad"), strict=True):
        golden_files.assert_official(p.grad, gradient)


def test_all_six_cases_are_there() -> None:
    assert len(CASES) == 6


@SHORTCUTS
@pytest.mark.parametrize("name", CASES)
def test_features_and_gradients_equal_the_official_code(name: str, shortcuts: bool) -> None:
    case = golden_files.load(name)
    check(prompt_model(case, shortcuts).train(), case)


@pytest.mark.parametrize("name", CASES)
def test_the_concatenating_oracle_equals_the_official_code(name: str) -> None:
    """No shortcut at all: prompts are rows of every block."""
    case = golden_files.load(name)
    check(paper_model(prompt_model(case)), case)


@SHORTCUTS
@pytest.mark.parametrize("name", CASES)
def test_folded_model_gives_the_same_features(name: str, shortcuts: bool) -> None:
    case = golden_files.load(name)
    folded = prompt_model(case, shortcuts).fold()
    golden_files.assert_official(folded(case.tensors["input"]), case.tensors["features"])


def test_prompts_fill_the_official_initial_interval() -> None:
    """uniform(-v, v) with v = sqrt(6 / (3 · patch height · patch width + D)): the paper's Xavier range."""
    model = fastprompt.get_prompt_model(golden_files.backbone(False), fastprompt.VPTConfig(50))
    bound = (6 / (3 * 8 * 8 + 64)) ** 0.5
    drawn = torch.cat([p.detach() for p in model.prompts])
    assert 0.99 * bound < drawn.abs().max() <= bound
    assert drawn.mean().abs() < 0.05 * bound


def test_strip_removes_the_carried_rows_only() -> None:
    base: Any = golden_files.backbone(False)
    x = torch.arange(7.0).view(1, 7, 1)
    assert backbone.strip(base, x, carried=3).flatten().tolist() == [0, 4, 5, 6]
    assert backbone.strip(base, x, carried=0) is x
