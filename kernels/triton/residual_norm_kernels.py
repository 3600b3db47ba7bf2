"""One pass over the residual stream: add a branch, blend the prompt rows, and compute the LayerNorm that follows.

A program holds whole rows, so that mean and variance need no second pass. Rows of up to 1024 elements belong to one
warp, whose sums need no shared memory. Each tensor has its own dtype; all arithmetic is in float32. Prompt rows differ
from the others by one masked load. The backward writes one number per prompt row and uses no atomics, so their sum has
the same bits in every run.
"""

import triton
import triton.language as tl

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


@triton.jit
def _vector(p_vector, o_d, m_d):
    """Load a scale, weight or bias [D] for all rows."""
    return tl.load(p_vector + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]


@triton.jit(
    # Gates are single elements of a vector: at most positions not aligned to 16 bytes.
    do_not_specialize_on_alignment=["p_gate"],
    do_not_specialize=[
        *_SIZES, "stride_xb", "stride_xn", "stride_db", "stride_dn", "stride_pb", "stride_pn",
    ],
)  # fmt: skip
def residual_norm_fwd_kernel(
    p_x, p_delta, p_scale, p_prompt, p_gate, p_weight, p_bias, p_y, p_normed, p_mean, p_rstd,
    eps, count, N, start, length,
    stride_xb, stride_xn, stride_xd, stride_db, stride_dn, stride_dd, stride_pb, stride_pn, stride_pd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Compute `count` rows [D] of x + scale · delta, blended with a gate, and normed with NORM."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_b, i_n = o_row // N, o_row % N
    m_row = o_row < count
    mask = m_row[:, None] & m_d[None, :]

    y = _load(_row_starts(p_x, i_b, i_n, stride_xb, stride_xn, ALIGNED), o_d, stride_xd, mask)
    b_delta = _load(_row_starts(p_delta, i_b, i_n, stride_db, stride_dn, ALIGNED), o_d, stride_dd, mask)
    if HAS_SCALE:
        b_delta *= _vector(p_scale, o_d, m_d)
    y += b_delta  # [ROWS, BLOCK_D]
    if HAS_GATE:
        gate = tl.load(p_gate).to(tl.float32)
        m_blend = (i_n >= start) & (i_n < start + length)
        p_row = _row_starts(p_prompt, i_b, i_n - start, stride_pb, stride_pn, ALIGNED)
        b_prompt = _load(p_row, o_d, stride_pd, mask & m_blend[:, None])
        y = tl.where(m_blend[:, None], gate * y + (1 - gate) * b_prompt, y)
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
            y *= _vector(p_weight, o_d, m_d)
        if HAS_BIAS:
            y += _vector(p_bias, o_d, m_d)
        tl.store(p_normed + o_out, y.to(p_normed.dtype.element_ty), mask=mask)
        tl.store(p_mean + o_row, mean, mask=m_row)
        tl.store(p_rstd + o_row, rstd, mask=m_row)


@triton.jit(
    do_not_specialize_on_alignment=["p_gate"],
    do_not_specialize=[*_SIZES, "stride_yb", "stride_yn", "stride_nb", "stride_nn"],
)
def residual_norm_bwd_kernel(
    p_dy, p_dnormed, p_y, p_mean, p_rstd, p_weight, p_scale, p_gate, p_difference,
    p_dx, p_ddelta, p_dprompt, p_partial,
    count, first, span, N, start, length,
    stride_yb, stride_yn, stride_yd, stride_nb, stride_nn, stride_nd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_DNORMED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_GATE: tl.constexpr, NEED_X: tl.constexpr, NEED_DELTA: tl.constexpr, NEED_PROMPT: tl.constexpr,
    NEED_GATE: tl.constexpr, ALIGNED: tl.constexpr,
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
            dx *= _vector(p_weight, o_d, m_d)
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
    o_out = o_flat[:, None] * D + o_d[None, :]
    if NEED_X:
        tl.store(p_dx + o_out, dx.to(p_dx.dtype.element_ty), mask=mask)
    if NEED_DELTA:
        if HAS_SCALE:
            dx *= _vector(p_scale, o_d, m_d)
        tl.store(p_ddelta + o_out, dx.to(p_ddelta.dtype.element_ty), mask=mask)
