"""On a CPU `replace_attention` runs the operators that timm runs, forward and backward: it cannot be slower."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from timm_families import images, small
from torch.utils._python_dispatch import TorchDispatchMode

import fastprompt

# Views cost nothing; which of them stand between two operators may differ.
VIEWS = {
    "view",
    "_unsafe_view",
    "transpose",
    "t",
    "permute",
    "unbind",
    "slice",
    "expand",
    "detach",
    "alias",
    "reshape",
}


class Operators(TorchDispatchMode):
    """Counts the operators that compute, with the shapes of their first inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in VIEWS:
            first = next((a for a in args if isinstance(a, torch.Tensor)), None)
            self.seen[name, 0 if first is None else first.numel()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["vit", "vit-layer-scale", "vit-avg-fc-norm", "deit-distilled"])
def test_no_operator_runs_that_timm_does_not_run(family: str) -> None:
    counts = []
    for replaced in (False, True):
        model = small(family, torch.float32)
        if replaced:
            fastprompt.replace_attention(model, strict=True)
        with Operators() as operators:
            model(images(dtype=torch.float32)).sum().backward()
        counts.append(operators.seen)
    assert not counts[1] - counts[0], "an operator that timm does not run"
    assert any("scaled_dot_product" in name for name, _ in counts[1])
