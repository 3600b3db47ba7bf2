"""`as_encoder`: a prompted model as the encoder of a dense head, such as one for segmentation."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from timm.models import FeatureInfo
from torch import Tensor, nn

from fastprompt.model import PromptModel


def as_encoder(model: PromptModel, indices: int | Sequence[int], *, norm: bool = False) -> PromptEncoder:
    """Wrap `model` as an encoder: images -> a map of patch features for each block in `indices`.

    Args:
        model: a model of any method; its parameters are shared, so training the encoder trains the prompts.
        indices: the blocks whose outputs are returned, in increasing order; negative ones count from the end. An int n
            means the last n blocks.
        norm: apply the model's final norm to each map.

    Raises:
        TypeError: `model` is not a `PromptModel`, or `indices` are not integers.
        ValueError: `indices` are empty, out of range or not increasing.
        NotImplementedError: the model's patches do not form a grid.
    """
    if not isinstance(model, PromptModel):
        raise TypeError(
            f"`as_encoder`: `model` must be a PromptModel; got {type(model).__name__}; make one with `get_prompt_model`"
        )
    blocks = _blocks(indices, len(model.base.blocks))
    reason = _no_grid_reason(model)
    if reason is not None:
        raise NotImplementedError(f"`as_encoder`: {reason}")
    return PromptEncoder(model, blocks, norm)


class PromptEncoder(nn.Module):
    """Images [B, C, H, W] -> a list of maps [B, D, h, w]; created by :func:`as_encoder`.

    Attributes:
        model: the `PromptModel`.
        indices: the blocks whose outputs are returned.
        feature_info: timm's `FeatureInfo` of these blocks: `channels()`, `reduction()`, `module_name()`.
    """

    model: PromptModel

    def __init__(self, model: PromptModel, indices: list[int], norm: bool) -> None:
        super().__init__()
        self.model = model
        self.indices = indices
        self.norm = norm
        self.feature_info = FeatureInfo(copy.deepcopy(model.base.feature_info), tuple(indices))
        self.training = model.training

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, C, H, W] -> one [B, D, h, w] for each of `indices`, without prompts.

        Blocks after the last index do not run.
        """
        return self.model.forward_intermediates(
            images, indices=self.indices, norm=self.norm, stop_early=True, intermediates_only=True
        )


def _blocks(indices: int | Sequence[int], depth: int) -> list[int]:
    def is_int(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    if is_int(indices):
        if not 1 <= indices <= depth:  # type: ignore[operator]
            raise ValueError(
                f"`as_encoder`: `indices` as an int must be the last 1 to {depth} blocks; got {indices}; for block "
                f"{indices} alone pass [{indices}]"
            )
        return list(range(depth - indices, depth))  # type: ignore[operator]
    if not isinstance(indices, Sequence) or isinstance(indices, str) or not all(map(is_int, indices)):
        raise TypeError(
            f"`as_encoder`: `indices` must be an int or a list of ints; got {indices!r}; pass for example [2, 5, 8, 11]"
        )
    if not indices:
        raise ValueError(
            "`as_encoder`: `indices` must contain at least one block; got none; pass for example [-1]"
        )
    outside = [i for i in indices if not -depth <= i < depth]
    if outside:
        raise ValueError(
            f"`as_encoder`: `indices` must be in {-depth}..{depth - 1}, the model has {depth} blocks; got {outside}"
        )
    blocks = [i % depth for i in indices]
    if blocks != sorted(set(blocks)):
        raise ValueError(
            f"`as_encoder`: `indices` must increase, because maps are in the order of the blocks; got {list(indices)}, "
            f"which are blocks {blocks}; pass {sorted(set(blocks))}"
        )
    return blocks


def _no_grid_reason(model: PromptModel) -> str | None:
    """Return why the patch tokens of this model do not form a map, or None."""
    base = model.base
    embed = base.patch_embed
    if not callable(getattr(embed, "dynamic_feat_size", None)):
        return (
            f"{type(embed).__name__} has no `dynamic_feat_size`, so its tokens cannot be arranged as a map; "
            "use a model with timm's PatchEmbed"
        )
    if getattr(base.patch_drop, "prob", 0) > 0 and model.config.backbone_train_mode:
        return (
            f"patches are dropped in training (patch_drop_rate={base.patch_drop.prob} with backbone_train_mode=True), "
            "and the remaining patches do not form a map; build the model with patch_drop_rate=0"
        )
    return None
