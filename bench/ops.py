"""The comparisons of single operations: inputs, competitors, the correctness gate, and rows of times.

A case names its competitors: the package on each backend that has a kernel, and what it is measured against. Every
competitor's output and gradients are compared with float64 first; one that fails, or cannot serve the call, becomes a
note instead of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import baselines, measure, roofline
from fastprompt import ops
from fastprompt.ops import dispatch

Inputs = dict[str, Tensor]
Function = Callable[..., Any]

FORWARD, BOTH = "forward", "forward+backward"
ROUNDINGS = 64 * torch.finfo(torch.float32).eps


class WrongResult(Exception):
    """A competitor's numbers are off by more than rounding."""


@dataclass
class Case:
    """One operation at one shape.

    Attributes:
        shape: named sizes, as they stand in the rows.
        draw: makes one set of inputs.
        exact: the definition in plain PyTorch; in float64 the yardstick, in the inputs' dtype the measure of rounding.
        ours, others: competitors by name, called with the inputs by name.
        work, work_backward: bytes and operations of a forward and of a backward.
        frozen: inputs that do not train.
        spread: for a one-element input, a shape to which `exact` takes it expanded. The error of one number is as
            often zero as large; those of the many terms whose sum it is say how large it may be.
    """

    suite: str
    shape: dict[str, Any]
    dtype: torch.dtype
    draw: Callable[[], Inputs]
    exact: Function
    ours: dict[str, Function]
    others: dict[str, Function]
    work: roofline.Work
    work_backward: roofline.Work
    frozen: tuple[str, ...] = ()
    spread: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """ "prompt_attention B=128 N=197 P=10 ..."."""
        return " ".join([self.suite, *(f"{k}={v}" for k, v in self.shape.items())])


def backends(operation: str, device: str) -> list[str]:
    """The backends with a kernel for `operation` in this process that are made for `device`.

    Triton's interpreter is left out: it proves indexing on a CPU, slowly, which is the tests' business.
    """
    elsewhere = ("cpu",) if device.startswith("cuda") else ("triton", "cuda")
    table = dispatch.backends()
    return [b.name for b in table if b.available and operation in b.operations and b.name not in elsewhere]


# The gate -----------------------------------------------------------------------------------------------------------


def evaluate(
    case: Case, function: Function, inputs: Inputs, mode: str, cotangents: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Outputs of `function(**inputs)`, and with mode "forward+backward" the gradient of each input that trains."""
    if mode == FORWARD:
        with torch.no_grad():
            return {f"output {i}": out for i, out in enumerate(_tuple(function(**inputs)))}
    leaves = {
        name: x.detach().requires_grad_(x.is_floating_point() and name not in case.frozen)
        for name, x in inputs.items()
    }
    outs = _tuple(function(**leaves))
    wanted = {name: x for name, x in leaves.items() if x.requires_grad and x.numel()}
    weights = [w.to(out) for w, out in zip(cotangents, outs, strict=True)]
    gradients = torch.autograd.grad(outs, list(wanted.values()), weights)
    results = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    return {**results, **{f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}}


def gate(case: Case, mode: str) -> dict[str, float]:
    """The error of every competitor that computes `case`; the others are left out, with a note on the case."""
    judge = Judge(case, mode)
    errors: dict[str, float] = {}
    for name, function in {**case.ours, **case.others}.items():
        try:
            errors[name] = judge(function)
        except Exception as error:  # whatever a competitor does, the others are still measured
            case.notes.append(f"{case.name}, {mode}: {name}: {type(error).__name__}: {first_line(error)}")
    return errors


class Judge:
    """Compares a competitor's results on fresh inputs of a case with float64, and with plain PyTorch's errors."""

    def __init__(self, case: Case, mode: str) -> None:
        self.case, self.mode = case, mode
        self.inputs = case.draw()
        with torch.no_grad():
            outs = _tuple(case.exact(**self.inputs))
        self.cotangents = _cotangents(outs)
        self.exact = self._exact(self.inputs, wide=True)
        plain = self._exact(self.inputs, wide=False)
        self.usual = {name: _distance(plain[name], want) for name, want in self.exact.items()}
        for source, shape in case.spread.items() if mode == BOTH else ():
            spread = {**self.inputs, source: self.inputs[source].expand(shape).clone()}
            name = f"gradient of {source}"
            terms = self._exact(spread, wide=False)[name], self._exact(spread, wide=True)[name]
            self.usual[name] += 2 * _distance(*terms) + ROUNDINGS * math.sqrt(terms[0].numel())

    def _exact(self, inputs: Inputs, wide: bool) -> dict[str, Tensor]:
        if wide:
            inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
        return evaluate(self.case, self.case.exact, inputs, self.mode, self.cotangents)

    def __call__(self, function: Function) -> float:
        """The largest relative error of any result of `function`.

        Raises WrongResult unless each errs at most twice as much as plain PyTorch in the same dtype, plus a rounding.
        """
        return self.check(evaluate(self.case, function, self.inputs, self.mode, self.cotangents))

    def check(self, got: Mapping[str, Tensor]) -> float:
        """As a call, for results that are there already."""
        if got.keys() != self.exact.keys():
            raise WrongResult(f"results {sorted(got)}, not {sorted(self.exact)}")
        worst = 0.0
        for name, want in self.exact.items():
            have = got[name]
            if have.shape != want.shape:
                raise WrongResult(f"{name}: shape {tuple(have.shape)}, not {tuple(want.shape)}")
            error, size = _distance(have, want), want.norm().item()
            slack = ROUNDINGS * math.sqrt(max(want.numel(), 1))
            if not error <= 2 * self.usual[name] + torch.finfo(have.dtype).eps * size + slack:
                raise WrongResult(
                    f"{name}: off by {error:.2e}, plain PyTorch by {self.usual[name]:.2e}, of {size:.2e}"
                )
            if size > slack:
                worst = max(worst, error / size)
        return worst


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).norm().item()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to a length that fits a report."""
    return (str(error).strip().splitlines() or [""])[0][:200]


# Rows -----------------------------------------------------------------------------------------------------------------


def steps(case: Case, mode: str, names: Sequence[str], device: str) -> dict[str, list[measure.Step]]:
    """For each competitor one step for each set of inputs; the sets are common to all."""
    first = case.draw()
    count = measure.input_sets(sum(x.numel() * x.element_size() for x in first.values()), device)
    sets = [first, *(case.draw() for _ in range(count - 1))]
    with torch.no_grad():
        weights = [_cotangents(_tuple(case.exact(**inputs))) for inputs in sets]
    functions = {**case.ours, **case.others}
    return {
        name: [
            partial(evaluate, case, functions[name], i, mode, w) for i, w in zip(sets, weights, strict=True)
        ]
        for name in names
    }


def rows(case: Case, mode: str, rounds: int, device: str) -> list[measure.Row]:
    """Gate, then time every competitor of `case` in turn."""
    torch._dynamo.reset()  # compiled competitors of other shapes count against the limit of recompilations
    errors = gate(case, mode)
    if not errors:
        return []
    times = measure.interleaved(steps(case, mode, list(errors), device), rounds, device)
    work = [case.work] if mode == FORWARD else [case.work, case.work_backward]
    floor = sum(w.floor_us() for w in work)
    moved = sum(w.bytes for w in work)
    metrics = {
        name: {
            "GB/s": round(moved / t["p50"] / 1e6, 1),
            "TFLOP/s": round(sum(w.operations for w in work) / t["p50"] / 1e9, 1),
        }
        for name, t in times.items()
    }
    if device.startswith("cuda"):
        for name, t in times.items():
            metrics[name].update({"floor_us": round(floor, 2), "of_floor": round(floor / 1e3 / t["p50"], 4)})
    return measure.compare(
        times,
        case.ours,
        errors,
        metrics,
        measure.machine(device),
        suite=case.suite,
        mode=mode,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        rounds=rounds,
    )


# Cases ----------------------------------------------------------------------------------------------------------------


def attention_case(
    B: int,
    N: int,
    P: int,
    H: int,
    d: int,
    dtype: torch.dtype,
    device: str,
    others: Sequence[str] = (),
    *,
    kind: str = "shared",
    temperature: bool = False,
) -> Case:
    """Prompt attention over views of a packed qkv.

    `others`: names in `ATTENTION`, for shared prompts without a temperature. `kind`: "shared" prompts [P, H, d],
    "per image" [B, P, H, d], or a "table" [B + 1, P, H, d] with an index.
    """
    lead = {"shared": (), "per image": (B,), "table": (B + 1,)}[kind]

    def draw() -> Inputs:
        q, k, v = torch.randn(B, N, 3, H, d, device=device, dtype=dtype).unbind(2)
        inputs = {"q": q, "k": k, "v": v}
        if P:
            for name in ("prompt_k", "prompt_v"):
                inputs[name] = torch.randn(*lead, P, H, d, device=device, dtype=dtype)
            if kind == "table":
                inputs["prompt_index"] = torch.randint(0, B + 1, (B,), device=device)
        if temperature:
            inputs["temperature"] = 0.5 + torch.rand(1, device=device)
        return inputs

    def exact(prompt_index: Tensor | None = None, **inputs: Tensor) -> Tensor:
        if prompt_index is not None:
            inputs = {n: x[prompt_index] if n.startswith("prompt") else x for n, x in inputs.items()}
        return baselines.products(**inputs)

    return Case(
        "prompt_attention",
        {"B": B, "N": N, "P": P, "H": H, "d": d, **({} if kind == "shared" else {"prompts": kind})},
        dtype,
        draw,
        exact,
        {
            f"fastprompt {name}": partial(ops.prompt_attention, backend=name)
            for name in backends("prompt_attention", device)
        },
        {name: ATTENTION[name]() for name in others},
        roofline.attention(B, N, P, H, d, itemsize=dtype.itemsize),
        roofline.attention_backward(B, N, P, H, d, itemsize=dtype.itemsize),
        spread={"temperature": (B, H, N, 1)} if temperature else {},
    )


def packed_case(
    B: int, N: int, P: int, H: int, d: int, dtype: torch.dtype, device: str, others: Sequence[str] = ()
) -> Case:
    """The same of one tensor, qkv [B, N, 3, H, d], as a block has it: its gradient is one tensor too."""
    apart = attention_case(B, N, P, H, d, dtype, device, others)

    def draw() -> Inputs:
        inputs = {"qkv": torch.randn(B, N, 3, H, d, device=device, dtype=dtype)}
        if P:
            inputs.update(
                (n, torch.randn(P, H, d, device=device, dtype=dtype)) for n in ("prompt_k", "prompt_v")
            )
        return inputs

    def unpacked(function: Function) -> Function:
        return lambda qkv, **prompts: function(**dict(zip("qkv", qkv.unbind(2), strict=True)), **prompts)

    return replace(
        apart,
        suite="packed_prompt_attention",
        draw=draw,
        exact=unpacked(apart.exact),
        ours={
            f"fastprompt {name}": partial(ops.packed_prompt_attention, backend=name)
            for name in backends("packed_prompt_attention", device)
        },
        others={name: unpacked(function) for name, function in apart.others.items()},
    )


ATTENTION: dict[str, Callable[[], Function]] = {
    **{f"sdpa {name}": partial(baselines.sdpa, name) for name in baselines.SDPA},
    "flex": partial(baselines.flex, compiled=True),
    "flex, not compiled": partial(baselines.flex, compiled=False),
    "products": lambda: baselines.products,
}


def blend_case(B: int, N: int, P: int, D: int, dtype: torch.dtype, device: str) -> Case:
    """Gated residual add; `N` counts the prompts."""

    def draw() -> Inputs:
        x, delta, prompts = (torch.randn(B, n, D, device=device, dtype=dtype) for n in (N, N, P))
        return {
            "x": x,
            "delta": delta,
            "prompt_in": prompts,
            "gate": torch.rand((), device=device, dtype=dtype),
        }

    def blend(backend: str, x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor) -> Tensor:
        return ops.gated_blend(x, delta, prompt_in, gate, 1, P, backend=backend)[0]

    plain = partial(baselines.blend, start=1)
    return Case(
        "gated_blend",
        {"B": B, "N": N, "P": P, "D": D},
        dtype,
        draw,
        plain,
        {f"fastprompt {name}": partial(blend, name) for name in backends("gated_blend", device)},
        {"eager": plain, **_compiled(plain, device)},
        roofline.gated_blend(B, N, P, D, itemsize=dtype.itemsize),
        roofline.gated_blend_backward(B, N, P, D, itemsize=dtype.itemsize),
        spread={"gate": (B, P, D)},
    )


def blend_norm_case(B: int, N: int, P: int, D: int, dtype: torch.dtype, device: str) -> Case:
    """Gated residual add and the next LayerNorm; `N` counts the prompts."""

    def draw() -> Inputs:
        x, delta, prompts = (torch.randn(B, n, D, device=device, dtype=dtype) for n in (N, N, P))
        weight, bias = (torch.randn(D, device=device, dtype=dtype) for _ in range(2))
        gate = torch.rand((), device=device, dtype=dtype)
        return {"x": x, "delta": delta, "prompt_in": prompts, "gate": gate, "weight": weight, "bias": bias}

    def ours(
        backend: str, x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, weight: Tensor, bias: Tensor
    ) -> Any:
        return ops.gated_blend(
            x, delta, prompt_in, gate, 1, P, norm=ops.Norm(weight, bias, 1e-6), backend=backend
        )

    plain = partial(baselines.blend_norm, start=1)
    return Case(
        "gated_blend_norm",
        {"B": B, "N": N, "P": P, "D": D},
        dtype,
        draw,
        plain,
        {
            f"fastprompt {name}": partial(ours, name)
            for name in backends("gated_blend", device)
            if name != "cpu"
        },
        {"eager": plain, **_compiled(plain, device)},
        roofline.gated_blend_norm(B, N, P, D, itemsize=dtype.itemsize),
        roofline.gated_blend_norm_backward(B, N, P, D, itemsize=dtype.itemsize),
        frozen=("weight", "bias"),
        spread={"gate": (B, P, D)},
    )


def folded_case(B: int, N: int, P: int, H: int, D: int, dtype: torch.dtype, device: str) -> Case:
    """CVPT's folded cross-attention with its residual add against the same by products, eager and compiled."""

    def draw() -> Inputs:
        x = torch.randn(B, N, D, device=device)
        key, value = (torch.randn(H, P, D, device=device) * D**-0.5 for _ in range(2))
        bias, out_bias = torch.randn(H, P, device=device), torch.randn(D, device=device)
        named = {"x": x, "key": key, "bias": bias, "value": value, "out_bias": out_bias}
        return {name: t.to(dtype) for name, t in named.items()}

    def ours(backend: str, x: Tensor, **prompts: Tensor) -> Tensor:
        return ops.folded_cross_attention(x, ops.FoldedPrompts(**prompts), residual=True, backend=backend)[0]

    return Case(
        "folded_cross_attention",
        {"B": B, "N": N, "P": P, "H": H, "D": D},
        dtype,
        draw,
        baselines.folded,
        {f"fastprompt {name}": partial(ours, name) for name in backends("folded_cross_attention", device)},
        {"eager": baselines.folded, **_compiled(baselines.folded, device)},
        roofline.folded(B, N, P, H, D, itemsize=dtype.itemsize),
        roofline.folded_backward(B, N, P, H, D, itemsize=dtype.itemsize),
        frozen=("out_bias",),
    )


def folded_norm_case(B: int, N: int, P: int, H: int, D: int, dtype: torch.dtype, device: str) -> Case:
    """The same and the LayerNorm that follows."""
    alone = folded_case(B, N, P, H, D, dtype, device)

    def draw() -> Inputs:
        weight, norm_bias = (torch.randn(D, device=device).to(dtype) for _ in range(2))
        return {**alone.draw(), "weight": weight, "norm_bias": norm_bias}

    def ours(backend: str, x: Tensor, weight: Tensor, norm_bias: Tensor, **prompts: Tensor) -> Any:
        folded = ops.FoldedPrompts(**prompts)
        norm = ops.Norm(weight, norm_bias, 1e-6)
        return ops.folded_cross_attention(x, folded, residual=True, norm=norm, backend=backend)

    name = "folded_cross_attention_norm"
    norm = roofline.gated_blend_norm_backward(B, N, 0, D, itemsize=dtype.itemsize)
    return replace(
        alone,
        suite=name,
        draw=draw,
        exact=baselines.folded_norm,
        ours={f"fastprompt {backend}": partial(ours, backend) for backend in backends(alone.suite, device)},
        others={"eager": baselines.folded_norm, **_compiled(baselines.folded_norm, device)},
        work=roofline.folded_norm(B, N, P, H, D, itemsize=dtype.itemsize),
        work_backward=replace(alone.work_backward, bytes=alone.work_backward.bytes + norm.bytes),
        frozen=("out_bias", "weight", "norm_bias"),
    )


def row_case(B: int, N: int, H: int, D: int, dtype: torch.dtype, device: str) -> Case:
    """One query row over `N` rows, maps folded away, against keys and values made and SDPA."""

    def draw() -> Inputs:
        weights = {n: torch.randn(D, D, device=device) * D**-0.5 for n in ("k_weight", "v_weight")}
        biases = {n: torch.randn(D, device=device) for n in ("k_bias", "v_bias")}
        query, rows = torch.randn(B, 1, H, D // H, device=device), torch.randn(B, N, D, device=device)
        return {n: t.to(dtype) for n, t in {"query": query, "rows": rows, **weights, **biases}.items()}

    def ours(backend: str, query: Tensor, rows: Tensor, k_bias: Tensor, **maps: Tensor) -> Tensor:
        with dispatch.use_backend(backend):
            return ops.row_attention(query, rows, None, **maps)  # the keys' bias changes no softmax

    return Case(
        "row_attention",
        {"B": B, "N": N, "H": H, "D": D},
        dtype,
        draw,
        baselines.row,
        {f"fastprompt {name}": partial(ours, name) for name in backends("folded_row_attention", device)},
        {"keys and values, sdpa": baselines.row, **_compiled(baselines.row, device)},
        roofline.row_attention(B, N, 0, H, D, itemsize=dtype.itemsize),
        roofline.row_attention_backward(B, N, 0, H, D, itemsize=dtype.itemsize),
        frozen=("k_weight", "k_bias", "v_weight", "v_bias"),
    )


def _compiled(function: Function, device: str) -> dict[str, Function]:
    """The same by `torch.compile`, static shapes; on a GPU only, where it is worth its minutes."""
    return {"compiled": torch.compile(function, dynamic=False)} if device.startswith("cuda") else {}


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _cotangents(outs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn_like(out) for out in outs]
