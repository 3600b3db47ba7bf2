"""The parts of `bench.gpu_check`, each run in a process of its own: `python -m bench.gpu_parts NAME --out DIR`.

A part appends each record to DIR/records.jsonl at once, one a line, and stops by itself when its seconds are spent.
Records: {"kind": "row", ...}, {"kind": "check", "name", "ok", "detail"}, {"kind": "note", "text"}.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import fastprompt
from bench import measure, models, numerics, ops
from bench.cases import NAMES, load
from fastprompt.calibration import timing

Record = dict[str, Any]


@dataclass
class Settings:
    """The settings of a part: `dry` runs tiny shapes on a CPU; `shard` i of n takes every n-th round of the sweep."""

    dry: bool
    end: float
    shard: tuple[int, int] = (0, 1)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def rounds(self) -> int:
        return 2 if self.dry else 20

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end


def note(text: str) -> Record:
    return {"kind": "note", "text": text}


def numerics_part(settings: Settings) -> Iterator[Record]:
    """Check the sweep of shapes, one shard of it."""
    cases = numerics.sweep(settings.device, settings.dry, settings.shard)
    if settings.dry:  # one of a kind
        cases = iter({(c.suite, c.dtype, c.frozen): c for c in reversed(list(cases))}.values())
    for case in cases:
        if settings.over:
            left_out = 1 + sum(1 for _ in cases)
            yield note(f"numerics {settings.shard[0]}: the time ended before the last {left_out} shapes")
            return
        try:
            found = list(numerics.checks_of(case))
        except Exception as error:  # of the exact results: one failed check
            yield _failed(case.name, error)
            continue
        for name, check in found:
            yield _check(name, check)


def modes_part(settings: Settings) -> Iterator[Record]:
    """Check streams, graphs, compilation, autocast and DDP."""
    compiler = "aot_eager" if settings.dry else "inductor"
    for name, check in numerics.execution_modes(settings.device, compiler).items():
        yield note(f"{name}: the time ended before it") if settings.over else _check(name, check)


def _check(name: str, check: Callable[[], str]) -> Record:
    try:
        return {"kind": "check", "name": name, "ok": True, "detail": check()}
    except NotImplementedError as error:  # a backend that says why it does not support the call
        return note(f"{name.rpartition(': ')[0]}: {ops.first_line(error)}")
    except Exception as error:
        return _failed(name, error)


def _failed(name: str, error: Exception) -> Record:
    detail = f"{type(error).__name__}: {ops.first_line(error)}"
    return {"kind": "check", "name": name, "ok": False, "detail": detail}


def operations_part(settings: Settings, names: Sequence[str], autotuned: bool = False) -> Iterator[Record]:
    """Time operations against their competitors; of the first, say too what the device reaches.

    `autotuned`: only those with competitors that search their tile sizes, against these too.
    """
    if names == NAMES[:1]:
        yield from _ceilings(settings)
    size = ops.Size(128, 197, 12, 768, torch.bfloat16, "cuda")
    if settings.dry:
        size = ops.Size(2, 17, 3, 24, torch.float32, "cpu")
    for case in chain.from_iterable(load(name).cases(size) for name in names):
        if autotuned and not case.autotuned:
            continue
        for mode in (ops.FORWARD, ops.BOTH):
            rows = partial(ops.rows, case, mode, settings.rounds, settings.device, autotuned)
            yield from _timed(settings, f"{case.name}, {mode}", rows)
        yield from map(note, case.notes)


def _timed(settings: Settings, name: str, rows: Callable[[], Iterable[measure.Row]]) -> Iterator[Record]:
    """Yield the rows of a comparison, or a note that the time ended before it or that it failed."""
    if settings.over:
        yield note(f"{name}: the time ended before it")
        return
    try:
        for row in rows():
            yield {"kind": "row", **row.to_dict()}
    except Exception as error:
        yield note(f"{name}: {type(error).__name__}: {ops.first_line(error)}")


def _ceilings(settings: Settings) -> Iterator[Record]:
    """Say what the device reaches: bytes of a copy a second, operations of a large product a second."""
    side, size = (64, 1 << 16) if settings.dry else (8192, 1 << 32)
    dtype = torch.float32 if settings.dry else torch.bfloat16
    source = torch.randn(size // dtype.itemsize, device=settings.device, dtype=dtype)
    copy = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=settings.device, dtype=dtype) for _ in range(2))
    steps = {"copy": lambda: copy.copy_(source), "product": lambda: a @ b}
    times = timing.interleaved(steps, 5, settings.device)
    yield note(
        f"ceilings: a copy moves {2 * size / times['copy']['p50'] / 1e9:.2f} TB/s, "
        f"an {side}-square product makes {2 * side**3 / times['product']['p50'] / 1e9:.0f} TFLOP/s"
    )


def models_part(settings: Settings, compiled: bool = False) -> Iterator[Record]:
    """Time whole models; compiled ones in training only, since one comparison can take the part's time."""
    setting = models.Setting("vit_base_patch16_224", 224, 128, torch.bfloat16, "cuda", 10, ("cudnn", "flash"))
    plan = [
        ("vpt-deep", 50),
        ("gate-vpt", 50),
        ("cvpt", 10),
        ("vpt-deep", 100),
        ("vpt-deep", 10),
        ("cvpt", 20),
    ]
    if settings.dry:
        tiny = models.Setting("test_vit", 48, 2, torch.float32, "cpu", 1, ("flash",))
        setting, plan = replace(tiny, compiler="aot_eager", depth=2), plan[:1]
    if compiled:
        plan = [one for one in plan if one[0] == "vpt-deep"]
        setting = replace(setting, compiled=True, kernels=())
    base = models.backbone(setting)
    modes = (models.TRAINING,) if compiled else (models.TRAINING, models.INFERENCE)
    for method, P in plan:
        notes: list[str] = []

        def rows(method: str = method, P: int = P, notes: list[str] = notes) -> Iterator[measure.Row]:
            comparison = models.comparison(method, P, setting, base)
            comparison.notes = notes
            return models.rows(comparison, modes)

        yield from _timed(settings, f"{method} P={P}{', compiled' if compiled else ''}", rows)
        yield from map(note, notes)


PARTS: dict[str, Callable[[Settings], Iterable[Record]]] = {
    "numerics": numerics_part,
    "modes": modes_part,
    **{name: partial(operations_part, names=(name,)) for name in NAMES},
    "autotuned": partial(operations_part, names=NAMES, autotuned=True),
    "models": models_part,
    "compiled": partial(models_part, compiled=True),
}


# What torch and Triton say of an error that outlives the call.
LOST = ("CUDA error", "Triton Error [CUDA]: an illegal", "Triton Error [CUDA]: unspecified launch failure")


def until_the_device_is_lost(records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records up to a CUDA error, after which nothing in the process works."""
    for record in records:
        yield record
        text = record.get("detail", record.get("text", ""))
        if any(sign in text for sign in LOST):
            yield note("after a CUDA error: the rest of this part was not run")
            return


def run(name: str, settings: Settings, path: Path, label: str) -> int:
    """Run part `name`, append its records to `path`, print a summary; 1 if a check failed."""
    good = bad = rows = 0
    with path.open("a") as file:
        for record in until_the_device_is_lost(PARTS[name](settings)):
            file.write(json.dumps({"part": label, **record}) + "\n")
            file.flush()
            rows += record["kind"] == "row"
            if record["kind"] == "check":
                good, bad = good + record["ok"], bad + (not record["ok"])
                if not record["ok"]:
                    print(f"FAILED {record['name']}: {record['detail']}", flush=True)
            elif record["kind"] == "note":
                print(record["text"], flush=True)
    counts = [f"{rows} rows"] if rows else []
    counts += [f"{good} checks passed, {bad} failed"] if good or bad else []
    print("; ".join(counts) or "nothing found", flush=True)
    return 1 if bad else 0


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="what the records call the part; default its own name")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th round of the sweep from the i-th on")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--dry-run-cpu", action="store_true")
    given = parser.parse_args()
    i, n = (int(x) for x in given.shard.split("/"))
    torch.manual_seed(i)
    settings = Settings(given.dry_run_cpu, time.monotonic() + given.seconds, (i, n))
    label = given.name or given.part
    print(fastprompt.backends(), flush=True)
    return run(given.part, settings, given.out / "records.jsonl", label)


if __name__ == "__main__":
    sys.exit(main())
