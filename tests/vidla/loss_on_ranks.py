"""Run by test_loss_ranks.py as `torchrun --nproc-per-node=4 loss_on_ranks.py FOLDER SEED`.

One launch for all checks on several ranks, because starting ranks is the slow part. What each finds goes to FOLDER.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
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


def step(seed: int, group: dist.ProcessGroup | None = None) -> dict[str, torch.Tensor]:
    """Loss and parameter gradients of one step in which the ranks of the group share the global batch."""
    batch = global_batch(seed)
    model = TwoTowers()  # seeded by global_batch
    rank, ranks = distributed.group_place(group)
    b = GLOBAL_BATCH // ranks
    mine = {name: x[rank * b : (rank + 1) * b] for name, x in batch.items()}
    run = DistributedDataParallel(model, process_group=group) if dist.is_initialized() else model
    features = run(mine.pop("video"), mine.pop("caption"), mine.pop("subtitle"))
    loss = contrastive_loss(*features, **mine, chunk=3, group=group)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def uneven(ranks: distributed.Ranks, folder: Path) -> None:
    x = torch.randn(2 + ranks.rank, DIM)
    try:
        contrastive_loss(x, x, x, 10.0)
    except ValueError as error:
        (folder / f"uneven.{ranks.rank}").write_text(str(error))


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


def first(ranks: distributed.Ranks, folder: Path) -> None:
    made = folder / "made"
    with ranks.main_first():
        if ranks.is_main:
            made.write_text("made")
        assert made.read_text() == "made"
    try:
        with ranks.main_first():
            raise KeyError("no data")
    except (KeyError, RuntimeError) as error:
        (folder / f"first.{ranks.rank}").write_text(f"{type(error).__name__}: {error}")


def main(folder: Path, seed: int) -> None:
    ranks = distributed.setup("cpu", timeout=timedelta(seconds=90))
    gather(ranks)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.save(step(seed), folder / f"world.{ranks.rank}")
    torch.save(step(seed, pairs[ranks.rank // 2]), folder / f"pair.{ranks.rank}")
    uneven(ranks, folder)
    first(ranks, folder)
    ranks.barrier()
    distributed.teardown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
