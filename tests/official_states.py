"""States under the names of the official code, and models that do not hold their values yet."""

from __future__ import annotations

import json
from typing import Any

import golden_files
import timm
import torch
from torch import Tensor, nn

import fastprompt

State = dict[str, Tensor]

POOLS = {"original": "all", "img_pool": "image", "prompt_pool": "prompt", "all": "all"}
# `davpt_mask_all` holds a whole model of other sizes (test_checkpoint_backbones.py).
CASES = [
    name
    for name in golden_files.names("")
    if name not in ("backbone_small", "davpt_kmeans", "davpt_mask_all")
]


def config_of(name: str, case: golden_files.Case, tune: Any) -> fastprompt.PromptConfig:
    c, mean = case.config, case.mean_pooled or name == "davpt_mean"
    if name.startswith("vpt"):
        pool: Any = POOLS[c["VIT_POOL_TYPE"]] if mean else "backbone"
        return fastprompt.VPTConfig(c["NUM_TOKENS"], deep=c["DEEP"], pool=pool)
    if name.startswith("gatevpt"):
        return fastprompt.GateVPTConfig(
            c["NUM_TOKENS"],
            num_gates=c["GATE_NUM"],
            temperature_range=(c["TEMP_MIN"], c["TEMP_MAX"]),
            pool="all" if mean else "backbone",
            dropout=c["DROPOUT"],
        )
    if name.startswith("cvpt"):
        return fastprompt.CVPTConfig(c["num_prompts"], insert=c["insert"])
    assert c["loss_oproxy_pos_alpha"] == c["loss_oproxy_neg_alpha"]
    assert c["loss_oproxy_pos_delta"] == -c["loss_oproxy_neg_delta"]
    assert c["vpt_type_for_cls_ml"] == c["vpt_type_for_patch_ml"] == "vpt"  # the prompts themselves
    return fastprompt.DAVPTConfig(
        c["num_prompts"],
        c["proxy_prompt_len"],
        (c["proxy_prompt_start_idx"], c["proxy_prompt_end_idx"]),
        prompt_norm=c["vpt_norm"],
        criterion={"proxyanchor": "proxy_anchor", "proxynca": "proxy_nca"}[c["criterion"]],
        class_feature=c["cls_type"],
        patch_weight=c["vpt_loss_weight"],
        class_weight=c["cls_loss_weight"],
        proxy_scale=c["loss_vpt_scale_ratio"],
        alpha=c["loss_oproxy_pos_alpha"],
        delta=c["loss_oproxy_pos_delta"],
        dropout=c["prompt_drop_rate"],
        pool={"all": "all", "img": "image"}[c["mae_pooling"]] if mean else "backbone",
        tune=tune,
    )


def golden(
    name: str, *, shortcuts: bool = True, tune: str = "prompts+biases"
) -> tuple[Any, State, golden_files.Case]:
    """Return a model for the golden case, with random numbers for all that trains; what was trained; the case."""
    case = golden_files.load(name)
    base: Any = golden_files.backbone(case.mean_pooled, num_classes=case.config.get("num_classes", 0))
    if name == "davpt_mean":
        base.global_pool = "avg"  # norm, then mean
    config = config_of(name, case, tune)
    model: Any = fastprompt.get_prompt_model(base, config, shortcuts=shortcuts).eval()
    state = {k.removeprefix("prompt."): t for k, t in case.tensors.items() if k.startswith("prompt.")}
    if name.startswith("davpt") and tune == "prompts+biases":  # what else trains, with the backbone's values
        split = separate(backbone_state())
        gradients = [k.removeprefix("grad.") for k in case.tensors if k.startswith("grad.")]
        state |= {k: split[k] for k in gradients if k not in state}
    scramble(model)
    return model, state, case


def masked(
    *, shortcuts: bool = True, fc_norm: bool = False, **changes: Any
) -> tuple[Any, State, Tensor, Tensor]:
    """DA-VPT's recipe for CUB-200 on MAE: a model for it, the official state, images and the official logits."""
    tensors, fields, _ = golden_files.load("davpt_mask_all")
    with golden_files.safe_open(golden_files.FOLDER / "davpt_mask_all.safetensors", "pt") as file:
        base = timm.create_model(**{**json.loads(file.metadata()["timm"]), "fc_norm": fc_norm}).double()
    config = fastprompt.DAVPTConfig(**{"mask_prompts": fields.pop("mask"), **fields, **changes})
    model = fastprompt.get_prompt_model(base, config, shortcuts=shortcuts).eval()
    state = {k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}
    return model, state, tensors["input"].double(), tensors["logits"]


def output(case: golden_files.Case) -> Tensor:
    """The official code's output."""
    return case.tensors["logits" if "logits" in case.tensors else "features"]


def backbone_state() -> State:
    """The golden backbone under timm's names, as MAE and MoCo v3 use them."""
    return golden_files.load("backbone_small").tensors


def scramble(model: nn.Module, frozen: bool = False) -> None:
    """Random numbers for what trains (of a packed bias k's and v's part), or for everything."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if frozen:
                p.normal_()
            elif p.requires_grad:
                (p[len(p) // 3 :] if name.endswith("qkv.bias") else p).normal_()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: t for key, t in state.items()}


def separate(state: State, parts: tuple[str, str, str] = ("q", "k", "v")) -> State:
    """Packed maps apart, `attn.qkv` as `attn.q`, `attn.k` and `attn.v`."""
    found: State = {}
    for key, t in state.items():
        if ".qkv." in key:
            found |= {key.replace("qkv", part): third for part, third in zip(parts, t.chunk(3), strict=True)}
        else:
            found[key] = t
    return found


def jax_names(state: State) -> State:
    """The backbone under the names of VPT's supervised ViT."""
    names = {
        "blocks.": "encoder.layer.",
        "norm1.": "attention_norm.",
        "norm2.": "ffn_norm.",
        "mlp.": "ffn.",
        "attn.proj.": "attn.out.",
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.",
    }
    found = {}
    for key, t in separate(state, ("query", "key", "value")).items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        found["encoder.encoder_" + key if key.startswith("norm.") else key] = t
    return found
