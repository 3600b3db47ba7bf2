"""PromptModel as a user meets it: what trains, modes, devices and dtypes, folding, compiling, and refusals."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm_families import CLASSES, DEPTH, images, small, vit
from torch import nn

import fastprompt
from bench.correctness import assert_as_exact, assert_same
from bench.papers import paper_model
from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, PromptOutput, VPTConfig


def build(config: PromptConfig | None = None, **kwargs: Any) -> Any:
    return fastprompt.get_prompt_model(vit(**kwargs).to(torch.float64), config or VPTConfig(3))


def test_calling_without_labels_returns_logits_and_with_labels_an_output() -> None:
    model = build()
    logits = model(images(3))
    assert logits.shape == (3, CLASSES)
    output = model(images(3), labels=torch.zeros(3, dtype=torch.long))
    assert isinstance(output, PromptOutput)
    assert torch.equal(output.logits, logits)
    assert output.method_loss.shape == ()
    assert output.method_loss == 0


def test_only_prompts_and_head_train(capsys: pytest.CaptureFixture[str]) -> None:
    model = build(VPTConfig(3))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"prompts.0", "prompts.1", "base.head.weight", "base.head.bias"}
    assert sum(p.numel() for p in model.trainable_parameters()) == DEPTH * 3 * 48 + 48 * CLASSES + CLASSES
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 533 || all params: ")


def test_a_training_step_moves_what_trains_and_nothing_else() -> None:
    model = build().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.1)
    output = model(images(4), labels=torch.arange(4))
    (F.cross_entropy(output.logits, torch.arange(4)) + output.method_loss).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_train_keeps_the_frozen_backbone_in_eval_mode() -> None:
    model = build(drop_rate=0.5).train()
    assert model.training
    assert model.base.head.training
    assert model.base.head_drop.training
    assert not any(block.training for block in model.base.blocks)
    assert not model.eval().base.head_drop.training
    assert build(VPTConfig(3, backbone_train_mode=True)).train().base.blocks[0].training


def test_new_model_takes_over_the_mode_of_the_timm_model() -> None:
    assert fastprompt.get_prompt_model(vit().train(), VPTConfig(1)).training
    assert not fastprompt.get_prompt_model(vit().eval(), VPTConfig(1)).training


def test_weights_are_shared_with_the_timm_model() -> None:
    base = small("vit")
    weight = base.blocks[0].attn.qkv.weight
    assert fastprompt.get_prompt_model(base, VPTConfig(3)).base.blocks[0].attn.qkv.weight is weight


@pytest.mark.parametrize("config", [VPTConfig(3), VPTConfig(3, deep=False)], ids=["deep", "shallow"])
def test_copies_and_pickles_compute_the_same(config: VPTConfig) -> None:
    model = build(config).eval()
    expected = model(images())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(images()), expected)
        with torch.no_grad():
            clone.prompts[0].add_(1)
        assert torch.equal(model(images()), expected)


def test_works_after_replace_attention_and_the_other_way_round() -> None:
    plain, base = build().eval(), small("vit")
    assert len(fastprompt.replace_attention(base).replaced) == DEPTH
    model = fastprompt.get_prompt_model(base, VPTConfig(3)).eval()
    model.load_state_dict(plain.state_dict())
    assert_same(model(images()), plain(images()))
    assert fastprompt.restore_attention(model) == DEPTH
    assert_same(model(images()), plain(images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_runs_in_other_dtypes_and_follows_to(dtype: torch.dtype) -> None:
    model = build().eval().to(dtype)
    assert model.prompts[0].dtype == dtype
    x, paper = images(dtype=dtype), paper_model(model)
    with torch.no_grad():
        assert_as_exact(model(x), paper(x), paper.double()(x.double()))


def test_float32_prompts_train_on_a_bfloat16_backbone() -> None:
    """Prompts take the backbone's dtype when made; a user may keep them in float32 for the optimizer."""
    for config in (VPTConfig(3), VPTConfig(3, deep=False)):
        model = fastprompt.get_prompt_model(vit().bfloat16(), config)
        model.prompts.float()
        model(images(dtype=torch.bfloat16)).float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.prompts)


@pytest.mark.parametrize("family", ["vit", "vit-avg-fc-norm", "rope-axial", "vit-qk-norm"])
@pytest.mark.parametrize("config", [VPTConfig(3), VPTConfig(3, deep=False)], ids=["deep", "shallow"])
def test_autocast_runs_and_keeps_gradients_in_float32(family: str, config: VPTConfig) -> None:
    model: Any = fastprompt.get_prompt_model(small(family, torch.float32), config)
    x, paper = images(dtype=torch.float32), paper_model(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, plain = model(x), paper(x)
    assert_as_exact(logits, plain, paper.double()(x.double()))
    logits.sum().backward()
    assert model.prompts[0].grad.dtype == torch.float32
    assert model.prompts[0].grad.isfinite().all()


def test_folded_model_is_for_inference_and_says_so() -> None:
    model = build().eval()
    folded = model.fold()
    assert not folded(images()).requires_grad
    assert {name for name, _ in folded.named_buffers()} >= {"constant_1", "constant_2"}
    with pytest.raises(RuntimeError, match="for inference"):
        folded.train()
    assert folded.eval() is folded
    with torch.no_grad():
        model.prompts[0].normal_()
    assert not torch.allclose(folded(images()), model(images())), "constants are as they were"
    assert_same(model.fold()(images()), model(images()))
    assert folded.to(torch.float32)(images(dtype=torch.float32)).dtype == torch.float32


def test_folding_leaves_prompts_out_of_each_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = build().fold()
    monkeypatch.setattr(
        "fastprompt.blocks.prepare_prompts", lambda *a, **k: pytest.fail("prompts are constants")
    )
    folded(images())


# tests/methods/test_all_methods.py compiles every method on a class-token model.
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("vit-avg-fc-norm", VPTConfig(3)),
        pytest.param("vit-avg-fc-norm", VPTConfig(3, deep=False), marks=pytest.mark.slow),
        pytest.param("rope-mixed", VPTConfig(3), marks=pytest.mark.slow),
        pytest.param("rope-mixed", VPTConfig(3, deep=False), marks=pytest.mark.slow),
    ],
)
def test_compiles_as_one_graph_with_gradients(family: str, config: VPTConfig) -> None:
    torch._dynamo.reset()
    model = fastprompt.get_prompt_model(small(family), config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(images())
    logits = compiled(images())
    assert_same(logits, expected)
    assert_same(
        torch.autograd.grad(logits.sum(), list(model.prompts)),
        torch.autograd.grad(expected.sum(), list(model.prompts)),
    )


EXPORTED: dict[str, tuple[str, PromptConfig]] = {
    "vpt": ("vit", VPTConfig(3)),
    "vpt-shallow-rope": ("rope-axial", VPTConfig(3, deep=False)),
    "gate-vpt": ("vit", GateVPTConfig(3)),
    "cvpt-folded": ("vit", CVPTConfig(3)),
    "cvpt-direct": ("vit-avg-fc-norm", CVPTConfig(30, insert=4)),
    "da-vpt-masked": ("vit", DAVPTConfig(3, 4, (1, 1), mask_prompts=True, pool="all")),
}


def export(case: str) -> tuple[Any, torch.export.ExportedProgram]:
    """Return the folded model of a case, and its program for any number of images."""
    family, config = EXPORTED[case]
    folded = fastprompt.get_prompt_model(small(family), config).fold()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    return folded, torch.export.export(folded, (images(2),), dynamic_shapes=(batch,))


@pytest.mark.parametrize("case", EXPORTED)
def test_exported_programs_are_plain_pytorch(case: str) -> None:
    folded, program = export(case)
    for images_ in (images(1), images(5)):
        assert_same(program.module()(images_), folded(images_))
    operators = {
        node.target
        for graph in program.graph_module.modules()
        if hasattr(graph, "graph")
        for node in graph.graph.nodes
        if node.op == "call_function"
    }
    assert operators
    # Sizes that depend on the batch are computed by Python's own operators.
    assert {getattr(target, "namespace", target.__module__) for target in operators} <= {"aten", "_operator"}


WITHOUT_FASTPROMPT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastprompt", "timm"):
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Blocked())
import torch
for path in sys.argv[1:]:
    x, logits = torch.load(path + ".expected")
    torch.testing.assert_close(torch.export.load(path).module()(x), logits, rtol=0, atol=0)
try:
    import fastprompt
except ImportError:
    print("all ran without fastprompt")
"""


@pytest.mark.slow
def test_exported_programs_run_where_fastprompt_is_not_installed(tmp_path: Path) -> None:
    paths = []
    for case in EXPORTED:
        _, program = export(case)
        paths.append(str(tmp_path / f"{case}.pt2"))
        torch.export.save(program, paths[-1])
        torch.save((images(3), program.module()(images(3))), paths[-1] + ".expected")
    command = [sys.executable, "-c", WITHOUT_FASTPROMPT, *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == "all ran without fastprompt\n", done.stderr


@pytest.mark.parametrize("config", [GateVPTConfig(3), CVPTConfig(3), DAVPTConfig(3, 4, (1, 1))])
def test_folded_models_can_be_copied_pickled_and_moved(config: PromptConfig) -> None:
    folded = build(config).eval().fold()
    logits = folded(images())
    for clone in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(clone(images()), logits)
        assert clone.state_dict().keys() == folded.state_dict().keys()
    assert folded.to(torch.float32)(images(dtype=torch.float32)).dtype == torch.float32


# Inputs that the model cannot take ------------------------------------------------------------------------------

BAD_IMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    "no tensor": ([1.0], TypeError, "`images` must be a tensor [B, C, h, w]; got list"),
    "one image": (torch.zeros(3, 32, 32), ValueError, "got (3, 32, 32); add the batch dimension"),
    "bytes": (
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        TypeError,
        "must be floating point; got torch.uint8",
    ),
    "other dtype": (
        torch.zeros(2, 3, 32, 32),
        TypeError,
        "`images` are torch.float32 and the model torch.float64; convert them by `images.to(torch.float64)`",
    ),
    "other device": (
        torch.zeros(2, 3, 32, 32, device="meta", dtype=torch.float64),
        ValueError,
        "`images` are on meta and the model on cpu; move them by `images.to('cpu')`",
    ),
    "channels last": (
        torch.zeros(2, 32, 32, 3, dtype=torch.float64),
        ValueError,
        "must have 3 channels, [B, C, h, w]; got (2, 32, 32, 3)",
    ),
    "other size": (
        torch.zeros(2, 3, 32, 40, dtype=torch.float64),
        ValueError,
        "must be 32x32 pixels; got 32x40; resize them, or build the timm model with img_size=(32, 40)",
    ),
}


@pytest.mark.parametrize(("x", "error", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_wrong_images_are_refused_by_name(x: Any, error: type[Exception], message: str) -> None:
    model = build()
    calls = {
        "PromptModel": model,
        "FoldedPromptModel": model.fold(),
        "forward_features": model.forward_features,
        "forward_intermediates": model.forward_intermediates,
    }
    for caller, call in calls.items():
        with pytest.raises(error, match=re.escape(f"`{caller}`: ") + ".*" + re.escape(message)):
            call(x)


def test_models_for_any_image_size_take_multiples_of_the_patch() -> None:
    dynamic = build(dynamic_img_size=True)
    assert dynamic(torch.randn(2, 3, 40, 24, dtype=torch.float64)).shape == (2, CLASSES)
    with pytest.raises(
        ValueError, match=re.escape("must be multiples of 8 and 8, the patch size; got 40x20")
    ):
        dynamic(torch.randn(2, 3, 40, 20, dtype=torch.float64))
    padding = build(dynamic_img_size=True, dynamic_img_pad=True)
    assert padding(torch.randn(2, 3, 40, 20, dtype=torch.float64)).shape == (2, CLASSES)


BAD_LABELS: dict[str, tuple[Any, type[Exception], str]] = {
    "no tensor": ([0, 1], TypeError, "`labels` must be a tensor [B]; got list"),
    "other batch": (torch.zeros(3, dtype=torch.long), ValueError, "must be [B] = (2,); got (3,)"),
    "one-hot": (torch.zeros(2, CLASSES), ValueError, "must be [B] = (2,); got (2, 5)"),
    "floats": (torch.zeros(2), TypeError, "must be int64 or int32; got torch.float32"),
    "bytes": (torch.zeros(2, dtype=torch.uint8), TypeError, "must be int64 or int32; got torch.uint8"),
    "other device": (
        torch.zeros(2, dtype=torch.long, device="meta"),
        ValueError,
        "on meta and `images` on cpu",
    ),
    "too large": (torch.tensor([0, CLASSES]), ValueError, "must be in 0..4, the model's classes; got 5"),
    "negative": (torch.tensor([0, -1]), ValueError, "must be in 0..4, the model's classes; got -1"),
}


@pytest.mark.parametrize("config", [VPTConfig(3), DAVPTConfig(3, 4, (1, 1))], ids=["vpt", "da-vpt"])
@pytest.mark.parametrize(("labels", "error", "message"), BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_wrong_labels_are_refused_by_name(
    labels: Any, error: type[Exception], message: str, config: PromptConfig
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build(config)(images(2), labels=labels)


def test_tokens_and_block_indices_are_checked() -> None:
    model = build()
    with pytest.raises(ValueError, match=re.escape("`x` must be [B, N, D=48]; got (2, 48)")):
        model.forward_head(torch.zeros(2, 48, dtype=torch.float64))
    for indices in (0, 3, [], [2], ["a"]):
        with pytest.raises(ValueError, match="`forward_intermediates`: `indices` must"):
            model.forward_intermediates(images(), indices=indices)


# Refusals: before anything is changed ---------------------------------------------------------------------------


class Subclass(timm.models.vision_transformer.VisionTransformer):
    pass


def flags(model: nn.Module) -> list[bool]:
    return [p.requires_grad for p in model.parameters()]


def test_unsupported_models_are_refused_unchanged() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224")
    before = flags(swin)
    with pytest.raises(NotImplementedError, match="SwinTransformer: attention within windows of a pyramid"):
        fastprompt.get_prompt_model(swin, VPTConfig(3))
    assert flags(swin) == before
    with pytest.raises(NotImplementedError, match="Subclass: a subclass"):
        fastprompt.get_prompt_model(Subclass(depth=1, embed_dim=48, num_heads=3), VPTConfig(3))
    with pytest.raises(TypeError, match="got str"):
        fastprompt.get_prompt_model("vit_base_patch16_224", VPTConfig(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="already has prompts"):
        fastprompt.get_prompt_model(build(), VPTConfig(3))
    with pytest.raises(TypeError, match="VPTConfig; got dict"):
        fastprompt.get_prompt_model(vit(), {"num_prompts": 3})  # type: ignore[arg-type]


def test_one_odd_block_is_refused_with_its_place() -> None:
    base: Any = vit()
    base.blocks[1].attn.qkv = nn.Sequential(base.blocks[1].attn.qkv)
    with pytest.raises(NotImplementedError, match=r"blocks\.1: .*Sequential is not a plain"):
        fastprompt.get_prompt_model(base, VPTConfig(3))
    assert all(flags(base))


@pytest.mark.parametrize(
    ("family", "reason"),
    [("deit-distilled", "distilled head"), ("vit-map", "pools by attention")],
)
def test_pools_that_the_head_cannot_read_are_refused(family: str, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=f"pool='image' is not supported.*{reason}"):
        fastprompt.get_prompt_model(small(family), VPTConfig(3, pool="image"))


def test_active_attention_dropout_is_refused_rather_than_dropped() -> None:
    with pytest.raises(NotImplementedError, match=r"attention dropout 0\.1 would be active"):
        build(VPTConfig(3, backbone_train_mode=True), attn_drop_rate=0.1)
    model = build(attn_drop_rate=0.1).train()
    model(images())  # the frozen backbone is in eval mode
    model.base.blocks[0].train()
    with pytest.raises(NotImplementedError, match="attention dropout"):
        model(images())


def test_head_that_reads_every_token_gets_every_token() -> None:
    model = build(global_pool="").eval()
    assert model(images()).shape == (2, 17, CLASSES)
    with pytest.raises(NotImplementedError, match="every token"):
        build(VPTConfig(3, pool="all"), global_pool="")


def test_model_without_a_head_returns_pooled_features() -> None:
    model = build(num_classes=0)
    assert model(images()).shape == (2, 48)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompts.0", "prompts.1"]
