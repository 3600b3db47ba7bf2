"""What every method does alike: on each served family it works, or is refused with the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from timm_families import CLASSES, PROMPTABLE, images, small
from torch._dynamo.backends.common import aot_autograd

import fastprompt
from bench.correctness import assert_same
from fastprompt import CVPTConfig, DAVPTConfig, GateVPTConfig, PromptConfig, VPTConfig

METHODS: dict[str, PromptConfig] = {
    "vpt": VPTConfig(3),
    "gate-vpt": GateVPTConfig(3, dropout=0.0),
    "cvpt": CVPTConfig(3),
    "da-vpt": DAVPTConfig(3, 4, (1, 1)),
    "da-vpt-plus": DAVPTConfig(3, 4, (0, 1), prompt_norm="layer", tune="prompts+biases", class_feature="key"),
}
REASONS = {
    "cvpt": "CVPT's",  # no cross-attention is defined with q/k norm, output norm, gate, norm after the branches
    "da-vpt": r"needs a class token|queries and keys are \d+ wide",
    "da-vpt-plus": r"needs a class token|queries and keys are \d+ wide",
}


def model_or_reason(base: Any, method: str) -> Any:
    try:
        return fastprompt.get_prompt_model(base, METHODS[method])
    except NotImplementedError as error:
        return str(error)


@pytest.mark.parametrize("family", PROMPTABLE)
@pytest.mark.parametrize("method", METHODS)
def test_trains_on_the_family_or_says_why_not(method: str, family: str) -> None:
    base: Any = small(family)
    model = model_or_reason(base, method)
    if isinstance(model, str):
        assert re.search(REASONS[method], model), model
        assert all(p.requires_grad for p in base.parameters()), "nothing was changed"
        return
    if method == "cvpt":
        attn = base.blocks[0].attn
        assert all(type(getattr(attn, n)) is torch.nn.Identity for n in ("q_norm", "k_norm", "norm"))
    model.train()
    x, labels = images(4), torch.arange(4)
    output = model(x, labels=labels)
    assert output.logits.shape == (4, CLASSES)
    (output.logits.square().sum() + output.method_loss).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
    assert all(p.grad.any() for p in model.prompts)
    model.eval()
    with torch.no_grad():
        logits = model(x)
        assert_same(model.forward_head(model.forward_features(x)), logits)
        assert_same(model.fold()(x), logits)


@pytest.mark.parametrize("method", METHODS)
def test_configuration_survives_json(method: str) -> None:
    config = METHODS[method]
    assert PromptConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_restores_the_method(method: str) -> None:
    model = fastprompt.get_prompt_model(small("vit"), METHODS[method]).eval()
    other = fastprompt.get_prompt_model(small("vit", seed=3), METHODS[method]).eval()
    assert not torch.allclose(other(images()), model(images()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))


def gradients(model: Any, function: Any) -> list[torch.Tensor]:
    output = function(images(), labels=torch.arange(2))
    loss = output.logits.square().sum() + output.method_loss
    return [output.logits, *torch.autograd.grad(loss, list(model.prompts))]


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(method: str) -> None:
    model: Any = fastprompt.get_prompt_model(small("vit"), METHODS[method]).eval()
    plain = gradients(model, model)
    model.base.set_grad_checkpointing(True)
    assert_same(gradients(model, model), plain)


def recorded(found: list[str]) -> Any:
    """Return a compiler backend that collects the operators of forward and backward, and runs them as they are."""

    def compile(graph: Any, inputs: Any) -> Any:
        found.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compile, bw_compiler=compile)


@pytest.mark.parametrize("method", [*list(METHODS)[:-1], pytest.param("da-vpt-plus", marks=pytest.mark.slow)])
def test_compiles_as_one_graph_of_plain_pytorch_and_attention(method: str) -> None:
    """An operator of ours is a fence for a compiler: only attention with prompts is worth one, and CVPT has none."""
    torch._dynamo.reset()
    model: Any = fastprompt.get_prompt_model(small("vit"), METHODS[method]).eval()
    operators: list[str] = []
    compiled = torch.compile(model, fullgraph=True, backend=recorded(operators))
    assert_same(gradients(model, compiled), gradients(model, model))
    assert operators
    ours = {name.removesuffix(".default") for name in operators if name.startswith("fastprompt.")}
    attention = {"fastprompt.packed_prompt_attention", "fastprompt.packed_prompt_attention_backward"}
    assert ours == (set() if method == "cvpt" else attention)


def test_values_that_do_not_fit_the_model_are_refused_unchanged() -> None:
    for config, message in (
        (VPTConfig(3, blocks=3), "`blocks` must be <= 2, the model's depth; got 3"),
        (GateVPTConfig(2, num_gates=3), "`num_gates` must be <= 2"),
        (DAVPTConfig(2, 2, (1, 2)), r"`guided_blocks` must be in 0\.\.1"),
    ):
        base = small("vit")
        with pytest.raises(ValueError, match=message):
            fastprompt.get_prompt_model(base, config)
        assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("temperature", [False, 0.5])
def test_gate_vpt_with_a_fixed_temperature_or_none(temperature: bool | float) -> None:
    model: Any = fastprompt.get_prompt_model(small("vit"), GateVPTConfig(3, temperature=temperature)).eval()
    trained: Any = fastprompt.get_prompt_model(small("vit"), GateVPTConfig(3)).eval()
    assert "temperature" not in dict(model.named_parameters())
    with torch.no_grad():
        trained.prompts[0].copy_(model.prompts[0])
        trained.temperature.fill_(temperature or 1.0)
    assert_same(model(images()), trained(images()))


def test_cvpt_dropout_draws_a_mask_for_each_image_and_takes_the_direct_form() -> None:
    model: Any = fastprompt.get_prompt_model(small("vit"), CVPTConfig(3, dropout=0.5)).train()
    state = model.prepare(4, model._head_input())
    assert state[0].prompts.key.shape[:2] == (4, 3)
    assert not torch.equal(state[0].prompts.key[0], state[0].prompts.key[1])
    model.eval()
    assert model.prepare(4, model._head_input())[0].prompts.key.ndim == 3
