"""Compare a method with its form in the papers: first the results, then the time of a training step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bench.correctness import Oracle
from bench.measure import interleaved
from bench.papers import paper_model
from fastprompt import PromptModel
from fastprompt.training.loop import adamw


@dataclass(frozen=True)
class Comparison:
    """Times of the fastest training steps in milliseconds, and the largest absolute differences in float32."""

    step_ms: float
    paper_step_ms: float
    logit_difference: float
    gradient_difference: float

    @property
    def ratio(self) -> float:
        """The step time of the papers' form, divided by fastprompt's."""
        return self.paper_step_ms / self.step_ms


def compare(model: PromptModel, images: Tensor, labels: Tensor, *, rounds: int) -> Comparison:
    """Compare `model` with its papers' form on one batch; updates `model`.

    Raises `bench.correctness.WrongResult` if logits or gradients are less accurate than those of the papers' form.
    """
    paper, exact = paper_model(model).train(), paper_model(model).double().train()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    theirs = _logits_and_loss_of(paper, images, labels)
    oracle = Oracle(theirs, trained, exact=_logits_and_loss_of(exact, images.double(), labels))
    found = oracle.evaluate(_logits_and_loss_of(model.train(), images, labels))
    oracle.check(found)
    differences = {name: float((found[name] - t).abs().max()) for name, t in oracle.evaluate(theirs).items()}
    gradients = [value for name, value in differences.items() if name.startswith("gradient")]
    step, paper_step = step_times([model, paper], images, labels, rounds=rounds)
    return Comparison(step, paper_step, differences["output 0"], max(gradients))


def step_times(models: Sequence[nn.Module], images: Tensor, labels: Tensor, *, rounds: int) -> list[float]:
    """Return the time of each model's fastest training step in milliseconds; updates the models.

    On a CPU this is processor time, which excludes waiting for other programs.
    """
    steps = {str(i): _training_step(model.train(), images, labels) for i, model in enumerate(models)}
    times = interleaved(steps, rounds, images.device.type, graphs=False)
    return [time.get("cpu_min", time["min"]) for time in times.values()]


def _training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        if isinstance(model, VisionTransformer):
            loss = F.cross_entropy(model(images), labels)
        else:
            output = model(images, labels=labels)
            loss = F.cross_entropy(output.logits, labels) + output.method_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def _logits_and_loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[..., Any]:
    """Return the function from trained parameters to logits and loss; every call draws the same dropout masks."""

    def function(**parameters: Tensor) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(0)
            output = functional_call(model, parameters, (images,), {"labels": labels})
        return output.logits, F.cross_entropy(output.logits, labels) + output.method_loss

    return function
