"""The class → prompt map: k-means against the official numbers, and the official skips and fallbacks."""

from __future__ import annotations

import re
from typing import Any

import golden_files
import pytest
import torch
from timm_families import randomise, vit
from torch import Tensor

import fastprompt
from bench.correctness import assert_same
from fastprompt.methods.class_map import cosine_kmeans, map_classes, normalise


def model_of(proxies: int = 3, classes: int = 6, **options: Any) -> Any:
    base = randomise(vit(num_classes=classes)).to(torch.float64)
    config = fastprompt.DAVPTConfig(2, proxies, (1, 1), **options)
    return fastprompt.get_prompt_model(base, config)


def batches(classes: int = 6, count: int = 8, size: int = 9) -> list[tuple[Tensor, Tensor]]:
    """Images that differ by class, and labels."""
    found = []
    for _ in range(count):
        labels = torch.randint(classes, (size,))
        shade = labels.double().view(-1, 1, 1, 1) - 2.5
        found.append((0.3 * torch.randn(size, 3, 32, 32, dtype=torch.float64) + shade, labels))
    return found


def test_kmeans_equals_the_official_code() -> None:
    case = golden_files.load("davpt_kmeans")
    features = normalise(case.tensors["class_features"], case.config["norm"])
    assignment, centroids = cosine_kmeans(features, case.tensors["initial_centroids"])
    assert torch.equal(assignment, case.tensors["assignment"])
    golden_files.assert_official(centroids, case.tensors["centroids"])


def test_empty_cluster_keeps_its_centroid() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    start = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assignment, centroids = cosine_kmeans(features, start)
    assert assignment.tolist() == [0, 0]
    assert torch.equal(centroids[1], start[1])


def test_a_map_of_all_classes_to_one_prompt_is_not_used() -> None:
    means = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]])
    start = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert map_classes(means, torch.ones(3), start, 2, norm="none") is None


def test_classes_without_images_get_some_prompt_and_disturb_no_mean() -> None:
    means = torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, torch.nan], [1.0, 0.1]])
    found = map_classes(means, torch.tensor([3.0, 1.0, 0.0, 2.0]), torch.eye(2), 2, norm="none")
    assert found is not None
    assignment, centroids = found
    assert assignment[[0, 1, 3]].tolist() == [0, 1, 0]
    assert 0 <= assignment[2] < 2
    assert centroids.isfinite().all()


def test_as_many_prompts_as_classes_make_the_identity() -> None:
    found = map_classes(torch.randn(3, 4), torch.ones(3), None, 3)
    assert found is not None
    assert found[0].tolist() == [0, 1, 2]


def test_too_few_classes_with_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 prompts need as many classes with images; got 1"):
        map_classes(torch.randn(4, 5), torch.tensor([1.0, 0.0, 0.0, 0.0]), None, 2)


def test_fewer_classes_than_proxies_shrink_the_proxies() -> None:
    model = model_of(proxies=10, classes=4)
    assert model.prompts[1].shape == (4, 48)
    assert model.class_to_prompt.tolist() == [0, 1, 2, 3]


def test_first_map_comes_from_the_frozen_backbone_with_so_many_images_of_each_class() -> None:
    model, data = model_of(), batches()
    seen: list[int] = []
    original = model.base.forward_features
    model.base.forward_features = lambda images: seen.append(len(images)) or original(images)
    model.train()
    model.fit_class_map(iter(data), images_per_class=2)
    assert sum(seen) == 12, "two images of each of six classes, and no more"
    assert model.training
    assert not model.base.blocks[0].training or model.config.backbone_train_mode
    assert sorted(set(model.class_to_prompt.tolist())) == [0, 1, 2]
    assert not model.class_centroids.isnan().any()
    images, labels = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    del model.base.forward_features
    with torch.no_grad():
        model.eval()
        features = model.base.forward_head(model.base.forward_features(images), pre_logits=True)
    means = torch.stack([features[labels == c][:2].mean(0) for c in range(6)])
    expected = map_classes(means, torch.ones(6), None, 3, generator=torch.Generator().manual_seed(0))
    assert expected is not None
    assert torch.equal(model.class_to_prompt, expected[0])


def test_later_maps_come_from_the_tuned_models_epoch_and_start_where_the_last_ended() -> None:
    model, data = model_of(), batches()
    model.fit_class_map(data)
    centroids = model.class_centroids.clone()
    model.train()
    features: dict[int, list[Tensor]] = {}
    for images, labels in data[:4]:
        model(images, labels=labels)
        pooled = model.eval().forward_features(images)[:, 0]
        model.train()
        for label, feature in zip(labels.tolist(), pooled, strict=True):
            features.setdefault(label, []).append(feature)
    means = torch.stack([torch.stack(features[c]).mean(0) for c in range(6)])
    expected = map_classes(means, torch.ones(6), centroids, 3)
    model.update_class_map()
    assert expected is not None
    assert torch.equal(model.class_to_prompt, expected[0])
    assert_same(model.class_centroids, expected[1])
    with pytest.raises(ValueError, match="there are no images"):
        model.update_class_map()


def test_evaluation_and_calls_without_labels_are_not_counted() -> None:
    model = model_of()
    images, labels = batches()[0]
    model.train()(images)
    model.eval()(images, labels=labels)
    assert not model.class_counts.any()
    model.train()(images, labels=labels)
    assert model.class_counts.sum() == len(labels)


def test_map_and_centroids_are_saved_and_the_epochs_sums_are_not() -> None:
    model = model_of()
    model.fit_class_map(batches())
    state = model.state_dict()
    assert {"class_to_prompt", "class_centroids"} <= set(state)
    assert not {"class_sums", "class_counts"} & set(state)


def test_models_of_other_methods_have_no_class_map() -> None:
    model: Any = fastprompt.get_prompt_model(vit(), fastprompt.VPTConfig(2))
    with pytest.raises(AttributeError, match="'VPTModel' object has no attribute 'fit_class_map'"):
        model.fit_class_map([])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x, y: (x[..., :16], y),
            ValueError,
            "`fit_class_map`: `images` must be 32x32 pixels; got 32x16",
        ),
        (lambda x, y: (x, y.float()), TypeError, "`fit_class_map`: `labels` must be int64 or int32"),
        (lambda x, y: (x, y + 4), ValueError, "`fit_class_map`: `labels` must be in 0..5"),
    ],
    ids=["image size", "label dtype", "label range"],
)
def test_a_loaders_mistakes_are_named_and_the_mode_is_restored(
    change: Any, error: type[Exception], message: str
) -> None:
    model = model_of().train()
    with pytest.raises(error, match=re.escape(message)):
        model.fit_class_map([change(*batches(count=1, size=30)[0])])
    assert model.training


def test_images_per_class_must_be_positive() -> None:
    with pytest.raises(ValueError, match="`images_per_class` must be an integer >= 1; got 0"):
        model_of().fit_class_map([], images_per_class=0)
