"""The proof on a GPU, one command: numerics, then times against the baselines, the headline first. Needs no network.

    python -m bench.gpu_check --out DIR [--minutes 8] [--parts NAME,NAME] [--resume FILE] [--ptxas FILE]
    python -m bench.gpu_check --out DIR --dry-run-cpu      the same code on tiny shapes; its times mean nothing

Each part is a process with a time limit, so that a crash or an endless loop costs that part alone; what it found before
is kept. Parts run in the order of their importance until the time is spent. DIR gets `records.jsonl` (each check, time
and note as soon as it is there), `table.txt`, rewritten after each stage and printed last, `profile.json` of the part
`calibrate`, and `failed.txt`, the last lines of failed parts. Logs and build go to a temporary folder.

`--resume` continues an earlier run, whose `records.jsonl` is the FILE: what that has measured is not measured again.

Exit code: 0 everything that was checked passed, 1 something failed, 2 there is no GPU.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import cases, gpu_clock, gpu_report

REPOSITORY = Path(__file__).resolve().parents[1]
RESERVE = 6.0  # seconds kept for the report
MIN_SECONDS = 12.0  # a part that would get fewer is not started
GRACE = 8.0  # a part that stops by itself at its limit gets so many more to finish its last case
COMPILING = 25.0  # ... where torch may have to compile a case first
# What is calibrated, the shapes that most users have first.
CALIBRATED = (
    *("--models", "vit_base_patch16_224,vit_base_patch16_384,vit_small_patch16_224,vit_large_patch16_224"),
    *("--batch", "128", "--workers", str(max(1, min(12, (os.cpu_count() or 1) - 2)))),
)


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name, command: what it is called, and what it runs.
        seconds: how long it may take.
        writes: whether it writes records itself.
        stops_at: the option that tells it its seconds, at which it stops by itself; "" for none.
        grace: the seconds that it then gets to finish.
        environment: variables besides :func:`environment`.
    """

    name: str
    command: list[str]
    seconds: float
    writes: bool = True
    stops_at: str = ""
    grace: float = GRACE
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """The end of a part: "ok", "failed", "stopped" at its limit, or "skipped", and a line about it."""

    name: str
    status: str
    seconds: float
    detail: str

    def __str__(self) -> str:
        return f"{self.name:<24} {self.status:<8} {self.seconds:6.1f} s  {self.detail}"


def stages(out: Path, work: Path, dry: bool, shards: int, ptxas: Path | None = None) -> list[list[Part]]:
    """Return the parts in order of importance; those of one stage take no times and run side by side.

    `ptxas`: another assembler, with which the numerics are checked as well.
    """
    dry_run = ["--dry-run-cpu"] if dry else []

    def part(name: str, seconds: float, *options: str, grace: float = GRACE, **variables: str) -> Part:
        module = [sys.executable, "-m", "bench.gpu_parts", name.partition("-")[0]]
        command = [*module, "--out", str(out), *options, "--name", name, *dry_run]
        return Part(name, command, seconds, stops_at="--seconds", grace=grace, environment=variables)

    def shares(name: str, seconds: float, count: int, **variables: str) -> list[Part]:
        return [part(f"{name}-{i}", seconds, "--shard", f"{i}/{count}", **variables) for i in range(count)]

    # A kernel is checked by these parts themselves: what is wrong must show, not be replaced.
    numerics = shares("numerics", 100, shards, FASTPROMPT_CHECK="never")
    if ptxas is not None:
        numerics += shares("ptxas", 100, shards, FASTPROMPT_CHECK="never", TRITON_PTXAS_PATH=str(ptxas))
    first, *others = cases.NAMES
    threads = str(max(1, (os.cpu_count() or 1) // 4))
    profile = out / "profile.json"
    calibrate = [sys.executable, "-m", "fastprompt.cli", "calibrate", "--out", str(profile)]
    calibrate += dry_run or CALIBRATED
    return [
        [*numerics, *shares("precompile", 110, 3, TORCHINDUCTOR_COMPILE_THREADS=threads)],
        [part(first, 80)],
        *([part(name, 30)] for name in others),
        [part("compiled", 100, grace=COMPILING)],
        [
            Part(
                "calibrate",
                [*calibrate, *(["--workers", "0", *dry_run] if dry else [])],
                180,
                writes=False,
                stops_at="--time-limit",
            )
        ],
        [part("autocast", 120)],
        [part("compilers", 240, grace=COMPILING)],
        [part("small", 90, grace=COMPILING)],
        [part("autotuned", 80, grace=COMPILING)],
        [part("longer", 120)],
        [part("models", 80)],
        [part("modes", 160), Part("tests", test_command(dry), 180, writes=False)],
        [Part("build", build_command(work), 110, writes=False)],
    ]


def assembler() -> Path | None:
    """Return the newest ptxas here if it is newer than the one that Triton uses for this GPU, or None."""
    from fastprompt.ops import profile

    found: list[tuple[list[int], Path]] = []
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    for name in ("triton", "nvidia"):
        spec = find_spec(name)
        for folder in spec.submodule_search_locations or () if spec else ():
            folders += [p.parent for p in Path(folder).glob("**/bin/ptxas*")]
    for file in {p for folder in folders for p in folder.glob("ptxas*") if os.access(p, os.X_OK)}:
        version = ptxas_version(file)
        if version:
            found.append((version, file))
    used = [int(n) for n in re.findall(r"\d+", profile.machine()["ptxas"])]
    best = max(found, default=None)
    return best[1] if best is not None and best[0] > used else None


def ptxas_version(file: Path) -> list[int]:
    """Return the version of an assembler as numbers; none if it does not say."""
    try:
        said = subprocess.run(
            [file, "--version"], capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    version = re.search(r"V(\d+(?:\.\d+)+)", said)
    return [int(n) for n in version.group(1).split(".")] if version else []


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
        "FASTPROMPT_PROFILE": "none",  # what the package ships is timed
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS may give other bits each time
    }


def run_stage(
    parts: Sequence[Part], work: Path, seconds_left: float, more: Mapping[str, str] | None = None
) -> Iterator[Outcome]:
    """Run `parts` side by side, each to its limit or to the end of the time; yield the outcome of each.

    `more`: variables of their environment.
    """
    started = time.monotonic()
    running: list[tuple[Part, subprocess.Popen[bytes], float]] = []
    for part in parts:
        limit = min(part.seconds, seconds_left)
        if limit < MIN_SECONDS:
            yield Outcome(part.name, "skipped", 0.0, "no time is left")
            continue
        # The part stops by itself a little before it is stopped.
        own = [part.stops_at, f"{max(limit - part.grace, limit / 2):.0f}"] if part.stops_at else []
        with (work / f"{part.name}.log").open("wb") as log:
            options: Any = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": work}
            options["env"] = {**environment(work), **(more or {}), **part.environment}
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


def run(
    all_stages: Sequence[Sequence[Part]],
    out: Path,
    work: Path,
    minutes: float,
    ptxas: Path | None = None,
) -> int:
    """Run every stage until the time is spent, print a line for each part and then the table; return the exit code.

    Parts that ended well in an earlier run, whose records are in `out`, are not run again. If only the kernels made by
    Triton's own assembler were wrong, later parts use `ptxas`.
    """
    started = time.monotonic()
    records = out / "records.jsonl"
    found = gpu_report.collect(records)
    finished = {p["name"] for p in found["parts"] if p["status"] == "ok"}
    outcomes = [Outcome(**{f.name: p[f.name] for f in fields(Outcome)}) for p in found["parts"]]
    more: dict[str, str] = {}
    write_table(outcomes, out, work)
    for parts in all_stages:
        stage = [p for p in parts if p.name not in finished]
        if not stage:
            continue
        left = 60 * minutes - RESERVE - (time.monotonic() - started)
        try:
            with gpu_clock.sampling(records, stage[0].name):
                for outcome in run_stage(stage, work, left, more):
                    outcomes = [o for o in outcomes if o.name != outcome.name] + [outcome]
                    if outcome.status != "skipped":
                        gpu_report.append(records, {"kind": "part", **asdict(outcome)})
                    print(outcome, flush=True)
        finally:
            found = write_table(outcomes, out, work)
        if ptxas is not None and _only_ours_are_wrong(found):
            more["TRITON_PTXAS_PATH"] = str(ptxas)
    print((out / "table.txt").read_text(), end="", flush=True)
    wrong = any(not c["ok"] for c in found["checks"])
    return 1 if wrong or any(_is_bad(o) for o in outcomes) else 0


def _only_ours_are_wrong(found: gpu_report.Found) -> bool:
    """Tell whether kernels of Triton's own assembler failed and none of the other one's did, which were checked too."""
    checks = [(c.get("part", "").partition("-")[0], c["ok"]) for c in found["checks"]]
    other = [ok for part, ok in checks if part == "ptxas"]
    return bool(other) and all(other) and not all(ok for part, ok in checks if part == "numerics")


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
    checks = outcome.name.startswith(("build", "numerics", "ptxas", "modes"))
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
    parser.add_argument("--shards", type=int, default=max(1, min(4, (os.cpu_count() or 1) // 4)))
    parser.add_argument("--resume", type=Path, metavar="FILE", help="the records.jsonl of a run to continue")
    parser.add_argument("--ptxas", type=Path, help="another assembler to check; default the newest one here")
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
    records = out / "records.jsonl"
    if given.resume is None:
        records.unlink(missing_ok=True)
    elif not given.resume.exists():
        parser.error(f"--resume: there is no {given.resume}")
    else:
        text = given.resume.read_text()
        records.write_text(f"{text}\n")  # a line that was cut short ends here
    work = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    print(f"logs and build: {work}")
    ptxas = given.ptxas or (None if given.dry_run_cpu else assembler())
    chosen = stages(out, work, given.dry_run_cpu, given.shards, ptxas)
    if given.parts:
        wanted = given.parts.split(",")
        known = sorted({p.name.partition("-")[0] for stage in chosen for p in stage})
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            parser.error(f"there is no part {', '.join(unknown)}; known are {', '.join(known)}")
        chosen = [[p for p in stage if p.name.partition("-")[0] in wanted] for stage in chosen]
    return run(chosen, out, work, given.minutes, ptxas)


if __name__ == "__main__":
    sys.exit(main())
