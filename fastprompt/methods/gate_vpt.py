"""GateVPT: shallow prompts whose way from block to block is gated, and a softmax temperature for each block.

Yoo et al., "Improving Visual Prompt Tuning for Self-supervised Vision Transformers", ICML 2023. After block i the
prompt rows become gate_i · prompt_out + (1 - gate_i) · prompt_in, and block i divides its scores by temperature_i.
Prompts differ from image to image from block 0 on, so they stand in the sequence; the last block's shortcuts apply.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from fastprompt.config import GateVPTConfig, PromptConfig, VPTConfig
from fastprompt.methods.method import Read
from fastprompt.methods.vpt import VPT, VPTState


class GateVPT(VPT):
    """VPT-Shallow with gates and temperatures; see the module's text."""

    config_class: ClassVar[type[PromptConfig]] = GateVPTConfig

    def __init__(self, config: GateVPTConfig, base: Any) -> None:
        super().__init__(
            VPTConfig(config.num_prompts, deep=False, pool=config.pool, dropout=config.dropout), base
        )
        self.gate_config = config
        self.num_gates = self.depth - 1 if config.num_gates is None else config.num_gates
        if self.num_gates > self.depth:
            raise ValueError(
                f"GateVPTConfig: `num_gates` must be <= {self.depth}, the model's depth; got {config.num_gates}"
            )

    def build(self, model: Any) -> None:
        super().build(model)
        like, config = model.prompts[0], self.gate_config
        model.gate_logits = nn.Parameter(like.new_full((self.num_gates,), -config.gate_init))
        if config.temperature is True:
            model.temperature = nn.Parameter(like.new_ones(self.depth))
        else:
            fixed = None if config.temperature is False else like.new_full((self.depth,), config.temperature)
            model.register_buffer("temperature", fixed)

    def prepare(self, model: Any, batch_size: int | None, read: Read) -> VPTState:
        if isinstance(model.temperature, nn.Parameter):
            # A projection, in place: a value outside moves to the edge and gets its gradient there. Through `data`, so
            # that a second forward before the backward does not invalidate the first.
            model.temperature.data.clamp_(*self.gate_config.temperature_range)
        state = super().prepare(model, batch_size, read)
        temperatures = () if model.temperature is None else model.temperature.unbind(0)
        return state._replace(temperatures=temperatures, gates=model.gate_logits.sigmoid().unbind(0))
