"""Retrieval on held-out clips: encode each clip and its caption once, rank all against all.

Raw similarities; the transductive dual softmax is `vidla.dual_softmax` on what `encode` returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .metrics import retrieval_metrics

if TYPE_CHECKING:
    from .loader import Batch
    from .model import VidLA


@torch.inference_mode()
def encode(
    model: VidLA, batches: Iterable[Batch], autocast: AbstractContextManager | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised features of every clip and of every caption, fp32.

    Args: model: stays in the mode it was found in; batches: distinct clips, on the model's device.
    Returns: videos (V, E), texts (C, E), text_to_video (C,): clips without a caption are candidates without a query.
    """
    training = model.training
    model.eval()
    videos, texts, owners, seen = [], [], [], 0
    for batch in batches:
        has = batch.has_caption.nonzero().flatten()
        with autocast or nullcontext():
            videos.append(model.encode_video(batch.video).float())
            if len(has):
                texts.append(model.encode_text(batch.caption[has]).float())
        owners.append(has + seen)
        seen += len(batch.keys)
    model.train(training)
    if not texts:
        raise ValueError("no held-out clip has a caption, so there is nothing to retrieve with")
    normalized = (torch.nn.functional.normalize(torch.cat(x), dim=-1) for x in (videos, texts))
    return *normalized, torch.cat(owners)


def evaluate(model: VidLA, batches: Iterable[Batch], autocast: AbstractContextManager | None = None) -> dict[str, float]:
    """`retrieval_metrics` of the captions of `batches`, with "chance", the recall at 1 of a blind guess (text to video)."""
    videos, texts, owners = encode(model, batches, autocast)
    return retrieval_metrics(texts @ videos.T, owners) | {"chance": 1 / len(videos)}
