"""Functions of the attention kernels: tiles across two key segments, and products over a split head dimension.

A tile of `BLOCK` rows and `HEAD_DIM` columns is one or two pieces of D0 and D1 columns, powers of two: 64 + 16 for
head_dim 72 and 80, where padding to 128 would waste up to half of the operations. With D1 = 0 the second piece is the
first and generates no code.
"""

import triton
import triton.language as tl


@triton.jit
def key_rows(p_image, p_prompt, o_row, N, stride_n, stride_pn, ALIGNED: tl.constexpr):
    """Return pointers to rows `o_row` of [image keys ; prompt keys], so that a tile may hold rows of both."""
    p_row = tl.where(o_row < N, p_image + o_row * stride_n, p_prompt + (o_row - N) * stride_pn)
    if ALIGNED:
        # Triton does not see the alignment through the selection; without it loads are 2 bytes wide.
        p_row = tl.multiple_of(p_row, 16)
    return p_row  # [BLOCK]


@triton.jit
def rows(p_base, o_row, stride, ALIGNED: tl.constexpr):
    """Return pointers to rows `o_row`, with the alignment that Triton cannot see for head_dim 40 or 72."""
    p_row = p_base + o_row * stride
    if ALIGNED:
        p_row = tl.multiple_of(p_row, 16)
    return p_row  # [BLOCK]


@triton.jit
def _piece(p_row, m_row, START: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    o_d = START + tl.arange(0, D)
    mask = m_row[:, None]
    if START + D > HEAD_DIM:
        mask = mask & (o_d < HEAD_DIM)[None, :]
    return p_row[:, None] + o_d[None, :], mask  # [BLOCK, D]


@triton.jit
def load(p_row, m_row, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Load the rows at `p_row` in two pieces; zeros where `m_row` is False."""
    p_piece, mask = _piece(p_row, m_row, 0, D0, HEAD_DIM)
    first = tl.load(p_piece, mask=mask, other=0.0)
    second = first
    if D1 > 0:
        p_piece, mask = _piece(p_row, m_row, D0, D1, HEAD_DIM)
        second = tl.load(p_piece, mask=mask, other=0.0)
    return first, second  # [BLOCK, D0], [BLOCK, D1]


@triton.jit
def store(p_row, m_row, first, second, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Store the two pieces of rows `p_row` where `m_row` is True, in the memory's dtype."""
    p_piece, mask = _piece(p_row, m_row, 0, D0, HEAD_DIM)
    tl.store(p_piece, first.to(p_row.dtype.element_ty), mask=mask)
    if D1 > 0:
        p_piece, mask = _piece(p_row, m_row, D0, D1, HEAD_DIM)
        tl.store(p_piece, second.to(p_row.dtype.element_ty), mask=mask)


@triton.jit
def product(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Return a·b over the head dimension, in float32, for b [D, BLOCK_B]."""
    both = tl.dot(a0, b0, input_precision=PRECISION)
    if D1 > 0:
        both = tl.dot(a1, b1, acc=both, input_precision=PRECISION)
    return both  # [BLOCK_A, BLOCK_B]


@triton.jit
def contract(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Return a·bᵀ over the head dimension, in float32."""
    return product(a0, a1, tl.trans(b0), tl.trans(b1), D1, PRECISION)  # [BLOCK_A, BLOCK_B]


@triton.jit
def accumulate(acc0, acc1, weights, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + weights·b, both pieces, with the weights in b's dtype."""
    weights = weights.to(b0.dtype)
    acc0 = tl.dot(weights, b0, acc=acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(weights, b1, acc=acc1, input_precision=PRECISION)
    return acc0, acc1  # [BLOCK_A, D0], [BLOCK_A, D1]


@triton.jit
def awaited(acc0, acc1, D1: tl.constexpr, AWAIT: tl.constexpr):
    """Return sums that a loop carries; with AWAIT, Triton awaits their products here, not in the loop's next pass.

    Any use in the pass that starts a product has this effect. This one, a copy, generates no instruction.
    """
    if AWAIT:
        acc0 = _use(acc0)
        if D1 > 0:
            acc1 = _use(acc1)
    return acc0, acc1


@triton.jit
def _use(x):
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def zeros(BLOCK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Return two float32 pieces of zeros to accumulate in."""
    acc0 = tl.zeros([BLOCK, D0], tl.float32)
    acc1 = acc0
    if D1 > 0:
        acc1 = tl.zeros([BLOCK, D1], tl.float32)
    return acc0, acc1


@triton.jit
def score_factor(p_temperature, scale, HAS_TEMPERATURE: tl.constexpr):
    """Return the softmax scale with log2(e) folded in, for exp2."""
    factor = scale * 1.4426950408889634  # log2(e)
    if HAS_TEMPERATURE:
        factor = factor / tl.load(p_temperature).to(tl.float32)
    return factor


@triton.jit
def signed_factor(p_temperature, scale, HAS_TEMPERATURE: tl.constexpr):
    """Return the factor's sign and size, so that with signed queries the largest product is the largest score.

    A factor of 0 is a sign of 0 and a size of 1: -inf times 0 would be a NaN.
    """
    factor = score_factor(p_temperature, scale, HAS_TEMPERATURE)
    sign = tl.where(factor < 0, -1.0, tl.where(factor == 0, 0.0, 1.0))
    return sign, tl.where(factor == 0, 1.0, tl.abs(factor))


@triton.jit
def prompt_set(p_index, i_b, T, HAS_INDEX: tl.constexpr):
    """Return the prompt set of image `i_b`, and whether it exists; if not, the first set."""
    i_set = i_b
    known = True
    if HAS_INDEX:
        i_set = tl.load(p_index + i_b).to(tl.int64)
        known = (i_set >= 0) & (i_set < T)
        i_set = tl.where(known, i_set, 0)
    return i_set, known
