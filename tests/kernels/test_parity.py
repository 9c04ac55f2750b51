"""Every backend against the reference: values and gradients of q, k and v, on fresh random inputs.

Kernels run interpreted (Triton) or emulated (CUDA) on a CPU and compiled on a GPU; a backend that cannot serve a case skips
with its own sentence.
"""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch

from vidla_kernels import TokenLayout, backends, tiles

from .cases import CASES, DTYPES, OPS, PRETRAINING, TUBE_CASES, Case, dense_runs, random_case, run
from .check import check


def in_half(case: Case, backend: str) -> Case:
    """The case in bf16 where it is fp32 and the backend has no fp32: its layout is still worth a run."""
    return replace(case, dtype=torch.bfloat16) if backend == "cuda" and case.dtype == torch.float32 else case


BACKENDS = [(backend, op) for backend in ("portable", "triton") for op in OPS] + [("cuda", "hierarchical")]
FIXED = [
    (backend, op, case)
    for backend, op in BACKENDS
    for case in dict.fromkeys(in_half(case, backend) for case in (*CASES, *(TUBE_CASES if op == "tube" else ())))
]


def skip_if_refused(op: str, backend: str, case: Case, device: torch.device) -> None:
    if reason := backends.refuses(backend, backends.Case(device, case.dtype, case.head_dim, case.layout, op)):
        pytest.skip(reason)


def compare(op: str, backend: str, case: Case, device: torch.device) -> None:
    skip_if_refused(op, backend, case, device)
    qkv, grad = case.draw(op, device)
    gold = run(op, qkv.double(), grad.double(), case.layout, "reference")
    dense = dense_runs(op, qkv, grad, case.layout)
    ours = run(op, qkv, grad, case.layout, backend)
    assert ours.out.dtype == case.dtype
    assert ours.out.is_contiguous()
    check(ours, dense, gold, 0 if op == "tube" else case.layout.num_summary, case.dtype)
    if backend != "portable" and (device.type == "cuda" or case in CASES[:3]):  # no atomics: two runs are bit-equal
        again = run(op, qkv, grad, case.layout, backend)
        assert torch.equal(ours.out, again.out)
        assert torch.equal(ours.d_qkv, again.d_qkv)


@pytest.mark.parametrize(("backend", "op", "case"), FIXED, ids=str)
def test_errs_at_most_twice_torchs_own_attention(backend, op, case, device, seed):
    compare(op, backend, case, device)


# Shape classes of the backward: a frame in one tile, with and without hierarchy; frames of several tiles; more tiles of rows.
FRAMES = [
    TokenLayout(5, 49),
    TokenLayout(4, 9, 0),
    TokenLayout(6, 20, 4, 3, 3, True),
    TokenLayout(1, 63, 0, patches_see_cls=True),
]
FRAMES += [TokenLayout(2, 68), TokenLayout(2, 196), TokenLayout(1, 257)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs its own tiles")
@pytest.mark.parametrize(("layout", "dtype"), list(product(FRAMES, (torch.float16, torch.bfloat16))), ids=str)
def test_tiles_of_h100(layout, dtype, device, seed, monkeypatch):
    """The interpreter runs A100's tiles unless it is told otherwise; H100's take other paths through the kernels."""
    monkeypatch.setattr(tiles, "DEFAULT_ARCH", 90)
    compare("hierarchical", "triton", Case(layout, heads=1, dtype=dtype), device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs its own kernels")
@pytest.mark.parametrize(("layout", "dtype"), list(product(FRAMES, (torch.float16, torch.bfloat16))), ids=str)
def test_cuda_kernels_of_h100(layout, dtype, device, seed, monkeypatch):
    """The emulation plays an A100 unless it is told otherwise; an H100 has kernels of its own."""
    monkeypatch.setenv("VIDLA_EMULATE_ARCH", "90")
    compare("hierarchical", "cuda", Case(layout, heads=2, dtype=dtype), device)


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize(("backend", "op"), BACKENDS)
def test_random_cases(backend, op, number, device, seed):
    case = in_half(random_case(random.Random(seed)), backend)
    print(case)
    compare(op, backend, case, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "op"), BACKENDS)
def test_one_hot(backend, op, dtype, device, seed):
    """Scores of 10**5: the output is the winner's value exactly, without an overflow, where one key clearly wins."""
    case = Case(TokenLayout(4, 19), dtype=dtype, magnitude=200.0)
    skip_if_refused(op, backend, case, device)
    qkv, _ = case.draw(op, device)
    mask = case.layout.tube_mask(device) if op == "tube" else case.layout.mask(device)
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) * case.head_dim**-0.5).masked_fill(~mask, -torch.inf)
    first, second = scores.topk(2).values.unbind(-1)
    clear = (first - second > 100).transpose(1, 2)
    assert clear.float().mean() > 0.5
    winner = v.gather(2, scores.argmax(-1, keepdim=True).expand_as(v)).transpose(1, 2)
    out = OPS[op](qkv, case.layout, backend=backend).double()
    assert torch.isfinite(out).all()
    assert torch.equal(out[clear], winner[clear])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="whole pretraining shapes take minutes under the interpreter")
@pytest.mark.parametrize("case", PRETRAINING, ids=str)
@pytest.mark.parametrize(("backend", "op"), BACKENDS)
def test_pretraining_shapes(backend, op, case, device, seed):
    compare(op, backend, case, device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs more than 8 GB of GPU memory and a compiled kernel")
@pytest.mark.parametrize("shape", PRETRAINING[1:3], ids=str)
@pytest.mark.parametrize(("backend", "op"), BACKENDS[2:])
def test_offsets_beyond_32_bits(backend, op, shape, seed):
    """A batch of over 2**31 elements: its last clip must be what that clip gives alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    case = Case(shape.layout, batch=2**31 // (shape.layout.seq_len * 3 * 12 * 64) + 2, heads=12, dtype=torch.bfloat16)
    qkv, _ = case.draw(op, torch.device("cuda"))
    assert qkv.numel() > 2**31
    skip_if_refused(op, backend, case, qkv.device)
    last, alone = OPS[op](qkv, case.layout, backend=backend)[-1:], OPS[op](qkv[-1:], case.layout, backend=backend)
    # The frames of a lone clip may be split further, to fill the GPU, which rounds its summary rows differently.
    summary = case.layout.num_summary if op == "hierarchical" else 0
    assert torch.equal(last[:, summary:], alone[:, summary:])
    torch.testing.assert_close(last[:, :summary], alone[:, :summary])


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck_in_float64(op, backend, device, seed):
    case = Case(TokenLayout(3, 4, 2, 2, 2, patches_see_cls=seed % 2 == 0), batch=2, heads=2, head_dim=4)
    qkv, _ = case.draw(op, device)
    assert torch.autograd.gradcheck(lambda x: OPS[op](x, case.layout, backend=backend), qkv.double().requires_grad_())
