"""What the package is measured against: prompts as one writes them on timm and PyTorch, with nothing from fastprompt.

Attention: every competitor gets the image's and the prompts' keys and values apart, as a block has them, and joins
them itself, so that the copy counts. Models: prompts are rows of the sequence in every block, as in the papers' code.
Each is given the best setting known: fused attention, no copy that is not needed, prompts projected once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[..., Tensor]

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


# Attention: q, k, v [B, N, H, d], prompt_k, prompt_v [P, H, d] or None -> [B, N, H, d], contiguous -------------------


def join(image: Tensor, prompts: Tensor | None) -> Tensor:
    """[B, N, H, d] and prompts [P, H, d] or [B, P, H, d] (or None) -> [B, H, N + P, d], as SDPA takes it."""
    if prompts is not None and prompts.shape[-3] > 0:
        image = torch.cat([image, prompts.expand(image.shape[0], -1, -1, -1)], dim=1)
    return image.transpose(1, 2)


def sdpa(name: str) -> Attention:
    """`F.scaled_dot_product_attention` over the joined keys, held to one of `SDPA`."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor | None = None, prompt_v: Tensor | None = None
    ) -> Tensor:
        with sdpa_kernel(SDPA[name]):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), join(k, prompt_k), join(v, prompt_v))
        return out.transpose(1, 2).contiguous()

    return attention


def products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    temperature: Tensor | None = None,
) -> Tensor:
    """Plain matrix products and a softmax: the definition, in the inputs' dtype; in float64 the yardstick.

    `temperature` has one element, or one for each score row, [B, H, N, 1].
    """
    scores = torch.matmul(q.transpose(1, 2), join(k, prompt_k).mT) * q.shape[-1] ** -0.5
    if temperature is not None:
        scores = scores / temperature
    weights = scores.softmax(-1).to(v.dtype)
    return torch.matmul(weights, join(v, prompt_v)).transpose(1, 2).contiguous()


def flex(*, compiled: bool, mode: str = "max-autotune-no-cudagraphs") -> Attention:
    """FlexAttention over the joined keys; compiled, its kernels' tiles are searched for each shape."""
    from torch.nn.attention.flex_attention import flex_attention

    # Static shapes: a kernel for just this length, which is the best case.
    run = torch.compile(flex_attention, dynamic=False, mode=mode) if compiled else flex_attention

    def attention(
        q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor | None = None, prompt_v: Tensor | None = None
    ) -> Tensor:
        out = cast(Tensor, run(q.transpose(1, 2), join(k, prompt_k), join(v, prompt_v)))
        return out.transpose(1, 2).contiguous()

    return attention


# The other operations -----------------------------------------------------------------------------------------------


def blend(x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, *, start: int) -> Tensor:
    """GateVPT after a block: residual add, and prompt rows [B, P, D] blended with those that entered it.

    x, delta [B, N, D], with prompts at rows start .. start + P -> [B, N, D].
    """
    out = x + delta
    stop = start + prompt_in.shape[1]
    rows = gate * out[:, start:stop] + (1 - gate) * prompt_in
    return torch.cat([out[:, :start], rows.to(out.dtype), out[:, stop:]], dim=1)


def blend_norm(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    start: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """:func:`blend`, then the next block's LayerNorm: (y, normed), both [B, N, D]."""
    y = blend(x, delta, prompt_in, gate, start=start)
    return y, F.layer_norm(y, y.shape[-1:], weight, bias, eps)


def folded(x: Tensor, key: Tensor, bias: Tensor, value: Tensor, out_bias: Tensor) -> Tensor:
    """CVPT with prompts folded beforehand, and its residual add: two products around a softmax per head.

    x [B, N, D], key, value [H, P, D], bias [H, P], out_bias [D] -> [B, N, D].
    """
    H, P, D = key.shape
    scores = F.linear(x, key.view(H * P, D), bias.view(H * P)).unflatten(-1, (H, P))
    return x + torch.matmul(scores.softmax(-1).flatten(-2), value.view(H * P, D)) + out_bias


def folded_norm(
    x: Tensor,
    key: Tensor,
    bias: Tensor,
    value: Tensor,
    out_bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """:func:`folded`, then the block's second LayerNorm: (y, normed), both [B, N, D]."""
    y = folded(x, key, bias, value, out_bias)
    return y, F.layer_norm(y, y.shape[-1:], weight, norm_bias, eps)


def cross_attention(attn: Any, x: Tensor, prompts: Tensor) -> Tensor:
    """CVPT as published, by the weights of timm's `Attention`: every token of x [B, N, D] to prompts [P, D].

    Prompts are projected once, not once for each image, and SDPA attends.
    """
    (B, N, D), H = x.shape, attn.num_heads
    q_weight, kv_weight = attn.qkv.weight.split([D, 2 * D])
    q_bias, kv_bias = attn.qkv.bias.split([D, 2 * D])
    q = F.linear(x, q_weight, q_bias).view(B, N, H, -1).transpose(1, 2)
    kv = F.linear(prompts, kv_weight, kv_bias).view(-1, 2, H, D // H).permute(1, 2, 0, 3)
    k, v = kv.expand(B, -1, -1, -1, -1).unbind(1)
    out = F.scaled_dot_product_attention(q, k, v)
    return attn.proj(out.transpose(1, 2).reshape(B, N, D))


def row(
    query: Tensor, rows: Tensor, k_weight: Tensor, k_bias: Tensor, v_weight: Tensor, v_bias: Tensor
) -> Tensor:
    """One query row over keys and values made of all rows: query [B, 1, H, d], rows [B, N, D] -> [B, 1, H, d]."""
    B, _, H, d = query.shape
    k, v = (
        F.linear(rows, weight, bias).view(B, -1, H, d).transpose(1, 2)
        for weight, bias in ((k_weight, k_bias), (v_weight, v_bias))
    )
    return F.scaled_dot_product_attention(query.transpose(1, 2), k, v).transpose(1, 2).contiguous()


# Models ---------------------------------------------------------------------------------------------------------------


class ConcatVPT(nn.Module):
    """VPT by concatenation (Jia et al., ECCV 2022): timm's own blocks, and every row through every block.

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
        self.base: Any = frozen(base)
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
        """images [B, C, h, w] -> logits [B, classes]."""
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


class ConcatGateVPT(nn.Module):
    """GateVPT (Yoo et al., ICML 2023) on timm's class-token `VisionTransformer`, prompts as rows of the sequence.

    Args:
        base: the timm model; copied, frozen but for its head.
        prompts: [P, D]. gate_logits: [G], for the first G blocks. temperature: [L].
    """

    def __init__(self, base: nn.Module, prompts: Tensor, gate_logits: Tensor, temperature: Tensor) -> None:
        super().__init__()
        self.base: Any = frozen(base)
        self.prompts = nn.ParameterList([nn.Parameter(prompts.detach().clone())])
        self.gate_logits = nn.Parameter(gate_logits.detach().clone())
        self.temperature = nn.Parameter(temperature.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, h, w] -> logits [B, classes]."""
        base, prefix, P = self.base, self.base.num_prefix_tokens, self.prompts[0].shape[0]
        self.temperature.data.clamp_(0.01, 10.0)
        x = base.norm_pre(base._pos_embed(base.patch_embed(images)))
        x = torch.cat([x[:, :prefix], self.prompts[0].expand(len(x), -1, -1), x[:, prefix:]], dim=1)
        gates = self.gate_logits.sigmoid()
        for i, block in enumerate(base.blocks):
            entered = x[:, prefix : prefix + P]
            x = x + block.ls1(self._attention(block.attn, block.norm1(x), self.temperature[i]))
            x = x + block.ls2(block.mlp(block.norm2(x)))
            if i < len(gates):
                rows = gates[i] * x[:, prefix : prefix + P] + (1 - gates[i]) * entered
                x = torch.cat([x[:, :prefix], rows, x[:, prefix + P :]], dim=1)
        x = torch.cat([x[:, :prefix], x[:, prefix + P :]], dim=1)
        return base.forward_head(base.norm(x))

    def _attention(self, attn: Any, x: Tensor, temperature: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = attn.qkv(x).view(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        # Dividing the queries divides the scores, and lets SDPA stay fused.
        out = F.scaled_dot_product_attention(q / temperature.to(q.dtype), k, v)
        return attn.proj(out.transpose(1, 2).reshape(B, N, D))


class CrossVPT(nn.Module):
    """CVPT (Huang et al., ICCV 2025, insert 3) on timm's `VisionTransformer`: cross-attention after self-attention.

    Args:
        base: the timm model; copied, frozen but for its head.
        prompts: one [P, D] for each block.
    """

    def __init__(self, base: nn.Module, prompts: list[Tensor]) -> None:
        super().__init__()
        self.base: Any = frozen(base)
        self.prompts = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in prompts)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, h, w] -> logits [B, classes]."""
        base = self.base
        x = base.norm_pre(base._pos_embed(base.patch_embed(images)))
        for block, prompts in zip(base.blocks, self.prompts, strict=True):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            x = x + cross_attention(block.attn, x, prompts)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return base.forward_head(base.norm(x))


class BareBackbone(nn.Module):
    """The timm model without prompts; its class token trains, so that a backward runs through every block."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base: Any = frozen(base)
        self.base.cls_token.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, h, w] -> logits [B, classes]."""
        return self.base(images)


def frozen(base: nn.Module) -> nn.Module:
    """A copy of `base` in which only the head trains."""
    base = copy.deepcopy(base).requires_grad_(False)
    heads = base.get_classifier()  # type: ignore[operator]
    for head in heads if isinstance(heads, tuple) else (heads,):
        head.requires_grad_(True)
    return base
