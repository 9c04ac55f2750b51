"""The shapes that are measured: the paper's pretraining and finetuning layouts, sized for the machine, and what grows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidla_kernels import TokenLayout

PASSES = {"fwd": "forward", "fwd+bwd": "forward and backward"}
OPS = ("tube", "hierarchical")
PATCHES = {"B/32": 49, "B/16": 196, "L/14": 256}  # N at 224 pixels
HEADS = {"B/32": 12, "B/16": 12, "L/14": 16}


@dataclass(frozen=True)
class Shape:
    """A tower's layout with batch B, heads H, head dimension D and dtype."""

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

    def unit_bytes(self, op: str) -> int:
        """Bytes of one of q, k, v or the output: the unit in which floors are counted."""
        return self.B * self.tokens(op) * self.H * self.D * torch.finfo(self.dtype).bits // 8

    def draw(self, op: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """qkv (B, tokens, 3, H, D) with a gradient to come, and the gradient of the output."""
        tokens = self.tokens(op)
        qkv = torch.randn(self.B, tokens, 3, self.H, self.D, device=device, dtype=self.dtype)
        return qkv.requires_grad_(), torch.randn(self.B, tokens, self.H, self.D, device=device, dtype=self.dtype)

    def to_json(self) -> dict:
        lay = self.layout
        numbers = {"T": lay.frames, "N": lay.patches, "U": lay.levels, "V": lay.tokens_per_level, "r": lay.temporal_scale}
        return {"name": self.name, "B": self.B, "H": self.H, "D": self.D, "dtype": str(self.dtype)[6:], **numbers}


@dataclass(frozen=True)
class Sweep:
    """One table of results: every implementation of `op` on the same tensors."""

    group: str  # "attention", "growth with T" or "growth with B"
    op: str  # "tube" or "hierarchical"
    shape: Shape
    passes: str  # "fwd" or "fwd+bwd"

    def __str__(self) -> str:
        return f"{self.op} attention, {PASSES[self.passes]}: {self.shape}"


def shape(tower: str, T: int, B: int, device: torch.device) -> Shape:
    """U-V-r 3-4-2 with the tower's patches and heads: bfloat16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Shape(f"{tower} T={T}", TokenLayout(T, PATCHES[tower]), B, HEADS[tower], dtype)


def sweeps(device: torch.device, toy: bool = False) -> list[Sweep]:
    """What `pytest benchmarks/` measures of the two attentions, the most asked-for first.

    Args:
        device: a GPU gets 32 clips at T=12 and T=32; a CPU a few clips at T=12.
        toy: one tiny shape and two points of growth, to try the harness itself.
    """
    if toy:
        tiny = [Shape(f"toy T={T}", TokenLayout(T, 5, 2, 2), B, 2, torch.float32, 32) for T, B in ((4, 2), (8, 2), (4, 4))]
        rows = [Sweep("attention", op, tiny[0], passes) for op in OPS for passes in PASSES]
        rows += [Sweep("growth with T", op, s, "fwd+bwd") for op in OPS for s in tiny[:2]]
        return rows + [Sweep("growth with B", op, s, "fwd+bwd") for op in OPS for s in (tiny[0], tiny[2])]
    if device.type == "cuda":
        main = [("B/16", 12, 32), ("B/32", 12, 32), ("L/14", 12, 32), ("B/16", 32, 32), ("B/32", 32, 32), ("L/14", 32, 32)]
        over_T = [("B/16", T, 8) for T in (8, 16, 32, 64, 128)]
        over_B = [("B/32", 12, B) for B in (1, 4, 16, 64, 256)]
    else:
        main = [("B/16", 12, 1), ("B/32", 12, 4), ("L/14", 12, 1)]
        over_T = [("B/32", T, 1) for T in (8, 32, 128)]
        over_B = [("B/32", 12, B) for B in (1, 2, 8)]
    rows = [Sweep("attention", op, shape(*row, device), passes) for row in main for op in OPS for passes in PASSES]
    rows += [Sweep("growth with T", op, shape(*row, device), "fwd+bwd") for op in OPS for row in over_T]
    return rows + [Sweep("growth with B", op, shape(*row, device), "fwd+bwd") for op in OPS for row in over_B]
