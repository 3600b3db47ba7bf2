"""Attention of an image's tokens to the prompts of a block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastprompt import backbone, blocks, vit
from fastprompt.methods import CVPTModel, GateVPTModel
from fastprompt.model import PromptModel
from fastprompt.ops import project_prompts
from fastprompt.ops.operator import accumulation_dtype
from fastprompt.vit import TimmBlock
from fastprompt.viz.rows import Entering, checked_block, entering, evaluating


def attention_to_prompts(model: PromptModel, images: Tensor, block: int) -> Tensor:
    """Return the attention of the image's rows to a block's prompts: images [B, C, h, w] -> weights [B, H, N, P].

    Runs the model in eval mode up to `block` and computes the softmax of that block alone: the weights of attention
    over concatenated tokens and prompts. N counts prefix tokens and patches, not prompts. For VPT, GateVPT (temperature
    included) and DA-VPT a row sums to less than 1, because the rest of its attention goes to the image. CVPT attends to
    prompts separately, so each row sums to 1.

    Args:
        model: a model of any method, with prompts.
        images: valid inputs of the model, on its device.
        block: the block; negative ones count from the end.

    Returns:
        The weights in float32 (float64 for a float64 model).

    Raises:
        TypeError, ValueError: `model` is not a `PromptModel` or has no prompts, there is no such block, or the model
            does not take these images.
    """
    index = checked_block(model, block, "attention_to_prompts")
    backbone.check_images(model.base, images, "attention_to_prompts")
    with evaluating(model):
        rows = entering(model, images, index)
        timm_block = backbone.blocks_of(model.base)[index]
        if isinstance(model, CVPTModel):
            return _cross_weights(timm_block, rows, model.config.insert)
        temperature = None
        if isinstance(model, GateVPTModel) and model.temperature is not None:
            temperature = model.temperature[index]
        return _self_weights(timm_block, rows, temperature)


def _self_weights(block: TimmBlock, rows: Entering, temperature: Tensor | None) -> Tensor:
    """Return the weights of prompts that share a softmax with the image."""
    adapter, attention = vit.adapters(block)
    attn = blocks.attention_of(block)
    q, k, _ = attention.qkv(attn, adapter.attention_input(block, rows.x), rows.rope)
    prompt_input = adapter.attention_input(block, rows.prompts.to(q.dtype))
    prompt_k, _ = attention.keys_values(attn, prompt_input)
    keys = torch.cat([k, prompt_k.expand(len(k), -1, -1, -1)], dim=1)
    return _softmax(q, keys, attn.scale, temperature)[..., k.shape[1] :]


def _cross_weights(block: TimmBlock, rows: Entering, insert: int) -> Tensor:
    """Return the weights of CVPT's cross-attention, at position `insert` of the block."""
    adapter, attention = vit.adapters(block)
    attn, x = blocks.attention_of(block), rows.x
    if insert in (3, 4):
        h = adapter.attention_input(block, x)
        out = vit.attend(attn, *attention.qkv(attn, h, rows.rope))
        x = adapter.add_attention(block, x, attention.finish(attn, out, h))
    elif insert == 5:
        x, _ = blocks.run_block(block, x, None, blocks.Context(rope=rows.rope))
    weights, H = attention.plain_weights(attn), attn.num_heads
    q = rearrange(F.linear(x, weights.q_weight, weights.q_bias), "B N (H d) -> B N H d", H=H)
    key = project_prompts(rows.prompts.to(x.dtype), weights, H).key
    return _softmax(q, key.expand(len(q), -1, -1, -1), attn.scale, None)


def _softmax(q: Tensor, k: Tensor, scale: float, temperature: Tensor | None) -> Tensor:
    """q [B, N, H, d], k [B, M, H, d] -> weights [B, H, N, M], in float32 or better."""
    with torch.autocast(q.device.type, enabled=False):
        wide = accumulation_dtype(q.dtype)
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) * scale
        return (scores if temperature is None else scores / temperature.to(wide)).softmax(-1)
