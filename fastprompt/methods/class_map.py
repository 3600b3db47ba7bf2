"""Which prompt stands for which class: cosine k-means over the classes' mean features (DA-VPT, CVPR 2025)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

FeatureNorm = Literal["layer", "l2", "none"]

ROUNDS, TOLERANCE = 20, 1e-4


def normalise(features: Tensor, norm: FeatureNorm) -> Tensor:
    """Class features [C, D] as they are clustered: through a LayerNorm without affine part, to length 1, or as is."""
    if norm == "layer":
        return F.layer_norm(features, features.shape[-1:])
    return F.normalize(features, dim=-1) if norm == "l2" else features


def cosine_kmeans(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """k-means by cosine: features [C, D], centroids [k, D] to start from -> assignment [C], centroids [k, D].

    At most 20 rounds, fewer once the centroids' movements sum to less than 1e-4; an empty cluster keeps its centroid.
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
        means: [C, D]; rows of classes without an image are not read.
        counts: [C], images of each class.
        centroids: [k, D] of the last map, or None for a first one, which starts at random classes.
        prompts: k. With as many classes as prompts, or fewer, the map is the identity.
        norm: what class features pass through first.
        generator: draws the first centroids, and the prompts of classes without an image.

    Returns:
        class → prompt [C] and centroids [k, D]; None where all classes came to one prompt: such a map is not used.

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
                f"class map: {len(features)} classes have images and {prompts} prompts need as many to start from; "
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
