"""Trust on first use: compare a kernel's results with plain PyTorch's the first time it runs in this process.

The project's rule decides (`bench/correctness.py`): the error against float64, over each whole output, may be twice
that of plain PyTorch in the same dtype, plus a rounding. A kernel that fails is refused for the rest of the process; it
is reported once, and the call and all later ones take the next way. ``FASTPROMPT_CHECK`` is ``first`` (default),
``always`` (check every call) or ``never``.

A check evaluates plain PyTorch for one image, or some small ones, at a time, so that it takes little memory beside the
call's own. It draws no random numbers and records no gradients.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from fastprompt.kernels import identities
from fastprompt.kernels.identities import Identity

T = TypeVar("T")
MODES = ("first", "always", "never")
# Numbers in the images that are compared at a time: 32 MB in float64, and as often as much for what is made of them.
CHUNK = 2**22

# Of a normal distribution, as in bench/correctness.py.
DEVIATIONS = 6.0

_mode: str = os.environ.get("FASTPROMPT_CHECK", "").strip().lower() or "first"


class Form(NamedTuple):
    """How an operation is checked.

    Attributes:
        images: for the operation's arguments, return the positions of those whose first dimension counts the images.
        exact: the operation for arguments in float64; default the plain form.
    """

    images: Callable[..., Sequence[int]]
    exact: Callable[..., Any] | None = None


_forms: dict[str, Form] = {}


def describe(
    operation: str, images: Callable[..., Sequence[int]], exact: Callable[..., Any] | None = None
) -> None:
    """Set how `operation` is checked (:class:`Form`); others are checked for all images at a time."""
    _forms[operation] = Form(images, exact)


def run(name: str, run: Callable[..., T], plain: Callable[..., T], *args: Any) -> T:
    """Return `run(*args)`, checked if it launches kernels that were not checked before.

    Args:
        name: the operation.
        run: launches kernels; returns a tensor or a tuple of tensors.
        plain: the same in plain PyTorch, for arguments in any floating dtype.

    Raises:
        Refused: a kernel failed its check, now or earlier, or cannot be launched.
        ValueError: FASTPROMPT_CHECK names no mode.
    """
    if _mode not in MODES:
        raise ValueError(f"`FASTPROMPT_CHECK`: there is no mode {_mode!r}; choose one of {', '.join(MODES)}")
    with identities.watching() as launched:
        results = run(*args)
    new = [i for i in dict.fromkeys(launched) if i.state == "not yet" or _mode == "always"]
    if not new or _mode == "never":
        return results
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _warn_of_capture(name)
        return results
    device = new[0].device
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            fault = _compare(name, results, plain, args)
    except IndexError:  # the caller's `prompt_index`; the next call is checked
        return results
    except torch.OutOfMemoryError as error:
        _give_up(name, new, str(error))
        return results
    if fault is not None:
        from fastprompt.kernels.triton import launch  # not at the top: it imports triton

        raise launch.refuse(new, f"`{name}`: {fault}")
    for identity in new:
        identity.state = "trusted"
    return results


def report() -> list[str]:
    """Return lines that say how many kernels were checked in this process, and which are refused, with the reason."""
    found = list(identities.known.values())
    if not found:
        return []
    counts = Counter(identity.state for identity in found)
    total = ", ".join(f"{counts[state]} {state}" for state in get_args(identities.State) if counts[state])
    return [
        f"Triton kernels checked on first use: {total}",
        *(f"  {i.state}: {i}: {i.reason}" for i in found if i.reason is not None),
    ]


def _compare(name: str, results: Any, plain: Callable[..., Any], args: tuple[Any, ...]) -> str | None:
    """Return what is wrong with `results`, or None."""
    form = _forms.get(name, Form(lambda *args: ()))
    exact = plain if form.exact is None else form.exact
    ours = _tensors(results)
    comparisons = [_Comparison() for _ in ours]
    parts = list(_parts(form.images(*args), args))
    for rows, part in parts:
        wanted = _tensors(exact(*(_double(x) for x in part)))
        usual = _tensors(plain(*part))
        for comparison, got, p, want in zip(comparisons, ours, usual, wanted, strict=True):
            if len(parts) > 1 and got.shape[:1] != want.shape[:1]:
                comparison.add(got[rows], p, want)
            else:  # a sum over the images, or all of them
                comparison.collect(got, p, want)
    for comparison in comparisons:
        comparison.add_sums()
    relative = math.hypot(*(c.plain for c in comparisons)) / (
        math.hypot(*(c.size for c in comparisons)) or 1.0
    )
    for i, (comparison, got) in enumerate(zip(comparisons, ours, strict=True)):
        fault = comparison.fault(torch.finfo(got.dtype), relative)
        if fault is not None:
            return f"result {i} of {len(ours)}: {fault}"
    return None


class _Comparison:
    """The error of one result, and of its plain form, against the exact one, over all images."""

    def __init__(self) -> None:
        self.squares: Any = 0.0  # of our error, plain's, and the exact values
        self.count = 0
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None
        self.misshapen: str | None = None

    def add(self, got: Tensor, plain: Tensor, want: Tensor) -> None:
        if want.numel() == 0:  # not needed
            return
        if got.shape != want.shape:
            self.misshapen = f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
            return
        # Where plain PyTorch overflows there is nothing to compare with.
        valid = plain.isfinite() & want.isfinite()
        rows = (got.double() - want, plain.double() - want, want)
        self.squares = self.squares + torch.stack([x.where(valid, 0.0).square().sum() for x in rows])
        self.count += want.numel()

    def collect(self, got: Tensor, plain: Tensor, want: Tensor) -> None:
        before = self.sums
        self.sums = (
            (got, plain.double(), want) if before is None else (got, before[1] + plain, before[2] + want)
        )

    def add_sums(self) -> None:
        """Compare the sums, and read the numbers from the device."""
        if self.sums is not None:
            self.add(*self.sums)
        self.ours, self.plain, self.size = (
            [math.sqrt(x) for x in self.squares.tolist()] if self.count else [0.0] * 3
        )

    def fault(self, finfo: torch.finfo, relative: float) -> str | None:
        """Return what is wrong, or None; `relative` is plain PyTorch's error of all results together."""
        if self.misshapen is not None:
            return self.misshapen
        if not self.count:
            return None
        typical = self.size * relative
        rounding = finfo.eps * (self.size + finfo.smallest_normal * math.sqrt(self.count))
        allowed = 2 * max(self.plain, typical) + DEVIATIONS * typical / math.sqrt(self.count) + rounding
        if self.ours <= allowed:
            return None
        return (
            f"off by {self.ours:.2e}, plain PyTorch by {self.plain:.2e}; {allowed:.2e} is allowed; "
            f"its norm is {self.size:.2e}"
        )


def _parts(images: Sequence[int], args: tuple[Any, ...]) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Yield the arguments for some images after others: those in `images` sliced, the others as they are."""
    batched = {i for i in images if isinstance(args[i], Tensor)}
    if not batched:
        yield slice(None), args
        return
    count = args[min(batched)].shape[0]
    numbers = sum(args[i].numel() for i in batched) // max(1, count)
    step = max(1, CHUNK // max(1, numbers))
    for first in range(0, max(1, count), step):
        rows = slice(first, first + step)
        yield rows, tuple(x[rows] if i in batched else x for i, x in enumerate(args))


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@functools.cache
def _warn_of_capture(name: str) -> None:
    warnings.warn(
        f"`{name}`: its Triton kernels are captured into a CUDA graph before they were checked; run it once before the "
        "capture, as PyTorch's own warm-up does, and they are",
        RuntimeWarning,
        stacklevel=3,
    )


def _give_up(name: str, unchecked: Sequence[Identity], error: str) -> None:
    """Use kernels unchecked, because there is not enough memory to compare even one image."""
    for identity in unchecked:
        identity.state, identity.reason = "unchecked", f"out of memory: {error}"
    warnings.warn(
        f"`{name}`: there is not enough memory to check its Triton kernels; they are used unchecked; "
        "to check them, run one small batch first",
        RuntimeWarning,
        stacklevel=3,
    )
