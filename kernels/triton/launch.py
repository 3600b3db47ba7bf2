"""Launch Triton kernels: check whether Triton can run, select the table of tile sizes, and launch.

On a CUDA device a launch runs the kernel on the current stream. Under ``TRITON_INTERPRET=1`` it runs the same source in
NumPy on CPU tensors, to check indexing and algebra. With a `recorder` set, the recorder gets the launch instead
(`bench.offline_compile` compiles it offline, with tensors on the meta device).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from fastprompt.kernels import identities
from fastprompt.kernels.identities import Identity, Refused

# Read when the kernels are decorated; a later change of the variable has no effect.
INTERPRETED: bool = triton.knobs.runtime.interpret
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# The table of configurations by compute capability; Ada and consumer Blackwell use Ampere's instructions.
ARCHITECTURES = {9: 90, 10: 100}
# Products of float32: "auto" (TF32 where torch allows it, else IEEE), "ieee" or "tf32x3".
FP32: str = os.environ.get("FASTPROMPT_FP32", "auto").strip().lower() or "auto"


class Recorder(Protocol):
    """Receives launches in place of a GPU of compute capability `capability`."""

    capability: tuple[int, int]

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], options: dict[str, int], arguments: Any
    ) -> None: ...


# triton-lang/triton#11781: older ones may reuse the input registers of an asynchronous product before it has read them.
FIRST_SOUND_PTXAS = (13, 1)

# If set, it gets all launches, and none reaches a device.
recorder: Recorder | None = None


def unavailable() -> str | None:
    """Return why Triton kernels cannot run in this process, or None."""
    if INTERPRETED:
        return _interpreter_fault()
    if not torch.cuda.is_available():
        return "there is no CUDA device; TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly, to check them"
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA GPUs"
    return None


def _interpreter_fault() -> str | None:
    """Return why the interpreter does not work: Triton 3.6 calls int() on an array, which NumPy 2.4 refuses."""
    import numpy  # Triton needs it for its interpreter only

    versions = [tuple(int(n) for n in v.split(".")[:2]) for v in (triton.__version__, numpy.__version__)]
    if versions[0] >= (3, 7) or versions[1] < (2, 4):
        return None
    return (
        f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__}; "
        "install numpy<2.4, or a newer triton"
    )


def unsupported(tensor: Tensor) -> str | None:
    """Return why no kernel here can run on `tensor`, for its device or dtype, or None."""
    if recorder is not None:
        return None
    kind = tensor.device.type
    if kind != ("cpu" if INTERPRETED else "cuda"):
        return f"it runs on {'cpu' if INTERPRETED else 'cuda'} tensors here, not {kind} ones"
    if tensor.dtype not in FLOATS:
        return f"dtype {tensor.dtype} is not supported (float16, bfloat16, float32)"
    if INTERPRETED:
        if tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; use float16 or float32"
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    if major < 8:
        return f"compute capability {major}.{minor} of {tensor.device} is not supported (8.0 or newer)"
    return None


def architecture(device: torch.device) -> int:
    """Return the table of configurations for `device`: 80, 90 or 100, and 0 for the interpreter."""
    if recorder is not None:
        return ARCHITECTURES.get(recorder.capability[0], 80)
    if INTERPRETED:
        return 0
    return ARCHITECTURES.get(torch.cuda.get_device_capability(device)[0], 80)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; 1 without a device."""
    if recorder is not None or INTERPRETED:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def input_precision(dtype: torch.dtype) -> str:
    """Return the precision of products of `dtype`: for float32 what ``FASTPROMPT_FP32`` says, else IEEE.

    "tf32x3" is three TF32 products of the upper and lower halves of the operands. It is no default: tensor cores
    truncate their sums, which by emulation makes 1.5 times the error of IEEE products over 64 terms and 5 times over
    768, more than the factor of 2 that this package allows itself.

    Raises:
        ValueError: ``FASTPROMPT_FP32`` has an unknown value.
    """
    if dtype != torch.float32:
        return "ieee"
    if FP32 not in ("auto", "ieee", "tf32x3"):
        raise ValueError(f"`FASTPROMPT_FP32`: {FP32!r} is not supported; use 'auto', 'ieee' or 'tf32x3'")
    # torch.get_float32_matmul_precision raises after the newer switch has been set.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return FP32 if FP32 != "auto" else "tf32" if allowed else "ieee"


def aligned(*tensors: Tensor) -> bool:
    """Return whether every row of these tensors, along their last dimension, starts at a multiple of 16 bytes."""
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
    """Run `kernel` over `grid` on `device`'s current stream; do nothing for an empty grid.

    Raises:
        Refused: the kernel failed its check (:mod:`fastprompt.ops.trust`), or does not compile or fit on the device.
    """
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if recorder is not None:
        recorder(kernel, grid, options, arguments)
        return
    identity = identify(kernel, device, options, arguments)
    identities.launching(identity)
    record = identities.recorder()
    try:
        with nullcontext() if record is None else record.pause():
            if INTERPRETED or device.index == torch.cuda.current_device():
                compiled = kernel[grid](**arguments, **options)
            else:
                with torch.cuda.device(device):
                    compiled = kernel[grid](**arguments, **options)
    except TritonError as error:
        if INTERPRETED:
            raise
        raise refuse([identity], f"an error of Triton: {error}") from error
    if record is not None:
        if identity.state == "not yet":
            record.fault = "a kernel was not checked"
        record.launch(kernel, None if INTERPRETED else compiled, grid, device, arguments | options)


# Trust ----------------------------------------------------------------------------------------------------------


def identify(
    kernel: Any, device: torch.device, options: dict[str, int], arguments: dict[str, Any]
) -> Identity:
    """Return the identity of a launch, the same object for each launch of it."""
    constants = _constants(kernel.fn)
    values = [
        x.dtype if isinstance(x, Tensor) else x if name in constants else None
        for name, x in arguments.items()
    ]
    key = (kernel.fn, device, *options.values(), *values)
    identity = identities.known.get(key)
    if identity is None:
        identity = identities.known[key] = Identity(
            kernel.fn.__name__,
            device,
            tuple(dict.fromkeys(x.dtype for x in arguments.values() if isinstance(x, Tensor))),
            {name: x for name, x in arguments.items() if name in constants},
            options,
        )
        warn_of_assembler_once(device)
    return identity


@functools.cache
def _constants(function: Any) -> frozenset[str]:
    """Return the names of the arguments of a kernel that are constants for the compiler."""
    return frozenset(name for name, kind in function.__annotations__.items() if "constexpr" in str(kind))


def refuse(launched: Sequence[Identity], fault: str) -> Refused:
    """Refuse all later launches of `launched`, warn, and return the error to raise."""
    names = ", ".join(dict.fromkeys(identity.kernel for identity in launched))
    reason = f"{names} is refused because of {fault}"
    for identity in launched:
        identity.state, identity.reason = "refused", reason
    kernels = "\n".join(f"  {identity}" for identity in launched)
    warnings.warn(
        f"fastprompt uses these Triton kernels no more in this process:\n{kernels}\nbecause of {fault} "
        f"({toolchain(launched[0].device)}). No result of them is returned. Try a newer triton, or set "
        "TRITON_PTXAS_PATH to the ptxas of a newer CUDA, and please report this message",
        RuntimeWarning,
        stacklevel=2,
    )
    return Refused(reason)


def toolchain(device: torch.device) -> str:
    """Return the versions of triton and of the assembler that it uses for `device`."""
    if INTERPRETED:
        return f"triton {triton.__version__}, interpreted"
    return f"triton {triton.__version__}, ptxas {assembler_version(device) or 'not found'}"


def assembler_version(device: torch.device) -> str | None:
    """Return the version of ptxas that Triton uses for `device`, as "12.8", or None if there is none."""
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = torch.cuda.get_device_capability(device)
    try:
        return str(get_ptxas(10 * major + minor).version)
    except RuntimeError:  # Triton's "Cannot find ptxas"
        return None


def assembler_fault(device: torch.device) -> str | None:
    """Return what is known to be wrong with the ptxas that Triton uses for `device`, with the remedy, or None."""
    if INTERPRETED or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    version = assembler_version(device)
    if version is None or tuple(int(n) for n in version.split(".")) >= FIRST_SOUND_PTXAS:
        return None
    return (
        f"triton {triton.__version__} assembles kernels for {torch.cuda.get_device_name(device)} with ptxas {version}, "
        "which can make wrong code for compute capability 9.0: it may reuse the input registers of asynchronous matrix "
        "products too early. Each kernel is checked on first use; better use ptxas 13.1 or newer: set "
        "TRITON_PTXAS_PATH to it, or install triton 3.9 or newer"
    )


@functools.cache
def warn_of_assembler_once(device: torch.device) -> None:
    """Warn of :func:`assembler_fault`, if there is one."""
    fault = assembler_fault(device)
    if fault is not None:
        warnings.warn(fault, RuntimeWarning, stacklevel=2)
