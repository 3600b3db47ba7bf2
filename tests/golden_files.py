"""The numbers of the official code (float64, CPU), and the small backbone that all of them share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"


class Case(NamedTuple):
    """Tensors of one golden case by name, its configuration, and whether the model pools by mean and then norms."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    mean_pooled: bool


def names(prefix: str) -> list[str]:
    """The golden cases whose name starts with `prefix`."""
    return sorted(p.stem for p in FOLDER.glob(f"{prefix}*.safetensors"))


def load(name: str) -> Case:
    """One golden case."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata()
    return Case(tensors, json.loads(metadata.get("config", "{}")), "mean" in metadata.get("family", ""))


def backbone(mean_pooled: bool, num_classes: int = 0) -> nn.Module:
    """The golden backbone in float64: class-token head, or MAE style (mean, then norm)."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
    model = VisionTransformer(**sizes, num_classes=num_classes, global_pool="avg" if mean_pooled else "token")
    state = load("backbone_small").tensors
    if mean_pooled:
        state = {("fc_" + k if k.startswith("norm.") else k): v for k, v in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("head.") for key in missing)
    return model.to(torch.float64)


def assert_official(actual: Any, official: Any) -> None:
    """Check that float64 tensors equal the official code's, each element at a relative 1e-9."""
    torch.testing.assert_close(actual, official, rtol=1e-9, atol=1e-12)
