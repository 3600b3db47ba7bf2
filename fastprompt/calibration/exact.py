"""Calls that are checked before they are timed: their results against float64, by the project's rule for numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprompt.ops.rounding import DRAWS, RandomRounding, allowed, chance

Inputs = dict[str, Tensor]
Results = Mapping[str, Tensor]
Context = Callable[[], AbstractContextManager[Any]]


class Wrong(ArithmeticError):
    """Results that err by more than rounding explains; the message names the first."""


def check(got: Results, plain: Results, exact: Results, redraw: Callable[[], Results]) -> float:
    """Return the largest relative error of `got`, which may err about as much as `plain` PyTorch in the same dtype.

    The rule is that of :mod:`fastprompt.ops.rounding`; `redraw` runs plain PyTorch again, for its random roundings.

    Raises:
        Wrong: a result is missing, not finite, or errs by more.
    """
    if got.keys() != exact.keys():
        raise Wrong(f"results {sorted(got)}, not {sorted(exact)}")
    draws: list[Results] = []
    worst = 0.0
    for name, want in exact.items():
        error, size, usual = (_norm(x) for x in (got[name] - want, want, plain[name] - want))
        rule = partial(allowed, plain[name].dtype, size, want.numel(), usual)
        most = rule()
        if not error <= most:
            if not draws:
                for seed in range(DRAWS):
                    with RandomRounding(seed):
                        draws.append(redraw())
            most = rule(*chance([_norm(drawn[name] - want) for drawn in draws], want.numel()))
        if not error <= most:
            raise Wrong(f"{name} is off by {error:.1e}; {most:.1e} is allowed; its norm is {size:.1e}")
        worst = max(worst, error / size if size else 0.0)
    return worst


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item()


@dataclass
class Trial:
    """A differentiable call with its inputs and its definition.

    Attributes:
        run: the call, by the kernel in question; returns a tensor or several.
        plain: the same by PyTorch's operators, in the inputs' dtype.
        reference: its specification, for float64.
        inputs: by name; those of `frozen` get no gradient.
        per_image: the inputs whose first dimension is the images'. A check reads few images only.
    """

    run: Callable[..., Any]
    plain: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Inputs
    frozen: tuple[str, ...] = ()
    per_image: tuple[str, ...] = ()
    cotangents: list[Tensor] = field(default_factory=list)

    CHECKED = 4  # images: float64 on a GPU is slow and large

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.cotangents = [torch.randn_like(x) for x in _outputs(self.plain(**self.inputs))]

    def forward(self) -> None:
        """Run the forward alone."""
        with torch.no_grad():
            self.run(**self.inputs)

    def both(self) -> None:
        """Run forward and backward."""
        self._evaluate(self.run, self.inputs, self.cotangents, nullcontext)

    def check(self, backward: bool = True, backward_in: Context = nullcontext) -> float:
        """Return the largest relative error over the first images, of outputs, and of gradients if `backward`.

        The call gets all images. Those that are not checked have no part in the gradients, since theirs is zero.
        `backward_in` makes the context in which the call's backward runs.

        Raises:
            Wrong: it errs by more than rounding explains, see :func:`check`.
        """
        few = {n: x[: self.CHECKED] if n in self.per_image else x for n, x in self.inputs.items()}
        wide = {n: x.double() if x.is_floating_point() else x for n, x in few.items()}
        given, padded = [], []
        for cotangent in self.cotangents if backward else ():
            whole = torch.zeros_like(cotangent)
            whole[: self.CHECKED] = cotangent[: self.CHECKED]
            given.append(cotangent[: self.CHECKED])
            padded.append(whole)
        exact = self._evaluate(self.reference, wide, [x.double() for x in given], nullcontext)
        plain = self._evaluate(self.plain, few, given, nullcontext)
        got = self._evaluate(self.run, self.inputs, padded, backward_in)
        for name in got:
            if name.startswith("output") or name.removeprefix("gradient of ") in self.per_image:
                got[name] = got[name][: self.CHECKED]
        return check(got, plain, exact, lambda: self._evaluate(self.plain, few, given, nullcontext))

    def _evaluate(
        self, function: Callable[..., Any], inputs: Inputs, cotangents: list[Tensor], backward_in: Context
    ) -> dict[str, Tensor]:
        """Return the outputs, and with `cotangents` the gradients."""
        leaves = {
            n: x.detach().requires_grad_(x.is_floating_point() and n not in self.frozen)
            for n, x in inputs.items()
        }
        with torch.set_grad_enabled(bool(cotangents)):
            outs = _outputs(function(**leaves))
        found = {f"output {i}": out.detach() for i, out in enumerate(outs)}
        if cotangents:
            sources = {n: x for n, x in leaves.items() if x.requires_grad}
            weights = [w.to(out) for w, out in zip(cotangents, outs, strict=True)]
            with backward_in():
                gradients = torch.autograd.grad(outs, list(sources.values()), weights)
            found |= {f"gradient of {n}": g for n, g in zip(sources, gradients, strict=True)}
        return found


def _outputs(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [x for x in out if x is not None]


# What torch and Triton say of an error that outlives the call.
_LOST = ("CUDA error", "Triton Error [CUDA]: an illegal", "Triton Error [CUDA]: unspecified launch failure")


def is_lost(error: BaseException | str) -> bool:
    """Return whether nothing works on the device in this process after `error`, or after an error with this text."""
    return any(sign in str(error) for sign in _LOST)


def first_line(error: BaseException) -> str:
    """Return the kind and the first line of an error, cut to a length that fits a table."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
