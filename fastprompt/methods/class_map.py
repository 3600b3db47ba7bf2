"""Assign prompts to classes: cosine k-means over the classes' mean features (DA-VPT, CVPR 2025)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

FeatureNorm = Literal["layer", "l2", "none"]

ROUNDS, TOLERANCE = 20, 1e-4


def normalise(features: Tensor, norm: FeatureNorm) -> Tensor:
    """Normalise class features [C, D] for clustering: LayerNorm without affine part, length 1, or unchanged."""
    if norm == "layer":
        return F.layer_norm(features, features.shape[-1:])
    return F.normalize(features, dim=-1) if norm == "l2" else features


def cosine_kmeans(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine k-means: features [C, D], initial centroids [k, D] -> assignment [C], centroids [k, D].

    Runs at most 20 rounds, and stops when the centroids' movements sum to less than 1e-4. An empty cluster keeps its
    centroid.
    """
    assignment = _nearest(features, centroids)
    for _ in range(ROUNDS):
        assignment = _nearest(features, centroids)
        members = F.one_hot(assignment, centroids.shape[0]).to(features.dtype).mT
        count = members.sum(1, keepdim=True)
        moved = torch.where(count > 0, members @ features / count.clamp(min=1), centroids)
        movement = (moved - centroids).norm(dim=-1).sum()
        centroids = moved
        if movement < TOLERANCE:
            break
    return assignment, centroids


def map_classes(
    means: Tensor,
    counts: Tensor,
    centroids: Tensor | None,
    prompts: int,
    *,
    norm: FeatureNorm = "layer",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Map classes to prompts by their mean features.

    Args:
        means: [C, D]; rows of classes without an image are ignored.
        counts: [C], images of each class.
        centroids: [k, D] of the last map; None starts at random classes.
        prompts: k. If there are no more classes than prompts, the map is the identity.
        norm: applied to the class features first.
        generator: draws the first centroids, and the prompts of classes without an image.

    Returns:
        The prompt of each class [C] and the centroids [k, D]; None if all classes are assigned to one prompt.

    Raises:
        ValueError: fewer classes with images than prompts.
    """
    C = means.shape[0]
    seen = counts > 0
    features = normalise(means[seen], norm)
    if prompts >= C:
        return torch.arange(C, device=means.device), normalise(means, norm)
    if centroids is None:
        if len(features) < prompts:
            raise ValueError(
                f"class map: {prompts} prompts need as many classes with images; got {len(features)}; "
                "use more images or fewer proxy prompts"
            )
        first = torch.randperm(len(features), generator=generator)[:prompts]
        centroids = features[first.to(features.device)]
    assignment, centroids = cosine_kmeans(features, centroids.to(features.dtype))
    if prompts > 1 and bool((assignment == assignment[0]).all()):
        return None
    chosen = torch.randint(prompts, (C,), generator=generator).to(means.device)
    chosen[seen] = assignment
    return chosen, centroids


def _nearest(features: Tensor, centroids: Tensor) -> Tensor:
    return (F.normalize(features, dim=-1) @ F.normalize(centroids, dim=-1).mT).argmax(1)
