"""Correctness on a device: a sweep of shapes, and the modes in which models are run, all against float64.

Every competitor here is the package, on each backend. Memory from `torch.empty` is poisoned with NaN, and each call is
run twice: the results must be the same bits.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, product, zip_longest
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastprompt
from bench import ops
from bench.cases import NAMES, load, operations
from bench.correctness import Oracle, WrongResult
from bench.models import METHODS, OWN
from fastprompt.calibration import timing

Results = dict[str, Tensor]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def sweep(device: str, tiny: bool = False, shard: tuple[int, int] = (0, 1)) -> Iterator[ops.Case]:
    """Yield shapes of every operation in turn, the most telling ones first.

    `tiny` shapes run the same code quickly; `shard` i of n takes every n-th round of turns.
    """
    turns = (
        chain(operation.sweep(device, tiny), _blocks(operation, device, tiny)) for operation in operations()
    )
    rounds = islice(zip_longest(*turns), shard[0], None, shard[1])
    return (case for case in chain.from_iterable(rounds) if case is not None)


def _blocks(operation: ops.Operation, device: str, tiny: bool) -> Iterator[ops.Case]:
    """Yield what is measured of `operation`, for two images, three widths and three dtypes."""
    shrink = 16 if tiny else 1
    for (H, D), dtype in product(((6, 384), (12, 768), (16, 1280)), (BF16, FP32, FP16)):
        yield from operation.cases(ops.Size(2, 197 // shrink, H, D // shrink // H * H, dtype, device))


@contextmanager
def poisoned() -> Iterator[None]:
    """Let `torch.empty` hand out NaN."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def checks_of(case: ops.Case) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield a named check for each backend that supports `case`: exact enough, and the same bits twice."""
    oracle = case.oracle(ops.BOTH) if case.ours else None
    for name, function in case.ours.items():

        def check(name: str = name, function: ops.Function = function) -> str:
            assert oracle is not None
            with poisoned(), case.context(name):
                got, again = (oracle.evaluate(function) for _ in range(2))
            error = oracle.check(got)
            different = [n for n in got if not torch.equal(got[n], again[n])]
            if different:
                raise WrongResult(f"not the same bits twice: {', '.join(different)}")
            return f"error {error:.1e}"

        options = [str(case.dtype).removeprefix("torch."), *(f"frozen {n}" for n in case.frozen)]
        yield f"{case.name} {' '.join(options)}: {name}", check


# Modes of execution --------------------------------------------------------------------------------------------------


def execution_modes(device: str, compiler: str) -> dict[str, Callable[[], str]]:
    """Return named checks of operations and models under streams, graphs, `torch.compile`, autocast and DDP."""
    found: dict[str, Callable[[], str]] = {}
    for name in NAMES if device.startswith("cuda") else ():
        found[f"another stream: {name}"] = partial(_on_each_backend, _on_another_stream, name, device)
        found[f"CUDA graph, forward and backward: {name}"] = partial(
            _on_each_backend, _in_a_graph, name, device
        )
    for method in METHODS:
        compiled = partial(_compiled, method, device, compiler)
        found[f"torch.compile, full graph, training step: {method}"] = compiled
        found[f"autocast: {method}"] = partial(_autocast, method, device)
        found[f"DDP, one process: {method}"] = partial(_distributed, method, device)
    return found


def _on_each_backend(run: Callable[[ops.Case, Oracle, ops.Function], Results], name: str, device: str) -> str:
    """Check what `run` makes of each backend of an operation."""
    case = next(load(name).cases(ops.Size(4, 197, 3, 192, FP16, device)))
    oracle = case.oracle(ops.BOTH)
    for backend, function in case.ours.items():
        try:
            with case.context(backend):
                oracle.check(run(case, oracle, function))
        except WrongResult as error:
            raise WrongResult(f"{backend}: {error}") from error
    return f"{len(case.ours)} backends"


def _on_another_stream(case: ops.Case, oracle: Oracle, function: ops.Function) -> Results:
    """Run on a stream of its own, which must wait for inputs that come late."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), poisoned():
        torch.cuda._sleep(20_000_000)
        late = {n: x.clone() for n, x in oracle.inputs.items() if x is not None}
        got = oracle.evaluate(function, late)
    stream.synchronize()
    return got


def _in_a_graph(case: ops.Case, oracle: Oracle, function: ops.Function) -> Results:
    """Capture a forward and a backward, and replay them on new inputs."""
    static, got = case.draw(), {}
    graph = timing.capture(lambda: got.update(oracle.evaluate(function, static)))
    for n, x in oracle.inputs.items():
        if x is not None:
            static[n].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    return got


class _Trained:
    """A small model of a method, one batch, and the exact logits and gradients of what the method trains."""

    def __init__(self, method: str, device: str, autocast: bool = False) -> None:
        base = timm.create_model("test_vit", img_size=64, depth=2, num_classes=5).to(device)
        self.model: Any = fastprompt.get_prompt_model(base, METHODS[method](4, 2)).train()
        self.images = torch.randn(4, 3, 64, 64, device=device)
        self.autocast = partial(torch.autocast, device, BF16, enabled=autocast)
        wide = copy.deepcopy(self.model).double()

        def plain(**parameters: Tensor) -> Tensor:
            with self.autocast(), fastprompt.use_backend("eager"):
                return functional_call(self.model, parameters, (self.images,))

        def exact(**parameters: Tensor) -> Tensor:
            return functional_call(wide, parameters, (self.images.double(),))

        own = {n: p.detach() for n, p in self.model.named_parameters() if n.startswith(OWN)}
        self.oracle = Oracle(plain, own, exact=exact)

    def check(self, model: Callable[[Tensor], Tensor]) -> str:
        """Run a training step of `model`, compiled or wrapped, and check it."""
        assert self.oracle.cotangents is not None
        self.model.zero_grad(set_to_none=True)
        with self.autocast():
            logits = model(self.images)
        logits.backward(self.oracle.cotangents[0].to(logits))
        gradients = {
            f"gradient of {n}": p.grad for n, p in self.model.named_parameters() if n.startswith(OWN)
        }
        return f"error {self.oracle.check({'output': logits.detach(), **gradients}):.1e}"


def _compiled(method: str, device: str, compiler: str) -> str:
    """Check a training step compiled in one graph, and that the next one compiles nothing."""
    torch._dynamo.reset()
    trained = _Trained(method, device)
    compiled: Any = torch.compile(trained.model, fullgraph=True, backend=compiler)
    trained.check(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        return trained.check(compiled)


def _autocast(method: str, device: str) -> str:
    """Check a training step under bfloat16 autocast."""
    trained = _Trained(method, device, autocast=True)
    return trained.check(trained.model)


def _distributed(method: str, device: str) -> str:
    """Check a training step of one process of DistributedDataParallel."""
    from torch import distributed

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    trained = _Trained(method, device)

    def by(backend: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            distributed.init_process_group(
                backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1
            )
            try:
                return f"{backend}, {trained.check(nn.parallel.DistributedDataParallel(trained.model))}"
            finally:
                distributed.destroy_process_group()

    if not (device.startswith("cuda") and distributed.is_nccl_available()):
        return by("gloo")
    try:
        return by("nccl")
    except distributed.DistBackendError as error:  # NCCL asks for more of a machine than one process needs
        return f"{by('gloo')}; NCCL: {ops.first_line(error)}"
