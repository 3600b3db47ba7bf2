"""Operations and bytes of the methods, counted: the table that no change may let grow unnoticed.

    python -m bench.costs [--check]

For each model, method and number of prompts P: the operations of the matrix products of a forward and of a training
step, and the bytes that the forward keeps for its backward; for fastprompt and for the papers' form
(:mod:`bench.papers`). For ViT-B also with each part of the blocks recomputed in the backward (`recompute=`). Counted
on the meta device, so that the numbers depend on no machine: fastprompt by its `eager` backend, and PyTorch's SDPA as
its fused operator, whose backward recomputes the scores.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fastprompt
from bench.measure import saved_bytes
from bench.models import CLASSES, METHODS
from bench.papers import paper_model
from fastprompt.blocks import Recompute

TABLE = Path(__file__).parent / "results" / "costs.json"
MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
PROMPTS = (10, 50, 100)
BATCH = 8


class Setting(NamedTuple):
    """One row of the table: a timm model, a method of :data:`bench.models.METHODS`, P, and what is recomputed."""

    model: str
    method: str
    P: int
    recompute: Recompute | None = None

    def __str__(self) -> str:
        return f"{self.method} on {self.model}, P={self.P}" + (
            f", {self.recompute}" if self.recompute else ""
        )


class Cost(NamedTuple):
    """Operations of a forward and of a training step, and bytes kept for the backward, at batch size `BATCH`."""

    forward: int
    training: int
    saved_bytes: int


class Row(NamedTuple):
    """The costs of one setting: of fastprompt and of the papers' form."""

    ours: Cost
    papers: Cost


PLAIN = [Setting(m, method, P) for m in MODELS for method in METHODS for P in PROMPTS]
# VPT-Deep with each P, the other methods with one.
RECOMPUTED = [
    Setting(MODELS[1], method, P, part)
    for method in METHODS
    for P in (PROMPTS if method == "vpt-deep" else PROMPTS[1:2])
    for part in get_args(Recompute)
]
SETTINGS = PLAIN + RECOMPUTED


def count(setting: Setting) -> Row:
    """Count the costs of one setting."""
    with torch.device("meta"):
        base: Any = timm.create_model(setting.model, num_classes=CLASSES)
    config = METHODS[setting.method](setting.P, len(base.blocks))
    model = fastprompt.get_prompt_model(base, config, recompute=setting.recompute).train()
    with fastprompt.use_backend("eager"):
        return Row(cost(model), cost(paper_model(model)))


def cost(model: nn.Module) -> Cost:
    """Count a training step of `model` (a `PromptModel` or its papers' form) on the meta device."""
    images = torch.empty(BATCH, 3, 224, 224, device="meta")
    labels = torch.zeros(BATCH, dtype=torch.long, device="meta")
    losses = []

    def forward() -> None:
        logits, method_loss = model(images, labels)
        losses.append(F.cross_entropy(logits, labels) + method_loss)

    with _FusedAttention(), FlopCounterMode(display=False, custom_mapping=_FUSED_OPERATIONS) as counter:
        kept = saved_bytes(forward, (*model.parameters(), *model.buffers(), images, labels))
        operations = counter.get_total_flops()
        losses[0].backward()
    return Cost(operations, counter.get_total_flops(), kept)


_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# torch 2.11 does not count these two; newer ones count them so.
_FUSED_OPERATIONS = {
    _FUSED: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class _FusedAttention(TorchFunctionMode):
    """Calls the fused operator for SDPA, which the meta device would write out as products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FUSED(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def read(path: Path = TABLE) -> dict[Setting, Row]:
    """Read the committed table."""
    rows = json.loads(path.read_text())["rows"]
    return {
        Setting(row["model"], row["method"], row["P"], row["recompute"]): Row(
            Cost(**row["ours"]), Cost(**row["papers"])
        )
        for row in rows
    }


def write(path: Path = TABLE) -> None:
    """Count all settings and rewrite the table, and its readable form beside it."""
    table = {setting: count(setting) for setting in SETTINGS}
    lines = [
        json.dumps({**s._asdict(), "ours": row.ours._asdict(), "papers": row.papers._asdict()})
        for s, row in table.items()
    ]
    path.write_text(f'{{"batch": {BATCH}, "rows": [\n' + ",\n".join(lines) + "\n]}\n")
    path.with_suffix(".md").write_text(readable(table))


def readable(table: dict[Setting, Row]) -> str:
    """Return the table as Markdown: what fastprompt costs, and in brackets its ratio to the papers' form."""
    lines = [
        "# Operations and memory, counted",
        "",
        f"Written by `python -m bench.costs`: images of 224 pixels, batch size {BATCH}, float32. Operations of matrix",
        "products in 10^9, and megabytes kept for the backward. In brackets: the ratio to the method in its paper's",
        "form (`bench/papers.py`).",
    ]
    for model in dict.fromkeys(setting.model for setting in table):
        lines += ["", f"## {model}", ""]
        lines += [
            "| Method | P | forward | training step | kept for the backward |",
            "| --- | --- | --- | --- | --- |",
        ]
        for setting, row in table.items():
            if setting.model == model and setting.recompute is None:
                lines.append(f"| {setting.method} | {setting.P} | {' | '.join(_cells(row))} |")
    return "\n".join([*lines, "", *recomputed(table)]) + "\n"


def recomputed(table: dict[Setting, Row]) -> Iterator[str]:
    """Write the lines of the second table: what each `recompute` keeps, and the operations of a training step."""
    yield "## Recomputing in the backward (`recompute=`)"
    for model, method in dict.fromkeys((s.model, s.method) for s in table if s.recompute is not None):
        yield from ("", f"{method} on {model}", "")
        yield "| P | recomputed | training step | times that of nothing | kept for the backward |"
        yield "| --- | --- | --- | --- | --- |"
        for setting, row in table.items():
            if setting.recompute is None or (setting.model, setting.method) != (model, method):
                continue
            nothing = table[setting._replace(recompute=None)]
            if setting.recompute == get_args(Recompute)[0]:
                _, step, kept = _cells(nothing)
                yield f"| {setting.P} | nothing | {step} | 1 | {kept} |"
            _, step, kept = _cells(row)
            factor = row.ours.training / nothing.ours.training
            yield f"| {setting.P} | {setting.recompute} | {step} | {factor:.3f} | {kept} |"


def _cells(row: Row) -> list[str]:
    """Return forward, training step and bytes, each with the ratio to the papers' form in brackets."""
    return [
        f"{mine / unit:,.1f} ({mine / theirs:.3f})"
        for mine, theirs, unit in zip(row.ours, row.papers, (1e9, 1e9, 1e6), strict=True)
    ]


def changes(table: dict[Setting, Row], settings: Iterable[Setting] = SETTINGS) -> Iterator[str]:
    """Count `settings` anew and describe each number that is not the one in `table`."""
    for setting in settings:
        found = count(setting)
        for side, before, now in zip(Row._fields, table[setting], found, strict=True):
            for name, old, new in zip(Cost._fields, before, now, strict=True):
                if new != old:
                    kind = "grew" if new > old else "shrank"
                    yield f"{setting}: {side}.{name} {kind} from {old:,} to {new:,} ({new / old:.4f})"


ADVICE = "If this is meant, rewrite the table with `python -m bench.costs` and say why in the commit message."


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the table instead of rewriting it")
    if not parser.parse_args().check:
        write()
    elif found := list(changes(read())):
        raise SystemExit("\n".join(["bench.costs: costs differ from the table.", *found, ADVICE]))


if __name__ == "__main__":
    main()
