"""`as_encoder`: maps without prompts, in timm's manner, on shared parameters."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from prompted_models import CONFIGS, prompted
from timm.layers import PatchEmbed
from timm_families import WIDTH, images, small, vit
from torch import nn

import fastprompt
from bench.correctness import assert_same
from bench.papers import trace
from fastprompt import VPTConfig, as_encoder
from fastprompt.encoder import PromptEncoder


def plain(depth: int = 3, **kwargs: Any) -> Any:
    return fastprompt.get_prompt_model(small("vit", depth=depth, **kwargs), VPTConfig(3)).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_maps_are_the_patches_of_the_concatenating_model(name: str) -> None:
    model = prompted("vit-registers", CONFIGS[name], depth=3)
    encoder = as_encoder(model, [0, 2])
    maps = encoder(images())
    states = trace(model, images()).tokens
    assert [m.shape for m in maps] == [(2, WIDTH, 4, 4)] * 2
    prefix = model.base.num_prefix_tokens
    assert prefix == 5
    for found, state in zip(maps, (states[0], states[2]), strict=True):
        for row in range(4):
            for column in range(4):
                assert_same(found[:, :, row, column], state[:, prefix + 4 * row + column])


@pytest.mark.parametrize("family", ["eva02-fused-glu", "rope-mixed", "deit-distilled", "vit-avg-fc-norm"])
def test_other_families_give_maps_too(family: str) -> None:
    model = prompted(family, CONFIGS["vpt-deep"])
    (found,) = as_encoder(model, 1)(images())
    state = trace(model, images()).tokens[-1][:, model.base.num_prefix_tokens :]
    assert_same(found.flatten(2).mT, state)


def test_norm_is_the_models_final_one() -> None:
    model = plain()
    (raw,), (normed,) = as_encoder(model, [1])(images()), as_encoder(model, [1], norm=True)(images())
    assert_same(normed.flatten(2).mT, model.base.norm(raw.flatten(2).mT))


@pytest.mark.parametrize(
    ("asked", "blocks"), [(1, [2]), (3, [0, 1, 2]), ([-3, -1], [0, 2]), ((1,), [1]), (range(2), [0, 1])]
)
def test_indices_are_timms_and_feature_info_tells_them(asked: Any, blocks: list[int]) -> None:
    encoder = as_encoder(plain(), asked)
    assert encoder.indices == blocks
    assert encoder.feature_info.channels() == [WIDTH] * len(blocks)
    assert encoder.feature_info.reduction() == [8] * len(blocks)
    assert encoder.feature_info.module_name() == [f"blocks.{i}" for i in blocks]
    assert len(encoder(images())) == len(blocks)


def test_maps_follow_the_images_size() -> None:
    model = plain(dynamic_img_size=True)
    maps = as_encoder(model, [0])(torch.randn(1, 3, 40, 24, dtype=torch.float64))
    assert maps[0].shape == (1, WIDTH, 5, 3)


def test_training_the_encoder_trains_the_prompts_and_nothing_frozen() -> None:
    model = plain()
    encoder = as_encoder(model, [0, 1])
    ours = {id(p) for p in model.parameters()}
    assert {id(p) for p in encoder.parameters()} == ours
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    sum(m.square().mean() for m in encoder(images())).backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"prompts.0", "prompts.1"}, "block 2 lies after the last map"


def test_blocks_after_the_last_map_do_not_run() -> None:
    model = plain()
    with torch.no_grad():
        model.base.blocks[2].mlp.fc2.weight.fill_(torch.nan)
    assert as_encoder(model, [0, 1])(images())[1].isfinite().all()
    assert as_encoder(model, [2])(images())[0].isnan().any()


def test_modes_are_the_prompt_models() -> None:
    model = plain()
    encoder = as_encoder(model, [0])
    assert not encoder.training
    encoder.train()
    assert model.training
    assert not model.base.blocks[0].training, "the frozen backbone stays in eval mode"


def test_it_is_a_part_of_a_larger_module() -> None:
    model = plain()
    whole = nn.ModuleDict({"encoder": as_encoder(model, [0]), "head": nn.Conv2d(WIDTH, 2, 1)})
    names = {name for name in whole.state_dict() if name.startswith("encoder.")}
    assert names == {f"encoder.model.{name}" for name in model.state_dict()}


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (0, ValueError, "the last 1 to 3 blocks; got 0; for block 0 alone pass [0]"),
        (4, ValueError, "the last 1 to 3 blocks; got 4"),
        ([], ValueError, "must contain at least one block"),
        ([0, 3], ValueError, "must be in -3..2, the model has 3 blocks; got [3]"),
        ([2, 0], ValueError, "are blocks [2, 0]; pass [0, 2]"),
        ([0, -3], ValueError, "are blocks [0, 0]; pass [0]"),
        (True, TypeError, "must be an int or a list of ints; got True"),
        ("12", TypeError, "must be an int or a list of ints; got '12'"),
        ([0.0], TypeError, "must be an int or a list of ints"),
        (None, TypeError, "must be an int or a list of ints; got None"),
    ],
)
def test_bad_indices_are_refused_by_name(indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        as_encoder(plain(), indices)


def test_other_models_are_refused() -> None:
    model = plain()
    for other in (model.base, model.fold()):
        with pytest.raises(TypeError, match="`model` must be a PromptModel; got"):
            as_encoder(other, 1)


def test_tokens_that_are_no_grid_are_refused() -> None:
    class Gridless(PatchEmbed):
        dynamic_feat_size = None  # type: ignore[assignment]

    model = fastprompt.get_prompt_model(vit(embed_layer=Gridless), VPTConfig(3))
    with pytest.raises(NotImplementedError, match="Gridless has no `dynamic_feat_size`"):
        as_encoder(model, 1)

    dropping = vit(patch_drop_rate=0.5)
    model = fastprompt.get_prompt_model(dropping, VPTConfig(3, backbone_train_mode=True))
    with pytest.raises(NotImplementedError, match=re.escape("patch_drop_rate=0.5")):
        as_encoder(model, 1)
    # In a backbone that stays in eval mode no patch is ever dropped.
    kept = as_encoder(fastprompt.get_prompt_model(dropping, VPTConfig(3)).train(), 1)
    assert isinstance(kept, PromptEncoder)
    assert kept(images(dtype=torch.float32))[0].shape == (2, WIDTH, 4, 4)
