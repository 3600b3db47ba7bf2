"""Adapters of timm's attention and block classes, one for each supported class.

An adapter has no state: it reads the module's weights at each call, so `.to()`, `load_state_dict`, in-place updates and
`copy.deepcopy` work. Classes are matched exactly (`type(m) is cls`): a subclass may compute something else.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import AttentionRope, DropPath, GluMlp, LayerScale, Mlp, SwiGLU, apply_rot_embed_cat
from timm.layers.attention import Attention
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from fastprompt.frozen import acts_on, has_hooks, linear, low
from fastprompt.ops import AttentionWeights, dispatch, packed_prompt_attention, prompt_attention
from fastprompt.refusals import class_path, refusal

TimmAttention: TypeAlias = Attention | AttentionRope | EvaAttention
TimmBlock: TypeAlias = Block | ResPostBlock | EvaBlock

# The MLPs whose hidden layer `mlp_hidden` computes.
_MLPS = (Mlp, GluMlp, SwiGLU)

# Set on an attention whose packed bias trains only in its key and value parts (DA-VPT).
FROZEN_QUERY_BIAS = "_fastprompt_frozen_query_bias"


class AttentionAdapter:
    """timm's `Attention`: one packed qkv Linear, optional q/k norm, output norm and output gate."""

    def reason(self, attn: TimmAttention) -> str | None:
        """Return why this instance is not supported, or None."""
        if getattr(attn, "num_kv_groups", 1) != 1:
            return f"grouped-query attention ({attn.num_heads} query heads on {attn.num_kv_heads} key heads)"
        return None

    def packed(self, attn: TimmAttention, x: Tensor) -> Tensor | None:
        """x [B, N, D] -> q, k and v as one tensor [B, N, 3, H, d], or None if they have separate maps."""
        if getattr(attn, FROZEN_QUERY_BIAS, False):
            q_bias, kv_bias = _split_bias(attn)
            return _unflatten(attn, F.linear(x, low(attn.qkv.weight), torch.cat((q_bias, kv_bias))))
        return _unflatten(attn, linear(attn.qkv, x))

    def project(self, attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D] -> q, k, v [B, N, H, d], before norm and rotary embedding."""
        packed = self.packed(attn, x)
        if packed is not None:
            q, k, v = packed.unbind(2)
        else:
            split = "B N (H d) -> B N H d"
            q, k, v = (
                rearrange(linear(f, x), split, H=attn.num_heads)
                for f in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
        return q, k, v

    def weights(self, attn: TimmAttention) -> AttentionWeights | None:
        """Return the four maps as views of the module's parameters, or None if they are not plain Linear layers.

        Under autocast frozen ones are views of their low-precision copies.
        """
        if not (_plain(attn.qkv) and _plain(attn.proj)):
            return None
        qw, kw, vw = low(attn.qkv.weight).chunk(3)
        qb, kb, vb = (None,) * 3 if attn.qkv.bias is None else low(attn.qkv.bias).chunk(3)
        if getattr(attn, FROZEN_QUERY_BIAS, False):
            qb, _ = _split_bias(attn)
        return AttentionWeights(qw, qb, kw, kb, vw, vb, low(attn.proj.weight), low(attn.proj.bias))

    def plain_weights(self, attn: TimmAttention) -> AttentionWeights:
        """Return `weights`; raise TypeError for an attention that `prompt_reason` refuses."""
        weights = self.weights(attn)
        if weights is None:
            raise TypeError("the attention's maps are not plain Linear layers; check `prompt_reason` first")
        return weights

    def key_value_map(self, attn: TimmAttention) -> tuple[Tensor, Tensor | None]:
        """Return the map of keys and values as one Linear: weight [2·H·d, D], bias [2·H·d] or None."""
        inner = attn.qkv.weight.shape[0] // 3
        bias = low(attn.qkv.bias)
        return low(attn.qkv.weight)[inner:], None if bias is None else bias[inner:]

    def qkv(
        self, attn: TimmAttention, x: Tensor, rope: Tensor | None = None, extra_prefix: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D] -> normed and rotated q, k and v, [B, N, H, d].

        Rotary embedding skips the model's prefix tokens and the `extra_prefix` rows after them (carried prompts).
        """
        q, k, v = self.project(attn, x)
        q, k = attn.q_norm(q), attn.k_norm(k)
        return _rotate(attn, q, v, rope, extra_prefix), _rotate(attn, k, v, rope, extra_prefix), v

    def keys_values(
        self, attn: TimmAttention, x: Tensor, rope: Tensor | None = None, extra_prefix: int = 0
    ) -> tuple[Tensor, Tensor]:
        """x [..., N, D] -> normed and rotated k and v, [..., N, H, d]; computes no queries."""
        weight, bias = self.key_value_map(attn)
        k, v = rearrange(
            F.linear(x, weight, bias), "... N (two H d) -> two ... N H d", two=2, H=attn.num_heads
        )
        return _rotate(attn, attn.k_norm(k), v, rope, extra_prefix), v

    def queries(self, attn: TimmAttention, x: Tensor) -> Tensor:
        """Rows without rotary embedding (prefix rows) [B, R, D] -> normed q [B, R, H, d]."""
        weights = self.plain_weights(attn)
        q = F.linear(x, weights.q_weight, weights.q_bias)
        return attn.q_norm(rearrange(q, "B R (H d) -> B R H d", H=attn.num_heads))

    def can_absorb_kv(self, attn: TimmAttention, rope: bool) -> bool:
        """Return whether the key and value maps can be absorbed into query and output (`ops.row_attention`)."""
        return not rope and isinstance(attn.k_norm, nn.Identity) and isinstance(attn.q_norm, nn.Identity)

    def finish(self, attn: TimmAttention, out: Tensor, x: Tensor) -> Tensor:
        """Attention's output [B, N, H, d] for its input x [B, N, D] -> [B, N, D]: norm, gate, projection, dropout."""
        out = attn.norm(rearrange(out, "B N H d -> B N (H d)"))
        gate = getattr(attn, "gate", None)
        if gate is not None:
            out = out * linear(gate, x).sigmoid()
        return attn.proj_drop(linear(attn.proj, out))


class RopeAttentionAdapter(AttentionAdapter):
    """timm's `AttentionRope`: one packed map or three separate ones, each with its bias."""

    def packed(self, attn: TimmAttention, x: Tensor) -> Tensor | None:
        return None if attn.qkv is None else super().packed(attn, x)

    def weights(self, attn: TimmAttention) -> AttentionWeights | None:
        if attn.qkv is not None:
            return super().weights(attn)
        maps = (attn.q_proj, attn.k_proj, attn.v_proj, attn.proj)
        if not all(_plain(m) for m in maps):
            return None
        return AttentionWeights(*(low(p) for m in maps for p in (m.weight, m.bias)))

    def key_value_map(self, attn: TimmAttention) -> tuple[Tensor, Tensor | None]:
        if attn.qkv is not None:
            return super().key_value_map(attn)
        k, v = attn.k_proj, attn.v_proj
        weights = [low(k.weight), low(v.weight)]
        return torch.cat(weights), _join(low(k.bias), low(v.bias), weights[0])


class EvaAttentionAdapter(RopeAttentionAdapter):
    """timm's `EvaAttention`: a packed map with separate q and v biases (k's is zero), or three separate maps."""

    def packed(self, attn: Any, x: Tensor) -> Tensor | None:
        if attn.qkv is None or attn.q_bias is None:
            return super().packed(attn, x)
        biases = (attn.q_bias, attn.k_bias, attn.v_bias)
        if attn.qkv_bias_separate or not _plain(attn.qkv):
            packed = linear(attn.qkv, x) + torch.cat(biases)
        else:
            packed = F.linear(x, low(attn.qkv.weight), torch.cat([low(bias) for bias in biases]))
        return _unflatten(attn, packed)

    def weights(self, attn: Any) -> AttentionWeights | None:
        packed = super().weights(attn)
        if packed is None or attn.qkv is None or attn.q_bias is None:
            return packed
        return packed._replace(q_bias=low(attn.q_bias), k_bias=low(attn.k_bias), v_bias=low(attn.v_bias))

    def key_value_map(self, attn: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().key_value_map(attn)
        if attn.qkv is not None and attn.q_bias is not None:
            bias = torch.cat((low(attn.k_bias), low(attn.v_bias)))
        return weight, bias


class PlainAdd(NamedTuple):
    """A branch that is added to the residual stream times a frozen `scale` [D], None for 1, and nothing else."""

    scale: Tensor | None


class BlockAdapter:
    """timm's `Block`: x + drop_path1(ls1(attn(norm1(x)))), then the same around the MLP."""

    def attention_input(self, block: TimmBlock, x: Tensor) -> Tensor:
        return block.norm1(x)

    def attention_delta(self, block: TimmBlock, out: Tensor) -> Tensor:
        """Return what the attention branch adds to the residual stream, given the attention's output."""
        return block.drop_path1(self.attention_scale(block, out))

    def attention_scale(self, block: Any, out: Tensor) -> Tensor:
        """Apply layer scale, or the norm in its place, to the attention's output."""
        return block.ls1(out)

    def add_attention(self, block: TimmBlock, x: Tensor, out: Tensor) -> Tensor:
        return x + self.attention_delta(block, out)

    def mlp_input(self, block: TimmBlock, x: Tensor) -> Tensor:
        return block.norm2(x)

    def mlp_delta(self, block: Any, out: Tensor) -> Tensor:
        """Return what the MLP branch adds to the residual stream, given the MLP's output."""
        return block.drop_path2(block.ls2(out))

    def add_mlp(self, block: TimmBlock, x: Tensor, out: Tensor) -> Tensor:
        return x + self.mlp_delta(block, out)

    def plain_add(self, block: Any, branch: int) -> PlainAdd | None:
        """Return how branch 1 (attention) or 2 (MLP) is added if that is plain: no drop path, no hooks; else None."""
        module = (block.ls1, block.ls2)[branch - 1]
        if type(module) not in (nn.Identity, LayerScale) or has_hooks(module):
            return None
        return self._plain_add(block, branch, getattr(module, "gamma", None))

    def _plain_add(self, block: Any, branch: int, scale: Tensor | None) -> PlainAdd | None:
        drop = (block.drop_path1, block.drop_path2)[branch - 1]
        drops = type(drop) is not nn.Identity and not (type(drop) is DropPath and not drop.training)
        if drops or has_hooks(drop) or (scale is not None and scale.requires_grad):
            return None
        return PlainAdd(scale)

    def mean_commutes(self, block: TimmBlock) -> bool:
        """Return whether a mean over rows may be taken before `fc2` and the residual add."""
        mlp = block.mlp
        return type(mlp) in _MLPS and _plain(mlp.fc2) and not _active(mlp.drop2)


class ResPostBlockAdapter(BlockAdapter):
    """timm's `ResPostBlock`: the norms come after attention and MLP."""

    def attention_input(self, block: TimmBlock, x: Tensor) -> Tensor:
        return x

    def attention_scale(self, block: TimmBlock, out: Tensor) -> Tensor:
        return block.norm1(out)

    def mlp_input(self, block: TimmBlock, x: Tensor) -> Tensor:
        return x

    def mlp_delta(self, block: TimmBlock, out: Tensor) -> Tensor:
        return block.drop_path2(block.norm2(out))

    def plain_add(self, block: Any, branch: int) -> PlainAdd | None:
        return None  # a norm is in the place of layer scale

    def mean_commutes(self, block: TimmBlock) -> bool:
        return False  # norm2 normalises each row of the MLP's output


class EvaBlockAdapter(BlockAdapter):
    """timm's `EvaBlock`: `Block` whose layer scale is a parameter, on both branches, one, or none."""

    def attention_scale(self, block: Any, out: Tensor) -> Tensor:
        return out if block.gamma_1 is None else block.gamma_1 * out

    def mlp_delta(self, block: Any, out: Tensor) -> Tensor:
        return block.drop_path2(out if block.gamma_2 is None else block.gamma_2 * out)

    def plain_add(self, block: Any, branch: int) -> PlainAdd | None:
        return self._plain_add(block, branch, (block.gamma_1, block.gamma_2)[branch - 1])


ATTENTION: dict[type, AttentionAdapter] = {
    Attention: AttentionAdapter(),
    AttentionRope: RopeAttentionAdapter(),
    EvaAttention: EvaAttentionAdapter(),
}
BLOCKS: dict[type, BlockAdapter] = {
    Block: BlockAdapter(),
    ResPostBlock: ResPostBlockAdapter(),
    EvaBlock: EvaBlockAdapter(),
}


def attention_adapter(attn: nn.Module) -> AttentionAdapter:
    """Return the adapter of a supported attention, replaced by `replace_attention` or not."""
    return ATTENTION[timm_class(attn)]


def adapters(block: TimmBlock) -> tuple[BlockAdapter, AttentionAdapter]:
    """Return the adapters of a supported block and of its attention."""
    return BLOCKS[type(block)], attention_adapter(block.attn)


def timm_class(attn: nn.Module) -> type[nn.Module]:
    """Return the class of a module; for one replaced by `replace_attention`, timm's class."""
    cls = type(attn)
    found = getattr(cls, "timm_class", None)
    return found if found in cls.__bases__ else cls  # a subclass of a replacement is not one


def attention_reason(attn: Any) -> str | None:
    """Return why this attention module is not supported, or None."""
    adapter = ATTENTION.get(timm_class(attn))
    if adapter is None:
        return refusal(attn, (*BLOCKS, *ATTENTION))
    reason = adapter.reason(attn)
    return None if reason is None else f"{class_path(attn)}: {reason}"


def block_reason(block: nn.Module) -> str | None:
    """Return why this block or its attention is not supported, or None."""
    if type(block) not in BLOCKS:
        return refusal(block, (*BLOCKS, *ATTENTION))
    attn: Any = block.attn
    return attention_reason(attn)


def prompt_reason(block: nn.Module) -> str | None:
    """Return why this block does not support prompts, or None: `block_reason`, or a map is not a plain Linear layer."""
    reason = block_reason(block)
    attn: Any = block.attn if reason is None else None
    if attn is None or attention_adapter(attn).weights(attn) is not None:
        return reason
    qkv = (attn.q_proj, attn.k_proj, attn.v_proj) if attn.qkv is None else (attn.qkv,)
    odd = next(m for m in (*qkv, attn.proj) if not _plain(m))
    return f"{class_path(odd)} is not a plain torch.nn.Linear; merge or remove it first"


def drops_attention(attn: TimmAttention) -> bool:
    """Return whether attention dropout is active; no kernel supports it."""
    return _active(attn.attn_drop)


def attend(
    attn: TimmAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompts: tuple[Tensor, Tensor] | None = None,
    temperature: Tensor | None = None,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """Run `prompt_attention` at the scale of `attn`; raise NotImplementedError if attention dropout is active."""
    _refuse_dropout(attn)
    prompt_k, prompt_v = prompts if prompts is not None else (None, None)
    return prompt_attention(
        q, k, v, prompt_k, prompt_v, scale=attn.scale, temperature=temperature, backend=backend
    )


def self_attend(
    attn: TimmAttention,
    x: Tensor,
    prompts: tuple[Tensor, Tensor] | None = None,
    temperature: Tensor | None = None,
    rope: Tensor | None = None,
    extra_prefix: int = 0,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """Attention of the rows x [B, N, D] over themselves and prompts -> [B, N, H, d], the input of `finish`.

    Packed queries, keys and values stay packed unless norm or rotary embedding acts on them.
    """
    adapter = attention_adapter(attn)
    packed = adapter.packed(attn, x) if adapter.can_absorb_kv(attn, rope is not None) else None
    if packed is None:
        return attend(attn, *adapter.qkv(attn, x, rope, extra_prefix), prompts, temperature, backend)
    _refuse_dropout(attn)
    prompt_k, prompt_v = prompts if prompts is not None else (None, None)
    return packed_prompt_attention(
        packed, prompt_k, prompt_v, scale=attn.scale, temperature=temperature, backend=backend
    )


def _refuse_dropout(attn: TimmAttention) -> None:
    if drops_attention(attn):
        raise NotImplementedError(
            f"active attention dropout is not supported; got p = {attn.attn_drop.p}; "
            "set `attn_drop.p` to 0 or put the block into eval mode"
        )


def run_mlp(mlp: Any, x: Tensor) -> Tensor:
    """Return mlp(x) for the MLP of a block."""
    if type(mlp) not in _MLPS or not acts_on(x) or has_hooks(mlp):
        return mlp(x)
    return mlp.drop2(linear(mlp.fc2, mlp_hidden(mlp, x)))


def mlp_hidden(mlp: Any, x: Tensor) -> Tensor:
    """Return the input of `fc2` of an MLP for which :meth:`BlockAdapter.mean_commutes`."""
    if type(mlp) is SwiGLU:
        hidden = mlp.act(linear(mlp.fc1_g, x)) * linear(mlp.fc1_x, x)
    elif type(mlp) is GluMlp:
        first, second = linear(mlp.fc1, x).chunk(2, dim=-1)
        hidden = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
    else:
        hidden = mlp.act(linear(mlp.fc1, x))
    return mlp.norm(mlp.drop1(hidden))


def _unflatten(attn: TimmAttention, qkv: Tensor) -> Tensor:
    """[B, N, 3·H·d] -> [B, N, 3, H, d]."""
    return qkv.unflatten(-1, (3, attn.num_heads, -1))


def _split_bias(attn: TimmAttention) -> tuple[Tensor, Tensor]:
    """Split the packed bias into its query part, detached, and the rest."""
    inner = attn.qkv.bias.shape[0] // 3
    return attn.qkv.bias[:inner].detach(), attn.qkv.bias[inner:]


def _rotate(attn: Any, t: Tensor, like: Tensor, rope: Tensor | None, extra_prefix: int) -> Tensor:
    """Apply rotary position embedding to the patch rows of t [B, N, H, d]."""
    if rope is None:
        return t
    prefix = attn.num_prefix_tokens + extra_prefix
    heads_first = rearrange(t, "B N H d -> B H N d")
    rotated = apply_rot_embed_cat(heads_first[:, :, prefix:], rope, half=getattr(attn, "rotate_half", False))
    joined = torch.cat([heads_first[:, :, :prefix], rotated], dim=2).type_as(like)
    return rearrange(joined, "B H N d -> B N H d")


def _plain(module: object) -> bool:
    return type(module) is nn.Linear


def _active(dropout: Any) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def _join(first: Tensor | None, second: Tensor | None, like: Tensor) -> Tensor | None:
    """Concatenate two biases, with zeros for a missing one (EVA has no key bias)."""
    if first is None and second is None:
        return None
    return torch.cat([like.new_zeros(like.shape[0]) if b is None else b for b in (first, second)])
