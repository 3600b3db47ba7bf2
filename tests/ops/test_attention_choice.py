"""Which way a call takes: the defaults, one forced by name, and what cannot run."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import Shape, concatenated, draw
from numerics import backends_of

from bench.correctness import Oracle
from fastprompt.kernels import identities
from fastprompt.ops import attention_choice, packed_prompt_attention, prompt_attention
from fastprompt.ops.attention_backends import _module
from fastprompt.ops.attention_choice import WAYS, Call, use_way, ways

# ViT-B at 224 pixels with 50 prompts on an H100.
HOPPER = Call((9, 0), torch.bfloat16, 64, 197, 197, 50)
CPU = HOPPER._replace(capability=None)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "resident"),
        ({"backward": True}, "resident"),
        ({"keys": 206}, "resident"),
        ({"keys": 207}, "split"),
        ({"head_dim": 80}, "split"),
        ({"capability": (8, 0)}, "split"),
        ({"capability": (8, 9)}, "split"),
        ({"capability": (10, 0)}, "split"),
        ({"capability": (12, 0)}, "split"),
        ({"dtype": torch.float32}, "split"),
        ({"dtype": torch.float64}, "joined"),
        ({"capability": (7, 5)}, "joined"),
        ({"capability": (7, 5), "queries": 1}, "split"),
        ({"prompts": 0}, "joined"),
        ({"prompts": 0, "temperature": True}, "resident"),
        ({"queries": 1}, "looped"),
        ({"backward": True, "only_prompts": True}, "split"),
        ({"keys": 577, "temperature": True}, "split"),
        ({"keys": 577, "temperature": True, "backward": True}, "looped"),
    ],
    ids=str,
)
def test_defaults(changes: dict[str, Any], first: str) -> None:
    found = ways(HOPPER._replace(**changes))
    assert found[0] == first
    assert len(set(found)) == len(found)
    assert "joined" in found  # the fallback of last resort


def test_without_triton_no_way_needs_it_on_a_gpu() -> None:
    for call in (HOPPER, HOPPER._replace(queries=1), HOPPER._replace(dtype=torch.float64)):
        assert set(ways(call, triton=False)) == {"split", "joined"}
    assert ways(CPU, triton=False)[0] == "joined"


@pytest.mark.parametrize("way", WAYS)
def test_a_way_by_name_is_the_only_one(way: str) -> None:
    with use_way(way):
        for call in (HOPPER, CPU):
            assert ways(call) == ways(call, triton=False) == (way,)
        with use_way("auto"):
            assert ways(HOPPER)[0] == "resident"
    assert ways(HOPPER)[0] == "resident"


def test_an_unknown_way_is_named() -> None:
    with pytest.raises(ValueError, match=r"`use_way`: there is no way 'flash'.*'joined'"), use_way("flash"):
        pass


def test_a_wrong_environment_variable_is_an_error_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # test_dispatch.py reads the variable in a process of its own.
    monkeypatch.setattr(attention_choice, "_request", "fast")
    with pytest.raises(ValueError, match="`FASTPROMPT_ATTENTION`: there is no way 'fast'"):
        prompt_attention(**draw(Shape(), torch.float32))


@pytest.mark.skipif("triton" not in backends_of("prompt_attention"), reason="Triton runs nothing here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has other tiles")
class TestTriton:
    """By Triton's interpreter."""

    def test_a_way_that_triton_has_no_kernel_for_is_refused_with_the_reason(self) -> None:
        inputs = draw(Shape(B=1, Nq=2, N=260), torch.float32)
        with use_way("resident"), pytest.raises(NotImplementedError, match="264 keys are more than"):
            prompt_attention(**inputs, backend="triton")
        with use_way("joined"), pytest.raises(NotImplementedError, match="no kernel of Triton's"):
            prompt_attention(**inputs, backend="triton")

    @pytest.mark.parametrize(
        ("way", "kernel"),
        [
            ("resident", "prompt_attention_fwd_resident_kernel"),
            ("looped", "prompt_attention_fwd_kernel"),
            ("split", "prompt_segment_fwd_kernel"),
        ],
    )
    def test_each_way_launches_its_own_kernels(
        self, way: str, kernel: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launched = []
        launch = _module("launch")
        monkeypatch.setattr(launch, "launch", lambda kernel, *args, **named: launched.append(kernel))
        inputs = draw(Shape(Nq=18), torch.float32)
        with use_way(way):
            prompt_attention(**inputs, backend="triton")
        assert [k.fn.__name__ for k in launched] == [kernel]

    @pytest.mark.parametrize("way", ["looped", "split"])
    @pytest.mark.parametrize(
        ("shape", "trainable"),
        [
            (Shape(B=2, Nq=5, N=3, P=2, d=8), None),
            (Shape(B=2, Nq=5, N=3, P=2, d=40, kind="table"), None),
            (Shape(B=2, Nq=5, N=3, P=2, d=8, kind="per image"), {"prompt_k", "prompt_v"}),
            (Shape(B=2, Nq=5, N=0, P=2, d=8), None),
        ],
        ids=["shared", "table", "per image, prompts alone", "no image keys"],
    )
    def test_a_way_by_name_has_the_right_numbers(
        self, way: str, shape: Shape, trainable: set[str] | None
    ) -> None:
        oracle = Oracle(concatenated, draw(shape, torch.float32), trainable=trainable)
        with use_way(way):
            oracle(partial(prompt_attention, backend="triton"))

    def test_packed_by_split(self) -> None:
        inputs = draw(Shape(B=2, Nq=5, N=5, P=2, d=8), torch.float16)
        inputs["qkv"] = torch.stack([inputs.pop(name) for name in "qkv"], 2)  # type: ignore[arg-type]
        oracle = Oracle(lambda qkv, **rest: concatenated(*qkv.unbind(2), **rest), inputs)
        with use_way("split"):
            oracle(partial(packed_prompt_attention, backend="triton"))

    def test_a_refused_way_is_followed_by_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launchers, tried = _module("prompt_attention"), []
        right = launchers.forward

        def refused(*args: Any, way: str) -> Any:
            tried.append(way)
            if way == "resident":
                raise identities.Refused("it is wrong")
            return right(*args, way=way)

        monkeypatch.setattr(launchers, "forward", refused)
        inputs = draw(Shape(Nq=18), torch.float32)
        Oracle(concatenated, inputs, backward=False)(partial(prompt_attention, backend="triton"))
        assert tried == ["resident", "looped"]
        with use_way("resident"), pytest.raises(NotImplementedError, match="'resident': it is wrong"):
            prompt_attention(**inputs, backend="triton")
