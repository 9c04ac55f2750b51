"""Where what is made on a user's machine is kept, and which sources a compiled library was made of."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache: $VIDLA_CACHE, else vidla/ in $XDG_CACHE_HOME, else in ~/.cache."""
    named = os.environ.get("VIDLA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vidla"
    return Path(named).expanduser()


def digest(folder: Path, suffixes: tuple[str, ...]) -> str:
    """What the sources in a folder are: the hash of the files' hashes, which CMakeLists.txt puts into the library it builds."""
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    return hashlib.sha256("".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files).encode()).hexdigest()
