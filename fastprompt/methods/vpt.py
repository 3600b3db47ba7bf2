"""Visual Prompt Tuning: shallow, deep and partial deep (Jia et al., ECCV 2022), with the exact shortcuts.

In the official code prompts are rows of the sequence. A block with its own prompts removes the previous block's prompt
rows, so prompt rows of a block's output are used only if the next block carries them on or the head averages them. All
other prompts are only keys and values here, prepared once for the whole batch; prompts are rows of the sequence from
the first block whose prompt rows are used. Without shortcuts they are rows of every block.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import backbone, blocks
from fastprompt.backbone import Backbone, HeadInput
from fastprompt.blocks import BlockPrompts, Context, Recompute
from fastprompt.config import PromptConfig, VPTConfig
from fastprompt.methods.base import OnBlock, PromptModel


class VPTState(NamedTuple):
    """Prepared prompts: for each block keys and values, or rows that replace the carried ones, or None.

    GateVPT adds a temperature for each block and gates for the first blocks, DA-VPT `masked` prompt rows.
    """

    prompts: tuple[BlockPrompts | None, ...]
    rows: tuple[Tensor | None, ...]
    temperatures: tuple[Tensor, ...] = ()
    gates: tuple[Tensor, ...] = ()
    masked: bool = False


class VPTModel(PromptModel):
    """A timm model with prompts as tokens; see the module's text.

    Attributes:
        prompted: the number of blocks, from the first, that have their own prompts.
        prompt_project: `Linear` from `config.project` to the model's width, or None.
    """

    config_class: ClassVar[type[PromptConfig]] = VPTConfig
    config: VPTConfig

    prompt_project: nn.Linear | None

    @classmethod
    def check(cls, base: Backbone, config: VPTConfig) -> None:
        if config.blocks is not None and config.blocks > len(base.blocks):
            raise ValueError(
                f"VPTConfig: `blocks` must be <= {len(base.blocks)}, the model's depth; got {config.blocks}"
            )

    def add_prompts(self) -> None:
        base, config = self.base, self.config
        prompted = (config.blocks or len(base.blocks)) if config.deep else 1
        width = config.project or base.embed_dim
        self._draw_prompts(prompted, width, sets=1 if config.shared_across_blocks else prompted)
        if config.project is not None:
            like = self.prompts[0]
            self.prompt_project = nn.Linear(width, base.embed_dim, device=like.device, dtype=like.dtype)
            nn.init.kaiming_normal_(self.prompt_project.weight, a=0, mode="fan_out")

    def _draw_prompts(self, prompted: int, width: int, sets: int) -> None:
        """Register `sets` prompts [P, width] for `prompted` blocks, drawn from the paper's interval."""
        self.prompted = prompted
        self.prompt_project = None
        height, breadth = backbone.patch_size(self.base)
        bound = math.sqrt(6.0 / (3 * height * breadth + width))
        like = next(self.base.parameters())
        self.prompts = nn.ParameterList(
            nn.Parameter(like.new_empty(self.config.num_prompts, width).uniform_(-bound, bound))
            for _ in range(sets)
        )

    @property
    def carried(self) -> int:
        in_sequence = self._carry_from is not None or not self.shortcuts
        return self.prompts[-1].shape[0] if in_sequence else 0

    @property
    def _carry_from(self) -> int | None:
        """The first block whose prompts are rows of the sequence because their outputs are used, or None."""
        reads_prompts = self.pool in ("all", "prompt")
        if self.config.num_prompts == 0 or not (self.prompted < len(self.base.blocks) or reads_prompts):
            return None
        return self.prompted - 1

    def prepare(self, batch_size: int | None, reads: HeadInput) -> VPTState:
        base_blocks = backbone.blocks_of(self.base)
        depth = len(base_blocks)
        prompts: list[BlockPrompts | None] = [None] * depth
        rows: list[Tensor | None] = [None] * depth
        if self.config.num_prompts == 0:
            return VPTState(tuple(prompts), tuple(rows))
        folded = reads.rows is not None and blocks.folds(base_blocks[-1], backbone.has_rope(self.base))
        for i, block in enumerate(base_blocks[: self.prompted]):
            p = self.prompts_of(i, batch_size)
            if i == self._carry_from or not self.shortcuts:
                rows[i] = p
            else:
                prompts[i] = blocks.prepare_prompts(block, p, folded=folded and i == depth - 1)
        return VPTState(tuple(prompts), tuple(rows))

    @staticmethod
    def run(
        base: Backbone,
        state: VPTState,
        x: Tensor,
        ropes: list[Tensor | None],
        reads: HeadInput,
        on_block: OnBlock | None = None,
        depth: int | None = None,
        recompute: Recompute | None = None,
    ) -> tuple[Tensor, int]:
        recompute = blocks.recompute_of(base, recompute)
        base_blocks = backbone.blocks_of(base)
        prefix, carried, normed = base.num_prefix_tokens, 0, None
        stop = len(base_blocks) if depth is None else depth
        for i, block in enumerate(base_blocks[:stop]):
            if on_block is not None:
                on_block(i, x, carried)
            rows = state.rows[i]
            if rows is not None:
                x = torch.cat([x[:, :prefix], rows.expand(x.shape[0], -1, -1), x[:, prefix + carried :]], 1)
                carried, normed = rows.shape[-2], None
            last = i == len(base_blocks) - 1
            goes_on = i + 1 < stop and state.rows[i + 1] is None  # as they are, to the next block's norm1
            context = Context(
                rope=ropes[i],
                prefix=prefix,
                carried=carried,
                masked=state.masked and carried > 0,
                temperature=state.temperatures[i] if state.temperatures else None,
                gate=state.gates[i] if i < len(state.gates) and carried > 0 else None,
                following=base_blocks[i + 1] if goes_on else None,
                normed=normed,
                recompute=recompute,
            )
            if last and reads.rows is not None:
                x = blocks.run_rows(block, x, state.prompts[i], context, reads.rows)
            else:
                x, normed = blocks.run_block(
                    block, x, state.prompts[i], context, reads.spans if last else None
                )
        return x, carried

    def prompts_of(self, block: int, batch_size: int | None) -> Tensor:
        """Return the prompts that enter `block`, one of the first `prompted`.

        They are [P, D], or [B, P, D] under prompt dropout, which differs by image.
        """
        p = self.prompts[block if len(self.prompts) > 1 else 0]
        if self.prompt_project is not None:
            p = self.prompt_project(p)
        # Prompts may be float32 with a bfloat16 backbone.
        p = self.norm_prompts(p).to(next(self.base.parameters()).dtype)
        if self.config.dropout > 0 and self.training and batch_size is not None:
            p = F.dropout(p.expand(batch_size, -1, -1), self.config.dropout)
        return p

    def norm_prompts(self, p: Tensor) -> Tensor:
        """Return prompts [P, D] as they enter the model; DA-VPT normalizes them."""
        return p
