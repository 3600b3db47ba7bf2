"""Batches of one draw of labelled images, as each method wants them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastprompt.config import DAVPTConfig, PromptConfig
from fastprompt.training import Batches, ClassBalancedBatchSampler, LabelledImages, augment


class BalancedBatches:
    """Distorted images in batches with equally many of each class, as DA-VPT's recipe draws them; anew in each pass."""

    def __init__(self, data: LabelledImages, batch_size: int, *, seed: int) -> None:
        self.data = data
        self.sampler = ClassBalancedBatchSampler(
            data.labels, batch_size, images_per_class=batch_size // len(data.classes), seed=seed
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.passes = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.set_epoch(self.passes)
        self.passes += 1
        for rows in self.sampler:
            yield augment(self.data.images[rows], self.generator), self.data.labels[rows]


def batches_for(
    config: PromptConfig, data: LabelledImages, batch_size: int, *, seed: int
) -> Batches | BalancedBatches:
    """Distorted training batches: in random order, or for DA-VPT with equally many images of each class."""
    if isinstance(config, DAVPTConfig):
        return BalancedBatches(data, batch_size, seed=seed)
    return Batches(data, batch_size, seed=seed, distort=True)
