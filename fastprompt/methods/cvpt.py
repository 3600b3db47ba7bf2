"""CVPT: every token attends to a block's prompts, by the block's own frozen attention weights.

Huang et al., "CVPT: Cross Visual Prompt Tuning", ICCV 2025. The prompts are the only new parameters: the four maps are
those of the block's self-attention. Prompts do not depend on the images, so they are folded into these maps once for
the whole batch if that is cheaper (:func:`fastprompt.ops.choose_form`). Under prompt dropout each image has its own
prompts, and the direct form runs. Without shortcuts all prompts are expanded to the batch, and the direct form runs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from fastprompt import backbone, blocks, vit
from fastprompt.backbone import Backbone, HeadInput
from fastprompt.blocks import Context, Cross, Recompute
from fastprompt.config import CVPTConfig, PromptConfig
from fastprompt.methods.base import OnBlock, PromptModel
from fastprompt.ops import FoldedPrompts, ProjectedPrompts, choose_form, fold_prompts, project_prompts
from fastprompt.refusals import class_path
from fastprompt.vit import TimmBlock


class CVPTModel(PromptModel):
    """A timm model with cross-attention to prompts in every block; see the module's text."""

    config_class: ClassVar[type[PromptConfig]] = CVPTConfig
    config: CVPTConfig

    @classmethod
    def check(cls, base: Backbone, config: CVPTConfig) -> None:
        for i, block in enumerate(backbone.blocks_of(base)):
            reason = _reason(block)
            if reason is not None:
                raise NotImplementedError(f"CVPT: blocks.{i}: {reason}")

    def add_prompts(self) -> None:
        like = next(self.base.parameters())
        shape = (self.config.num_prompts, self.base.embed_dim)
        self.prompts = nn.ParameterList(
            nn.Parameter(nn.init.xavier_uniform_(like.new_empty(shape))) for _ in self.base.blocks
        )

    def prepare(self, batch_size: int | None, reads: HeadInput) -> tuple[Cross, ...]:
        base, config = self.base, self.config
        dtype = next(base.parameters()).dtype
        dropped = config.dropout > 0 and self.training
        tokens = base.patch_embed.num_patches + base.num_prefix_tokens
        state = []
        for i, block in enumerate(backbone.blocks_of(base)):
            p = self.prompts[i].to(dtype)
            if batch_size is not None and (dropped or not self.shortcuts):
                p = F.dropout(p.expand(batch_size, -1, -1), config.dropout, training=dropped)
            last = i == len(base.blocks) - 1
            rows = reads.rows if last and reads.rows is not None and config.insert != 1 else tokens
            total = None if batch_size is None else batch_size * rows
            state.append(Cross(config.insert, _prepare(block, p, total, fold=self.shortcuts)))
        return tuple(state)

    @staticmethod
    def run(
        base: Backbone,
        state: tuple[Cross, ...],
        x: Tensor,
        ropes: list[Tensor | None],
        reads: HeadInput,
        on_block: OnBlock | None = None,
        depth: int | None = None,
        recompute: Recompute | None = None,
    ) -> tuple[Tensor, int]:
        recompute = blocks.recompute_of(base, recompute)
        last, normed = len(base.blocks) - 1, None
        base_blocks = backbone.blocks_of(base)[:depth]
        for i, block in enumerate(base_blocks):
            if on_block is not None:
                on_block(i, x, 0)
            following = base_blocks[i + 1] if i + 1 < len(base_blocks) else None
            context = Context(
                rope=ropes[i], cross=state[i], following=following, normed=normed, recompute=recompute
            )
            if i == last and reads.rows is not None:
                x = blocks.run_rows(block, x, None, context, reads.rows)
            else:
                x, normed = blocks.run_block(block, x, None, context, reads.spans if i == last else None)
        return x, 0


def _prepare(
    block: TimmBlock, prompts: Tensor, tokens: int | None, *, fold: bool
) -> FoldedPrompts | ProjectedPrompts:
    attn = blocks.attention_of(block)
    weights = vit.attention_adapter(attn).plain_weights(attn)
    H, D = attn.num_heads, weights.q_weight.shape[1]
    training = torch.is_grad_enabled() and prompts.requires_grad
    head_dim = weights.q_weight.shape[0] // H
    if fold and choose_form(tokens, prompts, D, H, head_dim, training=training) == "folded":
        return fold_prompts(prompts, weights, H, attn.scale)
    return project_prompts(prompts, weights, H)


def _reason(block: TimmBlock) -> str | None:
    """Return why the weights of this block's self-attention do not define a cross-attention, or None."""
    if isinstance(block, ResPostBlock):
        return (
            f"{class_path(block)} normalizes after its branches, so CVPT's insertion positions are undefined"
        )
    attn = blocks.attention_of(block)
    for name in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(attn, name), nn.Identity):
            return f"{class_path(attn)} has `{name}`, for which CVPT's cross-attention is not defined"
    if getattr(attn, "gate", None) is not None:
        return f"{class_path(attn)} has an output gate, for which CVPT's cross-attention is not defined"
    return None
