"""Trust on first use: compare a kernel's results with plain PyTorch's the first time it runs in this process.

The project's rule decides (:mod:`fastprompt.ops.rounding`): the error against float64, over each whole output, may be
about twice that of plain PyTorch in the same dtype. A kernel that fails is refused for the rest of the process; it
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
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from fastprompt.kernels import identities
from fastprompt.kernels.identities import Identity
from fastprompt.ops.rounding import DRAWS, RandomRounding, allowed, chance

T = TypeVar("T")
MODES = ("first", "always", "never")
# Numbers in the images that are compared at a time: 32 MB in float64, and as often as much for what is made of them.
CHUNK = 2**22

_mode: str = os.environ.get("FASTPROMPT_CHECK", "").strip().lower() or "first"


class Form(NamedTuple):
    """How an operation is checked.

    Attributes:
        images: for the operation's arguments, return the positions of those whose first dimension counts the images.
        exact: the operation for arguments in float64; default the plain form.
    """

    images: Callable[..., Sequence[int]]
    exact: Callable[..., Any] | None = None


_Part = tuple[slice, tuple[Any, ...]]
_forms: dict[str, Form] = {}


def describe(
    operation: str, images: Callable[..., Sequence[int]], exact: Callable[..., Any] | None = None
) -> None:
    """Set how `operation` is checked (:class:`Form`); others are checked for all images at a time."""
    _forms[operation] = Form(images, exact)


def always() -> bool:
    """Return whether every call is checked."""
    return _mode == "always"


def never() -> bool:
    """Return whether nothing is checked."""
    return _mode == "never"


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
    if _mode == "never":
        for identity in new:
            identity.state = "unchecked"
        return results
    if not new:
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
    parts = list(_parts(form.images(*args), args))
    return _Check(_tensors(results), plain, form.exact or plain, parts).fault()


class _Check:
    """Results of a call, with the arguments of plain PyTorch for some images after others."""

    def __init__(
        self, results: list[Tensor], plain: Callable[..., Any], exact: Callable[..., Any], parts: list[_Part]
    ) -> None:
        self.results, self.plain, self.exact, self.parts = results, plain, exact, parts

    def fault(self) -> str | None:
        """Return what is wrong, or None."""
        drawn: list[list[float]] = []
        for i, (result, norms) in enumerate(zip(self.results, self._norms([nullcontext()]), strict=True)):
            error, usual, size = norms
            most = allowed(result.dtype, size, result.numel(), usual)
            if not error <= most:
                drawn = drawn or self._norms([RandomRounding(seed) for seed in range(DRAWS)])
                _, *errors, _ = drawn[i]
                most = allowed(result.dtype, size, result.numel(), usual, *chance(errors, result.numel()))
            if not error <= most:
                return (
                    f"result {i + 1} of {len(self.results)}: off by {error:.2e}, plain PyTorch by {usual:.2e}; "
                    f"{most:.2e} is allowed; its norm is {size:.2e}"
                )
        return None

    def _norms(self, contexts: Sequence[AbstractContextManager[Any]]) -> list[list[float]]:
        """Return for each result the norms of its error, of plain PyTorch's in each context, and of the exact one."""
        sums: dict[int, list[Tensor]] = {}
        squares: dict[int, Tensor] = {}
        for rows, arguments in self.parts:
            forms = []
            for context in contexts:
                with context:
                    forms.append(_tensors(self.plain(*arguments)))
            forms.append(_tensors(self.exact(*(_double(x) for x in arguments))))
            for i, (result, *found) in enumerate(zip(self.results, *forms, strict=True)):
                if len(self.parts) > 1 and result.shape[:1] != found[-1].shape[:1]:
                    part = _squares([result[rows], *found])
                    squares[i] = squares[i] + part if i in squares else part
                else:  # a sum over the images, or the result for all of them
                    before = sums.get(i, [torch.zeros_like(x, dtype=torch.float64) for x in found])
                    sums[i] = [a + b for a, b in zip(before, found, strict=True)]
        squares |= {i: _squares([self.results[i], *found]) for i, found in sums.items()}
        return [[math.sqrt(x) for x in squares[i].tolist()] for i in range(len(self.results))]


def _squares(forms: list[Tensor]) -> Tensor:
    """Return the squared errors of `forms` but the last, the exact one, and its squared norm.

    Where plain PyTorch, the second, is not finite there is nothing to compare with. The exact form of a result that is
    not needed is empty; the others may be anything.
    """
    *others, exact = forms
    if exact.numel() == 0:
        return exact.new_zeros(len(forms))
    if any(x.shape != exact.shape for x in others):
        return exact.new_full((len(forms),), math.inf)
    valid = forms[1].isfinite() & exact.isfinite()
    errors = [x.double() - exact for x in others]
    return torch.stack([x.where(valid, 0.0).square().sum() for x in (*errors, exact)])


def _parts(images: Sequence[int], args: tuple[Any, ...]) -> Iterator[_Part]:
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
    if isinstance(x, torch.dtype):  # of a result
        return torch.float64
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
