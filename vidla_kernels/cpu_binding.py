"""Both attentions in C++ on a CPU (cpu/), called from torch: the library is loaded with ctypes and gets raw pointers.

It is how `portable` serves float32 tensors on a CPU, where `pip install` has built `libvidla_cpu.so`; VIDLA_CPU=0 leaves it
unused. The code is there three times, and the processor decides which runs: baseline, AVX2, AVX-512; VIDLA_CPU=baseline, avx2
or avx512 asks for one of them. torch allocates everything, results and workspace. The threads are torch's own where its OpenMP
runtime lends them, as many as torch would take and fewer for a small call; their number changes no bit of a result.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch.autograd.forward_ad import unpack_dual

from . import files
from .layout import TokenLayout, summary_table

LIBRARY = Path(__file__).parent / "libvidla_cpu.so"
SKIPPED = LIBRARY.with_suffix(".txt")  # setup.py's reason where it has not built the library
SOURCES = Path(__file__).parent / "cpu"
VERSIONS = ("baseline", "avx2", "avx512")
TUBE_FORWARD, TUBE_BACKWARD, HIERARCHICAL_FORWARD, HIERARCHICAL_BACKWARD = range(4)
_CPU = torch.device("cpu")


class Call(ctypes.Structure):
    """vidla::Call of cpu/call.h, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("qkv", "d_out", "out", "lse", "d_qkv", "rows", "workspace")]
        + [(f"qkv_{name}", ctypes.c_int64) for name in ("batch", "token", "third", "head")]
        + [(f"d_out_{name}", ctypes.c_int64) for name in ("batch", "token", "head")]
        + [(name, ctypes.c_int32) for name in ("which", "batch", "heads", "head_dim", "frames", "patches", "summary")]
        + [(name, ctypes.c_int32) for name in ("first_key", "threads", "version")]
        + [("scale", ctypes.c_float)]
    )


def digest() -> str:
    """What the sources are; CMakeLists.txt puts the same into the library it builds."""
    return files.digest(SOURCES, (".cpp", ".h"))


@cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises: OSError, RuntimeError where it is not there, cannot be loaded, or was built from other sources than lie here.
    """
    if not LIBRARY.exists():
        why = SKIPPED.read_text().strip() if SKIPPED.exists() else "the package was not installed with pip"
        raise RuntimeError(f"they were not built ({why}); with a C++ compiler on PATH, `pip install` builds them")
    lib = ctypes.CDLL(str(LIBRARY))
    lib.vidla_cpu_sources.restype = ctypes.c_char_p
    if lib.vidla_cpu_sources().decode() != digest():
        raise RuntimeError(f"{LIBRARY} was built from other sources than those in {SOURCES}: pip install again")
    lib.vidla_cpu_plan.argtypes, lib.vidla_cpu_plan.restype = [ctypes.POINTER(Call)], ctypes.c_int64
    lib.vidla_cpu_run.argtypes, lib.vidla_cpu_run.restype = [ctypes.POINTER(Call), ctypes.c_void_p], None
    lib.vidla_cpu_exp2.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    lib.vidla_cpu_exp2.restype = None
    return lib


@cache
def torchs_threads() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch itself uses, GNU's or one that stands in for it; None where
    there is none, and the library starts threads of its own."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@cache
def missing() -> str | None:
    """Why the native kernels cannot run here, or None."""
    asked = os.environ.get("VIDLA_CPU", "")
    if asked == "0":
        return "VIDLA_CPU=0 is set"
    if asked not in ("", *VERSIONS):
        return f"VIDLA_CPU is {asked!r}; it may be 0 or one of {', '.join(VERSIONS)}"
    try:
        here = VERSIONS[: library().vidla_cpu_best() + 1]
    except (OSError, RuntimeError) as error:
        return str(error)
    return None if asked in ("", *here) else f"VIDLA_CPU={asked}, and this processor has {', '.join(here)}"


@cache
def version() -> int:
    """The number in VERSIONS of the code that runs: the one VIDLA_CPU names, else the best for this processor."""
    return VERSIONS.index(os.environ.get("VIDLA_CPU") or VERSIONS[library().vidla_cpu_best()])


def refuses(qkv: torch.Tensor) -> str | None:
    """Why the native kernels cannot serve a call, or None. What they refuse, portable_cpu.py does in torch."""
    if type(qkv) not in (torch.Tensor, torch.nn.Parameter):
        return f"{type(qkv).__name__} may have no memory of its own"
    if qkv.device.type != "cpu" or qkv.dtype != torch.float32:
        return f"{qkv.dtype} on {qkv.device}: the native kernels have float32 on a CPU"
    if qkv.numel() == 0:
        return "an empty tensor"
    if torch._C._are_functorch_transforms_active() or unpack_dual(qkv).tangent is not None:
        return "torch.func or forward-mode differentiation: a registered operator would lose the tangent without a word"
    return missing()


def _run(which: int, qkv: torch.Tensor, layout: TokenLayout, scale: float, **tensors: torch.Tensor) -> None:
    if reason := refuses(qkv):
        raise RuntimeError(f"the native CPU kernels cannot run this: {reason}")
    lib, grad = library(), tensors.get("d_out")
    B, _, _, H, D = qkv.shape
    call = Call(
        qkv=qkv.data_ptr(),
        rows=summary_table(layout, _CPU).data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        **dict(zip(("qkv_batch", "qkv_token", "qkv_third", "qkv_head"), qkv.stride(), strict=False)),
        **dict(zip(("d_out_batch", "d_out_token", "d_out_head"), () if grad is None else grad.stride(), strict=False)),
        which=which,
        batch=B,
        heads=H,
        head_dim=D,
        frames=layout.frames,
        patches=layout.patches,
        summary=0 if which in (TUBE_FORWARD, TUBE_BACKWARD) else layout.num_summary,
        first_key=layout.first_key_of_patches,
        threads=torch.get_num_threads(),
        version=version(),
        scale=scale,
    )
    workspace = torch.empty(lib.vidla_cpu_plan(call), dtype=torch.float32, device=_CPU)
    call.workspace = workspace.data_ptr()
    lib.vidla_cpu_run(call, torchs_threads())


def tube_forward(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> torch.Tensor:
    """Tube attention of packed queries, keys and values.

    Args:
        qkv: (B, T*N, 3, H, D), float32, of any strides with D contiguous.
        layout: T and N.
        scale: factor on q.k.

    Returns:
        (B, T*N, H, D), contiguous.

    Raises:
        RuntimeError: no library, or a tensor that it does not serve.
    """
    B, tokens, _, H, D = qkv.shape
    out = torch.empty(B, tokens, H, D, dtype=qkv.dtype, device=_CPU)
    _run(TUBE_FORWARD, qkv, layout, scale, out=out)
    return out


def tube_backward(grad_out: torch.Tensor, qkv: torch.Tensor, layout: TokenLayout, scale: float) -> torch.Tensor:
    """Gradient of qkv, contiguous, from that of the output, (B, T*N, H, D) of any strides with D contiguous."""
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=_CPU)
    _run(TUBE_BACKWARD, qkv, layout, scale, d_out=grad_out, d_qkv=d_qkv)
    return d_qkv


def forward(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Hierarchical attention of packed queries, keys and values.

    Args:
        qkv: (B, S, 3, H, D), float32, of any strides with D contiguous.
        layout: the order of the tokens and the rule.
        scale: factor on q.k.

    Returns:
        out: (B, S, H, D), contiguous.
        lse: (B, H, S), log-sum-exp of each row's scaled scores in base 2, for the backward.

    Raises:
        RuntimeError: no library, or a tensor that it does not serve.
    """
    B, S, _, H, D = qkv.shape
    out = torch.empty(B, S, H, D, dtype=qkv.dtype, device=_CPU)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=_CPU)
    _run(HIERARCHICAL_FORWARD, qkv, layout, scale, out=out, lse=lse)
    return out, lse


def backward(
    grad_out: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, layout: TokenLayout, scale: float
) -> torch.Tensor:
    """Gradient of qkv, contiguous, from that of the output and from what `forward` returned."""
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=_CPU)
    _run(HIERARCHICAL_BACKWARD, qkv, layout, scale, d_out=grad_out, out=out, lse=lse, d_qkv=d_qkv)
    return d_qkv
