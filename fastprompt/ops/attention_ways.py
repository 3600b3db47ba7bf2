"""Prompt attention in PyTorch, by each of its ways (docs/attention.md).

The functions here run below autograd and in PyTorch: `resident` and `looped` are plain matrix products; `split` and
`joined` call PyTorch's fused kernels (:mod:`fastprompt.ops.vendor_attention`).

On a CPU joining is the fastest: the copy takes 0.5 of 8 ms at [8, 197, 12, 64] with P = 10; `split` takes 8.2 ms,
products for one image at a time 9.3 ms (Xeon with AVX-512, 2 threads, float32). In bfloat16 the backward of the CPU's
kernel takes 49 ms, products 34 ms, and its float32 backward 17 ms without casts, so it runs in float32 or better.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastprompt.ops import prompt_segment, vendor_attention
from fastprompt.ops.attention_choice import Call, Way

Gradients: TypeAlias = list[Tensor | None]


class Inputs(NamedTuple):
    """The arguments of :func:`fastprompt.ops.prompt_attention`, as its operator has them."""

    q: Tensor
    k: Tensor
    v: Tensor
    prompt_k: Tensor | None
    prompt_v: Tensor | None
    temperature: Tensor | None
    prompt_index: Tensor | None
    scale: float

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return the inputs with the tensors of attention in `dtype`."""
        pk, pv = self.prompt_k, self.prompt_v
        return self._replace(
            q=self.q.to(dtype),
            k=self.k.to(dtype),
            v=self.v.to(dtype),
            prompt_k=None if pk is None else pk.to(dtype),
            prompt_v=None if pv is None else pv.to(dtype),
        )


def call_of(inputs: Inputs, needs: Sequence[bool] | None = None) -> Call:
    """Return what the choice of a way depends on; `needs`, the gradients that are needed, for a backward."""
    q, k, _, prompt_k, *_ = inputs
    return Call(
        _capability(q.device) if q.is_cuda else None,
        q.dtype,
        q.shape[-1],
        q.shape[1],
        k.shape[1],
        0 if prompt_k is None else prompt_k.shape[-3],
        inputs.temperature is not None,
        needs is not None,
        needs is not None and not needs_image_keys(needs),
    )


_capability = functools.cache(torch.cuda.get_device_capability)


def needs_image_keys(needs: Sequence[bool]) -> bool:
    """Return whether a gradient needs the image columns of the softmax; d(prompt_k) and d(prompt_v) do not.

    Args:
        needs: of q, k, v, prompt_k, prompt_v and temperature, which gradients are needed.
    """
    return needs[0] or needs[1] or needs[2] or needs[5]


# In PyTorch ------------------------------------------------------------------------------------------------------


def forward(way: Way, inputs: Inputs, segment: Any = prompt_segment) -> tuple[Tensor, Tensor]:
    """Compute prompt attention by `way`; `resident` and `looped` are plain products.

    Args:
        segment: the module whose `merge` adds the prompts' part of `split`.

    Returns:
        out [B, Nq, H, d], contiguous, and the natural log-sum-exp [B, H, Nq].
    """
    q, k, v, prompt_k, prompt_v, temperature, prompt_index, _ = inputs
    scaled, scale = _without_temperature(inputs)
    if way == "split" and prompt_k is not None and prompt_v is not None:
        out, lse = vendor_attention.forward(scaled, k, v, scale)
        return segment.merge(q, out, lse, prompt_k, prompt_v, temperature, prompt_index, inputs.scale)
    keys, values = join(k, prompt_k, prompt_index), join(v, prompt_v, prompt_index)
    out, lse = vendor_attention.forward(scaled, keys, values, scale, fused=way in ("split", "joined"))
    return out.contiguous(), lse


def gradients(
    way: Way,
    grad: Tensor,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    segment: Any = prompt_segment,
    into: Tensor | None = None,
) -> Gradients:
    """Compute the gradients of :func:`forward`, by whichever way `out` and `lse` were computed.

    Args:
        needs: of q, k, v, prompt_k, prompt_v and temperature, which gradients to return.
        segment: the module whose `segment_backward` adds the prompts' part of `split`.
        into: memory for the gradient of q, used if that saves a copy.

    Returns:
        The six gradients, None where not needed; in the inputs' dtype or the accumulation dtype, any strides.
    """
    if inputs.q.device.type == "cpu" and out.dtype != lse.dtype:
        # The CPU's kernel is slower in low precision.
        inputs, grad, out = inputs.to(lse.dtype), grad.to(lse.dtype), out.to(lse.dtype)
    q, k, v, prompt_k, prompt_v, temperature, prompt_index, scale = inputs
    prompts = (prompt_k, prompt_v, temperature, prompt_index)
    if prompt_k is not None and not needs_image_keys(needs):
        # Nothing before this block trains: output and log-sum-exp say all there is to know about the image's keys.
        needed = (False, needs[3], needs[4], q.new_empty(0))
        _, dpk, dpv = segment.segment_backward(grad, q, *prompts, out, lse, scale, *needed)
        found: Gradients = [None, None, None, dpk, dpv, None]
    elif way == "split" and prompt_k is not None:
        divided, divided_scale = _without_temperature(inputs)
        dq, dk, dv = vendor_attention.backward(grad, divided, k, v, out, lse, divided_scale)
        needed = (needs[0] or needs[5], needs[3], needs[4], _divide_on_gpu(dq, temperature))
        memory = {
            "into": into if into is not None and into.dtype == dq.dtype else None,
            "products": torch.empty_like(lse) if needs[5] else None,
        }
        dq, dpk, dpv = segment.segment_backward(grad, q, *prompts, out, lse, scale, *needed, **memory)
        found = [dq, dk, dv, dpk, dpv, _of_temperature(memory["products"], temperature)]
    else:
        found = _joined_gradients(way, grad, inputs, out, lse, needs)
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def _joined_gradients(
    way: Way, grad: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, needs: Sequence[bool]
) -> Gradients:
    q, k, v, prompt_k, prompt_v, temperature, prompt_index, _ = inputs
    keys, values = join(k, prompt_k, prompt_index), join(v, prompt_v, prompt_index)
    divided, scale = _without_temperature(inputs)
    fused = way in ("split", "joined")
    dq, dkeys, dvalues = vendor_attention.backward(grad, divided, keys, values, out, lse, scale, fused=fused)
    dq, N = _divide_on_gpu(dq, temperature), k.shape[1]
    of_prompts = [
        prompt_segment.sum_over_images(d[:, N:].to(lse.dtype), p, prompt_index)
        if need and p is not None
        else None
        for d, p, need in ((dkeys, prompt_k, needs[3]), (dvalues, prompt_v, needs[4]))
    ]
    products = q.to(lse.dtype) * dq if needs[5] else None
    return [dq, dkeys[:, :N], dvalues[:, :N], *of_prompts, _of_temperature(products, temperature)]


def _of_temperature(products: Tensor | None, temperature: Tensor | None) -> Tensor | None:
    """Return d(temperature) of the products q·dq of each row, or of their terms."""
    if products is None or temperature is None:
        return None
    # Scores are linear in q, so that the sum of q·dq is the sum of score · d(score), and score ~ 1 / temperature.
    return -products.sum().reshape(temperature.shape) / temperature


def join(image: Tensor, prompt: Tensor | None, index: Tensor | None) -> Tensor:
    """Concatenate [B, N, H, d] and prompts of any of the three kinds to [B, N + P, H, d]."""
    if prompt is None:
        return image
    if index is not None:
        prompt = prompt.index_select(0, index)
    return torch.cat([image, prompt.expand(image.shape[0], -1, -1, -1)], dim=1)


def _without_temperature(inputs: Inputs) -> tuple[Tensor, float]:
    """Return q and the scale for a kernel that knows no temperature."""
    q, temperature = inputs.q, inputs.temperature
    if temperature is None:
        return q, inputs.scale
    if q.device.type == "cpu":
        return q, inputs.scale / temperature.item()
    return (q / temperature).to(q.dtype), inputs.scale  # reading the number would wait for the GPU


def _divide_on_gpu(dq: Tensor, temperature: Tensor | None) -> Tensor:
    """Return the gradient of q where `dq` is that of the q of :func:`_without_temperature`."""
    return dq if temperature is None or dq.device.type == "cpu" else dq.div_(temperature)
