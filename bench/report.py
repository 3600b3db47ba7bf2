"""README's tables of measurements, made from the committed rows by one command.

python -m bench.report [--device cpu]    prints every table of a device
python -m bench.report --write           puts those of whole models on a CPU into README.md between its markers
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu" / "results.json"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

Row = dict[str, Any]
OURS = ("fastprompt", "replace_attention")
METHODS = {"vpt-deep": "VPT-Deep", "gate-vpt": "GateVPT", "cvpt": "CVPT"}
MODELS = {*METHODS, "replace-attention"}


def table(result: dict[str, Any]) -> str:
    """Return the rows of whole models as Markdown."""
    rows = [row for row in result["rows"] if row["suite"] in MODELS]
    first = rows[0]
    versions = first["versions"]
    threads = f", {versions['threads']} threads" if "threads" in versions else ""
    by = "interleaved minima of wall time" if first["clock"] == "wall" else "medians of interleaved rounds"
    lines = [
        f"{first['device']}{threads}, torch {versions['torch']}, timm {versions['timm']}, "
        f"{first['dtype']}; {by}, {_commits(rows)}."
    ]
    for suite, title in METHODS.items():
        found = [pair for pair in pairs(rows, suite) if pair[0]["provider"] == "fastprompt"]
        if found:
            lines += [
                "",
                f"| {title} | prompts | step | time, ms | concatenation + SDPA, ms | speed-up | operations | "
                "bytes saved |",
                "|---|---|---|---|---|---|---|---|",
                *(_method_line(*pair) for pair in found),
            ]
    found = pairs(rows, "replace-attention")
    if found:
        lines += [
            "",
            "| `replace_attention` alone | step | time, ms | timm, ms | time ratio |",
            "|---|---|---|---|---|",
            *(_replace_line(*pair) for pair in found),
        ]
    return "\n".join(lines)


def tables(result: dict[str, Any]) -> str:
    """Return :func:`table`, and the single operations: ours beside the fastest of the others."""
    suites = dict.fromkeys(row["suite"] for row in result["rows"])
    parts = [table(result)] if suites.keys() & MODELS else []
    for suite in [s for s in suites if s not in MODELS]:
        lines = [
            f"| `{suite}` | call | ours | time, ms | fastest other | time, ms | time ratio |",
            "|---|---|---|---|---|---|---|",
        ]
        for row, other in pairs(result["rows"], suite):
            sizes = ", ".join(f"{k}={v}" for k, v in row["shape"].items())
            lines.append(
                f"| {sizes}, {row['dtype']} | {row['mode']} | {row['provider']} | {_best(row):.3f} "
                f"| {other['provider']} | {_best(other):.3f} | {row['ratio']:.2f} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def pairs(rows: Sequence[Row], suite: str | None = None) -> list[tuple[Row, Row]]:
    """Return each row of ours (in `suite`), with the row of the baseline that its ratio compares with."""

    def comparison(row: Row) -> tuple[Any, ...]:
        return row.get("part"), row["suite"], row["mode"], row["dtype"], json.dumps(row["shape"])

    baselines = {comparison(row): row for row in rows if row["provider"] == row["baseline"]}
    return [
        (row, baselines[comparison(row)])
        for row in rows
        if suite in (None, row["suite"]) and row["provider"].startswith(OURS) and comparison(row) in baselines
    ]


def _best(row: Row) -> float:
    """Return the time that tables compare: the least on a CPU, whose other work only adds, the median on a GPU."""
    return row["min"] if row["clock"] == "wall" else row["p50"]


def _method_line(row: Row, other: Row) -> str:
    operations = row["metrics"]["operations"] / other["metrics"]["operations"]
    kept = ""
    if row["mode"] == "training step":
        kept = f"{row['metrics']['saved_bytes'] / other['metrics']['saved_bytes']:.3f}x"
    return (
        f"| {row['shape']['model']}, batch {row['shape']['B']} | {row['shape']['P']} | {row['mode']} "
        f"| {_best(row):.0f} | {_best(other):.0f} | **{_best(other) / _best(row):.2f}x** | {operations:.3f}x | {kept} |"
    )


def _replace_line(row: Row, other: Row) -> str:
    return (
        f"| {row['shape']['model']}, batch {row['shape']['B']} | {row['mode']} "
        f"| {_best(row):.0f} | {_best(other):.0f} | {row['ratio']:.3f} |"
    )


def _commits(rows: Sequence[Row]) -> str:
    """Return the commit of each suite; one commit, where it is the same for all."""
    commits = {row["suite"]: row["commit"] for row in rows}
    if len(set(commits.values())) == 1:
        return f"at commit {rows[0]['commit']}"
    return ", ".join(f"{suite} at commit {commit}" for suite, commit in commits.items())


def written(readme: str, result: dict[str, Any]) -> str:
    """Return `readme` with the tables of `result` between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(result)}\n{END}{after}"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    parser.add_argument("--device", default="cpu", help="a folder of bench/results")
    arguments = parser.parse_args()
    result = json.loads((RESULTS.parent.parent / arguments.device / "results.json").read_text())
    if not arguments.write:
        print(tables(result))
        return
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text(), result))


if __name__ == "__main__":
    main()
