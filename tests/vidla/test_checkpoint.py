"""Checkpoints: a kill at any instant leaves a loadable one, and what is loaded is what was saved."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from vidla import checkpoint
from vidla.config import Optim, UsageError
from vidla.model import VidLA, create_model
from vidla.optim import create_optimizer

CONFIG = '{"embed_dim": 8, "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16}, \
"text_cfg": {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 1, "layers": 1}}'
IDENTITY = {"seed": 3, "optim.betas": [0.9, 0.999], "data.train's content": "abc"}


@pytest.fixture
def run(tmp_path: Path, seed: int):
    """(model, optimizer) after one update with random gradients."""
    (tmp_path / "model.json").write_text(CONFIG)
    return make(tmp_path)


def make(tmp_path: Path) -> tuple[VidLA, torch.optim.Optimizer]:
    model = create_model(str(tmp_path / "model.json"), frames=2)
    optimizer = create_optimizer(model, Optim())
    update(model, optimizer)
    return model, optimizer


def update(model: VidLA, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def save(folder: Path, run, step: int, keep: int = 2) -> Path:
    return checkpoint.save(folder, step, *run, IDENTITY, {"step": step, "loss": 0.5}, keep)


def test_everything_comes_back(run, tmp_path: Path):
    path = save(tmp_path / "c", run, 7)
    random_numbers = random.random(), np.random.rand(), torch.rand(1).item()
    model, optimizer = make(tmp_path)
    assert checkpoint.load(path, model, optimizer, IDENTITY) == (7, {"step": 7, "loss": 0.5})
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == random_numbers
    for name, value in run[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for seed, (m, o) in ((1, run), (1, (model, optimizer))):  # the optimiser's state too: the next update is the same
        torch.manual_seed(seed)
        update(m, o)
    for name, value in run[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_the_weights_are_a_model_of_their_own(run, tmp_path: Path):
    path = save(tmp_path / "c", run, 7)
    model = VidLA.from_pretrained(path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), run[0].state_dict().values(), strict=True))


def test_the_newest_are_kept(run, tmp_path: Path):
    for step in (1, 2, 10, 99_999_999, 100_000_000):
        save(tmp_path / "c", run, step)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-100000000", "step-99999999"]
    assert checkpoint.latest(tmp_path / "c").name == "step-100000000"
    assert checkpoint.latest(tmp_path / "absent") is None


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and clean up."""


def test_a_kill_between_any_two_operations_leaves_a_loadable_checkpoint(run, tmp_path: Path, monkeypatch):
    """Every operation that changes the disk is the last one in turn. There is always step 1 or something newer."""
    import shutil

    real = {(m, n): getattr(m, n) for m, n in ((os, "rename"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"))}
    real |= {(torch, "save"): torch.save, (shutil, "rmtree"): shutil.rmtree}
    folder, survived = tmp_path / "c", set()
    for kill_at in range(1, 200):
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, run, 1, keep=1)
        count = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == kill_at:  # noqa: B023, called within this turn of the loop
                    if function is real[torch, "save"]:  # half a file
                        Path(args[1]).write_bytes(b"PK\x03\x04")
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for (module, name), function in real.items():
                patch.setattr(module, name, counted(function))
            try:
                save(folder, run, 2, keep=1)
            except Killed:
                killed = True
            else:
                killed = False
        newest = checkpoint.latest(folder)
        assert newest is not None, kill_at
        step, _ = checkpoint.load(newest, *run, IDENTITY)
        survived.add(step)
        save(folder, run, 3, keep=1)  # leftovers are in nobody's way
        assert [p.name for p in folder.iterdir()] == ["step-00000003"], kill_at
        if not killed:
            break
    assert kill_at > 8
    assert survived == {1, 2}


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "absent"])
def test_a_damaged_checkpoint_is_passed_over(run, tmp_path: Path, file: str, damage: str):
    save(tmp_path / "c", run, 1)
    path = save(tmp_path / "c", run, 2) / file
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])
    assert checkpoint.latest(tmp_path / "c").name == "step-00000001"
    with pytest.raises(UsageError, match="not a complete checkpoint"):
        checkpoint.load(tmp_path / "c" / "step-00000002", *run, IDENTITY)


@pytest.mark.parametrize(("name", "value"), [("seed", 4), ("optim.betas", [0.9, 0.95]), ("data.train's content", "abd")])
def test_another_run_is_refused_by_name_and_changes_nothing(run, tmp_path: Path, name: str, value):
    path = save(tmp_path / "c", run, 1)
    model, optimizer = make(tmp_path)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        checkpoint.load(path, model, optimizer, IDENTITY | {name: value})
    assert f"{name} was {IDENTITY[name]}, is {value}" in str(caught.value)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_loading_runs_no_code(run, tmp_path: Path):
    path = save(tmp_path / "c", run, 1)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({"step": 1, "evil": Evil()}, path / "state.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.load(path, *run, IDENTITY)
    assert not marker.exists()
