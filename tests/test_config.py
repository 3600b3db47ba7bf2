"""Configurations: what they refuse, and JSON there and back."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from fastprompt import PromptConfig, VPTConfig

BAD: dict[str, dict[str, Any]] = {
    "negative prompts": {"num_prompts": -1},
    "huge number of prompts": {"num_prompts": 2**40},
    "fractional prompts": {"num_prompts": 2.5},
    "boolean prompts": {"num_prompts": True},
    "no blocks": {"num_prompts": 2, "blocks": 0},
    "blocks of shallow": {"num_prompts": 2, "deep": False, "blocks": 2},
    "shared shallow": {"num_prompts": 2, "deep": False, "shared_across_blocks": True},
    "deep is not a number": {"num_prompts": 2, "deep": 1},
    "unknown pool": {"num_prompts": 2, "pool": "max"},
    "prompt pool without prompts": {"num_prompts": 0, "pool": "prompt"},
    "dropout of one": {"num_prompts": 2, "dropout": 1.0},
    "negative dropout": {"num_prompts": 2, "dropout": -0.1},
    "not a number": {"num_prompts": 2, "dropout": float("nan")},
    "textual dropout": {"num_prompts": 2, "dropout": "0.1"},
    "no width": {"num_prompts": 2, "project": 0},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD.keys())
def test_bad_values_are_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="VPTConfig") as error:
        VPTConfig(**fields)
    named = [name for name in fields if f"`{name}`" in str(error.value) or f"{name}=" in str(error.value)]
    assert named, str(error.value)


def test_json_round_trip_keeps_every_field() -> None:
    config = VPTConfig(7, blocks=3, pool="image", dropout=0.25, shared_across_blocks=True, project=12)
    text = config.to_json()
    assert json.loads(text)["method"] == "vpt"
    assert VPTConfig.from_json(text) == config
    assert PromptConfig.from_json(text) == config
    assert VPTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "got list"),
        ('{"method": "lora", "num_prompts": 1}', "'lora'"),
        ('{"method": "vpt", "num_prompts": 1, "tokens": 2}', "'tokens'"),
        ('{"method": "vpt", "num_prompts": -3}', "-3"),
    ],
    ids=["corrupt", "no object", "unknown method", "unknown field", "bad value"],
)
def test_foreign_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PromptConfig.from_json(text)


def test_configurations_are_immutable_and_hashable() -> None:
    config = VPTConfig(4)
    with pytest.raises(AttributeError):
        config.num_prompts = 5  # type: ignore[misc]
    assert len({config, VPTConfig(4)}) == 1
