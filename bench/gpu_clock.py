"""Clock, power and temperature of the GPU while a stage runs, as records."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import gpu_report

FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
    "utilization": "utilization.gpu",
}
SECONDS = 3.0


@contextmanager
def sampling(records: Path, stage: str) -> Iterator[None]:
    """Append a record every few seconds inside; nothing without `nvidia-smi`."""
    if shutil.which("nvidia-smi") is None:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_sample, args=(records, stage, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)


def _sample(records: Path, stage: str, over: threading.Event) -> None:
    while not over.wait(SECONDS):
        found = read()
        if found:
            gpu_report.append(records, {"kind": "clock", "part": stage, **found})


def read() -> dict[str, float]:
    """Return what `nvidia-smi` says of the first GPU, without what it does not know."""
    query = [
        "nvidia-smi",
        f"--query-gpu={','.join(FIELDS.values())}",
        "--format=csv,noheader,nounits",
        "--id=0",
    ]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = {}
    for name, value in zip(FIELDS, said.strip().split(","), strict=False):
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found
