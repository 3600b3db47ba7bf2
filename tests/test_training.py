"""Data and loop: the images drawn, the parameters trained, and repeatability by seed."""

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
def pool() -> LabelledImages:
    """Return 300 images of 5 classes: noise around a pattern of each class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (300,), generator=generator)
    patterns = torch.randn(5, 1, 8, 8, generator=generator)
    return LabelledImages(
        patterns[labels] + torch.randn(300, 1, 8, 8, generator=generator), labels, tuple(range(5))
    )


def test_split_is_balanced_disjoint_and_decided_by_its_seed(pool: LabelledImages) -> None:
    drawn, rest = split_per_class(pool, 50, seed=3)
    assert torch.bincount(drawn.labels).tolist() == [10] * 5
    assert len(drawn) + len(rest) == len(pool)
    rows = torch.arange(len(pool))
    numbered = LabelledImages(rows[:, None, None, None].float(), pool.labels, pool.classes)
    first, others = split_per_class(numbered, 50, seed=3)
    assert torch.equal(torch.cat([first.images, others.images]).flatten().sort().values, rows.float())
    assert torch.equal(split_per_class(pool, 50, seed=3)[0].images, drawn.images)
    assert not torch.equal(split_per_class(pool, 50, seed=4)[0].images, drawn.images)


@pytest.mark.parametrize("count", [0, 4, 51, -5])
def test_split_refuses_unequal_counts(pool: LabelledImages, count: int) -> None:
    with pytest.raises(ValueError, match=f"positive multiple of the 5 classes; got {count}"):
        split_per_class(pool, count, seed=0)


def test_split_refuses_more_than_there_are(pool: LabelledImages) -> None:
    with pytest.raises(ValueError, match="which has"):
        split_per_class(pool, 890, seed=0)


def test_every_image_comes_once_an_epoch_in_a_new_order(pool: LabelledImages) -> None:
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


def test_batches_refuse_bad_arguments(pool: LabelledImages) -> None:
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        Batches(pool, 0)
    with pytest.raises(ValueError, match="pass `seed`"):
        Batches(pool, 8, transform=lambda images, generator: images)


def test_transform_gets_every_batch_and_a_generator_that_the_seed_decides(pool: LabelledImages) -> None:
    def noise(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(images.shape, generator=generator)

    batches = Batches(pool, 100, seed=0, transform=noise)
    first, second = [list(batches) for _ in range(2)]
    again = list(Batches(pool, 100, seed=0, transform=noise))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], second[0][0])


def test_batches_of_equally_many_images_per_class_differ_from_pass_to_pass(pool: LabelledImages) -> None:
    data, _ = split_per_class(pool, 50, seed=0)
    batches = Batches(data, 20, seed=0, images_per_class=4)
    assert len(batches) == 3
    first, second = [list(batches) for _ in range(2)]
    for _, labels in first + second:
        assert labels.bincount().tolist() == [4] * 5
    assert not torch.equal(first[0][0], second[0][0])
    again = next(iter(Batches(data, 20, seed=0, images_per_class=4)))
    assert torch.equal(again[0], first[0][0])


def prompt_model(**config: Any) -> fastprompt.PromptModel:
    base = tiny_vit()
    torch.manual_seed(1)
    return fastprompt.get_prompt_model(base, fastprompt.VPTConfig(3, **config))


def test_fit_lowers_the_loss_and_touches_only_what_trains(pool: LabelledImages) -> None:
    data, _ = split_per_class(pool, 100, seed=0)
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


def test_fit_trains_a_plain_model(pool: LabelledImages) -> None:
    data, _ = split_per_class(pool, 50, seed=0)
    history = fit(
        tiny_vit(), Batches(data, 25, seed=0), epochs=6, lr=3e-3, clip_norm=1.0, label_smoothing=0.1
    )
    assert history.loss[-1] < history.loss[0]


def test_fit_is_decided_by_its_seed_and_leaves_the_callers_random_state(pool: LabelledImages) -> None:
    data, _ = split_per_class(pool, 50, seed=0)

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


def test_fit_adds_the_methods_own_loss(pool: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = split_per_class(pool, 25, seed=0)
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


def test_fit_runs_under_bfloat16_autocast(pool: LabelledImages) -> None:
    data, _ = split_per_class(pool, 25, seed=0)
    model = prompt_model()
    history = fit(model, Batches(data, 25, seed=0), epochs=4, lr=2e-2, autocast=torch.bfloat16)
    assert history.loss[-1] < history.loss[0]
    assert model.prompts[0].dtype == torch.float32


def test_progress_hears_of_every_update(pool: LabelledImages) -> None:
    data, _ = split_per_class(pool, 25, seed=0)
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
        pytest.param({"lr": 0.0}, "`lr` must be positive and finite; got 0.0", id="lr"),
        pytest.param({"lr": math.nan}, "`lr` must be positive and finite; got nan", id="lr nan"),
        pytest.param({"warmup": 2}, "got 2", id="warmup"),
        pytest.param({"autocast": torch.float16}, "loss scaler", id="float16"),
    ],
)
def test_fit_refuses_bad_values(pool: LabelledImages, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(prompt_model(), Batches(pool, 25), **{"epochs": 1, "lr": 1e-2, **change})


def test_fit_refuses_a_frozen_model_and_an_empty_loader(pool: LabelledImages) -> None:
    with pytest.raises(ValueError, match="no parameter of `model` requires a gradient"):
        fit(tiny_vit().requires_grad_(False), Batches(pool, 25), epochs=1, lr=1e-2)
    with pytest.raises(ValueError, match="`loader` is empty"):
        fit(tiny_vit(), [], epochs=1, lr=1e-2)


def test_fit_stops_where_the_loss_is_no_number(pool: LabelledImages) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    nn.init.constant_(model[1].weight, math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at update 1"):
        fit(model, Batches(pool, 25), epochs=1, lr=1e-2)


def test_evaluate_counts_and_puts_the_mode_back(pool: LabelledImages) -> None:
    class Always(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 0, 1, 0, 0]]).expand(len(images), -1)

    model = Always().train()
    expected = float((pool.labels == 2).double().mean())
    assert evaluate(model, Batches(pool, 100)) == pytest.approx(expected)
    assert model.training
    with pytest.raises(ValueError, match="`loader` is empty"):
        evaluate(model, [])
