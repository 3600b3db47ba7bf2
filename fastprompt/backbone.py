"""timm models outside their blocks: from images to tokens, and from the last block to the head."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias, cast

import torch
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastprompt import frozen, vit
from fastprompt.blocks import Span, attention_of, select
from fastprompt.config import Pool
from fastprompt.ops.operator import autocast_enabled
from fastprompt.refusals import class_path, refusal
from fastprompt.vit import TimmBlock

MODELS = (VisionTransformer, VisionTransformerDistilled, Eva)
Backbone: TypeAlias = VisionTransformer | Eva


class HeadInput(NamedTuple):
    """Rows of the last block that the head reads: the first `rows`, the mean over `spans`, or (neither) every row."""

    rows: int | None = None
    spans: tuple[Span, ...] | None = None


def model_reason(model: nn.Module) -> str | None:
    """Return why prompts are not supported for `model`, or None."""
    if type(model) not in MODELS:
        return refusal(model, MODELS)
    blocks = blocks_of(cast(Backbone, model))
    if not blocks:
        return f"{class_path(model)}: it has no blocks"
    for i, block in enumerate(blocks):
        reason = vit.prompt_reason(block)
        if reason is not None:
            return f"blocks.{i}: {reason}"
    return None


def attention_dropout_reason(model: Backbone) -> str | None:
    """Return why the blocks of `model` cannot be in train mode, or None."""
    for i, block in enumerate(blocks_of(model)):
        probability = attention_of(block).attn_drop.p
        if probability > 0:
            return (
                f"blocks.{i}: attention dropout {probability} would be active with backbone_train_mode=True and is not "
                "supported; build the model with attn_drop_rate=0"
            )
    return None


def pool_reason(model: Backbone, pool: Pool) -> str | None:
    """Return why the head of `model` cannot read `pool`, or None; "backbone" always works."""
    if pool == "backbone":
        return None
    if isinstance(model, VisionTransformerDistilled):
        return "the distilled head reads the class and the distillation token, not a mean"
    if model.attn_pool is not None:
        return "the head pools by attention"
    if not model.global_pool:
        return "the head reads every token (global_pool='')"
    return None


def blocks_of(model: Backbone) -> list[TimmBlock]:
    """Return the blocks of `model`."""
    return cast("list[TimmBlock]", list(model.blocks))


def patch_size(model: Backbone) -> tuple[int, int]:
    """Return height and width of a patch in pixels."""
    size = model.patch_embed.patch_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def has_rope(model: Backbone) -> bool:
    """Return whether the model's attention rotates queries and keys."""
    return getattr(model, "rope", None) is not None


def head_modules(model: Backbone) -> list[nn.Module]:
    """Return the modules that are trained for a new task: the classifier (two for a distilled model)."""
    head = model.get_classifier()
    return list(head) if isinstance(head, tuple) else [head]


def check_images(model: Backbone, images: Tensor, caller: str) -> None:
    """Raise TypeError or ValueError, naming `caller`, unless the model takes `images`."""
    if not isinstance(images, Tensor):
        raise TypeError(f"`{caller}`: `images` must be a tensor [B, C, h, w]; got {type(images).__name__}")
    shape = tuple(images.shape)
    if images.ndim != 4:
        raise ValueError(
            f"`{caller}`: `images` must be [B, C, h, w]; got {shape}; "
            "add the batch dimension of a single image by `images.unsqueeze(0)`"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"`{caller}`: `images` must be floating point; got {images.dtype}; "
            "convert and normalise them as in the model's training (`images.float() / 255`, then mean and std)"
        )
    embed = model.patch_embed
    proj = embed.proj if isinstance(embed, PatchEmbed) else None
    weight = proj.weight if isinstance(proj, nn.Conv2d) else next(embed.parameters(), None)
    if type(weight) is nn.Parameter:  # not a sharded or wrapped one, which is converted when it is used
        if images.device != weight.device and weight.device.type != "meta":
            raise ValueError(
                f"`{caller}`: `images` are on {images.device} and the model on {weight.device}; "
                f"move them by `images.to({str(weight.device)!r})`"
            )
        if images.dtype != weight.dtype and not autocast_enabled(images):
            raise TypeError(
                f"`{caller}`: `images` are {images.dtype} and the model {weight.dtype}; "
                f"convert them by `images.to({weight.dtype})`, or run under `torch.autocast`"
            )
    if not isinstance(embed, PatchEmbed):
        return
    if isinstance(proj, nn.Conv2d) and shape[1] != proj.in_channels:
        raise ValueError(
            f"`{caller}`: `images` must have {proj.in_channels} channels, [B, C, h, w]; got {shape}; "
            f"move channels to dimension 1, or build the timm model with in_chans={shape[1]}"
        )
    height, width = shape[2:]
    if embed.img_size is None:
        return
    if embed.strict_img_size:
        if (height, width) != tuple(embed.img_size):
            raise ValueError(
                f"`{caller}`: `images` must be {embed.img_size[0]}x{embed.img_size[1]} pixels; got {height}x{width}; "
                f"resize them, or build the timm model with img_size=({height}, {width}) or dynamic_img_size=True"
            )
    elif not embed.dynamic_img_pad:
        rows, columns = patch_size(model)
        if height % rows or width % columns or not height or not width:
            raise ValueError(
                f"`{caller}`: height and width of `images` must be multiples of {rows} and {columns}, the patch size; "
                f"got {height}x{width}; resize them, or build the timm model with dynamic_img_pad=True"
            )


def check_labels(model: Backbone, images: Tensor, labels: Tensor, caller: str) -> None:
    """Raise TypeError or ValueError, naming `caller`, unless `labels` [B] are classes of `images`.

    Their range is checked on CPUs only; on a GPU the check would synchronize.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"`{caller}`: `labels` must be a tensor [B]; got {type(labels).__name__}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"`{caller}`: `labels` must be [B] = {tuple(images.shape[:1])}; got {tuple(labels.shape)}"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"`{caller}`: `labels` must be int64 or int32; got {labels.dtype}; convert them")
    if labels.device != images.device:
        raise ValueError(
            f"`{caller}`: `labels` are on {labels.device} and `images` on {images.device}; move them there"
        )
    head = head_modules(model)[0]
    if (
        labels.device.type == "cpu"
        and labels.numel() > 0
        and isinstance(head, nn.Linear)
        and not torch.compiler.is_compiling()
    ):
        low, high = (int(x) for x in labels.aminmax())
        if low < 0 or high >= head.out_features:
            raise ValueError(
                f"`{caller}`: `labels` must be in 0..{head.out_features - 1}, the model's classes; "
                f"got {low if low < 0 else high}; build the timm model with num_classes=..."
            )


def embed(model: Backbone, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """images [B, C, h, w] -> tokens [B, N, D], the input of block 0, and each block's rotary embedding or None."""
    depth = len(model.blocks)
    x = frozen.call(model.patch_embed, images)
    if not isinstance(model, Eva):
        return model.norm_pre(model.patch_drop(model._pos_embed(x))), [None] * depth
    x, rope = model._pos_embed(x)
    x = model.norm_pre(x)
    if rope is not None and getattr(model, "rope_mixed", False):
        return x, list(rope.unbind(0))
    return x, [rope] * depth


def head_input(model: Backbone, pool: Pool, carried: int) -> HeadInput:
    """Return the rows of the last block that the head reads; `carried` prompts follow the prefix tokens."""
    normed_after = isinstance(model.norm, nn.Identity)  # else the norm before the mean needs every row
    if pool != "backbone":
        return HeadInput(spans=_pool_spans(model, pool, carried)) if normed_after else HeadInput()
    if isinstance(model, VisionTransformerDistilled):
        return HeadInput(rows=2)
    if model.attn_pool is not None:
        return HeadInput()
    if model.global_pool == "token":
        return HeadInput(rows=1)
    if model.global_pool != "avg" or not normed_after:
        return HeadInput()
    if not getattr(model, "pool_include_prefix", False):
        return HeadInput(spans=_pool_spans(model, "image", carried))
    return HeadInput(spans=((0, None),) if carried == 0 else _without(model, carried))


def apply_head(
    model: Backbone, x: Tensor, reads: HeadInput, pool: Pool, carried: int
) -> tuple[Tensor, Tensor]:
    """Run final norm, pooling and classifier on x, the output of the last block for `reads`.

    Returns:
        The input of the classifier [B, D], and the logits [B, classes].
    """
    if reads.spans is not None:
        features = pooled_features(model, x)
    elif pool == "backbone":
        x = model.norm(x if reads.rows is not None else strip(model, x, carried))
        features = model.forward_head(x, pre_logits=True)
        if isinstance(model, VisionTransformerDistilled):
            return features, model.forward_head(x)
    else:
        features = pooled_features(model, mean_of(model, model.norm(x), pool, carried))
    return features, model.head(features)


def pooled_features(model: Backbone, pooled: Tensor) -> Tensor:
    """Pooled rows [B, D] -> the input of the classifier [B, D]."""
    return model.head_drop(model.fc_norm(pooled))


def mean_of(model: Backbone, x: Tensor, pool: Pool, carried: int) -> Tensor:
    """x [B, N + carried, D] -> the mean [B, D] over the rows of `pool` ("all", "image" or "prompt")."""
    return select(x, _pool_spans(model, pool, carried)).mean(1)


def strip(model: Backbone, x: Tensor, carried: int) -> Tensor:
    """Remove the prompts after the prefix tokens from rows [B, N + carried, D]."""
    return x if carried == 0 else select(x, _without(model, carried))


def _without(model: Backbone, carried: int) -> tuple[Span, ...]:
    return ((0, model.num_prefix_tokens), (model.num_prefix_tokens + carried, None))


def _pool_spans(model: Backbone, pool: Pool, carried: int) -> tuple[Span, ...]:
    start = model.num_prefix_tokens
    if pool == "all":
        return ((start, None),)
    return ((start + carried, None),) if pool == "image" else ((start, start + carried),)
