"""TokenLayout: the rule against Figure 3 written by hand, and against masks built by loops from the paper's equations."""

import random

import numpy as np
import pytest
import torch

from vidla_kernels import TokenLayout

from .cases import random_layout

# Figure 3: N=4 patches, T=4 frames, U=2 levels, V=1 token a level, r=2. Columns: CLS, MST-0, MST-1, then the frames.
FIGURE_3 = """
    1 1 1 1111 1111 1111 1111
    0 1 0 1111 1111 1111 1111
    0 1 1 1111 0000 1111 0000
    0 1 1 1111 0000 0000 0000
    0 1 1 1111 0000 0000 0000
    0 1 1 1111 0000 0000 0000
    0 1 1 1111 0000 0000 0000
    0 1 1 0000 1111 0000 0000
    0 1 1 0000 1111 0000 0000
    0 1 1 0000 1111 0000 0000
    0 1 1 0000 1111 0000 0000
    0 1 1 0000 0000 1111 0000
    0 1 1 0000 0000 1111 0000
    0 1 1 0000 0000 1111 0000
    0 1 1 0000 0000 1111 0000
    0 1 1 0000 0000 0000 1111
    0 1 1 0000 0000 0000 1111
    0 1 1 0000 0000 0000 1111
    0 1 1 0000 0000 0000 1111
"""
FIGURE_3_TUBE = """
    1000 1000 1000 1000
    0100 0100 0100 0100
    0010 0010 0010 0010
    0001 0001 0001 0001
"""


def by_hand(drawing: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in line if c in "01"] for line in drawing.strip().splitlines()])


def test_figure_3():
    layout = TokenLayout(frames=4, patches=4, levels=2, tokens_per_level=1, temporal_scale=2)
    assert torch.equal(layout.mask(), by_hand(FIGURE_3))
    assert torch.equal(layout.tube_mask(), by_hand(FIGURE_3_TUBE).repeat(4, 1))


def by_equations(layout: TokenLayout) -> torch.Tensor:
    """The paper's matrices, entry by entry. M^PATCH's first column is the equation's only with patches_see_cls."""
    T, N, U, V, r = (getattr(layout, f) for f in ("frames", "patches", "levels", "tokens_per_level", "temporal_scale"))
    m_cls = [[True] * (1 + U * V + T * N)]
    m_mst = [
        [False] + [i // V >= j // V for j in range(U * V)] + [(j // N) % r ** (i // V) == 0 for j in range(T * N)]
        for i in range(U * V)
    ]
    m_patch = [[layout.patches_see_cls] + [True] * (U * V) + [i // N == j // N for j in range(T * N)] for i in range(T * N)]
    return torch.tensor(m_cls + m_mst + m_patch)


@pytest.mark.parametrize("number", range(100))
def test_random_layouts_against_the_equations(number, seed):
    layout = random_layout(random.Random(seed))
    print(layout)
    mask = layout.mask()
    assert torch.equal(mask, by_equations(layout))
    tube = [[abs(j - i) % layout.patches == 0 for j in range(layout.num_patches)] for i in range(layout.num_patches)]
    assert torch.equal(layout.tube_mask(), torch.tensor(tube))
    assert layout.visible_pairs == mask.sum()

    # What kernels read says the same: an interval of summary keys and a stride of frames for each summary row.
    G, frame = layout.num_summary, torch.arange(layout.num_patches) // layout.patches
    assert len(layout.summary_rows) == G
    for row, (first, end, stride) in zip(mask, layout.summary_rows, strict=False):
        assert row[:G].nonzero().flatten().tolist() == list(range(first, end))
        assert torch.equal(row[G:], frame % stride == 0)
    assert mask[G:, : layout.first_key_of_patches].sum() == 0
    assert mask[G:, layout.first_key_of_patches : G].all()


def test_sizes_of_the_pretraining_shapes():
    assert TokenLayout(12, 49).seq_len == 601
    assert TokenLayout(12, 196).seq_len == 2365
    assert TokenLayout(32, 196).seq_len == 6285
    assert TokenLayout(12, 196).num_summary == 13


def test_frozen_hashable_and_equal_by_value():
    a, b = TokenLayout(12, 49), TokenLayout(np.int64(12), 49, 3, 4, 2, False)
    assert a == b
    assert hash(a) == hash(b)
    assert type(b.frames) is int
    assert a != TokenLayout(12, 49, patches_see_cls=True)
    with pytest.raises(AttributeError):
        a.frames = 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("frames", 0), ("frames", 1.5), ("frames", None), ("patches", -1), ("patches", "49"), ("levels", -1), ("levels", True)]
    + [("tokens_per_level", 0), ("tokens_per_level", -4), ("temporal_scale", 0), ("patches_see_cls", 1)],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}; it must be"):
        TokenLayout(**({"frames": 4, "patches": 4} | {field: value}))


def test_huge_scale_sees_only_frame_0():
    layout = TokenLayout(frames=8, patches=2, levels=40, tokens_per_level=1, temporal_scale=1000)
    assert torch.equal(layout.mask(), by_equations(layout))


def test_describe_says_what_a_newcomer_asks():
    text = TokenLayout(12, 49).describe()
    for fact in ("601 tokens", "MST level 2", "frames 0, 4, ... (3 of 12)", "40,681"):
        assert fact in text, text
    assert "S=601" in str(TokenLayout(12, 49))
