"""The library for GPUs, where nvcc is: all shipped tilings compile for A100 and H100, and none spills a register.

An installed library is looked at if it was built from these sources; else CMake builds one, in minutes, into the user's
cache, where the next run finds it.
"""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vidla_kernels import cuda_binding, cuda_emulate
from vidla_kernels.tiles import HEAD_DIMS

ROOT = Path(__file__).parents[2]
ARCHS = ("sm_80", "sm_90a")


def cuobjdump() -> str | None:
    """The program that tells a kernel's registers and stack: of the CUDA toolkit, or the one that Triton brings."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    return shutil.which("cuobjdump", path=f"{os.environ['PATH']}:{Path(triton.__file__).parent}/backends/nvidia/bin")


def sources_of(library: Path) -> str:
    lib = ctypes.CDLL(str(library))
    lib.vidla_sources.restype = ctypes.c_char_p
    return lib.vidla_sources().decode()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The library for GPUs, built from the sources as they are."""
    if cuda_binding.LIBRARY.exists() and sources_of(cuda_binding.LIBRARY) == cuda_emulate.digest():
        return cuda_binding.LIBRARY
    for program in ("nvcc", "cmake"):
        if shutil.which(program) is None and not (program == "nvcc" and os.environ.get("CUDACXX")):
            pytest.skip(f"{program} was not found, and no library built from these sources is installed")
    kept = cuda_emulate.cache_folder() / f"cuda-built-{cuda_emulate.digest()[:12]}.so"
    if not kept.exists():
        folder = tmp_path_factory.mktemp("build")
        for command in (["cmake", "-S", ROOT, "-B", folder], ["cmake", "--build", folder, "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "libvidla_cuda.so", kept)
    return kept


def test_cmake_and_python_agree_on_what_the_sources_are(built):
    assert sources_of(built) == cuda_emulate.digest()


@pytest.fixture(scope="module")
def resources(built) -> dict[str, dict[str, dict[str, int]]]:
    """arch -> kernel (mangled) -> registers, stack, ..., from the machine code."""
    if (program := cuobjdump()) is None:
        pytest.skip("cuobjdump was not found; it comes with the CUDA toolkit and with Triton")
    found: dict[str, dict[str, dict[str, int]]] = {}
    arch = name = ""
    for line in subprocess.run([program, "-res-usage", built], capture_output=True, text=True, check=True).stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif "REG:" in line:
            found.setdefault(arch, {})[name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tiling_is_compiled_and_none_spills(arch, resources):
    kernels = {name: usage for name, usage in resources[arch].items() if "_frames" in name}
    import torch

    tilings = sum(len(cuda_binding.variants(name, D, torch.device("cpu"))) for name in cuda_binding.PASSES for D in HEAD_DIMS)
    assert len(kernels) >= tilings  # two dtypes of each; two that are one kernel with other parameters count once
    spilled = {name: usage for name, usage in resources[arch].items() if usage["STACK"]}
    assert not spilled, "\n".join(f"{name}: {usage}" for name, usage in spilled.items())


def test_later_gpus_find_ptx(built):
    if (program := cuobjdump()) is None:
        pytest.skip("cuobjdump was not found; it comes with the CUDA toolkit and with Triton")
    listed = subprocess.run([program, "-lptx", built], capture_output=True, text=True, check=True).stdout
    assert re.search(r"sm_[89]0\.ptx", listed)


def test_only_the_launchers_are_exported(built):
    """Two CUDA runtimes in one process must not see each other."""
    listed = subprocess.run(["nm", "-D", "--defined-only", built], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    assert names
    assert all(name.startswith("vidla_") for name in names)


def test_without_a_usable_gpu_the_library_says_so(built):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    lib = cuda_binding.prepare(ctypes.CDLL(str(built)))
    status = lib.vidla_device_status()
    assert status > 0
    assert "CUDA" in lib.vidla_error_text(status).decode()
