"""The examples run, learn, and write what the documentation shows."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> Any:
    """`examples/<name>.py` as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads(1)
    torch.set_num_threads(before)


class TestSegmentation:
    def test_losses_fall_and_both_beat_the_constant_prediction(self, capsys: pytest.CaptureFixture) -> None:
        found = load("segmentation").run(steps=60, seed=0)
        assert list(found) == ["frozen encoder", "VPT-Deep"]
        for result in found.values():
            assert len(result.losses) == 60
            assert sum(result.losses[-10:]) < 0.5 * sum(result.losses[:10])
            assert result.iou > 1.1 * result.constant_iou
        printed = capsys.readouterr().out
        assert f"mean IoU      {found['frozen encoder'].iou:>16.3f}{found['VPT-Deep'].iou:>16.3f}" in printed

    def test_only_prompts_and_decoder_train(self) -> None:
        example = load("segmentation")
        backbone, _ = example.pretrained(steps=2, seed=0)
        before = [p.detach().clone() for p in backbone.parameters()]
        model = example.segmenter(backbone, 2, seed=0)
        prompts = [p.detach().clone() for p in model[0].model.prompts]
        example.train(model, range(5, 10), negative=True, steps=2, lr=0.01, seed=0)
        assert all(map(torch.equal, model[0].model.base.parameters(), before))
        assert not any(map(torch.equal, model[0].model.prompts, prompts))

    def test_held_out_scenes_share_no_digit_and_no_photograph_with_training(self) -> None:
        example = load("segmentation")
        train, test = (example.Scenes(range(10), negative=False, held_out=h, seed=0) for h in (False, True))
        seen = {ink.numpy().tobytes() for kind in train.ink for ink in kind}
        unseen = [ink.numpy().tobytes() for kind in test.ink for ink in kind]
        assert len(unseen) > 400
        assert seen.isdisjoint(unseen)
        widths = [(a.shape[2], b.shape[2]) for a, b in zip(train.photographs, test.photographs, strict=True)]
        assert widths == [(480, 160)] * 2

    def test_labels_lie_where_the_ink_is_and_negatives_are_the_same_scenes(self) -> None:
        example = load("segmentation")
        scenes, negatives = (
            example.Scenes(range(5), negative=n, held_out=False, seed=0) for n in (False, True)
        )
        images, labels = scenes.draw(64)
        assert images.shape == (64, 3, 24, 24)
        assert set(labels.unique().tolist()) == set(range(6))
        assert images.mean(1)[labels > 0].mean() > images.mean(1)[labels == 0].mean() + 1
        other, other_labels = negatives.draw(64)
        assert torch.equal(other, -images)
        assert torch.equal(other_labels, labels)

    def test_mean_iou_by_hand(self) -> None:
        example = load("segmentation")
        labels = torch.arange(6).repeat(2, 1)  # each class twice
        assert example.mean_iou(labels, labels) == 1
        predicted = labels.clone()
        predicted[0, 1] = 0  # class 0: 2 of 3; class 1: 1 of 2
        assert math.isclose(example.mean_iou(predicted, labels), (2 / 3 + 1 / 2 + 4) / 6, rel_tol=1e-6)

    def test_too_few_steps_are_refused(self, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit):
            load("segmentation").main(["--steps", "1"])
        assert "--steps must be at least 2; got 1" in capsys.readouterr().err


def test_seeing_writes_the_figures_of_the_documentation(tmp_path: Path) -> None:
    load("seeing").main(["--out", str(tmp_path), "--epochs", "1", "--tuning-epochs", "1"])
    written = sorted(p.name for p in tmp_path.iterdir())
    page = (ROOT / "docs" / "seeing.md").read_text(encoding="utf-8")
    assert len(written) == 5
    for name in written:
        assert f"](images/{name})" in page
        kept = ROOT / "docs" / "images" / name
        assert kept.read_bytes()[:4] == b"\x89PNG"
        assert kept.stat().st_size < 100_000
