"""Small members of the supported timm families, with random weights: one table for all tests that need a model.

Sizes are tiny (32-pixel images, 16 patches), but every switch that changes an attention's arithmetic is on somewhere.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, SwiGLU
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

DEPTH, WIDTH, HEADS, CLASSES = 2, 48, 3, 5
IMAGE = (3, 32, 32)


def accepts(cls: type, *names: str) -> bool:
    """Return whether `cls` of the installed timm takes the arguments `names`."""
    return set(names) <= set(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        build: makes the model, as timm initialises it; takes further arguments of its class.
        prompts: whether `get_prompt_model` supports it too.
        present: whether the installed timm has it.
    """

    build: Callable[..., nn.Module]
    prompts: bool = True
    present: bool = True


def vit(cls: type[nn.Module] = VisionTransformer, **kwargs: Any) -> nn.Module:
    """A small `VisionTransformer` (or `cls`)."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return cls(**{**sizes, "num_classes": CLASSES, **kwargs})


def eva(**kwargs: Any) -> nn.Module:
    """A small `Eva`; 64 wide because each rotary axis takes a quarter of a head."""
    return vit(Eva, **{"embed_dim": 64, "num_heads": 4, "use_rot_pos_emb": True, **kwargs})


def naflex(**kwargs: Any) -> nn.Module:
    """A small `NaFlexVit`."""
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": DEPTH, "num_heads": 4, "pos_embed_grid_size": (4, 4)}
    return NaFlexVit(num_classes=CLASSES, **{**sizes, "global_pool": "avg", **kwargs})


def with_attention(build: Callable[..., Any], make: Callable[[], nn.Module], **kwargs: Any) -> nn.Module:
    """A model with another attention module in each block, for options that its constructor does not pass on."""
    model = build(**kwargs)
    for block in model.blocks:
        block.attn = make()
    return model


FAMILIES: dict[str, Family] = {
    "vit": Family(vit),
    "vit-no-qkv-bias": Family(partial(vit, qkv_bias=False)),
    "vit-qk-norm": Family(partial(vit, qk_norm=True)),
    "vit-scale-norms": Family(partial(vit, scale_attn_norm=True, scale_mlp_norm=True)),
    "vit-no-proj-bias-pre-norm": Family(partial(vit, proj_bias=False, pre_norm=True)),
    "vit-layer-scale": Family(partial(vit, init_values=0.1)),
    "vit-registers": Family(partial(vit, reg_tokens=4, no_embed_class=True, init_values=0.1)),
    "vit-avg-fc-norm": Family(partial(vit, global_pool="avg", class_token=False)),
    "vit-map": Family(partial(vit, global_pool="map", class_token=False)),
    "vit-glu": Family(partial(vit, mlp_layer=partial(GluMlp, gate_last=False))),
    "vit-swiglu": Family(partial(vit, mlp_layer=SwiGLU)),
    "vit-head-dim": Family(
        partial(with_attention, vit, lambda: Attention(WIDTH, HEADS, attn_head_dim=24, qkv_bias=True))
    ),
    "vit-gated": Family(
        partial(with_attention, vit, lambda: Attention(WIDTH, HEADS, qkv_bias=True, gated=True)),
        present=accepts(Attention, "gated"),
    ),
    "vit-res-post": Family(partial(vit, block_fn=ResPostBlock, init_values=0.1)),
    "deit-distilled": Family(partial(vit, VisionTransformerDistilled)),
    "eva-no-rope": Family(partial(eva, use_rot_pos_emb=False, init_values=0.1, global_pool="avg")),
    "eva02-unfused-swiglu": Family(
        partial(eva, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, init_values=0.1)
    ),
    "eva02-fused-glu": Family(partial(eva, swiglu_mlp=True, ref_feat_shape=(16, 16))),
    "eva-no-qkv-bias": Family(partial(eva, qkv_bias=False, qkv_fused=False)),
    "eva-no-qkv-bias-fused": Family(partial(eva, qkv_bias=False, global_pool="token")),
    "eva-separate-bias-qk-norm": Family(
        partial(
            with_attention,
            eva,
            lambda: EvaAttention(
                64, 4, qkv_bias_separate=True, qk_norm=True, scale_norm=False, norm_layer=nn.LayerNorm
            ),
        )
    ),
    "eva-gated": Family(
        partial(with_attention, eva, lambda: EvaAttention(64, 4, scale_norm=False, gated=True)),
        present=accepts(EvaAttention, "gated"),
    ),
    "eva-attn-only-layer-scale": Family(
        partial(eva, init_values=0.1, attn_only_layer_scale=True),
        present=accepts(EvaBlock, "attn_only_layer_scale"),
    ),
    "rope-axial": Family(partial(eva, attn_type="rope", use_abs_pos_emb=False)),
    "rope-mixed": Family(
        partial(eva, attn_type="rope", rope_type="mixed", rope_grid_indexing="xy", init_values=0.1)
    ),
    "rope-dinov3": Family(
        partial(
            eva,
            attn_type="rope",
            rope_type="dinov3",
            rope_rotate_half=True,
            num_reg_tokens=4,
            qkv_bias=False,
            use_abs_pos_emb=False,
            init_values=0.1,
        )
    ),
    "rope-unfused-head-dim": Family(
        partial(
            with_attention,
            partial(eva, use_rot_pos_emb=False),
            lambda: AttentionRope(
                64, 4, qkv_fused=False, attn_head_dim=24, qk_norm=True, norm_layer=nn.LayerNorm
            ),
        )
    ),
    "rope-gated": Family(
        partial(
            with_attention,
            eva,
            lambda: AttentionRope(64, 4, scale_norm=True, norm_layer=nn.LayerNorm, gated=True),
        ),
        present=accepts(AttentionRope, "gated"),
    ),
    "rope-unfused-no-bias": Family(partial(eva, attn_type="rope", qkv_fused=False, qkv_bias=False)),
    "rope-multimodal": Family(
        partial(eva, attn_type="rope", rope_type="mrope", rope_mrope_section=(2, 3, 3)),
        present=accepts(Eva, "rope_mrope_section"),
    ),
    "naflex": Family(partial(naflex, reg_tokens=2, class_token=True), prompts=False),
    "naflex-rope": Family(
        partial(naflex, rope_type="axial", attn_type="rope", pos_embed="none"), prompts=False
    ),
    "naflex-eva": Family(
        partial(naflex, rope_type="mixed", attn_type="eva", swiglu_mlp=True, init_values=0.1), prompts=False
    ),
}

# The families of this timm, and those that take prompts.
PRESENT = [name for name, family in FAMILIES.items() if family.present]
PROMPTABLE = [name for name in PRESENT if FAMILIES[name].prompts]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers for every parameter: as initialised, layer scale, biases and position embeddings hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim >= 2 and "token" not in name and "pos_embed" not in name:
                p.copy_(noise / math.sqrt(p[0].numel()))
            elif name.endswith("weight") or "gamma" in name:  # norms and layer scale
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(0.3 * noise)
    return model


def small(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **kwargs: Any) -> Any:
    """Return the member `name` of `FAMILIES`, as `prepare` makes it; `kwargs` go to its class (``depth=1``)."""
    return prepare(FAMILIES[name].build(**kwargs), dtype, seed)


def prepare(model: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Give `model` random weights of `dtype` and put it into eval mode."""
    model = randomise(model, seed).to(dtype).eval()
    for module in model.modules():
        if isinstance(module, RotaryEmbeddingMixed) and module.t_x is not None and module.t_y is not None:
            # timm 1.0.26 makes the frequencies float32, and multiplies them with these grids.
            module.t_x, module.t_y = module.t_x.float(), module.t_y.float()
    return model


def images(batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Random images [batch, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *IMAGE, generator=generator, dtype=torch.float64).to(dtype)


def by_hand(model: nn.Module) -> nn.Module:
    """A copy that runs timm's written-out attention, which shares no kernel with ours."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Attention | AttentionRope | EvaAttention):
            module.fused_attn = False  # type: ignore[misc]
    return model


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Output, and gradients of its product with a fixed tensor, of the input and of every parameter."""
    x = images().requires_grad_()
    model.zero_grad()
    out = run(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    found = {name: p.grad for name, p in model.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **{k: g for k, g in found.items() if g is not None}}  # type: ignore[dict-item]
