"""Measuring: who is compared with whom, in which order, and that the tables say what the rows do."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import measure, report, run
from fastprompt.calibration import timing

MACHINE = {"device": "a CPU", "versions": {"torch": "2", "timm": "1", "threads": 2}, "commit": "abc"}


def times(**least: float) -> dict[str, dict[str, float]]:
    return {name: {"min": ms, "p20": ms + 1, "p50": ms + 2, "p80": ms + 3} for name, ms in least.items()}


def compare(**options: Any) -> dict[str, measure.Row]:
    given: dict[str, Any] = {
        "suite": "vpt-deep",
        "mode": "inference",
        "shape": {"model": "m", "B": 2, "P": 5},
        "dtype": "float32",
        "rounds": 3,
        **options,
    }
    errors: dict[str, float | None] = {"fastprompt": 1e-6, "slow": 1e-6, "fast": 1e-6, "bare": None}
    found = measure.compare(
        times(fastprompt=2.0, slow=8.0, fast=4.0, bare=1.0), ["fastprompt"], errors, {}, MACHINE, **given
    )
    return {row.provider: row for row in found}


def test_the_baseline_is_the_fastest_of_the_others_that_was_checked() -> None:
    rows = compare()
    assert {row.baseline for row in rows.values()} == {"fast"}
    assert {name: row.ratio for name, row in rows.items()} == {
        "fastprompt": 0.5,
        "slow": 2.0,
        "fast": 1.0,
        "bare": 0.25,
    }


def test_a_row_names_device_versions_commit_shape_and_error() -> None:
    row = compare()["fastprompt"].to_dict()
    assert row["device"] == "a CPU"
    assert (row["versions"], row["commit"]) == (MACHINE["versions"], "abc")
    assert (row["shape"], row["dtype"], row["rounds"]) == ({"model": "m", "B": 2, "P": 5}, "float32", 3)
    assert (row["min"], row["p20"], row["p50"], row["p80"]) == (2.0, 3.0, 4.0, 5.0)
    assert row["error"] == 1e-6
    assert json.loads(json.dumps(row)) == row


def test_rounds_are_interleaved_and_every_other_one_runs_backwards() -> None:
    calls: list[str] = []
    steps = {"a": lambda: calls.append("a"), "b": [lambda: calls.append("b1"), lambda: calls.append("b2")]}
    found = timing.interleaved(steps, rounds=2)
    assert calls[2:] == ["a", "b1", "b2", "b1", "b2", "a"]  # after one unmeasured step of each
    assert found.keys() == {"a", "b"}
    assert all(t["min"] <= t["p20"] <= t["p50"] <= t["p80"] for t in found.values())


def test_quantiles() -> None:
    assert timing.quantiles([float(i) for i in range(11)]) == {
        "min": 0.0,
        "p20": 2.0,
        "p50": 5.0,
        "p80": 8.0,
    }
    assert timing.quantiles([3.0]) == {"min": 3.0, "p20": 3.0, "p50": 3.0, "p80": 3.0}


def test_the_machine_names_this_one() -> None:
    found = measure.machine()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["threads"] == torch.get_num_threads()
    assert found["device"]
    assert measure.folder_name("cpu") == "cpu"


def test_saved_bytes_counts_a_storage_once_and_no_parameter() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.nn.Parameter(torch.randn(8))
    assert measure.saved_bytes(lambda: (x * weight) * x, [weight]) == 2 * x.nbytes  # x, and x * weight


def method_rows() -> dict[str, Any]:
    metrics = {"operations": 50.0, "saved_bytes": 30.0}
    rows = [row.to_dict() for row in compare().values()]
    rows += [row.to_dict() for row in compare(mode="training step").values()]
    for row in rows:
        row["metrics"] = {k: v * (1 if row["provider"] == "fastprompt" else 2) for k, v in metrics.items()}
    return {"rows": rows}


def test_the_table_compares_ours_with_its_baseline() -> None:
    lines = report.table(method_rows()).splitlines()
    assert "| m, batch 2 | 5 | inference | 2 | 4 | **2.00x** | 0.500x |  |" in lines
    assert "| m, batch 2 | 5 | training step | 2 | 4 | **2.00x** | 0.500x | 0.500x |" in lines
    assert len([line for line in lines if line.startswith("| m")]) == 2
    assert lines[0].endswith("wall time, at commit abc.")


def test_suites_of_different_commits_are_told_apart() -> None:
    rows = method_rows()["rows"]
    later = [{**row, "suite": "cvpt", "commit": "def"} for row in rows]
    line = report.table({"rows": [*rows, *later]}).splitlines()[0]
    assert line.endswith("vpt-deep at commit abc, cvpt at commit def.")


def test_written_replaces_what_stands_between_the_markers() -> None:
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    written = report.written(readme, method_rows())
    assert written.startswith(f"before\n{report.BEGIN}\na CPU, 2 threads")
    assert written.endswith(f"{report.END}\nafter\n")
    assert "old" not in written
    assert report.written(written, method_rows()) == written


def test_committed_rows_have_the_fields_of_a_row() -> None:
    for path in (report.RESULTS.parent.parent).glob("*/results.json"):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            measure.Row(**row)


def test_rows_of_another_machine_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(method_rows()))
    assert run.kept_rows(path, MACHINE, ["vpt-deep"]) == []
    assert len(run.kept_rows(path, MACHINE, ["cvpt"])) == 8
    with pytest.raises(SystemExit, match="versions"):
        run.kept_rows(path, {**MACHINE, "versions": {}}, ["cvpt"])


def test_the_run_measures_a_suite_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for suite in ("cvpt", "replace-attention"):
        monkeypatch.setattr(sys, "argv", ["run", "--quick", "--out", str(tmp_path), "--suite", suite])
        run.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    providers = {"fastprompt", "fastprompt, folded", "concatenation", "bare backbone"}
    assert {r["provider"] for r in rows if r["suite"] == "cvpt"} >= providers
    assert {r["provider"] for r in rows if r["suite"] == "replace-attention"} == {"replace_attention", "timm"}
    assert "| CVPT | prompts |" in capsys.readouterr().out


def test_a_run_that_is_stopped_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: Any) -> Iterator[measure.Row]:
        yield compare()["fastprompt"]
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measured", measured)
    monkeypatch.setattr(sys, "argv", ["run", "--quick", "--out", str(tmp_path), "--suite", "cvpt"])
    with pytest.raises(KeyboardInterrupt):
        run.main()
    (row,) = json.loads((tmp_path / "results.json.partial").read_text())["rows"]
    assert row["provider"] == "fastprompt"
    assert not (tmp_path / "results.json").exists()


class FakeDevice:
    """What `bench.measure` uses of `torch.cuda`, with a clock that the test sets: each step takes `ms`."""

    def __init__(self, captures: bool) -> None:
        self.captures, self.capturing, self.now = captures, False, 0.0

    def step(self, ms: float) -> Any:
        def run() -> None:
            if self.capturing:
                self.graph.append(ms)
            else:
                self.now += ms

        return run

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Graph:
            def replay(self) -> None:
                device.now += sum(device.graphs[id(self)])

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        @contextlib.contextmanager
        def graph(graph: Graph) -> Iterator[None]:
            if not device.captures:
                raise RuntimeError("operation not permitted when stream is capturing")
            device.capturing, device.graph = True, []
            yield
            device.capturing, device.graphs[id(graph)] = False, device.graph

        self.graphs: dict[int, list[float]] = {}
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "CUDAGraph": Graph,
            "graph": graph,
        }
        fakes |= {"stream": lambda s: contextlib.nullcontext(), "synchronize": lambda: None, "Event": Event}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize(("captures", "clock"), [(True, "graph"), (False, "events")])
def test_on_a_gpu_a_step_is_timed_by_events_around_all_of_its_inputs(
    captures: bool, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice(captures)
    device.install(monkeypatch)
    steps = {"a": [device.step(2.0), device.step(4.0)], "b": [device.step(0.01)]}
    found = timing.interleaved(steps, 3, "cuda")
    assert {name: (t["p50"], t["clock"]) for name, t in found.items()} == {
        "a": (3.0, clock),
        "b": (0.01, clock),
    }


def test_models_are_not_captured_on_a_gpu_and_run_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(captures=True)
    device.install(monkeypatch)
    assert timing.interleaved({"a": device.step(20.0)}, 1, "cuda", graphs=False)["a"]["clock"] == "events"
    assert device.graphs == {}
    assert device.now == 3 * 20.0 + 2 * 20.0 + timing.CALLS_MS  # warm, estimate, measure


def test_each_round_fills_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(captures=True)
    device.install(monkeypatch)
    timing.interleaved({"a": device.step(2.0)}, 3, "cuda", window=20.0)
    assert device.now == 3 * 2.0 + 2 * 2.0 + 3 * 20.0  # warm, estimate, measure
