"""The four methods in their papers' own form, on timm's modules and PyTorch's SDPA: the baseline of all comparisons.

VPT, GateVPT and DA-VPT concatenate prompts to the tokens, and a block with its own prompts replaces the rows of the
previous ones. CVPT expands its prompts to the batch. The benchmarks time these models, the tests take them in float64
for the definition, and the demo compares with them. Nothing here runs code of fastprompt, except the formula of
DA-VPT's loss; `tests/methods/test_golden.py` holds them to the numbers of the published code.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, PromptModel, VPTConfig
from fastprompt.methods.proxy_loss import proxy_loss, similarities


class Output(NamedTuple):
    """Logits [B, classes] and the method's own loss, a scalar; 0 for a method without one."""

    logits: Tensor
    method_loss: Tensor


class PaperVPT(nn.Module):
    """VPT (Jia et al., ECCV 2022): prompts are rows of the sequence, after the prefix tokens.

    Holds copies of the parameters and buffers of `model`, under the same names; the same of them train.
    """

    _concatenates: ClassVar[bool] = True
    _needs_plain_blocks: ClassVar[bool] = False

    def __init__(self, model: PromptModel) -> None:
        super().__init__()
        if self._needs_plain_blocks:
            _require_plain_blocks(model)
        own = copy.deepcopy(model)
        for kind in ("_parameters", "_buffers", "_modules"):
            getattr(self, kind).update(getattr(own, kind))
        config: Any = own.config
        base: Any = own.base
        self.config, self.base = config, base
        # Which of `prompts` enters a block; blocks without one carry the last prompts on.
        self._entering = list(range(len(own.prompts)))
        if getattr(config, "shared_across_blocks", False):
            self._entering = [0] * (config.blocks or len(base.blocks))
        for i, block in enumerate(base.blocks):
            if self._concatenates and hasattr(block.attn, "num_prefix_tokens"):
                rows = own.prompts[self._entering[min(i, len(self._entering) - 1)]].shape[0]
                block.attn.num_prefix_tokens += rows  # rotary embedding skips the prompts
        self.train(model.training)

    def train(self, mode: bool = True) -> PaperVPT:
        """Set the mode; the frozen backbone stays in eval mode unless the configuration says otherwise."""
        super().train(mode)
        self.base.train(mode and self.config.backbone_train_mode)
        return self

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | Output:
        """Return the logits [B, classes] of images [B, C, h, w]; with `labels` [B], an :class:`Output`."""
        base, prefix, P = self.base, self.base.num_prefix_tokens, 0
        x = base._pos_embed(base.patch_embed(images))
        x, rope = x if isinstance(x, tuple) else (base.patch_drop(x), None)
        x = base.norm_pre(x)
        losses: list[Tensor] = []
        for i, block in enumerate(base.blocks):
            if self._concatenates and i < len(self._entering):
                prompts = self.prompt_rows(i, len(x))
                x = torch.cat([x[:, :prefix], prompts, x[:, prefix + P :]], dim=1)
                P = prompts.shape[1]
            if labels is not None:
                losses += self.losses(i, x, P, labels)
            x = self.block(i, block, x, rope[i] if getattr(base, "rope_mixed", False) else rope, P)
        logits = self.head(x, P)
        if labels is None:
            return logits
        return Output(logits, torch.stack(losses).sum() if losses else logits.new_zeros(()))

    def prompts_of(self, i: int) -> Tensor:
        """Return the prompts of block i, [P, D]."""
        p = self.prompts[self._entering[i]]
        return p if getattr(self.config, "project", None) is None else self.prompt_project(p)

    def prompt_rows(self, i: int, batch: int) -> Tensor:
        """Return the prompts of block i for each image, [B, P, D]; each image draws its own dropout mask."""
        return F.dropout(self.prompts_of(i).expand(batch, -1, -1), self.config.dropout, self.training)

    def block(self, i: int, block: Any, x: Tensor, rope: Tensor | None, P: int) -> Tensor:
        """Run block i on tokens x [B, N + P, D]."""
        return block(x) if rope is None else block(x, rope=rope)

    def losses(self, i: int, x: Tensor, P: int, labels: Tensor) -> list[Tensor]:
        """Return what block i, with input x [B, N + P, D], adds to the method's loss."""
        return []

    def head(self, x: Tensor, P: int) -> Tensor:
        """Return the logits of the last block's tokens x [B, N + P, D]."""
        base, prefix = self.base, self.base.num_prefix_tokens
        x, pool = base.norm(x), self.config.pool
        if pool == "backbone":
            return base.forward_head(x if base.global_pool == "token" else without_prompts(x, prefix, P))
        rows = {"all": x[:, prefix:], "image": x[:, prefix + P :], "prompt": x[:, prefix : prefix + P]}[pool]
        return base.head(base.head_drop(base.fc_norm(rows.mean(1))))


class PaperGateVPT(PaperVPT):
    """GateVPT (Yoo et al., ICML 2023): prompt rows blended with those that entered, and a softmax temperature."""

    _needs_plain_blocks = True

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | Output:
        if self.config.temperature is True:
            self.temperature.data.clamp_(*self.config.temperature_range)
        return super().forward(images, labels)

    def block(self, i: int, block: Any, x: Tensor, rope: Tensor | None, P: int) -> Tensor:
        start, stop = self.base.num_prefix_tokens, self.base.num_prefix_tokens + P
        out = x + block.drop_path1(block.ls1(self._attention(i, block.attn, block.norm1(x))))
        out = out + block.drop_path2(block.ls2(block.mlp(block.norm2(out))))
        if i >= len(self.gate_logits):
            return out
        gate = self.gate_logits[i].sigmoid()
        blended = gate * out[:, start:stop] + (1 - gate) * x[:, start:stop]
        return torch.cat([out[:, :start], blended, out[:, stop:]], dim=1)

    def _attention(self, i: int, attn: Any, x: Tensor) -> Tensor:
        if self.config.temperature is False:
            return attn(x)
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # Dividing the queries divides the scores, and SDPA stays fused.
        q = attn.q_norm(q) / self.temperature[i]
        out = F.scaled_dot_product_attention(q, attn.k_norm(k), v)
        return attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))


class PaperCVPT(PaperVPT):
    """CVPT (Huang et al., ICCV 2025): all tokens attend to the block's prompts, by its self-attention's weights."""

    _concatenates = False
    _needs_plain_blocks = True

    def block(self, i: int, block: Any, x: Tensor, rope: Tensor | None, P: int) -> Tensor:
        insert, cross = self.config.insert, partial(self._cross, block.attn, self.prompt_rows(i, len(x)))
        if insert == 1:
            x = x + cross(x)
        attended = block.ls1(block.attn(block.norm1(x)))
        if insert == 2:
            attended = attended + cross(x)
        x = x + block.drop_path1(attended)
        if insert == 3:
            x = x + cross(x)
        hidden = block.norm2(x)
        if insert == 4:
            hidden = hidden + cross(x)
        x = x + block.drop_path2(block.ls2(block.mlp(hidden)))
        if insert == 5:
            x = x + cross(x)
        return x

    @staticmethod
    def _cross(attn: Any, prompts: Tensor, x: Tensor) -> Tensor:
        """Attend from x [B, N, D] to prompts [B, P, D]."""
        D, heads, bias = x.shape[-1], attn.num_heads, attn.qkv.bias
        q = F.linear(x, attn.qkv.weight[: -2 * D], None if bias is None else bias[: -2 * D])
        kv = F.linear(prompts, attn.qkv.weight[-2 * D :], None if bias is None else bias[-2 * D :])
        k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q.unflatten(-1, (heads, -1)).transpose(1, 2), k, v)
        return attn.proj(out.transpose(1, 2).flatten(2))


class PaperDAVPT(PaperVPT):
    """DA-VPT (Ren et al., CVPR 2025): VPT-Deep, and a metric loss at the input of each guided block."""

    _needs_plain_blocks = True

    def __init__(self, model: PromptModel) -> None:
        if model.config.tune != "prompts":  # type: ignore[attr-defined]
            raise NotImplementedError(
                "`paper_model`: DA-VPT needs tune='prompts', because timm packs q's frozen bias with those of k and v, "
                f"which train; got {model.config.tune!r}"  # type: ignore[attr-defined]
            )
        super().__init__(model)

    def prompts_of(self, i: int) -> Tensor:
        """Return the normed prompts of block i, [P, D]."""
        if self.config.prompt_norm == "l2":
            return F.normalize(self.prompts[i], dim=-1, eps=1e-6)
        return self.prompt_norm(self.prompts[i]) if self.config.prompt_norm == "layer" else self.prompts[i]

    def block(self, i: int, block: Any, x: Tensor, rope: Tensor | None, P: int) -> Tensor:
        if not self.config.mask_prompts:
            return block(x)
        prefix, N = self.base.num_prefix_tokens, x.shape[1]
        seen = torch.ones(N, N, dtype=torch.bool, device=x.device)
        seen[prefix : prefix + P, : prefix + P] = False
        return block(x, attn_mask=seen)

    def losses(self, i: int, x: Tensor, P: int, labels: Tensor) -> list[Tensor]:
        config, block = self.config, self.base.blocks[i]
        first, last = config.guided_blocks
        if not first <= i <= last:
            return []
        prompts, found = self.prompts_of(i), []
        for weight, feature, kind in (
            (config.patch_weight, x[:, self.base.num_prefix_tokens + P :].mean(1), config.proxy_for_patch),
            (config.class_weight, _view(block, x[:, 0], config.class_feature), config.proxy_for_class),
        ):
            sims = similarities(feature, _view(block, prompts, kind), config.proxy_scale)
            loss = proxy_loss(
                sims,
                self.class_to_prompt[labels],
                criterion=config.criterion,
                alpha=config.alpha,
                delta=config.delta,
            )
            found.append(weight * loss / (last + 1 - first))
        return found


def _view(block: Any, rows: Tensor, kind: str) -> Tensor:
    """Return rows [..., D] themselves ("cls", "prompt"), or as the queries or keys of `block`."""
    if kind in ("cls", "prompt"):
        return rows
    part = ("query", "key").index(kind)
    qkv, D = block.attn.qkv, rows.shape[-1]
    here = slice(part * D, (part + 1) * D)
    return F.linear(block.norm1(rows), qkv.weight[here], None if qkv.bias is None else qkv.bias[here])


PAPER_MODELS: dict[type[PromptConfig], type[PaperVPT]] = {
    VPTConfig: PaperVPT,
    GateVPTConfig: PaperGateVPT,
    CVPTConfig: PaperCVPT,
    DAVPTConfig: PaperDAVPT,
}


def paper_model(model: PromptModel) -> PaperVPT:
    """Return the same function as `model` in the papers' form, on copies of its weights under the same names.

    Raises NotImplementedError where the papers' form of this model or configuration is not written here.
    """
    return PAPER_MODELS[type(model.config)](model)


def _require_plain_blocks(model: PromptModel) -> None:
    for i, block in enumerate(model.base.blocks):
        if type(block) is not Block or type(block.attn) is not Attention or getattr(block.attn, "gate", None):
            raise NotImplementedError(
                f"`paper_model`: {type(model.config).__name__} needs blocks of timm's `Block` with `Attention`; "
                f"blocks.{i} is {type(block).__name__} with {type(block.attn).__name__}"
            )


def without_prompts(x: Tensor, prefix: int, P: int) -> Tensor:
    """Return tokens x [B, N + P, D] without the P prompts that follow the prefix tokens, [B, N, D]."""
    return torch.cat([x[:, :prefix], x[:, prefix + P :]], dim=1)


# What the blocks return and attend to ---------------------------------------------------------------------------------


class Trace(NamedTuple):
    """For each block: its image tokens [B, N, D] without prompts, and their attention to prompts [B, H, N, P]."""

    tokens: list[Tensor]
    weights: list[Tensor]


@torch.no_grad()
def trace(model: PromptModel, images: Tensor) -> Trace:
    """Run the papers' form of `model`, in eval mode, and keep what its blocks return and attend to."""
    paper = paper_model(model).eval()
    prefix, run, found = paper.base.num_prefix_tokens, paper.block, Trace([], [])

    def block(i: int, block: Any, x: Tensor, rope: Tensor | None, P: int) -> Tensor:
        with _AttentionWeights() as attention:
            x = run(i, block, x, rope, P)
        found.tokens.append(without_prompts(x, prefix, P))
        if P:
            weights = without_prompts(attention.weights[0].transpose(1, 2), prefix, P).transpose(1, 2)
            found.weights.append(weights[..., prefix : prefix + P])
        else:  # cross-attention is the call whose keys are not the tokens
            found.weights.extend(w for w in attention.weights if w.shape[-1] != x.shape[1])
        return x

    paper.block = block  # type: ignore[method-assign]
    paper(images)
    return found


class _AttentionWeights(TorchFunctionMode):
    """Computes the weights [B, H, N, M] of each call of SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, _ = args
            scores = q @ k.mT * q.shape[-1] ** -0.5
            mask = (kwargs or {}).get("attn_mask")
            self.weights.append(
                (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
            )
        return func(*args, **(kwargs or {}))
