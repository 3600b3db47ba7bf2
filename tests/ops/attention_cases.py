"""Inputs of prompt attention, and the formula written down again: by concatenation, and by loops."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import softmax_from_lse as softmax
from fastprompt.ops import AttentionWeights


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
    "one token, one prompt": Shape(B=64, Nq=1, N=1, P=1, d=8),
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


class Path(NamedTuple):
    """A call that takes a way of its own through the Triton kernels; `trainable`: None for all."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    temperature: bool = True
    trainable: str | None = None


# What the grids above ask of `eager`, in as few calls as the interpreter has time for. A kernel's code depends on
# - the pieces of head_dim (16, 32, 32 + 16, 64, 64 + 16, 64 + 32, 128), and whether rows are aligned;
# - whether all keys are held at once (in which pieces), or in tiles of 128: whole ones and a tail in 16 bits, masked
#   ones in float32; and on one or several tiles of queries;
# - the kind of prompts, the temperature, and what trains.
# test_prompt_attention_paths.py checks that these reach each kernel with each of its flags.
HALF = torch.float16
SMALL = Shape(B=2, Nq=5, N=3, P=2, d=8)
PATHS = {
    "one token, one prompt": Path(SHAPES["one token, one prompt"]._replace(B=3)),
    "all keys held, shared": Path(SHAPES["one image"]),
    "all keys held, a table": Path(SHAPES["ViT"]._replace(kind="table"), HALF, temperature=False),
    "all keys held, per image": Path(SHAPES["one image"]._replace(d=40, kind="per image"), temperature=False),
    "all keys held, no prompts": Path(Shape(Nq=18, P=0, d=40), HALF, temperature=False),
    "one query": Path(SHAPES["one query"]._replace(kind="table"), HALF, temperature=False),
    "odd head_dim": Path(SHAPES["odd head_dim"], HALF),
    "odd head_dim, per image": Path(Shape(Nq=18, d=33, kind="per image")),
    "many prompts": Path(SHAPES["more prompts than tokens"]._replace(kind="table")),
    "64 + 16 wide, a tail": Path(SHAPES["more queries than keys"]._replace(kind="table"), HALF),
    "64 + 16 wide, two tiles of queries": Path(Shape(B=1, Nq=130, N=7, d=80), temperature=False),
    "64 + 32 wide, prompts only": Path(SHAPES["prompts only"]._replace(kind="per image"), HALF),
    "128 wide": Path(SHAPES["wide heads"]._replace(kind="per image"), temperature=False),
    "128 wide, whole tiles of keys": Path(
        Shape(B=1, Nq=20, N=246, P=10, H=1, d=128, kind="table"), HALF, temperature=False
    ),
    "128 wide, whole tiles and a tail": Path(Shape(B=1, Nq=20, N=300, H=1, d=128), HALF, temperature=False),
    "more keys than are held": Path(Shape(B=1, Nq=20, N=300, H=1, d=64, kind="per image")),
    "more images than are summed at once": Path(Shape(33, 1, 1, 1, 1, 8), trainable="prompt_v"),
    "more images than are summed at once, a table": Path(
        Shape(33, 1, 1, 1, 1, 8, "table"), trainable="prompt_k"
    ),
    "empty batch": Path(SHAPES["empty batch"]),
    "no queries": Path(SHAPES["no queries"]._replace(kind="table")),
    "q": Path(SMALL._replace(d=33), trainable="q"),
    "temperature": Path(SMALL._replace(kind="table"), trainable="temperature"),
    "k": Path(SMALL, trainable="k"),
    "v": Path(SMALL, trainable="v temperature"),
    "k and v": Path(SMALL._replace(d=33), trainable="k v", temperature=False),
    "prompt_k": Path(SMALL._replace(kind="per image"), trainable="prompt_k"),
    "prompt_v": Path(SMALL._replace(d=33), trainable="prompt_v"),
    "prompts": Path(SHAPES["ViT"]._replace(kind="table"), trainable="prompt_k prompt_v"),
    "k and prompt_k": Path(SMALL, trainable="k prompt_k q temperature"),
    "v and prompt_v": Path(
        SMALL._replace(kind="per image"), HALF, trainable="v prompt_v q", temperature=False
    ),
    "k and prompt_v": Path(SMALL, trainable="k prompt_v"),
    "v and prompt_k": Path(SMALL, trainable="v prompt_k"),
    "q, k and v": Path(SMALL, trainable="q k v"),
}


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
    return torch.matmul(softmax(logits).to(q.dtype), v.transpose(1, 2)).transpose(1, 2)


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


def cross_attention(
    x: Tensor, prompts: Tensor, weights: AttentionWeights, H: int, scale: float | None = None
) -> Tensor:
    """CVPT's cross-attention as its equations stand, by matmul and softmax in the inputs' dtype."""
    q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, proj_weight, proj_bias = weights

    q = F.linear(x, q_weight, q_bias)
    k, v = F.linear(prompts, k_weight, k_bias), F.linear(prompts, v_weight, v_bias)
    d = q.shape[-1] // H
    outs = []
    for h in range(H):
        part = slice(h * d, (h + 1) * d)
        scores = q[..., part] @ k[..., part].mT * (d**-0.5 if scale is None else scale)
        outs.append(scores.softmax(-1) @ v[..., part])
    return F.linear(torch.cat(outs, -1), proj_weight, proj_bias)
