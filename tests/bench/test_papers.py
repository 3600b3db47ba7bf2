"""The papers' form of the methods gives the numbers of the published code; VPT's are checked in test_vpt_golden.py."""

from __future__ import annotations

from typing import Any

import golden_files
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm_families import small
from torch import Tensor, nn

import fastprompt
from bench.correctness import assert_same
from bench.models import BareBackbone
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
    if labels is None:
        logits, loss = model(case.tensors["input"]), 0
    else:
        logits, loss = model(case.tensors["input"], labels)
        assert_same(loss, case.tensors["metric_loss"][0])
    assert_same(logits, case.tensors["features" if "features" in case.tensors else "logits"])
    ((logits * case.tensors["cotangent"]).sum() + loss).backward()
    assert_same(
        {name: model.get_parameter(name).grad for name in gradients},
        {name: gradient.view_as(model.get_parameter(name)) for name, gradient in gradients.items()},
    )


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


DA_VPT = [name for name in golden_files.names("davpt_") if name not in ("davpt_kmeans", "davpt_mask_all")]


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


def test_da_vpt_with_masked_prompts() -> None:
    tensors = golden_files.load("davpt_mask_all").tensors
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
    base = VisionTransformer(**sizes, global_pool="avg", fc_norm=False).double()
    config = DAVPTConfig(7, 3, (1, 2), prompt_norm="l2", pool="all", mask_prompts=True)
    model = fastprompt.get_prompt_model(base, config).eval()
    state = {key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")}
    fastprompt.load_official_state_dict(model, state)
    assert_same(paper_model(model)(tensors["input"].double()), tensors["logits"])


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            "eva02-fused-glu",
            CVPTConfig(2),
            "needs blocks of timm's `Block` with `Attention`; blocks.0 is EvaBlock",
        ),
        ("vit", DAVPTConfig(2, 2, (0, 0), tune="prompts+biases"), "needs tune='prompts'"),
    ],
)
def test_what_is_not_written_is_refused(family: str, config: PromptConfig, message: str) -> None:
    model = fastprompt.get_prompt_model(small(family), config)
    with pytest.raises(NotImplementedError, match=message):
        paper_model(model)


def test_the_backward_of_the_bare_backbone_runs_through_every_block() -> None:
    model = BareBackbone(golden_files.backbone(False))
    seen: list[int] = []
    for i, block in enumerate(model.base.blocks):
        block.register_full_backward_hook(lambda *_, i=i: seen.append(i))
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).sum().backward()
    assert seen == [2, 1, 0]
