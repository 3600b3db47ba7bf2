"""The backend `triton`: its launchers in `fastprompt.kernels.triton`, imported when a call first asks for them."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from fastprompt.ops import dispatch

_PACKAGE = "fastprompt.kernels.triton"


def serve(operation: str, module: str, function: str, automatic: bool = True) -> None:
    """Register `function` of kernels/triton/`module`.py for `operation`, with `can_<function>` as its `can_run`."""

    def run(*args: Any) -> Any:
        return getattr(_load(module), function)(*args)

    def can_run(*args: Any) -> str | None:
        return missing() or getattr(_load(module), f"can_{function}")(*args)

    dispatch.register(operation, "triton", run, can_run, automatic)


@functools.cache
def _load(module: str) -> Any:
    return importlib.import_module(f"{_PACKAGE}.{module}")


@functools.cache
def missing() -> str | None:
    """The reason why the backend can serve no call in this process, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}; `pip install triton`"
    return _load("launch").unavailable()


def _taken_by_auto() -> bool:
    # The interpreter is there to check kernels, a thousand times slower than any other backend.
    return missing() is None and not _load("launch").INTERPRETED


dispatch.register_availability("triton", missing, automatic=_taken_by_auto)
