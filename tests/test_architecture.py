"""Dependencies point one way (docs/architecture.md), and files stay small enough to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastprompt"
MAX_LINES = 500

# What each part of fastprompt may import of fastprompt, besides itself. A new part has to be entered here.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "ops": {"kernels"},
    "config": set(),
    "refusals": set(),
    "vit": {"ops", "refusals"},
    "blocks": {"vit", "ops"},
    "backbone": {"blocks", "config", "vit", "refusals", "ops"},
    "methods": {"backbone", "blocks", "config", "vit", "refusals", "ops"},
    "model": {"backbone", "config", "methods"},
    "checkpoint": {"model", "config", "vit"},
    "encoder": {"model"},
    "viz": {"model", "methods", "backbone", "blocks", "vit", "ops"},
    "replace": {"vit", "refusals", "ops"},
    "training": {"model"},
    "demo": {"training", "model", "methods", "config", "backbone", "blocks", "vit", "ops", "replace"},
    "cli": {"demo"},
}
# The public names: what stands at the end of the chain may use them, what they are made of may not.
MAY_IMPORT_THE_PACKAGE = {"training", "demo", "cli"}


def part_of(path: Path) -> str:
    """ "ops" for fastprompt/ops/dispatch.py, "vit" for fastprompt/vit.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of the modules that the file imports, wherever in the file; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_parts_import_only_what_lies_below_them() -> None:
    known = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    wrong: list[str] = []
    for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")]):
        part = part_of(path)
        if part == "__init__":
            continue
        assert part in ALLOWED, f"{path}: enter {part!r} in ALLOWED and in docs/architecture.md"
        for name in imports(path):
            top, _, rest = name.partition(".")
            if top != "fastprompt":
                continue
            other = rest.partition(".")[0]
            if other in known:
                allowed = other == part or other in ALLOWED[part]
            else:
                allowed = part in MAY_IMPORT_THE_PACKAGE
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_methods_name_no_backend() -> None:
    for path in (PACKAGE / "methods").glob("*.py"):
        words = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not words & {"triton", "cuda", "cpu", "eager"}, path
        assert not [n for n in imports(path) if "dispatch" in n or "kernels" in n], path


def test_operations_import_no_timm() -> None:
    for path in [*(PACKAGE / "ops").glob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert not [n for n in imports(path) if n.split(".")[0] == "timm"], path


@pytest.mark.parametrize("folder", ["fastprompt", "kernels", "bench", "tests"])
def test_no_file_is_too_long(folder: str) -> None:
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
