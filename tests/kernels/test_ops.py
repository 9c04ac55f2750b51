"""The public functions: registration with torch.library, torch.compile, autocast, choice of backend, refusals."""

import subprocess
import sys

import pytest
import torch

from vidla_kernels import TokenLayout, available_backends, backends, hierarchical_attention, tube_attention
from vidla_kernels.backends import missing, refuses

from .cases import DTYPES, OPS, Case

LAYOUT = TokenLayout(3, 5, 2, 2, 2)
BACKENDS = ("triton", "cuda", "portable", "reference")
CALLS = [(backend, op) for backend in BACKENDS for op in OPS if (backend, op) != ("cuda", "tube")]


def draw(op, device, dtype=torch.float32, layout=LAYOUT):
    return Case(layout, batch=2, heads=2, head_dim=32, dtype=dtype).draw(op, device)


def skip_if_missing(backend, device):
    if reason := missing(backend, device):
        pytest.skip(reason)


def fast(backend):
    """A dtype that the backend has: fp32 where it has that."""
    return torch.bfloat16 if backend == "cuda" else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "op"), [call for call in CALLS if call[0] in ("triton", "cuda")])
def test_opcheck(backend, op, dtype, device, seed):
    if reason := refuses(backend, backends.Case(device, dtype, 32, LAYOUT, op)):
        pytest.skip(reason)
    qkv, _ = draw(op, device, dtype)
    registered = getattr(torch.ops.vidla_kernels, f"{op}_attention").default
    torch.library.opcheck(registered, (qkv.requires_grad_(), LAYOUT.to_ints(), 0.2, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend, device, seed):
    """Compiled before anything has run: a new layout must hold nothing that only an eager call would fill in."""
    skip_if_missing(backend, device)
    layout = TokenLayout(3, 5, 2, 2, 2)

    def step(qkv):
        out = hierarchical_attention(qkv, layout, backend=backend)
        patches = tube_attention(qkv[:, layout.num_summary :], layout, backend="reference" if backend == "cuda" else backend)
        return out.sum() + patches.square().sum()

    torch._dynamo.reset()
    qkv, _ = draw("hierarchical", device, fast(backend))
    eager, compiled = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled).backward()
    step(eager).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "op"), CALLS)
def test_autocast_computes_in_autocasts_dtype(backend, op, low, device, seed):
    skip_if_missing(backend, device)
    qkv, grad = draw(op, device)
    leaf = qkv.clone().requires_grad_()
    with torch.autocast(device.type, low):
        out = OPS[op](leaf, LAYOUT, backend=backend)
    assert out.dtype == low
    assert torch.equal(out, OPS[op](qkv.to(low), LAYOUT, backend=backend))
    out.backward(grad.to(low))
    assert leaf.grad.dtype == torch.float32
    if backend in ("triton", "cuda"):  # the registered operator follows autocast by itself, and leaves float64 alone
        with torch.autocast(device.type, low):
            direct = getattr(torch.ops.vidla_kernels, f"{op}_attention")(qkv, LAYOUT.to_ints(), 32**-0.5, backend)
        assert torch.equal(direct if op == "tube" else direct[0], out)
    else:
        with torch.autocast(device.type, low):
            assert OPS[op](qkv.double(), LAYOUT, backend=backend).dtype == torch.float64


@pytest.mark.parametrize(("backend", "op"), CALLS)
def test_scale_is_a_factor_on_the_scores(backend, op, device, seed):
    skip_if_missing(backend, device)
    qkv, _ = draw(op, device, fast(backend))
    scaled = qkv.clone()
    scaled[:, :, 0] *= 4  # exact in any dtype
    default = OPS[op](scaled, LAYOUT, backend=backend)
    torch.testing.assert_close(OPS[op](qkv, LAYOUT, scale=4 * 32**-0.5, backend=backend), default)


def test_inner_stride_is_allowed(device, seed):
    """A tensor whose head dimension is not contiguous is copied, not refused and not misread."""
    for backend in BACKENDS:
        if missing(backend, device):
            continue
        qkv, _ = draw("hierarchical", device, fast(backend))
        odd = qkv.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert odd.stride(-1) != 1
        torch.testing.assert_close(
            hierarchical_attention(odd, LAYOUT, backend=backend), hierarchical_attention(qkv, LAYOUT, backend=backend)
        )


@pytest.mark.parametrize(("backend", "op"), CALLS)
def test_any_strides_of_the_incoming_gradient(backend, op, device, seed):
    """The gradient of a sum is one number, expanded; others come transposed. Neither is misread."""
    skip_if_missing(backend, device)
    qkv, grad = draw(op, device, fast(backend))
    qkv.requires_grad_()
    out = OPS[op](qkv, LAYOUT, backend=backend)
    for odd in (
        torch.ones((), device=device, dtype=out.dtype).expand_as(out),
        grad.transpose(1, 3).contiguous().transpose(1, 3),
    ):
        assert not odd.is_contiguous()
        got, want = (torch.autograd.grad(out, qkv, g, retain_graph=True)[0] for g in (odd, odd.contiguous()))
        assert torch.equal(got, want)


def test_auto_is_portable_on_a_cpu():
    assert available_backends("cpu")[:2] == ("portable", "reference")
    qkv, _ = draw("tube", torch.device("cpu"))
    assert torch.equal(tube_attention(qkv, LAYOUT), tube_attention(qkv, LAYOUT, backend="portable"))


def test_refusals_say_what_is_wrong_and_what_is_legal(device):
    qkv, _ = draw("hierarchical", device)
    with pytest.raises(ValueError, match=r"expected \(B, S=20, 3, H, D\).*3 frames x 5 patches"):
        hierarchical_attention(qkv[:, :-1], LAYOUT)
    with pytest.raises(ValueError, match=r"\(B, T\*N=15, 3, H, D\)"):
        tube_attention(qkv, LAYOUT)
    with pytest.raises(ValueError, match="int64; expected float16"):
        hierarchical_attention(qkv.long(), LAYOUT)
    with pytest.raises(ValueError, match="'auto', one of 'triton', 'cuda', 'portable', 'reference', or"):
        hierarchical_attention(qkv, LAYOUT, backend="fast")
    for plan in ("triton/portable", "triton:1", "cuda/", "/cuda", "cuda:x", "triton/cuda/cuda"):
        with pytest.raises(ValueError, match="for forward and backward as in 'triton/cuda'"):
            hierarchical_attention(qkv, LAYOUT, backend=plan)
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run this: .*Available here: portable"):
        tube_attention(qkv[:, 5:], LAYOUT, backend="cuda")


def test_kernels_refuse_what_they_do_not_have(device):
    skip_if_missing("triton", device)
    for head_dim, dtype, reason in (
        (72, torch.float32, "head dimension 72: the triton backend has 32"),
        (64, torch.float64, "float64: the triton backend has"),
    ):
        qkv = torch.zeros(1, LAYOUT.seq_len, 3, 1, head_dim, dtype=dtype, device=device)
        with pytest.raises(RuntimeError, match=reason):
            hierarchical_attention(qkv, LAYOUT, backend="triton")
        assert hierarchical_attention(qkv, LAYOUT).isfinite().all()  # auto falls back


def python(code: str, **env: str) -> str:
    import os

    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VIDLA_EMULATE_CUDA")}
    return subprocess.run([sys.executable, "-c", code], env=kept | env, capture_output=True, text=True, check=True).stdout


def test_imports_alone():
    code = "import sys, vidla_kernels; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = set(python(code).split())
    assert "torch" in loaded
    assert not loaded & {"vidla", "open_clip", "torchvision", "nvidia.dali", "xformers", "open_clip_train", "PIL"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_the_error_says_how_to_interpret():
    code = """
import torch, vidla_kernels as vk
layout = vk.TokenLayout(2, 3)
print(vk.available_backends("cpu"))
try:
    vk.tube_attention(torch.zeros(1, 6, 3, 1, 32), layout, backend="triton")
except RuntimeError as error:
    print(error)
"""
    text = python(code)
    assert "('portable', 'reference')" in text
    assert "set TRITON_INTERPRET=1" in text
    said = python("from vidla_kernels.__main__ import main; main()")
    assert said.count("TRITON_INTERPRET=1") == said.count("VIDLA_EMULATE_CUDA=1") == 1
