"""The search's own parts that need no GPU: rewriting a table, choosing the fastest, refusing to run."""

from __future__ import annotations

import importlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, ops, tune
from bench.cases import prompt_attention
from bench.correctness import WrongResult
from fastprompt.calibration import search

by_operation = pytest.mark.parametrize("operation", cases.NAMES)


@by_operation
def test_a_rewritten_table_is_the_given_one_and_the_rest_of_the_file_stays(
    operation: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{operation}_config.py"
    shutil.copy(tune.FOLDER / path.name, path)
    before, text = tune.config_of(operation).TABLE, path.read_text()
    first, last = next(iter(before)), list(before)[-1]
    table = {**before, first: before[last]}
    tune.rewrite(path, table)
    assert tune.entries_in(path) == {str(k): str(v) for k, v in table.items()}
    assert path.read_text().partition("TABLE: ")[0] == text.partition("TABLE: ")[0]
    tune.rewrite(path, before)
    assert tune.entries_in(path) == {str(k): str(v) for k, v in before.items()}


def test_a_file_without_a_table_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x_config.py"
    path.write_text("OTHER = {}\n")
    with pytest.raises(ValueError, match="assigns no TABLE"):
        tune.rewrite(path, {})
    assert path.read_text() == "OTHER = {}\n"


def test_what_cannot_be_written_down_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x_config.py"
    path.write_text("TABLE = {1: 2}\nTABLE[1] = 5\n")
    with pytest.raises(ValueError, match="another table"):
        tune.rewrite(path, {1: 3})  # type: ignore[dict-item]
    assert path.read_text() == "TABLE = {1: 2}\nTABLE[1] = 5\n"


def test_candidates_are_checked_on_a_case_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    case = prompt_attention.case(2, 9, 3, 2, 8, torch.float32, "cpu")
    exact = case.exact
    case.ours = {tune.NAME: exact}
    checks = tune.checks([(case, ops.FORWARD), (case, ops.BOTH)])
    assert len(checks) == 2
    for check in checks:
        check()
    case.ours[tune.NAME] = lambda **inputs: 2 * exact(**inputs)
    for check in checks:
        with pytest.raises(WrongResult):
            check()
    case.ours.clear()
    with pytest.raises(NotImplementedError, match="no Triton kernel here"):
        tune.checks([(case, ops.FORWARD)])


def test_an_entry_for_many_keys_is_judged_at_several_lengths() -> None:
    table = tune.config_of("prompt_attention").TABLE
    (key,) = (k for k in table if k[:5] == (90, "dq", 64, "long", 2))
    found = cases.load("prompt_attention").timed(key, tune.TIMED)
    assert [c.shape["N"] for c in found] == [397, 577, 1370]
    work = [c.shape["B"] * c.shape["N"] ** 2 for c in found]
    assert max(work) < 1.2 * min(work)


# The sizes by which the launchers of each operation choose an entry, from its key and the shape of a case.
CHOICES: dict[str, Any] = {
    "prompt_attention": lambda key, shape: (
        *(shape["d"], 1 if key.length == "one" else shape["N"], shape["N"] + shape["P"], key.itemsize),
    ),
    "residual_norm": lambda key, shape: (shape["D"],),
    "gated_blend": lambda key, shape: (shape["D"], key.norm),
    "folded_cross_attention": lambda key, shape: (
        *(tune.config_of("folded_cross_attention").split(shape["H"], shape["P"]).total, key.itemsize),
    ),
    "row_attention": lambda key, shape: (16 * shape["D"], key.itemsize),
}


@by_operation
def test_every_entry_has_candidates_and_calls_that_reach_it(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operation's own `choose` finds the entry, and after a change the changed one: nothing remembers it."""
    config = tune.config_of(operation)
    for key in [key for key in config.TABLE if key.architecture == 90]:
        other = next(c for c in config.candidates(key) if c != config.TABLE[key])
        monkeypatch.setitem(config.TABLE, key, other)
        for images, widest in ((tune.TIMED, False), (tune.CHECKED, True)):
            case, mode = tune.call_of(operation, key, images, widest)
            assert mode == (ops.FORWARD if key.kernel == "fwd" else ops.BOTH)
            sizes = CHOICES[operation](key, case.shape)
            assert config.choose(90, key.kernel, *sizes) is other, key


def test_keys_of_the_most_used_kernels_come_first() -> None:
    table = importlib.import_module("fastprompt.kernels.triton.prompt_attention_config").TABLE
    keys = sorted((k for k in table if k[0] in (80, 90)), key=search.order)
    assert keys[0][1] == "bwd"
    assert [k[4] for k in keys] == sorted(k[4] for k in keys)


def test_without_a_gpu_nothing_is_searched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune", cases.NAMES[0]])
    assert tune.main() == 2
    assert "no GPU" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tune", "nothing"])
    with pytest.raises(SystemExit):
        tune.main()


def test_what_is_found_is_saved_key_by_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    operation = "folded_cross_attention"
    table = tune.config_of(operation).TABLE
    keys = sorted((k for k in table if k[0] == 90 and "fwd" in k), key=search.order)
    calls = iter([{0: 2.0, 1: 1.0}, {0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.0}])

    def measured(module: Any, key: Any, candidates: list[Any], *rest: Any) -> dict[int, float]:
        if key == keys[3]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {**dict.fromkeys(range(len(candidates)), 5.0), **next(calls)}

    monkeypatch.setattr(tune, "architecture", lambda: 90)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(search, "fault_of", lambda *arguments: None)
    monkeypatch.setattr(search, "measured", measured)
    monkeypatch.setattr(tune, "steps_of", lambda operation, key: [])
    saved: list[Any] = []
    chosen = tune.tune(operation, 5.0, "fwd", 2, lambda table: saved.append(dict(table)))
    changed = [key for key in table if chosen[key] != table[key]]
    assert changed == [keys[0], keys[2]]
    assert [[key for key in table if found[key] != table[key]] for found in saved] == [changed[:1], changed]
    printed = capsys.readouterr().out
    assert f"{keys[3]}: RuntimeError: CUDA error" in printed
    assert "the search ends here" in printed


def test_nothing_is_searched_when_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "architecture", lambda: 90)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    assert tune.tune("gated_blend", 0.0, "", 1, pytest.fail) == tune.config_of("gated_blend").TABLE
    assert "the time ended before it; kept as it is" in capsys.readouterr().out
