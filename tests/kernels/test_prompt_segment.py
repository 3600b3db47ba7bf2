"""The Triton kernels of the prompt segment: joined with an image segment, they give attention and its gradients."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from attention_cases import KINDS, Shape, concatenated, draw
from numerics import dtypes_of, odd_strides, packed, transposed
from torch import Tensor

from bench.correctness import Oracle
from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton import prompt_segment as kernels
from fastprompt.kernels.triton.prompt_segment_config import TABLE, choose, prompt_tile
from fastprompt.ops import prompt_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = dtypes_of("triton")
HALF = DTYPES[-1]
SCALE = 0.3

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Path(NamedTuple):
    """A call that takes a way of its own through the kernels."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    temperature: bool = True


# The kernels' code depends on the pieces of head_dim, on whether one tile of 64 (for wide heads, or up to 64 prompts)
# or 128 holds all prompts, and on the kind of prompts; and there may be several tiles of queries.
PATHS = {
    "shared": Path(Shape()),
    "one prompt": Path(Shape(P=1, d=8), HALF, temperature=False),
    "a table": Path(Shape(Nq=130, kind="table"), HALF),
    "per image": Path(Shape(kind="per image", d=40), temperature=False),
    "many images": Path(Shape(B=40, Nq=5, P=3, d=16), HALF),
    "two tiles of queries": Path(Shape(B=2, Nq=130, d=64), temperature=False),
    "64 + 16 wide, many prompts": Path(Shape(P=100, d=80, H=1), HALF),
    "64 + 32 wide": Path(Shape(P=20, d=88, kind="per image"), HALF),
    "128 wide": Path(Shape(P=70, d=128, H=1, kind="table"), temperature=False),
    "more prompts than a tile holds": Path(Shape(B=2, P=300, d=64, H=1)),
    "more prompts than a tile holds, a table": Path(Shape(B=3, P=150, H=1, kind="table"), HALF),
    "odd head_dim": Path(Shape(d=33), HALF),
}
by_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def scores(q: Tensor, keys: Tensor, temperature: Tensor | None) -> Tensor:
    """Scaled scores [B, H, Nq, keys] in plain PyTorch."""
    s = torch.matmul(q.transpose(1, 2), keys.permute(0, 2, 3, 1)) * SCALE
    s = s if temperature is None else s / temperature
    return s.to(torch.promote_types(s.dtype, torch.float32))


def of_images(prompt: Tensor, B: int, index: Tensor | None) -> Tensor:
    """Prompts of each image, [B, P, H, d]."""
    if index is not None:
        return prompt[index]
    return prompt if prompt.ndim == 4 else prompt.expand(B, -1, -1, -1)


def plain_merge(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`kernels.merge` in plain PyTorch, in the inputs' dtype."""
    keys, values = (of_images(x, len(q), prompt_index) for x in (prompt_k, prompt_v))
    s = scores(q, keys, temperature)
    joint = torch.logaddexp(lse, s.logsumexp(-1))
    weights = (s - joint.unsqueeze(-1)).exp().to(q.dtype)
    share = (lse - joint).exp().unsqueeze(-1).to(q.dtype)
    return (out.transpose(1, 2) * share + weights @ values.transpose(1, 2)).transpose(1, 2), joint


def plain_backward(
    grad: Tensor,
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    temperature: Tensor | None,
    prompt_index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
) -> tuple[Tensor, ...]:
    """:func:`kernels.segment_backward` in plain PyTorch, in the inputs' dtype."""
    keys, values = (of_images(x, len(q), prompt_index) for x in (prompt_k, prompt_v))
    weights = (scores(q, keys, temperature) - lse.unsqueeze(-1)).exp()
    d_out, queries = grad.transpose(1, 2), q.transpose(1, 2)
    delta = (d_out * out.transpose(1, 2)).sum(-1, keepdim=True, dtype=weights.dtype)
    d_scores = weights * (d_out @ values.permute(0, 2, 3, 1) - delta) * SCALE
    d_scores = (d_scores if temperature is None else d_scores / temperature).to(q.dtype)
    joint = dq + (d_scores @ keys.transpose(1, 2)).transpose(1, 2)
    products = (q.to(lse.dtype) * joint.to(lse.dtype)).sum(-1).transpose(1, 2)
    gradients = []
    for prompt, x in ((prompt_k, d_scores.mT @ queries), (prompt_v, weights.to(q.dtype).mT @ d_out)):
        x = x.transpose(1, 2)
        if prompt_index is not None:
            x = torch.zeros(prompt.shape, dtype=x.dtype, device=x.device).index_add(0, prompt_index, x)
        gradients.append(x.sum(0) if prompt.ndim == 3 else x)
    return joint, *gradients, products


def forward_inputs(path: Path) -> dict[str, Tensor | None]:
    """Return the arguments of a merge: the image segment's output and LSE are attention's own."""
    inputs = draw(path.shape, path.dtype, DEVICE, path.temperature)
    q, k, v = (inputs.pop(name) for name in "qkv")
    assert q is not None
    assert k is not None
    assert v is not None
    s = scores(q.float(), k.float(), inputs["temperature"])
    out = (s.softmax(-1) @ v.float().transpose(1, 2)).transpose(1, 2).to(path.dtype)
    return {"q": q, "out": out, "lse": s.logsumexp(-1), **inputs}


def backward_inputs(path: Path) -> dict[str, Tensor | None]:
    """Return the arguments of a backward: the joint output and LSE, and any dq."""
    inputs = forward_inputs(path)
    q = inputs["q"]
    assert q is not None
    inputs["out"], inputs["lse"] = plain_merge(**inputs)  # type: ignore[arg-type]
    return {"grad": torch.randn_like(q), **inputs, "dq": torch.randn_like(q)}


def merge(**inputs: Any) -> tuple[Tensor, Tensor]:
    return kernels.merge(**inputs, scale=SCALE)


def backward(needs: str = "q k v", apart: bool = True, **inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients in `needs`, the products too if dq is among them; dq in place if not `apart`."""
    B, Nq, H, _ = inputs["q"].shape
    wanted = [name in needs for name in "qkv"]
    products = torch.empty(B, H, Nq, device=DEVICE) if wanted[0] else None
    into = packed(torch.full_like(inputs["q"], torch.nan)) if apart and wanted[0] else None
    results = kernels.segment_backward(
        **inputs,
        scale=SCALE,
        needs_q=wanted[0],
        needs_k=wanted[1],
        needs_v=wanted[2],
        into=into,
        products=products,
    )
    for need, x in zip(wanted, results, strict=True):
        assert need or x.numel() == 0
    if wanted[0]:
        assert results[0] is (inputs["dq"] if into is None else into)
    return *(x if need else None for need, x in zip(wanted, results, strict=True)), products


@by_path
def test_the_prompts_join_the_image_segment(path: Path) -> None:
    Oracle(plain_merge, forward_inputs(path), backward=False)(merge)


@by_path
def test_gradients_of_the_prompt_segment(path: Path) -> None:
    Oracle(plain_backward, backward_inputs(path), backward=False)(backward)


@pytest.mark.parametrize("needs", ["q", "k", "v", "k v", "q k", "q v"])
@pytest.mark.parametrize("P", [4, 130], ids=["one tile", "several tiles"])
def test_gradients_are_the_same_whichever_else_is_needed(needs: str, P: int) -> None:
    def wanted(**inputs: Any) -> dict[str, Tensor]:
        results = dict(zip(("q", "k", "v", "products"), plain_backward(**inputs), strict=True))
        return [results[n] for n in (*needs.split(), *(("products",) if "q" in needs else ()))]

    inputs = backward_inputs(Path(Shape(P=P, H=1)))
    Oracle(wanted, inputs, backward=False)(partial(backward, needs))


@pytest.mark.parametrize("layout", [packed, odd_strides, transposed], ids=lambda layout: layout.__name__)
def test_strides_do_not_matter(layout: Any) -> None:
    path = Path(Shape(B=2, kind="per image"))

    def laid_out(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        given = {n: layout(x) if x is not None and x.ndim == 4 else x for n, x in inputs.items()}
        if "dq" not in inputs:  # rows of an LSE that are padded, as PyTorch's own kernels return them
            lse = inputs["lse"]
            assert lse is not None
            given["lse"] = torch.nn.functional.pad(lse, (0, 5), value=torch.nan)[..., : lse.shape[-1]]
        return given

    inputs = forward_inputs(path)
    Oracle(plain_merge, inputs, backward=False)(merge, laid_out(inputs))
    inputs = backward_inputs(path)
    oracle = Oracle(plain_backward, inputs, backward=False)
    oracle(backward, laid_out(inputs))
    if layout is not odd_strides:
        oracle(partial(backward, apart=False), laid_out(inputs))


@pytest.mark.parametrize("temperature", [True, False])
def test_with_the_image_segment_it_is_attention(temperature: bool) -> None:
    """The gradients of the image segment from the joint output and LSE, and those of the prompts, are all gradients."""
    inputs = draw(Shape(Nq=20, N=20), torch.float32, DEVICE, temperature)

    class Split(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
            s = scores(q, k, rest[2])
            out = (s.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
            out, lse = kernels.merge(q, out, s.logsumexp(-1), *rest, SCALE)
            ctx.save_for_backward(q, k, v, *rest, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            q, k, v, *rest, out, lse = ctx.saved_tensors
            dq, dk, dv, _ = plain_backward(grad, q, k, v, rest[2], None, out, lse, torch.zeros_like(q))
            products = torch.empty_like(lse)
            gradients = kernels.segment_backward(
                grad, q, *rest, out, lse, SCALE, True, True, True, dq, products=products
            )
            t = rest[2]
            d_temperature = None if t is None else (-products.sum() / t).reshape(t.shape)
            return gradients[0], dk, dv, *gradients[1:], d_temperature, None

    def split(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        return Split.apply(q, k, v, *rest.values())

    plain, exact = (partial(f, scale=SCALE) for f in (concatenated, prompt_attention_reference))
    Oracle(plain, inputs, exact=exact)(split)


@pytest.mark.parametrize("sign", [1, -1])
def test_without_image_keys_prompts_are_all(sign: int) -> None:
    """An LSE of -inf says that there are none; the output beside it is not read."""
    inputs = draw(Shape(N=0, P=5), torch.float32, DEVICE)
    inputs["q"] *= sign * 300  # type: ignore[operator]
    empty = {"out": torch.full_like(inputs["q"], torch.nan), "lse": torch.full((3, 2, 11), -torch.inf)}  # type: ignore[arg-type]

    def ours(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        return merge(q=q, **{n: x.to(q.device) for n, x in empty.items()}, **rest)[0]

    plain, exact = (partial(f, scale=SCALE) for f in (concatenated, prompt_attention_reference))
    Oracle(plain, inputs, exact=exact, backward=False)(ours)


def test_very_negative_scores_leave_no_trace_of_padding() -> None:
    """A padded prompt scores 0, by which its weight overflows where all true scores lie far below."""
    path = Path(Shape(P=3), temperature=False)
    inputs = draw(path.shape, path.dtype, DEVICE, path.temperature)
    for name in ("k", "prompt_k"):
        inputs[name] = inputs[name].abs() + 1  # type: ignore[union-attr]
    q = inputs["q"] = -inputs["q"].abs() - 10  # type: ignore[union-attr]
    k, v = inputs.pop("k"), inputs.pop("v")
    s = scores(q, k, None)  # type: ignore[arg-type]
    inputs = {**inputs, "out": (s.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2), "lse": s.logsumexp(-1)}  # type: ignore[union-attr]
    Oracle(plain_merge, inputs, backward=False)(merge)
    inputs["out"], inputs["lse"] = plain_merge(**inputs)  # type: ignore[arg-type]
    inputs = {**inputs, "grad": torch.randn_like(q), "dq": torch.zeros_like(q)}
    Oracle(plain_backward, inputs, backward=False)(backward)


def test_an_index_outside_the_table_gives_nan_for_its_image_alone() -> None:
    inputs = forward_inputs(Path(Shape(B=3, kind="table")))
    for wrong in (5, -1):
        inputs["prompt_index"] = torch.tensor([0, wrong, 4], device=DEVICE)
        out, _ = merge(**inputs)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("B", "Nq", "P"), [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_add(B: int, Nq: int, P: int, kind: str) -> None:
    inputs = forward_inputs(Path(Shape(B=B, Nq=Nq, P=P, kind=kind)))
    out, lse = merge(**inputs)
    assert out.shape == inputs["q"].shape  # type: ignore[union-attr]
    assert out.isfinite().all()
    assert lse.isfinite().all()
    given = {**inputs, "grad": torch.randn_like(out), "out": out, "lse": lse, "dq": torch.ones_like(out)}
    dq, dk, dv, _ = backward(**given)
    assert torch.equal(dq, given["dq"])  # type: ignore[arg-type]
    for gradient, name in ((dk, "prompt_k"), (dv, "prompt_v")):
        assert torch.equal(gradient, torch.zeros_like(inputs[name]))  # type: ignore[arg-type]


@pytest.mark.parametrize("multiprocessors", [1, 2, 1000])
def test_two_runs_give_the_same_bits(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs share the images."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    inputs = backward_inputs(Path(Shape(B=5, Nq=150, H=1)))
    oracle = Oracle(plain_backward, inputs, backward=False)
    first, second = (oracle.evaluate(backward) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    oracle.check(first)


def test_what_is_not_supported_is_refused_with_the_reason() -> None:
    q = torch.empty(2, 5, 1, 160, device=DEVICE)
    table = torch.empty(70000, 1, 1, 8, device=DEVICE)
    assert "head_dim 160 is not supported" in str(kernels.can_merge(q))
    assert "70000 prompt sets are not supported" in str(kernels.can_segment_backward(q, q[..., :8], table))
    assert "float64 is not supported" in str(kernels.can_merge(q[..., :8].double()))


def test_every_call_has_an_entry() -> None:
    for key in TABLE:
        for prompts in (1, 16, 50, 64, 65, 300):
            config = choose(key.architecture, key.kernel, key.head_dim, prompts, key.itemsize)
            tile = prompt_tile(prompts, config)
            assert 16 <= tile <= config.block_p
            assert tile == config.block_p or tile >= prompts
