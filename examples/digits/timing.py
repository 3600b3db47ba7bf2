"""Compare a method with its form in the papers: first the results, then the time of a training step."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from bench.correctness import assert_same
from bench.papers import paper_model
from fastprompt import PromptModel
from fastprompt.calibration.timing import interleaved
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

    Raises `bench.correctness.WrongResult` if the two differ in float64 by more than rounding.
    """
    paper = paper_model(model)
    wide, images64 = copy.deepcopy(model).double(), images.double()
    assert_same(_results(wide, images64, labels), _results(paper_model(wide), images64, labels))
    ours, theirs = _results(model, images, labels), _results(paper, images, labels)
    logits, *gradients = (float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    step, paper_step = step_times([model, paper], images, labels, rounds=rounds)
    return Comparison(step, paper_step, logits, max(gradients))


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
        _, loss = _logits_and_loss(model, images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def _results(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the logits and the gradient of each trained parameter; every call draws the same dropout masks."""
    trained = {name: p for name, p in model.train().named_parameters() if p.requires_grad}
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        logits, loss = _logits_and_loss(model, images, labels)
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return {"logits": logits.detach(), **dict(zip(trained, gradients, strict=True))}


def _logits_and_loss(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [B, classes], and the cross-entropy plus the method's loss; timm's models have none."""
    if isinstance(model, VisionTransformer):
        logits: Tensor = model(images)
        return logits, F.cross_entropy(logits, labels)
    output = model(images, labels=labels)
    return output.logits, F.cross_entropy(output.logits, labels) + output.method_loss
