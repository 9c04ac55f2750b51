"""Every shipped configuration, compiled for both architectures without a GPU: no spills in a loop, shared memory that fits.

fp16 takes the rows of bf16 in the tile table, and the same instructions at the same widths: one head dimension stands for it.
Compiling is minutes of work the first time; Triton's cache on disk makes the next run seconds.
"""

import pytest

from benchmarks.cost.cases import Case
from benchmarks.cost.resources import SHARED_LIMIT, Compiled, compiled
from vidla_kernels import tiles

# (T, N) of every shape class. Tubes: up to 16, 32, 64, 128 rows, and beyond. Frames: B/32's 49 patches, B/16's 196, L/14's 256.
SHAPES = {"tube": ((12, 49), (24, 49), (48, 49), (96, 49), (192, 49)), "hierarchical": ((12, 49), (12, 196), (12, 256))}
KINDS = [(dtype, D) for dtype in ("bfloat16", "float32") for D in tiles.HEAD_DIMS] + [("float16", 64)]


@pytest.fixture(scope="module")
def shipped() -> list[tuple[Case, Compiled]]:
    """All launches of all shipped configurations, compiled by two processes at a time."""
    cases = [
        Case(op, arch, T, N, B=2, D=D, dtype=dtype)
        for op, shapes in SHAPES.items()
        for arch in SHARED_LIMIT
        for dtype, D in KINDS
        for T, N in shapes
    ]
    return [(case, row) for case, rows in zip(cases, compiled(cases), strict=True) for row in rows]


@pytest.mark.parametrize(("dtype", "D"), KINDS)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("op", SHAPES)
def test_nothing_spills_and_shared_memory_fits(shipped, op: str, arch: int, dtype: str, D: int) -> None:
    rows = [(case, row) for case, row in shipped if (case.op, case.arch, case.dtype, case.D) == (op, arch, dtype, D)]
    # Straight-line code may spill a little where that doubles the programs an SM holds (tiles.py says where and why).
    spills = lambda row: row.spills_in_loops or row.spilled > 0.06  # noqa: E731
    wrong = [(case, row) for case, row in rows if spills(row) or row.shared > SHARED_LIMIT[arch]]
    table = "\n".join(
        f"{row.kernel}, T {case.T}, N {case.N}, {row.options}, {row.warps} warps: {row.registers} registers, {row.stack} bytes "
        f"of stack, {row.spills_in_loops} spills in loops, {row.spilled:.0%} in all, {row.shared} bytes of shared memory"
        for case, row in wrong
    )
    assert rows, "nothing was compiled"
    assert not wrong, (
        f"{len(wrong)} of {len(rows)} launches spill in a loop or much, or need more than {SHARED_LIMIT[arch]} bytes:\n{table}"
    )


def test_every_tile_of_the_packed_kernels_is_compiled(shipped) -> None:
    made = {(row.kernel, case.arch, case.dtype, case.D, row.options["ROWS"], row.warps) for case, row in shipped}
    for arch in SHARED_LIMIT:
        for dtype, D in KINDS:
            for kernel, name in (("tube_forward", "forward_packed"), ("tube_backward", "backward_packed")):
                choice = tiles.TABLE[kernel, arch, "fp32" if dtype == "float32" else "half", D]
                assert {(name, arch, dtype, D, tile.rows, tile.warps) for tile in choice} <= made


# What is a runtime value: B everywhere, T within a shape class, and in tube attention also N and H.
SIZES = {
    "tube": [{"T": T} for T in (1, 2, 16, 33, 64)] + [{"N": N} for N in (1, 196, 256)] + [{"H": H} for H in (1, 16)],
    "hierarchical": [{"T": T} for T in (1, 2, 16, 33)],
}


@pytest.mark.parametrize("op", SHAPES)
def test_other_sizes_compile_nothing_new(op: str) -> None:
    sizes = [{}, *SIZES[op], *({"B": B} for B in (1, 16, 33))]
    cases = [Case(op, 90, **({"T": 12, "N": 49, "B": 2, "D": 32, "dtype": "float16"} | size)) for size in sizes]
    first = {}  # by kernel, the digest at the base size
    new = [
        (row.kernel, size)
        for size, rows in zip(sizes, compiled(cases), strict=True)
        for row in rows
        if first.setdefault(row.kernel, row.digest) != row.digest
    ]
    assert not new, new
