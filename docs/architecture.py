"""Draw docs/architecture.png: the way of a batch through the code.

python docs/architecture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file only, no window

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

INK, GREY = "#1f2933", "#7b8794"
COLOURS = {"data": "#dcebf7", "model": "#fde8cf", "vidla_kernels": "#f9d5d3", "run": "#dff0dc"}  # background by kind

WIDTH, HEIGHT = 3.4, 1.45
COLUMNS = (0.2, 5.1, 10.0, 14.9)  # left edges

# name: (column, bottom, kind, title, lines below it)
BOXES = {
    "layout": (1, 6.6, "vidla_kernels", "layout.py", ["TokenLayout", "token order, who sees whom"]),
    "ops": (2, 6.6, "vidla_kernels", "vidla_kernels/ops.py", ["tube_attention", "hierarchical_attention"]),
    "triton": (3, 7.45, "vidla_kernels", "triton_*.py, tiles.py", ["forward, backward", "on NVIDIA GPUs"]),
    "portable": (3, 5.75, "vidla_kernels", "portable.py", ["the same in torch", "on CPUs and other devices"]),
    "shards": (0, 4.35, "data", "shards.py", ["ShardSet", "any clip, by offset and size"]),
    "sampling": (0, 2.35, "data", "sampling.py", ["global_batch, choose_view", "f(seed, epoch, index)"]),
    "loader": (1, 3.35, "data", "loader.py", ["ClipLoader", "this rank's Batch"]),
    "video": (2, 4.35, "model", "video.py", ["VideoTower", "(B, T, 3, h, w) to (B, E)"]),
    "text": (2, 2.35, "model", "text.py", ["TextTower", "(B, L) to (B, E)"]),
    "loss": (3, 3.35, "run", "loss.py", ["contrastive_loss", "equation 3 over all ranks"]),
    "step": (3, 0.3, "run", "train.py, optim.py", ["backward, clip, AdamW", "the same loop on every rank"]),
    "retrieval": (2, 0.3, "run", "retrieval.py", ["evaluate", "metrics.py: recall, ranks"]),
    "log": (1, 0.3, "run", "progress.py", ["RunLog", "log.jsonl, TensorBoard"]),
    "checkpoint": (0, 0.3, "run", "checkpoint.py", ["save, latest, load", "weights, optimiser, step"]),
}

# (from, side, to, side, label): a side is left, right, top or bottom
ARROWS = [
    ("shards", "right", "loader", "left", "clips"),
    ("sampling", "right", "loader", "left", "which, what"),
    ("loader", "right", "video", "left", "pixels"),
    ("loader", "right", "text", "left", "tokens"),
    ("video", "right", "loss", "left", "video"),
    ("text", "right", "loss", "left", "texts"),
    ("video", "top", "ops", "bottom", "packed q, k, v"),
    ("layout", "right", "ops", "left", "the rule"),
    ("ops", "right", "triton", "left", ""),
    ("ops", "right", "portable", "left", "backends.py"),
    ("loss", "bottom", "step", "top", "gradients"),
    ("step", "left", "retrieval", "right", "last step"),
    ("retrieval", "left", "log", "right", "metrics"),
    ("log", "left", "checkpoint", "right", "every n-th"),
]


def anchor(name: str, side: str) -> tuple[float, float]:
    """The middle of a box's side."""
    left, bottom = COLUMNS[BOXES[name][0]], BOXES[name][1]
    x = {"left": left, "right": left + WIDTH}.get(side, left + WIDTH / 2)
    y = {"bottom": bottom, "top": bottom + HEIGHT}.get(side, bottom + HEIGHT / 2)
    return x, y


def draw() -> plt.Figure:
    figure, axes = plt.subplots(figsize=(14, 7))
    axes.set(xlim=(0, 18.5), ylim=(0.1, 9), aspect="equal")
    axes.axis("off")
    for column, bottom, kind, title, lines in BOXES.values():
        corner, style = (COLUMNS[column], bottom), "round,pad=0,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, style, fc=COLOURS[kind], ec=INK, lw=1))
        middle, top = COLUMNS[column] + WIDTH / 2, bottom + HEIGHT
        axes.text(middle, top - 0.36, title, ha="center", va="center", size=10.5, weight="bold", color=INK)
        for row, line in enumerate(lines):
            axes.text(middle, top - 0.74 - 0.36 * row, line, ha="center", va="center", size=9, color=INK)
    for source, start, target, end, label in ARROWS:
        (x0, y0), (x1, y1) = anchor(source, start), anchor(target, end)
        axes.annotate("", (x1, y1), (x0, y0), arrowprops=dict(arrowstyle="-|>", color=GREY, lw=1.4, shrinkA=1, shrinkB=1))
        if label:
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            axes.text(x, y, label, ha="center", va="center", size=8, color=INK, bbox=dict(fc="white", ec="none", pad=1))
    for x, y, kind in ((0.3, 8.1, "data"), (1.6, 8.1, "model"), (3.1, 8.1, "run"), (0.3, 7.6, "vidla_kernels")):
        axes.add_patch(FancyBboxPatch((x, y), 0.3, 0.26, "round,pad=0,rounding_size=0.05", fc=COLOURS[kind], ec=INK, lw=0.8))
        axes.text(x + 0.42, y + 0.13, kind, va="center", size=9.5, color=INK)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=110, bbox_inches="tight", metadata={"Software": None})
