"""Each device primitive on its own: the emulated one against its definition, and on a GPU the PTX against the emulated one.

So a mistake in the emulation, which would let every other test of the CUDA sources agree with a wrong kernel, shows here; and
what the emulation cannot see, the inline PTX, is compared word by word as soon as there is a GPU and nvcc.
"""

import ctypes
import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vidla_kernels import cuda_emulate

PROGRAM = Path(__file__).with_name("primitives.cu")
NAMES = ("mma", "ldmatrix", "ldmatrix.trans", "pack", "unpack", "shuffle", "exp2", "store_shared", "active")
DTYPES = (torch.bfloat16, torch.float16)


def load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return lib


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copy(PROGRAM, folder)
    for header in ("device.cuh", "emulate.h"):
        shutil.copy(cuda_emulate.SOURCES / header, folder)
    cuda_emulate.compile_library(folder, folder / "primitives.so", ("-O1",))
    lib = load(folder / "primitives.so")
    lib.vidla_emulation_report.restype = ctypes.c_char_p
    return lib


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    target = tmp_path_factory.mktemp("compiled") / "primitives.so"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    flags = ["-std=c++17", f"-arch={arch}", "-shared", "-Xcompiler=-fPIC", f"-I{cuda_emulate.SOURCES}", "-o", target]
    subprocess.run(["nvcc", *flags, PROGRAM], check=True)
    return load(target)


def words(name: str, dtype: torch.dtype) -> torch.Tensor:
    """(512,) int32, inputs that make sense for a primitive."""
    if name == "mma":
        halves = torch.randn(384).to(dtype).view(torch.int32)
        return torch.cat((halves, torch.randn(128).view(torch.int32), torch.zeros(192, dtype=torch.int32)))
    if name == "pack":
        special = torch.tensor([0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e-7, 6e-8, 3e-8, -1e-40, torch.inf, -torch.inf])
        return torch.cat((special, torch.randn(500) * torch.exp2(torch.randint(-28, 17, (500,)).float()))).view(torch.int32)
    if name == "exp2":
        return torch.cat((torch.tensor([0.0, -0.0, 1.0, -1.0, -200.0, -torch.inf]), torch.randn(506) * 30)).view(torch.int32)
    return torch.randint(-(2**31), 2**31, (512,)).int()


def run(lib: ctypes.CDLL, name: str, dtype: torch.dtype, given: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(given, -1)
    stream = torch.cuda.current_stream().cuda_stream if given.is_cuda else None
    assert lib.run(given.data_ptr(), out.data_ptr(), NAMES.index(name), DTYPES.index(dtype), stream) == 0
    return out.cpu()


def expected(name: str, dtype: torch.dtype, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, a mask of the words that are defined), from the PTX manual's definitions."""
    lane, out, defined = torch.arange(32), torch.full((512,), -1, dtype=torch.int32), torch.zeros(512, dtype=torch.bool)
    g, j = lane // 4, lane % 4

    def give(at: torch.Tensor, value: torch.Tensor) -> None:
        out[at], defined[at] = value, True

    def halves(word: torch.Tensor) -> torch.Tensor:
        return word.contiguous().view(dtype).view(*word.shape, 2)  # little endian: the lower column first

    if name == "mma":
        a, b, c = x[:128].view(32, 4), x[128:192].view(32, 2), x[192:320].view(torch.float32).view(32, 4).double()
        A, B, C = (torch.zeros(shape, dtype=torch.float64) for shape in ((16, 16), (16, 8), (16, 8)))
        for i in range(4):
            for h in range(2):
                A[g + i % 2 * 8, 2 * j + h + i // 2 * 8] = halves(a[:, i])[:, h].double()
        for i in range(2):
            for h in range(2):
                B[2 * j + h + 8 * i, g] = halves(b[:, i])[:, h].double()
                C[g + 8 * i, 2 * j + h] = c[:, 2 * i + h]
        D = A @ B + C
        for i in range(4):
            give(4 * lane + i, D[g + i // 2 * 8, 2 * j + i % 2].float().view(torch.int32))
    if name.startswith("ldmatrix"):
        rows = x[:128].view(32, 4)[x[128:160] % 32].view(torch.int16).view(4, 8, 8)  # matrix, row, column
        matrices = rows.transpose(1, 2) if name.endswith("trans") else rows
        for m in range(4):
            give(4 * lane + m, matrices[m].contiguous().view(torch.int32)[g, j])
    if name == "pack":
        two = x[:64].view(torch.float32).view(32, 2).to(dtype)
        give(lane, two.view(torch.int32)[:, 0])
        for h in range(2):
            give(32 + 32 * h + lane, two[:, h].float().view(torch.int32))
    if name == "unpack":
        for h in range(2):
            value = halves(x[:256])[:, h].float()
            give(256 * h + torch.arange(256), value.view(torch.int32))
    if name == "shuffle":
        for i in range(5):
            give(32 * i + lane, x[lane ^ 2**i])
    if name == "exp2":
        give(torch.arange(512), torch.exp2(x.view(torch.float32)).view(torch.int32))
    if name == "store_shared":
        stored = x[:128].view(4, 32).flip(1).reshape(128)  # word i of shared memory
        for m in range(4):
            give(4 * lane + m, stored[32 * m + lane])
            give(128 + 4 * lane + m, torch.zeros(32, dtype=torch.int32))
    if name == "active":
        active = lane % 3 == 0
        two, four = x[:64].view(32, 2), x[64:192].view(32, 4)
        give(256 + lane, torch.where(active, (two.sum(1) + four.sum(1)).int(), 0))
        give(torch.arange(64), torch.where(active[:, None], two, -1).flatten())
        give(64 + torch.arange(128), torch.where(active[:, None], four, -1).flatten())
    return out, defined


def compare(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    if name in ("mma", "exp2"):  # sums in another order; ex2.approx: 2 units in the last place
        torch.testing.assert_close(got.view(torch.float32), want.view(torch.float32), rtol=1e-5, atol=1e-5)
    else:
        a, b = got, want
        if name == "unpack":  # of NaNs, any is good
            nan = b.view(torch.float32).isnan()
            assert a.view(torch.float32)[nan].isnan().all()
            a, b = a[~nan], b[~nan]
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_emulated_primitive_does_what_is_defined(name, dtype, emulated, seed):
    for _ in range(20):
        given = words(name, dtype)
        got = run(emulated, name, dtype, given)
        report = json.loads(emulated.vidla_emulation_report())
        assert not report["errors"], report["messages"]
        want, defined = expected(name, dtype, given)
        compare(name, got[defined], want[defined])


@pytest.mark.parametrize("stride", [0, 4, 8, 12, 16, 20, 32, 64, 128])
def test_bank_conflicts_are_counted_and_races_found(stride, emulated):
    """4-byte stores of 32 lanes: a bank takes one word a pass, and lanes that write one word race."""
    given = torch.full((512,), stride, dtype=torch.int32)
    assert emulated.run(given.data_ptr(), torch.empty_like(given).data_ptr(), len(NAMES), 0, None) == 0
    report = json.loads(emulated.vidla_emulation_report())
    passes = math.gcd(stride // 4, 32) if stride else 1
    assert report["kernels"]["primitive"]["store_conflicts"] == passes - 1
    assert report["errors"] == ({} if stride else {"race: write after write": 31})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the PTX runs on a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_ptx_does_what_the_emulation_does(name, dtype, emulated, compiled, seed):
    for _ in range(20):
        given = words(name, dtype)
        want = run(emulated, name, dtype, given)
        _, defined = expected(name, dtype, given)
        compare(name, run(compiled, name, dtype, given.cuda())[defined], want[defined])
