"""What all Triton kernels share: the legend of names, and arithmetic that is right compiled and interpreted.

Legend: B batch, T frames, N patches a frame, G summary tokens, H heads, D head dimension, BD = D rounded up to a power of
two. i_ program index, o_ offsets, m_ mask, p_ pointer, b_ tile; _s strides in elements. Scores are kept in base 2:
exp(x) = exp2(x * LOG2E). Sums and softmax in fp32, products in the input dtype.

Triton's interpreter computes bfloat16 on the raw 16 bits, so products, sums and roundings of bfloat16 come out as garbage.
Kernels therefore multiply only through `dot` and round only through `to`, which compiled code reduces to one instruction.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from . import tiles

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
# The score of a pair that may not see each other. Finite: -inf - -inf is NaN where a whole tile of a row is hidden.
HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr = "ieee"):
    """a @ b in fp32. PRECISION is that of fp32 operands, from `precision`; 16-bit operands are exact."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def to(x, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest even (the interpreter would truncate)."""
    if INTERPRET:  # noqa: SIM102 - a constexpr branch, then a dtype branch
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            # Low bits cleared, or the interpreter makes 1.2e-38, the smallest normal number, of a zero that gained some.
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def log2(x):
    """log2 of positive numbers within 2^-22, absolute near 1 and relative elsewhere; tl.log2 is twenty instructions."""
    if INTERPRET:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


def precision(dtype: torch.dtype) -> str:
    """How kernels multiply float32, for `dot`: "tf32" where torch's own matmuls would, else "ieee"."""
    return "tf32" if tiles.kind(dtype) == "tf32" else "ieee"


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Run a kernel whose first argument is a tensor, on that tensor's GPU (Triton itself takes the current one).

    Every launch of the library goes through here, so that a test can compile all of them ahead of time.
    """
    with torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext():
        tiles.launched(kernel[grid](*args, **options))
