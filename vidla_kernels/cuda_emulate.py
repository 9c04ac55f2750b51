"""The CUDA kernels on a CPU: their sources compiled by g++ over `cuda/emulate.h`, for tests.

Everything the emulation finds wrong (a race, a read of bytes that have not arrived, an access out of bounds, lanes that
part ways) is an exception, so whatever runs through here is also a test of the kernels' ordering. What the last call cost
(bytes, products, bank conflicts, barriers) is in `last_report`.

VIDLA_EMULATE_SEED picks the order in which the warps of a block run, VIDLA_EMULATE_THREADS how many blocks run at a time,
VIDLA_EMULATE_ARCH the GPU that is played (80 or 90: shared memory, choice of tiling), VIDLA_EMULATE_SMS its multiprocessors.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from . import files

SOURCES = Path(__file__).parent / "cuda"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wno-unknown-pragmas")
FLAGS += ("-DVIDLA_EMULATE", "-U_FORTIFY_SOURCE")

last_report: dict = {}  # of the last launcher called, by kernel and by buffer; see cuda/emulate.h


def missing() -> str | None:
    """Why this machine cannot emulate, or None."""
    if os.environ.get("VIDLA_EMULATE_CUDA") != "1":
        return "on a CPU the CUDA kernels run only under emulation, for tests: set VIDLA_EMULATE_CUDA=1"
    if sys.platform != "linux":
        return f"the emulation of CUDA switches stacks the way glibc does: it runs on Linux, not on {sys.platform}"
    if shutil.which("g++") is None:
        return "VIDLA_EMULATE_CUDA=1 compiles the CUDA sources with g++, which was not found; install it (apt install g++)"
    return None


def digest() -> str:
    """What the sources are; CMakeLists.txt puts the same into the library it builds."""
    return files.digest(SOURCES, (".cu", ".cuh", ".h"))


def compile_library(sources: Path, target: Path, flags: tuple[str, ...] = (), processes: int | None = None) -> None:
    """Compile every .cu file in a folder for the CPU and link them into one shared library.

    Args:
        sources: folder with the .cu files and the headers they include.
        target: the library to write.
        flags: further options of the compiler.
        processes: how many compilers may run at a time; None is one a core.

    Raises:
        RuntimeError: the compiler failed; the message is its own.
    """

    def run(*command: str | Path) -> None:
        done = subprocess.run(["g++", *FLAGS, *flags, *command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ could not compile the CUDA sources for emulation:\n{done.stderr[:4000]}")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        units = {source: Path(folder) / f"{source.stem}.o" for source in sorted(sources.glob("*.cu"))}
        list(pool.map(lambda pair: run("-x", "c++", "-c", pair[0], "-o", pair[1]), units.items()))
        run("-shared", *units.values(), "-o", target)


@cache
def library() -> ctypes.CDLL:
    """The emulated library, compiled by the first call after a change of the sources and kept in the user's cache.

    Raises: RuntimeError, OSError saying what to do where it cannot be compiled or kept.
    """
    name = hashlib.sha256((digest() + " ".join(FLAGS)).encode()).hexdigest()[:12]
    folder = files.cache_folder()
    kept = folder / f"cuda-emulated-{name}.so"
    if not kept.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / kept.name
                compile_library(SOURCES, made)
                made.replace(kept)  # whole or not there, also when several processes compile it at once
        except OSError as error:
            raise OSError(
                f"cannot keep the emulated CUDA kernels in {folder} ({error}); let the environment variable "
                "VIDLA_CACHE name a folder that can be written"
            ) from error
    return ctypes.CDLL(str(kept))


def take_report(lib: ctypes.CDLL, call: str) -> None:
    """Fetch what the emulation has noted since the last call, and raise what it found wrong.

    Raises: RuntimeError with the first errors in words.
    """
    global last_report
    lib.vidla_emulation_report.restype = ctypes.c_char_p
    last_report = json.loads(lib.vidla_emulation_report())
    if errors := last_report["errors"]:
        kinds = ", ".join(f"{kind} ({count}x)" for kind, count in errors.items())
        raise RuntimeError(f"{call}: the emulation reports {kinds}:\n" + "\n".join(last_report["messages"]))
