"""The same figures for the kernels in CUDA C++: what they launch, compiled by nvcc; what they move, from their emulation.

The library's own launchers run, linked with recorder.cpp in place of the CUDA runtime, which answers as an A100 or H100
and writes down kernel, grid, shared memory and parameters. The machine code comes out of the same library.

Blocks that stay and walk over many frames have paths too long to replay whole: the estimate is taken at 4 and at 8 frames a
block and continued at the rate between them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from . import replay, report, sass
from .cases import Case, in_other_process
from .resources import SHARED_LIMIT, Compiled, classes
from .traffic import Work, from_emulation
from .walk import Launch, Walked, follow

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
PASSES = {"fwd": "forward", "bwd": "backward"}
PARAMETERS = 512  # bytes of a kernel's parameters that are recorded; more than any takes


def missing() -> str | None:
    """Why the CUDA kernels cannot be looked at on this machine, or None."""
    if importlib.util.find_spec("vidla_kernels.cuda_binding") is None:
        return "this tree has none"
    return next((f"{name} was not found" for name in ("nvcc", "g++") if shutil.which(name) is None), None)


def version() -> str:
    """nvcc's, or that it is not there."""
    if shutil.which("nvcc") is None:
        return "not installed"
    return re.search(r"V([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout)[1]


@functools.cache
def library(arch: int) -> tuple[Path, ctypes.CDLL]:
    """The CUDA sources for one architecture, linked with the recorder; compiled once (minutes) and kept in the user's cache.

    Raises:
        RuntimeError: nvcc failed; the message is its own.
    """
    from vidla_kernels import cuda_binding, cuda_emulate, files

    recorder = Path(__file__).with_name("recorder.cpp")
    name = hashlib.sha256((cuda_emulate.digest() + recorder.read_text() + version()).encode()).hexdigest()[:12]
    target = files.cache_folder() / f"cuda-recorded-{ARCHITECTURES[arch]}-{name}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        command = ["nvcc", "-shared", f"-arch={ARCHITECTURES[arch]}", "-std=c++17", "-cudart", "none", "--threads", "2"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-o", made, *sorted(cuda_emulate.SOURCES.glob("*.cu")), recorder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc could not compile the CUDA sources:\n{done.stderr[-4000:]}")
        made.replace(target)
    lib = cuda_binding.prepare(ctypes.CDLL(str(target)))
    lib.vidla_recorded.restype = ctypes.c_char_p
    return target, lib


def launches(case: Case, direction: str, variant: int = -1) -> tuple[list[tuple[str, Launch]], int]:
    """(mangled kernel, launch) of one pass in their order, and the variant that was launched."""
    import torch

    from vidla_kernels import cuda_binding

    lib, gpu = library(case.arch)[1], replay.GPUS[case.arch]
    settings = {"ARCH": case.arch, "SMS": gpu.sms, "SHARED": SHARED_LIMIT[case.arch], "PARAMETERS": PARAMETERS}
    os.environ.update({f"VIDLA_RECORD_{name}": str(value) for name, value in settings.items()})
    qkv = torch.empty(case.B, case.tokens, 3, case.H, case.D, dtype=getattr(torch, case.dtype), device="meta")
    call = cuda_binding.Call(
        **{name: 0x7F00_0000_0000 + (i << 32) for i, name in enumerate(_POINTERS)},
        **dict(zip(("qkv_batch", "qkv_token", "qkv_third", "qkv_head"), qkv.stride(), strict=False)),
        type=cuda_binding.TYPES[qkv.dtype],
        batch=case.B,
        heads=case.H,
        head_dim=case.D,
        frames=case.T,
        patches=case.N,
        summary=case.layout.num_summary,
        patches_see_cls=case.layout.patches_see_cls,
        variant=variant,
        scale=case.D**-0.5,
    )
    name = f"vidla_hierarchical_{PASSES[direction]}"
    if variant < 0:
        call.variant = getattr(lib, f"{name}_choice")(call)
    call.workspace_bytes = getattr(lib, f"{name}_workspace")(call)
    lib.vidla_recorded()
    if code := getattr(lib, name)(call, None):
        raise RuntimeError(f"{case}, {direction}: {lib.vidla_error_text(code).decode()} (code {code})")
    lines = [line.split() for line in lib.vidla_recorded().decode().splitlines()]
    return [(k, Launch(int(g), int(t), int(s), bytes.fromhex(p))) for k, g, t, s, p in lines], call.variant


_POINTERS = ("qkv", "out", "lse", "d_out", "d_qkv", "workspace", "rows")


@functools.cache
def _kernel(arch: int, name: str) -> sass.Kernel:
    (kernel,) = sass.load(library(arch)[0], function=name)
    return kernel


def emulated(case: Case, variants: dict[str, int]) -> list[Work]:
    """What one (batch, head) moves, from the emulation; as many of them on one multiprocessor as the GPU has on each."""
    import torch

    from vidla_kernels import cuda_binding, cuda_emulate

    gpu = replay.GPUS[case.arch]
    os.environ |= {"VIDLA_EMULATE_ARCH": str(case.arch), "VIDLA_EMULATE_SMS": "1"}
    some = dataclasses.replace(case, B=max(1, round(case.B * case.H / gpu.sms)), H=1)
    qkv = torch.randn(some.B, some.tokens, 3, 1, some.D, dtype=getattr(torch, some.dtype))
    out, lse = cuda_binding.forward(qkv, some.layout, some.D**-0.5, variants["fwd"])
    work = from_emulation(cuda_emulate.last_report, some, "fwd")
    cuda_binding.backward(torch.randn_like(out), qkv, out, lse, some.layout, some.D**-0.5, variants["bwd"])
    return work + from_emulation(cuda_emulate.last_report, some, "bwd")


def _sample(launch: Launch, kernel: sass.Kernel, long: bool) -> Walked:
    return follow(kernel, launch, blocks=2 if long else 8)


def estimate(case: Case, direction: str, variant: int, work: list[Work]) -> list[Compiled]:
    """The launches of one pass, walked and replayed, with the bytes that were emulated."""
    mine = [w for w in work if w.direction == direction]
    gpu, rows = replay.GPUS[case.arch], []
    whole = launches(case, direction, variant)[0]
    most = max(mine, key=lambda w: w.asked)
    for i, (name, launch) in enumerate(whole):
        kernel = _kernel(case.arch, name)
        moved = max((w for w in mine if w.kernel in name), key=lambda w: len(w.kernel))
        # Different bytes are known of the pass, not of its kernels: the smaller ones read and write all of theirs once.
        distinct = most.distinct - sum(w.asked for w in mine if w is not most) if moved is most else moved.asked
        fit = replay.resident(gpu, kernel.registers, kernel.shared + launch.shared, launch.threads)
        frames = case.B * case.H * case.T
        stays = moved is most and launch.grid < frames // 8

        def replayed(some: Case, i=i, kernel=kernel, moved=moved, distinct=distinct, stays=stays):
            """The estimate at another number of heads, and what was walked."""
            (_, its), heads = launches(some, direction, variant)[0][i], some.B * some.H
            walked = _sample(its, kernel, stays)
            guess = replay.estimate(kernel, its, dram_bytes=distinct * heads, l2_bytes=moved.asked * heads, walked=walked)
            return guess, walked, heads

        if stays:
            few, more = (dataclasses.replace(case, B=n * launch.grid // case.T, H=1) for n in (4, 8))
            (first, _, _), (guess, walked, heads) = replayed(few), replayed(more)
            left = math.ceil(frames / launch.grid) - 8
            us = guess.replay + left * (guess.replay - first.replay) / 4
            bounds = {unit: value * case.B * case.H / heads for unit, value in guess.bounds.items()}
            us = max(us, *bounds.values())
        else:
            guess, walked, heads = replayed(case)
            us, bounds = guess.replay, guess.bounds
        loop = kernel.main_loop(walked.executed)
        row = Compiled(
            re.search(r"\d((?:hierarchical|tube)_[a-z_]+?)I", name)[1],
            direction,
            name,
            {"variant": variant},
            kernel.registers,
            kernel.stack,
            kernel.shared + launch.shared,
            math.ceil(launch.threads / 32),
            fit,
            launch.grid,
            kernel.spills_in_loops,
            kernel.spills / len(kernel.code),
        )
        row.instructions = classes(walked.executed, kernel.code, 32 / heads)
        row.loop = classes(walked.executed, loop, 32 / heads)
        row.loop_exponentials = sum(32 / heads * walked.executed[x] for x in loop if x.op.startswith("MUFU.EX2"))
        row.exponentials = sum(32 / heads * n for x, n in walked.executed.items() if x.op.startswith("MUFU.EX2"))
        row.macs, row.guesses = walked.macs / heads, sum(walked.guesses.values())
        row.replay_us, row.bounds_us, row.waits = us, bounds, guess.waits
        rows.append(row)
    return rows


def rows(cases: dict[str, list[Case]], say: Callable[[str], None] = print) -> tuple[list[dict], list[dict]]:
    """As `report.rows`, for the CUDA kernels' own choice of variants."""
    flat = [(shape, dataclasses.replace(case, backend="cuda")) for shape, some in cases.items() for case in some]
    say("compiling the CUDA kernels and asking what they launch")
    variants = [{direction: launches(case, direction)[1] for direction in PASSES} for _, case in flat]
    say("emulating, walking and replaying them")
    os.environ["VIDLA_EMULATE_CUDA"] = "1"
    counts = in_other_process("benchmarks.cost.cuda", [case for _, case in flat], interpret=True, variants=variants)
    passes, kernels = [], []
    for (shape, case), chosen, count in zip(flat, variants, counts, strict=True):
        work = [Work(**row) for row in count]
        for direction in PASSES:
            made = estimate(case, direction, chosen[direction], work)
            mine = [w for w in work if w.direction == direction]
            report.check(case, direction, mine, made)
            passes.append(report.pass_row(shape, case, direction, mine, made))
            kernels += [report.kernel_row(shape, case, row) for row in made]
    return passes, kernels


def main() -> None:
    asked = json.load(sys.stdin)
    works = [emulated(Case(**case), variants) for case, variants in zip(asked["cases"], asked["variants"], strict=True)]
    json.dump([[dataclasses.asdict(work) for work in work_of_case] for work_of_case in works], sys.stdout)


if __name__ == "__main__":
    main()
