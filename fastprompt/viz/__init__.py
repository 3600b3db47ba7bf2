"""Analyse prompts: gates, attention, class maps, similarities and t-SNE, as numbers and figures (docs/seeing.md).

Functions named `plot_...` return a `matplotlib.figure.Figure` and do not change matplotlib's global state; the others
return tensors and need neither matplotlib nor, except :func:`tsne`, scikit-learn.
"""

from fastprompt.viz.attention import attention_to_prompts
from fastprompt.viz.figures import (
    plot_attention,
    plot_class_map,
    plot_gates,
    plot_prompt_similarity,
    plot_tsne,
)
from fastprompt.viz.prompts import (
    Embedding,
    Gates,
    block_similarity,
    centroid_distances,
    class_distances,
    gate_values,
    prompt_similarity,
    prompts_and_tokens,
    proxy_distances,
    tsne,
)

__all__ = [
    "Embedding",
    "Gates",
    "attention_to_prompts",
    "block_similarity",
    "centroid_distances",
    "class_distances",
    "gate_values",
    "plot_attention",
    "plot_class_map",
    "plot_gates",
    "plot_prompt_similarity",
    "plot_tsne",
    "prompt_similarity",
    "prompts_and_tokens",
    "proxy_distances",
    "tsne",
]
