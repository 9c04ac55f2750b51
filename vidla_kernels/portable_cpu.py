"""The portable backend on a CPU without torch.compile: native kernels where there are any for the call (cpu_binding.py), else
in torch the same mathematics as portable.py, with the backward written out.

In torch, what costs time on a CPU is not the products but passing through memory, above all through memory that was asked for
anew: autograd's backward of a slice or of a concatenation fills, copies and adds whole tensors. Here every gradient is written
where it belongs, and what lies between is a clip's share (hierarchical) or a few tubes' (tube attention), which stays in
the cache and is used again for the next. The native kernels go through memory once.

Measurements: docs/results.md. Neither function can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import cpu_binding
from .layout import TokenLayout

# torch's CPU flash attention. The operators themselves, because a backward that writes in place needs both halves.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Autocast has been applied to qkv; inside, it would round what is kept in fp32.
_no_autocast = torch.autocast("cpu", enabled=False)

# Rows of q that a thread takes at a time in tube attention: q, k, v and their like then fit its second-level cache.
_ROWS = 4096


def tube(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> torch.Tensor:
    """Tube attention, paper equation 1 without norm, projections and residual. (B, T*N, 3, H, D) -> (B, T*N, H, D)."""
    if cpu_binding.refuses(qkv) is None:
        return torch.ops.vidla_kernels.tube_attention(qkv, layout.to_ints(), scale, "native")
    return _Tube.apply(qkv, layout, scale)[0]


def hierarchical(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> torch.Tensor:
    """Hierarchical attention, paper equation 2 without norm, projections and MLP. (B, S, 3, H, D) -> (B, S, H, D)."""
    if cpu_binding.refuses(qkv) is None:
        return torch.ops.vidla_kernels.hierarchical_attention(qkv, layout.to_ints(), scale, "native")[0]
    if qkv.stride(-1) != 1:  # which torch's operator takes for granted
        qkv = qkv.contiguous()
    return _Hierarchical.apply(qkv, layout, scale)[0]


# Tube attention: a few tubes at a time, copied to where a tube's T rows are neighbours, in fp32 at least.


def _portions(B: int, T: int, N: int, H: int) -> Iterator[tuple[int, slice]]:
    """(clip, places): which tubes are done together."""
    step = max(1, _ROWS * torch.get_num_threads() // (T * H))
    for b in range(B):
        for n in range(0, N, step):
            yield b, slice(n, n + step)


def _gather(x: torch.Tensor) -> torch.Tensor:
    """Rows (T, n, ..., H, D) of one clip as (..., n*H, T, D)."""
    x = x.movedim(0, -2).movedim(0, -4)  # (..., n, H, T, D)
    return x.to(torch.promote_types(x.dtype, torch.float32)).flatten(-4, -3)


def _scatter(x: torch.Tensor, to: torch.Tensor) -> None:
    """The inverse of `_gather`, rounding to the dtype of `to`, (T, n, ..., H, D)."""
    to.copy_(x.unflatten(-3, (to.shape[1], to.shape[-2])).movedim(-4, 0).movedim(-2, 0))


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scale)


class _Tube(torch.autograd.Function):
    @staticmethod
    @_no_autocast
    def forward(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        B, _, _, H, D = qkv.shape
        T, N = layout.frames, layout.patches
        qkv = qkv.unflatten(1, (T, N))
        out = qkv.new_empty(B, T, N, H, D)
        # Of each row the maximum and the sum: P comes back from them without the rounding of a log-sum-exp.
        stats = torch.empty(2, B, N, H, T, 1, dtype=torch.promote_types(qkv.dtype, torch.float32))
        for b, n in _portions(B, T, N, H):
            q, k, v = _gather(qkv[b, :, n])
            p = _scores(q, k, scale)
            # By hand: torch's softmax over a dozen columns takes five times as long as these.
            top = p.amax(-1, keepdim=True)
            total = p.sub_(top).exp_().sum(-1, keepdim=True)
            _scatter(torch.bmm(p, v).div_(total), out[b, :, n])
            stats[:, b, n] = torch.stack((top, total)).view_as(stats[:, b, n])
        return out.view(B, T * N, H, D), stats

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        qkv, ctx.layout, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(qkv, output[1])

    @staticmethod
    @_no_autocast
    def backward(ctx, grad_out, _):
        qkv, stats = ctx.saved_tensors
        B, _, _, H, D = qkv.shape
        T, N = ctx.layout.frames, ctx.layout.patches
        qkv, grad_out = qkv.unflatten(1, (T, N)), grad_out.unflatten(1, (T, N))
        d_qkv = qkv.new_empty(B, T, N, 3, H, D)
        for b, n in _portions(B, T, N, H):
            q, k, v = _gather(qkv[b, :, n])
            top, total = stats[:, b, n].reshape(2, -1, T, 1)
            d_out = _gather(grad_out[b, :, n])
            grads = torch.empty(3, *q.shape, dtype=q.dtype)
            dq, dk, dv = grads
            p = _scores(q, k, ctx.scale).sub_(top).exp_().div_(total)
            torch.bmm(p.mT, d_out, out=dv)
            dp = torch.bmm(d_out, v.mT)
            ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scale)
            torch.bmm(ds, k, out=dq)
            torch.bmm(ds.mT, q, out=dk)
            _scatter(grads, d_qkv[b, :, n])
        return d_qkv.view(B, T * N, 3, H, D), None, None


# Hierarchical attention: a clip at a time; its frames are the batch of one attention, its summary rows are another.


def _heads(x: torch.Tensor) -> torch.Tensor:
    """(..., rows, H, D) <-> (..., H, rows, D), a view."""
    return x.transpose(-3, -2)


def _summary_mask(layout: TokenLayout, dtype: torch.dtype) -> torch.Tensor:
    """(G, S): 0 where a summary row sees the key, else -inf."""
    position = torch.arange(layout.seq_len)
    hidden = ~layout.visible(position[: layout.num_summary, None], position[None])
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _frames(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """The patches of one clip's (S, ...) as (T, N, ...), a view."""
    return x[layout.num_summary :].unflatten(0, (layout.frames, layout.patches))


def _keys(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """K or V of one clip, (S, H, D), as each frame's patches see them: (T, N + summary keys, H, D)."""
    shared = x[layout.first_key_of_patches : layout.num_summary]
    return torch.cat((_frames(x, layout), shared.expand(layout.frames, *shared.shape)), 1)


class _Hierarchical(torch.autograd.Function):
    @staticmethod
    @_no_autocast
    def forward(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> tuple[torch.Tensor, ...]:
        B, S, _, H, D = qkv.shape
        T, N, G = layout.frames, layout.patches, layout.num_summary
        mask = _summary_mask(layout, qkv.dtype)
        out = qkv.new_empty(B, S, H, D)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        lse_frames, lse_summary = (qkv.new_empty(B, *shape, dtype=wide) for shape in ((T, H, N), (1, H, G)))
        for b in range(B):
            q, k, v = qkv[b].unbind(1)  # (S, H, D)
            rows, lse_frames[b] = _attend(*map(_heads, (_frames(q, layout), _keys(k, layout), _keys(v, layout))), scale=scale)
            _frames(out[b], layout).copy_(_heads(rows))
            rows, lse_summary[b] = _attend(*(_heads(x)[None] for x in (q[:G], k, v)), attn_mask=mask, scale=scale)
            out[b, :G] = _heads(rows)[0]
        return out, lse_frames, lse_summary, mask

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        qkv, ctx.layout, ctx.scale = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(qkv, *output)

    @staticmethod
    @_no_autocast
    def backward(ctx, grad_out, *_):
        qkv, out, lse_frames, lse_summary, mask = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        grad_out = grad_out.contiguous()  # that of a sum is one number, expanded
        N, G, first = layout.patches, layout.num_summary, layout.first_key_of_patches
        d_qkv = qkv.new_empty(qkv.shape)
        for b in range(qkv.shape[0]):
            q, k, v = qkv[b].unbind(1)
            summary = [_heads(x)[None] for x in (grad_out[b, :G], q[:G], k, v, out[b, :G])]
            dq, *d_kv = _attend_backward(*summary, lse_summary[b], 0.0, False, attn_mask=mask, scale=scale)
            d_qkv[b, :G, 0] = _heads(dq)[0]
            frames = (_frames(grad_out[b], layout), _frames(q, layout), _keys(k, layout), _keys(v, layout))
            frames = [_heads(x) for x in (*frames, _frames(out[b], layout))]
            dq, *d_keys = _attend_backward(*frames, lse_frames[b], 0.0, False, scale=scale)
            _frames(d_qkv[b, :, 0], layout).copy_(_heads(dq))
            for part, from_summary, from_frames in zip((1, 2), d_kv, d_keys, strict=True):
                to, from_summary, from_frames = d_qkv[b, :, part], _heads(from_summary)[0], _heads(from_frames)
                torch.add(_frames(from_summary, layout), from_frames[:, :N], out=_frames(to, layout))
                # Every frame adds to the gradient of the shared keys and values: in fp32 at least, as the kernels do.
                shared = from_frames[:, N:].sum(0, dtype=lse_frames.dtype)
                to[:first] = from_summary[:first]
                to[first:G] = shared.add_(from_summary[first:G])
        return d_qkv, None, None
