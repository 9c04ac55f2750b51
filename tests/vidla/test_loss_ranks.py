"""The loss and the collectives on several ranks (gloo, by torchrun), and `setup` without and with torchrun's environment."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidla import distributed

from . import loss_on_ranks

SCRIPT = Path(loss_on_ranks.__file__)
ROOT = SCRIPT.parents[2]
RANKS = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, int]:
    """The folder that four ranks have filled, and the seed they used."""
    folder, seed = tmp_path_factory.mktemp("ranks"), random.SystemRandom().randrange(2**31)
    print("seed", seed)
    env = {k: v for k, v in os.environ.items() if k not in distributed.TORCHRUN_VARIABLES}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command = [*torchrun, str(SCRIPT), str(folder), str(seed)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-20000:]
    assert "deprecated" not in done.stderr
    return folder, seed


@pytest.mark.parametrize("split", ["world", "pair"])  # the batch over four ranks; over two, in two groups at once
def test_ddp_on_several_ranks_is_the_whole_batch_on_one(found, split):
    folder, seed = found
    one = loss_on_ranks.step(seed)
    several = [torch.load(folder / f"{split}.{rank}", weights_only=True) for rank in range(RANKS)]
    assert set(one) == {"loss", "video.weight", "video.bias", "text.weight", "text.bias", "log_scale"}
    gradient_norm = torch.stack([gold.norm() for name, gold in one.items() if name != "loss"]).norm()
    for name, gold in one.items():
        assert gold.norm() > 1e-3 * gradient_norm, f"{name}: nothing to compare"
        for rank, ours in enumerate(several):
            size = gold.norm() if name == "loss" else gradient_norm  # a bias alone may be small by cancellation
            assert (ours[name] - gold).norm() <= 1e-6 * size, (name, rank)
    assert len({r["loss"].item() for r in (several if split == "world" else several[:2])}) == 1


def test_ranks_with_different_batches_all_raise(found):
    for rank in range(RANKS):
        assert "[[2, 10, 4], [3, 10, 4], [4, 10, 4], [5, 10, 4]]" in (found[0] / f"uneven.{rank}").read_text()


def test_when_rank_0_fails_first_the_others_raise_too(found):
    assert (found[0] / "first.0").read_text() == "KeyError: 'no data'"
    for rank in range(1, RANKS):
        assert (found[0] / f"first.{rank}").read_text().startswith("MainFailed: rank 0 failed")


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
