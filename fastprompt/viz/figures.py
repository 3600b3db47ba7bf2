"""Figures of the results of :mod:`fastprompt.viz.attention` and :mod:`fastprompt.viz.prompts`.

Each is a `matplotlib.figure.Figure`, created without pyplot: nothing is shown, stored or configured globally.
`figure.savefig(...)` saves it, and a notebook shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprompt.model import PromptModel
from fastprompt.viz.attention import attention_to_prompts
from fastprompt.viz.prompts import (
    block_similarity,
    check_davpt,
    class_distances,
    gate_values,
    prompt_similarity,
    proxy_distances,
    tsne,
)
from fastprompt.viz.rows import Loader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072b2", "#d55e00"  # from the colour-blind-safe palette of Okabe and Ito
MOST_ATTENDED = 4
NUMBERED = 20  # number points and ticks only up to this many


def plot_gates(model: PromptModel) -> Figure:
    """GateVPT: draw the gate of each gated block and the softmax temperature of each block (:func:`gate_values`).

    Raises NotImplementedError for another method, ImportError without matplotlib.
    """
    gates, temperatures = gate_values(model)
    figure = _figure(4.2 if temperatures is None else 8.4, 3.0)
    left, *right = figure.subplots(1, 1 if temperatures is None else 2, squeeze=False)[0]
    left.bar(range(len(gates)), _numbers(gates), color=BLUE)
    left.set(title="gate", xlabel="block", ylim=(0, 1))
    for axis in right:
        axis.plot(_numbers(temperatures), color=ORANGE, marker="o")
        axis.axhline(1, color="#b8b8b8", lw=0.8, zorder=0)
        axis.set(title="softmax temperature", xlabel="block")
    for axis in (left, *right):
        axis.locator_params(axis="x", integer=True)
    return figure


def plot_attention(
    model: PromptModel,
    images: Tensor,
    *,
    block: int = -1,
    prompt: int | Sequence[int] | None = None,
    head: int | None = None,
) -> Figure:
    """Draw each patch's attention to prompts over the image (:func:`attention_to_prompts`).

    Each row shows an image and then one map for each prompt. All maps share one colour scale.

    Args:
        model: a model of any method, with prompts.
        images: [B, C, h, w], valid inputs of the model; three channels are drawn in colour, otherwise their mean.
        block: the block; negative ones count from the end.
        prompt: one prompt or several; None for the four (at most) that these images attend to most.
        head: one head, or None for the mean over heads.

    Raises:
        TypeError, ValueError: as :func:`attention_to_prompts`, or `prompt` or `head` is out of range.
        ImportError: matplotlib is missing.
    """
    weights = attention_to_prompts(model, images, block)
    B, H, N, P = weights.shape
    if head is not None and not -H <= head < H:
        raise ValueError(
            f"`plot_attention`: `head` must be in 0..{H - 1}, or be None for the mean; got {head}"
        )
    maps = weights.mean(1) if head is None else weights[:, head]
    maps = maps[:, model.base.num_prefix_tokens :]  # the patches
    chosen = _chosen_prompts(prompt, maps)
    height, width = model.base.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    maps = maps[..., chosen].mT.unflatten(-1, (height, width))  # [B, chosen, height, width]

    figure = _figure(1.5 * (1 + len(chosen)) + 1, 1.5 * B + 0.5)
    axes = figure.subplots(B, 1 + len(chosen), squeeze=False)
    low, high = float(maps.min()), float(maps.max())
    extent = (0, images.shape[-1], images.shape[-2], 0)
    for i, row in enumerate(axes):
        picture = _picture(images[i])
        row[0].imshow(picture, cmap="gray", extent=extent)
        for axis, weight in zip(row[1:], maps[i], strict=True):
            axis.imshow(picture, cmap="gray", extent=extent)
            drawn = axis.imshow(
                _numbers(weight), cmap="viridis", vmin=low, vmax=high, alpha=0.8, extent=extent
            )
    for axis, j in zip(axes[0, 1:], chosen, strict=True):
        axis.set_title(f"prompt {j}", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    depth = len(model.base.blocks)
    figure.suptitle(
        f"attention to prompts, block {block % depth}, {'mean of heads' if head is None else f'head {head}'}"
    )
    return figure


def plot_class_map(model: PromptModel, loader: Loader | None = None, *, block: int | None = None) -> Figure:
    """DA-VPT: draw the prompt of each class, and with `loader` the distance of each class to each prompt.

    Args:
        model: a DA-VPT model.
        loader: yields (images [B, C, h, w], labels [B]); the colours are then the cosine distances of
            :func:`class_distances`, or of :func:`proxy_distances` if `block` is given.
        block: a guided block.

    Raises:
        NotImplementedError: the model is of another method.
        ValueError: `block` without `loader`, or as in the function that computes the distances.
        ImportError: matplotlib is missing.
    """
    model = check_davpt(model, "plot_class_map")
    if block is not None and loader is None:
        raise ValueError(f"`plot_class_map`: block={block} needs images to compute distances; pass `loader`")
    C, P = len(model.class_to_prompt), model.proxies
    figure = _figure(min(2.5 + 0.35 * P, 12), min(1.5 + 0.3 * C, 12))
    axis = figure.subplots()
    title = "the prompt of each class"
    if loader is not None:
        distances = class_distances(model, loader) if block is None else proxy_distances(model, loader, block)
        title += "\nand distances to " + ("centroids" if block is None else f"proxies, block {block}")
        drawn = axis.imshow(_numbers(distances), cmap="viridis_r", aspect="auto")
        figure.colorbar(drawn, ax=axis, label="cosine distance")
    axis.plot(_numbers(model.class_to_prompt), range(C), ls="", marker="o", color=ORANGE, mec="white")
    axis.set(xlabel="prompt", ylabel="class", xlim=(-0.5, P - 0.5), ylim=(C - 0.5, -0.5))
    axis.set_title(title, fontsize=9)
    if P <= NUMBERED:
        axis.set_xticks(range(P))
    if C <= NUMBERED:
        axis.set_yticks(range(C))
    return figure


def plot_prompt_similarity(model: PromptModel, block: int = 0) -> Figure:
    """Draw the cosines of the prompts of one block, and the similarity of blocks (:func:`block_similarity`).

    A model with one set of prompts has no second panel.

    Raises ValueError for a block without its own prompts, ImportError without matplotlib.
    """
    cosines = prompt_similarity(model, block)
    across = block_similarity(model)
    panels = 1 if len(across) == 1 else 2
    figure = _figure(4.4 * panels, 3.8)
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    drawn = left.imshow(_numbers(cosines), cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(drawn, ax=left, shrink=0.8)
    left.set(xlabel="prompt", ylabel="prompt")
    left.set_title(f"cosine, block {block % len(model.base.blocks)}", fontsize=10)
    for axis in right:
        drawn = axis.imshow(_numbers(across), cmap="Reds", vmin=0)
        figure.colorbar(drawn, ax=axis, shrink=0.8)
        axis.set(xlabel="block", ylabel="block")
        axis.set_title("mean |cosine| of the prompts of two blocks", fontsize=10)
    for axis in (left, *right):
        axis.locator_params(integer=True)
    return figure


def plot_tsne(
    model: PromptModel, loader: Loader, block: int = -1, *, perplexity: float | None = None, seed: int = 0
) -> Figure:
    """Draw prompts among the class tokens of images on the plane; arguments as for :func:`tsne`.

    Raises as :func:`tsne`, and ImportError without matplotlib.
    """
    figure = _figure(5.6, 4.6)
    prompts, tokens, labels = tsne(model, loader, block, perplexity=perplexity, seed=seed)
    axis = figure.subplots()
    drawn = axis.scatter(
        *_numbers(tokens).T, c=_numbers(labels), s=10, cmap="tab10" if int(labels.max()) < 10 else "turbo"
    )
    axis.scatter(*_numbers(prompts).T, marker="*", s=120, color="black", edgecolor="white", label="prompts")
    if len(prompts) <= NUMBERED:
        for i, place in enumerate(_numbers(prompts)):
            axis.annotate(str(i), place, (5, 5), textcoords="offset points", fontsize=8)
    axis.legend(
        *_legend(drawn, axis, labels), fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
    )
    axis.set(xticks=[], yticks=[])
    what = "mean of patches" if model.base.cls_token is None else "class tokens"
    axis.set_title(
        f"t-SNE of prompts and {what} entering block {block % len(model.base.blocks)}", fontsize=10
    )
    return figure


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib; install it with `pip install matplotlib`.") from error
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    return figure


def _numbers(t: Any) -> Any:
    """Convert a tensor to an array for matplotlib, which does not support half precision."""
    t = t.detach().cpu()
    return (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).numpy()


def _chosen_prompts(prompt: int | Sequence[int] | None, maps: Tensor) -> list[int]:
    """Return the prompts of maps [B, N, P] to draw; for None those with the most attention, in order."""
    P = maps.shape[-1]
    if prompt is None:
        most = maps.mean((0, 1)).topk(min(MOST_ATTENDED, P)).indices
        return sorted(most.tolist())
    chosen = [prompt] if isinstance(prompt, int) else list(prompt)
    outside = [j for j in chosen if not 0 <= j < P]
    if outside or not chosen:
        raise ValueError(f"`plot_attention`: `prompt` must be in 0..{P - 1}; got {prompt}")
    return chosen


def _picture(image: Tensor) -> Any:
    """Image [C, h, w] on any scale -> [h, w, 3] or [h, w] in 0..1."""
    image = image.detach().float()
    low, high = image.min(), image.max()
    image = (image - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return _numbers(image.permute(1, 2, 0) if len(image) == 3 else image.mean(0))


def _legend(drawn: Any, axis: Any, labels: Tensor) -> tuple[list[Any], list[str]]:
    """Return the legend of the prompts and, if there are at most 20, the classes."""
    handles, names = axis.get_legend_handles_labels()
    if len(labels.unique()) <= NUMBERED:
        points, classes = drawn.legend_elements(num=None)
        handles, names = [*handles, *points], [*names, *(f"class {c}" for c in labels.unique().tolist())]
    return handles, names
