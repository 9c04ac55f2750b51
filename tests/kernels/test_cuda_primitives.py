"""Each device primitive on its own: the emulated one against its definition, and on a GPU the PTX against the emulated one.

So a mistake in the emulation, which would let every other test of the CUDA sources agree with a wrong kernel, shows here; and
what the emulation cannot see, the inline PTX, is compared word by word as soon as there is a GPU and nvcc.
"""

import ctypes
import itertools
import json
import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vidla_kernels import cuda_emulate

PROGRAM = Path(__file__).with_name("primitives.cu")
NAMES = ("mma", "ldmatrix", "ldmatrix.trans", "pack", "unpack", "shuffle", "exp2", "store_shared", "active")
STRIDED = 9  # the number of the program that stores at a stride
HOPPER = ("stmatrix", "stmatrix.trans")  # from number 10 on
DTYPES = (torch.bfloat16, torch.float16)


def load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    lib.descriptor.restype = ctypes.c_uint64
    return lib


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copy(PROGRAM, folder)
    for header in (cuda_emulate.SOURCES / "device.cuh", *cuda_emulate.SOURCES.glob("*.h")):
        shutil.copy(header, folder)
    cuda_emulate.compile_library(folder, folder / "primitives.so", ("-O1",))
    lib = load(folder / "primitives.so")
    lib.vidla_emulation_report.restype = ctypes.c_char_p
    return lib


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    target = tmp_path_factory.mktemp("compiled") / "primitives.so"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability()).replace("90", "90a")
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
    x = torch.randint(-(2**31), 2**31, (512,)).int()
    if name.startswith("stmatrix"):  # a permutation of the rows
        x[128:130] = torch.tensor([random.choice((1, 3, 5, 7)), random.randrange(32)])
    return x


def run(lib: ctypes.CDLL, name: str, dtype: torch.dtype, given: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(given, -1)
    stream = torch.cuda.current_stream().cuda_stream if given.is_cuda else None
    number = NAMES.index(name) if name in NAMES else STRIDED + 1 + HOPPER.index(name)
    assert lib.run(given.data_ptr(), out.data_ptr(), number, DTYPES.index(dtype), stream) == 0
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
    if name.startswith("stmatrix"):
        r, row = x[:128].view(32, 4), (x[128].item() * lane + x[129].item()) % 32
        for m in range(4):
            matrix = r[:, m].contiguous().view(torch.int16).view(8, 8)
            rows = (matrix.T if name.endswith("trans") else matrix).contiguous().view(torch.int32).view(8, 4)
            give((4 * row[8 * m : 8 * m + 8, None] + torch.arange(4)).flatten(), rows.flatten())
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
@pytest.mark.parametrize("name", NAMES + HOPPER)
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
    assert emulated.run(given.data_ptr(), torch.empty_like(given).data_ptr(), STRIDED, 0, None) == 0
    report = json.loads(emulated.vidla_emulation_report())
    passes = math.gcd(stride // 4, 32) if stride else 1
    assert report["kernels"]["primitive"]["store_conflicts"] == passes - 1
    assert report["errors"] == ({} if stride else {"race: write after write": 31})


on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the PTX runs on a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES + (HOPPER if on_hopper else ()))
def test_ptx_does_what_the_emulation_does(name, dtype, emulated, compiled, seed):
    for _ in range(20):
        given = words(name, dtype)
        want = run(emulated, name, dtype, given)
        _, defined = expected(name, dtype, given)
        compare(name, run(compiled, name, dtype, given.cuda())[defined], want[defined])


# Products of a warpgroup. A matrix of which wgmma takes a (64 x 16) or b (16 x n) lies in one of eight ways.


class Product(ctypes.Structure):
    """vidla::Product of primitives.cu."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("shared", "a", "out")]
    _fields_ += [(name, ctypes.c_uint64) for name in ("a_at", "b_at")]
    _fields_ += [(name, ctypes.c_int) for name in ("a_step", "b_step", "mistake")]


SWIZZLES = {16: 0, 32: 1, 64: 2, 128: 3}  # bytes among which units change places -> number in device.cuh
MISTAKES = {
    "no_fence": "wgmma without a wgmma_fence",
    "no_commit": "wgmma waited for but not committed",
    "no_wait": "wgmma never waited for",
    "no_proxy_fence": "no fence_async between a write and wgmma",
    "no_barrier": "race: read after write",
    "accumulator_written": "accumulators written while a wgmma was under way",
    "a_written": "registers of a written while a wgmma was under way",
    "b_written": "write over the operand of a wgmma under way",
    "warps_differ": "differs from that of another warp of its warpgroup",
    "packed_after_fence": "wgmma of registers packed after the last wgmma_fence",
    "barrier_too_small": "barrier",
}


def places(rows: int, width: int, by_mn: bool, leading: int, stride: int, at: int) -> torch.Tensor:
    """(rows, 16): where each number of an operand is, in bytes, if it begins at `at`.

    The canonical layouts of the PTX ISA in numbers of 16 bits, written as nested shapes and strides: by k ((8, m), (8, 2)) has
    ((W, stride), (1, 8)), or ((8, stride), (1, leading)) without swizzle; by m or n ((8, u, m), (8, 2)) has
    ((1, 8, leading), (W, stride)), or ((1, stride), (8, leading)). u units of 8 numbers are W numbers, the swizzle's width.
    """
    W, (leading, stride) = width // 2, (leading // 2, stride // 2)
    row, k = torch.arange(rows)[:, None], torch.arange(16)[None]

    def nested(i: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        total = torch.zeros_like(i)
        for n, step in zip((*shape, 1 << 20), strides, strict=True):
            total, i = total + i % n * step, i // n
        return total

    if by_mn:
        units = ((8,), (1, stride)) if width == 16 else ((8, W // 8), (1, 8, leading))
        offset = nested(row, *units) + nested(k, (8,), (W, leading if width == 16 else stride))
    else:
        offset = nested(row, (8,), (W, stride)) + nested(k, (8,), (1, leading if width == 16 else 8))
    byte = at + 2 * offset
    unit = torch.div(byte, 16, rounding_mode="floor") % 8
    line = torch.div(byte, 128, rounding_mode="floor") % (width // 16)
    return byte - 16 * unit + 16 * (unit ^ line)


def layout_of(rows: int, width: int, by_mn: bool, further: int) -> tuple[int, int, int]:
    """leading, stride and step to the next 16 k, in bytes: all side by side, or with gaps where `further` says so."""
    if width == 16:
        inner = 128 + further
        outer = inner * (-(-rows // 8) if by_mn else 2) + further
        return (outer, inner, 2 * outer) if by_mn else (inner, outer, outer * rows // 8)
    tile = 8 * width * (2 if further else 1)  # which 8 rows, or 8 k, fill
    if by_mn:
        return 2 * tile, tile, 2 * tile * rows * 2 // width
    return 16, tile, 32 if width > 32 else rows // 8 * tile


class Operands:
    """Random a, a', b, b' and where they are."""

    def __init__(self, n: int, a: int, b_mn: bool, a_width: int, b_width: int, dtype: torch.dtype, lib: ctypes.CDLL) -> None:
        self.a, self.b = torch.randn(2, 64, 16).to(dtype), torch.randn(2, n, 16).to(dtype)
        self.shared = torch.full((32768,), torch.nan, dtype=dtype)
        self.n, self.kind, self.b_mn, self.dtype = n, a, b_mn, dtype
        self.at, self.step = {}, {}
        for name, x, rows, width, by_mn, at in (("b", self.b, n, b_width, b_mn, 0), ("a", self.a, 64, a_width, a == 1, 49152)):
            leading, stride, step = layout_of(rows, width, by_mn, 16 * random.randrange(2) * (n < 256))
            if name == "b" or a < 2:
                for i in range(2):
                    where = places(rows, width, by_mn, leading, stride, at + i * step)
                    self.shared[(where // 2).flatten()] = x[i].flatten()
            self.at[name], self.step[name] = lib.descriptor(at, SWIZZLES[width], leading, stride), step
        thread = torch.arange(128)
        row, k = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        self.registers = torch.stack(
            [self.a[i][row + r % 2 * 8][torch.arange(128)[:, None], (k + r // 2 * 8)[:, None] + torch.arange(2)]
             for i in range(2) for r in range(4)], 1
        ).contiguous()  # fmt: skip

    def run(self, lib: ctypes.CDLL, mistake: str = "nothing", device: str = "cpu") -> torch.Tensor:
        """(64, n), or NaN where nothing came."""
        out = torch.full((128, self.n // 2), torch.nan, device=device)
        shared, registers = self.shared.to(device), self.registers.to(device)
        number = ("nothing", *MISTAKES).index(mistake)
        pointers = (x.data_ptr() for x in (shared, registers, out))
        p = Product(*pointers, self.at["a"], self.at["b"], self.step["a"], self.step["b"], number)
        stream = torch.cuda.current_stream().cuda_stream if device != "cpu" else None
        arguments = (self.n, self.kind, int(self.b_mn), DTYPES.index(self.dtype), ctypes.c_void_p(stream))
        assert lib.run_product(ctypes.byref(p), *arguments) == 0
        thread, e = torch.arange(128)[:, None], torch.arange(self.n // 2)[None]
        row = thread // 32 * 16 + thread % 32 // 4 + e // 2 % 2 * 8
        result = torch.empty(64, self.n)
        result[row, e // 4 * 8 + thread % 4 * 2 + e % 2] = out.cpu()
        return result

    def product(self) -> torch.Tensor:
        return torch.einsum("imk,ink->mn", self.a.double(), self.b.double()).float()


def combinations(lib: ctypes.CDLL, dtype: torch.dtype) -> list[Operands]:
    ways = itertools.product((0, 1, 2), (False, True), SWIZZLES, SWIZZLES)
    sizes = itertools.cycle((8, 24, 64, 104))
    some = [(n, *way) for n, way in zip(sizes, ways, strict=False)]
    some += [(n, 0, b_mn, 128, w) for n in (64, 256) for b_mn in (False, True) for w in SWIZZLES]
    whole = [(n, a, b_mn, wa, wb) for n, a, b_mn, wa, wb in some if not (b_mn and 2 * n % wb)]
    return [Operands(n, a, b_mn, wa, wb, dtype, lib) for n, a, b_mn, wa, wb in whole]


def report_of(lib: ctypes.CDLL) -> dict:
    return json.loads(lib.vidla_emulation_report())


@pytest.fixture
def hopper(monkeypatch) -> None:
    monkeypatch.setenv("VIDLA_EMULATE_ARCH", "90")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_product_of_every_layout(dtype, emulated, hopper, seed):
    random.seed(seed)
    for x in combinations(emulated, dtype):
        got, report = x.run(emulated), report_of(emulated)
        assert not report["errors"], report["messages"]
        torch.testing.assert_close(got, x.product(), rtol=1e-5, atol=1e-4)
        counts = report["kernels"]["product"]
        assert counts["mma"] * 16 * 8 * 16 == 2 * 64 * x.n * 16
        assert counts["wgmma"] == 8
        assert counts["shared_read"] == 2 * 32 * (x.n + (64 if x.kind < 2 else 0))


@pytest.mark.parametrize("what", ["swizzle", "stride", "leading", "start"])
def test_a_wrong_descriptor_gives_another_product(what, emulated, hopper, seed):
    random.seed(seed)
    for width in SWIZZLES:
        x = Operands(64, 0, True, 128, width, torch.bfloat16, emulated)
        leading_matters = width < 128  # 64 columns are one unit of 128 bytes
        field = {"swizzle": 62, "stride": 32, "leading": 16, "start": 0}[what]
        x.at["b"] ^= (1 << field) if what != "start" else 0
        x.at["b"] += 8 if what == "start" else 0
        got, report = x.run(emulated), report_of(emulated)
        same = torch.allclose(got, x.product(), rtol=1e-5, atol=1e-4)
        assert (same and not report["errors"]) == (what == "leading" and not leading_matters), (width, report["errors"])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_with_wgmma_is_found(mistake, emulated, hopper, seed):
    x = Operands(64, 2 if mistake in ("a_written", "packed_after_fence") else 0, False, 128, 128, torch.bfloat16, emulated)
    assert not report_of(emulated)["errors"]
    x.run(emulated, mistake)
    report = report_of(emulated)
    assert any(MISTAKES[mistake] in text for text in [*report["errors"], *report["messages"]]), report


def test_wgmma_is_refused_where_the_gpu_has_none(emulated, monkeypatch, seed):
    monkeypatch.setenv("VIDLA_EMULATE_ARCH", "80")
    Operands(8, 0, False, 128, 128, torch.float16, emulated).run(emulated)
    assert any("on a GPU that has none" in text for text in report_of(emulated)["messages"])


@pytest.mark.skipif(not on_hopper, reason="wgmma runs on an H100")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpus_product_of_every_layout(dtype, compiled, seed):
    random.seed(seed)
    for x in combinations(compiled, dtype):
        torch.testing.assert_close(x.run(compiled, device="cuda"), x.product(), rtol=1e-5, atol=1e-4)
