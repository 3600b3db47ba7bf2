"""Broken copies of whole official states: each is refused and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from official_states import State, backbone_state, golden, jax_names, prefixed, scramble, separate
from test_checkpoint import refused
from test_checkpoint_backbones import cvpt_copies, cvpts_vpt
from torch import Tensor

from fastprompt import load_official_state_dict


def _vpt() -> tuple[Any, State]:
    model, state, _ = golden("vpt_deep_cls")
    return model, prefixed(jax_names(backbone_state()) | state, "enc.transformer.")


def _gate_vpt() -> tuple[Any, State]:
    model, state, _ = golden("gatevpt_mean")
    return model, backbone_state() | state


def _cvpt() -> tuple[Any, State]:
    model, state, _ = golden("cvpt_insert3")
    return model, backbone_state() | cvpt_copies(backbone_state()) | state


def _cvpts_vpt() -> tuple[Any, State]:
    return cvpts_vpt("vpt_shallow_cls")[:2]


def _da_vpt() -> tuple[Any, State]:
    model, state, _ = golden("davpt_cls")
    return model, separate(backbone_state()) | state | {
        "vpt_criterion.mapping": model.class_to_prompt.clone()
    }


def _prompts_alone() -> tuple[Any, State]:
    return golden("davpt_cls")[:2]


FORMATS = {f.__name__: f for f in (_vpt, _gate_vpt, _cvpt, _cvpts_vpt, _da_vpt, _prompts_alone)}
# What a state may lack: the class map, CVPT's copies of the attention. The VPT in CVPT's code without its prompts is a
# backbone like any other.
OPTIONAL = {"_da_vpt": "vpt_criterion.mapping", "_cvpt": ".CrossAttn.", "_cvpts_vpt": "Prompt_Tokens"}


def with_nan(t: Tensor) -> Any:
    t = t.double().clone()
    t.view(-1)[-1] = torch.nan
    return t


# What breaks one tensor of a state; None takes it out.
BREAK: dict[str, Callable[[Tensor], Any] | None] = {
    "missing": None,
    "row cut off": lambda t: t[..., :-1],
    "row added": lambda t: torch.cat([t, t[:1]]),
    "dimension added": lambda t: t[None],
    "flattened": lambda t: t.flatten() if t.ndim > 1 else t[:, None],
    "NaN": with_nan,
    "infinite": lambda t: t.double() + torch.inf,
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "no tensor": lambda t: str(t),
    "array of objects": lambda t: np.array(["a", None]),
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_broken_copy_is_refused(name: str) -> None:
    model, state = FORMATS[name]()
    scramble(model, frozen=True)
    for i, key in enumerate(state):
        faults = list(BREAK)
        if "blocks." in key or "layer." in key:  # of the many alike, each meets one fault
            faults = [faults[i % len(faults)]]
        for fault in faults:
            if OPTIONAL.get(name, "-") in key and fault == "missing":
                continue
            copy: dict[str, Any] = {k: t for k, t in state.items() if k != key}
            breaks = BREAK[fault]
            if breaks is not None:
                copy[key] = breaks(state[key])
            try:
                refused(model, copy)
            except BaseException as error:
                raise AssertionError(f"{key}: {fault}") from error
    assert set(load_official_state_dict(model, state).loaded) == {k for k in state if ".CrossAttn." not in k}


@pytest.mark.parametrize("name", FORMATS)
def test_not_strict_takes_no_broken_tensor(name: str) -> None:
    model, state = FORMATS[name]()
    key = next(k for k in state if "rompt" in k)
    for fault in ("row cut off", "row added", "dimension added", "NaN", "complex", "sparse"):
        broken = BREAK[fault]
        assert broken is not None
        refused(model, state | {key: broken(state[key])}, strict=False)


def test_integers_and_overflow_are_refused() -> None:
    model, state = _prompts_alone()
    key = "proxy_prompt_tokens"
    (line,) = refused(model, state | {key: state[key].long()})[1:]
    assert line == f"- {key}: is torch.int64; a floating-point dtype is needed"
    model.half()
    (line,) = refused(model, state | {key: state[key] + 1e6})[1:]
    assert line.startswith(f"- {key}: contains NaN or infinity as torch.float16")


def test_truncated_states_are_refused() -> None:
    model, state = _vpt()
    keys = list(state)
    for end in range(0, len(keys), 7):
        refused(model, {k: state[k] for k in keys[:end]})
