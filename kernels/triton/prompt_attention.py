"""Launchers of prompt-augmented attention, which select kernels and tiles for a call."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton.prompt_attention_bwd import (
    prompt_attention_bwd_delta_kernel,
    prompt_attention_bwd_dkdv_kernel,
    prompt_attention_bwd_dq_kernel,
    prompt_attention_bwd_sum_kernel,
)
from fastprompt.kernels.triton.prompt_attention_bwd_resident import prompt_attention_bwd_resident_kernel
from fastprompt.kernels.triton.prompt_attention_config import (
    RESIDENT_KEYS,
    Config,
    Kernel,
    choose,
    head_pieces,
    key_pieces,
    tail,
)
from fastprompt.kernels.triton.prompt_attention_fwd import (
    prompt_attention_fwd_kernel,
    prompt_attention_fwd_resident_kernel,
)

Way = Literal["resident", "looped"]

MAX_HEAD_DIM = 128
SECOND_AXIS = 65535  # the longest second axis of a grid
SUM_ROWS, SUM_COLUMNS = 32, 128


def can_forward(q: Tensor, *args: Any) -> str | None:
    """Return why the kernels cannot run for q [B, Nq, H, d], or None."""
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[-1]} is not supported (up to {MAX_HEAD_DIM})"
    return launch.unsupported(q)


def can_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor | None, *args: Any
) -> str | None:
    """As :func:`can_forward`, for the gradients."""
    if prompt_k is not None and prompt_k.ndim == 4 and prompt_k.shape[0] > SECOND_AXIS:
        return f"{prompt_k.shape[0]} prompt sets are not supported (up to {SECOND_AXIS})"
    return can_forward(q)


def packed_backward(
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
    *,
    way: Way,
) -> tuple[Tensor, ...]:
    """As :func:`backward`, with the gradients of q, k and v written into one tensor [B, N, 3, H, d]."""
    need_qkv, *others = needs
    q, k, v = qkv.unbind(2)
    packed = torch.empty(qkv.shape if need_qkv else 0, dtype=qkv.dtype, device=qkv.device)
    dq, dk, dv = packed.unbind(2) if need_qkv else (packed, packed, packed)
    inputs = _Inputs(q, k, v, prompt_k, prompt_v, temperature, prompt_index, scale)
    return (packed, *_backward(inputs, grad, out, lse, [need_qkv] * 3 + others, dq, dk, dv, way))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
    scale: float,
    *,
    way: Way,
) -> tuple[Tensor, Tensor]:
    """Return out [B, Nq, H, d], contiguous, and the natural LSE [B, H, Nq] in float32."""
    B, Nq, H, d = q.shape
    out = torch.empty((B, Nq, H, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Nq), dtype=torch.float32, device=q.device)
    inputs = _Inputs(q, k, v, prompt_k, prompt_v, temperature, prompt_index, scale)
    arguments = inputs.arguments(out)
    stride_ob, stride_om, stride_oh, _ = out.stride()
    arguments.update(p_out=out, p_lse=lse, stride_ob=stride_ob, stride_om=stride_om, stride_oh=stride_oh)
    arguments["POSITIVE"] = temperature is None and scale > 0
    keys = inputs.keys if way == "resident" else max(inputs.keys, RESIDENT_KEYS + 1)
    config = choose(launch.architecture(q.device), "fwd", d, Nq, keys, q.element_size())
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.block_n:
        launch.launch(
            prompt_attention_fwd_kernel,
            (B * H * triton.cdiv(Nq, config.block_m),),
            q.device,
            **arguments,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            AWAIT=awaits(q),
            **_tail(q, inputs.keys, config.block_n),
            **options,
        )
    else:
        rows = _rows_of_a_program(Nq, config.block_m, B * H, q.device)
        first, second, third = key_pieces(inputs.keys)
        launch.launch(
            prompt_attention_fwd_resident_kernel,
            (B * H * triton.cdiv(Nq, rows),),
            q.device,
            **arguments,
            tile_rows=rows,
            BLOCK_M=config.block_m,
            C0=first,
            C1=second,
            C2=third,
            **options,
        )
    return out, lse


def backward(
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
    *,
    way: Way,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, prompt_k, prompt_v and temperature; those not in `needs` are empty.

    k and v may have no rows (N = 0) if only prompts train.
    """
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else x.new_empty(0)
        for x, need in zip((q, k, v), needs, strict=False)
    )
    inputs = _Inputs(q, k, v, prompt_k, prompt_v, temperature, prompt_index, scale)
    return (dq, dk, dv, *_backward(inputs, grad, out, lse, needs, dq, dk, dv, way))


class _Inputs:
    """The operands of all kernels, with the required strides, and values derived from their shapes."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prompt_k: Tensor | None,
        prompt_v: Tensor | None,
        temperature: Tensor | None,
        prompt_index: Tensor | None,
        scale: float,
    ) -> None:
        self.q, self.k, self.v = (dense_rows(x) for x in (q, k, v))
        self.temperature, self.scale = temperature, scale
        self.prompt_index = None if prompt_index is None else prompt_index.contiguous()
        self.P = 0 if prompt_k is None else prompt_k.shape[-3]
        # Without prompts these are never read, but the pointers must have the keys' type.
        self.prompt_k = self.k[:, :0] if prompt_k is None else dense_rows(prompt_k)
        self.prompt_v = self.v[:, :0] if prompt_v is None else dense_rows(prompt_v)
        self.keys = self.k.shape[1] + self.P

    @property
    def shared(self) -> bool:
        """Return whether images share prompts, so that the prompts' gradients are sums."""
        return self.prompt_k.ndim == 3 or self.prompt_index is not None

    def arguments(self, *others: Tensor) -> dict[str, Any]:
        """Return the arguments of every kernel; `others` are further tensors that it reads or writes by rows."""
        _, Nq, H, d = self.q.shape
        tensors = (self.q, self.k, self.v, self.prompt_k, self.prompt_v)
        first, second = head_pieces(d)
        (qb, qm, qh), (kb, kn, kh), (vb, vn, vh), (pkb, pkn, pkh), (pvb, pvn, pvh) = map(strides, tensors)
        return {
            "p_q": self.q,
            "p_k": self.k,
            "p_v": self.v,
            "p_pk": self.prompt_k,
            "p_pv": self.prompt_v,
            "p_index": self.prompt_index,
            "p_temperature": self.temperature,
            "scale": self.scale,
            "Nq": Nq,
            "N": self.k.shape[1],
            "P": self.P,
            "T": self.prompt_k.shape[0],
            "H": H,
            "stride_qb": qb,
            "stride_qm": qm,
            "stride_qh": qh,
            "stride_kb": kb,
            "stride_kn": kn,
            "stride_kh": kh,
            "stride_vb": vb,
            "stride_vn": vn,
            "stride_vh": vh,
            "stride_pkb": pkb,
            "stride_pkn": pkn,
            "stride_pkh": pkh,
            "stride_pvb": pvb,
            "stride_pvn": pvn,
            "stride_pvh": pvh,
            "HEAD_DIM": d,
            "D0": first,
            "D1": second,
            "HAS_INDEX": self.prompt_index is not None,
            "HAS_TEMPERATURE": self.temperature is not None,
            "ALIGNED": launch.aligned(*tensors, *others),
            "PRECISION": launch.input_precision(self.q.dtype),
        }


def _backward(
    inputs: _Inputs,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    needs: list[bool],
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    way: Way,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill those of dq, dk and dv that are needed; return d(prompt_k), d(prompt_v) and d(temperature)."""
    q, P, device = inputs.q, inputs.P, inputs.q.device
    B, Nq, H, d = q.shape
    grad, out = dense_rows(grad), dense_rows(out)
    need_q, need_temperature = needs[0], needs[5] and inputs.temperature is not None
    image, prompt = needs[1] or needs[2], P > 0 and (needs[3] or needs[4])
    need_k, need_v = needs[1] or (prompt and needs[3]), needs[2] or (prompt and needs[4])
    nothing = q.new_empty(0)

    architecture, itemsize = launch.architecture(device), q.element_size()

    def find(kernel: Kernel) -> Config:
        return choose(architecture, kernel, d, Nq, inputs.keys, itemsize)

    own = P > 0 and inputs.prompt_k.ndim == 4  # each image has its prompts
    resident = way == "resident" and not (own and B > SECOND_AXIS)
    images = 1
    if resident and not own:
        images = max(_images_of_a_program(B, H, launch.multiprocessors(device)), triton.cdiv(B, SECOND_AXIS))
    groups = triton.cdiv(B, images)

    # Gradients that a kernel computes but nobody needs are written to scratch.
    if image and need_k and not needs[1]:
        dk = torch.empty_like(inputs.k, memory_format=torch.contiguous_format)
    if image and need_v and not needs[2]:
        dv = torch.empty_like(inputs.v, memory_format=torch.contiguous_format)
    dtype = torch.float32 if inputs.shared else q.dtype
    partial_k, partial_v = (
        torch.empty((groups, P, H, d), dtype=dtype, device=device) if prompt and need else nothing
        for need in (need_k, need_v)
    )
    sized = dk if dk.numel() else dv
    partial = partial_k if partial_k.numel() else partial_v
    arguments = inputs.arguments(grad, *(x for x in (dq, dk, dv, partial) if x.numel()))
    dob, dom, doh = strides(grad)
    arguments.update(p_do=grad, stride_dob=dob, stride_dom=dom, stride_doh=doh)
    dqb, dqm, dqh = strides(dq)
    to_queries = {"p_dq": dq, "stride_dqb": dqb, "stride_dqm": dqm, "stride_dqh": dqh}
    (dkb, dkn, dkh), (dpb, dpn, dph) = strides(sized), strides(partial)
    to_keys = {"p_dk": dk, "p_dv": dv, "stride_dkb": dkb, "stride_dkn": dkn, "stride_dkh": dkh}
    to_keys.update(p_dpk=partial_k, p_dpv=partial_v, stride_dpb=dpb, stride_dpn=dpn, stride_dph=dph)

    products = torch.empty((B, H, Nq) if need_temperature else 0, dtype=torch.float32, device=device)
    if resident:
        config = find("bwd")
        launch.launch(
            prompt_attention_bwd_resident_kernel,
            (H, groups),
            device,
            **arguments,
            **to_queries,
            **to_keys,
            p_lse=lse,
            B=B,
            images=images,
            BLOCK_M=config.block_m,
            KEYS=max(16, 1 << (inputs.keys - 1).bit_length()),
            STORE_PROMPT=prompt,
            AWAIT=awaits(q),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if need_temperature:
            # Scores are linear in q. A separate launch, because the kernel has no registers left for it.
            products, lse2 = torch.empty_like(lse), torch.empty_like(lse)
            _row_products(q, dq, lse, products, lse2)
    else:
        padded = triton.cdiv(Nq, 128) * 128
        delta, lse2 = (torch.empty((B, H, padded), dtype=torch.float32, device=device) for _ in range(2))
        _row_products(out, grad, lse, delta, lse2)
        arguments.update(p_lse2=lse2, p_delta=delta, padded=padded)
        if need_k or need_v:
            flags = {"NEED_K": need_k, "NEED_V": need_v, "STORE_IMAGE": image, "STORE_PROMPT": prompt}
            _launch_keys(inputs, find("dkdv"), {**arguments, **to_keys, **flags})
        if need_q or need_temperature:
            flags = {"NEED_Q": need_q, "NEED_TEMPERATURE": need_temperature}
            _launch_queries(inputs, find("dq"), {**arguments, **to_queries, "p_products": products, **flags})
    results = [
        like.new_empty(like.shape if need else 0)
        if not (need and prompt)
        else sum_partials(part, like, inputs.prompt_index)
        if inputs.shared
        else part
        for part, like, need in (
            (partial_k, inputs.prompt_k, needs[3]),
            (partial_v, inputs.prompt_v, needs[4]),
        )
    ]
    if need_temperature:
        assert inputs.temperature is not None
        t = inputs.temperature  # the products are Σ score · d(score) of each row, and score ~ 1 / temperature
        results.append((-products.sum().reshape(t.shape) / t).to(t.dtype))
    else:
        results.append(q.new_empty(0))
    return results[0], results[1], results[2]


def _launch_keys(inputs: _Inputs, config: Config, arguments: dict[str, Any]) -> None:
    """Compute the gradients of keys and values, one program per tile; only those of prompts unless STORE_IMAGE."""
    B, _, H, _ = inputs.q.shape
    first_key = 0 if arguments["STORE_IMAGE"] else inputs.k.shape[1]
    launch.launch(
        prompt_attention_bwd_dkdv_kernel,
        (B * H * triton.cdiv(inputs.keys - first_key, config.block_n),),
        inputs.q.device,
        **arguments,
        first_key=first_key,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        AWAIT=awaits(inputs.q),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _launch_queries(inputs: _Inputs, config: Config, arguments: dict[str, Any]) -> None:
    """Compute the gradient of q and the terms of the temperature's, one program per tile of queries."""
    B, Nq, H, _ = inputs.q.shape
    launch.launch(
        prompt_attention_bwd_dq_kernel,
        (B * H * triton.cdiv(Nq, config.block_m),),
        inputs.q.device,
        **arguments,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        AWAIT=awaits(inputs.q),
        **_tail(inputs.q, inputs.keys, config.block_n),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _row_products(a: Tensor, b: Tensor, lse: Tensor, products: Tensor, lse2: Tensor) -> None:
    """Compute a·b of each row of a head [B, Nq, H, d], and the LSE in units of log2, both [B, H, padded]."""
    B, Nq, H, d = a.shape
    (ob, om, oh), (dob, dom, doh) = strides(a), strides(b)
    padded = products.shape[2]
    block = 32 if d <= 64 else 16
    first, second = head_pieces(d)
    launch.launch(
        prompt_attention_bwd_delta_kernel,
        (B * H * triton.cdiv(padded, block),),
        a.device,
        p_out=a,
        p_do=b,
        p_lse=lse,
        p_delta=products,
        p_lse2=lse2,
        Nq=Nq,
        padded=padded,
        H=H,
        stride_ob=ob,
        stride_om=om,
        stride_oh=oh,
        stride_dob=dob,
        stride_dom=dom,
        stride_doh=doh,
        HEAD_DIM=d,
        D0=first,
        D1=second,
        BLOCK_M=block,
        ALIGNED=launch.aligned(a, b),
        num_warps=4,
        num_stages=1,
    )


def sum_partials(partial: Tensor, like: Tensor, index: Tensor | None) -> Tensor:
    """Sum partial gradients [n, P, H, d] in a fixed order, to the shape and dtype of `like`: shared prompts or a table.

    With a table there is one part for each image, and `index` [B] says whose set it belongs to.
    """
    total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    columns = partial.shape[1:].numel()
    launch.launch(
        prompt_attention_bwd_sum_kernel,
        (triton.cdiv(columns, SUM_COLUMNS), 1 if index is None else like.shape[0]),
        partial.device,
        p_partial=partial,
        p_index=index,
        p_sum=total,
        B=partial.shape[0],
        columns=columns,
        BLOCK_B=SUM_ROWS,
        BLOCK_C=SUM_COLUMNS,
        HAS_INDEX=index is not None,
        num_warps=4,
        num_stages=1,
    )
    return total


def _tail(q: Tensor, keys: int, block: int) -> dict[str, int | bool]:
    """Return the tile for the keys left over by whole tiles; float32 masks every tile instead.

    Float32 products hold whole rows in registers, and a second copy of them would spill.
    """
    if q.element_size() == 4:
        return {"TAIL": 0, "MASK_ALL": True}
    return {"TAIL": tail(keys, block), "MASK_ALL": False}


def awaits(q: Tensor) -> bool:
    """Return whether loops must await a product in the pass that starts it: on the matrix units of Hopper.

    There ptxas before 13.1, which Triton brings, may reuse the registers of a product that is under way.
    """
    units = q.element_size() == 2 or launch.input_precision(q.dtype) == "tf32"
    return units and launch.architecture(q.device) == 90


def _rows_of_a_program(Nq: int, block: int, heads: int, device: torch.device) -> int:
    """Return the number of query rows per program of the resident kernel: all, unless that gives too few programs."""
    tiles = triton.cdiv(Nq, block)
    splits = min(tiles, max(1, triton.cdiv(4 * launch.multiprocessors(device), max(1, heads))))
    return max(1, triton.cdiv(tiles, splits)) * block


@functools.lru_cache
def _images_of_a_program(B: int, H: int, multiprocessors: int) -> int:
    """Return how many images of a head a program of the resident backward owns, one of which runs on a multiprocessor.

    As many as finish in the shortest time, in units of an image: so few programs that each runs from the start, or two
    or three turns of them where these divide the images better.
    """
    best = 1, triton.cdiv(B * H, multiprocessors)
    for turns in (1, 2, 3):
        groups = min(B, turns * multiprocessors // H)
        if groups:
            images = triton.cdiv(B, groups)
            time = images * triton.cdiv(triton.cdiv(B, images) * H, multiprocessors)
            if (time, -images) < (best[1], -best[0]):
                best = images, time
    return best[0]


def dense_rows(x: Tensor) -> Tensor:
    """Return x with its last dimension dense and, within an image, offsets of 32 bits."""
    reach = sum((n - 1) * s for n, s in zip(x.shape[-3:], x.stride()[-3:], strict=True) if n)
    return x if x.stride(-1) == 1 and 0 <= reach < 2**31 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of image, row and head of x [B, N, H, d], or [N, H, d] with an image stride of 0."""
    if x.ndim < 3:  # not written in this call
        return 0, 0, 0
    b, n, h = (0, *x.stride()[:2]) if x.ndim == 3 else x.stride()[:3]
    return b, n, h
