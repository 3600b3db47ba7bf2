"""Which kernels this process has launched, and whether their results were compared with plain PyTorch's.

An *identity* is what Triton compiles separately, sizes and alignment aside: a kernel with its constants, the dtypes of
its tensors, its options and the device. `fastprompt.ops.trust` compares the results and decides.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

Key = tuple[Any, ...]
State = Literal["not yet", "trusted", "refused", "unchecked"]


class Refused(NotImplementedError):
    """A kernel failed its check, or cannot be launched, and is not used again in this process."""


@dataclass(eq=False)
class Identity:
    """One kernel as it is compiled.

    Attributes:
        state: what came of its check.
        reason: why it is refused, or why it cannot be checked.
    """

    kernel: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    constants: dict[str, Any]
    options: dict[str, int]
    state: State = "not yet"
    reason: str | None = None

    def __str__(self) -> str:
        names = sorted({str(dtype).removeprefix("torch.") for dtype in self.dtypes})
        settings = (f"{name}={value}" for name, value in {**self.constants, **self.options}.items())
        return f"{self.kernel} ({', '.join([*names, *settings])}) on {self.device}"


# In order of their first launch.
known: dict[Key, Identity] = {}


class Recorder(Protocol):
    """Records the launches of a call, in order to repeat them."""

    fault: str | None

    def pause(self) -> AbstractContextManager[None]: ...

    def launch(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        device: torch.device,
        arguments: dict[str, Any],
    ) -> None: ...


class _Watch(threading.local):  # the backward runs in autograd's own threads
    launched: list[Identity] | None = None
    recorder: Recorder | None = None


_watch = _Watch()


@contextmanager
def watching() -> Iterator[list[Identity]]:
    """Yield the list of the identities that this thread launches inside."""
    outer, _watch.launched = _watch.launched, []
    try:
        yield _watch.launched
    finally:
        _watch.launched = outer


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Let `recorder` record what this thread launches inside."""
    outer, _watch.recorder = _watch.recorder, recorder
    try:
        yield
    finally:
        _watch.recorder = outer


def recorder() -> Recorder | None:
    """Return what records the launches of this thread, or None."""
    return _watch.recorder


def launching(identity: Identity) -> None:
    """Note a launch of `identity`; raise Refused if it is refused."""
    if identity.state == "refused":
        raise Refused(identity.reason)
    if _watch.launched is not None:
        _watch.launched.append(identity)
