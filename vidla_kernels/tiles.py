"""Tile sizes of every Triton kernel, apart from the maths: which configuration runs where, and why.

Kernels take these numbers as constexprs and decide nothing. A change here needs a measurement or, without a GPU, the
ahead-of-time test, which compiles every row for every architecture and asserts that no register spills.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD_DIMS = (32, 64, 80, 96, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Architecture for tensors that are on no GPU: the interpreter, and ahead-of-time compilation, which patches it.
DEFAULT_ARCH = 80


@dataclass(frozen=True)
class Tile:
    """One configuration of one kernel.

    Args:
        rows: query rows in a tile (tl.arange needs a power of two).
        keys: key rows in a tile.
        warps: warps in a program.
        stages: software pipeline stages of the loop over key tiles (1: no pipeline).
        registers: most registers a thread may have (0: as many as the compiler likes).
        programs: how many of them an SM runs at a time, where a launcher cuts its work by that.
    """

    rows: int
    keys: int
    warps: int
    stages: int = 1
    registers: int = 0
    programs: int = 1


# (kernel, architectures, "half" or "fp32", head dimensions) -> tiles, smallest first where a kernel has several to choose
# from. fp16 and bf16 share rows: same bytes, same instructions. fp32 multiplies at full precision, which means FMA loops
# whose operands sit in registers, so its tiles are smaller.
_ROWS: dict[tuple[str, tuple[int, ...], str, tuple[int, ...]], tuple[Tile, ...]] = {
    # Tube attention, a whole number of tubes in a tile; T > rows takes the next tile, T > all rows the long kernels.
    # Registers and spills: Triton 3.8. Only the 64-row half tiles at D=64 have been timed (triton_tube.py).
    # 64 rows: T=12 packs 5 tubes and T=16 packs 4, with 6 % and 0 % of the rows spare; at most 166 registers, 3 programs.
    ("tube_forward", (80,), "half", HEAD_DIMS): (Tile(64, 64, 4),),
    # 65 to 128 frames stay one tile where wgmma reads operands from shared memory; on sm_80 128 rows spill from D=96.
    ("tube_forward", (90,), "half", HEAD_DIMS): (Tile(64, 64, 4), Tile(128, 128, 8)),
    # 32 rows on sm_80: 67 registers at D=64 where 64 rows take 219, so 7 programs are resident instead of 2. Not timed.
    # 64 rows, for 33 to 64 frames, over 8 warps: over 4 D=128 spills.
    ("tube_backward", (80,), "half", HEAD_DIMS): (Tile(32, 32, 4), Tile(64, 64, 8)),
    ("tube_backward", (90,), "half", HEAD_DIMS): (Tile(64, 64, 4), Tile(128, 128, 8)),
    # fp32: 32 rows spill at D=96 and 128 and take 247 registers at 80, where 16 rows take 42 to 80.
    ("tube_forward", (80, 90), "fp32", (32, 64)): (Tile(32, 32, 4),),
    ("tube_forward", (80, 90), "fp32", (80, 96, 128)): (Tile(16, 16, 4),),
    ("tube_backward", (80, 90), "fp32", (32, 64)): (Tile(32, 32, 4),),
    ("tube_backward", (80, 90), "fp32", (80, 96, 128)): (Tile(16, 16, 4),),
    # Long tubes, the largest tiles without spills: 64 keys spill at D=80 (forward) and D=64 (keys) on sm_80.
    ("tube_forward_long", (80, 90), "half", HEAD_DIMS): (Tile(64, 32, 4),),
    ("tube_backward_queries", (80, 90), "half", HEAD_DIMS): (Tile(64, 32, 4),),
    ("tube_backward_keys", (80,), "half", HEAD_DIMS): (Tile(32, 32, 4),),
    ("tube_backward_keys", (90,), "half", (32,)): (Tile(64, 32, 4),),  # with Triton 3.9, 8 bytes of 32 rows spill
    ("tube_backward_keys", (90,), "half", (64, 80, 96, 128)): (Tile(32, 32, 4),),
    ("tube_forward_long", (80,), "fp32", HEAD_DIMS): (Tile(16, 16, 4),),
    ("tube_forward_long", (90,), "fp32", (32, 64, 80, 96)): (Tile(16, 16, 4),),
    ("tube_forward_long", (90,), "fp32", (128,)): (Tile(32, 16, 8),),  # of 16 rows 8 bytes spill with Triton 3.8 or 3.9
    ("tube_backward_queries", (80, 90), "fp32", (32, 64, 80, 96)): (Tile(16, 16, 4),),
    ("tube_backward_queries", (80, 90), "fp32", (128,)): (Tile(16, 16, 8),),  # over 4 warps 200 bytes spill
    ("tube_backward_keys", (80, 90), "fp32", HEAD_DIMS): (Tile(16, 16, 8),),  # over 4 warps 8 bytes spill at D=80 and 128
    # Hierarchical attention: the largest tiles without spills at N = 49 and 196, Triton 3.8. None of them has been timed.
    # Small tail tiles are cut to fit by the launcher. D=80 and 96 are padded to 128 and behave like it.
    # The forward by shape (triton_hierarchical.forward chooses). us: a replay of the compiled code at bf16, B=32, H=12, D=64,
    # T=12, U-V-r 3-4-2, an estimate; floor: 4 units over 3.0 (H100) and 1.84 TB/s (A100). Triton 3.8.
    # A frame of up to 64 rows, B/32: one tile. H100 42 us (floor 39): bound by DRAM; A100 77 (64).
    ("hier_forward_walk", (80, 90), "half", (32, 64)): (Tile(64, 64, 4, 2, programs=3),),
    # B/16 on wgmma: 196 + 13 rows are two tiles of 128, 196 + 12 keys are 128 + 64 + 16. 128 registers, for two programs an SM
    # instead of one: 192 us where 157 registers take 350 (floor 155). About a hundred spill instructions of 2,000, none of
    # them in a loop, for there is none: the replay gives them 3 % of the waiting.
    ("hier_forward_resident", (90,), "half", (64,)): (Tile(128, 128, 8, registers=128),),
    # All others. mma.sync reads keys from shared memory for each 16 rows of a warp: 32 rows a warp halve that. 168 registers
    # for three programs an SM: B/16 378 us where 242 registers take 455 and 64 rows 401 to 541 (floor 253).
    ("hier_forward_stream", (80,), "half", (32, 64)): (Tile(128, 32, 4, 3, registers=168),),
    # Five small programs an SM hide each other's loads better than pipelining does, which takes shared memory from them. L/14
    # (H=16) 432 us (floor 270), L2 384 of them; 128 rows 537 to 594, 32 keys 457 to 489.
    ("hier_forward_stream", (90,), "half", (32, 64)): (Tile(64, 64, 4, 1, registers=96),),
    ("hier_forward_stream", (80,), "half", (80, 96, 128)): (Tile(64, 32, 4, 2),),
    ("hier_forward_stream", (90,), "half", (80, 96, 128)): (Tile(64, 32, 4, 3),),
    ("hier_dq", (80,), "half", (64,)): (Tile(64, 32, 4, 2),),
    ("hier_dq", (90,), "half", (32, 64)): (Tile(64, 32, 4, 2),),
    ("hier_dq", (80,), "half", (32, 80, 96, 128)): (Tile(32, 32, 4),),  # 64 rows, 2 stages at D=32 spill 8 bytes at N=49
    ("hier_dq", (90,), "half", (80, 96, 128)): (Tile(64, 32, 8, 2),),  # over 4 warps 228 registers: 2 programs
    # dK and dV stay in registers: fewer rows at a time, and more warps where D is large.
    ("hier_dkv", (80,), "half", (32, 64)): (Tile(16, 64, 4, 2),),
    ("hier_dkv", (90,), "half", (32, 64)): (Tile(32, 64, 4, 2),),
    ("hier_dkv", (80,), "half", (80, 96, 128)): (Tile(16, 64, 8, 2),),
    ("hier_dkv", (90,), "half", (80, 96, 128)): (Tile(32, 64, 8, 2),),
    # Once a head over 13 rows: latency, not throughput, so three frames are in flight.
    ("hier_combine", (80, 90), "half", HEAD_DIMS): (Tile(16, 16, 4, 3),),
    ("hier_finish", (80, 90), "half", HEAD_DIMS): (Tile(16, 16, 4, 3),),
    # fp32: an FMA thread holds whole rows of its operands, so small tiles over many warps.
    ("hier_forward_stream", (80, 90), "fp32", (32,)): (Tile(32, 32, 4),),
    ("hier_forward_stream", (80, 90), "fp32", (64, 80, 96)): (Tile(16, 32, 8),),
    ("hier_forward_stream", (80, 90), "fp32", (128,)): (Tile(16, 16, 8),),  # with 32 keys 104 bytes spill
    ("hier_dq", (80, 90), "fp32", (32, 64)): (Tile(32, 32, 8),),
    ("hier_dq", (80, 90), "fp32", (80, 96, 128)): (Tile(16, 16, 8),),
    ("hier_dkv", (80, 90), "fp32", HEAD_DIMS): (Tile(16, 32, 8),),
    ("hier_combine", (80, 90), "fp32", HEAD_DIMS): (Tile(16, 16, 8),),
    ("hier_finish", (80, 90), "fp32", HEAD_DIMS): (Tile(16, 16, 8),),
}

TABLE: dict[tuple[str, int, str, int], tuple[Tile, ...]] = {
    (kernel, arch, kind, D): choice for (kernel, archs, kind, dims), choice in _ROWS.items() for arch in archs for D in dims
}


def unsupported(dtype: torch.dtype, D: int) -> str | None:
    """None if the table has rows for this dtype and head dimension, else the sentence why not."""
    if D not in HEAD_DIMS:
        return f"head dimension {D}: the triton backend has {', '.join(map(str, HEAD_DIMS))}"
    if dtype not in DTYPES:
        return f"dtype {dtype}: the triton backend has float16, bfloat16, float32"
    return None


def arch(device: torch.device) -> int:
    """The architecture whose rows serve this device: 80 or 90 (163 and 227 KB of shared memory, mma.sync and wgmma).

    Raises:
        ValueError: an NVIDIA GPU older than compute capability 8.0, which has no bfloat16.
    """
    if device.type != "cuda":
        return DEFAULT_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"{device} has compute capability {major}.{minor}; the triton backend needs 8.0 or later")
    return 90 if major in (9, 10, 11) else 80  # 12.x (consumer Blackwell) has mma.sync and little shared memory, like 8.x


def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; those of an A100 or H100 for tensors that are on none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return {80: 108, 90: 132}[DEFAULT_ARCH]


def lookup(kernel: str, device: torch.device, dtype: torch.dtype, D: int) -> tuple[Tile, ...]:
    """The configurations of a kernel for tensors of this dtype and head dimension on this device, smallest first.

    Empty for a kernel that has none there, which only kernels with an alternative lack.

    Raises:
        ValueError: no row; the message is that of `unsupported`.
    """
    if reason := unsupported(dtype, D):
        raise ValueError(reason)
    return TABLE.get((kernel, arch(device), "fp32" if dtype == torch.float32 else "half", D), ())
