"""Numbers about the prompts of a model: gates, the map of classes, similarities, and where they lie among tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.methods import DAVPTModel, GateVPTModel
from fastprompt.methods.class_map import normalise
from fastprompt.methods.da_vpt import block_view
from fastprompt.methods.proxy_loss import similarities
from fastprompt.model import PromptModel
from fastprompt.ops.operator import accumulation_dtype
from fastprompt.viz.rows import (
    checked_block,
    checked_model,
    entering,
    evaluating,
    own_prompts,
)

Loader = Iterable[tuple[Tensor, Tensor]]


class Gates(NamedTuple):
    """GateVPT: `gates` [G] of the first G blocks, in (0, 1), and `temperatures` [L] of all blocks, or None."""

    gates: Tensor
    temperatures: Tensor | None


class Embedding(NamedTuple):
    """Points: `prompts` [P, k], `tokens` [B, k] one for each image, and the images' `labels` [B]."""

    prompts: Tensor
    tokens: Tensor
    labels: Tensor


@torch.no_grad()
def gate_values(model: PromptModel) -> Gates:
    """The gates and softmax temperatures of GateVPT as the next forward uses them.

    Raises NotImplementedError for another method.
    """
    checked_model(model, "gate_values")
    if not isinstance(model, GateVPTModel):
        raise NotImplementedError(f"`gate_values`: {_name(model)} has no gates; GateVPT has")
    parameters: Any = model
    temperature = parameters.temperature
    if temperature is not None:
        temperature = temperature.detach().clone()
        if isinstance(parameters.temperature, torch.nn.Parameter):
            temperature.clamp_(*model.config.temperature_range)
    return Gates(parameters.gate_logits.sigmoid(), temperature)


@torch.no_grad()
def prompt_similarity(model: PromptModel, block: int, other: int | None = None) -> Tensor:
    """Cosines of the prompts of `block` with those of `other` (None: with one another): [P, P'].

    Prompts are compared as they enter the model, after projection and norm. Raises ValueError for a block that has no
    prompts of its own.
    """
    first = _own_prompts(model, block, "prompt_similarity")
    second = first if other is None else _own_prompts(model, other, "prompt_similarity")
    return similarities(first, second, 1)


@torch.no_grad()
def block_similarity(model: PromptModel) -> Tensor:
    """Mean of |cosine| over the pairs of prompts of two blocks: [S, S] for the S blocks that have their own.

    A prompt is not paired with itself, so that the diagonal is NaN where a block has one prompt.
    """
    checked_model(model, "block_similarity")
    S = getattr(model, "prompted", len(model.base.blocks))
    means = prompt_similarity(model, 0).new_empty(S, S)
    for i in range(S):
        for j in range(S):
            cosines = prompt_similarity(model, i, j).abs()
            means[i, j] = _without_diagonal(cosines).mean() if i == j else cosines.mean()
    return means


@torch.no_grad()
def centroid_distances(model: PromptModel) -> Tensor:
    """DA-VPT: cosine distances 1 - cos of the centroids of the class map, [P_g, P_g].

    Raises NotImplementedError for another method, ValueError before a map was fitted.
    """
    centroids = _fitted_centroids(model, "centroid_distances")
    return _distances(centroids, centroids)


def class_distances(model: PromptModel, loader: Loader) -> Tensor:
    """DA-VPT: cosine distances of the classes' mean features to the centroids of the class map, [classes, P_g].

    The features are those that the head reads, in eval mode, and pass through the configuration's `feature_norm`: what
    `update_class_map` clusters. Rows of classes without an image are NaN.

    Args:
        model: a DA-VPT model with a fitted map (`model.class_to_prompt`).
        loader: yields (images [B, C, h, w], labels [B]).

    Raises:
        NotImplementedError: the method is another.
        ValueError: no map was fitted, or `loader` yields nothing.
    """
    centroids = _fitted_centroids(model, "class_distances")
    wide = accumulation_dtype(centroids.dtype)
    sums = torch.zeros(model.base.num_classes, centroids.shape[1], device=centroids.device, dtype=wide)
    counts = sums.new_zeros(len(sums), 1)
    with evaluating(model):
        for images, labels in _batches(model, loader, "class_distances"):
            features = model.forward_head(model.forward_features(images), pre_logits=True)
            sums.index_add_(0, labels, features.to(wide))
            counts.index_add_(0, labels, torch.ones_like(counts[labels]))
        # 0/0 makes the rows of absent classes NaN.
        means = normalise(sums / counts, model.config.feature_norm)  # type: ignore[attr-defined]
        return _distances(means, centroids)


def proxy_distances(
    model: PromptModel, loader: Loader, block: int, feature: Literal["class", "patch"] = "class"
) -> Tensor:
    """DA-VPT: cosine distances of features to the proxies of a guided block, averaged by class, [classes, P_g].

    They are the distances that the metric loss shortens for a class and its prompt: features and proxies in the views
    that the configuration names. Rows of classes without an image are NaN.

    Args:
        model: a DA-VPT model.
        loader: yields (images [B, C, h, w], labels [B]).
        block: one of the configuration's `guided_blocks`.
        feature: "class", of the class token, or "patch", the mean of the patches.

    Raises:
        NotImplementedError: the method is another.
        ValueError: `block` is not guided, `feature` is another word, the model has no class token for "class", or
            `loader` yields nothing.
    """
    name = "proxy_distances"
    checked_davpt(model, name)
    base: Any = model.base
    index = checked_block(model, block, name)
    config: Any = model.config
    if not config.guided_blocks[0] <= index <= config.guided_blocks[1]:
        raise ValueError(f"`{name}`: `block` must lie in guided_blocks={config.guided_blocks}; got {block}")
    if feature not in ("class", "patch"):
        raise ValueError(f"`{name}`: `feature` must be 'class' or 'patch'; got {feature!r}")
    if feature == "class" and base.cls_token is None:
        raise ValueError(f"`{name}`: the model has no class token; pass feature='patch'")
    view = config.proxy_for_class if feature == "class" else config.proxy_for_patch
    with evaluating(model):
        proxies = block_view(base.blocks[index], _own_prompts(model, index, name), view)
        wide = accumulation_dtype(proxies.dtype)
        sums = proxies.new_zeros(base.num_classes, len(proxies), dtype=wide)
        counts = sums.new_zeros(len(sums), 1)
        for images, labels in _batches(model, loader, name):
            x = entering(model, images, index).x
            rows = x[:, 0] if feature == "class" else x[:, base.num_prefix_tokens :].mean(1)
            if feature == "class":
                rows = block_view(base.blocks[index], rows, config.class_feature)
            sums.index_add_(0, labels, _distances(rows, proxies).to(wide))
            counts.index_add_(0, labels, torch.ones_like(counts[labels]))
        return sums / counts  # 0/0 makes the rows of absent classes NaN


def prompts_and_tokens(model: PromptModel, loader: Loader, block: int) -> Embedding:
    """The prompts and the class tokens as they enter a block, where the block's attention meets them.

    A model without a class token gives the mean of its patches instead. Prompts that earlier blocks have changed differ
    from image to image, and are averaged over the images.

    Args:
        model: any method's, with prompts.
        loader: yields (images [B, C, h, w], labels [B]).
        block: the block; negative ones count from the end.

    Returns:
        Prompts [P, D], tokens [B, D] and labels [B] of all images of `loader`.

    Raises:
        ValueError: no such block, `loader` yields nothing, or block 0, where all images have the same class token.
    """
    name = "prompts_and_tokens"
    index = checked_block(model, block, name)
    base = model.base
    if index == 0 and base.cls_token is not None:
        raise ValueError(
            f"`{name}`: the class token has seen nothing of the image as it enters block 0; "
            f"choose one of 1..{len(base.blocks) - 1}"
        )
    tokens: list[Tensor] = []
    labels: list[Tensor] = []
    prompts: list[Tensor] = []
    with evaluating(model):
        for images, batch_labels in _batches(model, loader, name):
            rows = entering(model, images, index)
            prefix = base.num_prefix_tokens
            tokens.append(rows.x[:, prefix:].mean(1) if base.cls_token is None else rows.x[:, 0])
            labels.append(batch_labels)
            # Those of the block itself are the same for all images.
            prompts = [rows.prompts[None]] if rows.prompts.ndim == 2 else [*prompts, rows.prompts]
        return Embedding(torch.cat(prompts).mean(0), torch.cat(tokens), torch.cat(labels))


def tsne(
    model: PromptModel, loader: Loader, block: int, *, perplexity: float | None = None, seed: int = 0
) -> Embedding:
    """t-SNE of prompts and class tokens together, on the plane, by scikit-learn; see :func:`prompts_and_tokens`.

    Rows are scaled to length 1 first: the norm before attention removes lengths, and prompts are often much shorter.

    Args:
        model, loader, block: as for :func:`prompts_and_tokens`.
        perplexity: None for 30, or a third of the points where that is less.
        seed: decides the start.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: as :func:`prompts_and_tokens`, or a `perplexity` that is not below the number of points.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("`tsne` needs scikit-learn; install it with `pip install scikit-learn`.") from error
    prompts, tokens, labels = prompts_and_tokens(model, loader, block)
    points = F.normalize(torch.cat([prompts.to(tokens.dtype), tokens]).float(), dim=-1).cpu()
    if perplexity is None:
        perplexity = min(30.0, (len(points) - 1) / 3)
    if not 0 < perplexity < len(points):
        raise ValueError(
            f"`tsne`: `perplexity` must lie between 0 and the number of points, {len(points)}; got {perplexity}"
        )
    flat = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points.numpy())
    placed = torch.from_numpy(flat)
    return Embedding(placed[: len(prompts)], placed[len(prompts) :], labels.cpu())


def _fitted_centroids(model: PromptModel, caller: str) -> Tensor:
    checked_davpt(model, caller)
    centroids: Any = model.class_centroids
    if bool(centroids.isnan().any()):
        raise ValueError(
            f"`{caller}`: the class map has no centroids yet; call `model.fit_class_map(loader)` first"
        )
    return centroids


def checked_davpt(model: PromptModel, caller: str) -> None:
    """Raises NotImplementedError for a method that maps no classes to prompts."""
    checked_model(model, caller)
    if not isinstance(model, DAVPTModel):
        raise NotImplementedError(f"`{caller}`: {_name(model)} maps no classes to prompts; DA-VPT does")


def _own_prompts(model: PromptModel, block: int, caller: str) -> Tensor:
    """The prompts [P, D] of `block` itself; raises ValueError for a block that carries those of an earlier one on."""
    index = checked_block(model, block, caller)
    prompts = own_prompts(model, index)
    if prompts is None:
        last = sum(own_prompts(model, i) is not None for i in range(index)) - 1
        raise ValueError(
            f"`{caller}`: `block` must have prompts of its own; got {block}, and blocks after {last} carry on those of "
            f"block {last}; choose one of 0..{last}"
        )
    return prompts


def _batches(model: PromptModel, loader: Loader, caller: str) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches of `loader` on the model's device."""
    device, empty = next(model.parameters()).device, True
    for images, labels in loader:
        empty = False
        yield images.to(device), labels.to(device)
    if empty:
        raise ValueError(f"`{caller}`: `loader` holds no image; got 0; give it at least one batch")


def _distances(first: Tensor, second: Tensor) -> Tensor:
    return 1 - similarities(first, second, 1)


def _without_diagonal(square: Tensor) -> Tensor:
    return square[~torch.eye(len(square), dtype=torch.bool, device=square.device)]


def _name(model: PromptModel) -> str:
    return type(model).__name__.removesuffix("Model")
