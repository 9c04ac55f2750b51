"""An estimate of a kernel's time: the paths of its warps, replayed on a model of one multiprocessor.

    launch = Launch(grid=4608, threads=128, shared=61440, params=bytes(problem))
    print(estimate(kernel, launch, dram_bytes=461e6))

As many blocks as fit are resident, a quarter of the multiprocessor issues one instruction a cycle, units are held as long
as the public rates say, latencies of fixed length are those that the assembler wrote into the code and the others the
constants below, none of which was fitted to a timing. Barriers of a block or of some of its warps and mbarriers hold warps
as they do on the machine, a phase of an mbarrier being over when every warp that arrives at it has, once. What wgmma reads in
shared memory passes through the same 128 bytes a clock as everything else there. Not modelled: TMA, bank conflicts,
instruction cache, gaps between launches, cache misses beyond `dram_bytes`. docs/kernels.md has the table of estimates beside
measured times.

Constants. NVIDIA A100 and H100 whitepapers: multiprocessors, clocks, registers and shared memory, dense bf16 rate (312 and
989 TFLOP/s), memory bandwidth; width of L2, 5120 bytes a clock (A100's, taken for both). CUDA C++ Programming Guide,
"Throughput of Native Arithmetic Instructions": results a clock. Luo et al., arXiv:2402.13499: order of the latencies of L2,
memory and shared memory; mma.sync reaches about 62 % of the rate of wgmma on H100. ACHIEVABLE is a round guess of ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .sass import Instruction, Kernel
from .walk import Launch, Path, Walked, follow


@dataclass(frozen=True)
class Gpu:
    """Public figures of one GPU. `tensor`: bf16 multiply-adds a clock and multiprocessor; `mma_sync`: the share of them
    that HMMA reaches; `fma`: cycles for which a warp's fp32 instruction holds its quarter of a multiprocessor."""

    name: str
    sms: int
    ghz: float
    shared: int  # bytes a multiprocessor gives its blocks
    dram: float  # bytes a second, peak
    tensor: int
    mma_sync: float
    fma: int
    latency_l2: int  # cycles
    latency_dram: int


GPUS = {
    80: Gpu("A100", 108, 1.41, 164 << 10, 2.04e12, 1024, 1.0, 2, 260, 560),
    90: Gpu("H100", 132, 1.70, 228 << 10, 3.35e12, 2048, 0.62, 1, 265, 650),
}
ACHIEVABLE = {"dram": 0.90, "l2": 0.75}  # share of the peak that a good copy gets
L2_WIDTH = 5120  # bytes a clock, all multiprocessors together
LATENCY = {"mufu": 24, "shfl": 24, "lds": 30, "bar": 20, "wgmma": 30, "sreg": 20, "fence": 20}
LATENCY |= {"sts": 20, "stg": 20, "cvt": 12, "spill": 40}  # cycles; what is not listed: 6
ARRIVALS = ("arrive", "copies")  # events that count for an mbarrier
LAUNCH = 200  # cycles between the end of a block and the first instruction of the next in its place


@dataclass(frozen=True)
class Estimate:
    """What `estimate` says of one launch; times in microseconds. `bounds`: what each unit needs alone. `replay`: the
    estimate."""

    gpu: str
    replay: float
    bounds: dict[str, float]
    blocks: int  # resident on a multiprocessor
    warps: int  # of one block
    walked: Walked
    waits: dict[str, float]  # what warps wait for, shares of their time

    def __str__(self) -> str:
        worst = max(self.bounds, key=self.bounds.get)
        bounds = ", ".join(f"{name} {us:.1f}" for name, us in self.bounds.items())
        guesses = sum(self.walked.guesses.values())
        guessed = f"; {guesses} branches guessed" if guesses else ""
        waits = ", ".join(f"{why} {share:.0%}" for why, share in self.waits.items() if share >= 0.03)
        return (
            f"{self.gpu}: replay {self.replay:.1f} us (an estimate); {self.blocks} blocks of {self.warps} warps; "
            f"bound {self.bounds[worst]:.1f} by {worst}; alone: {bounds}; warps wait for {waits}{guessed}"
        )


def resident(gpu: Gpu, registers: int, shared: int, threads: int) -> int:
    """Blocks that fit a multiprocessor. Registers are given out by 256 to a warp, and to warps four at a time."""
    warps = math.ceil(threads / 32)
    by_registers = 16384 // (math.ceil(registers / 8) * 256) // math.ceil(warps / 4)
    by_shared = gpu.shared // (math.ceil(shared / 128) * 128 + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


def cost(x: Instruction, gpu: Gpu, cycles_a_byte: float) -> tuple[str, float]:
    """The unit an instruction holds, and for how many cycles of one quarter of a multiprocessor."""
    if x.macs:
        return "tensor", x.macs / (gpu.tensor / 4) / (gpu.mma_sync if x.kind == "hmma" else 1)
    if x.kind in ("ldg", "ldgsts", "stg"):
        return "memory", x.size * cycles_a_byte
    if x.kind in ("lds", "sts", "shfl"):
        return "shared", (x.size or 128) / 32
    held = {"mufu": ("mufu", 8), "fp32": ("fma", gpu.fma), "imad": ("imad", 2), "uniform": ("uniform", 2)}
    held |= dict.fromkeys(("max", "cvt", "int"), ("alu", 2))
    return held.get(x.kind, ("none", 0))


class _Mbarrier:
    """One of a block: a phase is over when every warp that arrives at it has."""

    def __init__(self, warps: list[int]) -> None:
        self.arrived: dict[int, list[float]] = {w: [] for w in warps}

    def passes(self, parity: int, now: float) -> float:
        """When a wait for the phase of this parity that begins now is over; infinite while nobody knows."""
        phases = min((len(times) for times in self.arrived.values()), default=0)
        ends = [max(times[k] for times in self.arrived.values()) for k in range(max(0, phases - 4), phases)]
        over = phases - len(ends) + sum(end <= now for end in ends)
        if (over - 1) & 1 == parity:
            return now
        return max(now, ends[over - phases]) if over < phases else math.inf


class _Warp:
    __slots__ = ("block", "copies", "held", "issued", "mma", "part", "path", "pc", "pending", "ready", "scoreboards", "setters")
    __slots__ += ("barriers", "index", "meets", "time", "why")

    def __init__(self, block: int, part: int, path: list, time: float, barriers: dict, index: int) -> None:
        self.block, self.part, self.path, self.time = block, part, path, time
        self.barriers, self.index = barriers, index
        self.pc, self.held = 0, False  # held: waits for the other warps of its block,
        self.meets = 0  # or for so many of them at this barrier's number
        self.pending = {"ldgsts": 0.0, "wgmma": 0.0}  # when the last of each is there
        self.scoreboards = [0.0] * 6
        self.setters = [""] * 6  # kinds of the instructions that set them
        self.issued = time
        self.copies: list[float] = []  # when each group of copies, of wgmma, is there
        self.mma: list[float] = []
        self.settle()

    def settle(self) -> None:
        """When the next instruction may issue, as far as this warp's own past decides."""
        x, at = self.path[self.pc][0], self.time
        self.why = "fixed"
        if x.waits:
            for board in range(6):
                if x.waits >> board & 1 and self.scoreboards[board] > at:
                    at, self.why = self.scoreboards[board], self.setters[board]
        if "DEPBAR." in x.op and "LDG" not in x.op:  # all but the newest few groups
            groups = self.mma if x.op.startswith("WARPGROUP") else self.copies
            done = max(groups[: len(groups) - int(x.args.split(",")[1].strip(), 16)], default=0.0)
            if done > at:
                at, self.why = done, "wgmma" if groups is self.mma else "ldgsts"
        event = self.path[self.pc][3]
        if event and event[0] == "wait" and event[1] in self.barriers and event[2] is not None:
            over = self.barriers[event[1]].passes(event[2], at)
            if over > at:
                at, self.why = over, "mbarrier"
        self.ready = at


def replay(
    blocks: Sequence[Sequence[Path]], gpu: Gpu, *, fit: int, per_sm: float, miss: float, cycles_a_byte: float, steps=600_000
) -> tuple[float, dict[str, float]]:
    """Cycles one multiprocessor needs, and what its warps wait for between two instructions, as shares of their time: the
    kind of instruction whose result is missing, a busy unit, a barrier, an issue slot, or a latency fixed by the assembler.

    Args:
        blocks: for each of several blocks the paths of its warps (a single path: all warps take it). The multiprocessor
            gets them in turn. Warp w of the k-th block sits on quarter (k * warps + w) % 4.
        fit: blocks resident at a time.
        per_sm: blocks the multiprocessor gets in all. Up to five rounds of resident blocks are replayed, fewer for long
            paths (`steps` instructions in all); the rest follows at the rate of the later rounds.
        miss: share of memory requests that go beyond L2.
        cycles_a_byte: of a quarter's share of memory.
    """
    costs: dict[int, tuple] = {}

    def priced(path: Path) -> list[tuple[Instruction, str, float, tuple | None]]:
        if id(path) not in costs:
            table = {x: cost(x, gpu, cycles_a_byte) for x in set(path.code)}
            none = ("memory", 0.0)
            costs[id(path)] = [
                (x, *(none if i in path.off and table[x][0] == "memory" else table[x]), path.events.get(i))
                for i, x in enumerate(path.code)
            ]
        return costs[id(path)]

    warps = max(len(block) for block in blocks)
    same = all(len({id(p) for p in block}) == 1 for block in blocks) and warps % 4 == 0
    parts = 1 if same else 4  # equal warps: one quarter of the multiprocessor tells of all
    members = [[priced(p) for p in (block[: warps // 4] if same else block)] for block in blocks]
    arrivers = [
        {
            at: [w for w, path in enumerate(block) if any(e and e[0] in ARRIVALS and e[1] == at for *_, e in path)]
            for at in {e[1] for path in block for *_, e in path if e and e[0] in ARRIVALS}
        }
        for block in members
    ]
    length = sum(len(p) for block in members for p in block) / len(members)
    total = max(1, math.ceil(per_sm)) if per_sm <= 5 * fit else per_sm
    rounds = max(2, min(5, int(steps / (length * fit))))
    limit = int(min(total, rounds * fit))

    latency = {**LATENCY, "ldg": (t := miss * gpu.latency_dram + (1 - miss) * gpu.latency_l2), "ldgsts": t}
    free = [0.0] * parts
    # Until when each unit is busy. The quarters share memory and shared memory: what one leaves, another takes.
    common: Counter = Counter()
    own: list[Counter] = [Counter() for _ in range(parts)]
    units = lambda part, pipe: common if pipe in ("memory", "shared") else own[part]  # noqa: E731
    waits: Counter = Counter()
    ended: list[float] = []
    live: list[_Warp] = []
    begun = 0

    def begin(time: float) -> None:
        nonlocal begun
        block = members[begun % len(members)]
        barriers = {at: _Mbarrier(who) for at, who in arrivers[begun % len(members)].items()}
        live.extend(_Warp(begun, (begun * warps + w) % parts, path, time, barriers, w) for w, path in enumerate(block))
        begun += 1

    for k in range(min(fit, math.ceil(total))):
        begin(float(k))
    while len(ended) < limit:
        best, when, reason = None, math.inf, ""
        for w in live:
            if not w.held:
                at, why = w.ready, w.why
                if (pipe := w.path[w.pc][1]) not in ("memory", "none") and units(w.part, pipe)[pipe] > at:
                    at, why = units(w.part, pipe)[pipe], f"unit {pipe}"  # memory requests queue, the warp goes on
                if free[w.part] > at:
                    at, why = free[w.part], "issue"
                if at < when:
                    best, when, reason = w, at, why
        if best is None:
            raise ValueError("all warps wait for mbarriers: a phase of one takes more than one arrival of a warp")
        w, now = best, when
        waits[reason] += now - w.issued
        w.issued = now
        x, pipe, busy, event = w.path[w.pc]
        if pipe in ("memory", "shared"):
            busy /= parts
        free[w.part] = now + 1
        done = now + busy + latency.get(x.kind, 6)
        if x.kind == "wgmma":  # reads its operands through the port that all quarters share, while it multiplies
            unit = units(w.part, "shared")
            unit["shared"] = max(now, unit["shared"]) + x.shared_operands / 32 / parts
            done = max(done, unit["shared"] + latency["wgmma"])
        if pipe != "none":
            unit = units(w.part, pipe)
            start = max(now, unit[pipe])
            unit[pipe] = start + busy
            done += start - now
        for board, until in ((x.sets, done), (x.reads, now + busy + LATENCY["sts"])):
            if board < 6 and until > w.scoreboards[board]:
                w.scoreboards[board], w.setters[board] = until, x.kind
        if x.kind in w.pending:
            w.pending[x.kind] = max(w.pending[x.kind], done)
        if x.kind == "wgmma" and "gsb" in x.args:
            w.mma.append(w.pending["wgmma"])
        elif x.op == "LDGDEPBAR":
            w.copies.append(w.pending["ldgsts"])
        if event and event[0] in ARRIVALS and event[1] in w.barriers:
            w.barriers[event[1]].arrived[w.index].append(max(now, w.pending["ldgsts"]) if event[0] == "copies" else now)
            for v in live:
                if v.block == w.block and v.ready == math.inf and v is not w:
                    v.settle()
        w.time = now + max(1, x.stall)
        w.pc += 1
        over = w.pc == len(w.path)
        if x.op.startswith("BAR.SYNC") or over:  # here the warps of a block, or some of them, wait for each other
            w.held, w.time = True, w.time + LATENCY["bar"]
            some = event and event[0] == "sync" and event[1]
            w.meets = event[1] if some else 0
            mates = [v for v in live if v.block == w.block and (not some or (v.held and v.meets == w.meets))]
            wanted = event[2] // 32 * len(members[w.block % len(members)]) // warps if some else len(mates)
            if len(mates) == wanted and all(v.held and v.meets == w.meets for v in mates):
                meet = max(v.time for v in mates)
                if all(v.pc == len(v.path) for v in mates):
                    ended.append(meet)
                    live = [v for v in live if v.block != w.block]
                    if begun < total:
                        begin(meet + LAUNCH)
                else:  # warps that have ended wait no more
                    for v in mates:
                        if v.pc < len(v.path):
                            waits["barrier"] += meet - v.issued
                            v.held, v.time, v.issued = False, meet, meet
                            v.settle()
        else:
            w.settle()
    shares = {why: cycles / sum(waits.values()) for why, cycles in waits.most_common()}
    if limit >= total:
        return ended[-1], shares
    rate = (ended[-1] - ended[fit - 1]) / (limit - fit)  # the first round fills the pipeline
    return ended[-1] + rate * (total - limit), shares


def estimate(
    kernel: Kernel,
    launch: Launch,
    *,
    dram_bytes: float,
    l2_bytes: float | None = None,
    gpu: Gpu | None = None,
    walked: Walked | None = None,
) -> Estimate:
    """Replay some blocks of a launch.

    Args:
        dram_bytes: what must cross DRAM, whole launch.
        l2_bytes: what crosses L2, whole launch; default: what the walked blocks ask for, scaled to the grid.
        gpu: default: that of the kernel's architecture.
        walked: what `walk.follow` found; default: found here.
    """
    gpu = gpu or GPUS[kernel.arch]
    shared = kernel.shared + launch.shared
    if not (fit := resident(gpu, kernel.registers, shared, launch.threads)):
        raise ValueError(
            f"{kernel.name}: {shared} bytes of shared memory and {kernel.registers} registers do not fit {gpu.name}"
        )
    walked = walked or follow(kernel, launch)
    moved = walked.bytes_asked if l2_bytes is None else l2_bytes
    dram_rate, l2_rate = gpu.dram * ACHIEVABLE["dram"], L2_WIDTH * gpu.ghz * 1e9 * ACHIEVABLE["l2"]
    miss = min(1.0, dram_bytes / moved) if moved else 0.0

    busy: Counter = Counter()
    for x, times in walked.executed.items():
        pipe, cycles = cost(x, gpu, 0)
        busy[pipe] += times * cycles
        busy["shared"] += times * x.shared_operands / 32
    us = 1 / 4 / gpu.sms / gpu.ghz / 1e3
    bounds = {"DRAM": dram_bytes / dram_rate * 1e6, "L2": moved / l2_rate * 1e6, "issue": walked.instructions * us}
    bounds |= {pipe: busy[pipe] * us for pipe in ("tensor", "mufu", "shared", "alu")}

    seconds_a_byte = moved / walked.bytes_asked * max(1 / l2_rate, miss / dram_rate) if walked.bytes_asked else 0.0
    cycles_a_byte = 4 * gpu.sms * gpu.ghz * 1e9 * seconds_a_byte
    cycles, waits = replay(walked.blocks, gpu, fit=fit, per_sm=launch.grid / gpu.sms, miss=miss, cycles_a_byte=cycles_a_byte)
    # Stores at the very end of the replay may still be under way; the bounds hold nevertheless.
    us = max(cycles / gpu.ghz / 1e3, *bounds.values())
    return Estimate(gpu.name, us, bounds, fit, math.ceil(launch.threads / 32), walked, waits)
