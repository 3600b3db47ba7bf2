"""Every model that the installed timm registers is supported, or refused with a reason.

The tables below, and that of docs/supported-models.md, say what is expected of each class. A class that they do not
name (a newer timm's) must be refused.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from torch import Tensor, nn

import fastprompt
from fastprompt import refusals, vit
from fastprompt.refusals import class_path
from fastprompt.replace import ReplacementReport

pytestmark = pytest.mark.filterwarnings("ignore")
SHARDS, CHUNK = 8, 24
DOCS = Path(__file__).parent.parent / "docs" / "supported-models.md"

# Model class -> the attention classes in it that are replaced.
REPLACED = {
    "timm.models.vision_transformer.VisionTransformer": {"timm.layers.attention.Attention"},
    "timm.models.deit.VisionTransformerDistilled": {"timm.layers.attention.Attention"},
    "timm.models.eva.Eva": {"timm.models.eva.EvaAttention", "timm.layers.attention.AttentionRope"},
    "timm.models.naflexvit.NaFlexVit": {"timm.layers.attention.Attention"},
}
# Models that take prompts, unless a block of theirs is refused.
PROMPTED = set(REPLACED) - {"timm.models.naflexvit.NaFlexVit"}
# Attention classes that are refused in some models of the table above, though replaced in others.
PARTLY = {"timm.layers.attention.AttentionRope": "grouped-query attention"}
# Attention class -> why it is refused, as documented.
REFUSED = dict(re.findall(r"^\| `(timm\.[\w.]+)` \| (.+?) \|$", DOCS.read_text(), flags=re.MULTILINE))

# What users reach for first: name -> (is attention replaced, are prompts supported).
WELL_KNOWN = {
    "vit_base_patch16_224": (True, True),
    "vit_base_patch16_clip_224": (True, True),
    "vit_base_patch16_siglip_224": (True, True),
    "vit_base_patch14_reg4_dinov2": (True, True),
    "vit_base_r50_s16_224": (True, True),
    "vit_srelpos_small_patch16_224": (False, False),
    "aimv2_large_patch14_224": (True, True),
    "deit_base_distilled_patch16_224": (True, True),
    "deit3_base_patch16_224": (True, True),
    "vitamin_base_224": (True, True),
    "eva02_base_patch14_224": (True, True),
    "eva_giant_patch14_224": (True, True),
    "vit_pe_core_base_patch16_224": (True, True),
    "vit_base_patch16_rope_mixed_224": (True, True),
    "vit_base_patch16_dinov3": (True, True),
    "naflexvit_base_patch16_siglip": (True, False),
    "beit_base_patch16_224": (False, False),
    "swin_base_patch4_window7_224": (False, False),
    "resnet50": (False, False),
}


def _no_parameters(self: nn.Module) -> None:
    """Stands for a layer's `reset_parameters`."""


@contextmanager
def skeletons() -> Iterator[None]:
    """Inside, timm builds models without weights: `torch.empty` gives meta tensors, initialising does nothing.

    The same models as under ``torch.device("meta")``, three times as fast: index tables are made by real kernels.
    """
    # torch keeps the set of constructors that a device context covers from its first use on: it must see the
    # real `torch.empty`, not the one below, or every later `with torch.device(...)` of the process is without effect.
    with torch.device("meta"):
        empty = torch.empty
        empty(0)

    def meta_empty(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return empty(*args, device="meta", **kwargs)

    def untouched(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    in_place = ("uniform_", "normal_", "zero_", "fill_", "mul_", "div_", "add_", "clamp_", "erfinv_", "copy_")
    fillers = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "empty", meta_empty))
        for owner, names in ((Tensor, in_place), (nn.init, fillers)):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, untouched))
        for layer in (nn.Linear, nn.modules.conv._ConvNd):
            stack.enter_context(mock.patch.object(layer, "reset_parameters", _no_parameters))
        yield


def build(name: str) -> nn.Module:
    """A model of the registry; inside `skeletons`, one without weights."""
    try:
        return timm.create_model(name)
    except RuntimeError:  # a constructor that runs a part of the model (vit_*_r50)
        with torch.device("meta"):
            return timm.create_model(name)


def check(name: str, model: nn.Module) -> ReplacementReport:
    """Replace attention, then add prompts, and compare both with the tables."""
    cls = class_path(model)
    report = fastprompt.replace_attention(model)
    assert (report.reason is None) == bool(report.replaced)
    assert report.reason is None or len(report.reason) > 20
    for row in report.replaced:
        assert row.cls in REPLACED.get(cls, ()), f"{name}: {row} is replaced, which the table does not know"
    for row in report.skipped:
        assert row.reason, f"{name}: {row} is skipped without a reason"
        assert re.match(r"timm\.[\w.]+: .{10,}", row.reason), f"{name}: {row.reason!r} is not 'class: reason'"
        if row.cls in REFUSED:
            assert "not one of" not in row.reason, f"{name}: {row.cls} is known, but refused as unknown"
        elif row.cls in REPLACED.get(cls, ()):
            assert PARTLY.get(row.cls, "no reason") in row.reason, f"{name}: {row.reason}"
    _check_complete(name, model, report)
    _check_prompts(name, model, report)
    return report


def _check_complete(name: str, model: nn.Module, report: ReplacementReport) -> None:
    """No module of a known class is left out of the report."""
    replaced = {row.name for row in report.replaced}
    skipped = {row.name for row in report.skipped}
    for path, module in model.named_modules():
        if isinstance(module, tuple(vit.ATTENTION)):
            parents = {path[:i] for i in (0, *(m.start() for m in re.finditer(r"\.", path)), len(path))}
            assert path in replaced or parents & skipped, f"{name}: {path} is not in the report"
        elif class_path(module) in REFUSED and not any(
            path != row and path.startswith(f"{row}.") for row in skipped
        ):
            assert path in skipped, f"{name}: {path} ({class_path(module)}) is not in the report"


def _check_prompts(name: str, model: nn.Module, report: ReplacementReport) -> None:
    cls = class_path(model)
    flags = [p.requires_grad for p in model.parameters()]
    config = fastprompt.VPTConfig(num_prompts=2)
    if cls in PROMPTED and not report.skipped:
        prompted = fastprompt.get_prompt_model(model, config)
        assert len(prompted.prompts) == len(model.blocks), name  # type: ignore[arg-type]
        return
    with pytest.raises(NotImplementedError, match=r"timm\.[\w.]+: .{10,}") as error:
        fastprompt.get_prompt_model(model, config)
    if any(row.cls in REFUSED for row in report.skipped):
        assert "not one of" not in str(error.value), f"{name}: known, but refused as unknown"
    assert [p.requires_grad for p in model.parameters()] == flags, f"{name}: refused, yet changed"


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_timm_model_is_supported_or_refused_with_a_reason(shard: int) -> None:
    names = timm.list_models()[shard::SHARDS]
    assert len(names) > 100
    gc.disable()  # a million small objects: each full collection would walk them all
    try:
        for start in range(0, len(names), CHUNK):
            with skeletons():
                models = [(name, build(name)) for name in names[start : start + CHUNK]]
            for name, model in models:
                check(name, model)
            del models, model
            gc.collect()
    finally:
        gc.enable()


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_well_known_models_are_supported_as_documented(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with skeletons():
        model = build(name)
    replaced, prompted = WELL_KNOWN[name]
    assert bool(fastprompt.replace_attention(model).replaced) is replaced
    config = fastprompt.VPTConfig(num_prompts=2)
    if prompted:
        fastprompt.get_prompt_model(model, config)
    else:
        with pytest.raises(NotImplementedError, match=r"timm\.models\."):
            fastprompt.get_prompt_model(model, config)


def test_skeletons_equal_models_built_on_the_meta_device() -> None:
    with skeletons():
        skeleton = build("test_vit")
    with torch.device("meta"):
        meta = timm.create_model("test_vit")
    assert [(n, type(m)) for n, m in skeleton.named_modules()] == [
        (n, type(m)) for n, m in meta.named_modules()
    ]
    assert [(n, p.shape) for n, p in skeleton.named_parameters()] == [
        (n, p.shape) for n, p in meta.named_parameters()
    ]
    assert torch.empty(1).device.type == "cpu"


def test_device_contexts_work_after_skeletons_used_one() -> None:
    constructors = torch.utils._device._device_constructors  # type: ignore[attr-defined]
    constructors.cache_clear()
    with skeletons(), torch.device("meta"):
        torch.ones(1)
    with torch.device("meta"):
        assert torch.empty(1).is_meta


def test_documentation_lists_every_refused_class_with_the_code_s_reason() -> None:
    assert refusals.ATTENTION_REASONS == REFUSED
