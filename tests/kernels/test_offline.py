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

from bench import cases, offline, offline_compile, sass
from fastprompt.kernels.triton import launch
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
    """Return whether `row` is a kernel of the table's entry `key`."""
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
    good = sass.Machine(registers=128, stack=0, spills=0, shared=1024, instructions=100, loop=50, matrix={})
    assert good.fault(90) is None
    for change in ({"stack": sass.STACK_LIMIT + 8, "spills": 4}, {"shared": 228 << 10}):
        assert sass.Machine(**{**vars(good), **change}).fault(90) is not None
    assert sass.Machine(**{**vars(good), "shared": 100 << 10}).fault(89) is not None


PROGRAM = """
import torch
from bench import offline_compile, sass
from fastprompt.kernels.triton import gated_blend
x, gate = torch.empty(2, 9, 768, device="meta", dtype=torch.bfloat16), torch.empty((), device="meta")
with offline_compile.compiling(90) as compiled:
    gated_blend.forward(x, x, x[:, :3], gate, 1, 3, None, None, 1e-6)
(kernel,) = compiled
print(kernel.name, kernel.constants["NORM"], kernel.num_warps, sass.read(kernel).fault(90))
"""


def test_one_kernel_compiles_for_a_gpu_that_is_not_there() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["residual_norm_fwd_kernel", "True", "1", "None"], done.stderr[-2000:]


LOOPS = """
import re
import torch
from bench import offline_compile
from bench.ops import meta
from fastprompt.kernels.triton import prompt_attention, prompt_segment


def under_way(ptx):
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\\$\\w+:", line)}
    for end, line in enumerate(lines):
        back = re.search(r"bra(?:\\.uni)?\\s+(\\$\\w+)", line)
        if back and labels[back[1]] < end:
            groups = 0
            for inside in lines[labels[back[1]] : end]:
                groups += "wgmma.commit_group" in inside
                wait = re.search(r"wgmma\\.wait_group\\.sync\\.aligned (\\d+)", inside)
                groups = min(groups, int(wait[1])) if wait else groups
            yield groups


q, prompt, lse = (meta(*shape, dtype=dtype) for shape, dtype in (
    ((2, 300, 3, 40), torch.bfloat16), ((150, 3, 40), torch.bfloat16), ((2, 3, 300), torch.float32)
))
with offline_compile.compiling(90) as compiled:
    rest = prompt, prompt, None, None
    prompt_segment.merge(q, q, lse, *rest, 0.2)
    for part in (prompt, prompt[:50]):  # dq apart from the prompts' gradients, and with them
        prompt_segment.segment_backward(q, q, part, part, None, None, q, lse, 0.2, True, True, True, q)
    prompt_attention.forward(q, q, q, *rest, 0.2, way="looped")
    prompt_attention.backward(q, q, q, q, *rest, q, lse, 0.2, [True] * 6, way="looped")
for each in compiled:
    groups = list(under_way(each.kernel.asm["ptx"]))
    if "wgmma" in each.kernel.asm["ptx"]:
        print(each.name, *groups)
"""


@pytest.mark.slow
def test_no_product_is_under_way_where_a_loop_begins_anew() -> None:
    """Copies for later passes may overwrite what such a product of a head in two pieces reads."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LOOPS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    found = [line.split() for line in done.stdout.splitlines()]
    segment = ["prompt_segment_fwd_kernel", "prompt_segment_bwd_dq_kernel"] + 2 * [
        "prompt_segment_bwd_kernel"
    ]
    attention = [f"prompt_attention_{name}_kernel" for name in ("fwd", "bwd_dkdv", "bwd_dq")]
    assert [name for name, *_ in found] == segment + attention, done.stderr[-2000:]
    assert all(groups and set(groups) == {"0"} for _, *groups in found), found


ONCE = """
import torch
from bench import offline_compile
from bench.ops import meta
from fastprompt.kernels.triton import prompt_attention
q, prompt, out = (meta(*shape) for shape in ((1, 300, 1, 16), (10, 1, 16), (1, 300, 1, 16)))
with offline_compile.compiling(80) as compiled:
    for temperature in meta(2).unbind():
        given = q, q, q, prompt, prompt, temperature[None], None
        prompt_attention.forward(*given, 0.25, way="looped")
        prompt_attention.backward(out, *given, out, meta(1, 1, 300), 0.25, [True] * 6, way="looped")
hashes = [each.kernel.hash for each in compiled]
print(hashes[: len(hashes) // 2] == hashes[len(hashes) // 2 :])
"""


@pytest.mark.slow
def test_the_address_of_a_temperature_compiles_nothing_again() -> None:
    """Temperatures of several blocks in one tensor start at any multiple of 4 bytes."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ONCE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr[-2000:]


def test_interpreted_kernels_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert offline.main([]) == 2
    assert "unset it" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), offline_compile.compiling(90):
        pass
    assert launch.recorder is None
