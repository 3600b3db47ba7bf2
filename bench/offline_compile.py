"""Compile what is launched for a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from fastprompt.kernels.triton import launch


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled offline: its name, its launch, and Triton's own object."""

    name: str
    num_warps: int
    num_stages: int
    constants: dict[str, Any]
    kernel: Any


class _Compiler:
    """Compiles each launch instead of running it (`fastprompt.kernels.triton.launch.recorder`)."""

    def __init__(self, arch: int) -> None:
        self.capability = divmod(arch, 10)
        self.compiled: list[Compiled] = []

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], options: dict[str, int], arguments: dict[str, Any]
    ) -> None:
        compiled = kernel.warmup(grid=grid, **arguments, **options)
        constants = {name: value for name, value in arguments.items() if name.isupper()}
        self.compiled.append(Compiled(kernel.fn.__name__, **options, constants=constants, kernel=compiled))


class _Driver:
    """As much of a Triton driver as a compilation asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        # JITFunction keeps its kernels by device: another number for each architecture.
        self.get_current_device: Callable[[], int] = lambda: -arch

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(arch: int) -> Iterator[list[Compiled]]:
    """Compile, for compute capability `arch` (80, 90, 100, ...), what is launched inside; yield the growing list.

    Raises:
        RuntimeError: the kernels were imported under TRITON_INTERPRET=1.
    """
    if launch.INTERPRETED:
        raise RuntimeError(
            "the kernels are interpreted in this process; unset TRITON_INTERPRET to compile them"
        )
    compiler = _Compiler(arch)
    active = triton.runtime.driver
    previous, outer = active._active, launch.recorder
    active.set_active(_Driver(arch))
    launch.recorder = compiler
    try:
        yield compiler.compiled
    finally:
        active._active, launch.recorder = previous, outer
