"""The settings of the demo: sizes, methods, learning rates. docs/demo.md says how they were chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, VPTConfig

LINEAR_PROBE = "Linear probe"
QUICK_NOTE = "Smoke run (--quick): these numbers mean nothing."


@dataclass(frozen=True)
class Method:
    """A row of the table: the configuration for `get_prompt_model`, and how to tune it."""

    config: PromptConfig
    lr: float
    weight_decay: float = 0.0


METHODS: Mapping[str, Method] = {
    "VPT-Shallow": Method(VPTConfig(32, deep=False), lr=0.1),
    "VPT-Deep": Method(VPTConfig(32, deep=True), lr=0.1),
    "GateVPT": Method(GateVPTConfig(32), lr=0.2),
    "CVPT": Method(CVPTConfig(32), lr=0.1),
    "DA-VPT": Method(DAVPTConfig(32, 5, (6, 7)), lr=0.05),
}


@dataclass(frozen=True)
class Backbone:
    """The small ViT and its training on the first classes."""

    image_size: int = 8
    patch_size: int = 2
    width: int = 32
    depth: int = 8
    heads: int = 2
    epochs: int = 130
    batch_size: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.05
    held_out: int = 90


@dataclass(frozen=True)
class Protocol:
    """One run of the demo."""

    backbone: Backbone = field(default_factory=Backbone)
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    seen_classes: tuple[int, ...] = (0, 1, 2, 3, 4)
    new_classes: tuple[int, ...] = (5, 6, 7, 8, 9)
    pool: int = 350  # images that the labelled ones are drawn from; the others are the test set
    labelled: int = 200
    seeds: int = 3
    epochs: int = 40
    batch_size: int = 20
    timing_batch: int = 64
    timing_rounds: int = 20
    meaningful: bool = True

    @classmethod
    def quick(cls, seeds: int = 1) -> "Protocol":
        """Return the smoke run: it runs everything within seconds and trains nothing properly."""
        backbone = Backbone(width=24, depth=2, epochs=1, batch_size=128, held_out=50)
        methods = {name: Method(_small(method.config), method.lr) for name, method in METHODS.items()}
        return cls(
            backbone,
            methods,
            labelled=50,
            seeds=seeds,
            epochs=1,
            batch_size=25,
            timing_batch=8,
            timing_rounds=2,
            meaningful=False,
        )


def _small(config: PromptConfig) -> PromptConfig:
    """Return `config` with 2 prompts, for a backbone of 2 blocks."""
    changes: dict[str, Any] = {"num_prompts": 2}
    if isinstance(config, DAVPTConfig):
        changes["guided_blocks"] = (0, 1)
    return replace(config, **changes)
