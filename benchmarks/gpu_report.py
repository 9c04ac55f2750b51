"""One command for the owner of a GPU: everything that only a GPU can say, in nine minutes, as a report in docs/gpu/.

    pip install -e '.[test,bench]'
    python -m benchmarks.gpu_report

Steps, each in a process and with a time limit of its own, none depending on another: the parity tests with compiled kernels;
two runs of each kernel compared to the bit; compute-sanitizer's memcheck and racecheck; the benchmarks; tuning. A step whose
tool is missing says so and the rest goes on. Writes docs/gpu/DEVICE_DATE.md, .json and drawings. Exit code 0 if nothing that
ran failed, 1 if something did, 2 without a GPU. --rehearse walks through all of it on a CPU at toy size.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from vidla_kernels import backends

from .goals import goals
from .machine import ROOT, clocks, describe, slug, title
from .results import Results, goals_markdown, markdown, rates_in_words
from .shapes import OPS

MINUTES = 9.0
END = 20  # seconds kept for drawings and the report
FOLDER = ROOT / "docs" / "gpu"
PARITY, BITS, BENCHMARKS, TUNING = "parity tests, compiled", "two runs, bit by bit", "benchmarks", "tuning"
NO_KERNEL = "no kernel of ours runs here (python -m vidla_kernels says why)"
MEMCHECK, RACECHECK = "compute-sanitizer memcheck", "compute-sanitizer racecheck"


@dataclass
class Done:
    """What became of a step: "passed", "failed", "missing" (it could not run: why), or "cut short" (by its time limit)."""

    step: str
    status: str
    summary: str
    details: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Setting:
    """What a step is told."""

    stem: Path  # of the report's files
    logs: Path
    rehearse: bool


@dataclass(frozen=True)
class Output:
    """What a command printed, and its exit code: None where the time limit ended it."""

    code: int | None
    text: str

    @property
    def last(self) -> str:
        lines = [line for line in self.text.splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else "it printed nothing"


def run(command: list[str], seconds: float, log: Path, **environment: str) -> Output:
    """Run in the checkout; after `seconds` end it with all its children. Its output is kept in `log`."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
        )
        try:
            code = process.wait(timeout=max(seconds, 1))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(stop, KeyboardInterrupt):
                raise
            code = None
    return Output(code, log.read_text(encoding="utf-8", errors="replace"))


# The steps: (setting, seconds) -> Done.


def parity(setting: Setting, seconds: float) -> Done:
    """Each kernel against float64: at most twice the error of torch's own attention. The paper's shapes first."""
    if importlib.util.find_spec("pytest") is None:
        return Done(PARITY, "missing", "pytest is not installed (pip install -e '.[test,bench]')")
    began, texts, codes = time.monotonic(), [], []
    parts = ["one_hot and tube"] if setting.rehearse else ["pretraining", "not pretraining"]
    files = (
        ["tests/kernels/test_parity.py"] if setting.rehearse else ["tests/kernels/test_parity.py", "tests/kernels/test_ops.py"]
    )
    for i, selected in enumerate(parts):
        command = [sys.executable, "-m", "pytest", *files, "-v", "--no-header", "-p", "no:cacheprovider", "-k", selected]
        left = seconds - (time.monotonic() - began)
        output = run(command, left, setting.logs / f"parity-{i}.log", VIDLA_REQUIRE_GPU="0" if setting.rehearse else "1")
        texts.append(output.text)
        codes.append(output.code)
    return parity_from("\n".join(texts), codes)


def parity_from(text: str, codes: list[int | None]) -> Done:
    """Read pytest's -v output: also that of a run which was cut short."""
    verdicts = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.M)
    count = {kind: sum(v == kind for _, v in verdicts) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    wrong = count["FAILED"] + count["ERROR"]
    failed = [f"{name}: {verdict}" for name, verdict in verdicts if verdict in ("FAILED", "ERROR")]
    summary = f"{count['PASSED']} passed, {wrong} failed, {count['SKIPPED']} skipped"
    if wrong or any(code not in (0, 5, None) for code in codes):  # 5: the selection is empty
        if not wrong:
            last = [line for line in text.splitlines() if line.strip()][-1:]
            failed = [f"pytest ended with code {codes}: {''.join(last)}"]
        return Done(PARITY, "failed", summary, failed[:20])
    if None in codes:
        return Done(PARITY, "cut short", f"{summary}; the time limit ended it before the rest")
    if not count["PASSED"]:
        return Done(PARITY, "missing", f"{summary}: nothing was tested")
    return Done(PARITY, "passed", summary)


def bits(setting: Setting, seconds: float) -> Done:
    """Two backward runs on equal input."""
    extra = ["--small", "--cpu"] if setting.rehearse else []
    output = run([sys.executable, "-m", "benchmarks.repeat", *extra], seconds, setting.logs / "bits.log")
    lines = [line for line in output.text.splitlines() if re.search(r": (equal|.*DIFFER|not run)", line)]
    equal = sum(line.endswith(": equal") for line in lines)
    summary = f"{equal} of {len(lines)} kernels and shapes equal"
    if output.code is None:
        return Done(BITS, "cut short", f"{summary}; the time limit ended it before the rest", lines)
    if output.code:
        return Done(BITS, "failed", f"{summary}; {output.last}", lines)
    return Done(BITS, "passed" if equal else "missing", summary if equal else NO_KERNEL, lines)


def sanitizer(step: str, setting: Setting, seconds: float) -> Done:
    """compute-sanitizer over one small forward and backward of each kernel."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return Done(step, "missing", "compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    tool = step.split()[-1]
    command = [program, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "benchmarks.repeat", "--small"]
    # Without torch's cache of memory each tensor is an allocation of its own, whose ends the tool can see.
    log = setting.logs / f"{tool}.log"
    output = run([*command, *["--cpu"] * setting.rehearse], seconds, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    lines = [line.strip(" =") for line in output.text.splitlines() if "SUMMARY" in line]
    if output.code is None:
        return Done(step, "cut short", "the time limit ended it")
    if output.code:
        return Done(step, "failed", "; ".join(lines) or output.last, output.text.splitlines()[-30:])
    if ": equal" not in output.text:
        return Done(step, "missing", NO_KERNEL)
    return Done(step, "passed", "; ".join(lines) or "no error")


def benchmark(setting: Setting, seconds: float) -> Done:
    """The benchmark table, as much of it as fits: the paper's B/16 and B/32 come first."""
    if any(importlib.util.find_spec(name) is None for name in ("pytest", "pytest_benchmark")):
        return Done(BENCHMARKS, "missing", "pytest or pytest-benchmark is not installed (pip install -e '.[test,bench]')")
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-p", "no:cacheprovider"]
    # A table that was begun when the budget ends is finished: 40 seconds for it, or it is lost with the process.
    command += ["--results", str(setting.stem.with_suffix(".json")), "--budget", str(max(1.0, seconds - 40))]
    output = run([*command, *["--toy"] * setting.rehearse], seconds, setting.logs / "benchmarks.log")
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", output.text.splitlines()[-1] if output.text.strip() else "")
    summary = ", ".join(f"{number} {what}" for number, what in found).replace("passed", "timed").replace("skipped", "not timed")
    wrong = [line.strip() for line in output.text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if output.code is None:
        return Done(BENCHMARKS, "cut short", "the time limit ended it; what was measured until then is in the tables")
    return Done(BENCHMARKS, "failed" if output.code else "passed", summary or output.last, wrong[:20])


def tune(setting: Setting, seconds: float) -> Done:
    """Measure the shipped shapes' configurations on this GPU; `auto` then takes the best."""
    if importlib.util.find_spec("vidla_kernels.tune") is None:
        return Done(TUNING, "missing", "this version has no vidla_kernels.tune")
    output = run([sys.executable, "-m", "vidla_kernels.tune", "--quick"], seconds, setting.logs / "tune.log")
    lines = [line for line in output.text.splitlines() if line.strip()][-40:]
    if output.code is None:
        return Done(TUNING, "cut short", "the time limit ended it", lines)
    if output.code == 2:  # a refusal, such as: no GPU
        return Done(TUNING, "missing", output.last)
    return Done(TUNING, "failed" if output.code else "passed", output.last, lines)


# Seconds at most. What earlier steps leave goes to the benchmarks.
STEPS: dict[str, tuple[Callable[[Setting, float], Done], float]] = {
    PARITY: (parity, 110),
    BITS: (bits, 40),
    MEMCHECK: (partial(sanitizer, MEMCHECK), 45),
    RACECHECK: (partial(sanitizer, RACECHECK), 45),
    BENCHMARKS: (benchmark, float("inf")),
    TUNING: (tune, 50),
}


def compile_ahead(setting: Setting) -> list[subprocess.Popen]:
    """Start what compiles the benchmarks' peers into torch's cache on disk, beside the steps that are not timed: at one after
    the other compiling would take more time than there is."""
    selections = [f"{op}_attention and {tower} and 12_B and not growth" for op in OPS for tower in ("B/16", "B/32")] + ["step"]
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    if setting.rehearse:
        command, selections = [*command, "--toy"], ["tube_attention and not growth"]
    options = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"}  # each; the tests beside them want cores too
    return [subprocess.Popen([*command, "-k", selected], env=environment, **options) for selected in selections]


def stop(processes: list[subprocess.Popen]) -> None:
    while processes:
        process = processes.pop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def facts_of(device: torch.device) -> dict:
    """The machine, its clocks before any work, and each backend with the reason why it is missing."""
    idle = clocks(device) if device.type == "cuda" else {}
    return describe(device) | {"clocks": idle, "backends": {name: backends.missing(name, device) for name in backends.NAMES}}


def walk(setting: Setting, minutes: float) -> list[Done]:
    """All steps in order, within `minutes`. A step that raises has failed; the next one goes on."""
    began, results = time.monotonic(), []
    end = began + 60 * minutes - END
    ahead = compile_ahead(setting)
    try:
        for i, (name, (step, limit)) in enumerate(STEPS.items()):
            if name == BENCHMARKS:
                stop(ahead)
            later = sum(seconds for _, seconds in list(STEPS.values())[i + 1 :]) if limit == float("inf") else 0
            seconds = min(limit, end - time.monotonic() - later)
            print(f"[{time.monotonic() - began:4.0f} s] {name}, at most {seconds:.0f} s ...", flush=True)
            this = time.monotonic()
            try:
                done = step(setting, seconds) if seconds > 5 else Done(name, "cut short", "no time was left for it")
            except Exception as error:
                done = Done(name, "failed", f"{type(error).__name__}: {error}")
            done.seconds = round(time.monotonic() - this, 1)
            print(f"[{time.monotonic() - began:4.0f} s] {name}: {done.status}: {done.summary}", flush=True)
            results.append(done)
    finally:
        stop(ahead)
    return results


def write(setting: Setting, machine: dict, steps: list[Done]) -> list[Path]:
    """The report: JSON (the benchmarks' own file, with the steps added), drawings, Markdown."""
    file = setting.stem.with_suffix(".json")
    try:
        results = Results.read(file)
    except FileNotFoundError:
        results = Results(machine)
    data = results.to_json() | {"steps": [asdict(done) for done in steps], "rehearsal": setting.rehearse}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    drawings, why = [], None
    try:
        from .plot import draw

        drawings = draw(results, setting.stem)
    except Exception as error:  # without matplotlib, or a drawing that fails: the figures are in the tables
        why = f"{type(error).__name__}: {error}"
    text = setting.stem.with_suffix(".md")
    text.write_text("\n".join(report(setting, machine, results, steps, drawings, why)) + "\n", encoding="utf-8")
    return [text, file, *drawings]


def report(
    setting: Setting, machine: dict, results: Results, steps: list[Done], drawings: list[Path], no_drawings: str | None
) -> list[str]:
    """The report's lines."""
    lines = [f"# VidLA on {machine['device']['name']}", ""]
    if setting.rehearse:
        lines += ["**REHEARSAL on a CPU at toy size. It shows that the steps work; no figure in it means anything.**", ""]
    facts = {**machine["device"], **{f"{name} version": value for name, value in machine["versions"].items()}}
    facts |= {f"backend {name}": reason or "available" for name, reason in machine["backends"].items()}
    facts |= {
        "commit": machine["commit"],
        "date": machine["date"],
        **{f"{name}, idle": value for name, value in machine["clocks"].items()},
    }
    facts |= {f"{name}, multiplying": value for name, value in results.rates.get("clocks", {}).items()}
    lines += ["| | |", "|---|---|", *(f"| {name} | {'' if value is None else value} |" for name, value in facts.items()), ""]
    lines += ["## What ran", "", "| step | | | s |", "|---|---|---|---:|"]
    lines += [
        f"| {d.step} | {f'**{d.status}**' if d.status == 'failed' else d.status} | {_cell(d.summary)} | {d.seconds} |"
        for d in steps
    ]
    for done in steps:
        if done.status == "failed" and done.details:
            lines += ["", f"{done.step}:", "", "```", *done.details, "```"]
    lines += ["", "## Targets", "", "Times the floor in bfloat16 at B=32, H=12, D=64, U-V-r 3-4-2, T=12."]
    status = next((done.status for done in steps if done.step == PARITY), "missing")
    words = {
        "passed": "met",
        "failed": "**not met**",
        "cut short": "met as far as the parity tests came",
        "missing": "not measured",
    }
    lines += [f"Error at most twice torch's own: {words[status]}.", ""]
    held = goals(results)
    lines += goals_markdown(held) or ["No shape of the targets was measured."]
    lines += [
        "",
        "## Tables",
        "",
        *(f"- {line}" for line in rates_in_words(results)),
        *(markdown(results) or ["Nothing was timed."]),
    ]
    if drawings:
        lines += ["", "## Drawings", "", *(f"![{path.stem}]({path.name})\n" for path in drawings)]
    if no_drawings:
        lines += ["", f"No drawings: {no_drawings}."]
    tuning = next((done for done in steps if done.step == TUNING), None)
    if tuning and tuning.details:
        lines += ["", "## Tuning", "", "```", *tuning.details, "```"]
    return lines + ["", "To repeat it: `python -m benchmarks.gpu_report`. " + title(machine) + "."]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the report (default: docs/gpu, of a rehearsal a temporary one)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for everything (default: %(default)g)")
    parser.add_argument("--rehearse", action="store_true", help="walk through the steps on a CPU at toy size")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sentence = "a GPU report needs an NVIDIA GPU that torch sees, and there is none; --rehearse tries the steps without one"
        print(sentence, file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.rehearse else "cuda")
    machine = facts_of(device)
    folder = options.out or (Path(tempfile.mkdtemp(prefix="vidla-rehearsal-")) if options.rehearse else FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder.resolve() / ("rehearsal" if options.rehearse else slug(machine))
    stem.with_suffix(".json").unlink(missing_ok=True)  # of an earlier run on the same day
    print(title(machine), flush=True)
    with tempfile.TemporaryDirectory(prefix="vidla-report-") as logs:
        setting = Setting(stem, Path(logs), options.rehearse)
        steps = walk(setting, options.minutes)
        paths = write(setting, machine, steps)
    print("\n".join(["", *map(str, paths)]))
    return 1 if any(done.status == "failed" for done in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
