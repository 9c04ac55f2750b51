"""VidLA."""

from .loss import contrastive_loss
from .metrics import dual_softmax, retrieval_metrics
from .model import VidLA, create_model
from .tokenizer import get_tokenizer

__all__ = ["VidLA", "contrastive_loss", "create_model", "dual_softmax", "get_tokenizer", "retrieval_metrics"]
