"""Gated prompt blending: a residual add that blends the prompt rows with those of the block's input.

    y = x + delta;   y[:, start : start + length] = gate · y[:, ...] + (1 - gate) · prompt_in

GateVPT (Yoo et al., "Improving Visual Prompt Tuning for Self-supervised Vision Transformers", ICML 2023) scales a
block's update of the prompts by `gate`: a gated residual. With a norm, one kernel also computes LayerNorm(y), the input
of the next block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprompt.ops import dispatch, trust
from fastprompt.ops.checks import check_devices_and_dtypes, check_one_element
from fastprompt.ops.norm import (
    Norm,
    check_norm,
    empty_norm,
    layer_norm,
    layer_norm_backward,
    layer_norm_reference,
)
from fastprompt.ops.operator import (
    accumulation_dtype,
    autocast,
    define_operator,
    mark_as_backward,
    no_flops,
    register_gradient,
)

_Forward = tuple[Tensor, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor]


def gated_blend(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor,
    gate: Tensor,
    start: int,
    length: int,
    *,
    norm: Norm | None = None,
    backend: str = dispatch.AUTO,
) -> tuple[Tensor, Tensor | None]:
    """Return x + delta, with rows start..start+length blended with `prompt_in` by `gate`, and LayerNorm of that.

    Args:
        x, delta: [B, N, D]; N counts prefix, prompt and patch rows.
        prompt_in: [B, P, D], P = `length`: the prompt rows of the block's input.
        gate: one-element tensor, sigmoid(logit) in GateVPT; any floating dtype, computed in float32 or better.
        start, length: the prompt rows among the N.
        norm: the LayerNorm that follows, or None; frozen.
        backend: "auto", or the backend that must run this call (:func:`fastprompt.backends`).

    Returns:
        y [B, N, D], contiguous, in x's dtype, and LayerNorm(y) likewise, or None without a norm. The norm acts on y
        rounded to that dtype and computes in float32 or better.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message names value and remedy.
        NotImplementedError: `norm` requires a gradient, or `backend` names one that cannot run this call.
    """
    _check(x, delta, prompt_in, gate, start, length, norm)
    affine = (None, None, None) if norm is None else norm
    y, normed, _, _ = torch.ops.fastprompt.gated_blend(
        x, delta, prompt_in, gate, start, length, *affine, dispatch.requested(backend)
    )
    return y, None if norm is None else normed


def gated_blend_reference(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor,
    gate: Tensor,
    start: int,
    length: int,
    *,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute :func:`gated_blend` in plain PyTorch, in float32 or better, autocast off: the specification."""
    with torch.autocast(x.device.type, enabled=False):
        wide = accumulation_dtype(x.dtype)
        out = x.to(wide) + delta.to(wide)
        before, rows, after = out.split([start, length, x.shape[1] - start - length], dim=1)
        g = gate.to(wide).reshape(())
        y = torch.cat([before, g * rows + (1 - g) * prompt_in.to(wide), after], dim=1).to(x.dtype)
        return y, None if norm is None else layer_norm_reference(y, norm)


def _check(
    x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int, norm: Norm | None
) -> None:
    def fail(what: str) -> None:
        raise ValueError(f"`gated_blend`: {what}")

    if x.ndim != 3 or delta.shape != x.shape:
        fail(f"`x` and `delta` must both be [B, N, D]; got {tuple(x.shape)} and {tuple(delta.shape)}")
    B, N, D = x.shape
    if start < 0 or length < 0 or start + length > N:
        fail(f"rows start={start} .. start+length={start + length} must be within N={N}")
    if prompt_in.shape != (B, length, D):
        fail(
            f"`prompt_in` must be [B, length, D] = {(B, length, D)}; got {tuple(prompt_in.shape)}; expand it"
        )
    check_one_element("gated_blend", "gate", gate)
    others = {"delta": delta, "prompt_in": prompt_in, "gate": gate}
    check_devices_and_dtypes("gated_blend", "x", x, others, any_dtype=("gate",))
    check_norm("gated_blend", norm, D, x.device)


# The operator. `eps` None: no norm, and `normed`, `mean` and `rstd` [B, N] are empty.


def _fake(x: Tensor, *rest: Any) -> _Forward:
    *_, eps, _backend = rest
    return x.new_empty(x.shape), *empty_norm(x, eps)


def _fake_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    difference: Tensor | None,
    start: int,
    length: int,
    needs: list[bool],
    backend: str,
) -> _Gradients:
    return _empty_gradients(_either(grad_y, grad_normed), gate, length, needs)


_OPERATOR = define_operator(
    "gated_blend(Tensor x, Tensor delta, Tensor prompt_in, Tensor gate, SymInt start, SymInt length, "
    "Tensor? weight, Tensor? bias, float? eps, str backend) -> (Tensor y, Tensor normed, Tensor mean, Tensor rstd)",
    fake=_fake,
    flops=no_flops,
)
# One of the two gradients may be None. `y`, `mean`, `rstd` and `weight` are for `grad_normed`; `difference` [B, length,
# D] = x + delta - prompt_in on the prompt rows is for d(gate). Without a gate this is the gradient of the norm only.
# `needs`: which of d(x) = d(delta), d(prompt_in) and d(gate) are needed; the others are empty.
_BACKWARD = define_operator(
    "gated_blend_backward(Tensor? grad_y, Tensor? grad_normed, Tensor? y, Tensor? mean, Tensor? rstd, Tensor? weight, "
    "Tensor? gate, Tensor? difference, SymInt start, SymInt length, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    flops=no_flops,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: _Forward) -> None:
    x, delta, prompt_in, gate, start, length, weight, _bias, eps, backend = inputs
    y, normed, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.start, ctx.length, ctx.backend = start, length, backend
    difference = None
    if ctx.needs_input_grad[3]:
        # Recompute P rows, so that neither x nor delta is saved for one scalar's gradient.
        difference = x.narrow(1, start, length) + delta.narrow(1, start, length) - prompt_in
    if eps is None:
        ctx.mark_non_differentiable(normed, mean, rstd)
        ctx.save_for_backward(None, None, None, None, gate, difference)
    else:
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(y, mean, rstd, weight, gate, difference)


def _backward(ctx: Any, grad_y: Tensor | None, grad_normed: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None and grad_normed is None:
        return (None,) * 10
    need_x, need_delta, need_prompt, need_gate = ctx.needs_input_grad[:4]
    needs = [need_x or need_delta, need_prompt, need_gate]
    d_input, d_prompt, d_gate = torch.ops.fastprompt.gated_blend_backward(
        grad_y, grad_normed, *ctx.saved_tensors, ctx.start, ctx.length, needs, ctx.backend
    )
    return (
        d_input if need_x else None,
        d_input if need_delta else None,
        d_prompt if need_prompt else None,
        d_gate if need_gate else None,
        *(None,) * 6,
    )


register_gradient(_OPERATOR, setup=_setup, backward=_backward)
mark_as_backward(_BACKWARD)
autocast(_OPERATOR, promote=(0, 1, 2))


# The backends `eager` and `cpu` ---------------------------------------------------------------------------------


def _forward_eager(
    x: Tensor,
    delta: Tensor,
    prompt_in: Tensor,
    gate: Tensor,
    start: int,
    length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> _Forward:
    wide = accumulation_dtype(x.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.add(x, delta, out=y)
    rows = x.narrow(1, start, length).to(wide) + delta.narrow(1, start, length)
    y.narrow(1, start, length).copy_(torch.lerp(prompt_in.to(wide), rows, gate.to(wide).reshape(())))
    return y, *layer_norm(y, weight, bias, eps)


def _backward_eager(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    difference: Tensor | None,
    start: int,
    length: int,
    needs: list[bool],
) -> _Gradients:
    d_input, d_prompt, d_gate = _empty_gradients(_either(grad_y, grad_normed), gate, length, needs)
    grad = _gradient_of_y(grad_y, grad_normed, y, mean, rstd, weight)
    wide = accumulation_dtype(grad.dtype)
    if needs[0]:
        d_input.copy_(grad)
    if gate is None:
        return d_input, d_prompt, d_gate
    rows = grad.narrow(1, start, length).to(wide)
    g = gate.to(wide).reshape(())
    if needs[0]:
        d_input.narrow(1, start, length).copy_(g * rows)
    if needs[1]:
        d_prompt.copy_((1 - g) * rows)
    if needs[2] and difference is not None:
        d_gate = (rows * difference).sum().reshape(gate.shape).to(gate.dtype)
    return d_input, d_prompt, d_gate


def _gradient_of_y(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """Add the gradients from both outputs, in float32 or better if one is from the norm."""
    if grad_normed is None or y is None or mean is None or rstd is None:
        return _either(grad_y, grad_normed)
    grad = layer_norm_backward(grad_normed, y, mean, rstd, weight)
    return grad if grad_y is None else grad + grad_y


def _empty_gradients(grad: Tensor, gate: Tensor | None, length: int, needs: list[bool]) -> _Gradients:
    B, _, D = grad.shape
    return (
        grad.new_empty(grad.shape if needs[0] else 0),
        grad.new_empty((B, length, D) if needs[1] else 0),
        grad.new_empty(0) if gate is None else gate.new_empty(gate.shape if needs[2] else 0),
    )


def _either(grad_y: Tensor | None, grad_normed: Tensor | None) -> Tensor:
    grad = grad_normed if grad_y is None else grad_y
    assert grad is not None
    return grad


def _forward_cpu(
    x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int, *norm: Any
) -> _Forward:
    y = torch.ops.fastprompt_cpu.gated_blend(x, delta, prompt_in, gate, start, length)
    return y, *layer_norm(y, *norm)


def _can_forward_cpu(x: Tensor, *rest: Any) -> str | None:
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"dtype {x.dtype} is not supported (float32, float64, bfloat16, float16)"
    return dispatch.needs_device(x, "cpu")


def _backward_cpu(*args: Any) -> _Gradients:
    *of_norm, gate, difference, start, length, needs = args
    dtype = _either(*of_norm[:2]).dtype
    grad = _gradient_of_y(*of_norm)
    difference = None if difference is None else difference.to(grad.dtype)
    d_input, d_prompt, d_gate = torch.ops.fastprompt_cpu.gated_blend_backward(
        grad, gate, difference, start, length, *needs
    )
    return d_input.to(dtype), d_prompt.to(dtype), d_gate


def _can_backward_cpu(grad_y: Tensor | None, grad_normed: Tensor | None, *rest: Any) -> str | None:
    gate = rest[4]
    return "it needs a gate" if gate is None else _can_forward_cpu(_either(grad_y, grad_normed))


dispatch.register("gated_blend", "cpu", _forward_cpu, _can_forward_cpu)
dispatch.register("gated_blend_backward", "cpu", _backward_cpu, _can_backward_cpu)
dispatch.register("gated_blend", "eager", _forward_eager, dispatch.always)
dispatch.register("gated_blend_backward", "eager", _backward_eager, dispatch.always)
dispatch.register_triton("gated_blend", "gated_blend", "forward", fuses_norm=True)
dispatch.register_triton("gated_blend_backward", "gated_blend", "backward")
trust.describe("gated_blend", lambda *args: (0, 1, 2))
trust.describe("gated_blend_backward", lambda *args: (0, 1, 2, 3, 4, 7))
