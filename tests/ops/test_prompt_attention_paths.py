"""prompt_attention by kernels: few cases, which take every path."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from attention_cases import PATHS, Path, concatenated, draw
from numerics import backends_of
from torch import Tensor

from bench.correctness import Oracle, evaluate
from fastprompt.ops import packed_prompt_attention, prompt_attention

OPERATION = "prompt_attention"
WITHOUT = ("eager",)  # runs the grids
# A packed q, k and v trains as a whole.
PACKED = (
    "all keys held, no prompts",
    "all keys held, a table",
    "64 + 16 wide, a tail",
    "prompts",
    "temperature",
    "q, k and v",
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
by_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def trained(path: Path) -> set[str] | None:
    return None if path.trainable is None else set(path.trainable.split())


def inputs_of(path: Path, device: str = "cpu") -> dict[str, Tensor | None]:
    return draw(path.shape, path.dtype, device, path.temperature)


@by_path
def test_output_and_gradients(backend: str, device: str, path: Path) -> None:
    Oracle(concatenated, inputs_of(path, device), trainable=trained(path))(prompt_attention)


@pytest.mark.parametrize("path", [PATHS[name] for name in PACKED], ids=PACKED)
def test_output_and_gradients_of_packed(backend: str, device: str, path: Path) -> None:
    inputs = inputs_of(path, device)
    q, k, v = (inputs.pop(name) for name in "qkv")
    n = min(x.shape[1] for x in (q, k))  # as many queries as keys
    inputs["qkv"] = torch.stack([x[:, :n] for x in (q, k, v)], 2)
    names = trained(path)
    trainable = names and {"qkv" if name in "qkv" else name for name in names}

    def plain(qkv: Tensor, **rest: Tensor) -> Tensor:
        return concatenated(*qkv.unbind(2), **rest)

    Oracle(plain, inputs, trainable=trainable)(packed_prompt_attention)


@pytest.mark.skipif("triton" not in backends_of(OPERATION), reason="Triton runs nothing here")
def test_every_kernel_is_reached_with_each_of_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastprompt.kernels.triton import launch
    from fastprompt.kernels.triton import prompt_attention as launchers

    if not launch.INTERPRETED:
        pytest.skip("a GPU has other tiles; it runs the grids")
    seen: dict[str, dict[str, set[Any]]] = defaultdict(lambda: defaultdict(set))

    def record(kernel: Any, grid: Any, device: Any, **arguments: Any) -> None:
        for name, value in arguments.items():
            if name.isupper():
                seen[kernel.fn.__name__][name].add(value)

    monkeypatch.setattr(launch, "launch", record)
    for path in PATHS.values():
        inputs = inputs_of(path)
        evaluate(lambda **i: prompt_attention(**i, backend="triton"), inputs, inputs["q"], trained(path))
    assert set(seen) == {name for name in vars(launchers) if name.endswith("_kernel")}
    for kernel, flags in seen.items():
        flags.pop("AWAIT", None)  # False but on Hopper
        for flag, values in flags.items():
            assert len(values) == 2 or not isinstance(next(iter(values)), bool), (
                f"{kernel}: {flag} is {values}"
            )
