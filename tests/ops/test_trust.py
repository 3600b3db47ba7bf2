"""trust: a kernel's first results are compared with plain PyTorch's, and a wrong kernel is not used again."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import test_operators as forms
import torch
from attention_cases import Shape, draw
from torch import Tensor

import fastprompt
from bench.correctness import Oracle
from fastprompt.kernels import identities
from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton import prompt_attention as kernels
from fastprompt.kernels.triton.gated_blend import gated_blend_fwd_kernel
from fastprompt.ops import attention_choice, dispatch, prompt_attention, prompt_attention_reference, trust

pytestmark = pytest.mark.skipif(
    dispatch.why_no_triton() is not None, reason="Triton's kernels do not run in this process"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Wrong = Callable[..., None]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel has run yet, "auto" selects the interpreter, and unexpected warnings are errors."""
    monkeypatch.setattr(identities, "known", {})
    monkeypatch.setattr(trust, "_mode", "first")
    triton = dispatch._backends["triton"]
    monkeypatch.setattr(triton, "is_automatic", lambda: True)
    for kernel in triton.kernels.values():
        monkeypatch.setattr(kernel, "automatic", True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt|`")
        yield


@pytest.fixture
def falsify(monkeypatch: pytest.MonkeyPatch) -> Callable[[Wrong], list[str]]:
    """Let each launch be followed by `wrong(kernel's name, arguments)`; return the growing list of launches."""

    def install(wrong: Wrong) -> list[str]:
        launches: list[str] = []
        right = launch.launch

        def wrong_launch(kernel: Any, grid: Any, device: Any, **arguments: Any) -> None:
            right(kernel, grid, device, **arguments)
            launches.append(kernel.fn.__name__)
            wrong(kernel.fn.__name__, arguments)

        monkeypatch.setattr(launch, "launch", wrong_launch)
        return launches

    return install


def states() -> set[str]:
    return {identity.state for identity in identities.known.values()}


def attention_inputs(B: int = 3, **options: Any) -> dict[str, Any]:
    return draw(Shape(B, Nq=5, N=9, **{"P": 3, "d": 16, **options}), torch.float32, DEVICE)


def blend_inputs() -> dict[str, Any]:
    return {name: to_device(x) for name, x in forms.blend_inputs().items()}


def to_device(x: Tensor | None) -> Tensor | None:
    return x.to(DEVICE, torch.float32) if x is not None and x.is_floating_point() else x


def scale(pointer: str, factor: float) -> Wrong:
    """Falsify what a kernel writes to `pointer`."""

    def wrong(name: str, arguments: dict[str, Any]) -> None:
        if isinstance(arguments.get(pointer), Tensor):
            arguments[pointer].mul_(factor)

    return wrong


def test_a_right_kernel_is_checked_once_and_then_trusted(
    falsify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = falsify(lambda *_: None)
    inputs = blend_inputs()
    forms.run_blend(**inputs)
    assert launches == ["gated_blend_fwd_kernel"]
    assert states() == {"trusted"}
    monkeypatch.setattr(trust, "_compare", lambda *_: pytest.fail("checked again"))
    forms.run_blend(**{n: x[:1] if x.ndim == 3 else x for n, x in inputs.items()})
    assert len(launches) == 2


def test_a_wrong_forward_is_refused_once_and_the_right_numbers_are_returned(falsify: Any) -> None:
    launches = falsify(scale("p_y", 1.05))
    inputs = blend_inputs()
    with pytest.warns(RuntimeWarning) as caught:
        got = forms.run_blend(**inputs)
    (warning,) = [str(w.message) for w in caught]
    for part in ("gated_blend_fwd_kernel", "off by", "triton", "TRITON_PTXAS_PATH", "report"):
        assert part in warning
    assert launch.toolchain(torch.device(DEVICE)) in warning
    Oracle(partial(forms.run_blend, backend="eager"), inputs, backward=False).check({"output": got})
    assert states() == {"refused"}

    # Without a launch, a check or a warning.
    assert torch.equal(forms.run_blend(**inputs), got)
    assert len(launches) == 1
    with pytest.raises(NotImplementedError, match=r"'triton' was requested by name.*refused.*off by"):
        forms.run_blend(**inputs, backend="triton")
    assert len(launches) == 1


def test_a_kernel_with_a_wrong_factor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels._Inputs.arguments
    monkeypatch.setattr(
        kernels._Inputs, "arguments", lambda *a: (f := right(*a)) | {"scale": 1.1 * f["scale"]}
    )
    inputs = attention_inputs()
    with pytest.warns(RuntimeWarning, match="off by"), attention_choice.use_way("looped"):
        Oracle(prompt_attention_reference, inputs)(prompt_attention)


@pytest.mark.parametrize("wrong", ["p_dx", "p_dprompt", "p_partial"])
def test_a_wrong_backward_is_refused_and_the_right_gradients_are_returned(falsify: Any, wrong: str) -> None:
    falsify(scale(wrong, 0.9))
    inputs = blend_inputs()
    oracle = Oracle(partial(forms.run_blend, backend="eager"), inputs)
    with pytest.warns(RuntimeWarning, match="gated_blend_backward"):
        oracle(forms.run_blend)
    assert states() == {"trusted", "refused"}  # the forward's, the backward's
    with pytest.raises(NotImplementedError, match=r"`gated_blend_backward`.*refused"):
        oracle(partial(forms.run_blend, backend="triton"))
    oracle(forms.run_blend)


@pytest.mark.parametrize("name", [forms.BLEND, forms.CROSS, forms.ROW])  # attention has more ways than one
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_wrong_kernels_of_every_operation_are_refused(
    name: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result is off in one image alone, also where the images are compared one by one."""
    form = forms.WHOLE[name]
    monkeypatch.setattr(trust, "CHUNK", 1)
    inputs = {n: to_device(x) for n, x in form.draw(3).items()}
    oracle = Oracle(form.function, inputs, trainable=forms.floats(inputs), exact=form.function)
    operation = f"{form.operation}_backward" if backward else form.operation
    kernel = dispatch._backends["triton"].kernels[operation]
    right = kernel.run

    def wrong(*args: Any) -> Any:
        results = right(*args)
        results[0][-1].mul_(1.1)
        return results

    oracle(form.function)
    assert states() == {"trusted"}
    identities.known.clear()
    monkeypatch.setattr(kernel, "run", wrong)
    with pytest.warns(RuntimeWarning, match=f"`{operation}`: result 1 of"):
        oracle(form.function)


@pytest.mark.parametrize("kind", ["shared", "per image", "table"])
@pytest.mark.parametrize("numbers", [1, 2**10, 2**22], ids=["one image", "some images", "all images"])
def test_images_are_compared_in_parts(kind: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """P = B: the prompts that images share are not taken for one set per image."""
    monkeypatch.setattr(trust, "CHUNK", numbers)
    inputs = attention_inputs(B=5, P=5, kind=kind)
    Oracle(prompt_attention_reference, inputs)(prompt_attention)
    assert states() == {"trusted"}
    assert len(identities.known) >= 3


def test_overflow_that_plain_pytorch_shares_is_no_fault(falsify: Any) -> None:
    inputs = blend_inputs()
    inputs["x"][1] = torch.inf
    forms.run_blend(**inputs)
    assert states() == {"trusted"}
    identities.known.clear()

    def lose_a_row(name: str, arguments: dict[str, Any]) -> None:
        arguments["p_y"][0, 0] = torch.nan

    falsify(lose_a_row)
    with pytest.warns(RuntimeWarning, match="off by nan"):
        assert forms.run_blend(**inputs)[0, 0].isfinite().all()


def test_an_error_of_triton_is_reported_once_and_eager_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def fail(self: Any, grid: Any) -> Any:
        raise OutOfResources(232448, 101376, "shared memory")

    monkeypatch.setattr(type(gated_blend_fwd_kernel), "__getitem__", fail)
    inputs = blend_inputs()
    if launch.INTERPRETED:  # an error of the interpreter is a bug
        with pytest.raises(OutOfResources):
            forms.run_blend(**inputs)
        monkeypatch.setattr(launch, "INTERPRETED", False)
        monkeypatch.setattr(launch, "unsupported", lambda tensor: None)
        monkeypatch.setattr(launch, "architecture", lambda device: 80)
        monkeypatch.setattr(launch, "toolchain", lambda device: "triton")
        monkeypatch.setattr(launch, "warn_of_assembler_once", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
        identities.known.clear()
    with pytest.warns(RuntimeWarning, match="shared memory"):
        got = forms.run_blend(**inputs)
    assert torch.equal(got, forms.run_blend(**inputs))
    Oracle(partial(forms.run_blend, backend="eager"), inputs, backward=False).check({"output": got})
    with pytest.raises(NotImplementedError, match="shared memory"):
        forms.run_blend(**inputs, backend="triton")


# When it is checked ---------------------------------------------------------------------------------------------------


def test_always_checks_every_call(falsify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_mode", "always")
    calls = 0

    def wrong_in_the_third_call(name: str, arguments: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        arguments["p_y"].mul_(1.05 if calls == 3 else 1.0)

    falsify(wrong_in_the_third_call)
    inputs = blend_inputs()
    for _ in range(2):
        forms.run_blend(**inputs)
    with pytest.warns(RuntimeWarning, match="off by"):
        forms.run_blend(**inputs)


def test_never_checks_nothing(falsify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_mode", "never")
    falsify(lambda name, arguments: arguments["p_y"].fill_(7.0))
    assert (forms.run_blend(**blend_inputs()) == 7).all()
    assert states() == {"unchecked"}


def test_an_unknown_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_mode", "sometimes")
    with pytest.raises(ValueError, match=r"`FASTPROMPT_CHECK`.*'sometimes'.*first, always, never"):
        prompt_attention(**attention_inputs())


def test_a_captured_graph_is_not_checked_and_the_next_eager_call_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    trust._warn_of_capture.cache_clear()
    inputs = attention_inputs()
    with pytest.warns(RuntimeWarning, match="captured into a CUDA graph before they were checked"):
        prompt_attention(**inputs)
    prompt_attention(**inputs)  # no second warning
    assert states() == {"not yet"}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    prompt_attention(**inputs)
    assert states() == {"trusted"}


def test_kernels_are_used_unchecked_where_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trust, "_compare", fail)
    inputs = attention_inputs()
    with pytest.warns(RuntimeWarning, match="not enough memory"):
        got = prompt_attention(**inputs)
    assert torch.equal(prompt_attention(**inputs), got)
    assert states() == {"unchecked"}


def test_a_compiled_graph_is_checked_when_it_runs(fresh_compiler: None, falsify: Any) -> None:
    falsify(scale("p_y", 1.05))
    inputs = blend_inputs()
    with pytest.warns(RuntimeWarning, match="off by"):
        got = torch.compile(forms.OPS.gated_blend, fullgraph=True, backend="aot_eager")(
            *inputs.values(), 1, 2, None, None, None, "auto"
        )[0]
    assert torch.equal(got, forms.run_blend(**inputs)[0])


def test_a_check_leaves_no_trace() -> None:
    inputs = attention_inputs()
    state, q = torch.get_rng_state(), inputs["q"].requires_grad_()
    saved = forms.saved_bytes(lambda: prompt_attention(**inputs))
    assert torch.equal(torch.get_rng_state(), state)
    assert forms.saved_bytes(lambda: prompt_attention(**inputs)) == saved
    assert q.grad is None


# What is shown --------------------------------------------------------------------------------------------------------


def test_the_table_of_backends_shows_what_was_checked(falsify: Any) -> None:
    assert trust.report() == []
    inputs = attention_inputs()
    prompt_attention(**inputs)
    assert str(fastprompt.backends()).endswith("Triton kernels checked on first use: 1 trusted")
    falsify(scale("p_y", 1.05))
    with pytest.warns(RuntimeWarning):
        forms.run_blend(**blend_inputs())
    first, second = str(fastprompt.backends()).splitlines()[-2:]
    assert first == "Triton kernels checked on first use: 1 trusted, 1 refused"
    assert "refused: gated_blend_fwd_kernel (float32" in second
    assert "off by" in second


def test_an_old_assembler_is_reported_once_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 7)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    for capability, version, expected in (((9, 0), "12.8", 1), ((9, 0), "13.1", 0), ((8, 0), "12.8", 0)):
        launch.warn_of_assembler_once.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(launch, "assembler_version", lambda device, v=version: v)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                launch.warn_of_assembler_once(device)
        assert [f"ptxas {version}" in str(w.message) for w in caught] == [True] * expected
    launch.warn_of_assembler_once.cache_clear()


def test_the_table_of_backends_warns_of_an_old_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "assembler_fault", lambda device: f"an old ptxas for {device}")
    assert str(fastprompt.backends()).endswith("\nWarning: an old ptxas for cuda:0")


def test_the_version_of_the_assembler_is_triton_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    version = launch.assembler_version(torch.device("cuda", 0))
    assert version is not None
    assert [part.isdigit() for part in version.split(".")] == [True, True]


def test_the_environment_variable_sets_the_mode() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from fastprompt.ops import trust; print(trust._mode)"],
        env={**os.environ, "FASTPROMPT_CHECK": "Never ", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.stdout.strip(), result.returncode) == ("never", 0), result.stderr
