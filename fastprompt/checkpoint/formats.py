"""The names of tensors in the official code of VPT, GateVPT, CVPT and DA-VPT.

`FORMATS` has one entry for each layout of a file. To load another layout, add an entry: its names, the model's tensors
for each name, and how to recognise it. Names of the backbone become timm's, with separate q, k and v.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from fastprompt.config import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, VPTConfig
from fastprompt.model import PromptModel

CALLER = "`load_official_state_dict`"

# Wrappers of a model, in any order and number: DataParallel, VPT's `enc` and its ViT's `transformer`, ...
_PREFIXES = re.compile(r"^((module|model|backbone|enc|transformer|_orig_mod)\.)+")

# VPT's supervised ViT has Google's names; the prompt files of VPT (`SAVE_FOR_EACH_EPOCH`) have two more.
_LAYER = r"encoder\.layer\.(\d+)\."
_RENAMES = [
    (re.compile("^" + pattern), name)
    for pattern, name in (
        (_LAYER + r"attn\.(q|k|v)(?:uery|ey|alue)\.", r"blocks.\1.attn.\2."),
        (_LAYER + r"attn\.out\.", r"blocks.\1.attn.proj."),
        (_LAYER + r"attention_norm\.", r"blocks.\1.norm1."),
        (_LAYER + r"ffn_norm\.", r"blocks.\1.norm2."),
        (_LAYER + r"ffn\.", r"blocks.\1.mlp."),
        (r"encoder\.encoder_norm\.", "norm."),
        (r"embeddings\.cls_token$", "cls_token"),
        (r"embeddings\.position_embeddings$", "pos_embed"),
        (r"embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"(blocks\.\d+\.attn)\.(q|k|v)_proj\.", r"\1.\2."),
        (r"shallow_prompt$", "prompt_embeddings"),
        (r"deep_prompt$", "deep_prompt_embeddings"),
    )
]
PACKED = re.compile(r"(.*\battn\.)qkv\.(weight|bias)")
CROSS = re.compile(r"(blocks\.\d+\.)CrossAttn\.(.+)")
HEADS = ("head.", "head_dist.")
CLASS_MAP = "vpt_criterion.mapping"

# Needed only in pretraining: MoCo v3's predictor, MAE's decoder.
PRETRAINING = re.compile(r"(predictor|momentum_encoder)\.|decoder_|mask_token$")


class Name(NamedTuple):
    """An official name.

    Attributes:
        holds: the model's tensor for this name, or a function from the model to the indices of its sets of prompts.
        option: the fields of the configuration that decide whether the model has it; empty if it always has.
        sizes: for each dimension, the option that determines it.
    """

    holds: str | Callable[[PromptModel], Iterable[int]]
    option: str
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """The names of one official code for the parameters that its method adds.

    Attributes:
        code: its name in error messages.
        config: the configuration of the models that load it.
        names: the official names.
        marks: other names that only this code (or one with the same marks) saves.
        applies: returns False for a state (its common names) that has these names but another format.
        hint: the advice for a state that was recognised wrongly.
    """

    code: str
    config: type[PromptConfig]
    names: dict[str, Name]
    marks: re.Pattern[str] = re.compile(r"(?!)")
    applies: Callable[[set[str]], bool] = lambda names: True
    hint: str = ""

    def knows(self, name: str) -> bool:
        """Return whether `name` is one of the official names or of the marks."""
        return name in self.names or self.marks.match(name) is not None


def _first(model: PromptModel) -> range:
    return range(1)


def _later(model: PromptModel) -> range:
    return range(1, len(model.prompts))


def _all(model: PromptModel) -> range:
    return range(len(model.prompts))


def _guided(model: PromptModel) -> range:
    first, last = cast(DAVPTConfig, model.config).guided_blocks
    return range(first, last + 1)


def _unguided(model: PromptModel) -> list[int]:
    return [i for i in _all(model) if i not in _guided(model)]


def _is_vpt_of_cvpts_code(names: set[str]) -> bool:
    """Return whether the prompts enter as tokens: a whole CVPT model has a `CrossAttn` in each block."""
    cross = any(CROSS.match(name) for name in names)
    return "Prompt_Tokens" in names and not cross and any(name.startswith("blocks.") for name in names)


_P, _PROJECT, _PROXIES = "`num_prompts`", "`project`", "`num_proxy_prompts`"
_WIDTH, _DEPTH = "the timm model's width (`embed_dim`)", "the timm model's depth"
_VPT_WIDTH = f"{_PROJECT}, or {_WIDTH}"
_CLASSES = "the timm model's `num_classes`"
_VPT_HEAD = re.compile(r"head\.(last_layer|projection)\.")

FORMATS = (
    Format(
        "VPT",
        VPTConfig,
        {
            "prompt_embeddings": Name(_first, "", ("", _P, _VPT_WIDTH)),
            "deep_prompt_embeddings": Name(_later, "`deep`", ("`deep` and `blocks`", _P, _VPT_WIDTH)),
            "prompt_proj.weight": Name("prompt_project.weight", _PROJECT, (_WIDTH, _PROJECT)),
            "prompt_proj.bias": Name("prompt_project.bias", _PROJECT, (_WIDTH,)),
        },
        marks=_VPT_HEAD,
    ),
    Format(
        "GateVPT",
        GateVPTConfig,
        {
            "prompt_embeddings": Name(_first, "", ("", _P, _WIDTH)),
            "gate_logit": Name("gate_logits", "`num_gates`", ("`num_gates`",)),
            "temp": Name("temperature", "`temperature`", (_DEPTH,)),
        },
        marks=_VPT_HEAD,
    ),
    Format(
        "CVPT",
        CVPTConfig,
        {"Prompt_Tokens": Name(_all, "", (_DEPTH, _P, _WIDTH))},
        marks=CROSS,
        applies=lambda names: not _is_vpt_of_cvpts_code(names),
        hint="the VPT in CVPT's code is recognised only with its backbone",
    ),
    Format(
        "the VPT in CVPT's code",
        VPTConfig,
        {"Prompt_Tokens": Name(_all, "", (f"`deep` and `blocks`, or {_DEPTH}", _P, _VPT_WIDTH))},
        applies=_is_vpt_of_cvpts_code,
        hint="a CVPT state that lost its `CrossAttn` loads without its backbone",
    ),
    Format(
        "DA-VPT",
        DAVPTConfig,
        {
            "proxy_prompt_tokens": Name(_guided, "", ("`guided_blocks`", _PROXIES, _WIDTH)),
            "other_prompt_tokens": Name(
                _unguided, "`guided_blocks`", (f"`guided_blocks`, or {_DEPTH}", _P, _WIDTH)
            ),
            "vpt_norm.weight": Name("prompt_norm.weight", "`prompt_norm`", (_WIDTH,)),
            "vpt_norm.bias": Name("prompt_norm.bias", "`prompt_norm`", (_WIDTH,)),
            CLASS_MAP: Name("class_to_prompt", "", (_CLASSES,)),
            "vpt_criterion.centroids": Name("class_centroids", "", (_PROXIES, _WIDTH)),
        },
    ),
)

BACKBONE_SIZES = {
    "cls_token": ("", "", _WIDTH),
    "pos_embed": (
        "",
        "the timm model's image size (`img_size`), or resample it with `timm.layers.resample_abs_pos_embed`",
        _WIDTH,
    ),
    "head.weight": (f"{_CLASSES}, or remove the head from the state", _WIDTH),
    "head.bias": (f"{_CLASSES}, or remove the head from the state",),
}


def common_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Map each key of the state to timm's or the official name, without the prefixes of wrappers."""
    names = {key: _PREFIXES.sub("", str(key)) for key in state}
    encoders = [
        e for e in ("base_encoder.", "momentum_encoder.") if any(n.startswith(e) for n in names.values())
    ]
    for key, name in names.items():
        names[key] = rename(name.removeprefix(encoders[0]) if encoders else name)
    return names


def rename(name: str) -> str:
    """Return timm's name for a name of the backbone."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def format_of(model: PromptModel, names: set[str]) -> Format | None:
    """Return the state's format; raise ValueError if it is another method's, or a PromptModel's own state."""
    if any(name.startswith(("base.", "prompts.")) for name in names):
        raise ValueError(f"{CALLER}: this is a PromptModel's own state; use `model.load_state_dict(state)`")
    known = {f.code: {name for name in names if f.knows(name)} for f in FORMATS}
    of_any_method = set().union(*known.values())
    fitting = [f for f in FORMATS if known[f.code] == of_any_method and f.applies(names)]
    for layout in fitting:
        if layout.config is type(model.config):
            return layout
    if not of_any_method:
        return None
    if not fitting:
        raise ValueError(f"{CALLER}: the state mixes names of several methods: {some(sorted(of_any_method))}")
    theirs = fitting[0]
    raise ValueError(
        f"{CALLER}: the state is from {theirs.code} (it has {some(sorted(known[theirs.code]))}), but the model's "
        f"method is {model.config.method!r}; make the model with `fastprompt.{theirs.config.__name__}`"
        + (f" ({theirs.hint})" if theirs.hint else "")
    )


def some(names: Iterable[str]) -> str:
    """Return the first of `names` and the number of the others as text."""
    listed = list(names)
    more = f" and {len(listed) - 4} more" if len(listed) > 5 else ""
    return ", ".join(listed[:4] if more else listed) + more
