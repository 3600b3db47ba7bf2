"""Under autocast frozen weights are cast once: the same bits, no cast in later steps, and no copy that outlives."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from prompted_models import CONFIGS, FAMILIES, outputs_and_gradients, prompted
from timm_families import images, vit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastprompt
from bench import measure
from fastprompt import DAVPTConfig, VPTConfig, frozen, replace

LOW = torch.bfloat16
OTHER_FAMILIES = [*FAMILIES[1:], "vit-glu", "eva02-fused-glu", "eva-separate-bias-qk-norm"]


class Casts(TorchDispatchMode):
    """Collects the names of the parameters that are cast to another dtype, in whole or in part."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            name = self.names.get(args[0].untyped_storage()._cdata)
            if name is not None and args[0].dtype != (kwargs or {}).get("dtype", args[0].dtype):
                self.found.append(name)
        return func(*args, **(kwargs or {}))


def step(model: Any, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.autocast("cpu", LOW):
        return outputs_and_gradients(model, x, None)


def frozen_casts(model: Any, run: Callable[[], object]) -> list[str]:
    frozen_names = {name for name, p in model.named_parameters() if not p.requires_grad}
    with Casts(model) as casts:
        run()
    return [name for name in casts.found if name in frozen_names]


def half(family: str, config: Any, **kwargs: Any) -> Any:
    return prompted(family, config, **kwargs).float().train()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_step_of_each_method_casts_no_frozen_weight(name: str) -> None:
    model, x = half("vit", CONFIGS[name]), images(4, dtype=torch.float32)
    first = frozen_casts(model, lambda: step(model, x))
    assert {"base.patch_embed.proj.weight", "base.blocks.0.mlp.fc1.weight"} <= set(first)
    assert len(first) == len(set(first)), "not even twice in one step"
    assert frozen_casts(model, lambda: step(model, x)) == []


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_a_second_step_of_each_family_casts_no_frozen_weight(family: str) -> None:
    model, x = half(family, VPTConfig(3)), images(2, dtype=torch.float32)
    assert frozen_casts(model, lambda: step(model, x))
    # timm 1.0.26 casts the few numbers of its rotation itself.
    again = [name for name in frozen_casts(model, lambda: step(model, x)) if not name.endswith("rope.freqs")]
    assert again == []


def plain_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let autocast cast everything, at each use."""
    monkeypatch.setattr(frozen, "acts_on", lambda tensor: False)


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("vit", name) for name in CONFIGS), *((family, "vpt-deep") for family in OTHER_FAMILIES)],
)
def test_bits_are_those_of_plain_autocast(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = half(family, CONFIGS[name]), images(4, dtype=torch.float32)
    found = [step(model, x), step(model, x)]
    plain_autocast(monkeypatch)
    expected = step(model, x)
    for result in found:
        assert all(torch.equal(result[key], expected[key]) for key in expected)


def test_replaced_attention_casts_its_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vit().requires_grad_(False), images(2, dtype=torch.float32)
    fastprompt.replace_attention(model, strict=True)

    def infer() -> Tensor:
        with torch.autocast("cpu", LOW):
            return model(x)

    found = infer()
    attention = [n for n in frozen_casts(model, infer) if ".attn." in n]
    assert attention == []
    plain_autocast(monkeypatch)
    assert torch.equal(infer(), found)
    assert any(".attn.qkv.weight" in n for n in frozen_casts(model, infer))


def test_weights_that_train_go_the_normal_way() -> None:
    """DA-VPT+ trains norms and biases; a whole backbone may train too."""
    config = DAVPTConfig(3, 3, (0, 1), tune="prompts+biases")
    x = images(2, dtype=torch.float32)
    for train_all in (False, True):
        model = half("vit", config)
        if train_all:
            model.base.requires_grad_(True)
        step(model, x)
        with torch.autocast("cpu", LOW):
            model(x).float().square().sum().backward()
        qkv = model.base.blocks[0].attn.qkv
        assert qkv.bias.grad is not None
        assert qkv.bias.grad.any()
        assert (qkv.weight.grad is not None) == train_all
        if train_all:
            assert all(p.grad is not None for p in model.base.blocks[0].parameters())


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "in place": lambda m: nn.init.normal_(m.weight),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "new data": lambda m: setattr(m.weight, "data", m.weight.data + 1),
    "new data twice": lambda m: [setattr(m.weight, "data", m.weight.data + 1) for _ in range(2)],
    "transposed": lambda m: setattr(m.weight, "data", m.weight.data.t()),
    "new parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight.data + 1, requires_grad=False)),
    "float64 and back": lambda m: m.double().float(),
    "bias": lambda m: m.bias.add_(1),
}


def autocast_linear(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", LOW):
        return frozen.linear(module, x)


def plain_linear(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", LOW):
        return module(x)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    module, x = nn.Linear(8, 8).requires_grad_(False), torch.randn(3, 8)
    before = autocast_linear(module, x)
    assert torch.equal(before, plain_linear(module, x))
    CHANGES[change](module)
    after = autocast_linear(module, x)
    assert torch.equal(after, plain_linear(module, x))
    assert torch.equal(after, before) == (change == "float64 and back")


def test_other_dtypes_get_no_copy() -> None:
    x = torch.randn(3, 8)
    for dtype in (LOW, torch.float64):
        module = nn.Linear(8, 8, dtype=dtype).requires_grad_(False)
        with torch.autocast("cpu", LOW):
            assert frozen.low(module.weight) is module.weight
    module = nn.Linear(8, 8).requires_grad_(False)
    assert frozen.low(module.weight) is module.weight, "no autocast"
    for dtype in (LOW, torch.float16, LOW):
        with torch.autocast("cpu", dtype):
            assert frozen.linear(module, x).dtype == dtype
            assert torch.equal(frozen.linear(module, x), module(x))


def test_copies_are_freed_with_the_weights_and_travel_nowhere() -> None:
    model, x = half("vit", VPTConfig(3)), images(2, dtype=torch.float32)
    size = len(pickle.dumps(model))
    keys = set(model.state_dict())
    step(model, x)
    assert len(pickle.dumps(model)) == size
    assert set(model.state_dict()) == keys
    gc.collect()
    entries = len(frozen._copies)
    clone = copy.deepcopy(model)
    assert len(frozen._copies) == entries
    step(clone, x)
    assert len(frozen._copies) > entries
    with torch.autocast("cpu", LOW):
        tensor = weakref.ref(frozen.low(clone.base.blocks[0].attn.qkv.weight))
    del clone
    gc.collect()
    assert len(frozen._copies) == entries
    assert tensor() is None


def test_hooks_and_other_layers_are_called() -> None:
    calls: list[str] = []

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            calls.append("subclass")
            return 2 * super().forward(input)

    x = torch.randn(3, 8)
    hooked = nn.Linear(8, 8).requires_grad_(False)
    hooked.register_forward_hook(lambda *_: calls.append("hook"))
    patched = nn.Linear(8, 8).requires_grad_(False)
    patched.forward = lambda x: calls.append("patched") or x  # type: ignore[method-assign, func-returns-value]
    for module in (hooked, Scaled(8, 8).requires_grad_(False), patched):
        autocast_linear(module, x)
    assert calls == ["hook", "subclass", "patched"]
    model: Any = half("vit", VPTConfig(3))
    model.base.blocks[0].mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    model.base.blocks[0].mlp.act.register_forward_hook(lambda *_: calls.append("act"))
    model.base.patch_embed.proj.register_forward_hook(lambda *_: calls.append("embed"))
    step(model, images(2, dtype=torch.float32))
    assert calls[3:] == ["embed", "act", "mlp"]


def test_copies_made_in_inference_mode_serve_training() -> None:
    model, x = half("vit", VPTConfig(3)), images(2, dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", LOW):
        model(x)
    assert frozen_casts(model, lambda: step(model, x)) == []
    with torch.inference_mode():
        weight = torch.randn(4, 4)
        with torch.autocast("cpu", LOW):
            assert frozen.low(weight) is weight, "changes of an inference tensor are not counted"


def test_function_transforms_leave_no_wrapped_copies() -> None:
    module, x = nn.Linear(8, 8).requires_grad_(False), torch.randn(3, 8)
    expected = plain_linear(module, x)
    torch.func.grad(lambda x: autocast_linear(module, x).float().sum())(x)
    torch.vmap(lambda row: autocast_linear(module, row))(x)
    assert torch.equal(autocast_linear(module, x), expected)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(autocast_linear(module, x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compiled_and_traced_models_cast_the_weights_themselves() -> None:
    model, x = half("vit", VPTConfig(3)).eval(), images(2, dtype=torch.float32)
    before = len(frozen._copies)
    torch._dynamo.reset()
    with torch.autocast("cpu", LOW):
        torch.compile(model, fullgraph=True, backend="eager")(x)
        torch.jit.trace(replaced(), (x,), check_trace=False)
    assert len(frozen._copies) == before


def replaced() -> nn.Module:
    model = vit().requires_grad_(False).eval()
    replace.replace_attention(model)
    return model


def test_a_step_keeps_no_casts_for_its_backward() -> None:
    """The copies are kept anyway; what a step adds is activations alone."""
    model, x = half("vit", VPTConfig(3)), images(2, dtype=torch.float32)
    step(model, x)
    copies = [entry.tensor for entry in frozen._copies.values()]

    def forward() -> None:
        with torch.autocast("cpu", LOW):
            model(x)

    constants = (*model.parameters(), *model.buffers(), x)
    own = sum(t.nbytes for t in copies)
    assert (
        measure.saved_bytes(forward, (*constants, *copies))
        < measure.saved_bytes(forward, constants)
        <= (measure.saved_bytes(forward, (*constants, *copies)) + own)
    )
