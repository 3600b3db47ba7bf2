"""Which backend serves a call, and, when asked, why the others do not.

A backend is a set of implementations of the operations in this folder:

- ``triton``: Triton kernels, for CUDA tensors (and, under ``TRITON_INTERPRET=1``, CPU tensors).
- ``cuda``:   C++/CUDA kernels of the compiled extension.
- ``cpu``:    C++ kernels of the compiled extension, for CPU tensors.
- ``eager``:  PyTorch's own operators; serves every device and is the fallback of ``auto``.

``auto`` takes the first backend of that list that can run the call, Triton's interpreter excepted, and kernels whose
operation says that they have yet to prove faster. A backend asked for by name never falls back: it runs, or it raises
with its reason. The request comes from, in this order, the ``backend``
argument of an operation (or of :func:`fastprompt.replace_attention`), :func:`use_backend`, the variable
``FASTPROMPT_BACKEND``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

BACKENDS = ("triton", "cuda", "cpu", "eager")
AUTO = "auto"

# One process-wide request, not a thread-local one: the backward runs in autograd's own threads.
_request: str = os.environ.get("FASTPROMPT_BACKEND", AUTO).strip().lower() or AUTO


@dataclass(frozen=True)
class Implementation:
    """One operation on one backend: `run(*args)`, and `can_run(*args)`, the reason why it cannot, or None.

    One that is not `automatic` serves only those who name its backend.
    """

    run: Callable[..., Any]
    can_run: Callable[..., str | None]
    automatic: bool = True


@dataclass(frozen=True)
class Backend:
    """One backend in this process: the `operations` it serves, or the `reason` why it serves nothing (else None)."""

    name: str
    reason: str | None
    operations: tuple[str, ...]

    @property
    def available(self) -> bool:
        return self.reason is None


class BackendTable(tuple[Backend, ...]):
    """The backends in order of preference; prints as a table."""

    def __str__(self) -> str:
        rows = [(b.name, "yes" if b.available else "no", b.reason or ", ".join(b.operations)) for b in self]
        return "\n".join(
            ["backend  available  operations, or why not", *(f"{n:<8} {a:<10} {w}" for n, a, w in rows)]
        )


_implementations: dict[str, dict[str, Implementation]] = {}
_availability: dict[str, Callable[[], str | None]] = {}
_missed: dict[str, Callable[[], None]] = {}
_automatic: dict[str, Callable[[], bool]] = {}


def register(
    operation: str,
    backend: str,
    run: Callable[..., Any],
    can_run: Callable[..., str | None],
    automatic: bool = True,
) -> None:
    """Add the implementation of `operation` on `backend`; called once by each kernel's launcher."""
    _implementations.setdefault(operation, {})[backend] = Implementation(run, can_run, automatic)


def register_availability(
    backend: str,
    reason: Callable[[], str | None],
    missed: Callable[[], None] | None = None,
    automatic: Callable[[], bool] | None = None,
) -> None:
    """Say how to find out whether `backend` works in this process at all: None, or the reason why not.

    `missed` is called when "auto" would have taken the backend and it is not there. `automatic` says whether "auto" may
    take it; without one, it may.
    """
    _availability[backend] = reason
    if missed is not None:
        _missed[backend] = missed
    if automatic is not None:
        _automatic[backend] = automatic


def backends() -> BackendTable:
    """The backends in order of preference, what each serves here, or the reason why it serves nothing."""
    return BackendTable(
        Backend(
            name,
            _unavailable(name),
            tuple(op for op, by_backend in _implementations.items() if name in by_backend),
        )
        for name in BACKENDS
    )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operation by backend `name` inside the context ("auto" lifts an outer request).

    Process-wide, like ``FASTPROMPT_BACKEND``, so that a backward run inside the context obeys too. A `backend`
    argument that names a backend goes before it.

    Raises:
        ValueError: `name` is not "auto" or one of `BACKENDS`.
    """
    global _request
    check_name(name, "use_backend")
    previous, _request = _request, name
    try:
        yield
    finally:
        _request = previous


def check_name(name: str, caller: str) -> None:
    """Raise ValueError unless `name` is "auto" or a backend."""
    if name != AUTO and name not in BACKENDS:
        known = ", ".join(repr(n) for n in (AUTO, *BACKENDS))
        raise ValueError(f"`{caller}`: there is no backend {name!r}; choose one of {known}")


def requested(backend: str = AUTO) -> str:
    """The backend that a call asks for: its own argument, else the context's or the environment's."""
    name = _request if backend == AUTO else backend
    check_name(name, "backend" if backend != AUTO else "FASTPROMPT_BACKEND")
    return name


def select(operation: str, backend: str, *args: Any) -> tuple[str, Implementation]:
    """The backend that serves `operation` on `args`.

    Raises:
        NotImplementedError: `backend` is asked for by name and cannot serve the call; the message says why.
    """
    if backend != AUTO:
        reason = why_not(operation, backend, *args)
        if reason is not None:
            raise NotImplementedError(
                f"`{operation}`: backend {backend!r} was asked for by name and cannot serve this call: {reason}; "
                f"use backend 'auto' or 'eager'"
            )
        return backend, _implementations[operation][backend]
    for name in BACKENDS:
        if not _taken_by_auto(operation, name):
            continue
        implementation = _implementations[operation][name]
        if implementation.can_run(*args) is not None:
            continue
        if _unavailable(name) is None:
            return name, implementation
        _missed.get(name, _say_nothing)()
    raise NotImplementedError(f"`{operation}`: no backend can serve this call:\n{_reasons(operation, *args)}")


def why_not(operation: str, backend: str, *args: Any) -> str | None:
    """The reason why `backend` cannot serve `operation` on `args`, or None when it can."""
    return why_missing(operation, backend) or _implementations[operation][backend].can_run(*args)


def why_missing(operation: str, backend: str) -> str | None:
    """The reason why `backend` can serve no call of `operation` in this process, or None."""
    if backend not in _implementations[operation]:
        return _unavailable(backend) or f"it has no kernel for `{operation}`"
    return _unavailable(backend)


@torch.compiler.assume_constant_result  # the compiler cannot trace how availability is found out
def auto_is_eager(operation: str) -> bool:
    """Whether "auto" can serve `operation` by no backend but `eager` in this process."""
    return not any(
        name != "eager" and _taken_by_auto(operation, name) and _unavailable(name) is None
        for name in BACKENDS
    )


def has_fused_kernel(operation: str, tensor: torch.Tensor) -> bool:
    """Whether a kernel may serve `operation`, two steps in one, for `tensor`.

    Where none does, the two steps by themselves cost no more.
    """
    backend = requested()
    if backend == AUTO:
        return tensor.is_cuda and not auto_is_eager(operation)
    return _has_kernel(operation, backend)


@torch.compiler.assume_constant_result
def _has_kernel(operation: str, backend: str) -> bool:
    return backend not in ("cpu", "eager") and why_missing(operation, backend) is None


def explain(operation: str, *args: Any) -> dict[str, str | None]:
    """For every backend, why it cannot serve `operation` on `args` (None when it can)."""
    return {name: why_not(operation, name, *args) for name in BACKENDS}


def run(operation: str, backend: str, *args: Any) -> Any:
    """Run `operation` on `args` by the backend that serves it."""
    return select(operation, backend, *args)[1].run(*args)


def _say_nothing() -> None:
    pass


def _taken_by_auto(operation: str, backend: str) -> bool:
    """Whether "auto" may take `backend` for `operation`, if it is available and can run the call."""
    implementation = _implementations[operation].get(backend)
    automatic = _automatic.get(backend)
    return implementation is not None and implementation.automatic and (automatic is None or automatic())


def _unavailable(backend: str) -> str | None:
    probe = _availability.get(backend)
    return f"this version of fastprompt has no {backend} kernels" if probe is None else probe()


def _reasons(operation: str, *args: Any) -> str:
    return "\n".join(f"  {name}: {reason}" for name, reason in explain(operation, *args).items())


def always(*args: Any) -> str | None:
    """The `can_run` of an implementation that serves every call."""
    return None


def needs_device(tensor: torch.Tensor, device_type: str) -> str | None:
    """A reason unless `tensor` lies on `device_type`; the common first line of a `can_run`."""
    if tensor.device.type != device_type:
        return f"it serves {device_type} tensors, not {tensor.device.type} ones"
    return None


register_availability("eager", lambda: None)
