"""How things are measured: interleaved rounds, quantiles, operations, bytes saved, and what machine it was."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], Any]


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Run every step once a round, in turn, so that what disturbs the machine disturbs all of them.

    Returns, for each step: wall time in ms (`min`, `p20`, `p50`, `p80`), and the least CPU time, `cpu_min`.
    """
    for step in steps.values():
        step()
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        order = list(steps.items())
        for name, step in order if i % 2 == 0 else reversed(order):
            start, start_cpu = time.perf_counter(), time.process_time()
            step()
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - start_cpu))
    return {name: {**_quantiles(wall[name]), "cpu_min": round(min(cpu[name]), 3)} for name in steps}


def _quantiles(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    named = {"min": min(times), "p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}
    return {name: round(value, 3) for name, value in named.items()}


def operations(step: Step) -> int:
    """Floating-point operations of the matrix products in `step`, as FlopCounterMode counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def saved_bytes(forward: Step, parameters: Iterable[Tensor]) -> int:
    """Bytes that `forward` keeps for its backward: distinct storages, parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


def machine() -> dict[str, Any]:
    """What a number was measured on: processor, threads, versions and commit."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    name = named.get("model name", platform.processor() or platform.machine())
    extensions = [
        x for x in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if x in named.get("flags", "").split()
    ]
    return f"{name} ({', '.join(extensions)})" if extensions else name


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"
