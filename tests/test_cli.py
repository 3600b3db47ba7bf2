"""The command `fastprompt`: its output, one clear line for a mistake, and a start without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastprompt
from fastprompt import cli

ROOT = Path(__file__).resolve().parents[1]


def test_backends_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backends"]) == 0
    assert capsys.readouterr().out == f"{fastprompt.backends()}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no command"),
        pytest.param(["backend"], id="unknown command"),
        pytest.param(["backends", "--all"], id="unknown option"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_demo_says_in_one_line_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--quick"]) == 2
    message = capsys.readouterr().err
    assert "`python -m examples.digits`" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_starts_without_torch(option: str) -> None:
    code = (
        "import sys\n"
        "from fastprompt import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print({'torch', 'timm', 'numpy', 'triton', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, option]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert lines[0] == (
        "usage: fastprompt [-h] [--version] command ..."
        if option == "--help"
        else f"fastprompt {fastprompt.__version__}"
    )
    assert lines[-1] == "set()"
