"""An installation without the native library: it imports, says what is missing, and computes the same."""

import sys

import timm
import torch

import fastprompt
from fastprompt import ops
from fastprompt.kernels import native

if not fastprompt.__file__.startswith(sys.prefix) or native.find_library() is not None:
    sys.exit(f"not the pure-Python installation: {fastprompt.__file__}, {native.find_library()}")
print(fastprompt.backends())
if native.load() is None:
    sys.exit("the native library is loaded")

x, delta, prompts = torch.randn(2, 7, 16), torch.randn(2, 7, 16), torch.randn(2, 3, 16)
gate = torch.tensor(0.3)
blended = ops.gated_blend(x, delta, prompts, gate, 1, 3)[0]
torch.testing.assert_close(blended, ops.gated_blend_reference(x, delta, prompts, gate, 1, 3)[0])

backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
model = fastprompt.get_prompt_model(backbone, fastprompt.VPTConfig(num_prompts=2))
model(torch.randn(2, 3, 32, 32)).sum().backward()
if any(p.grad is None for p in model.prompts):
    sys.exit("a prompt got no gradient")
print(f"fastprompt {fastprompt.__version__} runs without its native library")
