"""Run a prompted model up to one block, and check the common arguments of this package's functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastprompt import backbone
from fastprompt.backbone import HeadInput
from fastprompt.methods import VPTModel
from fastprompt.model import PromptModel

Loader: TypeAlias = Iterable[tuple[Tensor, Tensor]]


class Entering(NamedTuple):
    """Input of a block: image rows `x` [B, N, D] and prompts [P, D] or, changed by earlier blocks, [B, P, D].

    `rope` is the block's rotary embedding or None.
    """

    x: Tensor
    prompts: Tensor
    rope: Tensor | None


def entering(model: PromptModel, images: Tensor, block: int) -> Entering:
    """Run the blocks before `block`: images [B, C, h, w] -> its input."""
    base, reads = model.base, HeadInput()
    x, ropes = backbone.embed(base, images)
    x, carried = model.run(base, model.prepare(len(images), reads), x, ropes, reads, depth=block)
    prefix = base.num_prefix_tokens
    own = own_prompts(model, block)
    prompts = x[:, prefix : prefix + carried] if own is None else own
    return Entering(backbone.strip(base, x, carried), prompts, ropes[block])


def prompted_blocks(model: PromptModel) -> int:
    """Return the number of blocks, from the first, that have their own prompts."""
    return model.prompted if isinstance(model, VPTModel) else len(model.prompts)


def own_prompts(model: PromptModel, block: int) -> Tensor | None:
    """Return the prompts [P, D] that enter at `block`, after projection and norm; None if it has none."""
    if block >= prompted_blocks(model):
        return None
    return model.prompts_of(block, None) if isinstance(model, VPTModel) else model.prompts[block]


def batches(model: PromptModel, loader: Loader, caller: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of `loader` on the model's device; raise ValueError or TypeError for wrong or no batches."""
    device, empty = next(model.parameters()).device, True
    for images, labels in loader:
        empty = False
        images, labels = images.to(device), labels.to(device)
        backbone.check_images(model.base, images, caller)
        backbone.check_labels(model.base, images, labels, caller)
        yield images, labels
    if empty:
        raise ValueError(f"`{caller}`: `loader` is empty")


def checked_block(model: PromptModel, block: int, caller: str) -> int:
    """Return `block` counted from the front; raise TypeError or ValueError unless `model` has prompts and the block."""
    check_model(model, caller)
    depth = len(model.base.blocks)
    if not isinstance(block, int) or isinstance(block, bool):
        raise TypeError(f"`{caller}`: `block` must be an integer; got {block!r}; pass one of 0..{depth - 1}")
    if not -depth <= block < depth:
        raise ValueError(
            f"`{caller}`: `block` must be in {-depth}..{depth - 1}, the model's blocks; got {block}"
        )
    return block % depth


def check_model(model: PromptModel, caller: str) -> None:
    """Raise TypeError unless `model` is a `PromptModel`, and ValueError unless it has prompts."""
    if not isinstance(model, PromptModel):
        raise TypeError(
            f"`{caller}`: `model` must be a PromptModel; got {type(model).__name__}; make one with `get_prompt_model` "
            "(a folded model's prompts are constants: pass the model it was made from)"
        )
    if not len(model.prompts[0]):
        raise ValueError(f"`{caller}`: `model` has no prompts (num_prompts=0)")


@contextmanager
def evaluating(model: PromptModel) -> Iterator[None]:
    """Put the model into eval mode without gradients; restore each module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
