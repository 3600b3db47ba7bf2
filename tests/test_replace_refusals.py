"""The modules that `replace_attention` refuses, its messages, and a user's own modules that it replaces."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import Block, VisionTransformer
from timm_families import gradients, images, small, vit
from torch import Tensor, nn

import fastprompt
from bench.correctness import assert_same
from fastprompt.ops import dispatch
from fastprompt.refusals import class_path
from fastprompt.replace import FastAttention, replace_attention, restore_attention


class OwnAttention(Attention):
    """A user's subclass, which may compute anything."""


class OwnModel(nn.Module):
    """A user's model of timm's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 48)
        self.layers = nn.ModuleList(Block(48, 3, qkv_bias=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


class LowRank(nn.Module):
    """LoRA's shape: a Linear and a low-rank update beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False).double()
        self.up = nn.Linear(2, linear.out_features, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_a_users_subclass_is_refused() -> None:
    model = vit(attn_layer=OwnAttention).double().eval()
    expected = model(images())
    report = replace_attention(model)
    assert report.replaced == []
    assert report.reason is not None
    assert "OwnAttention: a subclass of Attention may compute something else" in report.reason
    assert type(model.blocks[0].attn) is OwnAttention  # type: ignore[index, union-attr]
    assert_same(model(images()), expected)
    with pytest.raises(NotImplementedError, match=r"blocks\.0: .*OwnAttention: a subclass of Attention"):
        fastprompt.get_prompt_model(model, fastprompt.VPTConfig(num_prompts=2))


class OwnWindows(WindowAttention):
    """A user's subclass of an attention that is not supported."""


class OwnSwin(SwinTransformer):
    """A user's subclass of a pyramid."""


def test_a_subclass_of_a_pyramid_is_refused_with_its_reason() -> None:
    model: Any = OwnSwin(
        img_size=32, patch_size=4, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 1)
    )
    model.layers[0].blocks[0].attn.__class__ = OwnWindows
    reason = "attention within windows of a pyramid of feature maps, with relative position bias"
    report = replace_attention(model)
    assert [row.cls for row in report.skipped] == [
        class_path(model.layers[0].blocks[0].attn),
        "timm.models.swin_transformer.WindowAttention",
    ]
    assert all(row.reason == f"{row.cls}: {reason}" for row in report.skipped)
    message = rf"OwnSwin: {reason} \(layers\.0\.blocks\.0\.attn, .*OwnWindows\)"
    with pytest.raises(NotImplementedError, match=message):
        fastprompt.get_prompt_model(model, fastprompt.VPTConfig(num_prompts=2))


def test_models_without_a_fixed_number_of_tokens_take_no_prompts() -> None:
    with pytest.raises(NotImplementedError, match="NaFlexVit: each image may have its own number of tokens"):
        fastprompt.get_prompt_model(small("naflex"), fastprompt.VPTConfig(num_prompts=2))


def test_a_users_own_model_of_timm_blocks_is_replaced() -> None:
    model = OwnModel().double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    expected = model(x)
    report = replace_attention(model, strict=True)
    assert [r.name for r in report.replaced] == ["layers.0.attn", "layers.1.attn"]
    assert_same(model(x), expected)
    assert all(type(layer.attn) is FastAttention for layer in model.layers)


def test_a_users_model_may_be_called_attention() -> None:
    class AttentionClassifier(OwnModel):
        pass

    assert len(replace_attention(nn.Sequential(AttentionClassifier()), strict=True).replaced) == 2
    report = replace_attention(nn.Sequential(nn.MultiheadAttention(8, 2)))
    assert report.reason is not None
    assert "MultiheadAttention: not one of the supported classes" in report.reason


def test_a_lone_block_and_a_lone_attention_are_replaced() -> None:
    assert replace_attention(Block(48, 3)).replaced[0].name == "attn"
    assert replace_attention(Attention(48, 3)).replaced[0].name == ""


def test_attention_outside_a_known_block_is_refused() -> None:
    class OwnBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention(48, 3)

    report = replace_attention(OwnBlock())
    assert report.replaced == []
    assert "OwnBlock: not one of the supported classes" in str(report)


@pytest.mark.parametrize("target", ["qkv", "proj"])
@pytest.mark.parametrize("name", ["vit", "rope-dinov3", "eva-no-rope"])
def test_a_wrapped_linear_works_replaced_but_takes_no_prompts(name: str, target: str) -> None:
    model = small(name)
    wrapped = LowRank(getattr(model.blocks[1].attn, target))
    setattr(model.blocks[1].attn, target, wrapped)
    if name == "eva-no-rope" and target == "qkv":  # timm itself reads `qkv.weight` there, past any wrapper
        model.blocks[1].attn.qkv_bias_separate = True
    model.blocks[0].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    expected = gradients(model, model)
    assert f"blocks.1.attn.{target}.up.weight" in expected
    replace_attention(model, strict=True)
    assert_same(gradients(model, model), expected)
    with pytest.raises(NotImplementedError, match=r"blocks\.1: .*LowRank is not a plain torch.nn.Linear"):
        fastprompt.get_prompt_model(model, fastprompt.VPTConfig(num_prompts=2))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def mixed_model() -> Any:
    model: Any = small("vit", depth=3)
    model.blocks[1].attn = OwnAttention(48, 3).double()
    return model


def test_strict_raises_before_anything_is_changed() -> None:
    model = mixed_model()
    with pytest.raises(NotImplementedError) as error:
        replace_attention(model, strict=True)
    assert "some modules would be skipped" in str(error.value)
    assert "skipped: a subclass of Attention may compute" in str(error.value)
    assert "nothing was changed" in str(error.value)
    assert restore_attention(model) == 0
    assert len(replace_attention(model).replaced) == 2


def test_strict_raises_where_there_is_nothing_to_replace() -> None:
    with pytest.raises(NotImplementedError, match=r"no attention modules were recognised in torch\..*Linear"):
        replace_attention(nn.Linear(2, 2), strict=True)


def test_unknown_backend() -> None:
    model = small("vit")
    with pytest.raises(ValueError, match="there is no backend 'fast'; choose one of 'auto', 'triton'"):
        replace_attention(model, backend="fast")
    assert restore_attention(model) == 0


def test_missing_backend_raises_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch._backends["cuda"], "why_unavailable", lambda: "no such library")
    model = small("vit")
    with pytest.raises(
        NotImplementedError, match="backend 'cuda' does not support attention: no such library"
    ):
        replace_attention(model, backend="cuda")
    assert restore_attention(model) == 0


@pytest.mark.parametrize(
    "model", [None, "vit_base_patch16_224", VisionTransformer], ids=["none", "name", "class"]
)
def test_not_a_module(model: Any) -> None:
    for function in (replace_attention, restore_attention):
        message = f"`{function.__name__}`: `model` must be an nn.Module; got {model!r}; pass the model itself"
        with pytest.raises(TypeError, match=re.escape(message)):
            function(model)


def test_traced_code_is_named_as_the_reason() -> None:
    graph = torch.fx.symbolic_trace(small("vit"))
    assert "GraphModuleImpl; replace attention before tracing" in str(replace_attention(graph).reason)


def test_report_is_a_table() -> None:
    model = mixed_model()
    report = replace_attention(model)
    model.blocks[0].attn(torch.zeros(1, 2, 48, dtype=torch.float64), is_causal=True)
    path = class_path(model.blocks[1].attn)
    width = len(path)  # the longer of the two classes
    assert str(report) == "\n".join(
        [
            "replaced 2 attention modules, skipped 1",
            f"modules  first          {'class'.ljust(width)}  action",
            f"2        blocks.0.attn  {'timm.layers.attention.Attention'.ljust(width)}  replaced",
            f"1        blocks.1.attn  {path}  skipped: a subclass of Attention may compute "
            "something else; only the class itself is supported",
            "calls of timm's own forward: causal attention (1)",
        ]
    )
    assert repr(report) == str(report)
