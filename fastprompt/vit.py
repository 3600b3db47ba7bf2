"""What is read off a timm block: one adapter per supported class, and a reason for each refusal.

Adapters hold no state: they read weights off the module at each call, so that `.to()`, `load_state_dict`, in-place
updates and `copy.deepcopy` need no care. A class is matched exactly (`type(m) is cls`): a subclass may override all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import AttentionRope, GluMlp, Mlp, SwiGLU, apply_rot_embed_cat
from timm.layers.attention import Attention
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from fastprompt.ops import AttentionWeights, dispatch, packed_prompt_attention, prompt_attention

# Set on an attention whose packed bias trains in its key and value parts alone (DA-VPT).
FROZEN_QUERY_BIAS = "_fastprompt_frozen_query_bias"


class AttentionAdapter:
    """timm's `Attention`: one packed qkv Linear, optional q/k norm, output norm and output gate."""

    def reason(self, attn: Any) -> str | None:
        """Why this instance is not supported, or None."""
        if getattr(attn, "num_kv_groups", 1) != 1:
            return f"grouped-query attention ({attn.num_heads} query heads on {attn.num_kv_heads} key heads)"
        return None

    def packed(self, attn: Any, x: Tensor) -> Tensor | None:
        """x [B, N, D] -> q, k and v as one tensor [B, N, 3, H, d]; None where three maps make them."""
        if getattr(attn, FROZEN_QUERY_BIAS, False):
            q_bias, kv_bias = _split_bias(attn)
            return _unflatten(attn, F.linear(x, attn.qkv.weight, torch.cat((q_bias, kv_bias))))
        return _unflatten(attn, attn.qkv(x))

    def project(self, attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D] -> q, k, v [B, N, H, d], neither normed nor rotated."""
        packed = self.packed(attn, x)
        if packed is not None:
            q, k, v = packed.unbind(2)
        else:
            split = "B N (H d) -> B N H d"
            q, k, v = (
                rearrange(f(x), split, H=attn.num_heads) for f in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
        return q, k, v

    def weights(self, attn: Any) -> AttentionWeights | None:
        """The four maps, views of the module's own parameters; None where they are not plain Linear layers."""
        if not (_plain(attn.qkv) and _plain(attn.proj)):
            return None
        qw, kw, vw = attn.qkv.weight.chunk(3)
        qb, kb, vb = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
        if getattr(attn, FROZEN_QUERY_BIAS, False):
            qb, _ = _split_bias(attn)
        return AttentionWeights(qw, qb, kw, kb, vw, vb, attn.proj.weight, attn.proj.bias)

    def plain_weights(self, attn: Any) -> AttentionWeights:
        """`weights` of a block that `prompt_reason` lets pass; raises TypeError for any other."""
        weights = self.weights(attn)
        if weights is None:
            raise TypeError("the attention's maps are not plain Linear layers; check `prompt_reason` first")
        return weights

    def key_value_map(self, attn: Any) -> tuple[Tensor, Tensor | None]:
        """The map of keys and values as one Linear: weight [2·H·d, D], bias [2·H·d] or None."""
        inner = attn.qkv.weight.shape[0] // 3
        return attn.qkv.weight[inner:], None if attn.qkv.bias is None else attn.qkv.bias[inner:]

    def qkv(
        self, attn: Any, x: Tensor, rope: Tensor | None = None, extra_prefix: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D] -> normed and rotated q, k and v, [B, N, H, d].

        `extra_prefix` rows after the model's own prefix tokens (carried prompts) get no rotary position either.
        """
        q, k, v = self.project(attn, x)
        q, k = attn.q_norm(q), attn.k_norm(k)
        return _rotate(attn, q, v, rope, extra_prefix), _rotate(attn, k, v, rope, extra_prefix), v

    def keys_values(
        self, attn: Any, x: Tensor, rope: Tensor | None = None, extra_prefix: int = 0
    ) -> tuple[Tensor, Tensor]:
        """x [..., N, D] -> normed and rotated k and v, [..., N, H, d], without making queries."""
        weight, bias = self.key_value_map(attn)
        k, v = rearrange(
            F.linear(x, weight, bias), "... N (two H d) -> two ... N H d", two=2, H=attn.num_heads
        )
        return _rotate(attn, attn.k_norm(k), v, rope, extra_prefix), v

    def queries(self, attn: Any, x: Tensor) -> Tensor:
        """Rows without rotary position (prefix rows) [B, R, D] -> normed q [B, R, H, d]."""
        weights = self.plain_weights(attn)
        q = F.linear(x, weights.q_weight, weights.q_bias)
        return attn.q_norm(rearrange(q, "B R (H d) -> B R H d", H=attn.num_heads))

    def folds(self, attn: Any, rope: bool) -> bool:
        """Whether keys and values can be folded into query and output (:mod:`fastprompt.ops.row_attention`)."""
        return not rope and isinstance(attn.k_norm, nn.Identity) and isinstance(attn.q_norm, nn.Identity)

    def finish(self, attn: Any, out: Tensor, x: Tensor) -> Tensor:
        """Attention's output [B, N, H, d] for the rows x [B, N, D] -> [B, N, D]: norm, gate, projection, dropout."""
        out = attn.norm(rearrange(out, "B N H d -> B N (H d)"))
        gate = getattr(attn, "gate", None)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return attn.proj_drop(attn.proj(out))


class RopeAttentionAdapter(AttentionAdapter):
    """timm's `AttentionRope`: packed or separate maps, each with its own bias."""

    def packed(self, attn: Any, x: Tensor) -> Tensor | None:
        return None if attn.qkv is None else super().packed(attn, x)

    def weights(self, attn: Any) -> AttentionWeights | None:
        if attn.qkv is not None:
            return super().weights(attn)
        maps = (attn.q_proj, attn.k_proj, attn.v_proj, attn.proj)
        if not all(_plain(m) for m in maps):
            return None
        q, k, v, proj = maps
        return AttentionWeights(q.weight, q.bias, k.weight, k.bias, v.weight, v.bias, proj.weight, proj.bias)

    def key_value_map(self, attn: Any) -> tuple[Tensor, Tensor | None]:
        if attn.qkv is not None:
            return super().key_value_map(attn)
        k, v = attn.k_proj, attn.v_proj
        return torch.cat([k.weight, v.weight]), _join(k.bias, v.bias, k.weight)


class EvaAttentionAdapter(RopeAttentionAdapter):
    """timm's `EvaAttention`: packed maps without bias plus separate q and v biases (k's is zero), or separate maps."""

    def packed(self, attn: Any, x: Tensor) -> Tensor | None:
        if attn.qkv is None or attn.q_bias is None:
            return super().packed(attn, x)
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if attn.qkv_bias_separate or not _plain(attn.qkv):
            packed = attn.qkv(x) + bias
        else:
            packed = F.linear(x, attn.qkv.weight, bias)
        return _unflatten(attn, packed)

    def weights(self, attn: Any) -> AttentionWeights | None:
        packed = super().weights(attn)
        if packed is None or attn.qkv is None or attn.q_bias is None:
            return packed
        return packed._replace(q_bias=attn.q_bias, k_bias=attn.k_bias, v_bias=attn.v_bias)

    def key_value_map(self, attn: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().key_value_map(attn)
        if attn.qkv is not None and attn.q_bias is not None:
            bias = torch.cat((attn.k_bias, attn.v_bias))
        return weight, bias


class BlockAdapter:
    """timm's `Block`: x + drop_path1(ls1(attn(norm1(x)))), then the same around the MLP."""

    def attention_input(self, block: Any, x: Tensor) -> Tensor:
        return block.norm1(x)

    def attention_delta(self, block: Any, out: Tensor) -> Tensor:
        """What the attention branch adds to the residual stream, of its attention's output."""
        return block.drop_path1(self.attention_scale(block, out))

    def attention_scale(self, block: Any, out: Tensor) -> Tensor:
        """Layer scale, or the norm in its place, on the attention's output."""
        return block.ls1(out)

    def add_attention(self, block: Any, x: Tensor, out: Tensor) -> Tensor:
        return x + self.attention_delta(block, out)

    def mlp_input(self, block: Any, x: Tensor) -> Tensor:
        return block.norm2(x)

    def mlp_delta(self, block: Any, out: Tensor) -> Tensor:
        """What the MLP branch adds to the residual stream, of its MLP's output."""
        return block.drop_path2(block.ls2(out))

    def add_mlp(self, block: Any, x: Tensor, out: Tensor) -> Tensor:
        return x + self.mlp_delta(block, out)

    def mean_commutes(self, block: Any) -> bool:
        """Whether a mean over rows can be taken before `fc2` and the residual add instead of after them."""
        mlp = block.mlp
        return type(mlp) in (Mlp, GluMlp, SwiGLU) and _plain(mlp.fc2) and not _active(mlp.drop2)


class ResPostBlockAdapter(BlockAdapter):
    """timm's `ResPostBlock`: the norms come after attention and MLP."""

    def attention_input(self, block: Any, x: Tensor) -> Tensor:
        return x

    def attention_scale(self, block: Any, out: Tensor) -> Tensor:
        return block.norm1(out)

    def mlp_input(self, block: Any, x: Tensor) -> Tensor:
        return x

    def mlp_delta(self, block: Any, out: Tensor) -> Tensor:
        return block.drop_path2(block.norm2(out))

    def mean_commutes(self, block: Any) -> bool:
        return False  # norm2 acts on each row of the MLP's output


class EvaBlockAdapter(BlockAdapter):
    """timm's `EvaBlock`: `Block` with layer scale as parameters, on both branches, one, or none."""

    def attention_scale(self, block: Any, out: Tensor) -> Tensor:
        return out if block.gamma_1 is None else block.gamma_1 * out

    def mlp_delta(self, block: Any, out: Tensor) -> Tensor:
        return block.drop_path2(out if block.gamma_2 is None else block.gamma_2 * out)


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

_WINDOWS = "attention within windows of a pyramid of feature maps"
_MAPS = "attention on the feature map of a convolutional network, with convolutions for linear maps"
_PYRAMID = "a stage of a pyramid, whose tokens are a feature map"
_LANGUAGE = "the vision encoder of a language model, read as a grid of tokens"
_CHANNELS = "attention over channels, not over tokens"
_REDUCED = "keys and values come from a smaller map than the queries"
_BIAS = "relative position bias is added to the scores"
_CLASS_TOKEN = "only the class token attends"

# timm's other kinds of attention, and why they are not served. Classes not named here are refused as unknown.
_REFUSED = {
    "timm.layers.diff_attention.DiffAttention": "differential attention subtracts two softmaxes",
    "timm.models._efficientnet_blocks.MobileAttention": f"{_REDUCED}, and all heads share them",
    "timm.models.beit.Attention": _BIAS,
    "timm.models.cait.ClassAttn": _CLASS_TOKEN,
    "timm.models.cait.TalkingHeadAttn": "heads are mixed before and after the softmax",
    "timm.models.coat.FactorAttnConvRelPosEnc": "factorised attention makes no query-key scores",
    "timm.models.convit.GPSA": "scores are blended with scores of position, by a gate per head",
    "timm.models.convit.MHSA": "a class of ConViT's own, whose other blocks attend by position",
    "timm.models.cpubone.ConvAttention": _MAPS,
    "timm.models.crossvit.MultiScaleBlock": "two sequences, whose class tokens cross over",
    "timm.models.csatv2.SpatialAttention": "a spatial gate made of channel statistics",
    "timm.models.csatv2.TransformerBlock": f"{_PYRAMID}, downsampled in places",
    "timm.models.davit.ChannelAttention": _CHANNELS,
    "timm.models.davit.ChannelAttentionV2": _CHANNELS,
    "timm.models.davit.WindowAttention": _WINDOWS,
    "timm.models.deepseek_vit.DeepseekVitBlock": _LANGUAGE,
    "timm.models.edgenext.CrossCovarianceAttn": _CHANNELS,
    "timm.models.efficientformer.Attention": f"{_BIAS}, and values are wider than keys",
    "timm.models.efficientformer_v2.Attention2d": f"{_MAPS}, position bias and mixed heads",
    "timm.models.efficientformer_v2.Attention2dDownsample": f"{_MAPS}, and fewer queries than keys",
    "timm.models.efficientvit_mit.LiteMLA": "linear attention has no softmax",
    "timm.models.efficientvit_msra.LocalWindowAttention": f"{_WINDOWS}, each head fed by the one before",
    "timm.models.eva.EvaBlockPostNorm": "the norms come after attention and MLP",
    "timm.models.fastvit.AttentionBlock": _PYRAMID,
    "timm.models.gcvit.WindowAttentionGlobal": f"{_WINDOWS}, some by shared global queries",
    "timm.models.gemma4_vit.Gemma4Attention": "values are normed too, and scores are not scaled",
    "timm.models.hiera.MaskUnitAttention": f"{_WINDOWS}, with pooled queries",
    "timm.models.hieradet_sam2.MultiScaleAttention": f"{_WINDOWS}, with pooled queries",
    "timm.models.iformer.SHMA": _MAPS,
    "timm.models.levit.Attention": f"{_BIAS}, and values are wider than keys",
    "timm.models.levit.AttentionDownsample": "fewer queries than keys, with relative position bias",
    "timm.models.lowformer.ConvAttention": _MAPS,
    "timm.models.maxxvit.Attention2d": _MAPS,
    "timm.models.maxxvit.ParallelPartitionAttention": _WINDOWS,
    "timm.models.maxxvit.PartitionAttentionCl": _WINDOWS,
    "timm.models.metaformer.Attention": _PYRAMID,
    "timm.models.mobilevit.LinearSelfAttention": "linear attention has no query-key scores",
    "timm.models.mobilevit.MobileVitBlock": "each pixel attends to the pixels at its place in other patches",
    "timm.models.mvitv2.MultiScaleAttention": "queries, keys and values are pooled",
    "timm.models.nest.Attention": "attention within blocks of the image, one sequence each",
    "timm.models.nextvit.ConvAttention": "a grouped convolution, not attention of tokens",
    "timm.models.nextvit.EfficientAttention": _REDUCED,
    "timm.models.pit.Transformer": "a pooling hierarchy: the number of tokens changes from stage to stage",
    "timm.models.pvt_v2.Attention": _REDUCED,
    "timm.models.qwen3_vit.Qwen3VitEncoder": _LANGUAGE,
    "timm.models.shvit.SHSA": "only some of the channels of a feature map attend",
    "timm.models.swiftformer.EfficientAdditiveAttention": "additive attention makes no query-key scores",
    "timm.models.swin_transformer.WindowAttention": f"{_WINDOWS}, with relative position bias",
    "timm.models.swin_transformer_v2.WindowAttention": f"{_WINDOWS}, by cosine similarity",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": f"{_WINDOWS}, by cosine similarity",
    "timm.models.tiny_vit.Attention": f"{_WINDOWS}, with position bias",
    "timm.models.tnt.Attention": "pixels attend within patches, and patches to each other",
    "timm.models.twins.GlobalSubSampleAttn": _REDUCED,
    "timm.models.twins.LocallyGroupedAttn": _WINDOWS,
    "timm.models.vision_transformer.DiffParallelScalingBlock": "differential attention parallel to the MLP",
    "timm.models.vision_transformer.ParallelScalingBlock": "attention and MLP run in parallel on one input",
    "timm.models.vision_transformer.ParallelThingsBlock": "several attentions run in parallel in one block",
    "timm.models.vision_transformer_relpos.RelPosAttention": _BIAS,
    "timm.models.vision_transformer_sam.Attention": f"{_BIAS}, within windows in most blocks",
    "timm.models.visformer.Attention": _MAPS,
    "timm.models.volo.Attention": _PYRAMID,
    "timm.models.volo.ClassAttention": _CLASS_TOKEN,
    "timm.models.volo.OutlookAttention": "weights come from the query alone, over its neighbours",
    "timm.models.xcit.ClassAttentionBlock": _CLASS_TOKEN,
    "timm.models.xcit.XCA": _CHANNELS,
}


def class_path(module: object) -> str:
    """The full name of the class of `module`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_refused(module: object) -> bool:
    """Whether this class is known, and known not to be served."""
    return class_path(module) in _REFUSED


def attention_reason(attn: object) -> str | None:
    """Why the kernels cannot serve this attention module, or None."""
    adapter = ATTENTION.get(type(attn))
    if adapter is None:
        return refusal(attn)
    reason = adapter.reason(attn)
    return None if reason is None else f"{class_path(attn)}: {reason}"


def block_reason(block: object) -> str | None:
    """Why this block and its attention are not supported, or None."""
    if type(block) not in BLOCKS:
        return refusal(block)
    return attention_reason(block.attn)  # type: ignore[attr-defined]


def prompt_reason(block: object) -> str | None:
    """Why prompts cannot be given to this block, or None: besides `block_reason`, its maps must be plain Linears."""
    reason = block_reason(block)
    if reason is None:
        attn: Any = block.attn  # type: ignore[attr-defined]
        if ATTENTION[type(attn)].weights(attn) is None:
            maps = (
                (attn.qkv, attn.proj)
                if attn.qkv is not None
                else (attn.q_proj, attn.k_proj, attn.v_proj, attn.proj)
            )
            odd = next(m for m in maps if not _plain(m))
            reason = (
                f"{class_path(odd)} stands where a plain torch.nn.Linear is read; merge or remove it first"
            )
    return reason


def refusal(module: object) -> str:
    """The class of a module that is not supported, and the reason where it is known."""
    path = class_path(module)
    if path in _REFUSED:
        return f"{path}: {_REFUSED[path]}"
    known = ", ".join(cls.__name__ for cls in (*BLOCKS, *ATTENTION) if cls.__module__.startswith("timm."))
    bases = [cls.__name__ for cls in (*BLOCKS, *ATTENTION) if isinstance(module, cls)]
    if bases:
        return f"{path}: a subclass of {bases[0]} may compute something else; only the class itself is served"
    return f"{path}: not one of the classes that are read ({known})"


def adapters(block: Any) -> tuple[BlockAdapter, AttentionAdapter]:
    """The adapters of a supported block and of its attention."""
    return BLOCKS[type(block)], ATTENTION[type(block.attn)]


def drops_attention(attn: Any) -> bool:
    """Whether attention dropout is active, which no kernel here serves."""
    return _active(attn.attn_drop)


def attend(
    attn: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompts: tuple[Tensor, Tensor] | None = None,
    temperature: Tensor | None = None,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """`prompt_attention` at the scale of `attn`; refuses active attention dropout rather than dropping it."""
    _refuse_dropout(attn)
    prompt_k, prompt_v = prompts if prompts is not None else (None, None)
    return prompt_attention(
        q, k, v, prompt_k, prompt_v, scale=attn.scale, temperature=temperature, backend=backend
    )


def self_attend(
    attn: Any,
    x: Tensor,
    prompts: tuple[Tensor, Tensor] | None = None,
    temperature: Tensor | None = None,
    rope: Tensor | None = None,
    extra_prefix: int = 0,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """The attention of the rows x [B, N, D] over themselves and prompts -> [B, N, H, d], before `finish`.

    Packed queries, keys and values stay packed unless norm or rotation acts on them; see `qkv` for the rest.
    """
    adapter = ATTENTION[type(attn)]
    packed = adapter.packed(attn, x) if adapter.folds(attn, rope is not None) else None
    if packed is None:
        return attend(attn, *adapter.qkv(attn, x, rope, extra_prefix), prompts, temperature, backend)
    _refuse_dropout(attn)
    prompt_k, prompt_v = prompts if prompts is not None else (None, None)
    return packed_prompt_attention(
        packed, prompt_k, prompt_v, scale=attn.scale, temperature=temperature, backend=backend
    )


def _refuse_dropout(attn: Any) -> None:
    if drops_attention(attn):
        raise NotImplementedError(
            f"attention dropout {attn.attn_drop.p} is active, and dropout on attention weights is not served; "
            "set `attn_drop` to 0 or put the block into eval mode"
        )


def mlp_hidden(mlp: Any, x: Tensor) -> Tensor:
    """What enters `fc2` of a supported MLP (:meth:`BlockAdapter.mean_commutes`)."""
    if type(mlp) is SwiGLU:
        hidden = mlp.act(mlp.fc1_g(x)) * mlp.fc1_x(x)
    elif type(mlp) is GluMlp:
        first, second = mlp.fc1(x).chunk(2, dim=-1)
        hidden = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
    else:
        hidden = mlp.act(mlp.fc1(x))
    return mlp.norm(mlp.drop1(hidden))


def _unflatten(attn: Any, qkv: Tensor) -> Tensor:
    """[B, N, 3·H·d] -> [B, N, 3, H, d]."""
    return qkv.unflatten(-1, (3, attn.num_heads, -1))


def _split_bias(attn: Any) -> tuple[Tensor, Tensor]:
    """The packed bias as its query part, detached, and the rest."""
    inner = attn.qkv.bias.shape[0] // 3
    return attn.qkv.bias[:inner].detach(), attn.qkv.bias[inner:]


def _rotate(attn: Any, t: Tensor, like: Tensor, rope: Tensor | None, extra_prefix: int) -> Tensor:
    """Rotary position embedding on the patch rows of t [B, N, H, d]."""
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
    """Two biases as one, with zeros for a missing one (EVA has no key bias)."""
    if first is None and second is None:
        return None
    return torch.cat([like.new_zeros(like.shape[0]) if b is None else b for b in (first, second)])
