"""What `python -m vidla_kernels.tune` measured on this GPU: read when a kernel is first launched, never at import.

One JSON file in the user's cache, `path()`, holds one entry for each machine that was measured:

    {"format": 1, "entries": [{"machine": {...}, "measured": {...}, "tiles": {...}, "backends": {...}}]}

`machine` is all that a measurement depends on: GPU, compute capability, versions of torch and Triton, and a digest of the
kernels' sources. An entry counts where all of it is as it is now, and else is passed over (`--show` says why). `tiles` maps
the keys of tiles.py to the fields of a `Tile`, `backends` the keys of `backend_key` to a backend, or one of its variants
(backends.py, on plans). A file that cannot be read is
passed over with a warning: a cache never stops a run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import files

FORMAT = 1


def path() -> Path:
    """The file: tuned.json in the user's cache."""
    return files.cache_folder() / "tuned.json"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@cache
def _sources() -> str:
    """A digest of the kernels and of their shipped tiles: after a change of either, what was measured is of no use."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.name == "tiles.py" or file.name.startswith("triton_") or file.suffix in (".cu", ".cuh"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def machine(device: torch.device) -> dict[str, str] | None:
    """All that a measurement on this device depends on; None where nothing is tuned, which is everywhere but on a GPU."""
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_properties(device)
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "vidla": _version("vidla"),
        "kernels": _sources(),
    }


def read(file: Path | None = None) -> list[dict[str, Any]]:
    """The entries of the file; none where there is no file.

    Raises:
        ValueError: the file is not what `write` writes; the message says what is wrong.
    """
    try:
        text = (file or path()).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(str(error)) from None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"its format is {found!r}, this version reads {FORMAT}")
    entries = content.get("entries")
    if not isinstance(entries, list) or not all(_well_formed(entry) for entry in entries):
        raise ValueError("an entry is not {machine, measured, tiles, backends}, each a table")
    return entries


def _well_formed(entry: object) -> bool:
    parts = ("machine", "measured", "tiles", "backends")
    return isinstance(entry, dict) and all(isinstance(entry.get(part), dict) for part in parts)


def write(entries: list[dict[str, Any]], file: Path | None = None) -> None:
    """Replace the file in one step, so that a reader sees the old one or the new one."""
    file = file or path()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps({"format": FORMAT, "entries": entries}, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def differences(entry: dict[str, Any], here: dict[str, str] | None) -> str | None:
    """Why an entry does not count on the machine `here`; None where it does."""
    if here is None:
        return "torch sees no GPU here"
    there = entry["machine"]
    wrong = [f"{name} {there.get(name)}, here {value}" for name, value in here.items() if there.get(name) != value]
    return "measured with " + "; ".join(wrong) if wrong else None


def forget() -> None:
    """Read the file anew at the next launch."""
    _entry.cache_clear()


def tile(key: str, device: torch.device) -> dict[str, Any] | None:
    """The fields of the tile that was fastest for a key of tiles.py on this device; None where nothing was found."""
    return _here(device)["tiles"].get(key)


def backend_key(op: str, name: str, kind: str, D: int, N: int) -> str:
    """The class of calls for which one backend is preferred: attention, pass, kind of dtype, D, N up to a power of two."""
    return f"{op} {name} {kind} D={D} N<={max(64, 1 << (N - 1).bit_length())}"


def preferred_backend(op: str, name: str, device: torch.device, kind: str, D: int, N: int) -> str | None:
    """The kernels that were fastest on this device for a pass of this class of calls; None where none were measured."""
    found = _here(device)["backends"].get(backend_key(op, name, kind, D, N))
    return found if isinstance(found, str) else None


def _here(device: torch.device) -> dict[str, Any]:
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return _entry(device.type, index)


@cache
def _entry(kind: str, index: int | None) -> dict[str, Any]:
    nothing = {"machine": {}, "measured": {}, "tiles": {}, "backends": {}}
    if (here := machine(torch.device(kind, index))) is None:
        return nothing
    try:
        entries = read()
    except ValueError as error:
        warnings.warn(
            f"{path()} is passed over, and the shipped tiles are used: {error}. "
            "`python -m vidla_kernels.tune` measures anew, with --clear it removes the file.",
            stacklevel=2,
        )
        return nothing
    return next((entry for entry in entries if differences(entry, here) is None), nothing)
