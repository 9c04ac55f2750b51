"""Both attentions, every implementation side by side: the shapes of the paper, growth with T and with B.

    pytest benchmarks/ --benchmark-only

No number on a red gate: before it is timed an implementation must agree with the reference. All implementations of one
table run in turns on the same tensors.
"""

import pytest
import torch

from .conftest import BENCH, Bench, record, recorded_time
from .floor import floor_bytes, memory_over_tensors
from .gate import disagreement
from .measure import Candidate
from .peers import Implementation, forget, implementations, oracle
from .shapes import Sweep, sweeps


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    bench = metafunc.config.stash[BENCH]
    rows = [
        pytest.param(sweep, implementation.name, id=f"{sweep.group}, {sweep}, {implementation.name}".replace(" ", "_"))
        for sweep in sweeps(bench.device, bench.toy)
        for implementation in implementations(sweep, bench.device, bench.toy)
    ]
    metafunc.parametrize(("sweep", "name"), rows)


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # by a row that fails at the gate
@pytest.mark.benchmark(timer=recorded_time)
def test_attention(benchmark, bench: Bench, selected: list[str], sweep: Sweep, name: str):
    benchmark.group = str(sweep)
    record(benchmark, measure(bench, sweep, selected)[name])


def measure(bench: Bench, sweep: Sweep, names: list[str]) -> dict:
    if sweep in bench.outcomes:
        return bench.outcomes[sweep]
    torch.manual_seed(0)
    tensors = sweep.shape.draw(sweep.op, bench.device)
    want: list = []

    def wrong(implementation: Implementation) -> str | None:
        if not want:
            want.extend(run(oracle(sweep.op), sweep, *tensors))
        return disagreement(run(implementation.run, sweep, *tensors), tuple(want))

    candidates = [
        Candidate(one.name, lambda one=one: run(one.run, sweep, *tensors), lambda one=one: wrong(one), one.ours, one.absent)
        for one in implementations(sweep, bench.device, bench.toy)
        if one.name in names
    ]
    floor = None if bench.gate_only else floor_bytes(sweep.op, sweep.shape, sweep.passes) / bench.rates.copy
    try:
        return bench.table(
            sweep,
            candidates,
            floor_seconds=floor,
            tensors=lambda peak: memory_over_tensors(sweep.op, sweep.shape, sweep.passes, peak),
            group=sweep.group,
            op=sweep.op,
            passes=sweep.passes,
            shape=sweep.shape.to_json(),
        )
    finally:
        forget()


def run(attention, sweep: Sweep, qkv: torch.Tensor, grad: torch.Tensor) -> tuple:
    """(output, gradient of qkv), the latter None for the forward alone. Leaves nothing behind on qkv."""
    if sweep.passes == "fwd":
        with torch.no_grad():
            return attention(qkv.detach(), sweep.shape.layout), None  # FlexAttention on a CPU refuses a leaf with a gradient
    out = attention(qkv, sweep.shape.layout)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]
