"""Fast, exact visual prompt tuning of timm Vision Transformers."""

from importlib.metadata import PackageNotFoundError, version

from fastprompt.checkpoint import load_official_state_dict
from fastprompt.config import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, VPTConfig
from fastprompt.encoder import as_encoder
from fastprompt.model import FoldedPromptModel, PromptModel, PromptOutput, get_prompt_model
from fastprompt.ops.dispatch import backends, use_backend
from fastprompt.replace import ReplacementReport, replace_attention, restore_attention

try:
    __version__ = version("fastprompt")
except PackageNotFoundError:  # an uninstalled checkout
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
    "get_prompt_model",
    "load_official_state_dict",
    "replace_attention",
    "restore_attention",
    "use_backend",
]
