"""The default recipe over several seeds, beside the same run with one frame, and with hierarchy and tube attention off.

    python -m benchmarks.default_run OUT [--seeds 0 1 2] [--variants full ...]

Each run is `python -m vidla.train` with the variant's options; finished runs found in OUT are not repeated. Writes
OUT/results.json and prints the Markdown table of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

VARIANTS = {
    "full": ("the default", ()),
    "no-hierarchy": ("no MST, no tube attention", ("--model.levels", "0", "--model.tube", "False")),
    "one-frame": ("one frame", ("--model.frames", "1")),
}
FINAL = re.compile(r"final: step=(\d+) loss=(\S+) t2v_R@1=(\S+) v2t_R@1=(\S+) chance=(\S+)")


def run(out: Path, variant: str, seed: int) -> dict:
    """One training run: its final line as numbers, and its wall time with start-up and evaluation."""
    folder = out / f"{variant}-{seed}"
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    command = [sys.executable, "-m", "vidla.train", "--output", str(folder), "--seed", str(seed), "--resume", "never"]
    began = time.monotonic()
    done = subprocess.run([*command, *VARIANTS[variant][1]], stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - began
    step, loss, t2v, v2t, chance = (float(x) for x in FINAL.search(done.stdout).groups())
    row = {"variant": variant, "seed": seed, "step": step, "loss": loss, "t2v": t2v, "v2t": v2t, "chance": chance}
    row |= {"seconds": round(seconds, 1), "threads": torch.get_num_threads()}
    result.write_text(json.dumps(row))
    return row


def table(rows: list[dict]) -> str:
    """A Markdown row for each variant: mean and every seed's R@1, and how many times chance."""
    lines = ["| variant | t2v R@1, mean (each seed) | times chance | v2t R@1 | loss |", "|---|---|---|---|---|"]
    for variant, (words, _) in VARIANTS.items():
        mine = [row for row in rows if row["variant"] == variant]
        if not mine:
            continue
        t2v, v2t, loss = ([row[key] for row in mine] for key in ("t2v", "v2t", "loss"))
        each = ", ".join(f"{x:.3f}" for x in t2v)
        lines.append(
            f"| {words} | {statistics.mean(t2v):.3f} ({each}) | {statistics.mean(t2v) / mine[0]['chance']:.0f} "
            f"| {statistics.mean(v2t):.3f} | {statistics.mean(loss):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the runs and results.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each variant for each seed")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="which runs")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        for variant in options.variants:
            rows.append(run(options.out, variant, seed))
            print(rows[-1], file=sys.stderr, flush=True)
    machine = {"machine": platform.machine(), "torch": torch.__version__, "python": platform.python_version()}
    (options.out / "results.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
