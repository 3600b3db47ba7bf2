"""README's tables of measurements, made from the committed rows by one command.

python -m bench.report            prints the tables
python -m bench.report --write    puts them into README.md between its markers
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu" / "results.json"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def table(result: dict[str, Any]) -> str:
    """The rows of one run as Markdown."""
    machine = result["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, timm {machine['timm']}, "
        f"float32; interleaved minima of wall time, {_commits(result['rows'])}.",
        "",
        "| VPT-Deep | prompts | step | time, ms | concatenation + SDPA, ms | speed-up | operations | bytes saved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if row["suite"] != "vpt-deep":
            continue
        kind = "training" if row["mode"] == "training step" else "forward"
        kept = f"{row['ratios']['bytes saved for backward']:.3f}x" if kind == "training" else ""
        lines.append(
            f"| {row['model']}, batch {row['batch']} | {row['prompts']} | {row['mode']} "
            f"| {row['times_ms']['fastprompt']['min']:.0f} | {row['times_ms'][row['baseline']]['min']:.0f} "
            f"| **{row['speedup']:.2f}x** | {row['ratios'][f'{kind} operations']:.3f}x | {kept} |"
        )
    lines += [
        "",
        "| `replace_attention` alone | step | time, ms | timm, ms | time ratio |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']}, batch {row['batch']} | {row['mode']} | {row['times_ms']['replace_attention']['min']:.0f} "
        f"| {row['times_ms']['timm']['min']:.0f} | {row['ratio']:.3f} |"
        for row in result["rows"]
        if row["suite"] == "replace-attention"
    ]
    return "\n".join(lines)


def _commits(rows: list[dict[str, Any]]) -> str:
    """Which suite was measured at which commit."""
    return ", ".join(
        f"{suite} at commit {commit}" for suite, commit in {r["suite"]: r["commit"] for r in rows}.items()
    )


def written(readme: str, result: dict[str, Any]) -> str:
    """`readme` with the tables of `result` between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(result)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    arguments = parser.parse_args()
    result = json.loads(RESULTS.read_text())
    if not arguments.write:
        print(table(result))
        return
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text(), result))


if __name__ == "__main__":
    main()
