"""Time the Python of one attention call: the operation with its kernels stubbed, against concatenation and SDPA.

    python -m bench.overhead

No GPU is needed, and none is used: Triton compiles the kernels for one, and a stub takes their launches. Tensors are
small ones of the CPU, so that PyTorch's own operators take little more than their call.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastprompt.kernels.triton import launch
from fastprompt.ops import dispatch, packed_prompt_attention, replay, trust
from fastprompt.ops.attention_choice import use_way

ROUNDS, CALLS = 21, 200


class Launch(NamedTuple):
    """What reaches the GPU's driver: a kernel, its grid and its arguments."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class _Driver:
    """A driver of Triton whose kernels do nothing.

    Attributes:
        launches: the launches so far, if it is a list.
    """

    launches: list[Launch] | None = None

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = self
        driver = self

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.name = metadata.name

            def __call__(self, *arguments: Any) -> None:
                if driver.launches is not None:
                    driver.launches.append(Launch(self.name, arguments[:3], arguments[9:]))

        self.launcher_cls = Launcher

    def load_binary(self, name: str, *_: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    def unload_module(self, module: Any) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def stubbed(arch: int = 90) -> Iterator[_Driver]:
    """Let Triton's kernels for compute capability `arch` take CPU tensors and do nothing; yield their driver.

    Raises:
        RuntimeError: the kernels were imported under TRITON_INTERPRET=1.
    """
    if launch.INTERPRETED:
        raise RuntimeError("the kernels are interpreted in this process; unset TRITON_INTERPRET")
    driver, active = _Driver(arch), triton.runtime.driver
    previous = active._active
    active.set_active(driver)
    with ExitStack() as stack:
        stack.callback(setattr, active, "_active", previous)
        stack.callback(replay.forget)
        for target, name, value in (
            (launch, "unsupported", lambda tensor: None),
            (launch, "architecture", lambda device: arch),
            (launch, "multiprocessors", lambda device: 1),
            (launch, "warn_of_assembler_once", lambda device: None),
            (torch.cuda, "current_device", lambda: None),
            (dispatch._backends["triton"], "why_unavailable", lambda: None),
            (trust, "_mode", "never"),
            (replay, "device_type", "cpu"),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(dispatch.use_backend("triton"))
        yield driver


def draw(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Return qkv [B, N, 3, H, d] and keys and values [P, H, d] of prompts."""
    B, N, P, H, d = 2, 17, 3, 1, 64
    return (
        torch.randn(B, N, 3, H, d, dtype=dtype),
        torch.randn(P, H, d, dtype=dtype),
        torch.randn(P, H, d, dtype=dtype),
    )


def ours(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
    """Call the operation."""
    return packed_prompt_attention(qkv, prompt_k, prompt_v)


def concatenated(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
    """Compute the same by concatenation and PyTorch's attention."""
    q, k, v = qkv.unbind(2)
    k, v = (torch.cat([x, p.expand(len(x), -1, -1, -1)], 1) for x, p in ((k, prompt_k), (v, prompt_v)))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def calls_in(function: Callable[[], Any]) -> int:
    """Return how many Python and C functions a call calls: its work in Python, the same on any machine."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def microseconds(functions: list[Callable[[], Any]]) -> list[float]:
    """Return the median processor time of a call of each, in rounds of each after the other."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, found in zip(functions, times, strict=True):
            start = time.thread_time()
            for _ in range(CALLS):
                function()
            found.append((time.thread_time() - start) / CALLS * 1e6)
    return [statistics.median(found) for found in times]


def forward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Return a call of `function`."""
    return lambda: function(*inputs)


def forward_and_backward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Return a call of `function` and its gradients."""
    cotangent = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, cotangent)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    plain, training = draw(), tuple(x.requires_grad_() for x in draw())
    cases = (
        ("forward", forward, plain, False),
        ("forward, autocast", forward, plain, True),
        ("forward, gradients recorded", forward, training, False),
        ("forward and backward", forward_and_backward, training, False),
    )
    print(f"{'Python of one call, microseconds':<34} {'ours':>8} {'concat + SDPA':>14} {'calls, ours':>12}")
    with stubbed(), use_way("resident"):
        for name, make, inputs, autocast in cases:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                both = [make(ours, inputs), make(concatenated, inputs)]
                for function in both:
                    for _ in range(3):
                        function()
                times = microseconds(both)
                print(f"{name:<34} {times[0]:8.1f} {times[1]:14.1f} {calls_in(both[0]):12}")


if __name__ == "__main__":
    main()
