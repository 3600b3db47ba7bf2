"""Run one block with prompts: in full, for the mean of some rows, or for its first rows only.

All are exact (docs/shortcuts.md). Prompts enter a block in one of two ways: only as keys and values
(:class:`BlockPrompts`), or carried, as rows of the sequence between the prefix tokens and the patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import torch
from timm.layers import GluMlp, LayerNorm, Mlp, SwiGLU
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fastprompt import vit
from fastprompt.frozen import has_hooks, linear
from fastprompt.ops import (
    FoldedPrompts,
    Norm,
    ProjectedPrompts,
    direct_cross_attention,
    folded_cross_attention,
    gated_blend,
    residual_norm,
    row_attention,
)
from fastprompt.ops.dispatch import has_fused_kernel
from fastprompt.ops.operator import autocast_enabled
from fastprompt.vit import TimmAttention, TimmBlock

# Rows start..stop of a sequence; None is its end.
Span: TypeAlias = tuple[int, int | None]
# The part of each block that is computed again in the backward instead of being kept from the forward.
Recompute: TypeAlias = Literal["mlp", "attention", "block"]
_P = ParamSpec("_P")
_R = TypeVar("_R")


class BlockPrompts(NamedTuple):
    """The prompts of one block as its attention uses them, prepared once for the whole batch.

    `key` and `value`, [P, H, d] or [B, P, H, d], are the projected prompts. A block that absorbs its key and value maps
    (:func:`folds`) uses `rows` [P, D] or [B, P, D] instead, the prompts after norm1.
    """

    rows: Tensor | None
    key: Tensor | None
    value: Tensor | None


class Cross(NamedTuple):
    """CVPT's cross-attention of one block: its position `insert`, 1 to 5, and its prompts in one of two forms."""

    insert: int
    prompts: FoldedPrompts | ProjectedPrompts


class Context(NamedTuple):
    """The other inputs of a block, besides tokens and its own prompts.

    Attributes:
        rope: the block's rotary embedding, or None.
        prefix, carried: `carried` prompt rows follow the first `prefix` rows of the sequence.
        masked: carried prompts attend to patches only (DA-VPT's mask).
        temperature, gate: GateVPT's one-element tensors, or None.
        following: the next block, whose norm1 may be computed with this block's output, or None.
        cross: CVPT's cross-attention, or None.
        normed: norm1 of the tokens [B, N, D] if the block before has computed it, or None.
        recompute: the part that the backward computes again, or None.
    """

    rope: Tensor | None = None
    prefix: int = 0
    carried: int = 0
    masked: bool = False
    temperature: Tensor | None = None
    gate: Tensor | None = None
    following: TimmBlock | None = None
    cross: Cross | None = None
    normed: Tensor | None = None
    recompute: Recompute | None = None

    def run(self, part: Recompute, run: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Call `run`, and again in the backward if it computes the part to recompute."""
        if self.recompute != part or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        # Flat, so that `checkpoint` keeps the tensors as autograd does and sees whether they have changed.
        leaves, structure = pytree.tree_flatten((args, kwargs))

        def call(*leaves: object) -> _R:
            args, kwargs = pytree.tree_unflatten(list(leaves), structure)
            return run(*args, **kwargs)

        return checkpoint(call, *leaves, use_reentrant=False)


def prepare_prompts(block: TimmBlock, prompts: Tensor, *, folded: bool) -> BlockPrompts:
    """Prepare prompts [P, D] or [B, P, D] for the attention of `block`; for :func:`run_rows` if `folded`."""
    block_adapter, attention = vit.adapters(block)
    rows = block_adapter.attention_input(block, prompts)
    if folded:
        return BlockPrompts(rows, None, None)
    return BlockPrompts(None, *attention.keys_values(attention_of(block), rows))


def run_block(
    block: TimmBlock,
    x: Tensor,
    prompts: BlockPrompts | None,
    context: Context,
    spans: tuple[Span, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run all rows through the block.

    Args:
        x: [B, N, D]; N includes carried prompts.
        spans: return the mean over these rows of the output. `fc2` and layer scale are linear, so they then act on the
            mean, one row instead of N.

    Returns:
        The output [B, N, D] (or its mean [B, D]), and norm1 of it for `context.following` if one kernel computes both,
        else None.
    """
    if context.gate is None:
        return context.run("block", _run_block, block, x, prompts, context, spans)
    prompt_in = x.narrow(1, context.prefix, context.carried)
    x, delta = context.run("block", _gated_branches, block, x, prompts, context)
    following = _following(context)
    norm = None
    if following is not None and _fuses("gated_blend", x):
        norm = _frozen_norm(following, "norm1")
    x, normed = gated_blend(x, delta, prompt_in, context.gate, context.prefix, context.carried, norm=norm)
    return (x, normed) if spans is None else (select(x, spans).mean(1), None)


def _run_block(
    block: TimmBlock,
    x: Tensor,
    prompts: BlockPrompts | None,
    context: Context,
    spans: tuple[Span, ...] | None,
) -> tuple[Tensor, Tensor | None]:
    x = _cross(block, x, context, 1)
    out = context.run("attention", _attention, block, x, prompts, context)
    x, normed = _add_attention(block, x, out, context)
    if spans is not None:
        return _mlp_mean(block, x, normed, context, spans), None
    return _mlp(block, x, normed, context)


def _gated_branches(
    block: TimmBlock, x: Tensor, prompts: BlockPrompts | None, context: Context
) -> tuple[Tensor, Tensor]:
    """Return the rows [B, N, D] after attention, and what the MLP adds to them."""
    out = context.run("attention", _attention, block, x, prompts, context)
    x, normed = _add_attention(block, x, out, context)
    out = context.run("mlp", _mlp_output, block, x, normed, context.cross)
    return x, vit.adapters(block)[0].mlp_delta(block, out)


def run_rows(
    block: TimmBlock, x: Tensor, prompts: BlockPrompts | None, context: Context, count: int
) -> Tensor:
    """Run the first `count` rows (prefix tokens, which are not gated): x [B, N, D] -> [B, count, D].

    Keys and values of the other rows are computed only if q/k norm or rotary embedding acts on them.
    """
    return context.run("block", _run_rows, block, x, prompts, context, count)


def _run_rows(
    block: TimmBlock, x: Tensor, prompts: BlockPrompts | None, context: Context, count: int
) -> Tensor:
    x = _cross(block, x, context, 1)
    out = context.run("attention", _row_attention, block, x, prompts, context, count)
    rows, normed = _add_attention(block, x[:, :count], out, context)
    return _mlp(block, rows, normed, context)[0]


def _attention(block: TimmBlock, x: Tensor, prompts: BlockPrompts | None, context: Context) -> Tensor:
    """Return the output of the attention, x [B, N, D] -> [B, N, D], before layer scale."""
    adapter, attention = vit.adapters(block)
    attn = attention_of(block)
    h = adapter.attention_input(block, x) if context.normed is None else context.normed
    if context.masked:
        out = _attend_masked(attn, h, context)
    else:
        keys_values = _keys_values(block, prompts)
        out = vit.self_attend(
            attn, h, keys_values, context.temperature, rope=context.rope, extra_prefix=context.carried
        )
    return attention.finish(attn, out, h)


def _row_attention(
    block: TimmBlock, x: Tensor, prompts: BlockPrompts | None, context: Context, count: int
) -> Tensor:
    """Return the first `count` rows of :func:`_attention`, [B, count, D]."""
    adapter, attention = vit.adapters(block)
    attn = attention_of(block)
    h = adapter.attention_input(block, x) if context.normed is None else context.normed
    read = h[:, :count]
    q = attention.queries(attn, read)
    if folds(block, context.rope is not None):
        weights = attention.plain_weights(attn)
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
    return attention.finish(attn, out, read)


def attention_of(block: TimmBlock) -> TimmAttention:
    """Return the attention module of `block`."""
    return cast(TimmAttention, block.attn)


def recompute_of(model: nn.Module, recompute: Recompute | None) -> Recompute | None:
    """Return `recompute`, or "block" if gradient checkpointing is on in the timm `model`."""
    return "block" if getattr(model, "grad_checkpointing", False) else recompute


def folds(block: TimmBlock, rope: bool) -> bool:
    """Return whether :func:`run_rows` absorbs the key and value maps of this block; `rope`: whether it rotates."""
    attn = attention_of(block)
    return vit.attention_adapter(attn).can_absorb_kv(attn, rope) and not vit.drops_attention(attn)


def select(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Return the rows of x [B, N, D] in `spans`, in order."""
    if len(spans) == 1:
        start, stop = spans[0]
        return x[:, start:stop]
    return torch.cat([x[:, start:stop] for start, stop in spans], dim=1)


def cross_attention(block: TimmBlock, x: Tensor, cross: Cross, *, residual: bool = False) -> Tensor:
    """Return CVPT's cross-attention of x [B, N, D] to the block's prompts, with the weights of its self-attention.

    With `residual`, x is added.
    """
    if isinstance(cross.prompts, FoldedPrompts):
        return folded_cross_attention(x, cross.prompts, residual=residual)[0]
    attn = attention_of(block)
    weights = vit.attention_adapter(attn).plain_weights(attn)
    out = direct_cross_attention(x, cross.prompts, weights, scale=attn.scale)
    return x + out if residual else out


def _attend_masked(attn: TimmAttention, h: Tensor, context: Context) -> Tensor:
    """Self-attention in which the carried prompts attend to patches only: h [B, N, D] -> [B, N, H, d]."""
    start, stop = context.prefix, context.prefix + context.carried
    q, k, v = vit.attention_adapter(attn).qkv(attn, h, context.rope, context.carried)
    image = vit.attend(attn, select(q, ((0, start), (stop, None))), k, v, None, context.temperature)
    prompt = vit.attend(attn, q[:, start:stop], k[:, stop:], v[:, stop:], None, context.temperature)
    return torch.cat([image[:, :start], prompt, image[:, start:]], dim=1)


def _keys_values(block: TimmBlock, prompts: BlockPrompts | None) -> tuple[Tensor, Tensor] | None:
    if prompts is None:
        return None
    if prompts.key is not None and prompts.value is not None:
        return prompts.key, prompts.value
    # Prepared for `run_rows`, but all rows are needed.
    return (
        None
        if prompts.rows is None
        else vit.adapters(block)[1].keys_values(attention_of(block), prompts.rows)
    )


def _frozen_norm(block: TimmBlock, name: str) -> Norm | None:
    """Return norm1 or norm2 of `block` if it is a frozen LayerNorm before its branch, without hooks; else None."""
    norm = getattr(block, name)
    if isinstance(block, ResPostBlock) or type(norm) not in (nn.LayerNorm, LayerNorm):
        return None
    if (
        has_hooks(norm)
        or getattr(norm, "_fast_norm", False)
        or any(p.requires_grad for p in norm.parameters())
    ):
        return None
    return Norm(norm.weight, norm.bias, norm.eps)


def _fuses(operation: str, x: Tensor) -> bool:
    """Return whether a kernel computes `operation` and the norm that follows for x; a compiler fuses plain code."""
    return not torch.compiler.is_compiling() and has_fused_kernel(operation, x)


def _following(context: Context) -> TimmBlock | None:
    """Return the block whose norm1 may be computed with the MLP's residual add, or None."""
    changed = context.cross is not None and context.cross.insert in (1, 5)  # x is, between the two
    kept = context.recompute in ("attention", "block")  # the norm's output would be, beside x
    return None if changed or kept else context.following


def _add(
    block: TimmBlock, x: Tensor, out: Tensor, branch: Literal[1, 2], owner: TimmBlock | None
) -> tuple[Tensor, Tensor | None]:
    """Add the output of the attention (`branch` 1) or of the MLP (2) to x, both [B, N, D].

    The second result is the norm of `owner` that follows, norm2 or the next block's norm1, if one kernel computes both,
    else None.
    """
    adapter, _ = vit.adapters(block)
    if owner is not None and _fuses("residual_norm", x) and (x.dtype == out.dtype or autocast_enabled(x)):
        plain = adapter.plain_add(block, branch)
        norm = _frozen_norm(owner, "norm2" if branch == 1 else "norm1")
        if plain is not None and norm is not None:
            return residual_norm(x, out, plain.scale, norm)
    return (adapter.add_attention if branch == 1 else adapter.add_mlp)(block, x, out), None


def _add_attention(
    block: TimmBlock, x: Tensor, out: Tensor, context: Context
) -> tuple[Tensor, Tensor | None]:
    """Add the attention's output (and the cross-attention beside or after it) to x, both [B, N, D].

    The second result is norm2 of the sum if one kernel computes both, else None.
    """
    adapter, _ = vit.adapters(block)
    cross = context.cross
    if cross is not None and cross.insert == 2:
        delta = adapter.attention_scale(block, out) + cross_attention(block, x, cross)
        return x + block.drop_path1(delta), None
    kept = context.recompute == "mlp"  # the norm's output would be, beside x
    if cross is None or cross.insert != 3:
        reads_x = cross is not None and cross.insert == 4  # the MLP, besides its norm
        return _add(block, x, out, 1, None if kept or reads_x else block)
    x = adapter.add_attention(block, x, out)
    if isinstance(cross.prompts, FoldedPrompts) and not kept and _fuses("folded_cross_attention", x):
        norm = _frozen_norm(block, "norm2")
        return folded_cross_attention(x, cross.prompts, residual=True, norm=norm)
    return cross_attention(block, x, cross, residual=True), None


def _mlp_input(block: TimmBlock, x: Tensor, normed: Tensor | None, cross: Cross | None) -> Tensor:
    """Return the input of the MLP for x [B, N, D]; `normed` is norm2 of x if it has been computed, or None."""
    if normed is not None:
        return normed
    h = vit.adapters(block)[0].mlp_input(block, x)
    if cross is not None and cross.insert == 4:
        return h + cross_attention(block, x, cross)
    return h


def _mlp_output(block: TimmBlock, x: Tensor, normed: Tensor | None, cross: Cross | None) -> Tensor:
    return vit.run_mlp(block.mlp, _mlp_input(block, x, normed, cross))


def _mlp_hidden_mean(block: TimmBlock, x: Tensor, normed: Tensor | None, cross: Cross | None) -> Tensor:
    mlp = cast(Mlp | GluMlp | SwiGLU, block.mlp)
    return vit.mlp_hidden(mlp, _mlp_input(block, x, normed, cross)).mean(1, keepdim=True)


def _mlp(
    block: TimmBlock, x: Tensor, normed: Tensor | None, context: Context
) -> tuple[Tensor, Tensor | None]:
    """Return the block's output [B, N, D], and norm1 of it for the next block if one kernel computes both, else None.

    `normed` is norm2 of x if it has been computed, or None.
    """
    out = context.run("mlp", _mlp_output, block, x, normed, context.cross)
    x, normed = _add(block, x, out, 2, _following(context))
    return _cross(block, x, context, 5), normed


def _mlp_mean(
    block: TimmBlock, x: Tensor, normed: Tensor | None, context: Context, spans: tuple[Span, ...]
) -> Tensor:
    """Return the mean over `spans` of the output of :func:`_mlp`; only these rows run, and `fc2` after the mean."""
    adapter, _ = vit.adapters(block)
    x, normed = select(x, spans), None if normed is None else select(normed, spans)
    if not adapter.mean_commutes(block) or (context.cross is not None and context.cross.insert == 5):
        return _mlp(block, x, normed, context)[0].mean(1)
    hidden = context.run("mlp", _mlp_hidden_mean, block, x, normed, context.cross)
    fc2 = cast(Mlp | GluMlp | SwiGLU, block.mlp).fc2
    return adapter.add_mlp(block, x.mean(1, keepdim=True), linear(fc2, hidden)).squeeze(1)


def _cross(block: TimmBlock, x: Tensor, context: Context, insert: int) -> Tensor:
    """Add the cross-attention to x [B, N, D] if its position is this end of the block (1 or 5)."""
    if context.cross is None or context.cross.insert != insert:
        return x
    return cross_attention(block, x, context.cross, residual=True)
