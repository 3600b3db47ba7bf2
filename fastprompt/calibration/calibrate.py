"""`fastprompt calibrate`: check the kernels on this machine's GPU, time what calls choose among, write a profile."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastprompt.calibration import attention, search, tiles, timing
from fastprompt.calibration.attention import Shape
from fastprompt.calibration.exact import first_line, is_lost
from fastprompt.calibration.tiles import Work
from fastprompt.ops import dispatch, profile, replay
from fastprompt.ops.profile_file import DTYPES, Measurement, Profile, ProfileError, Tile, read, tables, write

SIZES = ("small", "base", "large")
MODELS = tuple(f"vit_{size}_patch16_{pixels}" for pixels in (224, 384) for size in SIZES)
PROMPTS = (50, 10, 100, 0)
BATCH = 64
LOST = "`calibrate`: the GPU cannot be used after this error; what was found before it is kept"
SECONDS = 600.0


@dataclass
class _Run:
    """One calibration: what it has found, where it keeps that, and until when it may go on."""

    found: Profile
    file: Path | None
    device: str
    end: float
    say: Callable[[str], None]
    dry: bool
    workers: int
    tried: set[Any] = field(default_factory=set)

    def keep(self, result: Measurement | Tile) -> None:
        self.found.add(result)
        if self.file is not None:
            write(self.found, self.file)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end


def calibrate(
    models: Sequence[str] = MODELS,
    *,
    batch: int = BATCH,
    prompts: Sequence[int] = PROMPTS,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    out: str | Path | None = None,
    time_limit: float = SECONDS,
    dry_run: bool = False,
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> Profile:
    """Check and time this GPU's kernels at the shapes of `models`, and write a profile that later calls follow.

    What is timed, in this order: the ways of attention, forward and backward, and the candidates of the kernels' tables
    of tile sizes. Nothing is timed that is not right against float64. The file is written after each result, so that a
    run that is stopped keeps what it has; a profile of this machine that is there already is extended.

    Args:
        models: names of timm models, for the tokens, heads and widths of their blocks.
        batch: images of a call.
        prompts: numbers of prompts.
        dtypes: of "bfloat16", "float16", "float32".
        out: the file; default that of `FASTPROMPT_PROFILE`, else in the user's cache folder; none for a dry run.
        time_limit: seconds after which nothing new is begun.
        dry_run: run everything once on tiny shapes on the CPU, to try the program; the times mean nothing.
        workers: processes that compile candidates; default up to four. 0 compiles them in this one.
        say: gets each line of the table.

    Returns:
        The profile.

    Raises:
        RuntimeError: there is no GPU, and this is no dry run; or a kernel has crashed and nothing works after it.
        ValueError: a model, a number or a dtype is none.
    """
    if not dry_run and not torch.cuda.is_available():
        raise RuntimeError(
            "`calibrate`: there is no CUDA device to measure; `--dry-run-cpu` tries the program without one"
        )
    shapes = _shapes(models, batch, prompts, dtypes, dry_run)
    file = Path(out) if out is not None else None if dry_run else profile.path() or profile.default_path()
    run = _Run(
        found=_begun(file),
        file=file,
        device="cpu" if dry_run else "cuda",
        end=time.monotonic() + time_limit,
        say=say,
        dry=dry_run,
        workers=workers
        if workers is not None
        else 0
        if dry_run
        else max(1, min(4, (os.cpu_count() or 1) - 1)),
    )
    say(", ".join(f"{name} {value}" for name, value in run.found.machine.items()))
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if run.device == "cuda" else []):
        torch.manual_seed(0)
        _ways(run, shapes)
        _tiles(run, shapes)
    say(f"wrote {file}" if file is not None and file.exists() else "no file was written")
    profile.forget()
    replay.forget()
    return run.found


def _begun(file: Path | None) -> Profile:
    """Return the profile in `file` if it is of this machine, else an empty one."""
    if file is not None and file.exists():
        try:
            found = read(file)
        except ProfileError:
            return Profile(profile.machine())
        if profile.why_other(found) is None:
            return found
    return Profile(profile.machine())


# The shapes ---------------------------------------------------------------------------------------------------------


def _shapes(
    models: Sequence[str], batch: int, prompts: Sequence[int], dtypes: Sequence[str], dry: bool
) -> list[Shape]:
    """Return the attention of the blocks of `models`, the first dtype and number of prompts first."""
    wrong = [d for d in dtypes if d not in DTYPES]
    if wrong:
        raise ValueError(f"`calibrate`: there is no dtype {wrong[0]!r}; known are {', '.join(DTYPES)}")
    if batch < 1 or min(prompts, default=0) < 0:
        raise ValueError(
            f"`calibrate`: `batch` must be at least 1 and `prompts` at least 0; got {batch}, {list(prompts)}"
        )
    if dry:
        return [Shape(5, 2, 16, P, 2, "float32", temperature=P > 0) for P in (3, 0)]
    blocks = [block(name) for name in models]
    found = [Shape(N, H, d, P, batch, dtype) for dtype in dtypes for P in prompts for N, H, d in blocks]
    return list(dict.fromkeys(found))


def block(model: str) -> tuple[int, int, int]:
    """Return tokens without prompts, heads and head_dim of a block of a timm model.

    Raises:
        ValueError: timm has no such model, or it is no ViT.
    """
    import timm

    try:
        with torch.device("meta"):
            made: Any = timm.create_model(model)
        N = made.patch_embed.num_patches + made.num_prefix_tokens
        return N, made.blocks[0].attn.num_heads, made.blocks[0].attn.head_dim
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`calibrate`: {model!r} is not a Vision Transformer of timm: {first_line(error)}"
        ) from error


# Ways ---------------------------------------------------------------------------------------------------------------


def _ways(run: _Run, shapes: Sequence[Shape]) -> None:
    """Time the ways at each shape. Shapes that a profile does not tell apart, by heads alone, are timed once."""
    widest: dict[Any, Shape] = {}
    for shape in shapes:
        key = (shape.tokens, shape.head_dim, shape.prompts, shape.dtype, shape.temperature)
        if key not in widest or widest[key].heads < shape.heads:
            widest[key] = shape
    for shape in widest.values():
        if run.over:
            run.say(f"attention {shape}: the time ended before it")
            continue
        try:
            for result in attention.measure(shape, run.device, 1 if run.dry else attention.ROUNDS):
                run.keep(result)
                run.say(_line(shape, result))
        except Exception as error:
            run.say(f"attention {shape}: {first_line(error)}")
            if is_lost(error):
                raise RuntimeError(LOST) from error
            if run.device == "cuda":
                torch.cuda.empty_cache()


def _line(shape: Shape, result: Measurement) -> str:
    times = sorted(result.microseconds.items(), key=lambda item: item[1])
    parts = [f"{way} {us:.1f} us" for way, us in times]
    parts += [f"{way}: {why}" for way, why in result.refused.items()]
    return f"attention {shape}, {'backward' if result.backward else 'forward'}: {'; '.join(parts)}"


# Tiles --------------------------------------------------------------------------------------------------------------


def _works(shapes: Sequence[Shape]) -> Iterator[Work]:
    """Yield the calls of Triton's kernels in blocks of these shapes, the most important first."""
    for way in ("resident", "split", "looped"):
        yield from (Work("prompt_attention", shape, way) for shape in shapes)
    for operation in tiles.CALLS:
        if operation != "prompt_attention":
            yield from (Work(operation, shape) for shape in shapes if shape.prompts)


def _tiles(run: _Run, shapes: Sequence[Shape]) -> None:
    reason = dispatch.why_no_triton()
    if run.dry and reason is None and not _interpreted():
        reason = (
            "Triton's kernels are not interpreted in this process; TRITON_INTERPRET=1 lets them run on a CPU"
        )
    if reason is not None:
        run.say(f"tile sizes: {reason}")
        return
    with _pool(run.workers) as pool:
        for work in _works(shapes):
            if run.over:
                run.say("tile sizes: the time ended before the rest")
                return
            try:
                for operation, key in tiles.entries(work, run.device):
                    _entry(run, work, operation, key, pool)
            except NotImplementedError:  # no kernel is meant for this shape
                continue
            except Exception as error:
                run.say(f"{work}: {first_line(error)}")
                if is_lost(error):
                    raise RuntimeError(LOST) from error


def _entry(run: _Run, work: Work, operation: str, key: Any, pool: Executor | None) -> None:
    """Search one entry of the table of `operation` by a call that reads it, if no call before has."""
    if (operation, key) in run.tried:
        return
    run.tried.add((operation, key))
    module = dict(tables())[operation]
    before = module.TABLE[key]
    candidates = [before, *(c for c in module.candidates(key) if c != before)]
    found = search.search(
        operation,
        key,
        candidates[:2] if run.dry else candidates,
        search.Later(_checks, (work, run.device)),
        partial(_steps, work, run.device, key.kernel != "fwd"),
        run.end,
        pool,
        run.device,
        1 if run.dry else search.ROUNDS,
    )
    best = search.fastest(found, before)
    times = {c.config: 1e3 * c.ms for c in found if c.ms is not None}
    refused = [c for c in found if c.ms is None]
    text = f"{operation} {_short(key)}: "
    if before not in times:
        fault = next(c.reason for c in found if c.config == before)
        text += f"{_short(before)}: {fault}; "
    if best in times:
        text += f"{_short(best)} {times[best]:.1f} us"
    if best != before and before in times:
        text += f", was {_short(before)} {times[before]:.1f} us"
    reasons = Counter(c.reason for c in refused).most_common(3)
    text += f"; {len(times)} timed, {len(refused)} refused"
    run.say(text + "".join(f"; {count} x {reason}" for reason, count in reasons))
    if best in times and best != before:
        run.keep(
            Tile(
                operation,
                key._asdict(),
                asdict(best),
                round(times[best], 2),
            )
        )


def _checks(work: Work, device: str) -> list[search.Check]:
    torch.manual_seed(0)
    return [partial(work.check, work.trial(device))]


def _steps(work: Work, device: str, backward: bool) -> list[timing.Step]:
    size = sum(x.numel() * x.element_size() for x in work.trial(device).inputs.values())
    return [work.step(device, backward) for _ in range(timing.input_sets(size, device))]


def _short(named: Any) -> str:
    """Return a key or a configuration on few characters: "90 bwd 64 short 2"."""
    values = named if isinstance(named, tuple) else asdict(named).values()
    return "/".join(str(v) for v in values)


def _interpreted() -> bool:
    from fastprompt.kernels.triton import launch

    return launch.INTERPRETED


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    if not workers:
        yield None
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
