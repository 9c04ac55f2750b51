"""What else a user could call: every way to compute the two attentions, ours and others', under one signature.

Each takes qkv (B, tokens, 3, H, D) and returns (B, tokens, H, D); the rule of who sees whom comes from TokenLayout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vidla_kernels import TokenLayout, available_backends, hierarchical_attention, portable, tube_attention

OURS = {"tube": tube_attention, "hierarchical": hierarchical_attention}
Attention = Callable[[torch.Tensor, TokenLayout], torch.Tensor]


def implementations(op: str, device: torch.device) -> dict[str, Attention]:
    """Name -> function. The reference comes first: the others are compared with it."""
    names = ["reference", *(name for name in available_backends(device) if name != "reference")]
    rows = {name: lambda qkv, layout, name=name: OURS[op](qkv, layout, backend=name) for name in names}
    rows["FlexAttention"] = lambda qkv, layout: flex(op, qkv, layout)
    if device.type == "cuda":  # on a CPU each costs a minute of compiling
        rows["compiled portable"] = lambda qkv, layout: _compiled_portable(op)(qkv, layout, qkv.shape[-1] ** -0.5)
    return rows


def cannot(name: str, passes: str, device: torch.device) -> str | None:
    """Why an implementation has no such row; None where it has."""
    if name == "FlexAttention" and device.type == "cpu" and passes != "fwd":
        return "FlexAttention has no backward on a CPU"
    return None


def flex(op: str, qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """torch's block-sparse attention, compiled, with its block mask made once for each layout."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = _compiled_flex()(q, k, v, block_mask=_block_mask(op, layout, qkv.device), scale=qkv.shape[-1] ** -0.5)
    return out.transpose(1, 2)


@cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(op: str, layout: TokenLayout, device: torch.device):
    visible, tokens = (layout.tube_visible, layout.num_patches) if op == "tube" else (layout.visible, layout.seq_len)
    return create_block_mask(lambda b, h, q, k: visible(q, k), None, None, tokens, tokens, device=device)


@cache
def _compiled_portable(op: str) -> Callable:
    return torch.compile(getattr(portable, op), dynamic=False)
