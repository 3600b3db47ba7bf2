"""Operations and models, for a look: `pytest bench/test_speed.py --benchmark-only`, on a GPU if there is one.

Every test checks its competitor against float64 first. pytest-benchmark times one competitor after the other; what is
published comes from interleaved rounds (`bench.run`, `bench.gpu_check`). On a CPU models are tiny and compiled without
code generation: a check, not a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import measure, models, ops
from bench.cases import operations
from fastprompt.calibration import timing

pytest.importorskip("pytest_benchmark")

GPU = torch.cuda.is_available()
if GPU:
    SIZE = ops.Size(128, 197, 12, 768, torch.bfloat16, "cuda")
    SETTING = models.Setting("vit_base_patch16_224", 224, 128, torch.bfloat16, "cuda", 10)
else:
    SIZE = ops.Size(2, 197, 3, 192, torch.float32, "cpu")
    SETTING = models.Setting("test_vit", 48, 2, torch.float32, "cpu", 2, compiler="aot_eager", depth=2)


def time(benchmark: Any, group: str, steps: list[timing.Step], rounds: int, **info: Any) -> None:
    """Time `steps`, one call of all of them a round."""

    def run() -> None:
        for step in steps:
            step()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.extra_info.update(calls=len(steps), **info, **measure.machine(SIZE.device))
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=2)


def competitors() -> Iterator[Any]:
    """Yield one parameter set for each competitor of each case."""
    for operation in operations():
        for case in operation.cases(SIZE):
            for name in (*case.ours, *case.others, *(case.autotuned if GPU else ())):
                yield pytest.param(case, name, id=f"{case.name}-{name}")


@pytest.mark.parametrize("mode", [ops.FORWARD, ops.BOTH])
@pytest.mark.parametrize(("case", "provider"), competitors())
def test_operation(benchmark: Any, case: ops.Case, provider: str, mode: str) -> None:
    torch._dynamo.reset()
    error = case.oracle(mode)(case.competitors[provider])
    steps = ops.steps(case, mode, [provider], SIZE.device)[provider]
    rounds = 20 if GPU else 5
    time(benchmark, f"{case.name} {mode}", steps, rounds, provider=provider, error=error, shape=case.shape)


@pytest.mark.parametrize(
    "provider",
    ["fastprompt", "concatenation", "bare backbone", "fastprompt, compiled", "concatenation, compiled"],
)
@pytest.mark.parametrize("mode", [models.TRAINING, models.INFERENCE])
@pytest.mark.parametrize(
    ("method", "P"), [("vpt-deep", 10), ("vpt-deep", 50), ("gate-vpt", 50), ("cvpt", 10)]
)
def test_model(benchmark: Any, method: str, P: int, provider: str, mode: str) -> None:
    torch._dynamo.reset()
    setting = replace(SETTING, compiled=provider.endswith("compiled"))
    comparison = models.comparison(method, P, setting, models.backbone(setting))
    errors = models.check_correctness(comparison, [provider])
    assert provider in errors, comparison.notes
    competitor = {**comparison.ours, **comparison.others}[provider]
    step = models.step_of(competitor, mode, *models.draw(setting))
    info = {"provider": provider, "error": errors[provider], "P": P}
    time(benchmark, f"{comparison.name} {mode}", [step], setting.rounds, **info)
