"""CVPT's folded cross-attention with its residual, and the LayerNorm that follows it, in one pass over the sequence.

    y = x + softmax_h(x·keyᵀ + bias)·value + out_bias;   normed = LayerNorm(y)

Where CVPT (Huang et al., ICCV 2025) puts it between attention and MLP, `y` is the residual stream and `normed` enters
the MLP. Weight and bias of the norm are frozen, as those of a prompted backbone are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprompt.ops import dispatch, triton_backend
from fastprompt.ops.folded_cross_attention import (
    FoldedPrompts,
    check_folded,
    fake,
    flops,
    gradients,
    keep_for_backward,
)
from fastprompt.ops.gated_blend_norm import check_norm, norm_rows
from fastprompt.ops.registration import accumulation_dtype, autocast, define, differentiate


def folded_cross_attention_norm(
    x: Tensor,
    folded: FoldedPrompts,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    backend: str = dispatch.AUTO,
) -> tuple[Tensor, Tensor]:
    """y = `folded_cross_attention(x, folded, residual=True)` and LayerNorm(y); differentiable in x and `folded`.

    Args:
        x: [B, N, D].
        folded: as made by :func:`fastprompt.ops.fold_prompts`.
        weight, bias: [D] or None, of any floating dtype; frozen.
        eps: added to the variance.
        backend: "auto", or the backend that has to serve this call.

    Returns:
        y and LayerNorm(y), [B, N, D], contiguous, in x's dtype. The norm reads y as rounded to that dtype and computes
        in float32 or better.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message names value and remedy.
        NotImplementedError: `weight` or `bias` requires a gradient.
    """
    check_folded("folded_cross_attention_norm", x, folded, residual=True)
    check_norm("folded_cross_attention_norm", x, weight, bias, "folded_cross_attention")
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *folded[:3]))
    y, normed, *_ = torch.ops.fastprompt.folded_cross_attention_norm(
        x, *folded, weight, bias, eps, trains, dispatch.requested(backend)
    )
    return y, normed


def folded_cross_attention_norm_reference(
    x: Tensor, folded: FoldedPrompts, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The specification of :func:`folded_cross_attention_norm`: plain PyTorch, in float32 or better."""
    with torch.autocast(x.device.type, enabled=False):
        wide = accumulation_dtype(x.dtype)
        key, key_bias, value = (t.to(wide) for t in folded[:3])
        logits = torch.einsum("bnd,hpd->bnhp", x.to(wide), key) + key_bias
        y = x.to(wide) + torch.einsum("bnhp,hpd->bnd", logits.softmax(-1), value)
        if folded.out_bias is not None:
            y = y + folded.out_bias.to(wide)
        y = y.to(x.dtype)
        return y, norm_rows(y, weight, bias, eps)[0]


# The operator. `weights` [B, N, H, P] is the softmax, empty unless `keep`; `mean` and `rstd` [B, N] are the norm's. Its
# gradient is the norm's, by the operator of :mod:`fastprompt.ops.gated_blend_norm`, then that of the cross-attention.


def _fake(
    x: Tensor,
    key: Tensor,
    key_bias: Tensor,
    value: Tensor,
    out_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    y, weights = fake(x, key, key_bias, value, out_bias, True, keep, backend)
    rows = x.new_empty(x.shape[:2], dtype=accumulation_dtype(y.dtype))
    return y, torch.empty_like(y), weights, rows, torch.empty_like(rows)


_OPERATOR = define(
    "folded_cross_attention_norm(Tensor x, Tensor key, Tensor key_bias, Tensor value, Tensor? out_bias, "
    "Tensor? weight, Tensor? bias, float eps, bool keep, str backend) "
    "-> (Tensor y, Tensor normed, Tensor weights, Tensor mean, Tensor rstd)",
    fake=_fake,
    flops=flops,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, weight, _bias, _eps, keep, backend = inputs
    y, _normed, weights, mean, rstd = output
    ctx.mark_non_differentiable(weights, mean, rstd)
    ctx.backend = backend
    keep_for_backward(ctx, inputs, weights, keep, y, mean, rstd, weight)


def _backward(ctx: Any, grad_y: Tensor | None, grad_normed: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None and grad_normed is None:
        return (None,) * 10
    grad: Any = grad_y
    if grad_normed is not None:
        no_blend = (None, None, 0, 0, True, False, False)
        grad, _, _ = torch.ops.fastprompt.gated_blend_norm_backward(
            grad_y, grad_normed, *ctx.saved_tensors[4:], *no_blend, ctx.backend
        )
    return (*gradients(ctx, grad, True, ctx.backend), *(None,) * 5)


differentiate(_OPERATOR, setup=_setup, backward=_backward)
autocast(_OPERATOR, cast=(1, 2, 3, 4))


# The backend `eager` --------------------------------------------------------------------------------------------


def _forward_eager(
    x: Tensor,
    key: Tensor,
    key_bias: Tensor,
    value: Tensor,
    out_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    y, weights = dispatch.run(
        "folded_cross_attention", "eager", x, key, key_bias, value, out_bias, True, keep
    )
    normed, mean, rstd = norm_rows(y, weight, bias, eps)
    return y, normed, weights, mean, rstd


dispatch.register("folded_cross_attention_norm", "eager", _forward_eager, dispatch.always)
# As its form without a norm: for those who name it, until it is measured.
triton_backend.serve("folded_cross_attention_norm", "prompt_cross_attention", "norm_forward", automatic=False)
