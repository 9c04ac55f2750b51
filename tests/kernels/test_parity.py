"""Every backend against the reference: values and gradients of q, k and v, on fresh random inputs.

Kernels run interpreted on a CPU and compiled on a GPU; a backend that cannot serve a case skips with its own sentence.
"""

import random

import pytest
import torch

from vidla_kernels import TokenLayout, backends

from .cases import CASES, DTYPES, OPS, PRETRAINING, TUBE_CASES, Case, dense_runs, random_case, run
from .check import check

FIXED = [(op, case) for op in OPS for case in (*CASES, *(TUBE_CASES if op == "tube" else ()))]


def skip_if_refused(backend: str, case: Case, device: torch.device) -> None:
    if reason := backends.refuses(backend, backends.Case(device, case.dtype, case.head_dim, case.layout)):
        pytest.skip(reason)


def compare(op: str, backend: str, case: Case, device: torch.device) -> None:
    skip_if_refused(backend, case, device)
    qkv, grad = case.draw(op, device)
    gold = run(op, qkv.double(), grad.double(), case.layout, "reference")
    dense = dense_runs(op, qkv, grad, case.layout)
    ours = run(op, qkv, grad, case.layout, backend)
    assert ours.out.dtype == case.dtype
    assert ours.out.is_contiguous()
    check(ours, dense, gold, 0 if op == "tube" else case.layout.num_summary, case.dtype)
    if backend == "triton" and (device.type == "cuda" or case in CASES[:3]):  # no atomics: two runs are bit-equal
        again = run(op, qkv, grad, case.layout, backend)
        assert torch.equal(ours.out, again.out)
        assert torch.equal(ours.d_qkv, again.d_qkv)


@pytest.mark.parametrize(("op", "case"), FIXED, ids=str)
@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_errs_at_most_twice_torchs_own_attention(backend, op, case, device, seed):
    compare(op, backend, case, device)


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_random_cases(backend, op, number, device, seed):
    case = random_case(random.Random(seed))
    print(case)
    compare(op, backend, case, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_one_hot(backend, op, dtype, device, seed):
    """Scores of 10**5: the output is the winner's value exactly, without an overflow, where one key clearly wins."""
    case = Case(TokenLayout(4, 19), dtype=dtype, magnitude=200.0)
    skip_if_refused(backend, case, device)
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
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_pretraining_shapes(backend, op, case, device, seed):
    compare(op, backend, case, device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs more than 8 GB of GPU memory and a compiled kernel")
@pytest.mark.parametrize("shape", PRETRAINING[1:3], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_offsets_beyond_32_bits(op, shape, seed):
    """A batch of over 2**31 elements: its last clip must be what that clip gives alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    case = Case(shape.layout, batch=2**31 // (shape.layout.seq_len * 3 * 12 * 64) + 2, heads=12, dtype=torch.bfloat16)
    qkv, _ = case.draw(op, torch.device("cuda"))
    assert qkv.numel() > 2**31
    among, alone = OPS[op](qkv, case.layout, backend="triton")[-1:], OPS[op](qkv[-1:], case.layout, backend="triton")
    # A lone clip of B/32 is split into runs of frames to fill the GPU, which rounds its summary rows differently.
    first = case.layout.num_summary if op == "hierarchical" and case.layout.patches == 49 else 0
    assert torch.equal(among[:, first:], alone[:, first:])


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck_in_float64(op, backend, device, seed):
    case = Case(TokenLayout(3, 4, 2, 2, 2, patches_see_cls=seed % 2 == 0), batch=2, heads=2, head_dim=4)
    qkv, _ = case.draw(op, device)
    assert torch.autograd.gradcheck(lambda x: OPS[op](x, case.layout, backend=backend), qkv.double().requires_grad_())
