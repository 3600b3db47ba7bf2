"""DA-VPT and DA-VPT+ against the numbers of the official code: logits, metric loss and every gradient."""

from __future__ import annotations

from typing import Any

import golden_files
import pytest
import torch
from torch import Tensor

import fastprompt
from fastprompt import DAVPTConfig

CASES = [name for name in golden_files.names("davpt_") if name not in ("davpt_kmeans", "davpt_mask_all")]
SHORTCUTS = pytest.mark.parametrize("shortcuts", [True, False], ids=["shortcuts", "full"])
POOLS = {"all": "all", "img": "image"}


def config_of(case: golden_files.Case) -> DAVPTConfig:
    c = case.config
    assert c["loss_oproxy_pos_alpha"] == c["loss_oproxy_neg_alpha"]
    assert c["loss_oproxy_pos_delta"] == -c["loss_oproxy_neg_delta"]
    kinds = {"vpt": "prompt"}
    return DAVPTConfig(
        c["num_prompts"],
        c["proxy_prompt_len"],
        (c["proxy_prompt_start_idx"], c["proxy_prompt_end_idx"]),
        prompt_norm=c["vpt_norm"],
        criterion={"proxyanchor": "proxy_anchor", "proxynca": "proxy_nca"}[c["criterion"]],
        class_feature=c["cls_type"],
        proxy_for_class=kinds[c["vpt_type_for_cls_ml"]],
        proxy_for_patch=kinds[c["vpt_type_for_patch_ml"]],
        patch_weight=c["vpt_loss_weight"],
        class_weight=c["cls_loss_weight"],
        proxy_scale=c["loss_vpt_scale_ratio"],
        alpha=c["loss_oproxy_pos_alpha"],
        delta=c["loss_oproxy_pos_delta"],
        dropout=c["prompt_drop_rate"],
        pool=POOLS[c["mae_pooling"]] if case.mean_pooled else "backbone",
        tune="prompts+biases",
    )


def load(name: str) -> golden_files.Case:
    case = golden_files.load(name)
    return case._replace(mean_pooled=name == "davpt_mean")


def prompt_model(case: golden_files.Case, shortcuts: bool = True) -> Any:
    base: Any = golden_files.backbone(False, num_classes=case.config["num_classes"])
    if case.mean_pooled:
        base.global_pool = "avg"  # norm, then mean
    model: Any = fastprompt.get_prompt_model(base, config_of(case), shortcuts=shortcuts)
    with torch.no_grad():
        for mine, theirs in zip(model.prompts, in_order(model, case, "prompt"), strict=True):
            mine.copy_(theirs)
        model.base.head.weight.copy_(case.tensors["prompt.head.weight"])
        model.base.head.bias.copy_(case.tensors["prompt.head.bias"])
        model.class_to_prompt.copy_(case.tensors["class_to_prompt"])
    return model


def in_order(model: Any, case: golden_files.Case, kind: str) -> list[Tensor]:
    """Proxies and other prompts in the order of the blocks."""
    proxies = iter(case.tensors[f"{kind}.proxy_prompt_tokens"])
    others = iter(case.tensors[f"{kind}.other_prompt_tokens"])
    guided = model.guided
    return [next(proxies if i in guided else others) for i in range(len(model.prompts))]


def trained_gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of what trains on the backbone, under the official names (q, k and v apart)."""
    found = {}
    for name, p in model.base.named_parameters():
        if not p.requires_grad:
            continue
        if name.endswith("attn.qkv.bias"):
            for part, gradient in zip("qkv", p.grad.chunk(3), strict=True):
                found[name.replace("qkv", part)] = gradient
        else:
            found[name] = p.grad
    return found


def test_all_four_cases_are_there() -> None:
    assert len(CASES) == 4


@SHORTCUTS
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_equal_the_official_code(name: str, shortcuts: bool) -> None:
    case = load(name)
    model = prompt_model(case, shortcuts).train()
    output = model(case.tensors["input"], labels=case.tensors["labels"])
    torch.testing.assert_close(output.logits, case.tensors["logits"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(output.method_loss, case.tensors["metric_loss"][0], rtol=1e-9, atol=1e-12)
    ((output.logits * case.tensors["cotangent"]).sum() + output.method_loss).backward()
    for p, gradient in zip(model.prompts, in_order(model, case, "grad"), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
    mine = trained_gradients(model)
    theirs = {
        key.removeprefix("grad."): t
        for key, t in case.tensors.items()
        if key.startswith("grad.") and not key.endswith("prompt_tokens")
    }
    for key in [k for k in mine if k.endswith("attn.q.bias")]:
        assert not mine.pop(key).any(), "q's part of the packed bias does not train"
    assert set(mine) == set(theirs)
    for key, gradient in theirs.items():
        torch.testing.assert_close(
            mine[key], gradient, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}"
        )
