"""Every shipped configuration, compiled for both architectures without a GPU: no spilled register, shared memory that fits.

fp16 takes the rows of bf16 in the tile table, and the same instructions at the same widths: one head dimension stands for it.
Compiling is minutes of work the first time; Triton's cache on disk makes the next run seconds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidla_kernels import tiles

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have (CUDA C++ Programming Guide, compute capabilities)
# (T, N) of every shape class. Tubes: up to 16, 32, 64, 128 rows, and beyond. Frames: B/32's 49 patches, B/16's 196, L/14's 256.
SHAPES = {"tube": ((12, 49), (24, 49), (48, 49), (96, 49), (192, 49)), "hierarchical": ((12, 49), (12, 196), (12, 256))}
KINDS = [(dtype, D) for dtype in ("bfloat16", "float32") for D in tiles.HEAD_DIMS] + [("float16", 64)]


def compile_cases(cases: list[dict]) -> list[dict]:
    """One row a launch, from a process of its own: Triton compiles nothing where it interprets."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot"],
        input=json.dumps(cases),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def case(family: str, arch: int, dtype: str, D: int, *, B: int = 2, T: int = 12, N: int = 49, H: int = 12) -> dict:
    return {"family": family, "arch": arch, "dtype": dtype, "D": D, "B": B, "T": T, "N": N, "H": H}


@pytest.fixture(scope="module")
def shipped() -> list[dict]:
    """What all shipped configurations cost, compiled by two processes at a time."""
    return compile_cases(
        [
            case(family, arch, dtype, D, T=T, N=N)
            for family, shapes in SHAPES.items()
            for arch in SHARED_LIMIT
            for dtype, D in KINDS
            for T, N in shapes
        ]
    )


@pytest.mark.parametrize(("dtype", "D"), KINDS)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("family", SHAPES)
def test_nothing_spills_and_shared_memory_fits(shipped: list[dict], family: str, arch: int, dtype: str, D: int) -> None:
    wanted = {"family": family, "arch": arch, "dtype": dtype, "D": D}
    rows = [row for row in shipped if wanted.items() <= row.items()]
    wrong = [row for row in rows if row["spill"] or row["shared"] > SHARED_LIMIT[arch]]
    columns = ("kernel", "T", "N", "rows", "warps", "registers", "spill", "shared")
    table = "\n".join(", ".join(f"{name} {row[name]}" for name in columns) for row in wrong)
    assert rows, "nothing was compiled"
    assert not wrong, f"{len(wrong)} of {len(rows)} launches spill or need more than {SHARED_LIMIT[arch]} bytes:\n{table}"


def test_every_tile_of_the_packed_kernels_is_compiled(shipped: list[dict]) -> None:
    compiled = {(row["kernel"], row["arch"], row["dtype"], row["D"], row["rows"], row["warps"]) for row in shipped}
    for arch in SHARED_LIMIT:
        for dtype, D in KINDS:
            for kernel, name in (("tube_forward", "forward_packed"), ("tube_backward", "backward_packed")):
                choice = tiles.TABLE[kernel, arch, "fp32" if dtype == "float32" else "half", D]
                assert {(name, arch, dtype, D, tile.rows, tile.warps) for tile in choice} <= compiled


# What is a runtime value: B everywhere, T within a shape class, and in tube attention also N and H.
SIZES = {
    "tube": [{"T": T} for T in (1, 2, 16, 33, 64)] + [{"N": N} for N in (1, 196, 256)] + [{"H": H} for H in (1, 16)],
    "hierarchical": [{"T": T} for T in (1, 2, 16, 33)],
}


@pytest.mark.parametrize("family", SHAPES)
def test_other_sizes_compile_nothing_new(family: str) -> None:
    sizes = [{}, *SIZES[family], *({"B": B} for B in (1, 16, 33))]
    rows = compile_cases([case(family, 90, "float16", 32, **size) for size in sizes])
    first = {}  # by kernel, the row of the base size
    new = [row for row in rows if first.setdefault(row["kernel"], row)["hash"] != row["hash"]]
    assert not new, [(row["kernel"], *(f"{name}={row[name]}" for name in "BTNH")) for row in new]
