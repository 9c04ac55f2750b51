"""One session's measurements: options, the device's rates, tables at the end, the JSON file."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import pytest
import torch

from .floor import Rates, measure_rates
from .machine import describe, load_average, slug, title
from .measure import Candidate, Outcome, compare, effort
from .results import Results, terminal

CPU_BUDGET = 540  # seconds; ten minutes with start-up and the end
FIRST = ("B/16 T=12", "B/32 T=12", "toy T=4")
FOLDER = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("VidLA benchmarks")
    group.addoption("--results", type=Path, help="JSON file for the results (default: benchmarks/results/DEVICE_DATE.json)")
    group.addoption("--budget", type=float, help=f"seconds after which nothing new is begun (default: {CPU_BUDGET} on a CPU)")
    group.addoption("--toy", action="store_true", help="tiny shapes, on a CPU: tries the harness, measures nothing of interest")


class Bench:
    """What the tests of this run share."""

    def __init__(self, config: pytest.Config) -> None:
        self.toy = config.getoption("--toy")
        self.device = torch.device("cuda" if torch.cuda.is_available() and not self.toy else "cpu")
        self.gate_only = config.getoption("benchmark_disable", False)
        self.results = Results()
        self.outcomes: dict[object, dict[str, Outcome]] = {}
        budget = config.getoption("--budget") or (CPU_BUDGET if self.device.type == "cpu" else None)
        self.deadline = time.monotonic() + budget if budget else float("inf")
        self.path: Path | None = config.getoption("--results")

    @cached_property
    def rates(self) -> Rates:
        """Measured on first use, before anything else."""
        self.results.machine = describe(self.device)
        rates = measure_rates(self.device, self.toy)
        self.results.rates = {
            "copy_bytes_per_s": rates.copy,
            "matmul_flops_per_s": rates.matmul,
            "matmul_of": rates.matmul_of,
            "clocks": rates.clocks,
            "load_average": load_average(),
        }
        return rates

    def table(self, key: object, candidates: list[Candidate], **of) -> dict[str, Outcome]:
        """Measure `candidates` in turns, once for each key; `of` describes the table (see results.py)."""
        if key not in self.outcomes:
            how = None if self.gate_only else effort(self.device, self.toy)
            self.outcomes[key] = compare(candidates, self.device, how, self.deadline)
            self.results.add(list(self.outcomes[key].values()), **of)
            if not self.gate_only:
                self.results.write(self.file)  # after each table, so that a run that is cut short leaves what it measured
        return self.outcomes[key]

    @property
    def file(self) -> Path:
        return self.path or FOLDER / f"{slug(self.results.machine)}{'-toy' * self.toy}.json"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The most asked-for first, so that a budget cuts off the least."""
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    of = item.callspec.params if hasattr(item, "callspec") else {}
    if "model" in of:
        return 2  # training steps
    if "sweep" not in of:
        return 0
    if of["sweep"].group == "attention" and of["sweep"].shape.name in FIRST:
        return 0 if of["sweep"].passes == "fwd+bwd" else 1
    return 3 if of["sweep"].group != "attention" else 4


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    bench = request.config.stash[BENCH]
    if not bench.gate_only:
        _ = bench.rates
    return bench


BENCH = pytest.StashKey[Bench]()


@pytest.fixture
def selected(request: pytest.FixtureRequest) -> list[str]:
    """The names of all selected tests that differ from this one in the implementation alone, in their order."""

    def others(item: pytest.Item) -> dict:
        return {key: value for key, value in item.callspec.params.items() if key != "name"}

    mine = others(request.node)
    items = (item for item in request.session.items if item.originalname == request.node.originalname)
    return [item.callspec.params["name"] for item in items if others(item) == mine]


def record(benchmark, outcome: Outcome) -> None:
    """Fail, skip, or hand the samples to pytest-benchmark, so that its JSON and its comparisons have them too."""
    if outcome.status == "red":
        pytest.fail(outcome.reason, pytrace=False)
    if outcome.status == "absent":
        pytest.skip(outcome.reason)
    if not outcome.seconds:  # --benchmark-disable: the gate alone
        benchmark(lambda: None)
        return
    benchmark.extra_info.update({key: value for key, value in asdict(outcome).items() if key != "seconds"})
    _REPLAY[:] = list(itertools.accumulate(itertools.chain.from_iterable((0.0, seconds) for seconds in outcome.seconds)))
    benchmark.pedantic(lambda: None, rounds=len(outcome.seconds))


_REPLAY: list[float] = []


def recorded_time() -> float:
    """A clock that shows pytest-benchmark the samples that were taken: it is read before and after each call."""
    return _REPLAY.pop(0) if _REPLAY else 0.0


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BENCH] = Bench(config)
    config.option.benchmark_quiet = True  # our tables have the same figures, and more
    config.option.reportchars = "fE"  # and they list what was skipped


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    bench = config.stash[BENCH]
    if not bench.results.rows:
        return
    if not bench.results.machine:
        bench.results.machine = describe(bench.device)
    terminalreporter.section(f"VidLA benchmarks{': toy sizes, no measurement' * bench.toy}")
    lines = [title(bench.results.machine), *terminal(bench.results)]
    if not bench.gate_only:
        lines += ["", f"written to {bench.file}", f"plots: python -m benchmarks.plot {bench.file}"]
    for line in lines:
        terminalreporter.write_line(line)
