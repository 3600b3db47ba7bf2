"""CVPT's cross-attention with its prompts folded into the attention's weights.

    out = softmax_h(x·Aᵀ + a)·V' + b_proj

is a two-layer MLP of hidden width H·P whose activation is a softmax per head. CVPT (Huang et al., ICCV 2025) inserts it
between attention and MLP, so one kernel may also add the residual and compute the LayerNorm before the MLP.
:mod:`fastprompt.ops.prompt_cross_attention` computes A, a and V' and selects this form if it takes fewer operations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt.ops import dispatch, trust
from fastprompt.ops.checks import check_devices_and_dtypes
from fastprompt.ops.norm import Norm, check_norm, empty_norm, layer_norm, layer_norm_reference
from fastprompt.ops.operator import (
    accumulation_dtype,
    autocast,
    call,
    define_operator,
    mark_as_backward,
    register_gradient,
    traced_plainly,
)

_Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class FoldedPrompts(NamedTuple):
    """Prompts folded into the attention's weights.

    `key` [H, P, D], `bias` [H, P], `value` [H, P, D], and `out_bias` [D] or None.
    """

    key: Tensor
    bias: Tensor
    value: Tensor
    out_bias: Tensor | None


def folded_cross_attention(
    x: Tensor,
    folded: FoldedPrompts,
    *,
    residual: bool = False,
    norm: Norm | None = None,
    backend: str = dispatch.AUTO,
) -> tuple[Tensor, Tensor | None]:
    """Return softmax_h(x·keyᵀ + bias)·value + out_bias, and LayerNorm of that; differentiable in x and `folded`.

    Args:
        x: [B, N, D]. Under autocast it keeps its dtype in the residual.
        folded: the result of :func:`fastprompt.ops.fold_prompts`.
        residual: add x.
        norm: the LayerNorm that follows, or None; frozen.
        backend: "auto", or the backend that must run this call (:func:`fastprompt.backends`).

    Returns:
        y [B, N, D], contiguous, and LayerNorm(y) likewise, or None without a norm. Under autocast the products and
        LayerNorm(y) have its dtype. The norm acts on y rounded to its dtype and computes in float32 or better.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message names value and remedy.
        NotImplementedError: `norm` requires a gradient, or `backend` names one that cannot run this call.
    """
    _check(x, folded, residual, norm)
    backend = dispatch.requested(backend)
    if traced_plainly(backend, fusable=True):
        return _plain(x, folded, residual, norm)
    affine = (None, None, None) if norm is None else norm
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *folded))
    y, _, normed, _, _ = call("folded_cross_attention", x, *folded, residual, *affine, trains, backend)
    return y, None if norm is None else normed


def folded_cross_attention_reference(
    x: Tensor, folded: FoldedPrompts, *, residual: bool = False, norm: Norm | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute :func:`folded_cross_attention` in plain PyTorch, in float32 or better: the specification."""
    with torch.autocast(x.device.type, enabled=False):
        wide = accumulation_dtype(x.dtype)
        key, bias, value = (t.to(wide) for t in folded[:3])
        logits = torch.einsum("bnd,hpd->bnhp", x.to(wide), key) + bias
        y = torch.einsum("bnhp,hpd->bnd", logits.softmax(-1), value)
        y = y if folded.out_bias is None else y + folded.out_bias.to(wide)
        y = (x.to(wide) + y if residual else y).to(x.dtype)
        return y, None if norm is None else layer_norm_reference(y, norm, folded.key.dtype)


def _plain(
    x: Tensor, folded: FoldedPrompts, residual: bool, norm: Norm | None
) -> tuple[Tensor, Tensor | None]:
    """Compute the same in the dtype of the products; under autocast that is its own."""
    key, bias, value, out_bias = folded
    H, P, _ = key.shape
    logits = torch.addmm(bias.flatten(), x.flatten(0, 1), key.flatten(0, 1).mT)
    weights = logits.unflatten(1, (H, P)).softmax(-1).flatten(1)
    if out_bias is None:
        out = weights @ value.flatten(0, 1)
    else:
        out = torch.addmm(out_bias, weights, value.flatten(0, 1))
    y = out.view(*x.shape[:2], value.shape[2])
    y = x + y if residual else y
    return y, None if norm is None else layer_norm_reference(y, norm, out.dtype)


def _check(x: Tensor, folded: FoldedPrompts, residual: bool, norm: Norm | None) -> None:
    key, bias, value, out_bias = folded
    fits = x.ndim == 3 and key.ndim == 3 and key.shape[2] == x.shape[2]
    if not fits or bias.shape != key.shape[:2] or value.ndim != 3 or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"`folded_cross_attention`: `x` must be [B, N, D] and `folded.key` [H, P, D], `folded.bias` [H, P], "
            f"`folded.value` [H, P, D]; got {tuple(x.shape)}, {tuple(key.shape)}, {tuple(bias.shape)}, "
            f"{tuple(value.shape)}; call `fold_prompts`"
        )
    if out_bias is not None and out_bias.shape != value.shape[2:]:
        raise ValueError(
            f"`folded_cross_attention`: `folded.out_bias` must be [D={value.shape[2]}]; got {tuple(out_bias.shape)}; "
            "call `fold_prompts`"
        )
    if residual and value.shape[2] != x.shape[2]:
        raise ValueError(
            f"`folded_cross_attention`: with `residual`, `folded.value` must be [H, P, D={x.shape[2]}]; "
            f"got {tuple(value.shape)}; omit `residual`"
        )
    others = {f"folded.{name}": tensor for name, tensor in folded._asdict().items()}
    check_devices_and_dtypes("folded_cross_attention", "x", x, others)
    check_norm("folded_cross_attention", norm, value.shape[2], x.device)


# The operator. `x` may have a wider dtype than the folded prompts (the residual stream under autocast): products run in
# theirs, which `normed` has too. `y` has theirs, or with `residual` the wider of both. `weights` [B, N, H, P] is the
# softmax, for the backward; empty unless `keep`. `eps` None: no norm, and `normed`, `mean`, `rstd` [B, N] are empty.


def _out_dtype(x: Tensor, key: Tensor, residual: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, key.dtype) if residual else key.dtype


def _fake(
    x: Tensor,
    key: Tensor,
    bias: Tensor,
    value: Tensor,
    out_bias: Tensor | None,
    residual: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    keep: bool,
    backend: str,
) -> _Forward:
    B, N, _ = x.shape
    y = x.new_empty((B, N, value.shape[2]), dtype=_out_dtype(x, key, residual))
    return y, key.new_empty((B, N, *key.shape[:2]) if keep else 0), *empty_norm(y, key.dtype, eps)


def _fake_backward(
    grad: Tensor,
    x: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    weights: Tensor | None,
    residual: bool,
    needs: list[bool],
    backend: str,
) -> _Gradients:
    dx, d_key, d_bias, d_value, d_out_bias = (grad.new_empty(0) for _ in range(5))
    if needs[0] and key is not None:
        dx = grad.new_empty((*grad.shape[:2], key.shape[2]))
    if weights is not None:
        head_sizes = weights.shape[2:]
        if needs[1] and x is not None:
            d_key = weights.new_empty((*head_sizes, x.shape[2]))
        if needs[2]:
            d_bias = weights.new_empty(head_sizes)
        if needs[3]:
            d_value = weights.new_empty((*head_sizes, grad.shape[2]))
    if needs[4]:
        d_out_bias = grad.new_empty(grad.shape[2])
    return dx, d_key, d_bias, d_value, d_out_bias


def _flops(x: Any, key: Any, bias: Any, value: Any, *rest: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * key[0] * key[1] * (key[2] + value[2])


def _flops_backward(grad: Any, x: Any, key: Any, value: Any, weights: Any, *rest: Any, **kwargs: Any) -> int:
    needs = rest[1]
    if weights is None:
        return 0
    width = grad[2] * (any(needs[:3]) + needs[3])  # d(weights) and d(value)
    width += (key[2] if needs[0] else 0) + (x[2] if needs[1] else 0)
    return 2 * weights[0] * weights[1] * weights[2] * weights[3] * width


_OPERATOR = define_operator(
    "folded_cross_attention(Tensor x, Tensor key, Tensor bias, Tensor value, Tensor? out_bias, bool residual, "
    "Tensor? norm_weight, Tensor? norm_bias, float? eps, bool keep, str backend) "
    "-> (Tensor y, Tensor weights, Tensor normed, Tensor mean, Tensor rstd)",
    fake=_fake,
    flops=_flops,
)
# `needs`: which of dx, d(key), d(bias), d(value), d(out_bias) are needed; the others are empty, and input tensors that
# are not needed are None. `residual_norm_backward` computes the norm's gradient first.
_BACKWARD = define_operator(
    "folded_cross_attention_backward(Tensor grad, Tensor? x, Tensor? key, Tensor? value, Tensor? weights, "
    "bool residual, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    flops=_flops_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: _Forward) -> None:
    x, key, bias, value, out_bias, residual, norm_weight, _norm_bias, eps, keep, backend = inputs
    y, weights, normed, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.residual, ctx.backend, ctx.wide = residual, backend, y.dtype
    ctx.dtypes = [x.dtype, key.dtype, bias.dtype, value.dtype, None if out_bias is None else out_bias.dtype]
    needs = ctx.needs_input_grad
    if any(needs[:5]) and not keep:
        raise ValueError("`folded_cross_attention`: `keep` must be True if an input requires a gradient")
    if eps is None:
        ctx.mark_non_differentiable(weights, normed, mean, rstd)
        norm: tuple[Tensor | None, ...] = (None,) * 4
    else:
        ctx.mark_non_differentiable(weights, mean, rstd)
        norm = (y, mean, rstd, norm_weight)
    ctx.save_for_backward(
        x if needs[1] else None,
        key if needs[0] else None,
        value if any(needs[:3]) else None,
        weights if any(needs[:4]) else None,
        *norm,
    )


def _backward(
    ctx: Any, grad_y: Tensor | None, _grad_weights: Tensor | None, grad_normed: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    if grad_y is None and grad_normed is None:
        return (None,) * 11
    # Read only once: under gradient checkpointing a second access fails.
    saved = ctx.saved_tensors
    grad = grad_y
    if grad_normed is not None:
        of_norm = (*saved[4:], None, ctx.wide, [True, False])
        grad, _d_delta = call("residual_norm_backward", grad_y, grad_normed, *of_norm, ctx.backend)
    needs = [bool(n) for n in ctx.needs_input_grad[:5]]
    found = call("folded_cross_attention_backward", grad, *saved[:4], ctx.residual, needs, ctx.backend)
    wanted = [g.to(dtype) if need else None for g, need, dtype in zip(found, needs, ctx.dtypes, strict=True)]
    return (*wanted, *(None,) * 6)


register_gradient(_OPERATOR, setup=_setup, backward=_backward)
mark_as_backward(_BACKWARD)
autocast(_OPERATOR, cast=(1, 2, 3, 4))


# The backend `eager` --------------------------------------------------------------------------------------------
#
# PyTorch's CPU softmax is slow on short rows: on [1576, 12, 10] in float32 it takes 3.7 ms and its backward 1.4; the
# code below takes 0.6 and 0.5 (Xeon with AVX-512, one thread). On other devices it is one kernel instead of many.


def _softmax(logits: Tensor) -> Tensor:
    """Return the softmax over the last dimension, computed in float32 or better."""
    if logits.device.type != "cpu" or logits.shape[-1] == 0:
        return logits.softmax(-1)
    wide = logits.to(accumulation_dtype(logits.dtype))
    wide = wide.sub(wide.amax(-1, keepdim=True)).exp_()
    return wide.div_(wide.sum(-1, keepdim=True)).to(logits.dtype)


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of the logits from that of the weights."""
    if weights.device.type != "cpu":
        return torch._softmax_backward_data(grad, weights, -1, weights.dtype)
    wide = accumulation_dtype(weights.dtype)
    d, w = grad.to(wide), weights.to(wide)
    return (d - (d * w).sum(-1, keepdim=True)).mul_(w).to(weights.dtype)


def _forward_eager(
    x: Tensor,
    key: Tensor,
    bias: Tensor,
    value: Tensor,
    out_bias: Tensor | None,
    residual: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    keep: bool,
) -> _Forward:
    B, N, _ = x.shape
    H, P, _ = key.shape
    rows = x.flatten(0, 1)
    logits = torch.addmm(bias.flatten(), rows.to(key.dtype), key.flatten(0, 1).mT)
    weights = _softmax(logits.view(B * N, H, P))
    hidden, values = weights.view(B * N, H * P), value.flatten(0, 1)
    if out_bias is not None:
        out = torch.addmm(out_bias, hidden, values)
        if residual:
            out = out.add_(rows) if _out_dtype(x, key, residual) == out.dtype else out + rows
    elif residual and x.dtype == key.dtype:
        out = torch.addmm(rows, hidden, values)
    else:
        out = hidden @ values + rows if residual else hidden @ values
    y = out.view(B, N, value.shape[2])
    kept = weights.view(B, N, H, P) if keep else key.new_empty(0)
    return y, kept, *layer_norm(y, key.dtype, norm_weight, norm_bias, eps)


def _backward_eager(
    grad: Tensor,
    x: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    weights: Tensor | None,
    residual: bool,
    needs: list[bool],
) -> _Gradients:
    dx, d_key, d_bias, d_value, d_out_bias = (grad.new_empty(0) for _ in range(5))
    rows = grad.flatten(0, 1)
    if needs[4]:
        d_out_bias = rows.sum(0, dtype=accumulation_dtype(grad.dtype)).to(grad.dtype)
    if weights is None:
        return dx, d_key, d_bias, d_value, d_out_bias
    B, N, H, P = weights.shape
    low = rows.to(weights.dtype)
    if value is not None:
        d_weights = (low @ value.flatten(0, 1).mT).view(weights.shape)
        d_logits = _softmax_backward(d_weights, weights).view(B * N, H * P)
        if needs[0] and key is not None:
            keys = key.flatten(0, 1)
            if residual and grad.dtype == key.dtype:
                dx = torch.addmm(rows, d_logits, keys)
            else:
                dx = (d_logits @ keys).to(grad.dtype)
                dx = dx.add_(rows) if residual else dx
            dx = dx.view(B, N, key.shape[2])
        if needs[1] and x is not None:
            d_key = (d_logits.mT @ x.flatten(0, 1).to(weights.dtype)).view(H, P, x.shape[2])
        if needs[2]:
            d_bias = d_logits.sum(0, dtype=accumulation_dtype(weights.dtype)).to(weights.dtype).view(H, P)
    if needs[3]:
        d_value = (weights.view(B * N, H * P).mT @ low).view(H, P, grad.shape[2])
    return dx, d_key, d_bias, d_value, d_out_bias


dispatch.register("folded_cross_attention", "eager", _forward_eager, dispatch.always)
dispatch.register("folded_cross_attention_backward", "eager", _backward_eager, dispatch.always)
# Not automatic: the products are large enough for the library, and every program of the fused kernel reads both
# matrices again. It has not been shown to be faster.
dispatch.register_triton(
    "folded_cross_attention", "folded_cross_attention", "forward", automatic=False, fuses_norm=True
)
dispatch.register_triton(
    "folded_cross_attention_backward", "folded_cross_attention", "backward", automatic=False
)
trust.describe("folded_cross_attention", lambda *args: (0,))
trust.describe("folded_cross_attention_backward", lambda *args: (0, 1, 4))
