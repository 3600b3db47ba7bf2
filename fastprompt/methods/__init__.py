"""The methods, one file each: their prompts, and how a model's blocks run with them."""

from fastprompt.methods.base import MODELS, FoldedPromptModel, PromptModel, PromptOutput
from fastprompt.methods.cvpt import CVPTModel
from fastprompt.methods.da_vpt import DAVPTModel
from fastprompt.methods.gate_vpt import GateVPTModel
from fastprompt.methods.vpt import VPTModel

__all__ = [
    "MODELS",
    "CVPTModel",
    "DAVPTModel",
    "FoldedPromptModel",
    "GateVPTModel",
    "PromptModel",
    "PromptOutput",
    "VPTModel",
]
