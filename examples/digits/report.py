"""The demo's results as a table, as JSON and as files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.digits.figure import draw
from examples.digits.protocol import QUICK_NOTE
from examples.digits.run import Results, Row

COLUMNS = (
    "Method",
    "Accuracy, %",
    "Trained parameters",
    "Step, ms",
    "Papers' form / fastprompt",
    "Largest logit difference",
)


def cells(row: Row) -> tuple[str, ...]:
    """Return a row of the table as text, in the order of `COLUMNS`."""
    comparison = row.comparison
    return (
        row.name,
        f"{100 * row.mean:.1f} ± {100 * row.std:.1f}",
        f"{row.trained_parameters:,}",
        f"{row.step_ms:.1f}",
        "-" if comparison is None else f"{comparison.ratio:.2f} x",
        "-" if comparison is None else f"{comparison.logit_difference:.1e}",
    )


def summary(results: Results) -> list[str]:
    """Return the lines below the table, which say what its numbers are."""
    protocol, prepared = results.protocol, results.prepared
    lines = [] if protocol.meaningful else [QUICK_NOTE]
    return [
        *lines,
        f"Backbone: {backbone_parameters(results):,} parameters, {100 * prepared.backbone_accuracy:.1f} % right on "
        f"{protocol.backbone.held_out} held-out images of {_span(protocol.seen_classes)}, then frozen.",
        f"Accuracy: on {len(prepared.test)} held-out images of {_span(protocol.new_classes)} after tuning on "
        f"{protocol.labelled}; mean ± standard deviation over {protocol.seeds} draws of these.",
        f"Step: fastest of {protocol.timing_rounds} training steps on {protocol.timing_batch} images (on a CPU: "
        "processor time); papers' form / fastprompt: how many times longer the same step takes as one writes it on "
        "timm.",
        f"{results.environment['device']}; torch {results.environment['torch']}, timm "
        f"{results.environment['timm']}; {results.seconds['total']:.0f} s in all, "
        f"{results.seconds['processor']:.0f} s of processor time.",
    ]


def markdown(results: Results) -> str:
    """Return the table and the lines below it in Markdown."""
    head = "| " + " | ".join(COLUMNS) + " |"
    rule = "|:--" + "|--:" * (len(COLUMNS) - 1) + "|"
    body = ["| " + " | ".join(cells(row)) + " |" for row in results.rows]
    return "\n".join([head, rule, *body, "", *(f"- {line}" for line in summary(results)), ""])


def as_dict(results: Results) -> dict[str, Any]:
    """Return all results, for `results.json`."""
    protocol = results.protocol
    return {
        "meaningful": protocol.meaningful,
        "protocol": {**asdict(protocol), "held_out_images": len(results.prepared.test)},
        "backbone": {
            "parameters": backbone_parameters(results),
            "accuracy": results.prepared.backbone_accuracy,
            "losses": results.prepared.backbone_losses,
        },
        "methods": [_row_dict(row) for row in results.rows],
        "environment": results.environment,
        "seconds": results.seconds,
    }


def _row_dict(row: Row) -> dict[str, Any]:
    found = {**asdict(row), "accuracy_mean": row.mean, "accuracy_std": row.std}
    if row.comparison is not None:
        found["comparison"]["ratio"] = row.comparison.ratio
    return found


def save(results: Results, out: Path) -> list[Path]:
    """Write results.json, results.md and results.png into the folder `out` and return their paths."""
    paths = [out / "results.json", out / "results.md", out / "results.png"]
    paths[0].write_text(json.dumps(as_dict(results), indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(results), encoding="utf-8")
    draw(results).savefig(paths[2], dpi=110)
    return paths


def backbone_parameters(results: Results) -> int:
    """Return the number of the backbone's parameters, including its head for the first classes."""
    return sum(p.numel() for p in results.prepared.backbone.parameters())


def _span(classes: tuple[int, ...]) -> str:
    return f"the digits {classes[0]} to {classes[-1]}"
