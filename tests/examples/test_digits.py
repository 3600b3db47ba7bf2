"""The demo: agreement with the papers' form, its parts, and a smoke run through the command line."""

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastprompt.demo.backbone import UprightDigits, build, turn
from fastprompt.demo.batches import batches_for
from fastprompt.demo.measure import compare, fastest_steps, step_time
from fastprompt.demo.probe import fit_probe
from fastprompt.demo.protocol import LINEAR_PROBE, METHODS, Protocol
from fastprompt.demo.report import QUICK_NOTE
from fastprompt.demo.run import prepare, prompted, run, tune
from fastprompt.demo.twins import VPTTwin, twin
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt
from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, VPTConfig, cli
from fastprompt.training import digits, split_per_class


def small_vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 4, "num_heads": 3}
    return VisionTransformer(**{**sizes, "num_classes": 5, **kwargs})


TWINS: dict[str, tuple[PromptConfig, dict[str, Any]]] = {
    "vpt-deep": (VPTConfig(5), {}),
    "vpt-partial": (VPTConfig(5, blocks=2), {}),
    "vpt-shallow": (VPTConfig(5, deep=False), {}),
    "vpt-registers": (VPTConfig(1), {"reg_tokens": 2}),
    "vpt-mean": (VPTConfig(5), {"global_pool": "avg", "class_token": False}),
    "vpt-dropout": (VPTConfig(5, dropout=0.4), {}),
    "gate-vpt": (GateVPTConfig(5, gate_init=0.5, dropout=0.0), {}),
    "gate-vpt-dropout": (GateVPTConfig(5, num_gates=2, dropout=0.4), {}),
    "cvpt": (CVPTConfig(5), {}),
    "cvpt-dropout": (CVPTConfig(5, dropout=0.4), {}),
    "da-vpt": (DAVPTConfig(5, 3, (1, 2), alpha=2.0), {}),
    "da-vpt-nca-dropout": (DAVPTConfig(5, 3, (3, 3), criterion="proxy_nca", dropout=0.4), {}),
}


def logits_loss_and_gradients(model: Any, images: Tensor, labels: Tensor) -> tuple[Any, ...]:
    torch.manual_seed(7)
    logits, loss = model(images, labels) if isinstance(model, VPTTwin) else model(images, labels=labels)
    loss = logits.new_zeros(()) if loss is None else loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    cotangent = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    found = torch.autograd.grad((logits * cotangent).sum() + loss, list(trained.values()))
    return logits, loss, dict(zip(trained, found, strict=True))


@pytest.mark.parametrize("case", TWINS)
def test_the_papers_form_and_fastprompt_are_one_function(case: str) -> None:
    config, vit = TWINS[case]
    model: Any = fastprompt.get_prompt_model(small_vit(**vit).double(), config).train()
    with torch.no_grad():
        for p in model.prompts:
            p.normal_()
        if isinstance(config, GateVPTConfig):
            model.temperature.copy_(
                torch.tensor([0.005, 0.5, 2, 20])
            )  # the clamp moves the first and the last
        if isinstance(config, DAVPTConfig):
            model.class_to_prompt.copy_(torch.tensor([2, 0, 1, 1, 0]))
    other = twin(model).train()
    images, labels = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 0, 4])
    mine = logits_loss_and_gradients(model, images, labels)
    theirs = logits_loss_and_gradients(other, images, labels)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert isinstance(config, DAVPTConfig) == bool(theirs[1] > 0)


def test_the_twin_shares_no_weight_with_the_model() -> None:
    for config, _ in TWINS.values():
        model = fastprompt.get_prompt_model(small_vit(), config)
        pointers = {p.data_ptr() for p in model.parameters()}
        assert pointers.isdisjoint(p.data_ptr() for p in twin(model).parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VPTConfig(2, project=3), "vpt needs project=None; got 3"),
        (VPTConfig(2, pool="all"), "vpt needs pool='backbone'; got 'all'"),
        (GateVPTConfig(2, temperature=0.5), "gate_vpt needs temperature=True; got 0.5"),
        (CVPTConfig(2, insert=4), "cvpt needs insert=3; got 4"),
        (DAVPTConfig(2, 2, (0, 0), tune="prompts+biases"), "da_vpt needs tune='prompts'"),
    ],
    ids=lambda value: value.method if isinstance(value, PromptConfig) else "",
)
def test_the_twin_refuses_what_it_does_not_compute(config: PromptConfig, message: str) -> None:
    model = fastprompt.get_prompt_model(small_vit(), config)
    with pytest.raises(NotImplementedError, match=message):
        twin(model)


@pytest.mark.parametrize("name", METHODS)
def test_the_demos_methods_have_a_twin(name: str) -> None:
    backbone = build(Protocol().backbone, 5)
    found = compare(
        prompted(backbone, METHODS[name], 5, seed=0), torch.randn(5, 1, 8, 8), torch.arange(5), rounds=1
    )
    assert found.logit_difference < 1e-4
    assert found.gradient_difference < 1e-4


@pytest.mark.parametrize("off", ["logits", "gradients"])
def test_no_time_is_reported_where_the_two_differ(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = VPTTwin.forward

    def forward(self: VPTTwin, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, loss = plain(self, images, labels)
        return logits * 1.5 if off == "logits" else logits.detach() + 1.5 * (logits - logits.detach()), loss

    monkeypatch.setattr(VPTTwin, "forward", forward)
    model = fastprompt.get_prompt_model(small_vit(), VPTConfig(2))
    with pytest.raises(RuntimeError, match="no time is reported"):
        compare(model, torch.randn(4, 1, 8, 8), torch.arange(4), rounds=1)


def test_compare_measures_both() -> None:
    model = fastprompt.get_prompt_model(small_vit(), VPTConfig(2))
    found = compare(model, torch.randn(4, 1, 8, 8), torch.arange(4), rounds=2)
    assert found.step_ms > 0
    assert found.ratio == pytest.approx(found.paper_step_ms / found.step_ms)
    assert found.logit_difference < 1e-5


def test_steps_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    times = fastest_steps([lambda: calls.append("a"), lambda: calls.append("b")], 2)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert all(0 <= t < 1 for t in times)


def test_the_shortest_time_is_the_clocks() -> None:
    ticks = iter([0.0, 5.0, 10.0, 13.0, 20.0, 24.0])
    assert fastest_steps([lambda: None], 3, lambda: next(ticks)) == [3.0]


def test_waiting_for_the_processor_is_no_time_of_the_step() -> None:
    class Waiting(torch.nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            time.sleep(0.2)
            return super().forward(images.flatten(1))

    assert 0 < step_time(Waiting(64, 5), torch.randn(4, 1, 8, 8), torch.arange(4), rounds=2) < 100


def test_turning_turns_only_the_chosen_images() -> None:
    images = torch.arange(18.0).reshape(2, 1, 3, 3)
    turned = turn(images, torch.tensor([0, 1]))
    assert torch.equal(turned[0], images[0])
    assert torch.equal(turned[1], torch.rot90(images[1], 1, (1, 2)))


def test_upright_scores_are_every_second() -> None:
    model = build(Protocol.quick().backbone, 10).eval()
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(UprightDigits(model)(images), model(images)[:, ::2])


def test_da_vpt_gets_equally_many_images_of_each_class_in_every_batch() -> None:
    data, _ = split_per_class(digits(range(5, 10)), 50, seed=0)
    balanced = batches_for(METHODS["DA-VPT"].config, data, 20, seed=0)
    assert len(balanced) == 3
    first, second = list(balanced), list(balanced)
    for images, labels in first + second:
        assert images.shape == (20, 1, 8, 8)
        assert labels.bincount().tolist() == [4] * 5
    assert not torch.equal(first[0][0], second[0][0]), "every pass draws anew"
    again = next(iter(batches_for(METHODS["DA-VPT"].config, data, 20, seed=0)))
    assert torch.equal(again[0], first[0][0])
    others = [
        labels.bincount(minlength=5).tolist() for _, labels in batches_for(VPTConfig(2), data, 20, seed=0)
    ]
    assert any(counts != [4] * 5 for counts in others)


def test_da_vpt_fits_its_class_map_before_it_is_tuned() -> None:
    protocol = Protocol.quick()
    prepared = prepare(protocol)
    method = protocol.methods["DA-VPT"]
    train, _ = split_per_class(prepared.pool, protocol.labelled, seed=0)
    model: Any = prompted(prepared.backbone, method, 5, seed=0)
    assert model.class_centroids.isnan().all()
    tune(model, train, method, protocol, seed=0)
    assert model.class_centroids.isfinite().all()


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
