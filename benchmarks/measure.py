"""Time, peak memory and launches of several implementations of one thing, in turns, on the same tensors.

On a CPU a sample is the wall time of one call. On a GPU it is the time between two events on the stream: the L2 cache is
overwritten first, and the stream is kept busy until the whole call is queued, so that the time is the device's and not
Python's. What Python takes to queue the call is reported apart (`host_us`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .floor import synchronize
from .memory import launches, peak_bytes

FLUSH_MIB = 256  # overwritten between samples: five times H100's L2 cache
CYCLES_PER_SECOND = 2e9  # above any clock of the GPUs meant here, so that the wait is never too short


@dataclass(frozen=True)
class Candidate:
    """An implementation to be measured.

    Args:
        call: runs it once; must leave nothing behind that it did not find.
        wrong: runs it and compares with the reference: None, or a sentence.
    """

    name: str
    call: Callable[[], object] | None
    wrong: Callable[[], str | None] | None = None
    ours: bool = False
    absent: str | None = None


@dataclass
class Outcome:
    """What became of one candidate: "timed", "absent" (with the reason), or "red" (it ran and is wrong)."""

    name: str
    ours: bool
    status: str
    reason: str | None = None
    seconds: list[float] = field(default_factory=list)
    host_seconds: float | None = None
    peak_bytes: int | None = None
    launches: int | None = None


@dataclass(frozen=True)
class Effort:
    """How much to measure: rounds at most, and at least 3 until `seconds` of a table have passed."""

    rounds: int
    warmup: int
    seconds: float


def effort(device: torch.device, toy: bool = False) -> Effort:
    if toy:
        return Effort(rounds=3, warmup=1, seconds=1)
    return Effort(50, 5, 8) if device.type == "cuda" else Effort(7, 1, 20)


def compare(candidates: list[Candidate], device: torch.device, how: Effort | None, deadline: float) -> dict[str, Outcome]:
    """Gate, memory and launches of each candidate, then the times of all that passed, in turns.

    Args:
        how: None runs the gate alone.
        deadline: `time.monotonic()` after which no further candidate is begun.
    """
    outcomes, calls = {}, {}
    for candidate in candidates:
        outcome = outcomes[candidate.name] = Outcome(candidate.name, candidate.ours, "timed")
        if time.monotonic() > deadline and not candidate.absent:
            outcome.status, outcome.reason = "absent", OUT_OF_TIME
            continue
        outcome.status, outcome.reason = _gate(candidate)
        if outcome.status == "timed" and how is not None:
            try:
                outcome.peak_bytes = peak_bytes(candidate.call, device)
                outcome.launches = launches(candidate.call, device)
                calls[candidate.name] = candidate.call
            except torch.OutOfMemoryError:
                outcome.status, outcome.reason = "absent", "out of GPU memory"
    if calls:
        for name, (seconds, host) in interleaved(calls, device, how).items():
            outcomes[name].seconds, outcomes[name].host_seconds = seconds, host
    return outcomes


OUT_OF_TIME = "the time budget was used up before it (--budget)"


def _gate(candidate: Candidate) -> tuple[str, str | None]:
    if candidate.absent:
        return "absent", candidate.absent
    try:
        wrong = candidate.wrong()
    except torch.OutOfMemoryError:
        return "absent", "out of GPU memory"
    except Exception as error:  # a peer that cannot run here is listed; an implementation of ours that raises is a failure
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"
        return ("red", f"raised {reason}") if candidate.ours else ("absent", f"raises {reason}")
    return ("red", wrong) if wrong else ("timed", None)


def interleaved(
    calls: dict[str, Callable[[], object]], device: torch.device, how: Effort
) -> dict[str, tuple[list[float], float | None]]:
    """(seconds of each sample, median seconds of the host) for each name. Every round takes all in turn, each round
    beginning with another one, so that drift of clocks and neighbours meets all alike."""
    sample = _GpuSample(device) if device.type == "cuda" else _cpu_sample
    names = list(calls)
    for _ in range(how.warmup):
        for call in calls.values():
            sample(call)
    seconds, host = {name: [] for name in names}, {name: [] for name in names}
    began = time.monotonic()
    for i in range(how.rounds):
        if i >= 3 and time.monotonic() - began > how.seconds:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            on_device, on_host = sample(calls[name])
            seconds[name].append(on_device)
            host[name].append(on_host)
    return {name: (seconds[name], statistics.median(host[name]) if device.type == "cuda" else None) for name in names}


def _cpu_sample(call: Callable[[], object]) -> tuple[float, float]:
    began = time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    return seconds, seconds


class _GpuSample:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(FLUSH_MIB * 2**20, dtype=torch.uint8, device=device)
        self.host: dict[Callable, float] = {}  # what the last call took to queue

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        synchronize(self.device)
        self.flush.zero_()
        wait = min(0.05, 2 * self.host.get(call, 0.005) + 2e-4)
        torch.cuda._sleep(int(wait * CYCLES_PER_SECOND))
        began = time.perf_counter()
        begin.record()
        call()
        end.record()
        self.host[call] = time.perf_counter() - began
        synchronize(self.device)
        return begin.elapsed_time(end) / 1e3, self.host[call]


def percentile(values: list[float], share: float) -> float:
    """Linear between the samples, as numpy's default."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
