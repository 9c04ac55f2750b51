"""The native libraries as tests need them: the installed one if it was built from these sources, else one built for the
user's cache, where the next run finds it."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from vidla_kernels import cpu_binding, cuda_binding, cuda_emulate, files

ROOT = Path(__file__).parents[2]
BINDINGS = {"cpu": cpu_binding, "cuda": cuda_binding}
DIGESTS = {"cpu": cpu_binding.digest, "cuda": cuda_emulate.digest}
COMPILERS = {"cpu": ("CXX", "c++", "g++", "clang++"), "cuda": ("CUDACXX", "nvcc")}


class Built(NamedTuple):
    library: Path
    log: str  # what the compiler said


def sources_of(library: Path, kind: str) -> str:
    """The digest of the sources that a library was built from."""
    function = getattr(ctypes.CDLL(str(library)), "vidla_cpu_sources" if kind == "cpu" else "vidla_sources")
    function.restype = ctypes.c_char_p
    return function().decode()


def built(kind: str) -> Built:
    """The library of a kind, "cpu" or "cuda", from the sources as they are. Skips where there is no compiler."""
    installed, digest = BINDINGS[kind].LIBRARY, DIGESTS[kind]()
    if installed.exists() and installed.with_suffix(".log").exists() and sources_of(installed, kind) == digest:
        return Built(installed, installed.with_suffix(".log").read_text())
    variable, *names = COMPILERS[kind]
    if not (os.environ.get(variable) or any(map(shutil.which, names))):
        pytest.skip(f"{' or '.join(names)} was not found, and no library built from these sources is installed")
    if not shutil.which("cmake"):
        pytest.skip("cmake was not found, and no library built from these sources is installed")
    kept = files.cache_folder() / f"{kind}-built-{digest[:12]}.so"
    log = kept.with_suffix(".log")
    if not (kept.exists() and log.exists()):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            said, other = "", {"cpu": "CUDA", "cuda": "CPU"}[kind]
            for command in (
                ["cmake", "-S", ROOT, "-B", folder, f"-DVIDLA_{other}=OFF"],
                ["cmake", "--build", folder, "--parallel", "2"],
            ):
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                assert done.returncode == 0, done.stdout[-4000:]
                said += done.stdout
            log.write_text(said)
            (Path(folder) / f"libvidla_{kind}.so").replace(kept)
    return Built(kept, log.read_text())


def exported(library: Path) -> list[str]:
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in listed.splitlines()]
