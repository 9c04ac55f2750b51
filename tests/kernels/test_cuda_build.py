"""The library for GPUs, where nvcc is: all shipped tilings compile for A100 and H100, and none spills a register.

Building it takes minutes where the installed one is not of these sources (build.py).
"""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vidla_kernels import cuda_binding, cuda_emulate
from vidla_kernels.tiles import HEAD_DIMS

from . import build
from .build import Built

ARCHS = ("sm_80", "sm_90a")
# Bytes that a thread of the backward stores to its stack at these head dimensions; everything else keeps to registers.
KNOWN_SPILLS = {128: 16}
KNOWN_SPILLS_OF_WGMMA = 20  # of the backwards on Hopper


def cuobjdump() -> str | None:
    """The program that lists what a library holds: of the CUDA toolkit, or the one that Triton brings."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    return shutil.which("cuobjdump", path=f"{os.environ['PATH']}:{Path(triton.__file__).parent}/backends/nvidia/bin")


@pytest.fixture(scope="module")
def built() -> Built:
    """The library for GPUs, built from the sources as they are, with ptxas -v's account of each kernel in its log."""
    return build.built("cuda")


def spills_of(log: str, arch: str) -> dict[str, str]:
    """Mangled kernel -> what ptxas says of its stack and spills. Lines of compilers that run side by side may alternate."""
    found, current, last_arch = {}, "", {}
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            last_arch[match[1]] = match[2]
        elif match := re.search(r"Function properties for (\w+)", line):
            current = match[1]
        elif "bytes spill stores" in line and last_arch.get(current) == arch:
            found[current] = line.strip()
    return found


def test_cmake_and_python_agree_on_what_the_sources_are(built):
    assert build.sources_of(built.library, "cuda") == cuda_emulate.digest()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tiling_is_compiled_and_none_spills(arch, built):
    spills = spills_of(built.log, arch)
    kernels = [name for name in spills if "_frames" in name]
    tilings = [len(cuda_binding.variants(name, D, torch.device("cpu"))) for name in cuda_binding.PASSES for D in HEAD_DIMS]
    assert len(kernels) == 2 * sum(tilings)  # two dtypes

    def known(name: str) -> int:
        if "hierarchical_bwd_frames" in name and "_wgmma" in name:
            return KNOWN_SPILLS_OF_WGMMA
        head_dim = re.search(r"hierarchical_bwd_frames.*?TilingILi(\d+)E", name)
        return KNOWN_SPILLS.get(int(head_dim[1]), 0) if head_dim else 0

    stored = {name: int(re.search(r"(\d+) bytes spill stores", said)[1]) for name, said in spills.items()}
    spilled = {name: spills[name] for name, count in stored.items() if count > known(name)}
    assert not spilled, "\n".join(f"{name}: {said}" for name, said in spilled.items())


def test_no_product_of_a_warpgroup_waits_for_itself(built):
    """ptxas says so where it cannot leave a wgmma under way (C7510 to C7514), or mends its fences and waits (C7517, C7519)."""
    said = [line for line in built.log.splitlines() if re.search(r"C75\d\d|wgmma.*serialized|warpgroup\.\w+ is injected", line)]
    assert not said, "\n".join(said)


def test_later_gpus_find_ptx(built):
    if (program := cuobjdump()) is None:
        pytest.skip("cuobjdump was not found; it comes with the CUDA toolkit and with Triton")
    listed = subprocess.run([program, "-lptx", built.library], capture_output=True, text=True, check=True).stdout
    assert re.search(r"sm_[89]0\.ptx", listed)


def test_only_the_launchers_are_exported(built):
    """Two CUDA runtimes in one process must not see each other."""
    names = build.exported(built.library)
    assert names
    assert all(name.startswith("vidla_") for name in names)


def test_without_a_usable_gpu_the_library_says_so(built):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    lib = cuda_binding.prepare(ctypes.CDLL(str(built.library)))
    status = lib.vidla_device_status()
    assert status > 0
    assert "CUDA" in lib.vidla_error_text(status).decode()
