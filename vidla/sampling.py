"""Which clip comes when, and what is cut out of it: pure functions of (seed, epoch, index).

Invariants:
- Nothing here keeps a state, so the number of workers, of ranks and of restarts cannot change a sample.
- The training stream is endless. Its position p is clip `order(seed, epoch, n)[p % n]` of epoch `p // n`, and global
  batch b is the positions [b * G, (b + 1) * G) for a global batch of G clips. When G does not divide n, the batch on
  the border holds the last clips of one epoch and the first of the next: no clip is dropped and none is repeated to
  fill a batch. (A clip may meet itself in such a batch; the loss masks pairs of one source, docs/decisions.md 11.)
- Resuming is arithmetic: the number of global batches consumed says everything.

Randomness comes from Philox, a counter-based generator: the key is (seed, purpose), the counter starts at
(epoch, index), so neighbouring clips, epochs and seeds are independent without any hashing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

__all__ = ["View", "choose_frames", "choose_view", "crop_box", "dense_frames", "generator", "global_batch", "order"]

ORDER, VIEW, DATA = range(3)  # the purposes: one stream of random numbers for each
Mode = Literal["train", "eval"]


def generator(seed: int, purpose: int, epoch: int = 0, index: int = 0) -> np.random.Generator:
    """Random numbers that belong to (seed, purpose, epoch, index) alone: each such call starts the same stream.

    Raises: ValueError for a negative number.
    """
    if min(seed, purpose, epoch, index) < 0:
        raise ValueError(f"seed, purpose, epoch and index must be >= 0, not {(seed, purpose, epoch, index)}")
    # Drawing increments the counter's first word; the others stay ours for 2^64 blocks.
    counter = np.array([0, index, epoch, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter))


@lru_cache(maxsize=4)  # a batch on the border of two epochs needs two; training and evaluation may take turns
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n clips in one epoch: a read-only (n,) int64 permutation. The last few are kept, not recomputed."""
    permutation = generator(seed, ORDER, epoch).permutation(n)
    permutation.setflags(write=False)
    return permutation


def global_batch(seed: int, batch: int, size: int, n: int) -> list[tuple[int, int]]:
    """The (epoch, clip index) pairs of one global batch of the endless training stream over n clips.

    Args: batch: its number, from 0. size: clips in a global batch. n: clips in the data set (fewer than `size` is legal).
    """
    if n < 1 or size < 1 or batch < 0:
        raise ValueError(f"need n >= 1, size >= 1 and batch >= 0, not n={n}, size={size}, batch={batch}")
    positions = (divmod(p, n) for p in range(batch * size, (batch + 1) * size))
    return [(epoch, int(order(seed, epoch, n)[place])) for epoch, place in positions]


def choose_frames(stored: int, frames: int, mode: Mode, rng: np.random.Generator | None = None) -> np.ndarray:
    """Segment sampling: one frame of each of `frames` equal segments of the clip (docs/decisions.md 9).

    Args:
        stored: frames the clip has. frames: T, frames wanted.
        mode: "train" takes a random frame of each segment, "eval" the one at its centre.
        rng: needed for "train" only.
    Returns: (T,) int64, never decreasing. With fewer than T frames stored, neighbours repeat; it never fails.
    """
    if stored < 1 or frames < 1:
        raise ValueError(f"need at least one frame stored and one wanted, not stored={stored}, frames={frames}")
    within = _rng(rng, "train").random(frames) if mode == "train" else 0.5
    # Segments are real intervals of [0, stored), so they stay equal when T does not divide the number of frames.
    chosen = ((np.arange(frames) + within) * stored / frames).astype(np.int64)
    return np.minimum(chosen, stored - 1)  # rounding up to `stored` itself is possible


def dense_frames(stored: int, frames: int, stride: int, mode: Mode, rng: np.random.Generator | None = None) -> np.ndarray:
    """Dense sampling, SlowFast's (paper, appendix A.3): every `stride`-th stored frame of a window within the clip.

    Args:
        stored: frames the clip has. frames: T, frames wanted. stride: stored frames from one to the next.
        mode: "train" draws the window's place, "eval" takes the centre.
        rng: needed for "train" only.
    Returns: (T,) int64, never decreasing. Where the clip is shorter than the window, its last frame repeats.
    """
    if min(stored, frames, stride) < 1:
        raise ValueError(f"need stored, frames and stride >= 1, not {stored=}, {frames=}, {stride=}")
    spare = max(0, stored - (frames - 1) * stride - 1)
    start = int(_rng(rng, "train").integers(spare + 1)) if mode == "train" else spare // 2
    return np.minimum(start + stride * np.arange(frames), stored - 1)


def crop_box(
    width: int, height: int, mode: Mode, rng: np.random.Generator | None = None, scales: Sequence[float] = (1.0, 0.8)
) -> tuple[int, int, int]:
    """A square crop (left, top, side) in pixels, the same for every frame of the clip.

    "train": the side is the frame's short side times one of `scales`, the place is random (the paper's multi-scale
    random crop; a square scaled to a square keeps the aspect). "eval", and "train" where `scales` is empty: the centre,
    side = short side.
    """
    if not all(0 < s <= 1 for s in scales):
        raise ValueError(f"crop scales must be in (0, 1], not {tuple(scales)}")
    short = min(width, height)
    if mode == "eval" or not scales:
        return (width - short) // 2, (height - short) // 2, short
    rng = _rng(rng, "train")
    side = max(1, round(short * scales[int(rng.integers(len(scales)))]))
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    return left, top, side


@dataclass(frozen=True)
class View:
    """What is taken of a clip: frame indices (T,), a square (left, top, side) of pixels, mirrored or not."""

    frames: tuple[int, ...]
    box: tuple[int, int, int]
    flip: bool


def choose_view(
    seed: int,
    epoch: int,
    index: int,
    *,
    stored: int,
    width: int,
    height: int,
    frames: int,
    mode: Mode,
    crop_scales: Sequence[float] = (1.0, 0.8),
    flip: bool = True,
    stride: int | None = None,
) -> View:
    """The view of clip `index` in `epoch`: dense sampling where there is a `stride`, segment sampling where it is None.

    Never flipped in "eval"; in "train" with probability 1/2 where `flip` is on.
    """
    rng = generator(seed, VIEW, epoch, index) if mode == "train" else None
    chosen = choose_frames(stored, frames, mode, rng) if stride is None else dense_frames(stored, frames, stride, mode, rng)
    box = crop_box(width, height, mode, rng, crop_scales)
    mirrored = rng is not None and flip and bool(rng.random() < 0.5)  # drawn last: `flip` changes no other choice
    return View(tuple(chosen.tolist()), box, mirrored)


def _rng(rng: np.random.Generator | None, mode: str) -> np.random.Generator:
    if rng is None:
        raise ValueError(f'mode "{mode}" draws at random: pass rng=generator(seed, VIEW, epoch, index)')
    return rng
