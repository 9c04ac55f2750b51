"""From counts to rows of a table: what a pass costs, and what each of its kernels does.

A row is a plain dict, so that baseline.json, the tables of docs/kernels.md and the tests speak of the same thing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import replay
from .cases import SHAPES, Case
from .resources import Compiled, compiled
from .traffic import Work, counted

BASELINE = Path(__file__).with_name("baseline.json")
GPU = {arch: gpu.name for arch, gpu in replay.GPUS.items()}
# Products on the walked path may differ by this share from those that were counted. Of CUDA's resident blocks a few are
# walked, over eight frames each, where the emulation walks all.
AGREE = {"triton": 0.05, "cuda": 0.10}


def floor_us(case: Case, direction: str) -> float:
    """What moving the floor's bytes takes at the DRAM rate that the replay assumes."""
    gpu = replay.GPUS[case.arch]
    return case.floor_bytes(direction) / (gpu.dram * replay.ACHIEVABLE["dram"]) * 1e6


def check(case: Case, direction: str, work: Sequence[Work], made: Sequence[Compiled]) -> None:
    """Refuse a walk whose products are not those that were counted.

    fp32 is multiplied without tensor cores, whose products are the ones that the walk counts. CUDA's kernels branch on votes
    about values, which the walk cannot know: whether it takes them as they go, their exponentials tell as well.

    Raises:
        ValueError: they differ; the message tells by how much.
    """
    if [w.kernel for w in work] != [m.kernel for m in made] and case.backend == "triton":
        raise ValueError(f"{case}: {[w.kernel for w in work]} were counted, {[m.kernel for m in made]} compiled")
    counts, walked = sum(w.macs for w in work), sum(m.macs for m in made)
    if case.dtype != "float32" and abs(walked - counts) > AGREE[case.backend] * counts:
        raise ValueError(f"{case}, {direction}: the paths walked multiply {walked / counts:.3f} times what was counted")
    if case.backend == "cuda":
        counts, walked = sum(w.exponentials for w in work), sum(m.exponentials for m in made)
        if abs(walked - counts) > AGREE["cuda"] * counts:
            raise ValueError(f"{case}, {direction}: the paths walked take {walked / counts:.3f} times the exponentials counted")


def pass_row(shape: str, case: Case, direction: str, work: Sequence[Work], made: Sequence[Compiled]) -> dict:
    """One forward or backward: bytes and products over what must be, launches, predicted time."""
    floor, needed = case.floor_bytes(direction, 1), case.needed_macs(direction, 1)
    again = sum(w.summary_again for w in work)
    predicted = sum(m.replay_us for m in made)
    return {
        "op": case.op,
        "backend": case.backend,
        "shape": shape,
        "arch": case.arch,
        "pass": direction,
        "launches": len(made),
        "bytes": (sum(w.asked for w in work) - again) / floor,
        "summary_again": again / floor,
        "distinct": sum(w.distinct for w in work) / floor,
        "products": sum(w.macs for w in work) / needed,
        "exponentials": sum(w.exponentials for w in work) / case.needed,
        "floor_us": floor_us(case, direction),
        "predicted_us": predicted,
        "over_floor": predicted / floor_us(case, direction),
    }


def kernel_row(shape: str, case: Case, row: Compiled) -> dict:
    """One kernel: what it holds, and its thread instructions: for each needed score in all, and in the main loop by class for
    each exponential there (where there are none: for each needed score)."""
    per = row.loop_exponentials or case.needed
    return {
        "op": case.op,
        "backend": case.backend,
        "shape": shape,
        "arch": case.arch,
        "pass": row.direction,
        "kernel": row.kernel,
        "options": row.options,
        "registers": row.registers,
        "stack": row.stack,
        "shared": row.shared,
        "blocks": row.blocks,
        "warps": row.warps,
        "instructions": sum(row.instructions.values()) / case.needed,
        "loop_share": sum(row.loop.values()) / max(1, sum(row.instructions.values())),
        "loop_spills": row.loop.get("spill", 0.0) / per if row.loop != row.instructions else 0.0,
        "spilled": row.spilled,
        "loop": {name: round(n / per, 3) for name, n in row.loop.items() if n},
        "guesses": row.guesses,
        "predicted_us": row.replay_us,
        "bounds_us": row.bounds_us,
        "waits": row.waits,
    }


def rows(cases: dict[str, list[Case]], say: Callable[[str], None] = print) -> tuple[list[dict], list[dict]]:
    """Rows of all passes and of all kernels of some cases, by the name of their shape."""
    flat = [(shape, case) for shape, some in cases.items() for case in some]
    say(f"counting bytes and products of {len(flat)} cases in Triton's interpreter")
    work = counted([case for _, case in flat])
    say("compiling, walking and replaying them")
    traffic = [[{"distinct": w.distinct, "asked": w.asked} for w in launches] for launches in work]
    made = compiled([case for _, case in flat], traffic=traffic)
    passes, kernels = [], []
    for (shape, case), launches, resources in zip(flat, work, made, strict=True):
        for direction in ("fwd", "bwd"):
            mine = [w for w in launches if w.direction == direction]
            theirs = [m for m in resources if m.direction == direction]
            check(case, direction, mine, theirs)
            passes.append(pass_row(shape, case, direction, mine, theirs))
            kernels += [kernel_row(shape, case, m) for m in theirs]
    return passes, kernels


def shipped(
    ops: Iterable[str] = ("tube", "hierarchical"), shapes: Iterable[str] = SHAPES, archs: Iterable[int] = replay.GPUS
) -> dict[str, list[Case]]:
    """The cases that are reported, by shape: bfloat16, D=64, B=32, U-V-r 3-4-2."""
    return {shape: [Case(op, arch, **SHAPES[shape]) for op in ops for arch in archs] for shape in shapes}


def save(passes: list[dict], kernels: list[dict], versions: dict[str, str]) -> None:
    rounded = json.loads(json.dumps([passes, kernels]), parse_float=lambda x: float(f"{float(x):.4g}"))
    lines = [json.dumps({"versions": versions})[:-1] + ","]
    for name, table in zip(("passes", "kernels"), rounded, strict=True):
        body = ",\n  ".join(json.dumps(row) for row in table)
        lines.append(f' "{name}": [\n  {body}\n ]{"," if name == "passes" else "}"}')
    BASELINE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def baseline() -> dict:
    """What `python -m benchmarks.cost --write` last wrote: "versions", "passes", "kernels"."""
    return json.loads(BASELINE.read_text(encoding="utf-8"))


# Tables, in Markdown; they read well enough on a terminal.


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in body)])


def work_table(passes: Iterable[dict]) -> str:
    head = ("op", "backend", "shape", "tiles of", "pass", "launches", "bytes", "MST again", "distinct bytes", "products", "exp")
    return table(
        head,
        (
            (p["op"], p["backend"], p["shape"], GPU[p["arch"]], p["pass"], p["launches"])
            + tuple(f"{p[name]:.2f}" for name in ("bytes", "summary_again", "distinct", "products", "exponentials"))
            for p in passes
        ),
    )


def time_table(passes: Sequence[dict]) -> str:
    """Predicted times; a forward and backward is the sum of both."""
    found = {(p["op"], p["backend"], p["shape"], p["arch"], p["pass"]): p for p in passes}
    body = []
    for op, backend, shape, arch in dict.fromkeys(key[:4] for key in found):
        fwd, bwd = (found[op, backend, shape, arch, direction] for direction in ("fwd", "bwd"))
        cells = []
        for parts in ([fwd], [fwd, bwd]):
            us, floor = (sum(p[name] for p in parts) for name in ("predicted_us", "floor_us"))
            cells += [f"{floor:.0f}", f"{us:.0f}", f"**{us / floor:.2f}**"]
        body.append((op, backend, shape, GPU[arch], *cells))
    head = ("op", "backend", "shape", "GPU", "floor, us", "fwd, us", "over floor", "floor, us", "fwd+bwd, us", "over floor")
    return table(head, body)


# What is aimed at: predicted time over the floor, forward alone and forward with backward.
GOALS = {
    ("tube", 80): (1.05, 1.05),
    ("tube", 90): (1.05, 1.05),
    ("hierarchical", 80): (1.40, 1.80),
    ("hierarchical", 90): (1.25, 1.50),
}
FORWARD_GOAL = {("hierarchical", 90, "B/32"): 1.15}
ALLOWANCE = {"L/14 T=12": 1.2, "B/32 T=32": 1.2, "B/16 T=32": 1.2}  # of the goals of hierarchical attention


def goals(op: str, shape: str, arch: int) -> tuple[float, float]:
    """What is aimed at for the forward, and for forward and backward together."""
    forward, both = GOALS[op, arch]
    forward = FORWARD_GOAL.get((op, arch, shape.split()[0]), forward)
    more = ALLOWANCE.get(shape, 1.0) if op == "hierarchical" else 1.0
    return forward * more, both * more


def best_table(passes: Sequence[dict]) -> str:
    """For each pass the better backend: what backend="FORWARD/BACKWARD" runs."""
    best: dict[tuple, dict] = {}
    for p in passes:
        key = (p["op"], p["shape"], p["arch"], p["pass"])
        best[key] = min(best.get(key, p), p, key=lambda p: p["predicted_us"])
    body = []
    for op, shape, arch in dict.fromkeys(key[:3] for key in best):
        fwd, bwd = (best[op, shape, arch, direction] for direction in ("fwd", "bwd"))
        cells = [op, shape, GPU[arch], fwd["backend"] if op == "tube" else f"{fwd['backend']}/{bwd['backend']}"]
        for parts, goal in zip(([fwd], [fwd, bwd]), goals(op, shape, arch), strict=True):
            ratio = sum(p["predicted_us"] for p in parts) / sum(p["floor_us"] for p in parts)
            cells += [f"**{ratio:.2f}**", f"{goal:.2f}", "" if ratio <= goal else "missed"]
        body.append(cells)
    head = ("op", "shape", "GPU", "kernels", "fwd over floor", "goal", "", "fwd+bwd over floor", "goal", "")
    return table(head, body)


def kernel_table(kernels: Iterable[dict]) -> str:
    classes = ("tensor", "exp", "float", "shared", "global", "barrier", "address")
    head = (
        "kernel",
        "shape",
        "GPU",
        "registers",
        "stack",
        "shared KB",
        "blocks x warps",
        "instr.",
        "of them in loop",
        *classes,
    )
    return table(
        head,
        (
            (f"`{k['kernel']}`", k["shape"], GPU[k["arch"]], k["registers"], k["stack"], f"{k['shared'] / 1024:.0f}")
            + (f"{k['blocks']} x {k['warps']}", f"{k['instructions']:.1f}", f"{k['loop_share']:.0%}")
            + tuple(f"{k['loop'].get(name, 0):.2f}" for name in classes)
            for k in kernels
        ),
    )
