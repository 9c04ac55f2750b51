"""AdamW with named parameter groups, and the learning rate as a pure function of the step.

Paper, section 4.1 and appendix A.1: AdamW, betas (0.9, 0.999), weight decay 0.02, cosine decay. Not in the paper and so
ours (docs/decisions.md, 10): the linear warm-up, epsilon 1e-6, and what does not decay.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from .config import Optim

# By name, never by position: biases, norms, embeddings (of tokens, places, times, CLS and MST) and the temperature.
NO_DECAY = re.compile(r"(^|[._])(bias|ln|embedding|logit_scale)($|[._])")


def learning_rate(step: int, steps: int, optim: Optim) -> float:
    """The rate of update `step` (from 0) of a run of `steps` updates: linear warm-up to the peak, then a cosine.

    The first update has a rate above zero, the last one `optim.lr_end`; where at most one update follows the warm-up,
    the last one has the peak.
    """
    warm = math.ceil(optim.warmup * steps)
    if step < warm:
        return optim.lr * (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, steps - 1 - warm))
    return optim.lr_end + (optim.lr - optim.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict]:
    """The trainable parameters in two groups, named 'decay' and 'no_decay'; each is in exactly one.

    Raises: ValueError for a vector that no rule names: whether it decays must be decided, not guessed.
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if optim.decay == "all":
            decay.append((name, parameter))
        elif NO_DECAY.search(name):
            no_decay.append((name, parameter))
        elif parameter.ndim < 2:
            raise ValueError(f"parameter {name} {tuple(parameter.shape)} is no matrix: name it in vidla.optim.NO_DECAY")
        else:
            decay.append((name, parameter))
    return [
        {"name": "decay", "params": [p for _, p in decay], "names": [n for n, _ in decay], "weight_decay": optim.weight_decay},
        {"name": "no_decay", "params": [p for _, p in no_decay], "names": [n for n, _ in no_decay], "weight_decay": 0.0},
    ]


def create_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over `parameter_groups(model)`. The rate is set before each update from `learning_rate`."""
    groups = [group for group in parameter_groups(model, optim) if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate of the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
