"""Labelled images in memory, a split with equally many images per class, and batches."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprompt.training.sampler import ClassBalancedBatchSampler

Transform = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class LabelledImages:
    """Images [B, C, height, width] and labels [B]; label `i` stands for class `classes[i]`."""

    images: Tensor
    labels: Tensor
    classes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "LabelledImages":
        return LabelledImages(self.images[index], self.labels[index], self.classes)


def split_per_class(data: LabelledImages, count: int, *, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Draw `count` random images, equally many of each class, and return (drawn, the rest).

    Raises ValueError if `count` is not a positive multiple of the number of classes, or a class has too few images.
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
                f"`split_per_class`: `count`={count} needs {count // number} images of class {name}, "
                f"which has {len(rows)}; lower `count`."
            )
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[: count // number]])
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[torch.cat(drawn)] = True
    return data[chosen.nonzero().squeeze(1)], data[(~chosen).nonzero().squeeze(1)]


@dataclass
class Batches:
    """Iterate over `data` in batches (images, labels).

    Args:
        data: the images and labels.
        batch_size: images per batch; the last batch may be smaller.
        seed: seeds all random draws; every pass draws a new order. None keeps the order of `data`.
        transform: random augmentation; called as `transform(images, generator)` on each batch. Needs `seed`.
        images_per_class: draw batches with this many images of each of their classes, as
            `ClassBalancedBatchSampler` does. Needs `seed`.
    """

    data: LabelledImages
    batch_size: int
    seed: int | None = None
    transform: Transform | None = None
    images_per_class: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"`Batches`: `batch_size` must be at least 1; got {self.batch_size}.")
        if self.seed is None and (self.transform is not None or self.images_per_class is not None):
            raise ValueError(
                "`Batches`: `transform` and `images_per_class` draw random numbers; pass `seed`."
            )
        self._generator = torch.Generator().manual_seed(self.seed or 0)
        self._sampler: ClassBalancedBatchSampler | None = None
        if self.images_per_class is not None:
            self._sampler = ClassBalancedBatchSampler(
                self.data.labels,
                self.batch_size,
                images_per_class=self.images_per_class,
                seed=self.seed or 0,
            )

    def __len__(self) -> int:
        return math.ceil(len(self.data) / self.batch_size) if self._sampler is None else len(self._sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self._rows():
            images = self.data.images[rows]
            if self.transform is not None:
                images = self.transform(images, self._generator)
            yield images, self.data.labels[rows]

    def _rows(self) -> Iterable[Tensor]:
        """Return the row numbers of each batch of one pass."""
        if self._sampler is not None:
            batches = [torch.tensor(batch) for batch in self._sampler]
            self._sampler.set_epoch(self._sampler.epoch + 1)
            return batches
        count = len(self.data)
        order = torch.arange(count) if self.seed is None else torch.randperm(count, generator=self._generator)
        return order.split(self.batch_size)
