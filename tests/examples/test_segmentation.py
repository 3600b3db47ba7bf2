"""examples/segmentation.py: its scenes, its score, and what trains."""

from __future__ import annotations

import math

import pytest
import torch

from examples import segmentation
from examples.segmentation import Scenes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_losses_fall(capsys: pytest.CaptureFixture[str]) -> None:
    found = segmentation.run(steps=12, seed=0)
    assert list(found) == ["frozen encoder", "VPT-Deep"]
    for result in found.values():
        assert len(result.losses) == 12
        assert sum(result.losses[-5:]) < 0.7 * sum(result.losses[:5])
    printed = capsys.readouterr().out
    assert f"mean IoU      {found['frozen encoder'].iou:>16.3f}{found['VPT-Deep'].iou:>16.3f}" in printed


@pytest.mark.slow
def test_both_models_beat_the_constant_prediction() -> None:
    for result in segmentation.run(steps=60, seed=0).values():
        assert result.iou > 1.1 * result.constant_iou


def test_only_prompts_and_decoder_train() -> None:
    backbone, _ = segmentation.pretrained(steps=2, seed=0)
    before = [p.detach().clone() for p in backbone.parameters()]
    model = segmentation.segmenter(backbone, 2, seed=0)
    prompts = [p.detach().clone() for p in model[0].model.prompts]
    segmentation.train(model, range(5, 10), negative=True, steps=2, lr=0.01, seed=0)
    assert all(map(torch.equal, model[0].model.base.parameters(), before))
    assert not any(map(torch.equal, model[0].model.prompts, prompts))


def test_held_out_scenes_share_no_digit_and_no_photograph_with_training() -> None:
    train, test = (Scenes(range(10), negative=False, held_out=h, seed=0) for h in (False, True))
    seen = {ink.numpy().tobytes() for kind in train.ink for ink in kind}
    unseen = [ink.numpy().tobytes() for kind in test.ink for ink in kind]
    assert len(unseen) > 400
    assert seen.isdisjoint(unseen)
    widths = [(a.shape[2], b.shape[2]) for a, b in zip(train.photographs, test.photographs, strict=True)]
    assert widths == [(480, 160)] * 2


def test_labels_lie_where_the_ink_is_and_negatives_are_the_same_scenes() -> None:
    scenes, negatives = (Scenes(range(5), negative=n, held_out=False, seed=0) for n in (False, True))
    images, labels = scenes.draw(64)
    assert images.shape == (64, 3, 24, 24)
    assert set(labels.unique().tolist()) == set(range(6))
    assert images.mean(1)[labels > 0].mean() > images.mean(1)[labels == 0].mean() + 1
    other, other_labels = negatives.draw(64)
    assert torch.equal(other, -images)
    assert torch.equal(other_labels, labels)


def test_mean_iou_by_hand() -> None:
    labels = torch.arange(6).repeat(2, 1)  # each class twice
    assert segmentation.mean_iou(labels, labels) == 1
    predicted = labels.clone()
    predicted[0, 1] = 0  # class 0: 2 of 3; class 1: 1 of 2
    assert math.isclose(segmentation.mean_iou(predicted, labels), (2 / 3 + 1 / 2 + 4) / 6, rel_tol=1e-6)


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        segmentation.main(["--steps", "1"])
    assert "--steps must be at least 2; got 1" in capsys.readouterr().err
