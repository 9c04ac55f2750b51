"""What cannot be beaten: the bytes that must move over the copy bandwidth, the products over the matmul rate, of the same run.

A unit is B * tokens * H * D elements. Forward: q, k, v read once and the output written once, 4 units. Backward: q, k, v
and dO read, dq, dk, dv written, 7 units. Attention is held against bytes, a tower's training step against products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .machine import clocks
from .shapes import Shape

UNITS = {"fwd": 4, "fwd+bwd": 4 + 7}
HELD = {"fwd": (3, 4), "fwd+bwd": (4, 8)}  # units of the inputs; of inputs, output and gradients together


class Rates(NamedTuple):
    """What the device did in this run, and its clocks while it did so (GPU)."""

    copy: float  # bytes a second, reads and writes both counted
    matmul: float  # floating-point operations a second
    matmul_of: str
    clocks: dict[str, str]


def floor_bytes(op: str, shape: Shape, passes: str) -> int:
    """Bytes that `passes` ("fwd" or "fwd+bwd") of `op` must move."""
    return UNITS[passes] * shape.unit_bytes(op)


def memory_over_tensors(op: str, shape: Shape, passes: str, peak: int) -> float:
    """All that lives at the call's peak, over its inputs, output and gradients together.

    Args:
        peak: bytes that the call adds to its inputs (`memory.peak_bytes`). Inputs are qkv and, with a backward, dO; the
            gradient is that of qkv.
    """
    inputs, together = HELD[passes]
    unit = shape.unit_bytes(op)
    return (inputs * unit + peak) / (together * unit)


def measure_rates(device: torch.device, toy: bool = False) -> Rates:
    """A copy of 512 MiB, and a square matrix product: 8192 in bfloat16 on a GPU, 2048 in float32 on a CPU."""
    mib, size = (8, 256) if toy else (512, 8192 if device.type == "cuda" else 2048)
    copy = copy_bandwidth(device, mib)
    matmul, of, during = matmul_rate(device, size)
    return Rates(copy, matmul, of, during)


def copy_bandwidth(device: torch.device, mib: int = 512, rounds: int = 9) -> float:
    """Bytes a second of a large copy, reads and writes both counted; the median of several."""
    source = torch.empty(mib * 2**20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / statistics.median(seconds_of(lambda: target.copy_(source), device) for _ in range(rounds))


def matmul_rate(device: torch.device, size: int, rounds: int = 9) -> tuple[float, str, dict[str, str]]:
    """Operations a second of a square product, what was multiplied, and on a GPU the clocks while it multiplies."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(2):
        torch.mm(a, b, out=out)
    median = statistics.median(seconds_of(lambda: torch.mm(a, b, out=out), device) for _ in range(rounds))
    during = {}
    if device.type == "cuda":
        for _ in range(int(1 / median)):  # about a second of work, in which the clocks are read
            torch.mm(a, b, out=out)
        during = clocks(device)
        synchronize(device)
    return 2 * size**3 / median, f"{size}^3 {str(dtype)[6:]}", during


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """One call's time: between two events on a GPU, where a clock on the host would count its own delays."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
