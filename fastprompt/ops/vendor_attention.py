"""PyTorch's own fused attention kernels, forward and backward, with the log-sum-exp as a result and as an argument.

`torch.nn.functional.scaled_dot_product_attention` keeps the log-sum-exp to itself. Its kernels do not: with it, the
output over some of the keys can be merged with that over others, and a backward that gets the *joint* output and
log-sum-exp returns the exact gradients for its part of the keys. The kernel is the one that PyTorch itself would take
there (`torch._fused_sdp_choice`): cuDNN, flash or memory-efficient on a GPU, flash on a CPU. Where none takes the
call, plain matrix products run over a few images at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastprompt.ops.operator import accumulation_dtype

aten = torch.ops.aten

_FLASH, _EFFICIENT, _CUDNN = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
)
_LSE_ROWS = 32  # the memory-efficient kernel reads the log-sum-exp of this many rows at a time
_SCORES = 2**26  # bytes of scores that plain products hold at a time


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, *, fused: bool = True) -> tuple[Tensor, Tensor]:
    """Return the attention of q [B, Nq, H, d] to k, v [B, N, H, d], and its log-sum-exp.

    Args:
        fused: False for plain products in any case.

    Returns:
        out [B, Nq, H, d], any strides, and the natural log-sum-exp [B, H, Nq], float64 for float64, else float32.
    """
    B, Nq, H, d = q.shape
    wide = accumulation_dtype(q.dtype)
    q, k, v = heads = _heads_first(q, k, v)
    kernel = _choose(q, k, v, scale) if fused else None
    if kernel is None:
        out, lse = _forward_by_products(q, k, v, scale)
    elif q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, False, scale=scale)
    elif kernel == _FLASH:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*heads, 0.0, False, False, scale=scale)
    elif kernel == _CUDNN:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *heads, None, True, 0.0, False, False, scale=scale
        )
        lse = lse.reshape(B, H, Nq)  # from [B, H, Nq, 1]
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            *heads, None, True, 0.0, False, scale=scale
        )
        lse = lse[..., :Nq]
    return out[..., :d].transpose(1, 2), lse.to(wide).contiguous()


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v for these keys.

    Args:
        grad, out: [B, Nq, H, d], the output over all keys and its gradient; there may be more keys than `k` holds.
        lse: [B, H, Nq], the natural log-sum-exp over all keys, contiguous.
        fused: False for plain products in any case.

    Returns:
        dq [B, Nq, H, d], the part that `k` contributes; dk and dv [B, N, H, d]; any strides.
    """
    d, Nq, N = q.shape[-1], q.shape[1], k.shape[1]
    # One layout for both, whatever the caller's: cuDNN's plans are kept by the layout of q, k and v alone.
    grad, out = _heads_first(grad.contiguous(), out.contiguous())
    q, k, v = _heads_first(q, k, v)
    kernel = _choose(q, k, v, scale) if fused else None
    unused = lse.new_empty((), dtype=torch.int64)  # the state of a dropout that there is not
    if kernel is None:
        dq, dk, dv = _backward_by_products(grad, q, k, v, out, lse, scale)
    elif q.device.type == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, scale=scale
        )
    elif kernel == _FLASH:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, Nq, N, 0.0, False, unused, unused, scale=scale
        )
    elif kernel == _CUDNN:
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse.unsqueeze(-1),
            unused,
            unused,
            None,
            None,
            None,
            Nq,
            N,
            0.0,
            False,
            scale=scale,
        )
    else:
        padded = F.pad(lse, (0, -Nq % _LSE_ROWS), value=torch.inf)  # weights of exp(-inf) = 0
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad,
            q,
            k,
            v,
            None,
            out,
            padded,
            unused,
            unused,
            0.0,
            [True, True, True, False],
            False,
            scale=scale,
        )
    return dq[..., :d].transpose(1, 2), dk[..., :d].transpose(1, 2), dv[..., :d].transpose(1, 2)


def chunks(B: int, bytes_per_image: int) -> Iterator[slice]:
    """Yield ranges that cover B images, each of as many as may hold scores at a time."""
    step = max(1, _SCORES // max(1, bytes_per_image))
    for start in range(0, B, step):
        yield slice(start, start + step)


def _choose(q: Tensor, k: Tensor, v: Tensor, scale: float) -> SDPBackend | None:
    """Return the fused kernel that PyTorch's attention would take for [B, H, N, d], or None."""
    if 0 in q.shape or 0 in k.shape:
        return None
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v, scale=scale))
    known = (_FLASH,) if q.device.type == "cpu" else (_FLASH, _EFFICIENT, _CUDNN)
    return choice if choice in known else None


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Transpose [B, N, H, d] to [B, H, N, d] in a layout that every kernel takes.

    The last dimension is dense. On a GPU head_dim is padded to a multiple of 8, and rows start at multiples of 16
    bytes.
    """
    return tuple(
        (_aligned(x) if x.is_cuda else x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)
        for x in tensors
    )


def _aligned(x: Tensor) -> Tensor:
    if x.shape[-1] % 8:
        return F.pad(x, (0, -x.shape[-1] % 8))
    starts = (x.storage_offset(), *x.stride()[:-1])
    dense = x.stride(-1) == 1 and all(s * x.element_size() % 16 == 0 for s in starts)
    return x if dense else x.contiguous()


def _forward_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (B, H, Nq, _), N, wide = q.shape, k.shape[2], accumulation_dtype(q.dtype)
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, H, Nq), dtype=wide)
    for images in chunks(B, H * Nq * N * lse.element_size()):
        scores = torch.matmul(q[images].to(wide), k[images].to(wide).mT).mul_(scale)
        lse[images] = scores.logsumexp(-1)
        weights = scores.sub_(lse[images].unsqueeze(-1)).exp_()
        out[images] = torch.matmul(weights, v[images].to(wide))
    return out, lse


def _backward_by_products(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, Nq, _), N, wide = q.shape, k.shape[2], lse.dtype
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for images in chunks(B, H * Nq * N * lse.element_size()):
        b_grad, b_q, b_k, b_v, b_out = (x[images].to(wide) for x in (grad, q, k, v, out))
        weights = torch.matmul(b_q, b_k.mT).mul_(scale).sub_(lse[images].unsqueeze(-1)).exp_()
        dv[images] = torch.matmul(weights.mT, b_grad)
        delta = (b_grad * b_out).sum(-1, keepdim=True)
        dscores = torch.matmul(b_grad, b_v.mT).sub_(delta).mul_(weights).mul_(scale)
        dq[images] = torch.matmul(dscores, b_k)
        dk[images] = torch.matmul(dscores.mT, b_q)
    return dq, dk, dv
