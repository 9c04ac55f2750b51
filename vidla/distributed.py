"""Ranks under torchrun, and the few collectives that the rest of the package needs.

`setup()` reads torchrun's environment. Plain `python` is one rank and needs no process group, so every helper here
also works without one: with a single rank each is the identity. Every wait has a time limit (`setup(timeout=)`): a
rank that dies makes the others raise instead of hanging for ever, and torchrun then ends them all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# One tensor in, one out. torch 2.14 renamed them, and the old names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class MainFailed(RuntimeError):
    """Rank 0 failed while this rank waited for it; rank 0 says why."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among all processes of the run, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs and files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if dist.is_initialized():
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body on rank 0, and on the other ranks only after that: `with ranks.main_first(): make_data()`.

        Every rank runs the body, so what rank 0 has left behind (a cached data set) should make it quick for the others.
        They wait at most `setup`'s timeout. If the body fails on rank 0, the other ranks raise MainFailed.
        """
        if self.is_main:
            failed = True
            try:
                yield
                failed = False
            finally:
                self._tell(failed)
        else:
            if self._tell(False):
                raise MainFailed("rank 0 failed in a step that the other ranks were waiting for; see its error")
            yield

    def _tell(self, failed: bool) -> bool:
        """True if `failed` is true on any rank."""
        if not dist.is_initialized():
            return failed
        flag = torch.tensor(int(failed), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def setup(device: str = "auto", timeout: timedelta = timedelta(minutes=10)) -> Ranks:
    """Join the run that torchrun started, or be its only rank.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda". With "cuda", rank r of a machine takes its GPU r.
        timeout: how long a collective waits for the other ranks before it raises.
    Returns:
        Ranks. Under torchrun the default process group is up: gloo for CPU tensors, and NCCL for GPU tensors on GPUs.
    Raises:
        ValueError: unknown device, or an environment that has some of torchrun's variables but not all.
        RuntimeError: "cuda" without a GPU, or more ranks on this machine than GPUs.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}: use 'auto', 'cpu' or 'cuda'")
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    launched = "RANK" in os.environ or "WORLD_SIZE" in os.environ
    if launched and missing:
        raise ValueError(f"{', '.join(missing)} not set, although RANK or WORLD_SIZE is: start with torchrun, or unset both")
    rank, world_size, local_rank = (int(os.environ[name]) for name in TORCHRUN_VARIABLES[:3]) if launched else (0, 1, 0)

    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise RuntimeError(f"local rank {local_rank} has no GPU ({gpus} here): start at most {gpus} ranks, or use 'cpu'")
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    else:
        place = torch.device("cpu")
    if launched and not dist.is_initialized():
        # gloo also on GPUs: asynchronous checkpoints gather CPU tensors.
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=timeout)
    return Ranks(rank, world_size, local_rank, place)


def teardown() -> None:
    """Leave the process group, if there is one.

    Does not wait for the other ranks, so that it is safe after an error. At a good end call `Ranks.barrier` before it: a
    rank that leaves early breaks the collectives that others are still in.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def group_place(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """(rank, size) in `group`; None is the default process group, and (0, 1) where none is initialised.

    Raises ValueError if this process is not in the group.
    """
    if group is None and not dist.is_initialized():
        return 0, 1
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("this process is not a member of the process group given")
    return rank, size


def all_gather_cat(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Concatenate (b, ...) of every rank along the first dimension, in rank order: (size * b, ...). No gradient.

    Every rank passes the same shape and dtype.
    """
    size = group_place(group)[1]
    x = x.detach().contiguous()
    if size == 1:
        return x
    out = x.new_empty((size * x.shape[0], *x.shape[1:]))
    _all_gather(out, x, group=group)
    return out


def all_gather_rows(*tensors: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    """`all_gather_cat` of several tensors with the same first dimension, of any dtypes, in one collective.

    Each row travels as the bytes of all its tensors, so integers stay exact beside floats.
    """
    if group_place(group)[1] == 1:
        return [x.detach() for x in tensors]
    rows = [x.detach().reshape(x.shape[0], -1).contiguous().view(torch.uint8) for x in tensors]
    parts = all_gather_cat(torch.cat(rows, dim=1), group).split([row.shape[1] for row in rows], dim=1)
    return [p.contiguous().view(x.dtype).view(-1, *x.shape[1:]) for p, x in zip(parts, tensors, strict=True)]


def reduce_scatter_rows(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum (size * b, ...) over the ranks and return this rank's b rows: the adjoint of `all_gather_cat`. No gradient."""
    size = group_place(group)[1]
    if size == 1:
        return x.detach()
    out = x.new_empty((x.shape[0] // size, *x.shape[1:]))
    _reduce_scatter(out, x.detach().contiguous(), group=group)
    return out


def all_reduce_sum(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum of x over the ranks, the same on each, in a new tensor. No gradient."""
    x = x.detach().clone()
    if group_place(group)[1] > 1:
        dist.all_reduce(x, group=group)
    return x
