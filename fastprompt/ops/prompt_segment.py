"""The prompts' part of attention whose image keys another kernel has seen, in plain PyTorch.

With s the scores of the prompts, and out1, lse1 the output and log-sum-exp over the image's keys,

    lse = logaddexp(lse1, logsumexp(s)),    out = exp(lse1 - lse)·out1 + Σ_p exp(s_p - lse)·v_p

The weights exp(s - lse) of the prompts and their gradients follow from the joint `out` and `lse` alone, so the backward
needs no image key. `fastprompt.kernels.triton.prompt_segment` has the same two functions as kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops.vendor_attention import chunks


def merge(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output over image and prompt keys, and its log-sum-exp.

    Args:
        q: [B, Nq, H, d].
        out, lse: [B, Nq, H, d] and [B, H, Nq], over the image's keys; `lse` is -inf where there are none.
        prompt_k, prompt_v, temperature, prompt_index, scale: as in :func:`fastprompt.ops.prompt_attention`.

    Returns:
        [B, Nq, H, d] in q's dtype, contiguous, and [B, H, Nq].
    """
    B, Nq, H, _ = q.shape
    joint, joint_lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    for images in chunks(B, H * Nq * prompt_k.shape[-3] * lse.element_size()):
        keys, values = (_of_images(p, prompt_index, images, lse.dtype) for p in (prompt_k, prompt_v))
        scores = _scores(q[images].transpose(1, 2).to(lse.dtype), keys, temperature, scale)
        total = torch.logaddexp(lse[images], scores.logsumexp(-1))
        rest = (lse[images] - total).exp_().unsqueeze(-1)
        weights = scores.sub_(total.unsqueeze(-1)).exp_()
        parts = torch.matmul(weights, values).addcmul_(out[images].transpose(1, 2).to(lse.dtype), rest)
        joint[images], joint_lse[images] = parts.transpose(1, 2), total
    return joint, joint_lse


def segment_backward(
    grad: Tensor,
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needs_q: bool,
    needs_k: bool,
    needs_v: bool,
    dq: Tensor,
    *,
    into: Tensor | None = None,
    products: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the joint dq, d(prompt_k) and d(prompt_v); a gradient that is not needed is empty.

    Args:
        grad, out, lse: [B, Nq, H, d] twice and [B, H, Nq], over image and prompt keys.
        dq: [B, Nq, H, d], the part of the image's keys; not read unless `needs_q`.
        into: memory for the joint dq; default `dq` itself.
        products: [B, H, Nq]; gets q·dq of each row. Their sum is -temperature · d(temperature).

    Returns:
        `into`; d(prompt_k) and d(prompt_v) in the prompts' shape and the dtype of `lse`, summed over the images that
        share them in a fixed order.
    """
    (B, Nq, H, d), P, wide = q.shape, prompt_k.shape[-3], lse.dtype
    into = dq if into is None else into
    partial_k, partial_v = (
        q.new_empty((B, P, H, d) if need else 0, dtype=wide) for need in (needs_k, needs_v)
    )
    for images in chunks(B, H * Nq * P * lse.element_size()):
        keys, values = (_of_images(p, prompt_index, images, wide) for p in (prompt_k, prompt_v))
        b_grad, b_q, b_out = (x[images].transpose(1, 2).to(wide) for x in (grad, q, out))
        weights = _scores(b_q, keys, temperature, scale).sub_(lse[images].unsqueeze(-1)).exp_()
        if needs_v:
            partial_v[images] = torch.matmul(weights.mT, b_grad).transpose(1, 2)
        if not (needs_q or needs_k):
            continue
        delta = (b_grad * b_out).sum(-1, keepdim=True)
        dscores = torch.matmul(b_grad, values.mT).sub_(delta).mul_(weights).mul_(scale)
        if temperature is not None:
            dscores.div_(temperature.to(wide))
        if needs_q:
            joint = torch.matmul(dscores, keys).add_(dq[images].transpose(1, 2))
            into[images] = joint.transpose(1, 2)
            if products is not None:
                products[images] = joint.mul_(b_q).sum(-1)
        if needs_k:
            partial_k[images] = torch.matmul(dscores.mT, b_q).transpose(1, 2)
    return (
        into if needs_q else q.new_empty(0),
        sum_over_images(partial_k, prompt_k, prompt_index) if needs_k else partial_k,
        sum_over_images(partial_v, prompt_v, prompt_index) if needs_v else partial_v,
    )


def sum_over_images(gradient: Tensor, prompt: Tensor, index: Tensor | None) -> Tensor:
    """Reduce prompt gradients of each image [B, P, H, d] to the shape of `prompt`, in a fixed order."""
    if index is not None:
        total = torch.zeros(prompt.shape, dtype=gradient.dtype, device=gradient.device)
        if gradient.is_cuda:
            # On a GPU index_add_ adds in any order; this sorts the index first.
            return total.index_put_((index.long(),), gradient, accumulate=True)
        return total.index_add_(0, index, gradient)
    return gradient.sum(0) if prompt.ndim == 3 else gradient


def _of_images(prompt: Tensor, index: Tensor | None, images: slice, dtype: torch.dtype) -> Tensor:
    """Return the prompts of some images as [b, H, P, d], or [H, P, d] if all images share them."""
    if index is not None:
        prompt = prompt.index_select(0, index[images])
    elif prompt.ndim == 4:
        prompt = prompt[images]
    return prompt.transpose(-3, -2).to(dtype)


def _scores(q: Tensor, keys: Tensor, temperature: Tensor | None, scale: float) -> Tensor:
    """Return the scores of q [b, H, Nq, d] over keys [b, H, P, d] or [H, P, d]."""
    scores = torch.matmul(q, keys.mT).mul_(scale)
    return scores if temperature is None else scores.div_(temperature.to(scores.dtype))
