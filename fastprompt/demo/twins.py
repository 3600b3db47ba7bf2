"""The methods as one writes them on timm today, in their papers' form: the demo's yardstick.

Prompts are rows of the sequence in every block that has them, cut out and replaced before the next one; CVPT attends to
prompts that are expanded to the batch. timm's modules and PyTorch's SDPA do the work; of fastprompt there is nothing
but the formula of DA-VPT's loss.
"""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.config import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, VPTConfig
from fastprompt.methods.proxy_loss import proxy_loss, similarities
from fastprompt.model import PromptModel


class VPTTwin(nn.Module):
    """VPT (Jia et al., ECCV 2022): `torch.cat` after the prefix tokens, then timm's block, for every prompted block."""

    def __init__(self, model: PromptModel) -> None:
        super().__init__()
        own: Any = copy.deepcopy(model)
        self.config: Any = own.config
        self.base, self.prompts = own.base, own.prompts

    def train(self, mode: bool = True) -> "VPTTwin":
        """As `PromptModel`: the frozen backbone stays in eval mode unless the configuration says otherwise."""
        super().train(mode)
        self.base.train(mode and self.config.backbone_train_mode)
        return self

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """images [B, C, height, width], labels [B] -> logits [B, classes] and the method's own loss, if it has one."""
        base = self.base
        x = base.norm_pre(base.patch_drop(base._pos_embed(base.patch_embed(images))))
        x, loss = self.blocks(x, labels)
        return base.forward_head(base.norm(x)), loss

    def blocks(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, N, D] through all blocks, and the sum of the blocks' losses."""
        prefix, carried = self.base.num_prefix_tokens, 0
        losses = []
        for i, block in enumerate(self.base.blocks):
            if i < len(self.prompts):
                rows = self.rows(i, len(x))
                x = torch.cat([x[:, :prefix], rows, x[:, prefix + carried :]], dim=1)
                carried = rows.shape[1]
            losses += self.losses(i, x, carried, labels)
            x = self.block(i, block, x, carried)
        x = torch.cat([x[:, :prefix], x[:, prefix + carried :]], dim=1)
        return x, torch.stack(losses).sum() if losses else None

    def rows(self, i: int, batch: int) -> Tensor:
        """The prompts of block i for each image, [B, P, D]; dropped values differ from image to image."""
        return F.dropout(self.prompts[i].expand(batch, -1, -1), self.config.dropout, self.training)

    def block(self, i: int, block: Any, x: Tensor, carried: int) -> Tensor:
        return cast(Tensor, block(x))

    def losses(self, i: int, x: Tensor, carried: int, labels: Tensor) -> list[Tensor]:
        """What block i adds to the loss, given its input [B, N + carried, D]."""
        return []


class GateVPTTwin(VPTTwin):
    """GateVPT (Yoo et al., ICML 2023): prompt rows blended with those that entered, a temperature for each block."""

    def __init__(self, model: PromptModel) -> None:
        super().__init__(model)
        self.gate_logits = nn.Parameter(cast(Tensor, model.gate_logits).detach().clone())
        self.temperature = nn.Parameter(cast(Tensor, model.temperature).detach().clone())

    def block(self, i: int, block: Any, x: Tensor, carried: int) -> Tensor:
        self.temperature.data[i].clamp_(*self.config.temperature_range)
        prefix = self.base.num_prefix_tokens
        prompts = slice(prefix, prefix + carried)
        out = x + block.ls1(self._attention(block.attn, block.norm1(x), self.temperature[i]))
        out = out + block.ls2(block.mlp(block.norm2(out)))
        if i >= len(self.gate_logits):
            return out
        gate = self.gate_logits[i].sigmoid()
        blended = gate * out[:, prompts] + (1 - gate) * x[:, prompts]
        return torch.cat([out[:, :prefix], blended, out[:, prompts.stop :]], dim=1)

    @staticmethod
    def _attention(attn: Any, h: Tensor, temperature: Tensor) -> Tensor:
        q, k, v = attn.qkv(h).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q / temperature, k, v)
        return cast(Tensor, attn.proj(out.transpose(1, 2).flatten(2)))


class DAVPTTwin(VPTTwin):
    """DA-VPT (Ren et al., CVPR 2025): VPT-Deep, and a metric loss at the input of each guided block."""

    def __init__(self, model: PromptModel) -> None:
        super().__init__(model)
        self.register_buffer("class_to_prompt", cast(Tensor, model.class_to_prompt).clone())

    def losses(self, i: int, x: Tensor, carried: int, labels: Tensor) -> list[Tensor]:
        config, block = self.config, self.base.blocks[i]
        first, last = config.guided_blocks
        if not first <= i <= last:
            return []
        patches = x[:, self.base.num_prefix_tokens + carried :].mean(1)
        query = block.attn.qkv(block.norm1(x[:, 0])).chunk(3, dim=-1)[0]
        found = []
        for weight, feature in ((config.patch_weight, patches), (config.class_weight, query)):
            sims = similarities(feature, self.prompts[i], config.proxy_scale)
            wanted = cast(Tensor, self.class_to_prompt)[labels]
            loss = proxy_loss(
                sims, wanted, criterion=config.criterion, alpha=config.alpha, delta=config.delta
            )
            found.append(weight * loss / (last - first + 1))
        return found


class CVPTTwin(VPTTwin):
    """CVPT (Huang et al., ICCV 2025): after self-attention all tokens attend to the prompts, by the same weights."""

    def blocks(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        for i, block in enumerate(self.base.blocks):
            x = x + block.ls1(block.attn(block.norm1(x)))
            x = x + self._cross(block.attn, x, self.rows(i, len(x)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x, None

    @staticmethod
    def _cross(attn: Any, x: Tensor, prompts: Tensor) -> Tensor:
        width, heads = x.shape[-1], (attn.num_heads, -1)
        q_weight, kv_weight = attn.qkv.weight.split([width, 2 * width])
        q_bias, kv_bias = attn.qkv.bias.split([width, 2 * width])
        q = F.linear(x, q_weight, q_bias).unflatten(-1, heads).transpose(1, 2)
        k, v = (
            F.linear(prompts, kv_weight, kv_bias).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, attn.proj(out.transpose(1, 2).flatten(2)))


# For each method its twin, and the fields of the configuration that it does not know, with the values it needs.
TWINS: dict[type[PromptConfig], tuple[type[VPTTwin], dict[str, Any]]] = {
    VPTConfig: (VPTTwin, {"pool": "backbone", "project": None, "shared_across_blocks": False}),
    GateVPTConfig: (GateVPTTwin, {"pool": "backbone", "temperature": True}),
    CVPTConfig: (CVPTTwin, {"insert": 3}),
    DAVPTConfig: (
        DAVPTTwin,
        {
            "pool": "backbone",
            "prompt_norm": "none",
            "class_feature": "query",
            "proxy_for_class": "prompt",
            "proxy_for_patch": "prompt",
            "tune": "prompts",
        },
    ),
}


def twin(model: PromptModel) -> VPTTwin:
    """The same function as `model`, on copies of its weights under the same names.

    Raises NotImplementedError for a configuration that the twin does not compute.
    """
    kind, needed = TWINS[type(model.config)]
    for field, value in needed.items():
        found = getattr(model.config, field)
        if found != value:
            raise NotImplementedError(
                f"`twin`: {model.config.method} needs {field}={value!r}; got {found!r}."
            )
    return kind(model)
