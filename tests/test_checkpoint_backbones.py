"""States that hold a backbone: VPT's ViT, MAE, MoCo v3, DA-VPT and CVPT as they save whole models, npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_files
import numpy as np
import pytest
import timm_families
import torch
from official_states import (
    State,
    backbone_state,
    golden,
    jax_names,
    masked,
    output,
    prefixed,
    scramble,
    separate,
)
from test_checkpoint import refused, same_output
from torch import Tensor

import fastprompt
from bench.correctness import assert_same
from fastprompt import load_official_state_dict


def blank(name: str) -> tuple[Any, State, golden_files.Case]:
    """`golden`, in a model whose backbone holds random numbers too."""
    model, state, case = golden(name)
    scramble(model, frozen=True)
    return model, state, case


def vpt(mean_pooled: bool = False, num_classes: int = 3) -> Any:
    """A VPT model whose backbone is not the golden one."""
    base = golden_files.backbone(mean_pooled, num_classes=num_classes)
    scramble(base, frozen=True)
    return fastprompt.get_prompt_model(base, fastprompt.VPTConfig(4))


def has_backbone(model: Any, state: State) -> None:
    """Every value of the timm-named `state` lies in the model."""
    mine = model.base.state_dict()
    for name, t in state.items():
        assert torch.equal(mine[name], t.double()), name


LAYOUTS = {"packed": lambda s: s, "separate": separate, "jax": jax_names}


@pytest.mark.parametrize("prefix", ["", "enc.", "module.enc.transformer."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_models_of_vpt_give_the_official_output(layout: str, prefix: str) -> None:
    model, state, case = blank("vpt_deep_cls")
    whole = prefixed(LAYOUTS[layout](backbone_state()) | state, prefix)
    assert set(load_official_state_dict(model, whole).loaded) == set(whole)
    same_output(model, case)


def test_whole_model_of_vpt_on_mae_has_its_norm_after_the_mean() -> None:
    model, state, case = blank("vpt_deep_mean")
    backbone = {("fc_" + k if k.startswith("norm.") else k): t for k, t in backbone_state().items()}
    load_official_state_dict(model, prefixed(backbone | state, "enc."))
    same_output(model, case)


@pytest.mark.parametrize("name", ["gatevpt_mean", "gatevpt_cls"])
def test_whole_model_of_gate_vpt_norms_the_mean_with_the_backbones_norm(name: str) -> None:
    model, state, case = blank(name)
    load_official_state_dict(model, prefixed(backbone_state() | state, "enc."))
    same_output(model, case)


def test_whole_model_of_da_vpt_computes_with_the_separate_maps() -> None:
    model, state, case = blank("davpt_cls")
    packed = {k: torch.randn_like(t) for k, t in backbone_state().items() if ".qkv." in k}
    whole = packed | separate(backbone_state()) | state
    report = load_official_state_dict(model, whole)
    assert set(report.ignored) == set(packed)
    assert set(report.loaded) == set(whole) - set(packed)
    same_output(model, case)


def test_whole_model_of_da_vpt_on_mae_needs_its_mask_and_its_norm() -> None:
    model, state, images, logits = masked()
    load_official_state_dict(model, state)
    assert_same(model(images), logits)
    model, *_ = masked(mask_prompts=False)
    load_official_state_dict(model, state)
    with torch.no_grad():
        assert (model(images) - logits).norm() > 0.05 * logits.norm(), "a state cannot tell"
    line = refused(masked(fc_norm=True)[0], state)[1]
    assert "build the timm model with global_pool='avg', fc_norm=False" in line


def cvpts_vpt(name: str) -> tuple[Any, State, golden_files.Case]:
    """`blank` of a VPT case, with the state as the VPT baseline in CVPT's code saves it."""
    model, state, case = blank(name)
    prompts = [state.pop(k) for k in ("prompt_embeddings", "deep_prompt_embeddings") if k in state]
    return model, {"Prompt_Tokens": torch.cat(prompts)} | backbone_state() | state, case


@pytest.mark.parametrize("name", ["vpt_deep_cls", "vpt_shallow_cls"])
def test_vpt_in_cvpts_code_is_vpt(name: str) -> None:
    model, state, case = cvpts_vpt(name)
    assert set(load_official_state_dict(model, state).loaded) == set(state)
    same_output(model, case)


def test_vpt_in_cvpts_code_is_no_cvpt_and_names_its_options() -> None:
    _, state, case = cvpts_vpt("vpt_deep_cls")
    (line,) = refused(blank("cvpt_insert3")[0], state, strict=False)
    assert "the state is from the VPT in CVPT's code (it has Prompt_Tokens)" in line
    assert "make the model with `fastprompt.VPTConfig`" in line
    config = fastprompt.VPTConfig(case.config["NUM_TOKENS"], deep=False)
    shallow = fastprompt.get_prompt_model(golden_files.backbone(False), config)
    (line,) = refused(shallow, state, strict=False)[1:]
    assert "check `deep` and `blocks`, or the timm model's depth" in line


def test_prompt_tokens_without_a_backbone_are_of_cvpt() -> None:
    (line,) = refused(vpt(num_classes=0), golden("cvpt_insert3")[1], strict=False)
    assert "make the model with `fastprompt.CVPTConfig`" in line
    assert "the VPT in CVPT's code is recognised only with its backbone" in line


def test_cvpt_without_prompts_is_no_pretraining() -> None:
    base: Any = golden_files.backbone(False, num_classes=3)
    model = fastprompt.get_prompt_model(base, fastprompt.CVPTConfig(4))
    head = {"head.weight": torch.randn(3, 64), "head.bias": torch.randn(3)}
    state = backbone_state() | cvpt_copies(backbone_state()) | head
    (line,) = refused(model, state)[1:]
    assert line == "- missing: Prompt_Tokens (prompts.0, prompts.1, prompts.2)"
    report = load_official_state_dict(model, state, strict=False)
    assert report.missing == ("prompts.0", "prompts.1", "prompts.2")
    assert torch.equal(base.head.weight, head["head.weight"].double())
    (line,) = refused(vpt(), state)
    assert "make the model with `fastprompt.CVPTConfig`" in line


def test_tuned_head_of_vpt_without_prompts_is_no_pretraining() -> None:
    head = {"head.last_layer.weight": torch.randn(3, 64), "head.last_layer.bias": torch.randn(3)}
    lines = refused(vpt(), prefixed(backbone_state(), "enc.") | head)[1:]
    assert [line.split(" (")[0] for line in lines] == [
        "- missing: prompt_embeddings",
        "- missing: deep_prompt_embeddings",
    ]


def cvpt_copies(state: State) -> State:
    """The attention weights once more, as CVPT's cross-attention holds them."""
    return {k.replace("attn", "CrossAttn"): t for k, t in separate(state).items() if ".attn." in k}


def test_whole_model_of_cvpt_holds_the_attention_twice() -> None:
    model, state, case = blank("cvpt_insert3")
    copies = cvpt_copies(backbone_state())
    report = load_official_state_dict(model, backbone_state() | copies | state)
    assert set(report.ignored) == set(copies)
    same_output(model, case)


@pytest.mark.parametrize("with_backbone", [True, False])
def test_cross_attention_of_its_own_is_refused(with_backbone: bool) -> None:
    model, state, _ = golden("cvpt_insert3")
    copies = cvpt_copies(backbone_state())
    copies["blocks.1.CrossAttn.k.bias"] = copies["blocks.1.CrossAttn.k.bias"] + 1
    whole = copies | state | (backbone_state() if with_backbone else {})
    (line,) = refused(model, whole, strict=False)[1:]
    assert line.startswith("- blocks.1.CrossAttn.k.bias: differs from the block's own attention weight")


def test_mae_leaves_prompts_head_and_the_norm_after_the_mean_as_they_are() -> None:
    model = vpt(mean_pooled=True)
    kept = {
        k: t.clone() for k, t in model.state_dict().items() if "norm" in k or "head" in k or "prompts" in k
    }
    kept = {k: t for k, t in kept.items() if ".blocks." not in k}
    pretraining = {
        **backbone_state(),
        "mask_token": torch.randn(1, 1, 32),
        "decoder_pos_embed": torch.randn(1, 17, 32),
        "decoder_blocks.0.attn.qkv.weight": torch.randn(96, 32),
    }
    report = load_official_state_dict(model, {"model": pretraining})
    unused = {
        "norm.weight",
        "norm.bias",
        "mask_token",
        "decoder_pos_embed",
        "decoder_blocks.0.attn.qkv.weight",
    }
    assert set(report.ignored) == unused
    assert report.missing == ("base.head.weight", "base.head.bias", "prompts.0", "prompts.1", "prompts.2")
    has_backbone(model, {k: t for k, t in backbone_state().items() if not k.startswith("norm.")})
    assert len(kept) == 7
    for name, t in kept.items():
        assert torch.equal(model.state_dict()[name], t), name


def test_finetuned_mae_brings_its_norm_after_the_mean() -> None:
    model = vpt(mean_pooled=True)
    state = {("fc_" + k if k.startswith("norm.") else k): t for k, t in backbone_state().items()}
    report = load_official_state_dict(model, {"model": state | {"head.weight": torch.randn(1000, 64)}})
    assert report.ignored == ("head.weight",)
    has_backbone(model, state)


def test_gate_vpt_on_mae_takes_its_norm() -> None:
    base = golden_files.backbone(True, num_classes=3)
    scramble(base, frozen=True)
    model: Any = fastprompt.get_prompt_model(base, fastprompt.GateVPTConfig(4, pool="all"))
    assert load_official_state_dict(model, {"model": backbone_state()}).ignored == ()
    assert torch.equal(model.base.fc_norm.weight, backbone_state()["norm.weight"].double())


def test_mocos_base_encoder_is_loaded_and_its_momentum_encoder_is_not() -> None:
    model = vpt()
    other = {k: torch.randn_like(t) for k, t in backbone_state().items()}
    state = {
        **prefixed(other, "module.momentum_encoder."),
        **prefixed(backbone_state(), "module.base_encoder."),
        "module.base_encoder.head.0.weight": torch.randn(128, 64),
        "module.predictor.0.weight": torch.randn(128, 128),
    }
    report = load_official_state_dict(model, {"epoch": 300, "arch": "vit_base", "state_dict": state})
    assert set(report.loaded) == set(prefixed(backbone_state(), "module.base_encoder."))
    assert set(report.ignored) == set(state) - set(report.loaded)
    has_backbone(model, backbone_state())


def test_momentum_encoder_alone_and_mocos_linear_probe() -> None:
    for prefix in ("module.momentum_encoder.", "module."):
        model = vpt()
        state = prefixed(backbone_state() | {"head.weight": torch.randn(1000, 64)}, prefix)
        assert load_official_state_dict(model, {"state_dict": state}).ignored == (f"{prefix}head.weight",)
        has_backbone(model, backbone_state())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("with_prompts", [True, False])
def test_half_a_backbone_is_refused(with_prompts: bool, strict: bool) -> None:
    model, state, _ = blank("vpt_deep_cls")
    whole = backbone_state() | (state if with_prompts else {})
    del whole["blocks.1.norm1.bias"], whole["pos_embed"]
    (line,) = refused(model, whole, strict)[1:]
    assert line.startswith("- incomplete backbone, without base.pos_embed, base.blocks.1.norm1.bias;")


def test_tuned_biases_need_da_vpt_plus() -> None:
    _, state, case = golden("davpt_cls")
    base: Any = golden_files.backbone(False, num_classes=case.config["num_classes"])
    config = fastprompt.DAVPTConfig(case.config["num_prompts"], case.config["proxy_prompt_len"], (1, 2))
    (line,) = refused(fastprompt.get_prompt_model(base, config), state)[1:]
    assert "incomplete backbone" in line
    assert "tune='prompts+biases'" in line


def test_norm_before_the_mean_is_not_taken_for_one_after_it() -> None:
    model, state, _ = blank("vpt_deep_mean")
    lines = refused(model, backbone_state() | state)
    assert (
        "incomplete backbone, without base.fc_norm.weight, base.fc_norm.bias; its norm is before the mean"
        in lines[1]
    )
    assert "global_pool='avg', fc_norm=False" in lines[1]
    assert lines[2:] == ["- unexpected: norm.bias", "- unexpected: norm.weight"]


def test_norm_after_the_mean_is_not_taken_for_one_before_it() -> None:
    model, state, _ = blank("davpt_mean")
    backbone = {("fc_" + k if k.startswith("norm.") else k): t for k, t in backbone_state().items()}
    line = refused(model, separate(backbone) | state)[1]
    assert "its norm is after the mean: build the timm model with global_pool='avg', fc_norm=True" in line


def test_positions_of_another_image_size_and_another_width_have_their_remedies() -> None:
    size, width = (
        backbone_state() | {"pos_embed": torch.randn(1, *shape)} for shape in ((197, 64), (17, 32))
    )
    (line,) = refused(vpt(), size)[1:]
    assert line.startswith(
        "- pos_embed: is (1, 197, 64), the model's is (1, 17, 64); check the timm model's image"
    )
    assert "`img_size`" in line
    assert "`timm.layers.resample_abs_pos_embed`" in line
    (line,) = refused(vpt(), width)[1:]
    assert line.endswith("the model's is (1, 17, 64); check the timm model's width (`embed_dim`)")


@pytest.mark.parametrize("name", timm_families.PROMPTABLE)
def test_timm_names_of_every_family(name: str) -> None:
    source, target = timm_families.small(name, seed=1), timm_families.small(name, seed=2)
    model = fastprompt.get_prompt_model(target, fastprompt.VPTConfig(2))
    heads = tuple(f"{head}." for head in ("head", "head_dist"))
    state = {k: t for k, t in source.state_dict().items() if not k.startswith(heads)}
    assert set(load_official_state_dict(model, source.state_dict()).loaded) == set(state)
    has_backbone(model, state)


@pytest.mark.parametrize("name", ["vit", "eva02-unfused-swiglu", "rope-unfused-no-bias"])
def test_packed_and_separate_maps_fit_models_of_both_kinds(name: str) -> None:
    source, target = timm_families.small(name, seed=1), timm_families.small(name, seed=2)
    state = {k.replace("_proj.", "."): t for k, t in separate(source.state_dict()).items()}
    for layer in range(timm_families.DEPTH):
        if name != "vit":
            parts = [state.pop(f"blocks.{layer}.attn.{part}.weight") for part in "qkv"]
            state[f"blocks.{layer}.attn.qkv.weight"] = torch.cat(parts)
    model = fastprompt.get_prompt_model(target, fastprompt.VPTConfig(2))
    assert not load_official_state_dict(model, state).unexpected
    has_backbone(model, {k: t for k, t in source.state_dict().items() if not k.startswith("head.")})


def npz(state: State, heads: int) -> dict[str, Any]:
    """The backbone as Google publishes it: kernels transposed, heads apart."""
    arrays: dict[str, Tensor] = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    width = state["cls_token"].shape[-1]
    for i in range(3):
        block, here = separate(state, ("query", "key", "value")), f"Transformer/encoderblock_{i}"
        attention = f"{here}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            weight = block[f"blocks.{i}.attn.{part}.weight"]
            arrays[f"{attention}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{part}/bias"] = block[f"blocks.{i}.attn.{part}.bias"].view(heads, -1)
        arrays[f"{attention}/out/kernel"] = block[f"blocks.{i}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = block[f"blocks.{i}.attn.proj.bias"]
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{here}/{theirs}/scale"] = block[f"blocks.{i}.{ours}.weight"]
            arrays[f"{here}/{theirs}/bias"] = block[f"blocks.{i}.{ours}.bias"]
        for j in (0, 1):
            dense = f"{here}/MlpBlock_3/Dense_{j}"
            arrays[f"{dense}/kernel"] = block[f"blocks.{i}.mlp.fc{j + 1}.weight"].T
            arrays[f"{dense}/bias"] = block[f"blocks.{i}.mlp.fc{j + 1}.bias"]
    return {name: np.ascontiguousarray(t.numpy()) for name, t in arrays.items()}


def test_npz_backbone_by_timm_and_prompts_by_us_give_the_official_output(tmp_path: Path) -> None:
    model, state, case = blank("vpt_deep_cls")
    path = tmp_path / "ViT-B_16.npz"
    np.savez(path, **npz(backbone_state(), heads=2))
    model.base.load_pretrained(str(path))
    load_official_state_dict(model, state)
    same_output(model, case)
    assert output(case).shape == (3, 64)
