"""VPT on every served family against the concatenating implementation, and what each exact shortcut leaves out."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from prompted_models import FAMILIES, outputs_and_gradients, prompted
from timm.layers import DropPath
from timm_families import CLASSES, DEPTH, PRESENT, PROMPTABLE, images, small
from torch import Tensor, nn

import fastprompt
from bench.correctness import assert_same
from bench.papers import paper_model, trace
from fastprompt import VPTConfig, backbone, blocks
from fastprompt.config import Pool
from fastprompt.ops import dispatch

PLACES = {"deep": {}, "shallow": {"deep": False}, "partial": {"blocks": 2}}


def pools_of(base: nn.Module) -> list[str]:
    return [p for p in get_args(Pool) if backbone.pool_reason(base, p) is None]


def assert_right(model: Any) -> None:
    """Compare logits and gradients with concatenation, and the other ways to the logits with each other."""
    x = images()
    mine = outputs_and_gradients(model, x, None)
    assert_same(mine, outputs_and_gradients(paper_model(model), x, None))
    with torch.no_grad():
        for logits in (model.forward_head(model.forward_features(x)), model.fold()(x)):
            assert_same(logits, mine["logits"])


@pytest.mark.parametrize("place", ["deep", "shallow"])
@pytest.mark.parametrize("family", PROMPTABLE)
def test_numbers_equal_concatenation_on_every_family(family: str, place: str) -> None:
    assert_right(prompted(family, VPTConfig(3, **PLACES[place])))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", [*FAMILIES, "eva-no-rope"])
def test_numbers_equal_concatenation_for_every_pool(family: str, place: str) -> None:
    for pool in pools_of(small(family)):
        assert_right(prompted(family, VPTConfig(3, pool=pool, **PLACES[place]), depth=3))


@pytest.mark.parametrize("family", PROMPTABLE)
def test_no_prompts_leave_the_backbone_as_it_is(family: str) -> None:
    base, x = small(family), images()
    expected = base(x)
    for config in (VPTConfig(0), VPTConfig(0, deep=False)):
        assert_same(fastprompt.get_prompt_model(base, config).eval()(x), expected)


def test_shared_prompts_collect_the_gradients_of_all_blocks() -> None:
    model = prompted("vit", VPTConfig(3, shared_across_blocks=True))
    assert len(model.prompts) == 1
    assert_right(model)


def test_projected_prompts_equal_concatenation_of_their_projections() -> None:
    model = prompted("vit", VPTConfig(3, project=10))
    assert [tuple(p.shape) for p in model.prompts] == [(3, 10)] * DEPTH
    assert_right(model)


@pytest.mark.parametrize("family", ["vit", "deit-distilled", "rope-dinov3", "vit-avg-fc-norm"])
@pytest.mark.parametrize("place", PLACES)
def test_intermediates_are_the_concatenating_models_without_prompts(family: str, place: str) -> None:
    model = prompted(family, VPTConfig(3, **PLACES[place]))
    x, prefix = images(), model.base.num_prefix_tokens
    expected = trace(model, x).tokens
    final, rows = model.forward_intermediates(x, output_fmt="NLC")
    assert_same(rows, [s[:, prefix:] for s in expected])
    assert_same(final, model.base.norm(expected[-1]))
    (maps,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True, norm=True)
    expected_map = model.base.norm(expected[0])[:, prefix:].mT.reshape(2, -1, 4, 4)
    assert_same(maps, expected_map)
    pairs = model.forward_intermediates(
        x, 1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    assert_same(pairs[0][1], expected[-1][:, :prefix])
    with pytest.raises(ValueError, match="NHWC"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_intermediates_have_timms_shapes_and_order() -> None:
    model, x = prompted("vit-registers", VPTConfig(0)), images()
    assert_same(model.forward_intermediates(x, indices=2), model.base.forward_intermediates(x, indices=2))


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    for place in PLACES.values():
        model = prompted("vit", VPTConfig(3, **place))
        plain = outputs_and_gradients(model, images(), None)
        model.base.set_grad_checkpointing(True)
        assert_same(outputs_and_gradients(model, images(), None), plain)


def test_drop_path_of_frozen_blocks_is_active_only_on_request() -> None:
    options = {"depth": 4, "drop_path_rate": 0.5}
    still = prompted("vit", VPTConfig(3), **options).train()
    assert not any(m.training for m in still.base.modules() if isinstance(m, DropPath))
    assert_same(still(images()), still(images()))
    moving = prompted("vit", VPTConfig(3, backbone_train_mode=True), **options).train()
    torch.manual_seed(0)
    mine = moving(images(8))
    paper = paper_model(moving).train()
    torch.manual_seed(0)
    assert_same(mine, paper(images(8)))  # each image drops the same branches, in the last block's one row too
    assert not torch.allclose(moving(images(8)), mine)


# What the shortcuts leave out -----------------------------------------------------------------------------------


def linear_rows(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that enter F.linear, which every projection goes through."""
    shapes: list[tuple[int, ...]] = []
    original = F.linear

    def spy(rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(rows.shape))
        return original(rows, *args, **kwargs)

    monkeypatch.setattr(F, "linear", spy)
    monkeypatch.setattr("torch.nn.modules.linear.F.linear", spy)
    model(x)
    monkeypatch.undo()
    return shapes


def test_deep_prompts_are_projected_once_for_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = linear_rows(prompted("vit", VPTConfig(5)), images(7), monkeypatch)
    assert all(s[-2] in (17, 5, 1) for s in shapes if len(s) == 3 or s[0] == 5), shapes
    assert sum(s == (5, 48) for s in shapes) == DEPTH - 1  # the last block's are folded away
    assert not any(s[-2] == 22 for s in shapes if len(s) == 3)


def test_last_block_of_a_class_token_model_runs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = linear_rows(prompted("vit", VPTConfig(5)), images(7), monkeypatch)
    full = [s for s in shapes if s[:2] == (7, 17)]
    one = [s for s in shapes if s[:2] == (7, 1)]
    assert len(full) == 4 * (DEPTH - 1)  # qkv, proj, fc1, fc2
    assert len(one) == 4  # q, proj, fc1, fc2: no keys, no values


def test_q_and_k_norm_keep_the_keys_of_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = linear_rows(prompted("vit-qk-norm", VPTConfig(5)), images(7), monkeypatch)
    assert len([s for s in shapes if s[:2] == (7, 17)]) == 4 * (DEPTH - 1) + 1


def test_mean_then_norm_runs_fc2_of_the_last_block_on_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prompted("vit-avg-fc-norm", VPTConfig(5))
    shapes = linear_rows(model, images(7), monkeypatch)
    hidden = [s for s in shapes if s[-1] == 4 * 48]
    assert hidden == [(7, 16, 192)] * (DEPTH - 1) + [(7, 1, 192)]


def test_block_zero_makes_the_gradients_of_prompts_alone() -> None:
    """Nothing before block 0 trains."""
    model = prompted("vit", VPTConfig(3))
    x, ropes = backbone.embed(model.base, images())
    state = model.prepare(2, model._head_input())
    asked: list[list[bool]] = []
    original = dispatch.run

    def spy(operation: str, backend: str, *args: Any) -> Any:
        if operation == "packed_prompt_attention_backward":
            asked.append(args[-1])
        return original(operation, backend, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "run", spy)
        blocks.run_block(model.base.blocks[0], x, state.prompts[0], blocks.Context())[0].sum().backward()
    assert asked == [[False, True, True, False]]


def test_frozen_weights_get_no_gradient() -> None:
    model = prompted("vit", VPTConfig(3)).train()
    model(images()).sum().backward()
    heads = {id(p) for p in model.base.head.parameters()}
    for p in model.base.parameters():
        assert (p.grad is not None) == (id(p) in heads)
    assert all(p.grad is not None for p in model.prompts)


def test_nan_prompts_reach_the_logits() -> None:
    for config in (VPTConfig(3), VPTConfig(3, deep=False)):
        model = prompted("vit", config)
        with torch.no_grad():
            model.prompts[-1][0, 0] = float("nan")
        assert model(images()).isnan().all()


def test_empty_batch_gives_empty_logits() -> None:
    for family in ("vit", "vit-avg-fc-norm", "rope-mixed"):
        for config in (VPTConfig(3), VPTConfig(3, deep=False)):
            assert prompted(family, config)(images(2)[:0]).shape == (0, CLASSES)


def test_every_family_of_the_table_was_tried() -> None:
    for name in set(PRESENT) - set(PROMPTABLE):
        with pytest.raises(NotImplementedError, match="NaFlexVit"):
            fastprompt.get_prompt_model(small(name), VPTConfig(3))
