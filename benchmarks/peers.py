"""What else a user could call: every way to compute the two attentions, ours and others', under one signature.

Each takes qkv (B, tokens, 3, H, D) as one packed Linear gives it and returns (B, tokens, H, D); permutes and copies that a
way needs are its own cost, and its gradient goes down to qkv. Masks and index tables depend on the layout alone and are
made once, outside the time, as a user would. Who sees whom comes from TokenLayout.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vidla_kernels import TokenLayout, available_backends, hierarchical_attention, portable, reference, tube_attention
from vidla_kernels.backends import Case, choose, refuses

from .shapes import Sweep

OURS = {"tube": tube_attention, "hierarchical": hierarchical_attention}
DENSE_TOKENS = 8300  # above, dense attention and its mask take minutes and gigabytes
Attention = Callable[[torch.Tensor, TokenLayout], torch.Tensor]


@dataclass(frozen=True)
class Implementation:
    """One row of a table."""

    name: str
    run: Attention | None  # None where it cannot be called here
    ours: bool = False
    absent: str | None = None  # why it is not measured in this sweep


def implementations(sweep: Sweep, device: torch.device, toy: bool = False) -> list[Implementation]:
    """Every implementation of a sweep's op, ours first; each that is not measured has its reason."""
    op = sweep.op
    case = Case(device, sweep.shape.dtype, sweep.shape.D, sweep.shape.layout, op)
    auto = choose("auto", case)
    rows = []
    for name in available_backends(device):
        if name == "reference" or (device.type == "cpu" and name != "portable"):
            continue  # the oracle is not raced (it builds its mask in every call), nor is what is interpreted
        run = partial(_ours, op=op, backend=name)
        rows.append(Implementation(f"{name} (auto)" if name == auto else name, run, ours=True, absent=refuses(name, case)))
    run = partial(_compiled_portable, op=op)
    rows.append(Implementation("portable, compiled", run, ours=True, absent=_unrolled(sweep, device, toy)))
    for name, (run, why) in PEERS[op].items():
        rows.append(Implementation(name, run, absent=why(sweep, device, toy)))
    return rows


def oracle(op: str) -> Attention:
    """What every implementation must agree with."""
    return partial(_ours, op=op, backend="reference")


def _ours(qkv: torch.Tensor, layout: TokenLayout, *, op: str, backend: str) -> torch.Tensor:
    return OURS[op](qkv, layout, backend=backend)


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _compiled_portable(qkv: torch.Tensor, layout: TokenLayout, *, op: str) -> torch.Tensor:
    return compiled(getattr(portable, op))(qkv, layout, qkv.shape[-1] ** -0.5)


# Dense attention, and torch's block-sparse attention.


@cache
def _mask(op: str, layout: TokenLayout, device: torch.device) -> torch.Tensor:
    return layout.tube_mask(device) if op == "tube" else layout.mask(device)


def dense(qkv: torch.Tensor, layout: TokenLayout, *, op: str) -> torch.Tensor:
    """SDPA under the dense mask."""
    return reference.masked_attention(qkv, _mask(op, layout, qkv.device), qkv.shape[-1] ** -0.5)


def flex(qkv: torch.Tensor, layout: TokenLayout, *, op: str, block: int) -> torch.Tensor:
    """FlexAttention, compiled, its mask in blocks of `block` x `block`. At 64 its tiles may not exceed the blocks."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    tiles = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
    options = dict.fromkeys(tiles, 64) if block == 64 and qkv.device.type == "cuda" else None
    mask = _block_mask(op, layout, qkv.device, block)
    return compiled(flex_attention)(q, k, v, block_mask=mask, kernel_options=options).transpose(1, 2)


@cache
def _block_mask(op: str, layout: TokenLayout, device: torch.device, block: int):
    visible, tokens = (layout.tube_visible, layout.num_patches) if op == "tube" else (layout.visible, layout.seq_len)
    return create_block_mask(lambda b, h, q, k: visible(q, k), None, None, tokens, tokens, device=device, BLOCK_SIZE=block)


# Hierarchical attention, a frame at a time.


@cache
def _summary_mask(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    position = torch.arange(layout.seq_len, device=device)
    return layout.visible(position[: layout.num_summary, None], position[None])  # (G, S)


def per_frame(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Summary rows under their (G, S) mask; all frames in one call, with the MST keys and values repeated beside each."""
    return _per_frame(qkv, _summary_mask(layout, qkv.device), *_sizes(layout))


def per_frame_of(layout: TokenLayout, device: torch.device) -> Attention:
    """`per_frame` with its mask at hand, for use inside a larger graph that is compiled."""
    mask, sizes = _summary_mask(layout, device), _sizes(layout)
    return lambda qkv, layout: _per_frame(qkv, mask, *sizes)


def per_frame_compiled(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    return compiled(_per_frame)(qkv, _summary_mask(layout, qkv.device), *_sizes(layout))


def per_frame_cudnn(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    return _per_frame(qkv, _summary_mask(layout, qkv.device), *_sizes(layout), frames_by=SDPBackend.CUDNN_ATTENTION)


def _sizes(layout: TokenLayout) -> tuple[int, int, int, int]:
    return layout.frames, layout.patches, layout.num_summary, layout.first_key_of_patches


def _per_frame(qkv, mask, T: int, N: int, G: int, first: int, frames_by: SDPBackend | None = None) -> torch.Tensor:
    B, _, _, H, D = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    summary = F.scaled_dot_product_attention(q[:, :, :G], k, v, attn_mask=mask)  # (B, H, G, D)
    frames = qkv[:, G:].view(B, T, N, 3, H, D)
    mst = qkv[:, None, first:G, 1:].expand(B, T, G - first, 2, H, D)
    kv = torch.cat([mst, frames[:, :, :, 1:]], 2).flatten(0, 1)  # (B*T, UV+N, 2, H, D)
    q, (k, v) = frames[:, :, :, 0].flatten(0, 1).transpose(1, 2), kv.permute(2, 0, 3, 1, 4)
    if frames_by is None:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        with sdpa_kernel(frames_by):
            out = F.scaled_dot_product_attention(q, k, v)
    patches = out.transpose(1, 2).reshape(B, T * N, H, D)
    return torch.cat([summary.transpose(1, 2), patches], 1)


def per_frame_loop(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """The same with one call for each frame."""
    T, N, G, first = _sizes(layout)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).split([G, T * N], 3)[0]
    mask = _summary_mask(layout, qkv.device)
    rows = [F.scaled_dot_product_attention(q, *qkv[:, :, 1:].permute(2, 0, 3, 1, 4), attn_mask=mask)]
    k, v = k[:, :, first:], v[:, :, first:]
    for frame in qkv[:, G:].unflatten(1, (T, N)).unbind(1):
        q, own_k, own_v = frame.permute(2, 0, 3, 1, 4)
        rows.append(F.scaled_dot_product_attention(q, torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)))
    return torch.cat(rows, 2).transpose(1, 2)


def clip_vip(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """As CLIP-ViP attends with its M proxy tokens: their keys and values repeated for each frame, the probabilities written
    out. There the M tokens attend to everything; here a mask gives each of the G summary tokens what VidLA lets it see."""
    T, N, G, first = _sizes(layout)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q = q * qkv.shape[-1] ** -0.5
    scores = (q[:, :, :G] @ k.transpose(-1, -2)).masked_fill(~_summary_mask(layout, qkv.device), -torch.inf)
    proxies = scores.softmax(-1) @ v
    k, v = (torch.cat([x[:, :, None, first:G].expand(-1, -1, T, -1, -1), x[:, :, G:].unflatten(2, (T, N))], 3) for x in (k, v))
    frames = (q[:, :, G:].unflatten(2, (T, N)) @ k.transpose(-1, -2)).softmax(-1) @ v  # (B, H, T, N, D)
    return torch.cat([proxies, frames.flatten(2, 3)], 2).transpose(1, 2)


# Attention over sequences of many lengths: the rule as dense blocks, each with keys of its own.


def blocks(layout: TokenLayout) -> list[tuple[list[int], list[int]]]:
    """Hierarchical attention as (query positions, key positions) of dense blocks; the queries of all are 0..S-1 in order.

    CLS is one, each level of MST one, each frame one.
    """
    T, N, G, first = _sizes(layout)
    frames = [list(range(G + t * N, G + (t + 1) * N)) for t in range(T)]
    pieces = []
    for row, group in itertools.groupby(range(G), key=lambda i: layout.summary_rows[i]):
        pieces.append((list(group), [*range(row.first, row.end), *itertools.chain(*frames[:: row.stride])]))
    return pieces + [(frame, [*range(first, G), *frame]) for frame in frames]


@dataclass(frozen=True)
class Packed:
    """`blocks` for B clips laid end to end: which rows of (B*S) are keys, and the lengths of the blocks."""

    keys: torch.Tensor
    q_lengths: list[int]
    k_lengths: list[int]


@cache
def _packed(layout: TokenLayout, B: int, device: torch.device) -> Packed:
    pieces = blocks(layout)
    keys = torch.tensor([key for _, keys in pieces for key in keys])
    keys = (torch.arange(B)[:, None] * layout.seq_len + keys).flatten().to(device)
    q, k = ([len(piece[i]) for piece in pieces] * B for i in (0, 1))
    return Packed(keys, q, k)


def _pack(qkv: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B*S, H, D) in place, k and v gathered block by block."""
    flat = qkv.flatten(0, 1)
    k, v = flat[:, 1:].index_select(0, _packed(layout, qkv.shape[0], qkv.device).keys).unbind(1)
    return flat[:, 0], k, v


@cache
def _block_diagonal(layout: TokenLayout, B: int, device: torch.device):
    from xformers.ops import fmha

    packed = _packed(layout, B, device)
    return fmha.attn_bias.BlockDiagonalMask.from_seqlens(packed.q_lengths, packed.k_lengths, device=device)


def xformers_hierarchical(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """memory_efficient_attention under a block-diagonal bias: one block for each dense piece."""
    from xformers.ops import memory_efficient_attention

    q, k, v = (x[None] for x in _pack(qkv, layout))
    bias = _block_diagonal(layout, qkv.shape[0], qkv.device)
    return memory_efficient_attention(q, k, v, attn_bias=bias).view(qkv[:, :, 0].shape)


@cache
def _lengths(layout: TokenLayout, B: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    packed = _packed(layout, B, device)
    q, k = (torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (packed.q_lengths, packed.k_lengths))
    return q.to(device), k.to(device), max(packed.q_lengths), max(packed.k_lengths)


def flash_hierarchical(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """flash_attn_varlen_func over the same blocks."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(*_pack(qkv, layout), *_lengths(layout, qkv.shape[0], qkv.device)).view(qkv[:, :, 0].shape)


# Tube attention.


def _tubes(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """(B, T*N, 3, H, D) -> (B*N, T, 3, H, D), a copy."""
    return qkv.unflatten(1, (layout.frames, layout.patches)).transpose(1, 2).flatten(0, 1)


def _untube(out: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """(B*N, T, H, D) -> (B, T*N, H, D), a copy."""
    return out.unflatten(0, (-1, layout.patches)).transpose(1, 2).flatten(1, 2)


def permute_sdpa(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """The tubes as a batch."""
    q, k, v = _tubes(qkv, layout).permute(2, 0, 3, 1, 4)
    return _untube(F.scaled_dot_product_attention(q, k, v).transpose(1, 2), layout)


def einsum(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Softmax between two einsums, on views."""
    return _einsum(qkv, layout.frames, layout.patches)


def einsum_compiled(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    return compiled(_einsum)(qkv, layout.frames, layout.patches)


def _einsum(qkv: torch.Tensor, T: int, N: int) -> torch.Tensor:
    q, k, v = qkv.unflatten(1, (T, N)).unbind(3)  # (B, T, N, H, D)
    weights = (torch.einsum("btnhd,bsnhd->bnhts", q, k) * qkv.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bnhts,bsnhd->btnhd", weights, v).flatten(1, 2)


@cache
def _tube_diagonal(T: int, tubes: int, device: torch.device):
    from xformers.ops import fmha

    return fmha.attn_bias.BlockDiagonalMask.from_seqlens([T] * tubes, device=device)


def xformers_tube(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Tubes laid end to end, one block each."""
    from xformers.ops import memory_efficient_attention

    tubes = _tubes(qkv, layout)
    q, k, v = tubes.flatten(0, 1)[None].unbind(2)
    out = memory_efficient_attention(q, k, v, attn_bias=_tube_diagonal(layout.frames, len(tubes), qkv.device))
    return _untube(out.view(tubes[:, :, 0].shape), layout)


def flash_tube(qkv: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """The tubes as a batch, still packed."""
    from flash_attn import flash_attn_qkvpacked_func

    return _untube(flash_attn_qkvpacked_func(_tubes(qkv, layout).contiguous()), layout)


# Why a peer is not measured: (sweep, device, toy) -> None or a sentence.

COMPILED_ON_CPU = ("B/16 T=12", "B/32 T=12")


def _always(sweep: Sweep, device: torch.device, toy: bool) -> None:
    return None


def _dense(sweep: Sweep, device: torch.device, toy: bool) -> str | None:
    tokens = sweep.shape.tokens(sweep.op)
    if sweep.group != "attention" and tokens > DENSE_TOKENS:
        return f"{tokens} tokens; the dense mask is timed up to {DENSE_TOKENS}"
    return None


def _not_in_growth(sweep: Sweep, device: torch.device, toy: bool) -> str | None:
    return "growth is shown for the nearest peers" if sweep.group != "attention" else None


def _compiling(sweep: Sweep, device: torch.device, toy: bool) -> str | None:
    if toy:
        return "nothing is compiled at toy size"
    if device.type == "cpu" and (
        sweep.group != "attention" or sweep.passes != "fwd+bwd" or sweep.shape.name not in COMPILED_ON_CPU
    ):
        return "compiling is slow on a CPU: there only forward and backward of B/16 and B/32 T=12"
    return None


def _unrolled(sweep: Sweep, device: torch.device, toy: bool) -> str | None:
    """portable's loop over frames is unrolled by the compiler."""
    if sweep.shape.layout.frames > 12:
        return "its loop over frames is unrolled, and compiled at T=12 alone"
    return _compiling(sweep, device, toy) or _not_in_growth(sweep, device, toy)


def _flex(sweep: Sweep, device: torch.device, toy: bool, *, block: int) -> str | None:
    if toy:
        return "nothing is compiled at toy size"
    if device.type == "cuda":
        return _not_in_growth(sweep, device, toy) if block == 64 else None
    if sweep.passes != "fwd":
        return "no backward on a CPU"
    if block == 64 or sweep.group != "attention" or sweep.shape.name not in COMPILED_ON_CPU:
        return "compiling is slow on a CPU: there only the forward of B/16 and B/32 T=12, in blocks of 128"
    return None


def _gpu_only(sweep: Sweep, device: torch.device, toy: bool) -> str | None:
    return "needs an NVIDIA GPU" if device.type != "cuda" else None


def _package(sweep: Sweep, device: torch.device, toy: bool, *, name: str, install: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return f"not installed ({install})"
    return _gpu_only(sweep, device, toy) or _not_in_growth(sweep, device, toy)


_XFORMERS = partial(_package, name="xformers", install="pip install xformers")
_FLASH = partial(_package, name="flash_attn", install="pip install flash-attn --no-build-isolation")

PEERS: dict[str, dict[str, tuple[Attention, Callable[[Sweep, torch.device, bool], str | None]]]] = {
    "tube": {
        "dense mask SDPA": (partial(dense, op="tube"), _dense),
        "permute + SDPA": (permute_sdpa, _always),
        "einsum": (einsum, _not_in_growth),
        "einsum, compiled": (einsum_compiled, _compiling),
        "FlexAttention, block 128": (partial(flex, op="tube", block=128), partial(_flex, block=128)),
        "FlexAttention, block 64": (partial(flex, op="tube", block=64), partial(_flex, block=64)),
        "xformers, block-diagonal": (xformers_tube, _XFORMERS),
        "flash-attn, a batch of tubes": (flash_tube, _FLASH),
    },
    "hierarchical": {
        "dense mask SDPA": (partial(dense, op="hierarchical"), _dense),
        "per-frame SDPA": (per_frame, _always),
        "per-frame SDPA, a loop": (per_frame_loop, _not_in_growth),
        "per-frame SDPA, compiled": (per_frame_compiled, _compiling),
        "per-frame SDPA, cuDNN": (per_frame_cudnn, _gpu_only),
        "CLIP-ViP's way": (clip_vip, _not_in_growth),
        "FlexAttention, block 128": (partial(flex, op="hierarchical", block=128), partial(_flex, block=128)),
        "FlexAttention, block 64": (partial(flex, op="hierarchical", block=64), partial(_flex, block=64)),
        "xformers, block-diagonal": (xformers_hierarchical, _XFORMERS),
        "flash-attn, varlen": (flash_hierarchical, _FLASH),
    },
}


def forget() -> None:
    """Drop masks, tables and compiled code: they belong to one shape, and large ones would crowd the next."""
    for remembered in (_mask, _block_mask, _summary_mask, _packed, _block_diagonal, _lengths, _tube_diagonal):
        remembered.cache_clear()
    torch._dynamo.reset()


__all__ = ["PEERS", "Implementation", "blocks", "forget", "implementations", "oracle"]
