"""Attention kernels of VidLA: tube attention and hierarchical attention, forward and backward, without a dense mask.

>>> from vidla_kernels import TokenLayout, hierarchical_attention
>>> layout = TokenLayout(frames=12, patches=196)
>>> out = hierarchical_attention(qkv, layout)  # (B, layout.seq_len, 3, H, D) -> (B, layout.seq_len, H, D)
"""

from .backends import available_backends
from .layout import TokenLayout
from .ops import hierarchical_attention, tube_attention

__all__ = ["TokenLayout", "available_backends", "hierarchical_attention", "tube_attention"]
