"""Correctness on a device, by itself and fast: a sweep of shapes against float64, and the ways in which models are run.

Every competitor here is the package, on each backend. Memory from `torch.empty` is poisoned with NaN, and each call is
made twice: the results must be the same bits.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprompt
from bench import ops
from bench.models import METHODS, OWN

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS = (197, 50, 257, 577, 1025, 1)
PROMPTS = (10, 0, 50, 100, 1, 256)
OTHER_HEADS = (80, 72, 88, 40)


def cases(device: str, tiny: bool = False) -> Iterator[ops.Case]:
    """The sweep, most telling cases first; `tiny` shapes run the same code quickly."""
    B, H = 2, 3
    shrink = 16 if tiny else 1

    def attention(N: int, P: int, d: int, dtype: torch.dtype, **options: Any) -> ops.Case:
        size = (B, max(1, N // shrink), P // (4 if tiny else 1), H, d)
        return ops.attention_case(*size, dtype, device, **options)

    # Enough heads that each has a program of its own: other kernels than few heads get.
    many = 2 if tiny else 64
    for P, d, dtype in ((10, 64, BF16), (0, 64, BF16), (50, 64, FP16), (10, 40, BF16)):
        size = (many, max(1, 197 // shrink), P // (4 if tiny else 1), H, d)
        yield ops.attention_case(*size, dtype, device)
        yield ops.packed_case(*size, dtype, device)
    yield ops.attention_case(many, max(1, 50 // shrink), 2 if tiny else 10, H, 64, BF16, device)
    for kind in ("shared", "per image", "table"):
        size = (many, max(1, 197 // shrink), 2 if tiny else 10, H, 64)
        yield ops.attention_case(*size, BF16, device, kind=kind, temperature=True)

    for N, P in ((197, 10), (197, 0), (257, 50)):
        for dtype in (BF16, FP32, FP16):
            yield attention(N, P, 64, dtype)
            yield ops.packed_case(B, max(1, N // shrink), P // (4 if tiny else 1), H, 64, dtype, device)
    for kind, dtype in product(("shared", "per image", "table"), (BF16, FP32)):
        yield attention(197, 10, 64, dtype, kind=kind, temperature=True)
        # Where nothing before a block trains, only its prompts do; and the reverse, frozen prompts.
        yield replace(attention(197, 10, 64, dtype, kind=kind), frozen=("q", "k", "v"))
        yield replace(attention(197, 10, 64, dtype, kind=kind), frozen=("prompt_k", "prompt_v"))
    for D, H_ in ((384, 6), (768, 12), (1280, 16)):
        width = D // shrink // H_ * H_ or H_
        for dtype, P in product((BF16, FP32, FP16), (10, 50)):
            yield ops.blend_case(B, 197 // shrink + P, P, width, dtype, device)
            yield ops.blend_norm_case(B, 197 // shrink + P, P, width, dtype, device)
            yield ops.folded_case(B, 197 // shrink, P, H_, width, dtype, device)
            yield ops.row_case(B, 197 // shrink, H_, width, dtype, device)
        for dtype in (BF16, FP32, FP16):
            yield ops.folded_norm_case(B, 197 // shrink, 10, H_, width, dtype, device)
    for d, dtype in product(OTHER_HEADS, (BF16, FP32, FP16)):
        for N, P in ((257, 10), (197, 100)):
            yield attention(N, P, d, dtype)
    for N, P, dtype in product(TOKENS, PROMPTS, (BF16, FP32, FP16)):
        yield attention(N, P, 64, dtype)
    for d, N, P in product(OTHER_HEADS, TOKENS, PROMPTS):
        yield attention(N, P, d, BF16)


@contextmanager
def poisoned() -> Iterator[None]:
    """Let `torch.empty` hand out NaN."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def checks_of(case: ops.Case) -> Iterator[tuple[str, Callable[[], str]]]:
    """A named check for each backend that serves `case`: exact enough, and twice the same."""
    if not case.ours:
        return
    judge = ops.Judge(case, ops.BOTH)
    for name, function in case.ours.items():

        def check(function: ops.Function = function) -> str:
            with poisoned():
                got, again = (
                    ops.evaluate(case, function, judge.inputs, ops.BOTH, judge.cotangents) for _ in range(2)
                )
            error = judge.check(got)
            different = [n for n in got if not torch.equal(got[n], again[n])]
            if different:
                raise ops.WrongResult(f"not the same bits twice: {', '.join(different)}")
            return f"error {error:.1e}"

        options = [
            str(case.dtype).removeprefix("torch."),
            *case.spread,
            *(f"frozen {n}" for n in case.frozen),
        ]
        yield f"{case.name} {' '.join(options)}: {name}", check


# The ways in which it is run ------------------------------------------------------------------------------------------


def ways(device: str, compiler: str) -> dict[str, Callable[[], str]]:
    """Named checks of operations and models under streams, graphs, `torch.compile`, autocast and DDP."""
    found: dict[str, Callable[[], str]] = {}
    if device.startswith("cuda"):
        found["another stream"] = lambda: _on_another_stream(device)
        found["CUDA graph, forward and backward"] = lambda: _in_a_graph(device)
    for method in METHODS:
        found[f"torch.compile, full graph, training step: {method}"] = lambda m=method: _compiled(
            m, device, compiler
        )
        found[f"autocast: {method}"] = lambda m=method: _autocast(m, device)
        found[f"DDP, one process: {method}"] = lambda m=method: _distributed(m, device)
    return found


def _case(device: str) -> ops.Case:
    return ops.attention_case(4, 197, 10, 3, 64, FP16, device)


def _on_another_stream(device: str) -> str:
    """On a stream of its own, behind work that delays its inputs, an operation waits for them."""
    case = _case(device)
    for name, function in case.ours.items():
        judge = ops.Judge(case, ops.BOTH)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), poisoned():
            torch.cuda._sleep(20_000_000)
            late = {n: x.clone() for n, x in judge.inputs.items()}
            got = ops.evaluate(case, function, late, ops.BOTH, judge.cotangents)
        stream.synchronize()
        _judged(judge, name, got)
    return f"{len(case.ours)} backends"


def _in_a_graph(device: str) -> str:
    """A captured forward and backward, replayed on new inputs, is as exact as a call."""
    case = _case(device)
    for name, function in case.ours.items():
        judge = ops.Judge(case, ops.BOTH)
        static = {n: torch.randn_like(x) for n, x in judge.inputs.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                ops.evaluate(case, function, static, ops.BOTH, judge.cotangents)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ops.evaluate(case, function, static, ops.BOTH, judge.cotangents)
        for n, x in judge.inputs.items():
            static[n].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        _judged(judge, name, got)
    return f"{len(case.ours)} backends"


def _judged(judge: ops.Judge, name: str, got: dict[str, Tensor]) -> None:
    try:
        judge.check(got)
    except ops.WrongResult as error:
        raise ops.WrongResult(f"{name}: {error}") from error


def _model(method: str, device: str, dtype: torch.dtype = FP32) -> Any:
    base = timm.create_model("test_vit", img_size=64, depth=2, num_classes=5).to(device, dtype)
    return fastprompt.get_prompt_model(base, METHODS[method].config(4)).train()


def _data(device: str) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 64, 64, device=device), torch.randint(0, 5, (4,), device=device)


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss and the gradients of what the method trains, of one training step."""
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images).float(), labels)
    loss.backward()
    named = {
        n.removeprefix("module.").removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters()
    }
    return {"loss": loss.detach(), **{n: g for n, g in named.items() if n.startswith(OWN) and g is not None}}


def _furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative difference; NaN wins."""
    if got.keys() != want.keys():
        raise ops.WrongResult(f"gradients of {sorted(got)}, not {sorted(want)}")
    errors = [((got[n].double() - w.double()).norm() / w.double().norm()).item() for n, w in want.items()]
    return max(errors, key=lambda e: float("inf") if e != e else e)


def _within(error: float, allowed: float) -> str:
    if not error <= allowed:
        raise ops.WrongResult(f"differs by {error:.1e}, {allowed:.1e} allowed")
    return f"differs by {error:.1e}"


def _compiled(method: str, device: str, compiler: str) -> str:
    """A compiled training step equals the eager one, in one graph, and is not compiled anew for the next batch."""
    torch._dynamo.reset()
    model, data = _model(method, device), _data(device)
    want = _step(model, *data)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    difference = _furthest(_step(compiled, *data), want)
    with torch._dynamo.config.patch(error_on_recompile=True):
        _step(compiled, *_data(device))
    # Products are in tf32 only where torch allows it, which is off; the patch embedding's kernel is the same in both.
    return _within(difference, 1e-3)


def _autocast(method: str, device: str) -> str:
    """Under bfloat16 autocast the gradients are those of float64, to four times the error of the backend `eager`."""
    model, data = _model(method, device), _data(device)
    exact = _step(copy.deepcopy(model).double(), data[0].double(), data[1])
    with torch.autocast(device.partition(":")[0], BF16):
        got = _step(model, *data)
        with fastprompt.use_backend("eager"):
            usual = _furthest(_step(model, *data), exact)
    return _within(_furthest(got, exact), 4 * usual + 1e-3)


def _distributed(method: str, device: str) -> str:
    """One process of DistributedDataParallel makes the gradients of the bare model."""
    from torch import distributed

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    model, data = _model(method, device), _data(device)
    want = _step(model, *data)

    def by(backend: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            distributed.init_process_group(
                backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1
            )
            try:
                got = _step(nn.parallel.DistributedDataParallel(model), *data)
            finally:
                distributed.destroy_process_group()
        return f"{backend}, {_within(_furthest(got, want), 1e-5)}"

    if not (device.startswith("cuda") and distributed.is_nccl_available()):
        return by("gloo")
    try:
        return by("nccl")
    except distributed.DistBackendError as error:  # NCCL asks for more of a machine than one process needs
        return f"{by('gloo')}; NCCL: {ops.first_line(error)}"
