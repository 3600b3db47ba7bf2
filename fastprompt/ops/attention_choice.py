"""The four ways to compute prompt attention, and the choice of one for each call.

All four are exact and differ in what reads the keys (docs/attention.md):

- ``resident``: a Triton kernel that holds all keys of one image and head in one program.
- ``looped``:   Triton kernels that loop over the keys.
- ``split``:    PyTorch's own fused kernel on the image's keys, then a small pass that adds the prompts' part.
- ``joined``:   the prompts' keys and values are copied behind the image's, then PyTorch's own fused kernel.

A call takes the first of :func:`ways` that can run it, and its backward, another call, chooses for itself: each way
leaves the same output and log-sum-exp. `FASTPROMPT_ATTENTION` and :func:`use_way` force one by name.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch

from fastprompt.ops import profile

Way = Literal["resident", "looped", "split", "joined"]
WAYS: tuple[Way, ...] = get_args(Way)
AUTO = "auto"

RESIDENT_KEYS = 256  # keys that one program can hold
FEW_QUERIES = 16  # the smallest tile of rows of a matrix product


class Call(NamedTuple):
    """What the choice depends on.

    Attributes:
        capability: of the GPU, such as (9, 0); None on a CPU.
        queries, keys, prompts: Nq, N and P.
        temperature: whether the scores are divided by one.
        backward: whether this is the backward; its choice does not bind it to the forward's.
        only_prompts: a backward in which only prompts need gradients, so that the image's keys are not read.
    """

    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    queries: int
    keys: int
    prompts: int
    temperature: bool = False
    backward: bool = False
    only_prompts: bool = False


def ways(call: Call, *, triton: bool = True) -> tuple[Way, ...]:
    """Return the ways to try for `call`, the preferred one first.

    Args:
        triton: whether Triton's kernels serve; without them `resident` and `looped` are plain matrix products, and the
            prompts' part of `split` is plain PyTorch.

    Raises:
        ValueError: `FASTPROMPT_ATTENTION` is no way.
    """
    name = forced()
    if name is not None:
        return (name,)
    order = _defaults_with_triton(call) if triton else _defaults_without_triton(call)
    # A GPU's times are those of its Triton kernels. With d(temperature), what counts is rounding, see below.
    followed = (triton or call.capability is None) and not (call.temperature and call.backward)
    fastest = profile.way(call) if followed else None
    return order if fastest is None else (fastest, *(way for way in order if way != fastest))


def forced() -> Way | None:
    """Return the way that is forced by name, or None.

    Raises:
        ValueError: `FASTPROMPT_ATTENTION` is no way.
    """
    _check(_request, "FASTPROMPT_ATTENTION")
    return None if _request == AUTO else _request  # type: ignore[return-value]


def requested() -> str:
    """Return the way that is requested by name, or "auto"."""
    return _request


@contextmanager
def use_way(name: str) -> Iterator[None]:
    """Compute every prompt attention inside the context by the way `name`; "auto" ends an outer one.

    Applies to the whole process, like `FASTPROMPT_ATTENTION`, because the backward runs in other threads.

    Raises:
        ValueError: `name` is not "auto" or one of `WAYS`.
    """
    global _request
    _check(name, "use_way")
    previous, _request = _request, name
    try:
        yield
    finally:
        _request = previous


def _check(name: str, caller: str) -> None:
    if name != AUTO and name not in WAYS:
        known = ", ".join(repr(n) for n in (AUTO, *WAYS))
        raise ValueError(f"`{caller}`: there is no way {name!r} to compute attention; choose one of {known}")


_request: str = os.environ.get("FASTPROMPT_ATTENTION", AUTO).strip().lower() or AUTO


# The defaults ---------------------------------------------------------------------------------------------------
#
# Reasoned, NOT MEASURED: no kernel of this project has run on a GPU yet. `fastprompt calibrate` measures a card, and
# its profile takes the place of these.


@functools.lru_cache(maxsize=1024)
def _defaults_with_triton(call: Call) -> tuple[Way, ...]:
    if call.prompts == 0 and not call.temperature:
        # There is nothing to join: PyTorch's own attention as it stands, the best kernel of that card.
        return ("joined", "resident", "looped", "split")
    if call.capability is None:
        # Triton's interpreter, which checks the kernels: the kernels that hold whole calls first.
        return ("resident", "looped", "split", "joined")
    if call.dtype == torch.float64 or call.capability < (8, 0):
        return _defaults_without_triton(call)  # Triton's kernels run neither
    if call.only_prompts:
        # Output and log-sum-exp are those of all keys, so the prompts' part alone gives the prompts' gradients.
        return ("split", "looped", "joined")
    if call.queries <= FEW_QUERIES:
        # Bound by one read of the keys. A vendor's tile of 64 or 128 rows is nearly all padding, and the prompts' part
        # would be a second launch of a few microseconds of work.
        return ("looped", "split", "joined")
    if call.dtype == torch.float32:
        # Our products are IEEE float32 outside the matrix units; the vendor's are several times as fast.
        return ("split", "joined", "looped")
    if _resident_fits(call):
        # One read of everything, no copy and no second pass, and registers and shared memory hold it.
        return ("resident", "split", "looped", "joined")
    if call.temperature and call.backward:
        # The vendors' d(score) subtracts a product of the rounded output, and d(temperature) multiplies that rounding
        # by the score; our kernels need not round.
        return ("looped", "split", "joined")
    # Many keys, wide heads, or a card for which the resident kernel is too large: the vendor's kernel is as fast as the
    # card allows, and the prompts' part reads q and the output once.
    return ("split", "looped", "joined")


def _resident_fits(call: Call) -> bool:
    hopper = call.capability is not None and call.capability[0] == 9
    return hopper and call.head_dim <= 64 and call.keys + call.prompts <= RESIDENT_KEYS


@functools.lru_cache(maxsize=1024)
def _defaults_without_triton(call: Call) -> tuple[Way, ...]:
    if call.capability is None:
        # Measured on CPUs (ops/prompt_ways.py): joining costs less than a second pass.
        return ("joined", "split", "resident", "looped")
    if call.queries <= FEW_QUERIES or call.only_prompts:
        # The prompts' part is as small as the queries, and the image's keys are not copied.
        return ("split", "joined")
    # In PyTorch the prompts' part of `split` keeps scores [B, H, Nq, P] and reads them some five times; joining reads
    # and writes the image's keys and values once.
    return ("joined", "split")
