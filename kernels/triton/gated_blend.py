"""Launchers of gated prompt blending, alone or with the LayerNorm that follows: kernels of residual_norm_kernels.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton.gated_blend_config import choose
from fastprompt.kernels.triton.residual_norm import (
    Blend,
    BlendGradient,
    launch_backward,
    launch_forward,
    unsupported,
)


def forward(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor,
    gate: Tensor,
    start: int,
    length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, LayerNorm(y) [B, N, D], mean and rstd [B, N] in float32; all but y are empty if `eps` is None."""
    config = choose(launch.architecture(x.device), "fwd", x.shape[-1], norm=eps is not None)
    blend = Blend(prompt_in, gate, start, length)
    return launch_forward(config, x, delta, None, blend, weight, bias, eps)


def can_forward(x: Tensor, delta: Tensor, prompt_in: Tensor, *args: object) -> str | None:
    """Return why :func:`forward` cannot run for x, delta [B, N, D] and prompt_in [B, length, D], or None."""
    return unsupported(x, delta, prompt_in)


def backward(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    gate: Tensor,
    difference: Tensor | None,
    start: int,
    length: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x [B, N, D], of delta in `dtype`, of prompt_in [B, length, D], and of gate.

    Those of x and prompt_in have y's dtype; those not needed are empty.
    """
    grad = grad_normed if grad_y is None else grad_y
    assert grad is not None
    config = choose(launch.architecture(grad.device), "bwd", grad.shape[-1], norm=grad_normed is not None)
    blend = BlendGradient(gate, difference, start, length, *needs[2:])
    norm = (y, mean, rstd, weight)
    return launch_backward(config, grad_y, grad_normed, *norm, None, blend, dtype, needs[:2])


def can_backward(grad_y: Tensor | None, grad_normed: Tensor | None, *args: object) -> str | None:
    """Return why :func:`backward` cannot run for these gradients [B, N, D], or None."""
    return unsupported(*(g for g in (grad_y, grad_normed) if g is not None))
