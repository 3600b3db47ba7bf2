"""Prompt dropout of GateVPT, CVPT and DA-VPT against the papers' forms, in plain PyTorch on timm's modules.

Each image draws its own mask, after the prompts are expanded to the batch. Both sides draw from the same seed, block by
block, so that the masks are the same. VPT's dropout is compared in test_vpt.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm_families import CLASSES, images, small
from torch import Tensor

import fastprompt
from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig

BATCH, DROPOUT, SEED = 4, 0.4, 11
LABELS = torch.tensor([0, 3, 0, 4])


def attention(attn: Any, x: Tensor, context: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Rows x [B, N, D] attend to the rows `context` [B, M, D], by the packed weights of `attn`."""
    wq, wk, wv = attn.qkv.weight.chunk(3)
    bq, bk, bv = attn.qkv.bias.chunk(3)

    def heads(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)

    q, k, v = heads(F.linear(x, wq, bq)), heads(F.linear(context, wk, bk)), heads(F.linear(context, wv, bv))
    weights = (q @ k.mT * attn.scale / temperature).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).flatten(2))


def dropped(p: Tensor) -> Tensor:
    return F.dropout(p.expand(BATCH, -1, -1), DROPOUT)


def embed(base: Any, x: Tensor) -> Tensor:
    return base._pos_embed(base.patch_embed(x))


def gate_vpt(model: Any, x: Tensor) -> Tensor:
    base, P = model.base, len(model.prompts[0])
    x = embed(base, x)
    x = torch.cat([x[:, :1], dropped(model.prompts[0]), x[:, 1:]], 1)
    for i, block in enumerate(base.blocks):
        entered = x[:, 1 : 1 + P]
        h = block.norm1(x)
        x = x + attention(block.attn, h, h, model.temperature[i])
        x = x + block.mlp(block.norm2(x))
        if i < len(base.blocks) - 1:
            gate = model.gate_logits[i].sigmoid()
            x = torch.cat([x[:, :1], gate * x[:, 1 : 1 + P] + (1 - gate) * entered, x[:, 1 + P :]], 1)
    return base.head(base.norm(x)[:, 0])


def cvpt(model: Any, x: Tensor) -> Tensor:
    base, insert = model.base, model.config.insert
    x = embed(base, x)
    for block, prompts in zip(base.blocks, model.prompts, strict=True):
        p = dropped(prompts)

        def cross(place: int, x: Tensor, block: Any = block, p: Tensor = p) -> Tensor | float:
            return attention(block.attn, x, p) if place == insert else 0.0

        x = x + cross(1, x)
        h = block.norm1(x)
        x = x + attention(block.attn, h, h) + cross(2, x)
        x = x + cross(3, x)
        x = x + block.mlp(block.norm2(x) + cross(4, x))
        x = x + cross(5, x)
    return base.head(base.norm(x)[:, 0])


def da_vpt(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the metric loss; its proxies are the normed prompts as they are before dropout."""
    base, config = model.base, model.config
    x, P, loss = embed(base, x), 0, torch.zeros((), dtype=torch.float64)
    first, last = config.guided_blocks
    for i, (block, prompts) in enumerate(zip(base.blocks, model.prompts, strict=True)):
        normed = F.normalize(prompts, dim=-1, eps=1e-6)
        x = torch.cat([x[:, :1], dropped(normed), x[:, 1 + P :]], 1)
        P = len(prompts)
        if first <= i <= last:
            wq, bq = block.attn.qkv.weight.chunk(3)[0], block.attn.qkv.bias.chunk(3)[0]
            query = F.linear(block.norm1(x[:, 0]), wq, bq)
            for weight, feature in (
                (config.patch_weight, x[:, 1 + P :].mean(1)),
                (config.class_weight, query),
            ):
                loss = loss + weight * proxy_anchor(model, feature, normed) / (last + 1 - first)
        h = block.norm1(x)
        x = x + attention(block.attn, h, h)
        x = x + block.mlp(block.norm2(x))
    return base.head(base.norm(x)[:, 0]), loss


def proxy_anchor(model: Any, feature: Tensor, proxies: Tensor) -> Tensor:
    c = model.config
    sims = F.normalize(feature, dim=-1) @ (c.proxy_scale * F.normalize(proxies, dim=-1)).T
    own = F.one_hot(model.class_to_prompt[LABELS], len(proxies)).bool()
    near = (-c.alpha * (sims - c.delta)).exp().masked_fill(~own, 0).sum(0).log1p().mean()
    far = (c.alpha * (sims + c.delta)).exp().masked_fill(own, 0).sum(0).log1p().mean()
    return near + far


Case = tuple[PromptConfig, Callable[[Any, Tensor], Any]]
CASES: dict[str, Case] = {
    "gate-vpt": (GateVPTConfig(3, gate_init=0.5, dropout=DROPOUT), gate_vpt),
    "da-vpt": (DAVPTConfig(3, 4, (1, 2), prompt_norm="l2", alpha=2.0, dropout=DROPOUT), da_vpt),
    **{f"cvpt-insert{i}": (CVPTConfig(3, insert=i, dropout=DROPOUT), cvpt) for i in range(1, 6)},
}


def prompted(config: PromptConfig, shortcuts: bool = True) -> Any:
    model = fastprompt.get_prompt_model(small("vit", depth=3), config, shortcuts=shortcuts)
    with torch.no_grad():
        for p in model.prompts:
            p.normal_()
        if isinstance(config, GateVPTConfig):
            model.temperature.uniform_(0.5, 2)
    return model.train()


def outputs_and_gradients(
    model: Any, run: Callable[..., Any], *args: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """What `run` makes of the images and all trained gradients, with masks drawn from SEED."""
    torch.manual_seed(SEED)
    out = run(*args)
    outputs = list(out) if isinstance(out, tuple) else [out]
    cotangents = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o) for o in outputs]
    trained = [p for p in model.parameters() if p.requires_grad]
    total = sum((o * w).sum() for o, w in zip(outputs, cotangents, strict=True))
    return outputs, list(torch.autograd.grad(total, trained))


@pytest.mark.parametrize("shortcuts", [True, False], ids=["shortcuts", "full"])
@pytest.mark.parametrize("case", CASES)
def test_dropout_of_each_image_equals_the_papers_form(case: str, shortcuts: bool) -> None:
    config, oracle = CASES[case]
    model, x = prompted(config, shortcuts), images(BATCH)
    call = (x, LABELS) if case == "da-vpt" else (x,)
    mine = outputs_and_gradients(model, model, *call)
    theirs = outputs_and_gradients(model, oracle, model, x)
    assert all(g.any() for g in theirs[1])
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_images_of_one_batch_draw_different_masks(case: str) -> None:
    model = prompted(CASES[case][0])
    logits = model(images(1).expand(BATCH, -1, -1, -1))
    assert logits.shape == (BATCH, CLASSES)
    assert len({tuple(row.tolist()) for row in logits}) == BATCH


@pytest.mark.parametrize("case", CASES)
def test_dropout_is_off_in_eval_mode_and_when_folded(case: str) -> None:
    model, x = prompted(CASES[case][0]), images(BATCH)
    folded = model.fold()
    model.eval()
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(folded(x), model(x).detach(), rtol=1e-10, atol=1e-10)
