"""The operations: each file is the specification of one, its operator and its default implementation."""

from fastprompt.ops.gated_blend import gated_blend, gated_blend_reference
from fastprompt.ops.prompt_attention import prompt_attention, prompt_attention_reference
from fastprompt.ops.prompt_cross_attention import (
    AttentionWeights,
    FoldedPrompts,
    ProjectedPrompts,
    choose_form,
    direct_cross_attention,
    fold_prompts,
    folded_cross_attention,
    project_prompts,
    prompt_cross_attention,
    prompt_cross_attention_reference,
)
from fastprompt.ops.row_attention import row_attention

__all__ = [
    "AttentionWeights",
    "FoldedPrompts",
    "ProjectedPrompts",
    "choose_form",
    "direct_cross_attention",
    "fold_prompts",
    "folded_cross_attention",
    "gated_blend",
    "gated_blend_reference",
    "project_prompts",
    "prompt_attention",
    "prompt_attention_reference",
    "prompt_cross_attention",
    "prompt_cross_attention_reference",
    "row_attention",
]
