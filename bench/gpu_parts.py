"""The parts of `bench.gpu_check`, each run in a process of its own: `python -m bench.gpu_parts NAME --out DIR`.

A part appends each record to DIR/records.jsonl at once, one a line, and stops by itself when its seconds are spent.
Records: {"kind": "row", ...}, {"kind": "check", "name", "ok", "detail"}, {"kind": "note", "text"},
{"kind": "kernel", "name", "ran"}: what ran on the device; {"kind": "done", "name"}: a comparison that need not be
measured again; and `bench.gpu_check` adds {"kind": "part", ...} and {"kind": "clock", ...}.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch

import fastprompt
from bench import gpu_models, gpu_report, numerics, ops
from bench.cases import NAMES, load, prompt_attention
from bench.gpu_records import Record, Settings, note, timed
from fastprompt.calibration import timing
from fastprompt.calibration.exact import is_lost
from fastprompt.kernels.identities import Refused
from fastprompt.ops import profile


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
    except Refused as error:  # a kernel that does not compile, or does not fit
        return _failed(name, error)
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
    cases = chain.from_iterable(load(name).cases(settings.size) for name in names)
    for case in cases:
        if not autotuned or case.autotuned:
            yield from _timed_case(settings, case, autotuned)


def longer_part(settings: Settings) -> Iterator[Record]:
    """Time attention at the lengths of 384 and 518 pixels, and models of these."""
    for case in prompt_attention.longer(settings.size):
        yield from _timed_case(settings, case)
    yield from gpu_models.longer(settings)


def _timed_case(settings: Settings, case: ops.Case, autotuned: bool = False) -> Iterator[Record]:
    for mode in (ops.FORWARD, ops.BOTH):
        name = f"{case.name}, {mode}"
        rows = partial(ops.rows, case, mode, settings.rounds, settings.device, autotuned)
        yield from timed(settings, name, rows)
        for provider in ("sdpa any", "fastprompt triton"):
            if provider in case.competitors and not settings.skips(name):
                yield from _ran(f"{name}: {provider}", partial(_once, case, mode, provider, settings.device))
    yield from map(note, case.notes)


def _once(case: ops.Case, mode: str, provider: str, device: str) -> None:
    ops.steps(case, mode, [provider], device)[provider][0]()


def _ran(name: str, step: timing.Step) -> Iterator[Record]:
    """Say which kernels ran, those that took longest first, if a profiler is there."""
    try:
        with torch.profiler.profile() as profiler:
            step()
        events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
        events.sort(key=lambda e: -e.self_device_time_total)
        if events:
            yield {"kind": "kernel", "name": name, "ran": [e.key[:120] for e in events[:4]]}
    except Exception as error:
        yield note(f"{name}: no profile: {ops.first_line(error)}")


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


PARTS: dict[str, Callable[[Settings], Iterable[Record]]] = {
    "numerics": numerics_part,
    "ptxas": numerics_part,  # with another assembler
    "modes": modes_part,
    **{name: partial(operations_part, names=(name,)) for name in NAMES},
    "autotuned": partial(operations_part, names=NAMES, autotuned=True),
    "longer": longer_part,
    **gpu_models.PARTS,
}


def until_the_device_is_lost(records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records up to a CUDA error, after which nothing in the process works."""
    for record in records:
        yield record
        if is_lost(record.get("detail", record.get("text", ""))):
            yield note("after a CUDA error: the rest of this part was not run")
            return


def run(name: str, settings: Settings, path: Path, label: str) -> int:
    """Run part `name`, append its records to `path`, print a summary; 1 if a check failed."""
    good = bad = rows = done = 0
    with path.open("a") as file:
        for record in until_the_device_is_lost(PARTS[name](settings)):
            file.write(json.dumps({"part": label, **record}) + "\n")
            file.flush()
            rows += record["kind"] == "row"
            done += record["kind"] == "done"
            if record["kind"] == "check":
                good, bad = good + record["ok"], bad + (not record["ok"])
                if not record["ok"]:
                    print(f"FAILED {record['name']}: {record['detail']}", flush=True)
            elif record["kind"] == "note":
                print(record["text"], flush=True)
    counts = [f"{n} {what}" for n, what in ((rows, "rows"), (done, "comparisons done")) if n]
    counts += [f"{good} checks passed, {bad} failed"] if good or bad else []
    here = profile.machine()
    print(
        f"{'; '.join(counts) or 'nothing found'}; triton {here['triton']}, ptxas {here['ptxas']}", flush=True
    )
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
    label = given.name or given.part
    path = given.out / "records.jsonl"
    done = frozenset(r["name"] for r in gpu_report.collect(path)["dones"] if r["part"] == label)
    settings = Settings(given.dry_run_cpu, time.monotonic() + given.seconds, (i, n), done)
    print(fastprompt.backends(), flush=True)
    return run(given.part, settings, path, label)


if __name__ == "__main__":
    sys.exit(main())
