"""What forward and backward of hierarchical attention in Triton share: a frame, and where a program finds its own.

Seen from one frame the rule is small. Its query rows are its N patches, then the G summary rows (CLS and MST) as far as
they look at this frame; its keys are its N patches, then the summary keys that patches see. All of these rows see all of
the frame's patches, and patch rows see the summary keys besides. So a frame is a dense (N + G) x (N + G) attention whose
last corner, summary rows by summary keys, is hidden. That corner is attention over summary tokens alone; it doesn't belong
to a frame and is done once a head by the small kernel that also joins the frames.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head(i_bh, H):
    """Indices of (batch, head), batch and head, in int64 for what is multiplied with them. Divided before that: in 64 bits
    a division is a function call, whose calling convention costs the whole kernel registers."""
    return i_bh.to(tl.int64), (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)


@triton.jit
def frame(i_bf, T, H):
    """Frame, and indices of (batch, head, frame), (batch, head), batch and head."""
    i_bh, i_b, i_h = head(i_bf // T, H)
    return i_bf % T, i_bf.to(tl.int64), i_bh, i_b, i_h


@triton.jit
def opaque(n: tl.constexpr, T):
    """n, which the compiler cannot know (T >= 1): it would inline a loop of one trip, after which the operands of whole and
    tail tiles live side by side and spill."""
    return tl.minimum(n, T * n)


def tail(rest: int, tile: int) -> int:
    """Size of the tiles that cover the `rest` rows behind the whole ones: no larger than needed, 16 at least for tl.dot."""
    return min(tile, max(16, triton.next_power_of_2(rest)))
