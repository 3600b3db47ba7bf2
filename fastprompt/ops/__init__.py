"""The operations. Each has a file with its specification, its operator and its default implementation."""

from fastprompt.ops.folded_cross_attention import (
    FoldedPrompts,
    folded_cross_attention,
    folded_cross_attention_reference,
)
from fastprompt.ops.gated_blend import gated_blend, gated_blend_reference
from fastprompt.ops.norm import Norm
from fastprompt.ops.packed_prompt_attention import packed_prompt_attention
from fastprompt.ops.prompt_attention import prompt_attention, prompt_attention_reference
from fastprompt.ops.prompt_cross_attention import (
    AttentionWeights,
    ProjectedPrompts,
    choose_form,
    direct_cross_attention,
    fold_prompts,
    project_prompts,
    prompt_cross_attention,
    prompt_cross_attention_reference,
)
from fastprompt.ops.residual_norm import residual_norm, residual_norm_reference
from fastprompt.ops.row_attention import (
    folded_row_attention,
    folded_row_attention_reference,
    row_attention,
)

__all__ = [
    "AttentionWeights",
    "FoldedPrompts",
    "Norm",
    "ProjectedPrompts",
    "choose_form",
    "direct_cross_attention",
    "fold_prompts",
    "folded_cross_attention",
    "folded_cross_attention_reference",
    "folded_row_attention",
    "folded_row_attention_reference",
    "gated_blend",
    "gated_blend_reference",
    "packed_prompt_attention",
    "project_prompts",
    "prompt_attention",
    "prompt_attention_reference",
    "prompt_cross_attention",
    "prompt_cross_attention_reference",
    "residual_norm",
    "residual_norm_reference",
    "row_attention",
]
