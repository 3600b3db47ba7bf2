"""How the tests of the operations judge numbers, and the memory layouts in which they hand over tensors.

The rule: against float64, an operation may err twice as much as plain PyTorch (matmul, softmax, add) does in the same
dtype on the same inputs, plus a rounding of the result and a few of float32. Nobody tunes a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from fastprompt.ops import dispatch

Inputs = Mapping[str, Tensor | None]
Function = Callable[..., Tensor]

# What sums of terms of size 1 to 10 may be off by in float32 when they cancel, as to the 0 that is the gradient of the
# score of a lone key.
ROUNDINGS = 64 * torch.finfo(torch.float32).eps

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def backends_of(operation: str) -> list[str]:
    """The backends with a kernel for `operation` in this process."""
    return [name for name in dispatch.BACKENDS if dispatch.why_missing(operation, name) is None]


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """What `backend` computes in, widest first; it refuses the others, which test_triton_backend.py checks."""
    if backend != "triton":
        return FLOATS
    return FLOATS[1:] if torch.cuda.is_available() else (torch.float32, torch.float16)


def skip_unless_served(operation: str, backend: str, *arguments: object) -> None:
    """Skip a shape that a kernel says it has no room for; `eager` serves all of them."""
    reason = dispatch.why_not(operation, backend, *arguments)
    if reason is not None:
        pytest.skip(reason)


def evaluate(
    function: Function, inputs: Inputs, cotangent: Tensor, trainable: set[str] | None = None
) -> dict[str, Tensor]:
    """The output of `function(**inputs)` and the gradient of each trainable input (default: of all floating ones)."""
    leaves = {}
    for name, x in inputs.items():
        if x is not None and x.is_floating_point():
            x = x.detach().requires_grad_(trainable is None or name in trainable)  # keeps strides
        leaves[name] = x
    out = function(**leaves)
    out.backward(cotangent.to(out))
    results = {"output": out.detach()}
    for name, x in leaves.items():
        if x is not None and x.requires_grad:
            assert x.grad is not None or x.numel() == 0, f"no gradient for {name}"
            results[f"gradient of {name}"] = torch.zeros_like(x) if x.grad is None else x.grad
        elif x is not None:
            assert x.grad is None, f"a gradient for {name}, which does not train"
    return results


def assert_as_exact_as_eager(
    function: Function,
    eager: Function,
    reference: Function,
    inputs: Inputs,
    spread: Mapping[str, tuple[int, ...]] | None = None,
    given: Inputs | None = None,
) -> None:
    """Judge output and every gradient of `function(**inputs)` by the rule above.

    Args:
        eager: the same in plain PyTorch, in the inputs' dtype.
        reference: the same, evaluated here in float64.
        spread: for a one-element input, a shape to which `eager` takes it expanded. The error of one number is as
            often zero as large; those of the many numbers whose sum it is say how large it may be by chance.
        given: the same values in another memory layout, for `function` alone.
    """
    floating = {name: x for name, x in inputs.items() if x is not None and x.is_floating_point()}
    dtype = next(iter(floating.values())).dtype
    wide = {**inputs, **{name: x.double() for name, x in floating.items()}}
    with torch.no_grad():
        shape = reference(**wide).shape
    cotangent = torch.randn(shape).to(dtype).to(next(iter(floating.values())).device)
    exact = evaluate(reference, wide, cotangent.double())
    plain = evaluate(eager, inputs, cotangent)
    ours = evaluate(function, inputs if given is None else given, cotangent)
    assert ours.keys() == exact.keys()
    eps = torch.finfo(dtype).eps
    for name, want in exact.items():
        got = ours[name]
        source = inputs.get(name.removeprefix("gradient of "))
        assert got.shape == want.shape, name
        assert got.dtype == (dtype if source is None else source.dtype), name
        if want.numel() == 0:
            continue
        size = want.abs().max().item()
        if dtype == torch.float64:
            allowed = 1e-10 * max(1.0, size)
        else:
            allowed = 2 * _error(plain[name], want) + eps * size + ROUNDINGS
            shape = (spread or {}).get(name.removeprefix("gradient of "))
            if shape is not None:
                allowed += 2 * _expected_error(eager, inputs, wide, cotangent, name, shape)
        error = _error(got, want)
        assert error <= allowed, (
            f"{name}: error {error:.2e} > {allowed:.2e} allowed (largest element {size:.2e})"
        )


def _expected_error(
    eager: Function, inputs: Inputs, wide: Inputs, cotangent: Tensor, name: str, shape: tuple[int, ...]
) -> float:
    """What error to expect of one sum, from eager's errors in its terms."""
    source = name.removeprefix("gradient of ")
    terms = []
    for given in (inputs, wide):
        scalar = given[source]
        assert scalar is not None
        terms.append(
            evaluate(eager, {**given, source: scalar.expand(shape).clone()}, cotangent)[name].double()
        )
    # Four standard deviations, and what cancels between the terms.
    return 4 * (terms[0] - terms[1]).norm().item() + ROUNDINGS * math.sqrt(terms[0].numel())


def assert_close(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float | None = None
) -> None:
    """Equal names, shapes and, to `tolerance` of the largest element, numbers (1e-10, in float32 1e-5)."""
    assert got.keys() == want.keys()
    if tolerance is None:
        tolerance = 1e-10 if got["output"].dtype == torch.float64 else 1e-5
    for name, w in want.items():
        assert got[name].shape == w.shape, name
        if w.numel():
            error, size = _error(got[name], w), w.abs().max().item()
            assert error <= tolerance * max(1.0, size), (
                f"{name}: error {error:.2e}, largest element {size:.2e}"
            )


def _error(got: Tensor, want: Tensor) -> float:
    difference = (got.double() - want.double()).abs()
    return float("inf") if difference.isnan().any() else difference.max().item()


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """The bytes that autograd keeps for the backward of `function()`."""
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        total += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return total


# Memory layouts: each takes a tensor [B, N, C, d] and gives one of equal values in other strides, NaN in the gaps, so
# that a kernel that reads past a row returns NaN. (`expanded` gives its first image's values to all.)


def packed(x: Tensor) -> Tensor:
    """One of three interleaved tensors, as `qkv.reshape(B, N, 3, H, d)[:, :, 1]`."""
    buffer = x.new_full((*x.shape[:2], 3, *x.shape[2:]), torch.nan)
    buffer[:, :, 1] = x
    return buffer[:, :, 1]


def transposed(x: Tensor) -> Tensor:
    """Heads before rows in memory, as SDPA's callers have them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def odd_strides(x: Tensor) -> Tensor:
    """Gaps after every row, head and element, and a start that is aligned to nothing."""
    B, N, C, d = x.shape
    buffer = x.new_full((B, N + 1, C + 1, 2 * d + 3), torch.nan)
    view = buffer[:, 1:, :C, 1 : 2 * d + 1 : 2]
    view.copy_(x)
    return view


def last_dimension_first(x: Tensor) -> Tensor:
    """head_dim outermost in memory."""
    return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def expanded(x: Tensor) -> Tensor:
    """The first image for all, with a stride of 0."""
    return x[:1].expand_as(x)


LAYOUTS = (packed, transposed, odd_strides, last_dimension_first, expanded)
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
