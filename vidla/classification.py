"""Classification by a linear head on the video embedding (paper, appendix A.3): its gradient and its evaluation.

The counterparts of `vidla.train.backward` and of `vidla.retrieval.evaluate`, for a model with `classes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .distributed import all_reduce_sum, group_place

if TYPE_CHECKING:
    from .loader import Batch
    from .model import VidLA


def freeze_texts(model: VidLA) -> None:
    """The text tower and the temperature are kept as they are: cross entropy gives them no gradient, DDP would wait for one."""
    model.text.requires_grad_(False)
    model.logit_scale.requires_grad_(False)


def backward(model: Any, batch: Batch, micro_batch: int, autocast: AbstractContextManager) -> Tensor:
    """Add the gradient of the mean cross entropy over the global batch to the parameters' and return that mean, in fp32.

    Args: model: a VidLA with a head, alone or in DDP; batch: this rank's share, on its device; micro_batch: most clips
        encoded at once. Unlike the contrastive loss this one is a sum over clips, so the parts simply add up.
    """
    size, losses = len(batch.keys), []
    for start in range(0, size, micro_batch):
        part = slice(start, start + micro_batch)
        hold = isinstance(model, DistributedDataParallel) and part.stop < size  # DDP averages once, after the last part
        with model.no_sync() if hold else nullcontext():
            with autocast:
                (logits,) = model(batch.video[part])
            loss = F.cross_entropy(logits, batch.label[part], reduction="sum") / size
            loss.backward()
        losses.append(loss.detach())
    return all_reduce_sum(torch.stack(losses).sum()) / group_place()[1]


@torch.inference_mode()
def evaluate(model: VidLA, batches: Iterable[Batch], autocast: AbstractContextManager | None = None) -> dict[str, float]:
    """Accuracy on `batches`, one view of each clip: "top1", "top5" (fractions), and "chance", that of a blind guess.

    Classes that tie with the right one count against the model, as in `vidla.metrics`. It stays in the mode it was found in.
    """
    training = model.training
    model.eval()
    ranks = []
    for batch in batches:
        with autocast or nullcontext():
            logits = model.classify(batch.video)
        ranks.append((~(logits < logits.gather(1, batch.label[:, None]))).sum(1))  # the right class is in the count
    model.train(training)
    rank = torch.cat(ranks)
    return {f"top{k}": (rank <= k).double().mean().item() for k in (1, 5)} | {"chance": 1 / model.head.out_features}
