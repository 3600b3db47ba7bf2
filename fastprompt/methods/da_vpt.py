"""DA-VPT: VPT-Deep whose prompts in the guided blocks are proxies of the classes, learned by a metric loss.

Ren et al., "DA-VPT: Semantic-Guided Visual Prompt Tuning for Vision Transformers", CVPR 2025. At the input of each
guided block the mean of the patches and the class token (or its query or key) are compared with the block's prompts.
Prompts are keys and values alone, as in VPT-Deep: the loss needs block inputs, which are there anyway, and no row of
a prompt is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import vit
from fastprompt.config import DAVPTConfig, PromptConfig, VPTConfig
from fastprompt.methods.class_map import map_classes
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
        for i in self.guided:
            _check_widths(config, base.blocks[i], i)
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
        model.register_buffer("class_centroids", like.new_full((self.proxies, base.embed_dim), torch.nan))
        # What an epoch has seen of each class; of no use to a later run.
        sums = torch.zeros(base.num_classes, base.embed_dim, device=like.device)
        model.register_buffer("class_sums", sums, persistent=False)
        model.register_buffer("class_counts", sums.new_zeros(base.num_classes), persistent=False)
        if self.da_config.tune == "prompts+biases":
            _train_biases(base)

    def observe(self, model: Any, labels: Tensor) -> Observer:
        return _GuidedLosses(self, model, labels)

    @torch.no_grad()
    def fit_class_map(
        self, model: Any, loader: Iterable[tuple[Tensor, Tensor]], images_per_class: int
    ) -> bool:
        base, training = model.base, model.training
        model.eval()
        _forget(model)
        device = model.class_counts.device
        for images, labels in loader:
            labels = labels.to(device)
            wanted = model.class_counts[labels] + _earlier(labels) < images_per_class
            if wanted.any():
                tokens = base.forward_features(images.to(device)[wanted])
                _remember(model, base.forward_head(tokens, pre_logits=True), labels[wanted])
            if bool((model.class_counts >= images_per_class).all()):
                break
        model.train(training)
        return self._map_classes(model, first=True)

    @torch.no_grad()
    def update_class_map(self, model: Any) -> bool:
        if dist.is_available() and dist.is_initialized():
            for total in (model.class_sums, model.class_counts):
                dist.all_reduce(total)
        return self._map_classes(model, first=bool(model.class_centroids.isnan().any()))

    def _map_classes(self, model: Any, *, first: bool) -> bool:
        if not model.class_counts.any():
            raise ValueError(
                "class map: no image has been seen; train with `labels`, or pass a loader that has images"
            )
        means = model.class_sums / model.class_counts.clamp(min=1).unsqueeze(1)
        # Drawn alike in every process of a distributed run.
        generator = torch.Generator().manual_seed(0)
        found = map_classes(
            means,
            model.class_counts,
            None if first else model.class_centroids,
            self.proxies,
            norm=self.da_config.feature_norm,
            generator=generator,
        )
        _forget(model)
        if found is None:
            return False
        assignment, centroids = found
        model.class_centroids.copy_(centroids)
        changed = not torch.equal(model.class_to_prompt, assignment)
        model.class_to_prompt.copy_(assignment)
        return changed

    def _normed(self, model: Any, p: Tensor) -> Tensor:
        if self.da_config.prompt_norm == "l2":
            return F.normalize(p, dim=-1, eps=EPS)
        return p if model.prompt_norm is None else model.prompt_norm(p)


class _GuidedLosses:
    """Collects the loss of each guided block as its input passes by."""

    def __init__(self, method: DAVPT, model: Any, labels: Tensor) -> None:
        self.method, self.model, self.labels = method, model, labels
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
            self._add(
                config.patch_weight, patches, block_view(base.blocks[i], prompts, config.proxy_for_patch)
            )
        if config.class_weight > 0:
            feature = block_view(base.blocks[i], tokens[:, 0], config.class_feature)
            self._add(
                config.class_weight, feature, block_view(base.blocks[i], prompts, config.proxy_for_class)
            )

    def loss(self, features: Tensor) -> Tensor:
        if self.model.training:
            _remember(self.model, features.detach(), self.labels)
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


def _remember(model: Any, features: Tensor, labels: Tensor) -> None:
    """Add features [B, D] of images of classes `labels` [B] to the sums of their classes."""
    model.class_sums.index_add_(0, labels, features.to(model.class_sums.dtype))
    model.class_counts.index_add_(0, labels, torch.ones_like(labels, dtype=model.class_counts.dtype))


def _forget(model: Any) -> None:
    model.class_sums.zero_()
    model.class_counts.zero_()


def _earlier(labels: Tensor) -> Tensor:
    """How many of the labels [B] before each one are the same."""
    return (labels.unsqueeze(1) == labels).tril(-1).sum(1)


def block_view(block: Any, rows: Tensor, kind: str) -> Tensor:
    """Rows [..., D] at the block's input, themselves ("cls", "prompt") or as the block's queries or keys."""
    if kind in ("cls", "prompt"):
        return rows
    adapter, attention = vit.adapters(block)
    weights = attention.plain_weights(block.attn)
    h = adapter.attention_input(block, rows)
    if kind == "query":
        return F.linear(h, weights.q_weight, weights.q_bias)
    return F.linear(h, weights.k_weight, weights.k_bias)


def _check_widths(config: DAVPTConfig, block: Any, i: int) -> None:
    """Refuse to compare rows of the model's width with projections of another (`attn_head_dim`)."""
    weights = vit.adapters(block)[1].weights(block.attn)
    if weights is None or weights.q_weight.shape[0] == weights.q_weight.shape[1]:
        return
    pairs = {("cls", config.proxy_for_patch), (config.class_feature, config.proxy_for_class)}
    for feature, proxy in pairs:
        if (feature in ("query", "key")) != (proxy in ("query", "key")):
            raise NotImplementedError(
                f"DA-VPT: blocks.{i}: queries and keys are {weights.q_weight.shape[0]} wide and tokens "
                f"{weights.q_weight.shape[1]}, so that {feature!r} cannot be compared with {proxy!r}; "
                "choose features and proxies of one kind"
            )


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
