"""Peak memory of a call, what it allocates above what was there before, and how many kernels it launches."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

logging.getLogger("torch.profiler").setLevel(logging.ERROR)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The largest sum of live allocations during `call`, inputs excluded.

    On a GPU from the caching allocator; on a CPU from the profiler's record of every allocation, which has those inside
    operators and of compiled code too. `call` must not free what was allocated before it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Kernels, copies and fills that `call` starts on a GPU, as the profiler saw them run; None on a CPU, and where the
    profiler may not look (it then sees none)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize(device)
    return count_launches(record.events()) or None


def count_launches(events) -> int:
    """Of a profiler's events those that ran on the GPU; ranges that only mark a stretch of time are none."""
    ran = (event for event in events if event.device_type == DeviceType.CUDA)
    return sum(not getattr(event, "is_user_annotation", False) for event in ran)
