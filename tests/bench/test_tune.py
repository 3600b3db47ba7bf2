"""The search's own parts that need no GPU: rewriting a table, choosing the fastest, refusing to run."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ops, tune


@pytest.mark.parametrize("operation", tune.operations())
def test_a_rewritten_table_is_the_given_one_and_the_rest_of_the_file_stays(
    operation: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{operation}_config.py"
    shutil.copy(tune.FOLDER / path.name, path)
    before, text = tune.loaded(path).TABLE, path.read_text()
    table = dict(before)
    first, last = next(iter(table)), list(table)[-1]
    table[first] = table[last]
    tune.rewrite(path, table)
    after = tune.loaded(path).TABLE
    assert {k: str(v) for k, v in after.items()} == {k: str(v) for k, v in table.items()}
    start = text.index("TABLE: ")
    assert path.read_text()[:start] == text[:start]
    tune.rewrite(path, dict(before))
    assert {k: str(v) for k, v in tune.loaded(path).TABLE.items()} == {k: str(v) for k, v in before.items()}


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


def test_the_fastest_must_win_by_more_than_noise() -> None:
    assert (
        tune.fastest([("old", 1.0, ""), ("new", 0.5, ""), ("broken", None, "out of memory")], "old") == "new"
    )
    assert tune.fastest([("old", 1.0, ""), ("new", 0.99, "")], "old") == "old"
    assert tune.fastest([("old", None, "wrong"), ("new", 3.0, "")], "old") == "new"
    assert tune.fastest([("old", None, "wrong")], "old") == "old"


def test_candidates_are_checked_and_the_table_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ops.attention_case(2, 9, 3, 2, 8, torch.float32, "cpu")
    exact = case.exact
    table: dict[tuple[Any, ...], Any] = {(90,): "old"}

    def kernel(**inputs: Any) -> Any:
        if table[90,] == "crash":
            raise RuntimeError("out of resource: shared memory")
        return exact(**inputs) * (2 if table[90,] == "wrong" else 1)

    case.ours = {"fastprompt triton": kernel}
    measured: list[str] = []

    def interleaved(steps: dict[str, Any], rounds: int, device: str) -> dict[str, dict[str, float]]:
        for several in steps.values():
            several[0]()
            measured.append(table[90,])
        return {name: {"p50": 1.0 + i} for i, name in enumerate(steps)}

    monkeypatch.setattr(tune.measure, "interleaved", interleaved)
    monkeypatch.setattr(tune.measure, "input_sets", lambda size, device: 1)
    found = list(tune.search(table, (90,), ["old", "wrong", "crash", "new"], (case, ops.FORWARD)))
    assert {c: ms for c, ms, _ in found} == {"old": 1.0, "new": 2.0, "wrong": None, "crash": None}
    assert measured == ["old", "new"]
    assert next(what for c, _, what in found if c == "wrong").startswith("WrongResult")
    assert table == {(90,): "old"}


@pytest.mark.parametrize("operation", tune.operations())
def test_every_key_has_candidates_and_a_call_that_reaches_it(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operation's own `choose` finds the entry by the sizes of the call."""
    module = importlib.import_module(f"fastprompt.kernels.triton.{operation}_config")
    for key in [key for key in module.TABLE if key[0] == 90]:
        assert module.candidates(key), key
        case, mode = tune.CALLS[operation](key)
        sizes = case.shape
        assert mode == (ops.FORWARD if key[1] in ("fwd", "forward") else ops.BOTH)
        if operation == "prompt_attention":
            queries = 1 if key[3] == "one" else sizes["N"]
            keys = sizes["N"] + sizes["P"]
            assert module.choose(key[1], 90, sizes["d"], queries, keys, key[4]) is module.TABLE[key]
        elif operation == "gated_blend":
            assert module.choose(90, key[1], sizes["D"]) is module.TABLE[key]
        elif operation == "prompt_cross_attention":
            total = module.split(sizes["H"], sizes["P"]).total
            reached = min(
                k[2] for k in module.TABLE if (k[0], k[1], k[3]) == (90, key[1], key[3]) and k[2] >= total
            )
            assert reached == key[2]
        elif operation == "row_attention":
            assert module.choose(90, key[1], 16 * sizes["D"], key[3]) is module.TABLE[key]


def test_without_a_gpu_nothing_is_searched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune", tune.operations()[0]])
    assert tune.main() == 2
    assert "no GPU" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tune", "nothing"])
    with pytest.raises(SystemExit):
        tune.main()
