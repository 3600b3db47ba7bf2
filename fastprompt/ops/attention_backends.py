"""Prompt attention on the backends `triton` and `eager`, for the operators: by the first way that can run the call."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprompt.kernels.identities import Refused
from fastprompt.ops import attention_choice, attention_ways, dispatch, prompt_segment, trust
from fastprompt.ops.attention_choice import Way
from fastprompt.ops.attention_ways import Gradients, Inputs, call_of, needs_image_keys


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of qkv [B, N, 3, H, d]; of [B, N, 1, H, d], queries alone, k and v have no rows."""
    q = qkv.select(2, 0)
    return (q, q[:, :0], q[:, :0]) if qkv.shape[2] == 1 else (q, qkv.select(2, 1), qkv.select(2, 2))


# By one way ------------------------------------------------------------------------------------------------------
#
# `kernels`: whether Triton's kernels serve. The other arguments and the results are the operators'.


def _forward(way: Way, kernels: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
    if kernels and way in ("resident", "looped"):
        result: tuple[Tensor, Tensor] = _module("prompt_attention").forward(*arguments, way=way)
        return result
    return attention_ways.forward(way, Inputs(*arguments), _segment(kernels))


def _backward(way: Way, kernels: bool, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if kernels and way in ("resident", "looped"):
        result: tuple[Tensor, ...] = _module("prompt_attention").backward(grad, *arguments, way=way)
        return result
    *tensors, out, lse, scale, needs = arguments
    inputs = Inputs(*[*tensors, scale])
    gradients = attention_ways.gradients(way, grad, inputs, out, lse, needs, _segment(kernels))
    return _outputs(gradients, inputs)


def _packed_forward(way: Way, kernels: bool, qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _forward(way, kernels, *unpack(qkv), *arguments)


def _packed_backward(
    way: Way, kernels: bool, grad: Tensor, qkv: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *tensors, out, lse, scale, needs = arguments
    if not needs[0] and qkv.shape[2] == 1:
        *_, dpk, dpv, dt = _backward(way, kernels, grad, *unpack(qkv), *arguments[:-1], _unpacked(needs))
        return qkv.new_empty(0), dpk, dpv, dt
    if kernels and way in ("resident", "looped"):
        result: tuple[Tensor, ...] = _module("prompt_attention").packed_backward(
            grad, qkv, *arguments, way=way
        )
        return result
    packed = torch.empty(qkv.shape if needs[0] else 0, dtype=qkv.dtype, device=qkv.device)
    parts = packed.unbind(2) if needs[0] else (None,) * 3
    inputs = Inputs(*[*unpack(qkv), *tensors, scale])
    gradients = attention_ways.gradients(
        way, grad, inputs, out, lse, _unpacked(needs), _segment(kernels), parts[0]
    )
    for part, gradient in zip(parts, gradients, strict=False):
        if part is not None and gradient is not None and part is not gradient:
            part.copy_(gradient)
    return packed, *_outputs([None, None, None, *gradients[3:]], inputs)[3:]


def _unpacked(needs: Sequence[bool]) -> list[bool]:
    """Return the six flags of q, k, v, ... for the four of qkv, ..."""
    return [needs[0]] * 3 + list(needs[1:])


def _outputs(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return gradients as an operator's outputs, in the inputs' dtypes."""
    # They must not share memory, so each gradient that is not needed is a separate empty tensor.
    return tuple(
        inputs.q.new_empty(0) if g is None or x is None else g.to(x.dtype).contiguous()
        for g, x in zip(gradients, inputs[:6], strict=True)
    )


# By the first way that can ---------------------------------------------------------------------------------------


class _Operation:
    """An operator's kernels on both backends.

    Args:
        name: of the operator.
        by: computes it by one way.
        read: returns, of its arguments, the inputs and which of their gradients are needed (None: it is a forward).
        exact: computes it from arguments in float64, to check kernels; default by joining keys.
    """

    def __init__(
        self,
        name: str,
        by: Callable[..., Any],
        read: Callable[..., tuple[Inputs, Sequence[bool] | None]],
        exact: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.by, self.read = name, by, read
        trust.describe(name, self.images, exact)
        dispatch.register(name, "triton", self.run_triton, self.why_not_triton, self.why_defer)
        dispatch.register(name, "eager", self.run_eager, self.why_not_eager)

    def run_eager(self, *arguments: Any) -> Any:
        inputs, needs = self.read(*arguments)
        _check_index(inputs)
        way = attention_choice.ways(call_of(inputs, needs), triton=False)[0]
        return self.by(way, False, *arguments)

    def why_not_eager(self, *arguments: Any) -> str | None:
        forced, q = attention_choice.forced(), arguments[0]
        if forced in ("resident", "looped") and q.is_cuda and q.dtype != torch.float64:
            return f"the way {forced!r} was requested by name, and on a GPU only Triton's kernels have it"
        return None

    def run_triton(self, *arguments: Any) -> Any:
        inputs, needs = self.read(*arguments)
        plain = partial(self.by, "joined", False)
        reasons = []
        for way in attention_choice.ways(call_of(inputs, needs)):
            reason = _why_not_way(way, inputs, needs)
            if reason is None:
                try:
                    return trust.run(self.name, partial(self.by, way, True), plain, *arguments)
                except Refused as refused:
                    reason = str(refused)
            reasons.append(f"{way!r}: {reason}")
        raise Refused("; ".join(reasons))

    def images(self, *arguments: Any) -> list[int]:
        """Return the positions of the arguments whose first dimension counts the images."""
        inputs, needs = self.read(*arguments)
        shared = () if inputs.prompt_index is None and _ndim(inputs.prompt_k) == 4 else inputs[3:5]
        single = {id(x) for x in (*shared, inputs.temperature)}
        return [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and id(x) not in single]

    def why_not_triton(self, *arguments: Any) -> str | None:
        """Return why no way can run the call, for its device, dtype or head_dim, or None."""
        inputs, needs = self.read(*arguments)
        kernels = _module("prompt_attention")
        reason: str | None = (
            kernels.can_forward(inputs.q) if needs is None else kernels.can_backward(inputs.q, *inputs[:4])
        )
        return reason

    def why_defer(self, *arguments: Any) -> str | None:
        """Return why "auto" should leave to PyTorch alone what Triton's kernels can run, or None."""
        best = attention_choice.ways(call_of(*self.read(*arguments)))[0]
        return "the way 'joined', preferred for this call, is PyTorch's alone" if best == "joined" else None


def _why_not_way(way: Way, inputs: Inputs, needs: Sequence[bool] | None) -> str | None:
    """Return why `way` cannot run with Triton's kernels a call that they can run otherwise, or None."""
    if way == "joined":
        return "it has no kernel of Triton's"
    return _why_not_resident(inputs, needs) if way == "resident" else None


def _why_not_resident(inputs: Inputs, needs: Sequence[bool] | None) -> str | None:
    """Return why no kernel that holds all keys of an image and head in one program can run the call, or None."""
    q, k, _, prompt_k, *_ = inputs
    (B, Nq, H, d), P = q.shape, 0 if prompt_k is None else prompt_k.shape[-3]
    keys, config, launch = k.shape[1] + P, _module("prompt_attention_config"), _module("launch")
    architecture = launch.architecture(q.device)
    if keys > attention_choice.RESIDENT_KEYS:
        return f"{keys} keys are more than one program holds ({attention_choice.RESIDENT_KEYS})"
    if needs is None:
        found = config.choose(architecture, "fwd", d, Nq, keys, q.element_size())
        return "there is none for this head_dim, dtype and GPU" if found.block_n else None
    if not config.has_resident_backward(architecture, d, keys, q.element_size()):
        return "there is no backward for this head_dim, dtype and GPU"
    prompts = set(needs[3:5]) if P else set()
    if not (needs[0] and needs[1] and needs[2]) or len(prompts) == 2:
        return "not all gradients are needed, and it computes all of them"
    slots = launch.multiprocessors(q.device)
    return None if slots <= B * H else f"{B * H} images and heads leave most of {slots} multiprocessors idle"


def _check_index(inputs: Inputs) -> None:
    # On a GPU the check would synchronize; there index_select asserts.
    prompt_k, index = inputs.prompt_k, inputs.prompt_index
    if prompt_k is None or index is None or index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= prompt_k.shape[0]:
        raise IndexError(
            f"`prompt_attention`: `prompt_index` is {low} to {high}, outside the table of T={prompt_k.shape[0]} "
            f"sets; use 0..{prompt_k.shape[0] - 1}"
        )


def _module(name: str) -> Any:
    """Return a module of launchers; importing it imports Triton."""
    return importlib.import_module(f"fastprompt.kernels.triton.{name}")


def _ndim(x: Tensor | None) -> int:
    return 0 if x is None else x.ndim


def _segment(kernels: bool) -> Any:
    return _module("prompt_segment") if kernels else prompt_segment


def _read_forward(*arguments: Any) -> tuple[Inputs, None]:
    return Inputs(*arguments), None


def _read_backward(grad: Tensor, *arguments: Any) -> tuple[Inputs, Sequence[bool]]:
    *tensors, _out, _lse, scale, needs = arguments
    return Inputs(*[*tensors, scale]), needs


def _read_packed_forward(qkv: Tensor, *arguments: Any) -> tuple[Inputs, None]:
    return Inputs(*unpack(qkv), *arguments), None


def _read_packed_backward(grad: Tensor, qkv: Tensor, *arguments: Any) -> tuple[Inputs, Sequence[bool]]:
    *tensors, _out, _lse, scale, needs = arguments
    return Inputs(*[*unpack(qkv), *tensors, scale]), _unpacked(needs)


def _exact_backward(by: Callable[..., Any], *arguments: Any) -> Any:
    """Return gradients by joining keys, from an output and log-sum-exp that are as exact as the inputs."""
    *before, out, lse, scale, needs = arguments
    grad, *tensors = before
    if needs_image_keys(needs if len(needs) == 6 else _unpacked(needs)):  # else there may be no image's keys
        forward = _forward if by is _backward else _packed_forward
        out, lse = forward("joined", False, *tensors, scale)
    return by("joined", False, grad, *tensors, out, lse, scale, needs)


_Operation("prompt_attention", _forward, _read_forward)
_Operation("prompt_attention_backward", _backward, _read_backward, partial(_exact_backward, _backward))
_Operation("packed_prompt_attention", _packed_forward, _read_packed_forward)
_Operation(
    "packed_prompt_attention_backward",
    _packed_backward,
    _read_packed_backward,
    partial(_exact_backward, _packed_backward),
)
