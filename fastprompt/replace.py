"""Run the attention of timm models with this package's kernels, module by module.

A replaced module stays the same object, with its parameters, buffers, hooks and state_dict keys. Only its class
changes, to a subclass of timm's class whose `forward` runs the kernels. This works with `.to()`, `.half()`,
`copy.deepcopy`, pickling, `torch.compile`, torch.fx and gradient checkpointing; changing the class back undoes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import torch
from timm.layers import AttentionPoolLatent, AttentionRope, register_notrace_module
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolPrr
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.fx import GraphModule, Proxy

from fastprompt import vit
from fastprompt.ops import dispatch
from fastprompt.refusals import class_path, is_refused, refusal

# timm's models that call their blocks as the adapters assume; blocks in a user's own module are accepted too.
_OWNERS = (VisionTransformer, VisionTransformerDistilled, Eva, NaFlexVit)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_POOLS = (AttentionPoolLatent, AttentionPoolPrr, AttentionPool2d, RotAttentionPool2d)
_BACKEND, _FALLBACKS = "_fastprompt_backend", "_fastprompt_fallbacks"


def _timm_forward(cls: type[nn.Module]) -> Callable[..., Tensor]:
    """Copy timm's `forward` under a second name: TorchScript compiles methods by name and does not support `super`."""
    forward = cls.forward
    return FunctionType(
        forward.__code__, forward.__globals__, "timm_forward", forward.__defaults__, forward.__closure__
    )


@register_notrace_module
class FastAttention(Attention):
    """timm's `Attention` with this package's kernels; created by :func:`replace_attention`."""

    timm_class: ClassVar[type[nn.Module]] = Attention
    timm_forward = _timm_forward(Attention)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not torch.jit.is_scripting():
            return _forward(self, x, None, attn_mask, is_causal)
        return self.timm_forward(x, attn_mask, is_causal)


@register_notrace_module
class FastAttentionRope(AttentionRope):
    """timm's `AttentionRope` with this package's kernels; created by :func:`replace_attention`."""

    timm_class: ClassVar[type[nn.Module]] = AttentionRope
    timm_forward = _timm_forward(AttentionRope)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if not torch.jit.is_scripting():
            return _forward(self, x, rope, attn_mask, is_causal)
        return self.timm_forward(x, rope, attn_mask, is_causal)


@register_notrace_module
class FastEvaAttention(EvaAttention):
    """timm's `EvaAttention` with this package's kernels; created by :func:`replace_attention`."""

    timm_class: ClassVar[type[nn.Module]] = EvaAttention
    timm_forward = _timm_forward(EvaAttention)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if not torch.jit.is_scripting():
            return _forward(self, x, rope, attn_mask, is_causal)
        return self.timm_forward(x, rope, attn_mask, is_causal)


_FAST = {cls.timm_class: cls for cls in (FastAttention, FastAttentionRope, FastEvaAttention)}


def _forward(attn: Any, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Run the kernels, or timm's `forward` for unsupported calls, which are counted."""
    given = {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal}
    if isinstance(x, Proxy):  # torch.fx's own tracer does not know timm's registry of leaves
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(attn), (x,), _options(given))
    reason = _fallback_reason(attn, attn_mask, is_causal)
    if reason is not None:
        if not torch.compiler.is_compiling():
            getattr(attn, _FALLBACKS)[reason] += 1
        return attn.timm_forward(x, **_options(given))
    out = vit.self_attend(attn, x, rope=rope, backend=getattr(attn, _BACKEND))
    return vit.attention_adapter(attn).finish(attn, out, x)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that differ from their defaults; `Attention.forward` has no `rope`."""
    return {name: value for name, value in given.items() if value is not None and value is not False}


def _fallback_reason(attn: Any, attn_mask: Tensor | None, is_causal: bool) -> str | None:
    if attn_mask is not None:
        return "an attention mask"
    if is_causal:
        return "causal attention"
    if vit.drops_attention(attn):
        return "active attention dropout"
    return None


@dataclass(frozen=True)
class Replacement:
    """One attention module: its name in the model, its class, and why it was skipped (None if it was replaced)."""

    name: str
    cls: str
    reason: str | None


class ReplacementReport:
    """The result of :func:`replace_attention`; prints as a table.

    Attributes:
        replaced, skipped: lists of `Replacement`, in the model's order.
    """

    def __init__(self, model: nn.Module, rows: list[Replacement]) -> None:
        self._model = model
        self.replaced = [r for r in rows if r.reason is None]
        self.skipped = [r for r in rows if r.reason is not None]

    @property
    def reason(self) -> str | None:
        """The reason why nothing was replaced, or None if something was."""
        if self.replaced:
            return None
        if not self.skipped:
            reason = f"no attention modules were recognised in {class_path(self._model)}"
            traced = any(isinstance(m, GraphModule | torch.jit.ScriptModule) for m in self._model.modules())
            return f"{reason}; replace attention before tracing" if traced else reason
        return "; ".join(dict.fromkeys(r.reason for r in self.skipped if r.reason))

    def fallback_calls(self) -> dict[str, int]:
        """Count the calls that ran timm's own `forward`, by reason; compiled calls are not counted."""
        calls: Counter[str] = Counter()
        for module in self._model.modules():
            calls.update(getattr(module, _FALLBACKS, {}))
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
        calls = [f"{reason} ({count})" for reason, count in self.fallback_calls().items()]
        if calls:
            lines.append(f"calls of timm's own forward: {', '.join(calls)}")
        return "\n".join(lines)

    __repr__ = __str__


def replace_attention(
    model: nn.Module, *, backend: str = dispatch.AUTO, strict: bool = False
) -> ReplacementReport:
    """Run the self-attention of timm blocks with this package's kernels; weights and state_dict keys are kept.

    Args:
        model: a timm model, or any module that contains timm blocks.
        backend: "auto", or the backend that runs every call (:func:`fastprompt.backends`).
        strict: raise if any attention module would be skipped, or if there is none.

    Returns:
        A report of the replaced and the skipped modules, with the reasons. Modules may be replaced again.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `backend` is unknown.
        NotImplementedError: `backend` cannot run attention here, or `strict` and a module would be skipped.
        Errors are raised before anything is changed.
    """
    _check_model(model, "replace_attention")
    dispatch.check_name(backend, "replace_attention")
    if backend != dispatch.AUTO:
        reason = dispatch.why_missing("prompt_attention", backend)
        if reason is not None:
            raise NotImplementedError(
                f"`replace_attention`: backend {backend!r} does not support attention: {reason}; use 'auto' or 'eager'"
            )
    found = _attention_modules(model)
    report = ReplacementReport(model, [Replacement(n, class_path(m), r) for n, m, r in found])
    if strict and (report.skipped or not report.replaced):
        raise NotImplementedError(
            f"`replace_attention`: strict=True, and {report.reason or 'some modules would be skipped'}\n{report}\n"
            "nothing was changed; use strict=False to replace the supported modules only"
        )
    for _, module, reason in found:
        if reason is None:
            module.__class__ = _FAST[vit.timm_class(module)]
            setattr(module, _BACKEND, backend)
            setattr(module, _FALLBACKS, Counter())
    return report


def restore_attention(model: nn.Module) -> int:
    """Undo :func:`replace_attention`; return the number of restored modules."""
    _check_model(model, "restore_attention")
    replaced = [m for m in model.modules() if type(m) in _FAST.values()]
    for module in replaced:
        delattr(module, _BACKEND)
        delattr(module, _FALLBACKS)
        module.__class__ = vit.timm_class(module)
    return len(replaced)


def _check_model(model: object, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`{caller}`: `model` must be an nn.Module; got {model!r:.80}; "
            "pass the model itself, such as timm.create_model(...) returns"
        )


def _attention_modules(model: nn.Module) -> list[tuple[str, nn.Module, str | None]]:
    """List the self-attention modules of `model`: name, module, and why it cannot be replaced (None if it can)."""
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
    """Return whether `module` is reported as attention; heads that pool by attention are not.

    An unknown class counts if its name says so and it contains no known attention: it may be a user's whole model.
    """
    if isinstance(module, _POOLS):
        return False
    if vit.timm_class(module) in vit.ATTENTION or is_refused(module):
        return True
    named = "attention" in type(module).__name__.lower()
    return named and not any(vit.timm_class(m) in vit.ATTENTION for m in module.modules())


def _replacement_reason(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    reason = vit.attention_reason(module)
    if reason is not None or name == "":
        return reason
    block_name = name.rpartition(".")[0]
    block = modules[block_name]
    if type(block) not in vit.BLOCKS:
        return refusal(block, vit.BLOCKS)
    owner = _owner(block_name, modules)
    if owner is not None and type(owner).__module__.startswith("timm.") and type(owner) not in _OWNERS:
        return refusal(owner, _OWNERS)
    return None


def _owner(name: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    """Return the innermost module that contains `name` and is not just a container."""
    while name:
        name = name.rpartition(".")[0]
        if type(modules[name]) not in _CONTAINERS:
            return modules[name]
    return None
