"""The CPU measurements: VPT-Deep against concatenation, and what `replace_attention` alone costs.

    python -m bench.run [--out DIR] [--rounds N] [--suite NAME] [--quick]

Correctness is checked before each number; a row whose check fails is an error and nothing is written.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprompt
from bench import measure
from bench.report import table
from tests.concat_vpt import ConcatVPT

SUITES = ("vpt-deep", "replace-attention")
CLASSES = 100
PROMPTS = (10, 50, 100)


def vpt_deep_rows(
    name: str, size: int, batch: int, rounds: int, prompts: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """VPT-Deep: the package against timm's blocks with concatenated prompts and SDPA, float32."""
    base = timm.create_model(name, num_classes=CLASSES).eval()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, CLASSES, (batch,))
    for P in prompts:
        ours = fastprompt.get_prompt_model(copy.deepcopy(base), fastprompt.VPTConfig(P)).train()
        theirs = ConcatVPT(base, list(ours.prompts)).eval()
        models: dict[str, nn.Module] = {"fastprompt": ours, "concatenation + SDPA": theirs}
        error = check_equal(ours, theirs, images)
        steps = {n: lambda m=m: train_step(m, images, labels) for n, m in models.items()}
        passes = {n: lambda m=m: infer(m, images) for n, m in models.items()}
        mine, other = models
        forward = {n: measure.operations(f) for n, f in passes.items()}
        training = {n: measure.operations(f) for n, f in steps.items()}
        kept = {
            n: measure.saved_bytes(lambda m=m: F.cross_entropy(m(images), labels), m.parameters())
            for n, m in models.items()
        }
        counts = {
            "forward operations": forward[mine] / forward[other],
            "training operations": training[mine] / training[other],
            "bytes saved for backward": kept[mine] / kept[other],
        }
        for mode, runs in (("training step", steps), ("inference", passes)):
            times = measure.interleaved(runs, rounds)
            yield {
                "suite": "vpt-deep",
                "model": name,
                "mode": mode,
                "prompts": P,
                "batch": batch,
                "dtype": "float32",
                "rounds": rounds,
                "baseline": other,
                "times_ms": times,
                "speedup": round(times[other]["min"] / times[mine]["min"], 3),
                "cpu_speedup": round(times[other]["cpu_min"] / times[mine]["cpu_min"], 3),
                "ratios": {k: round(v, 4) for k, v in counts.items()},
                "max_error": error,
            }


def replace_rows(names: tuple[str, ...], size: int, batch: int, rounds: int) -> Iterator[dict[str, Any]]:
    """`replace_attention` alone against timm's own attention (SDPA): the time ratio is to stay at 1."""
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, CLASSES, (batch,))
    for name in names:
        own = timm.create_model(name, num_classes=CLASSES).eval()
        fast = copy.deepcopy(own)
        fastprompt.replace_attention(fast, strict=True)
        error = check_equal(fast, own, images)
        models: dict[str, nn.Module] = {"replace_attention": fast, "timm": own}
        for mode, step in (("training step", train_step), ("inference", infer)):
            runs = {
                n: (lambda m=m: train_step(m, images, labels))
                if step is train_step
                else (lambda m=m: infer(m, images))
                for n, m in models.items()
            }
            times = measure.interleaved(runs, rounds)
            yield {
                "suite": "replace-attention",
                "model": name,
                "mode": mode,
                "batch": batch,
                "dtype": "float32",
                "rounds": rounds,
                "baseline": "timm",
                "times_ms": times,
                "ratio": round(times["replace_attention"]["min"] / times["timm"]["min"], 3),
                "cpu_ratio": round(times["replace_attention"]["cpu_min"] / times["timm"]["cpu_min"], 3),
                "max_error": error,
            }


def measured(suite: str, rounds: int, quick: bool) -> Iterator[dict[str, Any]]:
    """The rows of one suite."""
    if suite == "vpt-deep":
        if quick:
            return vpt_deep_rows("test_vit", 160, 2, 2, (10,))
        return vpt_deep_rows("vit_base_patch16_224", 224, 8, rounds, PROMPTS)
    if quick:
        return replace_rows(("test_vit",), 160, 2, 2)
    return replace_rows(("vit_small_patch16_224", "vit_base_patch16_224"), 224, 8, rounds)


def kept_rows(path: Path, machine: dict[str, Any], suite: str | None) -> list[dict[str, Any]]:
    """The rows of the other suites at `path`, if one suite is measured anew; they must come from the same set-up."""
    if suite is None or not path.exists():
        return []
    before = json.loads(path.read_text())
    changed = [k for k in machine if k != "commit" and before["machine"].get(k) != machine[k]]
    if changed:
        raise SystemExit(f"bench: {path} was measured with another {', '.join(changed)}; measure all suites")
    return [row for row in before["rows"] if row["suite"] != suite]


def train_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(images), labels).backward()


@torch.no_grad()
def infer(model: nn.Module, images: Tensor) -> None:
    model(images)


@torch.no_grad()
def check_equal(ours: nn.Module, theirs: nn.Module, images: Tensor) -> float:
    """The largest difference of logits, which must be rounding."""
    expected = theirs(images)
    error = float((ours(images) - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:
        raise SystemExit(f"bench: logits differ by {error:.2e} of the largest logit; no time is reported")
    return error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu", help="folder for rows"
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--suite", choices=SUITES, help="measure this one anew and keep the rows of the other"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and two rounds: checks the code, not speed"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    machine = measure.machine()
    rows = kept_rows(arguments.out / "results.json", machine, arguments.suite)
    for suite in SUITES:
        if arguments.suite not in (None, suite):
            continue
        for row in measured(suite, arguments.rounds, arguments.quick):
            rows.append({**row, "commit": machine["commit"]})
            print(f"{suite:<18} {row['model']:<22} {row['mode']:<14} measured", file=sys.stderr, flush=True)
    result = {"machine": machine, "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    partial = arguments.out / "results.json.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(arguments.out / "results.json")
    print(table(result))


if __name__ == "__main__":
    main()
