"""Whole models under pytest-benchmark: `pytest bench/test_models.py --benchmark-only`, on a GPU if there is one.

A training step and a forward for inference, eager and compiled, each method against its paper's form. Every test checks
logits and gradients first. On a CPU the model is tiny and compiled without code generation: a check, not a measurement.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import measure, models

pytest.importorskip("pytest_benchmark")

GPU = torch.cuda.is_available()


def setting_for(compiled: bool) -> models.Setting:
    """Return ViT-B/16 at batch 128 in bfloat16, or timm's smallest model."""
    if GPU:
        return models.Setting("vit_base_patch16_224", 224, 128, torch.bfloat16, "cuda", 10, compiled=compiled)
    return models.Setting(
        "test_vit", 48, 2, torch.float32, "cpu", 2, compiled=compiled, compiler="aot_eager", depth=2
    )


@pytest.mark.parametrize(
    ("provider", "compiled"),
    [
        ("fastprompt", False),
        ("concatenation", False),
        ("bare backbone", False),
        ("fastprompt", True),
        ("concatenation", True),
    ],
)
@pytest.mark.parametrize("mode", [models.TRAINING, models.INFERENCE])
@pytest.mark.parametrize(
    ("method", "P"), [("vpt-deep", 10), ("vpt-deep", 50), ("gate-vpt", 50), ("cvpt", 10)]
)
def test_model(benchmark: Any, method: str, P: int, provider: str, mode: str, compiled: bool) -> None:
    torch._dynamo.reset()
    setting = setting_for(compiled)
    comparison = models.comparison(method, P, setting, models.backbone(setting))
    name = f"{provider}, compiled" if compiled else provider
    errors = models.check_correctness(comparison, [name])
    assert name in errors, comparison.notes
    competitor = {**comparison.ours, **comparison.others}[name]
    step = models.step_of(competitor, mode, *models.draw(setting))

    def run() -> None:
        step()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{comparison.name} {mode}"
    benchmark.extra_info.update(provider=name, error=errors[name], P=P, **measure.machine(setting.device))
    benchmark.pedantic(run, rounds=setting.rounds, warmup_rounds=2)
