"""VPT against the numbers of the official code: forward and every gradient, through the public API."""

from __future__ import annotations

from typing import Any

import golden_files
import pytest
import torch
from concat_vpt import ConcatVPT
from torch import Tensor, nn

import fastprompt
from fastprompt.methods import vpt

CASES = golden_files.names("vpt_")
POOLS = {"original": "backbone", "img_pool": "image", "prompt_pool": "prompt"}


def golden_prompts(case: golden_files.Case, kind: str) -> list[Tensor]:
    """The prompts (kind "prompt") or their gradients ("grad"), one [P, D] for each prompted block."""
    first = case.tensors[f"{kind}.prompt_embeddings"]
    rest = case.tensors.get(f"{kind}.deep_prompt_embeddings", first[:0])
    return [*first, *rest]


def prompt_model(case: golden_files.Case) -> Any:
    pool = POOLS[case.config["VIT_POOL_TYPE"]]
    if pool == "backbone" and case.mean_pooled:
        pool = "all"
    config = fastprompt.VPTConfig(case.config["NUM_TOKENS"], deep=case.config["DEEP"], pool=pool)
    model = fastprompt.get_prompt_model(golden_files.backbone(case.mean_pooled), config)
    with torch.no_grad():
        for mine, theirs in zip(model.prompts, golden_prompts(case, "prompt"), strict=True):
            mine.copy_(theirs)
    return model


def check(model: nn.Module, case: golden_files.Case) -> None:
    features = model(case.tensors["input"])
    torch.testing.assert_close(features, case.tensors["features"], rtol=1e-9, atol=1e-12)
    (features * case.tensors["cotangent"]).sum().backward()
    prompts: Any = model.prompts
    for p, gradient in zip(prompts, golden_prompts(case, "grad"), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)


def test_all_six_cases_are_there() -> None:
    assert len(CASES) == 6


@pytest.mark.parametrize("name", CASES)
def test_features_and_gradients_equal_the_official_code(name: str) -> None:
    case = golden_files.load(name)
    check(prompt_model(case).train(), case)


@pytest.mark.parametrize("name", CASES)
def test_equal_with_shortcuts_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block in full, prompts as rows from the first block on that has them: no shortcut is taken."""
    case = golden_files.load(name)
    model = prompt_model(case)
    oracle = ConcatVPT(golden_files.backbone(case.mean_pooled), list(model.prompts), model.pool)
    check(oracle, case)


@pytest.mark.parametrize("name", CASES)
def test_folded_model_gives_the_same_features(name: str) -> None:
    case = golden_files.load(name)
    folded = prompt_model(case).fold()
    torch.testing.assert_close(folded(case.tensors["input"]), case.tensors["features"], rtol=1e-9, atol=1e-12)


def test_golden_prompts_are_within_the_official_initialisation() -> None:
    """The official code's uniform(-v, v): ours draws from the same interval and fills it."""
    case = golden_files.load("vpt_deep_cls")
    config = fastprompt.VPTConfig(50, deep=True)
    model = fastprompt.get_prompt_model(golden_files.backbone(False), config)
    bound = (6 / (3 * 8 * 8 + 64)) ** 0.5
    ours = torch.cat([p.detach() for p in model.prompts])
    assert ours.abs().max() <= bound
    assert ours.abs().max() > 0.99 * bound
    assert abs(ours.mean()) < 0.05 * bound
    assert torch.cat(golden_prompts(case, "prompt")).abs().max() <= bound


def test_strip_removes_the_carried_rows_only() -> None:
    x = torch.arange(7.0).view(1, 7, 1)
    assert vpt.strip(x, prefix=1, carried=3).flatten().tolist() == [0, 4, 5, 6]
    assert vpt.strip(x, prefix=1, carried=0) is x
