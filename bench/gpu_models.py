"""The parts of `bench.gpu_check` that time whole models against the papers' form, ViT-B/16 at batch 128 if not said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import torch

from bench import measure, models
from bench.gpu_records import Record, Settings, note, timed
from bench.models import INFERENCE, TRAINING, Setting

Plan = Sequence[tuple[str, int]]  # methods, and numbers of prompts

BASE = Setting("vit_base_patch16_224", 224, 128, torch.bfloat16, "cuda", 10)
TINY = Setting("test_vit", 48, 2, torch.float32, "cpu", 1, compiler="aot_eager", depth=2)
# What the README's first table would say: the most telling number first.
HEADLINE = (("vpt-deep", 50), ("vpt-deep", 10), ("vpt-deep", 100))
AUTOCAST = replace(BASE, dtype=torch.float32, autocast=True)
MODES = ("reduce-overhead", "max-autotune-no-cudagraphs")  # the second one searches for minutes


def eager(settings: Settings) -> Iterator[Record]:
    """Time models as they are, in bfloat16, against SDPA with each of its kernels."""
    plan = (*HEADLINE[:1], ("gate-vpt", 50), ("cvpt", 10), *HEADLINE[1:], ("cvpt", 20))
    yield from _times(settings, replace(BASE, kernels=("cudnn", "flash")), plan, (TRAINING, INFERENCE))


def precompile(settings: Settings) -> Iterator[Record]:
    """Compile what :func:`compiled` times, one number of prompts by the shard, so that it finds it in the cache."""
    plan = HEADLINE[settings.shard[0] : settings.shard[0] + 1]
    setting = _setting(settings, replace(BASE, compiled=True))
    for method, P in plan[:1]:
        name = f"{method} P={P}, compiling"
        if settings.skips(name):
            continue
        comparison = models.comparison(method, P, setting, models.backbone(setting))
        errors = models.check_correctness(comparison)
        yield from map(note, comparison.notes)
        yield {"kind": "done", "name": name} if errors else note(f"{name}: nothing was compiled")
    if not plan or settings.over:
        yield note("compiling: the time ended before it")


def compiled(settings: Settings) -> Iterator[Record]:
    """Time a training step of VPT-Deep, both sides compiled: the headline."""
    yield from _times(settings, replace(BASE, compiled=True), HEADLINE)


def autocast(settings: Settings) -> Iterator[Record]:
    """Time what users run: weights in float32 under bfloat16 autocast; as they are, then compiled."""
    yield from _times(settings, AUTOCAST, (*HEADLINE, ("gate-vpt", 50), ("cvpt", 10)))
    yield from _times(settings, replace(AUTOCAST, compiled=True), HEADLINE[:1])


def compilers(settings: Settings) -> Iterator[Record]:
    """Time the compiler's other modes, for both sides."""
    for mode in (None,) if settings.dry else MODES:
        yield from _times(settings, replace(BASE, compiled=True, mode=mode), HEADLINE[:1])


def small(settings: Settings) -> Iterator[Record]:
    """Time ViT-S/16 at batch 32, where Python's time per call may show: as it is, compiled, and as CUDA graphs."""
    setting = replace(BASE, model="vit_small_patch16_224", batch=32)
    yield from _times(settings, setting, HEADLINE[:2], (TRAINING, INFERENCE))
    for mode in (None,) if settings.dry else (None, "reduce-overhead"):
        yield from _times(settings, replace(setting, compiled=True, mode=mode), HEADLINE[:1])


def longer(settings: Settings) -> Iterator[Record]:
    """Time ViT-B at 384 and at 518 pixels."""
    longer = (("vit_base_patch16_384", 384, 32), ("vit_base_patch14_dinov2", 518, 16))
    for model, size, batch in longer[: 1 if settings.dry else 2]:
        yield from _times(settings, replace(BASE, model=model, size=size, batch=batch), HEADLINE[:1])


def _times(
    settings: Settings, setting: Setting, plan: Plan, modes: Sequence[str] = (TRAINING,)
) -> Iterator[Record]:
    """Yield the rows of each comparison in `plan`, mode by mode."""
    setting = _setting(settings, setting)
    names = {(method, P): _name(setting, method, P) for method, P in plan}
    base = cache(partial(models.backbone, setting))  # on first use: there may be nothing to measure
    for (method, P), name in names.items():
        notes: list[str] = []

        def rows(method: str = method, P: int = P, notes: list[str] = notes) -> Iterator[measure.Row]:
            comparison = models.comparison(method, P, setting, base())
            comparison.notes = notes
            return models.rows(comparison, modes)

        yield from timed(settings, name, rows)
        yield from map(note, notes)


def _setting(settings: Settings, setting: Setting) -> Setting:
    """Return `setting`, or for a dry run a tiny model in the same manner."""
    if not settings.dry:
        return setting
    return replace(TINY, compiled=setting.compiled, mode=setting.mode, autocast=setting.autocast)


def _name(setting: Setting, method: str, P: int) -> str:
    where = f"{setting.model} {setting.size} B={setting.batch} {setting.precision}"
    return f"{method} P={P} {where}{setting.variant}"


PARTS: dict[str, Callable[[Settings], Iterable[Record]]] = {
    "precompile": precompile,
    "compiled": compiled,
    "autocast": autocast,
    "compilers": compilers,
    "small": small,
    "models": eager,
}
