"""The pieces CLIP's two towers share: norm, activation, attention projections, residual block, stack of blocks.

Parameter names and shapes are CLIP's (`resblocks.0.attn.in_proj_weight`, `mlp.c_fc.weight`, ...), so that its checkpoints
load without renaming. Attention itself is not here: a tower gives `Attention` its own rule of who sees whom.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class LayerNorm(nn.LayerNorm):
    """Layer norm that returns its input's dtype; under autocast torch computes it, and would return it, in fp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation OpenAI's weights were trained with (docs/decisions.md, 6)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """The projections of multi-head attention: one packed input projection, one output projection.

    Args:
        width: d, the tokens' width.
        heads: H; d must be a multiple of it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def qkv(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, d) -> (B, S, 3, H, D), packed as the attention ops take it."""
        return F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, d) -> (B, S, H, D), the queries alone."""
        width = x.shape[-1]
        return F.linear(x, self.in_proj_weight[:width], self.in_proj_bias[:width]).unflatten(-1, (self.heads, -1))

    def key_value(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, d) -> (B, S, 2, H, D), keys and values without queries."""
        width = x.shape[-1]
        return F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:]).unflatten(-1, (2, self.heads, -1))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """The output projection: heads' outputs (B, S, H, D) -> (B, S, d)."""
        return self.out_proj(x.flatten(-2))


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool = False) -> torch.Tensor:
    """Attention without a mask, or with the causal one. q (B, Q, H, D), k and v (B, K, H, D) -> (B, Q, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)


class Block(nn.Module):
    """What every CLIP block holds: ln_1, attn, ln_2, mlp. Subclasses say who sees whom.

    Args:
        width: d.
        heads: H.
        mlp_ratio: hidden width of the MLP over d.
        quick_gelu: QuickGELU instead of GELU in the MLP.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, quick_gelu: bool) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, hidden),
                gelu=QuickGELU() if quick_gelu else nn.GELU(),
                c_proj=nn.Linear(hidden, width),
            )
        )


class Transformer(nn.Module):
    """A stack of blocks, drawn as CLIP draws its text tower; its blocks are `resblocks`, as in CLIP's checkpoints.

    Args:
        width: d, for the initial weights' spread.
        blocks: the blocks, first to last.
        checkpoint_activations: keep only each block's input for the backward and compute the rest again.
    """

    def __init__(self, width: int, blocks: Iterable[Block], checkpoint_activations: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)
        self.checkpoint_activations = checkpoint_activations
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * len(self.resblocks)) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * len(self.resblocks)) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def refuse_unknown(cfg: dict, implemented: set[str], neutral: dict[str, object], tower: str) -> None:
    """Refuse an open_clip tower config that asks for something this tower does not do.

    Args:
        cfg: `vision_cfg` or `text_cfg` in open_clip's JSON format.
        implemented: keys the tower reads.
        neutral: values of further keys that ask for nothing; a key absent here must be None, False or 0.
        tower: its name, for the message.

    Raises:
        ValueError: naming every such key and its value.
    """
    bad = {
        key: value
        for key, value in cfg.items()
        if key not in implemented and (value != neutral[key] if key in neutral else bool(value))
    }
    if bad:
        asked = ", ".join(f"{key}={value!r}" for key, value in bad.items())
        raise ValueError(
            f"the {tower} asks for {asked}, which VidLA's {tower} does not have; it reads {', '.join(sorted(implemented))}. "
            "Choose one of open_clip's plain CLIP models, such as ViT-B-32, ViT-B-16 or ViT-L-14"
        )
