"""Single operations under pytest-benchmark: `pytest bench/test_ops.py --benchmark-only`, on a GPU if there is one.

Every test checks its competitor against float64 first. pytest-benchmark times one competitor after the other, which is
good for a look; what is published comes from interleaved rounds (`bench.run`, `bench.gpu_check`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import measure, ops
from bench.cases import operations

pytest.importorskip("pytest_benchmark")

GPU = torch.cuda.is_available()
SIZE = (
    ops.Size(128, 197, 12, 768, torch.bfloat16, "cuda")
    if GPU
    else ops.Size(2, 197, 3, 192, torch.float32, "cpu")
)


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

    def run() -> None:
        for step in steps:
            step()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{case.name} {mode}"
    benchmark.extra_info.update(
        provider=provider, calls=len(steps), error=error, shape=case.shape, **measure.machine(SIZE.device)
    )
    benchmark.pedantic(run, rounds=20 if GPU else 5, warmup_rounds=2)
