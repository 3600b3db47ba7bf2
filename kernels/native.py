"""Find and load the native CPU library ``_C``, and define the schemas of its operators.

``_C`` is built on the LibTorch stable ABI and only *implements* ``torch.ops.fastprompt_cpu.*``. The schemas are defined
here, once per process, because torch aborts on a schema defined twice.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings
from pathlib import Path

import torch

LIBRARY_NAME = "_C.so"

SCHEMAS = (
    "gated_blend(Tensor x, Tensor delta, Tensor prompt_in, Tensor gate, int start, int length) -> Tensor",
    "gated_blend_backward(Tensor grad, Tensor gate, Tensor? difference, int start, int length,"
    " bool need_input, bool need_prompt, bool need_gate) -> (Tensor, Tensor, Tensor)",
)

_lock = threading.Lock()
_definitions: torch.library.Library | None = None


def find_library() -> Path | None:
    """Return the path of ``_C``, or None. An editable install puts it in site-packages, not with the sources."""
    spec = importlib.util.find_spec("fastprompt")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        candidate = Path(folder) / LIBRARY_NAME
        if candidate.is_file():
            return candidate
    return None


def load() -> str | None:
    """Load ``_C`` on the first call; return None if its operators can be used, else the reason in one line.

    Never raises. The result is cached, so a library installed later needs a new process.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> str | None:
    global _definitions
    path = find_library()
    if path is None:
        return (
            f"the native library {LIBRARY_NAME} is not installed; with a C++20 compiler and torch installed,"
            " run `pip install --no-build-isolation -e .` in fastprompt's folder"
        )
    try:
        # kernels/ and fastprompt/kernels are one folder: a process that imports both must define the schemas once.
        if not hasattr(torch.ops.fastprompt_cpu, "gated_blend"):
            definitions = torch.library.Library("fastprompt_cpu", "DEF")
            for schema in SCHEMAS:
                definitions.define(schema)
            _definitions = definitions
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} did not load: {' '.join(str(error).split())}"
    return None


@functools.cache
def warn_missing_once() -> None:
    """Warn once per process, if ``_C`` is not loaded, that CPU calls run as plain torch operations."""
    reason = load()
    if reason is not None:
        warnings.warn(
            f"fastprompt runs without its native CPU kernels: {reason}", RuntimeWarning, stacklevel=3
        )
