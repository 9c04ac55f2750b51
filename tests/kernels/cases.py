"""Shapes and inputs of the kernel tests, and the run that all of them compare."""

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vidla_kernels import TokenLayout, hierarchical_attention, tube_attention
from vidla_kernels.tiles import DTYPES, HEAD_DIMS

OPS = {"tube": tube_attention, "hierarchical": hierarchical_attention}


@dataclass(frozen=True)
class Case:
    """One call: layout, batch, heads, head dimension, dtype, and how its input lies in memory."""

    layout: TokenLayout
    batch: int = 1
    heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0
    growth: float = 0.0  # added to the last token's keys, to earlier ones' in proportion; queries are then near 3
    sliced: bool = False

    def __str__(self) -> str:
        lay = self.layout
        name = f"T{lay.frames}-N{lay.patches}-{lay.levels}.{lay.tokens_per_level}.{lay.temporal_scale}-D{self.head_dim}"
        name += f"-B{self.batch}-{str(self.dtype)[6:]}"
        return (
            name
            + "-cls" * lay.patches_see_cls
            + f"-x{self.magnitude:g}" * (self.magnitude != 1)
            + "-growing" * (self.growth != 0)
            + "-sliced" * self.sliced
        )

    def draw(self, op: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Random qkv and gradient of the output; a sliced case lies inside a larger tensor full of NaN."""
        tokens = self.layout.num_patches if op == "tube" else self.layout.seq_len
        shape = (self.batch, tokens, 3, self.heads, self.head_dim)
        qkv = torch.randn(shape, device=device) * self.magnitude
        if self.growth:
            qkv[:, :, 0] += 3
            qkv[:, :, 1] += self.growth * torch.linspace(0, 1, tokens, device=device)[:, None, None]
        qkv = qkv.to(self.dtype)
        grad = torch.randn(self.batch, tokens, self.heads, self.head_dim, device=device).to(self.dtype)
        if self.sliced:
            room = torch.full((self.batch, tokens + 5, 4, self.heads + 1, self.head_dim + 16), float("nan"), device=device)
            view = room.to(self.dtype)[:, 2:-3, :3, 1:, 8:-8]
            qkv = view.copy_(qkv)
        return qkv, grad


class Parts(NamedTuple):
    """Output and gradients of one run; `named` splits them so that a large part cannot hide a bad one."""

    out: torch.Tensor
    d_qkv: torch.Tensor

    def named(self, summary: int) -> dict[str, torch.Tensor]:
        rows = {"patches": slice(summary, None)} | ({"summary": slice(0, summary)} if summary else {})
        whole = {"out": self.out} | {f"d{n}": self.d_qkv[:, :, i] for i, n in enumerate("qkv")}
        return {f"{name} of {kind}": part[:, at] for name, part in whole.items() for kind, at in rows.items()}


def run(op: str, qkv: torch.Tensor, grad: torch.Tensor, layout: TokenLayout, backend: str) -> Parts:
    leaf = qkv.detach().requires_grad_()  # keeps the strides of a slice
    out = OPS[op](leaf, layout, backend=backend)
    (d_qkv,) = torch.autograd.grad(out, leaf, grad)
    return Parts(out.detach(), d_qkv)


def dense_runs(op: str, qkv: torch.Tensor, grad: torch.Tensor, layout: TokenLayout, orders: int = 4) -> list[Parts]:
    """The reference in the input's dtype under several orders of the head dimension, which it must not depend on.

    One run's error is a draw of luck where a few near-ties decide it (large fp32 scores): the worst of several
    orders of the same sums is what torch's own attention errs by.
    """
    runs = []
    for _ in range(orders):
        order = torch.randperm(qkv.shape[-1], device=qkv.device)
        out, d_qkv = run(op, qkv[..., order], grad[..., order], layout, "reference")
        back = order.argsort()
        runs.append(Parts(out[..., back], d_qkv[..., back]))
    return runs


def random_layout(rng: random.Random, most_tokens: int = 160) -> TokenLayout:
    while True:
        layout = TokenLayout(
            frames=rng.choice((1, 2, 3, 4, 5, 7, 8, 12, 16)),
            patches=rng.choice((1, 2, 3, 5, 9, 16, 17, 33)),
            levels=rng.randrange(5),
            tokens_per_level=rng.choice((1, 2, 4, 5, 9)),
            temporal_scale=rng.randrange(1, 5),
            patches_see_cls=rng.random() < 0.3,
        )
        if layout.seq_len <= most_tokens:
            return layout


def random_case(rng: random.Random) -> Case:
    return Case(
        random_layout(rng),
        batch=rng.choice((1, 2, 3)),
        heads=rng.choice((1, 2, 3)),
        head_dim=rng.choice(HEAD_DIMS),
        dtype=rng.choice(DTYPES),
        magnitude=rng.choice((0.1, 1.0, 1.0, 4.0)),
        sliced=rng.random() < 0.3,
    )


def _layout(T: int, N: int, U: int = 3, V: int = 4, r: int = 2, cls: bool = False) -> TokenLayout:
    return TokenLayout(T, N, U, V, r, cls)


# Every head dimension in every dtype, on a layout whose tiles are all ragged.
CASES = [Case(_layout(3, 21), head_dim=D, dtype=dtype) for D in HEAD_DIMS for dtype in DTYPES]
# Frames: one, few, many.
CASES += [Case(_layout(T, 5), heads=1, dtype=torch.float16) for T in (1, 2, 12, 16, 32)]
CASES += [Case(_layout(T, 2), heads=1, head_dim=32) for T in (17, 128)]
# Patches: one, B/32's 49, B/16's 196, L/14's 256 and one more.
CASES += [Case(_layout(2, N), heads=1, dtype=torch.bfloat16) for N in (1, 49, 196, 256, 257)]
CASES += [Case(_layout(1, 64), heads=1), Case(_layout(2, 65), heads=1, head_dim=128, dtype=torch.bfloat16)]
# Hierarchies: none, CLIP's, one level, steep, many summary tokens, patches that see CLS.
CASES += [
    Case(_layout(1, 16, U=0, cls=True), batch=2),
    Case(_layout(4, 9, U=0)),
    Case(_layout(5, 9, U=1, r=1)),
    Case(_layout(4, 4, U=2, V=1)),
    Case(_layout(7, 10, U=5, V=16, r=1), dtype=torch.bfloat16, heads=1),
    Case(_layout(9, 6, U=40, V=1, r=3), heads=1),
    Case(_layout(6, 20, U=4, V=3, r=3, cls=True), dtype=torch.float16),
]
# Magnitudes at which softmax is nearly one-hot (beyond: test_one_hot), and inputs that lie inside a larger tensor.
CASES += [Case(_layout(4, 19), dtype=dtype, magnitude=5.0) for dtype in DTYPES]
# Maxima that grow from tile to tile, and that outgrow the exponents of fp16 and of fp32.
CASES += [Case(_layout(2, 150), heads=1, dtype=torch.bfloat16, magnitude=4.0)]
CASES += [Case(_layout(1, 150), heads=1, dtype=dtype, growth=growth) for dtype in DTYPES for growth in (1.5, 8.0)]
CASES += [
    Case(_layout(3, 18, U=2), batch=2, head_dim=D, dtype=dtype, sliced=True)
    for D, dtype in zip((80, 64, 32), DTYPES, strict=True)
]

# Tube attention cuts its work by T: tubes that fill a tile, exceed one, exceed every tile, for each kind of dtype.
TUBE_CASES = [Case(_layout(T, 2), heads=1, head_dim=32) for T in (33, 64, 65, 100)]
TUBE_CASES += [
    Case(_layout(T, 3), heads=1, head_dim=D, dtype=dtype)
    for T, D, dtype in ((33, 64, torch.float16), (65, 64, torch.bfloat16), (65, 128, torch.float16), (129, 80, torch.bfloat16))
]

# For a GPU: the pretraining and finetuning shapes, whole.
PRETRAINING = [
    Case(_layout(T, N), batch=2, heads=H, dtype=dtype)
    for (T, N, H) in ((12, 49, 12), (12, 196, 12), (32, 49, 12), (32, 196, 12), (12, 256, 16), (16, 196, 12))
    for dtype in (torch.bfloat16, torch.float16)
]
