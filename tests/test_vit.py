"""The adapters compute what timm's own modules compute."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, ParallelScalingBlock, ResPostBlock
from timm.models.vitamin import GeGluMlp
from timm_families import PRESENT, accepts, randomise, small
from torch import Tensor, nn

from bench.correctness import assert_same
from fastprompt import vit

pytestmark = pytest.mark.usefixtures("one_thread")
ROPED = [name for name in PRESENT if not name.startswith(("vit", "deit", "naflex"))]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Record the inputs and the output of timm's attention kernel: q, k, v and out as [B, N, H, d]."""
    found: dict[str, Tensor] = {}
    run = F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        out = run(q, k, v, **kwargs)
        found.update({n: t.transpose(1, 2) for n, t in (("q", q), ("k", k), ("v", v), ("out", out))})
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return found


def attention_of(name: str) -> Any:
    return small(name).blocks[0].attn


def tokens(attn: Any, N: int = 9, batch: int = 2) -> Tensor:
    width = attn.proj.out_features
    return torch.randn(batch, N, width, dtype=torch.float64)


def rope_for(attn: Any, N: int) -> Tensor:
    """Random sines and cosines for the rows after the prefix."""
    return torch.randn(N - attn.num_prefix_tokens, 2 * attn.head_dim, dtype=torch.float64)


# --- attention


@pytest.mark.parametrize("name", PRESENT)
def test_queries_keys_and_values_are_what_timms_kernel_is_given(name: str, seen: dict[str, Tensor]) -> None:
    attn = attention_of(name)
    adapter = vit.ATTENTION[type(attn)]
    x = tokens(attn)
    out = attn(x)
    for actual, expected in zip(adapter.qkv(attn, x), (seen["q"], seen["k"], seen["v"]), strict=True):
        assert_same(actual, expected)
    k, v = adapter.keys_values(attn, x)
    assert_same(k, seen["k"])
    assert_same(v, seen["v"])
    assert_same(adapter.queries(attn, x[:, :2]), seen["q"][:, :2])
    assert_same(adapter.finish(attn, seen["out"], x), out)
    assert_same(adapter.finish(attn, seen["out"][:, :1], x[:, :1]), out[:, :1])


@pytest.mark.parametrize("name", PRESENT)
def test_weights_are_the_modules_own_maps(name: str) -> None:
    attn = attention_of(name)
    adapter = vit.ATTENTION[type(attn)]
    weights = adapter.weights(attn)
    assert weights is not None
    x = tokens(attn)
    maps = (
        (weights.q_weight, weights.q_bias),
        (weights.k_weight, weights.k_bias),
        (weights.v_weight, weights.v_bias),
    )
    for (weight, bias), projected in zip(maps, adapter.project(attn, x), strict=True):
        assert_same(F.linear(x, weight, bias), projected.flatten(2))
    assert weights.proj_weight is attn.proj.weight
    assert weights.proj_bias is attn.proj.bias
    storages = {p.untyped_storage().data_ptr() for p in attn.parameters()}
    assert {w.untyped_storage().data_ptr() for w in (weights.q_weight, weights.v_weight)} <= storages


@pytest.mark.parametrize("name", ["vit", "eva-no-rope", "eva-separate-bias-qk-norm", "rope-unfused-no-bias"])
def test_gradients_reach_every_parameter_through_keys_and_values(name: str) -> None:
    attn = attention_of(name)
    x = tokens(attn)
    maps = [n for n, _ in attn.named_parameters() if n.startswith(("qkv", "k_", "v_"))]
    k, v = vit.ATTENTION[type(attn)].keys_values(attn, x)
    (k.sin().sum() + v.cos().sum()).backward()
    found = {n: p.grad for n, p in attn.named_parameters() if n in maps}
    attn.zero_grad()
    _, k, v = vit.ATTENTION[type(attn)].qkv(attn, x)
    (k.sin().sum() + v.cos().sum()).backward()
    for n, p in attn.named_parameters():
        if n in maps:
            assert_same(found[n], p.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRESENT)
def test_key_and_value_maps_are_absorbed_unless_norm_or_rotary_position_acts_on_them(name: str) -> None:
    attn = attention_of(name)
    adapter = vit.ATTENTION[type(attn)]
    assert adapter.can_absorb_kv(attn, rope=False) is (
        "qk-norm" not in name and name != "rope-unfused-head-dim"
    )
    assert not adapter.can_absorb_kv(attn, rope=True)


def test_attention_dropout_is_refused_rather_than_dropped() -> None:
    attn: Any = Attention(48, 3, attn_drop=0.25)
    q, k, v = vit.ATTENTION[Attention].qkv(attn, torch.randn(2, 5, 48))
    with pytest.raises(NotImplementedError, match=r"active attention dropout.*got p = 0\.25; .*eval mode"):
        vit.attend(attn, q, k, v)
    assert vit.attend(attn.eval(), q, k, v).shape == (2, 5, 3, 16)


# --- blocks


@pytest.mark.parametrize("training", [False, True], ids=["eval", "drop-path"])
@pytest.mark.parametrize("name", PRESENT)
def test_block_adapter_runs_the_block(name: str, training: bool) -> None:
    block = small(name, drop_path_rate=0.5).blocks[1].train(training)
    adapter, attention = vit.adapters(block)
    x = tokens(block.attn, batch=8)
    options = {"rope": rope_for(block.attn, 9)} if name in ROPED else {}
    torch.manual_seed(0)
    expected = block(x, **options)
    torch.manual_seed(0)
    h = adapter.attention_input(block, x)
    q, k, v = attention.qkv(block.attn, h, **options)
    y = adapter.add_attention(block, x, attention.finish(block.attn, vit.attend(block.attn, q, k, v), h))
    assert_same(adapter.add_mlp(block, y, block.mlp(adapter.mlp_input(block, y))), expected)


MLPS = {
    "mlp": partial(Mlp, norm_layer=nn.LayerNorm),
    "mlp-plain": Mlp,
    "glu-gate-last": partial(GluMlp, norm_layer=nn.LayerNorm),
    "glu-gate-first": partial(GluMlp, gate_last=False),
    "swiglu-packed": SwiGLUPacked,
    "swiglu": partial(SwiGLU, norm_layer=nn.LayerNorm),
}


@pytest.mark.parametrize("name", MLPS)
def test_mlp_hidden_is_what_enters_the_last_map(name: str) -> None:
    mlp = randomise(MLPS[name](48, hidden_features=64, drop=(0.5, 0.0))).double().train()
    block: Any = Block(48, 3)
    block.mlp = mlp
    assert vit.BLOCKS[Block].mean_commutes(block)
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    torch.manual_seed(0)
    expected = mlp(x)
    torch.manual_seed(0)
    hidden = vit.mlp_hidden(mlp, x)
    assert_same(mlp.fc2(hidden), expected)  # type: ignore[operator]
    assert_same(mlp.fc2(hidden.mean(1)), expected.mean(1))  # type: ignore[operator]


class Wrapped(nn.Linear):
    """Not a plain Linear."""


@pytest.mark.parametrize(
    ("mlp", "training"),
    [
        pytest.param(lambda: Mlp(48, 64, drop=(0.0, 0.5)), True, id="active-dropout"),
        pytest.param(lambda: GeGluMlp(48, 64), False, id="unknown-class"),
    ],
)
def test_mean_does_not_commute(mlp: Any, training: bool) -> None:
    block: Any = Block(48, 3)
    block.mlp = mlp().train(training)
    assert not vit.BLOCKS[Block].mean_commutes(block)


def test_mean_commutes_with_inactive_dropout_only_and_a_plain_last_map() -> None:
    block: Any = Block(48, 3)
    adapter = vit.BLOCKS[Block]
    block.mlp = Mlp(48, 64, drop=(0.0, 0.5)).eval()
    assert adapter.mean_commutes(block)
    block.mlp.fc2 = Wrapped(64, 48)
    assert not adapter.mean_commutes(block)


def test_mean_does_not_commute_with_a_norm_after_the_mlp() -> None:
    assert not vit.BLOCKS[ResPostBlock].mean_commutes(ResPostBlock(48, 3))


# --- reasons


def test_reasons_name_the_class() -> None:
    class OwnBlock(Block):
        pass

    assert vit.block_reason(nn.Linear(2, 2)) == (
        "torch.nn.modules.linear.Linear: not one of the supported classes "
        "(Block, ResPostBlock, EvaBlock, Attention, AttentionRope, EvaAttention)"
    )
    assert "OwnBlock: a subclass of Block may compute something else" in str(
        vit.block_reason(OwnBlock(48, 3))
    )
    parallel = str(vit.block_reason(ParallelScalingBlock(48, 3)))
    assert parallel.endswith("ParallelScalingBlock: attention and MLP run in parallel on one input")
    block: Any = Block(48, 3)
    block.attn = nn.Identity()
    assert "Identity: not one of the supported classes" in str(vit.block_reason(block))


@pytest.mark.skipif(not accepts(AttentionRope, "num_kv_heads"), reason="this timm has no grouped queries")
def test_grouped_queries_are_refused_and_full_groups_are_not() -> None:
    block: Any = EvaBlock(64, 4, attn_type="rope", qkv_fused=False, num_kv_heads=2)
    assert vit.block_reason(block) == (
        "timm.layers.attention.AttentionRope: grouped-query attention (4 query heads on 2 key heads)"
    )
    same: Any = EvaBlock(64, 4, attn_type="rope", qkv_fused=False, num_kv_heads=4)
    assert vit.block_reason(same) is None


@pytest.mark.parametrize("fused", [True, False])
def test_prompt_reason_names_the_map_that_is_not_plain(fused: bool) -> None:
    block: Any = EvaBlock(64, 4, qkv_fused=fused)
    name = "qkv" if fused else "k_proj"
    setattr(block.attn, name, Wrapped(64, 192 if fused else 64))
    assert vit.block_reason(block) is None
    assert "Wrapped is not a plain torch.nn.Linear" in str(vit.prompt_reason(block))
    with pytest.raises(TypeError, match="not plain Linear layers; check `prompt_reason` first"):
        vit.ATTENTION[EvaAttention].queries(block.attn, torch.randn(1, 1, 64))
