"""`python -m vidla_kernels.tune`: which tiles, and which backend, are fastest on this GPU.

    python -m vidla_kernels.tune                                   # both attentions, bfloat16, B/32, B/16 and L/14: minutes
    python -m vidla_kernels.tune --quick --op tube                 # fewer shapes, shorter timings
    python -m vidla_kernels.tune --shape 16,196,12,64,8            # frames T, patches N, heads H, head dimension D, batch B
    python -m vidla_kernels.tune --show                            # what is known, and whether it counts here

For each kernel the candidates of tiles.py are timed in turns with the shipped tile: forward and backward of the whole
attention, medians of `triton.testing.do_bench`. A candidate that does not compile, spills, or gives another result than the
shipped tile is named and skipped. One that wins by more than 2 %, and again when both are timed anew, is kept in the file of
tuned.py, which later runs read at their first launch. For hierarchical attention every tiling of the CUDA kernels, where they
are built, is compared with Triton's in the same way, for forward and backward by themselves, and backend="auto" takes what was
faster.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch

from . import TokenLayout, backends, cuda_binding, hierarchical_attention, tiles, tube_attention, tuned

OPS = {"tube": tube_attention, "hierarchical": hierarchical_attention}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in tiles.DTYPES}
SHAPES = {"B/32": (12, 49, 12, 64, 32), "B/16": (12, 196, 12, 64, 32), "L/14": (12, 256, 16, 64, 32)}
PASSES = {"forward": 4, "backward": 7}  # units of B * tokens * H * D elements that must move: the floor
LEAST_GAIN = 0.02

Measure = Callable[[Callable[[], object]], float]  # a function -> seconds of one call


@dataclass(frozen=True)
class Case:
    """One attention at one shape: T frames, N patches, H heads, head dimension D, batch B."""

    op: str
    dtype: torch.dtype
    T: int
    N: int
    H: int
    D: int
    B: int
    name: str = ""

    def __str__(self) -> str:
        size = self.name or f"T={self.T} N={self.N} H={self.H} D={self.D} B={self.B}"
        return f"{self.op} {size} {str(self.dtype).removeprefix('torch.')}"

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.T, self.N)

    @property
    def tokens(self) -> int:
        return self.layout.num_patches if self.op == "tube" else self.layout.seq_len

    def floor(self, name: str, bandwidth: float) -> float:
        """Seconds in which a copy would move the bytes that a pass must move."""
        return PASSES[name] * self.B * self.tokens * self.H * self.D * self.dtype.itemsize / bandwidth


class Attention:
    """A case with its tensors, and its passes as functions of the plan (backends.py)."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        shape = (case.B, case.tokens, 3, case.H, case.D)
        self.qkv = torch.randn(shape, device=device).to(case.dtype).requires_grad_()
        self.grad = torch.randn(case.B, case.tokens, case.H, case.D, device=device).to(case.dtype)

    def passes(self, plan: str = "triton") -> dict[str, Callable[[], torch.Tensor]]:
        """Forward, and the backward of one forward that has run already."""
        attention, layout = OPS[self.case.op], self.case.layout
        out = attention(self.qkv, layout, backend=plan)

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return attention(self.qkv, layout, backend=plan)

        def backward() -> torch.Tensor:
            return torch.autograd.grad(out, self.qkv, self.grad, retain_graph=True)[0]

        return {"forward": forward, "backward": backward}


def do_bench(quick: bool) -> Measure:
    """triton.testing.do_bench: the median, with the L2 cache emptied before each call."""
    import triton.testing

    warmup, rep = (5, 20) if quick else (25, 100)  # milliseconds
    return lambda call: triton.testing.do_bench(call, warmup=warmup, rep=rep, return_mode="median") * 1e-3


def copy_bandwidth(device: torch.device, measure: Measure, size: int = 2**30) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / measure(lambda: target.copy_(source))


def agrees(ours: torch.Tensor, shipped: torch.Tensor) -> bool:
    """Whether two tiles computed the same, row by row. Not how exact they are, which the tests decide: only rounding may
    differ, and a wrong mask or a missing row is as large as a row."""
    few = {"half": 8 * torch.finfo(shipped.dtype).eps, "fp32": 64 * 2.0**-23, "tf32": 8 * 2.0**-10}[tiles.kind(shipped.dtype)]
    wrong, size = (x.float().square().mean(-1).sqrt() for x in (ours.float() - shipped.float(), shipped))
    typical = size.square().mean().sqrt()
    return bool((wrong <= few * torch.maximum(size, typical)).all())  # False where anything is NaN


def describe(tile: tiles.Tile) -> str:
    return " ".join(f"{name} {value}" for name, value in asdict(tile).items() if value is not None)


@dataclass
class Result:
    """What tuning found for one key of tiles.py."""

    key: str
    passes: str
    shipped: tiles.Tile
    best: tiles.Tile
    ratio: float  # time of the pass with the best tile over that with the shipped one; 1 where that is the best

    @property
    def wins(self) -> bool:
        return self.best != self.shipped


class Tuner:
    """Tunes one op and dtype over some shapes. `measure` and `say` are what a test replaces."""

    def __init__(self, cases: Iterable[Case], device: torch.device, measure: Measure, say: Callable[[str], object]) -> None:
        self.measure, self.say = measure, say
        self.attentions = [Attention(case, device) for case in cases]

    def results(self, bandwidth: float) -> Iterator[Result]:
        """One result a key, in the order in which the kernels are launched."""
        for name in PASSES:
            keys: dict[str, tiles.Tile] = {}
            for attention in self.attentions:
                with tiles.trial() as shipped:
                    call = attention.passes()[name]
                    shipped.asked.clear()
                    call()
                    seconds = self.measure(call)
                keys |= shipped.asked
                floor = attention.case.floor(name, bandwidth)
                self.say(
                    f"{attention.case} {name}: shipped {seconds * 1e6:.1f} us, {seconds / floor:.2f} of a copy of its bytes"
                )
            for key, tile in keys.items():
                yield self.tune(name, key, tile)

    def tune(self, name: str, key: str, shipped: tiles.Tile) -> Result:
        """The best of a key's candidates over all shapes that ask for the key."""
        ratios = {}
        for tile in tiles.candidates(key, shipped):
            ratio, why = self.compare(name, key, tile)
            self.say(f"  {key}: {describe(tile)}: {why or f'{ratio:.3f} of the time'}")
            if not why:
                ratios[tile] = ratio
        best = min(ratios, key=ratios.get, default=shipped)
        if best == shipped or ratios[best] > 1 - LEAST_GAIN:
            return Result(key, name, shipped, shipped, 1.0)
        again, why = self.compare(name, key, best)  # the best of several timings flatters: only a second one counts
        if why or again > 1 - LEAST_GAIN:
            self.say(f"  {key}: {describe(best)}: {why or f'{again:.3f} when timed again'}, not kept")
            return Result(key, name, shipped, shipped, 1.0)
        return Result(key, name, shipped, best, again)

    def compare(self, name: str, key: str, tile: tiles.Tile) -> tuple[float, str | None]:
        """Geometric mean over the shapes of time with `tile` over time with the shipped one, or why it cannot be used."""
        logs = []
        for attention in self.attentions:
            with tiles.trial() as shipped:
                call = attention.passes()[name]
                shipped.asked.clear()
                want = call()
                if key not in shipped.asked:
                    continue
                before = self.measure(call)
            with tiles.trial({key: tile}) as forced:
                try:
                    call = attention.passes()[name]
                    got = call()
                except Exception as error:  # whatever a compiler can raise: the candidate is out, tuning goes on
                    return math.nan, f"skipped, {type(error).__name__}: {(str(error).splitlines() or ['no message'])[-1]:.100}"
                if spilled := max((getattr(kernel, "n_spills", 0) or 0 for kernel in forced.launched), default=0):
                    return math.nan, f"skipped, {spilled} registers spill"
                if not agrees(got, want):
                    return math.nan, "skipped, its result is another one"
                logs.append(math.log(self.measure(call) / before))
        return math.exp(sum(logs) / len(logs)), None

    def backend(self, attention: Attention, name: str, plans: tuple[str, ...]) -> tuple[str, dict[str, float]]:
        """The fastest of some plans for a pass, with seconds of each. The first is the standard; one that gives another result
        is out, and the winner must win by `LEAST_GAIN` when both are timed anew as well."""
        want = attention.passes(plans[0])[name]()
        seconds = {}
        for plan in plans:
            call = attention.passes(plan)[name]
            if agrees(call(), want):
                seconds[plan] = self.measure(call)
            else:
                self.say(f"  {attention.case} {name}: {plan} skipped, its result is another one")
        best = min(seconds, key=seconds.get)
        if best != plans[0]:
            standard, again = (self.measure(attention.passes(plan)[name]) for plan in (plans[0], best))
            if max(seconds[best] / seconds[plans[0]], again / standard) > 1 - LEAST_GAIN:
                best = plans[0]
        return best, seconds


def cuda_plans(case: Case, name: str, device: torch.device) -> tuple[str, ...]:
    """Triton's kernels, then every tiling of the CUDA kernels that can run one pass of the case, as plans (backends.py)."""
    numbers = (
        number
        for number in cuda_binding.variants(name, case.D, device)
        if cuda_binding.serves(name, number, device, case.dtype, case.D, case.layout)
    )
    return ("triton", *(f"triton/cuda:{number}" if name == "backward" else f"cuda:{number}/triton" for number in numbers))


def tune(
    groups: Iterable[list[Case]],
    device: torch.device,
    measure: Measure,
    say: Callable[[str], object] = print,
    size: int = 2**30,
) -> list[Result]:
    """Tune each group of cases, which share op and dtype, and keep what was found after each.

    Args:
        groups: cases that share op, dtype and D.
        device: where to measure. Needs a `tuned.machine`.
        measure: seconds of one call of a function.
        say: where progress goes, a line at a time.
        size: bytes of the copy whose rate the floors are told by.

    Returns:
        A result for each key.
    """
    bandwidth = copy_bandwidth(device, measure, size)
    say(f"copy of {size >> 20} MiB: {bandwidth * 1e-12:.2f} TB/s")
    results = []
    for cases in groups:
        tuner = Tuner(cases, device, measure, say)
        found = list(tuner.results(bandwidth))
        results += found
        keep(device, bandwidth, {result.key: asdict(result.best) if result.wins else None for result in found})
        chosen = {}
        for attention in tuner.attentions:
            case = attention.case
            call = backends.Case(device, case.dtype, case.D, case.layout, case.op)
            if refusal := backends.refuses("cuda", call):
                say(f"{case}: backend cuda is not compared: {refusal}")
                continue
            for name in PASSES:
                best, seconds = tuner.backend(attention, name, cuda_plans(case, name, device))
                say(f"{case} {name}: " + ", ".join(f"{plan} {s * 1e6:.1f} us" for plan, s in seconds.items()))
                kernel = backends.part(best, name)
                key = tuned.backend_key(case.op, name, tiles.kind(case.dtype), case.D, case.N)
                chosen[key] = kernel if chosen.get(key, kernel) == kernel else "triton"  # shapes of one class that disagree
        keep(device, bandwidth, {}, chosen)
    return results


def keep(device: torch.device, bandwidth: float, found: dict[str, dict | None], chosen: dict[str, str] | None = None) -> None:
    """Put what was found for this machine into the file: None for a key where the shipped tile is the best."""
    here = tuned.machine(device)
    try:
        entries = tuned.read()
    except ValueError:
        entries = []  # unreadable: what it held is lost already
    entry = next((entry for entry in entries if tuned.differences(entry, here) is None), None)
    if entry is None:
        entry = {"machine": here, "measured": {}, "tiles": {}, "backends": {}}
        entries.append(entry)
    entry["measured"] = {"date": datetime.date.today().isoformat(), "copy_TB_per_s": round(bandwidth * 1e-12, 3)}
    entry["tiles"] = {key: tile for key, tile in {**entry["tiles"], **found}.items() if tile}
    entry["backends"] |= chosen or {}
    tuned.write(entries)
    tuned.forget()


def table(results: Iterable[Result]) -> str:
    """The gain over the shipped configuration, kernel by kernel."""
    rows = [("kernel", "pass", "shipped", "kept", "time of the pass")]
    for result in results:
        kept = (describe(result.best), f"{result.ratio - 1:+.1%}") if result.wins else ("the shipped one", "")
        rows.append((result.key, result.passes, describe(result.shipped), *kept))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def show(device: torch.device | None) -> str:
    """What the file holds, and of each entry whether it counts here."""
    try:
        entries = tuned.read()
    except ValueError as error:
        return f"{tuned.path()}: passed over, {error}"
    if not entries:
        return f"{tuned.path()}: nothing measured yet"
    lines = [str(tuned.path())]
    here = tuned.machine(device) if device else None
    for entry in entries:
        why = tuned.differences(entry, here)
        date = entry.get("measured", {}).get("date", "no date")
        lines.append(f"{entry['machine'].get('gpu')}, {date}: " + (f"passed over, {why}" if why else "in use here"))
        lines += [f"  {key}: {tile}" for key, tile in entry["tiles"].items()]
        lines += [f"  {key}: {name}" for key, name in entry["backends"].items()]
        if not entry["tiles"] and not entry["backends"]:
            lines.append("  the shipped tiles were the best")
    return "\n".join(lines)


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """A name of SHAPES, or "T,N,H,D,B"."""
    if text in SHAPES:
        return text, SHAPES[text]
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 5 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither of {', '.join(SHAPES)} nor T,N,H,D,B, five positive integers")
    if numbers[3] not in tiles.HEAD_DIMS:
        raise argparse.ArgumentTypeError(f"{text!r}: {tiles.unsupported(torch.float32, numbers[3])}")
    return "", numbers


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        "python -m vidla_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("--op", choices=OPS, action="append", help="default: both")
    parse.add_argument("--dtype", choices=DTYPES, action="append", help="default: bfloat16, whose tiles are float16's too")
    parse.add_argument(
        "--shape", type=parse_shape, action="append", metavar="SHAPE", help="B/32, B/16, L/14 or T,N,H,D,B; default: all three"
    )
    parse.add_argument(
        "--quick", action="store_true", help="by default B/32 and B/16 alone, and timings of 20 ms instead of 100"
    )
    parse.add_argument("--show", action="store_true", help="print what the file holds, measure nothing")
    parse.add_argument("--clear", action="store_true", help="remove the file, measure nothing")
    return parse


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    if args.clear:
        there = tuned.path().exists()
        tuned.path().unlink(missing_ok=True)
        print(f"{tuned.path()}: {'removed' if there else 'there was none'}")
        return 0
    if args.show:
        print(show(device))
        return 0
    if device is None:
        print("tuning measures on an NVIDIA GPU, and torch sees none here", file=sys.stderr)
        return 2
    if reason := backends.missing("triton", device):
        print(f"nothing to tune: {reason}", file=sys.stderr)
        return 2
    shapes = args.shape or [parse_shape(name) for name in (("B/32", "B/16") if args.quick else SHAPES)]
    groups: dict[tuple, list[Case]] = {}
    for op in args.op or OPS:
        for dtype in args.dtype or ["bfloat16"]:
            for name, numbers in shapes:
                groups.setdefault((op, dtype, numbers[3]), []).append(Case(op, DTYPES[dtype], *numbers, name))
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}", flush=True)
    try:
        results = tune(groups.values(), device, do_bench(args.quick), lambda line: print(line, flush=True))
    except torch.cuda.OutOfMemoryError as error:
        print(f"out of GPU memory: choose a smaller batch, as in --shape 12,196,12,64,8 ({error})", file=sys.stderr)
        return 1
    print(f"\n{table(results)}\n\n{tuned.path()}: read from now on. --show prints it, --clear removes it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
