"""Comparisons of whole models: the package against the papers' form on timm, training step and inference.

Both sides have the same weights, prompts and images. Logits and the gradients of what the method trains are checked
against float64 before a time is taken. `replace_attention` alone is compared with timm's own attention; its goal is a
ratio of 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

import fastprompt
from bench import baselines, measure
from bench.correctness import assert_as_exact
from bench.ops import backends, first_line
from bench.papers import paper_model
from fastprompt.calibration import timing

TRAINING, INFERENCE = "training step", "inference"
CLASSES = 100
REPLACE = "replace-attention"
OWN = ("prompts.", "gate_logits", "temperature")  # the parameters of a method, named alike on both sides

# The methods by name: from P and the model's depth to a configuration.
METHODS: dict[str, Callable[[int, int], fastprompt.PromptConfig]] = {
    "vpt-deep": lambda P, depth: fastprompt.VPTConfig(P),
    "vpt-shallow": lambda P, depth: fastprompt.VPTConfig(P, deep=False),
    "gate-vpt": lambda P, depth: fastprompt.GateVPTConfig(P, dropout=0.0),
    "cvpt": lambda P, depth: fastprompt.CVPTConfig(P),
    "da-vpt": lambda P, depth: fastprompt.DAVPTConfig(P, P, (depth - 2, depth - 1)),
}


@dataclass(frozen=True)
class Setting:
    """Where and how models are compared.

    Attributes:
        model: name of a timm model; its weights are random, which does not change times.
        kernels: names of `baselines.SDPA`: kernels that the papers' form is also measured with.
        compiled: measure both sides under `torch.compile`.
        compiler: its backend.
        mode: its mode, such as "reduce-overhead".
        depth: number of blocks, if not the model's own.
        autocast: run forwards under bfloat16 autocast.
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
    mode: str | None = None
    depth: int | None = None
    autocast: bool = False

    @property
    def variant(self) -> str:
        """How the models of both sides are run: "", ", compiled", ", compiled, reduce-overhead"."""
        return f"{', compiled' if self.compiled else ''}{f', {self.mode}' if self.mode else ''}"

    @property
    def precision(self) -> str:
        """The dtype of the weights, and of autocast."""
        return str(self.dtype).removeprefix("torch.") + (", autocast" if self.autocast else "")

    def forward(self) -> AbstractContextManager[Any]:
        """Return what forwards are run in."""
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=self.autocast)


@dataclass
class Competitor:
    """A model, and what it is run in; `forward`: in its forwards alone; `folded`: it is for inference alone."""

    model: nn.Module
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    folded: bool = False
    forward: Callable[[], AbstractContextManager[Any]] = nullcontext

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy, without DA-VPT's metric loss."""
        with self.context(), self.forward():
            return F.cross_entropy(self.model(images), labels)

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """Run forward, cross-entropy and backward, without the optimizer's update."""
        self.model.zero_grad(set_to_none=True)
        with self.context():
            self.loss(images, labels).backward()

    @torch.no_grad()
    def infer(self, images: Tensor, labels: Tensor) -> None:
        """Run one forward."""
        with self.context(), self.forward():
            self.model(images)

    def results(self, images: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """Return the logits, and the gradients of the method's parameters."""
        if self.folded:
            with torch.no_grad(), self.forward():
                return {"logits": self.model(images)}
        self.model.zero_grad(set_to_none=True)
        with self.context():
            with self.forward():
                logits = self.model(images)
            logits.backward(cotangent.to(logits))
        named = {n.removeprefix("_orig_mod."): p.grad for n, p in self.model.named_parameters()}
        gradients = {n: g for n, g in named.items() if n.startswith(OWN) and g is not None}
        return {"logits": logits.detach(), **gradients}


@dataclass
class Comparison:
    """The competitors of one method and number of prompts, and `notes` why some have no row."""

    method: str
    P: int
    setting: Setting
    ours: dict[str, Competitor] = field(default_factory=dict)
    others: dict[str, Competitor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """ "vpt-deep vit_base_patch16_224 P=10"."""
        return f"{self.method} {self.setting.model} P={self.P}{self.setting.variant}"


def backbone(setting: Setting) -> nn.Module:
    """Return timm's model with random weights, on the setting's device and in its dtype."""
    options = {} if setting.depth is None else {"depth": setting.depth}
    with torch.device(setting.device):
        model = timm.create_model(setting.model, img_size=setting.size, num_classes=CLASSES, **options)
    return model.to(setting.dtype).eval()


class BareBackbone(nn.Module):
    """The timm model without prompts; its class token trains, so that a backward runs through every block."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base: Any = copy.deepcopy(base).requires_grad_(False)
        self.base.cls_token.requires_grad_(True)
        self.base.head.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of images [B, C, h, w]."""
        return self.base(images)


def comparison(method: str, P: int, setting: Setting, base: nn.Module) -> Comparison:
    """Return the package and the papers' form, compiled; or, not compiled, also the bare backbone.

    The package then comes folded for inference too, and on a GPU with its eager backend. The copies of `base` share no
    memory.
    """
    found = Comparison(method, P, setting)
    if method == REPLACE:
        fast = copy.deepcopy(base)
        fastprompt.replace_attention(fast, strict=True)
        found.ours["replace_attention"], found.others["timm"] = Competitor(fast), Competitor(base)
        return found
    config = METHODS[method](P, len(base.blocks))  # type: ignore[arg-type]
    ours = fastprompt.get_prompt_model(copy.deepcopy(base), config).train()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.startswith(OWN):
                p.add_(0.1 * torch.randn_like(p))  # gates as initialised hide what passes through them
    theirs = paper_model(ours)
    competitor = partial(Competitor, forward=setting.forward)
    if setting.compiled:
        options = {"backend": setting.compiler, "mode": setting.mode}
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, **options)
        found.ours[f"fastprompt{setting.variant}"] = competitor(compiled(ours))
        found.others[f"concatenation{setting.variant}"] = competitor(compiled(theirs))
        return found
    found.ours["fastprompt"] = competitor(ours)
    found.ours["fastprompt, folded"] = competitor(ours.fold(), folded=True)
    ours.train()
    found.others["concatenation"] = competitor(theirs)
    if backends("prompt_attention", setting.device)[0] != "eager":
        found.ours["fastprompt, eager backend"] = competitor(ours, partial(fastprompt.use_backend, "eager"))
    for kernel in setting.kernels:
        context = partial(sdpa_kernel, baselines.SDPA[kernel])
        found.others[f"concatenation, sdpa {kernel}"] = competitor(theirs, context)
    found.others["bare backbone"] = competitor(BareBackbone(base).eval())
    return found


def draw(setting: Setting) -> tuple[Tensor, Tensor]:
    """Draw images [B, 3, size, size] and labels [B]."""
    B, size = setting.batch, setting.size
    images = torch.randn(B, 3, size, size, device=setting.device, dtype=setting.dtype)
    return images, torch.randint(0, CLASSES, (B,), device=setting.device)


def check_correctness(comparison: Comparison, names: Sequence[str] | None = None) -> dict[str, float | None]:
    """Return the error of each competitor (of `names`) that computes the method; None for a bare backbone.

    The others get a note. The papers' form in float64 is the truth, and in the setting's dtype the measure of rounding.
    """
    images, _ = draw(comparison.setting)
    part = images[:2]  # float64 is slow, and an image does not depend on the others
    cotangent = torch.randn(len(part), CLASSES, device=images.device)
    full = torch.cat([cotangent, cotangent.new_zeros(len(images) - len(part), CLASSES)])
    paper = next(iter(comparison.others.values())).model
    paper = getattr(paper, "_orig_mod", paper)
    exact = Competitor(copy.deepcopy(paper).double()).results(part.double(), cotangent)
    plain = Competitor(paper, forward=comparison.setting.forward).results(part, cotangent)
    errors: dict[str, float | None] = {}
    for name, competitor in {**comparison.ours, **comparison.others}.items():
        if names is not None and name not in names:
            continue
        try:
            found = competitor.results(images, full)
            if name.startswith("bare backbone"):
                errors[name] = None
                continue
            found["logits"] = found["logits"][: len(part)]
            wanted = ["logits"] if competitor.folded else list(exact)
            assert_as_exact(found, {n: plain[n] for n in wanted}, {n: exact[n] for n in wanted})
            errors[name] = max(_error(found[n], exact[n]) for n in wanted)
        except Exception as error:  # the others are still measured
            comparison.notes.append(f"{comparison.name}: {name}: {type(error).__name__}: {first_line(error)}")
    return errors


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def rows(comparison: Comparison, modes: Sequence[str] = (TRAINING, INFERENCE)) -> Iterator[measure.Row]:
    """Check, then time every competitor in turn, in each mode; the rows of a mode come when it is done."""
    torch._dynamo.reset()
    setting = comparison.setting
    errors = check_correctness(comparison)
    images, labels = draw(setting)
    for mode in modes if errors else ():
        every = {**comparison.ours, **comparison.others}
        competitors = {n: every[n] for n in errors if mode == INFERENCE or not every[n].folded}
        steps = {name: step_of(c, mode, images, labels) for name, c in competitors.items()}
        metrics = {name: measure.peak_bytes(step, setting.device) for name, step in steps.items()}
        if not setting.compiled:
            for name, step in steps.items():
                metrics[name]["operations"] = float(measure.operations(step))
        # Counting has run each once.
        times = timing.interleaved(steps, setting.rounds, setting.device, graphs=False, warm=setting.compiled)
        if mode == TRAINING and not setting.compiled:
            for name, c in competitors.items():
                kept = measure.saved_bytes(partial(c.loss, images, labels), c.model.parameters())
                metrics[name]["saved_bytes"] = float(kept)
        yield from measure.compare(
            times,
            comparison.ours,
            errors,
            metrics,
            measure.machine(setting.device),
            suite=comparison.method,
            mode=mode,
            shape={"model": setting.model, "B": setting.batch}
            | ({"pixels": setting.size} if setting.size != 224 else {})
            | ({"P": comparison.P} if comparison.P else {}),
            dtype=setting.precision,
            rounds=setting.rounds,
        )


def step_of(competitor: Competitor, mode: str, images: Tensor, labels: Tensor) -> timing.Step:
    """Return the step that is timed in `mode`."""
    return partial(competitor.train_step if mode == TRAINING else competitor.infer, images, labels)
