"""`replace_attention(model)`: the attention of timm blocks by this package's kernels, instance by instance.

A replaced module keeps its identity, its parameters, buffers, hooks and state_dict keys; only its class changes, to a
subclass whose `forward` runs the kernels. That survives `.to()`, `.half()`, `copy.deepcopy`, pickling, `torch.compile`
and gradient checkpointing, and is undone by changing the class back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, AttentionRope
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolPrr
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastprompt import vit
from fastprompt.ops import dispatch

# timm's models whose use of their blocks is known; blocks in a user's own module are taken as they are.
_OWNERS = (VisionTransformer, VisionTransformerDistilled, Eva, NaFlexVit)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_POOLS = (AttentionPoolLatent, AttentionPoolPrr, AttentionPool2d, RotAttentionPool2d)
_BACKEND, _OWN_PATH = "_fastprompt_backend", "_fastprompt_own_path"


def _forward(attn: Any, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """The replaced `forward`: kernels, or timm's own path, counted, for what they do not serve."""
    reason = _own_path_reason(attn, attn_mask, is_causal)
    if reason is not None:
        if not torch.compiler.is_compiling():
            getattr(attn, _OWN_PATH)[reason] += 1
        options: dict[str, Any] = {"attn_mask": attn_mask}
        if rope is not None:
            options["rope"] = rope
        if is_causal:
            options["is_causal"] = True
        return _original(attn).forward(attn, x, **options)
    adapter = vit.ATTENTION[type(attn)]
    out = vit.self_attend(attn, x, rope=rope, backend=getattr(attn, _BACKEND))
    return adapter.finish(attn, out, x)


def _own_path_reason(attn: Any, attn_mask: Tensor | None, is_causal: bool) -> str | None:
    if attn_mask is not None:
        return "an attention mask"
    if is_causal:
        return "causal attention"
    if vit.drops_attention(attn):
        return "active attention dropout"
    return None


class FastAttention(Attention):
    """timm's `Attention`, run by fastprompt; made by :func:`replace_attention`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return _forward(self, x, None, attn_mask, is_causal)


class FastAttentionRope(AttentionRope):
    """timm's `AttentionRope`, run by fastprompt; made by :func:`replace_attention`."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return _forward(self, x, rope, attn_mask, is_causal)


class FastEvaAttention(EvaAttention):
    """timm's `EvaAttention`, run by fastprompt; made by :func:`replace_attention`."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return _forward(self, x, rope, attn_mask, is_causal)


_FAST: dict[type, type] = {
    Attention: FastAttention,
    AttentionRope: FastAttentionRope,
    EvaAttention: FastEvaAttention,
}
_ORIGINAL = {fast: original for original, fast in _FAST.items()}
vit.ATTENTION.update({fast: vit.ATTENTION[original] for original, fast in _FAST.items()})


@dataclass(frozen=True)
class Replacement:
    """One attention module: its name in the model, its class, and the reason why it was skipped, None if it was not."""

    name: str
    cls: str
    reason: str | None


class ReplacementReport:
    """What :func:`replace_attention` did, module by module; prints as a table.

    Attributes:
        replaced, skipped: the `Replacement`s of each kind, in the model's order.
    """

    def __init__(self, model: nn.Module, rows: list[Replacement]) -> None:
        self._model = model
        self.replaced = [r for r in rows if r.reason is None]
        self.skipped = [r for r in rows if r.reason is not None]

    @property
    def reason(self) -> str | None:
        """Why nothing at all was replaced, or None if something was."""
        if self.replaced:
            return None
        if not self.skipped:
            return f"no attention modules were recognised in {vit.class_path(self._model)}"
        return "; ".join(dict.fromkeys(r.reason for r in self.skipped if r.reason))

    def own_path_calls(self) -> dict[str, int]:
        """How many calls took timm's own path since the replacement, by reason; compiled calls are not counted."""
        calls: Counter[str] = Counter()
        for module in self._model.modules():
            calls.update(getattr(module, _OWN_PATH, {}))
        return dict(calls)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} attention modules, skipped {len(self.skipped)}"]
        groups = Counter((r.cls, r.reason) for r in (*self.replaced, *self.skipped))
        first = {(r.cls, r.reason): r.name for r in reversed((*self.replaced, *self.skipped))}
        if groups:
            table = [("modules", "first", "class", "action")]
            for (cls, reason), count in groups.items():
                action = "replaced" if reason is None else "skipped: " + reason.removeprefix(f"{cls}: ")
                table.append((str(count), first[cls, reason] or "(the model)", cls, action))
            widths = [max(len(row[i]) for row in table) for i in range(3)]
            lines += [
                "  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3])) for row in table
            ]
        for reason, count in self.own_path_calls().items():
            lines.append(f"{count} calls took timm's own path: {reason}")
        return "\n".join(lines)

    __repr__ = __str__


def replace_attention(
    model: nn.Module, *, backend: str = dispatch.AUTO, strict: bool = False
) -> ReplacementReport:
    """Run the self-attention of a timm model's blocks by this package's kernels; weights and state_dict keys are kept.

    Args:
        model: a timm model, or any module that holds timm blocks.
        backend: "auto", or the backend that has to serve every call (:func:`fastprompt.backends`).
        strict: raise if anything would be skipped, or if there is nothing to replace.

    Returns:
        A report of what was replaced, and what was skipped and why. Replacing twice is harmless.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `backend` is unknown.
        NotImplementedError: `strict` and something would be skipped, or the named backend cannot serve attention here.
        In each case before anything is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`replace_attention`: `model` must be an nn.Module; got {type(model).__name__}")
    dispatch.check_name(backend, "replace_attention")
    if backend != dispatch.AUTO:
        reason = dispatch.why_missing("prompt_attention", backend)
        if reason is not None:
            raise NotImplementedError(
                f"`replace_attention`: backend {backend!r} cannot serve attention: {reason}; use 'auto' or 'eager'"
            )
    found = _attention_modules(model)
    report = ReplacementReport(model, [Replacement(n, vit.class_path(m), r) for n, m, r in found])
    if strict and (report.skipped or not report.replaced):
        raise NotImplementedError(
            f"`replace_attention`: strict=True, and {report.reason or 'some modules would be skipped'}\n{report}\n"
            "nothing was changed; use strict=False to replace what can be"
        )
    for _, module, reason in found:
        if reason is None:
            attn: Any = module
            attn.__class__ = _FAST.get(type(attn), type(attn))
            setattr(attn, _BACKEND, backend)
            setattr(attn, _OWN_PATH, Counter())
    return report


def restore_attention(model: nn.Module) -> int:
    """Undo :func:`replace_attention`; returns the number of modules that were restored (0 if none was replaced)."""
    restored = 0
    for module in model.modules():
        if type(module) in _ORIGINAL:
            delattr(module, _BACKEND)
            delattr(module, _OWN_PATH)
            module.__class__ = _ORIGINAL[type(module)]
            restored += 1
    return restored


def _original(attn: object) -> Any:
    return _ORIGINAL[type(attn)]


def _attention_modules(model: nn.Module) -> list[tuple[str, nn.Module, str | None]]:
    """Each self-attention module of `model`: its name, itself, and why it cannot be replaced, or None."""
    found: list[tuple[str, nn.Module, str | None]] = []
    modules = dict(model.named_modules())
    inside: set[int] = set()
    for name, module in modules.items():
        if id(module) in inside or not _is_attention(module):
            continue
        inside.update(id(m) for m in module.modules())
        found.append((name, module, _replacement_reason(name, module, modules)))
    return found


def _is_attention(module: nn.Module) -> bool:
    """Attention by class, or a block that is known for its own kind; heads that pool by attention are not.

    A class that is only called attention counts if it holds none: it may be a user's whole model.
    """
    if isinstance(module, _POOLS):
        return False
    if type(module) in vit.ATTENTION or vit.is_refused(module):
        return True
    named = "attention" in type(module).__name__.lower()
    return named and not any(type(m) in vit.ATTENTION for m in module.modules())


def _replacement_reason(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    reason = vit.attention_reason(module)
    if reason is not None or name == "":
        return reason
    block_name = name.rpartition(".")[0]
    block = modules[block_name]
    if type(block) not in vit.BLOCKS:
        return vit.refusal(block)
    owner = _owner(block_name, modules)
    if owner is not None and type(owner).__module__.startswith("timm.") and type(owner) not in _OWNERS:
        return vit.refusal(owner)
    return None


def _owner(name: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The innermost module around `name` that is not a mere container."""
    while name:
        name = name.rpartition(".")[0]
        if type(modules[name]) not in _CONTAINERS:
            return modules[name]
    return None
