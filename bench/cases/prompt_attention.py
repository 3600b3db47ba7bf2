"""`prompt_attention`, and `packed_prompt_attention` on one qkv tensor: image keys and prompt keys in one softmax."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench import baselines
from bench.cases import prompt_segment
from bench.ops import DTYPES, Case, Compilation, Context, Function, Inputs, Operation, Size, meta, ours
from bench.roofline import ViT, Work
from fastprompt import ops
from fastprompt.kernels.triton import prompt_attention_config as config
from fastprompt.ops.attention_choice import WAYS, use_way

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# What a call must do -------------------------------------------------------------------------------------------------


def work(B: int, N: int, P: int, H: int, d: int, *, itemsize: int = 2) -> tuple[Work, Work]:
    """Return the work of a forward, and of a backward in which everything trains.

    The forward reads q, k, v and prompts, and writes the output and one float32 log-sum-exp a row. The backward reads
    these and the output's gradient, and writes all gradients; it needs five products.
    """
    forward, backward = _executed(N, N + P, d, itemsize)
    scores = B * H * N * (N + P)
    return (
        Work(
            bytes=itemsize * H * d * (4 * B * N + 2 * P) + 4 * B * H * N,
            operations=4 * scores * d,
            exponentials=scores,
            executed=B * H * forward,
        ),
        Work(
            bytes=itemsize * H * d * (8 * B * N + 4 * P) + 4 * B * H * N,
            operations=10 * scores * d,
            exponentials=scores,
            executed=B * H * backward,
        ),
    )


def _executed(queries: int, keys: int, d: int, itemsize: int) -> tuple[int, int]:
    """Return the operations of a head's forward and backward with the tiles of the table for Hopper.

    With all keys resident the backward executes five products. Its two kernels, one for dK and dV and one for dQ, both
    compute the scores and their gradient, which makes seven.
    """
    width = sum(config.head_pieces(d))

    def entry(kernel: config.Kernel) -> config.Config:
        return config.choose(90, kernel, d, queries, keys, itemsize)

    def whole(count: int, block: int) -> int:
        return -(-count // block) * block

    def with_tail(block: int) -> int:
        return keys // block * block + config.tail(keys, block)

    fwd = entry("fwd")
    columns = with_tail(fwd.block_n) if fwd.block_n else sum(config.key_pieces(keys))
    forward = 4 * width * whole(queries, fwd.block_m) * columns
    if config.has_resident_backward(90, d, keys, itemsize):
        columns = max(16, 1 << (keys - 1).bit_length())
        return forward, 10 * width * whole(queries, entry("bwd").block_m) * columns
    dkdv, dq = entry("dkdv"), entry("dq")
    backward = 8 * whole(queries, dkdv.block_m) * whole(keys, dkdv.block_n)
    return forward, width * (backward + 6 * whole(queries, dq.block_m) * with_tail(dq.block_n))


def floors(B: int, vit: ViT, P: int) -> tuple[Work, Work]:
    """Return the work for a block of `vit` with `P` prompts."""
    return work(B, vit.N, P, vit.H, vit.D // vit.H)


# Inputs and competitors ----------------------------------------------------------------------------------------------


def case(
    B: int,
    N: int,
    P: int,
    H: int,
    d: int,
    dtype: torch.dtype,
    device: str,
    others: Sequence[str] = (),
    *,
    kind: str = "shared",
    temperature: bool = False,
    by_way: bool | None = None,
) -> Case:
    """Return prompt attention over views of a packed qkv.

    `others`: kernels of SDPA, or "products", for shared prompts without a temperature; with any, FlexAttention is the
    autotuned competitor. `kind`: "shared" prompts [P, H, d], "per image" [B, P, H, d], or a "table" [B + 1, P, H, d]
    with an index. `by_way`: with one competitor of ours for each way; default on a GPU.
    """
    lead = {"shared": (), "per image": (B,), "table": (B + 1,)}[kind]

    def draw() -> Inputs:
        q, k, v = torch.randn(B, N, 3, H, d, device=device, dtype=dtype).unbind(2)
        inputs = {"q": q, "k": k, "v": v, **_prompts((*lead, P, H, d), dtype, device)}
        if P and kind == "table":
            inputs["prompt_index"] = torch.randint(0, B + 1, (B,), device=device)
        if temperature:
            inputs["temperature"] = 0.5 + torch.rand(1, device=device)
        return inputs

    def exact(prompt_index: Tensor | None = None, **inputs: Tensor) -> Tensor:
        if prompt_index is not None:
            inputs = {n: x[prompt_index] if n.startswith("prompt") else x for n, x in inputs.items()}
        return baselines.products(**inputs, softmax=baselines.softmax_from_lse)

    compiled = device.startswith("cuda")
    flex = "flex" if compiled else "flex, not compiled"
    return Case(
        "prompt_attention",
        {"B": B, "N": N, "P": P, "H": H, "d": d, **({} if kind == "shared" else {"prompts": kind})},
        dtype,
        draw,
        exact,
        _ours(ops.prompt_attention, device, by_way),
        {name: _competitor(name) for name in others},
        work(B, N, P, H, d, itemsize=dtype.itemsize),
        autotuned={flex: baselines.flex(compiled=compiled)} if others else {},
        contexts=ways(device, by_way),
    )


def packed_case(
    B: int,
    N: int,
    P: int,
    H: int,
    d: int,
    dtype: torch.dtype,
    device: str,
    others: Sequence[str] = (),
    *,
    by_way: bool | None = None,
) -> Case:
    """Return the same on one tensor, qkv [B, N, 3, H, d], as a block has it; its gradient is one tensor too."""
    apart = case(B, N, P, H, d, dtype, device, others, by_way=by_way)

    def draw() -> Inputs:
        qkv = torch.randn(B, N, 3, H, d, device=device, dtype=dtype)
        return {"qkv": qkv, **_prompts((P, H, d), dtype, device)}

    def unpacked(function: Function) -> Function:
        return lambda qkv, **prompts: function(**dict(zip("qkv", qkv.unbind(2), strict=True)), **prompts)

    name = "packed_prompt_attention"
    return replace(
        apart,
        suite=name,
        draw=draw,
        exact=unpacked(apart.exact),
        ours=_ours(ops.packed_prompt_attention, device, by_way),
        others={name: unpacked(function) for name, function in apart.others.items()},
        autotuned={},
    )


def joined_case(
    B: int, N: int, P: int, H: int, d: int, dtype: torch.dtype, device: str, others: Sequence[str] = ()
) -> Case:
    """Return attention whose keys were joined with the prompts' beforehand: what is left when no copy counts."""
    found = case(B, N, 0, H, d, dtype, device, others)

    def draw() -> Inputs:
        return {n: torch.randn(B, N + P * (n != "q"), H, d, device=device, dtype=dtype) for n in "qkv"}

    shape = {"B": B, "N": N, "keys": N + P, "H": H, "d": d}
    return replace(
        found,
        suite="joined beforehand",
        shape=shape,
        draw=draw,
        work=work(B, N, P, H, d, itemsize=dtype.itemsize),
        autotuned={},
    )


def _ours(function: Function, device: str, by_way: bool | None) -> dict[str, Function]:
    """Return `function` on each backend, and if `by_way` by each of :func:`ways`."""
    found = ours(function.__name__, device, lambda backend: partial(function, backend=backend))
    return {**found, **dict.fromkeys(ways(device, by_way), function)}


def ways(device: str, by_way: bool | None = None) -> dict[str, Context]:
    """Return the contexts of the competitors that compute attention by one way each: on a GPU, or if `by_way`."""
    asked = device.startswith("cuda") if by_way is None else by_way
    return {f"fastprompt {way}": partial(use_way, way) for way in WAYS} if asked else {}


def _prompts(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    names = ("prompt_k", "prompt_v") if shape[-3] else ()
    return {name: torch.randn(shape, device=device, dtype=dtype) for name in names}


def _competitor(name: str) -> Function:
    return baselines.products if name == "products" else baselines.sdpa(name.removeprefix("sdpa "))


def cases(size: Size) -> Iterator[Case]:
    """Yield the comparisons at `size`; on a GPU also at the shapes of ViT-H, ViT-S and ViT-L."""
    B, N, H, d = size.B, size.N, size.H, size.D // size.H
    on = (size.dtype, size.device)
    gpu = size.device.startswith("cuda")
    fast = (
        ("sdpa flash", "sdpa cudnn", "sdpa efficient", "sdpa any")
        if gpu
        else ("sdpa flash", "sdpa math", "products")
    )
    for P in (50, 10, 100, 0):
        slow = ("sdpa math", "products") if gpu and P == 50 else ()
        yield case(B, N, P, H, d, *on, (*fast, *slow))
    for P in (50, 10, 100) if gpu else (50,):
        yield packed_case(B, N, P, H, d, *on, fast)
    yield joined_case(B, N, 50, H, d, *on, fast)
    for other_N, other_H, other_d in ((257, 16, 80), (197, 6, 64), (197, 16, 64)) if gpu else ():
        yield replace(case(B, other_N, 50, other_H, other_d, *on, fast), autotuned={})


def longer(size: Size) -> Iterator[Case]:
    """Yield the comparisons at the lengths of 384 and 518 pixels, with 50 prompts, for as many tokens in all."""
    gpu = size.device.startswith("cuda")
    fast = ("sdpa flash", "sdpa cudnn", "sdpa efficient") if gpu else ("sdpa flash",)
    for N in (577, 1370) if gpu else (2 * size.N, 3 * size.N):
        B = max(1, size.B * size.N // N)
        yield packed_case(B, N, 50, size.H, size.D // size.H, size.dtype, size.device, fast)


def sweep(device: str, tiny: bool) -> Iterator[Case]:
    """Yield the shapes to check; `tiny` ones run the same code quickly."""
    H, heads = 3, (80, 72, 88, 40)
    tokens, prompts = (197, 50, 257, 577, 1025, 1), (10, 0, 50, 100, 1, 256)

    def at(B: int, N: int, P: int, d: int, dtype: torch.dtype, packed: bool = False, **options: Any) -> Case:
        N, P = (max(1, N // 16), P // 4) if tiny else (N, P)
        return (packed_case if packed else case)(B, N, P, H, d, dtype, device, **options)

    # Enough heads that each has a program of its own: other kernels than few heads get.
    many = 2 if tiny else 64
    for P, d, dtype in ((10, 64, BF16), (0, 64, BF16), (50, 64, FP16), (10, 40, BF16)):
        yield at(many, 197, P, d, dtype)
        yield at(many, 197, P, d, dtype, packed=True)
    yield at(many, 50, 10, 64, BF16)
    for kind in ("shared", "per image", "table"):
        yield at(many, 197, 10, 64, BF16, kind=kind, temperature=True)
    for (N, P), dtype in product(((197, 10), (197, 0), (257, 50)), (BF16, FP32, FP16)):
        yield at(2, N, P, 64, dtype)
        yield at(2, N, P, 64, dtype, packed=True)
    for kind, dtype in product(("shared", "per image", "table"), (BF16, FP32)):
        yield at(2, 197, 10, 64, dtype, kind=kind, temperature=True)
        # Where nothing before a block trains, only its prompts do; and the reverse, frozen prompts.
        for frozen in (("q", "k", "v"), ("prompt_k", "prompt_v")):
            yield replace(at(2, 197, 10, 64, dtype, kind=kind), frozen=frozen)
    for d, dtype, (N, P) in product(heads, (BF16, FP32, FP16), ((257, 10), (197, 100))):
        yield at(2, N, P, d, dtype)
    for N, P, dtype in product(tokens, prompts, (BF16, FP32, FP16)):
        yield at(2, N, P, 64, dtype)
    for d, N, P in product(heads, tokens, prompts):
        yield at(2, N, P, d, BF16)


# Tiles ---------------------------------------------------------------------------------------------------------------


def reach(key: config.Key, images: int, widest: bool) -> Case:
    """Return a case that the table's entry `key` serves: of a shape that models have, or the widest."""
    N, P, B = {"medium": (197, 100, images), "long": (577, 50, images // 2)}.get(
        key.length, (197, 50, images)
    )
    return _reaching(key, B, N, P, widest)


def timed(key: config.Key, images: int) -> list[Case]:
    """Return the cases by which the entry `key` is judged: of many keys, several lengths, of about the same time."""
    if key.length != "long":
        return [reach(key, images, False)]
    return [_reaching(key, max(1, images * 300**2 // N**2), N, 50, False) for N in (397, 577, 1370)]


def _reaching(key: config.Key, B: int, N: int, P: int, widest: bool) -> Case:
    d = key.head_dim if widest or key.head_dim == 64 else 80
    found = case(B, N, P, 12, d, DTYPES[key.itemsize], "cuda")
    found.contexts["fastprompt triton"] = partial(use_way, "resident" if key.length == "short" else "looped")
    if key.length == "one":
        draw = found.draw
        found.draw = lambda: {name: x[:, :1] if name == "q" else x for name, x in draw().items()}
    return found


# Offline compilation -------------------------------------------------------------------------------------------------

# (queries, keys without prompts, head_dim). Every entry of the table, with as much left over by whole tiles as may be.
FORWARD_ENTRIES = [(*at, d) for d, at in product((64, 128), ((1, 245), (245, 245), (309, 309), (629, 629)))]
BACKWARD_ENTRIES = ((181, 181, 64), *((n, n, d) for n, d in product((309, 629), (64, 128))))
# Shapes that make other code of them: little left over, other pieces of keys, head_dim in two pieces.
FORWARD_VARIANTS = [(N, N, d) for N, d in ((197, 64), (50, 64), (237, 64), (197, 40), (197, 80), (577, 88))]
BACKWARD_VARIANTS = ((577, 577, 64), (197, 197, 80), (577, 577, 88))


def entries() -> Iterator[Compilation]:
    """Yield a launch for each entry of the tables in each dtype, with a temperature; a forward also without."""
    for dtype in (BF16, FP16, FP32):
        yield from _launches(FORWARD_ENTRIES, BACKWARD_ENTRIES, dtype)
    yield from _launches(FORWARD_ENTRIES, (), BF16, with_temperature=False)
    yield from prompt_segment.entries()


def variants() -> Iterator[Compilation]:
    """Yield the other shapes in bfloat16, and prompts that alone train, without a temperature."""
    yield from _launches(FORWARD_VARIANTS, BACKWARD_VARIANTS, BF16)
    ((_, backward),) = _launches((), [(197, 197, 64)], BF16)
    out, q, k, v, prompt_k, prompt_v, _, *rest, _ = backward.args
    no_keys = (out, q, k[:, :0], v[:, :0], prompt_k, prompt_v, None, *rest)
    yield "bfloat16 197x0+10 d64", partial(backward.func, *no_keys, [False, False, False, True, True, False])
    yield from prompt_segment.variants()


def _launches(
    forward: Iterable[tuple[int, int, int]],
    backward: Iterable[tuple[int, int, int]],
    dtype: torch.dtype,
    with_temperature: bool = True,
) -> Iterator[Compilation]:
    """Yield forwards and backwards for everything; q, k and v of one length are views of a packed tensor."""
    from fastprompt.kernels.triton import prompt_attention as kernels

    B, H, P = 4, 12, 10
    for kind, shapes in (("fwd", forward), ("bwd", backward)):
        for queries, keys, d in shapes:
            name = f"{str(dtype).removeprefix('torch.')} {queries}x{keys}+{P} d{d}"
            q, k, v = meta(B, keys, 3, H, d, dtype=dtype).unbind(2)
            out = meta(B, queries, H, d, dtype=dtype)
            q = q if queries == keys else out
            prompts, temperature = meta(2, P, H, d, dtype=dtype), meta(1)
            inputs = q, k, v, *prompts, temperature if with_temperature else None, None
            if kind == "fwd":
                yield name, partial(kernels.forward, *inputs, 0.125)
            else:
                lse = meta(B, H, queries)
                yield name, partial(kernels.backward, out, *inputs, out, lse, 0.125, [True] * 6)


OPERATION = Operation(
    "prompt_attention", cases, floors, reach, entries, variants, sweep=sweep, timed_cases=timed
)
