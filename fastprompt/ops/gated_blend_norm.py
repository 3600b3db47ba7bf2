"""Gated prompt blending and the LayerNorm that follows it, in one pass over the sequence.

    y = x + delta, its prompt rows blended as in :mod:`fastprompt.ops.gated_blend`;   normed = LayerNorm(y)

With GateVPT (Yoo et al., ICML 2023) `y` leaves one block and `normed` enters the next. Without a gate it is the
residual add and the norm of any block. Weight and bias of the norm are frozen, as those of a prompted backbone are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.ops import dispatch, triton_backend
from fastprompt.ops.gated_blend import check_blend, gated_blend_reference
from fastprompt.ops.registration import (
    accumulation_dtype,
    as_gradient,
    autocast,
    define,
    differentiate,
)


def gated_blend_norm(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor | None,
    gate: Tensor | None,
    start: int,
    length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    backend: str = dispatch.AUTO,
) -> tuple[Tensor, Tensor]:
    """y = `gated_blend(x, delta, prompt_in, gate, start, length)` and LayerNorm(y), differentiable in the first four.

    Args:
        x, delta, prompt_in, gate, start, length: as in :func:`fastprompt.ops.gated_blend`. `prompt_in` and `gate` None,
            with `length` 0, blend no rows: y = x + delta.
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
    _check(x, delta, prompt_in, gate, start, length, weight, bias)
    if prompt_in is None:
        prompt_in = x.new_empty((x.shape[0], 0, x.shape[2]))
    y, normed, _, _ = torch.ops.fastprompt.gated_blend_norm(
        x, delta, prompt_in, gate, start, length, weight, bias, eps, dispatch.requested(backend)
    )
    return y, normed


def gated_blend_norm_reference(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor | None,
    gate: Tensor | None,
    start: int,
    length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The specification of :func:`gated_blend_norm`: plain PyTorch, in float32 or better. Returns two [B, N, D]."""
    with torch.autocast(x.device.type, enabled=False):
        wide = accumulation_dtype(x.dtype)
        if prompt_in is None or gate is None:
            y = (x.to(wide) + delta.to(wide)).to(x.dtype)
        else:
            y = gated_blend_reference(x, delta, prompt_in, gate, start, length)
        return y, F.layer_norm(y.to(wide), y.shape[-1:], _to(weight, wide), _to(bias, wide), eps).to(x.dtype)


def _check(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor | None,
    gate: Tensor | None,
    start: int,
    length: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    check_blend("gated_blend_norm", x, delta, prompt_in, gate, start, length)
    check_norm("gated_blend_norm", x, weight, bias, "gated_blend")


def check_norm(caller: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, without: str) -> None:
    """Raise, in the name of `caller`, unless both are frozen [D] or None; `without` is the operation without a norm."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.shape != x.shape[-1:] or not tensor.is_floating_point():
            raise ValueError(
                f"`{caller}`: `{name}` must be floating point, [D] = [{x.shape[-1]}], or None; "
                f"got {tensor.dtype}, {tuple(tensor.shape)}; reshape it"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"`{caller}`: `{name}` is on {tensor.device} and `x` on {x.device}; move it there"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"`{caller}`: `{name}` requires a gradient, and the norm's weights are frozen here; "
                f"call `{without}` and `torch.nn.functional.layer_norm`, or detach it"
            )


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


# The operator ---------------------------------------------------------------------------------------------------


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, wide = x.shape[:2], accumulation_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        x.new_empty(rows, dtype=wide),
        x.new_empty(rows, dtype=wide),
    )


def _fake_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    difference: Tensor | None,
    start: int,
    length: int,
    need_input: bool,
    need_prompt: bool,
    need_gate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, D = y.shape
    return (
        y.new_empty(y.shape if need_input else 0),
        y.new_empty((B, length, D) if need_prompt else 0),
        y.new_empty(0) if gate is None else gate.new_empty(gate.shape if need_gate else 0),
    )


def _flops(*args: Any, **kwargs: Any) -> int:
    return 0  # FlopCounterMode counts matrix products alone.


_OPERATOR = define(
    "gated_blend_norm(Tensor x, Tensor delta, Tensor prompt_in, Tensor? gate, SymInt start, SymInt length, "
    "Tensor? weight, Tensor? bias, float eps, str backend) "
    "-> (Tensor y, Tensor normed, Tensor mean, Tensor rstd)",
    fake=_fake,
    flops=_flops,
)
# One of the two gradients may be None; `difference` as in `gated_blend_backward`.
_BACKWARD = define(
    "gated_blend_norm_backward(Tensor? grad_y, Tensor? grad_normed, Tensor y, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? gate, Tensor? difference, SymInt start, SymInt length, bool need_input, "
    "bool need_prompt, bool need_gate, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    flops=_flops,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, delta, prompt_in, gate, start, length, weight, _bias, _eps, backend = inputs
    y, _normed, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.start, ctx.length, ctx.backend = start, length, backend
    difference = None
    if ctx.needs_input_grad[3]:
        difference = x.narrow(1, start, length) + delta.narrow(1, start, length) - prompt_in
    ctx.save_for_backward(y, mean, rstd, weight, gate, difference)


def _backward(ctx: Any, grad_y: Tensor | None, grad_normed: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None and grad_normed is None:
        return (None,) * 10
    need_x, need_delta, need_prompt, need_gate = ctx.needs_input_grad[:4]
    d_input, d_prompt, d_gate = torch.ops.fastprompt.gated_blend_norm_backward(
        grad_y,
        grad_normed,
        *ctx.saved_tensors,
        ctx.start,
        ctx.length,
        need_x or need_delta,
        need_prompt,
        need_gate,
        ctx.backend,
    )
    return (
        d_input if need_x else None,
        d_input if need_delta else None,
        d_prompt if need_prompt else None,
        d_gate if need_gate else None,
        *(None,) * 6,
    )


differentiate(_OPERATOR, setup=_setup, backward=_backward)
as_gradient(_BACKWARD)
autocast(_OPERATOR, promote=(0, 1, 2))


# The backend `eager` --------------------------------------------------------------------------------------------


def _forward_eager(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor,
    gate: Tensor | None,
    start: int,
    length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if gate is None:
        y = (x + delta).contiguous()
    else:
        y = dispatch.run("gated_blend", "eager", x, delta, prompt_in, gate, start, length)
    return y, *norm_rows(y, weight, bias, eps)


def norm_rows(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of y [B, N, D] in its dtype, and mean and 1/deviation [B, N] in float32 or better."""
    wide = accumulation_dtype(y.dtype)
    normed, mean, rstd = torch.native_layer_norm(
        y.to(wide), y.shape[-1:], _to(weight, wide), _to(bias, wide), eps
    )
    return normed.to(y.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def _backward_eager(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    difference: Tensor | None,
    start: int,
    length: int,
    need_input: bool,
    need_prompt: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(y.dtype)
    grad = torch.zeros_like(y, dtype=wide) if grad_y is None else grad_y.to(wide)
    if grad_normed is not None:
        grad = grad + torch.ops.aten.native_layer_norm_backward(
            *(grad_normed.to(wide), y.to(wide), y.shape[-1:], mean[..., None], rstd[..., None]),
            *(_to(weight, wide), None, [True, False, False]),
        )[0]  # fmt: skip
    if gate is None:
        d_input = grad.to(y.dtype, copy=True, memory_format=torch.contiguous_format)
        return d_input if need_input else y.new_empty(0), y.new_empty(0), y.new_empty(0)
    needs = (need_input, need_prompt, need_gate)
    d_input, d_prompt, d_gate = dispatch.run(
        "gated_blend_backward", "eager", grad, gate, difference, start, length, *needs
    )
    return d_input.to(y.dtype), d_prompt.to(y.dtype), d_gate


dispatch.register("gated_blend_norm", "eager", _forward_eager, dispatch.always)
dispatch.register("gated_blend_norm_backward", "eager", _backward_eager, dispatch.always)
triton_backend.serve("gated_blend_norm", "gated_blend", "norm_forward")
triton_backend.serve("gated_blend_norm_backward", "gated_blend", "norm_backward")
