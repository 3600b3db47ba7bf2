"""`fastprompt.viz`: its numbers equal plain implementations, and its figures show them."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from prompted_models import CONFIGS, prompted
from timm_families import CLASSES, HEADS, PROMPTABLE, images, small
from torch import Tensor

import fastprompt
from bench.correctness import assert_as_exact, assert_same
from bench.papers import trace
from fastprompt import DAVPTConfig, GateVPTConfig, VPTConfig, viz
from fastprompt.methods.proxy_loss import proxy_loss

DA = DAVPTConfig(3, 2, (1, 1))


def vit(config: fastprompt.PromptConfig, depth: int = 3, **kwargs: Any) -> Any:
    return fastprompt.get_prompt_model(small("vit", depth=depth, **kwargs), config).eval()


def loader(count: int = 40, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Two batches; class 4 has no image."""
    labels = torch.arange(count) % (CLASSES - 1)
    x = images(count, dtype=dtype) + labels[:, None, None, None]
    return list(zip(x.split(count // 2), labels.split(count // 2), strict=True))


def fitted(config: DAVPTConfig = DA, **kwargs: Any) -> Any:
    model = vit(config, **kwargs)
    model.fit_class_map(loader())
    return model


def drawn(figure: Any) -> list[Tensor]:
    """Return the arrays of all images in a figure, without colour bars."""
    assert isinstance(figure, Figure)
    return [torch.as_tensor(i.get_array().filled(np.nan)) for axis in figure.axes for i in axis.images]


def plotted(numbers: Any) -> Tensor:
    return torch.as_tensor(np.asarray(numbers, dtype=float))


class TestAttention:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_weights_are_those_of_eager_concatenation(self, name: str) -> None:
        model = prompted("vit-registers", CONFIGS[name], depth=3)
        expected = trace(model, images()).weights
        for block in range(3):
            weights = viz.attention_to_prompts(model, images(), block)
            assert weights.shape == (2, HEADS, 5 + 16, 3)
            assert_same(weights, expected[block])
        assert_same(viz.attention_to_prompts(model, images(), -1), expected[2])

    @pytest.mark.parametrize("family", PROMPTABLE)
    @pytest.mark.parametrize("name", ["vpt-deep", "vpt-shallow"])
    def test_every_family(self, family: str, name: str) -> None:
        model = prompted(family, CONFIGS[name])
        for block, expected in enumerate(trace(model, images()).weights):
            assert_same(viz.attention_to_prompts(model, images(), block), expected)

    def test_cross_attention_sums_to_one_and_shared_attention_to_less(self) -> None:
        cross = viz.attention_to_prompts(prompted("vit", CONFIGS["cvpt-3"]), images(), 0).sum(-1)
        shared = viz.attention_to_prompts(prompted("vit", CONFIGS["vpt-deep"]), images(), 0).sum(-1)
        assert_same(cross, torch.ones_like(cross))
        assert (shared < 1).all()

    def test_prompts_that_average_into_the_head_change_nothing(self) -> None:
        one, other = vit(VPTConfig(3)), vit(VPTConfig(3, pool="prompt"))
        other.load_state_dict(one.state_dict())
        for block in range(3):
            assert_same(
                viz.attention_to_prompts(other, images(), block),
                viz.attention_to_prompts(one, images(), block),
            )

    def test_the_model_is_left_as_it_was(self) -> None:
        model = vit(VPTConfig(3, dropout=0.5)).train()
        model.base.norm.train()
        modes = [module.training for module in model.modules()]
        first, second = (viz.attention_to_prompts(model, images(), 1) for _ in range(2))
        assert torch.equal(first, second), "no dropout"
        assert not first.requires_grad
        assert [module.training for module in model.modules()] == modes
        assert True in modes
        assert False in modes

    def test_half_precision_gives_float32(self) -> None:
        model, twin, x = vit(VPTConfig(3)).bfloat16(), vit(VPTConfig(3)), images(dtype=torch.bfloat16)
        twin.load_state_dict(model.state_dict())
        weights = viz.attention_to_prompts(model, x, 0)
        plain = trace(model, x).weights[0].to(torch.float32)
        assert_as_exact(weights, plain, viz.attention_to_prompts(twin, x.double(), 0))

    def test_mask_of_da_vpt_keeps_prompts_from_looking_not_from_being_seen(self) -> None:
        free, masked = (vit(DAVPTConfig(3, 2, (1, 1), pool="all", mask_prompts=m)) for m in (False, True))
        masked.load_state_dict(free.state_dict())
        assert_same(
            viz.attention_to_prompts(masked, images(), -1), viz.attention_to_prompts(free, images(), -1)
        )

    def test_blocks_after_it_do_not_run(self) -> None:
        model = vit(VPTConfig(3))
        expected = viz.attention_to_prompts(model, images(), 1)
        with torch.no_grad():
            model.base.blocks[1].mlp.fc2.weight.fill_(torch.nan)
        assert torch.equal(viz.attention_to_prompts(model, images(), 1), expected)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((images(), 3), ValueError, "`block` must be in -3..2, the model's blocks; got 3"),
            ((images(), 1.0), TypeError, "`block` must be an integer; got 1.0"),
            (
                (images()[0], 0),
                ValueError,
                "`attention_to_prompts`: `images` must be [B, C, h, w]; got (3, 32, 32)",
            ),
        ],
    )
    def test_mistakes_are_named(self, arguments: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=re.escape(message)):
            viz.attention_to_prompts(vit(VPTConfig(3)), *arguments)

    def test_models_without_prompts_are_refused(self) -> None:
        model = vit(VPTConfig(3))
        for other in (model.base, model.fold()):
            with pytest.raises(TypeError, match="`model` must be a PromptModel"):
                viz.attention_to_prompts(other, images(), 0)
        with pytest.raises(ValueError, match="has no prompts"):
            viz.attention_to_prompts(vit(VPTConfig(0)), images(), 0)


class TestNumbers:
    def test_gates_and_temperatures(self) -> None:
        model = vit(GateVPTConfig(2, gate_init=1.5, temperature_range=(0.5, 2.0)))
        with torch.no_grad():
            model.temperature.copy_(torch.tensor([0.25, 1.0, 7.0]))
        gates, temperatures = viz.gate_values(model)
        assert_same(gates, torch.full((2,), 1 / (1 + np.exp(1.5)), dtype=torch.float64))
        assert temperatures is not None
        assert temperatures.tolist() == [0.5, 1.0, 2.0], "as the next forward clamps them"
        assert model.temperature.tolist() == [0.25, 1.0, 7.0], "and as they were"
        assert viz.gate_values(vit(GateVPTConfig(2, temperature=False))).temperatures is None
        fixed = viz.gate_values(vit(GateVPTConfig(2, temperature=20.0))).temperatures
        assert fixed is not None
        assert fixed.tolist() == [20.0] * 3, "a fixed temperature is not clamped"

    def test_similarities_are_cosines(self) -> None:
        model = vit(VPTConfig(4))
        a, _, b = (p.detach() for p in model.prompts)
        expected = torch.stack([torch.stack([x @ y / (x @ x * (y @ y)).sqrt() for y in b]) for x in a])
        assert_same(viz.prompt_similarity(model, 0, -1), expected)
        own, across = viz.prompt_similarity(model, 0), viz.block_similarity(model)
        assert_same(own.diagonal(), torch.ones_like(own[0]))
        assert across.shape == (3, 3)
        assert_same(across[0, 2], expected.abs().mean())
        assert_same(across[0, 0], (own.abs().sum() - own.trace()) / 12)

    def test_similarities_are_of_prompts_as_they_enter_the_model(self) -> None:
        model = prompted("vit", CONFIGS["vpt-project"])
        mapped = F.normalize(model.prompt_project(model.prompts[1]), dim=-1)
        assert_same(viz.prompt_similarity(model, 1), (mapped @ mapped.mT).detach())

    def test_blocks_without_prompts_of_their_own_are_named(self) -> None:
        model = vit(VPTConfig(3, blocks=2))
        assert viz.block_similarity(model).shape == (2, 2)
        with pytest.raises(ValueError, match=re.escape("choose one of 0..1")):
            viz.prompt_similarity(model, 2)

    def test_proxies_need_not_be_as_many_as_prompts(self) -> None:
        model = vit(DA)
        assert viz.prompt_similarity(model, 0, 1).shape == (3, 2)
        assert viz.attention_to_prompts(model, images(), 1).shape[-1] == 2

    @pytest.mark.parametrize("norm", ["layer", "l2", "none"])
    def test_a_fitted_map_takes_each_class_to_its_nearest_centroid(self, norm: Any) -> None:
        model = vit(DAVPTConfig(3, 2, (1, 1), feature_norm=norm))
        model.fit_class_map(loader())
        model.train()
        with torch.no_grad():
            for x, labels in loader():
                model(x, labels=labels)
        model.eval().update_class_map()
        distances = viz.class_distances(model, loader())
        assert distances.shape == (CLASSES, 2)
        assert distances[-1].isnan().all(), "no image"
        assert torch.equal(distances[:-1].argmin(1), model.class_to_prompt[:-1])
        x, labels = (torch.cat(parts) for parts in zip(*loader(), strict=True))
        features = model.forward_head(model.forward_features(x), pre_logits=True).detach()
        mean = features[labels == 1].mean(0)
        if norm == "layer":
            mean = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
        centroid = model.class_centroids[0]
        assert_same(distances[1, 0], 1 - (mean @ centroid) / (mean.norm() * centroid.norm()))

    def test_centroids(self) -> None:
        model = fitted()
        distances = viz.centroid_distances(model)
        a, b = model.class_centroids
        assert_same(distances[0, 1], 1 - (a @ b) / (a.norm() * b.norm()))
        assert_same(distances, distances.mT)
        with pytest.raises(ValueError, match="no centroids yet"):
            viz.centroid_distances(vit(DA))

    @pytest.mark.parametrize(("feature", "weights"), [("class", (0.0, 1.0)), ("patch", (1.0, 0.0))])
    def test_proxy_distances_are_what_the_metric_loss_compares(
        self, feature: Any, weights: tuple[float, float]
    ) -> None:
        patch, class_ = weights
        config = DAVPTConfig(3, 2, (1, 1), patch_weight=patch, class_weight=class_, proxy_for_patch="key")
        model = vit(config)
        x, labels = images(4), torch.arange(4)
        distances = viz.proxy_distances(model, [(x, labels)], 1, feature)  # one image of each class
        assert distances[-1].isnan().all()
        loss = proxy_loss(
            config.proxy_scale * (1 - distances[:-1]),
            model.class_to_prompt[labels],
            criterion="proxy_anchor",
            alpha=config.alpha,
            delta=config.delta,
        )
        assert_same(loss, model(x, labels=labels).method_loss.detach())

    def test_proxy_distances_are_means_over_images(self) -> None:
        model, ((x, labels), *_) = vit(DA), loader(8)
        one = viz.proxy_distances(model, [(x[:1], labels[:1])], 1)
        doubled = torch.cat([x[:1], x[:1]]), labels[:2].mul(0)
        assert_same(viz.proxy_distances(model, [doubled], 1)[0], one[0])

    def test_tokens_are_those_that_enter_the_block(self) -> None:
        for name in ("vpt-deep", "vpt-shallow"):
            model = prompted("vit", CONFIGS[name], depth=3)
            prompts, tokens, labels = viz.prompts_and_tokens(model, loader(8), 2)
            x = torch.cat([batch for batch, _ in loader(8)])
            assert_same(tokens, trace(model, x).tokens[1][:, 0])
            assert labels.tolist() == [0, 1, 2, 3] * 2
            if name == "vpt-deep":
                assert torch.equal(prompts, model.prompts[2])
            else:
                assert prompts.shape == (3, 48)
                assert not torch.isclose(prompts, model.prompts[0]).any(), "two blocks have changed them"

    def test_models_without_a_class_token_give_the_mean_of_their_patches(self) -> None:
        model = prompted("vit-avg-fc-norm", CONFIGS["vpt-deep"])
        tokens = viz.prompts_and_tokens(model, loader(8), 1).tokens
        x = torch.cat([batch for batch, _ in loader(8)])
        assert_same(tokens, trace(model, x).tokens[0].mean(1))
        assert viz.prompts_and_tokens(model, loader(8), 0).tokens.std(0).min() > 0

    def test_class_tokens_of_block_0_are_all_alike_and_refused(self) -> None:
        with pytest.raises(ValueError, match=re.escape("choose one of 1..2")):
            viz.prompts_and_tokens(vit(VPTConfig(3)), loader(), 0)

    def test_tsne_keeps_apart_what_is_apart(self) -> None:
        model = vit(VPTConfig(4))
        with torch.no_grad():
            model.prompts[1].copy_(50 + torch.randn(4, 48))  # a cluster of their own, far away
        prompts, tokens, labels = viz.tsne(model, loader(), 1, perplexity=3)
        assert (prompts.shape, tokens.shape, labels.shape) == ((4, 2), (40, 2), (40,))
        inner = torch.cdist(prompts, prompts).max()
        assert torch.cdist(prompts, tokens).min() > inner
        again = viz.tsne(model, loader(), 1, perplexity=3)
        assert torch.equal(again.tokens, tokens), "decided by the seed"
        with pytest.raises(ValueError, match="the number of points, 44; got 44"):
            viz.tsne(model, loader(), 1, perplexity=44)


NOT_DA = "does not map classes to prompts; only DA-VPT does"
OTHER_METHODS = {
    "gate_values": (viz.gate_values, (), "VPT has no gates; only GateVPT has"),
    "plot_gates": (viz.plot_gates, (), "VPT has no gates; only GateVPT has"),
    "centroid_distances": (viz.centroid_distances, (), NOT_DA),
    "class_distances": (viz.class_distances, (loader(),), NOT_DA),
    "proxy_distances": (viz.proxy_distances, (loader(), 1), NOT_DA),
    "plot_class_map": (viz.plot_class_map, (), NOT_DA),
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_a_method_that_has_no_such_thing_is_named(name: str) -> None:
    function, arguments, message = OTHER_METHODS[name]
    with pytest.raises(NotImplementedError, match=message):
        function(vit(VPTConfig(3)), *arguments)  # type: ignore[operator]
    with pytest.raises(TypeError, match="make one with `get_prompt_model`"):
        function(small("vit"), *arguments)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: viz.proxy_distances(m, loader(), 0), "`block` must be in guided_blocks=(1, 1); got 0"),
        (lambda m: viz.proxy_distances(m, loader(), 1, "query"), "`feature` must be 'class' or 'patch'"),
        (lambda m: viz.class_distances(m, []), "`class_distances`: `loader` is empty"),
        (lambda m: viz.prompts_and_tokens(m, [], 1), "`prompts_and_tokens`: `loader` is empty"),
        (
            lambda m: viz.tsne(m, [(images(), torch.ones(3).long())], 1),
            "`prompts_and_tokens`: `labels` must be [B]",
        ),
        (
            lambda m: viz.plot_class_map(m, block=1),
            "block=1 needs images to compute distances; pass `loader`",
        ),
        (lambda m: viz.plot_attention(m, images(), head=3), "`head` must be in 0..2"),
        (lambda m: viz.plot_attention(m, images(), prompt=[0, 2]), "`prompt` must be in 0..1"),
        (lambda m: viz.plot_attention(m, images(), prompt=[]), "`prompt` must be in 0..1"),
    ],
)
def test_values_out_of_range_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(fitted(depth=2))


def test_no_class_token_no_class_distance() -> None:
    base = small("vit-avg-fc-norm", depth=2)
    model = fastprompt.get_prompt_model(base, DAVPTConfig(3, 2, (1, 1), class_weight=0))
    with pytest.raises(ValueError, match="pass feature='patch'"):
        viz.proxy_distances(model, loader(), 1)
    assert viz.proxy_distances(model, loader(), 1, "patch").shape == (CLASSES, 2)


class TestFigures:
    def test_gates(self) -> None:
        model = vit(GateVPTConfig(2))
        gates, temperatures = viz.gate_values(model)
        left, right = viz.plot_gates(model).axes
        assert_same(plotted([bar.get_height() for bar in left.patches]), gates)
        assert_same(plotted(right.lines[0].get_ydata()), temperatures)
        assert len(viz.plot_gates(vit(GateVPTConfig(2, temperature=False))).axes) == 1

    def test_attention_maps_lie_over_the_image_in_its_own_layout(self) -> None:
        model, x = prompted("vit-registers", CONFIGS["vpt-deep"]), images()
        weights = viz.attention_to_prompts(model, x, 1)[0, :, 5:].mean(0)  # [patches, prompts]
        picture, again, first, below, second = drawn(viz.plot_attention(model, x, block=1, prompt=[2, 0]))[:5]
        grey = x[0].permute(1, 2, 0).float()
        assert torch.equal(picture, (grey - grey.min()) / (grey.max() - grey.min()))
        assert torch.equal(again, picture)
        assert torch.equal(below, picture)
        assert_same([first, second], [weights[:, j].unflatten(0, (4, 4)) for j in (2, 0)])

    def test_attention_of_one_head_and_one_prompt(self) -> None:
        model = prompted("vit", CONFIGS["cvpt-3"])
        weights = viz.attention_to_prompts(model, images(1), -1)
        *_, found = drawn(viz.plot_attention(model, images(1), prompt=1, head=2))
        assert_same(found.flatten(), weights[0, 2, 1:, 1])

    def test_the_prompts_shown_are_those_attended_to_most(self) -> None:
        model = vit(VPTConfig(7))
        weights = viz.attention_to_prompts(model, images(), -1)[:, :, 1:].mean((0, 1, 2))
        figure = viz.plot_attention(model, images())
        titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
        assert titles == [f"prompt {j}" for j in sorted(weights.topk(4).indices.tolist())]

    def test_class_map(self) -> None:
        model = fitted(depth=2)
        for options, expected in (
            ({"loader": loader()}, viz.class_distances(model, loader())),
            ({"loader": loader(), "block": 1}, viz.proxy_distances(model, loader(), 1)),
        ):
            (found,) = drawn(viz.plot_class_map(model, **options))
            assert found[-1].isnan().all(), "class 4 has no image"
            assert_same(found[:-1], expected[:-1])
        (axis,) = viz.plot_class_map(model).axes
        assert axis.lines[0].get_xdata().tolist() == model.class_to_prompt.tolist()
        assert list(axis.lines[0].get_ydata()) == list(range(CLASSES))

    def test_prompt_similarity(self) -> None:
        model = vit(VPTConfig(3))
        found = drawn(viz.plot_prompt_similarity(model, 1))
        assert_same(found, [viz.prompt_similarity(model, 1), viz.block_similarity(model)])
        assert len(drawn(viz.plot_prompt_similarity(vit(VPTConfig(3, deep=False))))) == 1

    def test_tsne(self) -> None:
        model = vit(VPTConfig(3))
        prompts, tokens, labels = viz.tsne(model, loader(), 1)
        of_tokens, of_prompts = viz.plot_tsne(model, loader(), 1).axes[0].collections
        assert torch.equal(plotted(of_tokens.get_offsets()), tokens.double())
        assert torch.equal(plotted(of_tokens.get_array()), labels.double())
        assert torch.equal(plotted(of_prompts.get_offsets()), prompts.double())

    def test_half_precision_models_are_drawn_too(self, tmp_path: Any) -> None:
        model = vit(GateVPTConfig(3)).bfloat16()
        x = images(dtype=torch.bfloat16)
        figures = [
            viz.plot_gates(model),
            viz.plot_attention(model, x),
            viz.plot_prompt_similarity(model),
            viz.plot_tsne(model, loader(dtype=torch.bfloat16), 1),
        ]
        for i, figure in enumerate(figures):
            path = tmp_path / f"{i}.png"
            figure.savefig(path)
            assert path.stat().st_size > 1000


@pytest.mark.slow
def test_matplotlib_and_scikit_learn_are_imported_only_to_draw() -> None:
    code = """
import sys, torch, fastprompt
print(*(n in sys.modules for n in ("matplotlib", "sklearn", "fastprompt.viz")))
from fastprompt import viz
from timm.models.vision_transformer import VisionTransformer
vit = VisionTransformer(img_size=8, patch_size=2, embed_dim=8, depth=1, num_heads=1, num_classes=2)
model = fastprompt.get_prompt_model(vit, fastprompt.VPTConfig(2))
viz.prompt_similarity(model, 0), viz.attention_to_prompts(model, torch.randn(1, 3, 8, 8), 0)
print(*(n in sys.modules for n in ("matplotlib", "sklearn")))
viz.plot_attention(model, torch.randn(1, 3, 8, 8))
print(*(n in sys.modules for n in ("matplotlib.figure", "matplotlib.pyplot", "sklearn")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False False False", "False False", "True False False"]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        viz.tsne(vit(VPTConfig(3)), loader(), 1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        viz.plot_prompt_similarity(vit(VPTConfig(3)))
