"""Order, frames and crops: permutations, golden frames, and nothing that depends on more than (seed, epoch, index)."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidla import sampling

SEEDS = st.integers(0, 2**63)


@given(seed=SEEDS, epoch=st.integers(0, 1000), n=st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_order_is_a_permutation_and_repeats(seed, epoch, n):
    first = sampling.order(seed, epoch, n).copy()
    sampling.order.cache_clear()
    assert sorted(first) == list(range(n))
    np.testing.assert_array_equal(first, sampling.order(seed, epoch, n))


def test_order_differs_between_epochs_and_seeds():
    orders = {tuple(sampling.order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_order_cannot_be_changed_by_its_user():
    with pytest.raises(ValueError, match="read-only"):
        sampling.order(0, 0, 5)[0] = 3


@given(seed=SEEDS, n=st.integers(1, 40), size=st.integers(1, 60), epochs=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_stream_of_batches_has_every_clip_once_an_epoch(seed, n, size, epochs):
    batches = -(-epochs * n // size)
    stream = [sample for b in range(batches) for sample in sampling.global_batch(seed, b, size, n)]
    assert all(count == 1 for count in Counter(stream).values())
    assert set(stream[: epochs * n]) == {(epoch, index) for epoch in range(epochs) for index in range(n)}
    assert [epoch for epoch, _ in stream] == sorted(epoch for epoch, _ in stream)


@given(stored=st.integers(1, 200), frames=st.integers(1, 64), seed=SEEDS)
@settings(max_examples=200, deadline=None)
def test_each_frame_comes_from_its_segment(stored, frames, seed):
    edges = np.arange(frames + 1) * stored / frames
    for mode in ("train", "eval"):
        chosen = sampling.choose_frames(stored, frames, mode, np.random.default_rng(seed))
        assert chosen.shape == (frames,)
        assert (chosen >= np.floor(edges[:-1])).all()
        assert (chosen < np.ceil(edges[1:])).all()


def test_golden_frames():
    assert sampling.choose_frames(12, 4, "eval").tolist() == [1, 4, 7, 10]
    assert sampling.choose_frames(8, 8, "eval").tolist() == list(range(8))
    assert sampling.choose_frames(10, 4, "eval").tolist() == [1, 3, 6, 8]
    assert sampling.choose_frames(3, 6, "eval").tolist() == [0, 0, 1, 1, 2, 2]
    assert sampling.choose_frames(1, 3, "eval").tolist() == [0, 0, 0]
    assert sampling.choose_frames(9, 1, "eval").tolist() == [4]


def test_dense_frames():
    def dense(stored, frames, stride, mode="eval", rng=None):
        return sampling.dense_frames(stored, frames, stride, mode, rng).tolist()

    assert dense(12, 4, 2) == [2, 4, 6, 8]
    assert dense(7, 4, 2) == [0, 2, 4, 6]
    assert dense(5, 4, 2) == [0, 2, 4, 4]
    assert dense(1, 3, 4) == [0, 0, 0]
    assert dense(9, 1, 3) == [4]
    rng = sampling.generator(7, sampling.VIEW)
    windows = Counter(tuple(dense(12, 4, 2, "train", rng)) for _ in range(3000))
    assert set(windows) == {(s, s + 2, s + 4, s + 6) for s in range(6)}  # the last window ends at the last frame
    assert min(windows.values()) > 400  # of 500 expected: five standard deviations


def test_training_reaches_every_frame_evenly():
    rng = sampling.generator(7, sampling.VIEW)
    chosen = np.stack([sampling.choose_frames(12, 4, "train", rng) for _ in range(3000)])
    assert (chosen // 3 == np.arange(4)).all()
    assert len(np.unique(chosen, axis=0)) == 3**4  # each segment draws for itself
    shares = np.bincount(chosen.ravel(), minlength=12) / 3000
    np.testing.assert_allclose(shares, 1 / 3, atol=0.05)  # five standard deviations


@given(width=st.integers(1, 500), height=st.integers(1, 500), seed=SEEDS)
@settings(max_examples=200, deadline=None)
def test_crops_lie_inside(width, height, seed):
    left, top, side = sampling.crop_box(width, height, "train", np.random.default_rng(seed), (1.0, 0.8))
    assert 0 <= left <= width - side
    assert 0 <= top <= height - side
    assert side in {max(1, round(min(width, height) * s)) for s in (1.0, 0.8)}


def test_golden_crops():
    assert sampling.crop_box(456, 256, "eval") == (100, 0, 256)
    assert sampling.crop_box(64, 64, "eval") == (0, 0, 64)
    assert sampling.crop_box(456, 256, "train", np.random.default_rng(0), ()) == (100, 0, 256)
    rng = sampling.generator(3, sampling.VIEW)
    boxes = {sampling.crop_box(30, 20, "train", rng, (1.0, 0.8)) for _ in range(2000)}
    assert boxes == {(x, 0, 20) for x in range(11)} | {(x, y, 16) for x in range(15) for y in range(5)}


def test_view_is_pure_and_fresh_every_epoch():
    options = {"stored": 30, "width": 90, "height": 60, "frames": 6, "mode": "train"}
    views = [sampling.choose_view(1, epoch, index, **options) for epoch in range(8) for index in range(8)]
    again = [sampling.choose_view(1, epoch, index, **options) for epoch in range(8) for index in range(8)]
    assert views == again
    assert len(set(views)) == 64
    assert {view.flip for view in views} == {True, False}
    unflipped = [sampling.choose_view(1, e, i, **options, flip=False) for e in range(8) for i in range(8)]
    assert [(v.frames, v.box, False) for v in views] == [(v.frames, v.box, v.flip) for v in unflipped]
    window = [sampling.choose_view(1, e, i, **options, stride=3) for e in range(8) for i in range(8)]
    assert window == [sampling.choose_view(1, e, i, **options, stride=3) for e in range(8) for i in range(8)]
    assert all((np.diff(view.frames) == 3).all() for view in window)
    assert len({view.frames for view in window}) > 8
    still = {sampling.choose_view(seed, 0, 0, **{**options, "mode": "eval"}) for seed in range(5)}
    assert still == {sampling.View((2, 7, 12, 17, 22, 27), (15, 0, 60), False)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sampling.choose_frames(0, 4, "eval"), "at least one frame"),
        (lambda: sampling.choose_frames(4, 4, "train"), "pass rng"),
        (lambda: sampling.dense_frames(4, 4, 0, "eval"), "stride >= 1"),
        (lambda: sampling.crop_box(4, 4, "train", np.random.default_rng(0), (1.2,)), r"\(0, 1\]"),
        (lambda: sampling.global_batch(0, 0, 4, 0), "n >= 1"),
        (lambda: sampling.generator(-1, 0), ">= 0"),
    ],
)
def test_errors_say_what_is_legal(call, words):
    with pytest.raises(ValueError, match=words):
        call()
