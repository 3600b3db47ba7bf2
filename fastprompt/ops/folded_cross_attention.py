"""CVPT's cross-attention with its prompts folded through the attention's weights.

    out = softmax_h(x·Aᵀ + a)·V' + b_proj

is a two-layer MLP of hidden width H·P whose activation is a softmax per head. How A, a and V' are made, and when this
form takes fewer operations, is the subject of :mod:`fastprompt.ops.prompt_cross_attention`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt.ops import dispatch, triton_backend
from fastprompt.ops.registration import (
    accumulation_dtype,
    as_gradient,
    autocast,
    autocast_enabled,
    define,
    differentiate,
)

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class FoldedPrompts(NamedTuple):
    """Prompts folded through the attention's weights.

    `key` [H, P, D], `bias` [H, P], `value` [H, P, D], and `out_bias` [D] or None.
    """

    key: Tensor
    bias: Tensor
    value: Tensor
    out_bias: Tensor | None


def folded_cross_attention(
    x: Tensor, folded: FoldedPrompts, *, residual: bool = False, backend: str = dispatch.AUTO
) -> Tensor:
    """softmax_h(x·keyᵀ + bias)·value + out_bias for x [B, N, D] -> [B, N, D]; differentiable in all of them.

    With `residual`, x is added in the same pass. Under autocast that x keeps its dtype, as in a sum of its own.

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes differ, and autocast is off.
    """
    check_folded("folded_cross_attention", x, folded, residual)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *folded[:3]))
    out, _ = torch.ops.fastprompt.folded_cross_attention(
        x, *folded, residual, trains, dispatch.requested(backend)
    )
    return out


def check_folded(caller: str, x: Tensor, folded: FoldedPrompts, residual: bool) -> None:
    """Raise, in the name of `caller`, unless x [B, N, D] and `folded` fit each other."""
    key, bias, value, _ = folded
    fits = x.ndim == 3 and key.ndim == 3 and key.shape[2] == x.shape[2]
    if not fits or bias.shape != key.shape[:2] or value.ndim != 3 or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"`{caller}`: `x` must be [B, N, D] and `folded.key` [H, P, D], `folded.bias` [H, P], "
            f"`folded.value` [H, P, D]; got {tuple(x.shape)}, {tuple(key.shape)}, {tuple(bias.shape)}, "
            f"{tuple(value.shape)}; make them by `fold_prompts`"
        )
    if residual and value.shape[2] != x.shape[2]:
        raise ValueError(
            f"`{caller}`: with `residual`, `folded.value` must be [H, P, D={x.shape[2]}]; got {tuple(value.shape)}; "
            "leave `residual` out"
        )
    if not autocast_enabled(x):
        for name, tensor in folded._asdict().items():
            if tensor is not None and tensor.dtype != x.dtype:
                raise TypeError(
                    f"`{caller}`: `folded.{name}` is {tensor.dtype} and `x` {x.dtype}; convert one of them"
                )


# The operator. `x` may be in a wider dtype than the folded prompts (the residual stream under autocast): it enters
# products in theirs. `out` is in theirs too, or with `residual` in the wider of both.


def _out_dtype(x: Tensor, key: Tensor, residual: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, key.dtype) if residual else key.dtype


def fake(
    x: Tensor,
    key: Tensor,
    bias: Tensor,
    value: Tensor,
    out_bias: Tensor | None,
    residual: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, N, _ = x.shape
    out = x.new_empty((B, N, value.shape[2]), dtype=_out_dtype(x, key, residual))
    return out, key.new_empty((B, N, *key.shape[:2]) if keep else 0)


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


def flops(x: Any, key: Any, bias: Any, value: Any, *rest: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * key[0] * key[1] * (key[2] + value[2])


def _flops_backward(grad: Any, x: Any, key: Any, value: Any, weights: Any, *rest: Any, **kwargs: Any) -> int:
    needs = rest[1]
    if weights is None:
        return 0
    width = grad[2] * (any(needs[:3]) + needs[3])  # d(weights) and d(value)
    width += (key[2] if needs[0] else 0) + (x[2] if needs[1] else 0)
    return 2 * weights[0] * weights[1] * weights[2] * weights[3] * width


# `weights` [B, N, H, P] is the softmax, for the backward; empty unless `keep`.
_OPERATOR = define(
    "folded_cross_attention(Tensor x, Tensor key, Tensor bias, Tensor value, Tensor? out_bias, bool residual, "
    "bool keep, str backend) -> (Tensor out, Tensor weights)",
    fake=fake,
    flops=flops,
)
# `needs` says which of dx, d(key), d(bias), d(value), d(out_bias) somebody reads; the others are empty. Of the tensors,
# those that these do not ask for are None.
_BACKWARD = define(
    "folded_cross_attention_backward(Tensor grad, Tensor? x, Tensor? key, Tensor? value, Tensor? weights, "
    "bool residual, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    flops=_flops_backward,
)


def keep_for_backward(
    ctx: Any, inputs: tuple[Any, ...], weights: Tensor, keep: bool, *more: Tensor | None
) -> None:
    """Save what :func:`gradients` needs, and `more`; `inputs` begin with x, key, bias, value and out_bias."""
    x, key, bias, value, out_bias = inputs[:5]
    ctx.set_materialize_grads(False)
    ctx.dtypes = [x.dtype, key.dtype, bias.dtype, value.dtype, None if out_bias is None else out_bias.dtype]
    needs = ctx.needs_input_grad
    if any(needs[:4]) and not keep:
        raise ValueError("`folded_cross_attention`: `keep` must be True where an input but `out_bias` trains")
    ctx.save_for_backward(
        x if needs[1] else None,
        key if needs[0] else None,
        value if any(needs[:3]) else None,
        weights if any(needs[:4]) else None,
        *more,
    )


def gradients(ctx: Any, grad: Tensor, residual: bool, backend: str) -> list[Tensor | None]:
    """Those of x, key, bias, value and out_bias, from that of the output."""
    needs = [bool(n) for n in ctx.needs_input_grad[:5]]
    found = torch.ops.fastprompt.folded_cross_attention_backward(
        grad, *ctx.saved_tensors[:4], residual, needs, backend
    )
    return [g.to(dtype) if need else None for g, need, dtype in zip(found, needs, ctx.dtypes, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, residual, keep, backend = inputs
    weights = output[1]
    ctx.mark_non_differentiable(weights)
    ctx.residual, ctx.backend = residual, backend
    keep_for_backward(ctx, inputs, weights, keep)


def _backward(ctx: Any, grad: Tensor | None, _grad_weights: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    return (*gradients(ctx, grad, ctx.residual, ctx.backend), None, None, None)


differentiate(_OPERATOR, setup=_setup, backward=_backward)
as_gradient(_BACKWARD)
autocast(_OPERATOR, cast=(1, 2, 3, 4))


# The backend `eager` --------------------------------------------------------------------------------------------
#
# PyTorch's CPU softmax is made for long rows: over [1576, 12, 10] in float32 it takes 3.7 ms and its backward 1.4, the
# passes below 0.6 and 0.5 (Xeon with AVX-512, one thread). Elsewhere it is one kernel instead of many.


def _softmax(logits: Tensor) -> Tensor:
    """The softmax over the last dimension, in float32 or better inside."""
    if logits.device.type != "cpu" or logits.shape[-1] == 0:
        return logits.softmax(-1)
    wide = logits.to(accumulation_dtype(logits.dtype))
    wide = wide.sub(wide.amax(-1, keepdim=True)).exp_()
    return wide.div_(wide.sum(-1, keepdim=True)).to(logits.dtype)


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the logits from that of the weights."""
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
    keep: bool,
) -> tuple[Tensor, Tensor]:
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
    return out.view(B, N, value.shape[2]), weights.view(B, N, H, P) if keep else key.new_empty(0)


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
# The products are large enough for the library, and every program of the fused kernel reads both matrices again: until
# somebody has measured that it is faster, it serves those who name it.
triton_backend.serve("folded_cross_attention", "prompt_cross_attention", "forward", automatic=False)
triton_backend.serve("folded_cross_attention_backward", "prompt_cross_attention", "backward", automatic=False)
