"""The demo's clock: whole training steps against the method's twin in the papers' form, after both agree."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastprompt.demo.twins import VPTTwin, twin
from fastprompt.model import PromptModel
from fastprompt.training.loop import adamw, logits_and_loss

# float32 sums in another order; a wrong formula is off by orders of magnitude more.
LOGIT_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """A method against its twin: step times are minima in milliseconds, differences largest absolute values."""

    step_ms: float
    paper_step_ms: float
    logit_difference: float
    gradient_difference: float

    @property
    def ratio(self) -> float:
        """How many times longer the step takes in the papers' form."""
        return self.paper_step_ms / self.step_ms


def compare(model: PromptModel, images: Tensor, labels: Tensor, *, rounds: int) -> Comparison:
    """Time `model` and its twin on one batch, in turns; the model itself is updated by it.

    Raises RuntimeError where logits or a gradient differ: a time is not worth having then.
    """
    other = twin(model)
    model.train()
    other.train()
    logits, gradients = _logits_and_gradients(model, images, labels)
    other_logits, other_gradients = _logits_and_gradients(other, images, labels)
    logit_difference = float((logits - other_logits).abs().max())
    if gradients.keys() != other_gradients.keys():
        raise RuntimeError(f"{model.config}: the twin trains {set(other_gradients)}, not {set(gradients)}.")
    gradient_difference = max(float((gradients[n] - t).abs().max()) for n, t in other_gradients.items())
    logit_bound = LOGIT_TOLERANCE * max(1.0, float(other_logits.abs().max()))
    gradient_bound = GRADIENT_TOLERANCE * max(float(t.abs().max()) for t in other_gradients.values())
    if not (logit_difference <= logit_bound and gradient_difference <= gradient_bound):
        raise RuntimeError(
            f"{model.config}: logits differ from the papers' form by {logit_difference:.2e} (bound {logit_bound:.0e}), "
            f"gradients by {gradient_difference:.2e} (bound {gradient_bound:.0e}); no time is reported."
        )
    steps = [_step(model, images, labels), _step(other, images, labels)]
    ours, theirs = fastest_steps(steps, rounds, _clock(images))
    return Comparison(1e3 * ours, 1e3 * theirs, logit_difference, gradient_difference)


def step_time(model: nn.Module, images: Tensor, labels: Tensor, *, rounds: int) -> float:
    """Fastest training step of `model` on the batch, in milliseconds; the model is updated by it."""
    return 1e3 * fastest_steps([_step(model.train(), images, labels)], rounds, _clock(images))[0]


def fastest_steps(
    steps: list[Callable[[], None]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Shortest time of each step in seconds; the steps take turns, so that a busy machine slows all of them."""
    for step in steps:
        step()
    best = [float("inf")] * len(steps)
    for turn in range(rounds):
        order = range(len(steps)) if turn % 2 == 0 else reversed(range(len(steps)))
        for i in order:
            start = clock()
            steps[i]()
            best[i] = min(best[i], clock() - start)
    return best


def _clock(images: Tensor) -> Callable[[], float]:
    """On a CPU the processor's time, which does not run while others have the core; the demo has one thread."""
    return time.perf_counter if images.is_cuda else time.process_time


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        _, loss = _logits_and_total_loss(model, images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def _logits_and_gradients(
    model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of each trained parameter; dropout draws the same masks in each call."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        logits, loss = _logits_and_total_loss(model, images, labels)
        gradients = torch.autograd.grad(loss, list(trained.values()))
    return logits.detach(), dict(zip(trained, gradients, strict=True))


def _logits_and_total_loss(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, classes], and the cross-entropy plus the method's own loss."""
    if isinstance(model, VPTTwin):
        logits, method_loss = model(images, labels)
    else:
        logits, method_loss = logits_and_loss(model, images, labels)
    loss = F.cross_entropy(logits, labels)
    return logits, loss if method_loss is None else loss + method_loss
