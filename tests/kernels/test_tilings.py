"""Hierarchical attention's forward is cut in three ways, by shape and architecture: each of them, whatever GPU is here."""

import pytest
import torch

from vidla_kernels import TokenLayout, tiles, triton_hierarchical

from .cases import Case, dense_runs, run
from .check import check
from .test_parity import skip_if_refused

# Which kernel serves: (T, N, G, arch); and layouts at which its tiles are exact, ragged, and as small or large as they come.
LAYOUTS = {
    "_walk_kernel": [(5, 49), (3, 1), (7, 51), (4, 50, 0, 0, 1), (9, 20, 4, 4, 3, True)],
    "_resident_kernel": [(2, 196), (3, 130, 2, 4, 2), (1, 197, 1, 4, 2, True), (2, 208, 0, 0, 1, True)],
    "_stream_kernel": [(2, 196), (2, 64, 0, 0, 1), (2, 65, 7, 9, 2, True), (3, 288, 1, 4, 2)],
}
# And how many frames a program of the walk has: all of them (then there is nothing to combine), two, one.
CALLS = [
    (kernel, layout, span)
    for kernel, layouts in LAYOUTS.items()
    for layout in layouts
    for span in ((99, 2, 1) if kernel == "_walk_kernel" else (None,))
]


# Few rows behind a frame's whole tiles: summary rows alone, patches with them, one row, none of a hierarchy. B * T frames fill
# no whole number of programs. And what remains over keys: tails of each kind.
BEHIND = [(5, 128), (3, 131), (1, 116), (2, 140, 0, 0, 1), (3, 254, 1, 4, 2, True)]


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, dict]]:
    """Names of the kernels launched with their options, in order."""
    seen, launch = [], triton_hierarchical.common.launch

    def record(kernel, *args, **options):
        seen.append((kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__, options))
        launch(kernel, *args, **options)

    monkeypatch.setattr(triton_hierarchical.common, "launch", record)
    return seen


def compare(case: Case, device: torch.device) -> None:
    """The forward beside the reference, twice: the second run has the same bits."""
    qkv, grad = case.draw("hierarchical", device)
    gold = run("hierarchical", qkv.double(), grad.double(), case.layout, "reference")
    ours = run("hierarchical", qkv, grad, case.layout, "triton")
    check(ours, dense_runs("hierarchical", qkv, grad, case.layout), gold, case.layout.num_summary, case.dtype)
    again = run("hierarchical", qkv, grad, case.layout, "triton")
    assert torch.equal(ours.out, again.out)
    assert torch.equal(ours.d_qkv, again.d_qkv)


@pytest.mark.parametrize(("kernel", "layout", "span"), CALLS, ids=str)
def test_every_tiling(kernel, layout, span, launches, monkeypatch, device, seed):
    if device.type == "cpu":
        monkeypatch.setattr(tiles, "DEFAULT_ARCH", 80 if kernel == "_stream_kernel" else 90)
    monkeypatch.setattr(triton_hierarchical, "_frames_a_program", lambda heads, T, programs: min(span, T))
    case = Case(TokenLayout(*layout), batch=2, heads=1, dtype=torch.float16)
    skip_if_refused("hierarchical", "triton", case, device)
    compare(case, device)
    if device.type == "cpu":  # a GPU decides by its own architecture
        names = [name for name, _ in launches]
        assert names[0] == kernel
        assert ("_combine_kernel" in names) is (kernel != "_walk_kernel" or span < layout[0])


@pytest.mark.parametrize("layout", BEHIND, ids=str)
def test_rows_behind_whole_tiles(layout, launches, monkeypatch, device, seed):
    if device.type == "cpu":
        monkeypatch.setattr(tiles, "DEFAULT_ARCH", 80)
    case = Case(TokenLayout(*layout), batch=1, heads=2, dtype=torch.float16)
    skip_if_refused("hierarchical", "triton", case, device)
    compare(case, device)
    if device.type == "cpu":
        name, options = launches[0]
        assert name == "_stream_kernel"
        assert options["LAST"] == 16


# Frames whose backward is one program: B/16, a full tile of rows, a tail that is a whole key tile, none at all.
@pytest.mark.parametrize("layout", [(3, 196), (2, 243), (2, 240, 3, 4, 2, True), (1, 192, 0, 0, 1)], ids=str)
def test_backward_with_all_rows_of_a_frame_at_once(layout, launches, monkeypatch, device, seed):
    if device.type == "cpu":
        monkeypatch.setattr(tiles, "DEFAULT_ARCH", 90)
    case = Case(TokenLayout(*layout), batch=2, heads=1, dtype=torch.float16)
    skip_if_refused("hierarchical", "triton", case, device)
    compare(case, device)
    if device.type == "cpu":
        assert [name for name, _ in launches].count("_frame_kernel") == 2


def test_summary_rows_without_a_frame_in_a_span(monkeypatch, device, seed):
    """Every frame a program of its own: most rows of the higher levels see nothing of most programs."""
    monkeypatch.setattr(triton_hierarchical, "_frames_a_program", lambda heads, T, programs: 1)
    case = Case(TokenLayout(8, 6, 4, 2, 3), dtype=torch.float16)
    skip_if_refused("hierarchical", "triton", case, device)
    qkv, _ = case.draw("hierarchical", device)
    out, lse = triton_hierarchical.forward(qkv, case.layout, case.head_dim**-0.5)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(scale, device, seed):
    case = Case(TokenLayout(2, 70), dtype=torch.float16)
    skip_if_refused("hierarchical", "triton", case, device)
    qkv, _ = case.draw("hierarchical", device)
    out, lse = triton_hierarchical.forward(qkv, case.layout, scale)
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~case.layout.mask(device), -torch.inf)
    eps = torch.finfo(case.dtype).eps
    assert (out.double() - (scores.softmax(-1) @ v).transpose(1, 2)).abs().max() <= 4 * eps * v.abs().max()
    want = scores.logsumexp(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert (lse.double() - want).abs().max() <= eps * want.abs().max()
