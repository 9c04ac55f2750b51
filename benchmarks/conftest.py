"""One table for each group at the end of the run: time, ratio to the reference, peak memory, distance from the floor."""

from __future__ import annotations

import platform
from collections import defaultdict

import pytest
import torch

from .floor import copy_bandwidth


class Table:
    """Rows of all benchmarks, printed after pytest's own summary."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        self.notes: dict[str, None] = {}
        self.bandwidth: float | None = None

    def add(self, group: str, name: str, **row: float) -> None:
        self.groups[group][name] = row

    def note(self, text: str) -> None:
        self.notes[text] = None

    def lines(self) -> list[str]:
        lines = []
        for group, rows in self.groups.items():
            slowest = rows.get("reference", {}).get("us")
            last = "x floor" if any("x_floor" in row for row in rows.values()) else "clips/s"
            lines += ["", group, f"  {'':<20}{'median us':>12}{'vs reference':>14}{'peak MiB':>11}{last:>10}"]
            for name, row in sorted(rows.items(), key=lambda item: item[1]["us"]):
                faster = f"{slowest / row['us']:.2f}x" if slowest else ""
                tail = row.get("x_floor", row.get("clips_per_s"))
                lines.append(f"  {name:<20}{row['us']:>12,.0f}{faster:>14}{row['peak_MiB']:>11,.1f}{tail:>10,.1f}")
        return lines + [""] * bool(self.notes) + [f"no row: {note}" for note in self.notes]


TABLE = Table()


@pytest.fixture(scope="session")
def table() -> Table:
    return TABLE


@pytest.fixture(scope="session")
def bandwidth() -> float:
    """Copy bandwidth of this run, bytes a second."""
    TABLE.bandwidth = copy_bandwidth(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return TABLE.bandwidth


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["torch"] = torch.__version__
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()


def pytest_terminal_summary(terminalreporter) -> None:
    if not TABLE.groups:
        return
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    terminalreporter.section(f"VidLA benchmarks: {where}, torch {torch.__version__}")
    if TABLE.bandwidth:
        terminalreporter.write_line(f"copy bandwidth of this run: {TABLE.bandwidth / 1e9:,.1f} GB/s (read + write)")
    for line in TABLE.lines():
        terminalreporter.write_line(line)
