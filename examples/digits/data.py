"""scikit-learn's handwritten digits, random distortions of them, and batches as each method trains on them."""

import math
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from fastprompt import DAVPTConfig, PromptConfig
from fastprompt.training import Batches, LabelledImages

# Mean and standard deviation of all 1,797 images, scaled to 0..1.
MEAN, STD = 0.3053, 0.3760
BACKGROUND = -MEAN / STD


def digits(classes: Sequence[int]) -> LabelledImages:
    """Return the images [B, 1, 8, 8] of `classes`, normalised; their labels are positions in `classes`."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    label_of = torch.full((10,), -1)
    label_of[torch.tensor(classes)] = torch.arange(len(classes))
    labels = label_of[torch.tensor(raw.target)]
    keep = labels >= 0
    return LabelledImages((images[keep] - MEAN) / STD, labels[keep], tuple(classes))


def augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float = 7.5,
    stretch: float = 0.075,
    shift: float = 0.06,
    shear: float = 0.075,
) -> Tensor:
    """Rotate, stretch, shear and shift each image [B, C, height, width] by a random amount up to the bounds given.

    `stretch` is the logarithm of the scale along each axis, `shift` a fraction of the image. The background of the
    digits fills what was outside.
    """
    count = len(images)

    def draw(bound: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * bound

    angle = draw(math.radians(degrees))
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    scale_x, scale_y, slant = draw(stretch).exp(), draw(stretch).exp(), draw(shear)
    skew = torch.stack(
        [torch.stack([scale_x, slant], -1), torch.stack([torch.zeros(count), scale_y], -1)], -2
    )
    # The coordinates of an image run from -1 to 1.
    offset = torch.stack([draw(2 * shift), draw(2 * shift)], -1).unsqueeze(-1)
    grid = F.affine_grid(
        torch.cat([rotation @ skew, offset], -1).to(images), list(images.shape), align_corners=False
    )
    moved = F.grid_sample(images - BACKGROUND, grid, padding_mode="zeros", align_corners=False)
    return moved + BACKGROUND


def training_batches(config: PromptConfig, data: LabelledImages, batch_size: int, *, seed: int) -> Batches:
    """Return augmented batches; those of DA-VPT hold equally many images of each class, as in its recipe."""
    each = batch_size // len(data.classes) if isinstance(config, DAVPTConfig) else None
    return Batches(data, batch_size, seed=seed, transform=augment, images_per_class=each)
