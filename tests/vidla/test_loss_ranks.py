"""The loss and the collectives on several ranks (gloo, by torchrun), and `setup` without and with torchrun's environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidla import distributed

SCRIPT = Path(__file__).with_name("loss_on_ranks.py")
ROOT = Path(__file__).parents[2]


def launch(ranks: int, out: Path, task: str, seed: int) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    env = {k: v for k, v in os.environ.items() if k not in distributed.TORCHRUN_VARIABLES}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *torchrun, str(SCRIPT), str(out), task, str(seed)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ddp_on_several_ranks_is_the_whole_batch_on_one(tmp_path, ranks, seed):
    launch(1, tmp_path / "one.pt", "step", seed)
    launch(ranks, tmp_path / "many.pt", "step", seed)
    one, many = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "many.pt"))
    assert one.keys() == many.keys() == {"loss", "video.weight", "video.bias", "text.weight", "text.bias", "log_scale"}
    for name, gold in one.items():
        assert gold.norm() > 1e-3, f"{name}: nothing to compare"
        assert (many[name] - gold).norm() <= 1e-6 * gold.norm(), name


def test_collectives(tmp_path, seed):
    launch(3, tmp_path / "unused", "gather", seed)


def test_ranks_with_different_batches_all_raise(tmp_path, seed):
    launch(2, tmp_path / "error", "uneven", seed)
    for rank in range(2):
        assert "[[2, 10, 4], [3, 10, 4]]" in (tmp_path / f"error.{rank}").read_text()


def test_when_rank_0_fails_first_the_others_raise_too(tmp_path, seed):
    launch(2, tmp_path / "data", "first", seed)
    assert (tmp_path / "data.0").read_text() == "KeyError: 'no data'"
    assert (tmp_path / "data.1").read_text().startswith("RuntimeError: rank 0 failed")


def test_without_torchrun_there_is_one_rank_and_no_group(monkeypatch):
    for name in distributed.TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    ranks = distributed.setup("cpu")
    assert ranks == distributed.Ranks(0, 1, 0, torch.device("cpu"))
    assert ranks.is_main
    assert not torch.distributed.is_initialized()
    ranks.barrier()
    ran = []
    with ranks.main_first():
        ran.append(1)
    assert ran == [1]
    x = torch.arange(3)
    assert torch.equal(distributed.all_gather_cat(x), x)
    assert torch.equal(distributed.all_gather_rows(x, x > 1)[1], x > 1)
    distributed.teardown()


def test_setup_refuses_what_it_cannot_do(monkeypatch):
    for name in distributed.TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="device is 'tpu'"):
        distributed.setup("tpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="local rank 0 has no GPU"):
        distributed.setup("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        distributed.setup("cpu")
