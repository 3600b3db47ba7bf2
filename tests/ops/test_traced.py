"""What a compiler sees: plain PyTorch in exported programs and where it fuses that itself, else one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import by_dtype
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.correctness import assert_as_exact
from fastprompt import use_backend
from fastprompt.ops import (
    FoldedPrompts,
    Norm,
    folded_cross_attention,
    folded_row_attention,
    gated_blend,
    packed_prompt_attention,
    prompt_attention,
    residual_norm,
)
from fastprompt.ops.operator import traced_plainly

B, N, P, H, D = 2, 5, 3, 2, 16

COMPILING, EXPORTING = "is_compiling", "_is_exporting_flag"


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (B, N, D),
        "delta": (B, N, D),
        "prompt_in": (B, P, D),
        "gate": (1,),
        "scale": (D,),
        "query": (B, 2, D),
        "prompt_rows": (P, D),
        "key": (H, P, D),
        "bias": (H, P),
        "value": (H, P, D),
        "qkv": (B, N, 3, H, D // H),
        "prompt_k": (P, H, D // H),
        "prompt_v": (P, H, D // H),
        "temperature": (1,),
    }
    drawn = {n: torch.randn(s, dtype=torch.float64, generator=generator) for n, s in shapes.items()}
    drawn["gate"], drawn["temperature"] = drawn["gate"].sigmoid(), drawn["temperature"].exp()
    return {n: t.to(dtype) for n, t in drawn.items()}


def norm(t: dict[str, Tensor]) -> Norm:
    return Norm(t["scale"], t["delta"][0, 0], 1e-6)


def folded(t: dict[str, Tensor]) -> FoldedPrompts:
    return FoldedPrompts(t["key"], t["bias"], t["value"], t["scale"])


def only_prompts(t: dict[str, Tensor]) -> Tensor:
    q, k, v = t["qkv"].unbind(2)
    return prompt_attention(q, k[:, :0], v[:, :0], t["prompt_k"], t["prompt_v"])


# What a compiler fuses itself, and what stays one operator for it.
FUSED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "gated_blend": lambda t: gated_blend(t["x"], t["delta"], t["prompt_in"], t["gate"], 1, P, norm=norm(t)),
    "residual_norm": lambda t: residual_norm(t["x"], t["delta"], t["scale"], norm(t)),
    "folded_cross_attention": lambda t: folded_cross_attention(
        t["x"], folded(t), residual=True, norm=norm(t)
    ),
    "without-bias": lambda t: folded_cross_attention(t["x"], folded(t)._replace(out_bias=None))[0],
    "folded_row_attention": lambda t: folded_row_attention(t["query"], t["x"], t["prompt_rows"]),
    "rows-alone": lambda t: folded_row_attention(t["query"], t["x"]),
    "only-prompts": only_prompts,
}
OPERATORS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "packed_prompt_attention": lambda t: packed_prompt_attention(t["qkv"], t["prompt_k"], t["prompt_v"]),
    "with-temperature": lambda t: packed_prompt_attention(t["qkv"], temperature=t["temperature"]),
    "prompt_attention": lambda t: prompt_attention(
        *t["qkv"].unbind(2), t["prompt_k"], t["prompt_v"], temperature=t["temperature"]
    ),
}


class Operators(TorchDispatchMode):
    """Collects the operators of this package that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("fastprompt"):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def run_while(state: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """Run `call` as a compiler's or an exporter's trace does, and return its operators of ours too."""
    with monkeypatch.context() as patch, Operators() as ours:
        patch.setattr(torch.compiler, COMPILING, lambda: True)
        patch.setattr(torch.compiler, EXPORTING, state == EXPORTING)
        return call(), ours.found


@by_dtype
@pytest.mark.parametrize("case", [*FUSED, *OPERATORS])
def test_traced_forms_are_as_exact_as_the_operators(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**FUSED, **OPERATORS}[case]
    plain, exact = call(inputs(dtype)), call({n: t.double() for n, t in inputs(dtype).items()})
    for state in (COMPILING, EXPORTING):
        found, ours = run_while(state, lambda: call(inputs(dtype)), monkeypatch)
        assert bool(ours) == (state == COMPILING and case in OPERATORS), ours
        assert_as_exact(found, plain, exact)


@pytest.mark.parametrize("case", FUSED)
def test_a_backend_by_name_keeps_its_operator_unless_exported(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = inputs(torch.float64)
    if case == "gated_blend":
        with use_backend("cpu"):
            assert run_while(COMPILING, lambda: FUSED[case](t), monkeypatch)[1]
            assert run_while(EXPORTING, lambda: FUSED[case](t), monkeypatch)[1] == []
    with use_backend("eager"):
        assert run_while(COMPILING, lambda: FUSED[case](t), monkeypatch)[1] == []


def test_eager_calls_are_never_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not traced_plainly("auto", fusable=True)
    monkeypatch.setattr(torch.compiler, COMPILING, lambda: True)
    assert traced_plainly("auto", fusable=True)
    assert not traced_plainly("triton", fusable=True)
    assert not traced_plainly("eager", fusable=False)
    monkeypatch.setattr(torch.compiler, EXPORTING, True)
    assert traced_plainly("triton", fusable=False)
