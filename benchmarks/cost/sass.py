"""The machine code of a kernel, as the assembler wrote it: exact, and the same on any machine.

    python -m benchmarks.cost.sass CUBIN [--kernel REGEX]     registers, spills, shared memory, mix of the main loop

Reads cubins of Triton (`compiled.asm["cubin"]`) and of nvcc (`nvcc -cubin -arch=sm_80`). Beside its name and operands an
instruction holds what the assembler decided about time: how long the next one waits, which scoreboards it sets and waits
for (bits 105 to 125 of the 128-bit word; the layout is that of Jia et al., arXiv:1804.06826). walk.py finds out what of it
a warp executes, replay.py how long that takes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

KINDS = [
    ("wgmma", r"HGMMA"),
    ("hmma", r"HMMA"),
    ("mufu", r"MUFU"),
    ("fp32", r"FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2"),
    ("max", r"FMNMX|FSETP|FSEL"),
    ("cvt", r"F2F|I2F|F2I"),
    ("shfl", r"SHFL|MATCH|VOTE|REDUX"),
    ("lds", r"LDSM?\b"),
    ("sts", r"STSM?\b"),
    ("ldgsts", r"LDGSTS"),
    ("ldg", r"LDG\b|LD\b"),
    ("stg", r"STG|ST\b|RED\b|ATOMG|ATOM\b"),
    ("spill", r"LDL|STL"),
    ("bar", r"BAR|WARPSYNC|WARPGROUP\.ARRIVE|SYNCS|ATOMS\.ARRIVE|ARRIVES"),
    ("fence", r"MEMBAR|FENCE"),
    ("wait", r"DEPBAR|LDGDEPBAR|WARPGROUP"),
    ("sreg", r"S2|LDC|R2UR"),
    ("ctrl", r"BRA|BRX|EXIT|NOP|BSSY|BSYNC|BREAK|RET|CALL|ENDCOLLECTIVE|YIELD"),
    ("imad", r"IMAD"),
    ("uniform", r"U[A-Z]"),
    ("int", r""),
]
# What a reader of a table asks for.
CLASSES = {
    "tensor": ("wgmma", "hmma"),
    "exp": ("mufu",),
    "float": ("fp32", "max", "cvt"),
    "shared": ("lds", "sts", "shfl"),
    "global": ("ldg", "ldgsts", "stg"),
    "barrier": ("bar", "fence", "wait"),
    "address": ("imad", "uniform", "int", "sreg"),
    "control": ("ctrl",),
    "spill": ("spill",),
}
CLASS_OF = {kind: name for name, kinds in CLASSES.items() for kind in kinds}


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction. Scoreboards: `sets` is released when the result is there, `reads` when the sources have been read
    (7: none), `waits` is the mask of those that must be clear; `stall` is cycles until the next may issue."""

    pc: int
    guard: str  # predicate it executes under, "" for always
    op: str
    args: str
    stall: int
    sets: int
    reads: int
    waits: int
    kind: str
    size: int  # bytes a warp moves

    @property
    def macs(self) -> float:
        """Multiply-adds of one warp: HMMA.16816 is 16x8x16, a HGMMA.64xNx16 is shared by four warps."""
        if self.kind == "wgmma":
            m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", self.op).groups())
            return m * n * k / 4
        return 16 * 8 * (16 if "16816" in self.op else 8 if "1688" in self.op else 4) if self.kind == "hmma" else 0

    @property
    def shared_operands(self) -> float:
        """Bytes of shared memory that one warp's part of a HGMMA reads: B, and A where that is not in registers. The four
        warps of the product share both reads."""
        if self.kind != "wgmma":
            return 0
        m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", self.op).groups())
        rows = n + (m if re.match(r"R\d+, gdesc", self.args) else 0)
        return rows * k * (4 if "TF32" in self.op else 2) / 4


@dataclass(frozen=True)
class Kernel:
    """A function of a cubin."""

    name: str
    arch: int
    registers: int
    stack: int  # bytes a thread; spilled registers live there
    shared: int  # bytes, the static part
    code: tuple[Instruction, ...]

    @property
    def spills(self) -> int:
        """Instructions that move a register to the stack or back."""
        return sum(x.kind == "spill" for x in self.code)

    @property
    def spills_in_loops(self) -> int:
        """Those between the target of a backward jump and the jump."""
        spans = [(target(x), x.pc) for x in self.code if is_jump(x) and target(x) < x.pc]
        return sum(any(head <= x.pc <= tail for head, tail in spans) for x in self.code if x.kind == "spill")

    def loops(self) -> list[tuple[Instruction, ...]]:
        """Bodies of the innermost loops by address, from the target of a backward jump to the jump. Where loops multiply,
        those that don't (waits, copies) are left out."""
        at = {x.pc: i for i, x in enumerate(self.code)}
        jumps = [(at[target(x)], i) for i, x in enumerate(self.code) if is_jump(x) and target(x) in at]
        spans = sorted({(head, tail) for head, tail in jumps if head < tail})
        spans = [(h, t) for h, t in spans if any(x.macs for x in self.code[h : t + 1])] or spans
        inner = [(h, t) for h, t in spans if not any((h, t) != (a, b) and h <= a and b <= t for a, b in spans)]
        return [self.code[h : t + 1] for h, t in inner]

    def main_loop(self, executed: Mapping[Instruction, float] | None = None) -> tuple[Instruction, ...]:
        """The innermost loop with the most products, as often as they are executed where that is known; the whole code where
        nothing loops."""
        times = executed or {}
        return max(self.loops(), key=lambda body: sum(x.macs * times.get(x, not executed) for x in body), default=self.code)


def tool(name: str) -> str:
    """A program of the CUDA toolkit: the one on the path, else Triton's copy."""
    if found := shutil.which(name):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


FUNCTION = re.compile(r"^\s*Function : (\S+)\n(.*?)(?=^\s*Function : |\Z)", re.M | re.S)
LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+?)(?:\s+([^;]*?))?\s*;\s+/\* 0x\w+ \*/\n\s+/\* (0x\w+) \*/", re.M
)


def parse(sass: str) -> tuple[Instruction, ...]:
    """One function's `cuobjdump -sass` text as instructions."""
    code = []
    for pc, guard, op, args, high in LINE.findall(sass):
        control = int(high, 16) >> 41
        kind = next(k for k, pattern in KINDS if re.match(pattern, op))
        lane = 0
        if kind in ("ldg", "ldgsts", "stg", "lds", "sts", "spill"):
            lane = next((bits // 8 for bits in (128, 64, 16, 8) if re.search(rf"\.[US]?{bits}\b", op)), 4)
            if op.startswith(("LDSM", "STSM")):
                lane = 4 * int((re.search(r"\.([24])\b", op) or [0, 1])[1])
        fields = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        code.append(Instruction(int(pc, 16), guard, op, args, *fields, kind, 32 * lane))
    return tuple(code)


def load(cubin: bytes | str | Path, pattern: str = "", *, function: str = "", code: bool = True) -> list[Kernel]:
    """The kernels of a cubin whose (mangled) name `pattern` is found in.

    Args:
        cubin: the file, or its contents. A library with code for one architecture will do as well.
        pattern: regular expression, searched in the name.
        function: the whole name, where it is known: nothing else is disassembled.
        code: False leaves the instructions out, which takes a tenth of the time.

    Raises:
        ValueError: no such kernel; the message names those that there are.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as copy:
        if isinstance(cubin, bytes):
            copy.write(cubin)
            copy.flush()
            cubin = copy.name
        command = [tool("cuobjdump"), *(["-sass"] if code else []), "-res-usage"]
        command += [*(["-fun", function] if function else []), str(cubin)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", listing)
    texts = dict(FUNCTION.findall(listing))
    arch = int(found[1]) if (found := re.search(r"code for sm_(\d+)", listing)) else 0
    kernels = []
    for name, *numbers in used:
        if re.search(pattern, name) and function in ("", name):
            registers, stack, shared = map(int, numbers)
            if arch >= 90:  # there the kilobyte that the system keeps of every block is counted in
                shared = max(0, shared - 1024)
            kernels.append(Kernel(name, arch, registers, stack, shared, parse(texts.get(name, ""))))
    if not kernels:
        raise ValueError(f"no kernel matches {pattern!r}; there are {', '.join(name for name, *_ in used) or 'none'}")
    return kernels


def mix(code: Iterable[Instruction]) -> dict[str, int]:
    """How many instructions of each class of `CLASSES`, those that occur."""
    counts = Counter(CLASS_OF[x.kind] for x in code)
    return {name: counts[name] for name in CLASSES if counts[name]}


def is_jump(x: Instruction) -> bool:
    return x.op.startswith(("BRA", "CALL")) and x.op != "BRA.DIV" and "0x" in x.args


def target(x: Instruction) -> int:
    return int(x.args.split("0x")[-1], 16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, spills, shared memory and main loop of a cubin's kernels.")
    parser.add_argument("cubin")
    parser.add_argument("--kernel", default="", help="regular expression, searched in the mangled name")
    args = parser.parse_args()
    for kernel in load(args.cubin, args.kernel):
        loop = " ".join(f"{name} {n}" for name, n in mix(kernel.main_loop()).items())
        print(
            f"{kernel.name}\n  sm_{kernel.arch}: {kernel.registers} registers, {kernel.stack} bytes of stack, "
            f"{kernel.spills} spill instructions, {kernel.shared} bytes of static shared memory\n"
            f"  {len(kernel.code)} instructions; main loop, {len(kernel.main_loop())}: {loop}"
        )


if __name__ == "__main__":
    main()
