"""The two public attentions, and their registration with torch.library (schema, fake, autograd, autocast).

`reference` and `portable` are plain torch functions: autograd, autocast and torch.compile see through them. Kernel backends
run behind the registered operators `torch.ops.vidla_kernels.tube_attention` and `.hierarchical_attention`, which
torch.compile keeps whole and whose backward is an operator of its own. There "native" is one more: the CPU kernels behind
`portable`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch

from . import cpu_binding, cuda_binding, portable, reference
from .backends import Case, choose, for_pass
from .layout import TokenLayout

NAMESPACE = "vidla_kernels"


def tube_attention(
    qkv: torch.Tensor, layout: TokenLayout, *, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Attention of each patch over its place in every frame (paper equation 1, without norm, projections and residual).

    Args:
        qkv: (B, T*N, 3, H, D), frame-major, the packed output of one Linear; float16, bfloat16 or float32 (reference and
            portable also float64). Any strides, so a slice of a larger tensor costs no copy while D is contiguous.
        layout: gives T and N; no other field is read.
        scale: factor on q.k; None is D ** -0.5, per head (docs/decisions.md), where the paper prints sqrt(d).
        backend: "auto", a name from `available_backends(qkv.device)`, or kernels for forward and backward: "triton/cuda".

    Returns:
        (B, T*N, H, D), contiguous, in qkv's dtype (under autocast in autocast's). Softmax and sums in fp32.

    Raises:
        ValueError: a shape, dtype or backend name that cannot be; the message has the expected and the given.
        RuntimeError: the backend named by hand cannot serve this case; the message says why.
    """
    qkv, scale, name = _prepare("tube", qkv, layout, layout.num_patches, "T*N", scale, backend)
    if name == "reference":
        return reference.tube(qkv, layout, scale)
    if name == "portable":
        return portable.tube(qkv, layout, scale)
    return torch.ops.vidla_kernels.tube_attention(qkv, layout.to_ints(), scale, name)


def hierarchical_attention(
    qkv: torch.Tensor, layout: TokenLayout, *, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Attention of the whole sequence under the hierarchical rule (paper equation 2, without norm, projections and MLP).

    CLS sees everything; an MST token of level u the MST of levels <= u and the patches of every r**u-th frame; a patch its
    own frame and every MST. `TokenLayout.visible` is the exact statement.

    Args:
        qkv: (B, S, 3, H, D) with the tokens in the order of `TokenLayout`; dtypes and strides as in `tube_attention`.
        layout: gives the order and the rule.
        scale, backend: as in `tube_attention`.

    Returns:
        (B, S, H, D), contiguous, in qkv's dtype (under autocast in autocast's). Softmax and sums in fp32.

    Raises:
        ValueError, RuntimeError: as in `tube_attention`.
    """
    qkv, scale, name = _prepare("hierarchical", qkv, layout, layout.seq_len, "S", scale, backend)
    if name == "reference":
        return reference.hierarchical(qkv, layout, scale)
    if name == "portable":
        return portable.hierarchical(qkv, layout, scale)
    return torch.ops.vidla_kernels.hierarchical_attention(qkv, layout.to_ints(), scale, name)[0]


def _prepare(op, qkv, layout, tokens, symbol, scale, backend):
    if qkv.dim() != 5 or qkv.shape[1] != tokens or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (B, {symbol}={tokens}, 3, H, D) for {layout}")
    if not qkv.dtype.is_floating_point:
        raise ValueError(f"qkv has dtype {qkv.dtype}; expected float16, bfloat16, float32 or float64")
    qkv = _autocast(qkv)
    name = choose(backend, Case(qkv.device, qkv.dtype, qkv.shape[-1], layout, op))
    return qkv, qkv.shape[-1] ** -0.5 if scale is None else float(scale), name


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """x as autocast would have it: in its dtype where autocast is on for x's device, but float64 stays."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


# Registered operators. A layout crosses the dispatcher as its six numbers.


@cache
def _layout(*ints: int) -> TokenLayout:
    return TokenLayout.from_ints(ints)


def _rows_contiguous(qkv: torch.Tensor) -> torch.Tensor:
    """Kernels take any strides but need D contiguous; what has it not is copied."""
    return qkv if qkv.stride(-1) == 1 else qkv.contiguous()


def _tube_kernel(backend: str, name: str) -> Callable:
    """The function of one pass, "forward" or "backward"."""
    if backend == "native":
        return getattr(cpu_binding, f"tube_{name}")
    from . import triton_tube

    return getattr(triton_tube, name)


@torch.library.custom_op(
    f"{NAMESPACE}::tube_attention", mutates_args=(), schema="(Tensor qkv, int[] layout, float scale, str backend) -> Tensor"
)
def _tube(qkv, layout, scale, backend):
    return _tube_kernel(backend, "forward")(_rows_contiguous(qkv), _layout(*layout), scale)


@torch.library.custom_op(
    f"{NAMESPACE}::tube_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor qkv, int[] layout, float scale, str backend) -> Tensor",
)
def _tube_backward(grad_out, qkv, layout, scale, backend):
    return _tube_kernel(backend, "backward")(grad_out.contiguous(), _rows_contiguous(qkv), _layout(*layout), scale)


def _hierarchical_kernel(plan: str, name: str) -> Callable:
    """As `_tube_kernel`, of a plan (backends.py)."""
    backend, variant = for_pass(plan, name)
    if backend == "native":
        return getattr(cpu_binding, name)
    if backend == "cuda":
        return partial(getattr(cuda_binding, name), variant=variant)
    from . import triton_hierarchical, triton_hierarchical_backward

    return triton_hierarchical.forward if name == "forward" else triton_hierarchical_backward.backward


@torch.library.custom_op(
    f"{NAMESPACE}::hierarchical_attention",
    mutates_args=(),
    schema="(Tensor qkv, int[] layout, float scale, str backend) -> (Tensor out, Tensor lse)",
)
def _hierarchical(qkv, layout, scale, backend):
    return _hierarchical_kernel(backend, "forward")(_rows_contiguous(qkv), _layout(*layout), scale)


@torch.library.custom_op(
    f"{NAMESPACE}::hierarchical_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int[] layout, float scale, str backend) -> Tensor",
)
def _hierarchical_backward(grad_out, qkv, out, lse, layout, scale, backend):
    kernel = _hierarchical_kernel(backend, "backward")
    return kernel(grad_out.contiguous(), _rows_contiguous(qkv), out, lse, _layout(*layout), scale)


@_tube.register_fake
def _(qkv, layout, scale, backend):
    B, tokens, _, H, D = qkv.shape
    return qkv.new_empty(B, tokens, H, D)


@_hierarchical.register_fake
def _(qkv, layout, scale, backend):
    B, S, _, H, D = qkv.shape
    return qkv.new_empty(B, S, H, D), qkv.new_empty(B, H, S, dtype=torch.float32)


@_tube_backward.register_fake
def _(grad_out, qkv, layout, scale, backend):
    return qkv.new_empty(qkv.shape)


@_hierarchical_backward.register_fake
def _(grad_out, qkv, out, lse, layout, scale, backend):
    return qkv.new_empty(qkv.shape)


def _save_tube(ctx, inputs, output):
    qkv, *ctx.rest = inputs
    ctx.save_for_backward(qkv)


def _save_hierarchical(ctx, inputs, output):
    qkv, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output)


_tube.register_autograd(
    lambda ctx, grad_out: (_tube_backward(grad_out, *ctx.saved_tensors, *ctx.rest), None, None, None),
    setup_context=_save_tube,
)
_hierarchical.register_autograd(
    lambda ctx, grad_out, _: (_hierarchical_backward(grad_out, *ctx.saved_tensors, *ctx.rest), None, None, None),
    setup_context=_save_hierarchical,
)


def _register_autocast(name: str) -> None:
    """Cast qkv to autocast's dtype when the operator itself is called. (register_autocast would fix one dtype for all.)"""
    op = getattr(torch.ops.vidla_kernels, name)
    for device in ("CPU", "CUDA"):
        key = getattr(torch._C.DispatchKey, f"Autocast{device}")

        def rule(keys, qkv, *rest, key=key):
            qkv = _autocast(qkv)  # before the guard, under which autocast is off
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(qkv, *rest)

        _library.impl(name, rule, f"Autocast{device}", with_keyset=True)


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_register_autocast("tube_attention")
_register_autocast("hierarchical_attention")
