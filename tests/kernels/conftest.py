"""Uninitialised memory that the kernels ask for holds NaN, so a row that nobody wrote fails every comparison."""

import pytest
import torch

from vidla_kernels import cpu_binding, cuda_binding, triton_hierarchical, triton_hierarchical_backward, triton_tube


class PoisonedTorch:
    """torch, but what `empty` returns is NaN throughout.

    It stands in for `torch` in the kernels' modules alone. (A patched torch.empty would also be what torch itself
    remembers as a constructor, and `with torch.device(...)` would miss the real one for the rest of the process.)
    """

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def empty(self, *args, **kwargs) -> torch.Tensor:
        tensor = torch.empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (triton_tube, triton_hierarchical, triton_hierarchical_backward, cuda_binding, cpu_binding):
        monkeypatch.setattr(module, "torch", PoisonedTorch())
