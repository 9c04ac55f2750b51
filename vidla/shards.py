"""The shard format: WebDataset tar files of clips as JPEG frames, with an index for random access (docs/shards.md).

    folder/shard-000000.tar     KEY.json, KEY.00.jpg, KEY.01.jpg, ... for each clip, one after the other
    folder/shard-000000.index   where each member lies; derived from the tar, rebuilt when missing or stale

Invariants:
- A file named *.tar is complete: the writer works under another name and renames.
- The same clips written in the same order give the same bytes (no time stamps, no user names).
- Nothing illegal is written and nothing illegal is read: `parse_meta` checks both ways, and an error names the file,
  the key, the field, what was found and what is legal.
- Every clip is read where it lies (os.pread), so the order of training is free and needs no shuffle buffer.

    python -m vidla.shards check DIR     reads every clip and decodes every frame of a folder
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

__all__ = ["ClipMeta", "ShardError", "ShardSet", "ShardWriter", "decode_frame", "parse_meta"]

FORMAT, INDEX_FORMAT, VERSION = "vidla-clip", "vidla-index", 1
SCALES = ("short", "medium", "long")
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # no dot: WebDataset cuts KEY.00.jpg at the first one; 80: ustar has room for 100
MEMBER = re.compile(rf"({KEY.pattern})\.(?:(json)|([0-9]{{2,}})\.jpg)")
BLOCK = 512  # tar's unit: a header is one block, data is padded to whole blocks
MAX_OPEN = 64  # tar files a ShardSet keeps open


class ShardError(ValueError):
    """A shard breaks the format. The message names the file, the key and the field."""


@dataclass(frozen=True)
class ClipMeta:
    """What KEY.json says of a clip. Times are seconds within the source video; field by field in docs/shards.md."""

    key: str
    caption: str | None
    subtitle: str | None
    source: str
    start: float
    end: float
    times: tuple[float, ...]
    width: int
    height: int
    scale: Literal["short", "medium", "long"]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.end - self.start

    @property
    def label(self) -> int:
        """The clip's class, extra["label"]; -1 where that is not there or no int64 from 0."""
        label = self.extra.get("label")
        return label if type(label) is int and 0 <= label < 2**63 else -1


# ---- The schema ------------------------------------------------------------------------------------------------


def parse_meta(table: Any, where: str) -> ClipMeta:
    """KEY.json's content -> ClipMeta.

    Args: where: words for the error's beginning ("shard-000000.tar, clip 'k1'").
    Raises: ShardError naming the field, what was found, and what is legal.
    """

    def demand(legal: bool, name: str, rule: str) -> None:
        if not legal:
            raise ShardError(f"{where}: field {name!r} is {table.get(name)!r}; legal: {rule}")

    if not isinstance(table, dict):
        raise ShardError(f"{where}: the JSON is {type(table).__name__}; legal: an object")
    demand(table.get("format") == FORMAT, "format", repr(FORMAT))
    demand(table.get("version") == VERSION, "version", f"{VERSION} (a newer file needs a newer vidla)")
    names = {"format", "version", *ClipMeta.__dataclass_fields__}
    if missing := names - set(table):
        raise ShardError(f"{where}: field {min(missing)!r} is missing; legal: all of {sorted(names)}")
    if unknown := set(table) - names:
        raise ShardError(f"{where}: field {min(unknown)!r} is unknown; legal: {sorted(names)}; anything else goes into 'extra'")

    demand(isinstance(table["key"], str) and KEY.fullmatch(table["key"]) is not None, "key", f"a string matching {KEY.pattern}")
    for name in ("caption", "subtitle"):
        text = table[name]
        demand(text is None or (isinstance(text, str) and text.strip() != ""), name, "a text that is not blank, or null")
    demand(isinstance(table["source"], str) and table["source"] != "", "source", "a string that is not empty")
    demand(_is_number(table["start"]) and table["start"] >= 0, "start", "a number >= 0 (seconds)")
    demand(_is_number(table["end"]) and table["end"] > table["start"], "end", f"a number > start = {table['start']} (seconds)")
    times = table["times"]
    demand(
        isinstance(times, list)
        and len(times) > 0
        and all(_is_number(t) for t in times)
        and all(a <= b for a, b in itertools.pairwise(times))
        and times[0] >= table["start"] - 1e-3
        and times[-1] <= table["end"] + 1e-3,
        "times",
        f"one number for each frame, never decreasing, from start = {table['start']} to end = {table['end']} (seconds)",
    )
    for name in ("width", "height"):
        demand(type(table[name]) is int and table[name] > 0, name, "an integer > 0 (pixels of every frame)")
    demand(table["scale"] in SCALES, "scale", f"one of {SCALES}")
    demand(isinstance(table["extra"], dict), "extra", "an object")
    values = {name: table[name] for name in ClipMeta.__dataclass_fields__}
    return ClipMeta(**{**values, "times": tuple(times)})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- Writing ---------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes clips to folder/PREFIX-000000.tar, ... and their indices. Use as a context manager.

    A shard appears under its name only when it is complete. When the body of the `with` raises, the unfinished shard
    is deleted and the finished ones stay. Several writers may share a folder under different prefixes.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000, prefix: str = "shard") -> None:
        """Raises: ValueError for a bad number or prefix, FileExistsError if the folder has shards of this prefix."""
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be >= 1, not {samples_per_shard}")
        if not KEY.fullmatch(prefix):
            raise ValueError(f"prefix {prefix!r} must match {KEY.pattern}")
        self.folder, self.samples_per_shard, self.prefix = Path(folder), samples_per_shard, prefix
        self.folder.mkdir(parents=True, exist_ok=True)
        if old := sorted(self.folder.glob(f"{prefix}-[0-9]*.tar")):
            raise FileExistsError(f"{old[0]} exists; write to an empty folder")
        self._shards = 0
        self._keys: set[str] = set()
        self._file: Any = None
        self._index = _Index()

    def write(self, meta: ClipMeta, jpegs: Sequence[bytes]) -> None:
        """Appends one clip. `jpegs` are its frames in order, grey or colour, each meta.width x meta.height pixels.

        Raises: ShardError for what a reader would refuse, and for a key written before.
        """
        table = {"format": FORMAT, "version": VERSION, **asdict(meta), "times": list(meta.times)}
        where = f"{self.folder}, clip {meta.key!r}"
        parse_meta(table, where)
        if meta.key in self._keys:
            raise ShardError(f"{where}: field 'key' was written before; legal: a key of its own for each clip of a folder")
        if len(jpegs) != len(meta.times):
            raise ShardError(f"{where}: field 'times' has {len(meta.times)} entries; legal: {len(jpegs)}, one for each frame")
        for k, jpeg in enumerate(jpegs):
            if not jpeg.startswith(b"\xff\xd8"):
                raise ShardError(f"{where}: frame {k} starts with {bytes(jpeg[:4])!r}; legal: a JPEG (starts with ff d8)")
        data = json.dumps(table, ensure_ascii=False, allow_nan=False).encode()
        if self._file is None:
            self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed by _finish or _abandon)
        members = [self._append(f"{meta.key}.json", data)]
        members += [self._append(f"{meta.key}.{k:02d}.jpg", jpeg) for k, jpeg in enumerate(jpegs)]
        self._keys.add(meta.key)
        self._index.add(meta, members)
        if len(self._index.keys) == self.samples_per_shard:
            self._finish()

    def _append(self, name: str, data: bytes) -> tuple[int, int]:
        offset = self._file.tell() + BLOCK
        self._file.write(_tar_header(name, len(data)) + data + bytes(-len(data) % BLOCK))
        return offset, len(data)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.prefix}-{self._shards:06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self._path.with_suffix(".tar.unfinished")

    def _finish(self) -> None:
        self._file.write(bytes(2 * BLOCK))  # tar's end mark
        size = self._file.tell()
        self._file.close()
        os.replace(self._temporary, self._path)
        _write_index(self._path, self._index.columns(size))
        self._file, self._index, self._shards = None, _Index(), self._shards + 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._file is None:
            return
        if kind is None:
            self._finish()
        else:
            self._file.close()
            self._temporary.unlink()
            self._file = None


def _tar_header(name: str, size: int) -> bytes:
    """One ustar header, the bytes tarfile would write. By hand since tarfile takes longer than encoding a small JPEG."""
    fields = (name.encode().ljust(100, b"\0"), b"0000644\0", b"0000000\0" * 2, b"%011o\0" % size, b"00000000000\0")
    rest = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - 156, b"\0")
    head = b"".join(fields)
    total = sum(head) + 8 * ord(" ") + sum(rest)  # the checksum field itself counts as blanks
    return head + b"%06o\0 " % total + rest


# ---- The index -------------------------------------------------------------------------------------------------


COLUMNS = {"keys": str, "sources": str, "captions": bool, "subtitles": bool, "frames": int, "offsets": int, "sizes": int}


class _Index:
    """Collects what the index of one shard says. A column is a list with one entry a clip; see docs/shards.md."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.sources: list[str] = []
        self.captions: list[bool] = []
        self.subtitles: list[bool] = []
        self.frames: list[int] = []
        self.offsets: list[int] = []  # of all members, clip after clip: its JSON, its frames
        self.sizes: list[int] = []

    def add(self, meta: ClipMeta, members: list[tuple[int, int]]) -> None:
        self.keys.append(meta.key)
        self.sources.append(meta.source)
        self.captions.append(meta.caption is not None)
        self.subtitles.append(meta.subtitle is not None)
        self.frames.append(len(members) - 1)
        self.offsets += [offset for offset, _ in members]
        self.sizes += [size for _, size in members]

    def columns(self, tar_size: int) -> dict[str, Any]:
        return {"format": INDEX_FORMAT, "version": VERSION, "tar_size": tar_size, **vars(self)}


def _write_index(tar: Path, columns: dict[str, Any]) -> None:
    temporary = tar.with_suffix(f".index.{os.getpid()}")
    temporary.write_text(json.dumps(columns, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    os.replace(temporary, tar.with_suffix(".index"))


def _read_index(tar: Path) -> dict[str, Any]:
    """The index of a shard; one that is missing or does not fit the tar is rebuilt, with a warning that says so."""
    path = tar.with_suffix(".index")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if (index["format"], index["version"]) != (INDEX_FORMAT, VERSION):
            why = f"has format {index['format']!r} version {index['version']}"
        elif index["tar_size"] != tar.stat().st_size:
            why = f"is for a tar of {index['tar_size']} bytes, which has {tar.stat().st_size}"
        elif not _columns_fit(index):
            why = "has columns of wrong values, or that do not fit each other"
        else:
            return index
    except FileNotFoundError:
        why = "is missing"
    except (ValueError, KeyError, TypeError):  # ValueError: no UTF-8, no JSON
        why = "is not readable"
    index = _scan(tar)
    note = f"the index {path} {why}; rebuilt it by scanning {tar.name} ({len(index['keys'])} clips)"
    try:
        _write_index(tar, index)
    except OSError as error:  # a read-only data set still works, only each start scans again
        note += f", but cannot keep it: {error}"
    warnings.warn(note, stacklevel=4)
    return index


def _columns_fit(index: dict[str, Any]) -> bool:
    """Whether each column is a list of its type and length, and every number lies within the tar."""
    for name, kind in COLUMNS.items():
        column = index[name]
        if not isinstance(column, list) or not set(map(type, column)) <= {kind}:
            return False
        if kind is int and column and not 0 <= min(column) <= max(column) <= index["tar_size"]:
            return False
    clips = len(index["keys"])
    lengths = {"offsets": clips + sum(index["frames"]), "sizes": clips + sum(index["frames"])}
    return all(len(index[name]) == lengths.get(name, clips) for name in COLUMNS)


def _scan(tar: Path) -> dict[str, Any]:
    """Builds the index of one shard from its tar alone, in whatever order the members of a clip come."""
    clips: dict[str, dict[int, tuple[int, int]]] = {}  # key -> {-1: JSON, k: frame k} -> (offset, size)
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                match = MEMBER.fullmatch(member.name) if member.isreg() else None
                if match is None:
                    raise ShardError(f"{tar}: member {member.name!r}; legal: files KEY.json and KEY.00.jpg, KEY.01.jpg, ...")
                key, number = match[1], -1 if match[2] else int(match[3])
                if number in clips.setdefault(key, {}):
                    raise ShardError(f"{tar}, clip {key!r}: member {member.name!r} comes twice; legal: once")
                clips[key][number] = (member.offset_data, member.size)
                end = max(end, member.offset_data + -(-member.size // BLOCK) * BLOCK)
    except tarfile.TarError as error:
        raise ShardError(f"{tar}: not a whole tar file ({error}); make the shard again") from None
    index = _Index()
    with open(tar, "rb") as file:
        file.seek(end)
        if file.read(2 * BLOCK) != bytes(2 * BLOCK):
            raise ShardError(f"{tar}: cut off at byte {end}: two zero blocks must end a tar; make the shard again")
        for key, members in clips.items():
            if sorted(members) != list(range(-1, len(members) - 1)):
                names = [f"{key}.json" if k < 0 else f"{key}.{k:02d}.jpg" for k in sorted(members)]
                raise ShardError(f"{tar}, clip {key!r}: has {names}; legal: {key}.json and frames 00, 01, ... without a gap")
            file.seek(members[-1][0])
            meta = _decode_meta(file.read(members[-1][1]), key, len(members) - 1, str(tar))
            index.add(meta, [members[k] for k in sorted(members)])
    return index.columns(tar.stat().st_size)


def _decode_meta(data: bytes, key: str, frames: int, file: str) -> ClipMeta:
    where = f"{file}, clip {key!r}"
    try:
        table = json.loads(data)
    except ValueError as error:
        raise ShardError(f"{where}: {key}.json is not JSON ({error}); where the tar was changed, delete its index") from None
    meta = parse_meta(table, where)
    if meta.key != key:
        raise ShardError(f"{where}: field 'key' is {meta.key!r}; legal: {key!r}, as the file (tar changed? delete its index)")
    if len(meta.times) != frames:
        raise ShardError(f"{where}: field 'times' has {len(meta.times)} entries; legal: {frames}, one for each frame stored")
    return meta


# ---- Reading ---------------------------------------------------------------------------------------------------


def decode_frame(jpeg: bytes, meta: ClipMeta, where: str) -> np.ndarray:
    """One frame of a clip: (h, w, 3) uint8 RGB, or (h, w, 1) of a grey frame.

    Args: where: words for the error's beginning ("shard-000000.tar, clip 'k1', frame 00").
    Raises: ShardError where the bytes are no JPEG of the size that the clip's JSON gives.
    """
    try:
        image = Image.open(io.BytesIO(jpeg), formats=("JPEG",))
        pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except UnidentifiedImageError:
        raise ShardError(f"{where}: not a JPEG; make the shard again") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL raises for bytes that are not all of one
        raise ShardError(f"{where}: not a whole JPEG ({error}); make the shard again") from None
    height, width = pixels.shape[:2]
    if (width, height) != (meta.width, meta.height):
        raise ShardError(f"{where}: is {width}x{height}; legal: {meta.width}x{meta.height}, as in the clip's JSON")
    return pixels.reshape(height, width, -1)


class ShardSet:
    """All clips of a folder of shards, by number: clip 0 is the first of the first shard (names in sorted order).

    Opens files lazily and drops them when pickled, so it can go to worker processes, forked or spawned. Not for sharing
    among threads. In memory: the index only, about 16 bytes a frame besides the keys.

    Attributes: folder; keys: list[str]; source_ids: (n,) int64, equal for clips of one source video, the same for every
    reader of the folder; has_caption, has_subtitle: (n,) bool; frame_counts: (n,) int64; fingerprint: a hash of the index
    (names, sources, texts' presence, places and sizes, not the pixels), for checkpoints to tell whether the data changed.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises: FileNotFoundError where no shard is, ShardError where one breaks the format."""
        self.folder = Path(folder)
        self.shards = sorted(self.folder.glob("*.tar"))
        if not self.shards:
            raise FileNotFoundError(f"no shards (*.tar) in {self.folder}; give the folder that holds them")
        columns = [_read_index(tar) for tar in self.shards]

        def joined(name: str, dtype: Any) -> np.ndarray:
            return np.concatenate([np.asarray(c[name], dtype=dtype) for c in columns])

        self.keys: list[str] = [key for c in columns for key in c["keys"]]
        self._check_keys(columns)
        self.has_caption, self.has_subtitle = joined("captions", bool), joined("subtitles", bool)
        self.frame_counts = joined("frames", np.int64)
        self._shard_of = np.repeat(np.arange(len(columns)), [len(c["keys"]) for c in columns])
        self._offsets, self._sizes = joined("offsets", np.int64), joined("sizes", np.int64)
        self._first = np.cumsum(self.frame_counts + 1) - self.frame_counts - 1  # clip -> its JSON in offsets and sizes
        sources = np.asarray([source for c in columns for source in c["sources"]], dtype=object)
        self.source_ids: np.ndarray = np.unique(sources, return_inverse=True)[1].astype(np.int64)
        self.fingerprint = self._hash(columns)
        self._files: dict[int, int] = {}  # shard -> file descriptor, of this process

    def _check_keys(self, columns: list[dict[str, Any]]) -> None:
        if len(set(self.keys)) == len(self.keys):
            return
        home: dict[str, str] = {}
        for tar, column in zip(self.shards, columns, strict=True):
            for key in column["keys"]:
                if key in home:
                    raise ShardError(f"{tar}, clip {key!r}: field 'key' is also in {home[key]}; legal: one clip for each key")
                home[key] = tar.name

    def _hash(self, columns: list[dict[str, Any]]) -> str:
        digest = hashlib.sha256()
        for tar, column in zip(self.shards, columns, strict=True):
            digest.update(json.dumps([tar.name, sorted(column.items())], ensure_ascii=False).encode())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[ClipMeta]:
        return (self.meta(i) for i in range(len(self)))

    def where(self, i: int) -> str:
        """Words for an error about clip i: "PATH.tar, clip 'KEY'"."""
        return f"{self.shards[self._shard_of[i]]}, clip {self.keys[i]!r}"

    def meta(self, i: int) -> ClipMeta:
        """What clip i's JSON says, checked. Raises: IndexError, ShardError."""
        self._check_number(i)
        tar = str(self.shards[self._shard_of[i]])
        return _decode_meta(self._read(i, 0), self.keys[i], int(self.frame_counts[i]), tar)

    def check_labels(self, classes: int) -> None:
        """Read every clip's JSON. Raises: ShardError for the first clip without a label from 0 to `classes` - 1."""
        for i, meta in enumerate(self):
            if not 0 <= meta.label < classes:
                found = repr(meta.extra["label"]) if "label" in meta.extra else "missing"
                raise ShardError(
                    f"{self.where(i)}: 'label' in field 'extra' is {found}; legal: an integer from 0 to {classes - 1}"
                )

    def frames(self, i: int, indices: Sequence[int]) -> list[bytes]:
        """The JPEG bytes of some frames of clip i, in the order asked; a frame asked for twice in a row is read once."""
        self._check_number(i)
        count = int(self.frame_counts[i])
        out: list[bytes] = []
        for n, k in enumerate(indices):
            if not 0 <= k < count:
                raise IndexError(f"{self.where(i)}: no frame {k}; it has 0 to {count - 1}")
            out.append(out[-1] if n > 0 and k == indices[n - 1] else self._read(i, k + 1))
        return out

    def _check_number(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise IndexError(f"no clip {i} in {self.folder}; it has 0 to {len(self) - 1}")

    def _read(self, i: int, member: int) -> bytes:
        place = self._first[i] + member
        offset, size = int(self._offsets[place]), int(self._sizes[place])
        data = os.pread(self._descriptor(int(self._shard_of[i])), size, offset)
        if len(data) != size:
            raise ShardError(f"{self.where(i)}: {len(data)} of {size} bytes at {offset}: the tar is cut off; make it again")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.pop(next(iter(self._files))))  # the one open longest
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self._files[shard]

    def close(self) -> None:
        """Closes this process's files; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):  # not where __init__ raised
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


# ---- The command -----------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m vidla.shards check DIR`. Exit code: 0, 1 where a clip is bad, 2 where there is nothing to check."""
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(prog="python -m vidla.shards", description="Whether a folder of shards can be trained on.")
    parser.add_argument("command", choices=["check"], help="read every clip, decode every frame; tell the first that is bad")
    parser.add_argument("folder", type=Path, help="the folder that holds the *.tar files")
    folder = parser.parse_args(argv).folder
    try:
        clips = ShardSet(folder)
    except ShardError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        parser.error(str(error))
    bad: list[str] = []
    for i in track(range(len(clips)), "checking", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        try:
            meta = clips.meta(i)
            for k, jpeg in enumerate(clips.frames(i, range(len(meta.times)))):
                decode_frame(jpeg, meta, f"{clips.where(i)}, frame {k:02d}")
        except ShardError as error:
            bad.append(str(error))
    if bad:
        print(bad[0], file=sys.stderr)
    print(
        f"{folder}: {len(clips)} clips of {len(set(clips.source_ids.tolist()))} sources in {len(clips.shards)} shards, "
        f"{clips.frame_counts.sum()} frames, {clips.has_caption.sum()} captions, {clips.has_subtitle.sum()} subtitles; "
        f"{len(bad)} clips are bad"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
