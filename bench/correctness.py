"""The one rule by which tests and benchmarks judge numbers: nobody sets a tolerance.

In float64, two ways to the same numbers agree up to its rounding (:func:`assert_same`). In any other dtype, what counts
is the error against float64 over the whole tensor (2-norm), and plain PyTorch ("eager": matmul, softmax, add) in the
same dtype on the same inputs is the measure (:func:`assert_as_exact`, :class:`Oracle`):

    error <= 2 · max(eager's error, E) + 6 · S + one rounding of the result

E and S are the root mean square and the spread of eager's error when every intermediate result is rounded once more, at
random. They say what one run of eager cannot: the error of a single number is as often near zero as large, and a sum
that cancels has the errors of its terms, however small it is. They are only computed when the rest does not suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastprompt.ops.rounding import DRAWS, RandomRounding, allowed, chance

Inputs: TypeAlias = Mapping[str, Tensor | None]
Results: TypeAlias = Tensor | Mapping[str, Any] | Sequence[Any] | None
Function: TypeAlias = Callable[..., Any]

# float64 holds 53 bits. Orders of summation may differ in the last 17 of a tensor's own size, or, for sums that cancel
# to nothing, in the last 13 of the largest tensor that is compared with it.
SAME, SAME_AS_LARGEST = 2.0**-36, 2.0**-40


class WrongResult(AssertionError):
    """A result is missing, has a wrong shape or dtype, or is off by more than rounding."""


def assert_same(got: Results, want: Results) -> None:
    """Check that float64 tensors, or structures of them, are equal up to rounding.

    Raises:
        TypeError: a tensor is not float64. Compare other dtypes with :func:`assert_as_exact` or `torch.equal`.
        WrongResult: the first tensor that is missing or differs, by name.
    """
    pairs = _pairs(got, want)
    for name, (a, b) in pairs.items():
        if a.dtype != torch.float64 or b.dtype != torch.float64:
            raise TypeError(
                f"`assert_same`: {name} must be float64; got {a.dtype} and {b.dtype}; compute in float64, or use "
                "`assert_as_exact`"
            )
    largest = max((_norm(b) / math.sqrt(b.numel()) for _, b in pairs.values() if b.numel()), default=0.0)
    for name, (a, b) in pairs.items():
        error, size = _norm(a - b), _norm(b)
        allowed = SAME * size + SAME_AS_LARGEST * largest * math.sqrt(b.numel())
        if not error <= allowed:
            raise WrongResult(f"{name}: off by {error:.2e}; {allowed:.2e} is allowed; its norm is {size:.2e}")


def assert_as_exact(got: Results, plain: Results, exact: Results) -> None:
    """Check that `got` is about as close to `exact` as `plain` is, by the rule above.

    E is taken from the relative error of all tensors given. Sums that cancel need an :class:`Oracle`, which can run
    plain PyTorch again.

    Args:
        got: tensors, or structures of them.
        plain: the same from plain PyTorch in the same dtype.
        exact: the same in float64.

    Raises:
        TypeError: `exact` is not float64.
        WrongResult: the first tensor that is missing, has a wrong shape or dtype, or errs too much, by name.
    """
    _Yardstick(plain, exact).check(got)


def evaluate(
    function: Function,
    inputs: Inputs,
    cotangents: Tensor | Sequence[Tensor] | None,
    trainable: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Return the outputs of `function(**inputs)` and the gradients of its inputs, by name.

    Args:
        cotangents: the gradient of each output; None for a forward alone.
        trainable: the inputs that get a gradient; default all floating-point ones.

    Returns:
        "output", or "output 0", "output 1", ... of several that are not None; and "gradient of NAME" for each input.
    """
    if cotangents is None:
        with torch.no_grad():
            return _outputs(function(**inputs))
    leaves = {  # detach() keeps the strides
        name: x.detach().requires_grad_(trainable is None or name in trainable)
        if x is not None and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }
    results = _outputs(function(**leaves))
    sources = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    gradients: Sequence[Tensor | None] = [None] * len(sources)
    if sources:
        given = [cotangents] if isinstance(cotangents, Tensor) else cotangents
        weights = [w.to(out) for w, out in zip(given, results.values(), strict=True)]
        gradients = torch.autograd.grad(
            list(results.values()), list(sources.values()), weights, allow_unused=True
        )
    results = {name: out.detach() for name, out in results.items()}
    for (name, x), gradient in zip(sources.items(), gradients, strict=True):
        if gradient is None and x.numel():
            raise WrongResult(f"no gradient of {name}")
        results[f"gradient of {name}"] = torch.zeros_like(x) if gradient is None else gradient
    return results


class Oracle:
    """The exact outputs and gradients for one set of inputs, against which many functions are checked.

    Attributes:
        inputs: what each function is called with.
        cotangents: the gradient of each output; None for a forward alone.
        exact: the results of `exact` in float64, as :func:`evaluate` names them.

    Args:
        plain: the operation in plain PyTorch.
        inputs: tensors by name, in the dtype to be judged.
        exact: the operation to be evaluated in float64; default `plain`.
        trainable: the inputs that get a gradient; default all floating-point ones.
        backward: check gradients too.
        cotangents: default normally distributed ones.
    """

    def __init__(
        self,
        plain: Function,
        inputs: Inputs,
        *,
        exact: Function | None = None,
        trainable: Collection[str] | None = None,
        backward: bool = True,
        cotangents: Sequence[Tensor] | None = None,
    ) -> None:
        self.inputs, self.trainable = inputs, trainable
        if cotangents is None and backward:
            cotangents = [torch.randn_like(out) for out in evaluate(plain, inputs, None).values()]
        self.cotangents = cotangents if backward else None
        wide = {
            name: x.double() if x is not None and x.is_floating_point() else x for name, x in inputs.items()
        }
        self.exact = self.evaluate(plain if exact is None else exact, wide)
        self._yardstick = _Yardstick(self.evaluate(plain), self.exact, lambda: self.evaluate(plain))

    def evaluate(self, function: Function, given: Inputs | None = None) -> dict[str, Tensor]:
        """Return the results of `function` on the inputs, or on `given`: their values in other memory."""
        return evaluate(function, self.inputs if given is None else given, self.cotangents, self.trainable)

    def __call__(self, function: Function, given: Inputs | None = None) -> float:
        """Check `function` and return the largest relative error; raises WrongResult."""
        return self.check(self.evaluate(function, given))

    def check(self, got: Mapping[str, Tensor]) -> float:
        """Check results that are there already and return the largest relative error; raises WrongResult."""
        return self._yardstick.check(got)


class _Yardstick:
    """How much eager errs, and how much it might as well have erred."""

    def __init__(
        self, plain: Results, exact: Results, perturbed: Callable[[], Results] | None = None
    ) -> None:
        self.plain, self.exact, self.perturbed = _named(plain), _named(exact), perturbed
        pairs = _pairs(plain, exact)
        for name, (_, want) in pairs.items():
            if want.dtype != torch.float64:
                raise TypeError(f"`assert_as_exact`: the exact {name} must be float64; got {want.dtype}")
        self.usual = {name: _norm(x.double() - want) for name, (x, want) in pairs.items()}
        for name, error in self.usual.items():
            if not math.isfinite(error):
                raise ValueError(f"{name}: plain PyTorch gives NaN or infinity, which measures nothing")
        self._errors: dict[str, list[float]] = {}

    def check(self, got: Results) -> float:
        pairs = _pairs(got, self.exact)
        for name, (x, _) in pairs.items():
            if x.dtype != self.plain[name].dtype:
                raise WrongResult(f"{name}: dtype {x.dtype}, not {self.plain[name].dtype}")
        if all(x.dtype == torch.float64 for x, _ in pairs.values()):
            assert_same(got, self.exact)
            return 0.0
        worst = 0.0
        for name, (x, want) in pairs.items():
            if x.numel() == 0:
                continue
            error, size, usual = _norm(x.double() - want), _norm(want), self.usual[name]
            most = allowed(x.dtype, size, x.numel(), usual)
            if not error <= most:
                most = allowed(x.dtype, size, x.numel(), usual, *self._chance(name))
            if not error <= most:
                raise WrongResult(
                    f"{name}: off by {error:.2e}, plain PyTorch by {usual:.2e}; {most:.2e} is allowed; "
                    f"its norm is {size:.2e}"
                )
            if size > most:
                worst = max(worst, error / size)
        return worst

    def _chance(self, name: str) -> tuple[float, float]:
        """The root mean square of eager's error under random roundings, and its standard deviation."""
        want = self.exact[name]
        if self.perturbed is None:
            sizes = math.hypot(*(_norm(x) for x in self.exact.values()))
            typical = _norm(want) * math.hypot(*self.usual.values()) / sizes if sizes else 0.0
            return typical, typical / math.sqrt(want.numel())
        if not self._errors:
            self._errors = {name: [] for name in self.exact}
            for seed in range(DRAWS):
                with RandomRounding(seed):
                    drawn = self.perturbed()
                for key, (x, exact) in _pairs(drawn, self.exact).items():
                    self._errors[key].append(_norm(x.double() - exact))
        return chance(self._errors[name], want.numel())


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item()


def _pairs(got: Results, want: Results) -> dict[str, tuple[Tensor, Tensor]]:
    """Join both by name, with the same shapes."""
    a, b = _named(got), _named(want)
    if a.keys() != b.keys():
        raise WrongResult(f"results {sorted(a)}, not {sorted(b)}")
    for name, x in b.items():
        if a[name].shape != x.shape:
            raise WrongResult(f"{name}: shape {tuple(a[name].shape)}, not {tuple(x.shape)}")
    return {name: (a[name].detach(), x.detach()) for name, x in b.items()}


def _named(results: Results, name: str = "") -> dict[str, Tensor]:
    """Flatten a structure of tensors; None is left out."""
    if results is None:
        return {}
    if isinstance(results, Tensor):
        return {name or "result": results}
    items = results.items() if isinstance(results, Mapping) else enumerate(results)
    found: dict[str, Tensor] = {}
    for key, value in items:
        found.update(_named(value, f"{name}.{key}" if name else str(key)))
    return found


def _outputs(out: Any) -> dict[str, Tensor]:
    outs = [out] if isinstance(out, Tensor) else [x for x in out if x is not None]
    return {"output" if len(outs) == 1 else f"output {i}": x for i, x in enumerate(outs)}
