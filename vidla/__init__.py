"""VidLA."""

from .model import VidLA, create_model
from .tokenizer import get_tokenizer

__all__ = ["VidLA", "create_model", "get_tokenizer"]
