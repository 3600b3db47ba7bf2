"""Launchers of the residual add with LayerNorm, whose kernels also serve the gated blend."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton.residual_norm_config import MAX_WIDTH, Config, choose
from fastprompt.kernels.triton.residual_norm_kernels import residual_norm_bwd_kernel, residual_norm_fwd_kernel


class Blend(NamedTuple):
    """The prompt rows start .. start+length, which are blended with `prompt_in` [B, length, D] by `gate`."""

    prompt_in: Tensor
    gate: Tensor
    start: int
    length: int


class BlendGradient(NamedTuple):
    """The same rows in a backward: `difference` [B, length, D] is for d(gate); which gradients are needed."""

    gate: Tensor
    difference: Tensor | None
    start: int
    length: int
    need_prompt: bool
    need_gate: bool


def forward(
    x: Tensor, delta: Tensor, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and LayerNorm(y) [B, N, D], mean and rstd [B, N] in float32."""
    config = choose(launch.architecture(x.device), "fwd", x.shape[-1])
    return launch_forward(config, x, delta, scale, None, weight, bias, eps)


def can_forward(x: Tensor, delta: Tensor, *args: object) -> str | None:
    """Return why :func:`forward` cannot run for x and delta [B, N, D], or None."""
    return unsupported(x, delta)


def backward(
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
    """Return d(x) in y's dtype and d(delta) in `dtype`, both [B, N, D]; those not needed are empty."""
    config = choose(launch.architecture(y.device), "bwd", y.shape[-1])
    norm = (y, mean, rstd, weight)
    return launch_backward(config, grad_y, grad_normed, *norm, scale, None, dtype, needs)[:2]


def can_backward(grad_y: Tensor | None, grad_normed: Tensor | None, *args: object) -> str | None:
    """Return why :func:`backward` cannot run for these gradients [B, N, D], or None."""
    return unsupported(*(g for g in (grad_y, grad_normed) if g is not None))


def unsupported(*rows: Tensor) -> str | None:
    """Return why the kernels cannot run for these tensors [B, N, D], or None."""
    reasons = (launch.unsupported(tensor) for tensor in rows)
    return unsupported_width(rows[0].shape[-1]) or next((r for r in reasons if r is not None), None)


def unsupported_width(width: int) -> str | None:
    """Return why the kernels cannot run for rows of `width` elements, or None."""
    return None if 1 <= width <= MAX_WIDTH else f"width {width} is not supported (1 to {MAX_WIDTH})"


def launch_forward(
    config: Config,
    x: Tensor,
    delta: Tensor,
    scale: Tensor | None,
    blend: Blend | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, LayerNorm(y) [B, N, D], mean and rstd [B, N] in float32; all but y are empty if `eps` is None."""
    B, N, D = x.shape
    norm = eps is not None
    rows = [x, delta] if blend is None else [x, delta, blend.prompt_in]
    y = x.new_empty(x.shape, dtype=functools.reduce(torch.promote_types, (t.dtype for t in rows)))
    normed = delta.new_empty(x.shape if norm else 0)
    mean, rstd = (x.new_empty((B, N) if norm else 0, dtype=torch.float32) for _ in range(2))
    prompt_strides = (0, 0, 0) if blend is None else blend.prompt_in.stride()
    launch.launch(
        residual_norm_fwd_kernel,
        (triton.cdiv(B * N, config.rows),),
        x.device,
        num_warps=config.num_warps,
        num_stages=1,
        p_x=x,
        p_delta=delta,
        p_scale=_contiguous(scale),
        p_prompt=None if blend is None else blend.prompt_in,
        p_gate=None if blend is None else blend.gate,
        p_weight=_contiguous(weight),
        p_bias=_contiguous(bias),
        p_y=y,
        p_normed=normed if norm else None,
        p_mean=mean if norm else None,
        p_rstd=rstd if norm else None,
        eps=eps or 0.0,
        count=B * N,
        N=N,
        start=0 if blend is None else blend.start,
        length=0 if blend is None else blend.length,
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        stride_xd=x.stride(2),
        stride_db=delta.stride(0),
        stride_dn=delta.stride(1),
        stride_dd=delta.stride(2),
        stride_pb=prompt_strides[0],
        stride_pn=prompt_strides[1],
        stride_pd=prompt_strides[2],
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        ROWS=config.rows,
        NORM=norm,
        HAS_SCALE=scale is not None,
        HAS_GATE=blend is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        ALIGNED=launch.aligned(*rows),
    )
    return y, normed, mean, rstd


def launch_backward(
    config: Config,
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    blend: BlendGradient | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return d(x) [B, N, D] in y's dtype, d(delta) in `dtype`, d(prompt_in) [B, length, D] in y's, and d(gate).

    Those not needed are empty: `needs` is for x and delta. `y`, `mean`, `rstd` and `weight` are for `grad_normed`.
    """
    grads = [g for g in (grad_y, grad_normed) if g is not None]
    of_y, of_normed = grads[0], grads[-1]  # for their strides; one may be missing
    B, N, D = of_y.shape
    start, length = (0, 0) if blend is None else (blend.start, blend.length)
    need_prompt, need_gate = (False, False) if blend is None else (blend.need_prompt, blend.need_gate)
    wide = of_y.dtype if grad_y is not None or y is None else y.dtype
    d_x = of_y.new_empty(of_y.shape if needs[0] else 0, dtype=wide)
    d_delta = of_y.new_empty(of_y.shape if needs[1] else 0, dtype=dtype)
    d_prompt = d_x.new_empty((B, length, D) if need_prompt else 0)
    d_gate = of_y.new_empty(0) if blend is None else blend.gate.new_empty(0)
    partial = of_y.new_empty(B * length if need_gate else 0, dtype=torch.float32)
    # If only prompts or gate train, other rows are not read.
    first, span = (0, N) if any(needs) else (start, length)
    launch.launch(
        residual_norm_bwd_kernel,
        (triton.cdiv(B * span, config.rows),),
        of_y.device,
        num_warps=config.num_warps,
        num_stages=1,
        p_dy=grad_y,
        p_dnormed=grad_normed,
        p_y=y,
        p_mean=mean,
        p_rstd=rstd,
        p_weight=_contiguous(weight),
        p_scale=_contiguous(scale),
        p_gate=None if blend is None else blend.gate,
        p_difference=None if blend is None else _contiguous(blend.difference),
        p_dx=d_x,
        p_ddelta=d_delta,
        p_dprompt=d_prompt,
        p_partial=partial,
        count=B * span,
        first=first,
        span=span,
        N=N,
        start=start,
        length=length,
        stride_yb=of_y.stride(0),
        stride_yn=of_y.stride(1),
        stride_yd=of_y.stride(2),
        stride_nb=of_normed.stride(0),
        stride_nn=of_normed.stride(1),
        stride_nd=of_normed.stride(2),
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        ROWS=config.rows,
        HAS_DY=grad_y is not None,
        HAS_DNORMED=grad_normed is not None,
        HAS_WEIGHT=weight is not None,
        HAS_SCALE=scale is not None,
        HAS_GATE=blend is not None,
        NEED_X=needs[0],
        NEED_DELTA=needs[1],
        NEED_PROMPT=need_prompt,
        NEED_GATE=need_gate,
        ALIGNED=launch.aligned(*grads),
    )
    if blend is not None and need_gate:
        d_gate = partial.sum().to(blend.gate.dtype).reshape(blend.gate.shape)
    return d_x, d_delta, d_prompt, d_gate


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
