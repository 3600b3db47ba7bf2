"""The papers' form of the methods gives the numbers of the published code; VPT's are checked in test_vpt_golden.py."""

from __future__ import annotations

from typing import Any

import golden_files
import pytest
import torch
from torch import Tensor, nn

import fastprompt
from bench.papers import paper_model
from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig


def published(case: golden_files.Case, config: PromptConfig, base: Any, state: dict[str, Any]) -> nn.Module:
    """Return the papers' form with the parameters of a golden case: `state`, and the head if there is one."""
    model: Any = fastprompt.get_prompt_model(base, config)
    head = {f"base.head.{n}": case.tensors.get(f"prompt.head.{n}") for n in ("weight", "bias")}
    with torch.no_grad():
        for name, value in {**state, **head}.items():
            if value is not None:
                model.get_parameter(name).copy_(value)
    if "class_to_prompt" in case.tensors:
        model.class_to_prompt.copy_(case.tensors["class_to_prompt"])
    return paper_model(model.train())


def check(model: nn.Module, case: golden_files.Case, gradients: dict[str, Tensor]) -> None:
    """Compare the output and the gradients of the parameters that `gradients` names."""
    labels = case.tensors.get("labels")
    out = model(case.tensors["input"]) if labels is None else model(case.tensors["input"], labels)
    logits, loss = (out, 0) if labels is None else out
    found, expected = [logits], [case.tensors["features" if "features" in case.tensors else "logits"]]
    if labels is not None:
        found, expected = [*found, loss], [*expected, case.tensors["metric_loss"][0]]
    ((logits * case.tensors["cotangent"]).sum() + loss).backward()
    found += [model.get_parameter(name).grad for name in gradients]
    expected += [gradient.view_as(model.get_parameter(name)) for name, gradient in gradients.items()]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", golden_files.names("gatevpt_"))
def test_gate_vpt(name: str) -> None:
    case = golden_files.load(name)
    config = GateVPTConfig(
        case.config["NUM_TOKENS"],
        num_gates=case.config["GATE_NUM"],
        temperature_range=(case.config["TEMP_MIN"], case.config["TEMP_MAX"]),
        pool="all" if case.mean_pooled else "backbone",
        dropout=case.config["DROPOUT"],
    )
    keys = {"prompts.0": "prompt_embeddings", "gate_logits": "gate_logit", "temperature": "temp"}
    state = {name: case.tensors[f"prompt.{key}"] for name, key in keys.items()}
    state["prompts.0"] = state["prompts.0"][0]
    model = published(case, config, golden_files.backbone(case.mean_pooled), state)
    check(model, case, {name: case.tensors[f"grad.{key}"] for name, key in keys.items()})


def of_blocks(case: golden_files.Case, key: str) -> dict[str, Tensor]:
    return {f"prompts.{i}": t for i, t in enumerate(case.tensors[key])}


@pytest.mark.parametrize("name", golden_files.names("cvpt_"))
def test_cvpt(name: str) -> None:
    case = golden_files.load(name)
    config = CVPTConfig(case.config["num_prompts"], insert=case.config["insert"])
    base = golden_files.backbone(False, num_classes=case.config["num_classes"])
    model = published(case, config, base, of_blocks(case, "prompt.Prompt_Tokens"))
    check(model, case, of_blocks(case, "grad.Prompt_Tokens"))


DA_VPT = [name for name in golden_files.names("davpt_") if name != "davpt_kmeans"]


@pytest.mark.parametrize("name", DA_VPT)
def test_da_vpt(name: str) -> None:
    case = golden_files.load(name)
    c = case.config
    guided = range(c["proxy_prompt_start_idx"], c["proxy_prompt_end_idx"] + 1)
    config = DAVPTConfig(
        c["num_prompts"],
        c["proxy_prompt_len"],
        (guided[0], guided[-1]),
        prompt_norm=c["vpt_norm"],
        criterion={"proxyanchor": "proxy_anchor", "proxynca": "proxy_nca"}[c["criterion"]],
        class_feature=c["cls_type"],
        patch_weight=c["vpt_loss_weight"],
        class_weight=c["cls_loss_weight"],
        proxy_scale=c["loss_vpt_scale_ratio"],
        alpha=c["loss_oproxy_pos_alpha"],
        delta=c["loss_oproxy_pos_delta"],
        pool={"all": "all", "img": "image"}[c["mae_pooling"]] if name == "davpt_mean" else "backbone",
    )
    base: Any = golden_files.backbone(False, num_classes=c["num_classes"])
    base.global_pool = "avg" if name == "davpt_mean" else "token"

    def in_order(kind: str) -> dict[str, Tensor]:
        sources = [iter(case.tensors[f"{kind}.{which}_prompt_tokens"]) for which in ("other", "proxy")]
        return {f"prompts.{i}": next(sources[i in guided]) for i in range(len(base.blocks))}

    check(published(case, config, base, in_order("prompt")), case, in_order("grad"))
