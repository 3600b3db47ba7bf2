"""GateVPT: shallow prompts whose updates are gated, and a softmax temperature for each block.

Yoo et al., "Improving Visual Prompt Tuning for Self-supervised Vision Transformers", ICML 2023. After block i the
prompt rows become gate_i · prompt_out + (1 - gate_i) · prompt_in, and block i divides its scores by temperature_i.
After block 0 prompts differ from image to image, so they are rows of the sequence; the last block's shortcuts apply.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fastprompt.backbone import Backbone, HeadInput
from fastprompt.config import GateVPTConfig, PromptConfig
from fastprompt.methods.vpt import VPTModel, VPTState


class GateVPTModel(VPTModel):
    """VPT-Shallow with gates and temperatures; see the module's text.

    Attributes:
        gate_logits: [G], for the first G blocks.
        temperature: [L], a parameter or a buffer, or None.
    """

    config_class: ClassVar[type[PromptConfig]] = GateVPTConfig
    config: GateVPTConfig  # type: ignore[assignment]  # `VPTModel` uses VPTConfig only in methods replaced here

    gate_logits: nn.Parameter
    temperature: Tensor | None

    @classmethod
    def check(cls, base: Backbone, config: GateVPTConfig) -> None:  # type: ignore[override]
        depth = len(base.blocks)
        if config.num_gates is not None and config.num_gates > depth:
            raise ValueError(
                f"GateVPTConfig: `num_gates` must be <= {depth}, the model's depth; got {config.num_gates}"
            )

    def add_prompts(self) -> None:
        config, depth = self.config, len(self.base.blocks)
        self._draw_prompts(1, self.base.embed_dim, sets=1)
        like = self.prompts[0]
        num_gates = depth - 1 if config.num_gates is None else config.num_gates
        self.gate_logits = nn.Parameter(like.new_full((num_gates,), -config.gate_init))
        if config.temperature is True:
            self.temperature = nn.Parameter(like.new_ones(depth))
        else:
            fixed = None if config.temperature is False else like.new_full((depth,), config.temperature)
            self.register_buffer("temperature", fixed)

    def prepare(self, batch_size: int | None, reads: HeadInput) -> VPTState:
        temperature = self.temperature
        if isinstance(temperature, nn.Parameter):
            # Clamp in place, so that the gradient is that at the clamped value. Through `data`, so that a second
            # forward before the backward does not invalidate the first.
            temperature.data.clamp_(*self.config.temperature_range)
        state = super().prepare(batch_size, reads)
        temperatures = () if temperature is None else temperature.unbind(0)
        return state._replace(temperatures=temperatures, gates=self.gate_logits.sigmoid().unbind(0))
