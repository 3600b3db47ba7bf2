"""Models of every method with prompts that matter, and what a test compares of them."""

from __future__ import annotations

from typing import Any

import torch
from timm_families import small
from torch import Tensor, nn

import fastprompt
from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, VPTConfig

P, LABELS = 5, torch.tensor([0, 3, 0, 4])
METHODS: dict[str, PromptConfig] = {
    "vpt-deep": VPTConfig(P),
    "vpt-shallow": VPTConfig(P, deep=False),
    "gate-vpt": GateVPTConfig(P, gate_init=0.5, dropout=0.0),
    "cvpt": CVPTConfig(P),
    "da-vpt": DAVPTConfig(P, 4, (1, 1), alpha=2.0),
}
# Each way in which prompts enter the tokens, three of them in every block.
CONFIGS: dict[str, PromptConfig] = {
    "vpt-deep": VPTConfig(3),
    "vpt-partial": VPTConfig(3, blocks=1),
    "vpt-shallow": VPTConfig(3, deep=False),
    "vpt-project": VPTConfig(3, project=5),
    "gate-vpt": GateVPTConfig(3, gate_init=0.5, dropout=0.1),
    "da-vpt": DAVPTConfig(3, 3, (1, 1), prompt_norm="layer"),
    **{f"cvpt-{i}": CVPTConfig(3, insert=i, dropout=0.1) for i in range(1, 6)},
}
# One family for each way in which attention, blocks and heads differ.
FAMILIES = [
    "vit",
    "vit-avg-fc-norm",
    "vit-qk-norm",
    "vit-res-post",
    "deit-distilled",
    "eva02-unfused-swiglu",
    "rope-mixed",
]


def changed(config: PromptConfig, **fields: Any) -> PromptConfig:
    """Return `config` with other values for `fields`."""
    return PromptConfig.from_dict({**config.to_dict(), **fields})


def prompted(family: str, config: PromptConfig, *, shortcuts: bool = True, **kwargs: Any) -> Any:
    """Return a PromptModel in eval mode whose own parameters are far from their initial values."""
    model: Any = fastprompt.get_prompt_model(small(family, **kwargs), config, shortcuts=shortcuts)
    with torch.no_grad():
        for p in model.prompts:
            p.normal_()
        if isinstance(config, GateVPTConfig) and config.temperature is True:
            model.temperature.uniform_(0.5, 2)
            model.gate_logits.normal_()
        if isinstance(config, DAVPTConfig) and config.prompt_norm == "layer":
            nn.init.normal_(model.prompt_norm.weight)
            nn.init.normal_(model.prompt_norm.bias)
    return model


def outputs_and_gradients(
    model: Any, x: Tensor, labels: Tensor | None = LABELS, cotangent: Tensor | None = None
) -> dict[str, Tensor]:
    """Return logits, the method's loss and the gradients of what trains, by name, for a fixed cotangent."""
    logits, loss = (
        model(x, labels=labels) if labels is not None else (model(x), torch.zeros((), dtype=x.dtype))
    )
    if cotangent is None:
        cotangent = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = (logits * cotangent).sum() + loss
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True, materialize_grads=True)
    return {"logits": logits, "loss": loss, **dict(zip(trained, found, strict=True))}
