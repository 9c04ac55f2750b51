"""Batches: the same bits for any workers, ranks and restarts; every clip in its turn; errors that name the frame."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from vidla import loader as loader_module
from vidla import sampling
from vidla.loader import Batch, ClipLoader, decode_clip, normalise
from vidla.shards import ClipMeta, ShardError, ShardSet, ShardWriter

T, SIZE = 4, 16
LABELS = ({"label": 7}, {}, {"label": "jump"})  # a run without classes may have anything there


def tokenizer(texts: list[str]) -> torch.Tensor:
    """Letters as tokens, length 12."""
    return torch.tensor([list(text.encode()[:12].ljust(12, b"\0")) for text in texts], dtype=torch.int64)


def picture(number: int, k: int, mode: str, width: int, height: int) -> np.ndarray:
    rng = np.random.default_rng([number, k])
    coarse = rng.integers(0, 256, (4, 5) if mode == "L" else (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write(folder, clips: int = 23, width: int = 28, height: int = 20):
    with ShardWriter(folder, samples_per_shard=7) as writer:
        for number in range(clips):
            count, jpegs = 2 + number % 5, []
            for k in range(count):
                file = io.BytesIO()
                Image.fromarray(picture(number, k, "L" if number % 2 else "RGB", width, height)).save(file, "JPEG", quality=95)
                jpegs.append(file.getvalue())
            texts = (None if number % 4 == 1 else f"caption {number}", None if number % 4 == 2 else f"speech {number}")
            times = tuple(map(float, range(count)))
            meta = ClipMeta(
                f"k{number}", *texts, f"v{number // 3}", 0.0, float(count), times, width, height, "short", LABELS[number % 3]
            )
            writer.write(meta, jpegs)
    return ShardSet(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return write(tmp_path_factory.mktemp("loader") / "set")


def make(shards: ShardSet, **changes) -> ClipLoader:
    options = {"frames": T, "image_size": SIZE, "batch_size": 6, "seed": 3, "train": True, "workers": 0}
    return ClipLoader(shards, tokenizer, **{**options, **changes})


def take(loader: ClipLoader, batches: int) -> list[Batch]:
    return list(itertools.islice(iter(loader), batches))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.keys == b.keys
        for name, value in vars(a).items():
            if name != "keys":
                assert torch.equal(value, getattr(b, name)), name


def join(parts: list[Batch]) -> Batch:
    fields = {}
    for name in vars(parts[0]):
        values = [getattr(p, name) for p in parts]
        fields[name] = list(itertools.chain(*values)) if name == "keys" else torch.cat(values)
    return Batch(**fields)


def test_fields(shards, seed):
    for batch in take(make(shards, seed=seed), 5):
        assert (batch.video.shape, batch.video.dtype) == ((6, T, 3, SIZE, SIZE), torch.float32)
        assert batch.video.is_contiguous()
        assert len(batch) == 6
        assert batch.caption.shape == batch.subtitle.shape == (6, 12)
        numbers = [int(key[1:]) for key in batch.keys]
        assert batch.index.tolist() == numbers
        assert (batch.label.dtype, batch.label.tolist()) == (torch.int64, [-1 if n % 3 else 7 for n in numbers])
        assert batch.has_caption.tolist() == [n % 4 != 1 for n in numbers]
        assert batch.has_subtitle.tolist() == [n % 4 != 2 for n in numbers]
        assert torch.equal(batch.caption, tokenizer([f"caption {n}" if n % 4 != 1 else "" for n in numbers]))
        assert torch.equal(batch.subtitle, tokenizer([f"speech {n}" if n % 4 != 2 else "" for n in numbers]))
        same = torch.tensor([[a // 3 == b // 3 for b in numbers] for a in numbers])
        assert torch.equal(batch.source[:, None] == batch.source, same)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, workers, seed):
    assert_same(take(make(shards, seed=seed), 9), take(make(shards, seed=seed, workers=workers), 9))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_same_global_batch(shards, world_size, seed):
    whole = take(make(shards, seed=seed), 9)
    parts = [
        take(make(shards, seed=seed, batch_size=6 // world_size, rank=r, world_size=world_size), 9) for r in range(world_size)
    ]
    assert_same(whole, [join(list(p)) for p in zip(*parts, strict=True)])
    rank = make(shards, seed=seed, batch_size=6 // world_size, rank=1, world_size=world_size)
    assert [rank.global_keys(b) for b in range(9)] == [batch.keys for batch in whole]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_the_rest_of_the_stream(shards, workers, seed):
    whole = take(make(shards, seed=seed), 10)
    assert_same(whole[4:], take(make(shards, seed=seed, start=4, workers=workers), 6))


def test_epochs_drop_and_repeat_nothing(shards, seed):
    stream = [key for batch in take(make(shards, seed=seed), 12) for key in batch.keys]  # 72 = 3 * 23 + 3
    epochs = [stream[e * 23 : (e + 1) * 23] for e in range(3)]
    assert [sorted(e) for e in epochs] == [sorted(shards.keys)] * 3
    assert len({tuple(e) for e in epochs}) == 3


def test_seeds_and_epochs_look_at_clips_anew(shards, seed):
    views = {}
    for batch in take(make(shards, seed=seed), 12):
        for key, video in zip(batch.keys, batch.video, strict=True):
            views.setdefault(key, []).append(video)
    assert sum(not torch.equal(v[0], v[1]) for v in views.values()) > 20
    assert not torch.equal(take(make(shards, seed=seed), 1)[0].video, take(make(shards, seed=seed + 1), 1)[0].video)


def test_evaluation_goes_once_through_in_order(shards):
    whole = list(make(shards, train=False))
    assert len(whole) == len(make(shards, train=False)) == 4
    assert [key for batch in whole for key in batch.keys] == shards.keys
    assert len(whole[-1]) == 23 - 3 * 6
    assert_same(whole, list(make(shards, train=False, seed=99, workers=2)))
    assert_same(whole[2:], list(make(shards, train=False, start=2)))
    ranks = [make(shards, train=False, batch_size=4, rank=r, world_size=3) for r in range(3)]  # the last batch has 11 of 12
    assert [[len(b) for b in rank] for rank in ranks] == [[4, 4], [4, 4], [4, 3]]
    ranks = [make(shards, train=False, batch_size=7, rank=r, world_size=3) for r in range(3)]  # and here 2 of 21
    assert [[len(b) for b in rank] for rank in ranks] == [[7, 2], [7], [7]]
    assert [len(rank) for rank in ranks] == [2, 1, 1]


def test_pixels_are_the_pictures(shards):
    """Against the pictures before JPEG: right frames, channels, orientation, crop and scale."""
    for batch in make(shards, train=False, image_size=20):
        for number, video in zip(batch.index.tolist(), batch.video, strict=True):
            frames = sampling.choose_frames(2 + number % 5, T, "eval")
            wanted = np.stack([picture(number, k, "L" if number % 2 else "RGB", 28, 20) for k in frames])
            wanted = np.repeat(wanted[..., None], 3, -1) if wanted.ndim == 3 else wanted
            wanted = torch.from_numpy(wanted[:, :, 4:24]).permute(0, 3, 1, 2)
            difference = (video - normalise(wanted)).abs().mean()
            assert difference < 0.1, number  # a wrong frame or a mirrored one is off by about 1


def test_dense_sampling_reads_its_window(shards):
    """Clips of two to six frames, four wanted: a neighbour each, never the far ones of segment sampling."""
    (batch,) = make(shards, train=False, batch_size=23, image_size=20, stride=1)
    (segments,) = make(shards, train=False, batch_size=23, image_size=20)
    for number, video, other in zip(batch.index.tolist(), batch.video, segments.video, strict=True):
        view = sampling.View(tuple(sampling.dense_frames(2 + number % 5, T, 1, "eval")), (4, 0, 20), False)
        assert torch.equal(video, normalise(decode_clip(shards, number, shards.meta(number), view, 20)))
        assert torch.equal(video, other) == (number % 5 == 2), number  # four frames of four


def test_crop_flip_and_scale(shards):
    meta = shards.meta(4)
    whole = decode_clip(shards, 4, meta, sampling.View((0, 3, 3), (2, 1, 16), False), 16)
    assert torch.equal(whole[1], whole[2])
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(decode_clip(shards, 4, meta, sampling.View((0, 3, 3), (2, 1, 16), True), 16), whole.flip(-1))
    wider = decode_clip(shards, 4, meta, sampling.View((0, 3, 3), (1, 0, 18), False), 18)
    assert torch.equal(wider[:, :, 1:17, 1:17], whole)
    half = decode_clip(shards, 4, meta, sampling.View((0, 3, 3), (2, 1, 16), False), 8).float()
    pooled = torch.nn.functional.avg_pool2d(whole.float(), 2)
    assert (half - pooled).abs().mean() < 6
    assert half.shape == (3, 3, 8, 8)


def test_normalise():
    video = torch.randint(0, 256, (2, 3, 3, 4, 4), dtype=torch.uint8)
    mean = torch.tensor(loader_module.CLIP_MEAN).double().view(3, 1, 1)
    std = torch.tensor(loader_module.CLIP_STD).double().view(3, 1, 1)
    torch.testing.assert_close(normalise(video).double(), (video.double() / 255 - mean) / std, atol=1e-6, rtol=1e-6)


def test_loading_leaves_the_global_generators_alone(shards):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    take(make(shards), 2)
    take(make(shards, workers=1), 2)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["noise", "cut", "size"])
def test_a_bad_frame_is_named(tmp_path, damage, workers):
    whole = write(tmp_path / "good", clips=3)
    with ShardWriter(tmp_path / "bad") as writer:
        for i, meta in enumerate(whole):
            jpegs = whole.frames(i, range(len(meta.times)))
            if i == 2:
                file = io.BytesIO()
                Image.new("RGB", (9, 20)).save(file, "JPEG")
                bad = {"noise": b"\xff\xd8 is no picture", "cut": jpegs[1][: len(jpegs[1]) // 2], "size": file.getvalue()}
                jpegs[1] = bad[damage]
            writer.write(meta, jpegs)
    words = {"noise": "not a JPEG;", "cut": r"not a whole JPEG \(", "size": "is 9x20; legal: 28x20"}[damage]
    with pytest.raises(ShardError, match=rf"shard-000000\.tar, clip 'k2', frame 01: {words}"):
        list(make(ShardSet(tmp_path / "bad"), train=False, workers=workers))


def test_bad_arguments_say_what_is_legal(shards):
    for changes in ({"frames": 0}, {"rank": 2, "world_size": 2}, {"workers": -1}, {"start": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="0 <= rank < world_size"):
            make(shards, **changes)
    with pytest.raises(TypeError, match="endless"):
        len(make(shards))
