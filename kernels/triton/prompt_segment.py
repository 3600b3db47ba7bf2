"""Launchers of the prompt segment: join it with an image segment computed by another kernel, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton.prompt_attention import (
    MAX_HEAD_DIM,
    SECOND_AXIS,
    awaits,
    dense_rows,
    strides,
    sum_partials,
)
from fastprompt.kernels.triton.prompt_attention_config import head_pieces
from fastprompt.kernels.triton.prompt_segment_config import Config, Kernel, choose, prompt_tile
from fastprompt.kernels.triton.prompt_segment_kernels import (
    prompt_segment_bwd_dq_kernel,
    prompt_segment_bwd_kernel,
    prompt_segment_fwd_kernel,
)

# Programs of the backward for each multiprocessor: each stores its partial sums, two keep a multiprocessor busy.
WAVES = 2


def can_merge(q: Tensor, *args: Any) -> str | None:
    """Return why the kernels cannot run for q [B, Nq, H, d], or None."""
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[-1]} is not supported (up to {MAX_HEAD_DIM})"
    return launch.unsupported(q)


def can_segment_backward(grad: Tensor, q: Tensor, prompt_k: Tensor, *args: Any) -> str | None:
    """As :func:`can_merge`, for the gradients."""
    if prompt_k.ndim == 4 and prompt_k.shape[0] > SECOND_AXIS:
        return f"{prompt_k.shape[0]} prompt sets are not supported (up to {SECOND_AXIS})"
    return can_merge(q)


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
    """Return attention to image keys and prompts, given attention to the image keys alone.

    Args:
        q: [B, Nq, H, d].
        out, lse: [B, Nq, H, d] and [B, H, Nq] float32: the image segment's output and natural LSE. Where the LSE is
            -inf, for no image keys, the output is not read.
        prompt_k, prompt_v: [P, H, d], [B, P, H, d], or with `prompt_index` [B] a table [T, P, H, d].
        temperature: one-element tensor that divides the scaled scores, or None.
        scale: factor on q·k.

    Returns:
        The joint output [B, Nq, H, d], contiguous, and the joint LSE [B, H, Nq] in float32.
    """
    B, Nq, H, d = q.shape
    segment = _Segment(q, prompt_k, prompt_v, temperature, prompt_index, scale)
    out = dense_rows(out)
    lse = lse if lse.stride(-1) == 1 else lse.contiguous()
    joint = torch.empty((B, Nq, H, d), dtype=q.dtype, device=q.device)
    joint_lse = torch.empty((B, H, Nq), dtype=torch.float32, device=q.device)
    config = segment.config("fwd")
    (ib, im, ih), (ob, om, oh) = strides(out), strides(joint)
    launch.launch(
        prompt_segment_fwd_kernel,
        (B * H * triton.cdiv(Nq, config.block_m),),
        q.device,
        **segment.arguments(config, out, joint),
        p_image=out,
        p_image_lse=lse,
        p_out=joint,
        p_lse=joint_lse,
        stride_ib=ib,
        stride_im=im,
        stride_ih=ih,
        stride_lb=lse.stride(0),
        stride_lh=lse.stride(1),
        stride_ob=ob,
        stride_om=om,
        stride_oh=oh,
    )
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
        grad: [B, Nq, H, d], the gradient of the joint output.
        q, prompt_k, prompt_v, temperature, prompt_index, scale: as in :func:`merge`.
        out, lse: the joint output [B, Nq, H, d] and the joint natural LSE [B, H, Nq], contiguous.
        dq: [B, Nq, H, d], the image segment's part; not read unless `needs_q`.
        into: memory for the joint dq with a dense last dimension, such as a part of a packed gradient; default `dq`
            itself.
        products: [B, H, Nq] float32, contiguous; gets q·dq of each row from the joint dq before it is rounded. Their
            sum is -temperature · d(temperature).

    The prompts' gradients have the prompts' shape and dtype; sums over images are in a fixed order.
    """
    segment = _Segment(q, prompt_k, prompt_v, temperature, prompt_index, scale)
    grad, out = dense_rows(grad), dense_rows(out)
    dq = dense_rows(dq) if needs_q else q.new_empty(0)
    into = into if needs_q and into is not None else dq
    arguments: dict[str, Any] = {"p_out": out, "p_lse": lse, "p_do": grad, "p_dq": dq, "p_joint": into}
    for name, x in (("o", out), ("do", grad), ("dq", dq), ("j", into)):
        names = (f"stride_{name}b", f"stride_{name}m", f"stride_{name}h")
        arguments.update(zip(names, strides(x), strict=True))
    arguments["p_products"] = products
    rows = (out, grad, dq, into) if needs_q else (out, grad)

    config = segment.config("bwd")
    needs_prompts = (needs_k or needs_v) and segment.P > 0
    fused = needs_q and needs_prompts and config.block_p >= segment.P
    if needs_q and not fused:
        _launch_queries(segment, {**arguments, "NEED_PRODUCTS": products is not None}, rows)
    dpk, dpv = (x.new_zeros(x.shape if need else 0) for x, need in ((prompt_k, needs_k), (prompt_v, needs_v)))
    if needs_prompts and q.numel():
        flags = {"NEED_Q": fused, "NEED_K": needs_k, "NEED_V": needs_v}
        flags["NEED_PRODUCTS"] = fused and products is not None
        partial_k, partial_v = _launch_prompts(segment, config, {**arguments, **flags}, rows)
        dpk = segment.reduce(partial_k) if needs_k else dpk
        dpv = segment.reduce(partial_v) if needs_v else dpv
    return into, dpk, dpv


def _launch_queries(segment: _Segment, arguments: dict[str, Any], rows: tuple[Tensor, ...]) -> None:
    """Add the prompts' part to dq, one program for each tile of queries."""
    B, Nq, H, _ = segment.q.shape
    config = segment.config("dq")
    launch.launch(
        prompt_segment_bwd_dq_kernel,
        (B * H * triton.cdiv(Nq, config.block_m),),
        segment.q.device,
        **segment.arguments(config, *rows),
        **arguments,
    )


def _launch_prompts(
    segment: _Segment, config: Config, arguments: dict[str, Any], rows: tuple[Tensor, ...]
) -> list[Tensor]:
    """Return partial sums of d(prompt_k) and d(prompt_v) [programs, P, H, d]; those not needed are empty."""
    (B, Nq, H, d), P, device = segment.q.shape, segment.P, segment.q.device
    tiles = triton.cdiv(Nq, config.block_m)
    prompt_tiles = triton.cdiv(P, prompt_tile(P, config))
    steps = tiles
    if segment.prompt_k.ndim == 3:
        wanted = triton.cdiv(WAVES * launch.multiprocessors(device), H * prompt_tiles)
        steps = triton.cdiv(B * tiles, min(wanted, B * tiles))
    programs = triton.cdiv(B * tiles, steps)
    dtype = torch.float32 if segment.shared else segment.q.dtype
    partials = [
        torch.empty((programs, P, H, d) if arguments[need] else 0, dtype=dtype, device=device)
        for need in ("NEED_K", "NEED_V")
    ]
    partial_k, partial_v = partials
    sized = partial_k if partial_k.numel() else partial_v
    dpb, dpn, dph = strides(sized)
    launch.launch(
        prompt_segment_bwd_kernel,
        (H * programs * prompt_tiles,),
        device,
        **segment.arguments(config, sized, *rows),
        **arguments,
        p_dpk=partial_k,
        p_dpv=partial_v,
        B=B,
        programs=programs,
        steps=steps,
        stride_dpb=dpb,
        stride_dpn=dpn,
        stride_dph=dph,
    )
    return partials


class _Segment:
    """The operands of all kernels, with the required strides."""

    def __init__(
        self,
        q: Tensor,
        prompt_k: Tensor,
        prompt_v: Tensor,
        temperature: Tensor | None,
        prompt_index: Tensor | None,
        scale: float,
    ) -> None:
        self.q, self.prompt_k, self.prompt_v = (dense_rows(x) for x in (q, prompt_k, prompt_v))
        self.prompt_index = None if prompt_index is None else prompt_index.contiguous()
        self.temperature, self.scale = temperature, scale
        self.P = prompt_k.shape[-3]

    @property
    def shared(self) -> bool:
        """Return whether images share prompts, so that the prompts' gradients are sums."""
        return self.prompt_k.ndim == 3 or self.prompt_index is not None

    def config(self, kernel: Kernel) -> Config:
        """Return the table's entry for this call."""
        architecture = launch.architecture(self.q.device)
        return choose(architecture, kernel, self.q.shape[-1], self.P, self.q.element_size())

    def arguments(self, config: Config, *others: Tensor) -> dict[str, Any]:
        """Return the arguments of every kernel; `others` are further tensors that it reads or writes by rows."""
        _, Nq, H, d = self.q.shape
        first, second = head_pieces(d)
        tensors = (self.q, self.prompt_k, self.prompt_v)
        (qb, qm, qh), (pkb, pkn, pkh), (pvb, pvn, pvh) = map(strides, tensors)
        return {
            "p_q": self.q,
            "p_pk": self.prompt_k,
            "p_pv": self.prompt_v,
            "p_index": self.prompt_index,
            "p_temperature": self.temperature,
            "scale": self.scale,
            "Nq": Nq,
            "P": self.P,
            "T": self.prompt_k.shape[0],
            "H": H,
            "stride_qb": qb,
            "stride_qm": qm,
            "stride_qh": qh,
            "stride_pkb": pkb,
            "stride_pkn": pkn,
            "stride_pkh": pkh,
            "stride_pvb": pvb,
            "stride_pvn": pvn,
            "stride_pvh": pvh,
            "HEAD_DIM": d,
            "D0": first,
            "D1": second,
            "BLOCK_M": config.block_m,
            "BLOCK_P": prompt_tile(self.P, config),
            "HAS_INDEX": self.prompt_index is not None,
            "HAS_TEMPERATURE": self.temperature is not None,
            "ALIGNED": launch.aligned(*tensors, *others),
            "PRECISION": launch.input_precision(self.q.dtype),
            "AWAIT": awaits(self.q),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def reduce(self, partial: Tensor) -> Tensor:
        """Sum partial gradients [programs, P, H, d] to the shape and dtype of the prompts, in a fixed order."""
        if not self.shared:
            return partial
        return sum_partials(partial, self.prompt_k, self.prompt_index)
