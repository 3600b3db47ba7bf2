"""The search among the candidates of a kernels' table: the right ones are timed, and the fastest is kept.

Candidates are checked in several processes, since compilation takes most of the time; those that do not compile, do not
fit the GPU or compute something else are refused with the reason. One process alone times the others, whose kernels it
finds in Triton's cache.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastprompt.calibration import timing
from fastprompt.calibration.exact import first_line
from fastprompt.ops import replay
from fastprompt.ops.profile_file import tables

ROUNDS = 5
WINDOW = 20.0  # ms that each candidate fills in a round
# A candidate replaces the entry only if it is faster by more than what two runs of one program differ by.
MARGIN = 0.98

Key = Any  # a named tuple with `architecture` and `kernel`
Check = Callable[[], Any]  # raises if the entry in the table is wrong
# Makes the checks of an entry: for other processes a :class:`Later`, for which they call it once for all candidates.
MakeChecks = Callable[[], Sequence[Check]]


@dataclass(frozen=True)
class Later:
    """A call that another process makes, once for all that asks for the same."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.function(*self.arguments)


class Candidate(NamedTuple):
    """What was found about one: its time in ms, or why there is none."""

    config: Any
    ms: float | None
    reason: str


def search(
    operation: str,
    key: Key,
    candidates: Sequence[Any],
    make_checks: MakeChecks,
    make_steps: Callable[[], Sequence[timing.Step]],
    end: float,
    pool: Executor | None = None,
    device: str = "cuda",
    rounds: int = ROUNDS,
) -> list[Candidate]:
    """Check every candidate for `key` until the time `end`, and time those that are right; the table is as before.

    Args:
        make_checks: makes the checks, in each process.
        make_steps: makes the steps to time, one for each set of inputs.
        pool: the processes; None checks them here.
    """
    module = dict(tables())[operation]
    found: list[Candidate] = []
    right: list[Any] = []
    for config, reason in _faults(operation, key, candidates, make_checks, end, pool):
        if reason is None:
            right.append(config)
        else:
            found.append(Candidate(config, None, reason))
    times = measured(module, key, right, make_steps(), device, rounds) if right else {}
    return [*found, *(Candidate(config, times[i], "measured") for i, config in enumerate(right))]


def _faults(
    operation: str,
    key: Key,
    candidates: Sequence[Any],
    make_checks: MakeChecks,
    end: float,
    pool: Executor | None,
) -> list[tuple[Any, str | None]]:
    late = "the time ended before it was checked"
    if pool is None:
        return [
            (c, late if time.monotonic() > end else fault_of(operation, key, c, make_checks))
            for c in candidates
        ]
    futures = [pool.submit(fault_of, operation, key, c, make_checks) for c in candidates]
    _, unfinished = wait(futures, max(0.0, end - time.monotonic()))
    for future in unfinished:
        future.cancel()
    return [(c, late if f in unfinished else f.result()) for c, f in zip(candidates, futures, strict=True)]


def fault_of(operation: str, key: Key, config: Any, make_checks: MakeChecks) -> str | None:
    """Return why `config` cannot serve `key`, or None."""
    return fault(dict(tables())[operation], key, config, _made(make_checks))


@functools.lru_cache(maxsize=1)
def _made(make_checks: MakeChecks) -> Sequence[Check]:
    return make_checks()


def fault(module: Any, key: Key, config: Any, checks: Sequence[Check]) -> str | None:
    """Return why `config` cannot serve `key`: too much shared memory, too many registers, or wrong; or None."""
    before = module.TABLE[key]
    module.override(key, config)
    try:
        with warnings.catch_warnings(), replay.off():  # a candidate that is refused is no news
            warnings.simplefilter("ignore", RuntimeWarning)
            for check in checks:
                check()
    except Exception as error:
        return first_line(error)
    finally:
        module.override(key, before)
    return None


def measured(
    module: Any,
    key: Key,
    configs: Sequence[Any],
    steps: Sequence[timing.Step],
    device: str,
    rounds: int = ROUNDS,
) -> dict[int, float]:
    """Return the milliseconds of each of `configs` by its place; the table is as before afterwards."""
    before = module.TABLE[key]

    def with_entry(config: Any, step: timing.Step) -> timing.Step:
        def run() -> None:
            module.override(key, config)
            step()

        return run

    programs = {str(i): [with_entry(config, step) for step in steps] for i, config in enumerate(configs)}
    try:
        with replay.off():  # each call reads the table
            times = timing.interleaved(programs, rounds, device, warm=False, window=WINDOW)
    finally:
        module.override(key, before)
    return {i: times[str(i)]["p50"] for i in range(len(configs))}


def fastest(found: Sequence[Candidate], before: Any) -> Any:
    """Return the fastest candidate, or `before` if nothing is faster by more than the margin."""
    times = {c.config: c.ms for c in found if c.ms is not None}
    best = min(times, key=times.__getitem__, default=before)
    return before if before in times and times[best] > MARGIN * times[before] else best


def order(key: Key) -> tuple[bool, bool]:
    """Sort what most calls reach first: 16-bit kernels, of attention the backward that most training steps run."""
    return getattr(key, "itemsize", 2) == 4, key.kernel != "bwd"
