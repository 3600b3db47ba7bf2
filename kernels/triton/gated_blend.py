"""Gated prompt blending, alone or with the LayerNorm that follows: one pass over the sequence, one row at a time.

A program holds whole rows, so that mean and variance need no second pass. Prompt rows differ from the others by one
masked load. The backward writes one number per prompt row and uses no atomics, so their sum has the same bits in every
run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton.gated_blend_config import MAX_WIDTH, choose

# Sizes of a batch: kernels are not specialized on their divisibility.
_SIZES = ["count", "first", "span", "N", "start", "length"]


@triton.jit
def _row_starts(p_base, i_b, i_n, stride_b, stride_n, ALIGNED: tl.constexpr):
    p_row = p_base + i_b.to(tl.int64) * stride_b + i_n.to(tl.int64) * stride_n
    if ALIGNED:
        # For a width such as 1000 Triton cannot see the alignment, and without it loads single elements.
        p_row = tl.multiple_of(p_row, 16)
    return p_row  # [ROWS]


@triton.jit
def _load(p_row, o_d, stride_d, mask):
    return tl.load(p_row[:, None] + (o_d * stride_d)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        *_SIZES, "stride_xb", "stride_xn", "stride_db", "stride_dn", "stride_pb", "stride_pn",
    ]
)  # fmt: skip
def gated_blend_fwd_kernel(
    p_x, p_delta, p_prompt, p_gate, p_weight, p_bias, p_y, p_normed, p_mean, p_rstd,
    eps, count, N, start, length,
    stride_xb, stride_xn, stride_xd, stride_db, stride_dn, stride_dd, stride_pb, stride_pn, stride_pd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Compute `count` rows [D] of x + delta, blended and, with NORM, normed."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_b, i_n = o_row // N, o_row % N
    m_row = o_row < count
    mask = m_row[:, None] & m_d[None, :]

    y = _load(_row_starts(p_x, i_b, i_n, stride_xb, stride_xn, ALIGNED), o_d, stride_xd, mask)
    y += _load(_row_starts(p_delta, i_b, i_n, stride_db, stride_dn, ALIGNED), o_d, stride_dd, mask)
    gate = tl.load(p_gate).to(tl.float32)
    m_blend = (i_n >= start) & (i_n < start + length)
    p_row = _row_starts(p_prompt, i_b, i_n - start, stride_pb, stride_pn, ALIGNED)
    b_prompt = _load(p_row, o_d, stride_pd, mask & m_blend[:, None])
    y = tl.where(m_blend[:, None], gate * y + (1 - gate) * b_prompt, y)  # [ROWS, BLOCK_D]
    y = y.to(p_y.dtype.element_ty)
    o_out = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_y + o_out, y, mask=mask)

    if NORM:
        # Of the rounded y, the input of the next operation.
        y = y.to(tl.float32)
        mean = tl.sum(y, 1) / D
        y = tl.where(m_d[None, :], y - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(y * y, 1) / D + eps)
        y *= rstd[:, None]
        if HAS_WEIGHT:
            y *= tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        tl.store(p_normed + o_out, y.to(p_normed.dtype.element_ty), mask=mask)
        tl.store(p_mean + o_row, mean, mask=m_row)
        tl.store(p_rstd + o_row, rstd, mask=m_row)


@triton.jit(do_not_specialize=[*_SIZES, "stride_yb", "stride_yn", "stride_nb", "stride_nn"])
def gated_blend_bwd_kernel(
    p_dy, p_dnormed, p_y, p_mean, p_rstd, p_weight, p_gate, p_difference, p_dx, p_dprompt, p_partial,
    count, first, span, N, start, length,
    stride_yb, stride_yn, stride_yd, stride_nb, stride_nn, stride_nd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_DNORMED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_GATE: tl.constexpr,
    NEED_INPUT: tl.constexpr, NEED_PROMPT: tl.constexpr, NEED_GATE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the rows first .. first+span of every image, `count` in all."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_b, i_n = o_row // span, first + o_row % span
    m_row = o_row < count
    mask = m_row[:, None] & m_d[None, :]
    o_flat = i_b.to(tl.int64) * N + i_n  # the row among all B * N

    dx = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if HAS_DNORMED:
        p_row = _row_starts(p_dnormed, i_b, i_n, stride_nb, stride_nn, ALIGNED)
        dx = _load(p_row, o_d, stride_nd, mask)
        if HAS_WEIGHT:
            dx *= tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        mean = tl.load(p_mean + o_flat, mask=m_row, other=0.0)
        rstd = tl.load(p_rstd + o_flat, mask=m_row, other=0.0)
        b_y = tl.load(p_y + o_flat[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        unit = (b_y - mean[:, None]) * rstd[:, None]  # before weight and bias
        dx -= (tl.sum(dx, 1) / D)[:, None] + unit * (tl.sum(dx * unit, 1) / D)[:, None]
        dx *= rstd[:, None]
    if HAS_DY:
        dx += _load(_row_starts(p_dy, i_b, i_n, stride_yb, stride_yn, ALIGNED), o_d, stride_yd, mask)

    if HAS_GATE:
        gate = tl.load(p_gate).to(tl.float32)
        m_blend = m_row & (i_n >= start) & (i_n < start + length)
        o_blend = i_b.to(tl.int64) * length + i_n - start  # the row among all B * length
        o_prompt = o_blend[:, None] * D + o_d[None, :]
        m_prompt = mask & m_blend[:, None]
        if NEED_GATE:
            b_difference = tl.load(p_difference + o_prompt, mask=m_prompt, other=0.0).to(tl.float32)
            tl.store(p_partial + o_blend, tl.sum(dx * b_difference, 1), mask=m_blend)
        if NEED_PROMPT:
            tl.store(p_dprompt + o_prompt, ((1 - gate) * dx).to(p_dprompt.dtype.element_ty), mask=m_prompt)
        dx = tl.where(m_blend[:, None], gate * dx, dx)
    if NEED_INPUT:
        tl.store(p_dx + o_flat[:, None] * D + o_d[None, :], dx.to(p_dx.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor,
    gate: Tensor,
    start: int,
    length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, LayerNorm(y) [B, N, D], mean and rstd [B, N] in float32; all but y are empty if `eps` is None."""
    B, N, D = x.shape
    norm = eps is not None
    y, normed = x.new_empty(x.shape), x.new_empty(x.shape if norm else 0)
    mean, rstd = (x.new_empty((B, N) if norm else 0, dtype=torch.float32) for _ in range(2))
    config = choose(launch.architecture(x.device), "fwd", D, norm)
    launch.launch(
        gated_blend_fwd_kernel,
        (triton.cdiv(B * N, config.rows),),
        x.device,
        num_warps=config.num_warps,
        num_stages=1,
        p_x=x,
        p_delta=delta,
        p_prompt=prompt_in,
        p_gate=gate,
        p_weight=None if weight is None else weight.contiguous(),
        p_bias=None if bias is None else bias.contiguous(),
        p_y=y,
        p_normed=normed if norm else None,
        p_mean=mean if norm else None,
        p_rstd=rstd if norm else None,
        eps=eps or 0.0,
        count=B * N,
        N=N,
        start=start,
        length=length,
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        stride_xd=x.stride(2),
        stride_db=delta.stride(0),
        stride_dn=delta.stride(1),
        stride_dd=delta.stride(2),
        stride_pb=prompt_in.stride(0),
        stride_pn=prompt_in.stride(1),
        stride_pd=prompt_in.stride(2),
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        ROWS=config.rows,
        NORM=norm,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        ALIGNED=launch.aligned(x, delta, prompt_in),
    )
    return y, normed, mean, rstd


def can_forward(x: Tensor, *args: object) -> str | None:
    """Return why :func:`forward` cannot run for x [B, N, D], or None."""
    return unsupported_width(x.shape[-1]) or launch.unsupported(x)


def backward(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    difference: Tensor | None,
    start: int,
    length: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d(x) = d(delta) [B, N, D], d(prompt_in) [B, length, D] and d(gate); those not needed are empty."""
    need_input, need_prompt, need_gate = needs
    grads = [g for g in (grad_y, grad_normed) if g is not None]
    like = grads[0]
    of_y, of_normed = like, grads[-1]  # for their strides; one may be missing
    B, N, D = like.shape
    d_input = like.new_empty(like.shape if need_input else 0)
    d_prompt = like.new_empty((B, length, D) if need_prompt else 0)
    d_gate = like.new_empty(0) if gate is None else gate.new_empty(0)
    partial = like.new_empty(B * length if need_gate else 0, dtype=torch.float32)
    # If only prompts or gate train, other rows are not read.
    first, span = (0, N) if need_input else (start, length)
    config = choose(launch.architecture(like.device), "bwd", D, norm=grad_normed is not None)
    launch.launch(
        gated_blend_bwd_kernel,
        (triton.cdiv(B * span, config.rows),),
        like.device,
        num_warps=config.num_warps,
        num_stages=1,
        p_dy=grad_y,
        p_dnormed=grad_normed,
        p_y=y,
        p_mean=mean,
        p_rstd=rstd,
        p_weight=None if weight is None else weight.contiguous(),
        p_gate=gate,
        p_difference=None if difference is None else difference.contiguous(),
        p_dx=d_input,
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
        HAS_GATE=gate is not None,
        NEED_INPUT=need_input,
        NEED_PROMPT=need_prompt,
        NEED_GATE=need_gate,
        ALIGNED=launch.aligned(*grads),
    )
    if need_gate and gate is not None:
        d_gate = partial.sum().to(gate.dtype).reshape(gate.shape)
    return d_input, d_prompt, d_gate


def can_backward(grad_y: Tensor | None, grad_normed: Tensor | None, *args: object) -> str | None:
    """Return why :func:`backward` cannot run for these gradients [B, N, D], or None."""
    grad = grad_normed if grad_y is None else grad_y
    assert grad is not None
    return unsupported_width(grad.shape[-1]) or launch.unsupported(grad)


def unsupported_width(width: int) -> str | None:
    """Return why the kernels cannot run for rows of `width` elements, or None."""
    return None if 1 <= width <= MAX_WIDTH else f"width {width} is not supported (1 to {MAX_WIDTH})"
