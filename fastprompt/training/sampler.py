"""Batches with equally many images of each of their classes, as in DA-VPT's recipe."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

CALLER = "`ClassBalancedBatchSampler`"


class ClassBalancedBatchSampler(Sampler[list[int]]):
    """Yield batches of indices with `batch_size // images_per_class` classes, for `DataLoader(batch_sampler=...)`.

    An epoch draws as many images as the dataset has. Classes are drawn in random order, and all come once before any
    comes again; so do the images of a class. In a distributed run every process draws its own part of the classes of
    each batch from the same seed. Call `set_epoch` before each epoch, as for `DistributedSampler`.

    Args:
        labels: [B], the class of each image.
        batch_size: images per batch and process, a multiple of `images_per_class`.
        images_per_class: images of each class in a batch; 2 in DA-VPT's recipe.
        seed: determines all draws together with the epoch.
        rank, world: index of this process and number of processes; None asks `torch.distributed`.

    Raises:
        ValueError: sizes do not divide, a batch needs more classes than there are, or `rank` is out of range.
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
            raise ValueError(f"{CALLER}: `labels` must be [B] with B >= 1; got shape {tuple(labels.shape)}.")
        if images_per_class < 1 or batch_size < 1 or batch_size % images_per_class:
            raise ValueError(
                f"{CALLER}: `batch_size` must be a positive multiple of `images_per_class`={images_per_class}; "
                f"got {batch_size}."
            )
        if not 0 <= self.rank < self.world:
            raise ValueError(f"{CALLER}: `rank` must be 0 to {self.world - 1}; got {self.rank}.")
        self.members = [(labels == c).nonzero().flatten() for c in labels.unique()]
        self.classes = batch_size // images_per_class
        if self.classes * self.world > len(self.members):
            raise ValueError(
                f"{CALLER}: {self.world} batches of {self.classes} classes need {self.classes * self.world} "
                f"classes; `labels` has {len(self.members)}; lower `batch_size` or raise `images_per_class`."
            )
        self.images_per_class, self.seed, self.epoch = images_per_class, seed, 0
        self.batches = math.ceil(len(labels) / (batch_size * self.world))

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Select the draws of the next pass; without a call every pass is the same."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        classes = _endless(torch.arange(len(self.members)), generator)
        images = [_endless(rows, generator) for rows in self.members]
        for _ in range(self.batches):
            drawn: list[int] = []
            # The end of one round and the start of the next may have a class in common; a batch must not repeat it.
            while len(drawn) < self.classes * self.world:
                candidate = next(classes)
                if candidate not in drawn:
                    drawn.append(candidate)
            # Every process draws for all of them, so that their generators stay equal.
            rows = [[next(images[c]) for _ in range(self.images_per_class)] for c in drawn]
            mine = rows[self.rank * self.classes : (self.rank + 1) * self.classes]
            yield [index for group in mine for index in group]


def _endless(items: Tensor, generator: torch.Generator) -> Iterator[int]:
    """Yield the items in random order, again and again, each once per round."""
    while True:
        for i in torch.randperm(len(items), generator=generator).tolist():
            yield int(items[i])
