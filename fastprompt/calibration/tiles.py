"""The entries of the kernels' tables that a model reaches, with the calls that reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprompt.calibration import timing
from fastprompt.calibration.attention import Shape
from fastprompt.calibration.exact import Inputs, Trial
from fastprompt.ops.attention_choice import AUTO, use_way
from fastprompt.ops.folded_cross_attention import (
    FoldedPrompts,
    folded_cross_attention,
    folded_cross_attention_reference,
)
from fastprompt.ops.gated_blend import gated_blend, gated_blend_reference
from fastprompt.ops.norm import Norm
from fastprompt.ops.packed_prompt_attention import packed_prompt_attention
from fastprompt.ops.profile_file import DTYPES, tables
from fastprompt.ops.prompt_attention import prompt_attention_reference
from fastprompt.ops.residual_norm import residual_norm, residual_norm_reference
from fastprompt.ops.row_attention import folded_row_attention, folded_row_attention_reference

EPS = 1e-6


@dataclass(frozen=True)
class Work:
    """A call of `operation` in a block of the attention `shape`, by Triton's kernels; `way` is of attention."""

    operation: str
    shape: Shape
    way: str = AUTO

    def __str__(self) -> str:
        return f"{self.operation} {self.shape}{'' if self.way == AUTO else f', {self.way}'}"

    def trial(self, device: str) -> Trial:
        """Return the call with random inputs."""
        return CALLS[self.operation](self, device)

    def check(self, trial: Trial) -> float:
        """Return the error of forward and backward of a :meth:`trial`; raises if they are wrong or cannot run."""
        with use_way(self.way):
            return trial.check(backward_in=partial(use_way, self.way))

    def step(self, device: str, backward: bool) -> timing.Step:
        """Return the forward, or forward and backward, on new inputs."""
        trial = self.trial(device)

        def run() -> None:
            with use_way(self.way):
                trial.both() if backward else trial.forward()

        return run


def _attention(work: Work, device: str) -> Trial:
    run, plain = (partial(packed_prompt_attention, backend=backend) for backend in ("triton", "eager"))

    def reference(qkv: Tensor, **rest: Any) -> Tensor:
        return prompt_attention_reference(*qkv.unbind(2), **rest)

    def by_default(**inputs: Any) -> Tensor:
        with use_way(AUTO):
            return plain(**inputs)

    return Trial(run, by_default, reference, work.shape.draw(device), per_image=("qkv",))


def _blend(work: Work, device: str) -> Trial:
    shape = work.shape
    B, N, P, D = shape.batch, shape.tokens + shape.prompts, shape.prompts, shape.heads * shape.head_dim
    dtype = DTYPES[shape.dtype]
    inputs: Inputs = {n: _randn(B, N, D, dtype=dtype, device=device) for n in ("x", "delta")}
    inputs["prompt_in"] = _randn(B, P, D, dtype=dtype, device=device)
    inputs["gate"] = torch.rand((), device=device).to(dtype)
    inputs |= {n: _randn(D, dtype=dtype, device=device) for n in ("weight", "bias")}

    def call(function: Callable[..., Any], weight: Tensor, bias: Tensor, **rest: Tensor) -> Any:
        return function(**rest, start=1, length=P, norm=Norm(weight, bias, EPS))

    triton, eager = (partial(gated_blend, backend=backend) for backend in ("triton", "eager"))
    run, plain, reference = (partial(call, f) for f in (triton, eager, gated_blend_reference))
    return Trial(run, plain, reference, inputs, ("weight", "bias"), ("x", "delta", "prompt_in"))


def _residual(work: Work, device: str) -> Trial:
    shape = work.shape
    B, N, D = shape.batch, shape.tokens + shape.prompts, shape.heads * shape.head_dim
    dtype = DTYPES[shape.dtype]
    inputs: Inputs = {n: _randn(B, N, D, dtype=dtype, device=device) for n in ("x", "delta")}
    inputs |= {n: _randn(D, dtype=dtype, device=device) for n in ("weight", "bias")}

    def call(function: Callable[..., Any], x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return function(x, delta, None, Norm(weight, bias, EPS))

    triton, eager = (partial(residual_norm, backend=backend) for backend in ("triton", "eager"))
    run, plain, reference = (partial(call, f) for f in (triton, eager, residual_norm_reference))
    return Trial(run, plain, reference, inputs, ("weight", "bias"), ("x", "delta"))


def _folded(work: Work, device: str) -> Trial:
    shape = work.shape
    B, N, P, H, D = shape.batch, shape.tokens, shape.prompts, shape.heads, shape.heads * shape.head_dim
    drawn = {
        "x": _randn(B, N, D, device=device),
        "key": _randn(H, P, D, device=device) * D**-0.5,
        "bias": _randn(H, P, device=device),
        "value": _randn(H, P, D, device=device) * D**-0.5,
        "out_bias": _randn(D, device=device),
        "weight": _randn(D, device=device),
        "norm_bias": _randn(D, device=device),
    }

    def call(
        function: Callable[..., Any], x: Tensor, weight: Tensor, norm_bias: Tensor, **prompts: Tensor
    ) -> Any:
        return function(x, FoldedPrompts(**prompts), residual=True, norm=Norm(weight, norm_bias, EPS))

    triton, eager = (partial(folded_cross_attention, backend=backend) for backend in ("triton", "eager"))
    run, plain, reference = (partial(call, f) for f in (triton, eager, folded_cross_attention_reference))
    inputs = {n: x.to(DTYPES[shape.dtype]) for n, x in drawn.items()}
    return Trial(run, plain, reference, inputs, ("out_bias", "weight", "norm_bias"), ("x",))


def _row(work: Work, device: str) -> Trial:
    shape = work.shape
    B, N, H, D = shape.batch, shape.tokens + shape.prompts, shape.heads, shape.heads * shape.head_dim
    dtype = DTYPES[shape.dtype]
    query = _randn(B, H, D, device=device).to(dtype) * D**-0.5
    inputs = {"query": query, "rows": _randn(B, N, D, dtype=dtype, device=device)}
    triton, eager = (partial(folded_row_attention, backend=backend) for backend in ("triton", "eager"))
    return Trial(triton, eager, folded_row_attention_reference, inputs, (), ("query", "rows"))


def _randn(*sizes: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes, device=device, dtype=dtype)


CALLS: dict[str, Callable[[Work, str], Trial]] = {
    "prompt_attention": _attention,
    "residual_norm": _residual,
    "gated_blend": _blend,
    "folded_cross_attention": _folded,
    "row_attention": _row,
}


# Which entries a call reads -----------------------------------------------------------------------------------------


def entries(work: Work, device: str) -> list[tuple[str, Any]]:
    """Return the tables' entries that forward and backward of `work` read: the table's name and the key."""
    step = work.step(device, backward=True)
    with reads() as found:
        step()
    return list(found)


@contextmanager
def reads() -> Iterator[dict[tuple[str, Any], None]]:
    """Yield the entries of all tables that are read inside, in order."""
    found: dict[tuple[str, Any], None] = {}

    class Watched(dict[Any, Any]):
        def __init__(self, name: str, entries: dict[Any, Any]) -> None:
            super().__init__(entries)
            self.name = name

        def __getitem__(self, key: Any) -> Any:
            found[self.name, key] = None
            return super().__getitem__(key)

    modules: list[tuple[str, Any]] = list(tables())
    before = [module.TABLE for _, module in modules]
    for name, module in modules:
        module.TABLE = Watched(name, module.TABLE)
    try:
        yield found
    finally:
        for (_, module), table in zip(modules, before, strict=True):
            module.TABLE = table
