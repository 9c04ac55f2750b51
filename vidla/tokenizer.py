"""CLIP's tokenizer, by model name: open_clip's byte-pair encoding with the context length of the model's text tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .model import get_model_config

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer


def get_tokenizer(name: str) -> SimpleTokenizer:
    """The tokenizer of a model. Works offline.

    Args:
        name: a model name as in `create_model`, or a folder written by `VidLA.save_pretrained`.

    Returns:
        A callable: str or list[str] -> (B, L) int64, L the model's context length: start, text, end, zeros. A text that
        is too long is cut, and keeps its end token. It pickles, so data-loading workers can hold it.

    Raises:
        ValueError: an unknown name, or a vocabulary that is not CLIP's.
    """
    from open_clip.tokenizer import SimpleTokenizer  # open_clip takes seconds to import

    saved = Path(name) / "config.json"
    model_cfg = json.loads(saved.read_text())["model_cfg"] if saved.is_file() else get_model_config(name)
    text_cfg = model_cfg["text_cfg"]
    if other := text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name"):
        raise ValueError(f"{name} has the tokenizer of {other}; VidLA's text tower takes CLIP's own, as in ViT-B-32")
    tokenizer = SimpleTokenizer(context_length=text_cfg.get("context_length", 77))
    vocab_size = text_cfg.get("vocab_size", tokenizer.vocab_size)
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(f"{name} has a vocabulary of {vocab_size}; CLIP's tokenizer has {tokenizer.vocab_size} tokens")
    return tokenizer
