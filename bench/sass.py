"""Read registers, stack, spills, shared memory and instructions of a compiled kernel off its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

from bench.offline_compile import Compiled

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory that one program may have, by compute capability; the table of 8.0 serves 8.6, 8.9 and 12.0 too.
SHARED_LIMIT = {80: 99 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Warp-level products, Hopper's warpgroup products, Blackwell's fifth-generation ones.
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
# Bytes of spilled registers that an entry may have, if a comment there says what it gains by them.
STACK_LIMIT = 16
_LABEL = r"(\.L_x_\d+)"


@dataclass(frozen=True)
class Machine:
    """One kernel's machine code: `spills` counts local loads and stores, `matrix` matrix instructions by name.

    `loop` is the number of instructions of the first loop with matrix instructions, 0 without one.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    loop: int
    matrix: dict[str, int]

    def fault(self, arch: int) -> str | None:
        """Return why this code must not be used on `arch`, or None."""
        if self.stack > STACK_LIMIT:
            return f"{self.stack} bytes of stack and {self.spills} local loads and stores"
        if self.shared > SHARED_LIMIT[arch]:
            return f"{self.shared} bytes of shared memory, of {SHARED_LIMIT[arch]}"
        return None


def read(compiled: Compiled) -> Machine:
    """Disassemble `compiled` with the tools of Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "--no-dataflow", "-c", file.name)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers for {compiled.name}:\n{usage}")
    instruction = r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*)"
    lines = re.findall(rf"^(?:{_LABEL}:|{instruction})", code, re.MULTILINE)
    opcodes = Counter(opcode for _, opcode, _ in lines if opcode)
    return Machine(
        registers=int(found[1]),
        stack=int(found[2]),
        spills=opcodes["LDL"] + opcodes["STL"],
        shared=compiled.kernel.metadata.shared,
        instructions=sum(opcodes.values()),
        loop=_matrix_loop(lines),
        matrix={name: opcodes[name] for name in MATRIX if opcodes[name]},
    )


def _matrix_loop(lines: list[tuple[str, str, str]]) -> int:
    """Count from a label to the branch back to it, with matrix instructions between.

    `lines` are (label, opcode, operands). The first such branch is the loop's own: on Blackwell, code behind the
    kernel's end branches back too, from waits.
    """
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    for label, opcode, operands in lines:
        if label:
            labels[label] = len(opcodes)
            continue
        opcodes.append(opcode)
        target = re.search(_LABEL, operands) if opcode == "BRA" else None
        if target and target[1] in labels:
            body = opcodes[labels[target[1]] :]
            if any(name in body for name in MATRIX):
                return len(body)
    return 0


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], check=True, capture_output=True, text=True).stdout
