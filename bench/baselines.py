"""Competitors of single operations: the same results from PyTorch alone, without fastprompt.

Attention gets the keys and values of image and prompts apart, as a block has them, and joins them, so that the copy
counts. Each competitor has the best setting known: fused attention, no copy that is not needed, prompts projected once.
Whole models are compared with the papers' form, :mod:`bench.papers`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
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
    """Join [B, N, H, d] and prompts [P, H, d] or [B, P, H, d] (or None): [B, H, N + P, d], as SDPA takes it."""
    if prompts is not None and prompts.shape[-3] > 0:
        image = torch.cat([image, prompts.expand(image.shape[0], -1, -1, -1)], dim=1)
    return image.transpose(1, 2)


def joined(function: Attention) -> Attention:
    """Return `function` of q, k, v [B, H, n, d] over the joined keys."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor | None = None, prompt_v: Tensor | None = None
    ) -> Tensor:
        out = function(q.transpose(1, 2), join(k, prompt_k), join(v, prompt_v))
        return out.transpose(1, 2).contiguous()

    return attention


def sdpa(name: str) -> Attention:
    """Return `F.scaled_dot_product_attention`, held to one of `SDPA`; "any" leaves the choice to PyTorch."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if name == "any" else sdpa_kernel(SDPA[name]):
            return F.scaled_dot_product_attention(q, k, v)

    return joined(attention)


def products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    temperature: Tensor | None = None,
    softmax: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return attention by matrix products and a softmax: the definition, in the inputs' dtype.

    `temperature` has one element, or one for each score row, [B, H, N, 1]. `softmax` replaces PyTorch's.
    """
    scores = torch.matmul(q.transpose(1, 2), join(k, prompt_k).mT) * q.shape[-1] ** -0.5
    if temperature is not None:
        scores = scores / temperature
    weights = (scores.softmax(-1) if softmax is None else softmax(scores)).to(v.dtype)
    return torch.matmul(weights, join(v, prompt_v)).transpose(1, 2).contiguous()


def softmax_from_lse(scores: Tensor) -> Tensor:
    """Return a softmax that has the roundings of large scores, in float32 or better: what flash kernels are judged by.

    A backward that keeps the log-sum-exp and makes the weights again, as PyTorch's own attention has it, has them too.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return (scores - scores.logsumexp(-1, keepdim=True)).exp()


def flex(*, compiled: bool, mode: str = "max-autotune-no-cudagraphs") -> Attention:
    """Return FlexAttention; compiled, it searches its tiles for each shape."""
    from torch.nn.attention.flex_attention import flex_attention

    # Static shapes: a kernel for just this length, which is the best case.
    return joined(torch.compile(flex_attention, dynamic=False, mode=mode) if compiled else flex_attention)


# The other operations -----------------------------------------------------------------------------------------------


def residual(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return the residual add x + delta [B, N, D], and the LayerNorm that follows, cast for the next Linear."""
    y = x + delta
    return y, F.layer_norm(y, y.shape[-1:], weight, bias, eps).to(delta.dtype)


def blend(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    start: int,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return GateVPT's residual add x + delta, prompt rows [B, P, D] blended with those that entered the block.

    x, delta [B, N, D], with prompts at rows start .. start + P -> y [B, N, D]; with the `weight` and `bias` of the
    LayerNorm that follows (y, normed).
    """
    out = x + delta
    stop = start + prompt_in.shape[1]
    rows = gate * out[:, start:stop] + (1 - gate) * prompt_in
    y = torch.cat([out[:, :start], rows.to(out.dtype), out[:, stop:]], dim=1)
    return y if weight is None else (y, F.layer_norm(y, y.shape[-1:], weight, bias, eps))


def folded(
    x: Tensor,
    key: Tensor,
    bias: Tensor,
    value: Tensor,
    out_bias: Tensor,
    weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return CVPT's residual add with prompts folded beforehand: two products around a softmax for each head.

    x [B, N, D], key, value [H, P, D], bias [H, P], out_bias [D] -> y [B, N, D]; with the `weight` and `norm_bias` of
    the LayerNorm that follows (y, normed).
    """
    H, P, D = key.shape
    scores = F.linear(x, key.view(H * P, D), bias.view(H * P)).unflatten(-1, (H, P))
    y = x + torch.matmul(scores.softmax(-1).flatten(-2), value.view(H * P, D)) + out_bias
    return y if weight is None else (y, F.layer_norm(y, y.shape[-1:], weight, norm_bias, eps))


def row(
    query: Tensor, rows: Tensor, k_weight: Tensor, k_bias: Tensor, v_weight: Tensor, v_bias: Tensor
) -> Tensor:
    """Return attention of query [B, 1, H, d] to keys and values made of all rows [B, N, D]: [B, 1, H, d]."""
    B, _, H, d = query.shape
    k, v = (
        F.linear(rows, weight, bias).view(B, -1, H, d).transpose(1, 2)
        for weight, bias in ((k_weight, k_bias), (v_weight, v_bias))
    )
    return F.scaled_dot_product_attention(query.transpose(1, 2), k, v).transpose(1, 2).contiguous()
