"""The methods: each file holds one, its prompts and how a model's blocks run with them."""

from fastprompt.methods.cvpt import CVPT
from fastprompt.methods.da_vpt import DAVPT
from fastprompt.methods.gate_vpt import GateVPT
from fastprompt.methods.method import METHODS, PromptMethod, method_for
from fastprompt.methods.vpt import VPT

__all__ = ["CVPT", "DAVPT", "METHODS", "VPT", "GateVPT", "PromptMethod", "method_for"]
