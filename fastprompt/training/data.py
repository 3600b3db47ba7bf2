"""Images for training: scikit-learn's bundled digits, cut by class, and random small distortions of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Mean and standard deviation of all 1,797 images, on the scale 0..1.
DIGITS_MEAN = 0.3053
DIGITS_STD = 0.3760
DIGITS_CLASSES = 10


@dataclass(frozen=True)
class LabelledImages:
    """Images [B, C, height, width] with their labels [B]; label `i` stands for class `classes[i]`."""

    images: Tensor
    labels: Tensor
    classes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "LabelledImages":
        return LabelledImages(self.images[index], self.labels[index], self.classes)


def digits(classes: Sequence[int], *, size: int = 8) -> LabelledImages:
    """The 8x8 handwritten digits that come with scikit-learn (UCI ML hand-written digits), no download.

    Returns images [B, 1, size, size] (float32, mean 0 and standard deviation 1 over all ten classes; bilinear
    where `size` is not 8) of the asked classes only, in the data set's order, with labels renumbered 0, 1, ... in
    the order of `classes`.

    Raises ValueError for an empty list, a repeated class or one outside 0..9, and for a size below 1; TypeError for
    a class that is no integer; ImportError where scikit-learn is missing (the extra `fastprompt[train]`).
    """
    wanted = _checked_classes(classes)
    if size < 1:
        raise ValueError(
            f"`digits`: `size` must be at least 1; got {size}; use 8 for the images as they are."
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "`digits` needs scikit-learn, which carries the images; install it with `pip install 'fastprompt[train]'`."
        ) from error
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    target = torch.tensor(raw.target, dtype=torch.int64)
    renumber = torch.full((DIGITS_CLASSES,), -1)
    renumber[torch.tensor(wanted)] = torch.arange(len(wanted))
    keep = renumber[target] >= 0
    images, labels = images[keep], renumber[target][keep]
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return LabelledImages((images - DIGITS_MEAN) / DIGITS_STD, labels, wanted)


def _checked_classes(classes: Sequence[int]) -> tuple[int, ...]:
    if isinstance(classes, str | bytes) or not all(
        isinstance(c, int) and not isinstance(c, bool) for c in classes
    ):
        raise TypeError(f"`digits`: `classes` must be integers; got {classes!r}; pass for example range(5).")
    wanted = tuple(classes)
    if not wanted:
        raise ValueError(
            "`digits`: `classes` must name at least one class; got none; pass for example range(5)."
        )
    outside = [c for c in wanted if not 0 <= c < DIGITS_CLASSES]
    if outside:
        raise ValueError(
            f"`digits`: `classes` must lie in 0..9; got {outside}; the data set has the ten digits."
        )
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"`digits`: `classes` must not repeat; got {list(wanted)}; name each class once.")
    return wanted


def split_per_class(data: LabelledImages, count: int, *, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Draw `count` images, equally many of each class, by `seed`; returns (drawn, all the others).

    Raises ValueError where `count` is not a positive multiple of the number of classes, or a class has too few images.
    """
    number = len(data.classes)
    if count < number or count % number:
        raise ValueError(
            f"`split_per_class`: `count` must be a positive multiple of the {number} classes; got {count}; "
            f"use for example {max(1, count // number) * number}."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label, name in enumerate(data.classes):
        rows = (data.labels == label).nonzero().squeeze(1)
        if len(rows) < count // number:
            raise ValueError(
                f"`split_per_class`: `count`={count} asks for {count // number} images of class {name}, "
                f"which has {len(rows)}; lower `count`."
            )
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[: count // number]])
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[torch.cat(drawn)] = True
    return data[chosen.nonzero().squeeze(1)], data[(~chosen).nonzero().squeeze(1)]


@dataclass
class Batches:
    """Batches (images, labels) of tensors that lie in memory; each pass draws a new order from `seed`.

    Without a seed the order is the data's own and the last batch may be short, as `evaluate` wants it. `distort`
    turns on `augment` for training batches.
    """

    data: LabelledImages
    batch_size: int
    seed: int | None = None
    distort: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(
                f"`Batches`: `batch_size` must be at least 1; got {self.batch_size}; use for example 32."
            )
        if self.distort and self.seed is None:
            raise ValueError("`Batches`: `distort` draws random numbers; pass `seed` with it.")
        self._generator = torch.Generator().manual_seed(self.seed or 0)

    def __len__(self) -> int:
        return math.ceil(len(self.data) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.data)
        order = torch.arange(count) if self.seed is None else torch.randperm(count, generator=self._generator)
        for rows in order.split(self.batch_size):
            images = self.data.images[rows]
            if self.distort:
                images = augment(images, self._generator)
            yield images, self.data.labels[rows]


def augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    background: float = -DIGITS_MEAN / DIGITS_STD,
    degrees: float = 7.5,
    stretch: float = 0.075,
    shift: float = 0.06,
    shear: float = 0.075,
) -> Tensor:
    """A random small rotation, stretch, shear and shift of each image [B, C, height, width], same shape back.

    `stretch` is in log scale per axis, `shift` in parts of the image; what comes in from outside is `background`.
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
    # Coordinates run from -1 to 1, so a part of the image is twice that in them.
    offset = torch.stack([draw(2 * shift), draw(2 * shift)], -1).unsqueeze(-1)
    grid = F.affine_grid(
        torch.cat([rotation @ skew, offset], -1).to(images), list(images.shape), align_corners=False
    )
    moved = F.grid_sample(images - background, grid, padding_mode="zeros", align_corners=False)
    return moved + background
