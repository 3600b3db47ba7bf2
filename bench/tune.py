"""Search the tile sizes of one Triton operation on this GPU, and write the fastest into its table.

    python -m bench.tune prompt_attention [--minutes 8] [--dry-run]
    python -m bench.tune --list

An operation's configurations stand in `kernels/triton/OPERATION_config.py`: a frozen dataclass `Config`, a dictionary
`TABLE` from keys to configurations, and `candidates(key)`. For each key of this GPU's architecture, every candidate is
put into the table in turn, checked against float64 on the call that the key serves, and timed among the others in
interleaved rounds. Without a GPU there is nothing to search: exit code 2.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import measure, ops

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "kernels" / "triton"
ROUNDS = 10
# A candidate replaces the entry only if it is faster by more than what two runs of one program differ by.
MARGIN = 0.98

Table = dict[tuple[Any, ...], Any]
Call = tuple[ops.Case, str]

DTYPES = {2: torch.bfloat16, 4: torch.float32}


def _attention(key: tuple[Any, ...]) -> Call:
    """(architecture, kernel, widest head_dim, length, bits): the shapes that models have there."""
    _, kernel, d, length, bits = key
    N, P = {"short": (197, 50), "long": (577, 50), "one": (197, 50)}[length]
    B = 64 if length == "long" else 128
    case = ops.attention_case(B, N, P, 12, 64 if d == 64 else 80, DTYPES[bits // 8], "cuda")
    if length == "one":
        draw = case.draw
        case.draw = lambda: {name: x[:, :1] if name == "q" else x for name, x in draw().items()}
    return case, ops.FORWARD if kernel == "fwd" else ops.BOTH


def _blend(key: tuple[Any, ...]) -> Call:
    """(architecture, "forward" or "backward", width)."""
    _, kind, width = key
    case = ops.blend_case(128, 247, 50, width * 3 // 4, torch.bfloat16, "cuda")
    return case, ops.FORWARD if kind == "forward" else ops.BOTH


def _folded(key: tuple[Any, ...]) -> Call:
    """(architecture, kernel, most columns, itemsize): as many prompts as the columns hold, ViT-B's heads."""
    _, kernel, columns, itemsize = key
    split = importlib.import_module("fastprompt.kernels.triton.prompt_cross_attention_config").split
    P = max(P for P in range(1, columns // 12 + 1) if split(12, P).total <= columns)
    case = ops.folded_case(128, 197, P, 12, 768, DTYPES[itemsize], "cuda")
    return case, ops.FORWARD if kernel == "forward" else ops.BOTH


def _row(key: tuple[Any, ...]) -> Call:
    """(architecture, kernel, most query rows times width, itemsize): the widest ViT there, its rows filled up to 16."""
    _, kernel, size, itemsize = key
    models = ((3, 192), (6, 384), (12, 768), (16, 1024), (16, 1280))
    H, D = max((m for m in models if 16 * m[1] <= size), default=models[0])
    case = ops.row_case(128, 247, H, D, DTYPES[itemsize], "cuda")
    return case, ops.FORWARD if kernel == "forward" else ops.BOTH


# The call that exercises a key of an operation's table.
CALLS: dict[str, Callable[[tuple[Any, ...]], Call]] = {
    "prompt_attention": _attention,
    "gated_blend": _blend,
    "prompt_cross_attention": _folded,
    "row_attention": _row,
}


def operations() -> list[str]:
    """The operations that have both a table and a call to measure it with."""
    return sorted(
        name for path in FOLDER.glob("*_config.py") if (name := path.stem.removesuffix("_config")) in CALLS
    )


def architecture() -> int:
    """The key of this GPU's entries: 80, 90 or 100."""
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(0)[0], 80)


def search(
    table: Table, key: tuple[Any, ...], candidates: list[Any], call: Call
) -> Iterator[tuple[Any, float | None, str]]:
    """(candidate, time in ms or None, what happened) for each candidate of `key`; `table` is as before afterwards."""
    case, mode = call
    name = "fastprompt triton"
    if name not in case.ours:
        raise NotImplementedError(
            f"`tune`: {case.suite} has no Triton kernel here; see fastprompt.backends()"
        )
    function = case.ours[name]
    judge = ops.Judge(case, mode)
    before = table[key]
    right: dict[int, Any] = {}
    try:
        for i, candidate in enumerate(candidates):
            table[key] = candidate
            try:
                judge(function)
                right[i] = candidate
            except Exception as error:  # too much shared memory, too many registers, or wrong
                yield candidate, None, f"{type(error).__name__}: {ops.first_line(error)}"

        def with_entry(candidate: Any, step: measure.Step) -> measure.Step:
            def run() -> None:
                table[key] = candidate
                step()

            return run

        steps = ops.steps(case, mode, [name], "cuda")[name]
        times = measure.interleaved(
            {str(i): [with_entry(candidate, step) for step in steps] for i, candidate in right.items()},
            ROUNDS,
            "cuda",
        )
        for i, candidate in right.items():
            yield candidate, times[str(i)]["p50"], "measured"
    finally:
        table[key] = before


def fastest(found: list[tuple[Any, float | None, str]], before: Any) -> Any:
    """The fastest candidate, or `before` if nothing is faster by more than the margin."""
    times = {str(candidate): ms for candidate, ms, _ in found if ms is not None}
    best = min((c for c, ms, _ in found if ms is not None), key=lambda c: times[str(c)], default=before)
    if str(before) in times and times.get(str(best), 0.0) > MARGIN * times[str(before)]:
        return before
    return best


def rewrite(path: Path, table: Table) -> None:
    """Put `table` in place of the value that `path` gives to `TABLE`, one entry a line; ruff formats it if it is there.

    Raises ValueError if the file assigns no `TABLE`, or means something else afterwards.
    """
    text = path.read_text(encoding="utf-8")
    value = _value_of_table(path, text)
    lines = text.splitlines(keepends=True)
    first, last = value.lineno - 1, (value.end_lineno or value.lineno) - 1
    head = "".join(lines[:first]) + lines[first][: value.col_offset]
    tail = lines[last][value.end_col_offset :] + "".join(lines[last + 1 :])
    entries = "".join(f"    {key!r}: {config!r},\n" for key, config in table.items())
    written = f"{head}{{\n{entries}}}{tail}"
    draft = path.with_name(f"draft_{path.name}")
    draft.write_text(written, encoding="utf-8")
    try:
        if {k: str(v) for k, v in loaded(draft).TABLE.items()} != {k: str(v) for k, v in table.items()}:
            raise ValueError(
                f"`rewrite`: {path} would hold another table than the one given; it is as it was"
            )
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    if shutil.which("ruff"):
        subprocess.run(["ruff", "format", "--quiet", str(path)], check=False)


def loaded(path: Path) -> ModuleType:
    """The module in the file at `path`, under a name of its own."""
    name = f"_tune_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"`loaded`: {path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def _value_of_table(path: Path, text: str) -> ast.expr:
    for node in ast.parse(text).body:
        names = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(n, ast.Name) and n.id == "TABLE" for n in names):
            return node.value  # type: ignore[attr-defined]
    raise ValueError(f"`rewrite`: {path} assigns no TABLE")


def tune(operation: str, module: ModuleType, minutes: float) -> Table:
    """Search every key of this GPU's architecture until the time is spent; returns the new table."""
    end = time.monotonic() + 60 * minutes
    table: Table = module.TABLE
    chosen = dict(table)
    for key in [k for k in table if k[0] == architecture()]:
        if time.monotonic() > end:
            print(f"{key}: the time ended before it; kept as it is")
            continue
        before = table[key]
        tried = [before, *(c for c in module.candidates(key) if c != before)]
        found = list(search(table, key, tried, CALLS[operation](key)))
        chosen[key] = fastest(found, before)
        times = {str(c): ms for c, ms, _ in found if ms is not None}
        for candidate, ms, what in found:
            print(f"  {key} {candidate}: {what if ms is None else f'{1e3 * ms:.1f} us'}")
        print(
            f"{key}: {chosen[key]} {1e3 * times.get(str(chosen[key]), float('nan')):.1f} us, "
            f"was {before} {1e3 * times.get(str(before), float('nan')):.1f} us",
            flush=True,
        )
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operation", nargs="?", help="one of --list")
    parser.add_argument("--list", action="store_true", help="print the operations that can be tuned")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the file as it is")
    given = parser.parse_args()
    if given.list:
        print("\n".join(operations()))
        return 0
    if given.operation not in operations():
        parser.error(
            f"there is no operation {given.operation!r} to tune; known are {', '.join(operations())}"
        )
    if not torch.cuda.is_available():
        print("tune: there is no GPU here; tile sizes are found by measuring, so nothing was changed")
        return 2
    module = importlib.import_module(f"fastprompt.kernels.triton.{given.operation}_config")
    table = tune(given.operation, module, given.minutes)
    path = FOLDER / f"{given.operation}_config.py"
    if not given.dry_run and table != module.TABLE:
        rewrite(path, table)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
