"""Moving digits: what the texts and pictures promise, and a cache that is never half made."""

import io
import itertools
import multiprocessing
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vidla import digits
from vidla.digits import Event
from vidla.shards import ShardSet


def pixels(read: ShardSet, i: int) -> np.ndarray:
    """(frames, 64, 64)"""
    return np.stack([np.asarray(Image.open(io.BytesIO(j))) for j in read.frames(i, range(read.frame_counts[i]))]).astype(float)


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> ShardSet:
    return ShardSet(digits.generate(tmp_path_factory.mktemp("digits") / "train", "train", clips=600, seed=5))


@pytest.fixture(scope="module")
def test(tmp_path_factory) -> ShardSet:
    return ShardSet(digits.generate(tmp_path_factory.mktemp("digits") / "test", "test", clips=250, seed=5))


def test_no_image_in_both_splits():
    seen = {
        split: {image.tobytes() for of_class in digits.digit_images()[split] for image in of_class}
        for split in ("train", "test")
    }
    assert not seen["train"] & seen["test"]
    assert sum(map(len, digits.digit_images()["train"])) + sum(map(len, digits.digit_images()["test"])) == 1797
    assert all(len(images) >= 40 for images in digits.digit_images()["test"])


def test_each_split_draws_its_own_images(tmp_path, monkeypatch):
    """With one split's images painted black, that split's frames show nothing, and the other's still do."""
    blank = tuple(np.zeros_like(images) for images in digits._enlarged("test"))
    images = digits._enlarged("train")
    monkeypatch.setattr(digits, "_enlarged", lambda split: {"test": blank, "train": images}[split])
    seen = {}
    for split in ("train", "test"):
        read = ShardSet(digits.generate(tmp_path / split, split, clips=2))
        seen[split] = float(np.ptp(pixels(read, 0)[-3]))
    assert seen["test"] < 80 < seen["train"]


def test_test_split_has_two_events_and_distinct_texts(test):
    metas = list(test)
    assert len(metas) == 250
    assert len({m.caption for m in metas}) == 250
    assert len({re.sub("^(" + "|".join(digits.OPENINGS) + ")", "", m.subtitle) for m in metas}) == 250
    assert len({m.source for m in metas}) == 250
    assert {(m.scale, len(m.extra["events"])) for m in metas} == {("medium", 2)}
    captions = {m.caption for m in metas}
    assert all(" then ".join(reversed(c.split(", then "))).replace(" then ", ", then ") in captions for c in captions)


def test_train_split_mixes_lengths_and_misses_texts(train):
    metas = list(train)
    assert Counter(m.scale for m in metas) == {"short": 300, "medium": 240, "long": 60}
    missing = Counter((m.caption is None, m.subtitle is None) for m in metas)
    assert missing[True, True] == 0
    assert 25 < missing[True, False] < 105  # of 600, a tenth; five standard deviations
    assert 25 < missing[False, True] < 105
    assert {tuple(event) for m in metas for event in m.extra["events"]} == {(e.digit, e.motion) for e in digits.EVENTS}
    assert Counter(Counter(train.source_ids.tolist()).values()) == {10: 60}


def test_clips_of_a_source_overlap(train):
    """Frames of the same moment are the same picture in every clip of the source."""
    moments: dict[float, bytes] = {}
    shared = 0
    for i in range(10):  # the first source
        meta = train.meta(i)
        assert meta.start <= meta.times[0]
        assert meta.times[-1] <= meta.end
        assert meta.duration == len(meta.times) / digits.FPS
        for moment, jpeg in zip(meta.times, train.frames(i, range(len(meta.times))), strict=True):
            shared += moment in moments
            assert moments.setdefault(moment, jpeg) == jpeg
    assert shared > 0


def test_texts_follow_the_events(train):
    words = {"caption": {}, "subtitle": {}}
    for meta in train:
        events = [Event(digit, motion) for digit, motion in meta.extra["events"]]
        if meta.caption is not None:
            assert meta.caption == digits.caption_of(events)
        if meta.subtitle is not None:
            assert meta.subtitle in {digits.subtitle_of(events, opening) for opening in digits.OPENINGS}
    for make in (digits.caption_of, lambda e: digits.subtitle_of(e, "")):
        texts = Counter(make(pair) for pair in itertools.product(digits.EVENTS, repeat=2))
        assert max(texts.values()) == 1
        words[make] = {word for text in texts for word in re.findall(r"\w+", text)}
    *_, one, other = words.values()
    assert one & other <= {"left", "right"}  # hardly a word in common
    assert digits.caption_of([Event(8, "left"), Event(2, "up")]) == "an eight moves left, then a two rises"


@pytest.mark.parametrize("split", ["train", "test"])
def test_pictures_show_the_motion(request, split):
    """The centre of the bright pixels moves as the event says, by 12 pixels and more in half an event."""
    read = request.getfixturevalue(split)
    checked = set()
    for i in range(120):
        meta = read.meta(i)
        if split == "train" and meta.scale != "short":
            continue
        motion = meta.extra["events"][0][1]
        frames = pixels(read, i)[: digits.EVENT_FRAMES[0]]  # no event is shorter
        floor, peak = np.median(frames, axis=(1, 2)), frames.max((1, 2))
        bright = np.clip(frames - ((floor + peak) / 2)[:, None, None], 0, None)  # the digit, none of the background
        y, x = ((bright * grid).sum((1, 2)) / bright.sum((1, 2)) for grid in np.mgrid[:64, :64])
        # A faint digit has no sharp place: where it appears late frames count, where it vanishes early ones. A digit
        # that moves is whole in the frames between.
        first, last = {"appear": (3, 6), "vanish": (0, 3)}.get(motion, (2, 5))
        dx, dy = x[last] - x[first], y[last] - y[first]
        checked.add(motion)
        if motion in ("appear", "vanish"):
            assert abs(dx) + abs(dy) < 3, meta
            faint, strong = (1, 6) if motion == "appear" else (6, 1)
            assert (peak - floor)[strong] > 1.5 * (peak - floor)[faint], meta
        elif motion == "back":
            assert x[0] < x[4], meta
        else:
            along, across = (dx, dy) if motion in ("left", "right") else (dy, dx)
            assert along * (1 if motion in ("right", "down") else -1) > 12, meta
            assert abs(across) < 4, meta
    assert checked == set(digits.MOTIONS)


def test_same_arguments_same_bytes_and_fewer_are_the_first(train, tmp_path):
    digits.generate(tmp_path / "same", "train", clips=37, seed=5)
    digits.generate(tmp_path / "other", "train", clips=37, seed=6)
    same, other = ShardSet(tmp_path / "same"), ShardSet(tmp_path / "other")
    assert len(same) == 37
    for i in range(37):
        assert same.meta(i) == train.meta(i)
        assert same.frames(i, range(same.frame_counts[i])) == train.frames(i, range(same.frame_counts[i]))
    assert [m.extra for m in same] != [m.extra for m in other]


def test_bad_arguments_say_what_is_legal(tmp_path):
    wrong = {
        "train": {"split": "dev"},
        ">= 1": {"clips": 0},
        "4830": {"split": "test", "clips": 4831},
        "not -1": {"seed": -1},
        "2\\^64 - 1": {"seed": 2**64},
    }
    for words, kwargs in wrong.items():
        with pytest.raises(ValueError, match=words):
            digits.generate(tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()


SMALL = {"clips": 40, "test_clips": 6}


def test_default_is_made_once(tmp_path, capfd, monkeypatch):
    train, test = digits.make_default(tmp_path, **SMALL)
    assert (len(ShardSet(train)), len(ShardSet(test))) == (40, 6)
    assert "46 clips" in capfd.readouterr().err
    monkeypatch.setattr(digits, "generate", None)  # a second generation would call it
    assert digits.make_default(tmp_path, **SMALL) == (train, test)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("VIDLA_CACHE", str(tmp_path))
    assert digits.make_default(**SMALL) == (train, test)
    names = {digits.default_folder(tmp_path, *args) for args in ((40, 6, 0), (41, 6, 0), (40, 7, 0), (40, 6, 1))}
    assert len(names) == 4


def test_a_cache_that_cannot_be_used_says_what_to_do(tmp_path, monkeypatch):
    cache = tmp_path / "file"
    cache.touch()
    for place in (cache, cache / "below"):
        monkeypatch.setenv("VIDLA_CACHE", str(place))
        with pytest.raises(OSError, match=rf"{place} .*VIDLA_CACHE.*--data\.train"):
            digits.make_default(**SMALL)


def test_half_made_default_is_not_taken(tmp_path, monkeypatch):
    generate = digits.generate

    def dies(folder, split, *args, **kwargs):
        if split == "test":
            raise KeyboardInterrupt
        return generate(folder, split, *args, **kwargs)

    monkeypatch.setattr(digits, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        digits.make_default(tmp_path, **SMALL)
    assert not digits.default_folder(tmp_path, 40, 6, 0).exists()
    assert len(list(tmp_path.glob(".*.unfinished"))) == 1
    monkeypatch.setattr(digits, "generate", generate)
    train, test = digits.make_default(tmp_path, **SMALL)
    assert (len(ShardSet(train)), len(ShardSet(test))) == (40, 6)
    assert not list(tmp_path.glob(".*.unfinished"))


def ask(cache) -> tuple:
    return digits.make_default(cache, **SMALL)


def test_processes_at_once_share_one_default(tmp_path, capfd):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        folders = pool.map(ask, [tmp_path] * 3, chunksize=1)
    assert len(set(folders)) == 1
    assert capfd.readouterr().err.count("making the default data") == 1
    assert len(ShardSet(folders[0][0])) == 40


def test_command_line(tmp_path):
    def call(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "vidla.digits", *args], capture_output=True, text=True, timeout=60)

    out = tmp_path / "out"
    assert call(str(out), "--clips", "12", "--seed", "3").returncode == 0
    assert len(ShardSet(out)) == 12
    again = call(str(out), "--clips", "12")
    assert again.returncode == 1
    assert "empty folder" in again.stderr
    assert "prefix" not in again.stderr
    for wrong in (("--clips", "0"), ("--seed", "9" * 23), ("--split", "test", "--clips", "9999")):
        refused = call(str(tmp_path / "new"), *wrong)
        assert refused.returncode == 2
        assert re.fullmatch(r"vidla\.digits: .*\n", refused.stderr)
    assert not (tmp_path / "new").exists()
    assert call(str(out), "--split", "dev").returncode == 2
