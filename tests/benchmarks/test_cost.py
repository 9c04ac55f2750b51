"""The counting tool counts right, and the shipped kernels cost what docs/kernels.md says."""

import contextlib
import dataclasses
import struct
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.cost import __main__ as command
from benchmarks.cost import replay, report, sass, thread, traffic, walk
from benchmarks.cost.cases import SHAPES, Case
from benchmarks.cost.resources import Compiled, compiled, parameters

TINY = sass.Kernel("tiny", 80, 12, 0, 0, sass.parse((Path(__file__).parent / "tiny.sass").read_text()))


def launch_tiny(n: int, heads: int, warps: int = 4, grid: int = 12) -> walk.Launch:
    return walk.Launch(grid, 32 * warps, params=struct.pack("<Qii", 0x7F0000000000, n, heads))


# sass


def test_an_instruction_is_read_with_what_the_assembler_wrote_into_it():
    at = {x.pc: x for x in TINY.code}
    load, add, jump = at[0x1E0], at[0x220], at[0x230]
    assert (load.op, load.args, load.kind, load.size) == ("LDG.E", "R2, [R2.64]", "ldg", 128)
    assert (load.sets, add.waits) == (2, 0b100)  # the sum waits for the scoreboard that the load sets
    assert (jump.guard, jump.op, sass.target(jump)) == ("!P0", "BRA", 0x1C0)
    assert add.stall == 12
    assert len(TINY.code) == 0x2B0 // 16 + 1


def test_the_main_loop_is_the_loop():
    assert [x.pc for x in TINY.main_loop()] == list(range(0x1C0, 0x240, 16))
    assert sass.mix(TINY.main_loop()) == {"float": 2, "global": 1, "address": 4, "control": 1}


@pytest.mark.parametrize(("op", "macs"), [("HMMA.16816.F32.BF16", 2048), ("HGMMA.64x32x16.F32.BF16", 8192), ("FFMA", 0)])
def test_products_of_an_instruction(op, macs):
    kind = {"HM": "hmma", "HG": "wgmma", "FF": "fp32"}[op[:2]]
    assert sass.Instruction(0, "", op, "", 1, 7, 7, 0, kind, 0).macs == macs


@pytest.mark.parametrize(
    ("op", "args", "bytes_"),
    [
        ("HGMMA.64x104x16.F32.BF16", "R24, gdesc[UR24], RZ, !UPT", (64 + 104) * 16 * 2 / 4),
        ("HGMMA.64x64x16.F32.BF16", "R24, R176, gdesc[UR20].tnspB, R24", 64 * 16 * 2 / 4),
        ("HGMMA.64x32x8.F32.TF32", "R24, gdesc[UR4], R24, gsb0", (64 + 32) * 8 * 4 / 4),
        ("HMMA.16816.F32.BF16", "R4, R8, R12, R4", 0),
    ],
)
def test_what_a_product_reads_in_shared_memory(op, args, bytes_):
    kind = "wgmma" if op.startswith("HG") else "hmma"
    x = sass.Instruction(0, "", op, args, 1, 7, 7, 0, kind, 0)
    assert x.shared_operands == bytes_


# walk


@pytest.mark.parametrize("n", [0, 1, 7, 100])
@pytest.mark.parametrize("heads", [1, 3, 12])
def test_a_loop_runs_as_often_as_launch_block_and_warp_say(n, heads):
    launch = launch_tiny(n, heads)
    for block in (0, 5, 11):
        for warp in range(4):
            path = walk.walk(TINY, launch, block, warp)
            trips = sum(x.op == "LDG.E" for x in path.code)
            assert trips == len(range(warp, n + block % heads, 4)), (block, warp)
            assert path.bytes_asked == 128 * (trips + 1)  # the store at the end, which hangs on a float, is counted


def test_a_loop_that_ends_on_something_loaded_is_refused():
    loaded = [dataclasses.replace(x, args=x.args.replace("R5", "R2")) if x.pc == 0x210 else x for x in TINY.code]
    with pytest.raises(ValueError, match="0x230 depends on something unknown"):
        walk.walk(dataclasses.replace(TINY, code=tuple(loaded)), launch_tiny(5, 1))


def test_a_forward_branch_on_a_float_is_guessed_and_told():
    assert walk.walk(TINY, launch_tiny(5, 1)).guesses == Counter({0x260: 1})


def test_parameters_lie_where_the_driver_puts_them():
    signature = {"p": "*bf16", "n": "i32", "D": "constexpr", "s": "i64", "scale": "fp32"}
    packed = parameters(signature, {"n": 3, "s": 5, "scale": 0.5})
    assert len(packed) == 28
    assert (packed[8:12], packed[16:24], packed[24:]) == (struct.pack("<i", 3), struct.pack("<q", 5), struct.pack("<f", 0.5))


# replay


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks"),
    [
        (90, 145, 40960, 128, 3),  # as Nsight Compute reports it for such a kernel: 18.75 %, limited by registers
        (80, 32, 0, 128, 16),
        (80, 32, 100 * 1024, 128, 1),
        (80, 117, 0, 224, 2),  # 7 warps take the registers of 8
        (80, 255, 0, 512, 0),
    ],
)
def test_blocks_that_fit(arch, registers, shared, threads, blocks):
    assert replay.resident(replay.GPUS[arch], registers, shared, threads) == blocks


def test_an_estimate_grows_with_work_and_is_never_below_a_bound():
    few, many = (replay.estimate(TINY, launch_tiny(n, 1, grid=4000), dram_bytes=1e6, l2_bytes=1e6) for n in (100, 200))
    assert 1.5 < many.replay / few.replay < 2.5
    slow = replay.estimate(TINY, launch_tiny(100, 1, grid=4000), dram_bytes=1e9, l2_bytes=1e9)
    assert slow.replay >= slow.bounds["DRAM"] > few.replay
    assert "an estimate" in str(few)
    assert sum(few.waits.values()) == pytest.approx(1)
    assert few == replay.estimate(TINY, launch_tiny(100, 1, grid=4000), dram_bytes=1e6, l2_bytes=1e6)


def path_of(*code: tuple[str, str, str], events: dict[int, tuple] | None = None) -> walk.Path:
    """A path of instructions (name, operands, kind) that could follow each other at once, and what happens at some of them."""
    instructions = [sass.Instruction(16 * i, "", op, args, 1, 7, 7, 0, kind, 0) for i, (op, args, kind) in enumerate(code)]
    return walk.Path(instructions, events=events or {})


def cycles(*warps: walk.Path) -> float:
    return replay.replay([warps], replay.GPUS[90], fit=1, per_sm=1, miss=1.0, cycles_a_byte=0.0)[0]


def test_a_barrier_of_some_warps_holds_those_alone():
    work, meet, end = (
        [("MUFU.EX2", "R0, R0", "mufu")] * 100,
        ("BAR.SYNC.DEFER_BLOCKING", "R1, 0x40", "bar"),
        ("EXIT", "", "ctrl"),
    )
    thread = walk.Thread(TINY, launch_tiny(1, 1), 0, 0)
    thread.registers["R1"] = 3
    event = walk._barrier(sass.Instruction(0, "", *meet[:2], 1, 7, 7, 0, meet[2], 0), thread)
    assert event == ("sync", 3, 64)
    late, early = path_of(*work, meet, end, events={100: event}), path_of(meet, *work, end, events={0: event})
    free = path_of(*work, end)
    alone = cycles(free)
    assert 1.9 * alone < cycles(late, early, free) < 2.2 * alone
    assert cycles(late, late, free) < 1.2 * alone


def test_a_product_does_not_wait_for_copies():
    product = ("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR4], RZ, !UPT, gsb0", "wgmma")
    wait, end = ("WARPGROUP.DEPBAR.LE", "gsb0, 0x0", "wait"), ("EXIT", "", "ctrl")
    copy = ("LDGSTS.E.128", "[R2], [R4.64]", "ldgsts")
    assert cycles(path_of(copy, product, wait, end)) < 100 < replay.GPUS[90].latency_dram
    assert (
        cycles(path_of(copy, ("LDGDEPBAR", "", "wait"), ("DEPBAR.LE", "SB0, 0x0", "wait"), end)) > replay.GPUS[90].latency_dram
    )


def test_an_mbarriers_phase_ends_with_its_last_warp():
    barrier = replay._Mbarrier([0, 3])
    assert barrier.passes(1, 5.0) == 5.0  # of a fresh barrier, the phase before the first counts as over
    assert barrier.passes(0, 5.0) == float("inf")
    barrier.arrived[0].append(7.0)
    assert barrier.passes(0, 5.0) == float("inf")
    barrier.arrived[3].append(9.0)
    assert barrier.passes(0, 5.0) == 9.0
    assert barrier.passes(0, 12.0) == 12.0
    assert barrier.passes(1, 12.0) == float("inf")


# traffic

SMALL = [Case("tube", 90, 6, 5, D=32), Case("hierarchical", 80, 3, 17, D=32), Case("hierarchical", 90, 2, 40, D=64)]


@pytest.fixture(scope="module")
def small() -> dict[Case, list[traffic.Work]]:
    return dict(zip(SMALL, traffic.counted(SMALL), strict=True))


def test_tube_attention_moves_its_floor_and_nothing_else(small):
    for direction in ("fwd", "bwd"):
        (work,) = (w for w in small[SMALL[0]] if w.direction == direction)
        assert work.asked == work.distinct == SMALL[0].floor_bytes(direction, 1)
        assert work.macs >= SMALL[0].needed_macs(direction, 1)


@pytest.mark.parametrize("case", SMALL[1:], ids=str)
def test_hierarchical_attention_reads_every_byte_of_its_inputs(small, case):
    unit = case.floor_bytes("fwd", 1) // 4
    for direction, inputs, outputs in (("fwd", 3, 1), ("bwd", 4, 3)):
        works = [w for w in small[case] if w.direction == direction]
        assert max(w.distinct_read["p_qkv"] for w in works) <= 3 * unit
        assert sum(w.distinct for w in works) >= (inputs + outputs) * unit
        assert sum(w.macs for w in works) >= case.needed_macs(direction, 1)
        assert sum(w.exponentials for w in works) >= case.needed
        assert all(w.asked >= w.distinct and w.summary_again <= w.read for w in works)
        assert sum(w.distinct_written.get("p_dqkv" if direction == "bwd" else "p_out", 0) for w in works) == outputs * unit


def test_the_emulations_report_becomes_the_same_rows():
    case = Case("hierarchical", 80, 2, 3, B=2, H=1, U=1, V=1)
    kernel = {"global_read": 3000, "global_written": 900, "mma": 4, "exp2": 512}
    buffer = {"bytes": 2000, "distinct_read": 2000, "distinct_written": 0}
    (work,) = traffic.from_emulation({"kernels": {"frames": kernel}, "buffers": {"qkv": buffer}}, case, "fwd")
    assert (work.kernel, work.read, work.written, work.macs, work.exponentials) == ("frames", 1500, 450, 4096, 256)
    assert work.distinct_read == {"qkv": 1000}
    assert work.summary_again == 256  # one MST key and value, of the second frame


def test_nobody_votes_on_what_is_not_known():
    warp = thread.Thread(TINY, launch_tiny(n=1, heads=1), block=0, thread=0)
    vote = thread.effect(sass.Instruction(0, "", "VOTE.ANY", "P1, P0", 1, 7, 7, 0, "shfl", 0))
    for known, result in ((None, 0), (0, 0), (1, 1)):
        warp.registers["P0"] = known
        vote(warp)
        assert warp.registers["P1"] == result


@pytest.mark.parametrize(("macs", "exponentials", "refused"), [(1.0, 1.0, None), (1.2, 1.0, "multiply"), (1.0, 0.85, "expon")])
def test_a_walk_that_is_not_what_was_counted_is_refused(macs, exponentials, refused):
    case = Case("hierarchical", 80, 2, 3, backend="cuda")
    made = Compiled("frames", "fwd", "", {}, 128, 0, 0, 4, 1, 1, macs=1000 * macs, exponentials=100 * exponentials)
    work = [traffic.Work("frames", "fwd", macs=1000, exponentials=100)]
    with pytest.raises(ValueError, match=refused) if refused else contextlib.nullcontext():
        report.check(case, "fwd", work, [made])


# the shipped kernels against the baseline


def shape_rows(kernels: list[dict]) -> dict[tuple, dict]:
    return {tuple(k[name] for name in ("op", "backend", "shape", "arch", "pass", "kernel")): k for k in kernels}


def test_docs_show_the_baseline():
    kept, page = report.baseline(), command.PAGE.read_text(encoding="utf-8")
    assert command.renew(page, command.tables(kept["passes"], kept["kernels"], kept["versions"])) == page


def test_launches_a_call():
    most = {"fwd": 2, "bwd": 3}
    assert [p for p in report.baseline()["passes"] if p["launches"] > most[p["pass"]]] == []


@pytest.fixture(scope="module")
def now() -> dict[tuple, dict]:
    cases = report.shipped(shapes=[shape for shape in SHAPES if "T=12" in shape])
    flat = [(shape, case) for shape, some in cases.items() for case in some]
    made = compiled([case for _, case in flat], walk=True)
    return shape_rows([report.kernel_row(shape, case, m) for (shape, case), rows in zip(flat, made, strict=True) for m in rows])


def test_no_main_loop_of_a_shipped_kernel_spills(now):
    assert {key: row["loop_spills"] for key, row in now.items() if row["loop_spills"]} == {}


def test_shipped_kernels_execute_no_more_than_the_page_says(now):
    triton = pytest.importorskip("triton")
    kept = report.baseline()
    if (made_with := kept["versions"]["triton"]) != triton.__version__:
        pytest.skip(f"the baseline is Triton {made_with}'s, this is {triton.__version__}")
    known = shape_rows(kept["kernels"])
    again = "python -m benchmarks.cost --write renews docs/kernels.md and its baseline"
    assert set(now) <= set(known), again
    more = {
        key: f"{row['instructions']:.1f} thread instructions a score, {known[key]['instructions']:.1f} in the baseline"
        for key, row in now.items()
        if row["instructions"] > 1.1 * known[key]["instructions"]
    }
    assert not more, f"{more}: {again}"
