"""Define PyTorch operators: schema, gradient, and rules for autocast, vmap and FLOP counting. Call them.

Schemas are defined only here (a schema defined twice aborts the process). They have no default values: the dispatcher
drops arguments equal to a default, and autograd formulas then do not get them.
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
_AUTOCAST_SETS = {device: torch._C.DispatchKeySet(key) for device, key in _AUTOCAST_KEYS.items()}


class _Operator:
    """What :func:`call` needs of an operator.

    Attributes:
        op: the operator.
        cast, promote: its autocast rule; None without one.
        function: its kernel and gradient without the dispatcher; None for a backward, which has no gradient.
    """

    def __init__(self, name: str, op: Any) -> None:
        self.name, self.op = name, op
        self.cast: Collection[int] | None = None
        self.promote: Collection[int] = ()
        self.function: type[torch.autograd.Function] | None = None


_operators: dict[str, _Operator] = {}


def define_operator(schema: str, *, fake: Callable[..., Any], flops: Callable[..., int]) -> Any:
    """Define the operator of `schema`, whose last argument, ``str backend``, is the requested backend.

    The kernel is chosen when the operator runs (:mod:`fastprompt.ops.dispatch`).

    Args:
        schema: in PyTorch's schema language, without the namespace.
        fake: computes the outputs' shapes and dtypes.
        flops: counts operations for :class:`torch.utils.flop_counter.FlopCounterMode`.

    Returns:
        The operator.
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
    _operators[name] = _Operator(name, packet.default)
    return packet.default


def traced_plainly(backend: str, *, fusable: bool) -> bool:
    """Return whether a compiler sees an operation as plain PyTorch, not as its operator.

    An exported program always contains plain PyTorch, so that it runs where fastprompt is not installed. For
    `torch.compile` an operator is a fence, so that `fusable` operations are plain PyTorch too: those for which the
    compiler's own kernels are as good. A backend with kernels that is requested by name gets its operator.
    """
    if exporting():
        return True
    return fusable and torch.compiler.is_compiling() and backend in (dispatch.AUTO, "eager")


def exporting() -> bool:
    """Return whether `torch.export` traces this code."""
    # Not `torch.compiler.is_exporting`, which in torch 2.11 is True for the code that `torch.compile` traces, too.
    return torch.compiler._is_exporting_flag


def call(name: str, *args: Any) -> Any:
    """Call an operator of this file, as `torch.ops.fastprompt.NAME(*args)` does.

    In plain eager mode (no compiler, no transformation, no mode, ordinary tensors) this runs the kernel and records the
    gradient without PyTorch's dispatcher, whose way through Python takes longer than a small kernel.
    """
    operator = _operators[name]
    if torch.compiler.is_compiling() or not _is_plain(args):
        return operator.op(*args)
    first = next(x for x in args if x.__class__ in _PLAIN_TYPES)
    if operator.cast is not None and torch.is_autocast_enabled(first.device.type):
        args = _convert(operator.cast, operator.promote, first.device.type, args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_SETS[first.device.type]):
            return _call_plainly(operator, args)
    return _call_plainly(operator, args)


def _call_plainly(operator: _Operator, args: tuple[Any, ...]) -> Any:
    if torch.is_grad_enabled() and any(x.requires_grad for x in args if x.__class__ in _PLAIN_TYPES):
        return operator.op(*args) if operator.function is None else operator.function.apply(*args)
    *inputs, backend = args
    return dispatch.run(operator.name, backend, *inputs)


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Return whether nothing but autograd and autocast acts on a call."""
    if torch._C._dispatch_tls_local_include_set().raw_repr() not in _PLAIN_STATES:
        return False
    for x in args:
        if isinstance(x, Tensor) and (
            x.__class__ not in _PLAIN_TYPES or x.is_neg() or not (x.is_cuda or x.is_cpu)
        ):
            return False
    return True


def _plain_states() -> frozenset[int]:
    """Return the dispatcher's state where no transformation and no mode is active, in inference mode and otherwise."""
    state = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    return frozenset((state.raw_repr(), state.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr()))


_PLAIN_STATES = _plain_states()


def no_flops(*args: Any, **kwargs: Any) -> int:
    """Return 0: FlopCounterMode counts matrix products only."""
    return 0


def register_gradient(op: Any, *, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register the gradient of `op`; `setup` saves the tensors for `backward`."""
    torch.library.register_autograd(op._name, backward, setup_context=setup, lib=LIBRARY)
    operator = _operators[op._opname]

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, backend = args
        results = dispatch.run(operator.name, backend, *inputs)
        setup(ctx, args, results)
        return results

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    operator.function = type(operator.name, (torch.autograd.Function,), members)


def mark_as_backward(op: Any) -> None:
    """Raise an error if `op`, a backward, is differentiated, and disable autocast for it.

    A backward computes in the dtypes of its forward, even inside an autocast region.
    """

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"`{op._name}` is not differentiable; for second derivatives use the operation's reference, which is plain "
            "PyTorch (for example `fastprompt.ops.prompt_attention_reference`)"
        )

    torch.library.register_autograd(op._name, backward, lib=LIBRARY)
    autocast(op)


def autocast(op: Any, cast: Collection[int] = (), promote: Collection[int] = ()) -> None:
    """Set the autocast rule of `op`.

    PyTorch's own rule for custom operators casts every tensor, but gates and temperatures must not be cast. Autocast is
    off inside the operator.

    Args:
        cast: positions of arguments to cast to autocast's dtype, as for a matrix product.
        promote: positions of arguments to cast to their widest common dtype, as for an addition.
    """
    operator = _operators[op._opname]
    operator.cast, operator.promote = cast, promote

    def kernel_for(device: str) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            converted = _convert(cast, promote, device, args)
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_SETS[device]):
                return op(*converted)

        return kernel

    for device in _AUTOCAST_KEYS:
        LIBRARY.impl(operator.name, kernel_for(device), f"Autocast{device.upper()}")


def _convert(
    cast: Collection[int], promote: Collection[int], device: str, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Return the arguments of an operator as autocast's rule converts them."""
    low = torch.get_autocast_dtype(device)
    wide = reduce(torch.promote_types, (args[i].dtype for i in promote)) if promote else low
    return tuple(
        [_cast(a, low) if i in cast else a.to(wide) if i in promote else a for i, a in enumerate(args)]
    )


def autocast_enabled(tensor: Tensor) -> bool:
    """Return whether autocast acts on an operation on `tensor` (there is no autocast for the meta device)."""
    # Not by torch.amp.is_autocast_available, which torch 2.11 cannot trace.
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which to sum over tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # Autocast does not cast float64 either.
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _loop_over_slices(op: Any) -> Callable[..., Any]:
    """Return a vmap rule that runs `op` once for each slice: exact, and as fast as a Python loop.

    For many prompt sets in one call use `prompt_index`; this rule lets code written with vmap run.
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
