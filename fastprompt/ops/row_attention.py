"""Attention of a few query rows, with the key and value maps absorbed into the query and the output.

With R query rows of an image the keys and values of its N rows need not be computed: for each head,

    q·k_jᵀ = (W_kᵀ·q)·h_j + q·b_k,   Σ_j p_j·v_j = W_v·(Σ_j p_j·h_j) + b_v,

where q·b_k cancels in the softmax and Σ p_j = 1. What remains is attention of R·H rows to the normed rows h themselves,
the operator `fastprompt::folded_row_attention`, with small products before and after it. The last block of a
class-token model uses it, because its head reads one row. q/k norm and rope act on computed keys and are not supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fastprompt.ops import dispatch, trust
from fastprompt.ops.checks import check_devices_and_dtypes
from fastprompt.ops.operator import (
    accumulation_dtype,
    autocast,
    call,
    define_operator,
    mark_as_backward,
    register_gradient,
    traced_plainly,
)


def row_attention(
    q: Tensor,
    rows: Tensor,
    prompt_rows: Tensor | None,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    *,
    scale: float | None = None,
    temperature: Tensor | None = None,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """Return softmax([q·kᵀ ; q·k_pᵀ]·scale/temperature)·[v ; v_p] without computing k and v, linear maps of `rows`.

    Args:
        q: [B, R, H, d], projected queries; R is small (1 for a class token).
        rows: [B, N, D], the input of the key and value maps.
        prompt_rows: [P, D] or [B, P, D], the prompts' input to the same maps, or None.
        k_weight, v_weight: [H·d, D].
        v_bias: [H·d] or None. The keys' bias has no effect.
        scale: factor on q·k; default d**-0.5.
        temperature: one-element tensor that divides the scaled scores, or None.
        backend: "auto", or the backend that must run the attention itself.

    Returns:
        [B, R, H, d].

    Raises:
        ValueError: `rows` and `prompt_rows` do not fit each other or the maps; the message names value and remedy.
        NotImplementedError: `backend` names one that cannot run this call.
    """
    H, d = q.shape[2:]
    scale = d**-0.5 if scale is None else scale
    query = torch.einsum(
        "brhd,hdD->brhD", q * scale, rearrange(k_weight, "(H d) D -> H d D", H=H).to(q.dtype)
    )
    if temperature is not None:
        query = query / temperature.to(query.dtype)
    context = folded_row_attention(
        rearrange(query, "B R H D -> B (R H) D"),
        rows.to(query.dtype),
        None if prompt_rows is None else prompt_rows.to(query.dtype),
        backend=backend,
    )
    context = rearrange(context, "B (R H) D -> B R H D", H=H)
    out = torch.einsum("brhD,hdD->brhd", context, rearrange(v_weight, "(H d) D -> H d D", H=H).to(q.dtype))
    return out if v_bias is None else out + rearrange(v_bias, "(H d) -> H d", H=H).to(out.dtype)


def folded_row_attention(
    query: Tensor, rows: Tensor, prompt_rows: Tensor | None = None, *, backend: str = dispatch.AUTO
) -> Tensor:
    """Return softmax([query·rowsᵀ ; query·prompt_rowsᵀ])·[rows ; prompt_rows]: the rows are both keys and values.

    Args:
        query: [B, M, D], already scaled; M = R·H is small (12 for a class token of ViT-B).
        rows: [B, N, D]; N may be 0, for attention to prompt rows only.
        prompt_rows: [P, D] shared by the batch, [B, P, D] one set per image, or None. P may be 0.
        backend: "auto", or the backend that must run this call (:func:`fastprompt.backends`).

    Returns:
        [B, M, D], contiguous.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message names value and remedy.
        NotImplementedError: `backend` names one that cannot run this call.
    """
    _check(query, rows, prompt_rows)
    if prompt_rows is not None and prompt_rows.shape[-2] == 0:
        prompt_rows = None
    backend = dispatch.requested(backend)
    if traced_plainly(backend, fusable=not (query.is_cuda and dispatch.triton_is_available())):
        return _plain(query, rows, prompt_rows)
    context, _ = call("folded_row_attention", query, rows, prompt_rows, backend)
    return context


def folded_row_attention_reference(query: Tensor, rows: Tensor, prompt_rows: Tensor | None = None) -> Tensor:
    """Compute :func:`folded_row_attention` in plain PyTorch, in float32 or better: the specification.

    Returns [B, M, D] in query's dtype; differentiable any number of times.
    """
    with torch.autocast(query.device.type, enabled=False):
        wide = accumulation_dtype(query.dtype)
        every = rows.to(wide)
        if prompt_rows is not None:
            every = torch.cat([every, prompt_rows.to(wide).expand(rows.shape[0], -1, -1)], dim=1)
        return ((query.to(wide) @ every.mT).softmax(-1) @ every).to(query.dtype)


def _plain(query: Tensor, rows: Tensor, prompt_rows: Tensor | None) -> Tensor:
    """Compute the same in the inputs' dtype, the softmax in float32 or better."""
    scores = query @ rows.mT
    if prompt_rows is not None:
        scores = torch.cat([scores, query @ prompt_rows.mT], dim=-1)
    weights = scores.softmax(-1, dtype=accumulation_dtype(scores.dtype)).to(scores.dtype)
    N = rows.shape[1]
    context = weights[..., :N] @ rows
    return context if prompt_rows is None else context + weights[..., N:] @ prompt_rows


def _check(query: Tensor, rows: Tensor, prompt_rows: Tensor | None) -> None:
    def fail(what: str) -> None:
        raise ValueError(f"`folded_row_attention`: {what}")

    if query.ndim != 3:
        fail(f"`query` must be [B, M, D]; got {tuple(query.shape)}")
    B, _, D = query.shape
    if rows.ndim != 3 or (rows.shape[0], rows.shape[2]) != (B, D):
        fail(f"`rows` must be [B, N, D] with B={B}, D={D} as in `query`; got {tuple(rows.shape)}")
    if D == 0:
        fail("the width is 0; `query` must be [B, M, D] with D >= 1")
    if prompt_rows is not None:
        shape = tuple(prompt_rows.shape)
        if len(shape) not in (2, 3) or shape[-1] != D or (len(shape) == 3 and shape[0] != B):
            fail(f"`prompt_rows` must be [P, D] or [B, P, D] with B={B}, D={D}; got {shape}; reshape it")
    if rows.shape[1] == 0 and (prompt_rows is None or prompt_rows.shape[-2] == 0):
        fail(
            "there is no row to attend to: `rows` has N=0 and there are no prompt rows; pass one or the other"
        )
    others = {"rows": rows, "prompt_rows": prompt_rows}
    check_devices_and_dtypes("folded_row_attention", "query", query, others)


# The operator ---------------------------------------------------------------------------------------------------


def _fake(query: Tensor, rows: Tensor, prompt_rows: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:2], dtype=accumulation_dtype(query.dtype))
    return query.new_empty(query.shape), lse


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    rows: Tensor,
    prompt_rows: Tensor | None,
    context: Tensor,
    lse: Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (query, rows, prompt_rows)
    return tuple(
        query.new_empty(0 if x is None or not need else x.shape)
        for x, need in zip(inputs, needs, strict=True)
    )


def _flops(query: Any, rows: Any, prompt_rows: Any, *rest: Any, **kwargs: Any) -> int:
    B, M, D = query
    return 4 * B * M * D * (rows[1] + (prompt_rows[-2] if prompt_rows else 0))


def _flops_backward(grad: Any, query: Any, rows: Any, prompt_rows: Any, *rest: Any, **kwargs: Any) -> int:
    need_query, need_rows, need_prompt = rest[2]
    B, M, D = query
    N, P = rows[1], prompt_rows[-2] if prompt_rows else 0
    if not _needs_image_rows(rest[2]):
        N = 0
    # Scores and d(weights), one product for d(query), and two for the gradient of each kind of row.
    products = (N + P) * (2 + need_query) + 2 * N * need_rows + 2 * P * need_prompt
    return 2 * B * M * D * products


_OPERATOR = define_operator(
    "folded_row_attention(Tensor query, Tensor rows, Tensor? prompt_rows, str backend) "
    "-> (Tensor context, Tensor lse)",
    fake=_fake,
    flops=_flops,
)
# `needs`: which of d(query), d(rows), d(prompt_rows) are needed; the others are empty.
_BACKWARD = define_operator(
    "folded_row_attention_backward(Tensor grad, Tensor query, Tensor rows, Tensor? prompt_rows, Tensor context, "
    "Tensor lse, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    flops=_flops_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, rows, prompt_rows, backend = inputs
    context, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.backend = backend
    if not _needs_image_rows(ctx.needs_input_grad):
        # The gradient of prompt rows needs only `lse` and `context`, not the other rows.
        rows = rows.new_empty((rows.shape[0], 0, rows.shape[2]))
    ctx.save_for_backward(query, rows, prompt_rows, context, lse)


def _backward(ctx: Any, grad: Tensor | None, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 4
    needs = [bool(n) for n in ctx.needs_input_grad[:3]]
    gradients = call("folded_row_attention_backward", grad, *ctx.saved_tensors, needs, ctx.backend)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None)


def _needs_image_rows(needs: Sequence[bool]) -> bool:
    return needs[0] or needs[1]


register_gradient(_OPERATOR, setup=_setup, backward=_backward)
mark_as_backward(_BACKWARD)
autocast(_OPERATOR, cast=(0, 1, 2))


# The backend `eager` --------------------------------------------------------------------------------------------


def _forward_eager(query: Tensor, rows: Tensor, prompt_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(query.dtype)
    N = rows.shape[1]
    scores = torch.matmul(query, rows.mT)
    if prompt_rows is not None:
        scores = torch.cat([scores, torch.matmul(query, prompt_rows.mT)], dim=-1)
    scores = scores.to(wide)
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).to(query.dtype)  # exp(scores - lse) has the rounding of large scores
    context = torch.matmul(weights[..., :N], rows)
    if prompt_rows is not None:
        context += torch.matmul(weights[..., N:], prompt_rows)
    return context, lse


def _backward_eager(
    grad: Tensor,
    query: Tensor,
    rows: Tensor,
    prompt_rows: Tensor | None,
    context: Tensor,
    lse: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    need_query, need_rows, need_prompt = needs
    M = query.shape[1]
    # Two products with a tall matrix; four with its halves would read the rows twice as often.
    both = torch.cat([query, grad], dim=1)  # [B, 2·M, D]
    if not _needs_image_rows(needs):
        rows = rows[:, :0]
    N = rows.shape[1]
    products = torch.matmul(both, rows.mT)
    if prompt_rows is not None:
        products = torch.cat([products, torch.matmul(both, prompt_rows.mT)], dim=-1)
    scores, d_weights = products.to(lse.dtype).chunk(2, dim=1)
    if _needs_image_rows(needs):
        # A softmax of these scores, not exp(scores - lse): large scores differ from the forward's by their rounding.
        # Weights that sum to 1 give the score of a row that outweighs all others a gradient of 0.
        weights = scores.softmax(-1)
        delta = (weights * d_weights).sum(-1, keepdim=True)
    else:
        weights = (scores - lse.unsqueeze(-1)).exp_()
        delta = (grad * context).sum(-1, keepdim=True, dtype=lse.dtype)
    # The gradients of the rows are these factors times [query ; grad].
    factors = torch.cat([(d_weights - delta).mul_(weights), weights], dim=1).to(query.dtype)
    of_rows, of_prompt = factors[..., :N], factors[..., N:]
    d_query, d_rows, d_prompt = (query.new_empty(0) for _ in range(3))
    if need_query:
        d_query = torch.matmul(of_rows[:, :M], rows)
    if need_rows:
        d_rows = torch.matmul(of_rows.mT, both)
    if prompt_rows is not None:
        if need_query:
            d_query += torch.matmul(of_prompt[:, :M], prompt_rows)
        if need_prompt and prompt_rows.ndim == 2:
            d_prompt = torch.matmul(of_prompt.flatten(0, 1).mT, both.flatten(0, 1))
        elif need_prompt:
            d_prompt = torch.matmul(of_prompt.mT, both)
    return d_query, d_rows, d_prompt


dispatch.register("folded_row_attention", "eager", _forward_eager, dispatch.always)
dispatch.register("folded_row_attention_backward", "eager", _backward_eager, dispatch.always)
dispatch.register_triton("folded_row_attention", "row_attention", "forward")
dispatch.register_triton("folded_row_attention_backward", "row_attention", "backward")


def _images(query: Tensor, rows: Tensor, prompt_rows: Tensor | None) -> tuple[int, ...]:
    return (0, 1) if prompt_rows is None or prompt_rows.ndim == 2 else (0, 1, 2)


def _images_backward(
    grad: Tensor, query: Tensor, rows: Tensor, prompt_rows: Tensor | None, *rest: Any
) -> tuple[int, ...]:
    return (0, *(1 + i for i in _images(query, rows, prompt_rows)), 4, 5)


def _exact_backward(
    grad: Tensor,
    query: Tensor,
    rows: Tensor,
    prompt_rows: Tensor | None,
    context: Tensor,
    lse: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if _needs_image_rows(needs):  # else there may be no rows to compute them from
        context, lse = _forward_eager(query, rows, prompt_rows)
    return _backward_eager(grad, query, rows, prompt_rows, context, lse, needs)


trust.describe("folded_row_attention", _images)
trust.describe("folded_row_attention_backward", _images_backward, _exact_backward)
