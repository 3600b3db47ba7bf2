"""Whole models under pytest-benchmark: `pytest bench/test_models.py --benchmark-only`, on a GPU if there is one.

A training step and a forward for inference, eager and compiled, each method against concatenation. Every test checks
logits and gradients first. On a CPU a tiny model, and compiled without a code generator: a check, not a measurement.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import measure, models

pytest.importorskip("pytest_benchmark")

GPU = torch.cuda.is_available()


def setting(compiled: bool) -> models.Setting:
    """ViT-B/16 at batch 128 in bfloat16, or timm's smallest model."""
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
    how = setting(compiled)
    made = models.comparison(method, P, how, models.backbone(how))
    name = f"{provider}, compiled" if compiled else provider
    errors = models.gate(made, [name])
    assert name in errors, made.notes
    competitor = {**made.ours, **made.others}[name]
    step = models.step_of(competitor, mode, *models.draw(how))

    def run() -> None:
        step()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{made.name} {mode}"
    benchmark.extra_info.update(provider=name, error=errors[name], P=P, **measure.machine(how.device))
    benchmark.pedantic(run, rounds=how.rounds, warmup_rounds=2)
