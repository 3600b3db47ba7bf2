"""Frozen weights under autocast: cast once, not at every use.

Autocast keeps the casts of tensors that require a gradient, until its region ends. It casts a frozen weight at every
use. :func:`low` makes one copy of each frozen weight in autocast's dtype instead and returns it until the weight
changes. The numbers are the same.

The copies belong to no module: `state_dict`, `copy.deepcopy`, pickling and `.to()` do not see them, and each is freed
with its weight. A compiler, a tracer and a CUDA graph get the weight itself, so that what they record casts it.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from fastprompt.ops.operator import autocast_enabled

_T = TypeVar("_T", bound=Tensor | None)


class _Copy(NamedTuple):
    """A low-precision copy, and what the weight was when it was made.

    A weak reference to the storage keeps its address from being used again for another one.
    """

    weight: weakref.ref[Tensor]
    storage: StorageWeakRef
    state: tuple[Any, ...]
    tensor: Tensor


_copies: dict[int, _Copy] = {}  # by id of the weight, while it lives


def low(weight: _T) -> _T:
    """Return `weight` as autocast would cast it, or itself if autocast does not act on it or it requires a gradient.

    Changes of the weight are seen, except those through `weight.data`, which PyTorch does not count as changes.
    """
    if weight is None or not acts_on(weight):
        return weight
    return _low(weight, torch.get_autocast_dtype(weight.device.type))  # type: ignore[return-value]


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """Return module(x); weights of a plain Linear layer without hooks come from :func:`low`."""
    if type(module) is not nn.Linear or not acts_on(x) or has_hooks(module):
        return module(x)
    dtype, bias = torch.get_autocast_dtype(x.device.type), module.bias
    return F.linear(x, _low(module.weight, dtype), None if bias is None else _low(bias, dtype))


def _low(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.requires_grad or weight.dtype in (dtype, torch.float64):
        return weight
    if type(weight) not in (nn.Parameter, Tensor) or weight.is_inference():
        return weight  # changes of an inference tensor are not counted
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return weight  # replays of the graph must see later changes
    storage = weight.untyped_storage()
    state = (dtype, weight._version, storage._cdata, weight.data_ptr(), weight.shape, weight.stride())
    found = _copies.get(id(weight))
    if found is not None and found.state == state and found.weight() is weight:
        return found.tensor
    with torch.inference_mode(False), torch.no_grad():
        tensor = weight.to(dtype)
    if type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        key = id(weight)
        reference = weakref.ref(weight, lambda _: _copies.pop(key, None))
        _copies[key] = _Copy(reference, StorageWeakRef(storage), state, tensor)
    return tensor


def call(module: nn.Module, x: Tensor) -> Tensor:
    """Return module(x); frozen weights of all convolutions and Linear layers inside come from :func:`low`."""
    if not acts_on(x):
        return module(x)
    with _LowWeights():
        return module(x)


def has_hooks(module: nn.Module) -> bool:
    """Return whether anything but `module.forward` of its class runs when `module` is called."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or nn.modules.module._has_any_global_hook()
    )


def acts_on(tensor: Tensor) -> bool:
    """Return whether autocast acts on `tensor` and this is no compilation or tracing."""
    return not torch.compiler.is_compiling() and autocast_enabled(tensor) and not torch.jit.is_tracing()


class _LowWeights(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, F.linear):
            args = tuple(low(a) if type(a) is nn.Parameter else a for a in args)
        return func(*args, **(kwargs or {}))
