"""Class-balanced batches, alone and in a distributed run."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastprompt.training.sampler import ClassBalancedBatchSampler

LABELS = torch.tensor([0] * 20 + [1] * 3 + [2] * 9 + [3] * 8 + [4] * 8)


def classes_of(batch: list[int]) -> Counter[int]:
    return Counter(LABELS[batch].tolist())


def test_every_batch_has_the_same_number_of_images_of_each_class() -> None:
    sampler = ClassBalancedBatchSampler(LABELS, 6)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 8
    for batch in batches:
        assert sorted(classes_of(batch).values()) == [2, 2, 2]


def test_classes_take_turns_and_images_come_again_only_after_all_were_used() -> None:
    drawn = [index for batch in ClassBalancedBatchSampler(LABELS, 10) for index in batch]
    assert set(Counter(LABELS[drawn].tolist()).values()) == {10}
    uses = Counter(drawn)
    of_class_one = [uses[i] for i in range(20, 23)]
    assert max(of_class_one) - min(of_class_one) <= 1
    assert max(uses[i] for i in range(20)) == 1


def test_epochs_differ_and_repeat_by_seed() -> None:
    sampler = ClassBalancedBatchSampler(LABELS, 4, seed=3)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(ClassBalancedBatchSampler(LABELS, 4, seed=4)) != first


def test_processes_draw_disjoint_classes_of_the_same_batch() -> None:
    parts = [list(ClassBalancedBatchSampler(LABELS, 4, rank=r, world=2)) for r in range(2)]
    assert len(parts[0]) == len(parts[1]) == 6
    for left, right in zip(*parts, strict=True):
        assert not set(classes_of(left)) & set(classes_of(right))
        assert sorted(classes_of(left + right).values()) == [2, 2, 2, 2]


def test_a_data_loader_takes_it() -> None:
    data = TensorDataset(torch.arange(len(LABELS)), LABELS)
    for _, labels in DataLoader(data, batch_sampler=ClassBalancedBatchSampler(LABELS, 6)):
        assert sorted(Counter(labels.tolist()).values()) == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 5}, "positive multiple of `images_per_class`=2; got 5"),
        ({"batch_size": 12}, "need 6 classes; `labels` has 5"),
        ({"batch_size": 6, "world": 2}, "need 6 classes; `labels` has 5"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "`rank` must be 0 to 1; got 2"),
        ({"batch_size": 4, "labels": []}, "B >= 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassBalancedBatchSampler(**{"labels": LABELS, **arguments})  # type: ignore[arg-type]
