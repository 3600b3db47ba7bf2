"""The backends, their kernels, and the choice of one for each call.

A backend is a set of kernels for the operations in this folder:

- ``triton``: Triton kernels, for CUDA tensors (and, under ``TRITON_INTERPRET=1``, CPU tensors).
- ``cuda``:   C++/CUDA kernels of the compiled extension.
- ``cpu``:    C++ kernels of the compiled extension, for CPU tensors.
- ``eager``:  PyTorch's own operators; supports every device and is the fallback of ``auto``.

``auto`` selects the first backend of that list that can run the call, except for Triton's interpreter and for kernels
registered as not automatic because they have not been shown to be faster. A backend requested by name never falls back:
it runs the call or raises with the reason. The request is, in this order, the ``backend`` argument of an operation (or
of :func:`fastprompt.replace_attention`), :func:`use_backend`, or the variable ``FASTPROMPT_BACKEND``.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastprompt.kernels import native
from fastprompt.kernels.identities import Refused
from fastprompt.ops import profile, replay, trust

BACKENDS = ("triton", "cuda", "cpu", "eager")
AUTO = "auto"

# One process-wide request, not a thread-local one: the backward runs in autograd's own threads.
_request: str = os.environ.get("FASTPROMPT_BACKEND", AUTO).strip().lower() or AUTO


@dataclass
class Kernel:
    """One operation on one backend.

    Attributes:
        run: run the operation.
        can_run: for the same arguments, return why `run` cannot run them, or None.
        why_defer: for the same arguments, return why "auto" should leave them to the next backend though this one can
            run them, or None.
        automatic: whether "auto" may select it; otherwise it must be requested by name.
        fuses_norm: whether it computes a norm in the same pass over the sequence.
    """

    run: Callable[..., Any]
    can_run: Callable[..., str | None]
    automatic: bool = True
    fuses_norm: bool = False
    why_defer: Callable[..., str | None] = lambda *args: None


@dataclass
class Backend:
    """One backend in this process.

    Attributes:
        why_unavailable: return why it is not available in this process, or None.
        is_automatic: return whether "auto" may select it.
        on_missed: called if "auto" would select it but it is not available.
        kernels: the kernels by operation.
    """

    name: str
    why_unavailable: Callable[[], str | None]
    is_automatic: Callable[[], bool] = lambda: True
    on_missed: Callable[[], None] = lambda: None
    kernels: dict[str, Kernel] = field(default_factory=dict)

    @property
    def reason(self) -> str | None:
        return self.why_unavailable()

    @property
    def available(self) -> bool:
        return self.reason is None

    @property
    def operations(self) -> tuple[str, ...]:
        return tuple(self.kernels)

    def automatic_kernel(self, operation: str) -> Kernel | None:
        """Return the kernel for `operation` that "auto" may select, available or not."""
        kernel = self.kernels.get(operation)
        return kernel if kernel is not None and kernel.automatic and self.is_automatic() else None

    def why_missing(self, operation: str) -> str | None:
        """Return why it can run no call of `operation` in this process, or None."""
        return self.reason or (None if operation in self.kernels else f"it has no kernel for `{operation}`")


class BackendTable(tuple[Backend, ...]):
    """The backends in order of preference; prints as a table."""

    def __str__(self) -> str:
        rows = [(b.name, "yes" if b.available else "no", b.reason or ", ".join(b.operations)) for b in self]
        lines = ["backend  available  operations, or why not", *(f"{n:<8} {a:<10} {w}" for n, a, w in rows)]
        return "\n".join([*lines, *trust.report(), *_faults_of_tools()])


def _faults_of_tools() -> list[str]:
    if why_no_triton() is not None or not torch.cuda.is_available():
        return []
    fault = _import_triton("launch").assembler_fault(torch.device("cuda", torch.cuda.current_device()))
    return [] if fault is None else [f"Warning: {fault}"]


def backends() -> BackendTable:
    """Return the backends in order of preference, each with its operations or the reason why it is not available."""
    return BackendTable(_backends.values())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside the context by backend `name` ("auto" overrides an outer request).

    Applies to the whole process, like ``FASTPROMPT_BACKEND``, because the backward runs in other threads. A `backend`
    argument that names a backend overrides it.

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
    """Return the backend requested for a call: by its argument, else by the context or the environment."""
    name = _request if backend == AUTO else backend
    check_name(name, "backend" if backend != AUTO else "FASTPROMPT_BACKEND")
    return name


def run(operation: str, backend: str, *args: Any) -> Any:
    """Run `operation` on the backend requested, or for "auto" on the first that can.

    Raises:
        NotImplementedError: `backend` is requested by name and cannot run the call; the message says why.
    """
    key = None if trust.always() else replay.signature(operation, backend, args)
    if key is None:
        return _run_first(operation, backend, *args)
    return replay.run(key, functools.partial(_run_first, operation, backend), *args)


def _run_first(operation: str, backend: str, *args: Any) -> Any:
    if backend != AUTO:
        name, kernel = select(operation, backend, *args)
        try:
            return _run(operation, name, kernel, args)
        except Refused as refused:
            raise _cannot(operation, backend, str(refused)) from refused
    for name, kernel in _candidates(operation, *args):
        try:
            return _run(operation, name, kernel, args)
        except Refused:
            continue
    raise _nobody(operation, *args)


def _run(operation: str, name: str, kernel: Kernel, args: tuple[Any, ...]) -> Any:
    if name != "triton":
        return kernel.run(*args)
    return trust.run(operation, kernel.run, _backends["eager"].kernels[operation].run, *args)


def select(operation: str, backend: str, *args: Any) -> tuple[str, Kernel]:
    """Return the backend and the kernel that run `operation` on `args`, unless the kernel is refused.

    Raises:
        NotImplementedError: `backend` is requested by name and cannot run the call; the message says why.
    """
    if backend != AUTO:
        reason = why_not(operation, backend, *args)
        if reason is not None:
            raise _cannot(operation, backend, reason)
        return backend, _backends[backend].kernels[operation]
    for candidate in _candidates(operation, *args):
        return candidate
    raise _nobody(operation, *args)


def _candidates(operation: str, *args: Any) -> Iterator[tuple[str, Kernel]]:
    """Yield the backends and kernels that "auto" may use for `args`, the first choice first."""
    for candidate in _backends.values():
        kernel = candidate.automatic_kernel(operation)
        if kernel is None or kernel.can_run(*args) is not None or kernel.why_defer(*args) is not None:
            continue
        if candidate.available:
            yield candidate.name, kernel
        else:
            candidate.on_missed()


def _cannot(operation: str, backend: str, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"`{operation}`: backend {backend!r} was requested by name and cannot run this call: {reason}; "
        "use backend 'auto' or 'eager'"
    )


def _nobody(operation: str, *args: Any) -> NotImplementedError:
    reasons = "\n".join(f"  {name}: {reason}" for name, reason in explain(operation, *args).items())
    return NotImplementedError(f"`{operation}`: no backend can run this call:\n{reasons}")


def why_not(operation: str, backend: str, *args: Any) -> str | None:
    """Return why `backend` cannot run `operation` on `args`, or None."""
    reason = why_missing(operation, backend)
    return _backends[backend].kernels[operation].can_run(*args) if reason is None else reason


def why_missing(operation: str, backend: str) -> str | None:
    """Return why `backend` can run no call of `operation` in this process, or None."""
    return _backends[backend].why_missing(operation)


def explain(operation: str, *args: Any) -> dict[str, str | None]:
    """Return, for every backend, why it cannot run `operation` on `args`, or None."""
    return {name: why_not(operation, name, *args) for name in BACKENDS}


def has_fused_kernel(operation: str, tensor: torch.Tensor) -> bool:
    """Return whether a kernel may run `operation` and its norm in one pass for `tensor`.

    If none does, a separate norm costs the same.
    """
    backend = requested()
    return (backend != AUTO or tensor.is_cuda) and _fuses_norm(operation, backend)


@torch.compiler.assume_constant_result
def _fuses_norm(operation: str, name: str) -> bool:
    for backend in _backends.values() if name == AUTO else (_backends[name],):
        kernel = (backend.automatic_kernel if name == AUTO else backend.kernels.get)(operation)
        if kernel is not None and kernel.fuses_norm and backend.available:
            return True
    return False


@torch.compiler.assume_constant_result
def triton_is_available() -> bool:
    """Return whether the backend `triton` is available in this process."""
    return why_no_triton() is None


# Registration ---------------------------------------------------------------------------------------------------


def register(
    operation: str,
    backend: str,
    run: Callable[..., Any],
    can_run: Callable[..., str | None],
    why_defer: Callable[..., str | None] | None = None,
) -> None:
    """Add a kernel for `operation` to `backend`."""
    _backends[backend].kernels[operation] = Kernel(run, can_run, why_defer=why_defer or always)


def register_triton(
    operation: str, module: str, function: str, *, automatic: bool = True, fuses_norm: bool = False
) -> None:
    """Add `function` of kernels/triton/`module`.py to the backend `triton`, with `can_<function>` as its `can_run`."""
    _backends["triton"].kernels[operation] = _TritonKernel(module, function, automatic, fuses_norm)


class _TritonKernel(Kernel):
    """A launcher that is imported on first use."""

    def __init__(self, module: str, function: str, automatic: bool, fuses_norm: bool) -> None:
        self.module, self.function = module, function
        self.automatic, self.fuses_norm = automatic, fuses_norm

    def __getattr__(self, name: str) -> Any:
        if name not in ("run", "can_run"):
            raise AttributeError(name)
        profile.apply_tiles()
        module = _import_triton(self.module)
        self.run, self.can_run = getattr(module, self.function), getattr(module, f"can_{self.function}")
        return self.__dict__[name]


@functools.cache
def why_no_triton() -> str | None:
    """Return why the backend `triton` is not available in this process, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}; `pip install triton`"
    return _import_triton("launch").unavailable()


def _triton_is_automatic() -> bool:
    # The interpreter, which only checks kernels, is a thousand times slower than any other backend.
    return why_no_triton() is None and not _import_triton("launch").INTERPRETED


def _import_triton(module: str) -> Any:
    return importlib.import_module(f"fastprompt.kernels.triton.{module}")


def always(*args: Any) -> str | None:
    """Return None: the `can_run` of a kernel that can run every call."""
    return None


def needs_device(tensor: torch.Tensor, device_type: str) -> str | None:
    """Return a reason unless `tensor` is on `device_type`."""
    if tensor.device.type != device_type:
        return f"it runs on {device_type} tensors, not {tensor.device.type} ones"
    return None


_backends: dict[str, Backend] = {
    "triton": Backend("triton", why_no_triton, is_automatic=_triton_is_automatic),
    "cuda": Backend("cuda", lambda: "this version of fastprompt has no cuda kernels"),
    "cpu": Backend("cpu", native.load, on_missed=native.warn_missing_once),
    "eager": Backend("eager", lambda: None),
}
