"""Times: competitors in interleaved rounds, on a CPU or a GPU.

On a GPU each operation is captured as a CUDA graph of one call for each of several sets of inputs, together larger than
the cache, and CUDA events time its replays: no launch gaps, and nothing is read from a warm cache.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

Step = Callable[[], Any]

# A timed stretch on a GPU holds as many replays or plain calls as fill this: replays, so that the events' resolution
# does not matter; plain calls, so that the synchronisation at its end does not.
REPLAYS_MS, CALLS_MS = 5.0, 100.0
MOST_REPEATS = 2000


def interleaved(
    steps: Mapping[str, Step | Sequence[Step]],
    rounds: int,
    device: str = "cpu",
    *,
    graphs: bool = True,
    warm: bool = True,
    window: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Run every competitor once a round, in turn, so that a disturbance of the machine affects all of them.

    Args:
        steps: for each competitor one step, or several that do the same on other inputs; all are run in a round.
        rounds: number of rounds.
        device: "cpu", or "cuda" for events on the device.
        graphs: on "cuda", capture each competitor; False times plain calls, as an uncaptured program makes them.
        warm: on a CPU, run each once before the first round.
        window: on "cuda", the milliseconds each fills in a round; default 5 of replays, 100 of plain calls.

    Returns:
        For each, the time of one step in ms (`min`, `p20`, `p50`, `p80`), `clock`, and on a CPU the least CPU time,
        `cpu_min`.
    """
    sets = {name: [s] if callable(s) else list(s) for name, s in steps.items()}
    if device.startswith("cuda"):
        return _on_gpu(sets, rounds, graphs, window)
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


def _on_gpu(
    sets: dict[str, list[Step]], rounds: int, graphs: bool, window: float | None
) -> dict[str, dict[str, Any]]:
    runs: dict[str, tuple[Step, str, int]] = {}
    for name, several in sets.items():
        run, clock = _prepared(several, graphs)
        once = _events(run, 1)
        once = min(once, _events(run, 1))  # the first replay uploads the graph
        stretch = window if window is not None else REPLAYS_MS if clock == "graph" else CALLS_MS
        runs[name] = run, clock, max(1, min(MOST_REPEATS, math.ceil(stretch / max(once, 1e-3))))
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
