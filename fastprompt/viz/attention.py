"""How much each token of an image attends to each prompt of a block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastprompt import blocks, vit
from fastprompt.methods import CVPTModel
from fastprompt.model import PromptModel
from fastprompt.ops import project_prompts
from fastprompt.ops.operator import accumulation_dtype
from fastprompt.viz.rows import Entering, checked_block, entering, evaluating


def attention_to_prompts(model: PromptModel, images: Tensor, block: int) -> Tensor:
    """Attention weights of the image's rows on a block's prompts: images [B, C, h, w] -> [B, H, N, P].

    Runs the model as it is in eval mode up to `block` and writes out the softmax of that block alone: the numbers that
    attention over concatenated tokens and prompts would have. N counts the prefix tokens, then the patches, and no
    prompts. For VPT, GateVPT (temperature included) and DA-VPT a row sums to the part of its attention that goes to
    prompts; the rest goes to the image. CVPT attends to prompts apart, so that each row sums to 1.

    Args:
        model: any method's, with prompts.
        images: as the model takes them, on its device.
        block: the block; negative ones count from the end.

    Returns:
        float32 (float64 for a float64 model).

    Raises:
        TypeError, ValueError: no `PromptModel`, one without prompts, no such block, or `images` are not [B, C, h, w].
    """
    index = checked_block(model, block, "attention_to_prompts")
    if images.ndim != 4:
        raise ValueError(
            f"`attention_to_prompts`: `images` must be [B, C, h, w]; got {tuple(images.shape)}; "
            "give a single image a batch dimension"
        )
    with evaluating(model):
        rows = entering(model, images, index)
        if isinstance(model, CVPTModel):
            return _cross_weights(model, rows, index)
        return _self_weights(model, rows, index)


def _self_weights(model: PromptModel, rows: Entering, index: int) -> Tensor:
    """Weights of image rows on prompts that share a softmax with the image."""
    block: Any = model.base.blocks[index]
    adapter, attention = vit.adapters(block)
    q, k, _ = attention.qkv(block.attn, adapter.attention_input(block, rows.x), rows.rope)
    prompt_k = blocks.prepare_prompts(block, rows.prompts.to(q.dtype), folded=False).key
    keys = torch.cat([k, prompt_k.expand(len(k), -1, -1, -1)], dim=1)  # type: ignore[union-attr]
    temperatures: Any = getattr(model, "temperature", None)
    temperature = None if temperatures is None else temperatures[index]
    return _softmax(q, keys, block.attn.scale, temperature)[..., k.shape[1] :]


def _cross_weights(model: PromptModel, rows: Entering, index: int) -> Tensor:
    """Weights of CVPT's cross-attention, whose place in the block is the configuration's."""
    block: Any = model.base.blocks[index]
    adapter, attention = vit.adapters(block)
    x = rows.x
    insert = model.config.insert  # type: ignore[attr-defined]
    if insert in (3, 4):
        h = adapter.attention_input(block, x)
        out = vit.attend(block.attn, *attention.qkv(block.attn, h, rows.rope))
        x = adapter.add_attention(block, x, attention.finish(block.attn, out, h))
    elif insert == 5:
        x, _ = blocks.run_block(block, x, None, blocks.Context(rope=rows.rope))
    weights = attention.plain_weights(block.attn)
    H = block.attn.num_heads
    q = rearrange(F.linear(x, weights.q_weight, weights.q_bias), "B N (H d) -> B N H d", H=H)
    key = project_prompts(rows.prompts.to(x.dtype), weights, H).key
    return _softmax(q, key.expand(len(q), -1, -1, -1), block.attn.scale, None)


def _softmax(q: Tensor, k: Tensor, scale: float, temperature: Tensor | None) -> Tensor:
    """q [B, N, H, d], k [B, M, H, d] -> weights [B, H, N, M], in float32 or better."""
    with torch.autocast(q.device.type, enabled=False):
        wide = accumulation_dtype(q.dtype)
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) * scale
        return (scores if temperature is None else scores / temperature.to(wide)).softmax(-1)
