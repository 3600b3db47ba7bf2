"""replay: a repeated call gives the bits of the call that it repeats, launches the same kernels, and is short."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_operators as forms
import torch
from attention_cases import Shape, draw
from torch import Tensor

from bench.correctness import evaluate
from bench.overhead import calls_in
from bench.overhead import draw as draw_packed
from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton.prompt_attention_fwd import prompt_attention_fwd_kernel
from fastprompt.ops import dispatch, packed_prompt_attention, prompt_attention, replay, trust
from fastprompt.ops.attention_choice import use_way

pytestmark = pytest.mark.skipif(
    dispatch.why_no_triton() is not None, reason="Triton's kernels do not run in this process"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls of the interpreter are recorded too, and by Triton alone."""
    monkeypatch.setattr(replay, "device_type", DEVICE)
    monkeypatch.setattr(replay, "_known", {})
    monkeypatch.setattr(trust, "_mode", "first")
    with dispatch.use_backend("triton"):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The growing list of the kernels that launchers launch; repetitions do not."""
    names: list[str] = []
    right = launch.launch

    def note(kernel: Any, *args: Any, **arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        right(kernel, *args, **arguments)

    monkeypatch.setattr(launch, "launch", note)
    return names


def inputs_of(form: forms.Form) -> dict[str, Any]:
    found = {n: x if x is None else x.to(DEVICE) for n, x in form.draw(3).items()}
    return {n: x.float() if x is not None and x.is_floating_point() else x for n, x in found.items()}


def copies(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values in other memory, so that a repetition that kept an address shows."""
    return {n: x.clone() if isinstance(x, Tensor) else x for n, x in inputs.items()}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", [*forms.OPERATIONS, "attention, shared prompts"])
def test_a_repetition_gives_the_same_bits_without_a_launcher(name: str, launched: list[str]) -> None:
    form = forms.FORMS[name]
    inputs = inputs_of(form)
    with use_way("looped"):
        cotangent = torch.randn_like(form.function(**inputs))
        replay.forget()  # `folded_cross_attention` keeps more for gradients
        first = evaluate(form.function, inputs, cotangent, forms.floats(inputs))
        for _ in range(3):  # records, proves, then repeats
            launched.clear()
            again = evaluate(form.function, copies(inputs), cotangent.clone(), forms.floats(inputs))
    assert launched == []
    assert all(isinstance(x, replay.Replay) for x in replay._known.values())
    assert all(torch.equal(x, again[n]) for n, x in first.items())


def prove(function: Callable[[], Any]) -> None:
    """Call `function` as often as it takes until calls are repetitions: a first run, a record, a comparison."""
    for _ in range(3):
        function()


def test_other_shapes_strides_alignment_and_numbers_are_other_calls(launched: list[str]) -> None:
    inputs = draw(Shape(B=3, Nq=5, N=5, P=3, d=16), torch.float32, DEVICE)
    wide = torch.zeros(inputs["q"].numel() + 1, device=DEVICE)
    unaligned = wide[1:].view_as(inputs["q"])  # type: ignore[arg-type]
    others = [
        inputs | {"q": inputs["q"][:, :4]},  # type: ignore[index]
        inputs | {"q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)},  # type: ignore[union-attr]
        inputs | {"q": unaligned},
        inputs | {"temperature": None},
        inputs | {"scale": 0.3},
    ]
    with use_way("looped"):
        prove(lambda: prompt_attention(**inputs))  # type: ignore[arg-type]
        for other in others:
            launched.clear()
            prove(lambda other=other: prompt_attention(**other))
            assert len(launched) == 3
            prompt_attention(**other)
            assert len(launched) == 3
    assert len(replay._known) == 1 + len(others)


def test_nothing_is_repeated_where_that_is_switched_off(launched: list[str]) -> None:
    inputs = draw(Shape(B=3, Nq=5, N=5, P=3, d=16), torch.float32, DEVICE)
    with use_way("looped"):
        prove(lambda: prompt_attention(**inputs))  # type: ignore[arg-type]
        launched.clear()
        with replay.off():
            prompt_attention(**inputs)  # type: ignore[arg-type]
        assert launched
        launched.clear()
        prompt_attention(**inputs)  # type: ignore[arg-type]
        assert not launched


@pytest.mark.usefixtures("poisoned_memory")
def test_a_repetition_that_differs_is_found_and_given_up(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launches of the record are lost, as if they had been made with wrong arguments."""
    inputs = draw(Shape(B=3, Nq=5, N=5, P=3, d=16), torch.float32, DEVICE)
    with use_way("looped"):
        for _ in range(2):
            expected = prompt_attention(**inputs)  # type: ignore[arg-type]
        (record,) = replay._known.values()
        assert isinstance(record, replay.Replay)
        monkeypatch.setattr(record, "steps", [s for s in record.steps if "_launch" not in s.__qualname__])
        with pytest.warns(RuntimeWarning, match="did not give its bits"):
            assert torch.equal(prompt_attention(**inputs), expected)  # type: ignore[arg-type]
        launched.clear()
        assert torch.equal(prompt_attention(**inputs), expected)  # type: ignore[arg-type]
        assert launched


def test_what_cannot_be_repeated_runs_as_ever(launched: list[str]) -> None:
    x = torch.ones(4, device=DEVICE)
    outside = torch.ones(4, device=DEVICE)
    functions = {
        "a number": lambda x: (x * x.sum().item(),),
        "a tensor from elsewhere": lambda x: (x + outside,),
        "no kernel": lambda x: (x + 1,),
    }
    for name, function in functions.items():
        for i in range(4):
            (got,) = replay.run((name,), function, x * i)
            assert torch.equal(got, function(x * i)[0])
        assert replay._known[(name,)] is False


def test_memory_of_no_more_use_is_free_before_the_end() -> None:
    recorder = replay.Recorder((torch.ones(4),))
    with recorder:
        a = torch.ones(4) * 2
        b = a + 1
        c = b.view(2, 2) + 1
    recorder.launches = 1
    found = recorder.finish((c,))
    assert found is not None
    freed = [step for step in found.steps if "free" in step.__qualname__]
    assert len(freed) >= 2
    assert torch.equal(found((torch.ones(4),))[0], c)


def test_every_call_is_checked_where_that_is_asked_for(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_mode", "always")
    inputs = inputs_of(forms.FORMS["blend without norm"])
    for _ in range(4):
        forms.run_blend(**inputs)
    assert len(launched) == 4


def test_records_are_forgotten_where_shapes_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_SIGNATURES", 3)
    for i in range(5):
        replay.run((i,), lambda: ())
    assert list(replay._known) == [(3,), (4,)]
    replay.forget()
    assert not replay._known


@pytest.mark.parametrize(
    ("trains", "most"), [(False, 120), (True, 145)], ids=["forward", "forward, gradients recorded"]
)
def test_python_of_a_repeated_call_stays_short(
    trains: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in calls of functions, on any machine the same; `python -m bench.overhead` gives the time."""
    inputs = [x.to(DEVICE).requires_grad_(trains) for x in draw_packed(torch.float32)]
    with use_way("looped"):
        prove(lambda: packed_prompt_attention(*inputs))
        monkeypatch.setattr(type(prompt_attention_fwd_kernel), "__getitem__", lambda *_: lambda **_: None)
        assert calls_in(lambda: packed_prompt_attention(*inputs)) <= most


COMPILED = """
import torch
from bench import overhead
from fastprompt.ops.attention_choice import use_way

inputs = [x.requires_grad_() for x in overhead.draw()]
cotangent = torch.ones(2, 17, 1, 64, dtype=torch.bfloat16)

def place(x, tensors):
    if not hasattr(x, "data_ptr") and not isinstance(x, int):
        return x
    address = x.data_ptr() if hasattr(x, "data_ptr") else x
    if address == 0 and not isinstance(x, int):
        return None  # an empty tensor has no address
    for name, t in tensors.items():
        start = t.untyped_storage().data_ptr()
        if start <= address < start + t.untyped_storage().nbytes():
            return name, address - start
    return "memory of its own" if hasattr(x, "data_ptr") or address > 2**32 else x

with overhead.stubbed() as driver:
    for way in ("resident", "looped"):
        found = []
        with use_way(way):
            for _ in range(3):
                driver.launches = []
                out = overhead.ours(*inputs)
                gradients = torch.autograd.grad(out, inputs, cotangent)
                tensors = dict(zip("abcdefgh", [*inputs, cotangent, out, *gradients]))
                found.append([
                    (x.kernel, x.grid, [place(a, tensors) for a in x.arguments]) for x in driver.launches
                ])
        direct, _, repeated = found
        assert len(direct) >= 3 and direct == repeated, (direct, repeated)
        assert {"a", "e", "f"} <= {a[0] for x in direct for a in x[2] if isinstance(a, tuple)}
"""


@pytest.mark.slow
def test_a_repetition_launches_compiled_kernels_with_the_same_arguments() -> None:
    """What reaches the driver is the same: kernels, grids, numbers, and addresses within the call's tensors."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
