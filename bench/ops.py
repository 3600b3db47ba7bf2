"""Comparisons of single operations: what a case is, its check against float64, and its rows of times.

A case (`bench.cases`) names its competitors: the package on each backend that has a kernel, and what it is compared
with. Every competitor's output and gradients are checked first; one that is wrong, or does not support the call,
becomes a note instead of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.correctness import Oracle, evaluate
from bench.roofline import ViT, Work
from fastprompt.calibration import timing
from fastprompt.ops import dispatch

Inputs = dict[str, Tensor]
Function = Callable[..., Any]
Context = Callable[[], AbstractContextManager[Any]]

FORWARD, BOTH = "forward", "forward+backward"
DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by the bytes of an element


@dataclass
class Case:
    """One operation at one shape.

    Attributes:
        suite, shape: what the rows call it; the shape by named sizes.
        draw: makes one set of inputs.
        exact: the definition in plain PyTorch: in float64 the truth, in the inputs' dtype the measure of rounding.
        ours, others: competitors by name, called with the inputs by name.
        work: bytes and operations of a forward and of a backward.
        autotuned: competitors that search their tile sizes, which takes minutes; measured on request.
        frozen: inputs that do not train.
        contexts: what competitors are run in, forward and backward, by name.
        notes: why competitors have no row.
    """

    suite: str
    shape: dict[str, Any]
    dtype: torch.dtype
    draw: Callable[[], Inputs]
    exact: Function
    ours: dict[str, Function]
    others: dict[str, Function]
    work: tuple[Work, Work]
    autotuned: dict[str, Function] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    contexts: dict[str, Context] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """ "prompt_attention B=128 N=197 P=10 ..."."""
        return " ".join([self.suite, *(f"{k}={v}" for k, v in self.shape.items())])

    @property
    def competitors(self) -> dict[str, Function]:
        """All competitors."""
        return {**self.ours, **self.others, **self.autotuned}

    def context(self, name: str) -> AbstractContextManager[Any]:
        """Return what the competitor `name` is run in."""
        return self.contexts.get(name, nullcontext)()

    def trainable(self, inputs: Inputs) -> list[str]:
        """Return the names of the inputs that get a gradient."""
        return [n for n, x in inputs.items() if x.is_floating_point() and x.numel() and n not in self.frozen]

    def oracle(self, mode: str) -> Oracle:
        """Return the exact results for fresh inputs."""
        inputs = self.draw()
        return Oracle(self.exact, inputs, trainable=self.trainable(inputs), backward=mode == BOTH)


# A name and a launch on meta tensors.
Compilation = tuple[str, partial[Any]]


@dataclass(frozen=True)
class Size:
    """One block of a ViT: `B` images of `N` tokens without prompts, `H` heads, width `D`; and where and how."""

    B: int
    N: int
    H: int
    D: int
    dtype: torch.dtype
    device: str


def _nothing(device: str, tiny: bool) -> Iterator[Case]:
    return iter(())


@dataclass(frozen=True)
class Operation:
    """All that the measurements know of an operation.

    Attributes:
        cases: yields the comparisons at a size, the most important first.
        floors: returns the work of a forward and a backward for B images of a ViT with P prompts.
        reach: returns a case that an entry of the kernels' table serves, by the entry's key and the number of images:
            a usual one, or the widest.
        entries, variants: yield launches that compile each entry of the table, and those that make other code of it.
        timed_cases: returns the cases that judge an entry, if not the usual one that reaches it.
        sweep: yields shapes that are checked besides `cases`, on a device; tiny ones to try the program.
    """

    name: str
    cases: Callable[[Size], Iterator[Case]]
    floors: Callable[[int, ViT, int], tuple[Work, Work]]
    reach: Callable[[Any, int, bool], Case]
    entries: Callable[[], Iterator[Compilation]]
    variants: Callable[[], Iterator[Compilation]]
    sweep: Callable[[str, bool], Iterator[Case]] = _nothing
    timed_cases: Callable[[Any, int], list[Case]] | None = None

    def timed(self, key: Any, images: int) -> list[Case]:
        """Return the cases whose times together judge an entry of the table."""
        return [self.reach(key, images, False)] if self.timed_cases is None else self.timed_cases(key, images)


# Parts of a case -----------------------------------------------------------------------------------------------------


def backends(operation: str, device: str) -> list[str]:
    """Return the backends with a kernel for `operation` in this process that run on `device`.

    Triton's interpreter is left out: it checks indexing on a CPU, slowly, which the tests do.
    """
    elsewhere = ("cpu",) if device.startswith("cuda") else ("triton", "cuda")
    table = dispatch.backends()
    return [b.name for b in table if b.available and operation in b.operations and b.name not in elsewhere]


def ours(operation: str, device: str, on: Callable[[str], Function]) -> dict[str, Function]:
    """Return the package's competitors: `on(backend)` for each backend of `operation`."""
    return {f"fastprompt {name}": on(name) for name in backends(operation, device)}


def compiled(function: Function, device: str) -> dict[str, Function]:
    """Return `function` under `torch.compile` with static shapes; nothing on a CPU, where it takes too long."""
    return {"compiled": torch.compile(function, dynamic=False)} if device.startswith("cuda") else {}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without memory, to compile a launch."""
    return torch.empty(shape, dtype=dtype, device="meta")


# Correctness and times -----------------------------------------------------------------------------------------------


def check_correctness(case: Case, mode: str, names: Sequence[str]) -> dict[str, float]:
    """Return the error of each competitor in `names` that computes `case`; the others get a note on the case."""
    oracle = case.oracle(mode)
    errors: dict[str, float] = {}
    for name in names:
        try:
            with case.context(name):
                errors[name] = oracle(case.competitors[name])
        except Exception as error:  # whatever a competitor does, the others are still measured
            case.notes.append(f"{case.name}, {mode}: {name}: {type(error).__name__}: {first_line(error)}")
    return errors


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, cut to a length that fits a report."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def steps(case: Case, mode: str, names: Sequence[str], device: str) -> dict[str, list[timing.Step]]:
    """Return for each competitor one step for each set of inputs; the sets are common to all."""
    first = case.draw()
    count = timing.input_sets(sum(x.numel() * x.element_size() for x in first.values()), device)
    sets = []
    for inputs in (first, *(case.draw() for _ in range(count - 1))):
        outs = evaluate(case.exact, inputs, None).values()
        cotangents = [torch.randn_like(out) for out in outs] if mode == BOTH else None
        sets.append((inputs, cotangents, case.trainable(inputs)))

    def run(name: str, *given: Any) -> None:
        with case.context(name):
            evaluate(case.competitors[name], *given)

    return {name: [partial(run, name, *given) for given in sets] for name in names}


def rows(case: Case, mode: str, rounds: int, device: str, autotuned: bool = False) -> list[measure.Row]:
    """Check, then time every competitor of `case` in turn; the `autotuned` ones if asked."""
    torch._dynamo.reset()  # compiled competitors of other shapes count against the limit of recompilations
    names = [*case.ours, *case.others, *(case.autotuned if autotuned else ())]
    errors = check_correctness(case, mode, names)
    if not errors:
        return []
    times = timing.interleaved(steps(case, mode, list(errors), device), rounds, device)
    work = case.work[:1] if mode == FORWARD else case.work
    floor_ms = sum(w.floor_us() for w in work) / 1e3
    metrics = {}
    for name, t in times.items():
        metrics[name] = {
            "GB/s": round(sum(w.bytes for w in work) / t["p50"] / 1e6, 1),
            "TFLOP/s": round(sum(w.operations for w in work) / t["p50"] / 1e9, 1),
        }
        if device.startswith("cuda"):
            metrics[name].update(floor_us=round(1e3 * floor_ms, 2), of_floor=round(floor_ms / t["p50"], 4))
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
