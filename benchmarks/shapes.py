"""The shapes that are measured: the paper's pretraining and finetuning layouts, sized for the machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidla_kernels import TokenLayout


@dataclass(frozen=True)
class Shape:
    """One benchmark row: a tower's layout with batch B, heads H, head dimension D and dtype."""

    name: str
    layout: TokenLayout
    B: int
    H: int
    dtype: torch.dtype
    D: int = 64

    def __str__(self) -> str:
        return f"{self.name} B={self.B} H={self.H} D={self.D} {str(self.dtype)[6:]}"

    def tokens(self, op: str) -> int:
        return self.layout.num_patches if op == "tube" else self.layout.seq_len

    def draw(self, op: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """qkv (B, tokens, 3, H, D) with a gradient to come, and the gradient of the output."""
        tokens = self.tokens(op)
        qkv = torch.randn(self.B, tokens, 3, self.H, self.D, device=device, dtype=self.dtype)
        return qkv.requires_grad_(), torch.randn(self.B, tokens, self.H, self.D, device=device, dtype=self.dtype)


def shapes(device: torch.device) -> list[Shape]:
    """U-V-r 3-4-2 at T=12 everywhere, and T=32 on a GPU. On a CPU a few clips in float32, on a GPU 32 in bfloat16."""
    gpu, dtype = device.type == "cuda", torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [("B/32 T=12", 12, 49, 12, 4), ("B/16 T=12", 12, 196, 12, 1), ("L/14 T=12", 12, 256, 16, 1)]
    if gpu:
        rows += [("B/32 T=32", 32, 49, 12, 0), ("B/16 T=32", 32, 196, 12, 0)]
    return [Shape(name, TokenLayout(T, N), 32 if gpu else B, H, dtype) for name, T, N, H, B in rows]
