"""Visual Prompt Tuning: shallow, deep and partial deep (Jia et al., ECCV 2022), with the exact shortcuts.

In the official code prompts are rows of the sequence. A block with its own prompts cuts the previous block's prompt
rows out, so that what a block computes for its prompt rows is read by nobody, unless the next block carries them on or
the head averages them. Such prompts are keys and values only here, made once for the whole batch; they stand in the
sequence only from the block on whose prompt rows are read. Without shortcuts every block's prompts stand in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastprompt import backbone, blocks
from fastprompt.blocks import BlockPrompts, Context
from fastprompt.config import PromptConfig, VPTConfig
from fastprompt.methods.method import PromptMethod, Read, run_reading


class VPTState(NamedTuple):
    """Each block's prompts as keys and values, or as the rows that enter it in place of the carried ones, or None.

    GateVPT adds a temperature for each block and a gate for the first of them.
    """

    prompts: tuple[BlockPrompts | None, ...]
    rows: tuple[Tensor | None, ...]
    temperatures: tuple[Tensor, ...] = ()
    gates: tuple[Tensor, ...] = ()


class VPT(PromptMethod):
    """Prompts as tokens; see the module's text."""

    config_class: ClassVar[type[PromptConfig]] = VPTConfig

    def __init__(self, config: VPTConfig, base: Any) -> None:
        self.config = config
        self.depth = len(base.blocks)
        if config.blocks is not None and config.blocks > self.depth:
            raise ValueError(
                f"VPTConfig: `blocks` must be <= {self.depth}, the model's depth; got {config.blocks}"
            )
        # How many blocks have prompts of their own; shallow is the case of one.
        self.prompted = (config.blocks or self.depth) if config.deep else 1
        reads_prompts = config.pool in ("all", "prompt")
        self.carry_from: int | None = None
        if self.prompted < self.depth or reads_prompts:
            self.carry_from = self.prompted - 1
        if config.num_prompts == 0:
            self.carry_from = None

    def build(self, model: Any) -> None:
        base, config = model.base, self.config
        like = next(base.parameters())
        width = config.project or base.embed_dim
        height, breadth = backbone.patch_size(base)
        bound = math.sqrt(6.0 / (3 * height * breadth + width))
        sets = 1 if config.shared_across_blocks else self.prompted
        model.prompts = nn.ParameterList(
            nn.Parameter(like.new_empty(config.num_prompts, width).uniform_(-bound, bound))
            for _ in range(sets)
        )
        model.prompt_project = None
        if config.project is not None:
            model.prompt_project = nn.Linear(width, base.embed_dim, device=like.device, dtype=like.dtype)
            nn.init.kaiming_normal_(model.prompt_project.weight, a=0, mode="fan_out")

    def prepare(self, model: Any, batch_size: int | None, read: Read) -> VPTState:
        base = model.base
        prompts: list[BlockPrompts | None] = [None] * self.depth
        rows: list[Tensor | None] = [None] * self.depth
        if self.config.num_prompts == 0:
            return VPTState(tuple(prompts), tuple(rows))
        folded = read(0, 0).rows is not None and blocks.folds(base.blocks[-1], backbone.has_rope(base))
        for i in range(self.prompted):
            p = self.prompts_of(model, i, batch_size)
            if i == self.carry_from or not model.shortcuts:
                rows[i] = p
            else:
                last = i == self.depth - 1
                prompts[i] = blocks.prepare_prompts(base.blocks[i], p, folded=folded and last)
        return VPTState(tuple(prompts), tuple(rows))

    def run(
        self,
        base: Any,
        state: VPTState,
        x: Tensor,
        ropes: list[Tensor | None],
        read: Read,
        on_block: Callable[[int, Tensor], None] | None = None,
        depth: int | None = None,
    ) -> tuple[Tensor, int]:
        prefix, carried = base.num_prefix_tokens, 0
        normed: Tensor | None = None
        if on_block is not None:
            on_block(-1, x)
        for i, (block, following) in enumerate(pairwise([*base.blocks[:depth], None])):
            rows = state.rows[i]
            if rows is not None:
                entering = rows.expand(x.shape[0], -1, -1)
                x = torch.cat([x[:, :prefix], entering, x[:, prefix + carried :]], dim=1)
                carried, normed = entering.shape[1], None
            reading = read(x.shape[1], carried) if i == self.depth - 1 else backbone.Reading()
            temperature = state.temperatures[i] if state.temperatures else None
            gate = state.gates[i] if i < len(state.gates) and carried else None
            context = Context(ropes[i], carried, prefix, temperature, gate, normed=normed)
            if gate is not None and following is not None:
                x, normed = _run_gated(base, block, x, following, state.prompts[i], context)
            else:
                x, normed = run_reading(base, block, x, reading, state.prompts[i], context), None
            if on_block is not None:
                on_block(i, strip(x, prefix, carried))
        return x, carried

    def prompts_of(self, model: Any, i: int, batch_size: int | None) -> Tensor:
        """The prompts of block i: [P, D], or [B, P, D] under prompt dropout, which each image draws for itself."""
        p = model.prompts[0 if self.config.shared_across_blocks else i]
        if model.prompt_project is not None:
            p = model.prompt_project(p)
        # Prompts may be kept in float32 beside a bfloat16 backbone.
        p = self._normed(model, p).to(next(model.base.parameters()).dtype)
        if self.config.dropout > 0 and model.training and batch_size is not None:
            p = F.dropout(p.expand(batch_size, -1, -1), self.config.dropout)
        return p

    def _normed(self, model: Any, p: Tensor) -> Tensor:
        """Prompts [P, D] as they enter the model; DA-VPT norms them."""
        return p


def _run_gated(base: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`fastprompt.blocks.run_gated`; recomputed in the backward if `base` has gradient checkpointing on."""
    if getattr(base, "grad_checkpointing", False):
        return checkpoint(blocks.run_gated, *arguments, use_reentrant=False)
    return blocks.run_gated(*arguments)


def strip(x: Tensor, prefix: int, carried: int) -> Tensor:
    """Tokens [B, N + carried, D] without the prompts that stand after the prefix tokens."""
    if carried == 0:
        return x
    return torch.cat([x[:, :prefix], x[:, prefix + carried :]], dim=1)
