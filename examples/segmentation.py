"""Segmentation with prompts: a SETR-PUP decoder on `fastprompt.as_encoder`, on real images, with no download.

The images are scikit-learn's: handwritten digits, in white over crops of its two photographs; the task is to name the
digit, or the background, at each pixel. A small ViT learns this for the digits 0 to 4 and is frozen. Then comes
another domain, the photographic negatives of scenes with the digits 5 to 9: a new decoder learns them on the frozen
encoder, and once more on the same encoder with deep prompts.

    python -m examples.segmentation --steps 300 --seed 0

The decoder is the progressive upsampling one of Zheng et al., "Rethinking Semantic Segmentation from a
Sequence-to-Sequence Perspective with Transformers", CVPR 2021.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt

SIZE, DIGIT = 24, 16  # pixels of a scene and of the digit in it
INK = 0.4  # a pixel inked more than this is digit
CLASSES = 6  # 0 is the background
BATCH, HELD_OUT = 16, 256
PROMPTS, LEARNING_RATE = 16, 1e-2


class Scenes:
    """Draws scenes: crops of the photographs with a digit over each [B, 3, S, S], and each pixel's class [B, S, S].

    Held-out scenes are made of other images of digits and of another part of the photographs.
    """

    def __init__(self, digits: Sequence[int], *, negative: bool, held_out: bool, seed: int) -> None:
        data = load_digits()
        ours = (torch.arange(len(data.target)) % 4 == 0) == held_out
        ink = torch.tensor(data.images).float()[ours] / 16
        ink = F.interpolate(ink[:, None], size=DIGIT, mode="bilinear", align_corners=False)[:, 0]
        target = torch.tensor(data.target)[ours]
        self.ink = [ink[target == digit] for digit in digits]
        photographs = [torch.tensor(p).permute(2, 0, 1).float() / 255 for p in load_sample_images().images]
        cut = 480  # of 640 columns
        self.photographs = [p[:, :, cut:] if held_out else p[:, :, :cut] for p in photographs]
        self.sign = -1 if negative else 1
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(self._scene() for _ in range(count)), strict=True)
        return self.sign * (torch.stack(images) - 0.5) / 0.25, torch.stack(labels)

    def _scene(self) -> tuple[Tensor, Tensor]:
        photograph = self.photographs[self._below(len(self.photographs))]
        top, left = (self._below(side - SIZE + 1) for side in photograph.shape[1:])
        kind = self._below(len(self.ink))
        y, x = self._below(SIZE - DIGIT + 1), self._below(SIZE - DIGIT + 1)
        sheet = torch.zeros(SIZE, SIZE)
        sheet[y : y + DIGIT, x : x + DIGIT] = self.ink[kind][self._below(len(self.ink[kind]))]
        image = 0.6 * photograph[:, top : top + SIZE, left : left + SIZE] * (1 - sheet) + sheet
        return image, (sheet > INK) * (kind + 1)

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.generator))


class Decoder(nn.Module):
    """SETR-PUP: convolutions and doublings of the last map [B, D, h, w], up to one score per class and pixel."""

    def __init__(self, encoder: Any, width: int = 32) -> None:
        super().__init__()
        channels, layers = encoder.feature_info.channels()[-1], []
        for _ in range(int(math.log2(encoder.feature_info.reduction()[-1]))):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            ]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, CLASSES, 3, padding=1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.layers(maps[-1])


@dataclass
class Trained:
    """The loss at each step, the mean IoU on held-out scenes, and that of calling every pixel background."""

    losses: list[float]
    iou: float
    constant_iou: float


def segmenter(backbone: nn.Module, prompts: int, *, seed: int) -> Any:
    """A frozen copy of `backbone` with deep prompts, and a decoder: images [B, 3, S, S] -> scores [B, 6, S, S]."""
    torch.manual_seed(seed)
    model = fastprompt.get_prompt_model(copy.deepcopy(backbone), fastprompt.VPTConfig(prompts))
    encoder = fastprompt.as_encoder(model, [-1], norm=True)
    torch.manual_seed(seed)  # the same decoder for any number of prompts
    return nn.Sequential(encoder, Decoder(encoder))


def train(
    model: nn.Module, digits: Sequence[int], *, negative: bool, steps: int, lr: float, seed: int
) -> Trained:
    """Train what is trainable in `model` on a batch of new scenes a step, then measure it on held-out ones."""
    scenes = Scenes(digits, negative=negative, held_out=False, seed=seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    losses = []
    model.train()
    for _ in range(steps):
        images, labels = scenes.draw(BATCH)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    images, labels = Scenes(digits, negative=negative, held_out=True, seed=seed).draw(HELD_OUT)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    return Trained(losses, mean_iou(predicted, labels), mean_iou(torch.zeros_like(labels), labels))


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Intersection over union of predicted and true pixels of each class, averaged over the classes."""
    ious = []
    for label in range(CLASSES):
        found, true = predicted == label, labels == label
        ious.append((found & true).sum() / (found | true).sum())
    return float(torch.stack(ious).mean())


def pretrained(*, steps: int, seed: int) -> tuple[nn.Module, Trained]:
    """A small ViT, all of it trained on the digits 0 to 4."""
    torch.manual_seed(seed)
    vit = VisionTransformer(img_size=SIZE, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=0)
    model = segmenter(vit, 0, seed=seed)
    backbone = model[0].model.base.requires_grad_(True)
    return backbone, train(model, range(5), negative=False, steps=steps, lr=3e-3, seed=seed)


def run(*, steps: int, seed: int) -> dict[str, Trained]:
    """Pretraining and both trainings; prints as it goes."""
    begin = time.process_time()
    backbone, before = pretrained(steps=steps, seed=seed)
    print(
        f"backbone, digits 0-4: loss {before.losses[0]:.2f} -> {_end(before.losses):.2f}, mean IoU {before.iou:.3f}"
    )
    found: dict[str, Trained] = {}
    for name, prompts in (("frozen encoder", 0), ("VPT-Deep", PROMPTS)):
        model = segmenter(backbone, prompts, seed=seed)
        found[name] = train(model, range(5, 10), negative=True, steps=steps, lr=LEARNING_RATE, seed=seed + 1)
    deep = found["VPT-Deep"]
    print(f"\ndigits 5-9, negatives; {len(deep.losses)} steps of {BATCH} scenes")
    print("loss after    " + "".join(f"{name:>16}" for name in found))
    for stop in sorted({max(1, steps * part // 4) for part in range(5)}):
        print(f"{stop:>10}    " + "".join(f"{_end(r.losses[:stop]):>16.3f}" for r in found.values()))
    print("mean IoU      " + "".join(f"{r.iou:>16.3f}" for r in found.values()))
    print(f"\nmean IoU of calling every pixel background: {deep.constant_iou:.3f}")
    print(f"{time.process_time() - begin:.0f} s of processor time")
    return found


def _end(losses: list[float]) -> float:
    """The mean of the last losses, at most ten."""
    return sum(losses[-10:]) / len(losses[-10:])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Segmentation with prompts on scikit-learn's bundled images."
    )
    parser.add_argument("--steps", type=int, default=300, help="updates of each of the three trainings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"--steps must be at least 2; got {options.steps}")
    torch.set_num_threads(1)  # a second thread gains nothing on matrices as small as these
    run(steps=options.steps, seed=options.seed)


if __name__ == "__main__":
    main()
