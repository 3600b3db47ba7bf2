"""Configurations: what they refuse, and JSON there and back."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, VPTConfig

BAD: dict[str, tuple[type[PromptConfig], dict[str, Any]]] = {
    "negative prompts": (VPTConfig, {"num_prompts": -1}),
    "huge number of prompts": (VPTConfig, {"num_prompts": 2**40}),
    "fractional prompts": (VPTConfig, {"num_prompts": 2.5}),
    "boolean prompts": (VPTConfig, {"num_prompts": True}),
    "no blocks": (VPTConfig, {"blocks": 0}),
    "blocks of shallow": (VPTConfig, {"deep": False, "blocks": 2}),
    "shared shallow": (VPTConfig, {"deep": False, "shared_across_blocks": True}),
    "deep is not a number": (VPTConfig, {"deep": 1}),
    "unknown pool": (VPTConfig, {"pool": "max"}),
    "prompt pool without prompts": (VPTConfig, {"num_prompts": 0, "pool": "prompt"}),
    "dropout of one": (VPTConfig, {"dropout": 1.0}),
    "negative dropout": (VPTConfig, {"dropout": -0.1}),
    "not a number": (VPTConfig, {"dropout": float("nan")}),
    "textual dropout": (VPTConfig, {"dropout": "0.1"}),
    "no width": (VPTConfig, {"project": 0}),
    "GateVPT without prompts": (GateVPTConfig, {"num_prompts": 0}),
    "infinite gate": (GateVPTConfig, {"gate_init": float("inf")}),
    "no temperature": (GateVPTConfig, {"temperature": 0.0}),
    "empty range": (GateVPTConfig, {"temperature_range": (1.0, 0.5)}),
    "negative gates": (GateVPTConfig, {"num_gates": -1}),
    "unknown place": (CVPTConfig, {"insert": 6}),
    "negative prompts of CVPT": (CVPTConfig, {"num_prompts": -2}),
    "prompts that CVPT does not carry": (CVPTConfig, {"pool": "all"}),
    "empty range of blocks": (DAVPTConfig, {"guided_blocks": (3, 1)}),
    "no proxies": (DAVPTConfig, {"num_proxy_prompts": 0}),
    "unknown criterion": (DAVPTConfig, {"criterion": "arcface"}),
    "negative weight": (DAVPTConfig, {"patch_weight": -1.0}),
}


@pytest.mark.parametrize(("config", "fields"), BAD.values(), ids=BAD.keys())
def test_bad_values_are_refused_by_name(config: type[PromptConfig], fields: dict[str, Any]) -> None:
    good: dict[str, Any] = {"num_prompts": 2}
    if config is DAVPTConfig:
        good |= {"num_proxy_prompts": 2, "guided_blocks": (0, 1)}
    config(**good)
    with pytest.raises(ValueError, match=f"{config.__name__}: `?({'|'.join(fields)})(`|=)"):
        config(**{**good, **fields})


def test_json_round_trip_keeps_every_field() -> None:
    config = VPTConfig(7, blocks=3, pool="image", dropout=0.25, shared_across_blocks=True, project=12)
    text = config.to_json()
    assert json.loads(text)["method"] == "vpt"
    assert VPTConfig.from_json(text) == config
    assert PromptConfig.from_json(text) == config
    assert VPTConfig.from_dict(config.to_dict()) == config


# Written before `pool`, `dropout` and `backbone_train_mode` were fields of every method.
WRITTEN = {
    '{"method": "vpt", "num_prompts": 7, "deep": true, "blocks": 3, "pool": "image", "dropout": 0.25, '
    '"shared_across_blocks": true, "project": 12, "backbone_train_mode": false}': VPTConfig(
        7, blocks=3, pool="image", dropout=0.25, shared_across_blocks=True, project=12
    ),
    '{"method": "gate_vpt", "num_prompts": 2, "gate_init": 5.0, "num_gates": null, "temperature": true, '
    '"temperature_range": [0.01, 10.0], "pool": "all", "dropout": 0.1, "backbone_train_mode": false}': (
        GateVPTConfig(2, pool="all")
    ),
    '{"method": "cvpt", "num_prompts": 2, "insert": 4, "dropout": 0.0, "backbone_train_mode": true}': (
        CVPTConfig(2, insert=4)
    ),
    '{"method": "da_vpt", "num_prompts": 2, "num_proxy_prompts": 3, "guided_blocks": [0, 1], '
    '"prompt_norm": "l2", "pool": "backbone", "dropout": 0.0, "backbone_train_mode": true}': (
        DAVPTConfig(2, 3, (0, 1), prompt_norm="l2")
    ),
}


@pytest.mark.parametrize(("text", "config"), WRITTEN.items(), ids=lambda x: getattr(x, "method", ""))
def test_json_of_earlier_versions_loads(text: str, config: PromptConfig) -> None:
    assert PromptConfig.from_json(text) == config


def test_each_method_keeps_its_own_defaults() -> None:
    configs = (VPTConfig(1), GateVPTConfig(1), CVPTConfig(1), DAVPTConfig(1, 1, (0, 0)))
    assert [c.dropout for c in configs] == [0.0, 0.1, 0.0, 0.0]
    assert [c.backbone_train_mode for c in configs] == [False, False, True, True]
    assert {c.pool for c in configs} == {"backbone"}


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
