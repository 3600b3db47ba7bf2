"""Fast, exact visual prompt tuning of timm Vision Transformers.

Names and submodules are imported on first use, so that `fastprompt --help` does not import torch and timm. Programs
that use only the operators in `torch.ops.fastprompt` must import `fastprompt.ops`.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastprompt.calibration.calibrate import calibrate
    from fastprompt.checkpoint import load_official_state_dict
    from fastprompt.config import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, VPTConfig
    from fastprompt.encoder import as_encoder
    from fastprompt.model import FoldedPromptModel, PromptModel, PromptOutput, get_prompt_model
    from fastprompt.ops.dispatch import backends, use_backend
    from fastprompt.replace import ReplacementReport, replace_attention, restore_attention

try:
    __version__ = version("fastprompt")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CVPTConfig",
    "DAVPTConfig",
    "FoldedPromptModel",
    "GateVPTConfig",
    "PromptConfig",
    "PromptModel",
    "PromptOutput",
    "ReplacementReport",
    "VPTConfig",
    "as_encoder",
    "backends",
    "calibrate",
    "get_prompt_model",
    "load_official_state_dict",
    "replace_attention",
    "restore_attention",
    "use_backend",
]

# The names of the imports above, by module.
_EXPORTS = {
    "calibration.calibrate": ["calibrate"],
    "checkpoint": ["load_official_state_dict"],
    "config": ["CVPTConfig", "DAVPTConfig", "GateVPTConfig", "PromptConfig", "VPTConfig"],
    "encoder": ["as_encoder"],
    "model": ["FoldedPromptModel", "PromptModel", "PromptOutput", "get_prompt_model"],
    "ops.dispatch": ["backends", "use_backend"],
    "replace": ["ReplacementReport", "replace_attention", "restore_attention"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name, or the submodule `name`."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"fastprompt.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return import_module(f"fastprompt.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"fastprompt.{name}":  # the submodule exists and lacks a dependency
                raise
    raise AttributeError(
        f"module 'fastprompt' has no attribute {name!r}", name=name, obj=sys.modules[__name__]
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
