"""The demo's figure: sample images, accuracies, training losses and step times."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from examples.digits.protocol import QUICK_NOTE
from examples.digits.run import Results, Row
from fastprompt.training import LabelledImages

# Okabe and Ito's palette, which colour-blind readers can tell apart; the probe is grey.
COLOURS = ("#8c8c8c", "#56b4e9", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")
SAMPLES = 3  # images of each class


def draw(results: Results) -> Figure:
    """Return the figure, 12 x 7.4 inches."""
    figure = Figure(figsize=(12, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    upper, lower = halves
    left, right = upper.subfigures(1, 2, wspace=0.03)
    protocol = results.protocol
    _images(left, results.prepared.seen, "The backbone learns these digits …")
    _images(right, results.prepared.pool, f"… and prompts, from {protocol.labelled} labelled images, these")
    accuracy, course, times = lower.subplots(1, 3, width_ratios=(1, 1, 1))
    _accuracies(accuracy, results)
    _courses(course, results.rows)
    _step_times(times, results)
    if not protocol.meaningful:
        figure.suptitle(QUICK_NOTE, color="#d55e00")
    return figure


def _images(part: Any, data: LabelledImages, title: str) -> None:
    part.suptitle(title, fontsize=12)
    axes = part.subplots(SAMPLES, len(data.classes), squeeze=False)
    for label in range(len(data.classes)):
        rows = (data.labels == label).nonzero().squeeze(1)
        picked = rows[torch.linspace(0, len(rows) - 1, SAMPLES).long()]
        for axis, image in zip(axes[:, label], data.images[picked], strict=True):
            axis.imshow(image[0].numpy(), cmap="gray_r", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_color("#d0d0d0")


def _accuracies(axis: Any, results: Results) -> None:
    rows = results.rows
    for accuracies in zip(*(row.accuracies for row in rows), strict=True):
        percent = [100 * a for a in accuracies]
        axis.plot(range(len(rows)), percent, color="#b8b8b8", lw=1, marker="o", ms=3.5, zorder=2)
    for i, row in enumerate(rows):
        mean, std = 100 * row.mean, 100 * row.std
        axis.errorbar(i, mean, std, fmt="o", ms=10, color=_colour(i), capsize=6, lw=2, zorder=3)
        top = max(mean + std, *(100 * a for a in row.accuracies))
        axis.annotate(f"{mean:.1f}", (i, top), (0, 8), textcoords="offset points", ha="center", weight="bold")
    axis.margins(x=0.1, y=0.14)
    axis.set_title(f"Accuracy on {len(results.prepared.test)} held-out images, %", fontsize=11)
    axis.set_xlabel("mean ± std; grey: each draw of labelled images", fontsize=9)
    _label_methods(axis, rows)


def _courses(axis: Any, rows: Sequence[Row]) -> None:
    for i, row in enumerate(rows):
        if not row.losses:
            continue
        epochs = range(1, len(row.losses[0]) + 1)
        for loss in row.losses:
            axis.plot(epochs, loss, color=_colour(i), lw=0.8, alpha=0.35)
        mean = [sum(values) / len(values) for values in zip(*row.losses, strict=True)]
        axis.plot(
            epochs, mean, color=_colour(i), lw=2.2, marker="o" if len(mean) == 1 else "", label=row.name
        )
    axis.set_title("Training loss", fontsize=11)
    axis.set_xlabel("epoch; thin: each draw", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    _tidy(axis)


def _step_times(axis: Any, results: Results) -> None:
    rows = results.rows
    for i, row in enumerate(rows):
        if row.comparison is None:
            axis.bar(i, row.step_ms, 0.4, color=_colour(i), zorder=2)
            continue
        axis.bar(i - 0.19, row.step_ms, 0.36, color=_colour(i), zorder=2)
        theirs = row.comparison.paper_step_ms
        axis.bar(i + 0.19, theirs, 0.36, color="white", edgecolor=_colour(i), hatch="///", zorder=2)
        axis.text(
            i, max(row.step_ms, theirs) * 1.03, f"{row.comparison.ratio:.2f}x", ha="center", weight="bold"
        )
    axis.margins(y=0.15)
    axis.set_title("Training step, ms", fontsize=11)
    axis.set_xlabel("filled: fastprompt; hatched: the papers' form on timm", fontsize=9)
    _label_methods(axis, rows)


def _label_methods(axis: Any, rows: Sequence[Row]) -> None:
    names = [row.name.replace(" ", "\n").replace("-", "-\n") if len(rows) > 4 else row.name for row in rows]
    axis.set_xticks(range(len(rows)), names, fontsize=9)
    axis.tick_params(axis="x", length=0)
    _tidy(axis)


def _tidy(axis: Any) -> None:
    axis.grid(axis="y", color="#e4e4e4", lw=0.8, zorder=0)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
