"""Gates, class maps and similarities of prompts, and their positions among the image's tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import backbone
from fastprompt.methods import DAVPTModel, GateVPTModel
from fastprompt.methods.class_map import normalise
from fastprompt.methods.da_vpt import block_view
from fastprompt.methods.proxy_loss import similarities
from fastprompt.model import PromptModel
from fastprompt.ops.operator import accumulation_dtype
from fastprompt.viz.rows import (
    Loader,
    batches,
    check_model,
    checked_block,
    entering,
    evaluating,
    own_prompts,
    prompted_blocks,
)


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
    """Return the gates and softmax temperatures that the next forward of a GateVPT model uses.

    Raises NotImplementedError for another method.
    """
    check_model(model, "gate_values")
    if not isinstance(model, GateVPTModel):
        raise NotImplementedError(f"`gate_values`: {_method(model)} has no gates; only GateVPT has")
    temperature = model.temperature
    if isinstance(temperature, nn.Parameter):
        temperature = temperature.clamp(*model.config.temperature_range)
    return Gates(model.gate_logits.sigmoid(), temperature)


@torch.no_grad()
def prompt_similarity(model: PromptModel, block: int, other: int | None = None) -> Tensor:
    """Return the cosines of the prompts of `block` and those of `other` (None: of `block` too), [P, P'].

    Prompts are compared as they enter the model, after projection and norm. Raises ValueError for a block without its
    own prompts.
    """
    first = _own_prompts(model, block, "prompt_similarity")
    second = first if other is None else _own_prompts(model, other, "prompt_similarity")
    return similarities(first, second, 1)


@torch.no_grad()
def block_similarity(model: PromptModel) -> Tensor:
    """Return the mean of |cosine| over the pairs of prompts of two blocks, [S, S] for S blocks with their own prompts.

    A prompt is not paired with itself, so the diagonal is NaN for a block of one prompt.
    """
    check_model(model, "block_similarity")
    S = prompted_blocks(model)
    means = prompt_similarity(model, 0).new_empty(S, S)
    for i in range(S):
        for j in range(S):
            cosines = prompt_similarity(model, i, j).abs()
            if i == j:
                cosines = cosines[~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)]
            means[i, j] = cosines.mean()
    return means


@torch.no_grad()
def centroid_distances(model: PromptModel) -> Tensor:
    """DA-VPT: return the cosine distances 1 - cos between the centroids of the class map, [P_g, P_g].

    Raises NotImplementedError for another method, ValueError before a map is fitted.
    """
    centroids = _fitted(model, "centroid_distances").class_centroids
    return _distances(centroids, centroids)


def class_distances(model: PromptModel, loader: Loader) -> Tensor:
    """DA-VPT: return the cosine distances of the classes' mean features to the map's centroids, [classes, P_g].

    The features are those that `update_class_map` clusters: the input of the classifier, in eval mode, after the
    configuration's `feature_norm`. Rows of classes without an image are NaN.

    Args:
        model: a DA-VPT model with a fitted map (`model.class_to_prompt`).
        loader: yields (images [B, C, h, w], labels [B]).

    Raises:
        NotImplementedError: the method is another.
        ValueError, TypeError: no map is fitted, `loader` is empty, or the model does not take its images or labels.
    """
    name = "class_distances"
    model = _fitted(model, name)
    with evaluating(model):
        features = (
            (model.forward_head(model.forward_features(images), pre_logits=True), labels)
            for images, labels in batches(model, loader, name)
        )
        centroids = model.class_centroids
        means = _class_means(features, model.base.num_classes, centroids.shape[1], centroids)
        return _distances(normalise(means, model.config.feature_norm), centroids)


def proxy_distances(
    model: PromptModel, loader: Loader, block: int, feature: Literal["class", "patch"] = "class"
) -> Tensor:
    """DA-VPT: return the cosine distances of features to the proxies of a guided block, averaged by class.

    The result is [classes, P_g]. The metric loss reduces the distance of a class to its prompt. Features and proxies
    have the forms selected by the configuration. Rows of classes without an image are NaN.

    Args:
        model: a DA-VPT model.
        loader: yields (images [B, C, h, w], labels [B]).
        block: one of the configuration's `guided_blocks`.
        feature: "class", of the class token, or "patch", the mean of the patches.

    Raises:
        NotImplementedError: the method is another.
        ValueError, TypeError: `block` is not guided, `feature` is unknown, the model has no class token for "class",
            `loader` is empty, or the model does not take its images or labels.
    """
    name = "proxy_distances"
    model = check_davpt(model, name)
    base, config = model.base, model.config
    index = checked_block(model, block, name)
    if index not in model.guided:
        raise ValueError(f"`{name}`: `block` must be in guided_blocks={config.guided_blocks}; got {block}")
    if feature not in ("class", "patch"):
        raise ValueError(f"`{name}`: `feature` must be 'class' or 'patch'; got {feature!r}")
    if feature == "class" and base.cls_token is None:
        raise ValueError(f"`{name}`: the model has no class token; pass feature='patch'")
    timm_block = backbone.blocks_of(base)[index]
    view = config.proxy_for_class if feature == "class" else config.proxy_for_patch

    def features_of(images: Tensor) -> Tensor:
        x = entering(model, images, index).x
        if feature == "patch":
            return x[:, base.num_prefix_tokens :].mean(1)
        return block_view(timm_block, x[:, 0], config.class_feature)

    with evaluating(model):
        proxies = block_view(timm_block, _own_prompts(model, index, name), view)
        distances = (
            (_distances(features_of(images), proxies), labels)
            for images, labels in batches(model, loader, name)
        )
        return _class_means(distances, base.num_classes, len(proxies), proxies)


def prompts_and_tokens(model: PromptModel, loader: Loader, block: int) -> Embedding:
    """Return the prompts and the class tokens in the input of a block's attention.

    For a model without a class token, the mean of the patches is used instead. Prompts that earlier blocks have changed
    differ between images and are averaged over them.

    Args:
        model: a model of any method, with prompts.
        loader: yields (images [B, C, h, w], labels [B]).
        block: the block; negative ones count from the end.

    Returns:
        Prompts [P, D], tokens [B, D] and labels [B] of all images of `loader`.

    Raises:
        ValueError, TypeError: no such block; block 0 of a model with a class token, which is the same for all images;
            `loader` is empty, or the model does not take its images or labels.
    """
    name = "prompts_and_tokens"
    index = checked_block(model, block, name)
    base = model.base
    if index == 0 and base.cls_token is not None:
        raise ValueError(
            f"`{name}`: the class token that enters block 0 is the same for all images; "
            f"choose one of 1..{len(base.blocks) - 1}"
        )
    tokens: list[Tensor] = []
    labels: list[Tensor] = []
    prompts: list[Tensor] = []
    with evaluating(model):
        for images, batch_labels in batches(model, loader, name):
            rows = entering(model, images, index)
            prefix = base.num_prefix_tokens
            tokens.append(rows.x[:, prefix:].mean(1) if base.cls_token is None else rows.x[:, 0])
            labels.append(batch_labels)
            # The block's own prompts are the same for all images.
            prompts = [rows.prompts[None]] if rows.prompts.ndim == 2 else [*prompts, rows.prompts]
        return Embedding(torch.cat(prompts).mean(0), torch.cat(tokens), torch.cat(labels))


def tsne(
    model: PromptModel, loader: Loader, block: int, *, perplexity: float | None = None, seed: int = 0
) -> Embedding:
    """Map prompts and class tokens to the plane with scikit-learn's t-SNE; see :func:`prompts_and_tokens`.

    Rows are scaled to length 1 first: the norm before attention removes lengths, and prompts are often much shorter.

    Args:
        model, loader, block: as for :func:`prompts_and_tokens`.
        perplexity: None for 30, or a third of the points if that is less.
        seed: determines the initial positions.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError, TypeError: as :func:`prompts_and_tokens`, or `perplexity` is not below the number of points.
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
            f"`tsne`: `perplexity` must be between 0 and the number of points, {len(points)}; got {perplexity}"
        )
    flat = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points.numpy())
    placed = torch.from_numpy(flat)
    return Embedding(placed[: len(prompts)], placed[len(prompts) :], labels.cpu())


def check_davpt(model: PromptModel, caller: str) -> DAVPTModel:
    """Return `model` if it maps classes to prompts; raise NotImplementedError otherwise."""
    check_model(model, caller)
    if not isinstance(model, DAVPTModel):
        raise NotImplementedError(
            f"`{caller}`: {_method(model)} does not map classes to prompts; only DA-VPT does"
        )
    return model


def _fitted(model: PromptModel, caller: str) -> DAVPTModel:
    model = check_davpt(model, caller)
    if bool(model.class_centroids.isnan().any()):
        raise ValueError(
            f"`{caller}`: the class map has no centroids yet; call `model.fit_class_map(loader)` first"
        )
    return model


def _own_prompts(model: PromptModel, block: int, caller: str) -> Tensor:
    """Return the prompts [P, D] of `block`; raise ValueError if it carries those of an earlier block on."""
    prompts = own_prompts(model, checked_block(model, block, caller))
    if prompts is None:
        last = prompted_blocks(model) - 1
        raise ValueError(
            f"`{caller}`: `block` must have its own prompts; got {block}, but blocks after {last} carry on those of "
            f"block {last}; choose one of 0..{last}"
        )
    return prompts


def _class_means(rows: Iterable[tuple[Tensor, Tensor]], classes: int, width: int, like: Tensor) -> Tensor:
    """Batches of rows [B, width] with labels [B] -> the mean of each class [classes, width], NaN without a row."""
    sums = like.new_zeros(classes, width, dtype=accumulation_dtype(like.dtype))
    counts = sums.new_zeros(classes, 1)
    for values, labels in rows:
        sums.index_add_(0, labels, values.to(sums.dtype))
        counts.index_add_(0, labels, torch.ones_like(counts[labels]))
    return sums / counts


def _distances(first: Tensor, second: Tensor) -> Tensor:
    return 1 - similarities(first, second, 1)


def _method(model: PromptModel) -> str:
    return type(model).__name__.removesuffix("Model")
