"""The documentation holds: its code runs, what it names exists, what is public is in it, its tables are the data's."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fastprompt
from bench import report
from fastprompt import PromptConfig, ops
from fastprompt.kernels import identities, native
from fastprompt.kernels.triton import launch
from fastprompt.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = ("fastprompt", "kernels", "bench", "examples", "tests", "docs", ".ci")


class Block(NamedTuple):
    """One fenced block; `follows`: nothing but blank lines stands between it and the block before."""

    line: int
    language: str
    text: str
    follows: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        follows = bool(found) and not text[end : match.start()].strip()
        found.append(Block(line, match.group(1), match.group(2).rstrip("\n"), follows))
        end = match.end()
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


# Without the native library or with a GPU the table of backends is another one.
AS_IN_THE_PAGES = native.load() is None and not torch.cuda.is_available()


@pytest.fixture
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pages show what a reader sees, who has run no kernel, not even interpreted ones."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(identities, "known", {})
    dispatch.why_no_triton.cache_clear()
    yield
    dispatch.why_no_triton.cache_clear()


@pytest.mark.parametrize("name", [n for n in NAMES if "```python" in (ROOT / n).read_text(encoding="utf-8")])
def test_code_blocks_run_in_order(
    name: str, one_thread: None, not_interpreted: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The blocks of a page share one namespace; a `text` block right after one is what it prints."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    namespace: dict[str, Any] = {"__name__": "documentation"}
    printed = ""
    for block in blocks(ROOT / name):
        if block.language == "python":
            # Padded, so that a traceback names the page's own line.
            code = compile("\n" * block.line + block.text, name, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(code, namespace)
            printed = stdout.getvalue().rstrip("\n")
        elif block.language == "text" and block.follows and AS_IN_THE_PAGES:
            assert printed == block.text, f"{name}:{block.line}"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name} links to {target}"
        if heading:
            assert heading in headings(file), f"{name} links to {target}"


def headings(page: Path) -> set[str]:
    """The anchors that a Markdown page offers."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name: str) -> None:
    for code in inline_code(ROOT / name):
        path = code.strip().rstrip("/")
        first = path.split("/")[0]
        # What a run makes is not in a fresh checkout.
        if "/" not in path or first not in FOLDERS or path.startswith("bench/results"):
            continue
        if not re.fullmatch(r"[\w./-]+", path):
            continue
        assert (ROOT / path).exists(), f"{name} names {path}"


@pytest.mark.parametrize("name", NAMES)
def test_fastprompt_names_exist(name: str) -> None:
    for code in inline_code(ROOT / name):
        for dotted in re.findall(r"(?<![\w./])fastprompt((?:\.[A-Za-z_]\w*)+)", code):
            parts = dotted[1:].split(".")
            assert resolves(parts), f"{name} names fastprompt{dotted}"


def resolves(parts: list[str]) -> bool:
    """Whether fastprompt.a.b... is a module or an attribute."""
    found: Any = fastprompt
    for i, part in enumerate(parts):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(["fastprompt", *parts[: i + 1]]))
            except ImportError:
                return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("module", [fastprompt, ops], ids=lambda m: m.__name__)
def test_every_public_name_is_documented(module: Any) -> None:
    documented = "\n".join(page.read_text(encoding="utf-8") for page in PAGES[2:])
    missing = [n for n in module.__all__ if not re.search(rf"\b{n}\b", documented)]
    assert not missing, f"public in {module.__name__}, but not in docs/: {missing}"


@pytest.mark.parametrize("config", PromptConfig.__subclasses__(), ids=lambda c: c.__name__)
def test_every_configuration_field_is_documented(config: type[PromptConfig]) -> None:
    """The page of a method has a heading of its configuration's name and a row for each field, with its default."""
    (page,) = [p for p in PAGES if f"## `{config.__name__}`" in p.read_text(encoding="utf-8")]
    text = page.read_text(encoding="utf-8")
    for field in dataclasses.fields(config):
        default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        row = f"| `{field.name}` | {default} |".replace("'", '"')
        assert row in text, f"{page.name} lacks {row}"


def test_every_environment_variable_is_in_the_table() -> None:
    sources = [
        path
        for folder in ("fastprompt", "kernels", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__).resolve()
    ]
    sources += [p for p in (ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run") if p.exists()]
    used = {n for p in sources for n in re.findall(r"\bFASTPROMPT_[A-Z_]+\b", p.read_text(encoding="utf-8"))}
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    assert used
    assert sorted(n for n in used if f"| `{n}` |" not in page) == []


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE)
        assert set(named) <= targets, page


def test_readmes_table_is_the_measurements() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(report.BEGIN) == readme.count(report.END) == 1
    if not report.RESULTS.exists():
        pytest.skip("no measurements yet")
    result = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert readme == report.written(readme, result), "run python -m bench.report --write"


def test_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [p.name for p in PAGES[2:] if p.name != "index.md"]
    assert [p for p in pages if f"({p})" not in index] == []
