"""Attention of a few query rows to the normed rows themselves, without keys and values (docs/shortcuts.md, 3).

Keys and values are the same rows, so a program loops over tiles of an image's rows with an online softmax and uses each
tile twice, for the scores and for the context: a row is read once (twice if the backward uses two launches to save
registers). With fewer images than multiprocessors several programs share an image's tiles, and their parts are joined
in a fixed order. All query rows, class tokens times heads, are one tile. A tile is a tuple of pieces of BLOCK_D
columns: a width of 768 is not a power of two, and the sums over its columns need not all be live at once.

The backward computes the scores in both orientations instead of transposing one: Triton up to 3.7.0 miscompiles a
product with a computed, transposed operand on Hopper. Gradients of prompt rows that images share are partial sums, one
per image, added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton.row_attention_config import ELEMENTWISE, SIZES, Config, Kernel, choose, largest
from fastprompt.kernels.triton.tiles import key_rows
from fastprompt.kernels.triton.tiles import rows as row_starts

MAX_QUERY_ROWS = 32
JOIN_COLUMNS = 256
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _append(pieces, piece):
    return pieces + (piece,)  # noqa: RUF005  (Triton has no unpacking)


@triton.jit
def _zeros(PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return float32 pieces to accumulate in."""
    pieces = ()
    for _ in tl.static_range(PIECES):
        pieces = _append(pieces, tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
    return pieces  # PIECES times [BLOCK_M, BLOCK_D]


@triton.jit
def _load(p_row, m_row, PIECE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load columns from PIECE·BLOCK_D on of the rows at `p_row`; zeros beyond the width and where `m_row` is False."""
    o_d = PIECE * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = m_row[:, None]
    if (PIECE + 1) * BLOCK_D > WIDTH:
        mask = mask & (o_d < WIDTH)[None, :]
    return tl.load(p_row[:, None] + o_d[None, :], mask=mask, other=0.0)  # [BLOCK, BLOCK_D]


@triton.jit
def _store(p_row, m_row, piece, PIECE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = PIECE * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = m_row[:, None]
    if (PIECE + 1) * BLOCK_D > WIDTH:
        mask = mask & (o_d < WIDTH)[None, :]
    tl.store(p_row[:, None] + o_d[None, :], piece.to(p_row.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N", "P"])
def row_attention_fwd_kernel(
    p_query, p_rows, p_prompt, p_context, p_lse, M, N, P,
    stride_qb, stride_qm, stride_rb, stride_rn, stride_pb, stride_pn,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the context and the LSE over the program's share of the tiles, contiguous."""
    i_b = tl.program_id(0).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < M
    p_q_row = row_starts(p_query + i_b * stride_qb, o_m, stride_qm, ALIGNED)
    p_rows += i_b * stride_rb
    p_prompt += i_b * stride_pb
    total = tl.zeros([BLOCK_M], tl.float32)
    high = tl.full([BLOCK_M], -3.0e38, tl.float32)  # finite: -inf less -inf is a NaN
    context = _zeros(PIECES, BLOCK_M, BLOCK_D)

    for start in range(tl.program_id(1) * BLOCK_N, N + P, tl.num_programs(1) * BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < N + P
        p_row = key_rows(p_rows, p_prompt, o_n, N, stride_rn, stride_pn, ALIGNED)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        tile = ()
        for i_d in tl.static_range(PIECES):
            b_q = _load(p_q_row, m_m, i_d, WIDTH, BLOCK_D)
            b_row = _load(p_row, m_n, i_d, WIDTH, BLOCK_D)
            s = tl.dot(b_q, tl.trans(b_row), acc=s, input_precision=PRECISION)
            tile = _append(tile, b_row)
        s = tl.where(m_n[None, :], s * LOG2E, float("-inf"))
        higher = tl.maximum(high, tl.max(s, 1))
        w = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(high - higher)
        total = total * shrink + tl.sum(w, 1)
        high = higher
        w = w.to(p_rows.dtype.element_ty)
        longer = ()
        for i_d in tl.static_range(PIECES):
            acc = context[i_d] * shrink[:, None]
            longer = _append(longer, tl.dot(w, tile[i_d], acc=acc, input_precision=PRECISION))
        context = longer

    i_part = i_b * tl.num_programs(1) + tl.program_id(1)
    p_c_row = row_starts(p_context + i_part * M * WIDTH, o_m, WIDTH, ALIGNED)
    for i_d in tl.static_range(PIECES):
        _store(p_c_row, m_m, context[i_d] / total[:, None], i_d, WIDTH, BLOCK_D)
    tl.store(p_lse + i_part * M + o_m, (high + tl.log2(total)) * LN2, mask=m_m)


@triton.jit(do_not_specialize=["M", "parts"])
def row_attention_join_kernel(
    p_part, p_part_lse, p_context, p_lse, M, parts, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Join the contexts [B, parts, M, D] and LSEs [B, parts, M] of one row, in the order of the parts."""
    i_b = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(1)
    o_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < WIDTH
    context = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    high = -1.0e38  # finite: -inf less -inf is a NaN
    for i in range(parts):
        i_row = (i_b * parts + i) * M + i_m
        lse = tl.load(p_part_lse + i_row)
        higher = tl.maximum(high, lse)
        share, shrink = tl.exp2((lse - higher) * LOG2E), tl.exp2((high - higher) * LOG2E)
        context = context * shrink + tl.load(p_part + i_row * WIDTH + o_d, mask=m_d, other=0.0) * share
        total = total * shrink + share
        high = higher
    i_row = i_b * M + i_m
    tl.store(p_context + i_row * WIDTH + o_d, (context / total).to(p_context.dtype.element_ty), mask=m_d)
    if tl.program_id(2) == 0:
        tl.store(p_lse + i_row, high + tl.log2(total) * LN2)


@triton.jit(do_not_specialize=["M", "N", "P"])
def row_attention_bwd_kernel(
    p_grad, p_query, p_rows, p_prompt, p_context, p_lse, p_d_query, p_d_rows, p_d_prompt, M, N, P,
    stride_gb, stride_gm, stride_qb, stride_qm, stride_rb, stride_rn, stride_pb, stride_pn, stride_cb, stride_cm,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, NEED_QUERY: tl.constexpr, NEED_ROWS: tl.constexpr, NEED_PROMPT: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the needed gradients, contiguous; d(query) over the program's share of the tiles."""
    i_b = tl.program_id(0).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < M
    p_g_row = row_starts(p_grad + i_b * stride_gb, o_m, stride_gm, ALIGNED)
    p_q_row = row_starts(p_query + i_b * stride_qb, o_m, stride_qm, ALIGNED)
    p_c_row = row_starts(p_context + i_b * stride_cb, o_m, stride_cm, ALIGNED)
    p_rows += i_b * stride_rb
    p_prompt += i_b * stride_pb
    p_d_rows += i_b * N * WIDTH
    p_d_prompt += i_b * P * WIDTH
    # Padded query rows get weights of 0 from an LSE of 1e30.
    lse = tl.load(p_lse + i_b * M + o_m, mask=m_m, other=1.0e30) * LOG2E
    delta = tl.zeros([BLOCK_M], tl.float32)
    d_query = _zeros(PIECES, BLOCK_M, BLOCK_D)
    excess = tl.zeros([BLOCK_M], tl.float32)
    for i_d in tl.static_range(PIECES):
        d_context = _load(p_g_row, m_m, i_d, WIDTH, BLOCK_D).to(tl.float32)
        b_context = _load(p_c_row, m_m, i_d, WIDTH, BLOCK_D).to(tl.float32)
        # Fused products, as in attention's delta: all threads of a row get the same bits.
        delta += tl.sum(tl.fma(d_context, b_context, 0.0), 1)

    for start in range(tl.program_id(1) * BLOCK_N, N + P, tl.num_programs(1) * BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < N + P
        p_row = key_rows(p_rows, p_prompt, o_n, N, stride_rn, stride_pn, ALIGNED)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        d_w = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        s_t = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        d_w_t = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        tile = ()
        for i_d in tl.static_range(PIECES):
            b_q = _load(p_q_row, m_m, i_d, WIDTH, BLOCK_D)
            b_g = _load(p_g_row, m_m, i_d, WIDTH, BLOCK_D)
            b_row = _load(p_row, m_n, i_d, WIDTH, BLOCK_D)
            tile = _append(tile, b_row)
            if NEED_QUERY:
                s = tl.dot(b_q, tl.trans(b_row), acc=s, input_precision=PRECISION)
                d_w = tl.dot(b_g, tl.trans(b_row), acc=d_w, input_precision=PRECISION)
            if NEED_ROWS or NEED_PROMPT:
                s_t = tl.dot(b_row, tl.trans(b_q), acc=s_t, input_precision=PRECISION)
                d_w_t = tl.dot(b_row, tl.trans(b_g), acc=d_w_t, input_precision=PRECISION)

        if NEED_QUERY:
            w = tl.exp2(tl.where(m_n[None, :], s * LOG2E - lse[:, None], float("-inf")))
            d_s = tl.fma(w, d_w - delta[:, None], 0.0).to(p_rows.dtype.element_ty)  # [BLOCK_M, BLOCK_N]
            excess += tl.sum(d_s.to(tl.float32), 1)
            longer = ()
            for i_d in tl.static_range(PIECES):
                longer = _append(longer, tl.dot(d_s, tile[i_d], acc=d_query[i_d], input_precision=PRECISION))
            d_query = longer
        if NEED_ROWS or NEED_PROMPT:
            w_t = tl.exp2(
                tl.where(m_n[:, None], s_t * LOG2E - lse[None, :], float("-inf"))
            )  # [BLOCK_N, BLOCK_M]
            d_s_t = (w_t * (d_w_t - delta[None, :])).to(p_rows.dtype.element_ty)
            w_t = w_t.to(p_rows.dtype.element_ty)
            p_d_row = row_starts(p_d_rows, o_n, WIDTH, ALIGNED)
            p_d_prompt_row = row_starts(p_d_prompt, o_n - N, WIDTH, ALIGNED)
            for i_d in tl.static_range(PIECES):
                d_row = tl.dot(d_s_t, _load(p_q_row, m_m, i_d, WIDTH, BLOCK_D), input_precision=PRECISION)
                b_g = _load(p_g_row, m_m, i_d, WIDTH, BLOCK_D)
                d_row = tl.dot(w_t, b_g, acc=d_row, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
                if NEED_ROWS:
                    _store(p_d_row, o_n < N, d_row, i_d, WIDTH, BLOCK_D)
                if NEED_PROMPT:
                    _store(p_d_prompt_row, (o_n >= N) & m_n, d_row, i_d, WIDTH, BLOCK_D)

    if NEED_QUERY:
        # The gradients of a row's scores sum to 0. What roundings of delta leave of them would move d(query) along the
        # context; a row that outweighs all others would get a gradient where there is none.
        i_part = i_b * tl.num_programs(1) + tl.program_id(1)
        p_d_query_row = row_starts(p_d_query + i_part * M * WIDTH, o_m, WIDTH, ALIGNED)
        for i_d in tl.static_range(PIECES):
            b_context = _load(p_c_row, m_m, i_d, WIDTH, BLOCK_D).to(tl.float32)
            _store(p_d_query_row, m_m, d_query[i_d] - excess[:, None] * b_context, i_d, WIDTH, BLOCK_D)


def can_forward(query: Tensor, rows: Tensor, prompt_rows: Tensor | None) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    M, D = query.shape[1:]
    if M > MAX_QUERY_ROWS:
        return f"{M} query rows an image (rows read times heads) are not supported (up to {MAX_QUERY_ROWS})"
    reason = launch.unsupported(query)
    if reason is not None:
        return reason
    limit = largest(launch.architecture(query.device), query.element_size()) // _block_m(M)
    what = f"{M} query rows of {query.dtype}"
    if D * query.element_size() % 16:
        limit, what = min(limit, SIZES[0] // _block_m(M)), f"{what}, no multiple of 16 bytes,"
    if limit < D:
        return f"width {D} with {what} is not supported (up to {limit})"
    return None


def forward(query: Tensor, rows: Tensor, prompt_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return context [B, M, D] and the LSE [B, M] in float32."""
    B, M, D = query.shape
    query, rows, prompt_rows = _dense(query), _dense(rows), _prompts(rows, prompt_rows)
    context = torch.empty((B, M, D), dtype=query.dtype, device=query.device)
    lse = torch.empty((B, M), dtype=torch.float32, device=query.device)
    config = _config(query, "fwd")
    parts = _parts(B, rows.shape[1] + prompt_rows.shape[1], config, query.device)
    part, part_lse = context, lse
    if parts > 1:
        part, part_lse = (x.new_empty((B, parts, *x.shape[1:]), dtype=torch.float32) for x in (context, lse))
    launch.launch(
        row_attention_fwd_kernel,
        (B, parts),
        query.device,
        p_query=query,
        p_rows=rows,
        p_prompt=prompt_rows,
        p_context=part,
        p_lse=part_lse,
        M=M,
        N=rows.shape[1],
        P=prompt_rows.shape[1],
        stride_qb=query.stride(0),
        stride_qm=query.stride(1),
        stride_rb=rows.stride(0),
        stride_rn=rows.stride(1),
        stride_pb=prompt_rows.stride(0),
        stride_pn=prompt_rows.stride(1),
        **_tiles(config, query, (query, rows, prompt_rows, part)),
    )
    if parts > 1:
        launch.launch(
            row_attention_join_kernel,
            (B, M, triton.cdiv(D, JOIN_COLUMNS)),
            query.device,
            p_part=part,
            p_part_lse=part_lse,
            p_context=context,
            p_lse=lse,
            M=M,
            parts=parts,
            WIDTH=D,
            BLOCK_D=JOIN_COLUMNS,
            num_warps=4,
            num_stages=1,
        )
    return context, lse


def can_backward(
    grad: Tensor, query: Tensor, rows: Tensor, prompt_rows: Tensor | None, *rest: object
) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return can_forward(query, rows, prompt_rows)


def backward(
    grad: Tensor,
    query: Tensor,
    rows: Tensor,
    prompt_rows: Tensor | None,
    context: Tensor,
    lse: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, rows and prompt_rows; those not in `needs` are empty."""
    need_query, need_rows, need_prompt = needs
    B, M, D = query.shape
    shared = prompt_rows is not None and prompt_rows.ndim == 2
    if not (need_query or need_rows):
        rows = rows[:, :0]
    grad, query, rows, context = _dense(grad), _dense(query), _dense(rows), _dense(context)
    prompt_rows = _prompts(rows, prompt_rows if need_query or need_prompt else None)
    N, P = rows.shape[1], prompt_rows.shape[1]
    d_rows = query.new_empty((B, N, D) if need_rows else 0)
    d_prompt = query.new_empty(
        (B, P, D) if need_prompt else 0, dtype=torch.float32 if shared else query.dtype
    )
    config = _config(query, "bwd")
    parts = _parts(B, N + P, config, query.device)
    d_query = query.new_empty((B, M, D) if need_query else 0)
    if need_query and parts > 1:
        d_query = query.new_empty((B, parts, M, D), dtype=torch.float32)
    both = need_query and (need_rows or need_prompt)
    # For each launch, whether it computes d(query), and whether the gradients of the rows.
    launches = ((True, False), (False, True)) if both and not config.fused else ((need_query, True),)
    for with_query, with_rows in launches:
        launch.launch(
            row_attention_bwd_kernel,
            (B, parts if with_query else triton.cdiv(N + P, config.block_n)),
            query.device,
            p_grad=grad,
            p_query=query,
            p_rows=rows,
            p_prompt=prompt_rows,
            p_context=context,
            p_lse=lse,
            p_d_query=d_query,
            p_d_rows=d_rows,
            p_d_prompt=d_prompt,
            M=M,
            N=N,
            P=P,
            stride_gb=grad.stride(0),
            stride_gm=grad.stride(1),
            stride_qb=query.stride(0),
            stride_qm=query.stride(1),
            stride_rb=rows.stride(0),
            stride_rn=rows.stride(1),
            stride_pb=prompt_rows.stride(0),
            stride_pn=prompt_rows.stride(1),
            stride_cb=context.stride(0),
            stride_cm=context.stride(1),
            NEED_QUERY=with_query,
            NEED_ROWS=with_rows and need_rows,
            NEED_PROMPT=with_rows and need_prompt,
            **_tiles(config, query, (grad, query, rows, prompt_rows, context)),
        )
    if d_query.ndim == 4:
        d_query = d_query.sum(1).to(query.dtype)
    if need_prompt and shared:
        d_prompt = d_prompt.sum(0).to(query.dtype)
    return d_query, d_rows, d_prompt


def _tiles(config: Config, query: Tensor, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Return the arguments of both kernels besides tensors and strides."""
    D = query.shape[2]
    BLOCK_D = min(config.block_d, max(16, triton.next_power_of_2(D)))
    aligned = D * query.element_size() % 16 == 0 and launch.aligned(*tensors)
    return {
        "WIDTH": D,
        "PIECES": triton.cdiv(D, BLOCK_D),
        "BLOCK_M": _block_m(query.shape[1]),
        "BLOCK_N": config.block_n,
        "BLOCK_D": BLOCK_D,
        "ALIGNED": aligned,
        "PRECISION": launch.input_precision(query.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _parts(B: int, rows: int, config: Config, device: torch.device) -> int:
    """Return the number of programs that share an image's tiles, so that together they fill the device."""
    return max(1, min(launch.multiprocessors(device) // max(1, B), triton.cdiv(rows, config.block_n)))


def _config(query: Tensor, kernel: Kernel) -> Config:
    if query.shape[2] * query.element_size() % 16:
        return ELEMENTWISE
    size = _block_m(query.shape[1]) * query.shape[2]
    return choose(launch.architecture(query.device), kernel, size, query.element_size())


def _block_m(M: int) -> int:
    return 16 if M <= 16 else 32


def _dense(x: Tensor) -> Tensor:
    """Return x with contiguous rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _prompts(rows: Tensor, prompt_rows: Tensor | None) -> Tensor:
    """Return prompt rows as [B, P, D]: shared rows with a batch stride of 0, None as P = 0."""
    if prompt_rows is None:
        return rows[:, :0]
    return _dense(prompt_rows).expand(rows.shape[0], -1, -1)
