"""DA-VPT: VPT-Deep whose prompts in the guided blocks are proxies of the classes, learned by a metric loss.

Ren et al., "DA-VPT: Semantic-Guided Visual Prompt Tuning for Vision Transformers", CVPR 2025. At the input of each
guided block the mean of the patches and the class token (or its query or key) are compared with the block's prompts.
Prompts are keys and values alone, as in VPT-Deep: the loss needs block inputs, which are there anyway, and no row of
a prompt is computed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import vit
from fastprompt.config import DAVPTConfig, PromptConfig, VPTConfig
from fastprompt.methods.method import Observer
from fastprompt.methods.proxy_loss import proxy_loss, similarities
from fastprompt.methods.vpt import VPT

EPS = 1e-6


class DAVPT(VPT):
    """VPT-Deep with guided blocks; see the module's text."""

    config_class: ClassVar[type[PromptConfig]] = DAVPTConfig

    def __init__(self, config: DAVPTConfig, base: Any) -> None:
        super().__init__(VPTConfig(config.num_prompts, pool=config.pool, dropout=config.dropout), base)
        self.da_config = config
        first, last = config.guided_blocks
        if last >= self.depth:
            raise ValueError(
                f"DAVPTConfig: `guided_blocks` must lie in 0..{self.depth - 1}, the model's blocks; "
                f"got {config.guided_blocks}"
            )
        if base.num_classes < 1:
            raise ValueError(
                "DAVPTConfig: the metric loss needs classes, and the model has no head; "
                "build it with num_classes=..."
            )
        if config.class_weight > 0 and base.cls_token is None:
            raise NotImplementedError(
                "DA-VPT: the class feature needs a class token, and this model has none; set class_weight=0"
            )
        self.guided = range(first, last + 1)
        self.proxies = min(config.num_proxy_prompts, base.num_classes)

    def build(self, model: Any) -> None:
        base = model.base
        like = next(base.parameters())
        # The official code draws the proxies of all guided blocks as one tensor, and the other prompts as another.
        guided = _draw(like, len(self.guided), self.proxies, base.embed_dim)
        others = _draw(like, self.depth - len(self.guided), self.config.num_prompts, base.embed_dim)
        sources = (iter(others), iter(guided))
        model.prompts = nn.ParameterList(
            nn.Parameter(next(sources[i in self.guided])) for i in range(self.depth)
        )
        model.prompt_project = None
        model.prompt_norm = None
        if self.da_config.prompt_norm == "layer":
            model.prompt_norm = nn.LayerNorm(base.embed_dim, eps=EPS, device=like.device, dtype=like.dtype)
        # Until a map is fitted, classes take turns; with as many prompts as classes that is the identity.
        classes = torch.arange(base.num_classes, device=like.device)
        model.register_buffer("class_to_prompt", classes % self.proxies)
        if self.da_config.tune == "prompts+biases":
            _train_biases(base)

    def observe(self, model: Any, labels: Tensor) -> Observer:
        return _GuidedLosses(self, model, labels)

    def _normed(self, model: Any, p: Tensor) -> Tensor:
        if self.da_config.prompt_norm == "l2":
            return F.normalize(p, dim=-1, eps=EPS)
        return p if model.prompt_norm is None else model.prompt_norm(p)


class _GuidedLosses:
    """Collects the loss of each guided block as its input passes by."""

    def __init__(self, method: DAVPT, model: Any, labels: Tensor) -> None:
        self.method, self.model = method, model
        self.proxy_of_image = model.class_to_prompt[labels]
        self.losses: list[Tensor] = []

    def see(self, block: int, tokens: Tensor) -> None:
        """`tokens` leave `block`, so that they enter the next."""
        i, config = block + 1, self.method.da_config
        if i not in self.method.guided:
            return
        base = self.model.base
        prompts = self.method._normed(self.model, self.model.prompts[i])
        if config.patch_weight > 0:
            patches = tokens[:, base.num_prefix_tokens :].mean(1)
            self._add(config.patch_weight, patches, _view(base.blocks[i], prompts, config.proxy_for_patch))
        if config.class_weight > 0:
            feature = _view(base.blocks[i], tokens[:, 0], config.class_feature)
            self._add(config.class_weight, feature, _view(base.blocks[i], prompts, config.proxy_for_class))

    def loss(self) -> Tensor:
        if not self.losses:
            return self.model.prompts[0].new_zeros(())
        return torch.stack(self.losses).sum() / len(self.method.guided)

    def _add(self, weight: float, features: Tensor, proxies: Tensor) -> None:
        config = self.method.da_config
        sims = similarities(features, proxies, config.proxy_scale)
        loss = proxy_loss(
            sims, self.proxy_of_image, criterion=config.criterion, alpha=config.alpha, delta=config.delta
        )
        self.losses.append(weight * loss)


def _view(block: Any, rows: Tensor, kind: str) -> Tensor:
    """Rows [..., D] at the block's input, themselves ("cls", "prompt") or as the block's queries or keys."""
    if kind in ("cls", "prompt"):
        return rows
    adapter, attention = vit.adapters(block)
    weights = attention.weights(block.attn)
    if weights is None:
        raise TypeError("the attention's maps are not plain Linear layers; check `prompt_reason` first")
    h = adapter.attention_input(block, rows)
    if kind == "query":
        return F.linear(h, weights.q_weight, weights.q_bias)
    return F.linear(h, weights.k_weight, weights.k_bias)


def _draw(like: Tensor, *shape: int) -> Tensor:
    """Xavier-uniform over the whole tensor, divided by 8."""
    if 0 in shape:
        return like.new_empty(shape)
    with torch.no_grad():
        return nn.init.xavier_uniform_(like.detach().new_empty(shape)).div_(8)


def _train_biases(base: Any) -> None:
    """DA-VPT+: let the class token, norm1 and the biases of k, v, proj, fc2 and norm2 train, found by name.

    By name, as in the official code, so that "proj.bias" takes in the patch embedding's.
    """
    for name, p in base.named_parameters():
        owner, _, last = name.rpartition(".")
        module = owner.rpartition(".")[2]
        if (
            name == "cls_token"
            or module == "norm1"
            or (last == "bias" and module in ("proj", "k_proj", "v_proj", "fc2", "norm2", "qkv"))
            or last == "v_bias"
        ):
            p.requires_grad_(True)
    for block in base.blocks:
        if getattr(block.attn, "qkv", None) is not None and block.attn.qkv.bias is not None:
            setattr(block.attn, vit.FROZEN_QUERY_BIAS, True)
