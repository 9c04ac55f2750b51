"""What the library's host functions would launch, compiled for a GPU that need not be there.

The Triton modules' own forward() and backward() run on meta tensors with `triton_common.launch` replaced by a compilation,
so what is compiled is what ships. Of each launch: registers, bytes of stack (spilled registers live there, and nothing else
of these kernels does), shared memory, blocks that fit a multiprocessor, the instructions of the main loop, and on request
the whole path of the warps with an estimate of the time (walk.py, replay.py).

`compiled` asks a process of its own, because nothing compiles in one where Triton interprets. `cubins` compiles the CUDA
sources of a folder with nvcc.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import multiprocessing
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import replay, sass
from .cases import Case, in_other_process
from .walk import Launch, follow

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have (CUDA C++ Programming Guide, compute capabilities)


@dataclass
class Compiled:
    """One launch of a case. `digest` is equal for launches of one compiled kernel. The second part is there on request and
    tells of one (batch, head): thread instructions by class, those of the main loop (of everything, where nothing loops),
    exponentials in there and (CUDA) in all, multiply-adds. The third part is the estimate, for the whole launch."""

    kernel: str
    direction: str
    digest: str
    options: dict[str, int]  # what the kernel was specialised for, with num_warps and num_stages
    registers: int
    stack: int
    shared: int
    warps: int
    blocks: int  # resident on a multiprocessor
    grid: int
    spills_in_loops: int = 0  # instructions that move spilled registers
    spilled: float = 0.0  # their share of all instructions

    instructions: dict[str, float] = field(default_factory=dict)
    loop: dict[str, float] = field(default_factory=dict)
    loop_exponentials: float = 0.0
    exponentials: float = 0.0
    macs: float = 0.0
    guesses: int = 0  # branches on something unknown

    replay_us: float = 0.0
    bounds_us: dict[str, float] = field(default_factory=dict)
    waits: dict[str, float] = field(default_factory=dict)


class OfflineDriver:
    """As much of a Triton driver as compiling asks for: the target, and a device to cache compiled kernels under."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


PACK = {"i1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f"}


def parameters(signature: dict[str, str], values: dict[str, object]) -> bytes:
    """The bytes of a Triton kernel's parameters as the driver lays them out, each at a multiple of its size."""
    out = bytearray()
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        value, code = (0x7F00_0000_0000, "Q") if kind.startswith("*") else (values[name], PACK[kind])
        size = struct.calcsize(code)
        out += bytes(-len(out) % size) + struct.pack("<" + code, value)
    return bytes(out)


@functools.cache
def _kernel(digest: str, cubin: bytes, code: bool) -> sass.Kernel:
    (kernel,) = sass.load(cubin, code=code)
    return kernel


def compile_case(case: Case, *, walk: bool = False, traffic: Sequence[dict] | None = None) -> list[Compiled]:
    """All launches of a case's forward and backward, in their order.

    Args:
        walk: count what is executed.
        traffic: for each launch `distinct` and `asked`, bytes of one (batch, head); with it comes the estimate.
    """
    import torch
    import triton

    from vidla_kernels import tiles, triton_common

    rows: list[Compiled] = []
    triton.runtime.driver.set_active(OfflineDriver(case.arch))
    tiles.DEFAULT_ARCH = case.arch
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"

    def record(kernel, grid, *args, **options) -> None:
        compiled = kernel.warmup(*args, grid=grid, **options)
        code = _kernel(compiled.hash, compiled.asm["cubin"], walk or traffic is not None)
        if code.stack and not code.code:
            code = _kernel(compiled.hash, compiled.asm["cubin"], True)
        threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
        blocks = functools.reduce(lambda a, b: a * b, grid)
        row = Compiled(
            compiled.name,
            direction,
            compiled.hash,
            {name: value for name, value in options.items() if isinstance(value, int)},
            code.registers,
            code.stack,
            shared,
            threads // 32,
            replay.resident(replay.GPUS[case.arch], code.registers, shared, threads),
            blocks,
            code.spills_in_loops,
            code.spills / max(1, len(code.code)),
        )
        if walk or traffic is not None:
            values = dict(zip(kernel.arg_names, args, strict=False)) | options
            launch = Launch(blocks, threads, shared, parameters(compiled.src.signature, values))
            walked, heads = follow(code, launch, blocks=36, run=18, same_warps=True), case.B * case.H
            loop = code.main_loop(walked.executed)
            row.instructions = classes(walked.executed, code.code, 32 / heads)
            row.loop = classes(walked.executed, loop, 32 / heads)
            row.loop_exponentials = sum(32 / heads * walked.executed[x] for x in loop if x.op.startswith("MUFU.EX2"))
            row.macs, row.guesses = walked.macs / heads, sum(walked.guesses.values())
        if traffic is not None:
            moved = traffic[len(rows)]
            guess = replay.estimate(
                code, launch, dram_bytes=moved["distinct"] * heads, l2_bytes=moved["asked"] * heads, walked=walked
            )
            row.replay_us, row.bounds_us, row.waits = guess.replay, guess.bounds, guess.waits
        rows.append(row)

    original, triton_common.launch = triton_common.launch, record
    try:
        for direction, call in case.host_calls("meta"):  # noqa: B007 - `record` reads it
            call()
    finally:
        triton_common.launch = original
    return rows


def classes(executed: dict[sass.Instruction, float], code: Sequence[sass.Instruction], factor: float) -> dict[str, float]:
    """Executed instructions among `code` by class, times `factor`."""
    counts = dict.fromkeys(sass.CLASSES, 0.0)
    for x in code:
        counts[sass.CLASS_OF[x.kind]] += factor * executed.get(x, 0)
    return counts


def compiled(
    cases: Sequence[Case], *, walk: bool = False, traffic: Sequence[Sequence[dict]] | None = None
) -> list[list[Compiled]]:
    """`compile_case` of each case, by two processes that compile."""
    rows = in_other_process("benchmarks.cost.resources", cases, interpret=False, walk=walk, traffic=traffic)
    return [[Compiled(**row) for row in launches] for launches in rows]


def cubins(folder: Path, arch: str, out: Path, *flags: str) -> list[Path]:
    """Every .cu of a folder as a cubin for "sm_80" or "sm_90a"; files that define no kernel give an empty one."""
    made = []
    for source in sorted(folder.glob("*.cu")):
        target = out / f"{source.stem}.{arch}.cubin"
        command = ["nvcc", "-cubin", f"-arch={arch}", "-std=c++17", *flags, "-o", str(target), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.append(target)
    return made


def _batch(batch: list[tuple[int, Case, dict]]) -> list[tuple[int, list[dict]]]:
    return [(i, [dataclasses.asdict(row) for row in compile_case(case, **options)]) for i, case, options in batch]


def main() -> None:
    asked = json.load(sys.stdin)
    cases = [Case(**case) for case in asked["cases"]]
    traffic = asked["traffic"] or [None] * len(cases)
    work = [(i, case, {"walk": asked["walk"], "traffic": traffic[i]}) for i, case in enumerate(cases)]
    # Cases that share compiled kernels stay in one process, which then compiles them once.
    kind = lambda item: (item[1].D, item[1].op, item[1].dtype, item[1].tf32, item[1].arch)  # noqa: E731
    batches = [list(items) for _, items in itertools.groupby(sorted(work, key=kind, reverse=True), key=kind)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = dict(row for batch in pool.map(_batch, batches) for row in batch)
    json.dump([rows[i] for i in range(len(cases))], sys.stdout)


if __name__ == "__main__":
    main()
