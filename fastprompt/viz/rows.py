"""What enters one block of a prompted model, had by running the blocks before it and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastprompt import backbone
from fastprompt.backbone import HeadInput, strip
from fastprompt.methods import VPTModel
from fastprompt.model import PromptModel


class Entering(NamedTuple):
    """What enters a block: image rows `x` [B, N, D] and prompts [P, D] or, changed by earlier blocks, [B, P, D].

    `rope` is the block's rotary embedding or None.
    """

    x: Tensor
    prompts: Tensor
    rope: Tensor | None


def entering(model: PromptModel, images: Tensor, block: int) -> Entering:
    """images [B, C, h, w] -> what enters `block`; runs the blocks before it."""
    base = model.base
    state = model.prepare(images.shape[0], HeadInput())
    x, ropes = backbone.embed(base, images)
    x, carried = model.run(base, state, x, ropes, HeadInput(), depth=block)
    prefix = base.num_prefix_tokens
    own = own_prompts(model, block)
    prompts = x[:, prefix : prefix + carried] if own is None else own
    return Entering(strip(base, x, carried), prompts, ropes[block])


def own_prompts(model: PromptModel, block: int) -> Tensor | None:
    """The prompts [P, D] that enter the model at `block`, after projection and norm where the method has them.

    None for a block that carries the prompts of an earlier one on.
    """
    if not isinstance(model, VPTModel):
        return model.prompts[block]
    return model.prompts_of(block, None) if block < model.prompted else None


def checked_block(model: PromptModel, block: int, caller: str) -> int:
    """`block`, counted from the front; raises TypeError or ValueError for what has no such block, or no prompts."""
    checked_model(model, caller)
    depth = len(model.base.blocks)
    if not isinstance(block, int) or isinstance(block, bool):
        raise TypeError(f"`{caller}`: `block` must be an integer; got {block!r}; pass one of 0..{depth - 1}")
    if not -depth <= block < depth:
        raise ValueError(
            f"`{caller}`: `block` must lie in {-depth}..{depth - 1}, the model's blocks; got {block}"
        )
    return block % depth


def checked_model(model: PromptModel, caller: str) -> None:
    """Raises TypeError for what is no `PromptModel`, ValueError for one without prompts."""
    if not isinstance(model, PromptModel):
        raise TypeError(
            f"`{caller}`: `model` must be a PromptModel; got {type(model).__name__}; make one by `get_prompt_model` "
            "(a folded model's prompts are constants: pass the model it was made of)"
        )
    if getattr(model.config, "num_prompts", 1) == 0:
        raise ValueError(f"`{caller}`: `model` has no prompts to show (num_prompts=0)")


@contextmanager
def evaluating(model: PromptModel) -> Iterator[None]:
    """The model in eval mode and without gradients; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
