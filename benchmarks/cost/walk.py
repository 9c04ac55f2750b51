"""The way of a warp through a kernel's machine code, found by executing it for one thread (thread.py).

    kernel, = sass.load("hierarchical_fwd.cubin", "frames.*bf16ELi64ELi4ELi1ELi64")
    launch = Launch(grid=4608, threads=128, shared=61440, params=bytes(problem))  # the struct that the kernel is given
    walk(kernel, launch, block=0, warp=3).macs

Trip counts are in no cubin, and warps of a block may do different work. So `walk` executes the integer instructions of a
warp's first thread (its index, the launch's parameters, divisions by multiplication, spilled words) and follows the
branches. Floats and what is loaded from memory are unknown. A branch on something unknown is not taken if it leads forward,
except past a call (the slow path of a division), and is listed in `Path.guesses`; a loop that ends on something unknown is
an error, except a wait for an mbarrier, which goes into `Path.events`. Instructions whose meaning is not written here leave
something unknown: the worst they can cause is an error. Who uses the result compares `Path.macs` with what the algorithm
needs, and refuses it where they part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .sass import CLASS_OF, Instruction, Kernel, target
from .thread import Launch, Thread, Value, address, effect, is_predicate, reader

LONGEST = 400_000  # instructions of one warp


@dataclass
class Path:
    """What one warp executes, in order; `off` holds the positions of memory instructions whose predicate was false, `events`
    by position what happens to mbarriers: ("arrive" | "copies" | "wait", shared address, parity waited for), and to barriers
    of some of a block's warps: ("sync", number, threads)."""

    code: list[Instruction] = field(default_factory=list)
    off: set[int] = field(default_factory=set)
    events: dict[int, tuple[str, Value, Value]] = field(default_factory=dict)
    guesses: Counter = field(default_factory=Counter)  # address of a branch on something unknown -> times

    @property
    def macs(self) -> float:
        return sum(x.macs for x in self.code)

    @property
    def bytes_asked(self) -> int:
        """Of global memory, predicated-off requests left out."""
        return sum(x.size for i, x in enumerate(self.code) if CLASS_OF[x.kind] == "global" and i not in self.off)


def _barrier(x: Instruction, thread: Thread) -> tuple[str, Value, Value] | None:
    """What an instruction does to an mbarrier, or to a barrier of some warps, if anything."""
    args = [a.strip() for a in x.args.split(",")]
    if x.op.startswith(("SYNCS.ARRIVE", "ATOMS.ARRIVE")):
        return "arrive", address(args[1], thread), None
    if x.op.startswith("ARRIVES"):
        return "copies", address(args[0], thread), None
    if x.op.startswith("SYNCS.PHASECHK"):
        parity = reader(args[2])(thread)
        return "wait", address(args[1], thread), None if parity is None else parity >> 31
    if x.op.startswith("BAR.SYNC") and len(args) > 1:
        return "sync", reader(args[0])(thread), reader(args[1])(thread)
    return None


def _polled(body: Sequence[Instruction], thread: Thread) -> tuple[str, Value, Value] | None:
    """On sm_80 a wait for an mbarrier is a loop that loads its upper word and compares the top bit; None: another loop.

    The comparison is LOP3: (bit ^ parity) & mask or, where the parity is a constant, bit & mask for 0 and ~bit & mask for 1.
    """
    loads = [x for x in body if x.op == "LDS"]
    tests = [x for x in body if x.op in ("LOP3.LUT", "ULOP3.LUT") and "0x80000000" in x.args]
    if len(body) > 8 or len(loads) != 1 or len(tests) != 1:
        return None
    args = [a.strip() for a in tests[0].args.split(",")]
    at, parity = address(loads[0].args.split(",")[1], thread), reader(args[4])(thread)
    if args[4] in ("RZ", "URZ"):
        parity = {"0xc0": 0, "0xc": 1 << 31}.get(args[5])
    return "wait", None if at is None else at - 4, None if parity is None else parity >> 31


def walk(kernel: Kernel, launch: Launch, block: int = 0, warp: int = 0) -> Path:
    """The instructions that one warp of one block executes.

    Raises:
        ValueError: a loop whose end depends on something unknown, or code that cannot be followed.
    """
    code, path = kernel.code, Path()
    if not (effects := _EFFECTS.get(kernel)):
        effects = _EFFECTS[kernel] = [effect(x) for x in code]
    at = {x.pc: i for i, x in enumerate(code)}
    thread = Thread(kernel, launch, block, 32 * warp)
    guards = {name: reader(name) for name in {x.guard for x in code} if name}
    calls: list[int] = []
    i = 0
    while len(path.code) < LONGEST:
        if i >= len(code):
            raise ValueError(f"{kernel.name}: ran past the end of the code")
        x = code[i]
        guard = guards[x.guard](thread) if x.guard else 1
        path.code.append(x)
        if guard == 0 and x.size:
            path.off.add(len(path.code) - 1)
        op = x.op.split(".")[0]
        if op in ("SYNCS", "ATOMS", "ARRIVES", "BAR") and guard != 0 and (event := _barrier(x, thread)):
            path.events[len(path.code) - 1] = event
        if op in ("BRA", "CALL", "RET", "EXIT", "BRX", "JMP"):
            for extra in (a.strip() for a in x.args.split(",")):  # a second predicate: BRA P1, 0x...
                if is_predicate(extra) and guard != 0:
                    guard = None if (p := reader(extra)(thread)) is None or guard is None else guard & p
            if x.op.startswith("BRA.DIV"):
                guard = 0
            if guard is None:
                if op == "BRA" and target(x) <= x.pc:
                    body = code[at[target(x)] : i]
                    if polled := _polled(body, thread):
                        path.events[len(path.code) - 1] = polled
                    elif not any(y.op.startswith("SYNCS.PHASECHK") for y in body) or len(body) > 8:
                        raise ValueError(f"{kernel.name}: the loop that ends at {x.pc:#x} depends on something unknown")
                    i += 1  # the wait is over: how long it takes is the replay's to find
                    continue
                # Forward: not taken, unless it leads past a call, which is the slow path of a division.
                over = code[i + 1 : at[target(x)]] if op == "BRA" else ()
                guard = int(any(y.op.startswith("CALL") for y in over))
                if not guard:
                    path.guesses[x.pc] += 1
            if guard:
                if op == "EXIT":
                    return path
                if op == "RET":
                    known = reader(x.args.split()[0])(thread)
                    back = calls.pop() if calls else None
                    i = at.get(known, back)
                    if i is None:
                        raise ValueError(f"{kernel.name}: a return at {x.pc:#x} to nowhere known")
                    continue
                if op in ("BRX", "JMP"):
                    raise ValueError(f"{kernel.name}: an indirect jump at {x.pc:#x}")
                if op == "CALL":
                    calls.append(i + 1)
                i = at[target(x)]
                continue
        elif guard == 1:
            effects[i](thread)
        elif guard is None:  # whatever it writes is either the old value or the new one
            before = dict(thread.registers)
            effects[i](thread)
            for name, value in thread.registers.items():
                if before.get(name) != value:
                    thread.registers[name] = None
        i += 1
    raise ValueError(f"{kernel.name}: no end after {LONGEST} instructions (block {block}, warp {warp})")


_EFFECTS: dict[Kernel, list] = {}


@dataclass
class Walked:
    """The paths of some blocks of a launch, equal ones being one object, and what follows for the whole launch."""

    blocks: list[list[Path]]
    scale: float  # blocks of the grid for each one walked

    @cached_property
    def executed(self) -> Counter:
        """Instruction -> how often warps execute it."""
        times: Counter = Counter()
        paths = {id(p): p for block in self.blocks for p in block}
        for key, n in Counter(id(p) for block in self.blocks for p in block).items():
            for x in paths[key].code:
                times[x] += n * self.scale
        return times

    @property
    def instructions(self) -> float:
        return sum(self.executed.values())

    @property
    def macs(self) -> float:
        return sum(x.macs * n for x, n in self.executed.items() if x.macs)

    @property
    def bytes_asked(self) -> float:
        return self.scale * sum(p.bytes_asked for block in self.blocks for p in block)

    @property
    def guesses(self) -> Counter:
        return sum((p.guesses for block in self.blocks for p in block), Counter())


def follow(kernel: Kernel, launch: Launch, *, blocks: int = 12, run: int = 1, same_warps: bool = False) -> Walked:
    """Walk some blocks of a launch.

    Args:
        blocks: how many, spread over the grid by the golden ratio, so that no period of the grid is favoured.
        run: how many of them are neighbours. Where blocks of several kinds take turns, a run of whole turns has each kind in
            its true share.
        same_warps: walk one warp of each block for all (Triton without warp specialisation).
    """
    warps = -(-launch.threads // 32)
    known: dict[tuple, Path] = {}

    def path(block: int, warp: int) -> Path:
        p = walk(kernel, launch, block, warp)
        return known.setdefault((tuple(x.pc for x in p.code), frozenset(p.off), tuple(p.events.items())), p)

    places = max(1, launch.grid - run + 1)
    starts = [int(places * (k * 0.618034 % 1)) for k in range(-(-blocks // run))]
    chosen = sorted({start + k for start in starts for k in range(min(run, launch.grid))})
    paths = [[path(b, 0)] * warps if same_warps else [path(b, w) for w in range(warps)] for b in chosen]
    return Walked(paths, launch.grid / len(paths))
