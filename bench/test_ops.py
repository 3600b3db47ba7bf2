"""Single operations under pytest-benchmark: `pytest bench/test_ops.py --benchmark-only`, on a GPU if there is one.

Every test checks its competitor against float64 first. pytest-benchmark times one competitor after the other, which is
good for a look; what is published comes from interleaved rounds (`bench.run`, `bench.gpu_check`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import measure, ops

pytest.importorskip("pytest_benchmark")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
B, N, H, D = (128, 197, 12, 768) if GPU else (2, 197, 3, 192)
BASELINES = ("sdpa flash", "sdpa cudnn", "sdpa efficient", "flex") if GPU else ("sdpa flash", "sdpa math")

CASES: dict[str, Callable[[], ops.Case]] = {
    **{
        f"attention-P{P}": lambda P=P: ops.attention_case(
            B, N, P, H, D // H, DTYPE, DEVICE, (*BASELINES, "products")
        )
        for P in (0, 10, 50, 100)
    },
    "packed-P50": lambda: ops.packed_case(B, N, 50, H, D // H, DTYPE, DEVICE, BASELINES),
    "gated_blend": lambda: ops.blend_case(B, N + 50, 50, D, DTYPE, DEVICE),
    "gated_blend_norm": lambda: ops.blend_norm_case(B, N + 50, 50, D, DTYPE, DEVICE),
    "folded-P10": lambda: ops.folded_case(B, N, 10, H, D, DTYPE, DEVICE),
    "folded-norm-P10": lambda: ops.folded_norm_case(B, N, 10, H, D, DTYPE, DEVICE),
    "folded-P50": lambda: ops.folded_case(B, N, 50, H, D, DTYPE, DEVICE),
    "row_attention": lambda: ops.row_case(B, N + 50, H, D, DTYPE, DEVICE),
}


def competitors() -> list[Any]:
    """One parameter set for each competitor of each case."""
    found = []
    for name, make in CASES.items():
        case = make()
        found += [pytest.param(name, who, id=f"{name}-{who}") for who in (*case.ours, *case.others)]
    return found


@pytest.mark.parametrize("mode", [ops.FORWARD, ops.BOTH])
@pytest.mark.parametrize(("name", "provider"), competitors())
def test_operation(benchmark: Any, name: str, provider: str, mode: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]()
    error = ops.Judge(case, mode)({**case.ours, **case.others}[provider])
    (step, *others) = ops.steps(case, mode, [provider], DEVICE)[provider]

    def run() -> None:
        for one in (step, *others):
            one()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{case.name} {mode}"
    benchmark.extra_info.update(
        provider=provider, calls=1 + len(others), error=error, shape=case.shape, **measure.machine(DEVICE)
    )
    benchmark.pedantic(run, rounds=20 if GPU else 5, warmup_rounds=2)
