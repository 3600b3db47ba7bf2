"""How an operation of this package becomes a PyTorch operator: one schema, and what every subsystem asks of it.

Schemas are defined here and nowhere else (a schema defined twice aborts the process), without default values (the
dispatcher drops arguments equal to a default, which autograd formulas then miss).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastprompt.ops import dispatch

NAMESPACE = "fastprompt"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_AUTOCAST_KEYS = {
    "cpu": torch._C.DispatchKey.AutocastCPU,
    "cuda": torch._C.DispatchKey.AutocastCUDA,
}


def define(schema: str, *, fake: Callable[..., Any], flops: Callable[..., int]) -> Any:
    """Define the operator of `schema`; its last argument, ``str backend``, is the backend asked for.

    The kernel is chosen when the operator runs (:mod:`fastprompt.ops.dispatch`). `fake` computes shapes only;
    `flops` counts operations for :class:`torch.utils.flop_counter.FlopCounterMode`. Returns the operator.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def kernel(*args: Any) -> Any:
        *inputs, backend = args
        return dispatch.run(name, backend, *inputs)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    packet = getattr(torch.ops.fastprompt, name)
    register_flop_formula(packet)(flops)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _loop_over_slices(packet.default), lib=LIBRARY)
    return packet.default


def differentiate(op: Any, *, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give `op` its gradient."""
    torch.library.register_autograd(op._name, backward, setup_context=setup, lib=LIBRARY)


def as_gradient(op: Any) -> None:
    """Make `op` a gradient: differentiating it is an error that says so, and autocast leaves it alone.

    Its dtypes are those of its forward, also where a backward runs inside autocast's region.
    """

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"`{op._name}` has no derivative of its own; for gradients of gradients use the operation's "
            "reference, which is plain PyTorch (for example `fastprompt.ops.prompt_attention_reference`)"
        )

    torch.library.register_autograd(op._name, backward, lib=LIBRARY)
    autocast(op)


def autocast(op: Any, cast: Collection[int] = (), promote: Collection[int] = ()) -> None:
    """Say what autocast does to the arguments of `op`.

    Those at `cast` go to autocast's dtype, as for a matrix product; those at `promote` to their common widest dtype, as
    for an addition. All others (gates, temperatures) stay as they are, which is why PyTorch's own rule for custom
    operators, casting every tensor, is not used. What the operator runs inside is out of autocast's reach.
    """
    name = op._schema.name.split("::")[1]

    def kernel_for(device: str) -> Callable[..., Any]:
        excluded = torch._C.DispatchKeySet(_AUTOCAST_KEYS[device])

        def kernel(*args: Any) -> Any:
            low = torch.get_autocast_dtype(device)
            wide = reduce(torch.promote_types, (args[i].dtype for i in promote)) if promote else low
            converted = [
                _cast(a, low) if i in cast else a.to(wide) if i in promote else a for i, a in enumerate(args)
            ]
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return op(*converted)

        return kernel

    for device in _AUTOCAST_KEYS:
        LIBRARY.impl(name, kernel_for(device), f"Autocast{device.upper()}")


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast would act on an operation on `tensor` (on the meta device there is none)."""
    # Not by torch.amp.is_autocast_available, which torch 2.11 cannot trace.
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tensors of `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # Autocast leaves float64 alone, and so do we.
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _loop_over_slices(op: Any) -> Callable[..., Any]:
    """A vmap rule that runs `op` once for each slice: exact, and as fast as a Python loop.

    Many prompt sets in one call are what `prompt_index` is for; vmap is here so that code written with it works.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        results = [
            op(
                *(
                    a.select(dim, i) if isinstance(dim, int) else a
                    for a, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    return rule
