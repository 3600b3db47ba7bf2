"""Dependencies point one way (docs/architecture.md), and files stay small enough to read."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastprompt"
FOLDERS = ("fastprompt", "kernels", "bench", "examples", "tests")
MAX_LINES = 500

# The parts of fastprompt that each part may import, besides itself. Enter a new part here and in docs/architecture.md.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "config": set(),
    "ops": {"kernels"},
    "refusals": set(),
    "frozen": {"ops"},
    "vit": {"frozen", "ops", "refusals"},
    "replace": {"vit", "refusals", "ops"},
    "blocks": {"vit", "frozen", "ops"},
    "backbone": {"blocks", "vit", "frozen", "refusals", "config", "ops"},
    "methods": {"backbone", "blocks", "vit", "refusals", "config", "ops"},
    "model": {"methods", "backbone", "blocks", "config"},
    "checkpoint": {"model", "config", "vit"},
    "encoder": {"model"},
    "viz": {"model", "methods", "backbone", "blocks", "vit", "ops"},
    "training": {"model"},
    "calibration": {"ops", "kernels"},
    "cli": {"calibration"},
}
# The ends of the chain may import the public names from `fastprompt` itself.
MAY_IMPORT_THE_PACKAGE = {"training", "cli"}
# The folders beside fastprompt: what each may import of the others.
FOLDERS_ALLOWED: dict[str, set[str]] = {
    "fastprompt": set(),
    "kernels": {"fastprompt"},  # fastprompt.kernels alone, see ALLOWED
    "bench": {"fastprompt"},
    "examples": {"fastprompt", "bench"},
    "tests": {"fastprompt", "bench", "examples", "kernels"},
}


def part_of(path: Path) -> str:
    """Return "ops" for fastprompt/ops/dispatch.py, "vit" for fastprompt/vit.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, on_import: bool = False) -> set[str]:
    """Return the full names of the modules that the file imports; `from a import b` counts as a.b.

    With `on_import`, only imports that run when the file is imported, not those inside functions or for type checkers.
    """
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        delayed = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        if not (on_import and delayed):
            pending.extend(ast.iter_child_nodes(node))
    return found


def package_files() -> list[Path]:
    """Return the Python files of fastprompt; its kernels lie behind a link, which rglob does not follow everywhere."""
    return sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")})


def test_parts_import_only_what_lies_below_them() -> None:
    known = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    wrong: list[str] = []
    for path in package_files():
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


def test_the_arrows_have_no_circle() -> None:
    TopologicalSorter(ALLOWED).prepare()  # raises CycleError
    TopologicalSorter(FOLDERS_ALLOWED | {"kernels": set()}).prepare()


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_what_lies_below_them(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name in imports(path)
        if (top := name.partition(".")[0]) in FOLDERS and top not in {folder, *FOLDERS_ALLOWED[folder]}
    ]
    assert not wrong


def test_files_import_each_other_in_no_circle() -> None:
    """Also inside a part, when the modules are imported."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in ("bench", "examples")
        for path in (ROOT / folder).rglob("*.py")
    }
    modules |= {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package_files()
    }
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = imports(path, on_import=True)
        found = {n if n in modules else n.rpartition(".")[0] for n in names}
        graph[module] = {n for n in found if n in modules and n != module}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_methods_name_no_backend() -> None:
    for path in (PACKAGE / "methods").glob("*.py"):
        words = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not words & {"triton", "cuda", "cpu", "eager"}, path
        assert not [n for n in imports(path) if "dispatch" in n or "kernels" in n], path


def test_operations_import_no_timm() -> None:
    for path in [*(PACKAGE / "ops").glob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert not [n for n in imports(path) if n.split(".")[0] == "timm"], path


def test_only_one_function_launches_triton_kernels() -> None:
    """`kernel[grid](...)` stands in launch.py and nowhere else."""
    for path in (ROOT / "kernels" / "triton").glob("*.py"):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        ]
        assert bool(calls) == (path.name == "launch.py"), path


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_too_long(folder: str) -> None:
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
