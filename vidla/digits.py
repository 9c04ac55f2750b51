"""Moving digits: the default recipe's data. Handwritten digits move over small frames, two texts tell what happens.

A clip is a sequence of one to three events; an event is one digit (scikit-learn's 8x8 images, enlarged) with one motion.
The digit of an event is gone when the next begins, so the order is visible, and the texts tell the events in order:
    caption   "a seven moves left, then a two rises"
    subtitle  "look, the 7 goes off to the left and after that the 2 climbs up"
Every test caption has a twin that differs in nothing but the order, and left from right is told by motion alone: a model
that looks at single frames, or at a set of frames, cannot solve the task.

As with the paper's data, clips of three lengths overlap in one source: a source is five events, its short clips are
single events, its medium clips two neighbouring ones, its long clip three. Train and test use different images of the
digits. The data is real in every other respect: shards of JPEG frames as `vidla.shards` describes.

Left and right are in the texts: train on this data without the horizontal flip, and with whole frames (crop scale 1).

    python -m vidla.digits OUT --clips 100000 --seed 1
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image

from vidla_kernels.files import cache_folder

from . import sampling
from .shards import ClipMeta, ShardWriter

__all__ = ["default_folder", "digit_images", "generate", "make_default"]

Split = Literal["train", "test"]

VERSION = 1  # counts changes of what is drawn or said, so that an old cache is not taken for the new data
SIZE = 64  # pixels of a frame's side
DIGIT = 32  # pixels of a digit's side
GRID = 16  # pixels: digits stand on the default tower's grid of patches, or 4 minutes are too few to learn to read them
FPS = 4.0
EVENT_FRAMES = (8, 11)  # an event lasts 8 to 11 frames, 2 to 2.75 s
TEST_EVERY = 4  # every fourth image of a class is the test split's
MISSING = 0.1  # share of the training clips without caption, and of those without subtitle
DEFAULT_CLIPS, DEFAULT_TEST_CLIPS = 8000, 400
SCALES = {1: "short", 2: "medium", 3: "long"}

# motion -> (what captions call it, what subtitles call it)
MOTIONS = {
    "left": ("moves left", "goes off to the left"),
    "right": ("moves right", "heads over to the right side"),
    "up": ("rises", "climbs up"),
    "down": ("falls", "drops to the bottom"),
    "back": ("turns back", "comes out and returns"),
    "appear": ("appears", "slowly fades in"),
    "vanish": ("vanishes", "is fading away"),
}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPENINGS = ("look, ", "here ", "okay so ", "and now ")


@dataclass(frozen=True)
class Event:
    """One digit (0-9) and its motion, a key of MOTIONS."""

    digit: int
    motion: str


EVENTS = tuple(Event(digit, motion) for digit in range(10) for motion in MOTIONS)

# ---- Texts -----------------------------------------------------------------------------------------------------


def caption_of(events: Iterable[Event]) -> str:
    """What a captioner would write. Different events, or another order, give a different text."""
    article = {8: "an"}
    return ", then ".join(f"{article.get(e.digit, 'a')} {NAMES[e.digit]} {MOTIONS[e.motion][0]}" for e in events)


def subtitle_of(events: Iterable[Event], opening: str) -> str:
    """The same content as somebody would say it, in other words and with numerals."""
    return opening + " and after that ".join(f"the {e.digit} {MOTIONS[e.motion][1]}" for e in events)


# ---- Pictures --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def digit_images() -> dict[Split, tuple[np.ndarray, ...]]:
    """The two splits of scikit-learn's digits: for each class 0-9 an array (images, 8, 8), values 0 to 16.

    Within a class every fourth image is for the test. No image is in both.
    """
    from sklearn.datasets import load_digits  # 1 s to import, and only this function needs it

    data = load_digits()
    classes = [data.images[data.target == digit] for digit in range(10)]
    test = [np.arange(len(images)) % TEST_EVERY == TEST_EVERY - 1 for images in classes]
    return {
        "train": tuple(images[~t] for images, t in zip(classes, test, strict=True)),
        "test": tuple(images[t] for images, t in zip(classes, test, strict=True)),
    }


@lru_cache(maxsize=2)
def _enlarged(split: Split) -> tuple[np.ndarray, ...]:
    """The images of a split as (images, DIGIT, DIGIT) float32 in 0 to 1."""

    def enlarge(image: np.ndarray) -> np.ndarray:
        small = Image.fromarray((image * (255 / 16)).astype(np.uint8))
        return np.asarray(small.resize((DIGIT, DIGIT), Image.Resampling.BICUBIC), dtype=np.float32) / 255

    return tuple(np.stack([enlarge(image) for image in images]) for images in digit_images()[split])


def _path(motion: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left edge, upper edge (pixels, may lie outside the frame) and opacity of a digit in each of `count` frames."""
    t = np.linspace(0, 1, count)
    room = SIZE - DIGIT
    along = -GRID + t * (room + 2 * GRID)  # from half outside one side to half outside the other: 64 pixels
    across = np.full(count, rng.integers(room // GRID + 1) * GRID)
    full = np.ones(count)
    if motion == "right":
        return along, across, full
    if motion == "left":
        return room - along, across, full
    if motion == "down":
        return across, along, full
    if motion == "up":
        return across, room - along, full
    if motion == "back":  # in from the left, and back there
        return -GRID + (1 - np.abs(2 * t - 1)) * (room + GRID), across, full
    opacity = np.clip(0.1 + 1.2 * t, 0, 1)  # of a digit that appears where it stands, or vanishes
    return across, np.full(count, rng.integers(room // GRID + 1) * GRID), opacity if motion == "appear" else opacity[::-1]


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """(64, SIZE, SIZE) float32: frames of camera noise to take from, since drawing one for each frame takes longer."""
    return sampling.generator(0, sampling.DATA).normal(0, 2.5, (64, SIZE, SIZE)).astype(np.float32)


def _draw_event(event: Event, background: np.ndarray, contrast: float, split: Split, rng: np.random.Generator) -> list[bytes]:
    """The JPEG frames of one event on its source's background."""
    images = _enlarged(split)[event.digit]
    digit = images[rng.integers(len(images))]
    count = int(rng.integers(EVENT_FRAMES[0], EVENT_FRAMES[1] + 1))
    xs, ys, opacity = _path(event.motion, count, rng)
    noise = _noise()[rng.integers(len(_noise()), size=count)]
    jpegs = []
    canvas = np.zeros((SIZE + 2 * DIGIT, SIZE + 2 * DIGIT), np.float32)  # a margin, so a digit may leave the frame
    for k in range(count):
        left, top = (round(place / GRID) * GRID + DIGIT for place in (xs[k], ys[k]))
        canvas[:] = 0
        canvas[top : top + DIGIT, left : left + DIGIT] = digit * (contrast * opacity[k])
        frame = background + noise[k] + canvas[DIGIT:-DIGIT, DIGIT:-DIGIT]
        jpegs.append(_encode(np.clip(frame, 0, 255).astype(np.uint8)))
    return jpegs


def _encode(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=85)  # one channel: smaller, and readers make RGB of it
    return file.getvalue()


def _background(rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A grey slope (SIZE, SIZE) and the brightness a digit adds to it."""
    level, contrast = rng.uniform(15, 70), rng.uniform(130, 180)
    slope = rng.uniform(-20, 20, 2)
    grid = np.linspace(-0.5, 0.5, SIZE)
    return (level + slope[0] * grid[:, None] + slope[1] * grid).astype(np.float32), contrast


# ---- Data sets -------------------------------------------------------------------------------------------------


def _train_sources(seed: int) -> Iterator[tuple[tuple[Event, ...], list[tuple[int, int]]]]:
    """Endless sources: five events, and ten windows (first event, events): five short, four medium, one long."""
    for number in itertools.count():
        rng = sampling.generator(seed, sampling.DATA, 1, number)
        events = tuple(EVENTS[i] for i in rng.integers(len(EVENTS), size=5))
        windows = [(k, 1) for k in range(5)] + [(k, 2) for k in range(4)] + [(int(rng.integers(3)), 3)]
        yield events, windows


def _test_sources(seed: int, clips: int) -> Iterator[tuple[tuple[Event, ...], list[tuple[int, int]]]]:
    """`clips` sources of two events, all different, in pairs of (a, b) and (b, a)."""
    pairs = list(itertools.combinations(EVENTS, 2))
    for place in range(clips):
        a, b = pairs[sampling.order(seed, 0, len(pairs))[place // 2]]
        yield ((a, b) if place % 2 == 0 else (b, a)), [(0, 2)]


def _check_arguments(split: str, clips: int, seed: int) -> None:
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", not {split!r}')
    if clips < 1:
        raise ValueError(f"clips must be >= 1, not {clips}")
    texts = len(EVENTS) * (len(EVENTS) - 1)
    if split == "test" and clips > texts:
        raise ValueError(f"the test split has at most {texts} clips, since no text comes twice, not {clips}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2^64 - 1, not {seed}")


def generate(
    folder: str | Path,
    split: Split = "train",
    clips: int = DEFAULT_CLIPS,
    seed: int = 0,
    *,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes shards of moving digits to a folder that has none yet; a pure function of (split, clips, seed).

    Args:
        split: "train" has clips of one, two and three events (50, 40 and 10 %), a tenth without caption and another
            tenth without subtitle. "test" has clips of two events, all with both texts, no text twice.
        clips: how many; fewer clips are the first of more.
        progress: called with the number of clips written so far.
    Returns: the folder.
    Raises: ValueError for an illegal argument, before anything is made; FileExistsError if the folder has shards.
    """
    _check_arguments(split, clips, seed)
    sources = _train_sources(seed) if split == "train" else _test_sources(seed, clips)
    written = 0
    with ShardWriter(folder) as writer:
        for number, (events, windows) in enumerate(sources):
            rng = sampling.generator(seed, sampling.DATA, 2 if split == "train" else 3, number)
            background, contrast = _background(rng)
            frames = [_draw_event(event, background, contrast, split, rng) for event in events]
            begins = np.cumsum([0] + [len(f) for f in frames])  # the frame each event begins with
            for first, count in windows[: clips - written]:
                meta = _describe(f"{split}-{number:06d}", events, first, count, begins, rng, split)
                writer.write(meta, [jpeg for event in frames[first : first + count] for jpeg in event])
                written += 1
            if progress is not None:
                progress(written)
            if written == clips:
                break
    return Path(folder)


def _describe(
    source: str, events: tuple[Event, ...], first: int, count: int, begins: np.ndarray, rng: np.random.Generator, split: Split
) -> ClipMeta:
    window = events[first : first + count]
    a, b = int(begins[first]), int(begins[first + count])
    caption = caption_of(window)
    subtitle = subtitle_of(window, OPENINGS[int(rng.integers(len(OPENINGS)))])
    lot = rng.random()
    return ClipMeta(
        key=f"{source}-{first}-{count}",
        caption=None if split == "train" and lot < MISSING else caption,
        subtitle=None if split == "train" and MISSING <= lot < 2 * MISSING else subtitle,
        source=source,
        start=a / FPS,
        end=b / FPS,
        times=tuple((k + 0.5) / FPS for k in range(a, b)),
        width=SIZE,
        height=SIZE,
        scale=SCALES[count],
        extra={"events": [[e.digit, e.motion] for e in window]},
    )


# ---- The default data set ----------------------------------------------------------------------------------------


def default_folder(cache_dir: str | Path | None, clips: int, test_clips: int, seed: int) -> Path:
    """Where `make_default` keeps the data: cache_dir, else the user's cache; a name for each content."""
    cache = Path(cache_dir or cache_folder()).expanduser()
    said = repr(
        (VERSION, clips, test_clips, seed, SIZE, DIGIT, GRID, FPS, EVENT_FRAMES, TEST_EVERY, MISSING, MOTIONS, OPENINGS)
    )
    return cache / f"moving-digits-v{VERSION}-{hashlib.sha256(said.encode()).hexdigest()[:10]}"


def make_default(
    cache_dir: str | Path | None = None, *, clips: int = DEFAULT_CLIPS, test_clips: int = DEFAULT_TEST_CLIPS, seed: int = 0
) -> tuple[Path, Path]:
    """The default data set: (training folder, test folder). Generated by the first call, found by the others.

    A half-made set is never taken for a whole one (it is made under another name and renamed), and of several
    processes that ask at once one works while the others wait for it.

    Raises: OSError saying what to do where the cache cannot be used.
    """
    folder = default_folder(cache_dir, clips, test_clips, seed)
    try:
        return _make_once(folder, clips, test_clips, seed)
    except OSError as error:
        raise OSError(
            f"cannot keep the default data in {folder.parent} ({error}); let the environment variable VIDLA_CACHE name a "
            "folder that can be written, or give data of your own (--data.train, --data.test)"
        ) from error


def _make_once(folder: Path, clips: int, test_clips: int, seed: int) -> tuple[Path, Path]:
    train, test = folder / "train", folder / "test"
    if folder.exists():
        return train, test
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # another process made it while this one waited
            return train, test
        for left in folder.parent.glob(f".{folder.name}.*.unfinished"):  # of a process that died: we hold the lock
            shutil.rmtree(left)
        making = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".unfinished", dir=folder.parent))
        making.chmod(0o755)  # mkdtemp's 0700 would lock out a shared cache
        with _Progress(f"making the default data in {folder}", clips + test_clips) as progress:
            generate(making / "train", "train", clips, seed, progress=progress)
            generate(making / "test", "test", test_clips, seed, progress=lambda n: progress(clips + n))
        os.rename(making, folder)
    return train, test


class _Progress:
    """A bar on a terminal; elsewhere a line at the start, the end, and at most every five seconds. On stderr."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True))

    def __enter__(self) -> _Progress:
        self.began = self.last = time.monotonic()
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total)
        else:
            print(f"{self.title}: {self.total} clips", file=sys.stderr, flush=True)
        return self

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=done)
        elif now - self.last >= 5:
            self.last = now
            print(f"  {done} of {self.total} clips", file=sys.stderr, flush=True)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if kind is None:
            print(f"  {self.total} clips in {time.monotonic() - self.began:.1f} s", file=sys.stderr, flush=True)


def main(
    out: Annotated[Path, tyro.conf.Positional],
    /,
    clips: int = DEFAULT_CLIPS,
    seed: int = 0,
    split: Split = "train",
) -> None:
    """Write a data set of moving digits, for training runs and load tests of any size.

    Each clip shows handwritten digits that move over 64x64 frames, one after the other, and has two texts that tell
    what happens ("a seven moves left, then a two rises"). The same arguments always give the same bytes.

    Examples:
      python -m vidla.digits data/train --clips 100000
      python -m vidla.digits data/test --split test --clips 400

    Args:
        out: folder for the shards; made if needed, must not hold shards yet.
        clips: how many clips, at about 25 KB each. The test split has at most 4830, since no text comes twice.
        seed: another seed gives another data set; at most 2^64 - 1.
        split: train has clips of one to three events, and some lack a text; test has two events and different images.
    """
    try:
        _check_arguments(split, clips, seed)
        with _Progress(f"writing {out}", clips) as progress:
            generate(out, split, clips, seed, progress=progress)
    except (ValueError, OSError) as error:
        print(f"vidla.digits: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m vidla.digits")
