"""`python -m vidla_kernels`: what this machine has, each backend, and for those missing, why."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from . import available_backends, cpu_binding, cuda_binding
from .backends import NAMES, missing


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
    gpu = torch.cuda.get_device_properties(device)
    return (
        f"{device} ({gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} SMs)"
    )


def main() -> None:
    packages = ("vidla", "torch", "triton", "xformers")
    print("  ".join(f"{name} {version(name)}" for name in packages), f" Python {sys.version.split()[0]}")
    native = cpu_binding.missing()
    print(
        f"portable runs float32 on a CPU in torch: the native kernels are missing, {native}"
        if native
        else f"portable runs float32 on a CPU natively ({cpu_binding.VERSIONS[cpu_binding.version()]}): {cpu_binding.LIBRARY}"
    )
    print(cuda_binding.not_built() or f"the CUDA kernels are built: {cuda_binding.LIBRARY}")
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] + [torch.device("cpu")]
    for device in devices:
        print(f"\n{describe(device)}: best first {', '.join(available_backends(device))}")
        for name in NAMES:
            print(f"  {name:<10} {missing(name, device) or 'available'}")


if __name__ == "__main__":
    main()
