"""Gated prompt blending: a residual add in which the prompt rows are blended with the rows that entered the block.

    y = x + delta;   y[:, start : start + length] = gate · y[:, ...] + (1 - gate) · prompt_in

GateVPT (Yoo et al., "Improving Visual Prompt Tuning for Self-supervised Vision Transformers", ICML 2023): a block
passes on `gate` of what it did to the prompts. Since y = prompt_in + Δ on those rows, it is a gated residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprompt.kernels import native
from fastprompt.ops import dispatch, triton_backend
from fastprompt.ops.registration import (
    accumulation_dtype,
    as_gradient,
    autocast,
    autocast_enabled,
    define,
    differentiate,
)


def gated_blend(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor,
    gate: Tensor,
    start: int,
    length: int,
    *,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """x + delta, with rows start..start+length blended with `prompt_in` by `gate`; differentiable in all tensors.

    Args:
        x, delta: [B, N, D], N counting prefix, prompt and patch rows.
        prompt_in: [B, P, D], P = `length`: the prompt rows that entered the block.
        gate: one-element tensor, sigmoid(logit) in GateVPT; any floating dtype, computed in float32 or better.
        start, length: where the prompt rows stand in N.
        backend: "auto", or the backend that has to serve this call.

    Returns:
        [B, N, D], contiguous, in x's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message names value and remedy.
    """
    check_blend("gated_blend", x, delta, prompt_in, gate, start, length)
    return torch.ops.fastprompt.gated_blend(
        x, delta, prompt_in, gate, start, length, dispatch.requested(backend)
    )


def gated_blend_reference(
    x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int
) -> Tensor:
    """The specification of :func:`gated_blend`: plain PyTorch, in float32 or better. Returns [B, N, D]."""
    with torch.autocast(x.device.type, enabled=False):
        wide = accumulation_dtype(x.dtype)
        out = x.to(wide) + delta.to(wide)
        before, rows, after = out.split([start, length, x.shape[1] - start - length], dim=1)
        g = gate.to(wide).reshape(())
        return torch.cat([before, g * rows + (1 - g) * prompt_in.to(wide), after], dim=1).to(x.dtype)


def check_blend(
    caller: str,
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor | None,
    gate: Tensor | None,
    start: int,
    length: int,
) -> None:
    """Raise ValueError or TypeError in the name of `caller` unless the arguments fit.

    `prompt_in` and `gate` may both be None where no row is blended.
    """

    def fail(what: str) -> None:
        raise ValueError(f"`{caller}`: {what}")

    if x.ndim != 3 or delta.shape != x.shape:
        fail(f"`x` and `delta` must both be [B, N, D]; got {tuple(x.shape)} and {tuple(delta.shape)}")
    B, N, D = x.shape
    if start < 0 or length < 0 or start + length > N:
        fail(f"rows start={start} .. start+length={start + length} do not lie within N={N}")
    tensors = {"delta": delta}
    if prompt_in is None or gate is None:
        if prompt_in is not gate or length > 0:
            fail(
                f"without `prompt_in` and `gate` no row is blended; got length={length}; pass both or neither"
            )
    else:
        tensors["prompt_in"] = prompt_in
        if prompt_in.shape != (B, length, D):
            fail(
                f"`prompt_in` must be [B, length, D] = {(B, length, D)}; got {tuple(prompt_in.shape)}; expand it"
            )
        if gate.numel() != 1 or not gate.is_floating_point():
            fail(
                f"`gate` must be a floating-point tensor of one element; got {gate.dtype}, {tuple(gate.shape)}"
            )
        if gate.device != x.device:
            fail(f"`gate` is on {gate.device} and `x` on {x.device}; move it there")
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            fail(f"`{name}` is on {tensor.device} and `x` on {x.device}; move it there")
    if not x.is_floating_point():
        raise TypeError(f"`{caller}`: `x` must be floating point; got {x.dtype}; convert it")
    if not autocast_enabled(x):
        for name, tensor in tensors.items():
            if tensor.dtype != x.dtype:
                raise TypeError(
                    f"`{caller}`: `{name}` is {tensor.dtype} and `x` {x.dtype}; convert one of them"
                )


# The operator ---------------------------------------------------------------------------------------------------


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad: Tensor,
    gate: Tensor,
    difference: Tensor | None,
    start: int,
    length: int,
    need_input: bool,
    need_prompt: bool,
    need_gate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, D = grad.shape
    return (
        grad.new_empty(grad.shape if need_input else 0),
        grad.new_empty((B, length, D) if need_prompt else 0),
        gate.new_empty(gate.shape if need_gate else 0),
    )


def _flops(*args: Any, **kwargs: Any) -> int:
    return 0  # FlopCounterMode counts matrix products; additions and elementwise products are free there.


_OPERATOR = define(
    "gated_blend(Tensor x, Tensor delta, Tensor prompt_in, Tensor gate, SymInt start, SymInt length, str backend) "
    "-> Tensor",
    fake=_fake,
    flops=_flops,
)
# `difference` [B, length, D] is x + delta - prompt_in on the prompt rows, None unless d(gate) is needed.
_BACKWARD = define(
    "gated_blend_backward(Tensor grad, Tensor gate, Tensor? difference, SymInt start, SymInt length, "
    "bool need_input, bool need_prompt, bool need_gate, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    flops=_flops,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, delta, prompt_in, gate, start, length, backend = inputs
    ctx.start, ctx.length, ctx.backend = start, length, backend
    difference = None
    if ctx.needs_input_grad[3]:
        # P rows made again here, so that neither x nor delta is kept alive for one scalar's gradient.
        difference = x.narrow(1, start, length) + delta.narrow(1, start, length) - prompt_in
    ctx.save_for_backward(gate, difference)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate, difference = ctx.saved_tensors
    need_x, need_delta, need_prompt, need_gate = ctx.needs_input_grad[:4]
    d_input, d_prompt, d_gate = torch.ops.fastprompt.gated_blend_backward(
        grad,
        gate,
        difference,
        ctx.start,
        ctx.length,
        need_x or need_delta,
        need_prompt,
        need_gate,
        ctx.backend,
    )
    return (
        d_input if need_x else None,
        d_input if need_delta else None,
        d_prompt if need_prompt else None,
        d_gate if need_gate else None,
        None,
        None,
        None,
    )


differentiate(_OPERATOR, setup=_setup, backward=_backward)
as_gradient(_BACKWARD)
autocast(_OPERATOR, promote=(0, 1, 2))


# The backends `eager` and `cpu` ---------------------------------------------------------------------------------


def _forward_eager(
    x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int
) -> Tensor:
    wide = accumulation_dtype(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.add(x, delta, out=out)
    rows = x.narrow(1, start, length).to(wide) + delta.narrow(1, start, length)
    out.narrow(1, start, length).copy_(torch.lerp(prompt_in.to(wide), rows, gate.to(wide).reshape(())))
    return out


def _backward_eager(
    grad: Tensor,
    gate: Tensor,
    difference: Tensor | None,
    start: int,
    length: int,
    need_input: bool,
    need_prompt: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(grad.dtype)
    rows = grad.narrow(1, start, length).to(wide)
    g = gate.to(wide).reshape(())
    d_input, d_prompt, d_gate = grad.new_empty(0), grad.new_empty(0), gate.new_empty(0)
    if need_input:
        d_input = grad.clone(memory_format=torch.contiguous_format)
        d_input.narrow(1, start, length).copy_(g * rows)
    if need_prompt:
        d_prompt = ((1 - g) * rows).to(grad.dtype).contiguous()
    if need_gate and difference is not None:
        d_gate = (rows * difference).sum().reshape(gate.shape).to(gate.dtype)
    return d_input, d_prompt, d_gate


def _forward_cpu(
    x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int
) -> Tensor:
    return torch.ops.fastprompt_cpu.gated_blend(x, delta, prompt_in, gate, start, length)


def _backward_cpu(
    grad: Tensor, gate: Tensor, difference: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastprompt_cpu.gated_blend_backward(grad, gate, difference, *rest)


def _can_run_cpu(x: Tensor, *args: Any) -> str | None:
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it serves float32, float64, bfloat16 and float16, not {x.dtype}"
    return dispatch.needs_device(x, "cpu")


dispatch.register_availability("cpu", native.load, native.warn_missing_once)
dispatch.register("gated_blend", "cpu", _forward_cpu, _can_run_cpu)
dispatch.register("gated_blend_backward", "cpu", _backward_cpu, _can_run_cpu)
dispatch.register("gated_blend", "eager", _forward_eager, dispatch.always)
dispatch.register("gated_blend_backward", "eager", _backward_eager, dispatch.always)
triton_backend.serve("gated_blend", "gated_blend", "forward")
triton_backend.serve("gated_blend_backward", "gated_blend", "backward")
