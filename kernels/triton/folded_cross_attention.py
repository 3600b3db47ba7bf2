"""Launchers of folded cross-attention. PyTorch computes the sums over all rows (gradients of prompts)."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from fastprompt.kernels.triton import folded_cross_attention_config as config
from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton.folded_cross_attention_kernels import (
    folded_cross_attention_bwd_kernel,
    folded_cross_attention_fwd_kernel,
)
from fastprompt.kernels.triton.residual_norm import unsupported_width


def can_forward(x: Tensor, key: Tensor, bias: Tensor, value: Tensor, *rest: object) -> str | None:
    """Return why :func:`forward` cannot run these arguments, or None."""
    *_, eps, keep = rest
    reason = launch.unsupported(x) or launch.unsupported(key) or _too_wide(key)
    if reason is None and eps is not None and keep:
        # The norm's backward is the residual add's kernel.
        reason = unsupported_width(value.shape[2])
    return reason


def forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y [B, N, D_out], the softmax's weights [B, N, H, P], LayerNorm(y), and mean and rstd [B, N] in float32.

    The weights are empty unless `keep`; LayerNorm(y), mean and rstd are empty if `eps` is None.
    """
    B, N, D = x.shape
    H, P, D_out = value.shape
    norm = eps is not None
    dtype = torch.promote_types(x.dtype, key.dtype) if residual else key.dtype
    y = x.new_empty((B, N, D_out), dtype=dtype)
    normed = y.new_empty(y.shape if norm else 0, dtype=key.dtype)
    mean, rstd = (x.new_empty((B, N) if norm else 0, dtype=torch.float32) for _ in range(2))
    x = x if x.stride(2) == 1 else x.contiguous()
    key, value, bias = key.contiguous(), value.contiguous(), bias.contiguous()
    weights = key.new_empty((B, N, H, P) if keep else 0)
    _launch(
        folded_cross_attention_fwd_kernel,
        "fwd",
        x,
        key,
        p_x=x,
        p_key=key,
        p_bias=bias,
        p_value=value,
        p_out_bias=y if out_bias is None else out_bias.contiguous(),
        p_out=y,
        p_weights=weights,
        p_norm_weight=None if norm_weight is None else norm_weight.contiguous(),
        p_norm_bias=None if norm_bias is None else norm_bias.contiguous(),
        p_normed=normed if norm else None,
        p_mean=mean if norm else None,
        p_rstd=rstd if norm else None,
        eps=eps or 0.0,
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        D=D,
        D_OUT=D_out,
        RESIDUAL=residual,
        KEEP=keep,
        HAS_BIAS=out_bias is not None,
        NORM=norm,
        HAS_NORM_WEIGHT=norm_weight is not None,
        HAS_NORM_BIAS=norm_bias is not None,
    )
    return y, weights, normed, mean, rstd


def can_backward(
    grad: Tensor,
    x: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    weights: Tensor | None,
    residual: bool,
    needs: list[bool],
) -> str | None:
    """Return why :func:`backward` cannot run these arguments, or None."""
    reason = launch.unsupported(grad)
    if reason is None and weights is not None:
        reason = launch.unsupported(weights)
    return reason if reason is not None or value is None else _too_wide(value)


def backward(
    grad: Tensor,
    x: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    weights: Tensor | None,
    residual: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, key, bias, value and out_bias; those not in `needs` are empty.

    The kernel computes the scores' gradients and dx. PyTorch's products compute the sums over all rows, in a fixed
    order; they read each operand once, and a kernel here would read the same bytes.
    """
    dx, d_key, d_bias, d_value, d_out_bias = (grad.new_empty(0) for _ in range(5))
    rows = grad.flatten(0, 1)
    if needs[4]:
        d_out_bias = rows.sum(0, dtype=torch.float32).to(grad.dtype)
    if weights is None:
        return dx, d_key, d_bias, d_value, d_out_bias
    B, N, H, P = weights.shape
    weights = weights.contiguous()
    if value is not None:
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        value = value.contiguous()
        matrix = value if key is None else key.contiguous()
        d_scores = torch.empty_like(weights) if needs[1] or needs[2] else weights
        dx = grad.new_empty((B, N, matrix.shape[2])) if needs[0] else dx
        _launch(
            folded_cross_attention_bwd_kernel,
            "bwd",
            grad,
            value,
            p_grad=grad,
            p_key=matrix,
            p_value=value,
            p_weights=weights,
            p_dx=dx,
            p_ds=d_scores,
            stride_gb=grad.stride(0),
            stride_gn=grad.stride(1),
            D=matrix.shape[2],
            D_OUT=value.shape[2],
            RESIDUAL=residual,
            NEEDS_DX=needs[0],
            NEEDS_DS=needs[1] or needs[2],
        )
        flat = d_scores.view(B * N, H * P)
        if needs[1] and x is not None:
            d_key = (flat.mT @ x.flatten(0, 1).to(flat.dtype)).view(H, P, x.shape[2])
        if needs[2]:
            d_bias = flat.sum(0, dtype=torch.float32).to(flat.dtype).view(H, P)
    if needs[3]:
        d_value = (weights.view(B * N, H * P).mT @ rows.to(weights.dtype)).view(H, P, grad.shape[2])
    return dx, d_key, d_bias, d_value, d_out_bias


def _too_wide(folded: Tensor) -> str | None:
    H, P, _ = folded.shape
    if P == 0:
        return "there are no prompts"
    total = config.split(H, P).total
    most = config.limit(launch.architecture(folded.device), folded.element_size())
    if total > most:
        return f"{H} heads of {P} prompts, {total} columns of {folded.dtype}, are not supported (up to {most} columns)"
    return None


def _launch(kernel: Any, name: config.Kernel, rows: Tensor, folded: Tensor, **arguments: Any) -> None:
    """Launch over the rows of [B, N, D], with the tiles and sizes for the matrices `folded` [H, P, D]."""
    B, N, _ = rows.shape
    H, P, _ = folded.shape
    columns = config.split(H, P)
    itemsize = folded.element_size()
    wide_rows = rows.element_size() > itemsize
    norm = arguments.get("NORM", False)
    chosen = config.choose(launch.architecture(rows.device), name, columns.total, itemsize, wide_rows, norm)
    row_bytes = [stride * rows.element_size() for stride in rows.stride()[:2]]
    launch.launch(
        kernel,
        (triton.cdiv(B * N, chosen.block_m),),
        rows.device,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        M=B * N,
        N=N,
        H=H,
        P=P,
        H0=columns.heads[0],
        H1=columns.heads[1],
        P0=columns.prompts[0],
        P1=columns.prompts[1],
        RUN=math.gcd(P, columns.prompts[0], columns.prompts[1] or columns.prompts[0]),
        BLOCK_M=chosen.block_m,
        BLOCK_K=chosen.block_k,
        BLOCK_D=chosen.block_d,
        ALIGNED=all(size % 16 == 0 for size in (*row_bytes, rows.data_ptr())),
        PRECISION=launch.input_precision(rows.dtype),
        **arguments,
    )
