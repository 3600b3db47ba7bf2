"""examples/seeing.py writes the figures that docs/seeing.md shows."""

from pathlib import Path

import pytest

from examples import seeing

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_writes_the_figures_of_the_documentation(tmp_path: Path) -> None:
    seeing.main(["--out", str(tmp_path), "--epochs", "1", "--tuning-epochs", "1"])
    written = sorted(p.name for p in tmp_path.iterdir())
    page = (DOCS / "seeing.md").read_text(encoding="utf-8")
    assert len(written) == 5
    for name in written:
        assert f"](images/{name})" in page
        kept = DOCS / "images" / name
        assert kept.read_bytes()[:4] == b"\x89PNG"
        assert kept.stat().st_size < 100_000
