"""The report of `bench.gpu_check`: its parts' records as one short table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.report import pairs

Found = dict[str, list[dict[str, Any]]]
KINDS = ("row", "check", "note", "kernel", "done", "part", "clock")


def collect(records: Path) -> Found:
    """Return the records by kind: "rows", "checks", "notes", ... A line cut short by a crash is left out."""
    found: Found = {f"{kind}s": [] for kind in KINDS}
    for line in records.read_text().splitlines() if records.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[f"{record.pop('kind')}s"].append(record)
    return found


def append(records: Path, record: dict[str, Any]) -> None:
    """Append one record to the file; parts that run at the same time do so too."""
    with records.open("a") as file:
        file.write(json.dumps(record) + "\n")


def end_of(log: Path, lines: int = 100) -> str:
    """Return the last lines of a log."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-lines:])


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty, cut to fit."""
    lines = [line.strip() for line in end_of(log).splitlines()]
    return next((line for line in reversed(lines) if line), "no output")[:160]


def table(found: Found, parts: Sequence[object]) -> str:
    """Return a line of each part, failures, and a line for each comparison: ours beside the best of the others."""
    lines = ["", "== parts", *map(str, parts)]
    wrong = [c for c in found["checks"] if not c["ok"]]
    lines += ["", f"== checks: {len(found['checks']) - len(wrong)} passed, {len(wrong)} failed"]
    lines += [f"FAILED {c['name']}: {c['detail']}" for c in wrong[:15]]
    if len(wrong) > 15:
        lines.append(f"... and {len(wrong) - 15} more in records.jsonl")
    lines += notes([n["text"] for n in found["notes"]])
    if found["rows"]:
        row = found["rows"][0]
        lines += ["", f"== times: {row['device']}, torch {row['versions']['torch']}, commit {row['commit']}"]
        lines += comparisons(found["rows"])
    if found["kernels"]:
        lines += ["", "== kernels that ran, the longest first"]
        lines += [f"{k['name']}: {', '.join(name[:60] for name in k['ran'])}" for k in found["kernels"]]
    if found["clocks"]:
        lines += ["", "== clock, power and temperature: median, least and most", *clocks(found["clocks"])]
    return "\n".join(lines)


def clocks(samples: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each stage."""
    lines = []
    for stage in dict.fromkeys(s["part"] for s in samples):
        parts = []
        for name, unit in (("sm_mhz", "MHz"), ("watts", "W"), ("celsius", "C")):
            values = [s[name] for s in samples if s["part"] == stage and name in s]
            if values:
                parts.append(f"{median(values):.0f} {unit} ({min(values):.0f} to {max(values):.0f})")
        lines.append(f"{stage:<24} {', '.join(parts)}")
    return lines


def notes(texts: Sequence[str], most: int = 16) -> list[str]:
    """Return one line for each reason, with the number of its cases ("CASE, MODE: REASON")."""
    reasons: dict[str, list[str]] = {}
    for text in texts:
        case, colon, reason = text.partition(": ")
        reasons.setdefault(reason if colon else text, []).append(case if colon else "")
    lines = [
        f"note: {where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}: {reason}"
        if where[0]
        else f"note: {reason}"
        for reason, where in reasons.items()
    ]
    return lines[:most] + ([f"... and {len(lines) - most} other reasons"] if len(lines) > most else [])


def comparisons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line for each comparison and each of our competitors in it."""
    lines = [
        f"{'what':<62} {'ours':<26} {'p50':>9} {'baseline':<26} {'p50':>9} {'ratio':>6} {'floor':>6} {'error':>8}"
    ]
    for row, other in pairs(rows):
        sizes = " ".join(str(v) if k == "model" else f"{k}={v}" for k, v in row["shape"].items())
        dtype = row["dtype"].replace("float", "fp").replace("bfp", "bf")
        what = f"{row['suite']} {row['mode'].replace('forward+backward', 'fwd+bwd')} {sizes} {dtype}"
        floor, error = row["metrics"].get("of_floor"), row["error"]
        lines.append(
            f"{what[:62]:<62} {row['provider'].removeprefix('fastprompt ')[:26]:<26} {_ms(row['p50']):>9} "
            f"{row['baseline'][:26]:<26} {_ms(other['p50']):>9} {row['ratio']:>6.2f} "
            f"{'' if floor is None else f'{floor:.0%}':>6} {'' if error is None else f'{error:.1e}':>8}"
        )
    return lines


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f} ms" if milliseconds >= 1 else f"{1e3 * milliseconds:.1f} us"
