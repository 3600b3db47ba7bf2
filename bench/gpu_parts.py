"""The parts of `bench.gpu_check`, each run in a process of its own: `python -m bench.gpu_parts NAME --out DIR`.

A part appends what it finds to DIR/NAME.jsonl at once, one record a line, and stops by itself when its seconds are
spent. Records: {"kind": "row", ...}, {"kind": "check", "name", "ok", "detail"}, {"kind": "note", "text"}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastprompt
from bench import measure, models, numerics, ops

Record = dict[str, Any]
ATTENTION = ("sdpa flash", "sdpa cudnn", "sdpa efficient")


@dataclass
class Settings:
    """What a part is told: `dry` runs tiny shapes on a CPU; `shard` i of n takes every n-th case."""

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
    """The sweep of shapes, one shard of it."""
    i, n = settings.shard
    cases = numerics.cases(settings.device, tiny=settings.dry)
    if settings.dry:
        # One of a kind.
        cases = {(c.suite, c.dtype, c.frozen, tuple(c.spread)): c for c in reversed(list(cases))}.values()
    left_out = 0
    for case in (case for j, case in enumerate(cases) if j % n == i):
        if settings.over:
            left_out += 1
            continue
        for name, check in _pairs(case):
            yield _check(name, check)
        for text in case.notes:
            yield note(text)
    if left_out:
        yield note(f"numerics {i}/{n}: the time ended before the last {left_out} shapes")


def _pairs(case: ops.Case) -> list[tuple[str, Callable[[], str]]]:
    try:
        return list(numerics.checks_of(case))
    except Exception as error:
        return [(case.name, partial(_raise, error))]


def _raise(error: Exception) -> str:
    raise error


def ways_part(settings: Settings) -> Iterator[Record]:
    """Streams, graphs, compilation, autocast, DDP."""
    for name, check in numerics.ways(settings.device, "aot_eager" if settings.dry else "inductor").items():
        if settings.over:
            yield note(f"ways: the time ended before: {name}")
            continue
        yield _check(name, check)


def _check(name: str, check: Callable[[], str]) -> Record:
    try:
        return {"kind": "check", "name": name, "ok": True, "detail": check()}
    except NotImplementedError as error:  # a backend that says why it does not serve the call
        return note(f"{name.rpartition(': ')[0]}: {ops.first_line(error)}")
    except Exception as error:
        detail = f"{type(error).__name__}: {ops.first_line(error)}"
        return {"kind": "check", "name": name, "ok": False, "detail": detail}


def attention_part(settings: Settings) -> Iterator[Record]:
    """Prompt attention against every kernel of SDPA, [128, 197, 12, 64] first."""
    yield from _ceilings(settings)
    for P in (50, 10, 100, 0):
        yield from _times(settings, ops.attention_case(*_attention_size(settings, P), ATTENTION))
    for P in (50, 10, 100):
        yield from _times(settings, ops.packed_case(*_attention_size(settings, P), ATTENTION))
    for model in ((128, 257, 50, 16, 80), (128, 197, 50, 6, 64), (128, 197, 50, 16, 64)):
        if not settings.dry:
            yield from _times(settings, ops.attention_case(*model, torch.bfloat16, "cuda", ATTENTION))
    slow = ("sdpa math", "products")
    yield from _times(settings, ops.attention_case(*_attention_size(settings, 50), slow))


def flex_part(settings: Settings) -> Iterator[Record]:
    """Prompt attention against FlexAttention, whose search for tiles takes its time."""
    name = "flex, not compiled" if settings.dry else "flex"
    for P in (50, 10, 100, 0):
        yield from _times(settings, ops.attention_case(*_attention_size(settings, P), (name,)))


def _attention_size(settings: Settings, P: int) -> tuple[int, int, int, int, int, torch.dtype, str]:
    if settings.dry:
        return 2, 17, P // 10, 2, 16, torch.float32, "cpu"
    return 128, 197, P, 12, 64, torch.bfloat16, "cuda"


def operations_part(settings: Settings) -> Iterator[Record]:
    """Gated blend and LayerNorm, folded cross-attention, one-row attention, at ViT-B's width."""
    B, N, H, D = (2, 17, 3, 24) if settings.dry else (128, 197, 12, 768)
    dtype = torch.float32 if settings.dry else torch.bfloat16
    size = (dtype, settings.device)
    yield from _times(settings, ops.blend_norm_case(B, N + 50, 50, D, *size))
    yield from _times(settings, ops.row_case(B, N + 50, H, D, *size))
    for P in (10, 20, 50):
        yield from _times(settings, ops.folded_case(B, N, P, H, D, *size))
    yield from _times(settings, ops.folded_norm_case(B, N, 10, H, D, *size))
    yield from _times(settings, ops.blend_case(B, N + 50, 50, D, *size))


def _times(settings: Settings, case: ops.Case) -> Iterator[Record]:
    for mode in (ops.FORWARD, ops.BOTH):
        if settings.over:
            yield note(f"{case.name}, {mode}: the time ended before it")
            continue
        try:
            for row in ops.rows(case, mode, settings.rounds, settings.device):
                yield {"kind": "row", **row.to_dict()}
        except Exception as error:
            yield note(f"{case.name}, {mode}: {type(error).__name__}: {ops.first_line(error)}")
    for text in case.notes:
        yield note(text)


def _ceilings(settings: Settings) -> Iterator[Record]:
    """What the device reaches: bytes of a copy a second, operations of a large product a second."""
    side, size = (64, 1 << 16) if settings.dry else (8192, 1 << 32)
    dtype = torch.float32 if settings.dry else torch.bfloat16
    source = torch.randn(size // dtype.itemsize, device=settings.device, dtype=dtype)
    copy = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=settings.device, dtype=dtype) for _ in range(2))
    steps = {"copy": lambda: copy.copy_(source), "product": lambda: a @ b}
    times = measure.interleaved(steps, 5, settings.device)
    yield note(
        f"ceilings: a copy moves {2 * size / times['copy']['p50'] / 1e9:.2f} TB/s, "
        f"an {side}-square product makes {2 * side**3 / times['product']['p50'] / 1e9:.0f} TFLOP/s"
    )


def models_part(settings: Settings, compiled: bool = False) -> Iterator[Record]:
    """Training step and inference of whole models."""
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
        setting = models.Setting(
            "test_vit", 48, 2, torch.float32, "cpu", 1, ("flash",), compiler="aot_eager", depth=2
        )
        plan = plan[:1]
    if compiled:
        setting = replace(setting, compiled=True, kernels=())
    base = models.backbone(setting)
    for method, P in plan:
        if settings.over:
            yield note(f"{method} P={P}{', compiled' if compiled else ''}: the time ended before it")
            continue
        made = models.comparison(method, P, setting, base)
        try:
            for row in models.rows(made):
                yield {"kind": "row", **row.to_dict()}
        except Exception as error:
            yield note(f"{made.name}: {type(error).__name__}: {ops.first_line(error)}")
        for text in made.notes:
            yield note(text)


PARTS: dict[str, Callable[[Settings], Iterable[Record]]] = {
    "numerics": numerics_part,
    "ways": ways_part,
    "attention": attention_part,
    "operations": operations_part,
    "models": models_part,
    "compiled": partial(models_part, compiled=True),
    "flex": flex_part,
}


# What torch and Triton say of an error that outlives the call.
LOST = ("CUDA error", "Triton Error [CUDA]: an illegal", "Triton Error [CUDA]: unspecified launch failure")


def until_the_device_is_lost(records: Iterable[Record]) -> Iterator[Record]:
    """The records, up to a CUDA error: after one, nothing in the process works any more."""
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="what the records' file is called; default: the part")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th case from the i-th on")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--dry-run-cpu", action="store_true")
    given = parser.parse_args()
    i, n = (int(x) for x in given.shard.split("/"))
    torch.manual_seed(i)
    settings = Settings(given.dry_run_cpu, time.monotonic() + given.seconds, (i, n))
    label = given.name or given.part
    print(fastprompt.backends(), flush=True)
    return run(given.part, settings, given.out / f"{label}.jsonl", label)


if __name__ == "__main__":
    sys.exit(main())
