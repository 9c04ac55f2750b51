"""Draw who sees whom, from `TokenLayout` itself: writes the three PNGs of docs/attention.md beside this file.

    python docs/draw_mask.py [FOLDER]

mask-toy.png   every query and key of the paper's Figure 3: tube attention, hierarchical attention
mask-b32.png   hierarchical attention of B/32 at T=12, one pixel a pair
tiles.png      one frame's part of B/16's mask, and how the hierarchical forward's tiles lie over it
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from vidla_kernels import TokenLayout, tiles, triton_hierarchical

TOY = TokenLayout(frames=4, patches=4, levels=2, tokens_per_level=1, temporal_scale=2)  # the paper's Figure 3
B32, B16 = TokenLayout(frames=12, patches=49), TokenLayout(frames=12, patches=196)

# What a visible pair is: its colour, and its name in the legend. The order is that of `kinds`' numbers, from 1.
KINDS = {
    "CLS row: sees everything": "#d1495b",
    "MST row, MST keys": "#c77d0a",
    "MST row, patches of every r^u-th frame": "#edae49",
    "patch row, MST keys": "#66a182",
    "patch row, patches of its frame": "#2e6fa7",
    "tube attention: its place in every frame": "#7b5ea7",
}
COLOURS = ListedColormap(["#ffffff", *KINDS.values()])
INK, GREY = "#222222", "#9a9a9a"

plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "savefig.dpi": 160, "text.color": INK})


def kinds(layout: TokenLayout) -> torch.Tensor:
    """(S, S) integers: 0 where `layout.mask()` hides the pair, else the number of its kind."""
    position = torch.arange(layout.seq_len)
    q_patch, k_patch = position[:, None] >= layout.num_summary, position[None] >= layout.num_summary
    kind = torch.where(q_patch, torch.where(k_patch, 5, 4), torch.where(k_patch, 3, 2))
    kind[0] = 1
    return kind * layout.mask()


def labels(layout: TokenLayout, summary: bool) -> list[str]:
    """A name for every token: CLS, MST level.token, f(rame) p(atch)."""
    mst = [f"MST{u}" for u in range(layout.levels) for _ in range(layout.tokens_per_level)]
    patches = [f"f{t}p{n}" for t in range(layout.frames) for n in range(layout.patches)]
    return ["CLS", *mst, *patches] if summary else patches


def legend(figure: plt.Figure, which: list[int], y: float, columns: int) -> None:
    names = list(KINDS)
    handles = [Patch(facecolor=KINDS[names[i - 1]], label=names[i - 1]) for i in which]
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, y), ncol=columns, frameon=False, fontsize=10)


def grid(axes: plt.Axes, cells: torch.Tensor, names: list[str], borders: list[int], title: str) -> None:
    """Every pair a cell, every row and column with its name, heavier lines at the borders."""
    axes.imshow(cells, cmap=COLOURS, vmin=0, vmax=len(KINDS), interpolation="nearest")
    size = len(names)
    for edge in range(size + 1):
        style = {"color": INK, "linewidth": 1.2} if edge in borders else {"color": "#dddddd", "linewidth": 0.5}
        axes.axhline(edge - 0.5, **style)
        axes.axvline(edge - 0.5, **style)
    axes.set_xticks(range(size), names, rotation=90, fontsize=11, family="DejaVu Sans Mono")
    axes.set_yticks(range(size), names, fontsize=11, family="DejaVu Sans Mono")
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set_anchor("N")
    axes.set_ylabel("query", fontsize=11)
    axes.set_title(title, fontsize=12, pad=10)
    axes.set_xlabel("key", fontsize=11)
    axes.xaxis.set_label_position("bottom")
    for side in axes.spines.values():
        side.set_visible(False)


def draw_toy(path: Path) -> None:
    T, N, G = TOY.frames, TOY.patches, TOY.num_summary
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6.8), width_ratios=[T * N, TOY.seq_len])
    tube = TOY.tube_mask() * len(KINDS)
    grid(left, tube, labels(TOY, summary=False), list(range(0, T * N + 1, N)), "Tube attention (patches only)")
    borders = [0, 1, *range(G, TOY.seq_len + 1, N)]
    grid(right, kinds(TOY), labels(TOY, summary=True), borders, "Hierarchical attention (all tokens)")
    figure.suptitle("Figure 3 of the paper: N=4 patches, T=4 frames, U=2 levels of V=1 MST, temporal scale r=2", fontsize=12.5)
    legend(figure, [6, 1, 2, 3, 4, 5], 0.005, 3)
    figure.subplots_adjust(left=0.075, right=0.995, top=0.81, bottom=0.13, wspace=0.2)
    figure.savefig(path)


def draw_b32(path: Path) -> None:
    layout, G, N = B32, B32.num_summary, B32.patches
    figure, (whole, rows) = plt.subplots(2, 1, figsize=(8, 10.8), height_ratios=[7.2, 1.5])
    cells = kinds(layout)
    whole.imshow(cells, cmap=COLOURS, vmin=0, vmax=len(KINDS), interpolation="nearest")
    middles = [G + t * N + N / 2 for t in range(layout.frames)]
    names = [f"frame {t}" for t in range(layout.frames)]
    whole.set_yticks([G / 2, *middles], ["CLS, MST", *names], fontsize=10)
    whole.set_xticks(middles, [str(t) for t in range(layout.frames)], fontsize=10)
    whole.set_xlabel("key: patches of frame", fontsize=11)
    whole.set_ylabel("query", fontsize=11)
    share = layout.visible_pairs / layout.seq_len**2
    whole.set_title(
        f"B/32 at T={layout.frames}: {layout.seq_len} tokens, {layout.visible_pairs:,} of {layout.seq_len**2:,} pairs "
        f"visible ({share:.1%})",
        fontsize=12,
    )

    rows.imshow(cells[:G], cmap=COLOURS, vmin=0, vmax=len(KINDS), interpolation="nearest", aspect="auto")
    V = layout.tokens_per_level
    levels = range(layout.levels)
    rows.set_yticks([0, *(1 + u * V + (V - 1) / 2 for u in levels)], ["CLS", *(f"MST level {u}" for u in levels)])
    for edge in (1, *(1 + u * V for u in range(1, layout.levels))):
        rows.axhline(edge - 0.5, color=INK, linewidth=0.8)
    rows.set_xticks(middles, [str(t) for t in range(layout.frames)], fontsize=10)
    rows.set_title(f"its first {G} rows, enlarged: level u sees every {layout.temporal_scale}^u-th frame", fontsize=12)
    for axes in (whole, rows):
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    legend(figure, [1, 2, 3, 4, 5], 0.005, 2)
    figure.subplots_adjust(left=0.14, right=0.97, top=0.965, bottom=0.125, hspace=0.17)
    figure.savefig(path)


def draw_tiles(path: Path) -> None:
    """Frame 1 of B/16: rows are its patches and the summary rows, columns its patches and the summary keys patches see."""
    frame, N, G, first = 1, B16.patches, B16.num_summary, B16.first_key_of_patches
    tile = tiles.TABLE["hier_forward_resident", 90, "half", 64][0]
    edges = triton_hierarchical._resident_tiles(tile, N, G, N + G - first)
    own = torch.arange(N) + G + frame * N
    query, key = torch.cat([own, torch.arange(G)]), torch.cat([own, torch.arange(first, G)])
    cells = kinds(B16)[query][:, key]
    cells[N:, N:] = 0  # summary rows by summary keys belong to no frame

    figure, axes = plt.subplots(figsize=(8, 7.8))
    axes.imshow(cells, cmap=COLOURS, vmin=0, vmax=len(KINDS), interpolation="nearest", alpha=0.75)
    corner = {"facecolor": "none", "edgecolor": GREY, "hatch": "////", "linewidth": 0}
    axes.add_patch(Rectangle((N - 0.5, N - 0.5), G - first, G, **corner))

    rows = [min(edge, len(query)) for edge in edges["ROWS"]]
    columns = [min(edge, len(key)) for edge in edges["KEYS"]]
    for edge in rows:
        axes.plot([-0.5, len(key) - 0.5], [edge - 0.5] * 2, color=INK, linewidth=2)
    for edge in columns:
        axes.plot([edge - 0.5] * 2, [-0.5, len(query) - 0.5], color=INK, linewidth=2 if edge in (0, columns[-1]) else 0.9)
    above = {"ha": "center", "va": "bottom", "fontsize": 10.5}
    for left, right in itertools.pairwise(columns[:-1]):
        axes.text((left + right) / 2, -3, f"{right - left} keys:\nno mask", **above)
    axes.text((columns[-2] + columns[-1]) / 2, -3, "tail:\nmasked", **above)
    for i, (top, bottom) in enumerate(itertools.pairwise(rows)):
        axes.text(len(key) + 2, (top + bottom) / 2, f"tile {i}", va="center", fontsize=10.5)
    axes.set_yticks([N / 2, N + G / 2], [f"{N} patch rows\nof frame {frame}", f"{G} summary\nrows"], fontsize=10.5)
    axes.set_xticks([N / 2, N + (G - first) / 2], [f"{N} patch keys of frame {frame}", f"{G - first} MST\nkeys"], fontsize=10.5)
    axes.tick_params(length=0)
    axes.set_xlim(-2, len(key) + 1)
    axes.set_ylim(len(query) + 1, -2)
    for side in axes.spines.values():
        side.set_visible(False)
    sizes = " + ".join(str(right - left) for left, right in itertools.pairwise(edges["KEYS"]))
    title = f"One frame of B/16, one program of the forward: tiles of {tile.rows} rows x {sizes} keys"
    figure.suptitle(title, fontsize=12, y=0.975)
    names = ["CLS row", "MST rows of levels that see the frame", "patch rows, MST keys", "patch rows, own patches"]
    colours = [list(KINDS.values())[i] for i in (0, 2, 3, 4)]
    handles = [Patch(facecolor=c, alpha=0.75, label=n) for c, n in zip(colours, names, strict=True)]
    handles.append(Patch(facecolor="white", edgecolor=GREY, label="MST rows of levels that skip it: read by nobody"))
    handles.append(Patch(**corner, label="summary by summary: the combine kernel's"))
    figure.legend(handles=handles, loc="lower center", ncol=2, frameon=False, fontsize=10)
    figure.subplots_adjust(left=0.16, right=0.88, top=0.88, bottom=0.19)
    figure.savefig(path)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, draw in (("mask-toy", draw_toy), ("mask-b32", draw_b32), ("tiles", draw_tiles)):
        draw(folder / f"{name}.png")
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
