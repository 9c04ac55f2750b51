"""Equation 3 of the paper: the contrastive loss of videos with their subtitles and captions, over all ranks.

    L = 1/|S| sum_{i in S} L_vs^i  +  1/|C| sum_{i in C} L_vc^i
    L_vt^i = -log( exp(v_i.t_i / tau) / sum_j exp(v_i.t_j / tau) )      video to text
             -log( exp(t_i.v_i / tau) / sum_j exp(t_i.v_j / tau) )      text to video,  t in {s, c}

S and C are the clips of the global batch that have a subtitle, a caption. Both sums over j run over the clips that have
that text, less the other clips of clip i's source video, which overlap with it (docs/decisions.md, 8 and 11).

Memory: a B x B matrix never exists. Loss and gradients of a chunk of anchors are computed together, in the forward, and
added up; what is kept for the backward is one gradient of the features' own size. Each rank takes its own clips as
anchors against everybody's features. Its gradients for other ranks' features go home by one reduce-scatter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from .distributed import all_gather_cat, all_gather_rows, all_reduce_sum, group_place, reduce_scatter_rows

VIDEO, CAPTION, SUBTITLE = 0, 1, 2  # place in the (B, 3, E) features and the (B, 3) flags
BLOCK = 2**24  # logits in a chunk by default: 64 MB in float32, of which about three are alive at once


def contrastive_loss(
    video: Tensor,
    caption: Tensor,
    subtitle: Tensor,
    logit_scale: Tensor | float,
    *,
    has_caption: Tensor | None = None,
    has_subtitle: Tensor | None = None,
    source: Tensor | None = None,
    chunk: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Equation 3: a sum of four cross entropies, each the mean over the clips that have the text.

    A clip without a text is in neither direction of that text's terms: not an anchor, not a negative, and neither is its
    video there. Its features of that text may hold anything, even NaN. A term that no clip has is 0 with zero gradients.

    Args:
        video, caption, subtitle: (B, E) floating-point features, not yet normalised.
        logit_scale: 1 / tau, the multiplier itself (exp applied): a tensor of one element, or a float.
        has_caption, has_subtitle: (B,) bool; None: every clip has the text.
        source: (B,) int64 ids. Two clips of one source (>= 0) are not each other's negatives. None: all differ.
        chunk: anchors handled at a time. Changes speed and memory, not the result. None: as many as keep a chunk's
            logits, anchors x global batch, within 2**24.
        group: the ranks that form the global batch; None is the default process group, or this process alone where none
            is initialised. Every rank passes the same B and must call this.

    Returns:
        The loss over the global batch, a scalar, equal on all ranks; computed in float32 (float64 for float64 features)
        also under autocast. The features' gradients are multiplied by the number of ranks, and logit_scale's is the
        whole one on every rank, so that the *average* over ranks that DDP takes is the gradient of the whole batch.

    Raises:
        ValueError: a wrong shape or dtype, chunk < 1, or ranks with different B, E or dtype (on every rank alike).
    """
    b, dim = _check(video, caption, subtitle, has_caption, has_subtitle, source, chunk)
    device, dtype = video.device, torch.promote_types(video.dtype, torch.float32)
    scale = torch.as_tensor(logit_scale, dtype=dtype, device=device)
    if scale.numel() != 1:
        raise ValueError(f"logit_scale has shape {tuple(scale.shape)}: expected one element")

    everyone = torch.ones(b, dtype=torch.bool, device=device)
    has = [everyone, everyone if has_caption is None else has_caption, everyone if has_subtitle is None else has_subtitle]
    has = torch.stack(has, dim=1)
    if source is None:
        source = torch.full((b,), -1, device=device)
    with torch.autocast(device.type, enabled=False):
        features = torch.stack([x.to(dtype) for x in (video, caption, subtitle)], dim=1)  # (B, 3, E)
        features = features.masked_fill(~has[:, :, None], 0)  # what a missing text holds must not matter
        features = F.normalize(features, dim=-1)
        _check_ranks(b, dim, dtype, device, group)
        return _Equation3.apply(features, scale.reshape(()), has, source, chunk, group, torch.is_grad_enabled())


class _Equation3(torch.autograd.Function):
    """(b, 3, E) unit features of this rank, scale, (b, 3) flags, (b,) sources -> loss. b: own clips, B: all clips."""

    @staticmethod
    def forward(ctx, own, scale, has_own, source_own, chunk, group, grad_enabled) -> Tensor:
        rank, ranks = group_place(group)
        b = own.shape[0]
        all_, has, source = all_gather_rows(own, has_own, source_own, group=group)  # (B, 3, E), (B, 3), (B,)
        weight = has / has.sum(0).clamp(min=1).to(own.dtype)  # of an anchor in its term's mean; 0 without the text
        chunk = chunk or max(1, BLOCK // has.shape[0])

        want_grad = grad_enabled and any(ctx.needs_input_grad)  # the latter is also True under no_grad
        loss, d_scale = own.new_zeros(()), own.new_zeros(())
        d_all = torch.zeros_like(all_) if want_grad else None
        for start in range(rank * b, (rank + 1) * b, chunk):  # anchors i, as rows of the global batch
            i = slice(start, min(start + chunk, (rank + 1) * b))
            other = (source[i, None] != source) | (source[i, None] < 0)  # (c, B), different source videos
            for text in (SUBTITLE, CAPTION):
                in_sum = other & has[:, text]
                in_sum.diagonal(start).fill_(True)  # an anchor's own pair; this also keeps log-sum-exp finite
                for anchor, target in ((VIDEO, text), (text, VIDEO)):
                    logits = (scale * all_[i, anchor]) @ all_[:, target].T  # (c, B)
                    logits.masked_fill_(~in_sum, -torch.inf)
                    lse = logits.logsumexp(dim=1)
                    loss += weight[i, text] @ (lse - logits.diagonal(start))
                    if want_grad:
                        d_logits = logits.sub_(lse[:, None]).exp_()  # softmax
                        d_logits.diagonal(start).sub_(1)
                        d_logits *= weight[i, text, None]
                        d_anchor = d_logits @ all_[:, target]
                        d_scale += (d_anchor * all_[i, anchor]).sum()
                        d_all[i, anchor] += scale * d_anchor
                        d_all[:, target] += d_logits.T @ (scale * all_[i, anchor])

        loss, d_scale = all_reduce_sum(torch.stack([loss, d_scale]), group).unbind()
        if want_grad:
            # Times the number of ranks: DDP divides by it. logit_scale's gradient is already the same on every rank.
            ctx.save_for_backward(reduce_scatter_rows(d_all, group).mul_(ranks), d_scale)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):
        d_own, d_scale = ctx.saved_tensors
        return d_loss * d_own, d_loss * d_scale, None, None, None, None, None


def _check(video, caption, subtitle, has_caption, has_subtitle, source, chunk) -> tuple[int, int]:
    """(B, E), or ValueError."""
    if video.ndim != 2 or 0 in video.shape:
        raise ValueError(f"video features have shape {tuple(video.shape)}: expected (B, E), both at least 1")
    if not video.is_floating_point():
        raise ValueError(f"video features are {video.dtype}: expected a floating-point dtype")
    b = video.shape[0]
    for name, x in (("caption", caption), ("subtitle", subtitle)):
        if x.shape != video.shape or not x.is_floating_point():
            raise ValueError(
                f"{name} features are {tuple(x.shape)} {x.dtype}: expected floating point of the video features' shape, "
                f"{tuple(video.shape)}. For clips without a {name} pass any rows and has_{name}=False"
            )
    for name, x, dtype in (
        ("has_caption", has_caption, torch.bool),
        ("has_subtitle", has_subtitle, torch.bool),
        ("source", source, torch.int64),
    ):
        if x is not None and (x.shape != (b,) or x.dtype != dtype):
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}: expected ({b},) {dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: expected at least 1, or None for the default")
    return b, video.shape[1]


def _check_ranks(b: int, dim: int, dtype: torch.dtype, device: torch.device, group: ProcessGroup | None) -> None:
    """ValueError on every rank if they disagree; a gather of unequal sizes would hang or mix up rows instead."""
    if group_place(group)[1] == 1:
        return
    mine = torch.tensor([[b, dim, dtype.itemsize]], device=device)
    given = all_gather_cat(mine, group).tolist()
    if any(row != given[0] for row in given):
        raise ValueError(f"ranks disagree on (B, E, bytes per element): {given}, in rank order; every rank needs the same")
