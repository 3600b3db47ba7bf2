"""Prompt-augmented attention: image queries attend to image keys and prompt keys in one softmax.

    out = softmax([q·kᵀ ; q·k_pᵀ] · scale / temperature) · [v ; v_p]

This is self-attention with prompts (VPT, Jia et al., ECCV 2022, eq. 4-5) without the queries of the prompts, whose
outputs the next block discards. The temperature is GateVPT's (Yoo et al., ICML 2023).

`prompt_attention_reference` is the specification; the operator `fastprompt::prompt_attention` is checked against it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.ops import attention_backends, attention_choice, dispatch  # noqa: F401
from fastprompt.ops.attention_ways import Inputs, call_of, join, needs_image_keys
from fastprompt.ops.checks import check_devices_and_dtypes, check_one_element
from fastprompt.ops.operator import (
    accumulation_dtype,
    autocast,
    call,
    define_operator,
    exporting,
    mark_as_backward,
    register_gradient,
    traced_plainly,
)


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    scale: float | None = None,
    temperature: Tensor | None = None,
    prompt_index: Tensor | None = None,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """Return the attention of image queries over image and prompt keys in one softmax.

    `N` counts image tokens, prefix tokens included and prompts excluded. Tensors may have any strides, such as views of
    a packed ``qkv``.

    Args:
        q: [B, Nq, H, d]; Nq may differ from N (for example one class-token row).
        k, v: [B, N, H, d]; N may be 0, for attention to prompts only.
        prompt_k, prompt_v: [P, H, d] shared by the batch, [B, P, H, d] one set per image, or, with `prompt_index`, a
            table [T, P, H, d]. P may be 0.
        scale: factor on q·k; default d**-0.5.
        temperature: one-element tensor that divides the scaled scores; differentiable.
        prompt_index: integers [B], the row of the table that each image uses.
        backend: "auto", or the backend that must run this call (:func:`fastprompt.backends`).

    Returns:
        [B, Nq, H, d], contiguous.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message names value and remedy.
        IndexError: a `prompt_index` outside the table (CPU; on a GPU NaN for that image, or a device-side assertion).
        NotImplementedError: `backend` names one that cannot run this call.
    """
    check_attention(q, k, v, prompt_k, prompt_v, temperature, prompt_index)
    if prompt_k is not None and prompt_k.shape[-3] == 0:
        prompt_k = prompt_v = prompt_index = None
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = dispatch.requested(backend)
    arguments = (q, k, v, prompt_k, prompt_v, temperature, prompt_index, scale)
    if is_plain(q, k, prompt_k, temperature, backend):
        return plain_attention(*arguments)
    out, _ = call("prompt_attention", *arguments, backend)
    return out


def prompt_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    scale: float | None = None,
    temperature: Tensor | None = None,
    prompt_index: Tensor | None = None,
) -> Tensor:
    """Compute :func:`prompt_attention` in plain PyTorch, in float32 or better, autocast off: the specification.

    Returns [B, Nq, H, d] in q's dtype; differentiable any number of times.
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = accumulation_dtype(q.dtype)
        keys, values = (
            join(x.to(wide), None if p is None else p.to(wide), prompt_index)
            for x, p in ((k, prompt_k), (v, prompt_v))
        )
        logits = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys)
        logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
        if temperature is not None:
            logits = logits / temperature.to(wide)
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), values).to(q.dtype)


# The operator ---------------------------------------------------------------------------------------------------


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
) -> None:
    """Raise ValueError or TypeError unless the arguments of :func:`prompt_attention` fit each other."""

    def fail(what: str) -> None:
        raise ValueError(f"`prompt_attention`: {what}")

    if q.ndim != 4 or k.ndim != 4:
        fail(f"`q` and `k` must be [B, N, H, d]; got {tuple(q.shape)} and {tuple(k.shape)}")
    B, _, H, d = q.shape
    if (k.shape[0], *k.shape[2:]) != (B, H, d) or v.shape != k.shape:
        fail(
            f"`k` and `v` must be [B, N, H, d] with B={B}, H={H}, d={d} as in `q`; "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if d == 0:
        fail("head_dim is 0; `q` must be [B, N, H, d] with d >= 1")
    if (prompt_k is None) != (prompt_v is None):
        fail("`prompt_k` and `prompt_v` must be given together; got one of them; pass both or neither")
    if prompt_k is None and prompt_index is not None:
        fail("`prompt_index` needs a table of prompts; pass `prompt_k` and `prompt_v` as [T, P, H, d]")
    if prompt_k is not None and prompt_v is not None:
        if prompt_k.shape != prompt_v.shape:
            fail(
                f"`prompt_k` and `prompt_v` differ in shape: {tuple(prompt_k.shape)}, {tuple(prompt_v.shape)}"
            )
        shape = tuple(prompt_k.shape)
        if prompt_index is not None:
            if len(shape) != 4 or shape[2:] != (H, d):
                fail(
                    f"with `prompt_index`, `prompt_k` must be a table [T, P, H, d], H={H}, d={d}; got {shape}"
                )
            if prompt_index.shape != (B,) or prompt_index.dtype not in (torch.int64, torch.int32):
                fail(
                    f"`prompt_index` must be int64 or int32 of shape [B] = [{B}]; "
                    f"got {prompt_index.dtype} of shape {tuple(prompt_index.shape)}"
                )
        elif shape[-2:] != (H, d) or len(shape) not in (3, 4) or (len(shape) == 4 and shape[0] != B):
            fail(
                f"`prompt_k` must be [P, H, d] or [B, P, H, d] with B={B}, H={H}, d={d}; got {shape}; "
                "reshape it, or pass `prompt_index` if it is a table [T, P, H, d]"
            )
    if temperature is not None:
        check_one_element("prompt_attention", "temperature", temperature)
    if k.shape[1] == 0 and (prompt_k is None or prompt_k.shape[-3] == 0):
        fail("there is no key to attend to: `k` has N=0 rows and there are no prompts")
    others = {"k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v}
    free = {"temperature": temperature, "prompt_index": prompt_index}
    check_devices_and_dtypes("prompt_attention", "q", q, {**others, **free}, any_dtype=free)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, Nq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Nq), dtype=accumulation_dtype(q.dtype))


def _fake_backward(grad: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, _out, _lse, _scale, needs, _backend = rest
    return tuple(
        x.new_empty(x.shape) if need else q.new_empty(0)
        for need, x in zip(needs, (q, *inputs[:5]), strict=True)
    )


def _flops(q: Any, k: Any, v: Any, prompt_k: Any, *rest: Any, **kwargs: Any) -> int:
    B, Nq, H, d = q
    return 4 * B * Nq * H * d * (k[1] + (prompt_k[-3] if prompt_k else 0))


def _flops_backward(grad: Any, q: Any, k: Any, v: Any, prompt_k: Any, *rest: Any, **kwargs: Any) -> int:
    needs = rest[-2]
    B, Nq, H, d = q
    P = prompt_k[-3] if prompt_k else 0
    product = 2 * B * Nq * H * d
    if not needs_image_keys(needs):
        return product * P * (1 + needs[4] + 2 * needs[3])
    # Scores, d(weights), and one product for each of dq, dk, dv.
    return (
        product * (k[1] + P) * (2 + (needs[0] or needs[5]) + (needs[1] or needs[3]) + (needs[2] or needs[4]))
    )


_OPERATOR = define_operator(
    "prompt_attention(Tensor q, Tensor k, Tensor v, Tensor? prompt_k, Tensor? prompt_v, Tensor? temperature, "
    "Tensor? prompt_index, float scale, str backend) -> (Tensor out, Tensor lse)",
    fake=_fake,
    flops=_flops,
)
# `needs`: which of dq, dk, dv, d(prompt_k), d(prompt_v), d(temperature) are needed; the others are empty.
_BACKWARD = define_operator(
    "prompt_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? prompt_k, Tensor? prompt_v, "
    "Tensor? temperature, Tensor? prompt_index, Tensor out, Tensor lse, float scale, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    flops=_flops_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *tensors, scale, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.backend = scale, backend
    if not needs_image_keys(ctx.needs_input_grad):
        k = v = k.new_empty((k.shape[0], 0, *k.shape[2:]))
    ctx.save_for_backward(q, k, v, *tensors, out, lse)


def _backward(ctx: Any, grad: Tensor | None, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    needs = [bool(n) for n in ctx.needs_input_grad[:6]]
    gradients = call("prompt_attention_backward", grad, *ctx.saved_tensors, ctx.scale, needs, ctx.backend)
    wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*wanted, None, None, None)


register_gradient(_OPERATOR, setup=_setup, backward=_backward)
mark_as_backward(_BACKWARD)
autocast(_OPERATOR, cast=(0, 1, 2, 3, 4))


# Without an operator of ours -------------------------------------------------------------------------------------


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
    scale: float,
) -> Tensor:
    """Return [B, Nq, H, d] by PyTorch's own attention over joined keys, with its own gradient."""
    k, v = join(k, prompt_k, prompt_index), join(v, prompt_v, prompt_index)
    if temperature is not None:
        q = (q / temperature).to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def is_plain(q: Tensor, k: Tensor, prompt_k: Tensor | None, temperature: Tensor | None, backend: str) -> bool:
    """Return whether the call is PyTorch's own attention: for a compiler, or where nothing is to be added."""
    # Compiled by Inductor for a CPU, the operator takes as long as PyTorch's attention over joined keys (float32), but
    # does not keep joined keys for the backward, and its backward in bfloat16 is faster.
    joins = prompt_k is not None and k.shape[1] > 0
    if traced_plainly(backend, fusable=not joins and temperature is None):
        return exporting() or attention_choice.forced() in (None, "joined")
    if prompt_k is not None or temperature is not None or backend != dispatch.AUTO or q.numel() == 0:
        return False
    inputs = Inputs(q, k, k, None, None, None, None, 1.0)
    return attention_choice.ways(call_of(inputs))[0] in ("joined", "split")
