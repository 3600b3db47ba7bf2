"""One run of the demo: train the backbone, probe it, tune prompts, then compare and time the methods."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

import fastprompt
from bench.measure import machine
from examples.digits.backbone import train_backbone
from examples.digits.data import digits, training_batches
from examples.digits.probe import features, probe
from examples.digits.protocol import LINEAR_PROBE, Method, Protocol
from examples.digits.timing import Comparison, compare, step_times
from fastprompt import PromptModel
from fastprompt.methods import DAVPTModel
from fastprompt.training import (
    Batches,
    History,
    LabelledImages,
    TrainingStep,
    evaluate,
    fit,
    split_per_class,
)

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the updates done and the number of updates."""


@dataclass
class Row:
    """A row of the table: one accuracy per draw, one mean loss per epoch and draw."""

    name: str
    settings: dict[str, Any]
    trained_parameters: int
    accuracies: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    step_ms: float = float("nan")
    comparison: Comparison | None = None

    @property
    def mean(self) -> float:
        """Mean accuracy over the draws, 0 to 1."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def std(self) -> float:
        """Standard deviation of the accuracy over the draws (n - 1); 0 for one draw."""
        if len(self.accuracies) < 2:
            return 0.0
        return float(torch.tensor(self.accuracies, dtype=torch.float64).std())


@dataclass(frozen=True)
class Prepared:
    """Input of all methods: the frozen backbone, the pool that labelled images are drawn from, and the test set."""

    backbone: VisionTransformer
    backbone_accuracy: float
    backbone_losses: list[float]
    seen: LabelledImages
    pool: LabelledImages
    test: LabelledImages

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return next(self.backbone.parameters()).device


@dataclass
class Results:
    """Everything that a run measured."""

    protocol: Protocol
    prepared: Prepared
    rows: list[Row]
    environment: dict[str, str]
    seconds: dict[str, float]


def run(protocol: Protocol, progress: Progress | None = None) -> Results:
    """Run the demo and call `progress` after every update.

    Raises `bench.correctness.WrongResult` if fastprompt and the papers' form of a method differ.
    """
    tell: Progress = progress or (lambda stage, done, total: None)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    with one_thread():
        prepared = prepare(protocol, tell)
        seconds = {"backbone": time.perf_counter() - begin}
        rows = [_probe(prepared, protocol, tell)]
        rows += [_tune(prepared, name, protocol, tell) for name in protocol.methods]
        seconds["tuning"] = time.perf_counter() - begin - seconds["backbone"]
        _time(prepared, rows, protocol, tell)
    seconds["total"] = time.perf_counter() - begin
    seconds["processor"] = time.process_time() - begin_cpu
    return Results(protocol, prepared, rows, _environment(prepared.device), seconds)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one CPU thread.

    A second thread gains nothing on matrices as small as the demo's. On a busy machine every operator would wait for
    whichever thread got no core (9 times slower, measured).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prepare(protocol: Protocol, tell: Progress, *, seed: int = 0) -> Prepared:
    """Split the images and train the backbone from `seed`; the test set is the same for every seed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen, new = digits(protocol.seen_classes), digits(protocol.new_classes)
    held_out, train = split_per_class(seen, protocol.backbone.held_out, seed=0)
    pool, test = split_per_class(new, protocol.pool, seed=0)
    backbone, history, accuracy = train_backbone(
        protocol.backbone, train, held_out, seed=seed, device=device, progress=_updates(tell, "Backbone")
    )
    return Prepared(backbone, accuracy, history.loss, seen, pool, test)


def prompted(backbone: VisionTransformer, method: Method, classes: int, *, seed: int) -> PromptModel:
    """Return a copy of the backbone with prompts and a new head, both drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fastprompt.get_prompt_model(_with_head(backbone, classes), method.config)


def _with_head(backbone: VisionTransformer, classes: int) -> VisionTransformer:
    own = copy.deepcopy(backbone)
    own.reset_classifier(classes)
    return own.to(next(backbone.parameters()).device)


def tune(
    model: PromptModel,
    train: LabelledImages,
    method: Method,
    protocol: Protocol,
    *,
    seed: int,
    progress: Callable[[TrainingStep], None] | None = None,
) -> History:
    """Tune `model` on `train` according to the protocol."""
    if isinstance(model, DAVPTModel):
        model.fit_class_map(Batches(train, protocol.batch_size, seed=seed))
    return fit(
        model,
        training_batches(method.config, train, protocol.batch_size, seed=seed),
        epochs=protocol.epochs,
        lr=method.lr,
        weight_decay=method.weight_decay,
        seed=seed,
        progress=progress,
    )


def _probe(prepared: Prepared, protocol: Protocol, tell: Progress) -> Row:
    begin, classes = time.perf_counter(), len(prepared.pool.classes)
    row = Row(LINEAR_PROBE, {"C": [], "distorted": []}, (protocol.backbone.width + 1) * classes)
    test = features(prepared.backbone, prepared.test.images)
    for seed in range(protocol.seeds):
        train, _ = split_per_class(prepared.pool, protocol.labelled, seed=seed)
        fitted = probe(prepared.backbone, train, seed=seed)
        row.accuracies.append(fitted.accuracy(test, prepared.test.labels))
        row.settings["C"].append(fitted.strength)
        row.settings["distorted"].append(fitted.distorted)
        tell(LINEAR_PROBE, seed + 1, protocol.seeds)
    row.seconds = time.perf_counter() - begin
    return row


def _tune(prepared: Prepared, name: str, protocol: Protocol, tell: Progress) -> Row:
    begin, method = time.perf_counter(), protocol.methods[name]
    row = Row(name, {**method.config.to_dict(), "lr": method.lr, "weight_decay": method.weight_decay}, 0)
    for seed in range(protocol.seeds):
        train, _ = split_per_class(prepared.pool, protocol.labelled, seed=seed)
        model = prompted(prepared.backbone, method, len(train.classes), seed=seed)
        row.trained_parameters = sum(p.numel() for p in model.trainable_parameters())
        updates = _updates(tell, f"{name}, draw {seed + 1} of {protocol.seeds}")
        row.losses.append(tune(model, train, method, protocol, seed=seed, progress=updates).loss)
        row.accuracies.append(evaluate(model, Batches(prepared.test, 256)))
    row.seconds = time.perf_counter() - begin
    return row


def _time(prepared: Prepared, rows: list[Row], protocol: Protocol, tell: Progress) -> None:
    """Fill in the step times of the rows, with newly initialised prompts."""
    classes, rounds = len(prepared.pool.classes), protocol.timing_rounds
    batch = prepared.pool[torch.arange(protocol.timing_batch)]
    images, labels = batch.images.to(prepared.device), batch.labels.to(prepared.device)
    for done, row in enumerate(rows, start=1):
        if row.name == LINEAR_PROBE:
            model = _with_head(prepared.backbone, classes)
            model.head.requires_grad_(True)
            (row.step_ms,) = step_times([model], images, labels, rounds=rounds)
        else:
            prompts = prompted(prepared.backbone, protocol.methods[row.name], classes, seed=0)
            row.comparison = compare(prompts, images, labels, rounds=rounds)
            row.step_ms = row.comparison.step_ms
        tell("Step times", done, len(rows))


def _updates(tell: Progress, stage: str) -> Callable[[TrainingStep], None]:
    return lambda at: tell(stage, at.step, at.steps)


def _environment(device: torch.device) -> dict[str, str]:
    found = machine(device.type)
    return {
        "device": f"{found['device']}, one thread" if device.type == "cpu" else found["device"],
        **{name: found["versions"][name] for name in ("python", "torch", "timm")},
        "fastprompt": fastprompt.__version__,
        "backends": ", ".join(b.name for b in fastprompt.backends() if b.available),
    }
