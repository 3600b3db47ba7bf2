"""What the parts of `bench.gpu_check` share: their settings, their records, and comparisons measured once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import measure, ops

Record = dict[str, Any]


@dataclass
class Settings:
    """The settings of a part.

    Attributes:
        dry: run tiny shapes on a CPU.
        end: when to begin nothing new, by the monotonic clock.
        shard: (i, n) takes every n-th round of the sweep from the i-th on, or the i-th of n things.
        done: the comparisons that an earlier run has measured.
    """

    dry: bool
    end: float
    shard: tuple[int, int] = (0, 1)
    done: frozenset[str] = frozenset()

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def rounds(self) -> int:
        return 2 if self.dry else 20

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end

    @property
    def size(self) -> ops.Size:
        """The block that operations are timed in: ViT-B/16."""
        if self.dry:
            return ops.Size(2, 17, 3, 24, torch.float32, "cpu")
        return ops.Size(128, 197, 12, 768, torch.bfloat16, "cuda")

    def skips(self, name: str) -> bool:
        """Tell whether `name` is not to be measured: it was, or the time is over."""
        return self.over or name in self.done


def note(text: str) -> Record:
    """Return a record of some words, "CASE: WHAT ABOUT IT"."""
    return {"kind": "note", "text": text}


def timed(settings: Settings, name: str, rows: Callable[[], Iterable[measure.Row]]) -> Iterator[Record]:
    """Yield the rows of a comparison and that it is done, or a note that the time ended before it or that it failed."""
    if name in settings.done:
        return
    if settings.over:
        yield note(f"{name}: the time ended before it")
        return
    try:
        for row in rows():
            yield {"kind": "row", **row.to_dict()}
    except Exception as error:
        yield note(f"{name}: {type(error).__name__}: {ops.first_line(error)}")
        return
    yield {"kind": "done", "name": name}
