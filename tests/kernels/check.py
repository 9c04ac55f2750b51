"""How exact a kernel must be: at most twice the error of torch's own attention in the same dtype, plus one rounding.

Both errors are against float64. The root mean square is held to twice; the largest single error, which is a matter of luck
(one near-tie decides it), to four times. No test states a tolerance of its own.
"""

import torch

from .cases import Parts


def check(ours: Parts, dense: list[Parts], gold: Parts, summary: int, dtype: torch.dtype) -> None:
    """Compare run by run and part by part: out, dq, dk, dv, of summary and patch rows apart.

    Args:
        ours, dense: the kernel's run, and the reference's runs in `dtype` (the worst of them counts).
        gold: the reference in float64 on the same inputs.
        summary: how many leading rows are summary tokens (0 for tube attention).
    """
    eps = torch.finfo(dtype).eps
    parts = gold.named(summary)
    # A gradient that cancels to nothing still carries the roundings of the terms it was made of.
    gradient = max(part.abs().max().item() for name, part in parts.items() if name[0] == "d")
    for name, want in parts.items():
        got, peers = ours.named(summary)[name].double(), [run.named(summary)[name].double() for run in dense]
        assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum()} of {got.numel()} values are not finite"
        size = want.abs().max().item() if name[0] == "o" else gradient
        for norm, times in ((_rms, 2), (_largest, 4)):
            error, torchs = norm(got - want), max(norm(peer - want) for peer in peers)
            allowed = times * torchs + eps * size
            assert error <= allowed, (
                f"{name}: {norm.__name__[1:]} error {error:.2e} > {allowed:.2e} "
                f"(torch's own attention: {torchs:.2e}, values up to {want.abs().max():.2e})"
            )


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()
