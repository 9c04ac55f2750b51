"""Two runs of each kernel, forward and backward, must be equal to the bit.

    python -m benchmarks.repeat [--small] [--cpu]

One line for each op, backend and shape; exit code 1 if any differs. Whole shapes of the paper, or with --small one tiny shape
that compute-sanitizer gets through in seconds.
"""

from __future__ import annotations

import argparse
import sys

import torch

from vidla_kernels import TokenLayout, available_backends
from vidla_kernels.backends import Case, refuses

from .peers import OURS
from .shapes import Shape, shape

WHOLE = (("B/16", 12, 8), ("B/32", 12, 32), ("L/14", 12, 4), ("B/16", 32, 4))


def shapes(device: torch.device, small: bool) -> list[Shape]:
    if small:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return [Shape("small T=3", TokenLayout(3, 21), 2, 2, dtype)]
    return [shape(*row, device) for row in WHOLE]


def run(op: str, backend: str, of: Shape, qkv: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = OURS[op](qkv, of.layout, backend=backend)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one tiny shape")
    parser.add_argument("--cpu", action="store_true", help="the portable backend on a CPU, to try this command")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        parser.exit(2, "there is no NVIDIA GPU that torch sees; --cpu tries this command with the portable backend\n")
    device = torch.device("cpu" if options.cpu else "cuda")
    kernels = ["portable"] if options.cpu else [name for name in ("cuda", "triton") if name in available_backends(device)]
    differing = 0
    for op in OURS:
        for backend in kernels:
            for of in shapes(device, options.small):
                name = f"{op}, {backend}, {of}"
                if reason := refuses(backend, Case(device, of.dtype, of.D, of.layout, op)):
                    print(f"{name}: not run: {reason}", flush=True)
                    continue
                qkv, grad = of.draw(op, device)
                first, second = run(op, backend, of, qkv, grad), run(op, backend, of, qkv, grad)
                differ = [
                    what for what, a, b in zip(("output", "gradient"), first, second, strict=True) if not torch.equal(a, b)
                ]
                differing += bool(differ)
                print(f"{name}: {' and '.join(differ) + ' DIFFER' if differ else 'equal'}", flush=True)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
