"""`replace_attention` keeps timm's numbers, through everything that people do to a model, and can be undone."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from timm_families import DEPTH, PRESENT, by_hand, gradients, images, small
from torch import Tensor, nn

from bench.correctness import assert_as_exact, assert_same
from fastprompt import replace, restore_attention
from fastprompt import vit as adapters
from fastprompt.ops.attention_choice import use_way
from fastprompt.replace import FastAttention, replace_attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Grows by the shape of the queries at each call of the operation: a test that claims the path must reach it."""
    calls: list[tuple[int, ...]] = []
    run, run_packed = adapters.prompt_attention, adapters.packed_prompt_attention

    def spy(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(q.shape))
        return run(q, *args, **kwargs)

    def spy_packed(qkv: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(qkv[:, :, 0].shape))
        return run_packed(qkv, *args, **kwargs)

    monkeypatch.setattr(adapters, "prompt_attention", spy)
    monkeypatch.setattr(adapters, "packed_prompt_attention", spy_packed)
    return calls


class Recorder:
    """A compiler backend that runs the graph as it is, and keeps the names of its operators."""

    def __init__(self) -> None:
        self.targets: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.targets += [str(node.target) for node in graph.graph.nodes]
        return graph.forward

    @property
    def kernels(self) -> int:
        return sum("prompt_attention" in target for target in self.targets)


# --- the same numbers, family by family


@pytest.mark.parametrize("name", PRESENT)
def test_output_is_timms_own_before_and_after(name: str, kernel_calls: list[tuple[int, ...]]) -> None:
    model = small(name)
    x = images()
    expected = by_hand(model)(x)
    classes = [type(m) for m in model.modules()]

    report = replace_attention(model, strict=True)
    assert (len(report.replaced), report.skipped, report.reason) == (DEPTH, [], None)
    assert_same(model(x), expected)
    assert len(kernel_calls) == DEPTH
    replace_attention(model, backend="eager")  # the operator itself, also where `auto` has no kernel for it
    assert_same(model(x), expected)
    assert len(kernel_calls) == 2 * DEPTH
    assert report.fallback_calls() == {}

    assert restore_attention(model) == DEPTH
    assert_same(model(x), expected)
    assert len(kernel_calls) == 2 * DEPTH
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("name", PRESENT)
def test_gradients_in_training_are_timms_own(name: str, kernel_calls: list[tuple[int, ...]]) -> None:
    model = small(name).train()
    reference = by_hand(model)
    expected = gradients(reference, reference)
    replace_attention(model, backend="eager")
    assert_same(gradients(model, model), expected)
    assert len(kernel_calls) == DEPTH


# One for each way to make queries, keys and values: packed or separate maps, biases apart, q/k norm, rotary embedding.
COMPILED = ("vit-registers", "vit-qk-norm", "eva-no-rope", "eva02-unfused-swiglu", "rope-dinov3")


@pytest.mark.parametrize(
    "name", [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in PRESENT]
)
def test_compiled_training_step_is_timms_own(name: str) -> None:
    model = small(name, depth=1).train()
    reference = by_hand(model)
    expected = gradients(reference, reference)
    replace_attention(model, backend="eager")
    assert_same(gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager")), expected)


@pytest.mark.slow
def test_inductor_gives_timms_numbers() -> None:
    model = small("vit", depth=1)
    expected = by_hand(model)(images())
    replace_attention(model, backend="eager")
    with torch.no_grad():
        assert_same(torch.compile(model, fullgraph=True)(images()), expected)


@pytest.mark.parametrize("name", ["vit-qk-norm", "eva02-unfused-swiglu", "rope-dinov3"])
def test_drop_path_and_patch_dropout_draw_what_timm_draws(name: str) -> None:
    model = small(name, drop_path_rate=0.5, patch_drop_rate=0.25, proj_drop_rate=0.1).train()
    reference = by_hand(model)
    torch.manual_seed(3)
    expected = gradients(reference, reference)
    report = replace_attention(model, backend="eager")
    torch.manual_seed(3)
    assert_same(gradients(model, model), expected)
    assert report.fallback_calls() == {}


# --- precision


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["vit-qk-norm", "rope-dinov3"])
def test_other_dtypes_are_as_exact_as_timm(name: str, dtype: torch.dtype, when: str) -> None:
    truth = small(name)(images())
    theirs = small(name).to(dtype)
    ours = small(name)
    if when == "before":
        replace_attention(ours)
        ours.to(dtype)
    else:
        ours.to(dtype)
        replace_attention(ours)
    x = images(dtype=dtype)
    assert_as_exact(ours(x), theirs(x), truth)


@pytest.mark.parametrize("name", ["vit", "vit-qk-norm", "eva02-unfused-swiglu", "rope-dinov3"])
def test_autocast_is_as_exact_as_timm(name: str) -> None:
    truth = small(name)(images())
    model = small(name, dtype=torch.float32)
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        own = model(x)
        replace_attention(model)
        assert_as_exact(model(x), own, truth)


# --- life cycle


def test_state_dict_and_parameters_are_the_same_objects() -> None:
    model = small("eva02-fused-glu")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    replace_attention(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert all(b is buffers[n] for n, b in model.named_buffers())
    other = small("eva02-fused-glu", seed=5)
    model.load_state_dict(other.state_dict())
    assert_same(model(images()), other(images()))


def test_hooks_survive() -> None:
    model = small("vit")
    seen: list[str] = []
    attn = model.blocks[0].attn
    attn.register_forward_pre_hook(lambda *_: seen.append("before"))
    attn.register_forward_hook(lambda *_: seen.append("after"))
    attn.register_full_backward_hook(lambda *_: seen.append("backward"))
    replace_attention(model)
    model(images()).sum().backward()
    assert seen == ["before", "after", "backward"]
    restore_attention(model)
    model(images()).sum().backward()
    assert seen == ["before", "after", "backward"] * 2


def test_a_deep_copy_is_independent() -> None:
    model = small("vit")
    expected = model(images())
    report = replace_attention(model)
    twin = copy.deepcopy(model)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    twin.blocks[0].attn(torch.randn(1, 4, 48, dtype=torch.float64), attn_mask=mask)
    assert report.fallback_calls() == {}
    assert restore_attention(twin) == DEPTH
    assert type(model.blocks[0].attn) is FastAttention
    with torch.no_grad():
        twin.blocks[0].attn.proj.weight.zero_()
    assert_same(model(images()), expected)


@pytest.mark.parametrize("name", ["vit-gated", "eva02-unfused-swiglu", "rope-mixed", "naflex"])
def test_pickling_keeps_the_replacement(name: str) -> None:
    if name not in PRESENT:
        pytest.skip("not in this timm")
    model = small(name)
    expected = model(images())
    replace_attention(model, backend="eager")
    pickled = pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (pickled, torch.load(file, weights_only=False)):
        assert_same(other(images()), expected)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert restore_attention(other) == DEPTH


def test_replacing_a_compiled_model_takes_effect() -> None:
    model = small("vit", depth=1)
    recorder = Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    # This way is an operator in the graph; by default attention without prompts is PyTorch's own there.
    with torch.no_grad(), use_way("split"):
        expected = compiled(images())
        assert recorder.kernels == 0
        report = replace_attention(compiled, backend="eager")
        assert len(report.replaced) == 1
        assert_same(compiled(images()), expected)
        assert recorder.kernels == 1
        recorder.targets.clear()
        assert restore_attention(compiled) == 1
        assert_same(compiled(images()), expected)
        assert recorder.kernels == 0


def test_compiled_model_does_not_recompile() -> None:
    model = small("vit", depth=1)
    replace_attention(model, backend="eager")
    recorder = Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    with torch.no_grad(), use_way("split"):
        for seed in range(3):
            compiled(images(seed=seed))
    assert recorder.kernels == 1


@pytest.mark.parametrize("name", ["vit-layer-scale", "eva02-unfused-swiglu", "rope-mixed", "naflex"])
def test_gradient_checkpointing(name: str, kernel_calls: list[tuple[int, ...]]) -> None:
    model = small(name).train()
    expected = gradients(model, model)
    replace_attention(model)
    model.set_grad_checkpointing(True)
    assert_same(gradients(model, model), expected)
    assert len(kernel_calls) == 2 * DEPTH  # forward, and again in the backward


def test_inside_wrapping_modules(kernel_calls: list[tuple[int, ...]]) -> None:
    model = small("vit")
    expected = model(images())
    wrapped = nn.Sequential(nn.DataParallel(model))
    report = replace_attention(wrapped)
    assert [r.name for r in report.replaced] == [f"0.module.blocks.{i}.attn" for i in range(DEPTH)]
    assert_same(wrapped(images()), expected)
    assert len(kernel_calls) == DEPTH


def test_replacing_twice_is_harmless_and_can_switch_the_backend() -> None:
    model = small("vit")
    expected = model(images())
    first = replace_attention(model)
    second = replace_attention(model, backend="eager", strict=True)
    assert [r.name for r in second.replaced] == [r.name for r in first.replaced]
    assert getattr(model.blocks[0].attn, replace._BACKEND) == "eager"
    assert_same(model(images()), expected)
    assert restore_attention(model) == DEPTH
    assert restore_attention(model) == 0
    assert type(model.blocks[0].attn) is Attention
    assert not [k for k in vars(model.blocks[0].attn) if "fastprompt" in k]


def test_restore_of_a_model_that_was_never_replaced() -> None:
    assert restore_attention(small("vit")) == 0
    assert restore_attention(nn.Linear(2, 2)) == 0


# --- what timm itself runs


@pytest.mark.parametrize("cls", [Attention, AttentionRope, EvaAttention])
def test_forward_takes_what_timms_takes(cls: type[nn.Module]) -> None:
    theirs = inspect.signature(cls.forward).parameters
    ours = inspect.signature(replace._FAST[cls].forward).parameters
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def attention(cls: type[nn.Module], **kwargs: Any) -> Any:
    torch.manual_seed(4)
    options = {"scale_norm": True, "norm_layer": LayerNorm, "qkv_bias": True, **kwargs}
    return cls(48, 3, **options).double()


@pytest.mark.parametrize("cls", [Attention, AttentionRope, EvaAttention])
@pytest.mark.parametrize(
    ("reason", "options"),
    [
        pytest.param(
            "an attention mask", {"attn_mask": torch.tensor([True, True, False, True])}, id="bool-mask"
        ),
        pytest.param("an attention mask", {"attn_mask": torch.arange(4.0).double()}, id="additive-mask"),
        pytest.param("causal attention", {"is_causal": True}, id="causal"),
    ],
)
def test_masks_run_timms_own_forward_and_are_counted(
    cls: type[nn.Module], reason: str, options: dict[str, Any]
) -> None:
    attn = attention(cls)
    x = torch.randn(2, 4, 48, dtype=torch.float64)
    options = {k: v.expand(2, 1, 4, 4) if isinstance(v, Tensor) else v for k, v in options.items()}
    expected = attn(x, **options)
    with pytest.raises(AssertionError):
        assert_same(expected, attn(x))
    report = replace_attention(attn)
    for _ in range(2):
        assert_same(attn(x, **options), expected)
    compiled = torch.compile(attn, fullgraph=True, backend="eager")
    assert_same(compiled(x, **options), expected)
    assert report.fallback_calls() == {reason: 2}
    attn(x)
    assert report.fallback_calls() == {reason: 2}
    assert f"calls of timm's own forward: {reason} (2)" in str(report)


@pytest.mark.parametrize("cls", [AttentionRope, EvaAttention])
def test_rope_and_mask_together(cls: type[nn.Module]) -> None:
    attn = attention(cls)
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    rope = torch.randn(4, 32, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True]).expand(2, 1, 5, 5)
    expected = attn(x, rope=rope), attn(x, rope=rope, attn_mask=mask)
    replace_attention(attn)
    assert_same(attn(x, rope=rope), expected[0])
    assert_same(attn(x, rope, mask), expected[1])


@pytest.mark.parametrize("cls", [Attention, AttentionRope, EvaAttention])
def test_active_attention_dropout_runs_timms_own_forward(cls: type[nn.Module]) -> None:
    attn = attention(cls, attn_drop=0.5).train()
    x = torch.randn(2, 4, 48, dtype=torch.float64)
    torch.manual_seed(0)
    expected = attn(x)
    report = replace_attention(attn)
    torch.manual_seed(0)
    assert_same(attn(x), expected)
    assert report.fallback_calls() == {"active attention dropout": 1}
    attn.eval()(x)
    assert report.fallback_calls() == {"active attention dropout": 1}


def test_naflex_batch_with_padding_runs_timms_own_forward() -> None:
    model = small("naflex")
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    coordinates = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"), -1).view(
        1, 6, 2
    )
    batch = {
        "patches": torch.randn(2, 6, 8 * 8 * 3, dtype=torch.float64),
        "patch_coord": coordinates.expand(2, 6, 2),
        "patch_valid": valid,
    }
    expected = model(batch)
    report = replace_attention(model)
    assert_same(model(batch), expected)
    assert report.fallback_calls() == {"an attention mask": DEPTH}
