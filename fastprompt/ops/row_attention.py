"""Attention of a few query rows, with the key and value maps folded into the query and the output.

With R query rows of an image the keys and values of its N rows need not be made: for each head,

    q·k_jᵀ = (W_kᵀ·q)·h_j + q·b_k,   Σ_j p_j·v_j = W_v·(Σ_j p_j·h_j) + b_v,

the softmax ignores q·b_k, and Σ p_j = 1. What is left are products of R·H rows with the normed rows h themselves. That
is the last block of a class-token model, whose head reads one row. Not with q/k norm or rope: they act on made keys.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


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
) -> Tensor:
    """softmax([q·kᵀ ; q·k_pᵀ]·scale/temperature)·[v ; v_p], k and v being linear maps of `rows` that are never made.

    Args:
        q: [B, R, H, d], projected queries; R is small (1 for a class token).
        rows: [B, N, D], the input of the key and value maps.
        prompt_rows: [P, D] or [B, P, D], the prompts' input of the same maps, or None.
        k_weight, v_weight: [H·d, D].
        v_bias: [H·d] or None. (The key's bias has no effect.)
        scale: factor on q·k; default d**-0.5.
        temperature: one-element tensor that divides the scaled scores, or None.

    Returns:
        [B, R, H, d].
    """
    B, R, H, d = q.shape
    scale = d**-0.5 if scale is None else scale
    query = torch.einsum(
        "brhd,hdD->brhD", q * scale, rearrange(k_weight, "(H d) D -> H d D", H=H).to(q.dtype)
    )
    if temperature is not None:
        query = query / temperature.to(query.dtype)
    query = rearrange(query, "B R H D -> B (R H) D")
    rows = rows.to(query.dtype)
    scores = torch.matmul(query, rows.mT)
    if prompt_rows is None or prompt_rows.shape[-2] == 0:
        context = torch.matmul(_softmax(scores), rows)
    else:
        prompt_rows = prompt_rows.to(query.dtype)
        N = rows.shape[1]
        weights = _softmax(torch.cat([scores, torch.matmul(query, prompt_rows.mT)], dim=-1))
        context = torch.matmul(weights[..., :N], rows) + torch.matmul(weights[..., N:], prompt_rows)
    context = rearrange(context, "B (R H) D -> B R H D", H=H)
    out = torch.einsum("brhD,hdD->brhd", context, rearrange(v_weight, "(H d) D -> H d D", H=H).to(q.dtype))
    return out if v_bias is None else out + rearrange(v_bias, "(H d) -> H d", H=H).to(out.dtype)


def _softmax(scores: Tensor) -> Tensor:
    # Autocast would leave the softmax in float32; the products around it take the dtype of the rows.
    return scores.softmax(-1).to(scores.dtype)
