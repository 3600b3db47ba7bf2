"""`PromptModel`: a frozen timm model with a method's prompts, and a head that trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastprompt import backbone
from fastprompt.backbone import Reading
from fastprompt.config import PromptConfig
from fastprompt.methods import PromptMethod, method_for
from fastprompt.methods.vpt import strip


class PromptOutput(NamedTuple):
    """What a `PromptModel` returns when it is given labels: logits [B, classes] and the method's own loss, a scalar.

    Train on ``cross_entropy(logits, labels) + method_loss``; it is 0 for methods without a loss of their own.
    """

    logits: Tensor
    method_loss: Tensor


def get_prompt_model(model: nn.Module, config: PromptConfig, *, shortcuts: bool = True) -> PromptModel:
    """Give a timm ViT the prompts that `config` describes; its weights are shared, and frozen but for the head.

    Args:
        model: timm's `VisionTransformer`, `VisionTransformerDistilled` or `Eva` (EVA02, DINOv3, ...), with blocks that
            fastprompt reads; before or after :func:`fastprompt.replace_attention`.
        config: such as :class:`fastprompt.VPTConfig`.
        shortcuts: False runs every row through every block, as the papers' code does: the same numbers, more work.

    Returns:
        A `PromptModel` on the model's device and in its dtype.

    Raises:
        NotImplementedError: the model, or what `config` asks of it, is not supported; the message says why.
        TypeError, ValueError: `model` or `config` is of another kind, or a value does not fit the model.
        In each case before anything is changed.
    """
    if isinstance(model, PromptModel):
        raise TypeError("`get_prompt_model`: this model has prompts already; pass its `base`")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`get_prompt_model`: `model` must be a timm model; got {type(model).__name__}")
    if not isinstance(shortcuts, bool):
        raise TypeError(f"`get_prompt_model`: `shortcuts` must be True or False; got {shortcuts!r}")
    reason = backbone.model_reason(model)
    if reason is None and getattr(config, "backbone_train_mode", False):
        reason = _attention_dropout_reason(model)
    if reason is None:
        reason = backbone.pool_reason(model, getattr(config, "pool", "backbone"))
        reason = None if reason is None else f"pool={config.pool!r} cannot be had: {reason}"  # type: ignore[attr-defined]
    if reason is not None:
        raise NotImplementedError(f"`get_prompt_model`: {reason}")
    return PromptModel(model, method_for(config, model), config, shortcuts)


def _attention_dropout_reason(model: Any) -> str | None:
    for i, block in enumerate(model.blocks):
        if block.attn.attn_drop.p > 0:
            return (
                f"blocks.{i}: attention dropout {block.attn.attn_drop.p} would be active with "
                "backbone_train_mode=True and is not served; build the model with attn_drop_rate=0"
            )
    return None


class PromptModel(nn.Module):
    """A timm model with prompts; made by :func:`get_prompt_model`.

    Attributes:
        base: the timm model: frozen, except for its head.
        prompts: `ParameterList`, one [P, D] for each prompted block ([P, project] with a projection).
        config: the method's configuration.
        shortcuts: whether work that reaches neither logits nor gradients is left out; may be set at any time.
    """

    base: Any
    prompts: nn.ParameterList

    def __init__(
        self, base: nn.Module, method: PromptMethod, config: PromptConfig, shortcuts: bool = True
    ) -> None:
        super().__init__()
        base.requires_grad_(False)
        for head in backbone.head_modules(base):
            head.requires_grad_(True)
        self.base = base
        self.config = config
        self.method = method
        self.shortcuts = shortcuts
        method.build(self)
        self.train(base.training)

    @property
    def pool(self) -> str:
        """What the head reads: "backbone", "all", "image" or "prompt"."""
        return getattr(self.config, "pool", "backbone")

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | PromptOutput:
        """images [B, C, h, w] -> logits [B, classes]; with `labels` [B], a :class:`PromptOutput`.

        Raises ValueError if `labels` is not [B].
        """
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(
                f"`PromptModel`: `labels` must be [B] = {tuple(images.shape[:1])}; got {tuple(labels.shape)}"
            )
        observer = None if labels is None else self.method.observe(self, labels)
        x, carried = self._run(images, self._read, None if observer is None else observer.see)
        logits = _logits(self.base, self.pool, x, carried, self._read)
        if labels is None:
            return logits
        if observer is None:
            return PromptOutput(logits, logits.new_zeros(()))
        features = _logits(self.base, self.pool, x, carried, self._read, pre_logits=True)
        return PromptOutput(logits, observer.loss(features))

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, C, h, w] -> all tokens after the final norm, [B, N, D], for `forward_head`.

        Prompts are among them, after the prefix tokens, only where `pool` averages them ("all", "prompt"). Computes
        every row of the last block, so calling the model itself is cheaper.
        """
        x, carried = self._run(images, _read_everything)
        if self.pool not in ("all", "prompt"):
            x = strip(x, self.base.num_prefix_tokens, carried)
        return self.base.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, D] of `forward_features` -> logits [B, classes], or pooled features [B, D] if `pre_logits`."""
        if self.pool == "backbone":
            return self.base.forward_head(x, pre_logits=pre_logits)
        carried = self.prompts[-1].shape[0] if self.pool in ("all", "prompt") else 0
        spans = backbone.pool_spans(self.base, self.pool, x.shape[1], carried)
        return backbone.classify(self.base, backbone.mean_of(x, spans), pre_logits)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's `forward_intermediates`: the patch features of the blocks in `indices`, without prompts.

        Args:
            images: [B, C, h, w].
            indices: the last so many blocks if an int, these blocks if a list, all if None.
            return_prefix_tokens: also return each block's prefix tokens.
            norm: apply the final norm to each.
            stop_early: run no further than the last block asked for.
            output_fmt: "NCHW" for [B, D, H', W'] maps, "NLC" for [B, N, D] rows.
            intermediates_only: leave out the final features.

        Returns:
            (final tokens [B, N, D], list of features), or the list alone.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(
                f"`forward_intermediates`: `output_fmt` must be 'NCHW' or 'NLC'; got {output_fmt!r}"
            )
        base, prefix = self.base, self.base.num_prefix_tokens
        take, last = feature_take_indices(len(base.blocks), indices)
        features: list[Any] = []

        def keep(i: int, tokens: Tensor) -> None:
            if i in take:
                features.append(base.norm(tokens) if norm else tokens)

        depth = last + 1 if stop_early else None
        x, carried = self._run(images, _read_everything, keep, depth)
        prefixes = [f[:, :prefix] for f in features]
        features = [f[:, prefix:] for f in features]
        if output_fmt == "NCHW":
            height, width = base.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
            features = [f.mT.reshape(f.shape[0], -1, height, width).contiguous() for f in features]
        if return_prefix_tokens:
            features = list(zip(features, prefixes, strict=True))
        if intermediates_only:
            return features
        return base.norm(strip(x, prefix, carried)), features

    def fold(self) -> FoldedPromptModel:
        """An inference-only module in which everything that depends on no image is a constant.

        It shares the backbone and the head with this model, which it puts into eval mode, and keeps the prompts' keys
        and values as they are now: fold again after further training.
        """
        return FoldedPromptModel(self)

    def fit_class_map(self, loader: Iterable[tuple[Tensor, Tensor]], images_per_class: int = 10) -> bool:
        """DA-VPT: map classes to prompts by k-means over the frozen backbone's mean feature of each class.

        Args:
            loader: yields (images [B, C, h, w], labels [B]); read until each class has its images, or to the end.
            images_per_class: how many images of each class are averaged.

        Returns:
            Whether `class_to_prompt` was changed (a map of all classes to one prompt is not used).

        Raises:
            NotImplementedError: the method has no class map.
            ValueError: fewer classes have images than there are prompts.
        """
        return self.method.fit_class_map(self, loader, images_per_class)

    def update_class_map(self) -> bool:
        """DA-VPT: map classes anew by their mean features in the tuned model; call it after an epoch of training.

        The means are taken over the training forwards with labels since the last call; all processes of a distributed
        run must call it together. Returns whether `class_to_prompt` was changed.
        """
        return self.method.update_class_map(self)

    def train(self, mode: bool = True) -> PromptModel:
        """Train mode for prompts and head; the frozen backbone stays in eval mode unless the config says otherwise."""
        super().train(mode)
        if not getattr(self.config, "backbone_train_mode", False):
            self.base.eval()
            for module in (*backbone.head_modules(self.base), self.base.head_drop):
                module.train(mode)
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train: prompts, head, and what else the method trains."""
        return (p for p in self.parameters() if p.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trainable = sum(p.numel() for p in self.trainable_parameters())
        total = sum(p.numel() for p in self.parameters())
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
        )

    def _read(self, tokens: int, carried: int) -> Reading:
        return _reading(self, tokens, carried)

    def _run(
        self, images: Tensor, read: Any, on_block: Any = None, depth: int | None = None
    ) -> tuple[Tensor, int]:
        state = self.method.prepare(self, images.shape[0], read)
        x, ropes = backbone.embed(self.base, images)
        return self.method.run(self.base, state, x, ropes, read, on_block, depth)


class FoldedPromptModel(nn.Module):
    """A `PromptModel` for inference: prompts are constants; made by :meth:`PromptModel.fold`."""

    base: Any

    def __init__(self, model: PromptModel) -> None:
        super().__init__()
        self.base = model.base
        self.config = model.config
        self.method = model.method
        self.pool = model.pool
        self.shortcuts = model.shortcuts
        with torch.no_grad():
            state = self.method.prepare(model, None, model._read)
        # Tensors become buffers, so that they follow `.to()`; what else the state holds is kept as it is.
        self._leaves, self._structure = pytree.tree_flatten(state)
        for i, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor):
                self.register_buffer(f"constant_{i}", leaf.detach().clone())
                self._leaves[i] = None
        super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, h, w] -> logits [B, classes]."""
        leaves = [getattr(self, f"constant_{i}", leaf) for i, leaf in enumerate(self._leaves)]
        state = pytree.tree_unflatten(leaves, self._structure)
        x, ropes = backbone.embed(self.base, images)
        x, carried = self.method.run(self.base, state, x, ropes, self._read)
        return _logits(self.base, self.pool, x, carried, self._read)

    def train(self, mode: bool = True) -> FoldedPromptModel:
        """Raises RuntimeError for `mode` True: the prompts are constants here."""
        if mode:
            raise RuntimeError(
                "a folded model is for inference: its prompts are constants; train the PromptModel it was made of, "
                "then call `fold()` again"
            )
        super().train(False)
        return self

    def _read(self, tokens: int, carried: int) -> Reading:
        return _reading(self, tokens, carried)


def _read_everything(tokens: int, carried: int) -> Reading:
    return Reading()


def _reading(model: PromptModel | FoldedPromptModel, tokens: int, carried: int) -> Reading:
    base, pool = model.base, model.pool
    if not model.shortcuts:
        return Reading()
    if pool == "backbone":
        return backbone.read_backbone(base, tokens, carried)
    if isinstance(base.norm, nn.Identity):
        return Reading(spans=backbone.pool_spans(base, pool, tokens, carried))
    return Reading()  # norm comes before the mean, so that it needs every row


def _logits(base: Any, pool: str, x: Tensor, carried: int, read: Any, pre_logits: bool = False) -> Tensor:
    """What the blocks returned for `read` -> logits [B, classes], or the features [B, D] that the classifier reads."""
    if x.ndim == 2:
        return backbone.classify(base, x, pre_logits)  # the mean over rows, before the norm
    if pool == "backbone":
        if read(x.shape[1], carried).rows is None:
            x = strip(x, base.num_prefix_tokens, carried)
        return base.forward_head(base.norm(x), pre_logits=pre_logits)
    spans = backbone.pool_spans(base, pool, x.shape[1], carried)
    return backbone.classify(base, backbone.mean_of(base.norm(x), spans), pre_logits)
