"""Measure: rows as data, operations, memory, and the name of the machine; times come from `fastprompt.calibration`."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastprompt.calibration.timing import Step


@dataclass(frozen=True)
class Row:
    """One competitor of one comparison. Times are milliseconds a call.

    Attributes:
        suite, mode, provider: what was measured ("prompt_attention", "forward", "sdpa flash").
        shape: named sizes; for a model also its name.
        clock: "wall", or on a GPU "graph" (replays of a captured graph) or "events" (plain calls, launches included).
        baseline: the competitor that `ratio` compares with: the fastest one that is not ours.
        ratio: this competitor's time over the baseline's, below 1 is faster: by `min` on a CPU, by `p50` on a GPU.
        error: ‖result − exact‖ / ‖exact‖ against float64, largest over outputs and gradients; None where nothing is
            compared (a bare backbone).
        metrics: what else is known: "cpu_min", "operations", "saved_bytes", "peak_bytes", "floor_us", ...
        device, versions, commit: what it was measured on.
    """

    suite: str
    mode: str
    provider: str
    shape: dict[str, Any]
    dtype: str
    clock: str
    rounds: int
    min: float
    p20: float
    p50: float
    p80: float
    baseline: str
    ratio: float
    error: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    device: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    commit: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as `results.json` has them."""
        return asdict(self)


def compare(
    times: Mapping[str, dict[str, float]],
    ours: Iterable[str],
    errors: Mapping[str, float | None],
    metrics: Mapping[str, dict[str, float]],
    machine: Mapping[str, Any],
    *,
    suite: str,
    mode: str,
    shape: dict[str, Any],
    dtype: str,
    rounds: int,
) -> list[Row]:
    """Return the rows of one comparison; the baseline is the fastest competitor that is not in `ours`."""
    by = "min" if next(iter(times.values())).get("clock", "wall") == "wall" else "p50"
    others = [name for name in times if name not in set(ours) and errors.get(name) is not None]
    baseline = min(others or list(times), key=lambda name: times[name][by])
    rows = []
    for name, t in times.items():
        quantiles = t["min"], t["p20"], t["p50"], t["p80"]
        ratio = round(t[by] / times[baseline][by], 4)
        more = {**({"cpu_min": t["cpu_min"]} if "cpu_min" in t else {}), **metrics.get(name, {})}
        what = suite, mode, name, shape, dtype, str(t.get("clock", "wall")), rounds
        rows.append(Row(*what, *quantiles, baseline, ratio, errors.get(name), more, **machine))
    return rows


def peak_bytes(step: Step, device: str) -> dict[str, float]:
    """Return {"peak_bytes": most memory that `step` allocated at a time}; nothing on a CPU."""
    if not device.startswith("cuda"):
        return {}
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return {"peak_bytes": float(torch.cuda.max_memory_allocated() - before)}


def operations(step: Step) -> int:
    """Return the floating-point operations of the matrix products in `step`, as FlopCounterMode counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def saved_bytes(forward: Step, constants: Iterable[Tensor]) -> int:
    """Return the bytes that `forward` keeps for its backward: distinct storages, those of `constants` excluded."""
    own = {tensor.untyped_storage()._cdata for tensor in constants}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what a number was measured on: `device` by name, `versions` (and threads), `commit`."""
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    versions.update((name, _version(name)) for name in ("timm", "triton"))
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        versions.update(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
        versions["capability"] = f"{properties.major}.{properties.minor}"
        return {"device": properties.name, "versions": versions, "commit": _commit()}
    versions.update(cores=os.cpu_count(), threads=torch.get_num_threads())
    return {"device": _processor(), "versions": versions, "commit": _commit()}


def folder_name(device: str) -> str:
    """Return the folder of `bench/results/` for a device: "cpu", or a GPU's name such as "nvidia-h200"."""
    if not device.startswith("cuda"):
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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


@functools.cache
def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
