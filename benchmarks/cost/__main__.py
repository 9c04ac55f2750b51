"""Count what the shipped kernels cost, on any machine, and print it.

python -m benchmarks.cost                                     everything, some minutes
python -m benchmarks.cost --op tube --shape "B/16 T=12"       a part of it
python -m benchmarks.cost --write                             everything, into docs/kernels.md and its plot
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from . import cuda, replay, report
from .cases import SHAPES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "kernels.md"


def versions() -> dict[str, str]:
    import triton

    return {"triton": triton.__version__, "nvcc": cuda.version()}


def renew(page: str, made: dict[str, str]) -> str:
    """The page with what stands between `<!-- cost: NAME -->` and `<!-- end -->` replaced.

    Raises:
        ValueError: the page has no such place.
    """
    for name, text in made.items():
        pattern = rf"(<!-- cost: {name} -->\n).*?(<!-- end -->)"
        page, found = re.subn(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.S)  # noqa: B023
        if found != 1:
            raise ValueError(f"docs/kernels.md has {found} places for the table {name!r}")
    return page


def tables(passes: list[dict], kernels: list[dict], used: dict[str, str]) -> dict[str, str]:
    """The tables of docs/kernels.md. Kernels at T=12 alone: T changes no kernel but long tubes'."""
    return {
        "versions": f"Triton {used['triton']}, nvcc {used['nvcc']}; bfloat16, B=32, D=64, U-V-r 3-4-2.",
        "best": report.best_table(passes),
        "time": report.time_table(passes),
        "work": report.work_table(passes),
        "kernels": report.kernel_table(k for k in kernels if "T=12" in k["shape"]),
    }


def plot(passes: list[dict], path: Path) -> None:
    """Predicted time over the floor, by shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(report.GPU), figsize=(11, 3.6), sharey=True)
    for axis, (arch, name) in zip(axes, sorted(report.GPU.items(), reverse=True), strict=True):
        mine = [p for p in passes if p["arch"] == arch]
        kinds = list(dict.fromkeys((p["op"], p["backend"], p["pass"]) for p in mine))
        shapes = list(dict.fromkeys(p["shape"] for p in mine))
        for i, kind in enumerate(kinds):
            ratio = {p["shape"]: p["over_floor"] for p in mine if (p["op"], p["backend"], p["pass"]) == kind}
            at = [shapes.index(shape) + (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for shape in ratio]
            axis.bar(at, ratio.values(), 0.72 / len(kinds), label=", ".join(kind))
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xticks(range(len(shapes)), shapes, fontsize=8)
        axis.set_title(f"{name}: predicted, not measured", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("predicted time / floor")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="*", choices=("tube", "hierarchical"), default=["tube", "hierarchical"])
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--arch", nargs="*", type=int, choices=sorted(replay.GPUS), default=sorted(replay.GPUS))
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA C++ kernels out (they need nvcc and g++)")
    parser.add_argument("--write", action="store_true", help="renew docs/kernels.md, its plot and baseline.json")
    args = parser.parse_args()
    if args.write and (set(args.op), set(args.shape), set(args.arch)) != (
        {"tube", "hierarchical"},
        set(SHAPES),
        set(replay.GPUS),
    ):
        parser.error("--write renews all tables: leave --op, --shape and --arch out")

    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    passes, kernels = report.rows(report.shipped(args.op, args.shape, args.arch), say)
    if reason := "asked for" if args.no_cuda else cuda.missing():
        say(f"CUDA C++ kernels left out: {reason}")
    elif "hierarchical" in args.op:
        more = cuda.rows(report.shipped(["hierarchical"], args.shape, args.arch), say)
        passes, kernels = passes + more[0], kernels + more[1]
    used = versions()
    if args.write:
        report.save(passes, kernels, used)
        kept = report.baseline()  # rounded: what the test compares the page with
        made = tables(kept["passes"], kept["kernels"], used)
        PAGE.write_text(renew(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
        plot(passes, DOCS / "kernels.png")
    else:
        print("\n\n".join(f"{name}\n{text}" for name, text in tables(passes, kernels, used).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
