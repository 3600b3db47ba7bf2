"""Prompt-augmented attention, backward with all keys resident: five products instead of seven (docs/performance.md)."""

import triton
import triton.language as tl

from fastprompt.kernels.triton.prompt_attention_bwd import store_keys, transposed
from fastprompt.kernels.triton.tiles import (
    accumulate,
    key_rows,
    load,
    prompt_set,
    rows,
    score_factor,
    store,
    zeros,
)


@triton.jit(do_not_specialize=("Nq", "N", "P", "T"))
def prompt_attention_bwd_resident_kernel(
    p_q, p_k, p_v, p_pk, p_pv, p_index, p_temperature, p_do, p_lse2, p_delta,
    p_dq, p_dk, p_dv, p_dpk, p_dpv,
    scale, Nq, padded, N, P, T, H,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkn, stride_pkh, stride_pvb, stride_pvn, stride_pvh,
    stride_dob, stride_dom, stride_doh, stride_dqb, stride_dqm, stride_dqh,
    stride_dkb, stride_dkn, stride_dkh, stride_dpb, stride_dpn, stride_dph,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr,
    STORE_PROMPT: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of one head of one image, whose keys and values stay in registers or shared memory."""
    i_bh = tl.program_id(0)
    i_b = (i_bh // H).to(tl.int64)
    i_h = i_bh % H
    i_set, known = prompt_set(p_index, i_b, T, HAS_INDEX)
    factor = score_factor(p_temperature, scale, HAS_TEMPERATURE)
    natural = factor * 0.6931471805599453

    p_q += i_b * stride_qb + i_h * stride_qh
    p_do += i_b * stride_dob + i_h * stride_doh
    p_dq += i_b * stride_dqb + i_h * stride_dqh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_pk += i_set * stride_pkb + i_h * stride_pkh
    p_pv += i_set * stride_pvb + i_h * stride_pvh
    p_lse2 += i_bh.to(tl.int64) * padded
    p_delta += i_bh.to(tl.int64) * padded

    o_n = tl.arange(0, KEYS)
    m_n = o_n < N + P
    k0, k1 = load(key_rows(p_k, p_pk, o_n, N, stride_kn, stride_pkn, ALIGNED), m_n, HEAD_DIM, D0, D1)
    v0, v1 = load(key_rows(p_v, p_pv, o_n, N, stride_vn, stride_pvn, ALIGNED), m_n, HEAD_DIM, D0, D1)
    dk0, dk1 = zeros(KEYS, D0, D1)
    dv0, dv1 = zeros(KEYS, D0, D1)
    for start in range(0, Nq, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m = o_m < Nq
        q0, q1 = load(rows(p_q, o_m, stride_qm, ALIGNED), m_m, HEAD_DIM, D0, D1)
        do0, do1 = load(rows(p_do, o_m, stride_dom, ALIGNED), m_m, HEAD_DIM, D0, D1)
        lse2 = tl.load(p_lse2 + o_m)
        delta = tl.load(p_delta + o_m)
        w, ds = transposed(k0, k1, v0, v1, q0, q1, do0, do1, lse2, delta, factor, True, D1, PRECISION)
        ds = ds.to(k0.dtype)  # [KEYS, BLOCK_M]
        dv0, dv1 = accumulate(dv0, dv1, w, do0, do1, D1, PRECISION)
        dk0, dk1 = accumulate(dk0, dk1, ds, q0, q1, D1, PRECISION)
        dq0 = tl.trans(tl.dot(tl.trans(k0), ds, input_precision=PRECISION)) * natural
        dq1 = dq0
        if D1 > 0:
            dq1 = tl.trans(tl.dot(tl.trans(k1), ds, input_precision=PRECISION)) * natural
        store(rows(p_dq, o_m, stride_dqm, ALIGNED), m_m, dq0, dq1, HEAD_DIM, D0, D1)

    o_image = i_b * stride_dkb + i_h * stride_dkh
    o_prompt = i_b * stride_dpb + i_h * stride_dph
    store_keys(
        p_dv + o_image, p_dpv + o_prompt, o_n, N, P, dv0, dv1, stride_dkn, stride_dpn,
        True, STORE_PROMPT, HEAD_DIM, D0, D1, ALIGNED,
    )  # fmt: skip
    dk0 *= natural
    dk1 *= natural
    store_keys(
        p_dk + o_image, p_dpk + o_prompt, o_n, N, P, dk0, dk1, stride_dkn, stride_dpn,
        True, STORE_PROMPT, HEAD_DIM, D0, D1, ALIGNED,
    )  # fmt: skip
