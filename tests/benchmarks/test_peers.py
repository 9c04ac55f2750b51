"""Every peer computes VidLA's attention: values and gradients on random layouts, those of a GPU through stand-ins."""

import random
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from benchmarks import peers
from benchmarks.gate import disagreement
from benchmarks.shapes import OPS, Shape, Sweep, sweeps
from tests.kernels.cases import random_layout

CPU = torch.device("cpu")
NAMES = [(op, name) for op in OPS for name in peers.PEERS[op]]


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs a GPU or a compiler, in plain torch: the peers' own code stays."""
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    monkeypatch.setattr(peers, "SDPBackend", types.SimpleNamespace(CUDNN_ATTENTION=SDPBackend.MATH))
    yield
    peers.forget()


def _attend(q, k, v, mask=None):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)


def _varlen(q, k, v, starts_q, starts_k, most_q, most_k):
    """flash_attn_varlen_func's contract, one sequence after the other."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert most_q == starts_q.diff().max()
    assert most_k == starts_k.diff().max()
    at_q, at_k = (x.diff().tolist() for x in (starts_q, starts_k))
    pieces = zip(q.split(at_q), k.split(at_k), v.split(at_k), strict=True)
    return torch.cat([_attend(*(x[None] for x in piece))[0] for piece in pieces])


def _draw(seed: int, op: str) -> tuple[Shape, torch.Tensor, torch.Tensor]:
    rng = random.Random(seed)
    shape = Shape("random", random_layout(rng), rng.choice((1, 2, 3)), rng.choice((1, 2)), torch.float32, 32)
    return shape, *shape.draw(op, CPU)


def _run(attention, shape, qkv, grad, backward=True):
    out = attention(qkv, shape.layout)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0] if backward else None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("op", "name"), NAMES)
def test_a_peer_agrees_with_the_reference(op, name, seed, on_a_cpu, monkeypatch):
    if name.startswith("xformers"):
        ops = pytest.importorskip("xformers.ops")

        def materialized(q, k, v, attn_bias):
            bias = attn_bias.materialize((1, q.shape[1], k.shape[1]), q.dtype, q.device)
            return _attend(q, k, v, bias)

        monkeypatch.setattr(ops, "memory_efficient_attention", materialized)
    if name.startswith("flash-attn"):
        flash = types.ModuleType("flash_attn")
        flash.flash_attn_varlen_func = _varlen
        flash.flash_attn_qkvpacked_func = lambda qkv: _attend(*qkv.unbind(2))
        monkeypatch.setitem(sys.modules, "flash_attn", flash)
    backward = not name.startswith("FlexAttention")  # has none on a CPU
    for number in range(3):
        shape, qkv, grad = _draw(seed + number, op)
        want = _run(peers.oracle(op), shape, qkv, grad, backward)
        attention = peers.PEERS[op][name][0]
        if not backward:
            qkv = qkv.detach()
        assert disagreement(_run(attention, shape, qkv, grad, backward), want) is None, shape


def test_the_dense_blocks_are_the_rule(seed):
    for number in range(20):
        layout = random_layout(random.Random(seed + number))
        mask = torch.zeros(layout.seq_len, layout.seq_len, dtype=torch.bool)
        queries = []
        for rows, keys in peers.blocks(layout):
            queries += rows
            assert len(set(keys)) == len(keys)
            mask[torch.tensor(rows)[:, None], torch.tensor(keys)] = True
        assert queries == list(range(layout.seq_len))
        assert torch.equal(mask, layout.mask()), layout


def test_xformers_still_has_what_is_called():
    import inspect

    fmha = pytest.importorskip("xformers.ops.fmha")
    parameters = inspect.signature(fmha.memory_efficient_attention).parameters
    assert list(parameters)[:4] == ["query", "key", "value", "attn_bias"]
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens([1, 2], [3, 4], device=CPU)
    dense = bias.materialize((3, 7))
    assert (dense == 0).sum() == 1 * 3 + 2 * 4


def test_each_peer_is_measured_or_has_a_reason():
    for toy in (False, True):
        for sweep in sweeps(CPU, toy):
            rows = peers.implementations(sweep, CPU, toy)
            assert next(row.name for row in rows if row.ours) == "portable (auto)"
            assert len({row.name for row in rows}) == len(rows)
            assert all(row.absent is None or len(row.absent) > 10 for row in rows)
            assert sum(row.absent is None for row in rows if not row.ours) >= 1
            assert {row.name for row in rows if not row.ours} == set(peers.PEERS[sweep.op])


@pytest.mark.parametrize("tower", ["B/16 T=12", "B/32 T=12"])
@pytest.mark.parametrize(
    ("op", "named"),
    [
        ("hierarchical", ["dense mask SDPA", "per-frame SDPA", "per-frame SDPA, a loop", "per-frame SDPA, compiled"]),
        ("tube", ["permute + SDPA", "einsum", "einsum, compiled"]),
    ],
)
def test_a_cpu_runs_every_peer_that_a_goal_names(op, named, tower):
    (sweep,) = (s for s in sweeps(CPU) if (s.group, s.op, s.passes, s.shape.name) == ("attention", op, "fwd+bwd", tower))
    measured = {row.name for row in peers.implementations(sweep, CPU) if row.absent is None}
    assert set(named) <= measured


def test_a_gpu_measures_the_shapes_of_the_paper():
    gpu = torch.device("cuda")
    found = {(s.group, s.op, s.passes, s.shape.name) for s in sweeps(gpu)}
    towers = [f"{tower} T={T}" for tower in ("B/32", "B/16", "L/14") for T in (12, 32)]
    assert {("attention", op, passes, t) for op in OPS for passes in ("fwd", "fwd+bwd") for t in towers} <= found
    assert {s.shape.layout.frames for s in sweeps(gpu) if s.group == "growth with T"} >= {8, 128}
    assert len({s.shape.B for s in sweeps(gpu) if s.group == "growth with B"}) >= 4
    assert {s.shape.dtype for s in sweeps(gpu)} == {torch.bfloat16}
    sweep = sweeps(gpu)[0]
    absent = {name for name, (_, why) in peers.PEERS[sweep.op].items() if why(sweep, gpu, False)}
    assert not {name for name in absent if "xformers" not in name and "flash" not in name}


def test_dense_attention_is_left_out_where_it_grows_too_large():
    long = Sweep("growth with T", "hierarchical", sweeps(torch.device("cuda"))[-1].shape, "fwd+bwd")
    assert peers.PEERS["hierarchical"]["dense mask SDPA"][1](long, CPU, False) is None
    huge = next(s for s in sweeps(torch.device("cuda")) if s.shape.layout.frames == 128)
    assert "tokens" in peers.PEERS[huge.op]["dense mask SDPA"][1](huge, CPU, False)
