"""Folded cross-attention's kernels: softmax_h(x·keyᵀ + bias)·value (+ out_bias, + x), all heads in one program.

A program holds the scores of its rows for all H·P columns in registers, as up to four tiles: heads in two groups H0 and
H1, each head's prompts in two pieces P0 and P1, powers of two (folded_cross_attention_config.py). So each softmax is
computed within one program, x is read and the output written once, and only the program's own rows are read again, for
the residual. Each program reads the folded matrices from the L2 cache.

The backward has the same structure: grad·valueᵀ, then the softmax's gradient from the saved weights, then its product
with key.
"""

import triton
import triton.language as tl


@triton.jit
def _column(
    H: tl.constexpr, P: tl.constexpr, H_START: tl.constexpr, P_START: tl.constexpr,
    HEADS: tl.constexpr, PROMPTS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Return, for each column of a tile, its row in the folded matrices, and whether it exists.

    RUN divides every position in memory where a run of columns starts.
    """
    o_c = tl.arange(0, HEADS * PROMPTS)
    i_h = H_START + o_c // PROMPTS
    i_p = P_START + o_c % PROMPTS
    mask = i_h < H
    if P_START + PROMPTS > P:
        mask = mask & (i_p < P)
    # Without the hints the weights are loaded one by one, with more pointers than registers.
    return tl.max_contiguous(tl.multiple_of(i_h * P + i_p, RUN), PROMPTS), mask  # [HEADS·PROMPTS]


@triton.jit
def _row(o_m, M, N, p_base, stride_b, stride_n, ALIGNED: tl.constexpr):
    """Return pointers to the rows `o_m` of [B, N, D]."""
    i_m = tl.minimum(o_m, M - 1)
    p_row = p_base + (i_m // N).to(tl.int64) * stride_b + (i_m % N).to(tl.int64) * stride_n
    if ALIGNED:
        p_row = tl.multiple_of(p_row, 16)
    return p_row  # [BLOCK_M]


@triton.jit
def _score(acc, b_x, p_matrix, o_c, m_c, o_d, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + x·matrixᵀ for one tile of columns and one step of the width."""
    mask = m_c[:, None]
    if D % BLOCK > 0:
        mask = mask & (o_d < D)[None, :]
    b_a = tl.load(p_matrix + o_c[:, None] * D + o_d[None, :], mask=mask, other=0.0)  # [C, BLOCK]
    return tl.dot(b_x, tl.trans(b_a), acc=acc, input_precision=PRECISION)  # [BLOCK_M, C]


@triton.jit
def _scores(
    p_row, m_row, p_matrix, o_00, m_00, o_01, m_01, o_10, m_10, o_11, m_11,
    D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return rows·matrixᵀ in four tiles; those without columns repeat the first and generate no code."""
    s_00 = tl.zeros([BLOCK_M, H0 * P0], tl.float32)
    s_01 = s_00
    s_10 = s_00
    s_11 = s_00
    if P1 > 0:
        s_01 = tl.zeros([BLOCK_M, H0 * P1], tl.float32)
    if H1 > 0:
        s_10 = tl.zeros([BLOCK_M, H1 * P0], tl.float32)
        if P1 > 0:
            s_11 = tl.zeros([BLOCK_M, H1 * P1], tl.float32)
    for start in range(0, D, BLOCK_K):
        o_d = start + tl.arange(0, BLOCK_K)
        mask = m_row[:, None]
        if D % BLOCK_K > 0:
            mask = mask & (o_d < D)[None, :]
        b_x = tl.load(p_row[:, None] + o_d[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        b_x = b_x.to(p_matrix.dtype.element_ty)
        s_00 = _score(s_00, b_x, p_matrix, o_00, m_00, o_d, D, BLOCK_K, PRECISION)
        if P1 > 0:
            s_01 = _score(s_01, b_x, p_matrix, o_01, m_01, o_d, D, BLOCK_K, PRECISION)
        if H1 > 0:
            s_10 = _score(s_10, b_x, p_matrix, o_10, m_10, o_d, D, BLOCK_K, PRECISION)
            if P1 > 0:
                s_11 = _score(s_11, b_x, p_matrix, o_11, m_11, o_d, D, BLOCK_K, PRECISION)
    return s_00, s_01, s_10, s_11


@triton.jit
def _mix(acc, w, p_matrix, o_c, m_c, o_d, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + w·matrix for one tile of columns and one piece of the width."""
    mask = m_c[:, None]
    if D % BLOCK > 0:
        mask = mask & (o_d < D)[None, :]
    b_v = tl.load(p_matrix + o_c[:, None] * D + o_d[None, :], mask=mask, other=0.0)  # [C, BLOCK]
    return tl.dot(w, b_v, acc=acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK]


@triton.jit
def _mixed(
    p_row, mask, w_00, w_01, w_10, w_11, p_matrix, o_00, m_00, o_01, m_01, o_10, m_10, o_11, m_11, o_d,
    D: tl.constexpr, H1: tl.constexpr, P1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return weights·matrix, plus the rows themselves if RESIDUAL, for one piece of the width, over all four tiles."""
    if RESIDUAL:
        acc = tl.load(p_row[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _mix(acc, w_00, p_matrix, o_00, m_00, o_d, D, BLOCK_D, PRECISION)
    if P1 > 0:
        acc = _mix(acc, w_01, p_matrix, o_01, m_01, o_d, D, BLOCK_D, PRECISION)
    if H1 > 0:
        acc = _mix(acc, w_10, p_matrix, o_10, m_10, o_d, D, BLOCK_D, PRECISION)
        if P1 > 0:
            acc = _mix(acc, w_11, p_matrix, o_11, m_11, o_d, D, BLOCK_D, PRECISION)
    return acc  # [BLOCK_M, BLOCK_D]


@triton.jit
def _by_head(x, HEADS: tl.constexpr):
    """Reshape [BLOCK_M, HEADS·PROMPTS] to [BLOCK_M, HEADS, PROMPTS], for reductions."""
    return tl.reshape(x, [x.shape[0], HEADS, x.shape[1] // HEADS])


@triton.jit
def _spread(x, PROMPTS: tl.constexpr):
    """Repeat a number per head [BLOCK_M, HEADS] for each of its prompts: [BLOCK_M, HEADS·PROMPTS].

    In two dimensions Triton keeps the layout of the products; in three it may choose that of the loads and move
    accumulators through shared memory.
    """
    x = tl.broadcast_to(x[:, :, None], [x.shape[0], x.shape[1], PROMPTS])
    return tl.reshape(x, [x.shape[0], x.shape[1] * PROMPTS])


@triton.jit
def _biased(s, p_bias, o_c, m_c, P: tl.constexpr, P_START: tl.constexpr, PROMPTS: tl.constexpr):
    """Add the bias to scores, -inf for padded prompts; padded heads stay finite."""
    bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if P_START + PROMPTS > P:
        bias = tl.where(P_START + tl.arange(0, s.shape[1]) % PROMPTS < P, bias, float("-inf"))
    return s + bias[None, :]


@triton.jit
def _softmax(
    s_0, s_1, p_bias, o_0, m_0, o_1, m_1, P: tl.constexpr,
    HEADS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """Return the softmax of each head of one group over both pieces of its prompts."""
    s_0 = _biased(s_0, p_bias, o_0, m_0, P, 0, P0)
    high = tl.max(_by_head(s_0, HEADS), 2)
    if P1 > 0:
        s_1 = _biased(s_1, p_bias, o_1, m_1, P, P0, P1)
        high = tl.maximum(high, tl.max(_by_head(s_1, HEADS), 2))
    w_0 = tl.exp(s_0 - _spread(high, P0))
    total = tl.sum(_by_head(w_0, HEADS), 2)
    w_1 = w_0
    if P1 > 0:
        w_1 = tl.exp(s_1 - _spread(high, P1))
        total += tl.sum(_by_head(w_1, HEADS), 2)
    inverse = 1.0 / total
    w_0 *= _spread(inverse, P0)
    if P1 > 0:
        w_1 *= _spread(inverse, P1)
    return w_0, w_1  # [BLOCK_M, HEADS·P0], [BLOCK_M, HEADS·P1]


@triton.jit
def _store(p_rows, m_row, w, o_c, m_c):
    """Write one tile of columns into rows `p_rows` of [M, H·P]."""
    tl.store(p_rows[:, None] + o_c[None, :], w, mask=m_row[:, None] & m_c[None, :])


@triton.jit
def _statistics(mean, m2, y, done, m_d, WIDTH: tl.constexpr, D: tl.constexpr):
    """Add y [BLOCK_M, WIDTH] to mean and sum of squared deviations [BLOCK_M] of the first `done` columns.

    Uses the update of Chan, Golub and LeVeque, which stays precise for a large mean.
    """
    count = WIDTH if D % WIDTH == 0 else tl.minimum(WIDTH, D - done)
    if D % WIDTH > 0:
        y = tl.where(m_d[None, :], y, 0.0)
    mean_y = tl.sum(y, 1) / count
    y -= mean_y[:, None]
    if D % WIDTH > 0:
        y = tl.where(m_d[None, :], y, 0.0)
    step = mean_y - mean
    share = count / (done + count)  # of the columns seen
    return mean + step * share, m2 + tl.sum(y * y, 1) + step * step * (done * share)


@triton.jit(do_not_specialize=["M", "N", "stride_xb", "stride_xn"])
def folded_cross_attention_fwd_kernel(
    p_x, p_key, p_bias, p_value, p_out_bias, p_out, p_weights,
    p_norm_weight, p_norm_bias, p_normed, p_mean, p_rstd,
    eps, M, N, stride_xb, stride_xn,
    H: tl.constexpr, P: tl.constexpr, D: tl.constexpr, D_OUT: tl.constexpr,
    H0: tl.constexpr, H1: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute rows [BLOCK_M] of `out` [M, D_OUT], of the softmax `weights` [M, H·P] to KEEP, and of the NORM."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_m < M
    p_row = _row(o_m, M, N, p_x, stride_xb, stride_xn, ALIGNED)
    o_00, m_00 = _column(H, P, 0, 0, H0, P0, RUN)
    o_01, m_01 = _column(H, P, 0, P0, H0, P1 if P1 > 0 else P0, RUN)
    o_10, m_10 = _column(H, P, H0, 0, H1 if H1 > 0 else H0, P0, RUN)
    o_11, m_11 = _column(H, P, H0, P0, H1 if H1 > 0 else H0, P1 if P1 > 0 else P0, RUN)
    s_00, s_01, s_10, s_11 = _scores(
        p_row, m_row, p_key, o_00, m_00, o_01, m_01, o_10, m_10, o_11, m_11,
        D, H0, H1, P0, P1, BLOCK_M, BLOCK_K, PRECISION,
    )  # fmt: skip
    dtype = p_value.dtype.element_ty
    w_00, w_01 = _softmax(s_00, s_01, p_bias, o_00, m_00, o_01, m_01, P, H0, P0, P1)
    w_00, w_01 = w_00.to(dtype), w_01.to(dtype)
    w_10, w_11 = w_00, w_01
    if H1 > 0:
        w_10, w_11 = _softmax(s_10, s_11, p_bias, o_10, m_10, o_11, m_11, P, H1, P0, P1)
        w_10, w_11 = w_10.to(dtype), w_11.to(dtype)
    if KEEP:
        p_kept = p_weights + o_m.to(tl.int64) * (H * P)
        _store(p_kept, m_row, w_00, o_00, m_00)
        if P1 > 0:
            _store(p_kept, m_row, w_01, o_01, m_01)
        if H1 > 0:
            _store(p_kept, m_row, w_10, o_10, m_10)
            if P1 > 0:
                _store(p_kept, m_row, w_11, o_11, m_11)
    o_out = o_m.to(tl.int64)[:, None] * D_OUT
    mean = tl.zeros([BLOCK_M], tl.float32)
    m2 = mean
    for start in range(0, D_OUT, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D_OUT
        mask = m_row[:, None] & m_d[None, :]
        acc = _mixed(
            p_row, mask, w_00, w_01, w_10, w_11, p_value, o_00, m_00, o_01, m_01, o_10, m_10, o_11, m_11, o_d,
            D_OUT, H1, P1, BLOCK_M, BLOCK_D, RESIDUAL, PRECISION,
        )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(p_out_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        out = acc.to(p_out.dtype.element_ty)
        tl.store(p_out + o_out + o_d[None, :], out, mask=mask)
        if NORM:
            # Of the rounded output, the input of the next operation.
            mean, m2 = _statistics(mean, m2, out.to(tl.float32), start, m_d, BLOCK_D, D_OUT)
    if NORM:
        rstd = 1 / tl.sqrt(m2 / D_OUT + eps)
        tl.store(p_mean + o_m, mean, mask=m_row)
        tl.store(p_rstd + o_m, rstd, mask=m_row)
        # Read the program's own rows again, from the cache, after all of its threads have written theirs.
        tl.debug_barrier()
        for start in range(0, D_OUT, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            m_d = o_d < D_OUT
            mask = m_row[:, None] & m_d[None, :]
            b_y = tl.load(p_out + o_out + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
            b_y = (b_y - mean[:, None]) * rstd[:, None]  # [BLOCK_M, BLOCK_D]
            if HAS_NORM_WEIGHT:
                b_y *= tl.load(p_norm_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
            if HAS_NORM_BIAS:
                b_y += tl.load(p_norm_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
            tl.store(p_normed + o_out + o_d[None, :], b_y.to(p_normed.dtype.element_ty), mask=mask)


@triton.jit
def _load(p_rows, m_row, o_c, m_c):
    """Load one tile of columns of rows `p_rows` of [M, H·P]."""
    return tl.load(p_rows[:, None] + o_c[None, :], mask=m_row[:, None] & m_c[None, :], other=0.0)


@triton.jit
def _d_softmax(
    d_0, d_1, p_rows, m_row, o_0, m_0, o_1, m_1, HEADS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr
):
    """Return the gradients of the scores of one group of heads from those of the weights at `p_rows`."""
    w_0 = _load(p_rows, m_row, o_0, m_0).to(tl.float32)
    delta = tl.sum(_by_head(w_0 * d_0, HEADS), 2)
    w_1 = w_0
    if P1 > 0:
        w_1 = _load(p_rows, m_row, o_1, m_1).to(tl.float32)
        delta += tl.sum(_by_head(w_1 * d_1, HEADS), 2)
    d_0 = w_0 * (d_0 - _spread(delta, P0))
    if P1 > 0:
        d_1 = w_1 * (d_1 - _spread(delta, P1))
    return d_0, d_1  # [BLOCK_M, HEADS·P0], [BLOCK_M, HEADS·P1]


@triton.jit(do_not_specialize=["M", "N", "stride_gb", "stride_gn"])
def folded_cross_attention_bwd_kernel(
    p_grad, p_key, p_value, p_weights, p_dx, p_ds,
    M, N, stride_gb, stride_gn,
    H: tl.constexpr, P: tl.constexpr, D: tl.constexpr, D_OUT: tl.constexpr,
    H0: tl.constexpr, H1: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    RESIDUAL: tl.constexpr, NEEDS_DX: tl.constexpr, NEEDS_DS: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute rows [BLOCK_M] of the scores' gradient `ds` [M, H·P] and of `dx` [M, D]."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_m < M
    p_row = _row(o_m, M, N, p_grad, stride_gb, stride_gn, ALIGNED)
    o_00, m_00 = _column(H, P, 0, 0, H0, P0, RUN)
    o_01, m_01 = _column(H, P, 0, P0, H0, P1 if P1 > 0 else P0, RUN)
    o_10, m_10 = _column(H, P, H0, 0, H1 if H1 > 0 else H0, P0, RUN)
    o_11, m_11 = _column(H, P, H0, P0, H1 if H1 > 0 else H0, P1 if P1 > 0 else P0, RUN)
    d_00, d_01, d_10, d_11 = _scores(
        p_row, m_row, p_value, o_00, m_00, o_01, m_01, o_10, m_10, o_11, m_11,
        D_OUT, H0, H1, P0, P1, BLOCK_M, BLOCK_K, PRECISION,
    )  # fmt: skip
    dtype = p_weights.dtype.element_ty
    o_row = tl.minimum(o_m, M - 1).to(tl.int64)
    p_kept = p_weights + o_row * (H * P)
    s_00, s_01 = _d_softmax(d_00, d_01, p_kept, m_row, o_00, m_00, o_01, m_01, H0, P0, P1)
    s_00, s_01 = s_00.to(dtype), s_01.to(dtype)
    s_10, s_11 = s_00, s_01
    if H1 > 0:
        s_10, s_11 = _d_softmax(d_10, d_11, p_kept, m_row, o_10, m_10, o_11, m_11, H1, P0, P1)
        s_10, s_11 = s_10.to(dtype), s_11.to(dtype)
    if NEEDS_DS:
        p_made = p_ds + o_row * (H * P)
        _store(p_made, m_row, s_00, o_00, m_00)
        if P1 > 0:
            _store(p_made, m_row, s_01, o_01, m_01)
        if H1 > 0:
            _store(p_made, m_row, s_10, o_10, m_10)
            if P1 > 0:
                _store(p_made, m_row, s_11, o_11, m_11)
    if NEEDS_DX:
        p_dx += o_row[:, None] * D
        for start in range(0, D, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            mask = m_row[:, None] & (o_d < D)[None, :]
            acc = _mixed(
                p_row, mask, s_00, s_01, s_10, s_11, p_key, o_00, m_00, o_01, m_01, o_10, m_10, o_11, m_11, o_d,
                D, H1, P1, BLOCK_M, BLOCK_D, RESIDUAL, PRECISION,
            )  # fmt: skip
            tl.store(p_dx + o_d[None, :], acc.to(p_dx.dtype.element_ty), mask=mask)
