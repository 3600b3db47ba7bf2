"""The contents of an installation: the symlinked kernels, wheel and sdist, the native library, lazy imports."""

from __future__ import annotations

import ast
import importlib.metadata
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

import fastprompt
from fastprompt.kernels import native

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_kernels_are_one_folder_under_two_names() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("a source distribution holds a copy")
    assert (ROOT / "fastprompt" / "kernels").is_symlink()
    assert (ROOT / "fastprompt" / "kernels").resolve() == ROOT / "kernels"


def test_build_isolation_does_not_download_torch(project: dict[str, Any]) -> None:
    assert not [r for r in project["build-system"]["requires"] if re.match(r"torch\b", r)]


def test_oldest_environment_pins_the_declared_floors(project: dict[str, Any]) -> None:
    pins = dict(
        word.split("==")
        for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
        if line.startswith("OLDEST :=")
        for word in line.split()
        if "==" in word
    )
    floors = dict(d.split(">=") for d in project["project"]["dependencies"] if ">=" in d)
    assert floors.keys() == {"torch", "timm"}
    for name, floor in floors.items():
        assert f"{pins[name]}.".startswith(f"{floor}."), (
            f"{name}: the floor is {floor}, the Makefile tests {pins[name]}"
        )


def test_version_is_the_projects(project: dict[str, Any]) -> None:
    try:
        installed = importlib.metadata.version("fastprompt")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert fastprompt.__version__ == installed == project["project"]["version"]


def test_native_library_uses_the_stable_abi_only() -> None:
    path = native.find_library()
    if path is None or shutil.which("nm") is None:
        pytest.skip("no native library, or no nm")
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(path)], check=True, capture_output=True, text=True
    )
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert any(s.startswith("torch_") for s in symbols)
    # CPython's own, and torch's C++ namespaces: either would tie the library to one version.
    assert not [s for s in symbols if re.match(r"_?Py|_Z.*(2at|3c10|5torch)", s)]


def test_wheel_holds_the_package_alone_and_sdist_what_tests_need(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    code = (
        "import sys\n"
        "from scikit_build_core import build\n"
        "build.build_wheel(sys.argv[1], {'wheel.cmake': 'false'})\n"
        "build.build_sdist(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, cwd=ROOT)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastprompt"}
    assert {"fastprompt/py.typed", "fastprompt/kernels/triton/launch.py"} <= set(names)
    with tarfile.open(sdist) as archive:
        folders = {name.split("/")[1] for name in archive.getnames()}
    assert {"fastprompt", "kernels", "bench", "examples", "tests", "docs"} <= folders
    assert ".ci" not in folders


def test_public_names_are_listed_alike_for_python_and_for_type_checkers() -> None:
    tree = ast.parse((ROOT / "fastprompt" / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: f"fastprompt.{module}" for name, module in fastprompt._MODULE_OF.items()}
    assert sorted(typed) == fastprompt.__all__
    # A submodule of the same name would replace the public name once it is imported.
    assert not {module.name for module in pkgutil.iter_modules(fastprompt.__path__)} & typed.keys()


IMPORTS = """
import sys
import fastprompt
heavy = {"torch", "timm", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert set(fastprompt.__all__) <= set(dir(fastprompt))
for name in ("get_promt_model", "_C"):
    assert not hasattr(fastprompt, name), name

# From here on an import of an optional package fails, also a lazy one.
optional = ("sklearn", "matplotlib", "rich")
sys.modules.update(dict.fromkeys(optional))
import fastprompt.ops
import torch
assert torch.ops.fastprompt.prompt_attention
import timm
before = set(sys.modules)
from fastprompt import *
assert get_prompt_model is fastprompt.model.get_prompt_model
assert fastprompt.get_prompt_model is get_prompt_model
added = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
assert added == {"fastprompt"}, added

import importlib, pkgutil
for module in pkgutil.walk_packages(fastprompt.__path__, "fastprompt."):
    if not module.name.endswith("._C"):  # a library of operators, not a Python module
        importlib.import_module(module.name)
from fastprompt.kernels import native
assert native._load.cache_info().currsize == 0, "the native library is loaded at its first use"
"""


def test_imports_are_lazy_and_need_no_optional_package() -> None:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", IMPORTS]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_unknown_attribute_raises_the_usual_error() -> None:
    with pytest.raises(AttributeError, match="module 'fastprompt' has no attribute 'get_promt_model'"):
        fastprompt.get_promt_model


def test_a_submodule_that_lacks_a_dependency_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr(fastprompt, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="timm"):
        fastprompt.not_yet_imported


def test_a_missing_library_is_a_reason_and_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_library", lambda: None)
    reason = native._load.__wrapped__()
    assert reason is not None
    assert "pip install --no-build-isolation" in reason
    assert "\n" not in reason
    monkeypatch.setattr(native, "load", lambda: reason)
    native.warn_missing_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        native.warn_missing_once()
        native.warn_missing_once()
    native.warn_missing_once.cache_clear()
    assert [str(w.message) for w in caught] == [f"fastprompt runs without its native CPU kernels: {reason}"]


def test_a_broken_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / native.LIBRARY_NAME
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "find_library", lambda: broken)
    reason = native._load.__wrapped__()
    assert reason is not None
    assert f"{broken} did not load" in reason
    assert "\n" not in reason
