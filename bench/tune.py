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
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import cases, ops
from bench.correctness import Oracle
from fastprompt.calibration import search, timing
from fastprompt.ops import profile

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "kernels" / "triton"
NAME = "fastprompt triton"

Key = Any  # a named tuple with `architecture` and `kernel`
Table = dict[Key, Any]
Call = tuple[ops.Case, str]

TIMED, CHECKED = 128, 16  # images; float64's results of 128 for each process would not fit
ROUNDS = 10


def architecture() -> int:
    """Return the architecture in the keys of this GPU's entries: 80, 90 or 100."""
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(0)[0], 80)


def config_of(operation: str) -> ModuleType:
    """Return the module with the table of `operation`."""
    return importlib.import_module(f"fastprompt.kernels.triton.{operation}_config")


def call_of(operation: str, key: Key, images: int, widest: bool = False) -> Call:
    """Return a call of `images` images that runs the kernel of `key`."""
    return cases.load(operation).reach(key, images, widest), mode_of(key)


def mode_of(key: Key) -> str:
    """Return how the kernel of `key` is run."""
    return ops.FORWARD if key.kernel == "fwd" else ops.BOTH


def checks(calls: Sequence[Call]) -> list[search.Check]:
    """Return the checks of calls against their exact results."""
    if missing := [case.suite for case, _ in calls if NAME not in case.ours]:
        raise NotImplementedError(
            f"`tune`: {missing[0]} has no Triton kernel here; see fastprompt.backends()"
        )
    return [partial(_check, case, case.oracle(mode)) for case, mode in calls]


def _check(case: ops.Case, oracle: Oracle) -> None:
    with case.context(NAME):
        oracle(case.ours[NAME])


def checks_of(operation: str, key: Key) -> list[search.Check]:
    """Return the checks of an entry: a usual call, and the widest that it serves."""
    torch.manual_seed(0)
    return checks([call_of(operation, key, CHECKED, widest) for widest in (False, True)])


def steps_of(operation: str, key: Key) -> list[timing.Step]:
    """Return the steps that time an entry."""
    mode = mode_of(key)
    return [
        step
        for case in cases.load(operation).timed(key, TIMED)
        for step in ops.steps(case, mode, [NAME], "cuda")[NAME]
    ]


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


def tune(operation: str, minutes: float, only: str, workers: int, save: Callable[[Table], None]) -> Table:
    """Search the keys of this GPU's architecture that hold the text `only`, until the time is spent; return the table.

    `save` gets the whole table after each key that changed.
    """
    end = time.monotonic() + 60 * minutes
    module = config_of(operation)
    table: Table = module.TABLE
    chosen = dict(table)
    keys = sorted((k for k in table if k.architecture == architecture() and only in str(k)), key=search.order)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for key in keys:
            if time.monotonic() > end:
                print(f"{key}: the time ended before it; kept as it is")
                continue
            before = table[key]
            tried = [before, *(c for c in module.candidates(key) if c != before)]
            try:
                make = search.Later(checks_of, (operation, key)), partial(steps_of, operation, key)
                found = search.search(operation, key, tried, *make, end, pool, rounds=ROUNDS)
            except Exception as error:  # of the device: nothing works any more, but what was found is kept
                print(f"{key}: {type(error).__name__}: {ops.first_line(error)}; the search ends here")
                break
            chosen[key] = search.fastest(found, before)
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
    os.environ[profile.VARIABLE] = profile.NONE  # the table is searched, not what a profile puts in it
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
