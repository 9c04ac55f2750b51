"""One configuration of one attention, and how to run the library's host functions for it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PASSES = {"fwd": 4, "bwd": 7}  # units that must move: q, k, v in and the output out; q, k, v, dO in and dq, dk, dv out
PRODUCTS = {"fwd": 2, "bwd": 5}  # D multiply-adds a needed score: S and O; S, dP, dQ, dK and dV


SHAPES = {  # T, N, H of the towers that are reported, U-V-r 3-4-2
    "B/32 T=12": {"T": 12, "N": 49, "H": 12},
    "B/16 T=12": {"T": 12, "N": 196, "H": 12},
    "L/14 T=12": {"T": 12, "N": 256, "H": 16},
    "B/32 T=32": {"T": 32, "N": 49, "H": 12},
    "B/16 T=32": {"T": 32, "N": 196, "H": 12},
}


@dataclass(frozen=True)
class Case:
    """An attention ("tube" or "hierarchical") at a shape, for an architecture (80, 90) whose tiles are taken, by a backend
    ("triton" or "cuda")."""

    op: str
    arch: int
    T: int
    N: int
    B: int = 32
    H: int = 12
    D: int = 64
    dtype: str = "bfloat16"
    U: int = 3
    V: int = 4
    r: int = 2
    backend: str = "triton"
    tf32: bool = False  # whether torch multiplies float32 so

    @property
    def layout(self):
        from vidla_kernels import TokenLayout

        return TokenLayout(self.T, self.N, self.U, self.V, self.r)

    @property
    def tokens(self) -> int:
        return self.layout.num_patches if self.op == "tube" else self.layout.seq_len

    @property
    def needed(self) -> int:
        """Scores of one (batch, head) that somebody sees."""
        return self.N * self.T * self.T if self.op == "tube" else self.layout.visible_pairs

    def floor_bytes(self, direction: str, heads: int | None = None) -> int:
        """Bytes that a pass must move, for `heads` (batch, head) pairs: by default all."""
        size = 4 if self.dtype == "float32" else 2
        return PASSES[direction] * (self.B * self.H if heads is None else heads) * self.tokens * self.D * size

    def needed_macs(self, direction: str, heads: int | None = None) -> int:
        return PRODUCTS[direction] * self.D * self.needed * (self.B * self.H if heads is None else heads)

    def host_calls(self, device: str, dtype: str | None = None) -> list[tuple[str, Callable[[], object]]]:
        """("fwd", call) and ("bwd", call) of the Triton backend's own host functions.

        The backward is to be called after the forward, whose result it takes. On a CPU all batch rows of qkv are one, and
        of everything else only what is touched takes memory.
        """
        import importlib

        import torch

        module = importlib.import_module(f"vidla_kernels.triton_{self.op}")
        of_backward = (
            importlib.import_module("vidla_kernels.triton_hierarchical_backward") if self.op == "hierarchical" else module
        )
        kind, scale, layout = getattr(torch, dtype or self.dtype), self.D**-0.5, self.layout
        batch = 1 if device == "cpu" else self.B
        qkv = torch.zeros(batch, self.tokens, 3, self.H, self.D, dtype=kind, device=device).expand(self.B, -1, -1, -1, -1)
        grad = torch.zeros(self.B, self.tokens, self.H, self.D, dtype=kind, device=device)
        saved: list = []

        def forward() -> None:
            result = module.forward(qkv, layout, scale)
            saved[:] = result if isinstance(result, tuple) else (result,)

        def backward() -> None:
            of_backward.backward(grad, qkv, *(saved if self.op == "hierarchical" else ()), layout, scale)

        return [("fwd", forward), ("bwd", backward)]


def in_other_process(module: str, cases: Sequence[Case], interpret: bool, **options: object) -> list[dict]:
    """Rows that `python -m module` makes of cases: a process either interprets Triton's kernels or compiles them.

    Raises:
        RuntimeError: the process failed; with what it wrote on stderr.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps({"cases": [dataclasses.asdict(case) for case in cases], **options}),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"python -m {module} failed:\n{done.stderr}")
    return json.loads(done.stdout)
