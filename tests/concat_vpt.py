"""The concatenating implementation of VPT: prompts are rows of the sequence in every block, as in the papers' code.

The oracle of the tests and the baseline of the benchmarks: timm's own blocks with SDPA, nothing from fastprompt, and
every row through every block.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class ConcatVPT(nn.Module):
    """VPT by concatenation.

    Args:
        base: a timm `VisionTransformer`, `VisionTransformerDistilled` or `Eva`; copied, frozen but for its head.
        prompts: one [P, D] for each prompted block: L for deep, k for partial deep, 1 for shallow.
        pool: "backbone", "all", "image" or "prompt".
        masks: optional, one [B, P, D] factor for each prompted block (a dropout mask with its scale).
    """

    def __init__(
        self,
        base: nn.Module,
        prompts: list[Tensor],
        pool: str = "backbone",
        masks: list[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.base: Any = copy.deepcopy(base).requires_grad_(False)
        heads = self.base.get_classifier()
        for head in heads if isinstance(heads, tuple) else (heads,):
            head.requires_grad_(True)
        self.prompts = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in prompts)
        self.pool, self.masks = pool, masks
        self.P = prompts[0].shape[0]
        for block in self.base.blocks:
            if hasattr(block.attn, "num_prefix_tokens"):
                block.attn.num_prefix_tokens += self.P  # rotary embedding skips the prompts

    def tokens(self, images: Tensor) -> list[Tensor]:
        """The tokens [B, prefix + P + patches, D] after each block."""
        base, B = self.base, images.shape[0]
        prefix = base.num_prefix_tokens
        x = base._pos_embed(base.patch_embed(images))
        x, rope = x if isinstance(x, tuple) else (x, None)
        x = base.norm_pre(x)
        states = []
        for i, block in enumerate(base.blocks):
            if i < len(self.prompts):
                p = self.prompts[i].expand(B, -1, -1)
                if self.masks is not None:
                    p = p * self.masks[i]
                old = self.P if i > 0 else 0
                x = torch.cat([x[:, :prefix], p, x[:, prefix + old :]], dim=1)
            if rope is None:
                x = block(x)
            else:
                x = block(x, rope=rope[i] if getattr(base, "rope_mixed", False) else rope)
            states.append(x)
        return states

    def forward(self, images: Tensor) -> Tensor:
        base, prefix, P = self.base, self.base.num_prefix_tokens, self.P
        x = base.norm(self.tokens(images)[-1])
        if self.pool == "backbone":
            return base.forward_head(torch.cat([x[:, :prefix], x[:, prefix + P :]], dim=1))
        rows = {
            "all": x[:, prefix:],
            "image": x[:, prefix + P :],
            "prompt": x[:, prefix : prefix + P],
        }[self.pool]
        return base.head(base.head_drop(base.fc_norm(rows.mean(1))))
