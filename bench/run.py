"""The committed measurements: whole models against concatenation, single operations, what `replace_attention` costs.

    python -m bench.run [--out DIR] [--rounds N] [--suite NAME ...] [--quick]

On a GPU if there is one, else on the CPU: ViT-B/16 at batch 8 in float32. Correctness is checked before each number.
A comparison whose check fails is an error: `results.json` stays as it is, and what was measured until then is in
`results.json.partial`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastprompt
from bench import costs, measure, models, ops
from bench.cases import operations
from bench.correctness import Oracle, WrongResult
from bench.report import RESULTS, tables

PLANS = {"vpt-deep": (10, 50, 100), "gate-vpt": (50,), "cvpt": (10,)}
REPLACE, OPERATIONS = "replace-attention", "operations"
SUITES = (*PLANS, REPLACE, OPERATIONS)


def setting_for(device: str, rounds: int, quick: bool, model: str = "vit_base_patch16_224") -> models.Setting:
    """Return the setting at which models are measured."""
    if quick:
        return models.Setting("test_vit", 48, 2, torch.float32, "cpu", 2, depth=2)
    if device == "cuda":
        return models.Setting(model, 224, 128, torch.bfloat16, "cuda", rounds, ("cudnn",))
    return models.Setting(model, 224, 8, torch.float32, "cpu", rounds)


def model_rows(method: str, setting: models.Setting, prompts: Sequence[int]) -> Iterator[measure.Row]:
    """Yield the rows of one method against concatenation on timm's blocks and the bare backbone."""
    base = models.backbone(setting)
    for P in prompts:
        comparison = models.comparison(method, P, setting, base)
        found = list(models.rows(comparison))
        _require_correct(comparison.notes)
        yield from found


def replace_rows(names: Sequence[str], rounds: int, quick: bool, device: str) -> Iterator[measure.Row]:
    """Yield the rows of `replace_attention` alone against timm's own attention (SDPA); its goal is a ratio of 1."""
    for name in names:
        setting = setting_for(device, rounds, quick, name)
        own = models.backbone(setting)
        fast = copy.deepcopy(own)
        fastprompt.replace_attention(fast, strict=True)
        images, labels = models.draw(setting)
        oracle = Oracle(own, {"x": images[:4]}, exact=copy.deepcopy(own).double(), backward=False)
        try:
            errors = {"replace_attention": oracle(fast), "timm": oracle(own)}
        except WrongResult as error:
            raise SystemExit(f"bench: replace_attention: logits: {error}; no time is reported") from error
        competitors = {"replace_attention": models.Competitor(fast), "timm": models.Competitor(own)}
        for mode in (models.TRAINING, models.INFERENCE):
            steps = {n: models.step_of(c, mode, images, labels) for n, c in competitors.items()}
            yield from measure.compare(
                measure.interleaved(steps, setting.rounds, device, graphs=False),
                ["replace_attention"],
                errors,
                {},
                measure.machine(device),
                suite=REPLACE,
                mode=mode,
                shape={"model": setting.model, "B": setting.batch},
                dtype=str(setting.dtype).removeprefix("torch."),
                rounds=setting.rounds,
            )


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
    if suite in PLANS:
        prompts = (5,) if quick else PLANS[suite]
        return model_rows(suite, setting_for(device, rounds, quick), prompts)
    if suite == REPLACE:
        names = ("test_vit",) if quick else ("vit_small_patch16_224",)
        return replace_rows(names, rounds, quick, device)
    return operation_rows(rounds, quick, device)


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = RESULTS.parent.parent / measure.folder_name(device)
    parser.add_argument("--out", type=Path, default=default, help="folder for rows")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--suite", nargs="+", choices=SUITES, default=SUITES, help="measure these anew, keep the others' rows"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and two rounds: checks the code, not speed"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        device = "cpu"
    torch.manual_seed(0)
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
