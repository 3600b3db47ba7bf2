"""The demo's backbone: a small timm ViT, trained on the first classes and then frozen."""

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastprompt.demo.protocol import Backbone
from fastprompt.training import Batches, History, LabelledImages, TrainingStep, evaluate, fit

VIEWS = 2  # upright, and turned by a quarter


def turn(images: Tensor, turned: Tensor) -> Tensor:
    """Turn image i of [B, C, S, S] by a quarter where `turned[i]` is 1."""
    return torch.where(turned.bool()[:, None, None, None], torch.rot90(images, 1, (2, 3)), images)


class TurnedBatches:
    """Batches in which every second image, by chance, is turned by a quarter; label `VIEWS * digit + turned`.

    With upright digits alone the training is over before the features say much about anything but these digits.
    """

    def __init__(self, batches: Batches, seed: int) -> None:
        self.batches = batches
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for images, labels in self.batches:
            turned = torch.randint(VIEWS, (len(labels),), generator=self.generator)
            yield turn(images, turned), VIEWS * labels + turned


class UprightDigits(nn.Module):
    """Scores of the digits alone: the classes of the upright view, [B, digits]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, ::VIEWS]


def build(setting: Backbone, classes: int) -> VisionTransformer:
    """timm's ViT for one-channel images; the weights come from torch's global random state."""
    return VisionTransformer(
        img_size=setting.image_size,
        patch_size=setting.patch_size,
        in_chans=1,
        embed_dim=setting.width,
        depth=setting.depth,
        num_heads=setting.heads,
        num_classes=classes,
    )


def train_backbone(
    setting: Backbone,
    train: LabelledImages,
    held_out: LabelledImages,
    *,
    seed: int,
    device: torch.device,
    progress: Callable[[TrainingStep], None] | None = None,
) -> tuple[VisionTransformer, History, float]:
    """Train on `train`; returns the frozen model, the course, and the accuracy on the upright `held_out`, 0..1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(setting, VIEWS * len(train.classes))
    model.to(device)
    batches = TurnedBatches(Batches(train, setting.batch_size, seed=seed, distort=True), seed)
    history = fit(
        model,
        batches,
        epochs=setting.epochs,
        lr=setting.lr,
        weight_decay=setting.weight_decay,
        betas=(0.9, 0.98),
        clip_norm=1.0,
        seed=seed,
        progress=progress,
    )
    accuracy = evaluate(UprightDigits(model), Batches(held_out, 256))
    return model.requires_grad_(False).eval(), history, accuracy
