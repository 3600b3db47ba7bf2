"""What the papers' form refuses, and the bare backbone; the papers' numbers are checked in methods/test_golden.py."""

from __future__ import annotations

import golden_files
import pytest
import torch
from timm_families import small

import fastprompt
from bench.models import BareBackbone
from bench.papers import paper_model
from fastprompt import CVPTConfig, DAVPTConfig, PromptConfig


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            "eva02-fused-glu",
            CVPTConfig(2),
            "needs blocks of timm's `Block` with `Attention`; blocks.0 is EvaBlock",
        ),
        ("vit", DAVPTConfig(2, 2, (0, 0), tune="prompts+biases"), "needs tune='prompts'"),
    ],
)
def test_what_is_not_written_is_refused(family: str, config: PromptConfig, message: str) -> None:
    model = fastprompt.get_prompt_model(small(family), config)
    with pytest.raises(NotImplementedError, match=message):
        paper_model(model)


def test_the_backward_of_the_bare_backbone_runs_through_every_block() -> None:
    model = BareBackbone(golden_files.backbone(False))
    seen: list[int] = []
    for i, block in enumerate(model.base.blocks):
        block.register_full_backward_hook(lambda *_, i=i: seen.append(i))
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).sum().backward()
    assert seen == [2, 1, 0]
