"""Compile every Triton kernel for GPUs that need not be there, and read its machine code.

    python -m bench.offline [--arch 80 90 100] [--operation NAME] [--only NAME] [--entries] [--json FILE]

With `--entries`, each entry of the tables in each dtype; without, also the shapes and options that compile to other
code. One line a kernel. The exit status is 1 if a kernel spills more than a few bytes, if it takes more shared memory
than the card has, if its products do not use the matrix instructions of Hopper or Blackwell although they are large
enough, or if a loop ends with one under way that ptxas may spoil.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import triton

from bench import cases
from bench.offline_compile import Compiled, compiling
from bench.sass import Machine, read
from fastprompt.kernels.triton import launch

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Row:
    """One compiled kernel: its launch, its constants, and its machine code."""

    arch: int
    kernel: str
    shape: str
    dtype: str
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    machine: Machine
    fault: str | None

    def __str__(self) -> str:
        m = self.machine
        matrix = " ".join(f"{name}:{count}" for name, count in m.matrix.items()) or "-"
        tiles = " ".join(
            f"{k}={v}" for k, v in self.constants.items() if k[:5] in ("BLOCK", "KEYS") or k[0] in "CDT"
        )
        return (
            f"sm_{self.arch:<3} {self.kernel:<42} {self.shape:<28} w{self.num_warps} s{self.num_stages} "
            f"{m.registers:>3} regs {m.shared / 1024:6.1f} KB {m.instructions:>5} instr "
            f"{m.loop:>4} in loop {matrix:<14} {tiles}" + (f"  FAULT: {self.fault}" if self.fault else "")
        )


def compile_all(arch: int, names: Sequence[str], only: str = "", entries: bool = False) -> Iterator[Row]:
    """Compile the kernels whose name holds `only` that the operations `names` launch for `arch`, each code once.

    `entries`: those of the tables alone.
    """
    seen: set[tuple[object, ...]] = set()
    for operation in map(cases.load, names):
        with compiling(arch) as compiled:
            for shape, call in chain(operation.entries(), () if entries else operation.variants()):
                call()
                for found in compiled:
                    key = (found.name, found.kernel.hash)
                    if key in seen or only not in found.name:
                        continue
                    seen.add(key)
                    machine = read(found)
                    fault = machine.fault(arch) or _slow_products(arch, found, machine) or _in_flight(found)
                    launched = found.constants, found.num_warps, found.num_stages
                    yield Row(arch, found.name, shape, _dtype(found), *launched, machine, fault)
                compiled.clear()


def _dtype(found: Compiled) -> str:
    """Return the dtype that the kernel's first pointer points to, its input's."""
    return next(kind[1:] for kind in found.kernel.src.signature.values() if kind.startswith("*"))


def _slow_products(arch: int, found: Compiled, machine: Machine) -> str | None:
    """Return a fault for warp-level products where the architecture has better ones, in tiles of 64 rows or more."""
    better = {90: "HGMMA", 100: "UTCHMMA"}.get(arch)
    if better is None or "HMMA" not in machine.matrix or better in machine.matrix:
        return None
    resident = arch == 90 and "KEYS" in found.constants  # its products are tall in keys
    few_prompts = found.constants.get("BLOCK_P", 64) < 64
    small = (found.constants.get("BLOCK_M", 64) < 64 or few_prompts) and not resident
    return None if small else f"HMMA instead of {better}"


def _in_flight(found: Compiled) -> str | None:
    """Return a fault for a product of registers that is under way where a loop begins anew.

    On Hopper, ptxas before 13.1 may reuse such registers before they are read (triton-lang/triton#11781).
    """
    waiting = False
    for line in found.kernel.asm["ttgir"].splitlines():
        if "warp_group_dot_wait" in line:
            waiting = False
        elif "warp_group_dot " in line:
            waiting |= "dot_op" in line  # the layout of an operand in registers
        elif "scf.yield" in line and waiting:
            return "a product of registers is under way at the end of a loop"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--operation", choices=cases.NAMES, nargs="+", default=cases.NAMES)
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--entries", action="store_true", help="the entries of the tables alone")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args(arguments)
    if launch.INTERPRETED:
        print("TRITON_INTERPRET is set, so there is nothing to compile; unset it", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message=".*FP_FUSION.*")
    print(f"triton {triton.__version__}")
    rows = []
    for arch in options.arch:
        for row in compile_all(arch, options.operation, options.only, options.entries):
            print(row, flush=True)
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    faults = [row for row in rows if row.fault]
    print(f"{len(rows)} kernels, {len(faults)} with faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
