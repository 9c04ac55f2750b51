"""Tile sizes of every Triton kernel, apart from the maths: which configuration runs where, and why.

Kernels take these numbers as constexprs and decide nothing. A change here needs a measurement or, without a GPU, the
ahead-of-time test, which compiles every row for every architecture and asserts that no register spills.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import tuned

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
        keep: hier_backward_frames only: whether sums over frames stay in registers from frame to frame.
        over: hier_forward_stream only: as many rows or fewer behind a frame's whole tiles get no tile; several frames' are
            done by one program.
    """

    rows: int
    keys: int
    warps: int
    stages: int = 1
    registers: int = 0
    programs: int = 1
    keep: bool = False
    over: int = 0

    def __post_init__(self) -> None:
        least = {"rows": 1, "keys": 1, "warps": 1, "stages": 1, "registers": 0, "programs": 1, "over": 0}
        if wrong := [name for name in least if type(getattr(self, name)) is not int or getattr(self, name) < least[name]]:
            raise ValueError(f"{', '.join(wrong)} of {self} must be positive integers")

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes beside the kernel's arguments."""
        return {"num_warps": self.warps} | ({"maxnreg": self.registers} if self.registers else {})


# (kernel, architectures, `kind` of dtype, head dimensions) -> tiles, smallest first where a kernel has several to choose
# from. fp16 and bf16 share rows: same bytes, same instructions. fp32 multiplies at full precision, which means FMA loops
# whose operands sit in registers, so its tiles are smaller. tf32 takes the rows of fp32 where it has none.
_ROWS: dict[tuple[str, tuple[int, ...], str, tuple[int, ...]], tuple[Tile, ...]] = {
    # Tube attention: a whole number of tubes in a tile, the smallest tile that holds one; T > all of them: the long kernels.
    # Registers: Triton 3.8, D=64. "x" is predicted time over that of moving the bytes, B=32, H=12, T=12, N=196 and 49.
    # Of these kernels only the 64-row tiles at D=64 on H100 were timed, in an earlier form (triton_tube.py).
    ("tube_forward", (80,), "half", HEAD_DIMS): (Tile(64, 64, 4),),  # 92 registers, 5 programs; 0.99x and 1.02x
    # 32 rows: 48 registers, 10 programs; 1.00x and 1.02x, where 64 rows are at 1.05x and 1.06x. At other D 64 rows are better.
    # 65 to 128 frames stay one tile where wgmma reads operands from shared memory: 1.02x at T=128, 1.19x at 96.
    ("tube_forward", (90,), "half", (64,)): (Tile(32, 32, 4), Tile(64, 64, 4), Tile(128, 128, 8)),
    ("tube_forward", (90,), "half", (32, 80, 96, 128)): (Tile(64, 64, 4), Tile(128, 128, 8)),
    # 32 rows: 60 registers, 8 programs; 0.99x and 1.00x, where 64 rows take 168. Those, for 33 to 64 frames, are at 1.05x with
    # T=64 and 1.21x with T=40; over 8 warps mma.sync reads twice as many bytes of shared memory: 2.4x.
    ("tube_backward", (80,), "half", HEAD_DIMS): (Tile(32, 32, 4), Tile(64, 64, 4)),
    ("tube_backward", (90,), "half", HEAD_DIMS): (Tile(64, 64, 4), Tile(128, 128, 8)),  # 120 registers; 0.98x and 0.97x
    # TF32 runs on tensor cores, which need no whole rows in registers: tiles of half as many rows as in half precision.
    ("tube_forward", (80, 90), "tf32", HEAD_DIMS): (Tile(16, 16, 4), Tile(32, 32, 4), Tile(64, 64, 8)),
    ("tube_backward", (80,), "tf32", HEAD_DIMS): (Tile(16, 16, 4), Tile(32, 32, 4)),  # 64 rows spill from D=64
    ("tube_backward", (90,), "tf32", HEAD_DIMS): (Tile(16, 16, 4), Tile(32, 32, 4), Tile(64, 64, 8)),
    # fp32: 32 rows spill at D=96 and 128 and take 247 registers at 80, where 16 rows take 42 to 96.
    ("tube_forward", (80, 90), "fp32", (32, 64)): (Tile(32, 32, 4),),
    ("tube_forward", (80, 90), "fp32", (80, 96, 128)): (Tile(16, 16, 4),),
    ("tube_backward", (80, 90), "fp32", (32, 64)): (Tile(32, 32, 4),),
    ("tube_backward", (80, 90), "fp32", (80, 128)): (Tile(16, 16, 4),),
    ("tube_backward", (80,), "fp32", (96,)): (Tile(16, 16, 2),),  # over 4 warps 8 bytes spill
    ("tube_backward", (90,), "fp32", (96,)): (Tile(16, 16, 4),),
    # Long tubes. Stages bring the keys by cp.async: on A100 (T=128, D=64) one is at 1.66x, two at 1.44x, three at 0.98x; on
    # H100 (T=192) two and three at 1.27x.
    ("tube_forward_long", (80,), "half", (64, 80, 96)): (Tile(64, 32, 4, 3),),
    ("tube_forward_long", (80,), "half", (32, 128)): (Tile(64, 32, 4, 2),),  # of three 16 bytes spill at D=32
    ("tube_forward_long", (90,), "half", HEAD_DIMS): (Tile(64, 32, 4, 2),),
    ("tube_backward_queries", (80,), "half", HEAD_DIMS): (Tile(64, 32, 4, 2),),
    ("tube_backward_queries", (90,), "half", HEAD_DIMS): (Tile(64, 32, 4),),
    ("tube_backward_keys", (80,), "half", HEAD_DIMS): (Tile(32, 32, 4),),
    ("tube_backward_keys", (90,), "half", HEAD_DIMS): (Tile(64, 32, 4, 2),),
    ("tube_forward_long", (80, 90), "tf32", HEAD_DIMS): (Tile(32, 32, 4, 2),),
    ("tube_backward_queries", (80,), "tf32", (32, 64, 96, 128)): (Tile(32, 32, 4, 2),),
    ("tube_backward_queries", (80,), "tf32", (80,)): (Tile(32, 16, 4, 2),),  # of 32 keys 8 bytes spill
    ("tube_backward_queries", (90,), "tf32", HEAD_DIMS): (Tile(32, 32, 4, 2),),
    ("tube_backward_keys", (80,), "tf32", HEAD_DIMS): (Tile(32, 32, 4),),
    ("tube_backward_keys", (90,), "tf32", (32, 64, 96, 128)): (Tile(32, 32, 4),),
    ("tube_backward_keys", (90,), "tf32", (80,)): (Tile(32, 32, 4, 2),),  # in one stage 8 bytes spill
    ("tube_forward_long", (80,), "fp32", HEAD_DIMS): (Tile(16, 16, 4),),
    ("tube_forward_long", (90,), "fp32", (32, 64, 80, 96)): (Tile(16, 16, 4),),
    ("tube_forward_long", (90,), "fp32", (128,)): (Tile(32, 16, 8),),  # of 16 rows 8 bytes spill with Triton 3.8 or 3.9
    ("tube_backward_queries", (80, 90), "fp32", (32, 64, 80, 96)): (Tile(16, 16, 4),),
    ("tube_backward_queries", (80, 90), "fp32", (128,)): (Tile(16, 16, 8),),  # over 4 warps 200 bytes spill
    ("tube_backward_keys", (80, 90), "fp32", HEAD_DIMS): (Tile(16, 16, 8),),  # over 4 warps 8 bytes spill at D=80 and 128
    # Hierarchical attention, Triton 3.8. None of these tiles has been timed. Small tail tiles are cut to fit by the launcher.
    # The backward pads D=80 and 96 to 128, where they behave like it; the forward does not.
    # The forward by shape (triton_hierarchical.forward chooses). us: a replay of the compiled code at bf16, B=32, H=12, D=64,
    # T=12, U-V-r 3-4-2, an estimate; floor: 4 units over 3.0 (H100) and 1.84 TB/s (A100). Triton 3.8.
    # A frame of up to 64 rows, B/32: one tile. H100 42 us (floor 39): bound by DRAM; A100 77 (64).
    ("hier_forward_walk", (80, 90), "half", (32, 64)): (Tile(64, 64, 4, 2, programs=3),),
    # B/16 on wgmma: 196 + 13 rows are two tiles of 128, 196 + 12 keys are 128 + 64 + 16. 128 registers, for two programs an SM
    # instead of one: 192 us where 157 registers take 350 (floor 155). About a hundred spill instructions of 2,000, none of
    # them in a loop, for there is none: the replay gives them 3 % of the waiting.
    ("hier_forward_resident", (90,), "half", (64,)): (Tile(128, 128, 8, registers=128),),
    # All others. mma.sync reads keys from shared memory for each 16 rows of a warp: 32 rows a warp halve that. 168 registers
    # for three programs an SM: B/16 398 us where 242 registers take 455 and 64 rows 401 to 541 (floor 253). L/14 (H=16) 694
    # (floor 440), 970 if the 13 summary rows take a third tile.
    ("hier_forward_stream", (80,), "half", (32, 64)): (Tile(128, 32, 4, 3, registers=168, over=16),),
    # Small programs, many an SM, hide each other's loads better than pipelining does, which takes shared memory from them. L/14
    # (floor 270): 128 rows 387 us, where keys cross L2 three times a frame; 64 rows 421, five times, 398 of it L2's. 64 keys
    # or 8 warps 403 to 426.
    ("hier_forward_stream", (90,), "half", (32, 64)): (
        Tile(64, 64, 4, 1, registers=96),
        Tile(128, 32, 4, 1, registers=128, over=16),
    ),
    ("hier_forward_stream", (80,), "half", (80, 96, 128)): (Tile(64, 32, 4, 2),),
    ("hier_forward_stream", (90,), "half", (80, 96, 128)): (Tile(64, 32, 4, 3),),
    # Backward, frames whose N + G rows fit one tile; () where no tile goes without spills. dQ, dK and dV are 96 registers.
    # On sm_90 what summary tokens gain stays in them from frame to frame (243 registers, 2 programs); on sm_80 300 bytes spill.
    # The next frame is copied meanwhile: 3 stages, since with 2 the copies start after the products.
    ("hier_backward_frames", (80,), "half", (32, 64)): (Tile(64, 64, 4, 2),),
    ("hier_backward_frames", (90,), "half", (32, 64)): (Tile(64, 64, 4, 3, keep=True),),
    ("hier_backward_frames", (80, 90), "half", (80, 96, 128)): (),
    ("hier_backward_frames", (80, 90), "fp32", HEAD_DIMS): (),
    # B/16: one program of 8 warps an SM, 255 registers. Everything is read once, and it takes no longer than two kernels that
    # read it twice (predicted 717 us; those 704 to 743). At 128 registers two programs run, 16 keys at a time: a sixth faster,
    # but 19 spills in the loop.
    ("hier_backward_frame", (90,), "half", (64,)): (Tile(256, 64, 8, 3),),
    # Larger frames: of several tiles that which pads least, N=196 to 256 rows either way, N=256 to 320 instead of 384.
    # 8 warps at 128 registers are 2 programs, one more register and it is one; fewer programs read each key, so L2 moves less.
    ("hier_backward_rows", (80,), "half", (32, 64)): (Tile(64, 32, 4, 3),),
    ("hier_backward_rows", (90,), "half", (32, 64)): (Tile(64, 32, 4, 3), Tile(128, 64, 8, 4, 128)),
    ("hier_backward_rows", (80,), "half", (80, 96, 128)): (Tile(32, 32, 4, 2),),
    ("hier_backward_rows", (90,), "half", (80, 96, 128)): (Tile(64, 32, 4, 3),),  # over 8 warps one program instead of 2
    # dK and dV stay in registers: fewer rows at a time. 168 registers are 3 programs, where the compiler takes 180.
    ("hier_backward_keys", (80,), "half", (32, 64)): (Tile(32, 64, 4, 3, 168),),
    ("hier_backward_keys", (90,), "half", (32, 64)): (Tile(32, 64, 4, 3), Tile(32, 128, 8, 3, 128)),
    ("hier_backward_keys", (80,), "half", (80, 96, 128)): (Tile(32, 32, 4, 2),),  # 8 warps repeat each other's mma.sync
    ("hier_backward_keys", (90,), "half", (80, 96, 128)): (Tile(16, 64, 4, 3),),
    # Once a head over 13 rows: latency, not throughput, so three frames are in flight.
    ("hier_combine", (80, 90), "half", HEAD_DIMS): (Tile(16, 16, 4, 3),),
    ("hier_finish", (80, 90), "half", HEAD_DIMS): (Tile(16, 16, 4, 3),),
    # fp32: an FMA thread holds whole rows of its operands, so small tiles over many warps.
    ("hier_forward_stream", (80, 90), "fp32", (32,)): (Tile(32, 32, 4),),
    ("hier_forward_stream", (80, 90), "fp32", (64, 80, 96)): (Tile(16, 32, 8),),
    ("hier_forward_stream", (80, 90), "fp32", (128,)): (Tile(16, 16, 8),),  # with 32 keys 104 bytes spill
    ("hier_backward_rows", (80, 90), "fp32", (32, 64)): (Tile(32, 32, 8),),
    ("hier_backward_rows", (80, 90), "fp32", (80, 96, 128)): (Tile(16, 16, 8),),
    ("hier_backward_keys", (80, 90), "fp32", HEAD_DIMS): (Tile(16, 32, 8),),
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


def kind(dtype: torch.dtype) -> str:
    """The kind of arithmetic, which rows are for: "half", "fp32", or "tf32" for float32 where torch's matmuls would take it.

    torch's setting is `torch.set_float32_matmul_precision` or `torch.backends.cuda.matmul.fp32_precision`. Reading the
    latter sees both; the older ways of asking raise where the new one has set it.
    """
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


@dataclass
class Trial:
    """What `python -m vidla_kernels.tune` does while it measures: it forces tiles, and sees which were asked for.

    Args:
        forced: by key, the tile to use instead of the shipped one. Nothing that was measured before is used.
        asked: by key, the tile that was given.
        launched: what Triton returned for each launch.
    """

    forced: dict[str, Tile] = field(default_factory=dict)
    asked: dict[str, Tile] = field(default_factory=dict)
    launched: list[Any] = field(default_factory=list)


_trial: Trial | None = None


@contextmanager
def trial(forced: Mapping[str, Tile] | None = None) -> Iterator[Trial]:
    """A `Trial` for all launches within, which forces these tiles by key."""
    global _trial
    before, _trial = _trial, Trial(dict(forced or {}))
    try:
        yield _trial
    finally:
        _trial = before


def launched(kernel: Any) -> None:
    """Tell the trial under way, if any, of a launch."""
    if _trial:
        _trial.launched.append(kernel)


def _chosen(key: str, device: torch.device, shipped: Tile) -> Tile:
    """The tile for a key: of the trial, else the one measured on this GPU, else the shipped one."""
    if _trial:
        return _trial.asked.setdefault(key, _trial.forced.get(key, shipped))
    if measured := tuned.tile(key, device):
        try:
            return Tile(**measured)
        except (TypeError, ValueError) as error:
            warnings.warn(f"{tuned.path()}, {key!r}: not a tile, the shipped one is used ({error})", stacklevel=2)
    return shipped


def _shipped(kernel: str, device: torch.device, dtype: torch.dtype, D: int) -> tuple[Tile, ...]:
    if reason := unsupported(dtype, D):
        raise ValueError(reason)
    sm, arithmetic = arch(device), kind(dtype)
    return TABLE.get((kernel, sm, arithmetic, D)) or TABLE.get((kernel, sm, "fp32", D), ())


def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; those of an A100 or H100 for tensors that are on none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return {80: 108, 90: 132}[DEFAULT_ARCH]


def lookup(kernel: str, device: torch.device, dtype: torch.dtype, D: int) -> tuple[Tile, ...]:
    """The configurations of a kernel for tensors of this dtype and head dimension on this device, smallest first.

    A kernel that has one configuration gets the one measured on this GPU (tuned.py), if there was a measurement.
    Empty for a kernel that has none there, which only kernels with an alternative lack.

    Raises:
        ValueError: no row; the message is that of `unsupported`.
    """
    row = _shipped(kernel, device, dtype, D)
    return row if len(row) != 1 else (_chosen(f"{kernel} {kind(dtype)} D={D}", device, row[0]),)


def holding(kernel: str, device: torch.device, dtype: torch.dtype, D: int, T: int) -> Tile | None:
    """The tile of a packed tube kernel for tubes of T rows; None where T exceeds every tile.

    The smallest that holds a tube, or the one measured on this GPU for all T of the same class.

    Raises:
        ValueError: as `lookup`.
    """
    fitting = [tile for tile in _shipped(kernel, device, dtype, D) if tile.rows >= T]
    if not fitting:
        return None
    longest = next(end for end in CLASSES if end >= T)
    tile = _chosen(f"{kernel} {kind(dtype)} D={D} T<={longest}", device, fitting[0])
    return tile if tile.rows >= T else fitting[0]


# Tubes are tuned by classes of T, and a class shares one tile: within it a new T compiles nothing.
CLASSES = (16, 32, 64, 128)

# What tuning tries beside the shipped tile. A candidate must hold its class of T; whether it compiles without a spilled
# register and gives the same result is found out there.
_CANDIDATES: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("tube_forward", "half"): (Tile(32, 32, 2), Tile(32, 32, 4), Tile(64, 64, 4), Tile(64, 64, 8), Tile(128, 128, 8)),
    ("tube_forward", "tf32"): (Tile(16, 16, 2), Tile(16, 16, 4), Tile(32, 32, 4), Tile(32, 32, 8), Tile(64, 64, 8)),
    ("tube_forward", "fp32"): (Tile(16, 16, 2), Tile(16, 16, 4), Tile(32, 32, 4), Tile(32, 32, 8)),
    ("tube_backward", "half"): (Tile(32, 32, 2), Tile(32, 32, 4), Tile(64, 64, 4), Tile(64, 64, 8), Tile(128, 128, 8)),
    ("tube_backward", "tf32"): (Tile(16, 16, 2), Tile(16, 16, 4), Tile(32, 32, 4), Tile(32, 32, 8)),
    ("tube_backward", "fp32"): (Tile(16, 16, 4), Tile(16, 16, 8), Tile(32, 32, 4), Tile(32, 32, 8)),
}


def candidates(key: str, shipped: Tile) -> list[Tile]:
    """What tuning tries for a key instead of the shipped tile: the list above, or the shipped tile's neighbours."""
    kernel, arithmetic, *rest = key.split()
    least = int(rest[-1].removeprefix("T<=")) if rest[-1].startswith("T<=") else 0
    listed = _CANDIDATES.get((kernel, arithmetic))
    if listed is None:  # other warps, a stage more or less: the rows of these kernels follow from N
        warps = [replace(shipped, warps=count) for count in (shipped.warps // 2, shipped.warps * 2) if 2 <= count <= 8]
        listed = (*warps, *(replace(shipped, stages=shipped.stages + by) for by in (-1, 1) if 1 <= shipped.stages + by <= 4))
    return [tile for tile in listed if tile != shipped and tile.rows >= least]
