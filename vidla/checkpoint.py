"""Checkpoints: everything a run needs to go on as if it had never stopped.

Invariants:
- `checkpoints/step-00000500/` is complete or absent. It is written under a temporary name, every file and the folder
  are fsynced, and one rename makes it visible. Deleting goes the other way: rename first, then remove. So a kill
  at any instant leaves every complete checkpoint loadable, and leftovers never look like one.
- There is no pointer to the newest one that could be stale: `latest` scans, and skips what was damaged later.
- A checkpoint is what `VidLA.save_pretrained` writes (so `VidLA.from_pretrained` and `create_model(pretrained=)` take
  the folder) and `state.pt` (optimiser, random states, run), read with `weights_only=True`: it runs no code.
- The state of the schedule and of the loader is one number, the step: both are pure functions of it, for any number
  of ranks.
- The run's identity (see config.py) and the data's fingerprints are stored; `load` refuses others, naming them.

Model and optimiser are replicated by DDP, so rank 0 writes for all.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from .config import UsageError, differences

if TYPE_CHECKING:
    from .model import VidLA

NAME = re.compile(r"step-(\d{8,})")
TEMPORARY = ".unfinished-"


def save(
    folder: Path,
    step: int,
    model: VidLA,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    record: dict[str, Any],
    keep: int,
) -> Path:
    """Write checkpoint `step` into `folder` and delete all but the newest `keep`.

    Args:
        step: updates done; also the number of global batches consumed.
        identity: what must be the same on resume, by name.
        record: the log's record of the step.
    Returns: the checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    final = folder / f"step-{step:08d}"
    unfinished = folder / f"{TEMPORARY}{final.name}"
    unfinished.mkdir()
    model.save_pretrained(unfinished)
    state = {"step": step, "record": record, "identity": identity, "random": _random_states()}
    torch.save(state | {"optimizer": optimizer.state_dict()}, unfinished / "state.pt")
    for path in (*unfinished.iterdir(), unfinished):
        _fsync(path)
    if final.exists():  # an earlier attempt of the same step, equal by construction
        _remove(final)
    os.rename(unfinished, final)
    _fsync(folder)
    for old in _complete(folder)[keep:]:
        _remove(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    return next(iter(_complete(folder)), None)


def load(path: Path, model: VidLA, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Put model, optimiser and random states back as they were; returns the step and its record.

    Raises: UsageError if `path` is no complete checkpoint, or belongs to a run with another identity; nothing is
    changed then.
    """
    if not _is_complete(path):
        raise UsageError(f"{path} is not a complete checkpoint: it needs model.safetensors and state.pt, both undamaged")
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if changed := differences(state["identity"], identity):
        raise UsageError(
            f"cannot resume {path}: {'; '.join(changed)}. Set it back, or start another run with --output or --resume never"
        )
    saved_names = [group["names"] for group in state["optimizer"]["param_groups"]]
    if saved_names != [group["names"] for group in optimizer.param_groups]:
        raise UsageError(f"cannot resume {path}: its model has other parameters than this version of the code")
    model.load_state_dict(safetensors.torch.load_file(path / "model.safetensors"))
    optimizer.load_state_dict(state["optimizer"])
    _set_random_states(state["random"])
    return state["step"], state["record"]


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    found = [(int(m[1]), path) for path in folder.glob("step-*") if (m := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if _is_complete(path)]


def _is_complete(path: Path) -> bool:
    """Both files are there with their ends: a truncated zip has no directory, safetensors compares sizes."""
    try:
        with safetensors.safe_open(path / "model.safetensors", "pt"):
            return zipfile.is_zipfile(path / "state.pt")
    except (OSError, safetensors.SafetensorError):
        return False


def _remove(path: Path) -> None:
    doomed = path.with_name(f"{TEMPORARY}old-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_states() -> dict[str, Any]:
    """Generators of Python, numpy and torch. The trainer draws nothing from them after the initial weights; a model
    or loss that does (dropout) stays exact on one rank."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
