"""The demo's clock: whole training steps against the concatenating implementation, after checking that both agree."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastprompt.demo.concat import ConcatVPT
from fastprompt.model import PromptModel
from fastprompt.training.loop import adamw, logits_and_loss

# float32 sums in another order; a wrong formula is off by orders of magnitude more.
LOGIT_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """One method against concatenation: step times are minima in milliseconds, differences largest absolute values."""

    step_ms: float
    concat_step_ms: float
    logit_difference: float
    gradient_difference: float

    @property
    def ratio(self) -> float:
        """How many times longer the concatenating step takes."""
        return self.concat_step_ms / self.step_ms


def compare(model: PromptModel, images: Tensor, labels: Tensor, *, rounds: int) -> Comparison:
    """Time `model` and its concatenating twin on one batch, in turns; the model itself is updated by it.

    Raises RuntimeError where logits or prompt gradients differ: a time is not worth having then.
    """
    twin = ConcatVPT.twin(model)
    model.train()
    twin.train()
    logits, gradients = _logits_and_gradients(model, images, labels)
    twin_logits, twin_gradients = _logits_and_gradients(twin, images, labels)
    logit_difference = float((logits - twin_logits).abs().max())
    pairs = list(zip(gradients, twin_gradients, strict=True))
    gradient_difference = max(float((g - t).abs().max()) for g, t in pairs)
    logit_bound = LOGIT_TOLERANCE * max(1.0, float(twin_logits.abs().max()))
    gradient_bound = GRADIENT_TOLERANCE * max(float(t.abs().max()) for t in twin_gradients)
    if not (logit_difference <= logit_bound and gradient_difference <= gradient_bound):
        raise RuntimeError(
            f"{model.config}: logits differ from concatenation by {logit_difference:.2e} (bound {logit_bound:.0e}), "
            f"prompt gradients by {gradient_difference:.2e} (bound {gradient_bound:.0e}); no time is reported."
        )
    ours, theirs = fastest_steps([_step(model, images, labels), _step(twin, images, labels)], rounds)
    return Comparison(1e3 * ours, 1e3 * theirs, logit_difference, gradient_difference)


def step_time(model: nn.Module, images: Tensor, labels: Tensor, *, rounds: int) -> float:
    """Fastest training step of `model` on the batch, in milliseconds; the model is updated by it."""
    return 1e3 * fastest_steps([_step(model.train(), images, labels)], rounds)[0]


def fastest_steps(steps: list[Callable[[], None]], rounds: int) -> list[float]:
    """Shortest time of each step in seconds; the steps take turns, so that a busy machine slows all of them."""
    for step in steps:
        step()
    best = [float("inf")] * len(steps)
    for turn in range(rounds):
        order = range(len(steps)) if turn % 2 == 0 else reversed(range(len(steps)))
        for i in order:
            start = time.perf_counter()
            steps[i]()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        logits, method_loss = logits_and_loss(model, images, labels)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        (loss if method_loss is None else loss + method_loss).backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def _logits_and_gradients(
    model: PromptModel | ConcatVPT, images: Tensor, labels: Tensor
) -> tuple[Tensor, list[Tensor]]:
    logits, method_loss = logits_and_loss(model, images, labels)
    loss = F.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss if method_loss is None else loss + method_loss, list(model.prompts))
    return logits.detach(), list(gradients)
