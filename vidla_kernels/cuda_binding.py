"""The CUDA kernels of hierarchical attention, called from torch: the library is loaded with ctypes and gets raw pointers.

On a GPU it is `libvidla_cuda.so`, which `pip install` builds where nvcc is found; on CPU tensors it is the same sources
under emulation (cuda_emulate.py). Launches go to torch's current stream of the tensors' device. torch allocates everything,
results and workspace, so its allocator sees it all; nothing waits for the GPU, and calls can be captured in CUDA graphs.
Every return code is looked at. Which tiling runs is the library's choice, or `variant`; `variants` lists them.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import NoReturn

import torch

from . import cuda_emulate
from .layout import TokenLayout, summary_table
from .tiles import HEAD_DIMS

LIBRARY = Path(__file__).parent / "libvidla_cuda.so"
SKIPPED = LIBRARY.with_suffix(".txt")  # setup.py's reason where it has not built the library
TYPES = {torch.bfloat16: 0, torch.float16: 1}
PASSES = ("forward", "backward")


class Call(ctypes.Structure):
    """vidla::Call of cuda/hierarchical.cuh, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("qkv", "out", "lse", "d_out", "d_qkv", "workspace", "rows")]
        + [(name, ctypes.c_int64) for name in ("workspace_bytes", "qkv_batch", "qkv_token", "qkv_third", "qkv_head")]
        + [
            (name, ctypes.c_int32)
            for name in ("type", "batch", "heads", "head_dim", "frames", "patches", "summary", "patches_see_cls", "variant")
        ]
        + [("scale", ctypes.c_float)]
    )


def not_built() -> str | None:
    """Why there is no library for GPUs that could be loaded, or None."""
    if not LIBRARY.exists():
        why = SKIPPED.read_text().strip() if SKIPPED.exists() else "the package was not installed with pip"
        return f"the CUDA kernels were not built ({why}); with nvcc and cmake on PATH, `pip install` builds them"
    try:
        library("cuda")
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def missing(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on this device at all, or None."""
    if device.type == "cpu":
        return cuda_emulate.missing()
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the CUDA kernels run on NVIDIA GPUs, not on {device}"
    if reason := not_built():
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the CUDA kernels need compute capability 8.0 (A100) or later; {device} has {major}.{minor}"
    lib = library("cuda")
    with _on(device):
        if status := lib.vidla_device_status():
            return f"the CUDA kernels cannot use {device}: {lib.vidla_error_text(status).decode()} (code {status})"
    return None


def prepare(lib: ctypes.CDLL, passes: tuple[str, ...] = PASSES) -> ctypes.CDLL:
    """Declare the functions of a loaded library."""
    lib.vidla_error_text.restype = ctypes.c_char_p
    for name in passes:
        launch, workspace, choice, variant = (
            getattr(lib, f"vidla_hierarchical_{name}{what}") for what in ("", "_workspace", "_choice", "_variant")
        )
        launch.argtypes, workspace.argtypes, choice.argtypes = (
            [ctypes.POINTER(Call), ctypes.c_void_p],
            [ctypes.POINTER(Call)],
            [ctypes.POINTER(Call)],
        )
        workspace.restype, variant.restype = ctypes.c_int64, ctypes.c_char_p
    return lib


@cache
def library(device_type: str) -> ctypes.CDLL:
    """The loaded library for tensors on "cuda" or, emulated, on "cpu".

    Raises: OSError, RuntimeError where it cannot be loaded, or was built from other sources than lie beside this file.
    """
    if device_type == "cpu":
        return prepare(cuda_emulate.library())
    lib = ctypes.CDLL(str(LIBRARY))
    lib.vidla_sources.restype = ctypes.c_char_p
    if lib.vidla_sources().decode() != cuda_emulate.digest():
        raise RuntimeError(f"{LIBRARY} was built from other sources than those in {cuda_emulate.SOURCES}: pip install again")
    return prepare(lib)


def variants(name: str, head_dim: int, device: torch.device) -> dict[int, str]:
    """The tilings of one pass ("forward" or "backward") for a head dimension, in words; none where it is not served."""
    function, found = getattr(library(device.type), f"vidla_hierarchical_{name}_variant"), {}
    while text := function(head_dim, len(found)):
        found[len(found)] = text.decode()
    return found


def choice(name: str, qkv: torch.Tensor, layout: TokenLayout) -> int:
    """The variant that one pass over these tensors runs by default."""
    function = getattr(library(qkv.device.type), f"vidla_hierarchical_{name}_choice")
    with _on(qkv.device):
        return function(_call(qkv, layout, 1.0, -1))


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, layout: TokenLayout) -> str | None:
    """Why the CUDA kernels cannot serve this case on a device where they run, or None."""
    if dtype not in TYPES:
        return f"dtype {dtype}: the cuda backend has bfloat16 and float16"
    played = os.environ.get("VIDLA_EMULATE_ARCH") if device.type == "cpu" else None
    return _refuses(device, dtype, head_dim, layout, played)


@lru_cache(maxsize=1024)
def _refuses(device: torch.device, dtype: torch.dtype, head_dim: int, layout: TokenLayout, played: str | None) -> str | None:
    served = [dim for dim in HEAD_DIMS if all(variants(name, dim, device) for name in PASSES)]
    if head_dim not in served:
        return f"head dimension {head_dim}: the cuda backend has {', '.join(map(str, served))}"

    def status(patches: int) -> int:
        some = replace(layout, patches=patches)
        return min(_status(name, -1, device, dtype, head_dim, some) for name in PASSES)

    if (code := status(layout.patches)) >= 0:
        return None
    most = next((patches for patches in range(layout.patches - 1, 0, -1) if status(patches) >= 0), 0)
    reason = library(device.type).vidla_error_text(code).decode()
    return f"{layout.patches} patches a frame: {reason}; with {layout.num_summary} summary tokens it takes up to {most}"


@lru_cache(maxsize=1024)
def serves(name: str, variant: int, device: torch.device, dtype: torch.dtype, head_dim: int, layout: TokenLayout) -> bool:
    """Whether a variant of one pass can run on this device at this layout."""
    return _status(name, variant, device, dtype, head_dim, layout) >= 0


def _status(name: str, variant: int, device: torch.device, dtype: torch.dtype, head_dim: int, layout: TokenLayout) -> int:
    """Bytes of workspace for one pass over one head of one clip, or below 0 why it cannot run."""
    sizes = {"batch": 1, "heads": 1, "head_dim": head_dim, "frames": layout.frames, "patches": layout.patches}
    sizes |= {"summary": layout.num_summary, "patches_see_cls": int(layout.patches_see_cls)}
    with _on(device):
        call = Call(**sizes, variant=variant, type=TYPES[dtype], scale=1.0)
        return getattr(library(device.type), f"vidla_hierarchical_{name}_workspace")(call)


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _call(qkv: torch.Tensor, layout: TokenLayout, scale: float, variant: int, **tensors: torch.Tensor) -> Call:
    B, _, _, H, D = qkv.shape
    return Call(
        qkv=qkv.data_ptr(),
        rows=summary_table(layout, qkv.device).data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        **dict(zip(("qkv_batch", "qkv_token", "qkv_third", "qkv_head"), qkv.stride(), strict=False)),
        type=TYPES[qkv.dtype],
        batch=B,
        heads=H,
        head_dim=D,
        frames=layout.frames,
        patches=layout.patches,
        summary=layout.num_summary,
        patches_see_cls=layout.patches_see_cls,
        variant=variant,
        scale=scale,
    )


def _run(name: str, call: Call, qkv: torch.Tensor, layout: TokenLayout) -> None:
    """Allocate the workspace, launch on torch's current stream, and look at what comes back."""
    device = qkv.device
    lib = library(device.type)

    def refuse(code: int) -> NoReturn:
        arch = "the emulation" if device.type == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        raise RuntimeError(
            f"hierarchical attention, {name}, on {arch}: {lib.vidla_error_text(code).decode()} (code {code}); qkv has shape "
            f"{tuple(qkv.shape)}, strides {qkv.stride()}, {qkv.dtype}, {layout}, variant {call.variant}"
        )

    with _on(device):
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        call.workspace_bytes = needed = getattr(lib, f"vidla_hierarchical_{name}_workspace")(call)
        if needed < 0:
            refuse(needed)
        workspace = torch.empty(needed // 4, dtype=torch.float32, device=device)
        call.workspace = workspace.data_ptr()
        if code := getattr(lib, f"vidla_hierarchical_{name}")(call, stream):
            refuse(code)
    if device.type == "cpu":
        cuda_emulate.take_report(lib, f"hierarchical attention, {name}, {layout}, qkv {tuple(qkv.shape)} {qkv.dtype}")


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its rows do not begin at multiples of the 16 bytes that a thread copies at a time, or where its
    tokens lie too far apart for offsets of 32 bits."""
    fits = x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    fits = fits and abs(x.stride(1)) < 2**24
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def forward(qkv: torch.Tensor, layout: TokenLayout, scale: float, variant: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Hierarchical attention of packed queries, keys and values.

    Args:
        qkv: (B, S, 3, H, D), fp16 or bf16. Any strides; copied where D is not contiguous, or a row of D does not begin at a
            multiple of 16 bytes.
        layout: the order of the tokens and the rule.
        scale: factor on q.k, of either sign.
        variant: a number from `variants`, or -1 for the library's choice.

    Returns:
        out: (B, S, H, D), contiguous, in qkv's dtype.
        lse: (B, H, S) fp32, log-sum-exp of each row's scaled scores in base 2, for the backward.

    Raises:
        RuntimeError: the launch failed, or the emulation found an error in the kernel.
    """
    B, S, _, H, D = qkv.shape
    if scale <= 0:  # the kernel takes a maximum, from -inf on, before it scales
        qkv, scale = torch.cat((qkv[:, :, :1] * (-1 if scale else 0), qkv[:, :, 1:]), 2), -scale or 1.0
    qkv = _aligned(qkv)
    out = torch.empty(B, S, H, D, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=qkv.device)
    _run("forward", _call(qkv, layout, scale, variant, out=out, lse=lse), qkv, layout)
    return out, lse


def backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: TokenLayout,
    scale: float,
    variant: int = -1,
) -> torch.Tensor:
    """Gradient of qkv.

    Args:
        grad_out: (B, S, H, D), contiguous, in qkv's dtype.
        qkv, layout, scale, variant: as in `forward`.
        out, lse: what `forward` returned.

    Returns:
        (B, S, 3, H, D), contiguous, in qkv's dtype.

    Raises:
        RuntimeError: as in `forward`.
    """
    qkv, grad_out = _aligned(qkv), _aligned(grad_out)
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    call = _call(qkv, layout, scale, variant, out=out, lse=lse, d_out=grad_out, d_qkv=d_qkv)
    _run("backward", call, qkv, layout)
    return d_qkv
