"""Every configuration in the tables compiles for GPUs that are not there: no spills, the right matrix instructions.

Other shapes and options that make other code of them are compiled by `python -m bench.offline`, which CI runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import cases, offline, sass
from fastprompt.kernels.triton import prompt_attention_config as attention

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "fwd": ("prompt_attention_fwd_kernel", "prompt_attention_fwd_resident_kernel"),
    "dkdv": ("prompt_attention_bwd_dkdv_kernel",),
    "dq": ("prompt_attention_bwd_dq_kernel",),
    "bwd": ("prompt_attention_bwd_resident_kernel",),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m bench.offline` in a process whose kernels are compiled, not interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "bench.offline", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("operation", cases.NAMES)
@pytest.mark.parametrize("arch", offline.ARCHITECTURES)
def test_every_configuration_compiles_without_faults(arch: int, operation: str, tmp_path: Path) -> None:
    names = ["--arch", str(arch), "--operation", operation]
    done = run("--entries", *names, "--json", str(tmp_path / "rows.json"))
    faults = "\n".join(line for line in done.stdout.splitlines() if "FAULT" in line)
    assert done.returncode == 0, f"{faults}\n{done.stderr[-2000:]}"
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32"}
    if operation == "prompt_attention":
        missing = [
            key for key in attention.TABLE if key[0] == arch and not any(holds(row, key) for row in rows)
        ]
        assert not missing, f"compiled nothing of {missing}"


def holds(row: dict[str, Any], key: attention.Key) -> bool:
    """Whether `row` is a kernel of the table's entry `key`."""
    _, kernel, width, _, itemsize = key
    config, constants = attention.TABLE[key], row["constants"]
    tiles = (constants.get("BLOCK_M"), constants.get("BLOCK_N", 0), row["num_warps"], row["num_stages"])
    return (
        row["kernel"] in KERNELS[kernel]
        and tiles == (config.block_m, config.block_n, config.num_warps, config.num_stages)
        and (constants["HEAD_DIM"] > 64) == (width > 64)
        and (row["dtype"] == "fp32") == (itemsize == 4)
    )


def test_a_spill_and_too_much_memory_are_faults() -> None:
    good = sass.Machine(registers=128, stack=0, spills=0, shared=1024, instructions=100, matrix={})
    assert good.fault(90) is None
    for change in ({"stack": 8}, {"spills": 1}, {"shared": 228 << 10}):
        assert sass.Machine(**{**vars(good), **change}).fault(90) is not None
    assert sass.Machine(**{**vars(good), "shared": 100 << 10}).fault(89) is not None


def test_interpreted_kernels_are_not_compiled() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.offline"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "unset it" in done.stderr
