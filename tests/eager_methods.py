"""The methods written out: concatenation and timm's own eager attention, whose weights are read where timm drops them.

The oracle for what a prompted model's blocks return and attend to; nothing from fastprompt runs in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm_families import by_hand
from torch import Tensor, nn

import fastprompt
from bench.baselines import ConcatVPT
from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, VPTConfig

CONFIGS: dict[str, fastprompt.PromptConfig] = {
    "vpt-deep": VPTConfig(3),
    "vpt-partial": VPTConfig(3, blocks=1),
    "vpt-shallow": VPTConfig(3, deep=False),
    "vpt-project": VPTConfig(3, project=5),
    "gate-vpt": GateVPTConfig(3, gate_init=0.5, dropout=0.1),
    "da-vpt": DAVPTConfig(3, 3, (1, 1), prompt_norm="layer"),
    **{f"cvpt-{i}": CVPTConfig(3, insert=i, dropout=0.1) for i in range(1, 6)},
}


class Trace(NamedTuple):
    """For each block: its image tokens [B, N, D] without prompts, and their attention to prompts [B, H, N, P]."""

    tokens: list[Tensor]
    weights: list[Tensor]


@torch.no_grad()
def trace(model: Any, images: Tensor) -> Trace:
    """Run `model`'s prompts on a copy of its timm model, as the papers write them."""
    base: Any = by_hand(model.base).eval()
    if isinstance(model.config, CVPTConfig):
        return _cross(base, model, images)
    prompts = list(model.prompts)
    if getattr(model, "prompt_project", None) is not None:
        prompts = [F.linear(p, model.prompt_project.weight, model.prompt_project.bias) for p in prompts]
    if getattr(model, "prompt_norm", None) is not None:
        norm = model.prompt_norm
        prompts = [F.layer_norm(p, p.shape[-1:], norm.weight, norm.bias, norm.eps) for p in prompts]
    concat = ConcatVPT(base, prompts)
    prefix, P = base.num_prefix_tokens, len(prompts[0])
    image = [*range(prefix), *range(prefix + P, prefix + P + base.patch_embed.num_patches)]
    weights: list[Tensor] = []
    for i, block in enumerate(concat.base.blocks):
        block.attn.attn_drop.register_forward_hook(
            lambda module, arguments, out: weights.append(arguments[0][:, :, image, prefix : prefix + P])
        )
        if isinstance(model.config, GateVPTConfig):
            block.attn.scale /= model.temperature[i].item()
            gate = model.gate_logits[i].sigmoid() if i < len(model.gate_logits) else 1.0
            concat.base.blocks[i] = _Gated(block, gate, prefix, P)
    tokens = [x[:, image] for x in concat.tokens(images)]
    return Trace(tokens, weights)


class _Gated(nn.Module):
    """A block after which the prompt rows are blended with those that entered."""

    def __init__(self, block: nn.Module, gate: Any, prefix: int, P: int) -> None:
        super().__init__()
        self.block, self.gate, self.rows = block, gate, slice(prefix, prefix + P)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x).clone()
        out[:, self.rows] = self.gate * out[:, self.rows] + (1 - self.gate) * x[:, self.rows]
        return out


def _cross(base: Any, model: Any, images: Tensor) -> Trace:
    """CVPT on timm's plain blocks, every map a Linear call."""
    insert, tokens, weights = model.config.insert, [], []
    x = base.norm_pre(base._pos_embed(base.patch_embed(images)))
    for block, p in zip(base.blocks, model.prompts, strict=True):
        H = block.attn.num_heads

        def cross(x: Tensor, attn: Any = block.attn, p: Tensor = p, H: int = H) -> Tensor:
            q, _, _ = attn.qkv(x).chunk(3, dim=-1)
            _, k, v = attn.qkv(p).expand(len(x), -1, -1).chunk(3, dim=-1)
            q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k, v))
            probabilities = (q @ k.mT * attn.scale).softmax(-1)
            weights.append(probabilities)
            return attn.proj((probabilities @ v).transpose(1, 2).flatten(2))

        if insert == 1:
            x = x + cross(x)
        x = x + block.ls1(block.attn(block.norm1(x))) + (cross(x) if insert == 2 else 0)
        if insert == 3:
            x = x + cross(x)
        x = x + block.ls2(block.mlp(block.norm2(x) + (cross(x) if insert == 4 else 0)))
        if insert == 5:
            x = x + cross(x)
        tokens.append(x)
    return Trace(tokens, weights)


def prompted(base: Any, name: str) -> Any:
    """`base` with the method `CONFIGS[name]`, in eval mode, every parameter of its own far from where it starts."""
    model: Any = fastprompt.get_prompt_model(base, CONFIGS[name]).eval()
    with torch.no_grad():
        for p in model.prompts:
            p.copy_(torch.randn_like(p))
        if name == "gate-vpt":
            model.temperature.copy_(torch.linspace(0.5, 2, len(model.temperature)))
            model.gate_logits.copy_(torch.linspace(-1, 1, len(model.gate_logits)))
        if name == "da-vpt":
            nn.init.normal_(model.prompt_norm.weight)
            nn.init.normal_(model.prompt_norm.bias)
    return model
