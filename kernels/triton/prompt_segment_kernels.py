"""The prompt segment of attention whose image segment another kernel computes (docs/attention.md).

A softmax over [image keys ; prompt keys] is two softmaxes joined by their log-sum-exps. Forward: the online softmax
goes on from the image segment's output and LSE. Backward: with the joint output and LSE, the gradients of the two
segments are independent, so that the prompts' part is added to dq, and d(prompt_k) and d(prompt_v) are sums over
queries. Both are bound by bytes: each query's rows are read once, and prompts stay on chip.
"""

import triton
import triton.language as tl

from fastprompt.kernels.triton.tiles import (
    accumulate,
    awaited,
    contract,
    load,
    prompt_set,
    rows,
    score_factor,
    store,
    zeros,
)


@triton.jit(do_not_specialize=("Nq", "P", "T"))
def prompt_segment_fwd_kernel(
    p_q, p_image, p_image_lse, p_pk, p_pv, p_index, p_temperature, p_out, p_lse,
    scale, Nq, P, T, H,
    stride_qb, stride_qm, stride_qh, stride_ib, stride_im, stride_ih, stride_lb, stride_lh,
    stride_pkb, stride_pkn, stride_pkh, stride_pvb, stride_pvn, stride_pvh, stride_ob, stride_om, stride_oh,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
):  # fmt: skip
    """Join the image segment's output `p_image` and LSE with the prompts, for one tile of queries."""
    tiles = tl.cdiv(Nq, BLOCK_M)
    i_bh = tl.program_id(0) // tiles
    o_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < Nq
    i_b = (i_bh // H).to(tl.int64)
    i_h = i_bh % H
    i_set, known = prompt_set(p_index, i_b, T, HAS_INDEX)
    factor = score_factor(p_temperature, scale, HAS_TEMPERATURE)

    p_q += i_b * stride_qb + i_h * stride_qh
    p_image += i_b * stride_ib + i_h * stride_ih
    p_image_lse += i_b * stride_lb + i_h * stride_lh
    p_pk += i_set * stride_pkb + i_h * stride_pkh
    p_pv += i_set * stride_pvb + i_h * stride_pvh
    p_out += i_b * stride_ob + i_h * stride_oh
    p_lse += i_bh.to(tl.int64) * Nq

    q0, q1 = load(rows(p_q, o_m, stride_qm, ALIGNED), m_m, HEAD_DIM, D0, D1)
    high = tl.load(p_image_lse + o_m, mask=m_m, other=0.0) * 1.4426950408889634
    # Without image keys their LSE is -inf, their output may be anything, and -inf less -inf would be a NaN.
    some = high != float("-inf")
    high = tl.where(some, high, -3.0e38)
    total = tl.where(some, 1.0, 0.0)
    image0, image1 = load(rows(p_image, o_m, stride_im, ALIGNED), m_m & some, HEAD_DIM, D0, D1)
    acc0 = image0.to(tl.float32)
    acc1 = acc0
    if D1 > 0:
        acc1 = image1.to(tl.float32)

    for start in range(0, P, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m_p = o_p < P
        k0, k1 = load(rows(p_pk, o_p, stride_pkn, ALIGNED), m_p, HEAD_DIM, D0, D1)
        v0, v1 = load(rows(p_pv, o_p, stride_pvn, ALIGNED), m_p, HEAD_DIM, D0, D1)
        s = contract(q0, q1, k0, k1, D1, PRECISION) * factor
        s = tl.where(m_p[None, :], s, float("-inf"))  # [BLOCK_M, BLOCK_P]
        higher = tl.maximum(high, tl.max(s, 1))
        w = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(high - higher)
        total = total * shrink + tl.sum(w, 1)
        high = higher
        acc0 *= shrink[:, None]
        if D1 > 0:
            acc1 *= shrink[:, None]
        acc0, acc1 = accumulate(acc0, acc1, w, v0, v1, D1, PRECISION)
        acc0, acc1 = awaited(acc0, acc1, D1, AWAIT)

    inverse = tl.where(known, 1.0 / total, float("nan"))[:, None]
    store(rows(p_out, o_m, stride_om, ALIGNED), m_m, acc0 * inverse, acc1 * inverse, HEAD_DIM, D0, D1)
    tl.store(p_lse + o_m, (high + tl.log2(total)) * 0.6931471805599453, mask=m_m)


@triton.jit
def _dot_rows(a0, a1, b0, b1, D1: tl.constexpr):
    """Return Σ a·b of each row, in float32, the same bits in all threads that hold it.

    A product that the compiler fuses with the sum of two threads is rounded in one of them alone; one that is itself a
    fused multiplication and addition is not fused again.
    """
    product = tl.sum(tl.fma(a0.to(tl.float32), b0.to(tl.float32), 0.0), 1)
    if D1 > 0:
        product += tl.sum(tl.fma(a1.to(tl.float32), b1.to(tl.float32), 0.0), 1)
    return product  # [BLOCK_M]


@triton.jit
def _add_dq(
    p_dq, p_joint, p_products, o_lse, o_m, m_m, q0, q1, part0, part1, stride_dqm, stride_jm,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, NEED_PRODUCTS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store dq plus the prompts' part, and q·dq of each row before it is rounded."""
    dq0, dq1 = load(rows(p_dq, o_m, stride_dqm, ALIGNED), m_m, HEAD_DIM, D0, D1)
    part0 += dq0.to(tl.float32)
    if D1 > 0:
        part1 += dq1.to(tl.float32)
    store(rows(p_joint, o_m, stride_jm, ALIGNED), m_m, part0, part1, HEAD_DIM, D0, D1)
    if NEED_PRODUCTS:
        tl.store(p_products + o_lse + o_m, _dot_rows(q0, q1, part0, part1, D1), mask=m_m)


@triton.jit(do_not_specialize=("Nq", "P", "T"))
def prompt_segment_bwd_dq_kernel(
    p_q, p_pk, p_pv, p_index, p_temperature, p_out, p_lse, p_do, p_dq, p_joint, p_products,
    scale, Nq, P, T, H,
    stride_qb, stride_qm, stride_qh, stride_ob, stride_om, stride_oh, stride_dob, stride_dom, stride_doh,
    stride_pkb, stride_pkn, stride_pkh, stride_pvb, stride_pvn, stride_pvh,
    stride_dqb, stride_dqm, stride_dqh, stride_jb, stride_jm, stride_jh,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    NEED_PRODUCTS: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
):  # fmt: skip
    """Add the part of all prompts to dq, for one tile of queries."""
    tiles = tl.cdiv(Nq, BLOCK_M)
    i_bh = tl.program_id(0) // tiles
    o_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < Nq
    i_b = (i_bh // H).to(tl.int64)
    i_h = i_bh % H
    i_set, known = prompt_set(p_index, i_b, T, HAS_INDEX)
    factor = score_factor(p_temperature, scale, HAS_TEMPERATURE)

    p_pk += i_set * stride_pkb + i_h * stride_pkh
    p_pv += i_set * stride_pvb + i_h * stride_pvh
    p_q += i_b * stride_qb + i_h * stride_qh
    p_do += i_b * stride_dob + i_h * stride_doh
    p_out += i_b * stride_ob + i_h * stride_oh
    p_dq += i_b * stride_dqb + i_h * stride_dqh
    p_joint += i_b * stride_jb + i_h * stride_jh
    o_lse = i_bh.to(tl.int64) * Nq

    q0, q1 = load(rows(p_q, o_m, stride_qm, ALIGNED), m_m, HEAD_DIM, D0, D1)
    do0, do1 = load(rows(p_do, o_m, stride_dom, ALIGNED), m_m, HEAD_DIM, D0, D1)
    o0, o1 = load(rows(p_out, o_m, stride_om, ALIGNED), m_m, HEAD_DIM, D0, D1)
    lse2 = tl.load(p_lse + o_lse + o_m, mask=m_m, other=1.0e30) * 1.4426950408889634
    delta = _dot_rows(o0, o1, do0, do1, D1)
    dq0, dq1 = zeros(BLOCK_M, D0, D1)
    for start in range(0, P, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m_p = o_p < P
        k0, k1 = load(rows(p_pk, o_p, stride_pkn, ALIGNED), m_p, HEAD_DIM, D0, D1)
        v0, v1 = load(rows(p_pv, o_p, stride_pvn, ALIGNED), m_p, HEAD_DIM, D0, D1)
        exponent = contract(q0, q1, k0, k1, D1, PRECISION) * factor - lse2[:, None]
        w = tl.exp2(tl.where(m_p[None, :], exponent, float("-inf")))  # [BLOCK_M, BLOCK_P]
        ds = w * (contract(do0, do1, v0, v1, D1, PRECISION) - delta[:, None])
        dq0, dq1 = accumulate(dq0, dq1, ds, k0, k1, D1, PRECISION)
        dq0, dq1 = awaited(dq0, dq1, D1, AWAIT)
    natural = factor * 0.6931471805599453
    _add_dq(
        p_dq, p_joint, p_products, o_lse, o_m, m_m, q0, q1, dq0 * natural, dq1 * natural, stride_dqm, stride_jm,
        HEAD_DIM, D0, D1, NEED_PRODUCTS, ALIGNED,
    )  # fmt: skip


@triton.jit(do_not_specialize=("B", "Nq", "P", "T", "programs", "steps"))
def prompt_segment_bwd_kernel(
    p_q, p_pk, p_pv, p_index, p_temperature, p_out, p_lse, p_do, p_dq, p_joint, p_products, p_dpk, p_dpv,
    scale, B, Nq, P, T, H, programs, steps,
    stride_qb, stride_qm, stride_qh, stride_ob, stride_om, stride_oh, stride_dob, stride_dom, stride_doh,
    stride_pkb, stride_pkn, stride_pkh, stride_pvb, stride_pvn, stride_pvh,
    stride_dqb, stride_dqm, stride_dqh, stride_jb, stride_jm, stride_jh, stride_dpb, stride_dpn, stride_dph,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEED_PRODUCTS: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
):  # fmt: skip
    """Sum d(prompt_k) and d(prompt_v) of one tile of prompts and one head over `steps` tiles of queries.

    The tiles of all images follow one another; a program goes on into the next image, so that few partial sums are
    stored. With prompts of its own an image has a program of its own. If one tile holds all prompts, NEED_Q adds their
    part to dq in the same pass.
    """
    i_h = tl.program_id(0) % H
    i_program = (tl.program_id(0) // H) % programs
    o_p = (tl.program_id(0) // H // programs) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < P
    tiles = tl.cdiv(Nq, BLOCK_M)
    first = i_program * steps
    i_set, known = prompt_set(p_index, (first // tiles).to(tl.int64), T, HAS_INDEX)
    factor = score_factor(p_temperature, scale, HAS_TEMPERATURE)
    natural = factor * 0.6931471805599453

    p_pk += i_set * stride_pkb + i_h * stride_pkh
    p_pv += i_set * stride_pvb + i_h * stride_pvh
    k0, k1 = load(rows(p_pk, o_p, stride_pkn, ALIGNED), m_p, HEAD_DIM, D0, D1)
    v0, v1 = load(rows(p_pv, o_p, stride_pvn, ALIGNED), m_p, HEAD_DIM, D0, D1)
    dk0, dk1 = zeros(BLOCK_P, D0, D1)
    dv0, dv1 = zeros(BLOCK_P, D0, D1)
    for step in range(first, tl.minimum(first + steps, B * tiles)):
        i_b = (step // tiles).to(tl.int64)
        o_m = (step % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < Nq
        p_row = p_q + i_b * stride_qb + i_h * stride_qh
        q0, q1 = load(rows(p_row, o_m, stride_qm, ALIGNED), m_m, HEAD_DIM, D0, D1)
        p_row = p_do + i_b * stride_dob + i_h * stride_doh
        do0, do1 = load(rows(p_row, o_m, stride_dom, ALIGNED), m_m, HEAD_DIM, D0, D1)
        o_lse = (i_b * H + i_h) * Nq
        lse2 = tl.load(p_lse + o_lse + o_m, mask=m_m, other=1.0e30) * 1.4426950408889634
        # Keys in rows, so that nothing computed is transposed: Triton up to 3.7.0 miscompiles that on Hopper.
        exponent = contract(k0, k1, q0, q1, D1, PRECISION) * factor - lse2[None, :]
        w = tl.exp2(tl.where(m_p[:, None], exponent, float("-inf")))  # [BLOCK_P, BLOCK_M]
        if NEED_V:
            dv0, dv1 = accumulate(dv0, dv1, w, do0, do1, D1, PRECISION)
            dv0, dv1 = awaited(dv0, dv1, D1, AWAIT)
        if NEED_K or NEED_Q:
            p_row = p_out + i_b * stride_ob + i_h * stride_oh
            o0, o1 = load(rows(p_row, o_m, stride_om, ALIGNED), m_m, HEAD_DIM, D0, D1)
            delta = _dot_rows(o0, o1, do0, do1, D1)
            ds = (w * (contract(v0, v1, do0, do1, D1, PRECISION) - delta[None, :])).to(k0.dtype)
            if NEED_K:
                dk0, dk1 = accumulate(dk0, dk1, ds, q0, q1, D1, PRECISION)
                dk0, dk1 = awaited(dk0, dk1, D1, AWAIT)
            if NEED_Q:
                part0 = tl.trans(tl.dot(tl.trans(k0), ds, input_precision=PRECISION)) * natural
                part1 = part0
                if D1 > 0:
                    part1 = tl.trans(tl.dot(tl.trans(k1), ds, input_precision=PRECISION)) * natural
                _add_dq(
                    p_dq + i_b * stride_dqb + i_h * stride_dqh, p_joint + i_b * stride_jb + i_h * stride_jh,
                    p_products, o_lse, o_m, m_m, q0, q1, part0, part1, stride_dqm, stride_jm,
                    HEAD_DIM, D0, D1, NEED_PRODUCTS, ALIGNED,
                )  # fmt: skip

    o_partial = i_program.to(tl.int64) * stride_dpb + i_h * stride_dph
    if NEED_V:
        store(rows(p_dpv + o_partial, o_p, stride_dpn, ALIGNED), m_p, dv0, dv1, HEAD_DIM, D0, D1)
    if NEED_K:
        p_row = rows(p_dpk + o_partial, o_p, stride_dpn, ALIGNED)
        store(p_row, m_p, dk0 * natural, dk1 * natural, HEAD_DIM, D0, D1)
