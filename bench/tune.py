"""Search the tile sizes of one Triton operation on this GPU, and write the fastest into its table.

    python -m bench.tune prompt_attention [--minutes 8] [--only TEXT] [--workers N] [--out DIR] [--dry-run]
    python -m bench.tune --list

An operation's tile sizes are in `kernels/triton/OPERATION_config.py`: a frozen class `Config`, a dictionary `TABLE`
from keys to configurations, and `candidates(key)`. For each key of this GPU's architecture, every candidate is put into
the table and checked against float64, on a usual call that the key serves (`reach` in `bench.cases`) and on the widest
one, in several processes, since compilation takes most of the time. The correct ones are timed in interleaved rounds by
one process alone. The file is rewritten after each key, so that a run that is ended keeps what it has found. Without a
GPU there is nothing to search: exit code 2.
"""

from __future__ import annotations

import ast
import functools
import importlib
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import cases, ops
from bench.correctness import Oracle
from fastprompt.calibration import timing

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "kernels" / "triton"
ROUNDS = 10
# A candidate replaces the entry only if it is faster by more than what two runs of one program differ by.
MARGIN = 0.98

NAME = "fastprompt triton"

Key = Any  # a named tuple with `architecture` and `kernel`
Table = dict[Key, Any]
Call = tuple[ops.Case, str]
Checks = list[tuple[Oracle, ops.Function]]
# What a candidate took in ms, or why it was not measured.
Found = list[tuple[Any, float | None, str]]

TIMED, CHECKED = 128, 16  # images; float64's results of 128 for each process would not fit


def architecture() -> int:
    """Return the architecture in the keys of this GPU's entries: 80, 90 or 100."""
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(0)[0], 80)


def checks(calls: Sequence[Call]) -> Checks:
    """Return the exact results of each call, and the function to check against them."""
    if missing := [case.suite for case, _ in calls if NAME not in case.ours]:
        raise NotImplementedError(
            f"`tune`: {missing[0]} has no Triton kernel here; see fastprompt.backends()"
        )
    return [(case.oracle(mode), case.ours[NAME]) for case, mode in calls]


def fault(table: Table, key: Key, candidate: Any, against: Checks) -> str | None:
    """Return why `candidate` cannot serve `key`: too much shared memory, too many registers, or wrong; or None."""
    before, table[key] = table[key], candidate
    try:
        for oracle, function in against:
            oracle(function)
    except Exception as error:
        return f"{type(error).__name__}: {ops.first_line(error)}"
    finally:
        table[key] = before
    return None


def measured(table: Table, key: Key, candidates: list[Any], call: Call) -> dict[int, float]:
    """Return the milliseconds of each candidate by its place; `table` is as before afterwards."""
    case, mode = call
    before = table[key]

    def with_entry(candidate: Any, step: timing.Step) -> timing.Step:
        def run() -> None:
            table[key] = candidate
            step()

        return run

    try:
        steps = ops.steps(case, mode, [NAME], "cuda")[NAME]
        programs = {str(i): [with_entry(c, step) for step in steps] for i, c in enumerate(candidates)}
        times = timing.interleaved(programs, ROUNDS, "cuda")
    finally:
        table[key] = before
    return {i: times[str(i)]["p50"] for i in range(len(candidates))}


def config_of(operation: str) -> ModuleType:
    """Return the module with the table of `operation`."""
    return importlib.import_module(f"fastprompt.kernels.triton.{operation}_config")


def call_of(operation: str, key: Key, images: int, widest: bool = False) -> Call:
    """Return a call of `images` images that runs the kernel of `key`."""
    case = cases.load(operation).reach(key, images, widest)
    return case, ops.FORWARD if key.kernel == "fwd" else ops.BOTH


@functools.lru_cache(maxsize=1)
def _checks_in_worker(operation: str, key: Key) -> Checks:
    torch.manual_seed(0)
    return checks([call_of(operation, key, CHECKED, widest) for widest in (False, True)])


def _fault_in_worker(operation: str, key: Key, candidate: Any) -> str | None:
    return fault(config_of(operation).TABLE, key, candidate, _checks_in_worker(operation, key))


def search(operation: str, key: Key, candidates: list[Any], pool: ProcessPoolExecutor, end: float) -> Found:
    """Check every candidate of `key` in `pool` until `end`, and time those that are right."""
    futures = [pool.submit(_fault_in_worker, operation, key, candidate) for candidate in candidates]
    _, late = wait(futures, max(0.0, end - time.monotonic()))
    found: Found = []
    right = []
    for candidate, future in zip(candidates, futures, strict=True):
        reason = "the time ended before it was checked" if future in late else future.result()
        if reason is None:
            right.append(candidate)
        else:
            future.cancel()
            found.append((candidate, None, reason))
    times = measured(config_of(operation).TABLE, key, right, call_of(operation, key, TIMED))
    return [*found, *((candidate, times[i], "measured") for i, candidate in enumerate(right))]


def fastest(found: Found, before: Any) -> Any:
    """Return the fastest candidate, or `before` if nothing is faster by more than the margin."""
    times = {candidate: ms for candidate, ms, _ in found if ms is not None}
    best = min(times, key=times.__getitem__, default=before)
    return before if before in times and times[best] > MARGIN * times[before] else best


def rewrite(path: Path, table: Table) -> None:
    """Replace the value that `path` gives to `TABLE` with `table`, one entry a line; ruff, if installed, formats it.

    Raises:
        ValueError: the file assigns no `TABLE`, or means something else afterwards.
    """
    text = path.read_text(encoding="utf-8")
    entries = "".join(f"    {key!r}: {config!r},\n" for key, config in table.items())
    draft = path.with_name(f"draft_{path.name}")
    draft.write_text(text.replace(_value_of_table(path, text), f"{{\n{entries}}}", 1), encoding="utf-8")
    try:
        if entries_in(draft) != {str(key): str(config) for key, config in table.items()}:
            raise ValueError(
                f"`rewrite`: {path} would hold another table than the one given; it is as it was"
            )
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    if shutil.which("ruff"):
        subprocess.run(["ruff", "format", "--quiet", str(path)], check=False)


def entries_in(path: Path) -> dict[str, str]:
    """Run the file at `path` and return its `TABLE` as text."""
    table = runpy.run_path(str(path), run_name="_tune")["TABLE"]
    return {str(key): str(config) for key, config in table.items()}


def _value_of_table(path: Path, text: str) -> str:
    for node in ast.parse(text).body:
        names = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(n, ast.Name) and n.id == "TABLE" for n in names):
            return ast.get_source_segment(text, node.value) or ""  # type: ignore[attr-defined]
    raise ValueError(f"`rewrite`: {path} assigns no TABLE")


def order(key: Key) -> tuple[bool, bool]:
    """Sort what most calls reach first: 16-bit kernels, of attention the backward that most training steps run."""
    return getattr(key, "itemsize", 2) == 4, key.kernel != "bwd"


def tune(operation: str, minutes: float, only: str, workers: int, save: Callable[[Table], None]) -> Table:
    """Search the keys of this GPU's architecture that hold the text `only`, until the time is spent; return the table.

    `save` gets the whole table after each key that changed.
    """
    end = time.monotonic() + 60 * minutes
    module = config_of(operation)
    table: Table = module.TABLE
    chosen = dict(table)
    keys = sorted((k for k in table if k.architecture == architecture() and only in str(k)), key=order)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for key in keys:
            if time.monotonic() > end:
                print(f"{key}: the time ended before it; kept as it is")
                continue
            before = table[key]
            tried = [before, *(c for c in module.candidates(key) if c != before)]
            try:
                found = search(operation, key, tried, pool, end)
            except Exception as error:  # of the device: nothing works any more, but what was found is kept
                print(f"{key}: {type(error).__name__}: {ops.first_line(error)}; the search ends here")
                break
            chosen[key] = fastest(found, before)
            for candidate, ms, what in found:
                print(f"  {key} {candidate}: {what if ms is None else f'{1e3 * ms:.1f} us'}")
            print(f"{key}: {chosen[key]}, was {before}", flush=True)
            if chosen[key] != before:
                save(chosen)
        pool.shutdown(wait=False, cancel_futures=True)
    return chosen


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("operation", nargs="?", choices=cases.NAMES, metavar="OPERATION", help="see --list")
    parser.add_argument("--list", action="store_true", help="print the operations that can be tuned")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", default="", help="keys that hold this text, such as 'bwd'")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of the file")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the file as it is")
    given = parser.parse_args()
    if given.list:
        print("\n".join(cases.NAMES))
        return 0
    if given.operation is None:
        parser.error(f"name an operation: {', '.join(cases.NAMES)}")
    if not torch.cuda.is_available():
        print("tune: there is no GPU here; tile sizes are found by measuring, so nothing was changed")
        return 2
    path = FOLDER / f"{given.operation}_config.py"

    def save(table: Table) -> None:
        if given.dry_run:
            return
        rewrite(path, table)
        print(f"wrote {path.relative_to(ROOT)}", flush=True)
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, given.out)

    tune(given.operation, given.minutes, given.only, given.workers, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
