"""The proof on a GPU, one command: build, numerics, then times against the baselines. Needs no network.

    python -m bench.gpu_check --out DIR [--minutes 8] [--parts NAME,NAME]
    python -m bench.gpu_check --out DIR --dry-run-cpu      the same code on tiny shapes; its times mean nothing

Each part is a process with a time limit, so that a crash or an endless loop costs that part alone; what it found before
is kept. Parts run in the order of their importance until the time is spent. DIR gets `records.jsonl` (each check, time
and note as soon as it is there), `table.txt`, rewritten after each stage and printed last, and `failed.txt`, the last
lines of failed parts. Logs and build go to a temporary folder.

Exit code: 0 everything that was checked passed, 1 something failed, 2 there is no GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import cases, gpu_report

REPOSITORY = Path(__file__).resolve().parents[1]
RESERVE = 6.0  # seconds kept for the report
MIN_SECONDS = 12.0  # a part that would get fewer is not started
GRACE = 8.0  # a part that stops by itself at its limit gets so many more to finish its last case
COMPILING = 25.0  # ... where torch may have to compile a case first


@dataclass(frozen=True)
class Part:
    """One process: its name, what it runs, the seconds it may take, and whether it writes records itself."""

    name: str
    command: list[str]
    seconds: float
    writes: bool = True
    grace: float = GRACE


@dataclass
class Outcome:
    """The end of a part: "ok", "failed", "stopped" at its limit, or "skipped", and a line about it."""

    name: str
    status: str
    seconds: float
    detail: str

    def __str__(self) -> str:
        return f"{self.name:<24} {self.status:<8} {self.seconds:6.1f} s  {self.detail}"


def stages(out: Path, work: Path, dry: bool, shards: int) -> list[list[Part]]:
    """Return the parts in order of importance; those of one stage take no times and run side by side."""

    def part(name: str, seconds: float, *options: str, grace: float = GRACE) -> Part:
        module = [sys.executable, "-m", "bench.gpu_parts", name.partition("-")[0]]
        dry_run = ["--dry-run-cpu"] if dry else []
        command = [*module, "--out", str(out), *options, "--name", name, *dry_run]
        return Part(name, command, seconds, grace=grace)

    sweep = [part(f"numerics-{i}", 180, "--shard", f"{i}/{shards}") for i in range(shards)]
    first, *others = cases.NAMES
    return [
        [Part("build", build_command(work), 110, writes=False)],
        [*sweep, part("modes", 160), Part("tests", test_command(dry), 180, writes=False)],
        [part(first, 80)],
        [part("models", 70)],
        [part("autotuned", 80, grace=COMPILING)],
        *([part(name, 40)] for name in others),
        [part("compiled", 150, grace=COMPILING)],
    ]


def build_command(work: Path) -> list[str]:
    """Return the command that builds the package into a folder that the later parts import it from."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--upgrade"]
    paths = ["--target", str(work / "installed"), str(REPOSITORY)]
    return [sys.executable, "-m", "pip", "install", *options, *paths]


def test_command(dry: bool) -> list[str]:
    """Return the command that tests the operations on the backends of a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(REPOSITORY), "-p", "no:cacheprovider"]
    command += ["-c", str(REPOSITORY / "pyproject.toml"), "--continue-on-collection-errors", "--tb=line"]
    if dry:
        return [*command, str(REPOSITORY / "tests" / "ops" / "test_dispatch.py")]
    if find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(12, os.cpu_count() or 1)))]  # they wait for Triton, not for the GPU
    paths = (REPOSITORY / "tests" / "ops", REPOSITORY / "tests" / "kernels" / "test_triton_backend.py")
    return [*command, "-k", "triton or cuda", "--maxfail", "50", *map(str, paths)]


def environment(work: Path) -> dict[str, str]:
    """Return the environment of a part, which imports the build, then the repository (for `bench`)."""
    paths = [str(work / "installed"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS may give other bits each time
    }


def run_stage(parts: Sequence[Part], work: Path, seconds_left: float) -> Iterator[Outcome]:
    """Run `parts` side by side, each to its limit or to the end of the time; yield the outcome of each."""
    started = time.monotonic()
    running: list[tuple[Part, subprocess.Popen[bytes], float]] = []
    for part in parts:
        limit = min(part.seconds, seconds_left)
        if limit < MIN_SECONDS:
            yield Outcome(part.name, "skipped", 0.0, "no time is left")
            continue
        # The part stops by itself a little before it is stopped.
        own = ["--seconds", f"{max(limit - part.grace, limit / 2):.0f}"] if part.writes else []
        with (work / f"{part.name}.log").open("wb") as log:
            options: Any = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": work, "env": environment(work)}
            process = subprocess.Popen(
                [*part.command, *own], start_new_session=True, preexec_fn=_heed_interrupts, **options
            )
        running.append((part, process, started + limit))
    try:
        for part, process, end in running:
            try:
                code = process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                _stop(process, ask=not part.writes)
                code = None
            yield _outcome(part, code, time.monotonic() - started, work)
    finally:  # if this program is stopped itself, its parts would live on
        for _, process, _ in running:
            if process.poll() is None:
                _stop(process)


def _heed_interrupts() -> None:
    """Let a part hear the SIGINT of :func:`_stop`, which a program run in a shell's background ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _outcome(part: Part, code: int | None, seconds: float, work: Path) -> Outcome:
    last = gpu_report.last_line(work / f"{part.name}.log")
    if part.name == "tests" and code == 5:
        return Outcome(part.name, "ok", seconds, "no backend of a GPU has tests to run")
    if code is None:
        failed = part.name == "tests" and "failed" in last
        return Outcome(part.name, "failed" if failed else "stopped", seconds, f"at its limit; {last}")
    if code < 0:
        return Outcome(part.name, "failed", seconds, f"killed by {signal.Signals(-code).name}; {last}")
    return Outcome(part.name, "ok" if code == 0 else "failed", seconds, last)


def _stop(process: subprocess.Popen[bytes], ask: bool = False) -> None:
    """End the part and what it started, its process group; `ask` it first, on which pytest sums up what it has run."""
    if ask:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, number)
            process.wait(2)
            return


def run(all_stages: Sequence[Sequence[Part]], out: Path, work: Path, minutes: float) -> int:
    """Run every stage until the time is spent, print a line for each part and then the table; return the exit code."""
    started = time.monotonic()
    outcomes: list[Outcome] = []
    found: gpu_report.Found = {}
    for stage in all_stages:
        left = 60 * minutes - RESERVE - (time.monotonic() - started)
        try:
            for outcome in run_stage(stage, work, left):
                outcomes.append(outcome)
                print(outcome, flush=True)
        finally:
            found = write_table(outcomes, out, work)
    print((out / "table.txt").read_text(), end="", flush=True)
    wrong = any(not c["ok"] for c in found["checks"])
    return 1 if wrong or any(_is_bad(o) for o in outcomes) else 0


def write_table(outcomes: Sequence[Outcome], out: Path, work: Path) -> gpu_report.Found:
    """Write `table.txt` and `failed.txt` of what there is so far, and return it."""
    found = gpu_report.collect(out / "records.jsonl")
    (out / "table.txt").write_text(gpu_report.table(found, outcomes) + "\n")
    failed = [o.name for o in outcomes if o.status in ("failed", "stopped")]
    if failed:
        ends = [f"== {name}\n{gpu_report.end_of(work / f'{name}.log')}" for name in failed]
        (out / "failed.txt").write_text("\n".join(ends))
    return found


def _is_bad(outcome: Outcome) -> bool:
    """Tell whether a part failed. Times that were not all taken are no failure; checks that never ended are."""
    checks = outcome.name.startswith(("build", "numerics", "modes"))
    return outcome.status == "failed" or (outcome.status == "stopped" and checks)


def why_no_gpu() -> str | None:
    """Return the reason why there is nothing to check here, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    build = "is built for CUDA" if torch.version.cuda else "is built without CUDA"
    return f"torch {torch.__version__} {build} and finds no GPU"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--minutes", type=float, default=8.0, help="the whole run ends within so many")
    parser.add_argument("--parts", help="only these, separated by commas")
    parser.add_argument("--shards", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--dry-run-cpu", action="store_true", help="tiny shapes: checks this program")
    given: Any = parser.parse_args(arguments)
    if not given.dry_run_cpu:
        reason = why_no_gpu()
        if reason is not None:
            print(f"gpu_check: {reason}; nothing was run (--dry-run-cpu tries this program without one)")
            return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "records.jsonl").unlink(missing_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    print(f"logs and build: {work}")
    chosen = stages(out, work, given.dry_run_cpu, given.shards)
    if given.parts:
        wanted = given.parts.split(",")
        known = sorted({p.name.partition("-")[0] for stage in chosen for p in stage})
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            parser.error(f"there is no part {', '.join(unknown)}; known are {', '.join(known)}")
        chosen = [[p for p in stage if p.name.partition("-")[0] in wanted] for stage in chosen]
    return run(chosen, out, work, given.minutes)


if __name__ == "__main__":
    sys.exit(main())
