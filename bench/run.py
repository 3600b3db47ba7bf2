"""The committed measurements: whole models against concatenation, single operations, what `replace_attention` costs.

    python -m bench.run [--out DIR] [--rounds N] [--suite NAME ...] [--quick]

On a GPU if there is one, else on the CPU: ViT-B/16 at batch 8 in float32. Correctness is checked before each number.
A comparison whose check fails is an error: `results.json` stays as it is, and what was measured until then is in
`results.json.partial`.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import costs, measure, models, ops
from bench.cases import operations
from bench.report import RESULTS, tables
from fastprompt.ops import profile

# The numbers of prompts at which each method is measured.
PLANS = {"vpt-deep": (10, 50, 100), "gate-vpt": (50,), "cvpt": (10,), models.REPLACE: (0,)}
OPERATIONS = "operations"
SUITES = (*PLANS, OPERATIONS)


def model_rows(method: str, rounds: int, quick: bool, device: str) -> Iterator[measure.Row]:
    """Yield the rows of one method against concatenation on timm's blocks and the bare backbone."""
    model = "vit_small_patch16_224" if method == models.REPLACE else "vit_base_patch16_224"
    if quick:
        setting = models.Setting("test_vit", 48, 2, torch.float32, "cpu", 2, depth=2)
    elif device == "cuda":
        setting = models.Setting(model, 224, 128, torch.bfloat16, "cuda", rounds, ("cudnn",))
    else:
        setting = models.Setting(model, 224, 8, torch.float32, "cpu", rounds)
    base = models.backbone(setting)
    for P in PLANS[method][:1] if quick else PLANS[method]:
        comparison = models.comparison(method, P, setting, base)
        found = list(models.rows(comparison))
        _require_correct(comparison.notes)
        yield from found


def operation_rows(rounds: int, quick: bool, device: str) -> Iterator[measure.Row]:
    """Yield the rows of each operation at ViT-B's width."""
    B, N, H, D = (2, 17, 3, 48) if quick else (128, 197, 12, 768) if device == "cuda" else (8, 197, 12, 768)
    size = ops.Size(B, N, H, D, torch.bfloat16 if device == "cuda" else torch.float32, device)
    for operation in operations():
        for case in operation.cases(size):
            for mode in (ops.FORWARD, ops.BOTH):
                yield from ops.rows(case, mode, rounds, device, autotuned=device == "cuda")
            _require_correct(case.notes)


def _require_correct(notes: Sequence[str]) -> None:
    wrong = [text for text in notes if "WrongResult" in text]
    if wrong:
        raise SystemExit(f"bench: {wrong[0]}; no time is reported")
    for text in notes:
        print(text, file=sys.stderr)


def measured(suite: str, rounds: int, quick: bool, device: str) -> Iterator[measure.Row]:
    """Yield the rows of one suite."""
    if suite == OPERATIONS:
        return operation_rows(rounds, quick, device)
    return model_rows(suite, rounds, quick, device)


def kept_rows(path: Path, machine: dict[str, Any], suites: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of the suites that are not measured again; they must come from the same set-up."""
    if not path.exists():
        return []
    rows = [row for row in json.loads(path.read_text())["rows"] if suite_of(row) not in suites]
    for row in rows:
        for name in ("device", "versions"):
            if row[name] != machine[name]:
                raise SystemExit(
                    f"bench: {path} was measured with other {name}; measure all suites, or --out elsewhere"
                )
    return rows


def suite_of(row: dict[str, Any]) -> str:
    """Return the suite of `SUITES` that a row belongs to: the operations name themselves."""
    return row["suite"] if row["suite"] in SUITES else OPERATIONS


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = RESULTS.parent.parent / measure.folder_name(device)
    parser.add_argument("--out", type=Path, default=default, help="folder for rows")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--suite", nargs="+", choices=SUITES, default=SUITES, help="keep the rows of the others"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model: checks the code, not speed")
    arguments = parser.parse_args()
    if arguments.quick:
        device = "cpu"
    torch.manual_seed(0)
    os.environ[profile.VARIABLE] = profile.NONE  # what is shipped is measured
    path = arguments.out / "results.json"
    rows = kept_rows(path, measure.machine(device), arguments.suite)
    arguments.out.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")  # what a run that is stopped leaves
    for suite in [s for s in SUITES if s in arguments.suite]:
        for row in measured(suite, arguments.rounds, arguments.quick, device):
            rows.append(row.to_dict())
            partial.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            print(f"{suite:<18} {row.mode:<16} {row.provider:<26} measured", file=sys.stderr, flush=True)
    partial.replace(path)
    if arguments.out == default and not arguments.quick:
        costs.write()
    print(tables({"rows": rows}))


if __name__ == "__main__":
    main()
