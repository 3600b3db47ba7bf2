"""Measure: interleaved rounds on a CPU or a GPU, rows as data, operations, memory, and the name of the machine.

On a GPU each operation is captured as a CUDA graph of one call for each of several sets of inputs, together larger than
the cache, and CUDA events time its replays: no launch gaps, and nothing is read from a warm cache.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], Any]

# A timed stretch on a GPU holds as many replays or plain calls as fill this: replays, so that the events' resolution
# does not matter; plain calls, so that the synchronisation at its end does not.
REPLAYS_MS, CALLS_MS = 1.0, 100.0


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


def interleaved(
    steps: Mapping[str, Step | Sequence[Step]],
    rounds: int,
    device: str = "cpu",
    *,
    graphs: bool = True,
    warm: bool = True,
) -> dict[str, dict[str, Any]]:
    """Run every competitor once a round, in turn, so that a disturbance of the machine affects all of them.

    Args:
        steps: for each competitor one step, or several that do the same on other inputs; all are run in a round.
        rounds: number of rounds.
        device: "cpu", or "cuda" for events on the device.
        graphs: on "cuda", capture each competitor; False times plain calls, as an uncaptured program makes them.
        warm: on a CPU, run each once before the first round.

    Returns:
        For each, the time of one step in ms (`min`, `p20`, `p50`, `p80`), `clock`, and on a CPU the least CPU time,
        `cpu_min`.
    """
    sets = {name: [s] if callable(s) else list(s) for name, s in steps.items()}
    if device.startswith("cuda"):
        return _on_gpu(sets, rounds, graphs)
    if warm:
        for several in sets.values():
            several[0]()
    wall: dict[str, list[float]] = {name: [] for name in sets}
    cpu: dict[str, list[float]] = {name: [] for name in sets}
    for i in range(rounds):
        for name in _order(sets, i):
            start, start_cpu = time.perf_counter(), time.process_time()
            for step in sets[name]:
                step()
            wall[name].append(1e3 * (time.perf_counter() - start) / len(sets[name]))
            cpu[name].append(1e3 * (time.process_time() - start_cpu) / len(sets[name]))
    return {name: {**quantiles(wall[name]), "cpu_min": round(min(cpu[name]), 4)} for name in sets}


def _on_gpu(sets: dict[str, list[Step]], rounds: int, graphs: bool) -> dict[str, dict[str, Any]]:
    runs: dict[str, tuple[Step, str, int]] = {}
    for name, several in sets.items():
        run, clock = _prepared(several, graphs)
        once = _events(run, 1)
        once = min(once, _events(run, 1))  # the first replay uploads the graph
        stretch = REPLAYS_MS if clock == "graph" else CALLS_MS
        runs[name] = run, clock, max(1, min(50, math.ceil(stretch / max(once, 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in sets}
    for i in range(rounds):
        for name in _order(sets, i):
            run, _, repeats = runs[name]
            times[name].append(_events(run, repeats) / (repeats * len(sets[name])))
    return {name: {**quantiles(times[name]), "clock": runs[name][1]} for name in sets}


def capture(run: Step) -> torch.cuda.CUDAGraph:
    """Run `run` three times on a stream of its own, then capture it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _prepared(steps: list[Step], graphs: bool) -> tuple[Step, str]:
    """Return what runs all `steps`: a replay and "graph", or plain calls and "events" if they cannot be captured."""

    def run() -> None:
        for step in steps:
            step()

    if graphs:
        try:
            return capture(run).replay, "graph"
        except RuntimeError:
            torch.cuda.synchronize()
    for _ in range(3):
        run()
    return run, "events"


def _events(run: Step, repeats: int) -> float:
    """Return the milliseconds on the device for `repeats` runs."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _order(names: Iterable[str], i: int) -> list[str]:
    """Reverse every other round, so that no competitor always follows the same one."""
    return list(names) if i % 2 == 0 else list(names)[::-1]


def quantiles(times: list[float]) -> dict[str, float]:
    """Return `min`, `p20`, `p50` and `p80` of times in ms, to a tenth of a microsecond."""
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    named = {"min": min(times), "p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}
    return {name: round(value, 4) for name, value in named.items()}


def input_sets(bytes_of_one: int, device: str) -> int:
    """Return the number of sets of inputs to rotate among: together at least three times the cache."""
    if not device.startswith("cuda"):
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(16, math.ceil(3 * cache / max(bytes_of_one, 1))))


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
