"""The way of a warp through a kernel's machine code, found by executing it for one thread.

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

import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .sass import CLASS_OF, Instruction, Kernel, target

PARAMETERS = {80: 0x160, 90: 0x210}  # where in constant bank 0 a kernel's parameters begin
LONGEST = 400_000  # instructions of one warp


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: blocks in the grid, threads in a block, dynamic shared memory, and the bytes of its
    parameters as the driver lays them out (pointers need no true value, but their true alignment)."""

    grid: int
    threads: int
    shared: int = 0
    params: bytes = b""


Value = int | None  # None: unknown


@dataclass
class Path:
    """What one warp executes, in order; `off` holds the positions of memory instructions whose predicate was false, `events`
    by position what happens to mbarriers: ("arrive" | "copies" | "wait", shared address, parity waited for)."""

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


MASK = 0xFFFFFFFF


def _signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


class _Thread:
    """One thread's registers, predicates and constant bank. What nobody has written is 0: the assembler packs predicates
    into bits of a register whose other bits it never sets."""

    def __init__(self, kernel: Kernel, launch: Launch, block: int, thread: int) -> None:
        names = [f"{kind}{n}" for kind, count in (("R", 255), ("UR", 63), ("P", 7), ("UP", 7)) for n in range(count)]
        self.registers: dict[str, Value] = dict.fromkeys([*names, "RZ", "URZ", "SRZ"], 0) | {"PT": 1, "UPT": 1}
        self.special = {"SR_CTAID.X": block, "SR_TID.X": thread, "SR_LANEID": thread % 32}
        bank = bytearray(0x1000)
        struct.pack_into("<6I", bank, 0, launch.threads, 1, 1, launch.grid, 1, 1)
        start = PARAMETERS[kernel.arch // 10 * 10]
        bank[start : start + len(launch.params)] = launch.params
        self.bank, self.end = bank, start + len(launch.params)
        self.stack: dict[int, Value] = {}  # words of spilled registers, by address

    def constant(self, at: Value, size: int = 4) -> Value:
        return None if at is None or at + size > self.end else int.from_bytes(self.bank[at : at + size], "little")


OPERAND = re.compile(r"^([-~!|]*)(U?R\d+|U?RZ|U?P\d|U?PT|SRZ|SR_[\w.]+|0x[0-9a-f]+|c\[)")


def _reader(text: str) -> Callable[[_Thread], Value]:
    """How to read one source operand; floats and addresses in brackets read as unknown."""
    text = text.strip().replace(".reuse", "")
    match = OPERAND.match(text)
    if not match:
        return lambda t: None
    signs, name = match.groups()
    if name == "c[":
        inner = re.fullmatch(r"[-~|]*c\[0x0\]\[(U?R\w+)?\+?(0x[0-9a-f]+)?\]\|?", text)
        if not inner:
            return lambda t: None
        index, offset = inner[1] or "RZ", int(inner[2] or "0", 16)
        read = lambda t: None if (i := t.registers.get(index)) is None else t.constant(i + offset)  # noqa: E731
    elif name.startswith("0x"):
        value = int(name, 16) & MASK
        read = lambda t: value  # noqa: E731
    elif name.startswith("SR_"):
        read = lambda t: t.special.get(name, 0 if "CTA" in name.upper() or "TID" in name else None)  # noqa: E731
    elif text.endswith((".H0_H0", ".H1_H1")):
        return lambda t: None
    else:
        read = lambda t: t.registers.get(name)  # noqa: E731
    if "P" in name and "!" in signs:
        return lambda t: None if (x := read(t)) is None else 1 - x
    if "~" in signs:
        return lambda t: None if (x := read(t)) is None else ~x & MASK
    if "|" in signs:
        inner_read, negative = read, "-" in signs
        return lambda t: None if (x := inner_read(t)) is None else abs(_signed(x)) * (-1 if negative else 1) & MASK
    if "-" in signs:
        return lambda t: None if (x := read(t)) is None else -x & MASK
    return read


def _pair(text: str) -> Callable[[_Thread], Value]:
    """How to read a 64-bit source: two registers or constants in a row; immediates are sign-extended."""
    text = text.strip().replace(".reuse", "")
    low = _reader(text)
    if match := re.fullmatch(r"(-?)(U?R)(\d+)(?:\.64)?", text):
        high = _reader(f"{match[2]}{int(match[3]) + 1}")
        both = lambda t: None if (a := low_of(t)) is None or (b := high(t)) is None else a | b << 32  # noqa: E731
        low_of = _reader(match[2] + match[3])
        return (lambda t: None if (x := both(t)) is None else -x & (1 << 64) - 1) if match[1] else both
    if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
        at = int(match[1], 16)
        return lambda t: t.constant(at, 8)
    return lambda t: None if (x := low(t)) is None else _signed(x) & (1 << 64) - 1 if "0x" in text else x


COMPARE = {
    "GE": lambda a, b: a >= b,
    "GT": lambda a, b: a > b,
    "LE": lambda a, b: a <= b,
    "LT": lambda a, b: a < b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _lut(a: int, b: int, c: int, table: int) -> int:
    """Bitwise function of three words: bit 4a + 2b + c of `table`."""
    out = 0
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & MASK


def _is_predicate(text: str) -> bool:
    return bool(re.fullmatch(r"!?U?(P\d|PT)", text.strip()))


def _compile(x: Instruction) -> Callable[[_Thread], None]:
    """What the instruction does to the integers and predicates of a thread."""
    op, modifiers = x.op.split(".")[0], x.op.split(".")[1:]
    args = [a.strip() for a in x.args.split(",")] if x.args else []
    signed = "U32" not in modifiers
    base = op.removeprefix("U") if op.startswith("U") and op not in ("UCLEA",) else op

    def to(names: Sequence[str], compute: Callable[..., object], *reads: Callable[[_Thread], Value]) -> Callable:
        """Write compute(sources) to `names`; unknown where a source is."""

        def run(t: _Thread) -> None:
            sources = [read(t) for read in reads]
            if any(s is None for s in sources):
                results: Sequence[Value] = [None] * len(names)
            else:
                result = compute(*sources)
                results = result if isinstance(result, tuple) else (result,)
            for name, value in zip(names, results, strict=True):
                if name not in ("RZ", "URZ", "PT", "UPT"):
                    t.registers[name] = value

        return run

    def wide(name: str, n: int = 2) -> list[str]:
        match = re.fullmatch(r"(U?R)(\d+)(?:\.64)?", name)
        return [f"{match[1]}{int(match[2]) + i}" for i in range(n)] if match else [name]

    if op in ("LDL", "STL"):
        where, moved = args if op == "STL" else args[::-1]
        base_name, offset = re.fullmatch(r"\[(R\d+)?\+?(0x[0-9a-f]+)?\]", where).groups()
        names = wide(moved, next((n // 32 for n in (128, 64) if str(n) in modifiers), 1))

        def spill(t: _Thread) -> None:
            start = t.registers.get(base_name or "RZ")
            for n, name in enumerate(names):
                address = None if start is None else start + int(offset or "0", 16) + 4 * n
                if op == "STL" and address is not None:
                    t.stack[address] = t.registers.get(name)
                elif op == "LDL":
                    t.registers[name] = None if address is None else t.stack.get(address)

        return spill
    if op in ("STG", "STS", "ST", "STSM", "BAR", "NOP", "BSSY", "BSYNC", "MEMBAR", "LDGSTS", "LDGDEPBAR", "DEPBAR"):
        return lambda t: None
    if base in ("MOV", "S2R", "S2UR", "R2UR", "I2I") or op in ("S2UR", "R2UR", "CS2R"):
        if op == "CS2R" and "32" not in modifiers:
            return to(wide(args[0]), lambda a: (a & MASK, 0), _reader(args[1]))
        sources = [a for a in args[1:] if not _is_predicate(a)]
        return to([args[0]], lambda a: a, _reader(sources[0]))
    if base in ("LDC",):
        n = 2 if "64" in modifiers else 1
        words = [to([name], lambda a: a, _shifted(args[1], 4 * i)) for i, name in enumerate(wide(args[0], n))]
        return lambda t: [word(t) for word in words] and None
    if base == "IMAD":
        carry = [a for a in args[1:4] if _is_predicate(a)]
        if "WIDE" in modifiers or "HI" in modifiers:
            a, b, c = [a for a in args[1:] if not _is_predicate(a)][:3]

            def product(p: int, q: int, r: int) -> int:
                p, q = (_signed(p), _signed(q)) if signed else (p, q)
                return p * q + r & (1 << 64) - 1

            reads = _reader(a), _reader(b), _pair(c)
            names = wide(args[0]) + carry[:1] if "WIDE" in modifiers else [args[0]]
            if "HI" in modifiers:
                return to(names, lambda p, q, r: product(p, q, r) >> 32, *reads)
            split = lambda v: (v & MASK, v >> 32)  # noqa: E731
            return to(names[:2], lambda p, q, r: split(product(p, q, r)), *reads)
        rest = [a for a in args[1:] if not _is_predicate(a)]
        reads = [_reader(a) for a in rest[:3]]
        if "X" in modifiers:
            return to([args[0]], lambda p, q, r, k: p * q + r + k & MASK, *reads, _reader(args[-1]))
        return to([args[0]], lambda p, q, r: p * q + r & MASK, *reads)
    if op in ("IADD3", "UIADD3", "VIADD", "IADD", "VIADD3"):
        outs = [a for a in args[1:3] if _is_predicate(a)][: max(0, len(args) - 4)]
        rest = args[1 + len(outs) :]
        values = [a for a in rest if not _is_predicate(a)]
        carries = [a for a in rest if _is_predicate(a)]
        # With carries in, ~a stands for a minus, so that the sum of words and carries is right as it is.
        reads = [_reader(a) for a in values] + ([_reader(a) for a in carries] if "X" in modifiers else [])
        if outs:  # the carry out of the unsigned sum; a negated source is added as ~a + 1
            plain = [_reader(a.lstrip("-")) for a in values]
            minus = [a.startswith("-") for a in values]

            def add(*sources: int) -> tuple[int, ...]:
                words = [(~s & MASK) + 1 if neg else s for s, neg in zip(sources, [*minus, *[False] * 2], strict=False)]
                total = sum(words)
                return total & MASK, *[int(total >> 32 > 0)] * len(outs)

            return to([args[0], *outs], add, *plain, *reads[len(values) :])
        return to([args[0]], lambda *sources: sum(sources) & MASK, *reads)
    if base == "LEA":
        outs = [a for a in args[1:2] if _is_predicate(a)]
        rest = [a for a in args[1 + len(outs) :] if not _is_predicate(a)]
        carry = [a for a in args[1 + len(outs) :] if _is_predicate(a)] if "X" in modifiers else []
        shift = int(rest[-1], 16)
        extra = [_reader(a) for a in carry]
        if "HI" in modifiers:
            if "SX32" in modifiers:
                high = _reader(rest[0])
                third = lambda t: None if (v := high(t)) is None else MASK if v >> 31 else 0  # noqa: E731
            else:
                third = _reader(rest[2])
            return to(
                [args[0], *outs],
                lambda a, b, c, *k: (((c << 32 | a) << shift >> 32) + b + sum(k) & MASK, *[None] * len(outs)),
                *(_reader(rest[0]), _reader(rest[1]), third, *extra),
            )
        return to(
            [args[0], *outs],
            lambda a, b, *k: (
                (a << shift) + b & MASK,
                *[int((a << shift & MASK) + b >> 32 > 0)] * len(outs),
            ),
            *(_reader(rest[0]), _reader(rest[1]), *extra),
        )
    if base == "SHF":
        a, count, c = (_reader(v) for v in args[1:4])
        left, long = "L" in modifiers, "U64" in modifiers or "S64" in modifiers
        arithmetic = "S32" in modifiers or "S64" in modifiers

        def shift_words(low: int, n: int, high: int) -> int:
            n &= 63 if long else 31
            if long or (left and "HI" in modifiers) or (not left and "HI" not in modifiers):
                both = high << 32 | low
                if left:
                    return both << n >> 32 & MASK if "HI" in modifiers else both << n & MASK
                both = _signed(both, 64) if arithmetic else both
                return (both >> n >> 32 if "HI" in modifiers else both >> n) & MASK
            return low << n & MASK if left else (_signed(high) if arithmetic else high) >> n & MASK

        return to([args[0]], shift_words, a, count, c)
    if base == "LOP3":
        outs = [args[0]] if _is_predicate(args[0]) else []
        rest = args[len(outs) :]
        table = int(rest[4], 16)
        names = [rest[0], *outs]
        return to(
            names,
            lambda a, b, c: ((v := _lut(a, b, c, table)), *[int(v != 0)] * len(outs)),
            *(_reader(v) for v in rest[1:4]),
        )
    if base == "PLOP3":
        table, other = int(args[5], 16), int(args[6], 16)

        def logic(t: _Thread) -> None:
            sources = [_reader(v)(t) for v in args[2:5]]
            for name, lut in ((args[0], table), (args[1], other)):
                choices = {
                    lut >> (4 * p + 2 * q + r) & 1
                    for p in ((0, 1) if sources[0] is None else (sources[0],))
                    for q in ((0, 1) if sources[1] is None else (sources[1],))
                    for r in ((0, 1) if sources[2] is None else (sources[2],))
                }
                if name not in ("PT", "UPT"):
                    t.registers[name] = choices.pop() if len(choices) == 1 else None

        return logic
    if base == "ISETP":
        compare = COMPARE.get(modifiers[0])
        join = next((m for m in modifiers[1:] if m in ("AND", "OR", "XOR")), "AND")
        reads = _reader(args[2]), _reader(args[3])
        before, extra = _reader(args[4]), _reader(args[5]) if "EX" in modifiers and len(args) > 5 else None

        def test(t: _Thread) -> None:
            a, b, k = reads[0](t), reads[1](t), before(t)
            result = None
            if a is not None and b is not None and compare:
                p, q = (_signed(a), _signed(b)) if signed else (a, b)
                result = int(compare(p, q))
                if extra is not None and p == q and modifiers[0] not in ("EQ", "NE"):
                    result = extra(t)
                elif extra is not None and modifiers[0] in ("EQ", "NE"):
                    low = extra(t)
                    result = None if low is None else int(result and low) if modifiers[0] == "EQ" else int(result or low)
            for name, value in ((args[0], result), (args[1], None if result is None else 1 - result)):
                if join == "AND":
                    joined = 0 if value == 0 or k == 0 else None if value is None or k is None else 1
                elif join == "OR":
                    joined = 1 if value == 1 or k == 1 else None if value is None or k is None else 0
                else:
                    joined = None if value is None or k is None else value ^ k
                if name not in ("PT", "UPT"):
                    t.registers[name] = joined

        return test
    if base in ("SEL", "FSEL"):
        a, b, choice = _reader(args[1]), _reader(args[2]), _reader(args[3])

        def select(t: _Thread) -> None:
            p = choice(t)
            t.registers[args[0]] = None if p is None else (a if p else b)(t)

        return select
    if op in ("IMNMX", "VIMNMX", "UIMNMX"):
        a, b, least = _reader(args[1]), _reader(args[2]), _reader(args[-1])
        key = _signed if signed else (lambda v: v)
        return to([args[0]], lambda p, q, k: (min if k else max)(p, q, key=key), a, b, least)
    if op == "IABS":
        return to([args[0]], lambda a: abs(_signed(a)), _reader(args[1]))
    if op in ("SGXT", "USGXT"):
        n = _reader(args[2])
        extend = lambda a, w: _signed(a & (1 << w) - 1, w) & MASK if signed else a & (1 << w) - 1  # noqa: E731
        return to([args[0]], extend, _reader(args[1]), n)
    if op in ("I2F", "I2FP", "UI2F"):
        return to([args[0]], lambda a: _up(_signed(a) if signed else a, "RP" in modifiers), _reader(args[1]))
    if op == "MUFU" and modifiers[0] == "RCP":
        return to([args[0]], lambda a: _bits(1 / _float(a)) if _float(a) else None, _reader(args[1]))
    if op == "F2I":
        return to([args[0]], lambda a: int(_float(a)) & MASK if abs(_float(a)) < 2**32 else None, _reader(args[1]))
    if op == "FMUL":
        return to([args[0]], lambda a, b: _bits(_float(a) * _float(b)), _reader(args[1]), _reader(args[2]))
    if op == "HFMA2" and args[1].endswith("RZ") and args[2] == "RZ":  # how a constant gets into a register on another unit
        try:
            high, low = (int.from_bytes(struct.pack("<e", float(a)), "little") for a in args[3:5])
        except (ValueError, OverflowError):
            return to([args[0]], lambda: None)
        return to([args[0]], lambda: high << 16 | low)
    if op == "FCHK":  # whether a division needs its slow path; it is called for subnormal numbers and the like
        return to([args[0]], lambda: 0)
    if op in ("P2R", "R2P") and len(modifiers) == 0:  # some predicates as bits of a register, and back
        which = [n for n in range(7) if int(args[-1], 16) >> n & 1]
        if op == "R2P":
            source = _reader(args[1])
            return lambda t: t.registers.update((f"P{n}", None if (v := source(t)) is None else v >> n & 1) for n in which)
        bits = [_reader(f"P{n}") for n in which]
        rest = _reader(args[2])
        keep = ~int(args[-1], 16)
        together = lambda r, *p: r & keep & MASK | sum(b << n for n, b in zip(which, p, strict=True))  # noqa: E731
        return to([args[0]], together, rest, *bits)
    if op == "PRMT":
        a, table, b = (_reader(v) for v in args[1:4])

        def permute(p: int, sel: int, q: int) -> Value:
            source = [(q << 32 | p) >> 8 * i & 255 for i in range(8)]
            return None if sel & 0x8888 else sum(source[sel >> 4 * i & 7] << 8 * i for i in range(4))

        return to([args[0]], permute, a, table, b)
    if op == "SHFL" and modifiers[0] == "IDX":  # of the first thread's own value, which is how a warp learns its index
        return to([args[1], args[0]], lambda a, lane: (a if lane == 0 else None, 1), _reader(args[2]), _reader(args[3]))
    if op in ("VOTE", "VOTEU"):
        name = next(a for a in args if _is_predicate(a))
        source = _reader(args[-1])
        writes = to([name], lambda a: a, source)
        return writes
    # All others leave something unknown: in how many registers?
    names = [a for a in args[:1] if re.fullmatch(r"U?R\d+|U?P\d", a)]
    if op in ("HMMA",):
        names = wide(args[0], 4)
    elif op == "HGMMA":
        names = wide(args[0], int(re.search(r"x(\d+)x", x.op)[1]) // 2)
    elif names and op.startswith("LD"):
        size = next((n for n in (128, 64) if str(n) in modifiers), 32)
        count = int((re.search(r"\.([24])\b", x.op) or [0, 1])[1]) if op == "LDSM" else size // 32
        names = wide(args[0], count)
    elif op.endswith("SETP") or op == "SHFL":
        names = [a for a in args[:2] if re.fullmatch(r"U?R\d+|U?P\d", a)]

    def forget(t: _Thread) -> None:
        for name in names:
            t.registers[name] = None

    return forget


def _shifted(text: str, by: int) -> Callable[[_Thread], Value]:
    """A constant-bank operand, `by` bytes further on."""
    match = re.fullmatch(r"c\[0x0\]\[(U?R\w+)?\+?(0x[0-9a-f]+)?\]", text.strip())
    if not match:
        return lambda t: None
    index, offset = match[1] or "RZ", int(match[2] or "0", 16) + by
    return lambda t: None if (i := t.registers.get(index)) is None else t.constant(i + offset)


def _up(value: int, up: bool) -> int:
    """Bits of a float of this value; rounded up where asked, so that a reciprocal of it is never too large."""
    bits = _bits(float(value))
    return bits + 1 if up and _float(bits) < value else bits


def _address(text: str, thread: _Thread) -> Value:
    """Of an operand like [UR4+0x8]."""
    terms = text.strip("[] ").replace(".64", "").split("+")
    values = [int(t, 16) if t.startswith("0x") else thread.registers.get(t) for t in terms]
    return None if None in values else sum(values)


def _mbarrier(x: Instruction, thread: _Thread) -> tuple[str, Value, Value] | None:
    """What an instruction does to an mbarrier, if anything."""
    args = [a.strip() for a in x.args.split(",")]
    if x.op.startswith(("SYNCS.ARRIVE", "ATOMS.ARRIVE")):
        return "arrive", _address(args[1], thread), None
    if x.op.startswith("ARRIVES"):
        return "copies", _address(args[0], thread), None
    if x.op.startswith("SYNCS.PHASECHK"):
        parity = _reader(args[2])(thread)
        return "wait", _address(args[1], thread), None if parity is None else parity >> 31
    return None


def _polled(body: Sequence[Instruction], thread: _Thread) -> tuple[str, Value, Value] | None:
    """On sm_80 a wait for an mbarrier is a loop that loads its upper word and compares the top bit; None: another loop."""
    loads = [x for x in body if x.op == "LDS"]
    tests = [x for x in body if x.op == "LOP3.LUT" and "0x80000000" in x.args]
    if len(body) > 8 or len(loads) != 1 or len(tests) != 1:
        return None
    address, parity = _address(loads[0].args.split(",")[1], thread), _reader(tests[0].args.split(",")[4])(thread)
    return "wait", None if address is None else address - 4, None if parity is None else parity >> 31


def walk(kernel: Kernel, launch: Launch, block: int = 0, warp: int = 0) -> Path:
    """The instructions that one warp of one block executes.

    Raises:
        ValueError: a loop whose end depends on something unknown, or code that cannot be followed.
    """
    code, path = kernel.code, Path()
    if not (effects := _EFFECTS.get(kernel)):
        effects = _EFFECTS[kernel] = [_compile(x) for x in code]
    at = {x.pc: i for i, x in enumerate(code)}
    thread = _Thread(kernel, launch, block, 32 * warp)
    guards = {name: _reader(name) for name in {x.guard for x in code} if name}
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
        if op in ("SYNCS", "ATOMS", "ARRIVES") and guard != 0 and (event := _mbarrier(x, thread)):
            path.events[len(path.code) - 1] = event
        if op in ("BRA", "CALL", "RET", "EXIT", "BRX", "JMP"):
            for extra in (a.strip() for a in x.args.split(",")):  # a second predicate: BRA P1, 0x...
                if _is_predicate(extra) and guard != 0:
                    guard = None if (p := _reader(extra)(thread)) is None or guard is None else guard & p
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
                    known = _reader(x.args.split()[0])(thread)
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


def follow(kernel: Kernel, launch: Launch, *, blocks: int = 12, same_warps: bool = False) -> Walked:
    """Walk some blocks of a launch.

    Args:
        blocks: how many, spread over the grid by the golden ratio, so that no period of the grid is favoured.
        same_warps: walk one warp of each block for all (Triton without warp specialisation).
    """
    warps = -(-launch.threads // 32)
    known: dict[tuple, Path] = {}

    def path(block: int, warp: int) -> Path:
        p = walk(kernel, launch, block, warp)
        return known.setdefault((tuple(x.pc for x in p.code), frozenset(p.off), tuple(p.events.items())), p)

    chosen = sorted({int(launch.grid * (k * 0.618034 % 1)) for k in range(blocks)})
    paths = [[path(b, 0)] * warps if same_warps else [path(b, w) for w in range(warps)] for b in chosen]
    return Walked(paths, launch.grid / len(paths))
