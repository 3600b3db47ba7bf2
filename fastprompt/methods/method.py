"""What a method is to a `PromptModel`: parameters, what is made of them once, and a run through the blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastprompt import blocks
from fastprompt.backbone import Reading
from fastprompt.blocks import BlockPrompts, Context
from fastprompt.config import PromptConfig

# (rows of the last block's sequence, carried prompts among them) -> what the head reads.
Read = Callable[[int, int], Reading]

METHODS: dict[type[PromptConfig], type[PromptMethod]] = {}


class Observer(Protocol):
    """Watches the tokens of one forward and makes a loss of them."""

    def see(self, block: int, tokens: Tensor) -> None:
        """As `on_block` of :meth:`PromptMethod.run`."""

    def loss(self, features: Tensor) -> Tensor:
        """The method's loss, a scalar; `features` [B, D] are what the head reads, after pooling and norm."""


class PromptMethod(ABC):
    """One method for one model's depth; holds no tensors (they lie on the `PromptModel`, under their public names)."""

    config_class: ClassVar[type[PromptConfig]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        METHODS[cls.config_class] = cls

    @abstractmethod
    def __init__(self, config: Any, base: nn.Module) -> None:
        """Raises ValueError or NotImplementedError where `config` does not fit `base`; changes nothing."""

    @abstractmethod
    def build(self, model: nn.Module) -> None:
        """Register the method's parameters and buffers on the PromptModel."""

    @abstractmethod
    def prepare(self, model: Any, batch_size: int | None, read: Read) -> Any:
        """What the blocks read of the prompts, made once for a whole batch: a pytree of tensors.

        `batch_size` None asks for what depends on no image (inference); it is stored by `PromptModel.fold`.
        """

    @abstractmethod
    def run(
        self,
        base: Any,
        state: Any,
        x: Tensor,
        ropes: list[Tensor | None],
        read: Read,
        on_block: Callable[[int, Tensor], None] | None = None,
        depth: int | None = None,
    ) -> tuple[Tensor, int]:
        """Tokens x [B, N, D] through the blocks.

        Args:
            base: the timm model.
            state: what `prepare` made.
            x: tokens as they enter block 0.
            ropes: each block's rotary embedding or None.
            read: what the head reads of the last block; the rows it does not read need not be computed.
            on_block: called before the first block with -1 and after each with its index, and with the tokens without
                prompts, [B, N, D].
            depth: stop after so many blocks; None for all.

        Returns:
            What `read` asked for ([B, R, D] rows, [B, D] mean or all rows), and the number of prompts among the rows.
        """

    def observe(self, model: Any, labels: Tensor) -> Observer | None:
        """What watches a forward with labels [B] to make the method's own loss; None for a method without one."""
        return None

    def fit_class_map(
        self, model: Any, loader: Iterable[tuple[Tensor, Tensor]], images_per_class: int
    ) -> bool:
        """See :meth:`fastprompt.PromptModel.fit_class_map`."""
        raise NotImplementedError(f"{type(self).__name__} maps no classes to prompts; DA-VPT does")

    def update_class_map(self, model: Any) -> bool:
        """See :meth:`fastprompt.PromptModel.update_class_map`."""
        raise NotImplementedError(f"{type(self).__name__} maps no classes to prompts; DA-VPT does")


def method_for(config: PromptConfig, base: nn.Module) -> PromptMethod:
    """The method that `config` configures, checked against `base`; raises TypeError for another kind of object."""
    if type(config) not in METHODS:
        known = ", ".join(cls.__name__ for cls in METHODS)
        raise TypeError(f"`config` must be one of {known}; got {type(config).__name__}")
    return METHODS[type(config)](config, base)


def run_reading(
    base: Any, block: Any, x: Tensor, reading: Reading, prompts: BlockPrompts | None, context: Context
) -> Tensor:
    """Run `block` for what is read of it; recomputed in the backward if `base` has gradient checkpointing on."""
    function: Callable[..., Tensor] = blocks.run_block
    what: tuple[Any, ...] = ()
    if reading.rows is not None:
        function, what = blocks.run_rows, (reading.rows,)
    elif reading.spans is not None:
        function, what = blocks.run_mean, (reading.spans,)
    if getattr(base, "grad_checkpointing", False):
        return checkpoint(function, block, x, *what, prompts, context, use_reentrant=False)
    return function(block, x, *what, prompts, context)
