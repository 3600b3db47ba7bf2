"""CVPT: every token attends to a block's prompts, by the block's own frozen attention weights.

Huang et al., "CVPT: Cross Visual Prompt Tuning", ICCV 2025. Nothing but prompts is added: the four maps are read off
the block's self-attention. As prompts depend on no image they are folded through these maps once for the whole batch,
if that is cheaper (:func:`fastprompt.ops.choose_form`); under prompt dropout each image has its own prompts, and they
take the direct form. Without shortcuts all prompts are expanded to the batch and take it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import backbone, vit
from fastprompt.blocks import Context, Cross
from fastprompt.config import CVPTConfig
from fastprompt.methods.method import PromptMethod, Read, run_reading
from fastprompt.ops import choose_form, fold_prompts, project_prompts


class CVPT(PromptMethod):
    """Cross-attention to prompts in every block; see the module's text."""

    config_class = CVPTConfig

    def __init__(self, config: CVPTConfig, base: Any) -> None:
        self.config = config
        self.depth = len(base.blocks)
        for i, block in enumerate(base.blocks):
            reason = _reason(block)
            if reason is not None:
                raise NotImplementedError(f"CVPT: blocks.{i}: {reason}")

    def build(self, model: Any) -> None:
        like = next(model.base.parameters())
        shape = (self.config.num_prompts, model.base.embed_dim)
        model.prompts = nn.ParameterList(
            nn.Parameter(nn.init.xavier_uniform_(like.new_empty(shape))) for _ in range(self.depth)
        )

    def prepare(self, model: Any, batch_size: int | None, read: Read) -> tuple[Cross, ...]:
        base, config = model.base, self.config
        per_image = base.patch_embed.num_patches + base.num_prefix_tokens
        state = []
        for i, block in enumerate(base.blocks):
            p = model.prompts[i].to(next(base.parameters()).dtype)
            dropped = config.dropout > 0 and model.training
            if batch_size is not None and (dropped or not model.shortcuts):
                p = F.dropout(p.expand(batch_size, -1, -1), config.dropout, training=dropped)
            rows = read(0, 0).rows
            if i < self.depth - 1 or rows is None or config.insert == 1:
                rows = per_image
            tokens = None if batch_size is None else batch_size * rows
            state.append(Cross(config.insert, _prepare(block.attn, p, tokens, fold=model.shortcuts)))
        return tuple(state)

    def run(
        self,
        base: Any,
        state: tuple[Cross, ...],
        x: Tensor,
        ropes: list[Tensor | None],
        read: Read,
        on_block: Callable[[int, Tensor], None] | None = None,
        depth: int | None = None,
    ) -> tuple[Tensor, int]:
        if on_block is not None:
            on_block(-1, x)
        for i, block in enumerate(base.blocks[:depth]):
            reading = read(x.shape[1], 0) if i == self.depth - 1 else backbone.Reading()
            x = run_reading(base, block, x, reading, None, Context(rope=ropes[i], cross=state[i]))
            if on_block is not None:
                on_block(i, x)
        return x, 0


def _prepare(attn: Any, prompts: Tensor, tokens: int | None, *, fold: bool) -> Any:
    weights = vit.attention_adapter(attn).plain_weights(attn)
    H, D = attn.num_heads, weights.q_weight.shape[1]
    if fold and choose_form(tokens, prompts, D, H, weights.q_weight.shape[0] // H) == "folded":
        return fold_prompts(prompts, weights, H, attn.scale)
    return project_prompts(prompts, weights, H)


def _reason(block: Any) -> str | None:
    """Why the weights of this block's self-attention do not define a cross-attention, or None."""
    if type(vit.BLOCKS[type(block)]) is vit.ResPostBlockAdapter:
        return f"{vit.class_path(block)} norms after its branches, for which CVPT's insertion places are not defined"
    attn = block.attn
    for name in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(attn, name), nn.Identity):
            return f"{vit.class_path(attn)} has `{name}`, and CVPT's cross-attention is defined without"
    if getattr(attn, "gate", None) is not None:
        return f"{vit.class_path(attn)} has an output gate, and CVPT's cross-attention is defined without"
    return None
