"""Both attentions in plain torch operations: any device, any dtype, no dense mask, memory linear in T.

The default on a CPU, the fallback on a GPU without Triton, and a baseline for the kernels. Nothing here is registered with
torch.library: autograd, autocast and torch.compile see ordinary operations. On a CPU, where nothing is compiled, the work is
done by portable_cpu.py, which writes the backward out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import portable_cpu
from .layout import TokenLayout


def _by_hand(qkv: torch.Tensor) -> bool:
    """Whether portable_cpu serves this call. Compiled, torch fuses the copies that it avoids, and would unroll its loops."""
    return qkv.device.type == "cpu" and not torch.compiler.is_compiling()


def tube(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> torch.Tensor:
    """Tube attention, paper equation 1 without norm, projections and residual. (B, T*N, 3, H, D) -> (B, T*N, H, D)."""
    if _by_hand(qkv):
        return portable_cpu.tube(qkv, layout, scale)
    B, _, _, H, D = qkv.shape
    T, N = layout.frames, layout.patches
    q, k, v = qkv.view(B, T, N, 3, H, D).unbind(3)  # (B, T, N, H, D)
    if qkv.dtype in (torch.float16, torch.bfloat16) or N == 1:
        # Fused attention keeps scores in fp32; written out, they would be rounded to 16 bits between the products.
        q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(B * N, H, T, D) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.view(B, N, H, T, D).permute(0, 3, 1, 2, 4).reshape(B, T * N, H, D)
    weights = (torch.einsum("btnhd,bsnhd->bnhts", q, k) * scale).softmax(-1)
    return torch.einsum("bnhts,bsnhd->btnhd", weights, v).reshape(B, T * N, H, D)


def hierarchical(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> torch.Tensor:
    """Hierarchical attention, paper equation 2 without norm, projections and MLP. (B, S, 3, H, D) -> (B, S, H, D).

    G summary rows attend to the whole sequence under their (G, S) mask; each frame's patches attend to the frame's own
    keys followed by the summary keys that patches see, which needs no mask.
    """
    if _by_hand(qkv):
        return portable_cpu.hierarchical(qkv, layout, scale)
    T, N, G, S = layout.frames, layout.patches, layout.num_summary, layout.seq_len
    summary, patches = qkv.split([G, T * N], 1)

    position = torch.arange(S, device=qkv.device)
    q, k, v = summary[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2), qkv[:, :, 2].transpose(1, 2)  # (B, H, ., D)
    mask = layout.visible(position[:G, None], position[None])
    rows = [F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)]

    # Every frame adds to the gradient of the shared keys and values: in fp32 at least, as the kernels do.
    wide = torch.promote_types(qkv.dtype, torch.float32)
    shared_kv = summary[:, layout.first_key_of_patches :, 1:].permute(2, 0, 3, 1, 4).to(wide)  # (2, B, H, UV or G, D)
    for frame in patches.unflatten(1, (T, N)).unbind(1):  # (B, N, 3, H, D)
        q, *kv = frame.permute(2, 0, 3, 1, 4)
        k, v = (torch.cat([own, shared.to(own.dtype)], 2) for own, shared in zip(kv, shared_kv, strict=True))
        rows.append(F.scaled_dot_product_attention(q, k, v, scale=scale))
    return torch.cat(rows, 2).transpose(1, 2).contiguous()
