"""Copy a state dict of official code into a `PromptModel`: make a plan, check it, and only then copy.

The names of both are converted to one set of names (:mod:`fastprompt.checkpoint.formats`). A tensor of the state is
then split along dimension 0 into tensors of the model: several sets of prompts, or q, k and v of a packed map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprompt import vit
from fastprompt.checkpoint.formats import (
    BACKBONE_SIZES,
    CALLER,
    CLASS_MAP,
    CROSS,
    FORMATS,
    HEADS,
    PACKED,
    PRETRAINING,
    Format,
    common_names,
    format_of,
    rename,
    some,
)
from fastprompt.config import DAVPTConfig, GateVPTConfig
from fastprompt.model import PromptModel


@dataclass(frozen=True)
class LoadReport:
    """The result of :func:`load_official_state_dict`.

    Attributes:
        loaded: keys of the state whose values were copied.
        missing: the model's trained parameters that are not in the state; they keep their values.
        unexpected: keys of the state that match nothing in the model.
        ignored: keys of the state that are not needed: heads and decoders of a pretraining, MoCo v3's second encoder,
            DA-VPT's unused packed maps, CVPT's copies of attention weights.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]


class _Piece(NamedTuple):
    """A tensor of the model, or a third of a packed one, to copy into.

    Attributes:
        name: its own name, with separate q, k and v.
        owner: the name of the parameter or buffer in the PromptModel.
        tensor: the tensor to copy into.
        trained: every state of tuned parameters contains it.
        frozen: only a state with the backbone contains it. (Neither: q's bias in DA-VPT+, the class map.)
    """

    name: str
    owner: str
    tensor: Tensor
    trained: bool
    frozen: bool = False


_Slots = dict[str, tuple[_Piece, ...]]


def load_official_state_dict(
    model: PromptModel, state: Mapping[str, Any], *, strict: bool = True
) -> LoadReport:
    """Copy a state dict of the official VPT, GateVPT, CVPT or DA-VPT code, or of a backbone, into `model`.

    Names are recognised under the prefixes `module.`, `model.`, `backbone.`, `enc.` and `transformer.`, with packed or
    separate q, k and v, and inside `{"model": ...}` or `{"state_dict": ...}`. A state of tuned parameters contains the
    prompts, the head and all other parameters that the method trains. It may also contain the whole backbone, which is
    then loaded. A state with only a backbone comes from pretraining (MAE, MoCo v3, supervised): the backbone is loaded,
    and the model keeps its prompts and its head.

    Args:
        model: from :func:`fastprompt.get_prompt_model`, for the same method and sizes. Its parameters stay the same
            objects, on their device and in their dtype.
        state: names to tensors (or NumPy arrays), as `torch.load(..., weights_only=True)` or safetensors return them.
        strict: False reports missing and unexpected names instead of raising.

    Raises:
        TypeError: `model` is not a PromptModel, or `state` is not a mapping.
        ValueError: the state is for another method or other options, has wrong shapes or dtypes, contains NaN or
            infinity, has an incomplete backbone or head, lacks trained parameters or has unexpected names (if
            `strict`), or shares no name with the model. One message lists every problem; the model is unchanged.
    """
    if not isinstance(model, PromptModel):
        raise TypeError(
            f"{CALLER}: `model` must be a PromptModel; got {type(model).__name__}; "
            "make one with `fastprompt.get_prompt_model`"
        )
    plan = _Plan(model, _unwrap(state))
    problems = list(plan.problems)
    if strict or not plan.copies:
        problems += [f"unexpected: {key}" for key in plan.unexpected]
        problems += [] if plan.pretraining else plan.missing_lines()
    if problems or not plan.copies:
        advice = " (strict=False loads the rest)" if plan.copies and not plan.problems else ""
        lines = problems or ["the state shares no name with the model"]
        raise ValueError(f"{CALLER}: nothing was loaded{advice}:\n" + "\n".join(f"- {p}" for p in lines))
    with torch.no_grad():
        for target, value in plan.copies:
            target.copy_(value)
    missing = dict.fromkeys(piece.owner for piece in plan.missing)
    return LoadReport(tuple(plan.loaded), tuple(missing), tuple(plan.unexpected), tuple(plan.ignored))


class _Plan:
    """The copies to make, the report, and all problems; changes nothing."""

    def __init__(self, model: PromptModel, state: Mapping[str, Any]) -> None:
        names = common_names(state)
        self.model = model
        self.present = set(names.values())
        self.layout = format_of(model, self.present)
        self.slots = _backbone_slots(model) | _method_slots(model, self.layout)
        of_a_method = any(f.knows(name) for f in FORMATS for name in self.present)
        self.pretraining = not of_a_method and any(
            name in self.slots and not name.startswith(HEADS) for name in self.present
        )
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.problems: list[str] = []  # errors even with strict=False
        self.loaded: list[str] = []
        self.missing: list[_Piece] = []
        self.unexpected: list[str] = []
        self.ignored: list[str] = []
        self.values: dict[str, Tensor] = {}
        # CVPT's copies of the attention come last, because they are compared with the attention.
        for key, name in sorted(names.items(), key=lambda item: CROSS.fullmatch(item[1]) is not None):
            self._add(key, name, state[key])
        self._check_backbone_and_missing()
        self._check_head(names)

    def _add(self, key: str, name: str, raw: Any) -> None:
        """Plan the copy of one entry of the state."""
        value = _as_tensor(name, raw)
        if value is None and name in self.slots:
            self.problems.append(f"{key}: is a {type(raw).__name__} without values; a tensor is needed")
        elif value is None:
            self.unexpected.append(key)
        elif value.numel() == 0 or self._is_not_needed(name):
            self.ignored.append(key)
        elif cross := CROSS.fullmatch(name):
            self._check_copy_of_attention(key, f"{cross[1]}attn.{cross[2]}", value)
        elif name not in self.slots and self.layout and name in self.layout.names:
            option = self.layout.names[name].option or "`num_prompts`"
            self.problems.append(
                f"{key}: the model has no such parameter; check {option} of the configuration"
            )
        elif name not in self.slots:
            self.unexpected.append(key)
        elif any(piece.name in self.values for piece in self.slots[name]):
            self.problems.append(f"{key}: the state contains the same parameter under another name")
        else:
            self._place(key, name, value)

    def _place(self, key: str, name: str, value: Tensor) -> None:
        pieces = self.slots[name]
        shape = pieces[0].tensor.shape
        rows = [len(piece.tensor) for piece in pieces] if len(pieces) > 1 else []
        if rows:
            shape = torch.Size((sum(rows), *shape[1:]))
        reason = self._shape_reason(name, value.shape, shape) or _value_reason(value, pieces[0].tensor)
        parts = value.split(rows) if rows and reason is None else [value] * len(pieces)
        self.values.update((piece.name, part) for piece, part in zip(pieces, parts, strict=True))
        if reason is None and name == CLASS_MAP:
            reason = _mapping_reason(value, self.slots["vpt_criterion.centroids"][0].tensor.shape[0])
        if reason is not None:
            self.problems.append(f"{key}: {reason}")
            return
        self.copies += [(piece.tensor, part) for piece, part in zip(pieces, parts, strict=True)]
        self.loaded.append(key)

    def _shape_reason(self, name: str, got: torch.Size, needed: torch.Size) -> str | None:
        if got == needed:
            return None
        of_method = self.layout.names[name].sizes if self.layout and name in self.layout.names else None
        sizes = BACKBONE_SIZES.get(name.replace("last_layer.", ""), ()) if of_method is None else of_method
        advice = "build the timm model that the state belongs to"
        if len(sizes) == len(got) == len(needed):
            differing = [s for s, a, b in zip(sizes, got, needed, strict=True) if a != b and s]
            advice = f"check {' and '.join(differing)}" if differing else advice
        return f"is {tuple(got)}, the model's is {tuple(needed)}; {advice}"

    def _is_not_needed(self, name: str) -> bool:
        packed = PACKED.fullmatch(name)
        if packed and f"{packed[1]}q.{packed[2]}" in self.present:
            return True  # DA-VPT saves the packed maps of pretraining, but computes with separate ones
        if not self.pretraining:
            return False
        if name.startswith("norm.") and "norm.weight" not in self.slots:
            return self._starts_anew(f"fc_{name}")
        return name.startswith(HEADS) or PRETRAINING.match(name) is not None

    def _starts_anew(self, name: str) -> bool:
        """Return whether `name` is a norm after the mean, which pretraining does not have: MAE and VPT reset it."""
        return (
            name.startswith("fc_norm.")
            and name not in self.present
            and name.removeprefix("fc_") in self.present
        )

    def _check_copy_of_attention(self, key: str, name: str, value: Tensor) -> None:
        """Compare a weight of CVPT's cross-attention with `name`, the block's own weight, which it shares here."""
        own = self.values.get(name, self.slots[name][0].tensor if name in self.slots else None)
        same = own is not None and own.shape == value.shape and _value_reason(value, own) is None
        if own is None or not same or not torch.equal(own, value.to(own)):
            self.problems.append(
                f"{key}: differs from the block's own attention weight, which CVPT shares here"
            )
        self.ignored.append(key)

    def _check_backbone_and_missing(self) -> None:
        """Record the trained parameters that the state lacks; an incomplete backbone is an error."""
        pieces = {piece.name: piece for slot in self.slots.values() for piece in slot}.values()
        with_backbone = self.pretraining or any(p.frozen and p.name in self.values for p in pieces)
        lacking: dict[str, None] = {}
        for piece in pieces:
            if piece.name in self.values or (self.pretraining and self._starts_anew(piece.name)):
                continue
            if with_backbone and piece.owner.startswith("base.") and not piece.name.startswith(HEADS):
                lacking[piece.owner] = None
            elif piece.trained:
                self.missing.append(piece)
        if not lacking:
            return
        advice = "pass the whole backbone, or only what was trained"
        if "base.fc_norm.weight" in lacking and "norm.weight" in self.present:
            advice = "its norm is before the mean: build the timm model with global_pool='avg', fc_norm=False"
        elif "base.norm.weight" in lacking and "fc_norm.weight" in self.present:
            advice = "its norm is after the mean: build the timm model with global_pool='avg', fc_norm=True"
        elif isinstance(self.model.config, DAVPTConfig):
            advice += " (tuned biases need tune='prompts+biases')"
        self.problems.append(f"incomplete backbone, without {some(lacking)}; {advice}")

    def _check_head(self, names: Mapping[str, str]) -> None:
        """Record an error if the state's head has more layers than the model's."""
        loaded = any(names[key].startswith(HEADS) for key in self.loaded)
        rest = [key for key in self.unexpected if names[key].startswith(HEADS)]
        if loaded and rest and not self.pretraining:
            self.unexpected = [key for key in self.unexpected if key not in rest]
            self.problems.append(
                f"incomplete head: the model's has no {some(rest)}; give the timm model a head with the state's layers "
                "and names before `get_prompt_model`, or remove every key of the head from the state and pass "
                "strict=False"
            )

    def missing_lines(self) -> list[str]:
        """Return one line for each parameter of the head or the backbone, and for each official name."""
        lines: list[str] = []
        names = self.layout.names if self.layout else {}
        official = {piece.owner: name for name in names for piece in self.slots.get(name, ())}
        for name, group in groupby(self.missing, lambda piece: official.get(piece.owner, "")):
            owners = list(dict.fromkeys(piece.owner for piece in group))
            if not name:
                lines += [f"missing: {owner}" for owner in owners]
                continue
            advice = f"; check {names[name].option} of the configuration" if names[name].option else ""
            lines.append(f"missing: {name} ({some(owners)}){advice}")
        return lines


def _unwrap(state: Any) -> Mapping[str, Any]:
    """Return the mapping under "model" or "state_dict", if there is one, else `state`."""
    if isinstance(state, nn.Module):
        raise TypeError(
            f"{CALLER}: `state` must map names to tensors; got {type(state).__name__}, a whole module; "
            "pass its `.state_dict()`"
        )
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{CALLER}: `state` must map names to tensors; got {type(state).__name__}; "
            "read it with `torch.load(path, weights_only=True)` or `safetensors.torch.load_file(path)`"
        )
    for key in ("model", "state_dict"):
        if isinstance(state.get(key), Mapping | nn.Module):
            return _unwrap(state[key])
    return state


def _backbone_slots(model: PromptModel) -> _Slots:
    """Map each possible name of the backbone or the head in a state to the model's tensors for it."""
    slots: _Slots = {}
    for name, tensor in model.base.state_dict(keep_vars=True).items():
        owner, trained, tensor = f"base.{name}", tensor.requires_grad, tensor.detach()
        packed = PACKED.fullmatch(name)
        if packed is None:
            short, head = rename(name), name.startswith(HEADS)
            slots[short] = (_Piece(short, owner, tensor, trained or head, not (trained or head)),)
            continue
        attn = model.base.get_submodule(packed[1].removesuffix("."))
        for part, third in zip("qkv", tensor.chunk(3), strict=True):
            short = f"{packed[1]}{part}.{packed[2]}"
            untrained = part == "q" and packed[2] == "bias" and getattr(attn, vit.FROZEN_QUERY_BIAS, False)
            slots[short] = (_Piece(short, owner, third, trained and not untrained, not trained),)
    for query in [name for name in slots if ".attn.q." in name]:
        parts = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in slots for part in parts):
            slots[query.replace(".attn.q.", ".attn.qkv.")] = tuple(p for part in parts for p in slots[part])
    aliases = {"head.last_layer.": "head."}  # VPT's name for a head of one layer
    if isinstance(model.config, GateVPTConfig) and "norm.weight" not in slots:
        # Its code normalizes the mean with the backbone's own norm, which timm calls fc_norm.
        aliases["norm."] = "fc_norm."
    for theirs, ours in aliases.items():
        for kind in ("weight", "bias"):
            if ours + kind in slots:
                slots.setdefault(theirs + kind, slots[ours + kind])
    return {name: pieces for name, pieces in slots.items() if all(p.tensor.numel() for p in pieces)}


def _method_slots(model: PromptModel, layout: Format | None) -> _Slots:
    """Map each of the layout's official names to the model's tensors for it, if the model has them."""
    own = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name.startswith("class_")
    }
    slots: _Slots = {}
    for official, (holds, _, _) in (layout.names if layout else {}).items():
        names = [holds] if isinstance(holds, str) else [f"prompts.{i}" for i in holds(model)]
        tensors = {name: own[name] for name in names if name in own and own[name].numel() > 0}
        pieces = tuple(
            _Piece(name, name, t.detach() if isinstance(holds, str) else t.detach()[None], t.requires_grad)
            for name, t in tensors.items()
        )
        if pieces:
            slots[official] = pieces
    return slots


def _as_tensor(name: str, value: Any) -> Tensor | None:
    """Convert a tensor, an array or the list of a class map to a tensor; None for anything else."""
    if isinstance(value, Tensor):
        return None if value.is_meta else value
    if not hasattr(value, "__array_interface__") and not (name == CLASS_MAP and isinstance(value, list)):
        return None
    try:
        return torch.as_tensor(value.copy())  # a copy has no negative strides
    except (TypeError, ValueError):  # strings, objects
        return None


def _value_reason(value: Tensor, target: Tensor) -> str | None:
    """Return why `value` cannot be copied into `target`, apart from its shape; None if it can."""
    if value.layout is not torch.strided:
        return "is sparse; pass its `.to_dense()`"
    if not target.is_floating_point():
        return f"is {value.dtype}; integers are needed" if value.is_complex() or value.is_quantized else None
    if not value.is_floating_point():
        return f"is {value.dtype}; a floating-point dtype is needed"
    if not value.to(target.dtype).isfinite().all():
        return f"contains NaN or infinity as {target.dtype}; the file is broken or its training diverged"
    return None


def _mapping_reason(mapping: Tensor, prompts: int) -> str | None:
    if ((mapping == mapping.long()) & (mapping >= 0) & (mapping < prompts)).all():
        return None
    return f"must be prompts in 0..{prompts - 1} for all classes; check `num_proxy_prompts`"
