"""Data and loop: what is drawn, what trains, and that a seed decides everything."""

import builtins
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import fastprompt
from fastprompt.training import (
    Batches,
    LabelledImages,
    TrainingStep,
    augment,
    digits,
    evaluate,
    fit,
    split_per_class,
)
from fastprompt.training.loop import warmup_cosine


def tiny_vit(classes: int = 5) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=classes
    )


@pytest.fixture(scope="module")
def new_digits() -> LabelledImages:
    return digits(range(5, 10))


def test_all_digits_are_there_and_normalised() -> None:
    data = digits(range(10))
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.float32
    assert abs(data.images.mean()) < 1e-3
    assert abs(data.images.std() - 1) < 1e-3


def test_two_class_lists_share_no_image_and_leave_none_out() -> None:
    everything, seen, new = digits(range(10)), digits(range(5)), digits(range(5, 10))
    assert len(seen) + len(new) == len(everything) == 1797
    assert torch.equal(seen.images, everything.images[everything.labels < 5])
    assert torch.equal(new.images, everything.images[everything.labels >= 5])


def test_labels_count_in_the_order_of_the_classes() -> None:
    everything, data = digits(range(10)), digits((7, 2))
    assert data.classes == (7, 2)
    assert torch.equal(data.images[data.labels == 0], everything.images[everything.labels == 7])
    assert torch.equal(data.images[data.labels == 1], everything.images[everything.labels == 2])


def test_size_upsamples() -> None:
    assert digits((0,), size=12).images.shape[1:] == (1, 12, 12)


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        pytest.param((), ValueError, "at least one class", id="none"),
        pytest.param((3, 10), ValueError, r"0\.\.9; got \[10\]", id="outside"),
        pytest.param((-1,), ValueError, r"got \[-1\]", id="negative"),
        pytest.param((3, 3), ValueError, r"must not repeat; got \[3, 3\]", id="repeated"),
        pytest.param((1.0,), TypeError, "must be integers", id="float"),
        pytest.param("01", TypeError, "must be integers", id="string"),
    ],
)
def test_bad_class_lists_are_refused(classes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        digits(classes)


def test_size_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="`size` must be at least 1; got 0"):
        digits((0,), size=0)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError("no sklearn")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"fastprompt\[train\]"):
        digits((0,))


def test_split_is_balanced_disjoint_and_decided_by_its_seed(new_digits: LabelledImages) -> None:
    drawn, rest = split_per_class(new_digits, 50, seed=3)
    assert torch.bincount(drawn.labels).tolist() == [10] * 5
    assert len(drawn) + len(rest) == len(new_digits)
    rows = torch.arange(len(new_digits))
    numbered = LabelledImages(rows[:, None, None, None].float(), new_digits.labels, new_digits.classes)
    first, others = split_per_class(numbered, 50, seed=3)
    assert torch.equal(torch.cat([first.images, others.images]).flatten().sort().values, rows.float())
    assert torch.equal(split_per_class(new_digits, 50, seed=3)[0].images, drawn.images)
    assert not torch.equal(split_per_class(new_digits, 50, seed=4)[0].images, drawn.images)


@pytest.mark.parametrize("count", [0, 4, 51, -5])
def test_split_refuses_unequal_counts(new_digits: LabelledImages, count: int) -> None:
    with pytest.raises(ValueError, match=f"positive multiple of the 5 classes; got {count}"):
        split_per_class(new_digits, count, seed=0)


def test_split_refuses_more_than_there_are(new_digits: LabelledImages) -> None:
    with pytest.raises(ValueError, match="which has"):
        split_per_class(new_digits, 890, seed=0)


def test_every_image_comes_once_an_epoch_in_a_new_order(new_digits: LabelledImages) -> None:
    rows = torch.arange(23.0)
    data = LabelledImages(rows[:, None, None, None], torch.zeros(23, dtype=torch.int64), (0,))
    batches = Batches(data, 5, seed=0)
    epochs = [torch.cat([images.flatten() for images, _ in batches]) for _ in range(2)]
    assert len(batches) == 5
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, rows)
    assert not torch.equal(epochs[0], epochs[1])
    in_order = torch.cat([images.flatten() for images, _ in Batches(data, 5)])
    assert torch.equal(in_order, rows)


def test_batches_refuse_bad_arguments(new_digits: LabelledImages) -> None:
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        Batches(new_digits, 0)
    with pytest.raises(ValueError, match="pass `seed`"):
        Batches(new_digits, 8, distort=True)


def test_augment_without_bounds_changes_nothing(new_digits: LabelledImages) -> None:
    images = new_digits.images[:4]
    generator = torch.Generator().manual_seed(0)
    still = augment(images, generator, background=-1.0, degrees=0, stretch=0, shift=0, shear=0)
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)


def test_augment_fills_with_the_background() -> None:
    images = torch.full((6, 1, 8, 8), -1.5)
    moved = augment(images, torch.Generator().manual_seed(0), background=-1.5, shift=0.5)
    torch.testing.assert_close(moved, images)


def prompt_model(**config: Any) -> fastprompt.PromptModel:
    base = tiny_vit()
    torch.manual_seed(1)
    return fastprompt.get_prompt_model(base, fastprompt.VPTConfig(3, **config))


def test_fit_lowers_the_loss_and_touches_only_what_trains(new_digits: LabelledImages) -> None:
    data, _ = split_per_class(new_digits, 100, seed=0)
    model = prompt_model()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = fit(model, Batches(data, 20, seed=0), epochs=12, lr=0.1)
    assert history.loss[-1] < 0.8 * history.loss[0]
    assert history.accuracy[-1] > history.accuracy[0]
    assert history.method_loss == [0.0] * 12
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable
    assert any("prompts" in name for name in trainable)
    assert not model.training


def test_fit_trains_a_plain_model(new_digits: LabelledImages) -> None:
    data, _ = split_per_class(new_digits, 50, seed=0)
    history = fit(
        tiny_vit(), Batches(data, 25, seed=0), epochs=6, lr=3e-3, clip_norm=1.0, label_smoothing=0.1
    )
    assert history.loss[-1] < history.loss[0]


def test_fit_is_decided_by_its_seed_and_leaves_the_callers_random_state(new_digits: LabelledImages) -> None:
    data, _ = split_per_class(new_digits, 50, seed=0)

    def tuned(seed: int) -> torch.Tensor:
        model = prompt_model(dropout=0.3)
        fit(model, Batches(data, 25, seed=0), epochs=2, lr=1e-2, seed=seed)
        return model.prompts[0].detach()

    first = tuned(0)
    state = torch.get_rng_state()
    assert torch.equal(tuned(0), first)
    torch.manual_seed(1)  # `prompt_model` leaves it so, after its draws
    assert not torch.equal(tuned(1), first)
    torch.set_rng_state(state)
    model = prompt_model(dropout=0.3)
    state = torch.get_rng_state()
    fit(model, Batches(data, 25, seed=0), epochs=1, lr=1e-2, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_fit_adds_the_methods_own_loss(new_digits: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = split_per_class(new_digits, 25, seed=0)
    model = prompt_model()
    plain = fastprompt.PromptModel.forward

    def pulled(self: Any, images: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        output = plain(self, images, labels)
        return output if labels is None else output._replace(method_loss=1e3 * self.prompts[0].square().sum())

    monkeypatch.setattr(fastprompt.PromptModel, "forward", pulled)
    before = model.prompts[0].detach().norm()
    history = fit(model, Batches(data, 25, seed=0), epochs=10, lr=1e-2)
    assert model.prompts[0].detach().norm() < 0.8 * before
    assert history.method_loss[-1] < history.method_loss[0]


def test_fit_runs_under_bfloat16_autocast(new_digits: LabelledImages) -> None:
    data, _ = split_per_class(new_digits, 25, seed=0)
    model = prompt_model()
    history = fit(model, Batches(data, 25, seed=0), epochs=4, lr=2e-2, autocast=torch.bfloat16)
    assert history.loss[-1] < history.loss[0]
    assert model.prompts[0].dtype == torch.float32


def test_progress_hears_of_every_update(new_digits: LabelledImages) -> None:
    data, _ = split_per_class(new_digits, 25, seed=0)
    heard: list[TrainingStep] = []
    fit(prompt_model(), Batches(data, 10, seed=0), epochs=2, lr=1e-2, progress=heard.append)
    assert [at.step for at in heard] == list(range(1, 7))
    assert {at.steps for at in heard} == {6}
    assert [at.epoch for at in heard] == [0, 0, 0, 1, 1, 1]


def test_learning_rate_rises_then_falls_to_nothing() -> None:
    factor = warmup_cosine(100, 0.1)
    values = [factor(i) for i in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(values[10:]))
    assert values[100] == pytest.approx(0.0)
    assert warmup_cosine(10, 0.0)(0) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"epochs": 0}, "`epochs` must be at least 1; got 0", id="epochs"),
        pytest.param({"lr": 0.0}, "`lr` must be a positive number; got 0.0", id="lr"),
        pytest.param({"lr": math.nan}, "`lr` must be a positive number; got nan", id="lr nan"),
        pytest.param({"warmup": 2}, "got 2", id="warmup"),
        pytest.param({"autocast": torch.float16}, "loss scaler", id="float16"),
    ],
)
def test_fit_refuses_bad_values(new_digits: LabelledImages, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(prompt_model(), Batches(new_digits, 25), **{"epochs": 1, "lr": 1e-2, **change})


def test_fit_refuses_a_frozen_model_and_an_empty_loader(new_digits: LabelledImages) -> None:
    with pytest.raises(ValueError, match="unfreeze some"):
        fit(tiny_vit().requires_grad_(False), Batches(new_digits, 25), epochs=1, lr=1e-2)
    with pytest.raises(ValueError, match="`loader` is empty"):
        fit(tiny_vit(), [], epochs=1, lr=1e-2)


def test_fit_stops_where_the_loss_is_no_number(new_digits: LabelledImages) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    nn.init.constant_(model[1].weight, math.nan)
    with pytest.raises(FloatingPointError, match="got nan at update 1"):
        fit(model, Batches(new_digits, 25), epochs=1, lr=1e-2)


def test_evaluate_counts_and_puts_the_mode_back(new_digits: LabelledImages) -> None:
    class Always(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 0, 1, 0, 0]]).expand(len(images), -1)

    model = Always().train()
    expected = float((new_digits.labels == 2).double().mean())
    assert evaluate(model, Batches(new_digits, 100)) == pytest.approx(expected)
    assert model.training
    with pytest.raises(ValueError, match="holds no image"):
        evaluate(model, [])
