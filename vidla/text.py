"""The text tower: CLIP's text transformer unchanged (paper section 4, "we retain the CLIP text encoder architecture")."""

from __future__ import annotations

import torch
from torch import nn

from .layers import Block, LayerNorm, Transformer, dense_attention, refuse_unknown

# open_clip's keys of text_cfg that the tower reads, and values of other keys that ask for nothing.
_IMPLEMENTED = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_NEUTRAL = {
    "pool_type": "argmax",
    "proj_type": "linear",
    "block_type": "default",
    # Read by open_clip only with another pooling, a class token or a Hugging Face model, which are refused.
    "eos_id": 2,
    "hf_model_pretrained": True,
    "hf_proj_type": "mlp",
    "hf_pooler_type": "mean_pooler",
}


class TextBlock(Block):
    """CLIP's text block: causal attention, MLP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, d) -> (B, L, d)."""
        x = x + self.attn.project(dense_attention(*self.attn.qkv(self.ln_1(x)).unbind(2), is_causal=True))
        return x + self.mlp(self.ln_2(x))


class TextTower(nn.Module):
    """The text encoder.

    Args:
        text_cfg: open_clip's `text_cfg` of a plain CLIP (context_length, vocab_size, width, heads, layers, mlp_ratio).
        embed_dim: E, width of the embedding shared with the video.
        quick_gelu: QuickGELU in the MLPs.
        checkpoint_activations: as in `Transformer`.

    Raises:
        ValueError: the config asks for another text tower (a Hugging Face model, another pooling, ...).
    """

    def __init__(self, text_cfg: dict, embed_dim: int, quick_gelu: bool, *, checkpoint_activations: bool) -> None:
        super().__init__()
        refuse_unknown(text_cfg, _IMPLEMENTED, _NEUTRAL, "text tower")
        # open_clip's defaults where the config is silent.
        width, heads = text_cfg.get("width", 512), text_cfg.get("heads", 8)
        layers, mlp_ratio = text_cfg.get("layers", 12), text_cfg.get("mlp_ratio", 4.0)
        self.context_length = text_cfg.get("context_length", 77)
        self.token_embedding = nn.Embedding(text_cfg.get("vocab_size", 49408), width)
        self.positional_embedding = nn.Parameter(torch.empty(self.context_length, width))
        blocks = (TextBlock(width, heads, mlp_ratio, quick_gelu) for _ in range(layers))
        self.transformer = Transformer(width, blocks, checkpoint_activations)
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed texts.

        Args:
            tokens: (B, L) integers from the tokenizer, L at most the context length. The end-of-text token, the largest
                id of the vocabulary, marks the position that is read.

        Returns:
            (B, E), not normalised.

        Raises:
            ValueError: another shape, or not integers.
        """
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context_length:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; this model takes (B, L), L from 1 to {self.context_length}"
            )
        if tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"tokens are {tokens.dtype}; they must be int64 or int32, as get_tokenizer gives them")
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.transformer(x)
        end = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]
        return self.ln_final(end) @ self.text_projection
