"""Inputs of prompt attention, and the formula written down again: by concatenation, and by loops."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """Sizes of one call; `kind` of prompts is "shared" [P, H, d], "per image" [B, P, H, d] or "table" [T, P, H, d]."""

    B: int = 3
    Nq: int = 11
    N: int = 11
    P: int = 4
    H: int = 2
    d: int = 32
    kind: str = "shared"


# Many images where they are small: the largest of a few errors is a matter of luck.
SHAPES = {
    "one image": Shape(B=1, Nq=17, N=17),
    "one token": Shape(B=12, Nq=1, N=1),
    "one token, one prompt": Shape(B=12, Nq=1, N=1, P=1, d=8),
    "no prompts": Shape(P=0, d=40),
    "one query": Shape(Nq=1, N=19, d=64),
    "more queries than keys": Shape(Nq=21, N=3, d=72),
    "fewer queries than keys": Shape(Nq=5, N=37, d=80),
    "prompts only": Shape(Nq=7, N=0, P=6, d=88),
    "one prompt only": Shape(Nq=7, N=0, P=1),
    "more prompts than tokens": Shape(N=2, P=50, d=16),
    "wide heads": Shape(d=128),
    "odd head_dim": Shape(d=33),
    "empty batch": Shape(B=0),
    "no queries": Shape(Nq=0),
    "ViT": Shape(B=1, Nq=197, N=197, P=10, d=64),
}
KINDS = ("shared", "per image", "table")


def draw(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", temperature: bool = True
) -> dict[str, Tensor | None]:
    """Random inputs of `prompt_attention`. A table has T = B + 2 rows, one of which two images share."""
    B, Nq, N, P, H, d, kind = shape
    lead = {"shared": (), "per image": (B,), "table": (B + 2,)}[kind]
    inputs: dict[str, Tensor | None] = {
        "q": torch.randn(B, Nq, H, d),
        "k": torch.randn(B, N, H, d),
        "v": torch.randn(B, N, H, d),
        "prompt_k": torch.randn(*lead, P, H, d),
        "prompt_v": torch.randn(*lead, P, H, d),
    }
    inputs = {name: None if x is None else x.to(device, dtype) for name, x in inputs.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs["temperature"] = torch.tensor([0.7], dtype=wide, device=device) if temperature else None
    inputs["prompt_index"] = None
    if kind == "table":
        index = torch.randperm(B + 2)[:B]
        if B > 1:
            index[-1] = index[0]
        inputs["prompt_index"] = index.to(device)
    return inputs


def concatenated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    scale: float | None = None,
    temperature: Tensor | None = None,
    prompt_index: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch in the inputs' dtype: join keys and prompt keys, matmul, softmax, matmul."""
    if prompt_k is not None and prompt_v is not None:
        if prompt_index is not None:
            prompt_k, prompt_v = prompt_k[prompt_index], prompt_v[prompt_index]
        elif prompt_k.ndim == 3:
            prompt_k, prompt_v = (
                torch.stack([p] * len(q)) if len(q) else p[None][:0] for p in (prompt_k, prompt_v)
            )
        k, v = torch.cat((k, prompt_k), 1), torch.cat((v, prompt_v), 1)
    logits = torch.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1)) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if temperature is not None:
        logits = logits / temperature  # in float32, as PyTorch promotes
    return torch.matmul(logits.softmax(-1).to(q.dtype), v.transpose(1, 2)).transpose(1, 2)


def by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    scale: float | None = None,
    temperature: Tensor | None = None,
    prompt_index: Tensor | None = None,
) -> Tensor:
    """The definition, one query at a time: a weighted mean of values with weights exp(score) / sum of exp(scores)."""
    rows = []
    for b in range(q.shape[0]):
        own_k, own_v = prompt_k, prompt_v
        if prompt_index is not None:
            own_k, own_v = prompt_k[int(prompt_index[b])], prompt_v[int(prompt_index[b])]
        elif prompt_k.ndim == 4:
            own_k, own_v = prompt_k[b], prompt_v[b]
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                keys = [*k[b, :, h], *own_k[:, h]]
                values = [*v[b, :, h], *own_v[:, h]]
                scores = [torch.dot(q[b, i, h], key) * (scale or 1 / math.sqrt(q.shape[3])) for key in keys]
                if temperature is not None:
                    scores = [s / temperature.squeeze() for s in scores]
                weights = [s.exp() for s in scores]
                total = sum(weights)
                rows.append(sum((w / total * value for w, value in zip(weights, values, strict=True))))
    B, Nq, H, d = q.shape
    return torch.stack(rows).view(B, H, Nq, d).transpose(1, 2)
