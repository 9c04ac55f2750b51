"""What a figure must be read with: device, driver, clocks, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vidla", "torch", "triton", "xformers", "flash-attn", "pytest-benchmark")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit")


def describe(device: torch.device) -> dict:
    """The machine as JSON. What cannot be read is None, never guessed."""
    return {
        "device": _gpu(device) if device.type == "cuda" else _cpu(),
        "versions": {name: version(name) for name in PACKAGES} | _versions(device),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _gpu(device: torch.device) -> dict:
    gpu = torch.cuda.get_device_properties(device)
    memory = round(gpu.total_memory / 2**30, 1)
    numbers = {"capability": f"{gpu.major}.{gpu.minor}", "memory_GiB": memory, "multiprocessors": gpu.multi_processor_count}
    driver = _nvidia_smi(device, ("driver_version",)).get("driver_version")
    return {"kind": "cuda", "name": gpu.name, **numbers, "driver": driver}


def _cpu() -> dict:
    model = None
    if (info := Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))
        model = found and found[1].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    name = model or platform.processor() or platform.machine()
    return {"kind": "cpu", "name": name, "capability": capability, "cores": cores, "threads": torch.get_num_threads()}


def _versions(device: torch.device) -> dict:
    of = {"python": platform.python_version(), "torch": torch.__version__}  # with the build, such as +cu130
    if device.type == "cuda":
        of |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return of


def load_average() -> float | None:
    """Processes that waited for a core during the last minute: above the number of cores, timings are worthless."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, temperature and power now, with their units; empty where nvidia-smi does not say."""
    return _nvidia_smi(device, CLOCKS)


def _nvidia_smi(device: torch.device, fields: tuple[str, ...]) -> dict[str, str]:
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    which = ["-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"] if uuid else []
    command = ["nvidia-smi", *which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else {}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with "+changes" where tracked files differ from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=20)
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + "+changes" * bool(changed.stdout.strip()) if head.returncode == 0 else None


def slug(machine: dict) -> str:
    """A file name of the device and the date, such as nvidia-h100-80gb-hbm3_2026-01-31."""
    return f"{re.sub(r'[^a-z0-9]+', '-', machine['device']['name'].lower()).strip('-')}_{machine['date'][:10]}"


def title(machine: dict) -> str:
    """One line for the head of a table."""
    device, versions = machine["device"], machine["versions"]
    if device["kind"] == "cuda":
        what = f"{device['name']} (sm_{device['capability'].replace('.', '')}, driver {device['driver'] or 'unknown'})"
    else:
        threads = "1 thread" if device["threads"] == 1 else f"{device['threads']} threads"
        what = f"{device['name']}, {threads}, {device['capability']}"
    return f"{what}, torch {versions['torch']}, {machine['date']}, commit {machine['commit'] or 'unknown'}"
