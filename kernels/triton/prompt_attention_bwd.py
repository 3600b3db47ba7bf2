"""Prompt-augmented attention, backward (docs/performance.md).

`delta` = Σ out·d(out) per row and the LSE are written once, padded to whole tiles, so that no loop has to mask rows.
Two kernels follow: a program of the first owns a tile of keys and loops over the queries (dk, dv), a program of the
second owns a tile of queries and loops over the keys (dq). For up to 256 keys there is a single kernel, whose programs
own a head of an image: five products instead of seven. All compute the transposed scores k·qᵀ directly if they need
them, because Triton up to 3.7.0 miscompiles a product with a computed, transposed operand on Hopper.

Gradients of prompts that images share are partial sums, one per image, which `prompt_attention_bwd_sum_kernel` adds in
a fixed order: the same bits in every run.
"""

import triton
import triton.language as tl

from fastprompt.kernels.triton.tiles import (
    accumulate,
    awaited,
    contract,
    key_rows,
    load,
    prompt_set,
    rows,
    score_factor,
    store,
    zeros,
)


@triton.jit(do_not_specialize=("Nq",))
def prompt_attention_bwd_delta_kernel(
    p_out, p_do, p_lse, p_delta, p_lse2, Nq, padded, H,
    stride_ob, stride_om, stride_oh, stride_dob, stride_dom, stride_doh,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Compute delta and the LSE in units of log2, [B·H, padded]; an LSE of 1e30 gives padded rows weights of 0.

    With q and dq for out and d(out), delta is q·dq, whose sum gives d(temperature).
    """
    tiles = tl.cdiv(padded, BLOCK_M)
    i_bh = tl.program_id(0) // tiles
    o_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < Nq
    i_b = (i_bh // H).to(tl.int64)
    i_h = i_bh % H
    p_out += i_b * stride_ob + i_h * stride_oh
    p_do += i_b * stride_dob + i_h * stride_doh
    o0, o1 = load(rows(p_out, o_m, stride_om, ALIGNED), m_m, HEAD_DIM, D0, D1)
    do0, do1 = load(rows(p_do, o_m, stride_dom, ALIGNED), m_m, HEAD_DIM, D0, D1)
    # A product that the compiler fuses with the sum of two threads is rounded in one of them alone; a fused one is not.
    delta = tl.sum(tl.fma(o0.to(tl.float32), do0.to(tl.float32), 0.0), 1)
    if D1 > 0:
        delta += tl.sum(tl.fma(o1.to(tl.float32), do1.to(tl.float32), 0.0), 1)
    lse = tl.load(p_lse + i_bh.to(tl.int64) * Nq + o_m, mask=m_m, other=1.0e30)
    o_padded = i_bh.to(tl.int64) * padded + o_m
    tl.store(p_delta + o_padded, delta, mask=o_m < padded)
    tl.store(p_lse2 + o_padded, lse * 1.4426950408889634, mask=o_m < padded)


@triton.jit
def _transposed(
    k0, k1, v0, v1, q0, q1, do0, do1, lse2, delta, factor, D1: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return weights and score gradients of a tile, keys in rows: wᵀ and w·(d(w) - delta)ᵀ."""
    w = tl.exp2(contract(k0, k1, q0, q1, D1, PRECISION) * factor - lse2[None, :])
    dw = contract(v0, v1, do0, do1, D1, PRECISION)
    return w, w * (dw - delta[None, :])  # [BLOCK_N, BLOCK_M]


@triton.jit
def store_keys(
    p_image, p_prompt, o_n, N, P, g0, g1, stride_n, stride_pn,
    STORE_IMAGE: tl.constexpr, STORE_PROMPT: tl.constexpr,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile of keys in the two segments, which differ in dtype."""
    if STORE_IMAGE:
        store(rows(p_image, o_n, stride_n, ALIGNED), o_n < N, g0, g1, HEAD_DIM, D0, D1)
    if STORE_PROMPT:
        m_prompt = (o_n >= N) & (o_n < N + P)
        store(rows(p_prompt, o_n - N, stride_pn, ALIGNED), m_prompt, g0, g1, HEAD_DIM, D0, D1)


@triton.jit(
    do_not_specialize=("Nq", "N", "P", "T", "first_key"), do_not_specialize_on_alignment=("p_temperature",)
)
def prompt_attention_bwd_dkdv_kernel(
    p_q, p_k, p_v, p_pk, p_pv, p_index, p_temperature, p_do, p_lse2, p_delta, p_dk, p_dv, p_dpk, p_dpv,
    scale, Nq, padded, N, P, T, H, first_key,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkn, stride_pkh, stride_pvb, stride_pvn, stride_pvh,
    stride_dob, stride_dom, stride_doh, stride_dkb, stride_dkn, stride_dkh, stride_dpb, stride_dpn, stride_dph,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, STORE_IMAGE: tl.constexpr, STORE_PROMPT: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys, from `first_key` on (N if only prompts train)."""
    tiles = tl.cdiv(N + P - first_key, BLOCK_N)
    i_bh = tl.program_id(0) // tiles
    o_n = first_key + (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N + P
    i_b = (i_bh // H).to(tl.int64)
    i_h = i_bh % H
    i_set, known = prompt_set(p_index, i_b, T, HAS_INDEX)
    factor = score_factor(p_temperature, scale, HAS_TEMPERATURE)

    p_q += i_b * stride_qb + i_h * stride_qh
    p_do += i_b * stride_dob + i_h * stride_doh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_pk += i_set * stride_pkb + i_h * stride_pkh
    p_pv += i_set * stride_pvb + i_h * stride_pvh
    p_lse2 += i_bh.to(tl.int64) * padded
    p_delta += i_bh.to(tl.int64) * padded

    k0, k1 = load(key_rows(p_k, p_pk, o_n, N, stride_kn, stride_pkn, ALIGNED), m_n, HEAD_DIM, D0, D1)
    v0, v1 = load(key_rows(p_v, p_pv, o_n, N, stride_vn, stride_pvn, ALIGNED), m_n, HEAD_DIM, D0, D1)
    dk0, dk1 = zeros(BLOCK_N, D0, D1)
    dv0, dv1 = zeros(BLOCK_N, D0, D1)
    for start in range(0, Nq, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        q0, q1 = load(rows(p_q, o_m, stride_qm, ALIGNED), o_m < Nq, HEAD_DIM, D0, D1)
        do0, do1 = load(rows(p_do, o_m, stride_dom, ALIGNED), o_m < Nq, HEAD_DIM, D0, D1)
        lse2 = tl.load(p_lse2 + o_m)
        delta = tl.load(p_delta + o_m)
        w, ds = _transposed(k0, k1, v0, v1, q0, q1, do0, do1, lse2, delta, factor, D1, PRECISION)
        if NEED_V:
            dv0, dv1 = accumulate(dv0, dv1, w, do0, do1, D1, PRECISION)
            dv0, dv1 = awaited(dv0, dv1, D1, AWAIT)
        if NEED_K:
            dk0, dk1 = accumulate(dk0, dk1, ds, q0, q1, D1, PRECISION)
            dk0, dk1 = awaited(dk0, dk1, D1, AWAIT)

    o_image = i_b * stride_dkb + i_h * stride_dkh
    o_prompt = i_b * stride_dpb + i_h * stride_dph
    if NEED_V:
        store_keys(
            p_dv + o_image, p_dpv + o_prompt, o_n, N, P, dv0, dv1, stride_dkn, stride_dpn,
            STORE_IMAGE, STORE_PROMPT, HEAD_DIM, D0, D1, ALIGNED,
        )  # fmt: skip
    if NEED_K:
        natural = factor * 0.6931471805599453
        store_keys(
            p_dk + o_image, p_dpk + o_prompt, o_n, N, P, dk0 * natural, dk1 * natural, stride_dkn, stride_dpn,
            STORE_IMAGE, STORE_PROMPT, HEAD_DIM, D0, D1, ALIGNED,
        )  # fmt: skip


@triton.jit
def _dq_step(
    dq0, dq1, rest, mean, both, q0, q1, do0, do1, lse2, delta, p_k, p_v, p_pk, p_pv, o_n, N, P, factor,
    stride_kn, stride_vn, stride_pkn, stride_pvn,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PADDED: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_TEMPERATURE: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, AWAIT: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to dq, and to the sums of ds, w·log(w) and ds·log(w) of each row, with weights w."""
    m_n = o_n < N + P
    k0, k1 = load(key_rows(p_k, p_pk, o_n, N, stride_kn, stride_pkn, ALIGNED), m_n, HEAD_DIM, D0, D1)
    v0, v1 = load(key_rows(p_v, p_pv, o_n, N, stride_vn, stride_pvn, ALIGNED), m_n, HEAD_DIM, D0, D1)
    dw = contract(do0, do1, v0, v1, D1, PRECISION)  # first, which takes fewer registers
    log = contract(q0, q1, k0, k1, D1, PRECISION) * factor - lse2[:, None]  # [BLOCK_M, BLOCK_N]
    if PADDED:
        log = tl.where(m_n[None, :], log, -1.0e30)
    w = tl.exp2(log)
    ds = w * (dw - delta[:, None])
    if NEED_TEMPERATURE:
        rest += tl.sum(ds, 1)
        mean += tl.sum(w * log, 1)
        both += tl.sum(ds * log, 1)
    if NEED_Q:
        dq0, dq1 = accumulate(dq0, dq1, ds, k0, k1, D1, PRECISION)
        dq0, dq1 = awaited(dq0, dq1, D1, AWAIT)
    return dq0, dq1, rest, mean, both


@triton.jit(do_not_specialize=("Nq", "N", "P", "T"), do_not_specialize_on_alignment=("p_temperature",))
def prompt_attention_bwd_dq_kernel(
    p_q, p_k, p_v, p_pk, p_pv, p_index, p_temperature, p_do, p_lse2, p_delta, p_dq, p_products,
    scale, Nq, padded, N, P, T, H,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkn, stride_pkh, stride_pvb, stride_pvn, stride_pvh,
    stride_dob, stride_dom, stride_doh, stride_dqb, stride_dqm, stride_dqh,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, MASK_ALL: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_TEMPERATURE: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
):  # fmt: skip
    """Compute dq of one tile of queries, and Σ score · d(score) of each row, whose sum gives d(temperature)."""
    tiles = tl.cdiv(Nq, BLOCK_M)
    i_bh = tl.program_id(0) // tiles
    o_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < Nq
    i_b = (i_bh // H).to(tl.int64)
    i_h = i_bh % H
    i_set, known = prompt_set(p_index, i_b, T, HAS_INDEX)
    factor = score_factor(p_temperature, scale, HAS_TEMPERATURE)

    p_q += i_b * stride_qb + i_h * stride_qh
    p_do += i_b * stride_dob + i_h * stride_doh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_pk += i_set * stride_pkb + i_h * stride_pkh
    p_pv += i_set * stride_pvb + i_h * stride_pvh

    q0, q1 = load(rows(p_q, o_m, stride_qm, ALIGNED), m_m, HEAD_DIM, D0, D1)
    do0, do1 = load(rows(p_do, o_m, stride_dom, ALIGNED), m_m, HEAD_DIM, D0, D1)
    lse2 = tl.load(p_lse2 + i_bh.to(tl.int64) * padded + o_m, mask=m_m, other=1.0e30)
    delta = tl.load(p_delta + i_bh.to(tl.int64) * padded + o_m, mask=m_m, other=0.0)
    dq0, dq1 = zeros(BLOCK_M, D0, D1)
    rest = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    both = tl.zeros([BLOCK_M], tl.float32)
    whole = N + P
    if not MASK_ALL:
        whole = whole // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        dq0, dq1, rest, mean, both = _dq_step(
            dq0, dq1, rest, mean, both, q0, q1, do0, do1, lse2, delta, p_k, p_v, p_pk, p_pv,
            start + tl.arange(0, BLOCK_N), N, P, factor, stride_kn, stride_vn, stride_pkn, stride_pvn,
            HEAD_DIM, D0, D1, MASK_ALL, NEED_Q, NEED_TEMPERATURE, ALIGNED, PRECISION, AWAIT,
        )  # fmt: skip
    if TAIL > 0:
        dq0, dq1, rest, mean, both = _dq_step(
            dq0, dq1, rest, mean, both, q0, q1, do0, do1, lse2, delta, p_k, p_v, p_pk, p_pv,
            whole + tl.arange(0, TAIL), N, P, factor, stride_kn, stride_vn, stride_pkn, stride_pvn,
            HEAD_DIM, D0, D1, True, NEED_Q, NEED_TEMPERATURE, ALIGNED, PRECISION, AWAIT,
        )  # fmt: skip
    if NEED_Q:
        natural = factor * 0.6931471805599453
        p_row = rows(p_dq + i_b * stride_dqb + i_h * stride_dqh, o_m, stride_dqm, ALIGNED)
        store(p_row, m_m, dq0 * natural, dq1 * natural, HEAD_DIM, D0, D1)
    if NEED_TEMPERATURE:
        # Delta of the rounded output leaves a rest, Σ ds of a row, which is 0 otherwise: large scores times this rest
        # would be most of the result. Less the rest, it depends neither on delta nor on what is added to all scores of
        # a row, so that the weights' logarithms do for the scores.
        product = (both - rest * mean) * 0.6931471805599453
        tl.store(p_products + i_bh.to(tl.int64) * Nq + o_m, product, mask=m_m)


@triton.jit(do_not_specialize=("B",))
def prompt_attention_bwd_sum_kernel(
    p_partial, p_index, p_sum, B, columns,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """Sum partial [B, columns] over images to [columns]; with an index, one sum per prompt set, [T, columns]."""
    i_set = tl.program_id(1)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, B, BLOCK_B):
        o_b = start + tl.arange(0, BLOCK_B)
        m_b = o_b < B
        if HAS_INDEX:
            m_b = m_b & (tl.load(p_index + o_b, mask=m_b, other=-1) == i_set)
        p_tile = p_partial + o_b.to(tl.int64)[:, None] * columns + o_c[None, :]
        total += tl.sum(tl.load(p_tile, mask=m_b[:, None] & m_c[None, :], other=0.0), 0)
    tl.store(p_sum + i_set.to(tl.int64) * columns + o_c, total.to(p_sum.dtype.element_ty), mask=m_c)
