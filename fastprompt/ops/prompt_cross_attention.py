"""CVPT's cross-attention to prompts with the weights of self-attention, in its direct and its folded form.

Direct (Huang et al., "CVPT: Cross Visual Prompt Tuning", ICCV 2025):

    q = W_q·x + b_q,  k = W_k·p + b_k,  v = W_v·p + b_v,  out = W_proj·[softmax(q·kᵀ·scale)·v] + b_proj

Folded, with the same result: the weights are frozen and p does not depend on the images, so for each head
A_h = scale·k_h·W_q,h, a_h = scale·k_h·b_q,h and V'_h = v_h·W_proj,hᵀ are computed once for the whole batch, and

    out = softmax_h(x·Aᵀ + a)·V' + b_proj

is a two-layer MLP of hidden width H·P whose activation is a softmax per head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastprompt.ops import dispatch
from fastprompt.ops.checks import check_devices_and_dtypes
from fastprompt.ops.folded_cross_attention import FoldedPrompts, folded_cross_attention
from fastprompt.ops.operator import accumulation_dtype
from fastprompt.ops.prompt_attention import prompt_attention

Form = Literal["auto", "folded", "direct"]


class AttentionWeights(NamedTuple):
    """The four maps of a self-attention: weights [H·d, D] (`proj` [D, H·d]), biases or None."""

    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None


class ProjectedPrompts(NamedTuple):
    """Keys and values of the direct form, [P, H, d] or [B, P, H, d]."""

    key: Tensor
    value: Tensor


def prompt_cross_attention(
    x: Tensor,
    prompts: Tensor,
    weights: AttentionWeights,
    num_heads: int,
    *,
    scale: float | None = None,
    form: Form = "auto",
    backend: str = dispatch.AUTO,
) -> Tensor:
    """Return the cross-attention of every token to the prompts, with the weights of self-attention (CVPT).

    Args:
        x: [B, N, D].
        prompts: [P, D] shared by the batch, or [B, P, D] one set per image (always the direct form).
        weights: the attention's own maps; they get gradients if they require them.
        num_heads: H; head_dim d = rows of `q_weight` / H.
        scale: factor on q·k; default d**-0.5.
        form: "folded", "direct", or "auto", the one with fewer operations (:func:`choose_form`).
        backend: "auto", or the backend that must run this call (:func:`fastprompt.backends`).

    Returns:
        [B, N, D]; only the projection's bias if P = 0.

    Raises:
        ValueError: shapes or `form` do not fit; the message names value and remedy.
    """
    _check(x, prompts, weights, num_heads, form)
    H, d = num_heads, weights.q_weight.shape[0] // num_heads
    scale = d**-0.5 if scale is None else float(scale)
    if prompts.shape[-2] == 0:
        # An empty sum that keeps x in the graph.
        out = x[..., :0].sum(-1, keepdim=True).expand(*x.shape[:2], weights.proj_weight.shape[0])
        return out.clone() if weights.proj_bias is None else out + weights.proj_bias
    if form == "auto":
        training = torch.is_grad_enabled() and (x.requires_grad or prompts.requires_grad)
        form = choose_form(x.shape[0] * x.shape[1], prompts, x.shape[2], H, d, training=training)
    if form == "folded":
        return folded_cross_attention(x, fold_prompts(prompts, weights, H, scale), backend=backend)[0]
    return direct_cross_attention(
        x, project_prompts(prompts, weights, H), weights, scale=scale, backend=backend
    )


def choose_form(
    tokens: int | None, prompts: Tensor, D: int, H: int, d: int, *, training: bool = False
) -> Literal["folded", "direct"]:
    """Return the form of :func:`prompt_cross_attention` with fewer operations for `tokens` = B·N rows.

    Prompts that differ by image cannot be folded. With `tokens` None, only the cost per token is compared. With
    `training` the backward is counted too: gradients of x and of the prompts, with frozen weights.
    """
    if prompts.ndim == 3:
        return "direct"
    P, A = prompts.shape[0], H * d
    # Products of two operations each. Folded: scores and output; d(weights), d(x), d(key) and d(value). Direct: the two
    # projections and their gradients; scores and output, and five products in the backward of attention.
    folded, direct = 2 * D * H * P, 2 * D * A + 2 * P * A
    folded_once, direct_once = 4 * P * D * A, 2 * P * D * A
    if training:
        folded, direct = 6 * D * H * P, 4 * D * A + 7 * P * A
        folded_once, direct_once = 2 * folded_once, 2 * direct_once
    if tokens is not None:
        folded, direct = tokens * folded + folded_once, tokens * direct + direct_once
    return "folded" if folded < direct else "direct"


def fold_prompts(prompts: Tensor, weights: AttentionWeights, num_heads: int, scale: float) -> FoldedPrompts:
    """Fold prompts [P, D] into the attention's weights, once for a whole batch; plain, differentiable PyTorch.

    A softmax's weights sum to 1, so the projection's bias is folded too: each head adds 1/H of it to its values. The
    residual is then all that is added to the second product.
    """
    split = "P (H d) -> H P d"
    k = rearrange(F.linear(prompts, weights.k_weight, weights.k_bias) * scale, split, H=num_heads)
    v = rearrange(F.linear(prompts, weights.v_weight, weights.v_bias), split, H=num_heads)
    key = torch.matmul(k, rearrange(weights.q_weight, "(H d) D -> H d D", H=num_heads).to(k.dtype))
    if weights.q_bias is None:
        bias = k.new_zeros(k.shape[:2])
    else:
        bias = torch.einsum(
            "hpd,hd->hp", k, rearrange(weights.q_bias, "(H d) -> H d", H=num_heads).to(k.dtype)
        )
    value = torch.matmul(v, rearrange(weights.proj_weight, "D (H d) -> H d D", H=num_heads).to(v.dtype))
    if weights.proj_bias is None or len(prompts) == 0:
        return FoldedPrompts(key, bias, value, weights.proj_bias)
    return FoldedPrompts(key, bias, value + weights.proj_bias / num_heads, None)


def project_prompts(prompts: Tensor, weights: AttentionWeights, num_heads: int) -> ProjectedPrompts:
    """Return keys and values [P, H, d] or [B, P, H, d] of prompts [P, D] or [B, P, D]."""
    split = "... P (H d) -> ... P H d"
    k = rearrange(F.linear(prompts, weights.k_weight, weights.k_bias), split, H=num_heads)
    v = rearrange(F.linear(prompts, weights.v_weight, weights.v_bias), split, H=num_heads)
    return ProjectedPrompts(k, v)


def direct_cross_attention(
    x: Tensor,
    projected: ProjectedPrompts,
    weights: AttentionWeights,
    *,
    scale: float | None = None,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """Return the direct form for x [B, N, D]: queries, attention over the prompts only, projection."""
    q = F.linear(x, weights.q_weight, weights.q_bias)
    q = rearrange(q, "B N (H d) -> B N H d", H=projected.key.shape[-2])
    nothing = q[:, :0]
    out = prompt_attention(q, nothing, nothing, *projected, scale=scale, backend=backend)
    return F.linear(rearrange(out, "B N H d -> B N (H d)"), weights.proj_weight, weights.proj_bias)


def prompt_cross_attention_reference(
    x: Tensor, prompts: Tensor, weights: AttentionWeights, num_heads: int, *, scale: float | None = None
) -> Tensor:
    """Compute :func:`prompt_cross_attention` by the direct form in float32 or better: the specification."""
    with torch.autocast(x.device.type, enabled=False):
        wide = accumulation_dtype(x.dtype)
        w = AttentionWeights(*(None if t is None else t.to(wide) for t in weights))  # type: ignore[arg-type]
        p = prompts.to(wide).expand(x.shape[0], *prompts.shape[-2:])
        q, k, v = (
            rearrange(F.linear(rows, weight, bias), "B N (H d) -> B H N d", H=num_heads)
            for rows, weight, bias in (
                (x.to(wide), w.q_weight, w.q_bias),
                (p, w.k_weight, w.k_bias),
                (p, w.v_weight, w.v_bias),
            )
        )
        attention = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1) @ v
        return F.linear(rearrange(attention, "B H N d -> B N (H d)"), w.proj_weight, w.proj_bias).to(x.dtype)


def _check(x: Tensor, prompts: Tensor, weights: AttentionWeights, num_heads: int, form: str) -> None:
    def fail(what: str) -> None:
        raise ValueError(f"`prompt_cross_attention`: {what}")

    if form not in ("auto", "folded", "direct"):
        fail(f"`form` must be 'auto', 'folded' or 'direct'; got {form!r}")
    if x.ndim != 3:
        fail(f"`x` must be [B, N, D]; got {tuple(x.shape)}")
    B, _, D = x.shape
    shape = tuple(prompts.shape)
    if len(shape) not in (2, 3) or shape[-1] != D or (len(shape) == 3 and shape[0] != B):
        fail(f"`prompts` must be [P, D] or [B, P, D] with B={B}, D={D}; got {shape}")
    if len(shape) == 3 and form == "folded":
        fail(f"`prompts` {shape}, which differ by image, cannot be folded; use form='direct' or 'auto'")
    width = weights.q_weight.shape[0]
    if num_heads < 1 or width % num_heads:
        fail(f"`num_heads` must divide the attention's width {width}; got {num_heads}")
    for name in ("q_weight", "k_weight", "v_weight"):
        if getattr(weights, name).shape != (width, D):
            fail(f"`{name}` must be [H·d, D] = {(width, D)}; got {tuple(getattr(weights, name).shape)}")
    if weights.proj_weight.ndim != 2 or weights.proj_weight.shape[1] != width:
        fail(f"`proj_weight` must be [D, H·d={width}]; got {tuple(weights.proj_weight.shape)}")
    biases = {"q_bias": width, "k_bias": width, "v_bias": width, "proj_bias": weights.proj_weight.shape[0]}
    for name, size in biases.items():
        bias = getattr(weights, name)
        if bias is not None and bias.shape != (size,):
            fail(f"`{name}` must be [{size}] or None; got {tuple(bias.shape)}")
    check_devices_and_dtypes("prompt_cross_attention", "x", x, {"prompts": prompts, **weights._asdict()})
