"""The training loop: AdamW with linear warm-up and cosine decay; cross-entropy plus the method's loss."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastprompt.model import PromptModel


class Loader(Protocol):
    """An iterable of batches (images [B, C, height, width], labels [B]) with a length, such as a `DataLoader`."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class TrainingStep:
    """Progress of `fit`: `step` counts updates from 1 to `steps`, `epoch` counts from 0."""

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float


@dataclass
class History:
    """Per epoch: mean cross-entropy, mean method loss, and accuracy on the training batches (0 to 1)."""

    loss: list[float] = field(default_factory=list)
    method_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    model: nn.Module,
    loader: Loader,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    warmup: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    clip_norm: float | None = None,
    label_smoothing: float = 0.0,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    progress: Callable[[TrainingStep], None] | None = None,
) -> History:
    """Train the parameters of `model` that require a gradient, with AdamW.

    Runs on the device of these parameters and leaves the model in eval mode and the global random state unchanged.

    Args:
        model: a `PromptModel`, whose method loss is added to the cross-entropy, or any module that maps images to
            logits.
        loader: the batches of one epoch.
        epochs: passes over `loader`.
        lr: peak learning rate. It rises linearly during warm-up, then falls to 0 as a cosine.
        weight_decay: applied to parameters with two or more dimensions.
        warmup: fraction of all updates spent on warm-up, 0 to 1.
        betas: of AdamW.
        clip_norm: largest norm of all gradients together; None does not clip.
        label_smoothing: of the cross-entropy.
        autocast: `torch.bfloat16`, or None to compute in the dtype of the parameters.
        seed: seeds dropout and other random layers.
        progress: called after each update.

    Raises:
        ValueError: an argument is out of range, `model` has nothing to train, or `loader` is empty.
        FloatingPointError: the loss is not finite.
    """
    _check(epochs, lr, warmup, autocast)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "`fit`: no parameter of `model` requires a gradient; call `requires_grad_()` on those to train."
        )
    if len(loader) == 0:
        raise ValueError("`fit`: `loader` is empty.")
    device = trained[0].device
    optimizer = adamw(trained, lr=lr, weight_decay=weight_decay, betas=betas)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps, warmup))
    history, step, start = History(), 0, time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        for epoch in range(epochs):
            seen, loss_sum, method_sum, right = 0, 0.0, 0.0, 0
            for images, labels in loader:
                images, labels = images.to(device), labels.to(device)
                with _autocast(device, autocast):
                    logits, method_loss = logits_and_loss(model, images, labels)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                (loss if method_loss is None else loss + method_loss).backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(trained, clip_norm)
                used_lr = optimizer.param_groups[0]["lr"]
                optimizer.step()
                schedule.step()
                step, value = step + 1, loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"`fit`: the loss is {value} at update {step} of {steps}; "
                        f"lower `lr` (now {lr}) or set `clip_norm`."
                    )
                seen += len(labels)
                loss_sum += value * len(labels)
                method_sum += 0.0 if method_loss is None else method_loss.item() * len(labels)
                right += int((logits.argmax(-1) == labels).sum())
                if progress is not None:
                    progress(TrainingStep(epoch, step, steps, value, used_lr))
            history.loss.append(loss_sum / seen)
            history.method_loss.append(method_sum / seen)
            history.accuracy.append(right / seen)
    model.eval()
    history.seconds = time.perf_counter() - start
    return history


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the accuracy of `model` on the batches (images [B, C, height, width], labels [B]) of `loader`, 0 to 1.

    Runs in eval mode, then restores the mode of the model. Raises ValueError if there are no images.
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    was_training, seen, right = model.training, 0, 0
    model.eval()
    try:
        for images, labels in loader:
            right += int((model(images.to(device)).argmax(-1) == labels.to(device)).sum())
            seen += len(labels)
    finally:
        model.train(was_training)
    if seen == 0:
        raise ValueError("`evaluate`: `loader` is empty.")
    return right / seen


def adamw(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """Return AdamW with weight decay on parameters with two or more dimensions only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


def warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Return the function from update i to its learning-rate factor.

    The factor rises linearly to 1 over the first `warmup * steps` updates, then falls to 0 as a cosine.
    """
    rising = round(warmup * steps)

    def factor(i: int) -> float:
        if i < rising:
            return (i + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (i - rising) / max(1, steps - rising))))

    return factor


def logits_and_loss(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the logits [B, classes] and, for a `PromptModel`, the method's loss."""
    if isinstance(model, PromptModel):
        output = model(images, labels=labels)
        return output.logits, output.method_loss
    return model(images), None


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _check(epochs: int, lr: float, warmup: float, autocast: torch.dtype | None) -> None:
    if epochs < 1:
        raise ValueError(f"`fit`: `epochs` must be at least 1; got {epochs}.")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"`fit`: `lr` must be positive and finite; got {lr}; try 1e-2 for prompts.")
    if not 0 <= warmup <= 1:
        raise ValueError(f"`fit`: `warmup` must be a fraction of all updates, 0 to 1; got {warmup}; try 0.1.")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(
            f"`fit`: `autocast` must be torch.bfloat16 or None; got {autocast}; float16 needs a loss scaler."
        )
