"""Prompt-augmented self-attention on packed queries, keys and values, the output of one projection.

The same as :func:`fastprompt.ops.prompt_attention` on the three parts of `qkv`, but the gradient is written directly
into one packed tensor, which saves a copy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastprompt.ops import dispatch
from fastprompt.ops.operator import (
    accumulation_dtype,
    autocast,
    call,
    define_operator,
    mark_as_backward,
    register_gradient,
)
from fastprompt.ops.prompt_attention import check_attention, is_plain, plain_attention


def packed_prompt_attention(
    qkv: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    scale: float | None = None,
    temperature: Tensor | None = None,
    prompt_index: Tensor | None = None,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """Return the attention of N tokens over themselves and prompts in one softmax.

    Args:
        qkv: [B, N, 3, H, d], the unflattened output of ``attn.qkv``; any strides.
        prompt_k, prompt_v, scale, temperature, prompt_index, backend: as in :func:`fastprompt.ops.prompt_attention`.

    Returns:
        [B, N, H, d], contiguous.

    Raises:
        As :func:`fastprompt.ops.prompt_attention`, and ValueError for a `qkv` of another shape.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"`packed_prompt_attention`: `qkv` must be [B, N, 3, H, d]; got {tuple(qkv.shape)}; "
            "unflatten the last dimension of the projection's output to (3, H, d)"
        )
    q, k, v = qkv.unbind(2)
    check_attention(q, k, v, prompt_k, prompt_v, temperature, prompt_index)
    if prompt_k is not None and prompt_k.shape[-3] == 0:
        prompt_k = prompt_v = prompt_index = None
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = dispatch.requested(backend)
    rest = (prompt_k, prompt_v, temperature, prompt_index, scale)
    if is_plain(q, k, prompt_k, temperature, backend):
        return plain_attention(q, k, v, *rest)
    out, _ = call("packed_prompt_attention", qkv, *rest, backend)
    return out


# The operator ---------------------------------------------------------------------------------------------------


def _fake(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, N, _, H, d = qkv.shape
    return qkv.new_empty((B, N, H, d)), qkv.new_empty((B, H, N), dtype=accumulation_dtype(qkv.dtype))


def _fake_backward(
    grad: Tensor,
    qkv: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    return tuple(
        qkv.new_empty(0) if x is None or not need else x.new_empty(x.shape)
        for x, need in zip((qkv, prompt_k, prompt_v, temperature), needs, strict=True)
    )


def _flops(qkv: Any, prompt_k: Any, *rest: Any, **kwargs: Any) -> int:
    B, N, _, H, d = qkv
    return 4 * B * N * H * d * (N + (prompt_k[-3] if prompt_k else 0))


def _flops_backward(grad: Any, qkv: Any, prompt_k: Any, *rest: Any, **kwargs: Any) -> int:
    needs = rest[-2]
    B, N, _, H, d = qkv
    P = prompt_k[-3] if prompt_k else 0
    product = 2 * B * N * H * d
    if not (needs[0] or needs[3]):
        return product * P * (1 + needs[2] + 2 * needs[1])
    return product * (N + P) * 5


_OPERATOR = define_operator(
    "packed_prompt_attention(Tensor qkv, Tensor? prompt_k, Tensor? prompt_v, Tensor? temperature, "
    "Tensor? prompt_index, float scale, str backend) -> (Tensor out, Tensor lse)",
    fake=_fake,
    flops=_flops,
)
# `needs`: which of d(qkv), d(prompt_k), d(prompt_v), d(temperature) are needed; the others are empty.
_BACKWARD = define_operator(
    "packed_prompt_attention_backward(Tensor grad, Tensor qkv, Tensor? prompt_k, Tensor? prompt_v, "
    "Tensor? temperature, Tensor? prompt_index, Tensor out, Tensor lse, float scale, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    flops=_flops_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *tensors, scale, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.backend = scale, backend
    if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[3]):
        # Only prompts train: a copy of the queries, a third of qkv, is kept in its place (`unpack`).
        qkv = qkv[:, :, :1].contiguous()
    ctx.save_for_backward(qkv, *tensors, out, lse)


def _backward(ctx: Any, grad: Tensor | None, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    needs = [bool(n) for n in ctx.needs_input_grad[:4]]
    gradients = call(
        "packed_prompt_attention_backward", grad, *ctx.saved_tensors, ctx.scale, needs, ctx.backend
    )
    wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*wanted, None, None, None)


register_gradient(_OPERATOR, setup=_setup, backward=_backward)
mark_as_backward(_BACKWARD)
autocast(_OPERATOR, cast=(0, 1, 2))
