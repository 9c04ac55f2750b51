"""The rows of a run: as JSON, as tables for a terminal or for Markdown, and the goals they are held against.

    python -m benchmarks.results FILE.json    prints the tables of a run as Markdown, for the documentation

A row is a plain dictionary, so that what reads the file needs nothing of this package:

    group, op, passes, shape, name, ours    which table, which implementation
    status, reason                          "timed"; "absent" or "red" (it disagrees), with the reason
    us: {median, p20, p80}, rounds          time; host_us: what Python takes to queue it (GPU)
    floor_us, x_floor                       the floor of this run, and how many times it the median is
    best_peer, x_best_peer                  the fastest that is not ours, and the median over its median
    peak_bytes, x_tensors                   memory added at the peak; all that lives over inputs, output and gradients
    launches                                kernels, copies and fills (GPU)
    clips_per_s                             of a training step
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from .goals import goals
from .machine import title as machine_title
from .measure import Outcome, percentile

VERSION = 1


class Results:
    """What one run measured."""

    def __init__(self, machine: dict | None = None) -> None:
        self.machine = machine or {}
        self.rates: dict = {}
        self.rows: list[dict] = []

    def add(self, outcomes: list[Outcome], *, floor_seconds: float | None, **of) -> None:
        """All rows of one table, so that each is beside its best peer. `of` goes into each: group, op, passes, shape."""
        clips, tensors = of.pop("clips", None), of.pop("tensors", None)
        medians = {o.name: percentile(o.seconds, 0.5) for o in outcomes if o.seconds}
        best = min((o.name for o in outcomes if o.name in medians and not o.ours), key=medians.get, default=None)
        for o in outcomes:
            row = {**of, "name": o.name, "ours": o.ours, "status": o.status, "reason": o.reason}
            if o.name in medians:
                median = medians[o.name]
                times = {"median": median, "p20": percentile(o.seconds, 0.2), "p80": percentile(o.seconds, 0.8)}
                row["us"] = {name: round(value * 1e6, 2) for name, value in times.items()}
                row["rounds"] = len(o.seconds)
                row["host_us"] = None if o.host_seconds is None else round(o.host_seconds * 1e6, 2)
                row["floor_us"] = None if floor_seconds is None else round(floor_seconds * 1e6, 2)
                row["x_floor"] = None if floor_seconds is None else round(median / floor_seconds, 3)
                row["best_peer"] = best
                row["x_best_peer"] = None if best is None else round(median / medians[best], 3)
                row["peak_bytes"], row["launches"] = o.peak_bytes, o.launches
                row["x_tensors"] = None if tensors is None else round(tensors(o.peak_bytes), 3)
                row["clips_per_s"] = None if clips is None else round(clips / median, 2)
            self.rows.append(row)

    def to_json(self) -> dict:
        return {"version": VERSION, **self.machine, "rates": self.rates, "goals": goals(self), "rows": self.rows}

    def write(self, path: Path) -> None:
        """Whole or not at all: a run may be ended at any moment."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises: ValueError for a file of another version."""
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("version") != VERSION:
            raise ValueError(f"{path} has version {data.get('version')!r}; this reads {VERSION}. Run the benchmarks again")
        results = cls({key: data[key] for key in data if key not in ("version", "rates", "goals", "rows")})
        results.rates, results.rows = data["rates"], data["rows"]
        return results

    def timed(self) -> dict[str, list[dict]]:
        """Title -> timed rows, fastest first, in the order of the run; what grows over T or B is one table."""
        grouped = defaultdict(list)
        for row in self.rows:
            if row["status"] == "timed" and row.get("us"):
                grouped[title(row)].append(row)
        return {name: sorted(rows, key=lambda row: row["us"]["median"]) for name, rows in grouped.items()}

    def not_timed(self) -> list[str]:
        """One line for each implementation and reason, with where it holds."""
        where, everywhere = defaultdict(set), defaultdict(set)
        for row in self.rows:
            everywhere[row["op"], row["name"]].add(title(row))
            if row["status"] != "timed":
                where[row["op"], row["name"], row["status"], row["reason"]].add(title(row))
        lines = []
        for (op, name, status, reason), titles in where.items():
            scope = "" if titles == everywhere[op, name] else f" ({_some(sorted(titles))})"
            lines.append(f"{op}, {name}: {'WRONG: ' if status == 'red' else ''}{reason}{scope}")
        return lines


def _some(titles: list[str]) -> str:
    return titles[0] if len(titles) == 1 else f"{len(titles)} tables"


def title(row: dict) -> str:
    shape, growth = row["shape"], row["group"].removeprefix("growth with ")
    if row["group"] == "step":
        return f"training step of the vision tower: {shape['name']} B={shape['B']}, {shape['dtype']}"
    what = f"{row['op']} attention, {'forward and backward' if '+' in row['passes'] else 'forward'}"
    name = shape["name"].split(" ")[0] if growth == "T" else shape["name"]
    sizes = "".join(f" {key}={shape[key]}" for key in ("B", "H", "D") if key != growth)
    return f"{what}{f' over {growth}' * (growth != row['group'])}: {name}{sizes}, {shape['dtype']}"


def as_text(name: str, rows: list[dict]) -> tuple[str, list[list[str]]]:
    """One table: its heading, and its cells with the headers first. What was not counted stays empty."""
    unit = "us" if min(row["us"]["median"] for row in rows) < 1000 else "ms"
    if rows[0]["group"].startswith("growth"):
        return f"{name}; median in {unit} (times the floor)", _growth(rows, rows[0]["group"][-1], unit)
    last = "clips/s" if rows[0]["group"] == "step" else "/ tensors"
    texts = [["", "median", "p20", "p80", "x floor", "x best peer", "peak MiB", last, "launches"]]
    for row in rows:
        times = [_time(row["us"][key], unit) for key in ("median", "p20", "p80")]
        ratios = [_number(row["x_floor"], 2), _number(row["x_best_peer"], 2), _number(row["peak_bytes"] / 2**20, 1)]
        per = _number(row["clips_per_s"], 1) if last == "clips/s" else _number(row["x_tensors"], 2)
        texts.append([_name(row), *times, *ratios, per, "" if row["launches"] is None else str(row["launches"])])
    floor = "" if rows[0]["floor_us"] is None else f", floor {_time(rows[0]['floor_us'], unit)}"
    return f"{name}; times in {unit}{floor}", texts


def _growth(rows: list[dict], axis: str, unit: str) -> list[list[str]]:
    """A column for each T or B, a line for each implementation."""
    sizes = sorted({row["shape"][axis] for row in rows})
    texts = [["", *(f"{axis}={size}" for size in sizes)]]
    for name in dict.fromkeys(_name(row) for row in rows):
        at = {row["shape"][axis]: row for row in rows if _name(row) == name}
        cells = (f"{_time(at[s]['us']['median'], unit)} ({_number(at[s]['x_floor'], 1)})" if s in at else "" for s in sizes)
        texts.append([name, *cells])
    return texts


def _name(row: dict) -> str:
    return f"VidLA {row['name']}" if row["ours"] else row["name"]


def _time(us: float, unit: str) -> str:
    return f"{us / 1e3:,.2f}" if unit == "ms" else f"{us:,.1f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def terminal(results: Results) -> list[str]:
    """Everything, aligned for a terminal."""
    lines = rates_in_words(results)
    for name, rows in results.timed().items():
        heading, texts = as_text(name, rows)
        widths = [max(len(text[i]) for text in texts) for i in range(len(texts[0]))]
        lines += ["", heading]
        for text in texts:
            aligned = [text[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(text[1:], widths[1:], strict=True)]
            lines.append(("  " + "  ".join(aligned)).rstrip())
    held = goals(results)
    if held:
        width = max(len(goal["what"]) for goal in held)
        lines += ["", "held against the goals"]
        lines += [f"  {g['what'].ljust(width)}  {in_words(g)}" for g in held]
    absent = results.not_timed()
    return lines + ([""] + ["not timed"] + [f"  {line}" for line in absent] if absent else [])


def rates_in_words(results: Results) -> list[str]:
    rates = results.rates
    if not rates:
        return []
    lines = [
        f"copy {rates['copy_bytes_per_s'] / 1e9:,.1f} GB/s (read + write), matmul {rates['matmul_flops_per_s'] / 1e12:,.2f} "
        f"TFLOP/s ({rates['matmul_of']})" + "".join(f", {name} {value}" for name, value in rates["clocks"].items())
    ]
    if rates.get("load_average") is not None and rates["load_average"] > 1.5 * results.machine["device"].get("cores", 1e9):
        lines.append(f"THIS MACHINE WAS BUSY (load {rates['load_average']}): its times say little")
    lines.append("x floor: median over the least time in which the bytes (of a step: the products) fit at these rates")
    lines.append("x best peer: median over that of the fastest that is not ours")
    lines.append("/ tensors: all memory at the peak over inputs, output and gradients together")
    if results.machine.get("device", {}).get("kind") != "cuda":
        lines.append("launches: counted on a GPU only")
    return lines


def in_words(goal: dict) -> str:
    by = f" ({goal['by']})" if goal["by"] else ""
    measured = "not measured" if goal["measured"] is None else f"{goal['measured']:5.2f}{by}"
    if goal["goal"] is None:
        return measured
    verdict = {None: "", True: ": met", False: ": NOT met"}[goal["met"]]
    return f"{measured}, goal {goal['sign']} {goal['goal']:g}{verdict}"


def markdown(results: Results) -> list[str]:
    """The tables as Markdown."""
    lines = []
    for name, rows in results.timed().items():
        heading, (head, *texts) = as_text(name, rows)
        lines += ["", f"**{heading}**", "", _line(head), "|---" + "|---:" * (len(head) - 1) + "|", *map(_line, texts)]
    if absent := results.not_timed():
        lines += ["", "Not timed:", "", *(f"- {line}" for line in absent)]
    return lines


def goals_markdown(held: list[dict]) -> list[str]:
    if not held:
        return []
    lines = ["| | measured | by | goal | |", "|---|---:|---|---:|---|"]
    for goal in held:
        measured = "" if goal["measured"] is None else f"{goal['measured']:.2f}"
        verdict = "not measured" if not measured else {None: "", True: "met", False: "**not met**"}[goal["met"]]
        aim = "" if goal["goal"] is None else f"{goal['sign']} {goal['goal']:g}"
        lines.append(_line([goal["what"], measured, goal["by"] or "", aim, verdict]))
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of a run of the benchmarks as Markdown.")
    parser.add_argument("file", type=Path, help="JSON file of a run")
    options = parser.parse_args()
    try:
        results = Results.read(options.file)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{options.file} cannot be read: {error}\n")
    rates = (f"- {line}" for line in rates_in_words(results))
    print("\n".join([machine_title(results.machine), "", *rates, "", *goals_markdown(goals(results)), *markdown(results)]))


if __name__ == "__main__":
    main()
