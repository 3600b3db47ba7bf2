"""Where one kernel also computes the norm that follows (GateVPT's norm1, CVPT's norm2): same numbers, one norm less."""

from __future__ import annotations

from collections import Counter
from typing import Any

import golden_files
import pytest
import test_golden
import torch
from prompted_models import FAMILIES, METHODS, outputs_and_gradients, prompted
from timm_families import images, small
from torch.utils._python_dispatch import TorchDispatchMode

from bench.correctness import assert_same
from fastprompt import CVPTConfig, blocks
from fastprompt.methods import CVPTModel, cvpt

# The operation, and the norm that follows it.
FUSED = {"gate-vpt": ("gated_blend", "norm1"), "cvpt": ("folded_cross_attention", "norm2")}
SUPPORTED = [
    *(("gate-vpt", family) for family in FAMILIES),
    *(("cvpt", family) for family in FAMILIES if not any(cvpt._reason(b) for b in small(family).blocks)),
]
by_method = pytest.mark.parametrize("method", FUSED)


@pytest.fixture(autouse=True)
def folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models would take CVPT's direct form."""
    monkeypatch.setattr(cvpt, "choose_form", lambda *args, **kwargs: "folded")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; here PyTorch's operators do it."""
    monkeypatch.setattr(blocks, "has_fused_kernel", lambda operation, x: True)


class Operators(TorchDispatchMode):
    """Counts the operators that run, those that compute a norm too as "<name> norm"."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        normed = func.namespace == "fastprompt" and given.get("eps") is not None
        self.counts[func._opname + " norm" * normed] += 1
        return func(*args, **(kwargs or {}))


def counts(model: Any, operation: str) -> tuple[int, int]:
    """How often `operation` runs with a norm and without, in one forward."""
    with Operators() as operators, torch.no_grad():
        model.eval()(images())
    return operators.counts[f"{operation} norm"], operators.counts[operation]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", [*golden_files.names("gatevpt_"), "cvpt_insert3"])
def test_fused_norms_equal_the_official_code(fused: None, name: str, checkpointing: bool) -> None:
    model, *wanted = test_golden.tuned(name)
    model.base.set_grad_checkpointing(checkpointing)
    test_golden.check(model, *wanted)


@pytest.mark.parametrize(("method", "family"), SUPPORTED)
def test_every_family_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, method: str, family: str
) -> None:
    model = prompted(family, METHODS[method], depth=3)
    want = outputs_and_gradients(model, images(4), None)
    monkeypatch.setattr(blocks, "has_fused_kernel", lambda operation, x: True)
    assert_same(outputs_and_gradients(model, images(4), None), want)


@by_method
def test_a_norm_that_trains_gets_its_gradient(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    model = prompted("vit", METHODS[method], depth=3)
    norm = FUSED[method][1]
    for block in model.base.blocks:
        getattr(block, norm).requires_grad_(True)
    want = outputs_and_gradients(model, images(4))
    assert want[f"base.blocks.1.{norm}.weight"].any()
    monkeypatch.setattr(blocks, "has_fused_kernel", lambda operation, x: True)
    assert_same(outputs_and_gradients(model, images(4)), want)


def test_gated_blocks_and_the_next_norm_are_one_operator(fused: None) -> None:
    assert counts(prompted("vit", METHODS["gate-vpt"], depth=3), "gated_blend") == (2, 0)


def test_a_norm_after_the_branches_is_left_there(fused: None) -> None:
    assert counts(prompted("vit-res-post", METHODS["gate-vpt"], depth=3), "gated_blend") == (0, 2)


@pytest.mark.parametrize(("insert", "fused_calls"), [(1, 0), (2, 0), (3, 2), (4, 0), (5, 0)])
def test_only_before_the_mlp_does_a_norm_follow_cvpt(fused: None, insert: int, fused_calls: int) -> None:
    model = prompted("vit", CVPTConfig(3, insert=insert))
    assert isinstance(model, CVPTModel)
    assert counts(model, "folded_cross_attention") == (fused_calls, 2 - fused_calls)


@by_method
def test_a_cpu_runs_operation_and_norm_by_themselves(method: str) -> None:
    assert counts(prompted("vit", METHODS[method], depth=3), FUSED[method][0])[0] == 0


def test_a_run_that_stops_computes_no_norm_for_the_block_after_it(fused: None) -> None:
    model = prompted("vit", METHODS["gate-vpt"], depth=3)
    with Operators() as operators, torch.no_grad():
        model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)
    assert (operators.counts["gated_blend norm"], operators.counts["gated_blend"]) == (1, 1)


def test_a_hook_on_the_norm_is_called(fused: None) -> None:
    model = prompted("vit", METHODS["gate-vpt"], depth=3)
    seen: list[Any] = []
    model.base.blocks[1].norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    model(images())
    assert len(seen) == 1


@by_method
@pytest.mark.slow
def test_compiles_as_one_graph(fused: None, method: str) -> None:
    torch._dynamo.reset()
    model = prompted("vit", METHODS[method])
    want = outputs_and_gradients(model, images(4))
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = outputs_and_gradients(compiled, images(4))
    assert_same({name.removeprefix("_orig_mod."): x for name, x in got.items()}, want)
    torch._dynamo.reset()
