"""The demo's backbone: a small timm ViT, trained on the first classes and then frozen."""

from collections.abc import Callable, Iterator

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from examples.digits.data import augment
from examples.digits.protocol import Backbone
from fastprompt.training import Batches, History, LabelledImages, TrainingStep, evaluate, fit

VIEWS = 2  # upright, and rotated by 90 degrees


class RotatedBatches:
    """Batches in which each image is rotated by 90 degrees with probability 1/2; label `VIEWS * digit + rotated`.

    With upright digits alone, training ends before the features contain much besides these digits.
    """

    def __init__(self, batches: Batches, seed: int) -> None:
        self.batches = batches
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            rotated = torch.randint(VIEWS, (len(labels),), generator=self.generator)
            yield rotate(images, rotated), VIEWS * labels + rotated


def rotate(images: Tensor, rotated: Tensor) -> Tensor:
    """Rotate image i of [B, C, S, S] by 90 degrees if `rotated[i]` is 1."""
    return torch.where(rotated.bool()[:, None, None, None], torch.rot90(images, 1, (2, 3)), images)


class UprightDigits(nn.Module):
    """The scores of the digits alone: the classes of the upright view, [B, digits]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.model(images)
        return scores[:, ::VIEWS]


def build(setting: Backbone, classes: int) -> VisionTransformer:
    """Return timm's ViT for images of one channel, with weights from torch's global random state."""
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
    """Train on `train`; return the frozen model, its history, and its accuracy on the upright `held_out`, 0 to 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(setting, VIEWS * len(train.classes))
    model.to(device)
    batches = RotatedBatches(Batches(train, setting.batch_size, seed=seed, transform=augment), seed)
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
