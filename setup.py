"""The optional native build; all metadata is in pyproject.toml.

Neither torch nor a GPU is needed to build: kernels sit behind `extern "C"` launchers and link only the static CUDA runtime,
so one library serves every torch and Python. Where it cannot be built, the package is pure Python and keeps the reason in
vidla_kernels/libvidla_cuda.txt, which is what `backend="cuda"` and `python -m vidla_kernels` then say.
VIDLA_CUDA=0 skips the native build, CUDACXX names another nvcc.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")

if os.environ.get("VIDLA_CUDA") == "0":
    SKIPPED = "VIDLA_CUDA=0 was set when it was installed"
elif not NVCC:
    SKIPPED = "nvcc was not found when it was installed: put it on PATH or set CUDACXX"
elif not shutil.which("cmake"):
    SKIPPED = "cmake was not found when it was installed: pip install cmake"
else:
    SKIPPED = ""


class CMakeBuild(build_ext):
    """Runs CMake; a kernel that does not compile fails the install."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # it is no Python module: no interpreter in its name

    def finalize_options(self) -> None:
        super().finalize_options()
        if SKIPPED:
            self.extensions = []

    def run(self) -> None:
        super().run()
        # An editable install keeps what it builds beside the sources, any other one in the tree that becomes the wheel.
        library = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "vidla_kernels" / "libvidla_cuda.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        reason, log = library.with_suffix(".txt"), library.with_suffix(".log")
        if SKIPPED:
            print(f"vidla_kernels: native CUDA build skipped: {SKIPPED}")
            reason.write_text(SKIPPED + "\n")
            for earlier in (library, log):  # of another install, from other sources
                earlier.unlink(missing_ok=True)
        else:
            reason.unlink(missing_ok=True)
            log.write_text(self.said)  # with ptxas -v's account of registers and spills

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        shutil.rmtree(build, ignore_errors=True)  # a partial build would compile, and say, less
        self.said = ""
        for command in (
            ["cmake", "-S", ROOT, "-B", build, f"-DCMAKE_CUDA_COMPILER={NVCC}"],
            ["cmake", "--build", build, "--parallel", str(os.cpu_count())],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout, flush=True)
            self.said += done.stdout
            if done.returncode:
                sys.exit("vidla_kernels: the CUDA kernels could not be built; VIDLA_CUDA=0 installs without them")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build / "libvidla_cuda.so", target)


class Wheel(bdist_wheel):
    """A wheel with the native library depends on the platform, not on the Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if SKIPPED else super().get_tag()[2])


setup(
    ext_modules=[Extension("vidla_kernels.libvidla_cuda", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
