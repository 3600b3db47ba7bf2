"""PyTorch's kernels for GPUs, without a GPU: on fake tensors, which check arguments and shapes and hold no data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import KINDS, Shape, draw
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from fastprompt.ops import attention_ways, vendor_attention
from fastprompt.ops.attention_ways import Inputs

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let PyTorch choose this kernel."""
    choice = KERNELS[request.param]
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **options: int(choice.value))
    return str(request.param)


by_kernel = pytest.mark.parametrize("kernel", KERNELS, indirect=True)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The fused kernels that are called, with their arguments, each checked against its schema by the call."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("_scaled_dot_product"):
            self.found.append((name, args))
        return func(*args, **(kwargs or {}))


@by_kernel
@pytest.mark.parametrize(("d", "padded"), [(64, 64), (33, 40), (72, 72)])
def test_arguments_and_shapes(kernel: str, d: int, padded: int) -> None:
    with FakeTensorMode(), Calls() as calls:
        qkv = torch.empty(2, 7, 3, 4, d, device="cuda", dtype=torch.bfloat16)
        q, k, v = qkv.unbind(2)
        q = q[:, :5]
        out, lse = vendor_attention.forward(q, k, v, 0.3)
        gradients = vendor_attention.backward(out, q, k, v, out, lse, 0.3)
    assert out.shape == q.shape
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 4, 5), torch.float32, True)
    for gradient, x in zip(gradients, (q, k, v), strict=True):
        assert (gradient.shape, gradient.dtype) == (x.shape, torch.bfloat16)
    names = [name for name, _ in calls.found]
    assert names == [f"_scaled_dot_product_{kernel}_attention{part}" for part in ("", "_backward")]
    forward, backward = (args for _, args in calls.found)
    for x in forward[:3] + backward[:4]:
        assert x.shape[-1] == padded
        assert all(s * 2 % 16 == 0 for s in (x.storage_offset(), *x.stride()[:-1]))
    given: Tensor = next(x for x in backward if isinstance(x, Tensor) and x.dtype == torch.float32)
    assert given.shape == {"flash": (2, 4, 5), "cudnn": (2, 4, 5, 1), "efficient": (2, 4, 32)}[kernel]


@by_kernel
def test_rows_are_given_as_they_lie_unless_a_kernel_could_not_read_them(kernel: str) -> None:
    with FakeTensorMode(), Calls() as calls:
        even, odd = (
            torch.empty(2, 7, 3, 4, 64 + gap, device="cuda", dtype=torch.float16)[..., :64] for gap in (0, 1)
        )
        for qkv in (even, odd):
            vendor_attention.forward(*qkv.unbind(2), 1.0)
    assert calls.found[0][1][0].stride() == (7 * 3 * 256, 64, 3 * 256, 1)
    assert calls.found[1][1][0].stride() == (7 * 256, 64, 256, 1)


@by_kernel
@pytest.mark.parametrize("way", ["split", "joined"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_gpu(kernel: str, way: str, kind: str) -> None:
    # Reading a number of a fake tensor is an error.
    with FakeTensorMode():
        inputs = Inputs(*[*draw(Shape(kind=kind), torch.bfloat16, "cuda").values(), 0.3])
        if inputs.prompt_index is not None:
            inputs = inputs._replace(prompt_index=torch.empty(3, dtype=torch.int64, device="cuda"))
        out, lse = attention_ways.forward(way, inputs)  # type: ignore[arg-type]
        gradients = attention_ways.gradients(way, out, inputs, out, lse, [True] * 6)  # type: ignore[arg-type]
    assert out.shape == inputs.q.shape
    assert out.is_contiguous()
    for gradient, x in zip(gradients, inputs, strict=False):
        assert gradient is not None
        assert isinstance(x, Tensor)
        assert gradient.shape == x.shape


def test_float64_on_a_gpu_is_computed_by_products() -> None:
    with FakeTensorMode(), Calls() as calls:
        q = torch.empty(2, 5, 3, 33, device="cuda", dtype=torch.float64)
        out, lse = vendor_attention.forward(q, q, q, 1.0)
        gradients = vendor_attention.backward(out, q, q, q, out, lse, 1.0)
    assert not calls.found
    assert [x.shape for x in (out, *gradients)] == [q.shape] * 4
    assert lse.dtype == torch.float64
