"""`recompute`: the backward computes a part of each block again, with the same results and less memory."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Any, get_args

import pytest
import torch
from prompted_models import CONFIGS, FAMILIES, LABELS, changed, outputs_and_gradients, prompted
from timm_families import images, small, vit
from torch import Tensor, nn

import fastprompt
from bench import measure
from bench.correctness import assert_same
from fastprompt import VPTConfig
from fastprompt.blocks import Recompute

PARTS = get_args(Recompute)


def run(model: Any, recompute: str | None, *, call: Any = None, autocast: bool = False) -> dict[str, Tensor]:
    """Return outputs and gradients of a training step in which the parts to recompute draw from one seed."""
    model.recompute = recompute
    torch.manual_seed(5)
    x = images(len(LABELS), dtype=next(model.base.parameters()).dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return outputs_and_gradients(model if call is None else call, x)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_gives_the_same_bits(name: str, part: str) -> None:
    model = prompted("vit", CONFIGS[name]).train()
    assert_equal(run(model, part), run(model, None))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", [*FAMILIES[1:], "vit-glu", "vit-layer-scale"])
def test_every_kind_of_block_gives_the_same_bits(family: str, part: str) -> None:
    for config in (VPTConfig(3), VPTConfig(3, deep=False)):
        model = prompted(family, config)
        model.recompute = part
        found = outputs_and_gradients(model, images(2), None)
        model.recompute = None
        assert_equal(found, outputs_and_gradients(model, images(2), None))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["vpt-deep", "gate-vpt", "cvpt-3", "cvpt-4"])
def test_random_draws_are_replayed(name: str, part: str) -> None:
    """Dropout of prompts and inside the blocks, and drop-path, under autocast too."""
    config = changed(CONFIGS[name], dropout=0.3, backbone_train_mode=True)
    drops = {"proj_drop_rate": 0.2, "drop_path_rate": 0.3}
    for autocast in (False, True):
        dtype = torch.float32 if autocast else torch.float64
        model = prompted("vit", config, depth=3, **drops).to(dtype).train()
        expected = run(model, None, autocast=autocast)
        assert_equal(run(model, part, autocast=autocast), expected)
        state = torch.get_rng_state()
        run(model, None, autocast=autocast)
        assert torch.equal(torch.get_rng_state(), state), "later draws are the same"


def kept(model: Any, recompute: str | None) -> int:
    model.recompute = recompute
    return measure.saved_bytes(partial(model, images(2)), (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", ["vpt-deep", "vpt-shallow", "gate-vpt", "cvpt-3", "da-vpt"])
def test_less_is_kept(name: str) -> None:
    """In units of the rows [B, N, D], a block keeps 10, or 6 without a part, or 1 without all of it; the last one less.

    Where no prompts are rows, no gradient passes the image rows of the first attention.
    """
    attentions = 5 if "shallow" in name or "gate" in name else 4
    model = prompted("vit", CONFIGS[name], depth=6)
    rows = 2 * 17 * 48 * 8
    nothing, mlp, attention, block = (kept(model, part) for part in (None, *PARTS))
    assert nothing - mlp >= 5 * 4 * rows
    assert nothing - attention >= attentions * 4 * rows
    assert nothing - block >= (attentions + 5) * 4 * rows


@pytest.mark.parametrize(
    ("part", "again"),
    [
        (None, ()),
        ("mlp", ("norm2", "fc1")),
        ("attention", ("norm1", "qkv")),
        ("block", ("norm1", "qkv", "norm2", "fc1")),
    ],
)
def test_the_part_and_nothing_else_runs_twice(part: str | None, again: tuple[str, ...]) -> None:
    model = prompted("vit", CONFIGS["gate-vpt"])
    calls: Counter[str] = Counter()
    for name, module in model.base.blocks[0].named_modules():
        if name and not isinstance(module, nn.Identity | nn.Dropout):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name.rpartition(".")[2]]))
    run(model, part)
    twice = {name for name in calls if calls[name] == 2}
    # The projection is entered, but the recomputation ends before its product.
    assert twice - {"attn", "mlp", "proj", "act", "fc2", "ls1", "ls2"} == set(again), calls


def test_timms_switch_is_the_recomputation_of_blocks() -> None:
    model = prompted("vit", CONFIGS["vpt-deep"])
    expected, block = run(model, None), kept(model, "block")
    model.base.set_grad_checkpointing(True)
    assert kept(model, None) == kept(model, "mlp") == block
    assert_equal(run(model, "mlp"), expected)


def test_inference_and_folded_models_do_not_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastprompt.blocks.checkpoint", lambda *a, **k: pytest.fail("nothing to recompute"))
    for part in PARTS:
        model = fastprompt.get_prompt_model(small("vit"), VPTConfig(3), recompute=part)
        with torch.no_grad():
            assert torch.equal(model.fold()(images()), model(images()))


def test_features_are_recomputed_too() -> None:
    model = prompted("vit", CONFIGS["vpt-deep"])
    found = []
    for part in (None, *PARTS):
        model.recompute = part
        out = model.forward_features(images())
        found.append((out, *torch.autograd.grad(out.square().sum(), list(model.prompts))))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


SLOW = {"marks": pytest.mark.slow}
NOT_IN_TORCH_2_11 = pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="its partitioner fails on a view from outside a checkpoint"
)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vpt-deep", "mlp"),
        pytest.param("vpt-deep", "attention", **SLOW),
        pytest.param("vpt-deep", "block", **SLOW),
        pytest.param("gate-vpt", "block", marks=[pytest.mark.slow, NOT_IN_TORCH_2_11]),
        pytest.param("cvpt-3", "mlp", **SLOW),
    ],
)
def test_compiles_as_one_graph(name: str, part: str) -> None:
    torch._dynamo.reset()
    model = prompted("vit", CONFIGS[name])
    expected = run(model, None)
    model.recompute = part
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, loss = forward(images(len(LABELS)), labels=LABELS)
    cotangent = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((logits * cotangent).sum() + loss, list(trained.values()))
    assert_same({"logits": logits, "loss": loss, **dict(zip(trained, found, strict=True))}, expected)


def test_other_values_are_refused_before_anything_is_changed() -> None:
    base: Any = vit()
    for wrong in ("MLP", True, ("mlp",)):
        with pytest.raises(
            ValueError, match=re.escape("`recompute` must be one of ('mlp', 'attention', 'block')")
        ):
            fastprompt.get_prompt_model(base, VPTConfig(3), recompute=wrong)  # type: ignore[arg-type]
    assert all(p.requires_grad for p in base.parameters())
