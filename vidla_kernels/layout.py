"""The order of the tokens and the rule of who attends to whom, stated once (paper section 4).

Order:  [CLS] | MST level 0 (V tokens) | ... | MST level U-1 | frame 0 (N patches) | ... | frame T-1 (N patches)

Everything else (masks, kernels, benchmark peers, tests) asks this file: dense code through `visible`, kernels through
`summary_rows` and `first_key_of_patches`, which say the same in a form that costs nothing per score.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch


class SummaryRow(NamedTuple):
    """What one summary token (CLS or MST) sees: summary keys first <= k < end, patches of frames t % stride == 0."""

    first: int
    end: int
    stride: int


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

    def __post_init__(self) -> None:
        if not isinstance(self.patches_see_cls, bool):
            raise ValueError(f"patches_see_cls is {self.patches_see_cls!r}; it must be True or False")
        least = {"frames": 1, "patches": 1, "levels": 0, "tokens_per_level": 0, "temporal_scale": 1}
        for field in fields(self)[:5]:
            value = getattr(self, field.name)
            try:
                if isinstance(value, bool):
                    raise TypeError
                number = operator.index(value)
            except TypeError:
                raise ValueError(f"{field.name} is {value!r}; it must be an integer >= {least[field.name]}") from None
            if number < least[field.name]:
                raise ValueError(f"{field.name} is {number}; it must be >= {least[field.name]}")
            object.__setattr__(self, field.name, number)  # numpy integers become plain ones
        if self.levels and not self.tokens_per_level:
            raise ValueError("tokens_per_level is 0; it must be >= 1 (for no MST at all, levels=0)")

    # Derived quantities, in the paper's symbols.

    @cached_property
    def num_mst(self) -> int:
        """U*V, the number of MST tokens."""
        return self.levels * self.tokens_per_level

    @cached_property
    def num_summary(self) -> int:
        """G = 1 + U*V: CLS and MST together, the first G positions."""
        return 1 + self.num_mst

    @cached_property
    def num_patches(self) -> int:
        """T*N, the number of patch tokens of all frames."""
        return self.frames * self.patches

    @cached_property
    def seq_len(self) -> int:
        """S = 1 + U*V + T*N."""
        return self.num_summary + self.num_patches

    @cached_property
    def frame_strides(self) -> tuple[int, ...]:
        """For each level u the stride of the frames it sees: r**u, or T where r**u is larger (frame 0 alone, either way)."""
        return tuple(min(self.temporal_scale**level, self.frames) for level in range(self.levels))

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

    # The same rule in the form kernels use: per summary row an interval of summary keys and a stride of frames.

    @cached_property
    def summary_rows(self) -> tuple[SummaryRow, ...]:
        """Row g of the sequence's first G: what that CLS or MST token sees."""
        v = self.tokens_per_level
        rows = [SummaryRow(0, self.num_summary, 1)]
        for level, stride in enumerate(self.frame_strides):
            rows += [SummaryRow(1, 1 + (level + 1) * v, stride)] * v
        return tuple(rows)

    @property
    def first_key_of_patches(self) -> int:
        """Patches see the summary keys from this one on: 0 with patches_see_cls, else 1 (they skip CLS)."""
        return 0 if self.patches_see_cls else 1

    @cached_property
    def visible_pairs(self) -> int:
        """Number of visible (query, key) pairs: the scores that hierarchical attention needs, per batch row and head."""
        own_frame = self.num_patches * (self.patches + self.num_summary - self.first_key_of_patches)
        rows = sum(row.end - row.first + -(-self.frames // row.stride) * self.patches for row in self.summary_rows)
        return own_frame + rows

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
