"""One thread of a kernel as far as integers go: registers, predicates, and what each instruction does to them.

Enough to follow a kernel's control flow (walk.py): indices, parameters, divisions, packed predicates, spilled words. None
stands for what is unknown: floats, and what comes out of memory. Meanings are what the names say, checked by the products
and trip counts that come out.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .sass import Instruction, Kernel

Value = int | None  # None: unknown
PARAMETERS = {80: 0x160, 90: 0x210}  # where in constant bank 0 a kernel's parameters begin
CONSTANT = ("RZ", "URZ", "PT", "UPT")
MASK = 0xFFFFFFFF


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def float_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: blocks in the grid, threads in a block, dynamic shared memory, and the bytes of its
    parameters as the driver lays them out (pointers need no true value, but their true alignment)."""

    grid: int
    threads: int
    shared: int = 0
    params: bytes = b""


class Thread:
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


Reader = Callable[[Thread], Value]
OPERAND = re.compile(r"^([-~!|]*)(U?R\d+|U?RZ|U?P\d|U?PT|SRZ|SR_[\w.]+|0x[0-9a-f]+|c\[)")


def reader(text: str) -> Reader:
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
        return lambda t: None if (x := inner_read(t)) is None else abs(signed(x)) * (-1 if negative else 1) & MASK
    if "-" in signs:
        return lambda t: None if (x := read(t)) is None else -x & MASK
    return read


def pair(text: str) -> Reader:
    """How to read a 64-bit source: two registers or constants in a row; immediates are sign-extended."""
    text = text.strip().replace(".reuse", "")
    low = reader(text)
    if match := re.fullmatch(r"(-?)(U?R)(\d+)(?:\.64)?", text):
        high = reader(f"{match[2]}{int(match[3]) + 1}")
        both = lambda t: None if (a := low_of(t)) is None or (b := high(t)) is None else a | b << 32  # noqa: E731
        low_of = reader(match[2] + match[3])
        return (lambda t: None if (x := both(t)) is None else -x & (1 << 64) - 1) if match[1] else both
    if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
        at = int(match[1], 16)
        return lambda t: t.constant(at, 8)
    return lambda t: None if (x := low(t)) is None else signed(x) & (1 << 64) - 1 if "0x" in text else x


def float_up(value: int, up: bool) -> int:
    """Bits of a float of this value; rounded up where asked, so that a reciprocal of it is never too large."""
    bits = float_bits(float(value))
    return bits + 1 if up and float_of(bits) < value else bits


COMPARE = {
    "GE": lambda a, b: a >= b,
    "GT": lambda a, b: a > b,
    "LE": lambda a, b: a <= b,
    "LT": lambda a, b: a < b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


JOIN: dict[str, Callable[[Value, Value], Value]] = {  # of a comparison and an earlier predicate, either of them unknown
    "AND": lambda a, b: 0 if 0 in (a, b) else None if None in (a, b) else 1,
    "OR": lambda a, b: 1 if 1 in (a, b) else None if None in (a, b) else 0,
    "XOR": lambda a, b: None if None in (a, b) else a ^ b,
}


def _lut(a: int, b: int, c: int, table: int) -> int:
    """Bitwise function of three words: bit 4a + 2b + c of `table`."""
    out = 0
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & MASK


def is_predicate(text: str) -> bool:
    return bool(re.fullmatch(r"!?U?(P\d|PT)", text.strip()))


def constant(text: str, by: int) -> Reader:
    """A constant-bank operand, `by` bytes further on."""
    match = re.fullmatch(r"c\[0x0\]\[(U?R\w+)?\+?(0x[0-9a-f]+)?\]", text.strip())
    if not match:
        return lambda t: None
    index, offset = match[1] or "RZ", int(match[2] or "0", 16) + by
    return lambda t: None if (i := t.registers.get(index)) is None else t.constant(i + offset)


def address(text: str, thread: Thread) -> Value:
    """Of an operand like [UR4+0x8]."""
    terms = text.strip("[] ").replace(".64", "").split("+")
    values = [int(t, 16) if t.startswith("0x") else thread.registers.get(t) for t in terms]
    return None if None in values else sum(values)


Effect = Callable[[Thread], None]
Decode = Callable[["Decoded"], Effect]
MEANINGS: dict[str, Decode] = {}


def meaning(*names: str) -> Callable[[Decode], Decode]:
    """Registers what instructions of these names do; U... is the same on registers of the whole warp."""

    def register(decode: Decode) -> Decode:
        MEANINGS.update(dict.fromkeys(names, decode))
        return decode

    return register


class Decoded:
    """An instruction's name, modifiers and operands."""

    def __init__(self, x: Instruction) -> None:
        self.text, (self.op, *self.modifiers) = x.op, x.op.split(".")
        self.args = [a.strip() for a in x.args.split(",")] if x.args else []
        self.signed = "U32" not in self.modifiers

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers

    @property
    def words(self) -> int:
        """32-bit registers that a load or store moves."""
        return next((n // 32 for n in (128, 64) if self.has(str(n))), 1)

    def values(self, start: int = 1) -> list[str]:
        """Operands that are no predicates."""
        return [a for a in self.args[start:] if not is_predicate(a)]

    def readers(self, *at: int) -> list[Reader]:
        return [reader(self.args[i]) for i in at]


def write(names: Sequence[str], compute: Callable[..., object], *reads: Reader) -> Effect:
    """compute(sources) goes to `names`; unknown where a source is."""

    def run(t: Thread) -> None:
        sources = [read(t) for read in reads]
        results: Sequence[Value] = [None] * len(names)
        if None not in sources:
            result = compute(*sources)
            results = result if isinstance(result, tuple) else (result,)
        for name, value in zip(names, results, strict=True):
            if name not in CONSTANT:
                t.registers[name] = value

    return run


def _consecutive(name: str, n: int) -> list[str]:
    match = re.fullmatch(r"(U?R)(\d+)(?:\.64)?", name)
    return [f"{match[1]}{int(match[2]) + i}" for i in range(n)] if match else [name]


@meaning("STG", "STS", "ST", "STSM", "BAR", "NOP", "BSSY", "BSYNC", "MEMBAR", "LDGSTS", "LDGDEPBAR", "DEPBAR")
def _nothing(x: Decoded) -> Effect:
    return lambda t: None


@meaning("LDL", "STL")
def _spill(x: Decoded) -> Effect:
    where, moved = x.args if x.op == "STL" else x.args[::-1]
    names = _consecutive(moved, x.words)

    def run(t: Thread) -> None:
        start = address(where, t)
        for n, name in enumerate(names):
            at = None if start is None else start + 4 * n
            if x.op == "LDL":
                t.registers[name] = None if at is None else t.stack.get(at)
            elif at is not None:
                t.stack[at] = t.registers.get(name)

    return run


@meaning("USETMAXREG")
def _registers(x: Decoded) -> Effect:
    """Asking for registers is repeated until it succeeds, which is at once as far as one warp can know."""
    return write(x.args[:1], lambda: 1) if x.has("TRY_ALLOC") else lambda t: None


@meaning("MOV", "S2R", "S2UR", "R2UR", "I2I", "CS2R")
def _move(x: Decoded) -> Effect:
    source = reader(x.values()[0])
    if x.op == "CS2R" and not x.has("32"):
        return write(_consecutive(x.args[0], 2), lambda a: (a & MASK, 0), source)
    return write([x.args[0]], lambda a: a, source)


@meaning("LDC")
def _load_constant(x: Decoded) -> Effect:
    words = _consecutive(x.args[0], x.words)
    moves = [write([name], lambda a: a, constant(x.args[1], 4 * i)) for i, name in enumerate(words)]

    def run(t: Thread) -> None:
        for move in moves:
            move(t)

    return run


@meaning("IMAD")
def _multiply_add(x: Decoded) -> Effect:
    a, b, c = x.values()[:3]
    factors = reader(a), reader(b)
    if x.has("X"):
        return write([x.args[0]], lambda p, q, r, k: p * q + r + k & MASK, *factors, reader(c), reader(x.args[-1]))
    if not (x.has("WIDE") or x.has("HI")):
        return write([x.args[0]], lambda p, q, r: p * q + r & MASK, *factors, reader(c))

    def product(p: int, q: int, r: int) -> tuple[int, int]:
        p, q = (signed(p), signed(q)) if x.signed else (p, q)
        total = p * q + r & (1 << 64) - 1
        return total & MASK, total >> 32

    if x.has("HI"):
        return write([x.args[0]], lambda p, q, r: product(p, q, r)[1], *factors, pair(c))
    return write(_consecutive(x.args[0], 2), product, *factors, pair(c))


@meaning("IADD3", "VIADD", "IADD", "VIADD3")
def _add(x: Decoded) -> Effect:
    outs = [a for a in x.args[1:3] if is_predicate(a)][: max(0, len(x.args) - 4)]
    rest = x.args[1 + len(outs) :]
    values = [a for a in rest if not is_predicate(a)]
    carries = [reader(a) for a in rest if is_predicate(a)] if x.has("X") else []
    if not outs:
        return write([x.args[0]], lambda *sources: sum(sources) & MASK, *map(reader, values), *carries)
    minus = [a.startswith("-") for a in values] + [False] * len(carries)

    def add(*sources: int) -> tuple[int, ...]:  # for the carry out a minus is ~a + 1, as the adder sees it
        total = sum((~s & MASK) + 1 if negative else s for s, negative in zip(sources, minus, strict=True))
        return total & MASK, *[int(total >> 32 > 0)] * len(outs)

    return write([x.args[0], *outs], add, *(reader(a.lstrip("-")) for a in values), *carries)


@meaning("LEA")
def _shift_add(x: Decoded) -> Effect:
    outs = [a for a in x.args[1:2] if is_predicate(a)]
    start = 1 + len(outs)
    rest, names = x.values(start), [x.args[0], *outs]
    carry = [reader(a) for a in x.args[start:] if is_predicate(a)] if x.has("X") else []
    low, addend, shift = reader(rest[0]), reader(rest[1]), int(rest[-1], 16)
    if not x.has("HI"):
        carry_out = lambda a, b: int((a << shift & MASK) + b >> 32 > 0)  # noqa: E731
        compute = lambda a, b, *k: ((a << shift) + b + sum(k) & MASK, *[carry_out(a, b)] * len(outs))  # noqa: E731
        return write(names, compute, low, addend, *carry)
    if x.has("SX32"):
        high: Reader = lambda t: None if (v := low(t)) is None else MASK if v >> 31 else 0  # noqa: E731
    else:
        high = reader(rest[2])
    compute = lambda a, b, c, *k: (((c << 32 | a) << shift >> 32) + b + sum(k) & MASK, *[None] * len(outs))  # noqa: E731
    return write(names, compute, low, addend, high, *carry)


@meaning("SHF")
def _shift(x: Decoded) -> Effect:
    left, high_part, long = x.has("L"), x.has("HI"), x.has("U64") or x.has("S64")
    arithmetic = x.has("S32") or x.has("S64")

    def shift(low: int, n: int, high: int) -> int:
        n &= 63 if long else 31
        if long or left == high_part:  # both words take part
            both = high << 32 | low
            shifted = both << n if left else (signed(both, 64) if arithmetic else both) >> n
            return (shifted >> 32 if high_part else shifted) & MASK
        return low << n & MASK if left else (signed(high) if arithmetic else high) >> n & MASK

    return write([x.args[0]], shift, *x.readers(1, 2, 3))


@meaning("LOP3")
def _logic(x: Decoded) -> Effect:
    outs = x.args[:1] if is_predicate(x.args[0]) else []
    name, a, b, c, table = x.args[len(outs) : len(outs) + 5]
    compute = lambda p, q, r: ((v := _lut(p, q, r, int(table, 16))), *[int(v != 0)] * len(outs))  # noqa: E731
    return write([name, *outs], compute, *map(reader, (a, b, c)))


@meaning("PLOP3")
def _predicate_logic(x: Decoded) -> Effect:
    sources = x.readers(2, 3, 4)
    outs = [(name, int(table, 16)) for name, table in zip(x.args[:2], x.args[5:7], strict=True) if name not in CONSTANT]

    def run(t: Thread) -> None:  # known where all that the unknown ones may be comes to the same
        choices = [(0, 1) if (v := source(t)) is None else (v,) for source in sources]
        for name, table in outs:
            results = {table >> 4 * p + 2 * q + r & 1 for p, q, r in itertools.product(*choices)}
            t.registers[name] = results.pop() if len(results) == 1 else None

    return run


@meaning("ISETP")
def _compare(x: Decoded) -> Effect:
    name, join = x.modifiers[0], next((m for m in x.modifiers[1:] if m in JOIN), "AND")
    extended = x.has("EX") and len(x.args) > 5  # the upper words of a pair; the last operand is what the lower ones said
    a, b, before = x.readers(2, 3, 4)
    lower = reader(x.args[5]) if extended else None

    def compare(t: Thread) -> Value:
        p, q = a(t), b(t)
        if p is None or q is None or name not in COMPARE:
            return None
        if x.signed:
            p, q = signed(p), signed(q)
        result = int(COMPARE[name](p, q))
        return lower(t) if lower and p == q else result

    def run(t: Thread) -> None:
        result, k = compare(t), before(t)
        for out, value in ((x.args[0], result), (x.args[1], None if result is None else 1 - result)):
            if out not in CONSTANT:
                t.registers[out] = JOIN[join](value, k)

    return run


@meaning("SEL", "FSEL")
def _select(x: Decoded) -> Effect:
    a, b, choice = x.readers(1, 2, 3)

    def run(t: Thread) -> None:
        p = choice(t)
        t.registers[x.args[0]] = None if p is None else (a if p else b)(t)

    return run


@meaning("IMNMX", "VIMNMX")
def _least(x: Decoded) -> Effect:
    key = signed if x.signed else (lambda v: v)
    return write([x.args[0]], lambda p, q, least: (min if least else max)(p, q, key=key), *x.readers(1, 2, -1))


@meaning("VIMNMX3")
def _least_of_three(x: Decoded) -> Effect:
    key = signed if x.signed else (lambda v: v)
    return write([x.args[0]], lambda p, q, r, least: (min if least else max)(p, q, r, key=key), *x.readers(1, 2, 3, 4))


@meaning("VIADDMNMX")
def _add_least(x: Decoded) -> Effect:
    key = signed if x.signed else (lambda v: v)
    compute = lambda p, q, r, least: (min if least else max)(p + q & MASK, r, key=key)  # noqa: E731
    return write([x.args[0]], compute, *x.readers(1, 2, 3, 4))


@meaning("IABS")
def _absolute(x: Decoded) -> Effect:
    return write([x.args[0]], lambda a: abs(signed(a)), *x.readers(1))


@meaning("SGXT")
def _extend(x: Decoded) -> Effect:
    extend = lambda a, n: signed(a & (1 << n) - 1, n) & MASK if x.signed else a & (1 << n) - 1  # noqa: E731
    return write([x.args[0]], extend, *x.readers(1, 2))


# Floats appear in divisions of integers: a reciprocal, rounded down, whose error the integers behind it make good.


@meaning("I2F", "I2FP")
def _to_float(x: Decoded) -> Effect:
    return write([x.args[0]], lambda a: float_up(signed(a) if x.signed else a, x.has("RP")), *x.readers(1))


@meaning("MUFU")
def _special(x: Decoded) -> Effect:
    if not x.has("RCP"):
        return _forget(x)
    return write([x.args[0]], lambda a: float_bits(1 / float_of(a)) if float_of(a) else None, *x.readers(1))


@meaning("F2I")
def _to_integer(x: Decoded) -> Effect:
    return write([x.args[0]], lambda a: int(f) & MASK if abs(f := float_of(a)) < 2**32 else None, *x.readers(1))


@meaning("FMUL")
def _float_product(x: Decoded) -> Effect:
    return write([x.args[0]], lambda a, b: float_bits(float_of(a) * float_of(b)), *x.readers(1, 2))


@meaning("HFMA2")
def _half_constant(x: Decoded) -> Effect:
    """0 * 0 + a constant is how the assembler brings one into a register on a unit that has time."""
    if not x.args[1].endswith("RZ") or x.args[2] != "RZ":
        return _forget(x)
    try:
        high, low = (int.from_bytes(struct.pack("<e", float(a)), "little") for a in x.args[3:5])
    except (ValueError, OverflowError):
        return _forget(x)
    return write([x.args[0]], lambda: high << 16 | low)


@meaning("FCHK")
def _needs_slow_division(x: Decoded) -> Effect:
    return write([x.args[0]], lambda: 0)  # only for subnormal numbers and the like


@meaning("P2R", "R2P")
def _pack_predicates(x: Decoded) -> Effect:
    """Some predicates as bits of a register, and back."""
    if x.modifiers:
        return _forget(x)
    mask = int(x.args[-1], 16)
    names = {n: f"P{n}" for n in range(7) if mask >> n & 1}
    if x.op == "R2P":
        return write(list(names.values()), lambda a: tuple(a >> n & 1 for n in names), reader(x.args[1]))
    together = lambda rest, *p: rest & ~mask & MASK | sum(b << n for n, b in zip(names, p, strict=True))  # noqa: E731
    return write([x.args[0]], together, reader(x.args[2]), *map(reader, names.values()))


@meaning("PRMT")
def _permute(x: Decoded) -> Effect:
    def permute(p: int, choice: int, q: int) -> Value:
        source = [(q << 32 | p) >> 8 * i & 255 for i in range(8)]
        return None if choice & 0x8888 else sum(source[choice >> 4 * i & 7] << 8 * i for i in range(4))

    return write([x.args[0]], permute, *x.readers(1, 2, 3))


@meaning("SHFL")
def _shuffle(x: Decoded) -> Effect:
    if not x.has("IDX"):
        return _forget(x)
    # The first thread's own value comes back: that is how a warp learns its index.
    return write([x.args[1], x.args[0]], lambda a, lane: (a if lane == 0 else None, 1), *x.readers(2, 3))


@meaning("VOTE", "VOTEU")
def _vote(x: Decoded) -> Effect:
    """Taken to be unanimous with the first thread; on something unknown nobody votes. What a warp votes on is an exception,
    and one that is none shows: who uses the path compares its products with those that were counted."""
    name, votes = next(a for a in x.args if is_predicate(a)), reader(x.args[-1])

    def run(t: Thread) -> None:
        if name not in CONSTANT:
            t.registers[name] = votes(t) or 0

    return run


def _forget(x: Decoded) -> Effect:
    """Something unknown, in as many registers as the instruction writes."""
    outs = x.args[: 2 if x.op.endswith("SETP") or x.op == "SHFL" else 1]
    names = [a for a in outs if re.fullmatch(r"U?R\d+|U?P\d", a)]
    if x.op == "HMMA":
        names = _consecutive(x.args[0], 4)
    elif x.op == "HGMMA":
        names = _consecutive(x.args[0], int(re.search(r"x(\d+)x", x.text)[1]) // 2)
    elif names and x.op == "LDSM":
        names = _consecutive(names[0], int((re.search(r"\.([24])\b", x.text) or [0, 1])[1]))
    elif names and x.op.startswith("LD"):
        names = _consecutive(names[0], x.words)

    def run(t: Thread) -> None:
        for name in names:
            t.registers[name] = None

    return run


def effect(x: Instruction) -> Effect:
    """What an instruction does to the integers and predicates of a thread."""
    decoded = Decoded(x)
    name = decoded.op
    decode = MEANINGS.get(name) or (MEANINGS.get(name[1:]) if name.startswith("U") else None) or _forget
    return decode(decoded)
