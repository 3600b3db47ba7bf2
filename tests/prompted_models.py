"""One prompted model of each method: the configurations that tests of all methods share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fastprompt
from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, VPTConfig

CONFIGS: dict[str, fastprompt.PromptConfig] = {
    "vpt-deep": VPTConfig(3),
    "vpt-partial": VPTConfig(3, blocks=1),
    "vpt-shallow": VPTConfig(3, deep=False),
    "vpt-project": VPTConfig(3, project=5),
    "gate-vpt": GateVPTConfig(3, gate_init=0.5, dropout=0.1),
    "da-vpt": DAVPTConfig(3, 3, (1, 1), prompt_norm="layer"),
    **{f"cvpt-{i}": CVPTConfig(3, insert=i, dropout=0.1) for i in range(1, 6)},
}


def prompted(base: Any, name: str) -> Any:
    """`base` with the method `CONFIGS[name]`, in eval mode, every parameter of its own far from where it starts."""
    model: Any = fastprompt.get_prompt_model(base, CONFIGS[name]).eval()
    with torch.no_grad():
        for p in model.prompts:
            p.copy_(torch.randn_like(p))
        if name == "gate-vpt":
            model.temperature.copy_(torch.linspace(0.5, 2, len(model.temperature)))
            model.gate_logits.copy_(torch.linspace(-1, 1, len(model.gate_logits)))
        if name == "da-vpt":
            nn.init.normal_(model.prompt_norm.weight)
            nn.init.normal_(model.prompt_norm.bias)
    return model
