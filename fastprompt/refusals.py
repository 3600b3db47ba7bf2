"""Reasons why timm classes are not supported, and the messages that give them."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

_WINDOWS = "attention within windows of a pyramid of feature maps"
_MAPS = "attention on the feature map of a convolutional network, with convolutions for linear maps"
_PYRAMID = "a stage of a pyramid, whose tokens are a feature map"
_LANGUAGE = "the vision encoder of a language model, read as a grid of tokens"
_CHANNELS = "attention over channels, not over tokens"
_REDUCED = "keys and values come from a smaller map than the queries"
_BIAS = "relative position bias is added to the scores"
_CLASS_TOKEN = "only the class token attends"

# timm class -> why its attention cannot be replaced. Classes that are not listed are refused as unknown.
ATTENTION_REASONS = {
    "timm.layers.diff_attention.DiffAttention": "differential attention subtracts two softmaxes",
    "timm.models._efficientnet_blocks.MobileAttention": f"{_REDUCED}, and all heads share them",
    "timm.models.beit.Attention": _BIAS,
    "timm.models.cait.ClassAttn": _CLASS_TOKEN,
    "timm.models.cait.TalkingHeadAttn": "heads are mixed before and after the softmax",
    "timm.models.coat.FactorAttnConvRelPosEnc": "factorised attention makes no query-key scores",
    "timm.models.convit.GPSA": "scores are blended with scores of position, by a gate per head",
    "timm.models.convit.MHSA": "a class of ConViT's own, whose other blocks attend by position",
    "timm.models.cpubone.ConvAttention": _MAPS,
    "timm.models.crossvit.MultiScaleBlock": "two sequences, whose class tokens cross over",
    "timm.models.csatv2.SpatialAttention": "a spatial gate made of channel statistics",
    "timm.models.csatv2.TransformerBlock": f"{_PYRAMID}, downsampled in places",
    "timm.models.davit.ChannelAttention": _CHANNELS,
    "timm.models.davit.ChannelAttentionV2": _CHANNELS,
    "timm.models.davit.WindowAttention": _WINDOWS,
    "timm.models.deepseek_vit.DeepseekVitBlock": _LANGUAGE,
    "timm.models.edgenext.CrossCovarianceAttn": _CHANNELS,
    "timm.models.efficientformer.Attention": f"{_BIAS}, and values are wider than keys",
    "timm.models.efficientformer_v2.Attention2d": f"{_MAPS}, position bias and mixed heads",
    "timm.models.efficientformer_v2.Attention2dDownsample": f"{_MAPS}, and fewer queries than keys",
    "timm.models.efficientvit_mit.LiteMLA": "linear attention has no softmax",
    "timm.models.efficientvit_msra.LocalWindowAttention": f"{_WINDOWS}, each head fed by the one before",
    "timm.models.eva.EvaBlockPostNorm": "the norms come after attention and MLP",
    "timm.models.fastvit.AttentionBlock": _PYRAMID,
    "timm.models.gcvit.WindowAttentionGlobal": f"{_WINDOWS}, some by shared global queries",
    "timm.models.gemma4_vit.Gemma4Attention": "values are normed too, and scores are not scaled",
    "timm.models.hiera.MaskUnitAttention": f"{_WINDOWS}, with pooled queries",
    "timm.models.hieradet_sam2.MultiScaleAttention": f"{_WINDOWS}, with pooled queries",
    "timm.models.iformer.SHMA": _MAPS,
    "timm.models.levit.Attention": f"{_BIAS}, and values are wider than keys",
    "timm.models.levit.AttentionDownsample": "fewer queries than keys, with relative position bias",
    "timm.models.lowformer.ConvAttention": _MAPS,
    "timm.models.maxxvit.Attention2d": _MAPS,
    "timm.models.maxxvit.ParallelPartitionAttention": _WINDOWS,
    "timm.models.maxxvit.PartitionAttentionCl": _WINDOWS,
    "timm.models.metaformer.Attention": _PYRAMID,
    "timm.models.mobilevit.LinearSelfAttention": "linear attention has no query-key scores",
    "timm.models.mobilevit.MobileVitBlock": "each pixel attends to the pixels at its place in other patches",
    "timm.models.mvitv2.MultiScaleAttention": "queries, keys and values are pooled",
    "timm.models.nest.Attention": "attention within blocks of the image, one sequence each",
    "timm.models.nextvit.ConvAttention": "a grouped convolution, not attention of tokens",
    "timm.models.nextvit.EfficientAttention": _REDUCED,
    "timm.models.pit.Transformer": "a pooling hierarchy: the number of tokens changes from stage to stage",
    "timm.models.pvt_v2.Attention": _REDUCED,
    "timm.models.qwen3_vit.Qwen3VitEncoder": _LANGUAGE,
    "timm.models.shvit.SHSA": "only some of the channels of a feature map attend",
    "timm.models.swiftformer.EfficientAdditiveAttention": "additive attention makes no query-key scores",
    "timm.models.swin_transformer.WindowAttention": f"{_WINDOWS}, with relative position bias",
    "timm.models.swin_transformer_v2.WindowAttention": f"{_WINDOWS}, by cosine similarity",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": f"{_WINDOWS}, by cosine similarity",
    "timm.models.tiny_vit.Attention": f"{_WINDOWS}, with position bias",
    "timm.models.tnt.Attention": "pixels attend within patches, and patches to each other",
    "timm.models.twins.GlobalSubSampleAttn": _REDUCED,
    "timm.models.twins.LocallyGroupedAttn": _WINDOWS,
    "timm.models.vision_transformer.DiffParallelScalingBlock": "differential attention parallel to the MLP",
    "timm.models.vision_transformer.ParallelScalingBlock": "attention and MLP run in parallel on one input",
    "timm.models.vision_transformer.ParallelThingsBlock": "several attentions run in parallel in one block",
    "timm.models.vision_transformer_relpos.RelPosAttention": _BIAS,
    "timm.models.vision_transformer_sam.Attention": f"{_BIAS}, within windows in most blocks",
    "timm.models.visformer.Attention": _MAPS,
    "timm.models.volo.Attention": _PYRAMID,
    "timm.models.volo.ClassAttention": _CLASS_TOKEN,
    "timm.models.volo.OutlookAttention": "weights come from the query alone, over its neighbours",
    "timm.models.xcit.ClassAttentionBlock": _CLASS_TOKEN,
    "timm.models.xcit.XCA": _CHANNELS,
}

# timm model class -> why it does not support prompts although its blocks do.
MODEL_REASONS = {
    "timm.models.naflexvit.NaFlexVit": "each image may have its own number of tokens",
}


def class_path(module: object) -> str:
    """Return the full name of the class of `module`."""
    return _path(type(module))


def is_refused(module: nn.Module) -> bool:
    """Return whether the attention of this class, or of a class that it derives from, is known not to be supported."""
    return _known(module, ATTENTION_REASONS) is not None


def refusal(module: nn.Module, supported: Collection[type[nn.Module]]) -> str:
    """Return "class: reason" for a module whose class is none of those in `supported`.

    The reason is that of the class itself or of a base class, else that of the first submodule that has one.
    """
    path = class_path(module)
    reason = _known(module, {**ATTENTION_REASONS, **MODEL_REASONS})
    if reason is not None:
        return f"{path}: {reason}"
    bases = [cls.__name__ for cls in supported if isinstance(module, cls)]
    if bases:
        return (
            f"{path}: a subclass of {bases[0]} may compute something else; only the class itself is supported"
        )
    for name, child in module.named_modules():
        reason = _known(child, ATTENTION_REASONS)
        if reason is not None:
            return f"{path}: {reason} ({name}, {class_path(child)})"
    names = ", ".join(cls.__name__ for cls in supported)
    return f"{path}: not one of the supported classes ({names})"


def _known(module: nn.Module, reasons: dict[str, str]) -> str | None:
    """Return the reason of the first class in the MRO that has one."""
    return next((reasons[path] for path in map(_path, type(module).__mro__) if path in reasons), None)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
