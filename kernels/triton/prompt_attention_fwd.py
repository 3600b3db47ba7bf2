"""Prompt-augmented attention, forward: image keys, then prompt keys, in one softmax (docs/performance.md).

Two kernels. *Resident*, for up to 256 keys: a program loads all keys and values of one head of one image once and loops
over query tiles with an exact softmax. *Looped*: a program owns one query tile and loops over key tiles with an online
softmax. In both, a tile of keys may hold the last image keys and the first prompt keys.
"""

import triton
import triton.language as tl

from fastprompt.kernels.triton.tiles import (
    accumulate,
    awaited,
    contract,
    key_rows,
    load,
    product,
    prompt_set,
    rows,
    signed_factor,
    store,
    zeros,
)


@triton.jit
def _finish(
    acc0, acc1, total, high, known, p_out, p_lse, o_m, Nq, stride_om,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Normalize and store one query tile; `high` is the largest score in units of log2."""
    m_m = o_m < Nq
    inverse = tl.where(known, 1.0 / total, float("nan"))[:, None]
    store(rows(p_out, o_m, stride_om, ALIGNED), m_m, acc0 * inverse, acc1 * inverse, HEAD_DIM, D0, D1)
    tl.store(p_lse + o_m, (high + tl.log2(total)) * 0.6931471805599453, mask=m_m)


@triton.jit
def _keys(
    p_k, p_v, p_pk, p_pv, o_n, N, P, sign, stride_kn, stride_vn, stride_pkn, stride_pvn,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, POSITIVE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return keys `o_n`, transposed and times `sign` (unless that is 1: POSITIVE), their values, and which exist.

    Transposed here, not in the loop, where Triton 3.9 would store them to shared memory again for each tile.
    """
    m_n = o_n < N + P
    k0, k1 = load(key_rows(p_k, p_pk, o_n, N, stride_kn, stride_pkn, ALIGNED), m_n, HEAD_DIM, D0, D1)
    v0, v1 = load(key_rows(p_v, p_pv, o_n, N, stride_vn, stride_pvn, ALIGNED), m_n, HEAD_DIM, D0, D1)
    if not POSITIVE:
        k0 *= sign.to(k0.dtype)
        k1 *= sign.to(k1.dtype)
    return tl.trans(k0), tl.trans(k1), v0, v1, m_n  # [D, BLOCK], [BLOCK, D], [BLOCK]


@triton.jit(
    do_not_specialize=("Nq", "N", "P", "T", "tile_rows"), do_not_specialize_on_alignment=("p_temperature",)
)
def prompt_attention_fwd_resident_kernel(
    p_q, p_k, p_v, p_pk, p_pv, p_index, p_temperature, p_out, p_lse,
    scale, Nq, N, P, T, H, tile_rows,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkn, stride_pkh, stride_pvb, stride_pvn, stride_pvh, stride_ob, stride_om, stride_oh,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, POSITIVE: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Process all keys at once, as C0 + C1 + C2 columns (powers of two; 0 for none), with little padding."""
    tiles = tl.cdiv(Nq, tile_rows)
    i_bh = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * tile_rows
    i_b = (i_bh // H).to(tl.int64)
    i_h = i_bh % H
    i_set, known = prompt_set(p_index, i_b, T, HAS_INDEX)
    sign, factor = signed_factor(p_temperature, scale, HAS_TEMPERATURE)

    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_pk += i_set * stride_pkb + i_h * stride_pkh
    p_pv += i_set * stride_pvb + i_h * stride_pvh
    p_out += i_b * stride_ob + i_h * stride_oh
    p_lse += i_bh.to(tl.int64) * Nq

    ka0, ka1, va0, va1, m_0 = _keys(
        p_k, p_v, p_pk, p_pv, tl.arange(0, C0), N, P, sign, stride_kn, stride_vn, stride_pkn, stride_pvn,
        HEAD_DIM, D0, D1, POSITIVE, ALIGNED,
    )  # fmt: skip
    if C1 > 0:
        kb0, kb1, vb0, vb1, m_1 = _keys(
            p_k, p_v, p_pk, p_pv, C0 + tl.arange(0, C1), N, P, sign, stride_kn, stride_vn, stride_pkn, stride_pvn,
            HEAD_DIM, D0, D1, POSITIVE, ALIGNED,
        )  # fmt: skip
    if C2 > 0:
        kc0, kc1, vc0, vc1, m_2 = _keys(
            p_k, p_v, p_pk, p_pv, C0 + C1 + tl.arange(0, C2), N, P, sign,
            stride_kn, stride_vn, stride_pkn, stride_pvn, HEAD_DIM, D0, D1, POSITIVE, ALIGNED,
        )  # fmt: skip

    for start in range(first, tl.minimum(first + tile_rows, Nq), BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        q0, q1 = load(rows(p_q, o_m, stride_qm, ALIGNED), o_m < Nq, HEAD_DIM, D0, D1)
        # Padding is in the last piece only.
        s_0 = product(q0, q1, ka0, ka1, D1, PRECISION)  # [BLOCK_M, C0]
        if C1 == 0:
            s_0 = tl.where(m_0[None, :], s_0, float("-inf"))
        high = tl.max(s_0, 1)
        if C1 > 0:
            s_1 = product(q0, q1, kb0, kb1, D1, PRECISION)  # [BLOCK_M, C1]
            if C2 == 0:
                s_1 = tl.where(m_1[None, :], s_1, float("-inf"))
            high = tl.maximum(high, tl.max(s_1, 1))
        if C2 > 0:
            s_2 = tl.where(m_2[None, :], product(q0, q1, kc0, kc1, D1, PRECISION), float("-inf"))
            high = tl.maximum(high, tl.max(s_2, 1))
        high *= factor

        acc0, acc1 = zeros(BLOCK_M, D0, D1)
        w_0 = tl.exp2(s_0 * factor - high[:, None])
        total = tl.sum(w_0, 1)
        acc0, acc1 = accumulate(acc0, acc1, w_0, va0, va1, D1, PRECISION)
        if C1 > 0:
            w_1 = tl.exp2(s_1 * factor - high[:, None])
            total += tl.sum(w_1, 1)
            acc0, acc1 = accumulate(acc0, acc1, w_1, vb0, vb1, D1, PRECISION)
        if C2 > 0:
            w_2 = tl.exp2(s_2 * factor - high[:, None])
            total += tl.sum(w_2, 1)
            acc0, acc1 = accumulate(acc0, acc1, w_2, vc0, vc1, D1, PRECISION)
        _finish(acc0, acc1, total, high, known, p_out, p_lse, o_m, Nq, stride_om, HEAD_DIM, D0, D1, ALIGNED)


@triton.jit
def _step(
    acc0, acc1, total, high, q0, q1, p_k, p_v, p_pk, p_pv, o_n, N, P, sign, factor,
    stride_kn, stride_vn, stride_pkn, stride_pvn,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr, POSITIVE: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, AWAIT: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the online softmax; `high` is the largest product so far, not yet times `factor`."""
    m_n = o_n < N + P
    k0, k1 = load(key_rows(p_k, p_pk, o_n, N, stride_kn, stride_pkn, ALIGNED), m_n, HEAD_DIM, D0, D1)
    s = contract(q0, q1, k0, k1, D1, PRECISION)  # [BLOCK_M, BLOCK_N]
    if not POSITIVE:
        s *= sign  # in q the sign would save these, but Triton keeps a computed q in registers
    if MASKED:
        s = tl.where(m_n[None, :], s, float("-inf"))
    higher = tl.maximum(high, tl.max(s, 1))
    w = tl.exp2(s * factor - (higher * factor)[:, None])
    shrink = tl.exp2((high - higher) * factor)
    total = total * shrink + tl.sum(w, 1)
    acc0 = acc0 * shrink[:, None]
    if D1 > 0:
        acc1 = acc1 * shrink[:, None]
    v0, v1 = load(key_rows(p_v, p_pv, o_n, N, stride_vn, stride_pvn, ALIGNED), m_n, HEAD_DIM, D0, D1)
    acc0, acc1 = accumulate(acc0, acc1, w, v0, v1, D1, PRECISION)
    acc0, acc1 = awaited(acc0, acc1, D1, AWAIT)
    return acc0, acc1, total, higher


@triton.jit(do_not_specialize=("Nq", "N", "P", "T"), do_not_specialize_on_alignment=("p_temperature",))
def prompt_attention_fwd_kernel(
    p_q, p_k, p_v, p_pk, p_pv, p_index, p_temperature, p_out, p_lse,
    scale, Nq, N, P, T, H,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkn, stride_pkh, stride_pvb, stride_pvn, stride_pvh, stride_ob, stride_om, stride_oh,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, MASK_ALL: tl.constexpr,
    POSITIVE: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, AWAIT: tl.constexpr,
):  # fmt: skip
    """Process whole tiles of BLOCK_N keys unmasked, then the rest in one tile of TAIL keys (0: none); or MASK_ALL."""
    tiles = tl.cdiv(Nq, BLOCK_M)
    i_bh = tl.program_id(0) // tiles
    o_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_b = (i_bh // H).to(tl.int64)
    i_h = i_bh % H
    i_set, known = prompt_set(p_index, i_b, T, HAS_INDEX)
    sign, factor = signed_factor(p_temperature, scale, HAS_TEMPERATURE)

    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_pk += i_set * stride_pkb + i_h * stride_pkh
    p_pv += i_set * stride_pvb + i_h * stride_pvh
    p_out += i_b * stride_ob + i_h * stride_oh
    p_lse += i_bh.to(tl.int64) * Nq

    q0, q1 = load(rows(p_q, o_m, stride_qm, ALIGNED), o_m < Nq, HEAD_DIM, D0, D1)
    acc0, acc1 = zeros(BLOCK_M, D0, D1)
    total = tl.zeros([BLOCK_M], tl.float32)
    high = tl.full([BLOCK_M], -3.0e38, tl.float32)  # finite: -inf less -inf is a NaN

    whole = N + P
    if not MASK_ALL:
        whole = whole // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc0, acc1, total, high = _step(
            acc0, acc1, total, high, q0, q1, p_k, p_v, p_pk, p_pv, start + tl.arange(0, BLOCK_N), N, P,
            sign, factor, stride_kn, stride_vn, stride_pkn, stride_pvn, HEAD_DIM, D0, D1, MASK_ALL, POSITIVE,
            ALIGNED, PRECISION, AWAIT,
        )  # fmt: skip
    if TAIL > 0:
        acc0, acc1, total, high = _step(
            acc0, acc1, total, high, q0, q1, p_k, p_v, p_pk, p_pv, whole + tl.arange(0, TAIL), N, P,
            sign, factor, stride_kn, stride_vn, stride_pkn, stride_pvn, HEAD_DIM, D0, D1, True, POSITIVE,
            ALIGNED, PRECISION, AWAIT,
        )  # fmt: skip
    _finish(
        acc0, acc1, total, high * factor, known, p_out, p_lse, o_m, Nq, stride_om, HEAD_DIM, D0, D1, ALIGNED
    )
