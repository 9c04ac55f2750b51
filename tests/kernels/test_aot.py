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
KINDS = [(kind, D) for kind in ("bfloat16", "float32", "tf32") for D in tiles.HEAD_DIMS] + [("float16", 64)]


def case(op: str, arch: int, kind: str, D: int, *, B: int = 2, T: int = 12, N: int = 49, H: int = 12) -> Case:
    """A case of a kind of arithmetic: a dtype, or "tf32"."""
    return Case(op, arch, T, N, B=B, H=H, D=D, dtype="float32" if kind == "tf32" else kind, tf32=kind == "tf32")


@pytest.fixture(scope="module")
def shipped() -> list[tuple[Case, Compiled]]:
    """All launches of all shipped configurations, compiled by two processes at a time."""
    cases = [
        case(op, arch, kind, D, T=T, N=N)
        for op, shapes in SHAPES.items()
        for arch in SHARED_LIMIT
        for kind, D in KINDS
        for T, N in shapes
    ]
    return [(made, row) for made, rows in zip(cases, compiled(cases), strict=True) for row in rows]


@pytest.mark.parametrize(("kind", "D"), KINDS)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("op", SHAPES)
def test_nothing_spills_and_shared_memory_fits(shipped, op: str, arch: int, kind: str, D: int) -> None:
    rows = [(made, row) for made, row in shipped if made == case(op, arch, kind, D, T=made.T, N=made.N)]
    # Straight-line code may spill a little where that doubles the programs an SM holds (tiles.py says where and why).
    spills = lambda row: row.spills_in_loops or row.spilled > 0.06  # noqa: E731
    wrong = [(made, row) for made, row in rows if spills(row) or row.shared > SHARED_LIMIT[arch]]
    table = "\n".join(
        f"{row.kernel}, T {made.T}, N {made.N}, {row.options}, {row.warps} warps: {row.registers} registers, {row.stack} bytes "
        f"of stack, {row.spills_in_loops} spills in loops, {row.spilled:.0%} in all, {row.shared} bytes of shared memory"
        for made, row in wrong
    )
    assert rows, "nothing was compiled"
    assert not wrong, (
        f"{len(wrong)} of {len(rows)} launches spill in a loop or much, or need more than {SHARED_LIMIT[arch]} bytes:\n{table}"
    )


def test_every_tile_of_the_packed_kernels_is_compiled(shipped) -> None:
    rows = {(row.kernel, made.arch, made.dtype, made.tf32, made.D, row.options.get("ROWS"), row.warps) for made, row in shipped}
    for arch in SHARED_LIMIT:
        for kind, D in KINDS:
            like = case("tube", arch, kind, D)
            for kernel, name in (("tube_forward", "forward_packed"), ("tube_backward", "backward_packed")):
                choice = tiles.TABLE[kernel, arch, {"float32": "fp32", "tf32": "tf32"}.get(kind, "half"), D]
                assert {(name, arch, like.dtype, like.tf32, D, tile.rows, tile.warps) for tile in choice} <= rows


# What is a runtime value: B everywhere, T within a class, and in tube attention also N and H. The classes are those of
# `tiles.CLASSES`, whose first and last members must share a kernel.
SIZES = {
    "tube": [{"N": N} for N in (1, 196, 256)] + [{"H": H} for H in (1, 16)],
    "hierarchical": [{"T": T} for T in (1, 2, 16, 33, 100)],
}


def compiled_anew(groups: list[list[Case]]) -> list[tuple[str, Case]]:
    """Launches whose kernel is not the one that the first launch of that name in the same group of cases compiled."""
    cases = [(number, member) for number, group in enumerate(groups) for member in group]
    first, anew = {}, []
    for (number, member), rows in zip(cases, compiled([member for _, member in cases]), strict=True):
        anew += [(row.kernel, member) for row in rows if first.setdefault((number, row.kernel), row.digest) != row.digest]
    return anew


@pytest.mark.parametrize("op", SHAPES)
def test_other_sizes_compile_nothing_new(op: str) -> None:
    sizes = [{}, *SIZES[op], *({"B": B} for B in (1, 16, 33))]
    kinds = [(arch, kind) for arch in SHARED_LIMIT for kind in ("float16", "tf32")]
    assert not compiled_anew([[case(op, arch, kind, 32, **size) for size in sizes] for arch, kind in kinds])


def test_a_class_of_tubes_shares_its_kernels() -> None:
    """Bucketed clips: every T from one class's end to the next launches the same kernels, whatever B is."""
    groups = []
    for arch in SHARED_LIMIT:
        for shorter, longest in zip((0, *tiles.CLASSES), tiles.CLASSES, strict=False):
            lengths = (shorter + 1, (shorter + longest) // 2, longest)
            groups.append([case("tube", arch, "float16", 64, T=T, B=B) for T in lengths for B in (2, 31)])
    assert not compiled_anew(groups)


def test_the_count_sees_a_new_kernel() -> None:
    assert compiled_anew([[case("tube", 80, "float16", 32, T=T) for T in (32, 33)]])
