"""The video tower: CLIP's ViT with hierarchical temporal attention (paper section 4, equations 1 and 2).

Tokens `[CLS] | MST | frame 0 patches | frame 1 patches | ...` (order and visibility: `vidla_kernels.TokenLayout`) pass
through L blocks, each of tube attention over the patches, hierarchical attention over everything, and CLIP's MLP. The
video's embedding is a projection of CLS. With one frame, no MST, no tube attention and `patches_see_cls`, it is CLIP's ViT.
"""

from __future__ import annotations

import torch
from torch import nn

from vidla_kernels import TokenLayout, hierarchical_attention, tube_attention

from .layers import Attention, Block, LayerNorm, Transformer, dense_attention, refuse_unknown

# open_clip's keys of vision_cfg that the tower reads, and values of other keys that ask for nothing.
_IMPLEMENTED = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_NEUTRAL = {
    "pool_type": "tok",
    "pos_embed_type": "learnable",
    "block_type": "default",
    # Read by open_clip only together with attentional_pool or timm_model_name, which are refused.
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "timm_pool": "avg",
    "timm_proj": "linear",
}


class VideoBlock(Block):
    """One layer of the video tower: tube attention, hierarchical attention, MLP, each with a norm before and a residual.

    Equation 2 writes MLP(Z) without a norm; CLIP's ln_2 stays (docs/decisions.md, 5).

    Args:
        width, heads, mlp_ratio, quick_gelu: as in `Block`.
        layout: the token sequence.
        tube: has tube attention (equation 1).
        joint: every token attends to every token, instead of hierarchical attention (ablation).
        backend: of both attentions, as in `vidla_kernels`. One with CUDA kernels, which are for hierarchical attention
            alone, leaves tube attention to "auto".
        cls_only: return the CLS row alone. The other rows give keys and values and nothing else, which is all the last
            block needs: only its CLS is read (docs/decisions.md, 12).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        quick_gelu: bool,
        *,
        layout: TokenLayout,
        tube: bool,
        joint: bool,
        backend: str,
        cls_only: bool,
    ) -> None:
        super().__init__(width, heads, mlp_ratio, quick_gelu)
        self.layout = layout
        self.joint = joint
        self.backend = backend
        self.tube_backend = "auto" if "cuda" in backend else backend
        self.cls_only = cls_only
        self.ln_tube = LayerNorm(width) if tube else None
        self.tube_attn = Attention(width, heads) if tube else None

    @torch.no_grad()
    def start_tube_from_spatial(self) -> None:
        """Tube attention starts as a copy of this block's spatial attention, except for an output projection of zero.

        So the layer begins as CLIP's. With q, k and v at zero too it would never get a gradient (docs/decisions.md, 4).
        """
        if self.tube_attn is None:
            return
        self.ln_tube.load_state_dict(self.ln_1.state_dict())
        self.tube_attn.in_proj_weight.copy_(self.attn.in_proj_weight)
        self.tube_attn.in_proj_bias.copy_(self.attn.in_proj_bias)
        self.tube_attn.out_proj.weight.zero_()
        self.tube_attn.out_proj.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, d) -> (B, S, d), or (B, 1, d) with cls_only."""
        if self.tube_attn is not None:
            summary, patches = x.split([self.layout.num_summary, self.layout.num_patches], 1)
            out = tube_attention(self.tube_attn.qkv(self.ln_tube(patches)), self.layout, backend=self.tube_backend)
            x = torch.cat([summary, patches + self.tube_attn.project(out)], 1)
        tokens = self.ln_1(x)
        if self.cls_only:  # CLS sees every token, so its row needs no mask
            k, v = self.attn.key_value(tokens).unbind(2)
            x, out = x[:, :1], dense_attention(self.attn.query(tokens[:, :1]), k, v)
        elif self.joint:
            out = dense_attention(*self.attn.qkv(tokens).unbind(2))
        else:
            out = hierarchical_attention(self.attn.qkv(tokens), self.layout, backend=self.backend)
        x = x + self.attn.project(out)
        return x + self.mlp(self.ln_2(x))


class VideoTower(nn.Module):
    """The video encoder.

    Args:
        vision_cfg: open_clip's `vision_cfg` of a plain ViT (image_size, patch_size, width, layers, head_width, mlp_ratio).
        embed_dim: E, width of the embedding shared with the text.
        quick_gelu: QuickGELU in the MLPs.
        frames, levels, tokens_per_level, temporal_scale, patches_see_cls: T, U, V, r and the rule, as in `TokenLayout`.
        tube, joint, backend: as in `VideoBlock`.
        checkpoint_activations: as in `Transformer`.

    Raises:
        ValueError: the config is not a plain ViT's, or its sizes do not fit together.
    """

    def __init__(
        self,
        vision_cfg: dict,
        embed_dim: int,
        quick_gelu: bool,
        *,
        frames: int,
        levels: int,
        tokens_per_level: int,
        temporal_scale: int,
        patches_see_cls: bool,
        tube: bool,
        joint: bool,
        backend: str,
        checkpoint_activations: bool,
    ) -> None:
        super().__init__()
        refuse_unknown(vision_cfg, _IMPLEMENTED, _NEUTRAL, "vision tower")
        # open_clip's defaults where the config is silent.
        image_size, patch_size = vision_cfg.get("image_size", 224), vision_cfg.get("patch_size", 16)
        width, head_width = vision_cfg.get("width", 768), vision_cfg.get("head_width", 64)
        layers, mlp_ratio = vision_cfg.get("layers", 12), vision_cfg.get("mlp_ratio", 4.0)
        if not isinstance(layers, int):
            raise ValueError(f"the vision tower's layers are {layers}, a ResNet's; VidLA extends a ViT such as ViT-B-32")
        if not isinstance(image_size, int) or image_size < patch_size or image_size % patch_size:
            raise ValueError(f"image_size is {image_size!r}; it must be an integer multiple of the patch size, {patch_size}")
        if width % head_width:
            raise ValueError(f"the vision tower's width {width} is not a multiple of its head_width {head_width}")
        self.image_size = image_size
        self.grid_size = image_size // patch_size
        self.layout = TokenLayout(
            frames=frames,
            patches=self.grid_size**2,
            levels=levels,
            tokens_per_level=tokens_per_level,
            temporal_scale=temporal_scale,
            patches_see_cls=patches_see_cls,
        )

        std = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        self.positional_embedding = nn.Parameter(std * torch.randn(1 + self.layout.patches, width))  # row 0: CLS
        # Starts at zero: step 0 is CLIP applied to each frame (docs/decisions.md, 7).
        self.temporal_embedding = nn.Parameter(torch.zeros(frames, width))
        self.mst_embedding = nn.Parameter(std * torch.randn(levels, tokens_per_level, width)) if levels else None
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            width,
            (
                VideoBlock(
                    width,
                    width // head_width,
                    mlp_ratio,
                    quick_gelu,
                    layout=self.layout,
                    tube=tube,
                    joint=joint,
                    backend=backend,
                    cls_only=layer == layers - 1,
                )
                for layer in range(layers)
            ),
            checkpoint_activations,
        )
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(std * torch.randn(width, embed_dim))
        self.start_tube_from_spatial()

    def start_tube_from_spatial(self) -> None:
        """`VideoBlock.start_tube_from_spatial` in every block."""
        for block in self.transformer.resblocks:
            block.start_tube_from_spatial()

    def embed(self, video: torch.Tensor) -> torch.Tensor:
        """The first block's input: video (B, T, 3, h, w) -> tokens (B, S, d), in `TokenLayout`'s order."""
        B, T, N = video.shape[0], self.layout.frames, self.layout.patches
        patches = self.conv1(video.flatten(0, 1).to(self.conv1.weight.dtype))  # (B*T, d, grid, grid)
        patches = patches.flatten(2).transpose(1, 2).unflatten(0, (B, T))  # (B, T, N, d)
        dtype = patches.dtype  # of the residual stream: under autocast not the parameters'
        position = self.temporal_embedding[:, None] + self.positional_embedding[1:]  # (T, N, d)
        patches = (patches + position.to(dtype)).reshape(B, T * N, -1)
        summary = (self.class_embedding + self.positional_embedding[0])[None]
        if self.mst_embedding is not None:
            summary = torch.cat([summary, self.mst_embedding.flatten(0, 1)])
        return self.ln_pre(torch.cat([summary.to(dtype).expand(B, -1, -1), patches], 1))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Embed videos.

        Args:
            video: (B, T, 3, h, w), floating point, normalised with CLIP's mean and standard deviation; any strides.

        Returns:
            (B, E), not normalised.

        Raises:
            ValueError: another shape, or integers.
        """
        T, size = self.layout.frames, self.image_size
        if video.ndim != 5 or video.shape[1:] != (T, 3, size, size):
            raise ValueError(
                f"video has shape {tuple(video.shape)}; this model takes (B, {T}, 3, {size}, {size}): {T} frames of "
                f"{size} x {size} pixels (other values: create_model(..., frames=, image_size=))"
            )
        if not video.is_floating_point():
            raise ValueError(f"video is {video.dtype}; it must be floating point, normalised with CLIP's mean and std")
        x = self.transformer(self.embed(video))
        return self.ln_post(x[:, 0]) @ self.proj
