"""The oracle: torch's own attention with the dense mask. Every test and benchmark compares against this file.

Any device, any floating dtype, float64 for truth. It builds the (S, S) mask and scores, so it is slow by design.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .layout import TokenLayout


def masked_attention(qkv: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled dot-product attention under a dense mask. qkv (B, S, 3, H, D), mask (S, S) True = visible -> (B, S, H, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # three of (B, H, S, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).contiguous()


def tube(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> torch.Tensor:
    """Tube attention, paper equation 1 without norm, projections and residual. (B, T*N, 3, H, D) -> (B, T*N, H, D)."""
    return masked_attention(qkv, layout.tube_mask(qkv.device), scale)


def hierarchical(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> torch.Tensor:
    """Hierarchical attention, paper equation 2 without norm, projections and MLP. (B, S, 3, H, D) -> (B, S, H, D)."""
    return masked_attention(qkv, layout.mask(qkv.device), scale)
