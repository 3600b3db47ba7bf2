"""`fastprompt calibrate` without a GPU: nothing wrong is chosen, and a run that is stopped keeps what it has."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastprompt
from fastprompt import cli
from fastprompt.calibration import attention, calibrate, exact, search, tiles
from fastprompt.calibration.attention import Shape
from fastprompt.calibration.tiles import Work
from fastprompt.kernels.triton import launch
from fastprompt.ops import attention_choice, dispatch, profile
from fastprompt.ops.attention_choice import WAYS
from fastprompt.ops.profile_file import Profile, read, tables, write

SHAPE = Shape(5, 2, 16, 3, 2, "float32", temperature=True)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    profile.forget()


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels take seconds."""
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: "not in this test")


# Nothing is timed before it is right --------------------------------------------------------------------------------


def trial(run: Callable[..., Any]) -> exact.Trial:
    """A product, and a sum that cancels."""

    def product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (a @ b) * c

    inputs = {"a": torch.randn(6, 8, 64), "b": torch.randn(64, 8), "c": torch.randn(())}
    return exact.Trial(lambda **given: run(product(**given)), product, product, inputs, (), ("a",))


def test_a_call_is_judged_by_its_outputs_and_its_gradients() -> None:
    assert 0 < trial(lambda out: out).check() < 1e-5
    assert trial(lambda out: out).check(backward=False) < 1e-6
    with pytest.raises(exact.Wrong, match="output 0 is off by"):
        trial(lambda out: out * 1.001).check()
    with pytest.raises(exact.Wrong, match="off by nan"):
        trial(lambda out: torch.where(out == out.max(), torch.nan, out)).check()
    twice = trial(lambda out: out + (out - out.detach()))
    twice.check(backward=False)
    with pytest.raises(exact.Wrong, match="gradient of a is off by"):
        twice.check()


def test_only_the_first_images_are_compared_but_all_are_run() -> None:
    seen: list[int] = []

    def spoil(out: torch.Tensor) -> torch.Tensor:
        seen.append(len(out))
        return torch.cat([out[: exact.Trial.CHECKED], 2 * out[exact.Trial.CHECKED :]])

    trial(spoil).check()
    assert seen == [6]


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_way_is_refused_for_the_direction_in_which_it_is_wrong(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = SHAPE.draw("cpu")
    assert {way: attention.why_wrong(way, inputs, backward) for way in WAYS} == dict.fromkeys(WAYS)
    original = attention._forward

    def forward(**given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = original(**given)
        return (1.01 * out if attention_choice.forced() == "split" else out), lse

    monkeypatch.setattr(attention, "_forward", forward)
    found = {way: attention.why_wrong(way, inputs, backward) for way in WAYS}
    wrong = [way for way, reason in found.items() if reason is not None]
    assert wrong == ([] if backward else ["split"])


def test_both_directions_are_timed_by_every_way_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(attention.measure(SHAPE, "cpu", rounds=1))
    assert [m.backward for m in found] == [False, True]
    assert all(set(m.microseconds) == set(WAYS) and not m.refused for m in found)
    assert (found[0].heads, found[0].prompts, found[0].temperature) == (2, 3, True)
    monkeypatch.setattr(attention, "why_wrong", lambda way, *rest: "wrong" if way == "joined" else None)
    found = list(attention.measure(SHAPE, "cpu", rounds=1))
    assert all(m.refused == {"joined": "wrong"} and "joined" not in m.microseconds for m in found)
    monkeypatch.setattr(attention, "why_wrong", lambda *rest: "wrong")
    assert list(attention.measure(SHAPE, "cpu", rounds=1)) == []


# The search ---------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """A table with one entry, of an operation that is as wrong or as slow as the entry says."""

    TABLE: dict[Any, Any]

    def override(self, key: Any, config: Any) -> None:
        self.TABLE[key] = config

    def check(self) -> None:
        if self.TABLE["key"] == "crash":
            raise RuntimeError("out of resource: shared memory\nmore lines")
        if self.TABLE["key"] == "wrong":
            raise exact.Wrong("output is off by 3")

    def step(self) -> None:
        time.sleep({"slow": 0.02, "fast": 0.002}[self.TABLE["key"]])


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    found = Table({"key": "slow"})
    monkeypatch.setattr(search, "tables", lambda: [("operation", found)])
    return found


@pytest.mark.parametrize("parallel", [False, True])
def test_candidates_are_checked_then_timed_and_the_table_is_put_back(table: Table, parallel: bool) -> None:
    candidates = ["slow", "crash", "wrong", "fast"]
    made: list[int] = []

    def checks() -> list[Callable[[], None]]:
        made.append(1)
        return [table.check]

    with ThreadPoolExecutor(1) as threads:
        found = search.search(
            *("operation", "key", candidates, checks, lambda: [table.step]),
            *(time.monotonic() + 60, threads if parallel else None, "cpu", 2),
        )
    reasons = {c.config: c.reason for c in found}
    assert reasons == {
        "slow": "measured",
        "crash": "RuntimeError: out of resource: shared memory",
        "wrong": "Wrong: output is off by 3",
        "fast": "measured",
    }
    assert {c.config for c in found if c.ms is not None} == {"slow", "fast"}
    assert search.fastest(found, "slow") == "fast"
    assert table.TABLE == {"key": "slow"}
    assert made == [1]


def test_checks_are_made_once_for_all_candidates_in_each_process() -> None:
    a, b = (pickle.loads(pickle.dumps(search.Later(max, (1, 2)))) for _ in range(2))
    assert hash(a) == hash(b)
    assert a == b
    assert a() == 2


def test_what_the_time_does_not_allow_is_neither_checked_nor_timed(table: Table) -> None:
    arguments = ("operation", "key", ["slow", "fast"], lambda: [table.check], lambda: [table.step])
    found = search.search(*arguments, time.monotonic() - 1, None, "cpu")
    assert {c.reason for c in found} == {"the time ended before it was checked"}
    assert search.fastest(found, "slow") == "slow"


def test_the_fastest_must_win_by_more_than_noise() -> None:
    def found(**times: float | None) -> list[search.Candidate]:
        return [search.Candidate(name, ms, "") for name, ms in times.items()]

    assert search.fastest(found(old=1.0, new=0.5, broken=None), "old") == "new"
    assert search.fastest(found(old=1.0, new=0.99), "old") == "old"
    assert search.fastest(found(old=None, new=3.0), "old") == "new"
    assert search.fastest(found(old=None), "old") == "old"


def test_the_entries_that_a_call_reads_are_found_in_all_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = dict(tables())
    before = {name: module.TABLE for name, module in modules.items()}
    keys = {name: list(module.TABLE)[:2] for name, module in modules.items()}
    order = [(name, keys[name][i]) for i in (1, 0, 1) for name in ("prompt_attention", "gated_blend")]

    def step(self: Work, device: str, backward: bool) -> Callable[[], None]:
        assert backward
        return lambda: [modules[name].TABLE[key] for name, key in order] and None

    monkeypatch.setattr(Work, "step", step)
    assert tiles.entries(Work("prompt_attention", SHAPE), "cpu") == list(dict.fromkeys(order))
    assert all(module.TABLE is before[name] for name, module in modules.items())


@pytest.mark.parametrize("operation", tiles.CALLS)
def test_calls_of_every_operation_are_defined_as_their_specification(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain form of each in place of Triton's kernel."""
    found = tiles.CALLS[operation](Work(operation, replace(SHAPE, temperature=False)), "cpu")
    found.run = found.plain
    assert found.check() < 1e-5


# The whole ----------------------------------------------------------------------------------------------------------


def run(out: Path | None, **options: Any) -> tuple[Profile, list[str]]:
    lines: list[str] = []
    found = fastprompt.calibrate(out=out, dry_run=True, say=lines.append, **options)
    return found, lines


def test_a_dry_run_writes_a_profile_that_this_machine_follows(
    no_triton: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "profile.json"
    found, lines = run(file)
    assert read(file) == found
    assert {(m.prompts, m.backward) for m in found.ways} == {(3, False), (3, True), (0, False), (0, True)}
    assert any(line.startswith("attention 2 x 2 heads of 16, 5+3 keys, float32") for line in lines)
    assert "tile sizes: not in this test" in lines
    monkeypatch.setenv(profile.VARIABLE, str(file))
    profile.forget()
    assert profile.in_force() == (found, str(file))
    call = attention_choice.Call(None, torch.float32, 16, 5, 5, 3, temperature=True)
    assert profile.way(call) == found.ways[0].fastest


def test_a_dry_run_without_a_file_writes_none(
    no_triton: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(profile.VARIABLE, raising=False)
    found, lines = run(None)
    assert found.ways
    assert lines[-1] == "no file was written"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_stopped_leaves_a_valid_profile_of_what_it_has(
    no_triton: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "profile.json"
    kept: list[str] = []

    def say(line: str) -> None:
        kept.append(line)
        if len(kept) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastprompt.calibrate(out=file, dry_run=True, say=say)
    assert len(read(file).ways) == 3
    resumed, _ = run(file, time_limit=-1.0)
    assert len(resumed.ways) == 3


def test_when_the_time_is_over_nothing_is_begun(no_triton: None, tmp_path: Path) -> None:
    found, lines = run(tmp_path / "p.json", time_limit=-1.0)
    assert found.ways == []
    assert len([line for line in lines if line.endswith("the time ended before it")]) == 2
    assert not (tmp_path / "p.json").exists()


def test_a_shape_that_fails_does_not_end_the_run(no_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(shape: Shape, device: str, rounds: int) -> Iterator[Any]:
        raise torch.OutOfMemoryError(f"out of memory at {shape.prompts}")
        yield

    monkeypatch.setattr(calibrate.attention, "measure", measure)
    found, lines = run(None)
    assert found.ways == []
    assert [line.rpartition(": ")[2] for line in lines[1:3]] == ["out of memory at 3", "out of memory at 0"]


def test_after_a_crash_of_the_device_nothing_more_is_tried(
    no_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(shape: Shape, device: str, rounds: int) -> Iterator[Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield

    monkeypatch.setattr(calibrate.attention, "measure", measure)
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="what was found before it is kept"):
        fastprompt.calibrate(dry_run=True, say=lines.append)
    assert len(lines) == 2


def test_a_profile_of_this_machine_is_extended_and_any_other_replaced(
    no_triton: None, tmp_path: Path
) -> None:
    file = tmp_path / "profile.json"
    older = next(attention.measure(replace(SHAPE, tokens=7), "cpu", rounds=1))
    for machine, kept in ((profile.machine(), True), ({**profile.machine(), "torch": "1.0"}, False)):
        write(Profile(machine, [older]), file)
        found, _ = run(file)
        assert (older in found.ways) is kept
        assert found.machine == profile.machine()
    file.write_text("{")
    assert run(file)[0].ways


def test_the_shapes_are_those_of_the_models_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrate.block("vit_small_patch16_224") == (197, 6, 64)
    assert calibrate.block("vit_base_patch16_384") == (577, 12, 64)
    models = ("vit_small_patch16_224", "vit_base_patch16_224")
    shapes = calibrate._shapes(models, 64, (50, 0), ("bfloat16",), dry=False)
    assert [(s.tokens, s.heads, s.prompts) for s in shapes] == [
        *((197, 6, 50), (197, 12, 50)),
        *((197, 6, 0), (197, 12, 0)),
    ]
    timed: list[int] = []
    monkeypatch.setattr(attention, "measure", lambda shape, *rest: timed.append(shape.heads) or iter(()))
    run_ = SimpleNamespace(over=False, device="cpu", dry=True, keep=None, say=None)
    calibrate._ways(run_, shapes)  # type: ignore[arg-type]
    assert timed == [12, 12]  # a profile does not tell heads apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["resnet18"]}, "'resnet18' is not a Vision Transformer"),
        ({"models": ["nothing"]}, "'nothing' is not a Vision Transformer"),
        ({"dtypes": ["int8"]}, "no dtype 'int8'; known are float16"),
        ({"batch": 0}, "`batch` must be at least 1"),
        ({"prompts": [-1]}, "`prompts` at least 0; got 64, [-1]"),
    ],
)
def test_wrong_arguments_are_named(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="calibrate") as error:
        fastprompt.calibrate(**options)
    assert message in str(error.value)


def test_without_a_gpu_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="`--dry-run-cpu` tries the program"):
        fastprompt.calibrate()
    assert cli.main(["calibrate"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["calibrate", "--prompts", "ten"]) == 2
    assert "'ten'" in capsys.readouterr().err


def test_the_command_hands_its_options_on_and_shows_the_profile(
    no_triton: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "p.json"
    assert cli.main(["calibrate", "--show"]) == 0
    assert capsys.readouterr().out == "no profile is in force: FASTPROMPT_PROFILE is 'none'\n"
    assert cli.main(["calibrate", "--dry-run-cpu", "--out", str(file), "--time-limit", "60"]) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    monkeypatch.setenv(profile.VARIABLE, str(file))
    profile.forget()
    assert cli.main(["calibrate", "--show"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{file} is in force\n  device cpu\n")
    assert (
        "ways of attention, 4 shapes:\n  2 x 2 heads of 16, 5+3 keys, float32, temperature, forward: "
        in shown
    )
    given: dict[str, Any] = {}
    monkeypatch.setattr(fastprompt, "calibrate", lambda **options: given.update(options))
    options = ["--models", "a,b", "--batch", "3", "--prompts", "1,2", "--dtypes", "float16", "--workers", "0"]
    assert cli.main(["calibrate", *options]) == 0
    given.pop("say")
    assert given == {
        "models": ["a", "b"],
        "batch": 3,
        "prompts": [1, 2],
        "dtypes": ["float16"],
        "workers": 0,
        "dry_run": False,
    }


@pytest.mark.slow
@pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels run on a GPU here")
def test_a_dry_run_searches_the_tables_by_the_interpreter(tmp_path: Path) -> None:
    found, lines = run(tmp_path / "p.json")
    searched = [line.split()[0] for line in lines if "timed," in line]
    assert set(searched) == {name for name, _ in tables()}
    assert [line for line in lines if " refused" in line and "; 2 timed, 0 refused" not in line] == []
    assert read(tmp_path / "p.json") == found
