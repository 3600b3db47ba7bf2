"""dispatch: which backend runs a call, how it is asked for, and the error when it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from attention_cases import Shape, draw
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fastprompt
from fastprompt.kernels import identities
from fastprompt.ops import dispatch, gated_blend, packed_prompt_attention, prompt_attention


class Recorder:
    """A backend's kernel that notes its calls and hands the work to the eager one."""

    def __init__(self, operation: str, reason: str | None = None) -> None:
        self.eager = dispatch._backends["eager"].kernels[operation]
        self.reason = reason
        self.calls = 0

    def run(self, *args: Any) -> Any:
        self.calls += 1
        return self.eager.run(*args)

    def can_run(self, *args: Any) -> str | None:
        return self.reason


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Add kernels for the time of one test: `registry(backend, operation, reason)` gives a Recorder.

    The kernels of `triton` and `cuda` are not there.
    """
    for name in ("triton", "cuda"):
        empty = dispatch.Backend(name, lambda: "no kernels")
        monkeypatch.setitem(dispatch._backends, name, empty)
    monkeypatch.setattr(dispatch, "_request", "auto")
    monkeypatch.setattr(identities, "known", {})

    def add(backend: str, operation: str, reason: str | None = None, missing: str | None = None) -> Recorder:
        recorder = Recorder(operation, reason)
        dispatch.register(operation, backend, recorder.run, recorder.can_run)
        dispatch._backends[backend].why_unavailable = lambda: missing
        return recorder

    return add


def attend() -> Tensor:
    return prompt_attention(**draw(Shape(), torch.float32))


def test_auto_takes_the_first_backend_in_the_order_of_preference(registry: Any) -> None:
    cuda, triton = registry("cuda", "prompt_attention"), registry("triton", "prompt_attention")
    attend()
    assert (triton.calls, cuda.calls) == (1, 0)


def test_auto_skips_a_backend_that_cannot_run_the_call(registry: Any) -> None:
    triton = registry("triton", "prompt_attention", reason="head_dim 32 is too small")
    cuda = registry("cuda", "prompt_attention")
    attend()
    assert (triton.calls, cuda.calls) == (0, 1)


def test_auto_skips_a_backend_that_is_not_available(registry: Any) -> None:
    triton = registry("triton", "prompt_attention", missing="triton is not installed")
    attend()
    assert triton.calls == 0


def test_auto_falls_back_to_eager(registry: Any) -> None:
    name, _ = dispatch.select("prompt_attention", "auto", *draw(Shape(), torch.float32).values(), 1.0)
    assert name == "eager"


def test_backward_may_run_on_another_backend(registry: Any) -> None:
    triton = registry("triton", "prompt_attention")
    inputs = draw(Shape(), torch.float32)
    inputs["q"].requires_grad_()  # type: ignore[union-attr]
    prompt_attention(**inputs).sum().backward()
    assert triton.calls == 1
    assert inputs["q"].grad is not None  # type: ignore[union-attr]


def test_backward_asks_for_the_backend_of_the_forward(registry: Any) -> None:
    registry("triton", "prompt_attention")
    backward = registry("triton", "prompt_attention_backward")
    inputs = draw(Shape(), torch.float32)
    inputs["q"].requires_grad_()  # type: ignore[union-attr]
    prompt_attention(**inputs, backend="triton").sum().backward()
    assert backward.calls == 1


@pytest.mark.parametrize("how", ["argument", "context"])
def test_a_backend_asked_for_by_name_never_falls_back(registry: Any, how: str) -> None:
    triton = registry("triton", "prompt_attention", reason="head_dim 32 is too small")
    context, argument = (
        (dispatch.use_backend("triton"), "auto") if how == "context" else (nullcontext(), "triton")
    )
    with (
        context,
        pytest.raises(NotImplementedError, match=r"`prompt_attention`.*'triton'.*head_dim 32 is too small"),
    ):
        prompt_attention(**draw(Shape(), torch.float32), backend=argument)
    assert triton.calls == 0


def test_an_unavailable_backend_asked_for_by_name_says_why(registry: Any) -> None:
    registry("triton", "prompt_attention", missing="triton is not installed")
    with pytest.raises(NotImplementedError, match="triton is not installed"), dispatch.use_backend("triton"):
        attend()


def test_a_backend_without_a_kernel_for_the_operation_says_so(registry: Any) -> None:
    registry("triton", "gated_blend")
    with pytest.raises(NotImplementedError, match="no kernel for `prompt_attention`"):
        prompt_attention(**draw(Shape(), torch.float32), backend="triton")


def test_a_bug_inside_a_check_is_raised_and_not_taken_for_unsupported(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = registry("triton", "prompt_attention")

    def broken(*args: Any) -> str | None:
        raise ZeroDivisionError

    dispatch.register("prompt_attention", "triton", triton.run, broken)
    with pytest.raises(ZeroDivisionError):
        attend()


def test_the_argument_goes_before_the_context(registry: Any) -> None:
    triton, cuda = registry("triton", "prompt_attention"), registry("cuda", "prompt_attention")
    with dispatch.use_backend("triton"):
        prompt_attention(**draw(Shape(), torch.float32), backend="cuda")
    assert (triton.calls, cuda.calls) == (0, 1)


def test_contexts_nest_and_auto_lifts_the_outer_one(registry: Any) -> None:
    assert dispatch.requested() == "auto"
    with fastprompt.use_backend("eager"):
        assert dispatch.requested() == "eager"
        with fastprompt.use_backend("auto"):
            assert dispatch.requested() == "auto"
            with fastprompt.use_backend("cpu"):
                assert dispatch.requested() == "cpu"
                assert dispatch.requested("eager") == "eager"
        assert dispatch.requested() == "eager"
    assert dispatch.requested() == "auto"


def test_context_is_left_on_an_exception(registry: Any) -> None:
    with pytest.raises(KeyError), dispatch.use_backend("eager"), dispatch.use_backend("cpu"):
        raise KeyError
    assert dispatch.requested() == "auto"


def test_context_reaches_the_backward(registry: Any) -> None:
    backward = registry("triton", "prompt_attention_backward")
    inputs = draw(Shape(), torch.float32)
    inputs["q"].requires_grad_()  # type: ignore[union-attr]
    with dispatch.use_backend("eager"):
        out = prompt_attention(**inputs)
    out.sum().backward()
    assert backward.calls == 0


@pytest.mark.parametrize("name", ["tpu", "", "Eager", "triton "])
def test_unknown_names_are_refused(registry: Any, name: str) -> None:
    with (
        pytest.raises(ValueError, match=rf"{name!r}.*'auto', 'triton', 'cuda', 'cpu', 'eager'"),
        dispatch.use_backend(name),
    ):
        pass
    if name:
        with pytest.raises(ValueError, match=repr(name)):
            prompt_attention(**draw(Shape(), torch.float32), backend=name)
    assert dispatch.requested() == "auto"


def test_explain_gives_a_reason_for_every_backend_that_cannot(registry: Any) -> None:
    registry("triton", "prompt_attention", reason="head_dim 32 is too small")
    registry("cuda", "prompt_attention", missing="no CUDA device")
    reasons = dispatch.explain("prompt_attention", *draw(Shape(), torch.float32).values(), 1.0)
    assert list(reasons) == list(dispatch.BACKENDS)
    assert reasons["triton"] == "head_dim 32 is too small"
    assert reasons["cuda"] == "no CUDA device"
    assert reasons["cpu"]
    assert reasons["eager"] is None


def test_the_table_names_every_backend_with_its_operations_or_its_reason(registry: Any) -> None:
    registry("triton", "prompt_attention")
    registry("cuda", "prompt_attention", missing="no CUDA device")
    table = fastprompt.backends()
    assert [backend.name for backend in table] == list(dispatch.BACKENDS)
    triton, cuda, _, eager = table
    assert triton.available
    assert triton.operations == ("prompt_attention",)
    assert not cuda.available
    assert cuda.reason == "no CUDA device"
    assert {"prompt_attention", "gated_blend", "folded_cross_attention"} <= set(eager.operations)
    lines = str(table).splitlines()
    assert len(lines) == 1 + len(table)
    assert lines[2].split(maxsplit=2) == ["cuda", "no", "no CUDA device"]
    assert all(line.startswith(backend.name) for line, backend in zip(lines[1:], table, strict=True))


def test_auto_leaves_what_is_not_automatic_to_those_who_name_it(registry: Any) -> None:
    triton = registry("triton", "prompt_attention")
    dispatch._backends["triton"].kernels["prompt_attention"].automatic = False
    attend()
    assert triton.calls == 0
    prompt_attention(**draw(Shape(), torch.float32), backend="triton")
    assert triton.calls == 1


def test_attention_without_prompts_that_no_kernel_supports_is_pytorchs_own(registry: Any) -> None:
    registry("triton", "prompt_attention", reason="head_dim 32 is too small")
    q = torch.randn(1, 3, 2, 32)
    want = scaled_dot_product_attention(*[q.transpose(1, 2)] * 3).transpose(1, 2)
    assert torch.equal(prompt_attention(q, q, q), want)
    packed = torch.stack([q] * 3, 2).requires_grad_()
    out = packed_prompt_attention(packed)
    assert "fastprompt" not in str(out.grad_fn.next_functions).lower()
    assert torch.equal(out, want)


def test_a_norm_is_fused_where_a_kernel_computes_it(registry: Any) -> None:
    x = torch.empty(1)
    assert not dispatch.has_fused_kernel("gated_blend", x)
    with dispatch.use_backend("cpu"):
        assert not dispatch.has_fused_kernel("gated_blend", x)
    registry("triton", "gated_blend")
    dispatch._backends["triton"].kernels["gated_blend"].fuses_norm = True
    assert not dispatch.has_fused_kernel("gated_blend", x)  # "auto" leaves CPU tensors to other backends
    with dispatch.use_backend("triton"):
        assert dispatch.has_fused_kernel("gated_blend", x)
        dispatch._backends["triton"].why_unavailable = lambda: "triton is not installed"
        assert not dispatch.has_fused_kernel("gated_blend", x)


@pytest.mark.skipif(
    dispatch.why_missing("gated_blend", "cpu") is not None, reason="the native library is not installed"
)
def test_native_kernels_run_cpu_tensors_and_no_others(registry: Any) -> None:
    rows, gate = torch.ones(2, 3, 4), torch.ones(1)
    arguments = (rows, rows, rows[:, :1], gate, 0, 1)
    without_norm = (*arguments, None, None, None)
    assert dispatch.select("gated_blend", "auto", *without_norm)[0] == "cpu"
    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in without_norm)
    assert dispatch.explain("gated_blend", *meta)["cpu"] == "it runs on cpu tensors, not meta ones"
    assert torch.equal(gated_blend(*arguments, backend="cpu")[0], gated_blend(*arguments, backend="eager")[0])


PROGRAM = """
import sys
from fastprompt.ops import attention_choice, dispatch
imported = [m for m in sys.modules if m.startswith("fastprompt.kernels.triton")]
print(dispatch.requested(), attention_choice.forced(), imported)
"""


def test_environment_variables_ask_for_a_backend_and_a_way_and_triton_is_imported_when_it_is_used() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            **os.environ,
            "FASTPROMPT_BACKEND": "Eager ",
            "FASTPROMPT_ATTENTION": "Split",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.stdout.strip(), result.returncode) == ("eager split []", 0), result.stderr


def test_a_wrong_environment_variable_is_an_error_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_request", "tpu")
    with pytest.raises(ValueError, match=r"`FASTPROMPT_BACKEND`.*'tpu'"):
        attend()
    monkeypatch.setattr(dispatch, "_request", "cuda")
    with pytest.raises(NotImplementedError, match="'cuda' was requested by name"):
        attend()
