"""Repeat a call without the Python that prepared it: the launchers' share of the time of small calls.

A call of Triton kernels allocates some tensors and launches some kernels, and which ones depends only on its
*signature*: the operation, the shapes, strides, dtypes, devices and alignment of its tensors, and its other arguments.
The second call of a signature is recorded. Later ones repeat the allocations and launches with their own tensors, and
skip the choice of backend, way and tiles, the launchers, and Triton's argument binder.

What a record holds of a launch is the compiled kernel that Triton chose, with the same integers and constants. Triton's
choice depends on nothing else but the dtypes and the alignment of pointers to 16 bytes; both are in the signature, or
follow from it for tensors that the call allocates. A call is not recorded if it reads a number from a tensor or lets
PyTorch choose an attention kernel, if it uses a tensor from elsewhere, or if one of its kernels was not checked
(:mod:`fastprompt.ops.trust`).

The first repetition runs beside the call itself, and all bits of their results must be equal: the kernels' sums have a
fixed order. If they are not, a warning says so and the call is never repeated. ``FASTPROMPT_CHECK=never`` omits this
comparison.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastprompt.kernels import identities
from fastprompt.ops import attention_choice, trust

aten = torch.ops.aten

# Signatures kept; so many different ones show that shapes vary, and then all are forgotten.
MAX_SIGNATURES = 1024
# The type of device whose calls are recorded.
device_type = "cuda"

Signature: TypeAlias = tuple[Any, ...]
Values: TypeAlias = list[Any]
Step: TypeAlias = Callable[[Values], None]

_ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


def signature(operation: str, backend: str, args: tuple[Any, ...]) -> Signature | None:
    """Return what decides how a call runs, or None for a call that is not to be recorded."""
    first = next(x for x in args if isinstance(x, Tensor))
    if first.device.type != device_type or _off:
        return None
    parts: list[Any] = [operation, backend, attention_choice.requested()]
    if first.dtype == torch.float32:
        parts.append(torch.backends.cuda.matmul.fp32_precision)
    for x in args:
        if isinstance(x, Tensor):
            parts += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
        else:
            parts.append(tuple(x) if isinstance(x, list) else x)
    return tuple(parts)


class Place(NamedTuple):
    """Where a tensor is: in which of the call's tensors that own memory, and which part of it."""

    owner: int
    offset: int  # bytes
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def find(self, values: Values) -> Tensor:
        """Return the tensor."""
        owner: Tensor = values[self.owner]
        if self.size == owner.shape and self.stride == owner.stride() and not self.offset:
            return owner
        start = owner.storage_offset() + self.offset // owner.element_size()
        return owner.as_strided(self.size, self.stride, start)


class Recorder(TorchDispatchMode):
    """Records the allocations, launches and other operators of one call.

    Attributes:
        fault: why the call cannot be repeated, or None.
    """

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.steps: list[tuple[Step, set[int]]] = []  # with the owners of memory that each uses
        self.places: dict[int, Place] = {}  # by the tensor's id
        self.alive: list[Tensor] = []  # so that no id is used again
        self.owners = self.inputs = len(args)
        self.launches = 0
        self.paused = False
        self.fault: str | None = None
        for i, x in enumerate(args):
            if isinstance(x, Tensor):
                self._add(x, i, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.paused:
            return out
        outputs = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, (tuple, list)) else []
        if not any(isinstance(x, Tensor) for x in (*tree_leaves((args, kwargs)), *outputs)):
            pass  # such as `promote_types`: it depends on nothing but numbers
        elif not outputs or not all(isinstance(x, Tensor) for x in outputs):
            self.fault = f"{func} returns more than tensors"
        elif func in _ALLOCATIONS:
            self._allocate(out)
        elif _are_views(func, args, outputs):
            self._view(func, args, outputs)
        else:
            self._operate(func, args, kwargs, outputs)
        return out

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing inside: Triton's own work for a launch."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def launch(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        device: torch.device,
        arguments: dict[str, Any],
    ) -> None:
        """Record a launch of `kernel`, compiled as `compiled` (None: interpreted)."""
        self.launches += 1
        places = {name: self._place(x) for name, x in arguments.items() if isinstance(x, Tensor)}
        owners = {place.owner for place in places.values() if place is not None}
        self.steps.append((_launch_step(kernel, compiled, grid, device, arguments, places), owners))

    def finish(self, results: Any) -> Replay | None:
        """Return the replay of the call, which returned `results`, or None if it cannot be repeated."""
        places = [self._place(x) for x in results]
        if self.fault is not None or not self.launches or None in places:
            return None
        kept = {place.owner for place in places if place is not None}
        last = {owner: i for i, (_, owners) in enumerate(self.steps) for owner in owners}
        steps: list[Step] = []
        for i, (step, _) in enumerate(self.steps):
            steps.append(step)
            done = [
                owner for owner, j in last.items() if j == i and owner not in kept and owner >= self.inputs
            ]
            if done and i + 1 < len(self.steps):
                steps.append(_free_step(done))
        return Replay(steps, places, self.owners - self.inputs)  # type: ignore[arg-type]

    def _add(self, x: Tensor, owner: int, offset: int) -> None:
        self.places[id(x)] = Place(owner, offset, tuple(x.shape), x.stride(), x.dtype)
        self.alive.append(x)

    def _own(self, x: Tensor) -> int:
        owner, self.owners = self.owners, self.owners + 1
        self._add(x, owner, 0)
        return owner

    def _place(self, x: Any) -> Place | None:
        place = self.places.get(id(x)) if isinstance(x, Tensor) else None
        if place is None:
            self.fault = "it uses or returns what it did not make"
        return place

    def _allocate(self, x: Tensor) -> None:
        owner = self._own(x)
        size, stride, dtype, device = tuple(x.shape), x.stride(), x.dtype, x.device
        if x.data_ptr() % 16:
            self.fault = "PyTorch allocated memory that is not aligned"

        def step(values: Values) -> None:
            values[owner] = torch.empty_strided(size, stride, dtype=dtype, device=device)

        def contiguous(values: Values) -> None:
            values[owner] = torch.empty(size, dtype=dtype, device=device)

        self.steps.append((contiguous if x.is_contiguous() else step, {owner}))

    def _view(self, func: Any, args: tuple[Any, ...], outputs: list[Tensor]) -> None:
        base = self._place(args[0])
        for x in outputs:
            if base is None or id(x) in self.places:
                continue
            if x.dtype != base.dtype or x.is_neg() or x.is_conj():
                self.fault = f"{func} reads memory in another way"
            # An empty tensor has no address.
            offset = x.storage_offset() - args[0].storage_offset() if x.numel() else 0
            self._add(x, base.owner, base.offset + offset * x.element_size())

    def _operate(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
    ) -> None:
        flat, structure = tree_flatten((args, kwargs))
        inputs = {i: self._place(x) for i, x in enumerate(flat) if isinstance(x, Tensor)}
        found = {i: place for i, place in inputs.items() if place is not None}
        flat = [None if i in inputs else x for i, x in enumerate(flat)]
        # In place, or into `out`: the result is a tensor that is there already.
        new = [self._own(x) if id(x) not in self.places else None for x in outputs]

        def step(values: Values) -> None:
            given = list(flat)
            for i, place in found.items():
                given[i] = place.find(values)
            args, kwargs = tree_unflatten(given, structure)
            out = func(*args, **kwargs)
            for owner, x in zip(new, [out] if isinstance(out, Tensor) else out, strict=True):
                if owner is not None:
                    values[owner] = x

        self.steps.append(
            (step, {place.owner for place in found.values()} | {o for o in new if o is not None})
        )


def _are_views(func: Any, args: tuple[Any, ...], outputs: list[Tensor]) -> bool:
    """Return whether an operator returned views of its first argument; `reshape` and others may return copies."""
    if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        return False
    memory = args[0].untyped_storage()._cdata
    return all(x.untyped_storage()._cdata == memory for x in outputs)


class Replay:
    """A recorded call."""

    def __init__(self, steps: list[Step], results: list[Place], owned: int) -> None:
        self.steps, self.results, self.empty = steps, results, (None,) * owned
        self.proven = False

    def __call__(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Run the call on arguments of its signature."""
        values = [*args, *self.empty]
        for step in self.steps:
            step(values)
        return tuple([place.find(values) for place in self.results])


def _launch_step(
    kernel: Any,
    compiled: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: dict[str, Any],
    places: dict[str, Place | None],
) -> Step:
    found = {name: place for name, place in places.items() if place is not None}
    if compiled is None:

        def interpreted(values: Values) -> None:
            kernel[grid](**{**arguments, **{name: place.find(values) for name, place in found.items()}})

        return interpreted

    start = compiled[(*grid, 1, 1)[:3]]
    template = [None if name in found else arguments[name] for name in kernel.arg_names]
    # An empty tensor has no address.
    pointers = [
        (i, found[name].owner, found[name].offset)
        for i, name in enumerate(kernel.arg_names)
        if name in found and 0 not in found[name].size
    ]

    def step(values: Values) -> None:
        given = template.copy()
        for i, owner, offset in pointers:
            given[i] = values[owner].data_ptr() + offset
        if device.index == torch.cuda.current_device():
            start(*given)
        else:
            with torch.cuda.device(device):
                start(*given)

    return step


def _free_step(owners: list[int]) -> Step:
    def step(values: Values) -> None:
        for owner in owners:
            values[owner] = None

    return step


# The calls --------------------------------------------------------------------------------------------------------

# None: seen once; False: cannot be repeated.
_known: dict[Signature, Replay | bool | None] = {}
_off = False


def run(key: Signature, function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, a call of the signature `key`: its first run, its record, or a repetition."""
    replay = _known.get(key, True)
    if isinstance(replay, Replay):
        return replay(args) if replay.proven or trust.never() else _prove(key, replay, function, args)
    if replay is True:  # new
        if len(_known) >= MAX_SIGNATURES:
            _known.clear()
        _known[key] = None
        return function(*args)
    if replay is False:
        return function(*args)
    recorder = Recorder(args)
    with recorder, identities.recording(recorder):
        results = function(*args)
    found = recorder.finish(results)
    _known[key] = False if found is None else found
    return results


def _prove(key: Signature, replay: Replay, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return `function(*args)`, and compare its bits with those of the first repetition."""
    results = function(*args)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return results  # a comparison would end the capture
    if all(_same_bits(x, y) for x, y in zip(results, replay(args), strict=True)):
        replay.proven = True
        return results
    _known[key] = False
    warnings.warn(
        f"`{key[0]}`: repeating the recorded launches of a call did not give its bits, so calls of this signature run "
        f"without a record; their results are right. torch {torch.__version__}, arguments: {key[1:]}. "
        "Please report this message",
        RuntimeWarning,
        stacklevel=2,
    )
    return results


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (x, y)))


@contextmanager
def off() -> Iterator[None]:
    """Record and repeat no call inside the context, for example while tables of tile sizes change."""
    global _off
    previous, _off = _off, True
    try:
        yield
    finally:
        _off = previous


def forget() -> None:
    """Forget all records, because tiles or ways are chosen in another way from now on."""
    _known.clear()
