"""The GPU check without a GPU: its parts on tiny shapes, and that it survives whatever a part does."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import cases, gpu_check, gpu_clock, gpu_parts, gpu_records, gpu_report, measure, numerics, ops
from bench.cases import prompt_attention
from fastprompt.kernels.identities import Refused
from fastprompt.ops import attention_choice, profile


def dry(seconds: float = 300.0) -> gpu_records.Settings:
    return gpu_records.Settings(True, time.monotonic() + seconds)


def part(name: str, code: str, seconds: float = 30.0) -> gpu_check.Part:
    return gpu_check.Part(name, [sys.executable, "-c", code], seconds, writes=False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_says_so_and_runs_nothing(
    no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "finds no GPU; nothing was run" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--dry-run-cpu", "--parts", "attention,nothing"])


def test_it_continues_after_a_crash_an_error_and_a_part_that_never_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "MIN_SECONDS", 0.0)
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    stages = [
        [part("crash", "import os; print('so far', flush=True); os.abort()")],
        [part("error", "raise SystemExit('three things were wrong')"), part("beside", "print('done')")],
        [part("endless", "import time; print('waiting', flush=True); time.sleep(60)", seconds=2.0)],
        [part("last", "print('still here')")],
    ]
    started = time.monotonic()
    assert gpu_check.run(stages, out, work, minutes=2.0) == 1
    assert time.monotonic() - started < 40
    table = [line.split(maxsplit=4) for line in (out / "table.txt").read_text().splitlines()]
    found = {words[0]: (words[1], words[4]) for words in table if len(words) == 5 and words[3] == "s"}
    assert found == {
        "crash": ("failed", "killed by SIGABRT; so far"),
        "error": ("failed", "three things were wrong"),
        "beside": ("ok", "done"),
        "endless": ("stopped", "at its limit; KeyboardInterrupt"),
        "last": ("ok", "still here"),
    }
    assert capsys.readouterr().out.endswith((out / "table.txt").read_text())
    assert "== error\nthree things were wrong" in (out / "failed.txt").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["failed.txt", "records.jsonl", "table.txt"]


def test_what_there_is_no_time_for_is_skipped_with_a_line(tmp_path: Path) -> None:
    assert gpu_check.run([[part("first", "print(1)")]], tmp_path, tmp_path, minutes=0.15) == 0
    assert "skipped" in (tmp_path / "table.txt").read_text()
    assert "no time is left" in (tmp_path / "table.txt").read_text()


def test_a_run_that_is_stopped_keeps_a_table_of_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "records.jsonl").write_text('{"kind": "check", "name": "a", "ok": true, "detail": ""}\n')

    def run_stage(
        parts: list[gpu_check.Part], work: Path, left: float, more: Any
    ) -> Iterator[gpu_check.Outcome]:
        yield gpu_check.Outcome(parts[0].name, "ok", 1.0, "")
        raise SystemExit(143)

    monkeypatch.setattr(gpu_check, "run_stage", run_stage)
    with pytest.raises(SystemExit):
        gpu_check.run([[part("first", "")], [part("second", "")]], tmp_path, tmp_path, minutes=2.0)
    table = (tmp_path / "table.txt").read_text()
    assert "first" in table
    assert "== checks: 1 passed, 0 failed" in table


def test_parts_come_in_the_order_of_their_importance(tmp_path: Path) -> None:
    stages = gpu_check.stages(tmp_path, tmp_path, dry=False, shards=2)
    names = [[p.name for p in stage] for stage in stages]
    assert names == [
        ["numerics-0", "numerics-1", "precompile-0", "precompile-1", "precompile-2"],
        *([name] for name in cases.NAMES),
        ["compiled"],
        ["calibrate"],
        ["autocast"],
        ["compilers"],
        ["small"],
        ["autotuned"],
        ["longer"],
        ["models"],
        ["modes", "tests"],
        ["build"],
    ]
    every = {name.partition("-")[0] for stage in names for name in stage}
    assert every == {"build", "tests", "calibrate", *gpu_parts.PARTS} - {"ptxas"}
    assert every >= set(cases.NAMES)


def test_numerics_are_checked_with_another_assembler_beside_tritons_own(tmp_path: Path) -> None:
    first, *_ = gpu_check.stages(tmp_path, tmp_path, dry=False, shards=1, ptxas=Path("/cuda/bin/ptxas"))
    assert [p.name for p in first][:2] == ["numerics-0", "ptxas-0"]
    assert first[1].environment["TRITON_PTXAS_PATH"] == "/cuda/bin/ptxas"
    assert all(p.environment["FASTPROMPT_CHECK"] == "never" for p in first[:2])
    assert "TRITON_PTXAS_PATH" not in first[0].environment


@pytest.mark.parametrize(
    ("own", "other", "changes"), [(True, True, False), (False, True, True), (False, False, False)]
)
def test_later_parts_use_the_other_assembler_if_only_tritons_own_makes_wrong_kernels(
    own: bool, other: bool, changes: bool, tmp_path: Path
) -> None:
    checks = [("numerics-0", own), ("ptxas-0", other)]
    lines = [{"kind": "check", "part": part, "name": part, "ok": ok, "detail": ""} for part, ok in checks]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    say = part("second", "import os; print(os.environ.get('TRITON_PTXAS_PATH', 'its own'))")
    gpu_check.run([[part("first", "")], [say]], tmp_path, tmp_path, 2.0, Path("/cuda/bin/ptxas"))
    assert ("/cuda/bin/ptxas" in (tmp_path / "second.log").read_text()) == changes


def test_the_newest_assembler_is_found_if_it_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, version in (("old", "12.4.1"), ("new", "99.1.80")):
        file = tmp_path / folder / "ptxas"
        file.parent.mkdir()
        file.write_text(f"#!/bin/sh\necho Cuda compilation tools, V{version}\n")
        file.chmod(0o755)
    paths = os.pathsep.join(str(tmp_path / folder) for folder in ("old", "new"))
    monkeypatch.setenv("PATH", f"{paths}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    assert gpu_check.assembler() == tmp_path / "new" / "ptxas"
    monkeypatch.setattr(profile, "machine", lambda: {"ptxas": "99.2.1"})
    assert gpu_check.assembler() is None


def test_a_resumed_run_keeps_what_there_is_and_runs_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "MIN_SECONDS", 0.0)
    done = part("done", "print('all of it')")
    endless = part("late", "import time; time.sleep(60)", seconds=0.5)
    gpu_check.run([[done], [endless]], tmp_path, tmp_path, minutes=1.0)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"kind": "row", "cut sho')
    again = tmp_path / "again"
    stages = [[part("done", "print('a second time')")], [part("late", "print('in time')")]]
    monkeypatch.setattr(gpu_check, "stages", lambda *arguments: stages)
    options = ["--out", str(again), "--dry-run-cpu", "--resume", str(tmp_path / "records.jsonl")]
    assert gpu_check.main(options) == 0
    table = (again / "table.txt").read_text()
    assert "all of it" in table
    assert "in time" in table
    assert "a second time" not in table
    with pytest.raises(SystemExit):
        gpu_check.main([*options[:-1], str(tmp_path / "nothing")])


def test_clock_and_power_are_recorded_while_a_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 2619, 640.5, 60, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu_clock, "SECONDS", 0.01)
    records = tmp_path / "records.jsonl"
    with gpu_clock.sampling(records, "models"):
        end = time.monotonic() + 20
        while not records.exists() and time.monotonic() < end:
            time.sleep(0.01)
    sample = gpu_report.collect(records)["clocks"][0]
    assert sample == {"part": "models", "sm_mhz": 1980, "memory_mhz": 2619, "watts": 640.5, "celsius": 60}
    assert "1980 MHz (1980 to 1980), 640 W" in gpu_report.clocks([sample])[0]


# The parts ------------------------------------------------------------------------------------------------------------


def records(name: str, settings: gpu_records.Settings) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return list(gpu_parts.PARTS[name](settings))


def test_the_sweep_checks_every_operation_and_finds_nothing_wrong() -> None:
    found = [r for r in records("numerics", dry()) if r["kind"] == "check"]
    assert len(found) > 20
    assert [r for r in found if not r["ok"]] == []
    assert {r["name"].split()[0] for r in found} >= set(cases.NAMES)


def test_shards_share_the_sweep() -> None:
    def shapes(*shard: int) -> list[Any]:
        return sorted((c.name, str(c.dtype), c.frozen) for c in numerics.sweep("cpu", True, shard))

    assert shapes(0, 2) != shapes(1, 2)
    assert sorted(shapes(0, 2) + shapes(1, 2)) == shapes(0, 1)
    assert {name.split()[0] for name, *_ in shapes(1, 4)} >= set(cases.NAMES)


def sweep_of(case: ops.Case, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(numerics, "sweep", lambda device, tiny, shard: iter([case]))
    return records("numerics", dry())


def test_a_backend_that_says_why_it_does_not_support_a_call_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = prompt_attention.case(1, 3, 0, 1, 8, torch.float32, "cpu")

    def refuse(**inputs: Any) -> Any:
        raise NotImplementedError("head_dim 8 is too small")

    case.ours = {"fastprompt triton": refuse}
    (found,) = sweep_of(case, monkeypatch)
    assert found["kind"] == "note"
    assert found["text"].endswith(": head_dim 8 is too small")


def test_a_kernel_that_cannot_be_launched_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    case = prompt_attention.case(1, 3, 0, 1, 8, torch.float32, "cpu")

    def refuse(**inputs: Any) -> Any:
        raise Refused("it cannot be launched: out of resource: shared memory")

    case.ours = {"fastprompt triton": refuse}
    (found,) = sweep_of(case, monkeypatch)
    assert not found["ok"]
    assert "shared memory" in found["detail"]


def test_the_sweep_reports_a_wrong_kernel_and_one_whose_results_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    case = prompt_attention.case(2, 9, 3, 2, 8, torch.float32, "cpu")
    exact = case.exact
    case.ours = {
        "wrong": lambda **inputs: exact(**inputs) * 1.01,
        "unsteady": lambda **inputs: exact(**inputs) * (1 + 1e-7 * torch.rand(1)),
        "forgetful": lambda **inputs: exact(**inputs) + torch.empty(2, 9, 2, 8),
        "right": exact,
    }
    found = {r["name"].split(": ")[-1]: r for r in sweep_of(case, monkeypatch)}
    assert {name: r["ok"] for name, r in found.items()} == {
        "wrong": False,
        "unsteady": False,
        "forgetful": False,
        "right": True,
    }
    assert "not the same bits twice" in found["unsteady"]["detail"]
    assert "off by nan" in found["forgetful"]["detail"]


@pytest.mark.parametrize("name", [*cases.NAMES, "autotuned"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_times_are_taken_in_both_modes_and_fit_a_row(name: str) -> None:
    rows = [r for r in records(name, dry()) if r["kind"] == "row"]
    assert {r["mode"] for r in rows} == {ops.FORWARD, ops.BOTH}
    assert any(r["provider"].startswith("fastprompt") for r in rows)
    assert any("flex" in r["provider"] for r in rows) == (name == "autotuned")
    for row in rows:
        measure.Row(**{k: v for k, v in row.items() if k != "kind"})


@pytest.mark.parametrize(
    ("name", "providers", "modes"),
    [
        ("models", {"fastprompt", "concatenation", "bare backbone"}, {"training step", "inference"}),
        ("longer", {"fastprompt", "concatenation", "bare backbone"}, {"training step", "forward+backward"}),
        *(
            pytest.param(part, {"fastprompt", "concatenation"}, modes, marks=pytest.mark.slow)
            for part, modes in (("autocast", {"training step"}), ("small", {"training step", "inference"}))
        ),
        pytest.param(
            *("compilers", {"fastprompt, compiled", "concatenation, compiled"}, {"training step"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "compiled",
            {"fastprompt, compiled", "concatenation, compiled"},
            {"training step"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_models_are_timed_against_concatenation_and_the_bare_backbone(
    name: str, providers: set[str], modes: set[str]
) -> None:
    rows = [r for r in records(name, dry()) if r["kind"] == "row"]
    assert {r["provider"] for r in rows if r["mode"] == "training step"} >= providers
    assert {r["mode"] for r in rows} >= modes


@pytest.mark.slow
def test_every_mode_of_execution_is_checked() -> None:
    found = {r["name"]: r for r in records("modes", dry())}
    assert {name: r["detail"] for name, r in found.items() if not r["ok"]} == {}
    for what in ("torch.compile", "autocast", "DDP"):
        assert len([name for name in found if name.startswith(what)]) == len(numerics.METHODS)


def test_a_training_step_under_autocast_is_checked_and_a_wrong_one_is_found() -> None:
    trained = numerics._Trained("vpt-deep", "cpu", autocast=True)
    assert trained.check(trained.model).startswith("error ")
    with pytest.raises(numerics.WrongResult, match="off by"):
        trained.check(lambda images: 1.1 * trained.model(images))


@pytest.mark.parametrize("name", sorted(gpu_parts.PARTS))
def test_a_part_whose_time_is_over_stops_and_says_what_it_left_out(name: str) -> None:
    found = records(name, dry(seconds=-1.0))
    assert {r["kind"] for r in found} == {"note"}
    assert any("the time ended before" in r["text"] for r in found)


def test_what_was_measured_is_not_measured_again() -> None:
    first = records("row_attention", dry())
    done = [r["name"] for r in first if r["kind"] == "done"]
    assert len(done) == 2
    settings = dry()
    settings.done = frozenset(done[:1])
    again = records("row_attention", settings)
    assert [r["name"] for r in again if r["kind"] == "done"] == done[1:]
    assert {r["mode"] for r in again if r["kind"] == "row"} == {ops.BOTH}


def test_the_kernels_that_ran_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(key="cudnn_generated_fort_native_sdpa", self_device_time_total=5.0)
    other = SimpleNamespace(key="cudaLaunchKernel", self_device_time_total=0.0)
    profiler = SimpleNamespace(key_averages=lambda: [other, event])
    monkeypatch.setattr(torch.profiler, "profile", lambda: contextlib.nullcontext(profiler))
    (found,) = gpu_parts._ran("P=50, forward: sdpa any", lambda: None)
    assert found["ran"] == ["cudnn_generated_fort_native_sdpa"]


def test_attention_is_timed_by_each_way_and_on_keys_joined_beforehand() -> None:
    case = prompt_attention.packed_case(2, 9, 3, 2, 8, torch.float32, "cpu", ("sdpa flash",), by_way=True)
    rows = ops.rows(case, ops.BOTH, 2, "cpu")
    assert {f"fastprompt {way}" for way in attention_choice.WAYS} <= {row.provider for row in rows}
    assert case.notes == []
    seen: list[str | None] = []
    case.ours["fastprompt split"] = lambda **inputs: (
        seen.append(attention_choice.forced()),
        case.exact(**inputs),
    )[1]
    ops.check_correctness(case, ops.BOTH, ["fastprompt split"])
    assert seen == ["split"]
    joined = prompt_attention.joined_case(2, 9, 3, 2, 8, torch.float32, "cpu", ("sdpa flash",))
    assert {len(x[0]) for n, x in joined.draw().items() if n != "q"} == {12}
    (row,) = (r for r in ops.rows(joined, ops.FORWARD, 2, "cpu") if r.provider == "sdpa flash")
    assert row.shape["keys"] == 12


def test_a_cuda_error_ends_its_part() -> None:
    lost = {
        "kind": "check",
        "name": "a",
        "ok": False,
        "detail": "AcceleratorError: CUDA error: an illegal address",
    }
    found = list(gpu_parts.until_the_device_is_lost([lost, {**lost, "name": "b"}]))
    assert [r.get("name", r.get("text")) for r in found] == [
        "a",
        "after a CUDA error: the rest of this part was not run",
    ]


# The whole, and its report --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_writes_records_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "records.jsonl").write_text('{"kind": "check", "name": "of an earlier run", "ok": false}\n')
    options = [
        "--out",
        str(tmp_path),
        "--dry-run-cpu",
        "--parts",
        "gated_blend,row_attention",
        "--shards",
        "1",
    ]
    assert gpu_check.main(options) == 0
    printed = capsys.readouterr().out
    assert printed.endswith((tmp_path / "table.txt").read_text())
    found = gpu_report.collect(tmp_path / "records.jsonl")
    assert {row["suite"] for row in found["rows"]} == {"gated_blend", "gated_blend_norm", "row_attention"}
    assert found["checks"] == []
    assert "gated_blend forward B=2 N=67 P=50 D=24 fp32" in printed


def test_a_failed_check_is_in_the_table_and_in_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"kind": "check", "name": "good", "ok": True, "detail": ""},
        {"kind": "check", "name": "bad", "ok": False, "detail": "off by 3"},
        {"kind": "note", "text": "P=1, forward: sdpa cudnn: no kernel"},
        {"kind": "note", "text": "P=2, forward: sdpa cudnn: no kernel"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "records.jsonl").write_text(text + '{"kind": "row", "cut sho')
    assert gpu_check.run([[]], tmp_path, tmp_path, minutes=1.0) == 1
    printed = capsys.readouterr().out
    assert "== checks: 1 passed, 1 failed" in printed
    assert "FAILED bad: off by 3" in printed
    assert "note: P=1, forward and 1 more: sdpa cudnn: no kernel" in printed


def test_the_table_sets_ours_beside_the_best_of_the_others() -> None:
    common = {"suite": "prompt_attention", "mode": "forward", "shape": {"N": 197}, "dtype": "bfloat16"}
    rows = [
        {**common, "provider": "fastprompt triton", "p50": 0.05, "ratio": 0.5, "baseline": "sdpa flash",
         "error": 1e-3, "metrics": {"of_floor": 0.72}},
        {**common, "provider": "sdpa flash", "p50": 0.1, "ratio": 1.0, "baseline": "sdpa flash",
         "error": 1e-3, "metrics": {}},
    ]  # fmt: skip
    (_, line) = gpu_report.comparisons(rows)
    found = " ".join(line.split())
    assert found == (
        "prompt_attention forward N=197 bf16 triton 50.0 us sdpa flash 100.0 us 0.50 72% 1.0e-03"
    )
