"""DA-VPT and DA-VPT+ against the numbers of the official code: logits, metric loss and every gradient."""

from __future__ import annotations

import json
from typing import Any

import golden_files
import pytest
import timm
import torch
from method_models import METHODS, changed, outputs_and_gradients, prompted
from timm_families import images
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastprompt
from bench.correctness import assert_same
from bench.papers import paper_model
from fastprompt import DAVPTConfig, PromptConfig

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
    golden_files.assert_official(output.logits, case.tensors["logits"])
    golden_files.assert_official(output.method_loss, case.tensors["metric_loss"][0])
    ((output.logits * case.tensors["cotangent"]).sum() + output.method_loss).backward()
    for p, gradient in zip(model.prompts, in_order(model, case, "grad"), strict=True):
        golden_files.assert_official(p.grad, gradient)
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
        golden_files.assert_official(mine[key], gradient)


# The mask ---------------------------------------------------------------------------------------------------------


@SHORTCUTS
def test_masked_prompts_give_the_official_logits(shortcuts: bool) -> None:
    """The last block has P_g prompts, the others P; its mask is as long as its own prompts."""
    case = golden_files.load("davpt_mask_all")
    with golden_files.safe_open(golden_files.FOLDER / "davpt_mask_all.safetensors", "pt") as file:
        base = timm.create_model(**json.loads(file.metadata()["timm"]))
    fields = dict(case.config)
    config = DAVPTConfig(mask_prompts=fields.pop("mask"), **fields)
    model = fastprompt.get_prompt_model(base, config, shortcuts=shortcuts).eval()
    state = {k.removeprefix("state."): t for k, t in case.tensors.items() if k.startswith("state.")}
    fastprompt.load_official_state_dict(model, state)
    x = case.tensors["input"].double()
    golden_files.assert_official(model.double()(x), case.tensors["logits"])
    golden_files.assert_official(model.fold()(x), case.tensors["logits"])
    model.config = changed(config, mask_prompts=False)
    assert (model(x) - case.tensors["logits"]).norm() > 0.01 * case.tensors["logits"].norm()


@SHORTCUTS
@pytest.mark.parametrize("pool", ["all", "prompt"])
@pytest.mark.parametrize("family", ["vit", "vit-registers", "vit-qk-norm", "vit-layer-scale"])
def test_masked_prompts_give_the_papers_gradients(family: str, pool: str, shortcuts: bool) -> None:
    config = changed(METHODS["da-vpt"], mask_prompts=True, pool=pool)
    model = prompted(family, config, shortcuts=shortcuts)
    assert_same(outputs_and_gradients(model, images(4)), outputs_and_gradients(paper_model(model), images(4)))


@pytest.mark.parametrize("pool", ["backbone", "image"])
def test_a_mask_without_readers_changes_nothing_and_costs_nothing(pool: str) -> None:
    def run(mask: bool) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(1)
        config: PromptConfig = changed(METHODS["da-vpt"], mask_prompts=mask, pool=pool)
        model = prompted("vit", config)
        with FlopCounterMode(display=False) as counter:
            model(images(4))
        return outputs_and_gradients(model, images(4)), counter.get_total_flops()

    masked, unmasked = run(True), run(False)
    assert masked[1] == unmasked[1]
    for name, x in unmasked[0].items():
        assert torch.equal(masked[0][name], x), name
