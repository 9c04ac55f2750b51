"""Batches of clips: shards -> JPEG decode -> crop, resize, flip -> normalised video and tokens.

Invariants:
- Batch b is a pure function of (seed, b) and the shards: its clips, frames, crops and flips come from `vidla.sampling`.
  Neither the number of workers nor of ranks changes a bit of the global batch; rank r gets its contiguous part.
- Resuming means to start at batch `start`; nothing is replayed, nothing has to be saved.
- No clip is dropped or replaced: the training stream runs over the ends of epochs, and a clip that cannot be read stops
  the run with its shard, key and frame.

Workers hand over uint8, a quarter of float32's bytes; it becomes float on the training device, in one pass.
Decoding is Pillow's. On one core a 64x64 grey frame takes 50 us and a 456x256 colour frame 0.65 ms; torchvision's decoder,
which gives the same bits, takes 22 us and 0.44 ms, but torchvision 0.29 announces its removal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from . import sampling
from .shards import ClipMeta, ShardSet, decode_frame

__all__ = ["CLIP_MEAN", "CLIP_STD", "Batch", "ClipLoader", "decode_clip", "normalise"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in 0 to 1, from CLIP's training data
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PREFETCH = 4  # batches a worker prepares ahead


@dataclass
class Batch:
    """One rank's part of a global batch.

    Attributes:
        video: (B, T, 3, h, w) float32, normalised with CLIP's mean and deviation.
        caption, subtitle: (B, L) int64 tokens; a row whose text is missing holds the tokens of "".
        has_caption, has_subtitle: (B,) bool.
        source: (B,) int64, equal for clips of one source video, on every rank.
        index: (B,) int64, the clips' numbers in the ShardSet.
        label: (B,) int64, their classes; -1 where there is none.
        keys: their keys.
    """

    video: torch.Tensor
    caption: torch.Tensor
    subtitle: torch.Tensor
    has_caption: torch.Tensor
    has_subtitle: torch.Tensor
    source: torch.Tensor
    index: torch.Tensor
    label: torch.Tensor
    keys: list[str]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = {k: v.to(device, non_blocking=non_blocking) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)

    def __len__(self) -> int:
        return len(self.keys)


class ClipLoader:
    """Iterates over the batches of one rank: endlessly in training, once over all clips in evaluation.

    In evaluation clips come in their own order, with centre frames and centre crops. The last batch may be smaller,
    and with several ranks the last ranks may get one batch less than the first.
    """

    def __init__(
        self,
        shards: ShardSet,
        tokenizer: Callable[[list[str]], torch.Tensor],
        *,
        frames: int,
        image_size: int,
        batch_size: int,
        seed: int = 0,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
        start: int = 0,
        crop_scales: Sequence[float] = (1.0, 0.8),
        flip: bool = True,
        stride: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            tokenizer: list of texts -> (texts, L) int64. Called in the workers.
            frames: T. image_size: h = w, pixels. batch_size: clips of this rank in a batch.
            seed: decides order, frames, crops and flips in training; without effect in evaluation.
            workers: processes that decode; 0 decodes in this one. start: global batches already consumed.
            crop_scales, flip: see `vidla.sampling`; training only.
            stride: of dense sampling, in stored frames; None is segment sampling.
            device: where the batches' tensors shall lie. On a GPU they travel as uint8, pinned, and become float there.
        """
        if min(frames, image_size, batch_size, world_size) < 1 or min(workers, start) < 0 or not 0 <= rank < world_size:
            raise ValueError(
                "need frames, image_size, batch_size, world_size >= 1, workers, start >= 0 and 0 <= rank < world_size, not "
                f"{frames=}, {image_size=}, {batch_size=}, {world_size=}, {workers=}, {start=}, {rank=}"
            )
        self.shards, self.seed, self.train, self.start, self.workers = shards, seed, train, start, workers
        self.batch_size, self.rank, self.world_size, self.device = batch_size, rank, world_size, torch.device(device)
        self.clips = _Clips(shards, tokenizer, seed, frames, image_size, train, tuple(crop_scales), flip, stride)

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches this rank gets from `start` on, in evaluation. Raises: TypeError in training, which does not end."""
        if self.train:
            raise TypeError("the training stream is endless: it has no length")
        return sum(1 for _ in self._samples())

    def global_keys(self, batch: int) -> list[str]:
        """The keys of the whole global batch `batch`, in order and for all ranks; reads nothing but the index."""
        return [self.shards.keys[index] for _, index in self._global_batch(batch)]

    def _global_batch(self, batch: int) -> list[tuple[int, int]]:
        size, n = self.global_batch_size, len(self.shards)
        if self.train:
            return sampling.global_batch(self.seed, batch, size, n)
        return [(0, index) for index in range(batch * size, min((batch + 1) * size, n))]

    def _samples(self) -> Iterator[list[tuple[int, int]]]:
        """This rank's (epoch, clip index) pairs, batch after batch."""
        batch = self.start
        while whole := self._global_batch(batch):
            if mine := whole[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]:
                yield mine
            batch += 1

    def __iter__(self) -> Iterator[Batch]:
        parallel: dict[str, Any] = {}
        if self.workers:  # a worker runs torch on one thread: the DataLoader sees to that
            parallel = {"num_workers": self.workers, "prefetch_factor": PREFETCH, "worker_init_fn": _leave_group}
        loader = DataLoader(
            self.clips,
            batch_sampler=self._samples(),
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # of its own, so that loading draws nothing from the global generator
            **parallel,
        )
        for fields in loader:
            batch = Batch(**fields).to(self.device, non_blocking=True)
            batch.video = normalise(batch.video)
            yield batch


def _leave_group(_: int) -> None:
    """A signal to the trainer's process group (Ctrl-C, a scheduler's SIGTERM) must not kill its workers: the trainer ends
    its step first, and then them."""
    os.setpgid(0, 0)


def normalise(video: torch.Tensor) -> torch.Tensor:
    """(..., 3, h, w) uint8 RGB -> float32 with CLIP's mean 0 and deviation 1 in each channel."""
    std = torch.tensor(CLIP_STD, device=video.device).view(3, 1, 1)
    mean = torch.tensor(CLIP_MEAN, device=video.device).view(3, 1, 1)
    return video.float().sub_(mean * 255).div_(std * 255)


def decode_clip(shards: ShardSet, index: int, meta: ClipMeta, view: sampling.View, image_size: int) -> torch.Tensor:
    """What `view` takes of clip `index`: (T, 3, image_size, image_size) uint8 RGB, channels last in memory.

    The crop is scaled with antialiased bicubic interpolation, as CLIP's is, and not at all where it has the size already.

    Raises: ShardError naming shard, key and frame where a frame is no JPEG of the size that the clip's JSON gives.
    """
    left, top, side = view.box
    video = np.empty((len(view.frames), side, side, 3), dtype=np.uint8)
    for t, (k, jpeg) in enumerate(zip(view.frames, shards.frames(index, view.frames), strict=True)):
        if t > 0 and k == view.frames[t - 1]:  # a clip with fewer frames than T repeats some
            video[t] = video[t - 1]
            continue
        frame = decode_frame(jpeg, meta, f"{shards.where(index)}, frame {k:02d}")
        video[t] = frame[top : top + side, left : left + side]
    out = torch.from_numpy(video).permute(0, 3, 1, 2)  # channels last is the fast case of interpolate on uint8
    if side != image_size:
        out = F.interpolate(out, (image_size, image_size), mode="bicubic", antialias=True)
    return out.flip(-1) if view.flip else out


class _Clips(Dataset):
    """Gives whole batches of (epoch, clip index) pairs as the fields of a Batch, the video still as uint8."""

    def __init__(
        self,
        shards: ShardSet,
        tokenizer: Callable[[list[str]], torch.Tensor],
        seed: int,
        frames: int,
        image_size: int,
        train: bool,
        crop_scales: tuple[float, ...],
        flip: bool,
        stride: int | None,
    ) -> None:
        self.shards, self.tokenizer, self.seed, self.image_size = shards, tokenizer, seed, image_size
        self.view_options: dict[str, Any] = {
            "frames": frames,
            "mode": "train" if train else "eval",
            "crop_scales": crop_scales,
            "flip": flip,
            "stride": stride,
        }

    def __getitems__(self, samples: list[tuple[int, int]]) -> dict[str, Any]:
        metas = [self.shards.meta(index) for _, index in samples]
        video = torch.empty(len(samples), self.view_options["frames"], 3, self.image_size, self.image_size, dtype=torch.uint8)
        for out, meta, (epoch, index) in zip(video, metas, samples, strict=True):
            stored = {"stored": len(meta.times), "width": meta.width, "height": meta.height}
            view = sampling.choose_view(self.seed, epoch, index, **stored, **self.view_options)
            out.copy_(decode_clip(self.shards, index, meta, view, self.image_size))
        indices = np.array([index for _, index in samples])
        return {
            "video": video,
            "caption": self.tokenizer([meta.caption or "" for meta in metas]),
            "subtitle": self.tokenizer([meta.subtitle or "" for meta in metas]),
            "has_caption": torch.tensor([meta.caption is not None for meta in metas]),
            "has_subtitle": torch.tensor([meta.subtitle is not None for meta in metas]),
            "source": torch.from_numpy(self.shards.source_ids[indices]),
            "index": torch.from_numpy(indices),
            "label": torch.tensor([meta.label for meta in metas]),
            "keys": [meta.key for meta in metas],
        }


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    """The collate function: `_Clips` has made the batch already. Not a lambda, which spawned workers could not get."""
    return batch
