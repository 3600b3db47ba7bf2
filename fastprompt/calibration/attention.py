"""Times of the ways to compute attention, forward and backward, each checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprompt.calibration import timing
from fastprompt.calibration.exact import Trial, first_line
from fastprompt.ops.attention_choice import AUTO, WAYS, Way, use_way
from fastprompt.ops.packed_prompt_attention import packed_prompt_attention
from fastprompt.ops.profile_file import DTYPES, Measurement
from fastprompt.ops.prompt_attention import prompt_attention_reference

ROUNDS = 5
WINDOW = 20.0  # ms that each way fills in a round: 100 in all


@dataclass(frozen=True)
class Shape:
    """Attention of a block: `tokens` queries and keys, and `prompts`."""

    tokens: int
    heads: int
    head_dim: int
    prompts: int
    batch: int
    dtype: str
    temperature: bool = False

    def __str__(self) -> str:
        sizes = f"{self.batch} x {self.heads} heads of {self.head_dim}, {self.tokens}+{self.prompts} keys"
        return f"{sizes}, {self.dtype}{', temperature' if self.temperature else ''}"

    def draw(self, device: str) -> dict[str, Tensor]:
        """Return random inputs: qkv [B, N, 3, H, d], prompt_k and prompt_v [P, H, d], temperature [1]."""
        dtype = DTYPES[self.dtype]
        H, d = self.heads, self.head_dim
        found = {"qkv": torch.randn(self.batch, self.tokens, 3, H, d, device=device, dtype=dtype)}
        for name in ("prompt_k", "prompt_v") if self.prompts else ():
            found[name] = torch.randn(self.prompts, H, d, device=device, dtype=dtype)
        if self.temperature:
            found["temperature"] = 0.5 + torch.rand(1, device=device)
        return found


def measure(shape: Shape, device: str, rounds: int = ROUNDS) -> Iterator[Measurement]:
    """Yield the times of the forward and of the backward, each if a way computes it rightly.

    Which way runs the backward does not depend on the one that ran the forward, so each is checked and timed alone.
    """
    inputs = shape.draw(device)
    count = timing.input_sets(sum(x.numel() * x.element_size() for x in inputs.values()), device)
    sets = [inputs, *(shape.draw(device) for _ in range(count - 1))]
    for backward in (False, True):
        refused = {way: fault for way in WAYS if (fault := why_wrong(way, inputs, backward)) is not None}
        if len(refused) < len(WAYS):
            steps = [_step(given, backward) for given in sets]
            yield _measured(shape, backward, steps, refused, rounds, device)


def why_wrong(way: Way, inputs: dict[str, Tensor], backward: bool) -> str | None:
    """Return why `way` cannot compute the forward, or the backward of whatever forward, or None."""
    forward_by: str = AUTO if backward else way
    run = partial(_by, forward_by, lambda **given: _forward(**given)[0])
    plain = partial(packed_prompt_attention, backend="eager")
    try:
        trial = Trial(run, plain, _reference, inputs, per_image=("qkv",))
        trial.check(backward, partial(use_way, way) if backward else nullcontext)
    except Exception as error:
        return first_line(error)
    return None


def _step(inputs: dict[str, Tensor], backward: bool) -> timing.Step:
    if not backward:
        return partial(_forward, **inputs)
    out, lse = _forward(**inputs)
    return partial(_backward, torch.randn_like(out), out, lse, **inputs)


def _measured(
    shape: Shape,
    backward: bool,
    steps: list[timing.Step],
    refused: dict[Way, str],
    rounds: int,
    device: str,
) -> Measurement:
    right = [way for way in WAYS if way not in refused]
    competitors: dict[str, list[timing.Step]] = {w: [partial(_by, w, s) for s in steps] for w in right}
    times = timing.interleaved(competitors, rounds, device, window=WINDOW)
    return Measurement(
        dtype=shape.dtype,
        head_dim=shape.head_dim,
        queries=shape.tokens,
        keys=shape.tokens,
        prompts=shape.prompts,
        temperature=shape.temperature,
        backward=backward,
        batch=shape.batch,
        heads=shape.heads,
        microseconds={way: round(1e3 * times[way]["p50"], 2) for way in right},
        refused=refused,
    )


def _by(way: str, call: Callable[..., Any], **inputs: Tensor) -> Any:
    with use_way(way):
        return call(**inputs)


def _forward(
    qkv: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    # The operator itself: without prompts, the public function leaves it to PyTorch's attention.
    return torch.ops.fastprompt.packed_prompt_attention(
        qkv, prompt_k, prompt_v, temperature, None, qkv.shape[-1] ** -0.5, "auto"
    )


def _backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    temperature: Tensor | None = None,
) -> tuple[Tensor, ...]:
    tensors = (qkv, prompt_k, prompt_v, temperature)
    needs = [x is not None for x in tensors]
    return torch.ops.fastprompt.packed_prompt_attention_backward(
        grad, *tensors, None, out, lse, qkv.shape[-1] ** -0.5, needs, "auto"
    )


def _reference(qkv: Tensor, **rest: Any) -> Tensor:
    return prompt_attention_reference(*qkv.unbind(2), **rest)
