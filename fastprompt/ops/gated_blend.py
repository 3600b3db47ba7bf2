"""Gated prompt blending: a residual add that blends the prompt rows with those of the block's input.

    y = x + delta;   y[:, start : start + length] = gate · y[:, ...] + (1 - gate) · prompt_in

GateVPT (Yoo et al., "Improving Visual Prompt Tuning for Self-supervised Vision Transformers", ICML 2023) scales a
block's update of the prompts by `gate`: a gated residual. With a norm, one kernel also computes LayerNorm(y), the input
of the next block.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt.ops import dispatch, trust
from fastprompt.ops.checks import check_devices_and_dtypes, check_one_element
from fastprompt.ops.norm import (
    Norm,
    check_norm,
    empty_norm,
    gradient_of_both,
    layer_norm,
    layer_norm_reference,
)
from fastprompt.ops.operator import (
    accumulation_dtype,
    autocast,
    call,
    define_operator,
    mark_as_backward,
    no_flops,
    register_gradient,
    traced_plainly,
)

_Forward = tuple[Tensor, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


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
        x, delta: [B, N, D]; N counts prefix, prompt and patch rows. Under autocast they may differ in dtype.
        prompt_in: [B, P, D], P = `length`: the prompt rows of the block's input.
        gate: one-element tensor, sigmoid(logit) in GateVPT; any floating dtype, computed in float32 or better.
        start, length: the prompt rows among the N.
        norm: the LayerNorm that follows, or None; frozen.
        backend: "auto", or the backend that must run this call (:func:`fastprompt.backends`).

    Returns:
        y [B, N, D], contiguous, in the widest dtype of x, delta and prompt_in, and LayerNorm(y) in delta's, or None
        without a norm. The norm acts on y rounded to its dtype and computes in float32 or better.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message names value and remedy.
        NotImplementedError: `norm` requires a gradient, or `backend` names one that cannot run this call.
    """
    _check(x, delta, prompt_in, gate, start, length, norm)
    backend = dispatch.requested(backend)
    if traced_plainly(backend, fusable=True):
        return _plain(x, delta, prompt_in, gate, start, length, norm)
    affine = (None, None, None) if norm is None else norm
    y, normed, _, _ = call("gated_blend", x, delta, prompt_in, gate, start, length, *affine, backend)
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
        return _plain(x, delta, prompt_in, gate, start, length, norm)


def _plain(
    x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int, norm: Norm | None
) -> tuple[Tensor, Tensor | None]:
    dtype = _widest(x, delta, prompt_in)
    wide = accumulation_dtype(dtype)
    out = x.to(wide) + delta.to(wide)
    before, rows, after = out.split([start, length, x.shape[1] - start - length], dim=1)
    g = gate.to(wide).reshape(())
    y = torch.cat([before, g * rows + (1 - g) * prompt_in.to(wide), after], dim=1).to(dtype)
    return y, None if norm is None else layer_norm_reference(y, norm, delta.dtype)


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


def _widest(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in tensors))


# The operator. `eps` None: no norm, and `normed`, `mean` and `rstd` [B, N] are empty.


class _BackwardInputs(NamedTuple):
    """The arguments of the backward.

    One of the two gradients may be None. `y`, `mean`, `rstd` and `weight` are for `grad_normed`; `difference` [B,
    length, D] = x + delta - prompt_in on the prompt rows is for d(gate). `needs`: which of d(x), d(delta), d(prompt_in)
    and d(gate) are needed; the others are empty. d(delta) has `dtype`, d(x) and d(prompt_in) have y's. Where d(x) and
    d(delta) are the same, only d(x) is asked for.
    """

    grad_y: Tensor | None
    grad_normed: Tensor | None
    y: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    weight: Tensor | None
    gate: Tensor
    difference: Tensor | None
    start: int
    length: int
    dtype: torch.dtype
    needs: list[bool]

    def of_y(self) -> Tensor:
        """Return the gradient of y [B, N, D] from both outputs."""
        return gradient_of_both(*self[:6])

    def empty(self) -> _Gradients:
        """Return uninitialized gradients."""
        grad = self.grad_normed if self.grad_y is None else self.grad_y
        assert grad is not None
        wide = grad.dtype if self.grad_y is not None or self.y is None else self.y.dtype
        B, _, D = grad.shape
        x, delta, prompt, gate = self.needs
        return (
            grad.new_empty(grad.shape if x else 0, dtype=wide),
            grad.new_empty(grad.shape if delta else 0, dtype=self.dtype),
            grad.new_empty((B, self.length, D) if prompt else 0, dtype=wide),
            self.gate.new_empty(self.gate.shape if gate else 0),
        )


def _fake(x: Tensor, delta: Tensor, prompt_in: Tensor, *rest: Any) -> _Forward:
    *_, eps, _backend = rest
    y = x.new_empty(x.shape, dtype=_widest(x, delta, prompt_in))
    return y, *empty_norm(y, delta.dtype, eps)


def _fake_backward(*args: Any) -> _Gradients:
    return _BackwardInputs(*args[:-1]).empty()


_OPERATOR = define_operator(
    "gated_blend(Tensor x, Tensor delta, Tensor prompt_in, Tensor gate, SymInt start, SymInt length, "
    "Tensor? weight, Tensor? bias, float? eps, str backend) -> (Tensor y, Tensor normed, Tensor mean, Tensor rstd)",
    fake=_fake,
    flops=no_flops,
)
_BACKWARD = define_operator(
    "gated_blend_backward(Tensor? grad_y, Tensor? grad_normed, Tensor? y, Tensor? mean, Tensor? rstd, Tensor? weight, "
    "Tensor gate, Tensor? difference, SymInt start, SymInt length, ScalarType dtype, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    flops=no_flops,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: _Forward) -> None:
    x, delta, prompt_in, gate, start, length, weight, _bias, eps, backend = inputs
    y, normed, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.start, ctx.length, ctx.backend = start, length, backend
    ctx.dtypes, ctx.wide = [t.dtype for t in (x, delta, prompt_in)], y.dtype
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
    of_x, of_delta, of_prompt = ctx.dtypes
    same = of_delta == ctx.wide
    needs = [need_x or (need_delta and same), need_delta and not same, need_prompt, need_gate]
    of_rows = (*ctx.saved_tensors, ctx.start, ctx.length, of_delta, needs)
    d_x, d_delta, d_prompt, d_gate = call("gated_blend_backward", grad_y, grad_normed, *of_rows, ctx.backend)
    d_delta = d_x if same else d_delta
    return (
        d_x.to(of_x) if need_x else None,
        d_delta if need_delta else None,
        d_prompt.to(of_prompt) if need_prompt else None,
        d_gate if need_gate else None,
        *(None,) * 6,
    )


register_gradient(_OPERATOR, setup=_setup, backward=_backward)
mark_as_backward(_BACKWARD)
autocast(_OPERATOR)


# The backends `eager` and `cpu` ---------------------------------------------------------------------------------


def _forward_eager(
    x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int, *norm: Any
) -> _Forward:
    dtype = _widest(x, delta, prompt_in)
    wide = accumulation_dtype(dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    torch.add(x, delta, out=y)
    rows = x.narrow(1, start, length).to(wide) + delta.narrow(1, start, length)
    y.narrow(1, start, length).copy_(torch.lerp(prompt_in.to(wide), rows, gate.to(wide).reshape(())))
    return y, *layer_norm(y, delta.dtype, *norm)


def _backward_eager(*args: Any) -> _Gradients:
    given = _BackwardInputs(*args)
    d_x, d_delta, d_prompt, d_gate = given.empty()
    grad, needs = given.of_y(), given.needs
    wide = accumulation_dtype(grad.dtype)
    rows = grad.narrow(1, given.start, given.length).to(wide)
    g = given.gate.to(wide).reshape(())
    for target, needed in ((d_x, needs[0]), (d_delta, needs[1])):
        if needed:
            target.copy_(grad)
            target.narrow(1, given.start, given.length).copy_(g * rows)
    if needs[2]:
        d_prompt.copy_((1 - g) * rows)
    if needs[3] and given.difference is not None:
        d_gate = (rows * given.difference).sum().reshape(d_gate.shape).to(d_gate.dtype)
    return d_x, d_delta, d_prompt, d_gate


def _forward_cpu(
    x: Tensor, delta: Tensor, prompt_in: Tensor, gate: Tensor, start: int, length: int, *norm: Any
) -> _Forward:
    dtype = _widest(x, delta, prompt_in)
    rows = (t.to(dtype) for t in (x, delta, prompt_in))
    y = torch.ops.fastprompt_cpu.gated_blend(*rows, gate, start, length)
    return y, *layer_norm(y, delta.dtype, *norm)


def _can_forward_cpu(x: Tensor, *rest: Any) -> str | None:
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"dtype {x.dtype} is not supported (float32, float64, bfloat16, float16)"
    return dispatch.needs_device(x, "cpu")


def _backward_cpu(*args: Any) -> _Gradients:
    given = _BackwardInputs(*args)
    grad, (need_x, need_delta, *others) = given.of_y(), given.needs
    difference = None if given.difference is None else given.difference.to(grad.dtype)
    d_input, d_prompt, d_gate = torch.ops.fastprompt_cpu.gated_blend_backward(
        grad, given.gate, difference, given.start, given.length, need_x or need_delta, *others
    )
    d_x, d_delta, of_prompt, _ = given.empty()
    return (
        d_input.to(d_x.dtype) if need_x else d_x,
        d_input.to(d_delta.dtype) if need_delta else d_delta,
        d_prompt.to(of_prompt.dtype),
        d_gate,
    )


def _can_backward_cpu(grad_y: Tensor | None, grad_normed: Tensor | None, *rest: Any) -> str | None:
    grad = grad_normed if grad_y is None else grad_y
    assert grad is not None
    return _can_forward_cpu(grad)


dispatch.register("gated_blend", "cpu", _forward_cpu, _can_forward_cpu)
dispatch.register("gated_blend_backward", "cpu", _backward_cpu, _can_backward_cpu)
dispatch.register("gated_blend", "eager", _forward_eager, dispatch.always)
dispatch.register("gated_blend_backward", "eager", _backward_eager, dispatch.always)
dispatch.register_triton("gated_blend", "gated_blend", "forward", fuses_norm=True)
dispatch.register_triton("gated_blend_backward", "gated_blend", "backward")
trust.describe("gated_blend", lambda *args: (0, 1, 2))
trust.describe("gated_blend_backward", lambda *args: (0, 1, 2, 3, 4, 7))
