"""timm's own model tests (its tests/test_models.py) on models whose attention is replaced.

timm checks shapes and finite numbers; here the numbers must be those of the same model before the replacement. Its
tests of the plain forward and backward are in test_replace.py, for every family.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_scriptable
from timm.models import (
    FeatureGraphNet,
    create_feature_extractor,
    get_graph_node_names,
    is_notrace_module,
)
from timm_families import CLASSES, DEPTH, gradients, images, prepare
from torch import nn

from bench.correctness import assert_same
from fastprompt import replace_attention
from fastprompt.replace import FastAttention, FastAttentionRope, FastEvaAttention

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 4, "depth": DEPTH}
NAFLEX = "naflexvit_base_patch16_gap"
MODELS: dict[str, dict[str, Any]] = {
    "test_vit": {"img_size": 32, "depth": DEPTH},
    "deit_tiny_distilled_patch16_224": TINY,
    "eva02_tiny_patch14_224": TINY,
    "vit_small_patch16_rope_mixed_224": TINY,
    NAFLEX: {"embed_dim": 64, "num_heads": 4, "depth": DEPTH},
}
VITS = [
    name for name in MODELS if name != NAFLEX
]  # NaFlexViT has no feature extraction and no TorchScript in timm


def build(name: str, **kwargs: Any) -> Any:
    with set_scriptable(True):
        return prepare(timm.create_model(name, num_classes=CLASSES, **MODELS[name], **kwargs))


def pair(name: str, **kwargs: Any) -> tuple[Any, Any]:
    """Build a model twice, the second time with its attention replaced."""
    theirs, ours = build(name, **kwargs), build(name, **kwargs)
    replace_attention(
        ours, backend="eager", strict=True
    )  # "auto" runs PyTorch's attention on a CPU, as timm does
    return theirs, ours


def fx_model(model: nn.Module) -> nn.Module:
    """Trace `model` up to its output with timm's feature extraction."""
    train_nodes, eval_nodes = get_graph_node_names(model)
    return create_feature_extractor(model, {(train_nodes if model.training else eval_nodes)[-1]: "output"})


def leaves(traced: Any) -> list[str]:
    """List the attention modules that are one call in the graph."""
    return [n.target for n in traced.graph.nodes if n.op == "call_module" and n.target.endswith("attn")]


def saved_and_loaded(scripted: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("name", MODELS)
def test_model_default_cfgs_non_std(name: str) -> None:
    theirs, ours = pair(name)
    x = images()
    assert_same(ours.forward_features(x), theirs.forward_features(x))
    for model in (theirs, ours):
        model.reset_classifier(0)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("name", VITS)
def test_model_forward_features(name: str) -> None:
    theirs, ours = pair(name, features_only=True, out_indices=(0, 1))
    features = ours(images())
    assert [f.shape[1] for f in features] == ours.feature_info.channels()
    assert_same(features, theirs(images()))


@pytest.mark.parametrize("name", MODELS)
def test_model_forward_intermediates(name: str) -> None:
    theirs, ours = pair(name)
    x = images()
    expected = theirs.forward_intermediates(x)
    assert_same(ours.forward_intermediates(x), expected)


@pytest.mark.parametrize("name", VITS)  # timm 1.0.26 prunes no NaFlexViT
def test_model_prune_intermediate_layers(name: str) -> None:
    theirs, ours = pair(name)
    assert ours.prune_intermediate_layers(indices=[0]) == [0]
    assert len(ours.blocks) == 1
    options: dict[str, Any] = {"indices": [0], "intermediates_only": True}
    assert_same(
        ours.forward_intermediates(images(), **options), theirs.forward_intermediates(images(), **options)
    )


@pytest.mark.parametrize("name", MODELS)
def test_model_forward_fx(name: str) -> None:
    theirs, ours = pair(name)
    traced = fx_model(ours)
    assert leaves(traced) == [f"blocks.{i}.attn" for i in range(DEPTH)]
    assert_same(traced(images())["output"], theirs(images()))


@pytest.mark.parametrize("cls", [FastAttention, FastAttentionRope, FastEvaAttention])
def test_timm_knows_the_replaced_classes_as_leaves(cls: type[nn.Module]) -> None:
    assert is_notrace_module(cls)


@pytest.mark.parametrize("name", MODELS)
def test_model_backward_fx(name: str) -> None:
    theirs, ours = (model.train() for model in pair(name))
    traced = fx_model(ours)
    assert_same(gradients(traced, lambda x: traced(x)["output"]), gradients(theirs, theirs))


@pytest.mark.parametrize("name", VITS)
def test_features_by_fx(name: str) -> None:
    theirs, ours = (FeatureGraphNet(model, out_indices=(0, 1)) for model in pair(name))
    assert_same(ours(images()), theirs(images()))


# With torch.fx's own tracer timm's test_vit fails, replaced or not.
@pytest.mark.parametrize("name", [name for name in VITS if name != "test_vit"])
def test_plain_symbolic_trace(name: str) -> None:
    theirs, ours = pair(name)
    traced = torch.fx.symbolic_trace(ours)
    assert leaves(traced) == [f"blocks.{i}.attn" for i in range(DEPTH)]
    assert_same(traced(images()), theirs(images()))


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, torch.jit.script])
def test_masks_reach_traced_attention(trace: Callable[[nn.Module], Any]) -> None:
    block = build("test_vit").blocks[0]
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    options = {"attn_mask": torch.randn(5, 5, dtype=torch.float64)}, {"is_causal": True}, {}
    expected = [block(x, **given) for given in options]
    replace_attention(block)
    traced = trace(block)
    assert_same([traced(x, **given) for given in options], expected)


SCRIPTED: dict[str, Callable[[nn.Module], Any]] = {
    "script": torch.jit.script,
    "fx-script": lambda model: torch.jit.script(fx_model(model)),
    "trace": lambda model: torch.jit.trace(model, images(seed=5)),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", SCRIPTED)
@pytest.mark.parametrize("name", VITS)
def test_model_forward_torchscript(name: str, how: str) -> None:
    theirs, ours = pair(name)
    classes = [type(m) for m in ours.modules()]
    scripted = saved_and_loaded(SCRIPTED[how](ours))
    out = scripted(images())
    assert_same(out["output"] if how == "fx-script" else out, theirs(images()))
    assert [type(m) for m in ours.modules()] == classes
