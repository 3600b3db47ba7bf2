"""Prompt-augmented attention: image queries attend to image keys and prompt keys in one softmax.

    out = softmax([q·kᵀ ; q·k_pᵀ] · scale / temperature) · [v ; v_p]

This is self-attention with prompts (VPT, Jia et al., ECCV 2022, eq. 4-5) without the queries of the prompts, whose
outputs the next block discards. The temperature is GateVPT's (Yoo et al., ICML 2023).

`prompt_attention_reference` is the specification; the operator `fastprompt::prompt_attention` is checked against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.ops import dispatch, trust
from fastprompt.ops.checks import check_devices_and_dtypes, check_one_element
from fastprompt.ops.operator import (
    accumulation_dtype,
    autocast,
    define_operator,
    mark_as_backward,
    register_gradient,
)

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


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
    if prompt_k is None and temperature is None and is_plain(q, backend):
        return plain_attention(q, k, v, scale)
    arguments = (q, k, v, prompt_k, prompt_v, temperature, prompt_index, scale)
    out, _ = torch.ops.fastprompt.prompt_attention(*arguments, backend)
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
            _all_keys(x.to(wide), None if p is None else p.to(wide), prompt_index)
            for x, p in ((k, prompt_k), (v, prompt_v))
        )
        logits = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys)
        logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
        if temperature is not None:
            logits = logits / temperature.to(wide)
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), values).to(q.dtype)


def _all_keys(image: Tensor, prompt: Tensor | None, index: Tensor | None) -> Tensor:
    """Concatenate [B, N, H, d] and prompts of any of the three kinds to [B, N + P, H, d]."""
    if prompt is None:
        return image
    if index is not None:
        prompt = prompt.index_select(0, index)
    return torch.cat([image, prompt.expand(image.shape[0], -1, -1, -1)], dim=1)


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
    gradients = torch.ops.fastprompt.prompt_attention_backward(
        grad, *ctx.saved_tensors, ctx.scale, needs, ctx.backend
    )
    wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*wanted, None, None, None)


register_gradient(_OPERATOR, setup=_setup, backward=_backward)
mark_as_backward(_BACKWARD)
autocast(_OPERATOR, cast=(0, 1, 2, 3, 4))


# The backend `eager` --------------------------------------------------------------------------------------------
#
# On a CPU, SDPA's flash kernel over [keys ; prompt keys] is the fastest form: joining them takes 0.5 of 8 ms at
# [8, 197, 12, 64] with P = 10; two segments merged by their LSEs take 8.2 ms, plain products for one image at a time
# 9.3 ms (Xeon with AVX-512, 2 threads, float32). In bfloat16 its backward takes 49 ms, plain products 34 ms, and its
# float32 backward 17 ms without casts, so the backward always runs in float32 or better.


def forward_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, Nq, H, _ = q.shape
    wide = accumulation_dtype(q.dtype)
    _check_index(prompt_k, prompt_index)
    keys = _all_keys(k, prompt_k, prompt_index)
    values = _all_keys(v, prompt_v, prompt_index)
    if _flash_runs(q, keys):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_heads_first(q, keys, values), 0.0, False, scale=_divide(scale, temperature)
        )
        return out.transpose(1, 2).contiguous(), lse.to(wide).contiguous()
    logits = torch.einsum("bqhd,bkhd->bhqk", q, keys).to(wide).mul_(scale)
    if temperature is not None:
        logits.div_(temperature.to(wide))
    lse = logits.logsumexp(-1)
    weights = logits.sub_(lse.unsqueeze(-1)).exp_().to(q.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values).contiguous(), lse


def _backward_eager(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needs: list[bool],
) -> _Gradients:
    inputs = (q, k, v, prompt_k, prompt_v, temperature)
    gradients = gradients_eager(grad, *inputs, prompt_index, out, lse, scale, needs)
    # An operator's outputs must not share memory, so each gradient that is not needed is a separate empty tensor.
    return tuple(  # type: ignore[return-value]
        q.new_empty(0) if x is None or g is None else g.to(x.dtype).contiguous()
        for g, x in zip(gradients, inputs, strict=True)
    )


def gradients_eager(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needs: list[bool],
) -> list[Tensor | None]:
    """Return the gradients that are needed, in the accumulation dtype and with any strides."""
    wide = accumulation_dtype(q.dtype)
    grad, q, k, v, out = (x.to(wide) for x in (grad, q, k, v, out))
    if prompt_k is not None and prompt_v is not None:
        prompt_k, prompt_v = prompt_k.to(wide), prompt_v.to(wide)
    if not needs_image_keys(needs):
        # Nothing before this block trains, so only the prompt columns [B, H, Nq, P] are needed.
        keys, values = (_all_keys(x[:, :0], p, prompt_index) for x, p in ((k, prompt_k), (v, prompt_v)))
    else:
        keys, values = _all_keys(k, prompt_k, prompt_index), _all_keys(v, prompt_v, prompt_index)
    if needs_image_keys(needs) and _flash_runs(q, keys):
        dq, dkeys, dvalues = (
            x.transpose(1, 2)
            for x in torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *_heads_first(grad, q, keys, values, out), lse, 0.0, False, scale=_divide(scale, temperature)
            )
        )
    else:
        dq, dkeys, dvalues = _backward_by_products(grad, q, keys, values, out, lse, scale, temperature, needs)
    results: list[Tensor | None] = [None] * 6
    P = 0 if prompt_k is None else prompt_k.shape[-3]
    N = keys.shape[1] - P
    if needs[0]:
        results[0] = dq
    for i, d, p in ((1, dkeys, prompt_k), (2, dvalues, prompt_v)):
        if needs[i]:
            results[i] = d[:, :N]
        if needs[i + 2] and p is not None:
            results[i + 2] = _reduce_prompts(d[:, N:], p, prompt_index)
    if needs[5] and temperature is not None:
        # Scores are linear in q, so that sum(q · dq) is the sum of score · d(score), and score ~ 1 / temperature.
        results[5] = -(q * dq).sum().reshape(temperature.shape) / temperature
    return results


def _backward_by_products(
    grad: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    temperature: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq [B, Nq, H, d], d(keys) and d(values) [B, N, H, d] by matrix products; those not needed are empty."""
    grad, q, keys, values, out = _heads_first(grad, q, keys, values, out)
    logits = torch.matmul(q, keys.mT).mul_(scale)
    if temperature is not None:
        logits.div_(temperature.to(logits.dtype))
    weights = logits.sub_(lse.unsqueeze(-1)).exp_()
    dq = dkeys = dvalues = q.new_empty(0, 0, 0, 0)
    if needs[2] or needs[4]:
        dvalues = torch.matmul(weights.mT, grad)
    if any(needs[i] for i in (0, 1, 3, 5)):
        delta = (grad * out).sum(-1, keepdim=True)
        dlogits = torch.matmul(grad, values.mT).sub_(delta).mul_(weights).mul_(scale)
        if temperature is not None:
            dlogits.div_(temperature.to(dlogits.dtype))
        if needs[0] or needs[5]:
            dq = torch.matmul(dlogits, keys)
        if needs[1] or needs[3]:
            dkeys = torch.matmul(dlogits.mT, q)
    return dq.transpose(1, 2), dkeys.transpose(1, 2), dvalues.transpose(1, 2)


def _reduce_prompts(gradient: Tensor, prompt: Tensor, index: Tensor | None) -> Tensor:
    """Reduce per-image prompt gradients [B, P, H, d] to the shape of `prompt`."""
    if index is not None:
        return torch.zeros_like(prompt).index_add_(0, index, gradient)
    return gradient.sum(0) if prompt.ndim == 3 else gradient


def needs_image_keys(needs: Sequence[bool]) -> bool:
    """Return whether a gradient needs the image columns of the softmax; d(prompt_k) and d(prompt_v) do not."""
    return needs[0] or needs[1] or needs[2] or needs[5]


def is_plain(q: Tensor, backend: str) -> bool:
    """Return whether "auto" runs attention without prompts on `q` by PyTorch's own operator."""
    return backend == dispatch.AUTO and q.numel() > 0 and dispatch.auto_is_eager("prompt_attention", q)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return PyTorch's own attention [B, Nq, H, d], with its own gradient."""
    q, k, v = _heads_first(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def _flash_runs(q: Tensor, keys: Tensor) -> bool:
    return q.device.type == "cpu" and q.numel() > 0 and keys.numel() > 0


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Transpose [B, N, H, d] to [B, H, N, d], the last dimension dense as the flash kernel requires."""
    return tuple((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors)


def _divide(scale: float, temperature: Tensor | None) -> float:
    return scale if temperature is None else scale / temperature.item()


def _check_index(prompt_k: Tensor | None, index: Tensor | None) -> None:
    # On a GPU the check would synchronize; there index_select asserts.
    if prompt_k is None or index is None or index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= prompt_k.shape[0]:
        raise IndexError(
            f"`prompt_attention`: `prompt_index` is {low} to {high}, outside the table of T={prompt_k.shape[0]} "
            f"sets; use 0..{prompt_k.shape[0] - 1}"
        )


dispatch.register_triton("prompt_attention", "prompt_attention", "forward")
dispatch.register_triton("prompt_attention_backward", "prompt_attention", "backward")
dispatch.register("prompt_attention", "eager", forward_eager, dispatch.always)
dispatch.register("prompt_attention_backward", "eager", _backward_eager, dispatch.always)


def _images(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[int, ...]:
    prompt_k, _, _, prompt_index, *_ = rest
    per_image = prompt_k is not None and prompt_k.ndim == 4 and prompt_index is None
    return (0, 1, 2, 3, 4, 6) if per_image else (0, 1, 2, 6)


def _images_backward(grad: Tensor, *inputs: Any) -> tuple[int, ...]:
    return (0, *(1 + i for i in _images(*inputs)), 8, 9)


def _exact_backward(*args: Any) -> _Gradients:
    grad, q, k, v, prompt_k, prompt_v, temperature, prompt_index, out, lse, scale, needs = args
    inputs = (q, k, v, prompt_k, prompt_v, temperature, prompt_index)
    if needs_image_keys(needs):  # else there may be no image keys to compute them from
        out, lse = forward_eager(*inputs, scale)
    return _backward_eager(grad, *inputs, out, lse, scale, needs)


trust.describe("prompt_attention", _images)
trust.describe("prompt_attention_backward", _images_backward, _exact_backward)
