"""The portable backend's memory: never S*S elements per batch and head, and linear in T; and both its forms.

On a CPU test_parity.py meets the form with a backward of its own (portable_cpu.py), or for float32 the native kernels, which
test_cpu.py has version by version. The composed form, which serves other devices and torch.compile, is compared with the
reference here, and so is a cut into portions that leave a remainder.
"""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vidla_kernels import TokenLayout, portable, portable_cpu

from .cases import CASES, OPS, Case
from .test_parity import compare


class Largest(TorchDispatchMode):
    """Watches every tensor that any operation returns, forward and backward: the largest storage, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def largest(op: str, layout: TokenLayout, backend: str, dtype: torch.dtype) -> int:
    """Elements of the largest tensor made by a forward and backward of one batch row and head."""
    tokens = layout.num_patches if op == "tube" else layout.seq_len
    qkv = torch.randn(1, tokens, 3, 1, 32, dtype=dtype, requires_grad=True)
    with Largest() as watch:
        OPS[op](qkv, layout, backend=backend).sum().backward()
    return watch.elements


LAYOUTS = [TokenLayout(12, 49), TokenLayout(5, 64, 2, 4, 2), TokenLayout(32, 16), TokenLayout(8, 49, patches_see_cls=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_no_tensor_of_the_masks_size(op, layout, dtype):
    pairs = (layout.num_patches if op == "tube" else layout.seq_len) ** 2
    assert largest(op, layout, "reference", dtype) >= pairs, "the watch must see the reference's dense mask or scores"
    assert largest(op, layout, "portable", dtype) < pairs


@pytest.mark.parametrize("op", OPS)
def test_memory_is_linear_in_frames(op):
    sizes = [largest(op, TokenLayout(T, 16), "portable", torch.float32) for T in (8, 16, 32)]
    growth = [math.log2(b / a) for a, b in itertools.pairwise(sizes)]
    assert max(growth) < 1.1, f"largest tensors {sizes} for 8, 16, 32 frames"


@pytest.mark.parametrize("case", CASES[::3], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_composed_form(op, case, device, seed, monkeypatch):
    monkeypatch.setattr(portable, "_by_hand", lambda qkv: False)
    compare(op, "portable", case, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="portable_cpu serves CPU tensors")
@pytest.mark.parametrize("rows", [1, 100])
def test_portions_of_tubes(rows, device, seed, monkeypatch):
    """One tube at a time; and several, with fewer in the last portion."""
    case = Case(TokenLayout(5, 23), batch=2, heads=3, head_dim=32, dtype=torch.bfloat16, sliced=True)
    monkeypatch.setattr(portable_cpu, "_ROWS", rows)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert len(list(portable_cpu._portions(2, 5, 23, 3))) == 2 * -(-23 // max(1, rows // 15))
    compare("tube", "portable", case, device)
