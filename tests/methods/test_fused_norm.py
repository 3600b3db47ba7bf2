"""Where one kernel also computes the norm that follows a residual add: same numbers, one norm less.

GateVPT's gated blend with norm1, CVPT's cross-attention with norm2, and both adds of every other block.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import test_golden
import torch
from official_states import CASES
from prompted_models import FAMILIES, METHODS, outputs_and_gradients, prompted
from timm_families import images, small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.correctness import assert_as_exact, assert_same
from fastprompt import CVPTConfig, blocks
from fastprompt.blocks import Context
from fastprompt.methods import CVPTModel, cvpt
from fastprompt.ops import dispatch

# The operation, and the norm that follows it.
FUSED = {"gate-vpt": ("gated_blend", "norm1"), "cvpt": ("folded_cross_attention", "norm2")}
SUPPORTED = [
    *((method, family) for method in ("vpt-deep", "gate-vpt") for family in FAMILIES),
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


def counts(model: Any, operation: str, x: Tensor | None = None) -> tuple[int, int]:
    """How often `operation` runs with a norm and without, in one forward."""
    with Operators() as operators, torch.no_grad():
        model.eval()(images() if x is None else x)
    return operators.counts[f"{operation} norm"], operators.counts[operation]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", CASES)
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


# The residual adds of blocks without gates ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("vpt-deep", 5),  # two in each block, one in the last, whose output no norm1 follows
        ("da-vpt", 5),
        ("vpt-shallow", 5),
        ("gate-vpt", 3),  # before the MLP
        ("cvpt", 2),  # after the MLP: folded_cross_attention has the other
    ],
)
def test_both_residual_adds_and_the_norms_that_follow_are_one_operator(
    fused: None, method: str, expected: int
) -> None:
    assert counts(prompted("vit", METHODS[method], depth=3), "residual_norm")[0] == expected


@pytest.mark.parametrize(("insert", "expected"), [(1, 3), (2, 2), (3, 2), (4, 2), (5, 3)])
def test_cross_attention_between_an_add_and_its_norm_parts_them(
    fused: None, insert: int, expected: int
) -> None:
    model = prompted("vit", CVPTConfig(3, insert=insert), depth=3)
    assert counts(model, "residual_norm")[0] == expected


def test_rows_that_the_next_block_replaces_are_not_normed(fused: None) -> None:
    model = prompted("vit", METHODS["vpt-deep"], depth=3, shortcuts=False)
    assert counts(model, "residual_norm")[0] == 3


@pytest.mark.parametrize("recompute", ["mlp", "attention", "block"])
def test_what_is_recomputed_keeps_no_norm(fused: None, recompute: Any) -> None:
    model = prompted("vit", METHODS["vpt-deep"], depth=3)
    want = outputs_and_gradients(model, images(4), None)
    model.recompute = recompute
    assert_same(outputs_and_gradients(model, images(4), None), want)
    assert counts(model, "residual_norm")[0] == {"mlp": 2, "attention": 3, "block": 3}[recompute]


def test_a_cpu_adds_and_norms_by_itself() -> None:
    assert counts(prompted("vit", METHODS["vpt-deep"], depth=3), "residual_norm") == (0, 0)


LAYER_SCALES = {"vit": {"init_values": 0.3}, "eva02-unfused-swiglu": {"init_values": 0.3}}


@pytest.mark.parametrize("family", LAYER_SCALES)
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_layer_scale(monkeypatch: pytest.MonkeyPatch, family: str, trains: bool) -> None:
    """Frozen, it is part of the operator; one that trains gets its gradient."""
    model = prompted(family, METHODS["vpt-deep"], depth=3, **LAYER_SCALES[family])
    scales = [p for name, p in model.named_parameters() if "gamma" in name]
    assert len(scales) == 6
    with torch.no_grad():
        for p in scales:
            p.uniform_(0.5, 1.5).requires_grad_(trains)
    want = outputs_and_gradients(model, images(4), None)
    monkeypatch.setattr(blocks, "has_fused_kernel", lambda operation, x: True)
    assert_same(outputs_and_gradients(model, images(4), None), want)
    assert counts(model, "residual_norm")[0] == (0 if trains else 5)


def test_an_active_drop_path_and_hooks_are_left_alone(fused: None) -> None:
    model = prompted("vit", METHODS["vpt-deep"], depth=3, drop_path_rate=0.2, init_values=0.3)
    for block in model.base.blocks[1:]:
        block.drop_path1.train()
    seen: list[Any] = []
    model.base.blocks[0].ls1.register_forward_hook(lambda module, args, out: seen.append(out))
    with Operators() as operators, torch.no_grad():
        model(images())
    assert operators.counts["residual_norm norm"] == 2  # after the MLPs
    assert len(seen) == 1


def test_autocast_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream stays float32, and the next layer would round the norm's output as the operator does."""
    first, second = small("vit").float().blocks
    x, cotangent = torch.randn(2, 3, 17, 48)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, normed = blocks.run_block(first, leaf, None, Context(following=second))
            y, _ = blocks.run_block(second, y, None, Context(normed=normed))
        y.backward(cotangent)
        return [y, leaf.grad]  # type: ignore[list-item]

    for block in (first, second):
        block.requires_grad_(False)
    want = run()
    monkeypatch.setattr(blocks, "has_fused_kernel", lambda operation, x: True)
    with Operators() as operators:
        got = run()
    assert all(map(torch.equal, got, want))
    assert operators.counts["residual_norm norm"] == 3


@pytest.mark.skipif(dispatch.why_missing("residual_norm", "triton") is not None, reason="no Triton here")
def test_the_kernels_give_the_numbers_of_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prompted("vit", METHODS["vpt-deep"], init_values=0.3).float()
    inputs = {"x": images(2).float()}

    def run(x: Tensor) -> Any:
        found = outputs_and_gradients(model.to(x.dtype), x, None)
        return {name: t for name, t in found.items() if name.startswith(("logits", "prompts"))}

    plain = run(**inputs)
    exact = run(inputs["x"].double())
    model.float()
    with dispatch.use_backend("triton"):
        got = run(**inputs)
    assert_as_exact(got, plain, exact)


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
