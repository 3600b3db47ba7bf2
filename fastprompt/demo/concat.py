"""VPT as one writes it on timm today: prompts concatenated to the tokens, timm's own blocks. The demo's yardstick."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.config import VPTConfig
from fastprompt.model import PromptModel


class ConcatVPT(nn.Module):
    """VPT (Jia et al., ECCV 2022) on a timm `VisionTransformer`: `torch.cat` after the prefix tokens, then every block.

    `base` is frozen except for its head; `prompts` holds one [P, D] per prompted block: the first enters before
    block 0, each later one replaces the prompt rows before its block.
    """

    def __init__(self, base: nn.Module, prompts: list[Tensor]) -> None:
        super().__init__()
        self.base: Any = base.requires_grad_(False)
        self.base.head.requires_grad_(True)
        self.prompts = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in prompts])

    @classmethod
    def twin(cls, model: PromptModel) -> "ConcatVPT":
        """The same function as `model`, on copies of its weights. Raises NotImplementedError for another method."""
        config = model.config
        if not isinstance(config, VPTConfig) or config.dropout or config.project or config.pool != "backbone":
            raise NotImplementedError(
                f"`ConcatVPT.twin`: needs VPT without dropout and projection and with pool='backbone'; got {config}."
            )
        return cls(copy.deepcopy(model.base), list(model.prompts))

    def train(self, mode: bool = True) -> "ConcatVPT":
        """As `PromptModel`: the frozen backbone stays in eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, height, width] -> logits [B, classes]."""
        base = self.base
        x = base.norm_pre(base.patch_drop(base._pos_embed(base.patch_embed(images))))
        prefix, count = base.num_prefix_tokens, self.prompts[0].shape[0]
        for i, block in enumerate(base.blocks):
            if i < len(self.prompts):
                old = 0 if i == 0 else count
                rows = self.prompts[i].expand(len(x), -1, -1)
                x = torch.cat([x[:, :prefix], rows, x[:, prefix + old :]], dim=1)
            x = block(x)
        x = torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)
        return base.forward_head(base.norm(x))
