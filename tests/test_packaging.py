"""What an installation is made of: the symlinked kernels, the native library's symbols, lazy imports."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import warnings
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


def test_import_loads_neither_optional_packages_nor_the_native_library() -> None:
    # timm itself imports triton: only what fastprompt adds to the two counts.
    code = (
        "import sys, torch, timm\n"
        "before = set(sys.modules)\n"
        "import fastprompt\n"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "from fastprompt.kernels import native\n"
        "print(sorted(added & {'triton', 'matplotlib', 'sklearn', 'rich'}), native._load.cache_info().currsize)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[] 0"), done.stderr


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
