"""The harness: floors, gate, turns, tables, goals, drawings. Times are made up here: nothing is measured."""

import itertools
import json
import math
import re
import time
import types

import numpy
import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import conftest, floor, machine, measure, memory, plot, results, test_step
from benchmarks.gate import disagreement
from benchmarks.goals import FLOOR, goals
from benchmarks.measure import Candidate, Effort, Outcome, compare
from benchmarks.results import Results, terminal
from benchmarks.shapes import Shape
from vidla_kernels import TokenLayout

CPU = torch.device("cpu")
TOWERS = ("B/16", "B/32")
B16 = Shape("B/16 T=12", TokenLayout(12, 196), 32, 12, torch.bfloat16)
B32 = Shape("B/32 T=12", TokenLayout(12, 49), 32, 12, torch.bfloat16)


def test_floors_by_hand():
    unit = 32 * 12 * 64 * 2  # bytes of one token of q in all clips and heads
    assert floor.floor_bytes("tube", B16, "fwd") == 4 * unit * 2352
    assert floor.floor_bytes("tube", B32, "fwd+bwd") == 11 * unit * 588
    assert floor.floor_bytes("hierarchical", B16, "fwd+bwd") == 11 * unit * 2365
    # On an H100 that copies 3.0 TB/s: 154 and 155 us forward, 426 us with the backward.
    assert floor.floor_bytes("tube", B16, "fwd") / 3.0e12 == pytest.approx(154e-6, rel=0.01)
    assert floor.floor_bytes("hierarchical", B16, "fwd") / 3.0e12 == pytest.approx(155e-6, rel=0.01)
    assert floor.floor_bytes("hierarchical", B16, "fwd+bwd") / 3.0e12 == pytest.approx(426e-6, rel=0.01)


def test_memory_over_tensors_by_hand():
    unit = B16.unit_bytes("hierarchical")
    assert floor.memory_over_tensors("hierarchical", B16, "fwd", unit) == 1.0  # qkv and the output, nothing else
    assert floor.memory_over_tensors("hierarchical", B16, "fwd+bwd", 4 * unit) == 1.0  # qkv, dO; the output and dqkv
    assert floor.memory_over_tensors("hierarchical", B16, "fwd+bwd", 12 * unit) == 2.0


def test_rates_are_of_this_device():
    rates = floor.measure_rates(CPU, toy=True)
    assert rates.copy > 1e8
    assert rates.matmul > 1e8
    assert rates.matmul_of == "256^3 float32"


def test_the_gate_sees_what_is_wrong():
    x = torch.randn(3, 5)
    assert disagreement((x, x), (x, None)) is None
    assert "disagrees" in disagreement((x + 1e-3, None), (x, None))
    assert "disagrees" in disagreement((x * math.nan, None), (x, None))
    assert "shape" in disagreement((x[:2], None), (x, None))
    assert disagreement((x.bfloat16(),), ((x * 1.001).bfloat16(),)) is None


def test_peak_memory_is_the_largest_sum_of_what_lives():
    def call():
        a = torch.empty(1000, dtype=torch.float32).fill_(1)
        b = torch.empty(500, dtype=torch.float32).fill_(1)
        del a
        c = torch.empty(900, dtype=torch.float32).fill_(1)
        return b, c

    assert memory.peak_bytes(call, CPU) == 4 * 1500
    assert memory.launches(call, CPU) is None


def test_launches_are_what_ran_on_the_gpu():
    def event(device, annotation=False):
        return types.SimpleNamespace(device_type=device, is_user_annotation=annotation)

    events = [event(DeviceType.CPU), event(DeviceType.CUDA), event(DeviceType.CUDA), event(DeviceType.CUDA, annotation=True)]
    assert memory.count_launches(events) == 2


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_percentiles_are_numpys(count):
    values = numpy.random.default_rng().random(count).tolist()
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert measure.percentile(values, share) == pytest.approx(numpy.quantile(values, share))


def test_candidates_run_in_turns_and_each_round_begins_with_another():
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}
    samples = measure.interleaved(calls, CPU, Effort(rounds=3, warmup=1, seconds=60))
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab"
    assert all(len(seconds) == 3 for seconds, _ in samples.values())


def test_long_candidates_get_three_rounds():
    samples = measure.interleaved({"a": lambda: time.sleep(0.01)}, CPU, Effort(rounds=50, warmup=0, seconds=0.001))
    assert len(samples["a"][0]) == 3


def test_a_gpu_sample_waits_until_the_call_is_queued(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 3.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(cycles))
    sample = measure._GpuSample(torch.device("meta"))

    def call():
        done.append("call")
        time.sleep(0.004)

    seconds, host = sample(call)
    assert seconds == 0.003
    assert host >= 0.004
    assert done[1:] == ["event", "call", "event"]
    done.clear()
    sample(call)
    assert done[0] / measure.CYCLES_PER_SECOND > 2 * 0.004


def test_a_gpu_is_described_as_far_as_it_can_be_read(monkeypatch):
    gpu = types.SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, uuid="ab-cd"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    asked = []

    def nvidia_smi(command, **options):
        asked.append(command)
        fields = command[-2].removeprefix("--query-gpu=").split(",")
        return types.SimpleNamespace(returncode=0, stdout=", ".join(f"{field} 1" for field in fields) + "\n")

    monkeypatch.setattr(machine.subprocess, "run", nvidia_smi)
    got = machine._gpu(torch.device("cuda"))
    assert (got["name"], got["capability"], got["multiprocessors"]) == ("NVIDIA H100", "9.0", 132)
    assert got["driver"] == "driver_version 1"
    assert "GPU-ab-cd" in asked[0]
    assert set(machine.clocks(torch.device("cuda"))) == set(machine.CLOCKS)

    def absent(command, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine._gpu(torch.device("cuda"))["driver"] is None
    assert machine.clocks(torch.device("cuda")) == {}


def test_what_becomes_of_a_candidate():
    def raises():
        raise RuntimeError("no such kernel\nand more")

    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def call():
        return torch.ones(10)

    def fine():
        return None

    candidates = [
        Candidate("fine", call, fine),
        Candidate("wrong", call, lambda: "disagrees"),
        Candidate("elsewhere", None, absent="needs an NVIDIA GPU"),
        Candidate("raises", call, raises),
        Candidate("ours raises", call, raises, ours=True),
        Candidate("large", call, no_memory),
    ]
    got = compare(candidates, CPU, Effort(2, 0, 1), math.inf)
    assert {name: outcome.status for name, outcome in got.items()} == {
        "fine": "timed",
        "wrong": "red",
        "elsewhere": "absent",
        "raises": "absent",
        "ours raises": "red",
        "large": "absent",
    }
    assert len(got["fine"].seconds) == 2
    assert not got["wrong"].seconds
    assert got["raises"].reason == "raises RuntimeError: no such kernel"
    late = compare(candidates[:1], CPU, Effort(2, 0, 1), time.monotonic() - 1)["fine"]
    assert (late.status, late.reason) == ("absent", measure.OUT_OF_TIME)
    gated = compare(candidates[:2], CPU, None, math.inf)
    assert [(o.status, o.seconds) for o in gated.values()] == [("timed", []), ("red", [])]


def test_pytest_benchmark_gets_the_samples():
    class Recorder:
        def __init__(self):
            self.extra_info, self.seconds = {}, []

        def pedantic(self, target, rounds):
            for _ in range(rounds):
                began = conftest.recorded_time()
                target()
                self.seconds.append(conftest.recorded_time() - began)

    recorder = Recorder()
    conftest.record(recorder, Outcome("a", True, "timed", seconds=[1.0, 2.0, 4.0], peak_bytes=7))
    assert recorder.seconds == [1.0, 2.0, 4.0]
    assert recorder.extra_info["peak_bytes"] == 7
    with pytest.raises(pytest.skip.Exception, match="no GPU"):
        conftest.record(recorder, Outcome("a", False, "absent", "no GPU"))
    with pytest.raises(pytest.fail.Exception, match="disagrees"):
        conftest.record(recorder, Outcome("a", False, "red", "disagrees"))


def made_up(kind: str = "cpu", times: dict[str, float] | None = None, capability: str = "9.0") -> Results:
    """A run that nobody ran: `times` in us of each implementation, floor 100 us."""
    got = Results(machine.describe(CPU))
    if kind == "cuda":
        gpu = {"name": "NVIDIA A100", "driver": "1", "capability": capability}
        got.machine["device"] = {"kind": "cuda", **gpu}
    got.rates = {"copy_bytes_per_s": 3e12, "matmul_flops_per_s": 7e14, "matmul_of": "8192^3", "clocks": {"clocks.sm": "1 MHz"}}
    times = times or {"portable (auto)": 50.0, "dense mask SDPA": 400.0, "per-frame SDPA": 80.0, "permute + SDPA": 90.0}
    for op, passes, shape in itertools.product(("tube", "hierarchical"), ("fwd", "fwd+bwd"), (B16, B32)):
        rows = [
            Outcome(name, "auto" in name, "timed", None, [us * 1e-6] * 5, 1e-5, 3 * shape.unit_bytes(op), 2)
            for name, us in times.items()
        ]
        rows.append(Outcome("xformers, block-diagonal", False, "absent", "needs an NVIDIA GPU"))
        rows.append(Outcome("odd one", False, "red", "disagrees") if op == "tube" else Outcome("odd one", False, "absent", "x"))
        of = {"group": "attention", "op": op, "passes": passes, "shape": shape.to_json()}
        tensors = lambda peak, s=shape, o=op, p=passes: floor.memory_over_tensors(o, s, p, peak)  # noqa: E731
        got.add(rows, floor_seconds=1e-4, tensors=tensors, **of)
    for T in (8, 32):
        rows = [Outcome("portable (auto)", True, "timed", None, [T * 1e-5] * 3, None, 10**6, None)]
        shape = Shape(f"B/32 T={T}", TokenLayout(T, 49), 1, 12, torch.float32).to_json()
        got.add(rows, floor_seconds=1e-5, group="growth with T", op="tube", passes="fwd+bwd", shape=shape)
    step = {"name": "ViT-B-32 T=12", "B": 32, "dtype": "bfloat16"}
    rows = [Outcome("portable", True, "timed", None, [0.05] * 3, None, 10**6, None)]
    got.add(rows, floor_seconds=0.017, clips=32, group="step", op="step", passes="fwd+bwd", shape=step)
    return got


def test_a_row_has_all_its_fields(tmp_path):
    path = tmp_path / "some" / "results.json"
    made_up().write(path)
    data = json.loads(path.read_text())
    assert {"version", "device", "versions", "commit", "date", "command", "rates", "goals", "rows"} <= set(data)
    assert {"python", "torch", "triton", "xformers", "flash-attn", "vidla"} <= set(data["versions"])
    row = data["rows"][0]
    described = results.__doc__
    assert all(key in described for key in row), "every field of a row is explained where rows are defined"
    assert row["us"] == {"median": 50.0, "p20": 50.0, "p80": 50.0}
    assert row["x_floor"] == 0.5
    assert (row["best_peer"], row["x_best_peer"]) == ("per-frame SDPA", 0.625)
    assert row["x_tensors"] == 1.5
    assert row["launches"] == 2
    assert data["rows"][-1]["clips_per_s"] == 640.0
    assert Results.read(path).rows == data["rows"]
    path.write_text(json.dumps({**data, "version": 0}))
    with pytest.raises(ValueError, match="version 0"):
        Results.read(path)


def test_the_table_is_aligned_and_tells_what_is_missing():
    lines = terminal(made_up())
    assert max(map(len, lines)) <= 140
    at = lines.index(next(line for line in lines if line.startswith("tube attention, forward: B/16 T=12")))
    head, *rows = lines[at + 1 : at + 6]
    assert [row.split("  ")[1] for row in rows] == [
        "VidLA portable (auto)",
        "per-frame SDPA",
        "permute + SDPA",
        "dense mask SDPA",
    ]
    for title in ("median", "p80", "x floor", "x best peer", "peak MiB", "launches"):
        end = head.index(title) + len(title)
        assert all(row[end - 1].isdigit() and row[end : end + 1] in ("", " ") for row in rows), title
    text = "\n".join(lines)
    assert "tube, odd one: WRONG: disagrees" in text
    assert text.count("xformers, block-diagonal: needs an NVIDIA GPU") == 2  # once for each op, not for each table
    assert "T=8          T=32" in text or "T=8" in text
    assert "640.0" in text
    assert not [line for line in lines if line != line.rstrip()]


def test_markdown_tables_have_equal_columns():
    lines = results.markdown(made_up())
    tables = [list(group) for key, group in itertools.groupby(lines, lambda line: line.startswith("|")) if key]
    assert len(tables) == 8 + 1 + 1
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_a_file_is_printed_for_the_documentation(tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.json"
    made_up().write(file)
    monkeypatch.setattr("sys.argv", ["results", str(file)])
    results.main()
    printed = capsys.readouterr().out
    assert "| VidLA portable (auto) | 50.0 | 50.0 | 50.0 | 0.50 | 0.62 |" in printed
    assert "| hierarchical, B/16: times faster than dense mask SDPA | 8.00 |  | >= 6 | met |" in printed
    file.write_text("{}")
    with pytest.raises(SystemExit) as stop:
        results.main()
    assert stop.value.code == 2


def test_goals_of_a_cpu():
    held = {goal["what"]: goal for goal in goals(made_up())}
    dense = held["hierarchical, B/16: times faster than dense mask SDPA"]
    assert (dense["measured"], dense["goal"], dense["met"]) == (8.0, 6.0, True)
    hand = held["hierarchical, B/32: times faster than per-frame SDPA by hand"]
    assert (hand["measured"], hand["met"]) == (1.6, True)
    assert held["tube, B/16: times faster than permute + SDPA"]["met"] is True
    assert held["hierarchical, B/16: times faster than per-frame SDPA, compiled"]["measured"] is None
    assert held["tube, B/16: memory over all tensors"]["measured"] == pytest.approx(7 / 8)
    slow = {"portable (auto)": 100.0, "dense mask SDPA": 400.0, "per-frame SDPA": 99.0}
    held = {goal["what"]: goal for goal in goals(made_up(times=slow))}
    assert held["hierarchical, B/32: times faster than per-frame SDPA by hand"]["met"] is False
    assert held["tube, B/16: times faster than permute + SDPA"]["met"] is None
    assert "NOT met" in "\n".join(terminal(made_up(times=slow)))


def test_goals_of_a_gpu():
    held = goals(made_up("cuda", {"cuda (auto)": 112.0, "per-frame SDPA": 300.0}))
    assert len(held) == len(FLOOR)
    assert {goal["by"] for goal in held} == {"cuda (auto)"}
    met = {goal["what"]: goal["met"] for goal in held}
    assert met["tube, forward, B/16: times the floor"] is False
    assert met["tube, forward, B/32: times the floor"] is True
    a100 = goals(made_up("cuda", {"cuda (auto)": 112.0, "per-frame SDPA": 300.0}, capability="8.0"))
    assert {goal["what"]: goal["met"] for goal in a100}["tube, forward, B/16: times the floor"] is True  # 1.05 and 10 %
    assert all(goal["met"] is None for goal in goals(made_up("cuda", {"per-frame SDPA": 300.0})))


def test_the_documented_targets_are_the_goals():
    text = (machine.ROOT / "docs" / "gpu" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (tube|hierarchical), (forward|forward and backward) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    words = {"forward": "fwd", "forward and backward": "fwd+bwd"}
    documented = {
        (op, tower, words[passes]): float(x) for op, passes, *both in rows for tower, x in zip(TOWERS, both, strict=True)
    }
    assert documented == FLOOR


def test_drawings_are_made_from_the_file_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "h100.json"
    made_up().write(file)
    monkeypatch.setattr("sys.argv", ["plot", str(file), "--out", str(tmp_path / "out")])
    plot.main()
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    kinds = ("tube-fwd", "tube-fwd-bwd", "hierarchical-fwd", "hierarchical-fwd-bwd", "growth", "step")
    assert written == sorted(f"h100-{kind}.png" for kind in kinds)
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in written)
    assert len(capsys.readouterr().out.split()) == len(kinds)
    monkeypatch.setattr("sys.argv", ["plot", str(tmp_path / "absent.json")])
    with pytest.raises(SystemExit) as stop:
        plot.main()
    assert stop.value.code == 2


def test_a_peers_compiled_tower_is_one_graph():
    how = test_step.rows(CPU)["einsum and per-frame SDPA, compiled"]
    tower = test_step.Tower("vidla-tiny", 2, CPU, how)
    tower.encode = torch.compile(tower.model.encode_video, backend="aot_eager")
    clips = torch.randn(1, 2, 3, 64, 64)
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        tower.step(clips)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_machine_names_itself():
    got = machine.describe(CPU)
    assert got["device"]["kind"] == "cpu"
    assert got["versions"]["torch"] == torch.__version__
    assert machine.slug({"device": {"name": "NVIDIA H100 80GB HBM3"}, "date": "2026-01-31 10:00 UTC"}) == (
        "nvidia-h100-80gb-hbm3_2026-01-31"
    )
    assert torch.__version__ in machine.title(got)
