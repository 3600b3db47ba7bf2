"""examples/digits: its data, its probe, the comparison with the papers' form, and the whole run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.correctness import WrongResult, assert_same
from bench.papers import PaperVPT
from examples.digits import __main__ as program
from examples.digits.backbone import UprightDigits, build, rotate
from examples.digits.data import BACKGROUND, augment, digits, training_batches
from examples.digits.probe import fit_probe
from examples.digits.protocol import LINEAR_PROBE, METHODS, QUICK_NOTE, Protocol
from examples.digits.run import prepare, prompted, run, tune
from examples.digits.timing import compare, step_times
from fastprompt import VPTConfig
from fastprompt.training import split_per_class

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
QUICK = Protocol.quick()


def quiet(stage: str, done: int, total: int) -> None:
    """Show no progress."""


# Data ---------------------------------------------------------------------------------------------------------------


def test_all_digits_are_there_and_normalised() -> None:
    data = digits(range(10))
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.float32
    # The constants have four digits.
    assert abs(data.images.mean()) < 1e-3
    assert abs(data.images.std() - 1) < 1e-3


def test_two_class_lists_share_no_image_and_leave_none_out() -> None:
    everything, seen, new = digits(range(10)), digits(range(5)), digits(range(5, 10))
    assert torch.equal(seen.images, everything.images[everything.labels < 5])
    assert torch.equal(new.images, everything.images[everything.labels >= 5])


def test_labels_count_in_the_order_of_the_classes() -> None:
    everything, data = digits(range(10)), digits((7, 2))
    assert data.classes == (7, 2)
    assert torch.equal(data.images[data.labels == 0], everything.images[everything.labels == 7])
    assert torch.equal(data.images[data.labels == 1], everything.images[everything.labels == 2])


def test_augment_without_bounds_changes_nothing() -> None:
    images = digits((0,)).images[:4].double()
    still = augment(images, torch.Generator().manual_seed(0), degrees=0, stretch=0, shift=0, shear=0)
    assert_same(still, images)


def test_augment_moves_each_image_on_its_own_and_fills_with_the_background() -> None:
    images = digits((0,)).images[:1].double().expand(6, -1, -1, -1)
    moved = augment(images, torch.Generator().manual_seed(0))
    assert not torch.equal(moved[0], moved[1])
    blank = torch.full_like(images, BACKGROUND)
    assert_same(augment(blank, torch.Generator().manual_seed(0), shift=0.5), blank)


def test_da_vpt_gets_equally_many_images_of_each_class_in_every_batch() -> None:
    data, _ = split_per_class(digits(range(5, 10)), 50, seed=0)
    for _, labels in training_batches(METHODS["DA-VPT"].config, data, 20, seed=0):
        assert labels.bincount().tolist() == [4] * 5
    others = [labels.bincount(minlength=5) for _, labels in training_batches(VPTConfig(2), data, 20, seed=0)]
    assert any(counts.tolist() != [4] * 5 for counts in others)


def test_only_the_chosen_images_are_rotated() -> None:
    images = torch.arange(18.0).reshape(2, 1, 3, 3)
    rotated = rotate(images, torch.tensor([0, 1]))
    assert torch.equal(rotated[0], images[0])
    assert torch.equal(rotated[1], torch.rot90(images[1], 1, (1, 2)))


def test_upright_scores_are_every_second() -> None:
    model = build(QUICK.backbone, 10).eval()
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(UprightDigits(model)(images), model(images)[:, ::2])


# Linear probe -------------------------------------------------------------------------------------------------------


def test_linear_probe_separates_what_a_line_separates() -> None:
    labels = torch.arange(60) % 3
    features = 4 * nn.functional.one_hot(labels, 8) + torch.randn(60, 8)
    plain = features[:30].unsqueeze(1)
    found = fit_probe(plain, plain.expand(-1, 2, -1), labels[:30], seed=0)
    assert found.weight.shape == (3, 8)
    assert found.bias.shape == (3,)
    assert found.accuracy(features[30:], labels[30:]) > 0.9
    assert torch.equal(fit_probe(plain, plain.expand(-1, 2, -1), labels[:30], seed=0).weight, found.weight)


def test_linear_probe_takes_augmented_copies_only_where_they_help() -> None:
    labels = torch.arange(60) % 3
    plain = (nn.functional.one_hot(labels, 4) + 0.1 * torch.randn(60, 4)).unsqueeze(1)
    misleading = torch.cat([plain, *(plain.roll(1, -1) for _ in range(3))], 1)
    found = fit_probe(plain, misleading, labels, seed=0)
    assert not found.distorted
    assert found.accuracy(plain[:, 0], labels) == 1.0


# Comparison and step times ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_each_method_agrees_with_its_papers_form(name: str) -> None:
    model = prompted(build(Protocol().backbone, 5), METHODS[name], 5, seed=0)
    found = compare(model, torch.randn(5, 1, 8, 8), torch.arange(5), rounds=1)
    assert found.step_ms > 0
    assert found.ratio == found.paper_step_ms / found.step_ms


@pytest.mark.parametrize("off", ["logits", "gradients"])
def test_no_time_is_taken_of_a_wrong_result(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PaperVPT.forward

    def forward(self: PaperVPT, images: Tensor, labels: Tensor) -> Any:
        output: Any = plain(self, images, labels)
        logits, factor = output.logits, 1.001
        wrong = logits * factor if off == "logits" else logits.detach() + factor * (logits - logits.detach())
        return output._replace(logits=wrong)

    monkeypatch.setattr(PaperVPT, "forward", forward)
    model = prompted(build(QUICK.backbone, 5), QUICK.methods["VPT-Deep"], 5, seed=0)
    with pytest.raises(WrongResult, match="logits" if off == "logits" else "off by"):
        compare(model, torch.randn(4, 1, 8, 8), torch.arange(4), rounds=1)


def test_a_step_time_excludes_waiting_for_the_processor() -> None:
    model = prompted(build(QUICK.backbone, 5), QUICK.methods["VPT-Deep"], 5, seed=0)
    model.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    (milliseconds,) = step_times([model], torch.randn(2, 1, 8, 8), torch.arange(2), rounds=2)
    assert 0 < milliseconds < 100


# Run ----------------------------------------------------------------------------------------------------------------


def test_da_vpt_fits_its_class_map_before_it_is_tuned() -> None:
    prepared = prepare(QUICK, quiet)
    method = QUICK.methods["DA-VPT"]
    train, _ = split_per_class(prepared.pool, QUICK.labelled, seed=0)
    model: Any = prompted(prepared.backbone, method, 5, seed=0)
    assert model.class_centroids.isnan().all()
    tune(model, train, method, QUICK, seed=0)
    assert model.class_centroids.isfinite().all()


def test_pool_and_test_set_hold_each_new_image_once_whatever_the_seed() -> None:
    first, second = prepare(QUICK, quiet, seed=0), prepare(QUICK, quiet, seed=1)
    assert len(first.pool) == QUICK.pool
    assert len(first.pool) + len(first.test) == 896
    assert torch.equal(first.test.images, second.test.images)
    assert not any(p.requires_grad for p in first.backbone.parameters())


def test_models_of_one_backbone_share_no_trained_weight() -> None:
    backbone = build(QUICK.backbone, 5)
    kept = copy.deepcopy(backbone.state_dict())
    one, other = (prompted(backbone, METHODS["CVPT"], 3, seed=seed) for seed in (0, 1))
    assert one.base.head.weight.data_ptr() != other.base.head.weight.data_ptr()
    assert not torch.equal(one.prompts[0], other.prompts[0])
    assert torch.equal(prompted(backbone, METHODS["CVPT"], 3, seed=0).prompts[0], one.prompts[0])
    assert all(torch.equal(kept[name], value) for name, value in backbone.state_dict().items())


def test_the_whole_run_is_decided_by_its_seeds() -> None:
    protocol = replace(QUICK, timing_rounds=1)
    first, second = run(protocol), run(protocol)
    assert [row.accuracies for row in first.rows] == [row.accuracies for row in second.rows]
    assert [row.losses for row in first.rows] == [row.losses for row in second.rows]


def test_quick_run_writes_table_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "results"
    assert program.main(["--quick", "--seeds", "2", "--out", str(out)]) == 0
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
            assert row["comparison"]["logit_difference"] >= 0
            assert row["comparison"]["ratio"] > 0

    table = (out / "results.md").read_text(encoding="utf-8")
    assert QUICK_NOTE in table
    assert sum(line.startswith("|") for line in table.splitlines()) == 2 + 1 + len(METHODS)
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1

    picture = (out / "results.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000


@pytest.mark.parametrize("option", ["--help", pytest.param("--quick", marks=pytest.mark.slow)])
def test_runs_as_a_program(option: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.digits", option, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert ("--seeds" if option == "--help" else "results.png") in done.stdout


# Wrong usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", ["0", "-3", "101", "two"])
def test_wrong_seeds_are_refused(seeds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(["--seeds", seeds, "--out", str(tmp_path / "out")])
    assert "--seeds" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_out_folder_that_is_a_file_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("here already")
    with pytest.raises(SystemExit, match="2"):
        program.main(["--out", str(taken)])
    assert f"--out {taken} cannot be written" in capsys.readouterr().err
    assert taken.read_text() == "here already"


def test_missing_packages_are_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "find_spec", lambda name: None if name == "rich" else name)
    with pytest.raises(SystemExit, match="2"):
        program.main(["--quick"])
    assert "rich not found; run pip install -e '.[train]'" in capsys.readouterr().err
