"""Batches with the same number of images of each of their classes, as DA-VPT's recipe draws them."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler


class ClassBalancedBatchSampler(Sampler[list[int]]):
    """Batch indices for a `DataLoader(batch_sampler=...)`: `batch_size // images_per_class` classes a batch.

    Every epoch goes through all classes in a new order, again and again until as many images as the data set has were
    drawn; images of a class come without repetition until all were used. In a distributed run each process draws its
    own part of each batch's classes, from the same seed; call `set_epoch` as for `DistributedSampler`.

    Args:
        labels: [B], the class of each image.
        batch_size: images of one batch of one process, a multiple of `images_per_class`.
        images_per_class: images of each class in a batch; 2 in DA-VPT's recipe.
        seed: with the epoch, decides every draw.
        rank, world: this process and how many there are; None asks `torch.distributed`, and 0 of 1 without it.

    Raises:
        ValueError: sizes do not divide, a batch asks for more classes than there are, or a rank is out of range.
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        batch_size: int,
        *,
        images_per_class: int = 2,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        labels = torch.as_tensor(labels)
        running = dist.is_available() and dist.is_initialized()
        self.world = world if world is not None else (dist.get_world_size() if running else 1)
        self.rank = rank if rank is not None else (dist.get_rank() if running else 0)
        if labels.ndim != 1 or not len(labels):
            raise ValueError(f"`labels` must be [B] with B >= 1; got shape {tuple(labels.shape)}")
        if images_per_class < 1 or batch_size < 1 or batch_size % images_per_class:
            raise ValueError(
                f"`batch_size` must be a multiple of `images_per_class`={images_per_class}; got {batch_size}"
            )
        if not 0 <= self.rank < self.world:
            raise ValueError(f"`rank` must lie in 0..{self.world - 1}; got {self.rank}")
        self.members = [(labels == c).nonzero().flatten() for c in labels.unique()]
        self.classes = batch_size // images_per_class
        if self.classes * self.world > len(self.members):
            raise ValueError(
                f"{self.world} batches of {self.classes} classes need {self.classes * self.world} classes and there "
                f"are {len(self.members)}; lower `batch_size` or raise `images_per_class`"
            )
        self.images_per_class, self.seed, self.epoch = images_per_class, seed, 0
        self.batches = math.ceil(len(labels) / (batch_size * self.world))

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of the next pass; without it every pass is the same."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        classes = _endless(torch.arange(len(self.members)), generator)
        images = [_endless(rows, generator) for rows in self.members]
        for _ in range(self.batches):
            drawn: list[int] = []
            while (
                len(drawn) < self.classes * self.world
            ):  # no class twice in a batch, also where two rounds meet
                candidate = next(classes)
                if candidate not in drawn:
                    drawn.append(candidate)
            # Every process draws for all, so that all stay in step.
            rows = [[next(images[c]) for _ in range(self.images_per_class)] for c in drawn]
            mine = rows[self.rank * self.classes : (self.rank + 1) * self.classes]
            yield [index for group in mine for index in group]


def _endless(items: Tensor, generator: torch.Generator) -> Iterator[int]:
    """Items in random order, all of them before any comes again."""
    while True:
        for i in torch.randperm(len(items), generator=generator).tolist():
            yield int(items[i])
