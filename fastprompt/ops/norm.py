"""The LayerNorm that an operation may apply to its output y, in the same pass over the sequence.

Under autocast y, the residual stream, is wider than what a Linear layer gives and takes. So the norm's output has the
dtype of the branch that was added: the next Linear reads it without a cast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.ops.operator import accumulation_dtype


class Norm(NamedTuple):
    """A frozen LayerNorm: `weight` and `bias` [D] of any floating dtype, or None, and `eps`, added to the variance."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


def check_norm(caller: str, norm: Norm | None, width: int, device: torch.device) -> None:
    """Raise an error that names `caller` unless weight and bias of `norm` are frozen, and [width] or None."""
    for name in ("weight", "bias") if norm is not None else ():
        tensor = getattr(norm, name)
        if tensor is None:
            continue
        if tensor.shape != (width,) or not tensor.is_floating_point():
            raise ValueError(
                f"`{caller}`: `norm.{name}` must be floating point, [D] = [{width}], or None; "
                f"got {tensor.dtype}, {tuple(tensor.shape)}; reshape it"
            )
        if tensor.device != device:
            raise ValueError(
                f"`{caller}`: `norm.{name}` is on {tensor.device} and `x` on {device}; move it there"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"`{caller}`: `norm.{name}` requires a gradient, which is not supported; detach it, or omit `norm` "
                "and call `torch.nn.functional.layer_norm`"
            )


def layer_norm_reference(y: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """Return the LayerNorm of y [B, N, D], computed in float32 or better, in `dtype`: the specification."""
    wide = accumulation_dtype(y.dtype)
    weight, bias = (None if t is None else t.to(wide) for t in norm[:2])
    return F.layer_norm(y.to(wide), y.shape[-1:], weight, bias, norm.eps).to(dtype)


def empty_norm(y: Tensor, dtype: torch.dtype, eps: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialized outputs for :func:`layer_norm` of y, of size 0 if `eps` is None (no norm)."""
    wide = accumulation_dtype(y.dtype)
    rows: tuple[int, ...] = (0,) if eps is None else y.shape[:-1]
    return (
        y.new_empty(0 if eps is None else y.shape, dtype=dtype),
        y.new_empty(rows, dtype=wide),
        y.new_empty(rows, dtype=wide),
    )


def layer_norm(
    y: Tensor, dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the LayerNorm of y [B, N, D] in `dtype`, and `mean` and `rstd` [B, N] in float32 or better."""
    if eps is None:
        return empty_norm(y, dtype, eps)
    wide = accumulation_dtype(y.dtype)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    normed, mean, rstd = torch.native_layer_norm(y.to(wide), y.shape[-1:], weight, bias, eps)
    return normed.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)


def gradient_of_both(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """Return the gradient of y [B, N, D] from those of y and LayerNorm(y), of which one may be None.

    In float32 or better if one is from the norm.
    """
    if grad_normed is None or y is None or mean is None or rstd is None:
        assert grad_y is not None
        return grad_y
    wide = mean.dtype
    weight = None if weight is None else weight.to(wide)
    grad = torch.ops.aten.native_layer_norm_backward(
        *(grad_normed.to(wide), y.to(wide), y.shape[-1:], mean[..., None], rstd[..., None], weight, None),
        [True, False, False],
    )[0]
    return grad if grad_y is None else grad + grad_y
