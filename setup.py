"""The optional native build; all metadata is in pyproject.toml.

Neither torch nor a GPU is needed to build: kernels sit behind `extern "C"` functions, and the CUDA ones link only the static
CUDA runtime, so one library serves every torch and Python. libvidla_cpu needs a C++ compiler, libvidla_cuda nvcc, each for
itself. Where one cannot be built, the package does without it and keeps the reason beside it (libvidla_cpu.txt,
libvidla_cuda.txt), which is what `python -m vidla_kernels` then says.
VIDLA_CPU=0 and VIDLA_CUDA=0 skip a build, CXX and CUDACXX name another compiler.
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
COMPILERS = {
    "CPU": os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
    "CUDA": os.environ.get("CUDACXX") or shutil.which("nvcc"),
}
CALLED = {"CPU": "a C++ compiler", "CUDA": "nvcc"}
VARIABLE = {"CPU": "CXX", "CUDA": "CUDACXX"}


def skipped(kind: str) -> str:
    """Why the library of a kind, "CPU" or "CUDA", is not built; empty where it is."""
    if os.environ.get(f"VIDLA_{kind}") == "0":
        return f"VIDLA_{kind}=0 was set when it was installed"
    if not COMPILERS[kind]:
        return f"{CALLED[kind]} was not found when it was installed: put it on PATH or set {VARIABLE[kind]}"
    if not shutil.which("cmake"):
        return "cmake was not found when it was installed: pip install cmake"
    return ""


SKIPPED = {f"vidla_kernels.libvidla_{kind.lower()}": skipped(kind) for kind in COMPILERS}


class CMakeBuild(build_ext):
    """Runs CMake. A CUDA kernel that does not compile fails the install; the package works without the CPU's, if slower."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # it is no Python module: no interpreter in its name

    def finalize_options(self) -> None:
        super().finalize_options()
        self.skipped, self.said = dict(SKIPPED), {}
        self.extensions = [ext for ext in self.extensions if not SKIPPED[ext.name]]

    def run(self) -> None:
        super().run()
        # An editable install keeps what it builds beside the sources, any other one in the tree that becomes the wheel.
        folder = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "vidla_kernels"
        folder.mkdir(parents=True, exist_ok=True)
        for name, why in self.skipped.items():
            library = folder / f"{name.rpartition('.')[2]}.so"
            reason, log = library.with_suffix(".txt"), library.with_suffix(".log")
            if why:
                print(f"vidla_kernels: {library.stem} skipped: {why}")
                reason.write_text(why + "\n")
                library.unlink(missing_ok=True)  # of another install, from other sources
            else:
                reason.unlink(missing_ok=True)
            log.unlink(missing_ok=True)
            if name in self.said:
                log.write_text(self.said[name])  # with ptxas -v's account of registers and spills

    def build_extension(self, ext: Extension) -> None:
        kind = ext.name.rpartition("_")[2].upper()
        build = Path(self.build_temp).resolve() / kind.lower()
        shutil.rmtree(build, ignore_errors=True)  # a partial build would compile, and say, less
        self.said[ext.name] = ""
        language = {"CPU": "CXX", "CUDA": "CUDA"}[kind]
        options = [f"-DVIDLA_{other}={'ON' if other == kind else 'OFF'}" for other in COMPILERS]
        options += ["-G", "Ninja"] if shutil.which("ninja") else []
        for command in (
            ["cmake", "-S", ROOT, "-B", build, f"-DCMAKE_{language}_COMPILER={COMPILERS[kind]}", *options],
            ["cmake", "--build", build, "--parallel", str(os.cpu_count())],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout, flush=True)
            self.said[ext.name] += done.stdout
            if done.returncode and kind == "CPU":
                self.skipped[ext.name] = f"{COMPILERS[kind]} could not compile it when it was installed: see libvidla_cpu.log"
                return
            if done.returncode:
                sys.exit("vidla_kernels: the CUDA kernels could not be built; VIDLA_CUDA=0 installs without them")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build / f"{ext.name.rpartition('.')[2]}.so", target)

    def copy_extensions_to_source(self) -> None:
        self.extensions = [ext for ext in self.extensions if not self.skipped[ext.name]]
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """A wheel with a native library depends on the platform, not on the Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if all(SKIPPED.values()) else super().get_tag()[2])


setup(
    ext_modules=[Extension(name, []) for name in SKIPPED],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
