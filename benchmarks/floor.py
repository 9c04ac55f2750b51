"""What a memory-bound kernel cannot beat: bytes that must move, over the copy bandwidth of the same run.

A unit is B * tokens * H * D elements. Forward: q, k, v read once and the output written once, 4 units. Backward: q, k, v
and dO read, dq, dk, dv written, 7 units.
"""

from __future__ import annotations

import statistics
import time

import torch

from .shapes import Shape

UNITS = {"fwd": 4, "fwd+bwd": 4 + 7}


def floor_bytes(op: str, shape: Shape, passes: str) -> int:
    """Bytes that `passes` ("fwd" or "fwd+bwd") of `op` must move."""
    unit = shape.B * shape.tokens(op) * shape.H * shape.D * torch.finfo(shape.dtype).bits // 8
    return UNITS[passes] * unit


def copy_bandwidth(device: torch.device, mib: int = 512, rounds: int = 9) -> float:
    """Bytes a second of a large copy, reads and writes both counted; the median of several."""
    source = torch.empty(mib * 2**20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * source.numel() / statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
