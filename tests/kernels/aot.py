"""Compile what the Triton kernels' host functions would launch, for a GPU that need not be there, and report its cost.

Reads a JSON list of cases from stdin, {"family": "tube" or "hierarchical", "arch": 80 or 90, "dtype": "float16", "D": 64,
"B": 2, "T": 12, "N": 49, "H": 12, "tf32": whether torch multiplies float32 so}, and prints a JSON list of one row a launch:
the case, and kernel, hash (equal for launches of one compiled kernel), rows (of its tile), registers, spill (instructions in
loops that move spilled registers), spilled (percent of all instructions that do), shared (bytes a program) and warps.

The modules' own forward() and backward() run on meta tensors, with `triton_common.launch` replaced by a compilation, so
what is compiled is what ships. A script and not a fixture, because nothing compiles in a process where Triton interprets.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported, here and in the pool's processes

import torch
import triton
from triton.backends.compiler import GPUTarget

from vidla_kernels import TokenLayout, tiles, triton_common

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class OfflineDriver:
    """As much of a Triton driver as compiling asks for: the target, and a device to cache compiled kernels under."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?);", re.M)


@functools.cache
def registers_and_spills(digest: str, cubin: bytes) -> tuple[int, int, int]:
    """Registers of a thread, its share of instructions (percent, rounded up) that move spilled registers, and how many of
    these lie in a loop: between a branch backwards and its target."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    code = [(int(pc, 16), op, args) for pc, op, args in SASS.findall(sass)]
    spills = [pc for pc, op, _ in code if op.startswith(("LDL", "STL"))]
    jumps = [(pc, int(target[1], 16)) for pc, op, args in code if op == "BRA" and (target := re.search(r"0x([0-9a-f]+)", args))]
    looped = sum(any(head <= pc <= tail for tail, head in jumps) for pc in spills)
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    assert bool(stack) == bool(spills), "the stack holds something else than spilled registers"
    return int(re.search(r"REG:(\d+)", usage)[1]), -(-100 * len(spills) // len(code)), looped


def compile_case(case: dict) -> list[dict]:
    """Rows of all launches of one case's forward and backward, in their order."""
    rows = []

    def record(kernel, grid, *args, **options) -> None:
        compiled = kernel.warmup(*args, grid=grid, **options)
        registers, spilled, spill = registers_and_spills(compiled.hash, compiled.asm["cubin"])
        rows.append(
            {
                **case,
                "kernel": compiled.name,
                "hash": compiled.hash,
                "rows": options["ROWS"],
                "registers": registers,
                "spill": spill,
                "spilled": spilled,
                "shared": compiled.metadata.shared,
                "warps": compiled.metadata.num_warps,
            }
        )

    triton.runtime.driver.set_active(OfflineDriver(case["arch"]))
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case["tf32"] else "ieee"
    tiles.DEFAULT_ARCH = case["arch"]
    triton_common.launch = record

    module = importlib.import_module(f"vidla_kernels.triton_{case['family']}")
    layout = TokenLayout(case["T"], case["N"])
    tokens = layout.num_patches if case["family"] == "tube" else layout.seq_len
    dtype, scale = getattr(torch, case["dtype"]), case["D"] ** -0.5
    qkv = torch.empty(case["B"], tokens, 3, case["H"], case["D"], dtype=dtype, device="meta")
    saved = module.forward(qkv, layout, scale)
    if case["family"] == "tube":
        module.backward(torch.empty_like(saved), qkv, layout, scale)
    else:
        out, lse = saved
        module.backward(torch.empty_like(out), qkv, out, lse, layout, scale)
    return rows


def compile_cases(cases: list[dict]) -> list[dict]:
    return [row for case in cases for row in compile_case(case)]


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    # Cases that share compiled kernels stay in one process, which then compiles them once.
    kind = lambda case: (case["D"], case["family"], case["dtype"], case["tf32"], case["arch"])  # noqa: E731
    batches = [list(batch) for _, batch in itertools.groupby(sorted(cases, key=kind, reverse=True), key=kind)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        json.dump([row for rows in pool.map(compile_cases, batches) for row in rows], sys.stdout)
