"""States of the official code of VPT, GateVPT, CVPT and DA-VPT, and of backbones, copied into a `PromptModel`.

Both sides are brought to one set of names: timm's for the backbone, with q, k and v apart (`blocks.0.attn.q.weight`),
and the official ones for what a method adds. What a state names is then a row of pieces along dimension 0: the sets of
prompts, or q, k and v of a packed map.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprompt import vit
from fastprompt.config import GateVPTConfig, PromptConfig
from fastprompt.model import PromptModel

# Wrappers of a model, in any order and number: DataParallel, VPT's `enc` and its ViT's `transformer`, ...
_PREFIXES = re.compile(r"^((module|model|backbone|enc|transformer|_orig_mod)\.)+")

# VPT's supervised ViT is named after Google's; its own prompt files (`SAVE_FOR_EACH_EPOCH`) have two more names.
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
        (r"head\.last_layer\.", "head."),
        (r"shallow_prompt$", "prompt_embeddings"),
        (r"deep_prompt$", "deep_prompt_embeddings"),
    )
]
_PACKED = re.compile(r"(.*\battn\.)qkv\.(weight|bias)")
_CROSS = re.compile(r"(blocks\.\d+\.)CrossAttn\.(.+)")

# What pretraining leaves behind: MoCo v3's predictor, MAE's decoder.
_PRETRAINING = re.compile(r"(predictor|momentum_encoder)\.|decoder_|mask_token$")
_HEADS = ("head.", "head_dist.")

# Official names by method, and what of the configuration their shapes follow from.
_METHOD_NAMES = {
    "vpt": {
        "prompt_embeddings": "`num_prompts` and `project`",
        "deep_prompt_embeddings": "`deep`, `blocks`, `num_prompts` and `project`",
        "prompt_proj.weight": "`project`",
        "prompt_proj.bias": "`project`",
    },
    "gate_vpt": {
        "prompt_embeddings": "`num_prompts`",
        "gate_logit": "`num_gates`",
        "temp": "`temperature`",
    },
    "cvpt": {"Prompt_Tokens": "`num_prompts`"},
    "da_vpt": {
        "proxy_prompt_tokens": "`num_proxy_prompts` and `guided_blocks`",
        "other_prompt_tokens": "`num_prompts` and `guided_blocks`",
        "vpt_norm.weight": "`prompt_norm`",
        "vpt_norm.bias": "`prompt_norm`",
    },
}
_ANY_METHOD = {name for names in _METHOD_NAMES.values() for name in names}


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_official_state_dict` did.

    Attributes:
        loaded: keys of the state whose values were copied.
        missing: names of the model's trained parameters that the state does not hold; they keep their values.
        unexpected: keys of the state that name nothing in the model.
        ignored: keys of the state that are of no use here: heads and decoders of a pretraining, MoCo v3's second
            encoder, the packed maps that DA-VPT keeps beside those it uses, CVPT's copies of attention weights.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]


class _Piece(NamedTuple):
    """A tensor of the model, or a third of a packed one, to be copied into.

    Attributes:
        name: its own name, with q, k and v apart.
        owner: the parameter's or buffer's name in the PromptModel.
        tensor: what is copied into.
        trained: every state of tuned parameters holds it.
        frozen: only a state with the backbone holds it. (Neither: the bias of q in DA-VPT+.)
    """

    name: str
    owner: str
    tensor: Tensor
    trained: bool
    frozen: bool = False


@dataclass
class _Plan:
    """What goes where, and what speaks against it."""

    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    pretraining: bool = False


def load_official_state_dict(
    model: PromptModel, state: Mapping[str, Any], *, strict: bool = True
) -> LoadReport:
    """Copy a state of the official code of VPT, GateVPT, CVPT or DA-VPT, or of a backbone, into `model`.

    Names are recognised under the prefixes `module.`, `model.`, `backbone.`, `enc.` and `transformer.`, with packed or
    separate q, k and v, and inside `{"model": ...}` or `{"state_dict": ...}`. A state of tuned parameters holds
    prompts, head and what else the method trains. The backbone may be absent; if it is there, it is loaded, as a whole.
    A state that holds a backbone and nothing of any method is a pretraining's (MAE, MoCo v3, supervised): the backbone
    is loaded, and the model keeps its prompts and its head.

    Args:
        model: made by :func:`fastprompt.get_prompt_model` for the same method and sizes. Its parameters stay the same
            objects, on their device and in their dtype.
        state: names to tensors (or NumPy arrays), as `torch.load(..., weights_only=True)` or safetensors give them.
        strict: False reports what is missing or unexpected instead of raising.

    Raises:
        TypeError: `model` is not a PromptModel, or `state` not a mapping.
        ValueError: the state is of another method, has other shapes, holds half a backbone, or (if `strict`) lacks
            trained parameters or has unexpected names. One message lists everything; nothing has been changed.
    """
    if not isinstance(model, PromptModel):
        raise TypeError(
            f"`load_official_state_dict`: `model` must be a PromptModel; got {type(model).__name__}; "
            "make one with `fastprompt.get_prompt_model`"
        )
    plan = _plan(model, _unwrap(state))
    problems = list(plan.problems)
    if strict:
        problems += [f"unexpected: {key}" for key in plan.unexpected]
        if not plan.pretraining:
            problems += [f"missing: {name}" for name in plan.missing]
    if problems:
        advice = "" if plan.problems else " (strict=False loads the rest)"
        raise ValueError(
            f"`load_official_state_dict`: nothing was loaded{advice}:\n"
            + "\n".join(f"- {p}" for p in problems)
        )
    with torch.no_grad():
        for target, value in plan.copies:
            target.copy_(value)
    return LoadReport(tuple(plan.loaded), tuple(plan.missing), tuple(plan.unexpected), tuple(plan.ignored))


def _plan(model: PromptModel, state: Mapping[str, Any]) -> _Plan:
    names = _names(state)
    present = set(names.values())
    _check_method(model, names)
    slots = _slots(model)
    pretraining = not present & _ANY_METHOD and any(n in slots and not n.startswith(_HEADS) for n in present)
    plan = _Plan(pretraining=pretraining)
    values: dict[str, Tensor] = {}
    copies_of_attention: dict[str, tuple[str, Tensor]] = {}
    for key, name in names.items():
        value = torch.as_tensor(state[key]) if hasattr(state[key], "__array_interface__") else state[key]
        cross = _CROSS.fullmatch(name)
        if not isinstance(value, Tensor) or value.is_meta:
            plan.unexpected.append(key)
        elif value.numel() == 0 or _is_useless(name, present, slots, pretraining):
            plan.ignored.append(key)
        elif cross and model.config.method == "cvpt":
            copies_of_attention[key] = (f"{cross[1]}attn.{cross[2]}", value)
        elif name not in slots:
            plan.unexpected.append(key)
        elif any(piece.name in values for piece in slots[name]):
            plan.problems.append(f"{key}: another name of the state means the same parameter")
        else:
            _place(plan, key, name, value, slots[name], values)
    pieces = {piece.name: piece for slot in slots.values() for piece in slot}
    for key, (name, value) in copies_of_attention.items():
        own = values.get(name, pieces[name].tensor if name in pieces else None)
        if own is None or own.shape != value.shape or not torch.equal(own, value.to(own)):
            plan.problems.append(
                f"{key}: not the block's own attention weight, which CVPT's cross-attention shares here"
            )
        plan.ignored.append(key)
    _account(plan, model, pieces.values(), values.keys(), present)
    return plan


def _place(
    plan: _Plan, key: str, name: str, value: Tensor, pieces: tuple[_Piece, ...], values: dict[str, Tensor]
) -> None:
    """Plan the copy of `value` into its pieces, which lie in it one after another."""
    rows = [len(piece.tensor) for piece in pieces] if len(pieces) > 1 else []
    shape = (sum(rows), *pieces[0].tensor.shape[1:]) if rows else pieces[0].tensor.shape
    fits = value.shape == shape
    parts = value.split(rows) if rows and fits else (value,) * len(pieces)
    values.update(zip((piece.name for piece in pieces), parts, strict=True))
    if not fits:
        plan.problems.append(
            f"{key}: is {tuple(value.shape)}, the model's is {tuple(shape)}; {_advice(name)}"
        )
        return
    plan.copies += [(piece.tensor, part) for piece, part in zip(pieces, parts, strict=True)]
    plan.loaded.append(key)


def _advice(name: str) -> str:
    for hints in _METHOD_NAMES.values():
        if name in hints:
            return f"see {hints[name]} of the configuration"
    if name.startswith(_HEADS):
        return "build the timm model with the state's `num_classes`, or take the head out of the state"
    if name == "pos_embed":
        return (
            "build the timm model for the state's image size (`img_size`), or resample first with "
            "`timm.layers.resample_abs_pos_embed`"
        )
    return "build the timm model that the state belongs to"


def _account(
    plan: _Plan, model: PromptModel, pieces: Iterable[_Piece], reached: Collection[str], present: set[str]
) -> None:
    """Note the trained parameters that the state does not hold, and refuse half a backbone."""
    pieces = list(pieces)
    with_backbone = plan.pretraining or any(piece.frozen and piece.name in reached for piece in pieces)
    lacking: list[str] = []
    for piece in pieces:
        if piece.name in reached or (plan.pretraining and _is_fresh_norm(piece.name, present)):
            continue
        head = piece.name.startswith(_HEADS)
        if with_backbone and piece.owner.startswith("base.") and not head:
            lacking.append(piece.owner)
        elif piece.trained:
            plan.missing.append(piece.owner)
    plan.missing = list(dict.fromkeys(plan.missing))
    if lacking:
        advice = "give the whole backbone, or only what was trained"
        if model.config.method == "da_vpt":
            advice += " (tuned biases need tune='prompts+biases')"
        plan.problems.append(f"half a backbone, without {', '.join(dict.fromkeys(lacking))}; {advice}")


def _unwrap(state: Any) -> Mapping[str, Any]:
    """What lies under "model" or "state_dict", if anything does."""
    if not isinstance(state, Mapping):
        raise TypeError(
            f"`load_official_state_dict`: `state` must map names to tensors; got {type(state).__name__}; "
            "read it with `torch.load(path, weights_only=True)` or `safetensors.torch.load_file(path)`"
        )
    for key in ("model", "state_dict"):
        if isinstance(state.get(key), Mapping):
            return _unwrap(state[key])
    return state


def _names(state: Mapping[str, Any]) -> dict[str, str]:
    """Each key of the state -> our name for it."""
    names = {key: _PREFIXES.sub("", str(key)) for key in state}
    encoders = [
        e for e in ("base_encoder.", "momentum_encoder.") if any(n.startswith(e) for n in names.values())
    ]
    for key, name in names.items():
        names[key] = _rename(name.removeprefix(encoders[0]) if encoders else name)
    return names


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _check_method(model: PromptModel, names: Mapping[str, str]) -> None:
    """Raise ValueError for the names of another method, or of a PromptModel's own state."""
    if any(name.startswith(("base.", "prompts.")) for name in names.values()):
        raise ValueError(
            "`load_official_state_dict`: this is a PromptModel's own state; use `model.load_state_dict(state)`"
        )
    mine = model.config.method
    foreign = {name for name in names.values() if name in _ANY_METHOD - _METHOD_NAMES.get(mine, {}).keys()}
    if foreign:
        theirs = max(_METHOD_NAMES, key=lambda method: len(foreign & _METHOD_NAMES[method].keys()))
        config = next(c.__name__ for c in PromptConfig.__subclasses__() if c.method == theirs)
        raise ValueError(
            f"`load_official_state_dict`: the state has {sorted(foreign)}, which belong to the method {theirs!r}, and "
            f"the model's method is {mine!r}; make the model with `fastprompt.{config}`"
        )


def _slots(model: PromptModel) -> dict[str, tuple[_Piece, ...]]:
    """What a state may name -> the tensors of the model that it means, one after another along dimension 0."""
    slots: dict[str, tuple[_Piece, ...]] = {}
    for name, tensor in model.base.state_dict(keep_vars=True).items():
        owner, frozen = f"base.{name}", not tensor.requires_grad
        packed, tensor = _PACKED.fullmatch(name), tensor.detach()
        if packed is None:
            short = _rename(name)
            slots[short] = (_Piece(short, owner, tensor, name.startswith(_HEADS) or not frozen, frozen),)
            continue
        attn = model.base.get_submodule(packed[1].removesuffix("."))
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            short = f"{packed[1]}{part}.{packed[2]}"
            untrained = part == "q" and packed[2] == "bias" and getattr(attn, vit.FROZEN_QUERY_BIAS, False)
            slots[short] = (_Piece(short, owner, piece, not (frozen or untrained), frozen),)
    for query in [name for name in slots if ".attn.q." in name]:
        parts = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in slots for part in parts):
            packed_name = query.replace(".attn.q.", ".attn.qkv.")
            slots[packed_name] = tuple(piece for part in parts for piece in slots[part])
    if isinstance(model.config, GateVPTConfig) and "norm.weight" not in slots:
        # Its official code norms the mean with the backbone's own norm, which timm calls fc_norm.
        slots.update({n.removeprefix("fc_"): slots[n] for n in list(slots) if n.startswith("fc_norm.")})
    slots.update(_method_slots(model))
    return {
        name: pieces
        for name, slot in slots.items()
        if (pieces := tuple(piece for piece in slot if piece.tensor.numel() > 0))
    }


def _method_slots(model: Any) -> dict[str, tuple[_Piece, ...]]:
    """The same for what the method adds, under the official names."""

    def prompts(indices: Iterable[int]) -> tuple[_Piece, ...]:
        return tuple(
            _Piece(name := f"prompts.{i}", name, model.prompts[i].detach().unsqueeze(0), trained=True)
            for i in indices
        )

    def of_module(official: str, name: str) -> dict[str, tuple[_Piece, ...]]:
        module: nn.Module | None = getattr(model, name)
        return {
            f"{official}.{n}": (_Piece(f"{name}.{n}", f"{name}.{n}", p.detach(), trained=True),)
            for n, p in (module.named_parameters() if module is not None else ())
        }

    method, blocks = model.config.method, range(len(model.prompts))
    if method == "vpt":
        return {
            "prompt_embeddings": prompts(blocks[:1]),
            "deep_prompt_embeddings": prompts(blocks[1:]),
            **of_module("prompt_proj", "prompt_project"),
        }
    if method == "gate_vpt":
        slots = {"prompt_embeddings": prompts(blocks)}
        for official, name in (("gate_logit", "gate_logits"), ("temp", "temperature")):
            if name in dict(model.named_parameters(recurse=False)):
                slots[official] = (_Piece(name, name, getattr(model, name).detach(), trained=True),)
        return slots
    if method == "cvpt":
        return {"Prompt_Tokens": prompts(blocks)}
    if method == "da_vpt":
        guided = model.guided
        return {
            "proxy_prompt_tokens": prompts(guided),
            "other_prompt_tokens": prompts(i for i in blocks if i not in guided),
            **of_module("vpt_norm", "prompt_norm"),
        }
    return {}


def _is_useless(
    name: str, present: set[str], slots: Mapping[str, tuple[_Piece, ...]], pretraining: bool
) -> bool:
    """Whether something of this name is left out without a word."""
    packed = _PACKED.fullmatch(name)
    if packed and f"{packed[1]}q.{packed[2]}" in present:
        return True  # DA-VPT keeps the packed maps of pretraining, and computes with separate ones
    if not pretraining:
        return False
    if name.startswith("norm.") and "norm.weight" not in slots:
        return _is_fresh_norm(f"fc_{name}", present)
    return name.startswith(_HEADS) or _PRETRAINING.match(name) is not None


def _is_fresh_norm(name: str, present: set[str]) -> bool:
    """Whether `name` is of a norm after the mean, where a pretraining has none: it starts anew, as in MAE and VPT."""
    return name.startswith("fc_norm.") and name not in present and name.removeprefix("fc_") in present
