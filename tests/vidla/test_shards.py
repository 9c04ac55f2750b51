"""The shard format: round trips, a foreign reader, a rebuilt index, and errors that name file, key and field."""

import io
import json
import multiprocessing
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidla import shards
from vidla.shards import ClipMeta, ShardError, ShardSet, ShardWriter


def jpeg(value: int, size=(8, 6), mode="RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, value, value)).save(file, "JPEG")
    return file.getvalue()


def clip(number: int, frames: int = 3, **changes) -> tuple[ClipMeta, list[bytes]]:
    values = {
        "key": f"v{number:03d}-a",
        "caption": None if number % 5 == 1 else f"a caption – {number}",
        "subtitle": None if number % 5 == 2 else f"subtitle {number}",
        "source": f"video {number // 2}",
        "start": 1.5,
        "end": 4.0,
        "times": tuple(np.linspace(1.5, 4.0, frames).tolist()),
        "width": 8,
        "height": 6,
        "scale": shards.SCALES[number % 3],
        "extra": {"n": number},
    }
    return ClipMeta(**{**values, **changes}), [jpeg(20 * number + k) for k in range(frames)]


@pytest.fixture
def folder(tmp_path):
    """Seven clips of 1 to 7 frames in three shards."""
    with ShardWriter(tmp_path / "set", samples_per_shard=3) as writer:
        for number in range(7):
            writer.write(*clip(number, frames=number + 1))
    return tmp_path / "set"


def test_round_trip(folder):
    assert sorted(p.name for p in folder.iterdir()) == [f"shard-{k:06d}.{e}" for k in range(3) for e in ("index", "tar")]
    read = ShardSet(folder)
    assert len(read) == 7
    for number, meta in enumerate(read):
        wanted, jpegs = clip(number, frames=number + 1)
        assert meta == wanted
        assert meta.duration == 2.5
        assert read.frames(number, range(number + 1)) == jpegs
        assert read.frames(number, [number, 0, 0]) == [jpegs[number], jpegs[0], jpegs[0]]
        assert (read.keys[number], read.frame_counts[number]) == (meta.key, number + 1)
        assert (read.has_caption[number], read.has_subtitle[number]) == (meta.caption is not None, meta.subtitle is not None)
    assert read.source_ids.tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_bytes_are_a_plain_tar_and_the_same_every_time(folder, tmp_path):
    with ShardWriter(tmp_path / "again", samples_per_shard=3) as writer:
        for number in range(7):
            writer.write(*clip(number, frames=number + 1))
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    meta, jpegs = clip(0, 1)
    with tarfile.open(folder / "shard-000000.tar") as archive:
        members = archive.getmembers()[:2]
        assert [m.name for m in members] == [f"{meta.key}.json", f"{meta.key}.00.jpg"]
        assert archive.extractfile(members[1]).read() == jpegs[0]
    ours = (folder / "shard-000000.tar").read_bytes()[: shards.BLOCK]
    assert ours == members[0].tobuf(tarfile.USTAR_FORMAT)


def test_webdataset_reads_our_shards(folder):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert len(samples) == 7
    for number, sample in enumerate(samples):
        meta, _ = clip(number, frames=number + 1)
        assert sample["__key__"] == meta.key
        assert sample["json"]["caption"] == meta.caption
        frames = [sample[f"{k:02d}.jpg"] for k in range(number + 1)]
        assert [int(f.mean().round()) for f in frames] == pytest.approx([20 * number + k for k in range(number + 1)], abs=1)
        assert frames[0].shape == (6, 8, 3)


def test_we_read_shards_of_webdataset(tmp_path):
    """Its writer orders members by name, JSON last, and knows no index."""
    webdataset = pytest.importorskip("webdataset")
    meta, jpegs = clip(0)
    table = {"format": "vidla-clip", "version": 1, **vars(meta)}
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as sink:
        sink.write({"__key__": meta.key, "json": table, **{f"{k:02d}.jpg": j for k, j in enumerate(jpegs)}})
    with pytest.warns(UserWarning, match=r"x\.index is missing; rebuilt"):
        read = ShardSet(tmp_path)
    assert read.meta(0) == meta
    assert read.frames(0, range(3)) == jpegs


@pytest.mark.parametrize("damage", ["missing", "other tar", "no JSON", "other version", "short column"])
def test_bad_index_is_rebuilt_and_said(folder, damage, recwarn):
    fingerprint = ShardSet(folder).fingerprint
    assert not recwarn.list
    path = folder / "shard-000001.index"
    whole = path.read_text()
    table = json.loads(whole)
    if damage == "missing":
        path.unlink()
    elif damage == "no JSON":
        path.write_text(whole[:-7])
    else:
        change = {"other tar": {"tar_size": 5}, "other version": {"version": 2}, "short column": {"sizes": table["sizes"][1:]}}
        path.write_text(json.dumps({**table, **change[damage]}))
    with pytest.warns(UserWarning, match=r"shard-000001\.index .*; rebuilt"):
        assert ShardSet(folder).fingerprint == fingerprint
    assert path.read_text() == whole
    ShardSet(folder)  # nothing said any more
    assert len([w for w in recwarn.list if "rebuilt" in str(w.message)]) == 0


@pytest.mark.parametrize("name", shards.COLUMNS)
@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-1], lambda c: [*c, c[-1]], lambda c: [0.5, *c[1:]], lambda c: [None, *c[1:]], len],
    ids=["short", "long", "0.5", "null", "no list"],
)
def test_a_damaged_column_of_the_index_is_rebuilt(folder, name, damage):
    """Every one: with a source too few, the sources of the next shard would move to other clips."""
    read = ShardSet(folder)
    path = folder / "shard-000000.index"
    whole = path.read_text()
    table = json.loads(whole)
    path.write_text(json.dumps({**table, name: damage(table[name])}))
    with pytest.warns(UserWarning, match=r"shard-000000\.index has columns .*; rebuilt"):
        again = ShardSet(folder)
    assert again.fingerprint == read.fingerprint
    assert again.source_ids.tolist() == read.source_ids.tolist()
    assert path.read_text() == whole


@pytest.mark.parametrize("number", [-1, 10**30, "zero"])
def test_an_index_that_points_nowhere_in_its_tar_is_rebuilt(folder, number):
    path = folder / "shard-000001.index"
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "offsets": [number, *table["offsets"][1:]]}))
    with pytest.warns(UserWarning, match=r"shard-000001\.index has columns .*; rebuilt"):
        assert ShardSet(folder).meta(3) == clip(3, frames=4)[0]


def test_fingerprint_tells_data_apart(folder, tmp_path):
    with ShardWriter(tmp_path / "other", samples_per_shard=3) as writer:
        for number in range(7):
            writer.write(*clip(number, frames=number + 1, source="another"))
    assert ShardSet(tmp_path / "other").fingerprint != ShardSet(folder).fingerprint


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("format", "x", "'vidla-clip'"),
        ("version", 2, "1"),
        ("key", "a.b", "matching"),
        ("caption", "  ", "null"),
        ("subtitle", 3, "null"),
        ("source", "", "not empty"),
        ("start", -1.0, ">= 0"),
        ("start", True, ">= 0"),
        ("end", 1.5, "> start"),
        ("end", float("nan"), "> start"),
        ("times", [2.0, 1.9, 3.0], "never decreasing"),
        ("times", [1.6, 2.0, 4.1], "to end = 4.0"),
        ("times", [], "one number"),
        ("width", 8.0, "integer > 0"),
        ("height", 0, "integer > 0"),
        ("scale", "huge", "one of"),
        ("extra", [], "an object"),
    ],
)
def test_illegal_fields_are_named(tmp_path, field, value, legal):
    meta, jpegs = clip(0)
    table = {"format": "vidla-clip", "version": 1, **vars(meta), "times": list(meta.times), field: value}
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        for name, data in [("v000-a.json", json.dumps(table).encode())] + [
            (f"v000-a.{k:02d}.jpg", j) for k, j in enumerate(jpegs)
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(ShardError) as caught:
        ShardSet(tmp_path)
    for word in ("bad.tar", "v000-a", repr(field), legal):
        assert word in str(caught.value)
    if field not in ("format", "version"):  # the writer refuses the same
        bad = clip(0, **{field: tuple(value) if field == "times" else value})
        with ShardWriter(tmp_path / "new") as writer, pytest.raises(ShardError, match=repr(field)):
            writer.write(*bad)
        assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_fields_missing_or_unknown_are_named(change):
    table = {"format": "vidla-clip", "version": 1, **vars(clip(0)[0]), "times": [2.0]}
    if change == "missing":
        del table["source"]
    else:
        table["fps"] = 3
    with pytest.raises(ShardError, match="'source' is missing" if change == "missing" else "'fps' is unknown.*extra"):
        shards.parse_meta(table, "here")


def test_cut_off_tar_is_refused(folder):
    tar = folder / "shard-000002.tar"
    whole = tar.read_bytes()
    meta, jpegs = clip(6, 7)
    for size in (len(whole) - 1024, len(whole) - 1025 - len(jpegs[-1]) // 2, 700):
        tar.write_bytes(whole[:size])
        with pytest.raises(ShardError, match=r"shard-000002\.tar.*make the shard again"):
            ShardSet(folder)
    tar.write_bytes(whole)
    read = ShardSet(folder)
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ShardError, match=rf"shard-000002\.tar, clip '{meta.key}'.*cut off"):
        read.frames(6, [6])


def test_tar_changed_behind_the_index_is_noticed(folder):
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"v001-a"', b'"v009-a"'))
    with pytest.raises(ShardError, match=r"clip 'v001-a': field 'key' is 'v009-a'.*index"):
        ShardSet(folder).meta(1)


def test_gaps_and_strangers_are_refused(folder):
    tar = folder / "shard-000000.tar"
    whole = tar.read_bytes()
    for old, new, words in (
        (b"v001-a.01.jpg", b"v001-a.02.jpg", "without a gap"),
        (b"v001-a.01.jpg", b"v001-a.01.png", "member 'v001-a.01.png'"),
        (b"v001-a.01.jpg", b"v001-a.00.jpg", "comes twice"),
    ):
        with tarfile.open(tar, "w") as out, tarfile.open(fileobj=io.BytesIO(whole)) as archive:
            for member in archive:
                data = archive.extractfile(member)
                member.name = member.name.replace(old.decode(), new.decode())
                out.addfile(member, data)
        (folder / "shard-000000.index").unlink(missing_ok=True)
        with pytest.raises(ShardError, match=words):
            ShardSet(folder)


def test_writer_refuses(tmp_path):
    with ShardWriter(tmp_path / "a") as writer:
        writer.write(*clip(0))
        with pytest.raises(ShardError, match="written before"):
            writer.write(*clip(0))
        with pytest.raises(ShardError, match="'times' has 3 entries; legal: 2"):
            writer.write(clip(1)[0], clip(1)[1][:2])
        with pytest.raises(ShardError, match="frame 1 starts with b'GIF8'"):
            writer.write(clip(1)[0], [jpeg(0), b"GIF89a", jpeg(1)])
    assert len(ShardSet(tmp_path / "a")) == 1
    with pytest.raises(FileExistsError, match="empty folder"):
        ShardWriter(tmp_path / "a")
    with ShardWriter(tmp_path / "a", prefix="more") as writer:
        writer.write(*clip(0))
    with pytest.raises(ShardError, match=r"shard-000000\.tar, clip 'v000-a': field 'key' is also in more-000000\.tar"):
        ShardSet(tmp_path / "a")


def test_a_writer_that_dies_leaves_whole_shards_only(tmp_path):
    def dies() -> None:
        with ShardWriter(tmp_path, samples_per_shard=2) as writer:
            for number in range(3):
                writer.write(*clip(number))
            assert [p.name for p in sorted(tmp_path.glob("*.tar"))] == ["shard-000000.tar"]
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        dies()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shard-000000.index", "shard-000000.tar"]
    assert len(ShardSet(tmp_path)) == 2


def test_numbers_out_of_range_and_empty_folders(folder, tmp_path):
    read = ShardSet(folder)
    for call in (lambda: read.meta(7), lambda: read.meta(-1), lambda: read.frames(0, [1]), lambda: read.frames(2, [-1])):
        with pytest.raises(IndexError, match="it has 0 to"):
            call()
    with pytest.raises(FileNotFoundError, match="no shards"):
        ShardSet(tmp_path / "nothing")


def test_many_shards_need_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    with ShardWriter(tmp_path, samples_per_shard=1) as writer:
        for number in range(5):
            writer.write(*clip(number))
    read = ShardSet(tmp_path)
    for number in (0, 1, 2, 3, 4, 0, 4, 2):
        assert read.meta(number) == clip(number)[0]
        assert len(read._files) <= 2


def read_all(read: ShardSet) -> list:
    return [(read.meta(i), read.frames(i, [0])) for i in range(len(read))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(folder, method):
    read = ShardSet(folder)
    wanted = read_all(read)  # files are open when the other processes start
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, [read, read]) == [wanted, wanted]
    assert read_all(read) == wanted


def test_check_reads_everything(folder, capsys):
    assert shards.main(["check", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{folder}: 7 clips of 4 sources in 3 shards, 28 frames, 5 captions, 6 subtitles; 0 clips are bad\n"
    assert said.err == ""


def test_check_tells_the_first_bad_clip_and_counts_all(folder, capsys):
    tar = folder / "shard-000001.tar"
    whole = tar.read_bytes()
    cut, other = clip(3, 4)[1][2], clip(4, 5)[1][0]
    tar.write_bytes(whole.replace(cut, cut[:300] + bytes(len(cut) - 300)).replace(other, bytes(len(other))))
    assert shards.main(["check", str(folder)]) == 1
    said = capsys.readouterr()
    assert re.fullmatch(rf"{tar}, clip 'v003-a', frame 02: not a .*JPEG.*\n", said.err)
    assert said.out.endswith("; 2 clips are bad\n")
    for path in (tar, tar.with_suffix(".index")):
        path.write_bytes(path.read_bytes()[:700])
    assert shards.main(["check", str(folder)]) == 1
    assert "make the shard again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"), [(["make", "x"], "invalid choice: 'make' .*check"), (["check"], "folder"), (["check", "."], "no shards")]
)
def test_wrong_use_of_the_command(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        shards.main(words)
    assert stopped.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_the_page_of_the_format_is_right(folder):
    """The table of fields names the fields there are, and the reader printed in docs/shards.md works as it stands."""
    page = (Path(__file__).parents[2] / "docs" / "shards.md").read_text()
    table = page.split("## KEY.json")[1].split("Both texts")[0]
    rows = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == {
        "format",
        "version",
        *ClipMeta.__dataclass_fields__,
    }
    example = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    assert shards.parse_meta(example, "docs").scale == "short"

    reader = re.search(r"standard library alone:\n\n```python\n(.*?)```", page, re.DOTALL)[1]
    assert "i, k = 5, 0" in reader
    for number, k in ((0, 0), (2, 1)):
        code = reader.replace("data/train", str(folder)).replace("i, k = 5, 0", f"i, k = {number}, {k}")
        names: dict = {}
        exec(code, names)
        meta, jpegs = clip(number, frames=number + 1)
        assert names["meta"]["caption"] == meta.caption
        assert names["jpeg"] == jpegs[k]
        os.close(names["file"])
