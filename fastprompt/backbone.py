"""What is read off a timm model around its blocks: how images become tokens, and which rows the head reads."""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastprompt import vit
from fastprompt.blocks import Span, select
from fastprompt.refusals import refusal

MODELS = (VisionTransformer, VisionTransformerDistilled, Eva)
POOLS = ("backbone", "all", "image", "prompt")


class Reading(NamedTuple):
    """The rows of the last block that the head reads: the first `rows`, the mean over `spans`, or (neither) all."""

    rows: int | None = None
    spans: tuple[Span, ...] | None = None


def model_reason(model: Any) -> str | None:
    """Why `model` cannot be prompted, or None."""
    if type(model) not in MODELS:
        return refusal(model, MODELS)
    if not model.blocks:
        return f"{vit.class_path(model)}: it has no blocks"
    for i, block in enumerate(model.blocks):
        reason = vit.prompt_reason(block)
        if reason is not None:
            return f"blocks.{i}: {reason}"
    return None


def pool_reason(model: Any, pool: str) -> str | None:
    """Why the head of `model` cannot read what `pool` names, or None; "backbone" always works."""
    if pool == "backbone":
        return None
    if isinstance(model, VisionTransformerDistilled):
        return "the distilled head reads the class and the distillation token, not a mean"
    if model.attn_pool is not None:
        return "the head pools by attention over the backbone's tokens"
    if not model.global_pool:
        return "the head reads every token (global_pool='')"
    return None


def patch_size(model: Any) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    size = model.patch_embed.patch_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def embed(model: Any, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """images [B, C, h, w] -> tokens [B, N, D] as they enter block 0, and each block's rotary embedding or None."""
    x = model.patch_embed(images)
    if type(model) is not Eva:
        x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
        return x, [None] * len(model.blocks)
    x, rope = model._pos_embed(x)
    x = model.norm_pre(x)
    if rope is not None and getattr(model, "rope_mixed", False):
        return x, list(rope.unbind(0))
    return x, [rope] * len(model.blocks)


def has_rope(model: Any) -> bool:
    """Whether the model's attention rotates queries and keys."""
    return getattr(model, "rope", None) is not None


def head_modules(model: Any) -> list[nn.Module]:
    """The modules that train with a new task: the classifier (two for a distilled model)."""
    head = model.get_classifier()
    return list(head) if isinstance(head, tuple) else [head]


def read_backbone(model: Any, tokens: int, carried: int) -> Reading:
    """What the model's own head reads of the last block, whose `tokens` rows include the `carried` prompts."""
    if isinstance(model, VisionTransformerDistilled):
        return Reading(rows=2)
    if model.attn_pool is not None:
        return Reading()
    if model.global_pool == "token":
        return Reading(rows=1)
    if model.global_pool == "avg" and isinstance(model.norm, nn.Identity):
        prefix = model.num_prefix_tokens
        patches = (prefix + carried, tokens)
        if not getattr(model, "pool_include_prefix", False):
            return Reading(spans=(patches,))
        return Reading(spans=((0, tokens),) if carried == 0 else ((0, prefix), patches))
    return Reading()


def pool_spans(model: Any, pool: str, tokens: int, carried: int) -> tuple[Span, ...]:
    """The rows that `pool` ("all", "image" or "prompt") averages, prompts standing after the prefix tokens."""
    prefix = model.num_prefix_tokens
    return {
        "all": ((prefix, tokens),),
        "image": ((prefix + carried, tokens),),
        "prompt": ((prefix, prefix + carried),),
    }[pool]


def classify(model: Any, pooled: Tensor, pre_logits: bool = False) -> Tensor:
    """Pooled features [B, D] -> logits: the model's head after its pooling."""
    x = model.head_drop(model.fc_norm(pooled))
    return x if pre_logits else model.head(x)


def mean_of(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """x [B, N, D] -> the mean [B, D] over the rows of `spans`."""
    return select(x, spans).mean(1)
