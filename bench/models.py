"""The comparisons of whole models: the package against prompts concatenated on timm, training step and inference.

Both sides have the same weights, prompts and images. Logits and the gradients of what the method trains are compared
with float64 before a time is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

import fastprompt
from bench import baselines, measure
from bench.correctness import WrongResult
from bench.ops import backends, first_line

TRAINING, INFERENCE = "training step", "inference"
CLASSES = 100
OWN = ("prompts.", "gate_logits", "temperature")  # what a method trains, by the same names on both sides


@dataclass(frozen=True)
class Method:
    """A method: its configuration for P prompts, and the same model by concatenation, made of a `PromptModel`."""

    config: Callable[[int], fastprompt.PromptConfig]
    baseline: Callable[[nn.Module, Any], nn.Module]


METHODS = {
    "vpt-deep": Method(
        fastprompt.VPTConfig, lambda base, ours: baselines.ConcatVPT(base, list(ours.prompts))
    ),
    "gate-vpt": Method(
        lambda P: fastprompt.GateVPTConfig(P, dropout=0.0),
        lambda base, ours: baselines.ConcatGateVPT(base, ours.prompts[0], ours.gate_logits, ours.temperature),
    ),
    "cvpt": Method(fastprompt.CVPTConfig, lambda base, ours: baselines.CrossVPT(base, list(ours.prompts))),
}


@dataclass(frozen=True)
class Setting:
    """Where and how models are compared.

    Attributes:
        model: timm's name; random weights, which have no influence on times.
        kernels: SDPA kernels to force for the concatenating model besides PyTorch's own choice; names of `SDPA`.
        compiled: measure both sides under `torch.compile` instead of eagerly.
        compiler: its backend.
        depth: of the model, if not its own.
    """

    model: str
    size: int
    batch: int
    dtype: torch.dtype
    device: str
    rounds: int
    kernels: tuple[str, ...] = ()
    compiled: bool = False
    compiler: str = "inductor"
    depth: int | None = None


@dataclass
class Competitor:
    """A model and how it is run: under a context, or as it is."""

    model: nn.Module
    run: Callable[[Callable[[], Any]], Any] = lambda step: step()


@dataclass
class Comparison:
    """The competitors of one method and number of prompts."""

    method: str
    P: int
    setting: Setting
    base: nn.Module
    ours: dict[str, Competitor] = field(default_factory=dict)
    others: dict[str, Competitor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting.model} P={self.P}{' compiled' if self.setting.compiled else ''}"


def backbone(setting: Setting) -> nn.Module:
    """timm's model with random weights, on the setting's device and in its dtype."""
    with torch.device(setting.device):
        return (
            timm.create_model(setting.model, img_size=setting.size, num_classes=CLASSES)
            .to(setting.dtype)
            .eval()
        )


def comparison(method: str, P: int, setting: Setting, base: nn.Module) -> Comparison:
    """The package (and on a GPU its eager backend by name), concatenation, and, not compiled, the bare backbone.

    `base` is copied; the copies share no memory.
    """
    made = Comparison(method, P, setting, base)
    ours = fastprompt.get_prompt_model(copy.deepcopy(base), METHODS[method].config(P)).train()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.startswith(OWN):
                p.add_(0.1 * torch.randn_like(p))  # as initialised, gates hide what passes through them
    theirs = METHODS[method].baseline(base, ours).eval()
    made.ours["fastprompt"] = Competitor(ours)
    made.others["concatenation"] = Competitor(theirs)
    if setting.compiled:
        made.ours = {"fastprompt, compiled": Competitor(_compile(ours, setting))}
        made.others = {"concatenation, compiled": Competitor(_compile(theirs, setting))}
        return made
    if backends("prompt_attention", setting.device)[0] != "eager":
        made.ours["fastprompt, eager backend"] = Competitor(
            ours, _within(lambda: fastprompt.use_backend("eager"))
        )
    for kernel in setting.kernels:
        made.others[f"concatenation, sdpa {kernel}"] = Competitor(
            theirs, _within(lambda kernel=kernel: sdpa_kernel(baselines.SDPA[kernel]))
        )
    made.others["bare backbone"] = Competitor(baselines.BareBackbone(base).eval())
    return made


def _compile(model: nn.Module, setting: Setting) -> nn.Module:
    return torch.compile(model, fullgraph=True, dynamic=False, backend=setting.compiler)


def _within(context: Callable[[], Any]) -> Callable[[Callable[[], Any]], Any]:
    def run(step: Callable[[], Any]) -> Any:
        with context():
            return step()

    return run


def draw(setting: Setting, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """Random images [B, 3, size, size] and labels [B]."""
    B, size = batch or setting.batch, setting.size
    images = torch.randn(B, 3, size, size, device=setting.device, dtype=setting.dtype)
    return images, torch.randint(0, CLASSES, (B,), device=setting.device)


def train_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward, cross-entropy, backward; the optimizer's update is not part of it."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(images), labels).backward()


@torch.no_grad()
def infer(model: nn.Module, images: Tensor) -> None:
    """One forward."""
    model(images)


def results(competitor: Competitor, images: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of what the method trains."""
    model = competitor.model
    model.zero_grad(set_to_none=True)

    def run() -> Tensor:
        logits = model(images)
        logits.backward(cotangent.to(logits))
        return logits.detach()

    logits = competitor.run(run)
    own = {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters()}
    return {"logits": logits, **{n: g for n, g in own.items() if n.startswith(OWN) and g is not None}}


def gate(made: Comparison, names: Sequence[str] | None = None) -> dict[str, float | None]:
    """The error of each competitor that computes the method; None for a bare backbone; the others become notes.

    `names`: only these.
    """
    images, _ = draw(made.setting)
    plain = next(iter(made.others.values()))
    # The definition, in float64, on the same images; the concatenating model is compared with the published code.
    original = getattr(plain.model, "_orig_mod", plain.model)
    wide = copy.deepcopy(original).double()
    part = images[:2]  # float64 is slow, and an image knows nothing of the others
    cotangent = torch.randn(len(part), CLASSES, device=images.device)
    exact = results(Competitor(wide), part.double(), cotangent)
    del wide
    usual = _errors(results(Competitor(original), part, cotangent), exact)
    full = torch.cat([cotangent, torch.zeros(len(images) - len(part), CLASSES, device=images.device)])
    errors: dict[str, float | None] = {}
    for name, competitor in {**made.ours, **made.others}.items():
        if names is not None and name not in names:
            continue
        try:
            if name.startswith("bare backbone"):
                results(competitor, images, full)
                errors[name] = None
                continue
            got = results(competitor, images, full)
            found = _errors({**got, "logits": got["logits"][: len(part)]}, exact)
            eps = torch.finfo(made.setting.dtype).eps
            wrong = {n: e for n, e in found.items() if not e <= 3 * usual[n] + 4 * eps}
            if wrong:
                worst = max(wrong, key=lambda n: wrong[n])
                raise WrongResult(f"{worst}: error {found[worst]:.2e}, concatenation {usual[worst]:.2e}")
            errors[name] = max(found.values())
        except Exception as error:  # the others are still measured
            made.notes.append(f"{made.name}: {name}: {type(error).__name__}: {first_line(error)}")
    return errors


def _errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    if got.keys() != exact.keys():
        raise WrongResult(f"results {sorted(got)}, not {sorted(exact)}")
    return {n: ((got[n].double() - w).norm() / w.norm()).item() for n, w in exact.items()}


def rows(made: Comparison, modes: Sequence[str] = (TRAINING, INFERENCE)) -> Iterator[measure.Row]:
    """Gate, then time every competitor in turn, in each mode; the rows of a mode come when it is done."""
    torch._dynamo.reset()
    setting = made.setting
    errors = gate(made)
    competitors = {n: c for n, c in {**made.ours, **made.others}.items() if n in errors}
    if not competitors:
        return
    images, labels = draw(setting)
    for mode in modes:
        extra = _folded(made, errors, images) if mode == INFERENCE and not setting.compiled else {}
        steps = {
            name: step_of(competitor, mode, images, labels)
            for name, competitor in {**competitors, **extra}.items()
        }
        metrics = {name: measure.peak_bytes(step, setting.device) for name, step in steps.items()}
        if not setting.compiled:
            for name, step in steps.items():
                metrics[name]["operations"] = float(measure.operations(step))
        # Counting has run each once.
        times = measure.interleaved(
            steps, setting.rounds, setting.device, graphs=False, warm=setting.compiled
        )
        if mode == TRAINING and not setting.compiled:
            for name, competitor in competitors.items():
                kept = measure.saved_bytes(_loss(competitor, images, labels), competitor.model.parameters())
                metrics[name]["saved_bytes"] = float(kept)
        yield from measure.compare(
            times,
            [*made.ours, *extra],
            {**errors, **dict.fromkeys(extra, errors.get("fastprompt"))},
            metrics,
            measure.machine(setting.device),
            suite=made.method,
            mode=mode,
            shape={"model": setting.model, "B": setting.batch, "P": made.P},
            dtype=str(setting.dtype).removeprefix("torch."),
            rounds=setting.rounds,
        )


def _folded(made: Comparison, errors: dict[str, float | None], images: Tensor) -> dict[str, Competitor]:
    """The package's model folded for inference, if it gives the logits of the model that passed the gate."""
    if "fastprompt" not in errors:
        return {}
    ours: Any = made.ours["fastprompt"].model
    folded = ours.fold()
    with torch.no_grad():
        error = _errors({"logits": folded(images)}, {"logits": ours(images).double()})["logits"]
    ours.train()
    if not error <= 32 * torch.finfo(images.dtype).eps:
        made.notes.append(f"{made.name}: fastprompt, folded: WrongResult: logits off by {error:.2e}")
        return {}
    return {"fastprompt, folded": Competitor(folded)}


def step_of(competitor: Competitor, mode: str, images: Tensor, labels: Tensor) -> measure.Step:
    if mode == TRAINING:
        return lambda: competitor.run(lambda: train_step(competitor.model, images, labels))
    return lambda: competitor.run(lambda: infer(competitor.model, images))


def _loss(competitor: Competitor, images: Tensor, labels: Tensor) -> measure.Step:
    return lambda: competitor.run(lambda: F.cross_entropy(competitor.model(images), labels))
