"""The order of the tokens and the rule of who attends to whom, stated once (paper section 4).

Order:  [CLS] | MST level 0 (V tokens) | ... | MST level U-1 | frame 0 (N patches) | ... | frame T-1 (N patches)

Everything else (masks, kernels, benchmark peers, tests) asks this file: dense code through `visible`, kernels through
`summary_rows` and `first_key_of_patches`, which say the same in a form that costs nothing per score.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch


class SummaryRow(NamedTuple):
    """What one summary token (CLS or MST) sees: summary keys first <= k < end, patches of frames t % stride == 0."""

    first: int
    end: int
    stride: int


def _derived() -> Any:
    """A field that `__post_init__` computes: no argument, not compared, not printed."""
    return field(init=False, repr=False, compare=False)


@dataclass(frozen=True)
class TokenLayout:
    """Shape of a video's token sequence and the visibility rule of hierarchical attention. Frozen and hashable.

    Args:
        frames: T >= 1, frames sampled from the clip.
        patches: N >= 1, patches in a frame.
        levels: U >= 0, levels of the temporal hierarchy; 0 means no MST tokens.
        tokens_per_level: V >= 1, MST tokens in a level (ignored, and 0 allowed, when levels is 0).
        temporal_scale: r >= 1; MST of level u look at every r**u-th frame.
        patches_see_cls: False follows the paper's text ("patch and [MST] tokens do not attend to the [CLS] token");
            True follows its equation for M^PATCH, and makes T=1, U=0 exactly CLIP's ViT.

    Raises:
        ValueError: a field is not an integer (bool for patches_see_cls) or lies outside its range.
    """

    frames: int
    patches: int
    levels: int = 3
    tokens_per_level: int = 4
    temporal_scale: int = 2
    patches_see_cls: bool = False

    # Derived quantities, in the paper's symbols. Computed once, and plain attributes because torch.compile traces those.
    num_mst: int = _derived()  # U*V
    num_summary: int = _derived()  # G = 1 + U*V: CLS and MST together, the first G positions
    num_patches: int = _derived()  # T*N, the patch tokens of all frames
    seq_len: int = _derived()  # S = 1 + U*V + T*N
    frame_strides: tuple[int, ...] = _derived()  # for each level u: r**u, or T where r**u is larger (frame 0 alone, both ways)

    # The rule in the form kernels use: for each of the G summary rows an interval of summary keys and a stride of frames,
    # and for all patches the first summary key they see: 0 with patches_see_cls, else 1.
    summary_rows: tuple[SummaryRow, ...] = _derived()
    first_key_of_patches: int = _derived()
    visible_pairs: int = _derived()  # how many (query, key) pairs see each other: the scores needed per batch row and head

    def __post_init__(self) -> None:
        if not isinstance(self.patches_see_cls, bool):
            raise ValueError(f"patches_see_cls is {self.patches_see_cls!r}; it must be True or False")
        least = {"frames": 1, "patches": 1, "levels": 0, "tokens_per_level": 0, "temporal_scale": 1}
        for name in least:
            value = getattr(self, name)
            try:
                if isinstance(value, bool):
                    raise TypeError
                number = operator.index(value)
            except TypeError:
                raise ValueError(f"{name} is {value!r}; it must be an integer >= {least[name]}") from None
            if number < least[name]:
                raise ValueError(f"{name} is {number}; it must be >= {least[name]}")
            object.__setattr__(self, name, number)  # numpy integers become plain ones
        if self.levels and not self.tokens_per_level:
            raise ValueError("tokens_per_level is 0; it must be >= 1 (for no MST at all, levels=0)")
        for name, value in self._derive().items():
            object.__setattr__(self, name, value)

    def _derive(self) -> dict[str, object]:
        T, N, U, V, r = self.frames, self.patches, self.levels, self.tokens_per_level, self.temporal_scale
        G = 1 + U * V
        strides = tuple(min(r**level, T) for level in range(U))
        rows = [SummaryRow(0, G, 1)]  # CLS
        for level, stride in enumerate(strides):
            rows += [SummaryRow(1, 1 + (level + 1) * V, stride)] * V
        first = 0 if self.patches_see_cls else 1
        pairs = T * N * (N + G - first) + sum(row.end - row.first + -(-T // row.stride) * N for row in rows)
        return {
            "num_mst": U * V,
            "num_summary": G,
            "num_patches": T * N,
            "seq_len": G + T * N,
            "frame_strides": strides,
            "summary_rows": tuple(rows),
            "first_key_of_patches": first,
            "visible_pairs": pairs,
        }

    def to_ints(self) -> list[int]:
        """The six numbers that make a layout, as they cross the dispatcher; `from_ints` takes them back."""
        fields = (self.frames, self.patches, self.levels, self.tokens_per_level, self.temporal_scale)
        return [*fields, int(self.patches_see_cls)]

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> TokenLayout:
        return cls(*ints[:5], patches_see_cls=bool(ints[5]))

    # The rule, for one query and key or for whole tensors of them.

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Whether query position q sees key position k in hierarchical attention.

        Args:
            q, k: integer tensors of positions in 0..S-1, broadcastable against each other.

        Returns:
            bool tensor of the broadcast shape. Plain arithmetic on its inputs: it works under vmap, so it serves
            FlexAttention as a mask_mod unchanged.
        """
        summary = self.num_summary
        q_cls, k_cls = q == 0, k == 0
        q_patch, k_patch = q >= summary, k >= summary
        q_mst, k_mst = ~q_cls & ~q_patch, ~k_cls & ~k_patch
        q_frame, k_frame = (q - summary) // self.patches, (k - summary) // self.patches

        # A CLS query sees everything. A patch sees the patches of its own frame and every MST.
        seen = q_cls | (q_patch & (k_mst | (k_patch & (q_frame == k_frame))))
        if self.patches_see_cls:
            seen = seen | (q_patch & k_cls)
        # An MST of level u sees the MST of levels <= u and the patches of every r**u-th frame; never CLS.
        if self.levels:
            q_level, k_level = (q - 1) // self.tokens_per_level, (k - 1) // self.tokens_per_level
            seen = seen | (q_mst & k_mst & (q_level >= k_level))
            for level, stride in enumerate(self.frame_strides):
                seen = seen | (q_mst & (q_level == level) & k_patch & (k_frame % stride == 0))
        return seen

    def tube_visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Whether patch q sees patch k in tube attention (paper: M-tilde, mod(|j-i|, N) = 0); positions in 0..T*N-1."""
        return q % self.patches == k % self.patches

    def mask(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Dense (S, S) bool mask of hierarchical attention, True = visible. For the reference and tests only."""
        position = torch.arange(self.seq_len, device=device)
        return self.visible(position[:, None], position[None])

    def tube_mask(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Dense (T*N, T*N) bool mask of tube attention, True = visible. For the reference and tests only."""
        position = torch.arange(self.num_patches, device=device)
        return self.tube_visible(position[:, None], position[None])

    def describe(self) -> str:
        """The layout in words: token order, sizes, and a table of who sees whom."""
        lines = [
            f"{self.frames} frames x {self.patches} patches + {self.num_summary} summary tokens = {self.seq_len} tokens",
            f"  position 0: CLS sees everything ({self.seq_len} keys)",
        ]
        for level, stride in enumerate(self.frame_strides):
            first = 1 + level * self.tokens_per_level
            row = self.summary_rows[first]
            seen = -(-self.frames // stride)
            which = (
                "every frame"
                if stride == 1
                else f"frames 0, {stride}, ... ({seen} of {self.frames})"
                if seen > 1
                else "frame 0"
            )
            lines.append(
                f"  positions {first}..{first + self.tokens_per_level - 1}: MST level {level} sees MST of levels 0..{level} "
                f"and the patches of {which} ({row.end - row.first + seen * self.patches} keys)"
            )
        extra = " and CLS" if self.patches_see_cls else ""
        mst = f" and {self.num_mst} MST" if self.num_mst else ""
        keys = self.patches + self.num_summary - self.first_key_of_patches
        lines.append(
            f"  positions {self.num_summary}..{self.seq_len - 1}: a patch sees its own frame{mst}{extra} ({keys} keys); "
            f"in tube attention its place in every frame ({self.frames} keys)"
        )
        share = self.visible_pairs / self.seq_len**2
        lines.append(f"  {self.visible_pairs:,} of {self.seq_len**2:,} query-key pairs are visible ({share:.1%})")
        return "\n".join(lines)

    def __str__(self) -> str:
        return (
            f"TokenLayout({self.frames} frames x {self.patches} patches, {self.levels} levels of "
            f"{self.tokens_per_level} MST, temporal scale {self.temporal_scale}, S={self.seq_len}"
            f"{', patches see CLS' if self.patches_see_cls else ''})"
        )


@cache
def summary_table(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """`layout.summary_rows` where kernels can read it, (G, 3) int32. A copy to the GPU would wait for it in each call.

    Kept for good: a captured CUDA graph has its address.
    """
    return torch.tensor(layout.summary_rows, dtype=torch.int32, device=device)
