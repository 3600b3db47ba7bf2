"""The proxy losses of DA-VPT: pull image features to the prompt of their class and push them from the others.

Proxy-Anchor (Kim et al., CVPR 2020) and Proxy-NCA in the form of DA-VPT's official code (Ren et al., CVPR 2025).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.ops.operator import accumulation_dtype


def similarities(features: Tensor, proxies: Tensor, scale: float) -> Tensor:
    """Return the scaled cosines [B, P] of features [B, D] and proxies [P, D], in float32 or better."""
    wide = accumulation_dtype(torch.promote_types(features.dtype, proxies.dtype))
    # The meta device has no autocast.
    with nullcontext() if features.is_meta else torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.to(wide), dim=-1) @ (scale * F.normalize(proxies.to(wide), dim=-1)).mT


def proxy_loss(
    sims: Tensor,
    proxy_of_image: Tensor,
    *,
    criterion: Literal["proxy_anchor", "proxy_nca"],
    alpha: float,
    delta: float,
) -> Tensor:
    """Return the loss of similarities [B, P] where image b belongs to proxy `proxy_of_image[b]`; a scalar.

    Proxy-Anchor, with sums over images and the mean over all proxies:

        log(1 + Σ_own exp(-alpha · (sims - delta))) + log(1 + Σ_other exp(alpha · (sims + delta)))

    Proxy-NCA: the same with sums over proxies and the mean over images. Each is one logsumexp, so no exponential of
    alpha · proxy_scale overflows.
    """
    own = F.one_hot(proxy_of_image, sims.shape[1]).bool()
    dim = 0 if criterion == "proxy_anchor" else 1
    nothing = -torch.inf
    attract = _log1p_sum_exp((-alpha * (sims - delta)).masked_fill(~own, nothing), dim)
    repel = _log1p_sum_exp((alpha * (sims + delta)).masked_fill(own, nothing), dim)
    return attract.mean() + repel.mean()


def _log1p_sum_exp(x: Tensor, dim: int) -> Tensor:
    """Return log(1 + Σ exp(x)) over `dim`; 0 where every x is -inf."""
    return F.pad(x, (0, 0, 1, 0) if dim == 0 else (1, 0)).logsumexp(dim)
