"""What the demo does with which numbers: sizes, methods, learning rates. docs/demo.md says how they were chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fastprompt.config import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, VPTConfig

LINEAR_PROBE = "Linear probe"


@dataclass(frozen=True)
class Method:
    """One row of the table: a configuration for `get_prompt_model` and how it is tuned."""

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
    """One run of the demo; `Protocol.quick()` is the smoke run, whose numbers mean nothing."""

    backbone: Backbone = field(default_factory=Backbone)
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    seen_classes: tuple[int, ...] = (0, 1, 2, 3, 4)
    new_classes: tuple[int, ...] = (5, 6, 7, 8, 9)
    pool: int = 350  # images that labelled ones are drawn from; all others are the test set
    labelled: int = 200
    seeds: int = 3
    epochs: int = 40
    batch_size: int = 20
    timing_batch: int = 64
    timing_rounds: int = 20
    meaningful: bool = True

    @classmethod
    def quick(cls, seeds: int = 1) -> "Protocol":
        """Seconds instead of minutes: every part runs, nothing is trained enough."""
        backbone = Backbone(width=24, depth=2, epochs=1, batch_size=128, held_out=50)
        methods = {name: Method(_few(method.config), method.lr) for name, method in METHODS.items()}
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


def _few(config: PromptConfig) -> PromptConfig:
    """With 2 prompts, for a backbone of 2 blocks."""
    if isinstance(config, DAVPTConfig):
        return replace(config, num_prompts=2, guided_blocks=(0, 1))
    return replace(config, num_prompts=2)  # type: ignore[call-arg]
