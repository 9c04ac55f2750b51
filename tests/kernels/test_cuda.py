"""The CUDA kernels beyond the parity tests: every tiling, the order of warps, what moves and what is multiplied, launching.

Without a GPU all of this runs under emulation, which raises on any race, out-of-bounds access or read of bytes that have not
arrived; so each run here also tests that. What the emulation itself catches: test_cuda_breaks.py.
"""

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from vidla_kernels import TokenLayout, available_backends, backends, cuda_binding, cuda_emulate, hierarchical_attention
from vidla_kernels.cuda_binding import PASSES
from vidla_kernels.tiles import HEAD_DIMS

from .cases import Case, Parts, dense_runs, run
from .check import check

# Ragged tiles, frames that MST levels skip, patches that see CLS, no MST, more queries than most blocks have rows.
LAYOUTS = (
    TokenLayout(3, 21),
    TokenLayout(5, 50, 2, 3, 2, patches_see_cls=True),
    TokenLayout(2, 7, levels=0),
    TokenLayout(2, 150, 4, 4, 3),
)
B16, B32 = TokenLayout(12, 196), TokenLayout(12, 49)
emulated = pytest.mark.skipif(torch.cuda.is_available(), reason="the emulation's counters are for CPU tensors")


@pytest.fixture(autouse=True)
def cuda_here(device, monkeypatch):
    if reason := backends.missing("cuda", device):
        pytest.skip(reason)
    monkeypatch.setenv("VIDLA_EMULATE_ARCH", "90")


def attend(qkv, grad, layout, forward=-1, backward=-1) -> Parts:
    """Both passes of one head dimension, each by a tiling of its own."""
    scale = qkv.shape[-1] ** -0.5
    out, lse = cuda_binding.forward(qkv, layout, scale, forward)
    return Parts(out, cuda_binding.backward(grad, qkv, out, lse, layout, scale, backward))


def shipped(head_dim: int) -> tuple[range, range]:
    """The numbers of the tilings that a device has for both passes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return tuple(range(len(cuda_binding.variants(name, head_dim, device))) for name in PASSES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_tiling_errs_at_most_twice_torchs_own_attention(head_dim, layout, dtype, device, seed, monkeypatch):
    monkeypatch.setenv("VIDLA_EMULATE_SMS", str((1, 3, 132)[seed % 3]))  # how many blocks share the frames
    case = Case(layout, heads=2, head_dim=head_dim, dtype=dtype)
    qkv, grad = case.draw("hierarchical", device)
    gold = run("hierarchical", qkv.double(), grad.double(), layout, "reference")
    dense = dense_runs("hierarchical", qkv, grad, layout)
    for forward, backward in itertools.zip_longest(*shipped(head_dim), fillvalue=-1):
        try:
            ours = attend(qkv, grad, layout, forward, backward)
        except RuntimeError as error:  # asked for by number, a tiling may be too large for a frame or an older GPU
            if "shared memory" not in str(error):
                raise
            continue
        check(ours, dense, gold, layout.num_summary, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [TokenLayout(2, 49), TokenLayout(2, 196), TokenLayout(2, 256), TokenLayout(1, 270)], ids=str)
def test_on_an_h100_the_forward_multiplies_by_wgmma_where_a_frames_keys_fit(layout, dtype, device, seed, monkeypatch):
    qkv, grad = Case(layout, heads=1, dtype=dtype, magnitude=3.0).draw("hierarchical", device)
    if device.type == "cpu":
        monkeypatch.setenv("VIDLA_EMULATE_ARCH", "80")
        assert "wgmma" not in tiling(qkv, layout)
        monkeypatch.setenv("VIDLA_EMULATE_ARCH", "90")
    if device.type == "cpu" or torch.cuda.get_device_capability()[0] == 9:
        assert ("wgmma" in tiling(qkv, layout)) == (64 - layout.num_summary < layout.patches <= 256)
    gold = run("hierarchical", qkv.double(), grad.double(), layout, "reference")
    ours = Parts(cuda_binding.forward(qkv, layout, 0.125)[0], gold.d_qkv.to(dtype))
    check(ours, dense_runs("hierarchical", qkv, grad, layout), gold, layout.num_summary, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "layout", [TokenLayout(2, 256), TokenLayout(3, 244, 5, 3, 2, patches_see_cls=True), TokenLayout(3, 209, 0)], ids=str
)
def test_on_an_h100_the_backward_multiplies_by_wgmma_where_a_frames_patches_fit(layout, dtype, device, seed, monkeypatch):
    """In the same order, too, whichever warps come first: the last keys' sums go from warpgroup to warpgroup."""
    qkv, grad = Case(layout, heads=3, dtype=dtype).draw("hierarchical", device)
    words = cuda_binding.variants("backward", 64, device)[cuda_binding.choice("backward", qkv, layout)]
    if device.type == "cpu" or torch.cuda.get_device_capability()[0] == 9:
        assert "wgmma" in words
        assert "272 keys" in words
    monkeypatch.setenv("VIDLA_EMULATE_SMS", str((1, 2, 132)[seed % 3]))
    gold = run("hierarchical", qkv.double(), grad.double(), layout, "reference")
    out, lse = cuda_binding.forward(qkv, layout, 0.125)
    runs = []
    for order in ("0", "1"):
        monkeypatch.setenv("VIDLA_EMULATE_SEED", order)
        runs.append(cuda_binding.backward(grad, qkv, out, lse, layout, 0.125))
    check(Parts(out, runs[0]), dense_runs("hierarchical", qkv, grad, layout), gold, layout.num_summary, dtype)
    assert torch.equal(*runs)


def tiling(qkv, layout) -> str:
    """What the forward of these tensors runs by default, in words."""
    return cuda_binding.variants("forward", qkv.shape[-1], qkv.device)[cuda_binding.choice("forward", qkv, layout)]


@emulated
def test_a_tiling_for_h100_is_refused_elsewhere(monkeypatch):
    monkeypatch.setenv("VIDLA_EMULATE_ARCH", "80")
    qkv = torch.zeros(1, B32.seq_len, 3, 1, 64, dtype=torch.float16)
    for number, words in cuda_binding.variants("forward", 64, qkv.device).items():
        if "wgmma" in words:
            with pytest.raises(RuntimeError, match=r"compute capability 9\.x"):
                cuda_binding.forward(qkv, B32, 0.125, number)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_order_of_warps_changes_no_bit(head_dim, device, seed, monkeypatch):
    """Emulated, warps take their turns in another order; on a GPU, the second run schedules them as it likes."""
    for layout in LAYOUTS[1:2]:
        qkv, grad = Case(layout, heads=3, head_dim=head_dim, dtype=torch.bfloat16).draw("hierarchical", device)
        runs = []
        for order in ("0", "1", "2"):
            monkeypatch.setenv("VIDLA_EMULATE_SEED", order)
            runs.append(attend(qkv, grad, layout))
        for other in runs[1:]:
            assert torch.equal(runs[0].out, other.out)
            assert torch.equal(runs[0].d_qkv, other.d_qkv)


def counted(layout: TokenLayout, name: str, arch: int, monkeypatch) -> dict:
    """What one pass costs at B=1, H=1, D=64 under the default tiling, in the units the goals are stated in.

    One multiprocessor, so that a block gets a clip's frames, as it does where a batch fills the GPU.

    bytes: all bytes moved between blocks and global memory over the floor, which is q, k, v, dO read once and the output,
    dq, dk, dv written once. apart: of these, MST and CLS tokens read again for each frame (from L2). work: products
    multiplied over those of visible pairs.
    """
    monkeypatch.setenv("VIDLA_EMULATE_ARCH", str(arch))
    monkeypatch.setenv("VIDLA_EMULATE_SMS", "1")
    qkv, grad = Case(layout, heads=1, dtype=torch.bfloat16).draw("hierarchical", torch.device("cpu"))
    out, lse = cuda_binding.forward(qkv, layout, 0.125)
    if name == "backward":
        cuda_binding.backward(grad, qkv, out, lse, layout, 0.125)
    report = cuda_emulate.last_report
    kernels, buffers = report["kernels"].values(), report["buffers"]
    floor = (4 if name == "forward" else 7) * out.nbytes
    products = (2 if name == "forward" else 5) * layout.visible_pairs * 64
    again = sum(buffer["read"] - buffer["distinct_read"] for key, buffer in buffers.items() if key in ("qkv", "out", "d_out"))
    return {
        "bytes": sum(k["global_read"] + k["global_written"] for k in kernels) / floor,
        "apart": again / floor,
        "work": sum(k["mma"] for k in kernels) * 16 * 8 * 16 / products,
        "conflicts": sum(k["ldmatrix_conflicts"] + k["cp_async_conflicts"] for k in kernels),
        "other conflicts, a block": sum(k["store_conflicts"] for k in kernels) / sum(k["blocks"] for k in kernels),
        "buffers": buffers,
    }


@emulated
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(("layout", "most_bytes", "most_work"), [(B16, (1.15, 1.30), 1.35), (B32, (1.30, 1.65), 1.7)], ids=str)
def test_every_byte_moves_once(name, layout, most_bytes, most_work, arch, seed, monkeypatch):
    """Exact: each byte of qkv is read, each byte of a result is written once, no bank conflicts of copies and
    fragments. Bounded: all bytes, work."""
    cost = counted(layout, name, arch, monkeypatch)
    print({key: value for key, value in cost.items() if key != "buffers"})
    buffers = cost["buffers"]
    for read in ("qkv",) if name == "forward" else ("qkv", "out", "d_out"):
        assert buffers[read]["distinct_read"] == buffers[read]["bytes"]
        assert buffers[read]["written"] == 0
    for written in ("out", "lse") if name == "forward" else ("d_qkv",):
        assert buffers[written]["written"] == buffers[written]["distinct_written"] == buffers[written]["bytes"]
        assert buffers[written]["read"] == 0
    assert cost["conflicts"] == 0
    assert cost["other conflicts, a block"] <= 2  # not in a loop over frames, which there are 12 of
    assert cost["bytes"] - cost["apart"] <= most_bytes[PASSES.index(name)]
    assert cost["work"] <= most_work


def test_misaligned_input_is_copied_and_not_misread(device, seed):
    """Rows of D that begin at odd multiples of 2 bytes, or at strides no multiple of 16: the same bits as from a copy."""
    layout = LAYOUTS[0]
    B, S, H, D = 1, layout.seq_len, 2, 64
    room = torch.randn(B, S, 3, H, D + 9, device=device).bfloat16()
    for odd in (room[..., 3 : D + 3], room.flatten()[1 : 1 + B * S * 3 * H * D].view(B, S, 3, H, D)):
        results = []
        for x in (odd, odd.clone(memory_format=torch.contiguous_format)):
            x = x.detach().requires_grad_()
            out = hierarchical_attention(x, layout, backend="cuda")
            results.append(Parts(out, *torch.autograd.grad(out, x, torch.ones_like(out))))
        assert torch.equal(results[0].out, results[1].out)
        assert torch.equal(results[0].d_qkv, results[1].d_qkv)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scale_may_be_zero_or_negative(scale, device, seed):
    qkv, grad = Case(LAYOUTS[1], dtype=torch.float16).draw("hierarchical", device)
    results = []
    for backend, x in (("reference", qkv.double()), ("reference", qkv), ("cuda", qkv)):
        x = x.detach().requires_grad_()
        out = hierarchical_attention(x, LAYOUTS[1], scale=scale, backend=backend)
        results.append(Parts(out.detach(), *torch.autograd.grad(out, x, grad.to(x.dtype))))
    check(results[2], [results[1]], results[0], LAYOUTS[1].num_summary, torch.float16)


def test_refusals_say_what_is_legal(device, monkeypatch):
    def reason(layout=B16, dtype=torch.bfloat16, head_dim=64, op="hierarchical"):
        return backends.refuses("cuda", backends.Case(device, dtype, head_dim, layout, op))

    monkeypatch.setenv("VIDLA_EMULATE_ARCH", "80")
    assert "no CUDA kernel for tube attention" in reason(op="tube")
    assert "float32: the cuda backend has bfloat16 and float16" in reason(dtype=torch.float32)
    assert "head dimension 72: the cuda backend has 32, 64" in reason(head_dim=72)
    for layout, head_dim in itertools.product((B16, B32, TokenLayout(32, 256), TokenLayout(4, 577)), HEAD_DIMS):
        assert reason(layout, head_dim=head_dim) is None
    if refusal := reason(TokenLayout(2, 20_000)):
        assert "20000 patches a frame" in refusal
        most = int(refusal.split()[-1])
        assert reason(TokenLayout(2, most)) is None
        assert reason(TokenLayout(2, most + 1)) is not None


def test_errors_of_the_library_become_exceptions_with_shape_and_arch(device):
    qkv = torch.zeros(1, B32.seq_len, 3, 2, 64, dtype=torch.float16, device=device)
    with pytest.raises(
        RuntimeError, match=r"forward, on (the emulation|sm_\d+): there is no such variant.*\(1, 601, 3, 2, 64\)"
    ):
        cuda_binding.forward(qkv, B32, 0.125, variant=99)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    """Each reason, as `backend="cuda"` and `python -m vidla_kernels` give it."""
    monkeypatch.setattr(cuda_binding, "LIBRARY", tmp_path / "libvidla_cuda.so")
    monkeypatch.setattr(cuda_binding, "SKIPPED", tmp_path / "libvidla_cuda.txt")
    cuda_binding.library.cache_clear()
    assert "not installed with pip" in cuda_binding.not_built()
    cuda_binding.SKIPPED.write_text("VIDLA_CUDA=0 was set\n")
    assert "not built (VIDLA_CUDA=0 was set); with nvcc and cmake on PATH" in cuda_binding.not_built()
    cuda_binding.LIBRARY.write_bytes(b"not a library")
    assert "libvidla_cuda.so" in cuda_binding.not_built()
    if shutil.which("g++"):
        monkeypatch.setattr(cuda_binding, "LIBRARY", Path(cuda_emulate.library()._name))  # has no hash of its sources
        assert "was built from other sources" in cuda_binding.not_built()
    cuda_binding.library.cache_clear()

    monkeypatch.setenv("PATH", str(tmp_path))
    assert "g++, which was not found" in cuda_emulate.missing()
    monkeypatch.delenv("VIDLA_EMULATE_CUDA", raising=False)
    assert "set VIDLA_EMULATE_CUDA=1" in cuda_emulate.missing()


@emulated
def test_sources_that_do_not_compile_say_so_and_a_cache_that_cannot_be_written_too(monkeypatch, tmp_path):
    (tmp_path / "broken.cu").write_text("int f() { return }")
    with pytest.raises(RuntimeError, match=r"could not compile.*\n.*broken\.cu"):
        cuda_emulate.compile_library(tmp_path, tmp_path / "broken.so")
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIDLA_CACHE", str(tmp_path / "file" / "folder"))
    cuda_emulate.library.cache_clear()
    with pytest.raises(OSError, match="let the environment variable VIDLA_CACHE name a folder"):
        cuda_emulate.library()


def test_auto_does_not_pick_cuda_without_a_measurement(device):
    assert "cuda" in available_backends(device)
    for dtype, op in itertools.product((torch.bfloat16, torch.float16), ("tube", "hierarchical")):
        assert backends.choose("auto", backends.Case(device, dtype, 64, B16, op)) != "cuda"


@pytest.mark.parametrize("plan", ["triton/cuda", "cuda:0/triton", "cuda:2/cuda:0"])
def test_forward_and_backward_by_kernels_of_two_backends(plan, device, seed, monkeypatch):
    """What one forward saves serves the other's backward, and a tiling asked for by number is the one that runs."""
    if reason := backends.missing("triton", device):
        pytest.skip(reason)
    launched = []
    for name in PASSES:
        kernel = getattr(cuda_binding, name)
        monkeypatch.setattr(
            cuda_binding, name, lambda *a, f=kernel, n=name, variant: launched.append((n, variant)) or f(*a, variant=variant)
        )
    qkv, grad = Case(LAYOUTS[0], heads=2, dtype=torch.float16).draw("hierarchical", device)
    gold = run("hierarchical", qkv.double(), grad.double(), LAYOUTS[0], "reference")
    ours, dense = run("hierarchical", qkv, grad, LAYOUTS[0], plan), dense_runs("hierarchical", qkv, grad, LAYOUTS[0])
    check(ours, dense, gold, LAYOUTS[0].num_summary, torch.float16)
    parts = ((name, *backends.for_pass(plan, name)) for name in PASSES)
    assert launched == [(name, variant) for name, backend, variant in parts if backend == "cuda"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_works_under_a_cuda_graph(device, seed):
    qkv, grad = Case(B32, heads=2, dtype=torch.bfloat16).draw("hierarchical", device)
    want = attend(qkv, grad, B32)  # also the warm-up: loads the library, copies the table of the layout
    graph, x, dy = torch.cuda.CUDAGraph(), torch.zeros_like(qkv), torch.zeros_like(grad)
    with torch.cuda.graph(graph):
        got = attend(x, dy, B32)
    x.copy_(qkv)
    dy.copy_(grad)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.d_qkv, want.d_qkv)
