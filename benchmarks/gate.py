"""The gate before every time: an implementation that disagrees with the reference gets no number."""

from __future__ import annotations

import torch

BOUND = {torch.float32: 2e-5}  # relative error in the norm; 16 bits have 2e-2. The exact bound is the tests' business


def disagreement(ours: tuple, reference: tuple) -> str | None:
    """None where `ours` agrees with the reference in the same dtype, else a sentence. What the reference lacks (None) is
    not compared."""
    for got, want in zip(ours, reference, strict=True):
        if want is None:
            continue
        if got.shape != want.shape:
            return f"disagrees with the reference: shape {tuple(got.shape)}, not {tuple(want.shape)}"
        error = (got.float() - want.float()).norm() / want.float().norm()
        bound = BOUND.get(want.dtype, 2e-2)
        if not error < bound:  # NaN as well
            return f"disagrees with the reference by {error:.1e}, more than {bound:.0e}"
    return None
