"""The committed measurements: whole models against concatenation, single operations, what `replace_attention` costs.

    python -m bench.run [--out DIR] [--rounds N] [--suite NAME ...] [--quick]

On a GPU if there is one, else on the CPU: ViT-B/16 at batch 8 in float32. Correctness is checked before each number;
a comparison whose check fails is an error, and nothing is written.
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
from bench import measure, models, ops
from bench.report import RESULTS, tables

PLANS = {"vpt-deep": (10, 50, 100), "gate-vpt": (50,), "cvpt": (10,)}
REPLACE, OPERATIONS = "replace-attention", "operations"
SUITES = (*PLANS, REPLACE, OPERATIONS)


def setting(device: str, rounds: int, quick: bool, model: str = "vit_base_patch16_224") -> models.Setting:
    """What models are measured at."""
    if quick:
        return models.Setting("test_vit", 48, 2, torch.float32, "cpu", 2, depth=2)
    if device == "cuda":
        return models.Setting(model, 224, 128, torch.bfloat16, "cuda", rounds, ("cudnn",))
    return models.Setting(model, 224, 8, torch.float32, "cpu", rounds)


def model_rows(method: str, how: models.Setting, prompts: Sequence[int]) -> Iterator[measure.Row]:
    """One method against concatenation on timm's blocks and the bare backbone."""
    base = models.backbone(how)
    for P in prompts:
        made = models.comparison(method, P, how, base)
        found = list(models.rows(made))
        _all_correct(made.notes)
        yield from found


def replace_rows(names: Sequence[str], rounds: int, quick: bool, device: str) -> Iterator[measure.Row]:
    """`replace_attention` alone against timm's own attention (SDPA): the time ratio is to stay at 1."""
    for name in names:
        how = setting(device, rounds, quick, name)
        own = models.backbone(how)
        fast = copy.deepcopy(own)
        fastprompt.replace_attention(fast, strict=True)
        images, labels = models.draw(how)
        with torch.no_grad():
            exact = copy.deepcopy(own).double()(images[:4].double())
            usual, error = (((m(images[:4]) - exact).norm() / exact.norm()).item() for m in (own, fast))
        if not error <= 2 * usual + torch.finfo(how.dtype).eps:
            raise SystemExit(f"bench: replace_attention: logits off by {error:.2e}, timm's by {usual:.2e}")
        competitors = {"replace_attention": models.Competitor(fast), "timm": models.Competitor(own)}
        for mode in (models.TRAINING, models.INFERENCE):
            steps = {n: models.step_of(c, mode, images, labels) for n, c in competitors.items()}
            yield from measure.compare(
                measure.interleaved(steps, how.rounds, device, graphs=False),
                ["replace_attention"],
                {"replace_attention": error, "timm": usual},
                {},
                measure.machine(device),
                suite=REPLACE,
                mode=mode,
                shape={"model": how.model, "B": how.batch},
                dtype=str(how.dtype).removeprefix("torch."),
                rounds=how.rounds,
            )


def operation_rows(rounds: int, quick: bool, device: str) -> Iterator[measure.Row]:
    """Each operation at ViT-B's width."""
    B, N, H, D = (2, 17, 3, 48) if quick else (128, 197, 12, 768) if device == "cuda" else (8, 197, 12, 768)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    names = ("sdpa flash", "sdpa math", "products")
    if device == "cuda":
        names = ("sdpa flash", "sdpa cudnn", "sdpa efficient", "flex")
    cases = [ops.attention_case(B, N, P, H, D // H, dtype, device, names) for P in (0, 10, 50, 100)]
    cases.append(ops.packed_case(B, N, 50, H, D // H, dtype, device, names))
    cases += [ops.folded_case(B, N, P, H, D, dtype, device) for P in (10, 50)]
    cases.append(ops.folded_norm_case(B, N, 10, H, D, dtype, device))
    cases += [make(B, N + 50, 50, D, dtype, device) for make in (ops.blend_case, ops.blend_norm_case)]
    cases.append(ops.row_case(B, N + 50, H, D, dtype, device))
    for case in cases:
        for mode in (ops.FORWARD, ops.BOTH):
            yield from ops.rows(case, mode, rounds, device)
        _all_correct(case.notes)


def _all_correct(notes: Sequence[str]) -> None:
    wrong = [text for text in notes if "WrongResult" in text]
    if wrong:
        raise SystemExit(f"bench: {wrong[0]}; no time is reported")
    for text in notes:
        print(text, file=sys.stderr)


def measured(suite: str, rounds: int, quick: bool, device: str) -> Iterator[measure.Row]:
    """The rows of one suite."""
    if suite in PLANS:
        prompts = (5,) if quick else PLANS[suite]
        return model_rows(suite, setting(device, rounds, quick), prompts)
    if suite == REPLACE:
        names = ("test_vit",) if quick else ("vit_small_patch16_224",)
        return replace_rows(names, rounds, quick, device)
    return operation_rows(rounds, quick, device)


def kept_rows(path: Path, machine: dict[str, Any], suites: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the suites that are not measured anew; they must come from the same set-up."""
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
    """The suite of `SUITES` that a row belongs to: the operations name themselves."""
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
    for suite in SUITES:
        if suite not in arguments.suite:
            continue
        for row in measured(suite, arguments.rounds, arguments.quick, device):
            rows.append(row.to_dict())
            print(f"{suite:<18} {row.mode:<16} {row.provider:<26} measured", file=sys.stderr, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    partial.replace(path)
    print(tables({"rows": rows}))


if __name__ == "__main__":
    main()
