"""Which implementation runs: what each backend can do, why it cannot, and what `auto` picks.

A refusal is a sentence. `refuses(...)` returns None or the reason, and the errors, `python -m vidla_kernels` and the
skipped tests all print that same sentence.

What runs is a *plan*: a backend's name, or "FORWARD/BACKWARD" where the kernels of two backends share a call (what a forward
saves is the same in all of them), each with ":VARIANT" behind it where not the backend's own choice of tiling is meant:
"triton", "cuda:2", "triton/cuda:5".
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from . import cuda_binding, tiles, tuned
from .cuda_binding import PASSES
from .layout import TokenLayout

# Best first on a GPU. The CUDA kernels have never run on one: they come behind Triton's until a measurement says otherwise.
NAMES = ("triton", "cuda", "portable", "reference")
KERNELS = ("triton", "cuda")  # which run behind the registered operators
_KERNEL = r"(triton|cuda(:\d+)?)"
_PLAN = re.compile(rf"{'|'.join(NAMES)}|{_KERNEL}(/{_KERNEL})?")


@dataclass(frozen=True)
class Case:
    """What a backend needs to know of a call to say whether it can serve it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    layout: TokenLayout
    op: Literal["tube", "hierarchical"]


@torch.compiler.assume_constant_result  # what a machine has does not change while a graph lives
def missing(name: str, device: torch.device) -> str | None:
    """Why backend `name` cannot run on `device` at all; None where it can."""
    return _missing(name, device)


@cache
def _missing(name: str, device: torch.device) -> str | None:
    if name in ("portable", "reference"):
        return None
    if name == "cuda":
        return cuda_binding.missing(device)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with torch's CUDA wheels on Linux (pip install triton)"
    if device.type == "cpu":
        import triton

        if triton.knobs.runtime.interpret:
            return None
        return "on a CPU Triton runs only under its interpreter, for tests: set TRITON_INTERPRET=1 before Python starts"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the Triton kernels run on NVIDIA GPUs, not on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the Triton kernels need compute capability 8.0 (A100) or later; {device} has {major}.{minor}"
    return None


def refuses(name: str, case: Case) -> str | None:
    """Why backend `name` cannot serve this case; None where it can."""
    if reason := missing(name, case.device):
        return reason
    if name in ("portable", "reference"):
        return None
    if name == "cuda":
        if case.op == "tube":
            return "there is no CUDA kernel for tube attention: the triton backend's moves only the bytes it must"
        return _cuda_refuses(case.device, case.dtype, int(case.head_dim), *case.layout.to_ints())
    return tiles.unsupported(case.dtype, case.head_dim)  # every layout is served


@torch.compiler.assume_constant_result  # a graph is compiled for one head dimension and layout
def _cuda_refuses(device: torch.device, dtype: torch.dtype, head_dim: int, *layout: int) -> str | None:
    return cuda_binding.refuses(device, dtype, head_dim, TokenLayout.from_ints(layout))


def part(plan: str, name: str) -> str:
    """What a plan says of one pass ("forward", "backward"), as in "cuda:2"."""
    return plan.split("/")[-1 if name == "backward" else 0]


def for_pass(plan: str, name: str) -> tuple[str, int]:
    """Backend and variant of one pass of a plan; variant -1 is the backend's own choice."""
    backend, _, variant = part(plan, name).partition(":")
    return backend, int(variant or -1)


def measured_fastest(case: Case, able: tuple[str, ...]) -> str | None:
    """The plan that a measurement on this GPU found to be fastest for the case, from backends in `able`; None without one.

    This is the only place where a measurement changes what `auto` picks.
    """
    return _measured_fastest(case.op, case.device, case.dtype, int(case.head_dim), able, *case.layout.to_ints())


@torch.compiler.assume_constant_result  # a graph is compiled for one head dimension and layout
def _measured_fastest(
    op: str, device: torch.device, dtype: torch.dtype, head_dim: int, able: tuple[str, ...], *ints: int
) -> str | None:
    layout = TokenLayout.from_ints(ints)

    def best(name: str) -> str | None:
        found = tuned.preferred_backend(op, name, device, tiles.kind(dtype), head_dim, layout.patches)
        backend, variant = for_pass(found or "", name)
        serves = backend in able and backend in KERNELS
        if serves and variant >= 0:  # it was measured at another N of this class
            serves = cuda_binding.serves(name, variant, device, dtype, head_dim, layout)
        return found if serves else None

    found = [best(name) for name in PASSES]
    if not any(found):
        return None
    standard = next(name for name in able if name in KERNELS)
    forward, backward = (plan or standard for plan in found)
    return forward if forward == backward and ":" not in forward else f"{forward}/{backward}"


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The backends that run on `device`, best first.

    On a CPU the interpreted and emulated kernels come last: exact, and thousands of times slower than `portable`.
    """
    device = torch.device(device)
    names = [name for name in NAMES if missing(name, device) is None]
    if device.type == "cpu":
        names.sort(key=lambda name: name in ("cuda", "triton"))
    return tuple(names)


def choose(backend: str, case: Case) -> str:
    """The plan that will run: the one named, or for "auto" the best that serves the case.

    Raises:
        ValueError: no such backend or plan.
        RuntimeError: a backend named by hand cannot serve the case; the message says why and what can.
    """
    if backend == "auto":
        able = tuple(name for name in available_backends(case.device) if refuses(name, case) is None)
        return measured_fastest(case, able) or able[0]
    if not _PLAN.fullmatch(backend):
        raise ValueError(
            f"backend is {backend!r}; it must be 'auto', one of {', '.join(map(repr, NAMES))}, or kernels for forward and "
            "backward as in 'triton/cuda', where 'cuda:2' is variant 2 of vidla_kernels.cuda_binding.variants"
        )
    for name in {for_pass(backend, name)[0]: None for name in PASSES}:
        if reason := refuses(name, case):
            able = [name for name in available_backends(case.device) if refuses(name, case) is None]
            raise RuntimeError(f"backend {name!r} cannot run this: {reason}. Available here: {', '.join(able)} (or 'auto')")
    return backend
