"""What every launcher here needs: whether Triton can serve this process, the table to read, and the launch itself.

A launch is one of three things. On a CUDA device, a kernel on the current stream. Under ``TRITON_INTERPRET=1``, a run
of the same source in NumPy on CPU tensors, to check indexing and algebra. Inside :func:`compiling`, a compilation for
a GPU that need not be there, with the arguments a real launch would have (tensors on the meta device).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

# Read when the kernels are decorated, so a later change of the variable changes nothing.
INTERPRETED: bool = triton.knobs.runtime.interpret
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Which table of configurations serves a compute capability: Ada and consumer Blackwell run Ampere's instructions.
ARCHITECTURES = {9: 90, 10: 100}


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled offline: its name, its launch, and Triton's own object."""

    name: str
    num_warps: int
    num_stages: int
    constants: dict[str, Any]
    kernel: Any


_target: GPUTarget | None = None
_compiled: list[Compiled] = []


def unavailable() -> str | None:
    """The reason why Triton kernels can serve no call in this process, or None."""
    if INTERPRETED:
        return _interpreter_fault()
    if not torch.cuda.is_available():
        return "there is no CUDA device; TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly, to check them"
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA GPUs"
    return None


def _interpreter_fault() -> str | None:
    """Triton 3.6 takes int() of an array of one element for a loop's bounds, which NumPy 2.4 refuses."""
    import numpy  # Triton needs it for its interpreter alone

    versions = [tuple(int(n) for n in v.split(".")[:2]) for v in (triton.__version__, numpy.__version__)]
    if versions[0] >= (3, 7) or versions[1] < (2, 4):
        return None
    return (
        f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__}; "
        "install numpy<2.4, or a newer triton"
    )


def unsupported(tensor: Tensor) -> str | None:
    """The reason why no kernel here takes `tensor`, for its device or dtype, or None."""
    if _target is not None:
        return None
    kind = tensor.device.type
    if kind != ("cpu" if INTERPRETED else "cuda"):
        return f"it serves {'cpu' if INTERPRETED else 'cuda'} tensors here, not {kind} ones"
    if tensor.dtype not in FLOATS:
        return f"it serves float16, bfloat16 and float32, not {tensor.dtype}"
    if INTERPRETED:
        if tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; use float16 or float32"
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    if major < 8:
        return f"it needs compute capability 8.0 or newer; {tensor.device} has {major}.{minor}"
    return None


def architecture(device: torch.device) -> int:
    """The table of configurations for `device`: 80, 90 or 100, and 0 for the interpreter."""
    if _target is not None:
        return ARCHITECTURES.get(_target.arch // 10, 80)
    if INTERPRETED:
        return 0
    return ARCHITECTURES.get(torch.cuda.get_device_capability(device)[0], 80)


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors share the work; 1 without a device."""
    if _target is not None or INTERPRETED:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def input_precision(dtype: torch.dtype) -> str:
    """What products of `dtype` mean: for float32 IEEE, unless torch's own matrix products are allowed to take TF32."""
    # Not by torch.get_float32_matmul_precision, which raises once somebody has set the newer switch.
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def aligned(*tensors: Tensor) -> bool:
    """Whether every row of these, along their last dimension, starts at a multiple of 16 bytes."""
    return all(
        x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *,
    num_warps: int,
    num_stages: int,
    **arguments: Any,
) -> None:
    """Run `kernel` over `grid` on `device`'s current stream; a grid without programs is no launch."""
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if _target is not None:
        compiled = kernel.warmup(grid=grid, **arguments, **options)
        constants = {name: arguments[name] for name in arguments if name.isupper()}
        _compiled.append(Compiled(kernel.fn.__name__, num_warps, num_stages, constants, compiled))
    elif INTERPRETED or device.index == torch.cuda.current_device():
        kernel[grid](**arguments, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](**arguments, **options)


@contextmanager
def compiling(arch: int) -> Iterator[list[Compiled]]:
    """Compile, for compute capability `arch` (80, 90, 100, ...), what is launched inside; yields the growing list.

    Raises:
        RuntimeError: the kernels were imported under TRITON_INTERPRET=1.
    """
    global _target, _compiled
    if INTERPRETED:
        raise RuntimeError(
            "the kernels are interpreted in this process; unset TRITON_INTERPRET to compile them"
        )
    before, _target, _compiled = (_target, _compiled), GPUTarget("cuda", arch, 32), []
    active = triton.runtime.driver
    previous = active._active
    active.set_active(_OfflineDriver(_target))
    try:
        yield _compiled
    finally:
        active._active = previous
        _target, _compiled = before


class _OfflineDriver:
    """As much of a Triton driver as a compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        # JITFunction keeps its kernels by device: another number for each architecture.
        self.get_current_device: Callable[[], int] = lambda: -target.arch

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0
