"""The optional native build; all metadata is in pyproject.toml.

Neither torch nor a GPU is needed to build: kernels sit behind `extern "C"` launchers and link only the static CUDA runtime,
so one library serves every torch and Python. Without nvcc, or without CUDA sources, the wheel is pure Python.
VIDLA_CUDA=0 skips the native build, CUDACXX names another nvcc.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = sorted((ROOT / "vidla_kernels" / "cuda").glob("*.cu"))
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")

if os.environ.get("VIDLA_CUDA") == "0":
    SKIPPED = "VIDLA_CUDA=0"
elif not SOURCES:
    SKIPPED = "vidla_kernels/cuda holds no .cu files"
elif not NVCC:
    SKIPPED = "nvcc was not found (put it on PATH or set CUDACXX)"
else:
    SKIPPED = ""


class CMakeBuild(build_ext):
    """Runs CMake; a kernel that does not compile fails the install."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # it is no Python module: no interpreter in its name

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        subprocess.check_call(["cmake", "-S", ROOT, "-B", build, f"-DCMAKE_CUDA_COMPILER={NVCC}"])
        subprocess.check_call(["cmake", "--build", build, "--parallel"])
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build / "libvidla_cuda.so", target)


class Wheel(bdist_wheel):
    """A wheel with the native library depends on the platform, not on the Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if SKIPPED else super().get_tag()[2])


if SKIPPED:
    print(f"vidla_kernels: native CUDA build skipped: {SKIPPED}")

setup(
    ext_modules=[] if SKIPPED else [Extension("vidla_kernels.libvidla_cuda", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
