"""Prompt-augmented attention, backward with all keys resident: five products instead of seven (docs/performance.md).

A program owns one head of several images, one after another, and holds all keys and values of an image. Gradients of
prompts that images share add up in registers over the program's images. Delta is the sum of weight · d(weight) over the
keys, in float32: Σ out·d(out) of the rounded output differs from it by noise that a saturated softmax does not hide.
"""

import triton
import triton.language as tl

from fastprompt.kernels.triton.prompt_attention_bwd import store_keys
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


@triton.jit(
    do_not_specialize=("B", "images", "Nq", "N", "P", "T"), do_not_specialize_on_alignment=("p_temperature",)
)
def prompt_attention_bwd_resident_kernel(
    p_q, p_k, p_v, p_pk, p_pv, p_index, p_temperature, p_do, p_lse,
    p_dq, p_dk, p_dv, p_dpk, p_dpv,
    scale, B, images, Nq, N, P, T, H,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkn, stride_pkh, stride_pvb, stride_pvn, stride_pvh,
    stride_dob, stride_dom, stride_doh, stride_dqb, stride_dqm, stride_dqh,
    stride_dkb, stride_dkn, stride_dkh, stride_dpb, stride_dpn, stride_dph,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr,
    STORE_PROMPT: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of one head of `images` images; those of the prompts are sums over these images."""
    i_group = tl.program_id(1)
    factor = score_factor(p_temperature, scale, HAS_TEMPERATURE)
    natural = factor * 0.6931471805599453
    dk0, dk1 = zeros(KEYS, D0, D1)
    dv0, dv1 = zeros(KEYS, D0, D1)
    end = tl.minimum((i_group + 1) * images, B)

    for image in tl.range(i_group * images, end, disable_licm=True):
        # Adding zero keeps the compiler from computing addresses once for all images, for which it has no registers.
        zero = tl.minimum(image, 0)
        o_n = tl.arange(0, KEYS) + zero
        i_h = tl.program_id(0) + zero
        m_n = o_n < N + P
        i_b = (image + zero).to(tl.int64)
        i_set, known = prompt_set(p_index, i_b, T, HAS_INDEX)
        factor_b = factor
        if HAS_INDEX:
            factor_b = tl.where(known, factor, float("nan"))  # as the forward
        p_k_b = p_k + i_b * stride_kb + i_h * stride_kh
        p_v_b = p_v + i_b * stride_vb + i_h * stride_vh
        p_pk_b = p_pk + i_set * stride_pkb + i_h * stride_pkh
        p_pv_b = p_pv + i_set * stride_pvb + i_h * stride_pvh
        p_q_b = p_q + i_b * stride_qb + i_h * stride_qh
        p_do_b = p_do + i_b * stride_dob + i_h * stride_doh
        p_dq_b = p_dq + i_b * stride_dqb + i_h * stride_dqh
        p_lse_b = p_lse + (i_b * H + i_h) * Nq

        k0, k1 = load(key_rows(p_k_b, p_pk_b, o_n, N, stride_kn, stride_pkn, ALIGNED), m_n, HEAD_DIM, D0, D1)
        v0, v1 = load(key_rows(p_v_b, p_pv_b, o_n, N, stride_vn, stride_pvn, ALIGNED), m_n, HEAD_DIM, D0, D1)
        for start in range(0, Nq, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_m = o_m < Nq
            q0, q1 = load(rows(p_q_b, o_m, stride_qm, ALIGNED), m_m, HEAD_DIM, D0, D1)
            do0, do1 = load(rows(p_do_b, o_m, stride_dom, ALIGNED), m_m, HEAD_DIM, D0, D1)
            lse2 = tl.load(p_lse_b + o_m, mask=m_m, other=1.0e30) * 1.4426950408889634
            # Keys in rows. In this order Triton 3.6 spills 16 bytes; with the scores first, 48.
            dw = contract(v0, v1, do0, do1, D1, PRECISION)
            log = contract(k0, k1, q0, q1, D1, PRECISION) * factor_b - lse2[None, :]
            # A key of zeros adds nothing unless its weight overflows; the weights of other keys are at most 1.
            w = tl.exp2(tl.minimum(log, 0.0, propagate_nan=tl.PropagateNan.ALL))
            product = w * dw
            delta = tl.sum(product, 0)
            ds = (product - w * delta[None, :]).to(k0.dtype)  # [KEYS, BLOCK_M]
            dv0, dv1 = accumulate(dv0, dv1, w, do0, do1, D1, PRECISION)
            dv0, dv1 = awaited(dv0, dv1, D1, AWAIT)
            dk0, dk1 = accumulate(dk0, dk1, ds, q0, q1, D1, PRECISION)
            dk0, dk1 = awaited(dk0, dk1, D1, AWAIT)
            dq0 = tl.trans(tl.dot(tl.trans(k0), ds, input_precision=PRECISION)) * natural
            dq1 = dq0
            if D1 > 0:
                dq1 = tl.trans(tl.dot(tl.trans(k1), ds, input_precision=PRECISION)) * natural
            store(rows(p_dq_b, o_m, stride_dqm, ALIGNED), m_m, dq0, dq1, HEAD_DIM, D0, D1)

        o_image = i_b * stride_dkb + i_h * stride_dkh
        store_keys(
            p_dv + o_image, p_dpv, o_n, N, P, dv0, dv1, stride_dkn, stride_dpn,
            True, False, HEAD_DIM, D0, D1, ALIGNED,
        )  # fmt: skip
        store_keys(
            p_dk + o_image, p_dpk, o_n, N, P, dk0 * natural, dk1 * natural, stride_dkn, stride_dpn,
            True, False, HEAD_DIM, D0, D1, ALIGNED,
        )  # fmt: skip
        m_prompt = (o_n >= N)[:, None]
        dk0, dv0 = tl.where(m_prompt, dk0, 0.0), tl.where(m_prompt, dv0, 0.0)
        if D1 > 0:
            dk1, dv1 = tl.where(m_prompt, dk1, 0.0), tl.where(m_prompt, dv1, 0.0)

    if STORE_PROMPT:
        i_h = tl.program_id(0)
        o_n = tl.arange(0, KEYS)
        o_prompt = i_group.to(tl.int64) * stride_dpb + i_h * stride_dph
        store_keys(
            p_dv, p_dpv + o_prompt, o_n, N, P, dv0, dv1, stride_dkn, stride_dpn,
            False, True, HEAD_DIM, D0, D1, ALIGNED,
        )  # fmt: skip
        store_keys(
            p_dk, p_dpk + o_prompt, o_n, N, P, dk0 * natural, dk1 * natural, stride_dkn, stride_dpn,
            False, True, HEAD_DIM, D0, D1, ALIGNED,
        )  # fmt: skip
