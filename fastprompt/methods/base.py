"""`PromptModel`: a frozen timm model with prompts and a trained head; the base class of all methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastprompt import backbone
from fastprompt.backbone import Backbone, HeadInput
from fastprompt.blocks import Recompute
from fastprompt.config import Pool, PromptConfig
from fastprompt.ops.operator import exporting

# (block, its input tokens [B, N, D], the number of carried prompts among them)
OnBlock: TypeAlias = Callable[[int, Tensor, int], None]

MODELS: dict[type[PromptConfig], type[PromptModel]] = {}


class PromptOutput(NamedTuple):
    """Output of a `PromptModel` called with labels: logits [B, classes] and the method's own loss, a scalar.

    Train on ``cross_entropy(logits, labels) + method_loss``; `method_loss` is 0 for methods without one.
    """

    logits: Tensor
    method_loss: Tensor


class PromptModel(nn.Module, ABC):
    """A timm model with prompts; created by :func:`fastprompt.get_prompt_model`.

    A method is a subclass: :meth:`check` checks that it supports the timm model, :meth:`add_prompts` registers its
    parameters, :meth:`prepare` computes, once per batch, the prompt tensors that the blocks need, and :meth:`run` runs
    the blocks. Its `config_class` registers it.

    Attributes:
        base: the timm model, frozen except for its head.
        prompts: `ParameterList`, one [P, D] for each prompted block ([P, project] with a projection).
        config: the method's configuration.
        shortcuts: whether to skip computation that affects neither logits nor gradients; may be set at any time.
        recompute: the part of each block that the backward computes again; may be set at any time.
    """

    config_class: ClassVar[type[PromptConfig]]

    base: Backbone
    prompts: nn.ParameterList
    config: PromptConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "config_class" in cls.__dict__:
            MODELS[cls.config_class] = cls

    def __init__(
        self,
        base: Backbone,
        config: PromptConfig,
        *,
        shortcuts: bool = True,
        recompute: Recompute | None = None,
    ) -> None:
        self.check(base, config)
        super().__init__()
        base.requires_grad_(False)
        for head in backbone.head_modules(base):
            head.requires_grad_(True)
        self.base = base
        self.config = config
        self.shortcuts = shortcuts
        self.recompute = recompute
        self.add_prompts()
        self.train(base.training)

    @classmethod
    @abstractmethod
    def check(cls, base: Backbone, config: Any) -> None:
        """Raise ValueError or NotImplementedError unless `config` fits `base`; change nothing."""

    @abstractmethod
    def add_prompts(self) -> None:
        """Register the method's parameters and buffers."""

    @abstractmethod
    def prepare(self, batch_size: int | None, reads: HeadInput) -> Any:
        """Compute the prompt tensors that the blocks need, once for a whole batch.

        Args:
            batch_size: B; None if the result must not depend on a batch, so that :meth:`fold` can store it.
            reads: the rows of the last block that the head reads.

        Returns:
            A pytree, the `state` of :meth:`run`.
        """

    @staticmethod
    @abstractmethod
    def run(
        base: Backbone,
        state: Any,
        x: Tensor,
        ropes: list[Tensor | None],
        reads: HeadInput,
        on_block: OnBlock | None = None,
        depth: int | None = None,
        recompute: Recompute | None = None,
    ) -> tuple[Tensor, int]:
        """Run tokens through the blocks. Prompts come only from `state`, so that a folded model needs none.

        Args:
            base: the timm model.
            state: the result of :meth:`prepare`.
            x: [B, N, D], the input of block 0.
            ropes: each block's rotary embedding or None.
            reads: the rows of the last block that the head reads; other rows need not be computed.
            on_block: called before each block.
            depth: the number of blocks to run; None for all.
            recompute: the part of each block that the backward computes again, or None.

        Returns:
            The output selected by `reads` ([B, R, D] rows, [B, D] mean, or all rows), and the number of prompts among
            all rows.
        """

    @property
    def carried(self) -> int:
        """Number of prompts among the rows of the last block."""
        return 0

    @property
    def pool(self) -> Pool:
        """The input of the head: "backbone", "all", "image" or "prompt"."""
        return self.config.pool

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | PromptOutput:
        """images [B, C, h, w] -> logits [B, classes]; with `labels` [B], a :class:`PromptOutput`.

        Raises ValueError or TypeError if the model does not take these images or labels.
        """
        backbone.check_images(self.base, images, "PromptModel")
        if labels is not None:
            backbone.check_labels(self.base, images, labels, "PromptModel")
        reads = self._head_input()
        x, ropes = backbone.embed(self.base, images)
        state = self.prepare(len(x), reads)
        x, carried = self.run(self.base, state, x, ropes, reads, recompute=self.recompute)
        _, logits = backbone.apply_head(self.base, x, reads, self.pool, carried)
        return logits if labels is None else PromptOutput(logits, logits.new_zeros(()))

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, C, h, w] -> all tokens after the final norm, [B, N, D], for `forward_head`.

        They include prompts, after the prefix tokens, only if `pool` averages them ("all", "prompt"). Every row of the
        last block is computed, so calling the model itself is cheaper.
        """
        x, carried = self._all_rows(images, "forward_features")
        if self.pool not in ("all", "prompt"):
            x = backbone.strip(self.base, x, carried)
        return self.base.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, D] of `forward_features` -> logits [B, classes], or pooled features [B, D] if `pre_logits`."""
        if x.ndim != 3 or x.shape[2] != self.base.embed_dim:
            raise ValueError(
                f"`forward_head`: `x` must be [B, N, D={self.base.embed_dim}]; got {tuple(x.shape)}; "
                "pass the result of `forward_features`"
            )
        if self.pool == "backbone":
            return self.base.forward_head(x, pre_logits=pre_logits)
        carried = self.prompts[-1].shape[0] if self.pool in ("all", "prompt") else 0
        features = backbone.pooled_features(self.base, backbone.mean_of(self.base, x, self.pool, carried))
        return features if pre_logits else self.base.head(features)

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
            indices: a list of blocks, an int n for the last n blocks, or None for all.
            return_prefix_tokens: also return each block's prefix tokens.
            norm: apply the final norm to each.
            stop_early: do not run the blocks after the last requested one.
            output_fmt: "NCHW" for [B, D, H', W'] maps, "NLC" for [B, N, D] rows.
            intermediates_only: leave out the final features.

        Returns:
            (final tokens [B, N, D], list of features), or only the list.
        """
        caller = "forward_intermediates"
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"`{caller}`: `output_fmt` must be 'NCHW' or 'NLC'; got {output_fmt!r}")
        base, prefix = self.base, self.base.num_prefix_tokens
        take = _block_indices(indices, len(base.blocks), caller)
        rows: dict[int, Tensor] = {}

        def keep(block: int, x: Tensor, carried: int) -> None:
            if block - 1 in take:
                rows[block - 1] = backbone.strip(base, x, carried)

        depth = max(take) + 1 if stop_early else len(base.blocks)
        x, carried = self._all_rows(images, caller, keep, depth)
        x = backbone.strip(base, x, carried)
        keep(depth, x, 0)
        tokens = [base.norm(rows[i]) if norm else rows[i] for i in sorted(take)]
        features: list[Any] = [t[:, prefix:] for t in tokens]
        if output_fmt == "NCHW":
            height, width = base.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
            features = [f.mT.reshape(f.shape[0], -1, height, width).contiguous() for f in features]
        if return_prefix_tokens:
            features = [(f, t[:, :prefix]) for f, t in zip(features, tokens, strict=True)]
        return features if intermediates_only else (base.norm(x), features)

    def fold(self) -> FoldedPromptModel:
        """Return an inference-only module in which everything that does not depend on the images is a constant.

        It shares the backbone and the head with this model, puts them into eval mode, and stores the prompts' current
        keys and values: fold again after further training.
        """
        return FoldedPromptModel(self)

    def train(self, mode: bool = True) -> PromptModel:
        """Set the mode of prompts and head; the frozen backbone follows only with `backbone_train_mode`."""
        super().train(mode)
        if not self.config.backbone_train_mode:
            self.base.eval()
            for module in (*backbone.head_modules(self.base), self.base.head_drop):
                module.train(mode)
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Return the trained parameters: prompts, head, and others of the method."""
        return (p for p in self.parameters() if p.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters."""
        trainable = sum(p.numel() for p in self.trainable_parameters())
        total = sum(p.numel() for p in self.parameters())
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
        )

    def _head_input(self) -> HeadInput:
        return backbone.head_input(self.base, self.pool, self.carried) if self.shortcuts else HeadInput()

    def _all_rows(
        self, images: Tensor, caller: str, on_block: OnBlock | None = None, depth: int | None = None
    ) -> tuple[Tensor, int]:
        """Run all rows of every block: images [B, C, h, w] -> rows [B, N + carried, D], and `carried`."""
        backbone.check_images(self.base, images, caller)
        x, ropes = backbone.embed(self.base, images)
        state = self.prepare(len(x), HeadInput())
        return self.run(self.base, state, x, ropes, HeadInput(), on_block, depth, self.recompute)


class FoldedPromptModel(nn.Module):
    """A `PromptModel` for inference: prompts are constants; created by :meth:`PromptModel.fold`."""

    base: Backbone

    def __init__(self, model: PromptModel) -> None:
        super().__init__()
        self.base = model.base
        self.config = model.config
        self.pool = model.pool
        self.shortcuts = model.shortcuts
        self._run = type(model).run
        self._reads = model._head_input()
        with torch.no_grad():
            state = model.prepare(None, self._reads)
        # Tensors become buffers, so that they follow `.to()`; other values are stored unchanged.
        self._leaves, self._structure = pytree.tree_flatten(state)
        for i, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor):
                self.register_buffer(f"constant_{i}", leaf.detach().clone())
                self._leaves[i] = None
        super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, h, w] -> logits [B, classes]."""
        if exporting():  # a change of the grad mode would be an operator of the program
            return self._logits(images)
        with torch.no_grad():
            return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        backbone.check_images(self.base, images, "FoldedPromptModel")
        leaves = [getattr(self, f"constant_{i}", leaf) for i, leaf in enumerate(self._leaves)]
        state = pytree.tree_unflatten(leaves, self._structure)
        x, ropes = backbone.embed(self.base, images)
        x, carried = self._run(self.base, state, x, ropes, self._reads)
        return backbone.apply_head(self.base, x, self._reads, self.pool, carried)[1]

    def train(self, mode: bool = True) -> FoldedPromptModel:
        """Raise RuntimeError for `mode` True: the prompts are constants here."""
        if mode:
            raise RuntimeError(
                "a folded model is for inference: its prompts are constants; train the PromptModel it was made from, "
                "then call `fold()` again"
            )
        super().train(False)
        return self


def _block_indices(indices: int | list[int] | None, depth: int, caller: str) -> set[int]:
    """Return the blocks selected by timm's `indices`."""
    if indices is None:
        return set(range(depth))
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise ValueError(
                f"`{caller}`: `indices` must be a list, or 1 to {depth} for the last blocks; got {indices}"
            )
        return set(range(depth - indices, depth))
    if not indices or not all(isinstance(i, int) and -depth <= i < depth for i in indices):
        raise ValueError(
            f"`{caller}`: `indices` must be an int or a list of blocks in {-depth}..{depth - 1}; got {indices!r}"
        )
    return {i % depth for i in indices}
