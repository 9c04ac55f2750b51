"""Run by test_loss_ranks.py, alone and under torchrun: one step of a small two-tower network with DDP, on fixed data.

python loss_on_ranks.py OUT step    every rank takes its part of one global batch; rank 0 saves loss and gradients to OUT
python loss_on_ranks.py OUT uneven  ranks bring different B: the message of each rank's ValueError goes to OUT.RANK
python loss_on_ranks.py OUT gather  the collectives' own test
python loss_on_ranks.py OUT first   rank 0 fails inside main_first: the message of each rank's error goes to OUT.RANK
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vidla import distributed
from vidla.loss import contrastive_loss

GLOBAL_BATCH, WIDTH, DIM = 16, 12, 10


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.video, self.text = nn.Linear(WIDTH, DIM), nn.Linear(WIDTH, DIM)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, video, caption, subtitle):
        return self.video(video), self.text(caption), self.text(subtitle), self.log_scale.exp()


def global_batch(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    batch = {name: torch.randn(GLOBAL_BATCH, WIDTH) for name in ("video", "caption", "subtitle")}
    batch |= {name: torch.rand(GLOBAL_BATCH) < 0.7 for name in ("has_caption", "has_subtitle")}
    last = slice(3 * GLOBAL_BATCH // 4, None)  # on 4 ranks one has no text at all
    batch["has_caption"][last] = batch["has_subtitle"][last] = False
    batch["has_caption"][0] = batch["has_subtitle"][1] = True
    batch["source"] = torch.arange(GLOBAL_BATCH) % 6 - 1 + 2**40  # sources are shared across ranks, and pass 2**24
    batch["source"][::6] = -1
    return batch


def step(ranks: distributed.Ranks, out: Path, seed: int) -> None:
    batch = global_batch(seed)
    model = TwoTowers()  # seeded by global_batch
    b = GLOBAL_BATCH // ranks.world_size
    mine = {name: x[ranks.rank * b : (ranks.rank + 1) * b] for name, x in batch.items()}
    run = DistributedDataParallel(model) if ranks.world_size > 1 else model
    features = run(mine.pop("video"), mine.pop("caption"), mine.pop("subtitle"))
    loss = contrastive_loss(*features, **mine, chunk=3)
    loss.backward()
    losses = distributed.all_gather_cat(loss.reshape(1))
    assert (losses == losses[0]).all(), losses
    if ranks.is_main:
        torch.save({"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}, out)


def uneven(ranks: distributed.Ranks, out: Path) -> None:
    x = torch.randn(2 + ranks.rank, DIM)
    try:
        contrastive_loss(x, x, x, 10.0)
    except ValueError as error:
        out.with_suffix(f".{ranks.rank}").write_text(str(error))


def gather(ranks: distributed.Ranks) -> None:
    r, n = ranks.rank, ranks.world_size
    ids, flags, values = distributed.all_gather_rows(
        torch.tensor([2**60 + r, -1]), torch.tensor([[True], [r % 2 == 0]]), torch.full((2, 3, 2), r + 0.1, dtype=torch.float64)
    )
    assert ids.tolist() == [x for k in range(n) for x in (2**60 + k, -1)]
    assert flags.dtype == torch.bool
    assert flags.flatten().tolist() == [x for k in range(n) for x in (True, k % 2 == 0)]
    assert torch.equal(values, torch.arange(n).double().add(0.1).repeat_interleave(2)[:, None, None].expand(-1, 3, 2))
    back = distributed.reduce_scatter_rows(torch.arange(2.0 * n)[:, None] + r)
    assert torch.equal(back, n * (torch.arange(2.0)[:, None] + 2 * r) + n * (n - 1) / 2)
    x = torch.tensor([float(r), 1.0])
    assert distributed.all_reduce_sum(x).tolist() == [n * (n - 1) / 2, n]
    assert x.tolist() == [r, 1]
    ranks.barrier()


def first(ranks: distributed.Ranks, out: Path) -> None:
    with ranks.main_first():
        if ranks.is_main:
            out.write_text("made")
        assert out.read_text() == "made"
    try:
        with ranks.main_first():
            raise KeyError("no data")
    except (KeyError, RuntimeError) as error:
        out.with_suffix(f".{ranks.rank}").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    path, task, seed_ = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    ranks_ = distributed.setup("cpu", timeout=timedelta(seconds=60))
    try:
        if task == "step":
            step(ranks_, path, seed_)
        elif task == "uneven":
            uneven(ranks_, path)
        elif task == "gather":
            gather(ranks_)
        elif task == "first":
            first(ranks_, path)
        else:
            raise SystemExit(f"unknown task {task}")
    finally:
        distributed.teardown()
