"""The report for a GPU's owner, rehearsed on a CPU: every step, and what is left when a piece is missing."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.gpu_report import Done, Setting
from benchmarks.machine import ROOT
from vidla_kernels import backends

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--rehearse", "--out", str(folder)]
    return folder, subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_rehearsal_walks_through_every_step(rehearsal):
    folder, done = rehearsal
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((folder / "rehearsal.json").read_text())
    steps = {step["step"]: step for step in data["steps"]}
    assert list(steps) == list(gpu_report.STEPS)
    assert data["rehearsal"] is True
    ran = (gpu_report.PARITY, gpu_report.BITS, gpu_report.BENCHMARKS)
    assert [steps[name]["status"] for name in ran] == ["passed"] * 3, steps
    assert "0 failed" in steps[gpu_report.PARITY]["summary"]
    assert all(step["status"] in ("passed", "missing") and step["summary"] for step in steps.values())
    assert all(name in done.stdout for name in steps)


def test_a_rehearsals_rows_are_gated_and_timed(rehearsal):
    data = json.loads((rehearsal[0] / "rehearsal.json").read_text())
    timed = [row for row in data["rows"] if row["status"] == "timed"]
    assert {row["group"] for row in timed} == {"attention", "growth with T", "growth with B", "step"}
    assert not [row for row in data["rows"] if row["status"] == "red"]
    assert all(row["us"]["p20"] <= row["us"]["median"] <= row["us"]["p80"] for row in timed)
    assert all(row["x_floor"] > 0 and row["peak_bytes"] > 0 and row["x_best_peer"] > 0 for row in timed)
    assert all(row["reason"] for row in data["rows"] if row["status"] == "absent")
    step = {row["name"] for row in timed if row["group"] == "step"}
    assert step == {"portable", "dense mask SDPA", "permute and per-frame SDPA", "einsum and per-frame SDPA"}


def test_a_rehearsal_says_that_it_is_one(rehearsal):
    text = (rehearsal[0] / "rehearsal.md").read_text()
    assert "REHEARSAL" in text
    assert "no figure in it means anything" in text
    for name in (*gpu_report.STEPS, "## Targets", "torch version", "VidLA portable (auto)", "Not timed"):
        assert name in text
    assert ("![rehearsal-growth](rehearsal-growth.png)" in text) == (rehearsal[0] / "rehearsal-growth.png").exists()
    assert "/tmp" not in text


def test_without_a_gpu_it_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--out", str(tmp_path / "gpu")])
    assert gpu_report.main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "needs an NVIDIA GPU" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (tmp_path / "gpu").exists()


@pytest.fixture(autouse=True)
def found_anew():
    """What is missing is looked for once in a process: what a test hides must not stay hidden."""
    yield
    backends._missing.cache_clear()


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting(tmp_path / "report", tmp_path, rehearse=True)


def test_a_missing_piece_is_reported_and_the_rest_goes_on(setting, monkeypatch):
    find = gpu_report.importlib.util.find_spec
    absent = ("pytest", "pytest_benchmark", "vidla_kernels.tune")
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name))
    monkeypatch.setattr(gpu_report.shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setattr(gpu_report, "compile_ahead", lambda setting: [])

    def breaks(setting, seconds):
        raise OSError("a step that breaks")

    monkeypatch.setitem(gpu_report.STEPS, gpu_report.BITS, (breaks, 40))
    steps = {done.step: done for done in gpu_report.walk(setting, minutes=9)}
    assert list(steps) == list(gpu_report.STEPS)
    assert steps[gpu_report.BITS].status == "failed"
    assert "a step that breaks" in steps[gpu_report.BITS].summary
    assert all(done.status == "missing" for name, done in steps.items() if name != gpu_report.BITS)
    assert "pip install" in steps[gpu_report.BENCHMARKS].summary

    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    paths = gpu_report.write(setting, gpu_report.facts_of(CPU), list(steps.values()))
    assert [path.suffix for path in paths] == [".md", ".json"]
    text = paths[0].read_text()
    assert "Nothing was timed." in text
    assert "| backend triton |" in text
    assert "Error at most twice torch's own: not measured." in text
    assert len(json.loads(paths[1].read_text())["steps"]) == len(steps)


def test_the_documented_limits_are_the_steps():
    text = (ROOT / "docs" / "gpu" / "README.md").read_text(encoding="utf-8")
    limits = {name: limit for name, (_, limit) in gpu_report.STEPS.items()}
    for name in (gpu_report.PARITY, gpu_report.BITS, gpu_report.TUNING):
        assert f"| {name} | {limits[name]} |" in text
    assert limits[gpu_report.MEMCHECK] == limits[gpu_report.RACECHECK]
    assert f"racecheck | {limits[gpu_report.MEMCHECK]} each |" in text


def test_no_time_left_is_said(setting, monkeypatch):
    monkeypatch.setattr(gpu_report, "compile_ahead", lambda setting: [])
    steps = gpu_report.walk(setting, minutes=0)
    assert {done.status for done in steps} == {"cut short"}


def test_a_command_is_ended_with_its_children(tmp_path):
    sleeps = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    child = f"import subprocess, sys; print('begun', flush=True); subprocess.run({sleeps})"
    began = time.monotonic()
    output = gpu_report.run([sys.executable, "-c", child], 1.5, tmp_path / "log")
    assert time.monotonic() - began < 20
    assert output.code is None
    assert output.last == "begun"


LINE = "tests/kernels/test_parity.py::test_a[{} 1] {} [ 10%]"


@pytest.mark.parametrize(
    ("verdicts", "codes", "status", "summary"),
    [
        (("PASSED", "SKIPPED"), [0, 0], "passed", "1 passed, 0 failed, 1 skipped"),
        (("PASSED", "FAILED"), [1, 0], "failed", "1 passed, 1 failed, 0 skipped"),
        (("PASSED", "PASSED"), [0, None], "cut short", "2 passed, 0 failed, 0 skipped"),
        (("PASSED", "FAILED"), [None, None], "failed", "1 passed, 1 failed, 0 skipped"),
        ((), [4, 0], "failed", "0 passed, 0 failed, 0 skipped"),
        (("PASSED",), [5, 0], "passed", "1 passed, 0 failed, 0 skipped"),
        (("SKIPPED",), [0, 0], "missing", "0 passed, 0 failed, 1 skipped: nothing"),
    ],
)
def test_the_parity_tests_output_is_read(verdicts, codes, status, summary):
    text = "\n".join(["collected 9 items", *(LINE.format(i, verdict) for i, verdict in enumerate(verdicts))])
    done = gpu_report.parity_from(text, codes)
    assert done.status == status
    assert done.summary.startswith(summary)
    assert bool(done.details) == (status == "failed")


@pytest.mark.parametrize(
    ("printed", "code", "status"),
    [
        ("tube, cuda, B/16: equal\ntube, triton, B/16: equal", 0, "passed"),
        ("tube, cuda, B/16: equal\ntube, triton, B/16: gradient DIFFER", 1, "failed"),
        ("tube, cuda, B/16: equal", None, "cut short"),
        ("tube, cuda, B/16: equal\nRuntimeError: CUDA error", 1, "failed"),
        ("", 0, "missing"),
    ],
)
def test_equal_bits_are_read(setting, monkeypatch, printed, code, status):
    monkeypatch.setattr(gpu_report, "run", lambda *args, **options: gpu_report.Output(code, printed))
    assert gpu_report.bits(setting, 40).status == status
    if printed:
        assert "1 of" in gpu_report.bits(setting, 40).summary or status == "passed"
    monkeypatch.setattr(gpu_report.shutil, "which", lambda *args, **options: "compute-sanitizer")
    assert gpu_report.sanitizer(gpu_report.MEMCHECK, setting, 40).status == status


def test_a_failed_step_is_the_exit_code(monkeypatch, tmp_path):
    monkeypatch.setattr(
        gpu_report, "walk", lambda setting, minutes: [Done(gpu_report.PARITY, "failed", "1 failed", ["test_a"])]
    )
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--rehearse", "--out", str(tmp_path)])
    assert gpu_report.main() == 1
    text = (tmp_path / "rehearsal.md").read_text()
    assert "**not met**" in text
    assert "test_a" in text
