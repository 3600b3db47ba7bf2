"""One run of the demo: train the backbone, probe it, tune prompts, compare and time; see `protocol`."""

import copy
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import torch

import fastprompt
from fastprompt.config import DAVPTConfig
from fastprompt.demo.backbone import train_backbone
from fastprompt.demo.batches import batches_for
from fastprompt.demo.measure import Comparison, compare, step_time
from fastprompt.demo.probe import features, probe
from fastprompt.demo.protocol import LINEAR_PROBE, Method, Protocol
from fastprompt.model import PromptModel, get_prompt_model
from fastprompt.training import (
    Batches,
    History,
    LabelledImages,
    TrainingStep,
    digits,
    evaluate,
    fit,
    split_per_class,
)

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the updates done and the updates in all."""


@dataclass
class Row:
    """One row of the table: accuracies are one per split, the course one mean loss per epoch and split."""

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
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def std(self) -> float:
        """Standard deviation over the splits (n - 1), 0 for one split."""
        if len(self.accuracies) < 2:
            return 0.0
        return (sum((a - self.mean) ** 2 for a in self.accuracies) / (len(self.accuracies) - 1)) ** 0.5


@dataclass(frozen=True)
class Prepared:
    """What every method starts from: the frozen backbone, the pool that labelled images come from, the test set."""

    backbone: Any
    backbone_accuracy: float
    backbone_losses: list[float]
    seen: LabelledImages
    pool: LabelledImages
    test: LabelledImages


@dataclass
class Results:
    """What the run found; `report` and `figure` show it."""

    protocol: Protocol
    prepared: Prepared
    rows: list[Row]
    environment: dict[str, str]
    seconds: dict[str, float]


def run(protocol: Protocol, progress: Progress | None = None) -> Results:
    """Run the demo; `progress` hears of every update.

    Raises RuntimeError where fastprompt and the papers' form differ.
    """
    with one_thread():
        return _run(protocol, progress)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for PyTorch's operators on the CPU: a second one gains nothing on matrices as small as the demo's,
    and on a busy machine every operator would wait for whichever thread got no core (9 times slower, measured)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(protocol: Protocol, progress: Progress | None) -> Results:
    begin, begin_cpu = time.perf_counter(), time.process_time()
    prepared = prepare(protocol, progress)
    seconds = {"backbone": time.perf_counter() - begin}

    rows = [_probe(prepared, protocol, progress)]
    for name, method in protocol.methods.items():
        rows.append(_tune_all(prepared, name, method, protocol, progress))
    seconds["tuning"] = time.perf_counter() - begin - seconds["backbone"]

    _time(prepared, rows, protocol, progress)
    seconds["total"] = time.perf_counter() - begin
    seconds["processor"] = time.process_time() - begin_cpu
    return Results(protocol, prepared, rows, _environment(_device(prepared)), seconds)


def prepare(protocol: Protocol, progress: Progress | None = None, *, seed: int = 0) -> Prepared:
    """Cut the images and train the backbone; the test set is the same for every `seed`, which is the backbone's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = protocol.backbone.image_size
    seen, new = digits(protocol.seen_classes, size=size), digits(protocol.new_classes, size=size)
    held_out, train = split_per_class(seen, protocol.backbone.held_out, seed=0)
    pool, test = split_per_class(new, protocol.pool, seed=0)
    backbone, course, accuracy = train_backbone(
        protocol.backbone, train, held_out, seed=seed, device=device, progress=_tell(progress, "Backbone")
    )
    return Prepared(backbone, accuracy, course.loss, seen, pool, test)


def prompted(backbone: Any, method: Method, classes: int, *, seed: int) -> PromptModel:
    """The backbone with prompts and a new head; only these two are its own, and drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_prompt_model(_with_head(backbone, classes), method.config)


def _with_head(backbone: Any, classes: int) -> Any:
    """A copy of the backbone whose head [classes] is freshly drawn: methods must not see each other's heads."""
    own = copy.deepcopy(backbone)
    own.reset_classifier(classes)
    return own.to(next(backbone.parameters()).device)


def _probe(prepared: Prepared, protocol: Protocol, progress: Progress | None) -> Row:
    begin, classes = time.perf_counter(), len(prepared.pool.classes)
    row = Row(LINEAR_PROBE, {"C": [], "distorted": []}, (protocol.backbone.width + 1) * classes)
    test = features(prepared.backbone, prepared.test.images)
    for seed in range(protocol.seeds):
        train, _ = split_per_class(prepared.pool, protocol.labelled, seed=seed)
        fitted = probe(prepared.backbone, train, seed=seed)
        row.accuracies.append(fitted.accuracy(test, prepared.test.labels))
        row.settings["C"].append(fitted.strength)
        row.settings["distorted"].append(fitted.distorted)
        if progress is not None:
            progress(LINEAR_PROBE, seed + 1, protocol.seeds)
    row.seconds = time.perf_counter() - begin
    return row


def _tune_all(
    prepared: Prepared, name: str, method: Method, protocol: Protocol, progress: Progress | None
) -> Row:
    begin, classes = time.perf_counter(), len(prepared.pool.classes)
    settings = {**method.config.to_dict(), "lr": method.lr, "weight_decay": method.weight_decay}
    row = Row(name, settings, 0)
    for seed in range(protocol.seeds):
        train, _ = split_per_class(prepared.pool, protocol.labelled, seed=seed)
        model = prompted(prepared.backbone, method, classes, seed=seed)
        row.trained_parameters = sum(p.numel() for p in model.trainable_parameters())
        stage = f"{name}, draw {seed + 1} of {protocol.seeds}"
        history = tune(model, train, method, protocol, seed=seed, progress=_tell(progress, stage))
        row.losses.append(history.loss)
        row.accuracies.append(evaluate(model, Batches(prepared.test, 256)))
    row.seconds = time.perf_counter() - begin
    return row


def tune(
    model: PromptModel,
    train: LabelledImages,
    method: Method,
    protocol: Protocol,
    *,
    seed: int,
    progress: Callable[[TrainingStep], None] | None = None,
) -> History:
    """Tune on `train` as the protocol says; also what the search runs."""
    if isinstance(method.config, DAVPTConfig):
        model.fit_class_map(Batches(train, protocol.batch_size, seed=seed))
    return fit(
        model,
        batches_for(method.config, train, protocol.batch_size, seed=seed),
        epochs=protocol.epochs,
        lr=method.lr,
        weight_decay=method.weight_decay,
        seed=seed,
        progress=progress,
    )


def _time(prepared: Prepared, rows: list[Row], protocol: Protocol, progress: Progress | None) -> None:
    """Fill in the rows' times and differences, on prompts as they are drawn."""
    backbone, classes, device = prepared.backbone, len(prepared.pool.classes), _device(prepared)
    batch = prepared.pool[torch.arange(protocol.timing_batch)]
    images, labels = batch.images.to(device), batch.labels.to(device)
    for done, row in enumerate(rows):
        if progress is not None:
            progress("Step times", done, len(rows))
        if row.name == LINEAR_PROBE:
            model = _with_head(backbone, classes)
            model.head.requires_grad_(True)
            row.step_ms = step_time(model, images, labels, rounds=protocol.timing_rounds)
        else:
            prompts = prompted(backbone, protocol.methods[row.name], classes, seed=0)
            row.comparison = compare(prompts, images, labels, rounds=protocol.timing_rounds)
            row.step_ms = row.comparison.step_ms
    if progress is not None:
        progress("Step times", len(rows), len(rows))


def _device(prepared: Prepared) -> torch.device:
    return next(prepared.backbone.parameters()).device


def _tell(progress: Progress | None, stage: str) -> Callable[[TrainingStep], None] | None:
    if progress is None:
        return None
    return lambda at: progress(stage, at.step, at.steps)


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{name}, one thread" if device.type == "cpu" else name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "fastprompt": fastprompt.__version__,
        "backends": ", ".join(b.name for b in fastprompt.backends() if b.available),
    }


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
