"""The demo: agreement with concatenation, its parts, and a smoke run through the command line."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import fastprompt
from fastprompt import cli
from fastprompt.demo.backbone import UprightDigits, build, turn
from fastprompt.demo.concat import ConcatVPT
from fastprompt.demo.measure import compare, fastest_steps
from fastprompt.demo.probe import fit_probe
from fastprompt.demo.protocol import LINEAR_PROBE, METHODS, Protocol
from fastprompt.demo.report import QUICK_NOTE
from fastprompt.demo.run import prepare, prompted, run


def small_vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 4, "num_heads": 3}
    return VisionTransformer(**{**sizes, "num_classes": 5, **kwargs})


@pytest.mark.parametrize(
    ("config", "vit"),
    [
        pytest.param(fastprompt.VPTConfig(5, deep=True), {}, id="deep"),
        pytest.param(fastprompt.VPTConfig(5, deep=True, blocks=2), {}, id="partial deep"),
        pytest.param(fastprompt.VPTConfig(5, deep=False), {}, id="shallow"),
        pytest.param(fastprompt.VPTConfig(1, deep=True), {"reg_tokens": 2}, id="registers"),
        pytest.param(
            fastprompt.VPTConfig(5, deep=True), {"global_pool": "avg", "class_token": False}, id="mean"
        ),
    ],
)
def test_concatenation_and_fastprompt_are_one_function(
    config: fastprompt.VPTConfig, vit: dict[str, Any]
) -> None:
    model = fastprompt.get_prompt_model(small_vit(**vit).double(), config).train()
    twin = ConcatVPT.twin(model).train()
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    logits, twin_logits = model(images), twin(images)
    torch.testing.assert_close(logits, twin_logits, rtol=1e-10, atol=1e-10)
    w = torch.randn_like(logits)
    gradients = torch.autograd.grad((logits * w).sum(), [*model.prompts, model.base.head.weight])
    twin_gradients = torch.autograd.grad((twin_logits * w).sum(), [*twin.prompts, twin.base.head.weight])
    torch.testing.assert_close(gradients, twin_gradients, rtol=1e-10, atol=1e-10)


def test_the_twin_shares_no_weight_with_the_model() -> None:
    model = fastprompt.get_prompt_model(small_vit(), fastprompt.VPTConfig(2))
    twin = ConcatVPT.twin(model)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert pointers.isdisjoint(p.data_ptr() for p in twin.parameters())


def test_the_twin_refuses_what_it_does_not_compute() -> None:
    model = fastprompt.get_prompt_model(small_vit(), fastprompt.VPTConfig(2, dropout=0.1))
    with pytest.raises(NotImplementedError, match="needs VPT without dropout"):
        ConcatVPT.twin(model)


def test_no_time_is_reported_where_the_two_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ConcatVPT.forward
    monkeypatch.setattr(ConcatVPT, "forward", lambda self, images: plain(self, images) * 1.5)
    model = fastprompt.get_prompt_model(small_vit(), fastprompt.VPTConfig(2))
    with pytest.raises(RuntimeError, match="no time is reported"):
        compare(model, torch.randn(4, 1, 8, 8), torch.arange(4), rounds=1)


def test_compare_measures_both() -> None:
    model = fastprompt.get_prompt_model(small_vit(), fastprompt.VPTConfig(2))
    found = compare(model, torch.randn(4, 1, 8, 8), torch.arange(4), rounds=2)
    assert found.step_ms > 0
    assert found.ratio == pytest.approx(found.concat_step_ms / found.step_ms)
    assert found.logit_difference < 1e-5


def test_steps_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    times = fastest_steps([lambda: calls.append("a"), lambda: calls.append("b")], 2)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert all(0 <= t < 1 for t in times)


def test_turning_turns_only_the_chosen_images() -> None:
    images = torch.arange(18.0).reshape(2, 1, 3, 3)
    turned = turn(images, torch.tensor([0, 1]))
    assert torch.equal(turned[0], images[0])
    assert torch.equal(turned[1], torch.rot90(images[1], 1, (1, 2)))


def test_upright_scores_are_every_second() -> None:
    model = build(Protocol.quick().backbone, 10).eval()
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(UprightDigits(model)(images), model(images)[:, ::2])


def test_linear_probe_separates_what_a_line_separates() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = 4 * torch.nn.functional.one_hot(labels, 8) + torch.randn(60, 8, generator=generator)
    plain = features[:30].unsqueeze(1)
    found = fit_probe(plain, plain.expand(-1, 2, -1), labels[:30], seed=0)
    assert found.weight.shape == (3, 8)
    assert found.bias.shape == (3,)
    assert found.accuracy(features[30:], labels[30:]) > 0.9
    assert torch.equal(fit_probe(plain, plain.expand(-1, 2, -1), labels[:30], seed=0).weight, found.weight)


def test_linear_probe_takes_distorted_copies_only_where_they_help() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    plain = (labels.float()[:, None, None] * 2 - 1) + 0.1 * torch.randn(40, 1, 4, generator=generator)
    misleading = torch.cat([plain, -plain, -plain], 1)
    found = fit_probe(plain, misleading, labels, seed=0)
    assert not found.distorted
    assert found.accuracy(plain[:, 0], labels) == 1.0


def test_pool_and_test_set_hold_each_new_image_once_whatever_the_seed() -> None:
    protocol = Protocol.quick()
    first, second = prepare(protocol, seed=0), prepare(protocol, seed=1)
    assert len(first.pool) == protocol.pool
    assert len(first.pool) + len(first.test) == 896
    assert torch.equal(first.test.images, second.test.images)
    assert not any(p.requires_grad for p in first.backbone.parameters())


def test_models_of_one_backbone_share_no_trained_weight() -> None:
    backbone = small_vit()
    kept = copy.deepcopy(backbone.state_dict())
    method = METHODS["VPT-Deep"]
    one, other = (prompted(backbone, method, 3, seed=seed) for seed in (0, 1))
    assert one.base.head.weight.data_ptr() != other.base.head.weight.data_ptr()
    assert not torch.equal(one.prompts[0], other.prompts[0])
    assert torch.equal(prompted(backbone, method, 3, seed=0).prompts[0], one.prompts[0])
    assert all(torch.equal(kept[name], value) for name, value in backbone.state_dict().items())


def test_the_whole_run_is_decided_by_its_seeds() -> None:
    protocol = replace(Protocol.quick(), timing_rounds=1)
    first, second = run(protocol), run(protocol)
    assert [row.accuracies for row in first.rows] == [row.accuracies for row in second.rows]
    assert [row.losses for row in first.rows] == [row.losses for row in second.rows]


def test_quick_demo_writes_table_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "results"
    assert cli.main(["demo", "--quick", "--seeds", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert QUICK_NOTE in printed
    assert "VPT-Deep" in printed

    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert found["meaningful"] is False
    assert [row["name"] for row in found["methods"]] == [LINEAR_PROBE, *METHODS]
    for row in found["methods"]:
        assert len(row["accuracies"]) == 2
        assert all(0 <= a <= 1 for a in row["accuracies"])
        assert row["step_ms"] > 0
        if row["name"] != LINEAR_PROBE:
            assert row["comparison"]["logit_difference"] < 1e-4
            assert row["comparison"]["ratio"] > 0

    table = (out / "results.md").read_text(encoding="utf-8")
    assert QUICK_NOTE in table
    assert sum(line.startswith("|") for line in table.splitlines()) == 2 + 1 + len(METHODS)
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1

    picture = (out / "results.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000
