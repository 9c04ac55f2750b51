"""The native kernels on a CPU, each version that this processor runs, and `portable` without them."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.forward_ad import dual_level, make_dual

from vidla_kernels import TokenLayout, cpu_binding, hierarchical_attention, reference

from . import build
from .cases import CASES, OPS, TUBE_CASES, Case, Parts, dense_runs, random_case, run
from .check import check
from .test_parity import compare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about CPU tensors")
CPU = torch.device("cpu")
MEMOS = (cpu_binding.library, cpu_binding.missing, cpu_binding.version)


@pytest.fixture(autouse=True)
def fresh_memory_of_what_is_there():
    yield
    for memo in MEMOS:
        memo.cache_clear()


@pytest.fixture(scope="module")
def built() -> build.Built:
    return build.built("cpu")


def use(version: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `portable` run a version of the native code on a CPU, or torch where it is "0"."""
    monkeypatch.setattr(cpu_binding, "LIBRARY", library)
    monkeypatch.setenv("VIDLA_CPU", version)
    for memo in MEMOS:
        memo.cache_clear()
    if version != "0" and (reason := cpu_binding.missing()):
        pytest.skip(reason)


@pytest.fixture
def native(built, monkeypatch) -> None:
    use("", built.library, monkeypatch)


FLOATS = [case for case in CASES if case.dtype == torch.float32]
# Head dimensions of no whole vector, of one element, and of many vectors; a block of rows and one more; G beyond a block.
FLOATS += [Case(TokenLayout(3, 18), head_dim=D, sliced=D % 2 == 0) for D in (1, 4, 33, 72, 200)]
FLOATS += [Case(TokenLayout(2, N), heads=1, head_dim=32) for N in (3, 52, 63, 116)]
FLOATS += [Case(TokenLayout(2, 7, 9, 8, 2, cls), heads=1, head_dim=32) for cls in (False, True)]
SETS = {"hierarchical": FLOATS, "tube": [*FLOATS, *(replace(case, dtype=torch.float32) for case in TUBE_CASES)]}


@pytest.mark.parametrize("version", ["0", *cpu_binding.VERSIONS])
@pytest.mark.parametrize(("op", "case"), [(op, case) for op in OPS for case in SETS[op]], ids=str)
def test_errs_at_most_twice_torchs_own_attention(version, op, case, built, monkeypatch, seed):
    use(version, built.library, monkeypatch)
    calls = []
    plain = cpu_binding._run
    monkeypatch.setattr(cpu_binding, "_run", lambda *args, **tensors: (calls.append(args), plain(*args, **tensors)))
    compare(op, "portable", case, CPU)
    assert len(calls) == (0 if version == "0" else 2), "the path that was asked for is the one that ran"


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("op", OPS)
def test_random_cases(op, number, native, seed):
    case = replace(random_case(random.Random(seed)), dtype=torch.float32)
    print(case)
    compare(op, "portable", case, CPU)


@pytest.mark.parametrize("version", cpu_binding.VERSIONS)
def test_power_of_two(version, built, monkeypatch, seed):
    """Against float64, over all that a softmax asks for: within 1.25 units in the last place, 0 below 2^-126.5, NaN kept."""
    use(version, built.library, monkeypatch)
    lib, number = cpu_binding.library(), cpu_binding.version()
    x = torch.cat((torch.linspace(-126.4, 30, 2**20), -(torch.rand(2**18) * 20).exp2(), torch.arange(-126.0, 128)))
    x = torch.cat((x, torch.tensor([0.0, -0.0, 0.5, -0.5, -1e-30, -torch.inf, -1e30, -127, -126.6, torch.nan])))
    x = torch.cat((x, torch.zeros(-len(x) % 16)))
    y = torch.full_like(x, torch.nan)
    lib.vidla_cpu_exp2(number, x.data_ptr(), y.data_ptr(), len(x))
    assert torch.equal(y.isnan(), x.isnan())
    assert (y[x < -126.55] == 0).all()
    kept = x >= -126
    exact = x[kept].double().exp2()
    unit = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double() - exact.float().double()
    assert ((y[kept].double() - exact).abs() / unit).max() < 1.25
    whole = kept & (x == x.round())
    assert torch.equal(y[whole].double(), x[whole].double().exp2())


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6, 7.0])
@pytest.mark.parametrize("op", OPS)
def test_any_scale(op, scale, native, seed):
    """Zero makes every key equal, a negative one turns the order of the keys round."""
    case = Case(TokenLayout(5, 13), heads=1, head_dim=32)
    qkv, grad = case.draw(op, CPU)

    def scaled(qkv: torch.Tensor, grad: torch.Tensor, backend: str) -> Parts:
        leaf = qkv.clone().requires_grad_()
        out = OPS[op](leaf, case.layout, scale=scale, backend=backend)
        return Parts(out.detach(), torch.autograd.grad(out, leaf, grad)[0])

    gold = scaled(qkv.double(), grad.double(), "reference")
    summary = case.layout.num_summary if op == "hierarchical" else 0
    check(scaled(qkv, grad, "portable"), [scaled(qkv, grad, "reference")], gold, summary, case.dtype)


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("whose", ["torch's", "own"])
@pytest.mark.parametrize("op", OPS)
def test_the_number_of_threads_changes_no_bit(op, whose, native, monkeypatch, seed):
    case = Case(TokenLayout(8, 49), batch=4, heads=5)
    qkv, grad = case.draw(op, CPU)
    started, runs = [], []

    lib = cpu_binding.library()

    class Watched:
        vidla_cpu_best, vidla_cpu_plan = lib.vidla_cpu_best, lib.vidla_cpu_plan

        @staticmethod
        def vidla_cpu_run(call: cpu_binding.Call, region: int | None) -> None:
            started.append(call.threads)
            lib.vidla_cpu_run(call, region if whose == "torch's" else None)

    if whose == "torch's" and cpu_binding.torchs_threads() is None:
        pytest.skip("this torch has no OpenMP runtime of GNU's kind")
    monkeypatch.setattr(cpu_binding, "library", Watched)
    for count in (1, 3, 1):
        with threads(count):
            runs.append(run(op, qkv, grad, case.layout, "portable"))
    assert started == [1, 1, 3, 3, 1, 1]
    for other in runs[1:]:
        assert torch.equal(runs[0].out, other.out)
        assert torch.equal(runs[0].d_qkv, other.d_qkv)


def test_a_small_call_takes_one_thread(native):
    call = cpu_binding.Call(batch=1, heads=2, head_dim=32, frames=3, patches=5, threads=64, version=cpu_binding.version())
    assert cpu_binding.library().vidla_cpu_plan(call) > 0
    assert call.threads == 1


def test_memory_of_a_thread_does_not_grow_with_clips_heads_or_frames(native):
    def floats(**sizes: int) -> int:
        known = {
            "which": cpu_binding.HIERARCHICAL_BACKWARD,
            "batch": 1,
            "heads": 1,
            "head_dim": 64,
            "frames": 8,
            "patches": 196,
            "summary": 13,
        }
        call = cpu_binding.Call(**known | sizes, threads=1, version=cpu_binding.version())
        return cpu_binding.library().vidla_cpu_plan(call)

    assert floats() == floats(batch=9) == floats(heads=12) == floats(frames=128)
    assert 4 * floats() < 2**20, "it should stay in a second-level cache of 1 MB"
    tube = cpu_binding.TUBE_BACKWARD
    assert floats(which=tube, frames=256, summary=0) < 2.2 * floats(which=tube, frames=128, summary=0)


@pytest.mark.parametrize("op", OPS)
def test_strides_of_zero_and_an_offset(op, native, seed):
    """One clip for all, one head for all, one tensor as q, k and v; none of them copied."""
    layout = TokenLayout(4, 9)
    tokens = layout.num_patches if op == "tube" else layout.seq_len
    base = torch.randn(2, tokens + 1, 3, 2, 40)[:, 1:, :, :, 3:35]
    views = (
        base[:1].expand(3, -1, -1, -1, -1),
        base[:, :, :, :1].expand(-1, -1, -1, 4, -1),
        base[:, :, 1:2].expand(-1, -1, 3, -1, -1),
    )
    for view in views:
        assert not view.is_contiguous()
        grad = torch.randn(view.shape[:2] + view.shape[3:])
        got, want = (run(op, x, grad, layout, "portable") for x in (view, view.contiguous()))
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.d_qkv, want.d_qkv)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("op", OPS)
def test_what_is_not_finite_goes_where_it_is_seen(op, part, value, native, seed):
    """A value that is not finite in one patch reaches the rows that it must, and no other row changes by a bit."""
    layout = TokenLayout(6, 5, 2, 3, 2)
    mask = layout.tube_mask() if op == "tube" else layout.mask()
    qkv = torch.randn(1, len(mask), 3, 2, 32)
    at = len(mask) - 1 - 2 * layout.patches  # a patch of frame 3
    bad = qkv.clone()
    bad[0, at, part, 1, 7] = value
    clean, out = (OPS[op](x, layout, backend="portable") for x in (qkv, bad))
    seen = torch.arange(len(mask)) == at if part == 0 else mask[:, at]
    assert torch.equal(out[0, ~seen], clean[0, ~seen])
    assert torch.equal(out[0, :, 0], clean[0, :, 0])
    want = reference.masked_attention(bad[:, :, :, 1:], mask, 32**-0.5)[0, seen, 0]
    assert torch.equal(out[0, seen, 1].isfinite().all(-1), want.isfinite().all(-1))
    gradient = run(op, bad, torch.randn(clean.shape), layout, "portable").d_qkv
    assert not gradient[0, at, :, 1].isfinite().all() or out[0, seen, 1].isfinite().all()
    assert gradient[0, ~(seen | mask[seen].any(0)), :, 1].isfinite().all()
    assert gradient[0, :, :, 0].isfinite().all()


def test_what_it_does_not_serve_runs_in_torch(native, seed):
    layout = TokenLayout(3, 5, 2, 2, 2)
    for dtype in (torch.float64, torch.bfloat16):
        qkv, _ = Case(layout, dtype=dtype).draw("hierarchical", CPU)
        assert "float32" in cpu_binding.refuses(qkv)
        assert hierarchical_attention(qkv, layout).isfinite().all()
        with pytest.raises(RuntimeError, match=r"native CPU kernels cannot run this: .*float32"):
            torch.ops.vidla_kernels.hierarchical_attention(qkv, layout.to_ints(), 0.1, "native")
    assert hierarchical_attention(torch.zeros(0, layout.seq_len, 3, 2, 32), layout).shape == (0, layout.seq_len, 2, 32)
    assert cpu_binding.refuses(torch.nn.Parameter(torch.zeros(1, 1, 3, 1, 8))) is None


@pytest.mark.parametrize("op", OPS)
def test_no_derivative_is_lost_without_a_word(op, native, seed):
    """Forward mode, torch.func and second derivatives: what is not there raises."""
    case = Case(TokenLayout(3, 5, 2, 2, 2), head_dim=8)
    qkv, _ = case.draw(op, CPU)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return OPS[op](x, case.layout, backend="portable")

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(attend, (qkv,), (qkv,))
    with dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        attend(make_dual(qkv, qkv))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(attend)(qkv[None])
    leaf = qkv.requires_grad_()
    (first,) = torch.autograd.grad(attend(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="autograd"):
        torch.autograd.grad(first.sum(), leaf)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, native, seed):
    case = Case(TokenLayout(3, 5, 2, 2, 2), head_dim=32)
    qkv, _ = case.draw(op, CPU)
    registered = getattr(torch.ops.vidla_kernels, f"{op}_attention").default
    torch.library.opcheck(registered, (qkv.requires_grad_(), case.layout.to_ints(), 0.2, "native"))


def test_without_a_library_portable_runs_in_torch_and_the_reason_is_told(built, monkeypatch, tmp_path, seed):
    case = Case(TokenLayout(3, 5, 2, 2, 2))
    qkv, grad = case.draw("hierarchical", CPU)

    def told(version: str, library: Path) -> str:
        monkeypatch.setattr(cpu_binding, "LIBRARY", library)
        monkeypatch.setenv("VIDLA_CPU", version)
        for memo in MEMOS:
            memo.cache_clear()
        got = run("hierarchical", qkv, grad, case.layout, "portable")
        gold = run("hierarchical", qkv.double(), grad.double(), case.layout, "reference")
        check(got, dense_runs("hierarchical", qkv, grad, case.layout), gold, case.layout.num_summary, case.dtype)
        return cpu_binding.missing()

    assert "VIDLA_CPU=0" in told("0", built.library)
    assert "'fast'; it may be 0 or one of baseline, avx2, avx512" in told("fast", built.library)
    assert "not installed with pip" in told("", tmp_path / "libvidla_cpu.so")
    changed = shutil.copytree(cpu_binding.SOURCES, tmp_path / "cpu")
    (changed / "simd.h").write_text("// changed")
    monkeypatch.setattr(cpu_binding, "SOURCES", changed)
    assert "built from other sources" in told("", built.library)


# The build.


def test_cmake_and_python_agree_on_what_the_sources_are(built):
    assert build.sources_of(built.library, "cpu") == cpu_binding.digest()
    assert not re.search(r"\bwarning:", built.log), built.log


def test_only_the_librarys_own_functions_are_exported(built):
    names = build.exported(built.library)
    assert names
    assert all(name.startswith("vidla_cpu_") for name in names)


def test_wide_registers_stay_in_the_versions_that_ask_for_them(built):
    """A library built here runs on any processor of the kind: what all share uses no more than the baseline has."""
    if os.uname().machine != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs objdump, on x86-64")
    text = subprocess.run(["objdump", "-d", "-C", "--no-show-raw-insn", built.library], capture_output=True, text=True).stdout
    wide = {"%ymm": set(), "%zmm": set()}
    function = ""
    for line in text.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:", line):
            function = match[1]
        for register, users in wide.items():
            if register in line:
                users.add(function)
    assert wide["%zmm"]
    assert all("vidla::avx512::" in name for name in wide["%zmm"])
    assert all("vidla::avx" in name for name in wide["%ymm"])


NATIVE = ("CMakeLists.txt", "setup.py", "vidla_kernels/cpu", "vidla_kernels/cuda")


@pytest.mark.parametrize("case", ["built", "no compiler", "skipped", "does not compile"])
def test_setup(case, built, tmp_path):
    """setup.py builds the library for itself, whether or not nvcc is there, and where it cannot says why in one line."""
    for name in NATIVE:
        source, target = build.ROOT / name, tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    env = {**os.environ, "VIDLA_CUDA": "0"}
    if case == "no compiler":
        env["PATH"] = str(Path(sys.executable).parent)
        env.pop("CXX", None)
        if any(shutil.which(name, path=env["PATH"]) for name in ("c++", "g++", "clang++")):
            pytest.skip("there is a compiler beside Python")
    elif case == "skipped":
        env["VIDLA_CPU"] = "0"
    elif case == "does not compile":
        (tmp_path / "tree/vidla_kernels/cpu/simd.h").write_text("#error broken\n")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "out", "--build-temp", tmp_path / "temp"]
    done = subprocess.run(command, cwd=tmp_path / "tree", env=env, capture_output=True, text=True)
    if "No module named 'setuptools" in done.stderr:
        pytest.skip("needs setuptools 70.1 or later, which pip brings for itself when it builds")
    assert done.returncode == 0, done.stderr
    library = tmp_path / "out/vidla_kernels/libvidla_cpu.so"
    assert library.with_name("libvidla_cuda.txt").read_text() == "VIDLA_CUDA=0 was set when it was installed\n"
    if case == "built":
        assert build.sources_of(library, "cpu") == cpu_binding.digest()
        assert library.with_suffix(".log").exists()
        return
    reason = {
        "no compiler": "a C++ compiler was not found",
        "skipped": "VIDLA_CPU=0 was set",
        "does not compile": "could not compile it when it was installed: see libvidla_cpu.log",
    }[case]
    assert not library.exists()
    assert reason in library.with_suffix(".txt").read_text()
    assert f"vidla_kernels: libvidla_cpu skipped: {library.with_suffix('.txt').read_text()}" in done.stdout
    if case == "does not compile":
        assert "#error broken" in library.with_suffix(".log").read_text()
