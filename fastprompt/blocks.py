"""How one block runs with prompts: in full, for the rows the head reads, or for their mean.

All three are exact (docs/shortcuts.md). Prompts enter a block in one of two ways: as keys and values alone
(:class:`BlockPrompts`), or carried, as rows of the sequence between the prefix tokens and the patches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from fastprompt import vit
from fastprompt.ops import (
    FoldedPrompts,
    Norm,
    ProjectedPrompts,
    direct_cross_attention,
    folded_cross_attention,
    gated_blend,
    row_attention,
)
from fastprompt.ops.dispatch import has_fused_kernel

Span = tuple[int, int]


class BlockPrompts(NamedTuple):
    """The prompts of one block: what its attention reads of them, made once for the whole batch.

    `rows` [P, D] or [B, P, D] enter the key and value maps (the prompts after norm1), `key` and `value` [P, H, d] or
    [B, P, H, d] are what comes out. Whichever the block does not use is None.
    """

    rows: Tensor | None
    key: Tensor | None
    value: Tensor | None


class Cross(NamedTuple):
    """CVPT's cross-attention of one block: where it stands (`insert`, 1 to 5), and its prompts in one of two forms."""

    insert: int
    prompts: FoldedPrompts | ProjectedPrompts


class Context(NamedTuple):
    """What a block is told besides tokens and prompts.

    `rope`: its rotary embedding; `carried` prompts stand in the sequence after `prefix` rows; `temperature` and `gate`:
    GateVPT's one-element tensors, or None; `cross`: CVPT's cross-attention, or None; `normed`: norm1 of the tokens
    [B, N, D] where the block before has made it, or None.
    """

    rope: Tensor | None = None
    carried: int = 0
    prefix: int = 0
    temperature: Tensor | None = None
    gate: Tensor | None = None
    cross: Cross | None = None
    normed: Tensor | None = None


def prepare_prompts(block: Any, prompts: Tensor, *, folded: bool) -> BlockPrompts:
    """Prompts [P, D] or [B, P, D] -> what the block's attention reads of them.

    `folded` blocks run by :func:`run_rows` with folded maps and need no keys and values.
    """
    block_adapter, attention = vit.adapters(block)
    rows = block_adapter.attention_input(block, prompts)
    if folded:
        return BlockPrompts(rows, None, None)
    key, value = attention.keys_values(block.attn, rows)
    return BlockPrompts(None, key, value)


def run_block(block: Any, x: Tensor, prompts: BlockPrompts | None, context: Context) -> Tensor:
    """The whole block: x [B, N, D] -> [B, N, D]; with a gate, carried prompts are blended with those that entered."""
    if context.gate is not None:
        return run_gated(block, x, None, prompts, context)[0]
    x = _cross(block, x, context, 1)
    x, normed = _attention(block, x, prompts, context)
    return _mlp(block, x, normed, context)


def run_gated(
    block: Any, x: Tensor, following: Any, prompts: BlockPrompts | None, context: Context
) -> tuple[Tensor, Tensor | None]:
    """The whole block, with a gate: x [B, N, D] -> [B, N, D], and norm1 of that for the block `following`.

    The second is None unless one kernel makes both.
    """
    adapter, _ = vit.adapters(block)
    entered = x.narrow(1, context.prefix, context.carried)
    x, normed = _attention(block, x, prompts, context)
    delta = adapter.mlp_delta(block, block.mlp(_mlp_input(block, x, normed, context)))
    norm = None
    if following is not None and has_fused_kernel("gated_blend", x):
        norm = _frozen_norm(following, "norm1")
    gate: Any = context.gate
    return gated_blend(x, delta, entered, gate, context.prefix, context.carried, norm=norm)


def run_rows(block: Any, x: Tensor, count: int, prompts: BlockPrompts | None, context: Context) -> Tensor:
    """The block for its first `count` rows alone (prefix tokens: no gate touches them): x [B, N, D] -> [B, count, D].

    Keys and values of the other rows are not made either, unless q/k norm or rotary embedding acts on them.
    """
    _, attention = vit.adapters(block)
    attn = block.attn
    x = _cross(block, x, context, 1)
    h = _attention_input(block, x, context)
    read = h[:, :count]
    q = attention.queries(attn, read)
    weights = attention.weights(attn)
    if folds(block, context.rope is not None) and weights is not None:
        out = row_attention(
            q,
            h,
            None if prompts is None else prompts.rows,
            weights.k_weight,
            weights.v_weight,
            weights.v_bias,
            scale=attn.scale,
            temperature=context.temperature,
        )
    else:
        k, v = attention.keys_values(attn, h, context.rope, context.carried)
        out = vit.attend(attn, q, k, v, _keys_values(block, prompts), context.temperature)
    rows, normed = _add_attention(block, x[:, :count], attention.finish(attn, out, read), context)
    return _mlp(block, rows, normed, context)


def run_mean(
    block: Any, x: Tensor, spans: tuple[Span, ...], prompts: BlockPrompts | None, context: Context
) -> Tensor:
    """The mean over the rows of `spans` of the block's output: x [B, N, D] -> [B, D].

    `fc2` and layer scale are linear and act on the mean, one row instead of N.
    """
    if context.gate is not None:
        return select(run_block(block, x, prompts, context), spans).mean(1)
    adapter, _ = vit.adapters(block)
    x = _cross(block, x, context, 1)
    x, normed = _attention(block, x, prompts, context)
    x, normed = select(x, spans), None if normed is None else select(normed, spans)
    if not adapter.mean_commutes(block) or (context.cross is not None and context.cross.insert == 5):
        return _mlp(block, x, normed, context).mean(1)
    hidden = vit.mlp_hidden(block.mlp, _mlp_input(block, x, normed, context)).mean(1, keepdim=True)
    return adapter.add_mlp(block, x.mean(1, keepdim=True), block.mlp.fc2(hidden)).squeeze(1)


def folds(block: Any, rope: bool) -> bool:
    """Whether :func:`run_rows` folds the key and value maps of this block away; `rope`: whether it rotates."""
    return vit.adapters(block)[1].can_absorb_kv(block.attn, rope) and not vit.drops_attention(block.attn)


def select(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """The rows of x [B, N, D] that lie in `spans`, in order."""
    if len(spans) == 1:
        start, stop = spans[0]
        return x[:, start:stop]
    return torch.cat([x[:, start:stop] for start, stop in spans], dim=1)


def _frozen_norm(block: Any, name: str) -> Norm | None:
    """Return norm1 or norm2 of `block` if it is a LayerNorm before its branch that neither trains nor has hooks."""
    norm = getattr(block, name)
    if isinstance(vit.adapters(block)[0], vit.ResPostBlockAdapter) or type(norm) not in (
        nn.LayerNorm,
        LayerNorm,
    ):
        return None
    watched = (
        norm._forward_pre_hooks or norm._forward_hooks or norm._backward_pre_hooks or norm._backward_hooks
    )
    if watched or getattr(norm, "_fast_norm", False) or any(p.requires_grad for p in norm.parameters()):
        return None
    return Norm(norm.weight, norm.bias, norm.eps)


def _attention_input(block: Any, x: Tensor, context: Context) -> Tensor:
    """What enters the attention's maps for the block's input x, both [B, N, D]."""
    return vit.adapters(block)[0].attention_input(block, x) if context.normed is None else context.normed


def _attention(
    block: Any, x: Tensor, prompts: BlockPrompts | None, context: Context
) -> tuple[Tensor, Tensor | None]:
    """x [B, N, D] plus its attention (and the cross-attention beside it or after it); norm2 as `_add_attention`."""
    _, attention = vit.adapters(block)
    h = _attention_input(block, x, context)
    prompt_keys = _keys_values(block, prompts)
    out = vit.self_attend(
        block.attn, h, prompt_keys, context.temperature, rope=context.rope, extra_prefix=context.carried
    )
    return _add_attention(block, x, attention.finish(block.attn, out, h), context)


def _add_attention(block: Any, x: Tensor, out: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    """x [B, N, D] plus what the attention's branch adds to it, and norm2 of that.

    The second is None unless one kernel makes both.
    """
    adapter, _ = vit.adapters(block)
    cross = context.cross
    if cross is not None and cross.insert == 2:
        delta = adapter.attention_scale(block, out) + cross_attention(block, x, cross)
        return x + block.drop_path1(delta), None
    x = adapter.add_attention(block, x, out)
    if cross is None or cross.insert != 3:
        return x, None
    if isinstance(cross.prompts, FoldedPrompts) and has_fused_kernel("folded_cross_attention", x):
        norm = _frozen_norm(block, "norm2")
        return folded_cross_attention(x, cross.prompts, residual=True, norm=norm)
    return cross_attention(block, x, cross, residual=True), None


def _mlp_input(block: Any, x: Tensor, normed: Tensor | None, context: Context) -> Tensor:
    """What enters the MLP for x [B, N, D]; `normed`: norm2 of x, where it is made already."""
    if normed is not None:
        return normed
    adapter, _ = vit.adapters(block)
    h = adapter.mlp_input(block, x)
    if context.cross is not None and context.cross.insert == 4:
        return h + cross_attention(block, x, context.cross)
    return h


def _mlp(block: Any, x: Tensor, normed: Tensor | None, context: Context) -> Tensor:
    adapter, _ = vit.adapters(block)
    x = adapter.add_mlp(block, x, block.mlp(_mlp_input(block, x, normed, context)))
    return _cross(block, x, context, 5)


def _cross(block: Any, x: Tensor, context: Context, insert: int) -> Tensor:
    """x [B, N, D], plus the cross-attention if it stands at this end of the block (1 or 5)."""
    if context.cross is None or context.cross.insert != insert:
        return x
    return cross_attention(block, x, context.cross, residual=True)


def cross_attention(block: Any, x: Tensor, cross: Cross, *, residual: bool = False) -> Tensor:
    """CVPT's cross-attention of x [B, N, D] to the block's prompts, by the weights of its self-attention.

    With `residual`, x is added.
    """
    if isinstance(cross.prompts, FoldedPrompts):
        return folded_cross_attention(x, cross.prompts, residual=residual)[0]
    weights = vit.adapters(block)[1].plain_weights(block.attn)
    out = direct_cross_attention(x, cross.prompts, weights, scale=block.attn.scale)
    return x + out if residual else out


def _keys_values(block: Any, prompts: BlockPrompts | None) -> tuple[Tensor, Tensor] | None:
    if prompts is None:
        return None
    if prompts.key is not None and prompts.value is not None:
        return prompts.key, prompts.value
    # Prepared for `run_rows`, and now all rows are asked for.
    return vit.adapters(block)[1].keys_values(block.attn, prompts.rows) if prompts.rows is not None else None
