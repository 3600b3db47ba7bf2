"""Residual add, with layer scale, and the LayerNorm that follows, in one pass over the sequence.

    y = x + scale · delta;   normed = LayerNorm(y)

A pre-norm block has this twice: around its attention, and around its MLP with the next block's first norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprompt.ops import dispatch, trust
from fastprompt.ops.checks import check_devices_and_dtypes
from fastprompt.ops.norm import (
    Norm,
    check_norm,
    empty_norm,
    gradient_of_both,
    layer_norm,
    layer_norm_reference,
)
from fastprompt.ops.operator import (
    accumulation_dtype,
    autocast,
    call,
    define_operator,
    mark_as_backward,
    no_flops,
    register_gradient,
    traced_plainly,
)

_Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def residual_norm(
    x: Tensor, delta: Tensor, scale: Tensor | None, norm: Norm, *, backend: str = dispatch.AUTO
) -> tuple[Tensor, Tensor]:
    """Return y = x + scale · delta, and LayerNorm(y); differentiable in x and delta.

    Args:
        x, delta: [B, N, D]. Under autocast they may differ in dtype.
        scale: [D] of any floating dtype, frozen (layer scale), or None.
        norm: the LayerNorm that follows, frozen.
        backend: "auto", or the backend that must run this call (:func:`fastprompt.backends`).

    Returns:
        y [B, N, D], contiguous, in the wider dtype of x and delta, and LayerNorm(y) in delta's. The norm acts on y
        rounded to its dtype and computes in float32 or better.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message names value and remedy.
        NotImplementedError: `norm` or `scale` requires a gradient, or `backend` names one that cannot run this call.
    """
    _check(x, delta, scale, norm)
    backend = dispatch.requested(backend)
    if traced_plainly(backend, fusable=True):
        return _plain(x, delta, scale, norm)
    y, normed, _, _ = call("residual_norm", x, delta, scale, *norm, backend)
    return y, normed


def residual_norm_reference(
    x: Tensor, delta: Tensor, scale: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Compute :func:`residual_norm` in plain PyTorch, in float32 or better, autocast off: the specification."""
    with torch.autocast(x.device.type, enabled=False):
        return _plain(x, delta, scale, norm)


def _plain(x: Tensor, delta: Tensor, scale: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, delta.dtype)
    wide = accumulation_dtype(dtype)
    added = delta.to(wide) if scale is None else scale.to(wide) * delta.to(wide)
    y = (x.to(wide) + added).to(dtype)
    return y, layer_norm_reference(y, norm, delta.dtype)


def _check(x: Tensor, delta: Tensor, scale: Tensor | None, norm: Norm) -> None:
    if x.ndim != 3 or delta.shape != x.shape:
        raise ValueError(
            f"`residual_norm`: `x` and `delta` must both be [B, N, D]; got {tuple(x.shape)} and "
            f"{tuple(delta.shape)}; reshape them"
        )
    if scale is not None and (scale.shape != x.shape[2:] or not scale.is_floating_point()):
        raise ValueError(
            f"`residual_norm`: `scale` must be floating point, [D] = [{x.shape[2]}], or None; "
            f"got {scale.dtype}, {tuple(scale.shape)}; reshape it"
        )
    others = {"delta": delta, "scale": scale}
    check_devices_and_dtypes("residual_norm", "x", x, others, any_dtype=("scale",))
    if scale is not None and scale.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "`residual_norm`: `scale` requires a gradient, which is not supported; detach it, or call "
            "`torch.nn.functional.layer_norm` on x + scale * delta"
        )
    check_norm("residual_norm", norm, x.shape[2], x.device)


# The operator.


def _fake(x: Tensor, delta: Tensor, *rest: Any) -> _Forward:
    *_, eps, _backend = rest
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, delta.dtype))
    return y, *empty_norm(y, delta.dtype, eps)


def _fake_backward(grad_y: Tensor | None, grad_normed: Tensor | None, y: Tensor, *rest: Any) -> Any:
    *_, dtype, needs, _backend = rest
    return _empty_gradients(y, dtype, needs)


_OPERATOR = define_operator(
    "residual_norm(Tensor x, Tensor delta, Tensor? scale, Tensor? weight, Tensor? bias, float eps, str backend) "
    "-> (Tensor y, Tensor normed, Tensor mean, Tensor rstd)",
    fake=_fake,
    flops=no_flops,
)
# One of the two gradients may be None. d(x) has y's dtype, d(delta) has `dtype`. `needs`: which of both are needed; the
# other is empty. Where both are the same, only d(x) is asked for.
_BACKWARD = define_operator(
    "residual_norm_backward(Tensor? grad_y, Tensor? grad_normed, Tensor y, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? scale, ScalarType dtype, bool[] needs, str backend) -> (Tensor, Tensor)",
    fake=_fake_backward,
    flops=no_flops,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: _Forward) -> None:
    x, delta, scale, weight, _bias, _eps, backend = inputs
    y, _normed, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.dtypes, ctx.backend = (x.dtype, delta.dtype), backend
    ctx.save_for_backward(y, mean, rstd, weight, scale)


def _backward(ctx: Any, grad_y: Tensor | None, grad_normed: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None and grad_normed is None:
        return (None,) * 7
    y, mean, rstd, weight, scale = ctx.saved_tensors
    need_x, need_delta = ctx.needs_input_grad[:2]
    of_x, of_delta = ctx.dtypes
    same = scale is None and of_delta == y.dtype
    needs = [need_x or (need_delta and same), need_delta and not same]
    d_x, d_delta = call(
        "residual_norm_backward",
        grad_y,
        grad_normed,
        y,
        mean,
        rstd,
        weight,
        scale,
        of_delta,
        needs,
        ctx.backend,
    )
    d_delta = d_x if same else d_delta
    return d_x.to(of_x) if need_x else None, d_delta if need_delta else None, *(None,) * 5


register_gradient(_OPERATOR, setup=_setup, backward=_backward)
mark_as_backward(_BACKWARD)
autocast(_OPERATOR)


# The backend `eager` ---------------------------------------------------------------------------------------------


def _forward_eager(x: Tensor, delta: Tensor, scale: Tensor | None, *norm: Any) -> _Forward:
    dtype = torch.promote_types(x.dtype, delta.dtype)
    wide = accumulation_dtype(dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    if scale is None:
        torch.add(x, delta, out=y)
    else:
        y.copy_(torch.addcmul(x.to(wide), scale.to(wide), delta.to(wide)))
    return y, *layer_norm(y, delta.dtype, *norm)


def _backward_eager(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    d_x, d_delta = _empty_gradients(y, dtype, needs)
    grad = gradient_of_both(grad_y, grad_normed, y, mean, rstd, weight)
    if needs[0]:
        d_x.copy_(grad)
    if needs[1]:
        d_delta.copy_(grad if scale is None else grad.to(mean.dtype) * scale.to(mean.dtype))
    return d_x, d_delta


def _empty_gradients(y: Tensor, dtype: torch.dtype, needs: list[bool]) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape if needs[0] else 0), y.new_empty(y.shape if needs[1] else 0, dtype=dtype)


dispatch.register("residual_norm", "eager", _forward_eager, dispatch.always)
dispatch.register("residual_norm_backward", "eager", _backward_eager, dispatch.always)
dispatch.register_triton("residual_norm", "residual_norm", "forward", fuses_norm=True)
dispatch.register_triton("residual_norm_backward", "residual_norm", "backward")
trust.describe("residual_norm", lambda *args: (0, 1))
trust.describe("residual_norm_backward", lambda *args: (0, 1, 2, 3, 4))
