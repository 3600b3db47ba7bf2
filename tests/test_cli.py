"""The command line: what it prints, and one clear line for a mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastprompt
from fastprompt import cli


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastprompt {fastprompt.__version__}\n"


def test_backends_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backends"]) == 0
    assert capsys.readouterr().out == f"{fastprompt.backends()}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no command"),
        pytest.param(["dmeo"], id="unknown command"),
        pytest.param(["demo", "--seeds", "two"], id="seeds no number"),
        pytest.param(["demo", "--sedes", "2"], id="unknown option"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["0", "-3", "101"])
def test_seeds_out_of_range_are_one_line(
    seeds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--seeds", seeds, "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message == f"fastprompt: error: --seeds must lie in 1..100; got {seeds}\n"


def test_an_out_folder_that_is_a_file_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("here already")
    assert cli.main(["demo", "--out", str(taken)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastprompt: error: --out")
    assert message.count("\n") == 1
    assert taken.read_text() == "here already"


def test_missing_packages_are_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_installed", lambda name: name != "rich")
    assert cli.main(["demo", "--quick"]) == 2
    assert "needs rich; run pip install 'fastprompt[train]'" in capsys.readouterr().err


def test_the_module_runs_as_a_program_and_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['fastprompt', '--help']\n"
        "from fastprompt import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('sklearn', 'matplotlib', 'rich') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "demo" in found.stdout
    assert found.stdout.splitlines()[-1] == "[]"
