"""`get_prompt_model`: check the timm model and build the model class of a configuration."""

from __future__ import annotations

from typing import cast, get_args

from torch import nn

from fastprompt import backbone
from fastprompt.backbone import Backbone
from fastprompt.blocks import Recompute
from fastprompt.config import PromptConfig
from fastprompt.methods import MODELS, FoldedPromptModel, PromptModel, PromptOutput

__all__ = ["FoldedPromptModel", "PromptModel", "PromptOutput", "get_prompt_model"]


def get_prompt_model(
    model: nn.Module,
    config: PromptConfig,
    *,
    shortcuts: bool = True,
    recompute: Recompute | None = None,
) -> PromptModel:
    """Add the prompts of `config` to a timm ViT; its weights are shared, and frozen except for the head.

    Args:
        model: timm's `VisionTransformer`, `VisionTransformerDistilled` or `Eva` (EVA02, DINOv3, ...), with supported
            blocks; before or after :func:`fastprompt.replace_attention`.
        config: such as :class:`fastprompt.VPTConfig`.
        shortcuts: False runs every row through every block, as the papers' code does: same results, more operations.
        recompute: what the backward computes again, to keep less memory from the forward, at the same results: "mlp",
            the norm and the hidden layer of each MLP; "attention", each attention; "block", each block, as timm's
            `set_grad_checkpointing` does; None, nothing (docs/training.md).

    Returns:
        The method's `PromptModel` (`VPTModel`, `GateVPTModel`, `CVPTModel` or `DAVPTModel`) on the model's device and
        in its dtype.

    Raises:
        NotImplementedError: the model, or `config` with this model, is not supported; the message says why.
        TypeError, ValueError: `model` or `config` has another type, or a value does not fit the model.
        Errors are raised before anything is changed.
    """
    if isinstance(model, PromptModel):
        raise TypeError("`get_prompt_model`: `model` already has prompts; pass its `base`")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`get_prompt_model`: `model` must be a timm model; got {type(model).__name__}")
    if type(config) not in MODELS:
        known = ", ".join(cls.__name__ for cls in MODELS)
        raise TypeError(f"`get_prompt_model`: `config` must be one of {known}; got {type(config).__name__}")
    if not isinstance(shortcuts, bool):
        raise TypeError(f"`get_prompt_model`: `shortcuts` must be True or False; got {shortcuts!r}")
    if recompute is not None and recompute not in get_args(Recompute):
        raise ValueError(
            f"`get_prompt_model`: `recompute` must be one of {get_args(Recompute)} or None; got {recompute!r}"
        )
    reason = backbone.model_reason(model)
    base = cast(Backbone, model)
    if reason is None and config.backbone_train_mode:
        reason = backbone.attention_dropout_reason(base)
    if reason is None:
        reason = backbone.pool_reason(base, config.pool)
        reason = None if reason is None else f"pool={config.pool!r} is not supported: {reason}"
    if reason is not None:
        raise NotImplementedError(f"`get_prompt_model`: {reason}")
    return MODELS[type(config)](base, config, shortcuts=shortcuts, recompute=recompute)
