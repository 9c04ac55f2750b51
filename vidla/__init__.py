"""VidLA: video-language alignment. The public names; each is imported when it is first used, so that a command's --help
does not wait for torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loss import contrastive_loss
    from .metrics import dual_softmax, retrieval_metrics
    from .model import VidLA, create_model
    from .tokenizer import get_tokenizer

_HOME = {
    "VidLA": "model",
    "contrastive_loss": "loss",
    "create_model": "model",
    "dual_softmax": "metrics",
    "get_tokenizer": "tokenizer",
    "retrieval_metrics": "metrics",
}
__all__ = ["VidLA", "contrastive_loss", "create_model", "dual_softmax", "get_tokenizer", "retrieval_metrics"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
