"""Drawings of a results file: bars for each shape, lines over T and B with the floor.

    python -m benchmarks.plot FILE.json [--out FOLDER]

Reads nothing but the file. Needs matplotlib (pip install matplotlib). Prints the paths of what it wrote: for each op and pass
FILE-OP-PASS.png, then FILE-growth.png and FILE-step.png, as far as the file has such rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .machine import title as machine_title
from .results import Results
from .shapes import OPS, PASSES

OURS = ("#c8553d", "#e59560", "#8f2d56", "#f2b134")  # warm; peers are cool
PEERS = ("#26547c", "#5b8db8", "#2a9d8f", "#7d8ca3", "#9a8fbf", "#3f6c51", "#88b7b5", "#4f5d75", "#a3b18a", "#6d597a")
COLUMNS = 3


def draw(results: Results, stem: Path) -> list[Path]:
    """Every drawing that the rows allow, as files that begin with `stem`.

    Raises: ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    written = []
    rows = [row for row in results.rows if row["status"] == "timed" and row.get("us")]
    colors = {op: _colors(rows, op) for op in (*OPS, "step")}
    for op in OPS:
        for passes, words in PASSES.items():
            mine = [row for row in rows if (row["group"], row["op"], row["passes"]) == ("attention", op, passes)]
            if mine:
                heading = f"{op.capitalize()} attention, {words}"
                written.append(_bars(mine, heading, results, colors[op], _file(stem, op, passes.replace("+", "-"))))
    growth = [row for row in rows if row["group"].startswith("growth")]
    if growth:
        written.append(_growth(growth, results, colors, _file(stem, "growth")))
    step = [row for row in rows if row["group"] == "step"]
    if step:
        heading = "Training step of the vision tower (forward, backward, AdamW)"
        written.append(_bars(step, heading, results, colors["step"], _file(stem, "step")))
    return written


def _file(stem: Path, *parts: str) -> Path:
    return stem.with_name("-".join([stem.name, *parts]) + ".png")


def _colors(rows: list[dict], op: str) -> dict[str, str]:
    """One colour for each name of an op; names that both attentions have come first, and so look the same in both."""
    ours, peers = {}, {}
    for row in sorted(rows, key=lambda row: -len({other["op"] for other in rows if other["name"] == row["name"]})):
        if row["op"] == op:
            (ours if row["ours"] else peers).setdefault(row["name"], None)
    chosen = {name: OURS[i % len(OURS)] for i, name in enumerate(ours)}
    return chosen | {name: PEERS[i % len(PEERS)] for i, name in enumerate(peers)}


def _bars(rows: list[dict], heading: str, results: Results, colors: dict[str, str], path: Path) -> Path:
    """One panel for each shape: a bar for each implementation, fastest on top, and the floor as a line."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    columns = min(COLUMNS, len(shapes))
    lines = -(-len(shapes) // columns)
    most = max(sum(_shape(row) == shape for row in rows) for shape in shapes)
    figure = Figure(figsize=(max(7.5, 4.8 * columns), lines * (0.32 * most + 1.1) + 0.8), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(shapes) :]:
        panel.axis("off")
    for panel, shape in zip(panels, shapes, strict=False):
        mine = sorted((row for row in rows if _shape(row) == shape), key=lambda row: -row["us"]["median"])
        scale, unit = (1e3, "ms") if min(row["us"]["median"] for row in mine) >= 1000 else (1, "us")
        medians = [row["us"]["median"] / scale for row in mine]
        spread = [[(row["us"]["median"] - row["us"]["p20"]) / scale for row in mine]]
        spread.append([(row["us"]["p80"] - row["us"]["median"]) / scale for row in mine])
        panel.barh(range(len(mine)), medians, color=[colors[row["name"]] for row in mine], height=0.72)
        panel.errorbar(medians, range(len(mine)), xerr=spread, fmt="none", ecolor="#222", elinewidth=0.8, capsize=2)
        for i, row in enumerate(mine):
            value = f" {medians[i]:,.1f}" if medians[i] < 100 else f" {medians[i]:,.0f}"
            panel.text(row["us"]["p80"] / scale, i, value, va="center", fontsize=7)
        names = [f"VidLA {row['name']}" if row["ours"] else row["name"] for row in mine]
        panel.set_yticks(range(len(mine)), names, fontsize=7)
        for label, row in zip(panel.get_yticklabels(), mine, strict=True):
            label.set_fontweight("bold" if row["ours"] else "normal")
        if mine[0]["floor_us"]:
            floor = mine[0]["floor_us"] / scale
            panel.axvline(floor, color="#222", linestyle=":", linewidth=1.2)
            panel.annotate("floor", (floor, 1.0), xycoords=("data", "axes fraction"), fontsize=7, ha="center", va="bottom")
        panel.set_xscale("log")
        _plain(panel.xaxis)
        panel.set_xlim(right=1.9 * max(row["us"]["p80"] for row in mine) / scale)
        panel.set_title(shape, fontsize=9, pad=12)
        panel.set_xlabel(f"median and 20th to 80th percentile, {unit}", fontsize=7)
        _quiet(panel)
    return _save(figure, heading, results, path)


def _growth(rows: list[dict], results: Results, colors: dict[str, dict[str, str]], path: Path) -> Path:
    """Time over T and over B, for each op, with the floor."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(row["group"] for row in rows))
    ops = [op for op in OPS if any(row["op"] == op for row in rows)]
    figure = Figure(figsize=(5.6 * len(groups), 4.1 * len(ops) + 0.6), layout="constrained")
    panels = figure.subplots(len(ops), len(groups), squeeze=False)
    for line, op in zip(panels, ops, strict=True):
        for panel, group in zip(line, groups, strict=True):
            mine = [row for row in rows if row["op"] == op and row["group"] == group]
            axis = group[-1]  # T or B
            for name in dict.fromkeys(row["name"] for row in mine):
                points = sorted(
                    (row["shape"][axis], row["us"]["median"] / 1e3, row["ours"]) for row in mine if row["name"] == name
                )
                ours = points[0][2]
                label = f"VidLA {name}" if ours else name
                panel.plot(
                    *zip(*(p[:2] for p in points), strict=True),
                    "o-",
                    label=label,
                    color=colors[op][name],
                    lw=2.4 if ours else 1.3,
                )
            floor = sorted({(row["shape"][axis], row["floor_us"] / 1e3) for row in mine})
            panel.plot(*zip(*floor, strict=True), ":", color="#222", label="floor")
            ticks = sorted({row["shape"][axis] for row in mine})
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            _plain(panel.yaxis)
            shape = mine[0]["shape"]
            tower = shape["name"].split(" ")[0]
            fixed = f"B={shape['B']}" if axis == "T" else f"T={shape['T']}"
            panel.set_title(f"{op} attention, {tower}, {fixed}", fontsize=9)
            panel.set_xlabel("frames T" if axis == "T" else "clips B", fontsize=8)
            panel.set_ylabel("forward and backward, ms", fontsize=8)
            panel.legend(fontsize=7, frameon=False)
            _quiet(panel)
    return _save(figure, "Growth with the number of frames and of clips", results, path)


def _shape(row: dict) -> str:
    shape = row["shape"]
    return f"{shape['name']}, B={shape['B']}, {shape['dtype']}"


def _plain(axis) -> None:
    """10 and 100 in place of powers, and no number between them."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _quiet(panel) -> None:
    panel.grid(axis="both", color="#ddd", linewidth=0.5)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=7)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _save(figure, heading: str, results: Results, path: Path) -> Path:
    figure.suptitle(heading, fontsize=11)
    figure.supxlabel(machine_title(results.machine), fontsize=7, color="#555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON file of a run of the benchmarks")
    parser.add_argument("--out", type=Path, help="folder for the drawings (default: beside the file)")
    options = parser.parse_args()
    try:
        results = Results.read(options.file)
        written = draw(results, (options.out or options.file.parent) / options.file.stem)
    except ModuleNotFoundError as error:
        parser.exit(1, f"no drawings: {error} (pip install matplotlib)\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{options.file} cannot be drawn: {error}\n")
    print("\n".join(map(str, written)) or f"{options.file} has no timed rows, so there is nothing to draw")


if __name__ == "__main__":
    main()
