"""DA-VPT: VPT-Deep whose prompts in the guided blocks are proxies of the classes, learned by a metric loss.

Ren et al., "DA-VPT: Semantic-Guided Visual Prompt Tuning for Vision Transformers", CVPR 2025. At the input of each
guided block the mean of the patches and the class token (or its query or key) are compared with the block's prompts.
As in VPT-Deep, prompts are only keys and values: the loss needs block inputs, which are computed anyway, but no prompt
row of a block's output.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import backbone, blocks, vit
from fastprompt.backbone import Backbone, HeadInput
from fastprompt.config import DAVPTConfig, PromptConfig
from fastprompt.methods.base import PromptOutput
from fastprompt.methods.class_map import map_classes
from fastprompt.methods.proxy_loss import proxy_loss, similarities
from fastprompt.methods.vpt import VPTModel, VPTState
from fastprompt.ops.operator import accumulation_dtype
from fastprompt.vit import TimmBlock

EPS = 1e-6
View = Literal["cls", "prompt", "query", "key"]


class DAVPTModel(VPTModel):
    """VPT-Deep with guided blocks; see the module's text.

    Attributes:
        guided: the guided blocks.
        prompt_norm: trained LayerNorm of the prompts, or None.
        class_to_prompt: int64 [classes], the prompt of each class.
        class_centroids: [proxies, D] of the last class map; NaN before the first.
    """

    config_class: ClassVar[type[PromptConfig]] = DAVPTConfig
    config: DAVPTConfig  # type: ignore[assignment]  # `VPTModel` uses VPTConfig only in methods replaced here

    prompt_norm: nn.LayerNorm | None
    class_to_prompt: Tensor
    class_centroids: Tensor
    class_sums: Tensor
    class_counts: Tensor

    @classmethod
    def check(cls, base: Backbone, config: DAVPTConfig) -> None:  # type: ignore[override]
        base_blocks = backbone.blocks_of(base)
        first, last = config.guided_blocks
        if last >= len(base_blocks):
            raise ValueError(
                f"DAVPTConfig: `guided_blocks` must be in 0..{len(base_blocks) - 1}, the model's blocks; "
                f"got {config.guided_blocks}"
            )
        if base.num_classes < 1:
            raise ValueError(
                "DAVPTConfig: the metric loss needs classes, but the model has no head; "
                "build it with num_classes=..."
            )
        if config.class_weight > 0 and base.cls_token is None:
            raise NotImplementedError(
                "DA-VPT: the class feature needs a class token, but this model has none; set class_weight=0"
            )
        for i in range(first, last + 1):
            _check_widths(config, base_blocks[i], i)

    def add_prompts(self) -> None:
        base, config = self.base, self.config
        depth, width = len(base.blocks), base.embed_dim
        first, last = config.guided_blocks
        self.guided = range(first, last + 1)
        self.prompted = depth
        self.prompt_project = None
        self.prompt_norm = None
        like = next(base.parameters())
        proxies = min(config.num_proxy_prompts, base.num_classes)
        # The official code draws the proxies of all guided blocks as one tensor, and the other prompts as another.
        guided = iter(_draw(like, len(self.guided), proxies, width))
        others = iter(_draw(like, depth - len(self.guided), config.num_prompts, width))
        self.prompts = nn.ParameterList(
            nn.Parameter(next(guided if i in self.guided else others)) for i in range(depth)
        )
        if config.prompt_norm == "layer":
            self.prompt_norm = nn.LayerNorm(width, eps=EPS, device=like.device, dtype=like.dtype)
        # Until a map is fitted, class c has prompt c modulo P_g: the identity with as many prompts as classes.
        classes = torch.arange(base.num_classes, device=like.device)
        self.register_buffer("class_to_prompt", classes % proxies)
        self.register_buffer("class_centroids", like.new_full((proxies, width), torch.nan))
        # Sums over the current epoch, by class; not saved, because a later run does not need them.
        wide = accumulation_dtype(like.dtype)
        sums = torch.zeros(base.num_classes, width, device=like.device, dtype=wide)
        self.register_buffer("class_sums", sums, persistent=False)
        self.register_buffer("class_counts", sums.new_zeros(base.num_classes), persistent=False)
        if config.tune == "prompts+biases":
            _train_biases(base)

    @property
    def proxies(self) -> int:
        """Number of prompts that are proxies of classes."""
        return len(self.class_centroids)

    def prepare(self, batch_size: int | None, reads: HeadInput) -> VPTState:
        return super().prepare(batch_size, reads)._replace(masked=self.config.mask_prompts)

    def norm_prompts(self, p: Tensor) -> Tensor:
        if self.config.prompt_norm == "l2":
            return F.normalize(p, dim=-1, eps=EPS)
        return p if self.prompt_norm is None else self.prompt_norm(p)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | PromptOutput:
        """images [B, C, h, w] -> logits [B, classes]; with `labels` [B], a :class:`PromptOutput` with the metric loss.

        In train mode with `labels`, the features of each class are collected for :meth:`update_class_map`.

        Raises ValueError or TypeError if the model does not take these images or labels.
        """
        if labels is None:
            return super().forward(images)
        backbone.check_images(self.base, images, "PromptModel")
        backbone.check_labels(self.base, images, labels, "PromptModel")
        losses: list[Tensor] = []
        proxy_of_image = self.class_to_prompt[labels]

        def guide(block: int, x: Tensor, carried: int) -> None:
            if block in self.guided:
                losses.extend(self._losses(block, x, carried, proxy_of_image))

        reads = self._head_input()
        x, ropes = backbone.embed(self.base, images)
        state = self.prepare(len(x), reads)
        x, carried = self.run(self.base, state, x, ropes, reads, guide, recompute=self.recompute)
        features, logits = backbone.apply_head(self.base, x, reads, self.pool, carried)
        if self.training:
            self._remember(features.detach(), labels)
        if not losses:
            return PromptOutput(logits, self.prompts[0].new_zeros(()))
        return PromptOutput(logits, torch.stack(losses).sum() / len(self.guided))

    @torch.no_grad()
    def fit_class_map(self, loader: Iterable[tuple[Tensor, Tensor]], images_per_class: int = 10) -> bool:
        """Map classes to prompts by k-means over the frozen backbone's mean feature of each class.

        Args:
            loader: yields (images [B, C, h, w], labels [B]); read until each class has enough images, or to the end.
            images_per_class: number of images of each class to average.

        Returns:
            Whether `class_to_prompt` was changed (a map of all classes to one prompt is discarded).

        Raises:
            ValueError, TypeError: the model does not take these images or labels, or fewer classes have images than
                there are prompts.
        """
        if not isinstance(images_per_class, int) or images_per_class < 1:
            raise ValueError(
                f"`fit_class_map`: `images_per_class` must be an integer >= 1; got {images_per_class!r}"
            )
        base, training, device = self.base, self.training, self.class_counts.device
        self.eval()
        self._forget()
        try:
            for images, labels in loader:
                images, labels = images.to(device), labels.to(device)
                backbone.check_images(base, images, "fit_class_map")
                backbone.check_labels(base, images, labels, "fit_class_map")
                wanted = self.class_counts[labels] + _earlier(labels) < images_per_class
                if wanted.any():
                    tokens = base.forward_features(images[wanted])
                    self._remember(base.forward_head(tokens, pre_logits=True), labels[wanted])
                if bool((self.class_counts >= images_per_class).all()):
                    break
        finally:
            self.train(training)
        return self._map_classes(first=True)

    @torch.no_grad()
    def update_class_map(self) -> bool:
        """Update the class map with the mean features of the tuned model; call it after an epoch of training.

        The means are taken over the training forwards with labels since the last call; all processes of a distributed
        run must call it together. Returns whether `class_to_prompt` was changed.
        """
        if dist.is_available() and dist.is_initialized():
            for total in (self.class_sums, self.class_counts):
                dist.all_reduce(total)
        return self._map_classes(first=bool(self.class_centroids.isnan().any()))

    def _map_classes(self, *, first: bool) -> bool:
        if not self.class_counts.any():
            raise ValueError(
                "class map: there are no images; train with `labels`, or pass a loader with images"
            )
        found = map_classes(
            self.class_sums / self.class_counts.clamp(min=1).unsqueeze(1),
            self.class_counts,
            None if first else self.class_centroids,
            self.proxies,
            norm=self.config.feature_norm,
            generator=torch.Generator().manual_seed(0),  # drawn alike in every process of a distributed run
        )
        self._forget()
        if found is None:
            return False
        assignment, centroids = found
        self.class_centroids.copy_(centroids)
        changed = not torch.equal(self.class_to_prompt, assignment)
        self.class_to_prompt.copy_(assignment)
        return changed

    def _losses(self, i: int, x: Tensor, carried: int, proxy_of_image: Tensor) -> list[Tensor]:
        """Return the weighted losses of guided block i, whose input is x [B, N + carried, D]."""
        config, base = self.config, self.base
        block = backbone.blocks_of(base)[i]
        prompts = self.norm_prompts(self.prompts[i])
        compared: list[tuple[float, Tensor, View]] = []
        if config.patch_weight > 0:
            patches = x[:, base.num_prefix_tokens + carried :].mean(1)
            compared.append((config.patch_weight, patches, config.proxy_for_patch))
        if config.class_weight > 0:
            feature = block_view(block, x[:, 0], config.class_feature)
            compared.append((config.class_weight, feature, config.proxy_for_class))
        losses = []
        for weight, features, view in compared:
            sims = similarities(features, block_view(block, prompts, view), config.proxy_scale)
            loss = proxy_loss(
                sims, proxy_of_image, criterion=config.criterion, alpha=config.alpha, delta=config.delta
            )
            losses.append(weight * loss)
        return losses

    def _remember(self, features: Tensor, labels: Tensor) -> None:
        """Add features [B, D] of images of classes `labels` [B] to the sums of their classes."""
        self.class_sums.index_add_(0, labels, features.to(self.class_sums.dtype))
        self.class_counts.index_add_(0, labels, torch.ones_like(labels, dtype=self.class_counts.dtype))

    def _forget(self) -> None:
        self.class_sums.zero_()
        self.class_counts.zero_()


def _earlier(labels: Tensor) -> Tensor:
    """Return, for each of the labels [B], how many equal labels precede it."""
    return (labels.unsqueeze(1) == labels).tril(-1).sum(1)


def block_view(block: TimmBlock, rows: Tensor, kind: View) -> Tensor:
    """Return rows [..., D] of the block's input unchanged ("cls", "prompt") or as the block's queries or keys."""
    if kind in ("cls", "prompt"):
        return rows
    adapter, attention = vit.adapters(block)
    weights = attention.plain_weights(blocks.attention_of(block))
    h = adapter.attention_input(block, rows)
    if kind == "query":
        return F.linear(h, weights.q_weight, weights.q_bias)
    return F.linear(h, weights.k_weight, weights.k_bias)


def _check_widths(config: DAVPTConfig, block: TimmBlock, i: int) -> None:
    """Raise an error if features and proxies differ in width (a model with `attn_head_dim`)."""
    weights = vit.adapters(block)[1].weights(blocks.attention_of(block))
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
    """Initialize Xavier-uniform over the whole tensor, divided by 8."""
    if 0 in shape:
        return like.new_empty(shape)
    with torch.no_grad():
        return nn.init.xavier_uniform_(like.detach().new_empty(shape)).div_(8)


def _train_biases(base: Backbone) -> None:
    """DA-VPT+: make the class token, norm1 and the biases of k, v, proj, fc2 and norm2 trainable.

    They are selected by name, as in the official code, so "proj.bias" includes that of the patch embedding.
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
    for block in backbone.blocks_of(base):
        if getattr(getattr(block.attn, "qkv", None), "bias", None) is not None:
            setattr(block.attn, vit.FROZEN_QUERY_BIAS, True)
