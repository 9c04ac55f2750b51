"""Tube attention in Triton: every form and tile of both architectures, its bytes counted, and float32 under torch's settings.

The interpreter takes the tiles of one architecture; here it is made to take each.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch

from vidla_kernels import TokenLayout, backends, tiles, triton_tube, tube_attention

from .cases import Case, Parts
from .check import check
from .test_parity import compare

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="looks into Triton's interpreter")


@pytest.fixture(autouse=True)
def triton_here(device):
    if reason := backends.missing("triton", device):
        pytest.skip(reason)


# A tube that fills its tile, one row less, one more; several in a tile with rows to spare; longer than every tile.
FRAMES = {
    "half": (1, 5, 12, 16, 17, 31, 33, 64, 65, 100, 128, 129, 150),
    "tf32": (12, 17, 33, 65),
    "fp32": (12, 33),
}


@pytest.mark.parametrize(("kind", "T"), [(kind, T) for kind in FRAMES for T in FRAMES[kind]])
@pytest.mark.parametrize("arch", [80, 90])
def test_every_form_and_tile(arch, kind, T, monkeypatch, device, seed):
    if device.type == "cuda" and arch != tiles.arch(device):
        pytest.skip(f"this GPU takes the tiles of sm_{tiles.arch(device)}")
    monkeypatch.setattr(tiles, "DEFAULT_ARCH", arch)
    setting = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        dtype = torch.float16 if kind == "half" else torch.float32
        assert tiles.kind(dtype) == kind
        compare("tube", "triton", Case(TokenLayout(T, 3), heads=1, head_dim=32 if T > 64 else 64, dtype=dtype), device)
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting


PASSES = {"tube_forward": (3, 1), "tube_backward": (4, 3)}  # units read, units written


@interpreted
@pytest.mark.parametrize("kind", ["half", "fp32"])
@pytest.mark.parametrize("arch", [80, 90])
def test_a_packed_tube_moves_each_byte_once(arch, kind, monkeypatch, seed):
    """4 units forward and 7 backward, every element of every tensor exactly once, for T as far as a tile holds a tube."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(tiles, "DEFAULT_ARCH", arch)
    touched = {"create_masked_load": [], "create_masked_store": []}  # addresses
    for name in touched:
        plain = getattr(InterpreterBuilder, name)

        def watched(self, pointers, *rest, plain=plain, name=name):
            mask = rest[0] if name == "create_masked_load" else rest[1]
            touched[name].append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel())
            return plain(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, watched)

    dtype = torch.float16 if kind == "half" else torch.float32
    B, N, H, D = 1, 3, 2, 32
    longest = {name: max(T for T in range(1, 129) if tiles.holding(name, torch.device("cpu"), dtype, D, T)) for name in PASSES}
    assert longest["tube_forward"] >= 32
    for name, (reads, writes) in PASSES.items():
        for T in {*range(1, 18), 24, 31, 32, 33, 50, 63, 64, 65, 99, 127, 128} & {*range(1, longest[name] + 1)}:
            qkv = torch.randn(B, T * N, 3, H, D).to(dtype)
            for addresses in touched.values():
                addresses.clear()
            if name == "tube_forward":
                triton_tube.forward(qkv, TokenLayout(T, N), D**-0.5)
            else:
                triton_tube.backward(qkv[:, :, 0].contiguous(), qkv, TokenLayout(T, N), D**-0.5)
            for addresses, units in zip(touched.values(), (reads, writes), strict=True):
                moved = np.concatenate(addresses)
                assert len(moved) == len(np.unique(moved)) == units * B * T * N * H * D, (name, T)


def test_packed_tiles_reach_as_far_as_documented():
    """Where the forms that move each byte once end, in frames; beyond are the long kernels."""
    reach = {}
    for arch in (80, 90):
        for kernel in ("tube_forward", "tube_backward"):
            for kind in ("half", "tf32", "fp32"):
                reach[arch, kernel, kind] = {
                    max(tile.rows for tile in tiles.TABLE[kernel, arch, kind, D]) for D in tiles.HEAD_DIMS
                }
    assert reach[80, "tube_forward", "half"] == reach[80, "tube_backward", "half"] == {64}
    assert reach[90, "tube_forward", "half"] == reach[90, "tube_backward", "half"] == {128}
    assert reach[80, "tube_forward", "tf32"] == reach[90, "tube_backward", "tf32"] == {64}
    assert reach[80, "tube_backward", "tf32"] == {32}


def test_a_row_finds_its_tube_without_a_division():
    """The kernels' x // T, as x * ceil(2**16 / T) >> 16, for all rows of a tile and all T."""
    x, T = np.arange(256)[:, None], np.arange(1, 257)[None]
    assert (x * -(-65536 // T) >> 16 == x // T).all()


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6, 7.0])
@pytest.mark.parametrize("T", [5, 70])
def test_any_scale(T, scale, device, seed):
    """Zero makes every key equal, a negative one turns the order of the keys round."""
    case = Case(TokenLayout(T, 3), heads=1, head_dim=32)
    qkv, grad = case.draw("tube", device)

    def run(qkv: torch.Tensor, grad: torch.Tensor, backend: str) -> Parts:
        leaf = qkv.clone().requires_grad_()
        out = tube_attention(leaf, case.layout, scale=scale, backend=backend)
        return Parts(out.detach(), torch.autograd.grad(out, leaf, grad)[0])

    gold = run(qkv.double(), grad.double(), "reference")
    check(run(qkv, grad, "triton"), [run(qkv, grad, "reference")], gold, 0, case.dtype)


SETTINGS = {
    "pass": "fp32",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.set_float32_matmul_precision('medium')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cuda.matmul.allow_tf32 = False": "fp32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": "fp32",
    "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'": "fp32",
    "torch.backends.fp32_precision = 'bf16'": "fp32",
}


def test_float32_follows_torchs_setting():
    """Old and new ways of setting it, and mixtures at which torch's old ways of asking raise; never half precision."""
    code = f"""
import os, torch
from vidla_kernels import tiles, triton_common
for setting in {list(SETTINGS)!r}:
    if os.fork() == 0:  # a process for each: some of the settings cannot be taken back
        exec(setting)
        single, half = torch.float32, torch.float16
        print(tiles.kind(single), triton_common.precision(single), tiles.kind(half), triton_common.precision(half), flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    want = [f"{kind} {'tf32' if kind == 'tf32' else 'ieee'} half ieee" for kind in SETTINGS.values()]
    assert done.stdout.splitlines() == want, done.stderr
