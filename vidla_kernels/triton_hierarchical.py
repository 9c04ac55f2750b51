"""Hierarchical attention, forward and backward. Legend: triton_common.py. Who sees whom: layout.py.

Seen from one frame the rule is small. Its query rows are its N patches, then the G summary rows (CLS and MST) as far as
they look at this frame; its keys are its N patches, then the summary keys that patches see. All of these rows see all of
the frame's patches, and patch rows see the summary keys besides. So a frame is a dense (N + G) x (N + G) attention whose
last corner, summary rows by summary keys, is hidden. That corner is attention over summary tokens alone; it doesn't belong
to a frame and is done once a head by the small kernel that also joins the frames.

Forward: three cuts of the same work, by the shape of a frame and the architecture (tiles.py), and a kernel that joins.
  _walk_kernel      Frames of up to 64 rows (B/32: 49 + 13). Owns consecutive frames of one (head, batch), all of them where
                    the batch fills the GPU; a frame is one tile of rows by one of keys, read once, the next frame on its way
                    meanwhile. Patch rows start anew in each frame. Summary rows carry their softmax from frame to frame in
                    registers, the first program's from the summary corner on: with one program a head nothing is left to join.
  _resident_kernel  Frames of two row tiles, on wgmma (B/16: 196 + 13 rows by 196 + 12 keys, tiled 128, 128 by 128, 64, 16).
                    Owns one (frame, head, batch). Reads q, keys and values once into shared memory, where wgmma takes its
                    operands. A row tile folds a key tile at a time, the last two together.
  _stream_kernel    All others, and mma.sync, which would copy resident keys to registers. Owns one tile of query rows of one
                    (frame, head, batch) and walks over the frame's keys, the masked tail first; the row tiles of a frame lie
                    next to each other in the grid and share its keys through L2.
  _combine_kernel   Owns a tile of summary rows of one (head, batch): the summary corner, then the programs' shares, in order.
  Patch keys carry no mask; what is left of the frame and the summary keys form the tail, which does where it must. A score
  costs one fused multiply-add before its exponential: maxima are taken before scaling, all is in base 2. For a summary row
  the kernels write a share of the softmax in place of a result: its output among these keys, divided and rounded like any
  output, and its log-sum-exp. So all rows of a tile end alike, and summary rows cost no pass of their own.

Backward, P recomputed from the log-sum-exp that the forward saved. A pair is hidden by an lse of 10^30, which makes its P
zero, so main loops carry no masks. delta = rowsum(dO * O) = rowsum(P * dP) never has a pass of its own.
  Frames whose N + G rows fit one tile (B/32), where tiles.py has that tile:
  _frames_kernel    Owns several frames of one (head, batch) and walks over them; the next frame arrives meanwhile. Reads q,
                    k, v, dO of a frame once, makes all five products of the tile, and so dQ, dK, dV. The tile holds all keys
                    of a patch row: its delta comes from P and dP, and O is read for summary rows only. What summary rows and
                    keys gain is summed over frames in registers (KEEP), or written frame by frame where these are short.
  Larger frames, where dQ, dK and dV of a frame exceed the registers of a multiprocessor, in two:
  _rows_kernel      Owns a tile of query rows of one (frame, head, batch) and walks over the frame's keys.
                    delta from O; it and lse are left for the next kernel in the order of the tile's rows. dQ of its rows.
  _keys_kernel      Owns a tile of keys of one (frame, head, batch) and walks over the frame's rows; dK, dV of its keys.
  Then for both:
  _finish_kernel    Owns a tile of summary tokens of one (head, batch): the gradients of the summary corner, then the parts
                    that the frames left, in their order: dQ of summary rows, dK and dV of summary keys.

Reduction: every element has one owner, what is summed over frames is summed in frame order. No atomics, the same bits every
run. Shares of summary tokens take B*H*T*G output rows in the forward (fewer in the walk) and at most 3*B*H*T*G*D floats in
the backward: linear in T.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import tiles
from . import triton_common as common
from .layout import TokenLayout

# Where a program works; rows, keys and tiles of a frame.


@triton.jit
def _query_rows(r, f, p_rows, N: tl.constexpr, G: tl.constexpr):
    """Query rows r of frame f, patches before summary rows: their tokens, and whether they attend to the frame.

    p_rows holds (first summary key, end, stride of frames) of every summary row, from TokenLayout.summary_rows.
    """
    g = r - N
    m_g = (g >= 0) & (g < G)
    stride = tl.load(p_rows + 3 * g + 2, mask=m_g, other=1)
    return tl.where(r < N, G + f * N + r, g), (r < N) | (m_g & (f % stride == 0))


@triton.jit
def _head(i_bh, H):
    """Indices of (batch, head), batch and head, in int64 for what is multiplied with them. Divided before that: in 64 bits
    a division is a function call, whose calling convention costs the whole kernel registers."""
    return i_bh.to(tl.int64), (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)


@triton.jit
def _frame(i_bf, T, H):
    """Frame, and indices of (batch, head, frame), (batch, head), batch and head."""
    i_bh, i_b, i_h = _head(i_bf // T, H)
    return i_bf % T, i_bf.to(tl.int64), i_bh, i_b, i_h


@triton.jit
def _opaque(n: tl.constexpr, T):
    """n, which the compiler cannot know (T >= 1): it would inline a loop of one trip, after which the operands of whole and
    tail tiles live side by side and spill."""
    return tl.minimum(n, T * n)


@triton.jit
def _key_tokens(c, f, N: tl.constexpr, G: tl.constexpr, FIRST: tl.constexpr):
    """Tokens of keys c of frame f: its patches, then the summary keys that patches see."""
    return tl.where(c < N, G + f * N + c, c - N + FIRST)


@triton.jit
def _load(p, o_row, m_row, D: tl.constexpr, BD: tl.constexpr):
    """(rows, BD) tile of rows that start at p + o_row; zeros in padding and where m_row is false. m_row None: no mask."""
    d = tl.arange(0, BD)
    p = p + o_row[:, None] + d[None]
    if D < BD:
        m = (d < D)[None]
        if m_row is not None:
            m = m & m_row[:, None]
        x = tl.load(p, mask=m, other=0.0)
    elif m_row is not None:
        x = tl.load(p, mask=m_row[:, None], other=0.0)
    else:
        x = tl.load(p)
    return x


@triton.jit
def _store(p, o_row, x, m_row, D: tl.constexpr, BD: tl.constexpr):
    """Store the rows of an fp32 tile where m_row is true, rounded to the memory's dtype."""
    d = tl.arange(0, BD)
    m = m_row[:, None]
    if D < BD:
        m = m & (d < D)[None]
    tl.store(p + o_row[:, None] + d[None], common.to(x, p.dtype.element_ty), mask=m)


# Forward. `visible` is None where every row of the tile sees every key.


@triton.jit
def _offsets(token, S_T: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of tokens of one clip. In 32 bits and by a constant, so that most of them become immediates."""
    if WIDE:
        token = token.to(tl.int64)
    return token * S_T


@triton.jit
def _read(p, o_row, m_row, COLS: tl.constexpr):
    """Rows that start at p + o_row as tiles of columns COLS[i]..COLS[i+1]. Zeros where m_row is false; None: no mask."""
    b = ()
    for i in tl.static_range(len(COLS) - 1):
        p_i = p + o_row[:, None] + (COLS[i] + tl.arange(0, COLS[i + 1] - COLS[i]))[None]
        if m_row is None:
            b = b + (tl.load(p_i),)
        else:
            b = b + (tl.load(p_i, mask=m_row[:, None], other=0.0),)
    return b


@triton.jit
def _finish_rows(p_row, p_lse, acc, m, l, m_row, dtype: tl.constexpr, COLS: tl.constexpr):
    """Write rows that have seen all their keys: output divided by the sum, and the log-sum-exp. None: no mask.

    A row that has seen nothing (l = 0, acc = 0) becomes zeros with a log-sum-exp of HIDDEN.
    """
    l = tl.maximum(l, 1e-30)
    share = 1.0 / l
    for i in tl.static_range(len(COLS) - 1):
        p_i = p_row[:, None] + (COLS[i] + tl.arange(0, COLS[i + 1] - COLS[i]))[None]
        b_o = common.to(acc[i] * share[:, None], dtype)
        if m_row is None:
            tl.store(p_i, b_o)
        else:
            tl.store(p_i, b_o, mask=m_row[:, None])
    tl.store(p_lse, m + common.log2(l), mask=m_row)


@triton.jit
def _scores(b_q, b_k, visible, PRECISION: tl.constexpr):
    """q @ k^T, not scaled; HIDDEN where not visible. `visible` is None where every row sees every key."""
    s = common.dot(b_q[0], tl.trans(b_k[0]), PRECISION)
    for i in tl.static_range(1, len(b_q)):
        s += common.dot(b_q[i], tl.trans(b_k[i]), PRECISION)
    if visible is not None:
        s = tl.where(visible, s, common.HIDDEN)
    return s


@triton.jit
def _accumulate(acc, shrink, p, b_v, PRECISION: tl.constexpr):
    """acc * shrink + p @ v, tile by tile of columns."""
    b = ()
    for i in tl.static_range(len(b_v)):
        b = b + (acc[i] * shrink[:, None] + common.dot(common.to(p, b_v[i].dtype), b_v[i], PRECISION),)
    return b


@triton.jit
def _softmax_step(s, b_v, acc, m, l, scale2, PRECISION: tl.constexpr):
    """Fold the scores of one tile of keys into the running softmax: maximum m in base 2, sum l, output acc not yet divided.

    The maximum is taken before scaling (scale2 > 0), so that scaling and subtracting it are one instruction a score.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * scale2)
    p = tl.exp2(s * scale2 - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    return _accumulate(acc, shrink, p, b_v, PRECISION), m_new, l * shrink + tl.sum(p, 1)


@triton.jit
def _no_keys_yet(ROWS: tl.constexpr, COLS: tl.constexpr):
    """acc, m, l of rows that have seen nothing."""
    acc = ()
    for i in tl.static_range(len(COLS) - 1):
        acc = acc + (tl.zeros([ROWS, COLS[i + 1] - COLS[i]], tl.float32),)
    return acc, tl.full([ROWS], common.HIDDEN, tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def _frame_queries(p_frame, r, f, N: tl.constexpr, G: tl.constexpr, S_T: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Query rows r of frame f, patches before summary rows; p_frame is the q of its first patch."""
    return _read(p_frame, _offsets(tl.where(r < N, r, r - N - G - f * N), S_T, WIDE), r < N + G, COLS)


@triton.jit
def _frame_keys(
    p_frame,
    s_c,
    f,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    S_T: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Keys and values FROM..TO of frame f: its patches, then the summary keys patches see, zeros behind them."""
    c = FROM + tl.arange(0, TO - FROM)
    m_c = None
    if TO > N + G - FIRST:
        m_c = c < N + G - FIRST
    if TO <= N:
        o_c = _offsets(c, S_T, WIDE)
    else:
        o_c = _offsets(tl.where(c < N, c, c - N + FIRST - G - f * N), S_T, WIDE)
    return _read(p_frame, o_c, m_c, COLS), _read(p_frame + s_c, o_c, m_c, COLS)


@triton.jit
def _frame_rows(
    p_out, p_lse, p_part, p_part_lse, f, i_bf, i_bh, i_b, i_h, r, T, H, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr
):
    """Where rows r of frame f are written: patches into the output, summary rows into the frame's shares."""
    S = G + T * N
    p_o = p_out + ((i_b * S + G + f * N) * H + i_h) * D + r * (H * D)
    p_l = p_lse + i_bh * S + G + f * N + r
    # The compiler loses sight of the rows' alignment here, and without it stores number by number.
    p_row = tl.multiple_of(tl.where(r < N, p_o, p_part + i_bf * G * D + (r - N) * D), 16)
    return p_row, tl.where(r < N, p_l, p_part_lse + i_bf * G + (r - N))


@triton.jit
def _attend(b_q, b_k, b_v, visible, scale2, PRECISION: tl.constexpr):
    """Softmax of a tile of rows over all key tiles, which lie on chip. `visible` masks the last of them only.

    The last tile is small (what is left of the patches, the summary keys) and shares its rescaling with the one before.
    """
    n: tl.constexpr = len(b_k)
    acc = ()
    m = 0.0
    l = 0.0
    for i in tl.static_range(n - 1):
        s = _scores(b_q, b_k[i], None, PRECISION)
        top = tl.max(s, 1)
        if i == n - 2:
            s_last = _scores(b_q, b_k[n - 1], visible, PRECISION)
            top = tl.maximum(top, tl.max(s_last, 1))
        m_new = top * scale2
        if i > 0:
            m_new = tl.maximum(m, m_new)
        p = tl.exp2(s * scale2 - m_new[:, None])
        if i == 0:
            for j in tl.static_range(len(b_q)):
                acc = acc + (common.dot(common.to(p, b_q[0].dtype), b_v[0][j], PRECISION),)
            l = tl.sum(p, 1)
        else:
            shrink = tl.exp2(m - m_new)
            acc = _accumulate(acc, shrink, p, b_v[i], PRECISION)
            l = l * shrink + tl.sum(p, 1)
        if i == n - 2:
            p_last = tl.exp2(s_last * scale2 - m_new[:, None])
            l += tl.sum(p_last, 1)
            total = ()
            for j in tl.static_range(len(b_q)):
                total = total + (acc[j] + common.dot(common.to(p_last, b_q[0].dtype), b_v[n - 1][j], PRECISION),)
            acc = total
        m = m_new
    return acc, m, l


@triton.jit(do_not_specialize=["T"])
def _resident_kernel(
    p_qkv,  # (B, S, 3, H, D), strides s_b, S_T, s_c, s_h
    p_out,  # (B, S, H, D)
    p_lse,  # (B, H, S)
    p_part,  # (B, H, T, G, D)
    p_part_lse,  # (B, H, T, G)
    s_b,
    s_c,
    s_h,
    scale,
    T,
    H: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    S_T: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,  # edges of the row tiles
    KEYS: tl.constexpr,  # edges of the key tiles
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    f, i_bf, i_bh, i_b, i_h = _frame(tl.program_id(0), T, H)
    p_q = p_qkv + i_b * s_b + i_h * s_h + _offsets(G + f * N, S_T, WIDE)
    scale2 = scale * common.LOG2E

    b_q = ()
    for i in tl.static_range(len(ROWS) - 1):
        r = ROWS[i] + tl.arange(0, ROWS[i + 1] - ROWS[i])
        if ROWS[i + 1] <= N:
            b_q = b_q + (_read(p_q, _offsets(r, S_T, WIDE), None, COLS),)
        else:
            b_q = b_q + (_frame_queries(p_q, r, f, N, G, S_T, COLS, WIDE),)
    b_k = ()
    b_v = ()
    for i in tl.static_range(len(KEYS) - 1):
        b_ki, b_vi = _frame_keys(p_q + s_c, s_c, f, KEYS[i], KEYS[i + 1], N, G, FIRST, S_T, COLS, WIDE)
        b_k = b_k + (b_ki,)
        b_v = b_v + (b_vi,)

    c = KEYS[len(KEYS) - 2] + tl.arange(0, KEYS[len(KEYS) - 1] - KEYS[len(KEYS) - 2])
    for i in tl.static_range(len(ROWS) - 1):
        r = ROWS[i] + tl.arange(0, ROWS[i + 1] - ROWS[i])
        if ROWS[i + 1] <= N:  # patches only
            visible = None
            if KEYS[len(KEYS) - 1] > N + G - FIRST:
                visible = (c < N + G - FIRST)[None]
            acc, m, l = _attend(b_q[i], b_k, b_v, visible, scale2, PRECISION)
            p_row, p_l = _frame_rows(p_out, p_lse, p_part, p_part_lse, f, i_bf, i_bh, i_b, i_h, r, T, H, N, G, D)
            _finish_rows(p_row, p_l, acc, m, l, None, p_out.dtype.element_ty, COLS)
        else:
            visible = (c < N + G - FIRST)[None] & ((r < N)[:, None] | (c < N)[None])
            acc, m, l = _attend(b_q[i], b_k, b_v, visible, scale2, PRECISION)
            p_row, p_l = _frame_rows(p_out, p_lse, p_part, p_part_lse, f, i_bf, i_bh, i_b, i_h, r, T, H, N, G, D)
            _finish_rows(p_row, p_l, acc, m, l, r < N + G, p_out.dtype.element_ty, COLS)


@triton.jit(do_not_specialize=["T"])
def _stream_kernel(
    p_qkv,
    p_out,
    p_lse,
    p_part,
    p_part_lse,
    s_b,
    s_c,
    s_h,
    scale,
    T,
    H: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    S_T: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,  # key tiles of patches only
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (N + G + ROWS - 1) // ROWS
    f, i_bf, i_bh, i_b, i_h = _frame(tl.program_id(0) // TILES, T, H)
    p_q = p_qkv + i_b * s_b + i_h * s_h + _offsets(G + f * N, S_T, WIDE)
    p_k = p_q + s_c
    scale2 = scale * common.LOG2E

    r = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    b_q = _frame_queries(p_q, r, f, N, G, S_T, COLS, WIDE)
    acc, m, l = _no_keys_yet(ROWS, COLS)
    # The tail first: its loads share their latency with those of q and of the pipeline. Rows that see none of it are put right
    # by the patches: exp2(HIDDEN - m) = 0.
    for o in tl.static_range(WHOLE * KEYS, N + G - FIRST, TAIL):
        c = o + tl.arange(0, TAIL)
        b_kt, b_vt = _frame_keys(p_k, s_c, f, o, o + TAIL, N, G, FIRST, S_T, COLS, WIDE)
        visible = (c < N + G - FIRST)[None] & ((r < N)[:, None] | (c < N)[None])
        acc, m, l = _softmax_step(_scores(b_q, b_kt, visible, PRECISION), b_vt, acc, m, l, scale2, PRECISION)
    o_k = _offsets(tl.arange(0, KEYS), S_T, WIDE)
    for i in tl.range(0, _opaque(WHOLE, T), num_stages=STAGES):
        p_ki = p_k + _offsets(i * KEYS, S_T, WIDE)
        b_k = _read(p_ki, o_k, None, COLS)
        b_v = _read(p_ki + s_c, o_k, None, COLS)
        acc, m, l = _softmax_step(_scores(b_q, b_k, None, PRECISION), b_v, acc, m, l, scale2, PRECISION)
    p_row, p_l = _frame_rows(p_out, p_lse, p_part, p_part_lse, f, i_bf, i_bh, i_b, i_h, r, T, H, N, G, D)
    _finish_rows(p_row, p_l, acc, m, l, r < N + G, p_out.dtype.element_ty, COLS)


@triton.jit
def _summary_scores(
    p_q,
    s_c,
    b_q,
    o_key,
    row,
    m_row,
    p_rows,
    G: tl.constexpr,
    KEYS: tl.constexpr,
    S_T: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of summary rows `row` by summary keys o_key..o_key+KEYS, and those keys' values. p_q: q of token 0."""
    c = o_key + tl.arange(0, KEYS)
    o_c = _offsets(c, S_T, WIDE)
    b_k = _read(p_q + s_c, o_c, c < G, COLS)
    b_v = _read(p_q + 2 * s_c, o_c, c < G, COLS)
    first = tl.load(p_rows + 3 * row, mask=m_row, other=0)
    end = tl.load(p_rows + 3 * row + 1, mask=m_row, other=0)
    return _scores(b_q, b_k, (c[None] >= first[:, None]) & (c[None] < end[:, None]), PRECISION), b_v


@triton.jit(do_not_specialize=["T", "SPAN"])
def _walk_kernel(
    p_qkv,
    p_out,
    p_lse,
    p_part,  # (B, H, programs of a head, G, D)
    p_part_lse,
    p_rows,  # (G, 3)
    s_b,
    s_c,
    s_h,
    scale,
    T,
    SPAN,  # frames a program walks over
    H: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    S_T: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SPANS = tl.cdiv(T, SPAN)
    i_span = tl.program_id(0) % SPANS
    i_bh, i_b, i_h = _head(tl.program_id(0) // SPANS, H)
    S = G + T * N
    p_q = p_qkv + i_b * s_b + i_h * s_h
    scale2 = scale * common.LOG2E

    # Tokens of rows and keys in frame 0, and how far they move from frame to frame.
    r = tl.arange(0, ROWS)
    patch = r < N
    g = r - N
    m_g = (g >= 0) & (g < G)
    c = tl.arange(0, KEYS)
    token_r, step_r = tl.where(patch, G + r, g), tl.where(patch, N, 0)
    token_c, step_c = tl.where(c < N, G + c, c - N + FIRST), tl.where(c < N, N, 0)
    m_c = c < N + G - FIRST
    visible = m_c[None] & (patch[:, None] | (c < N)[None])
    stride = tl.load(p_rows + 3 * g + 2, mask=m_g, other=1)

    acc, m, l = _no_keys_yet(ROWS, COLS)
    if i_span == 0:  # the summary rows' first keys are the summary tokens
        b_g = _read(p_q, _offsets(token_r, S_T, WIDE), m_g, COLS)
        s, b_vg = _summary_scores(p_q, s_c, b_g, 0, g, m_g, p_rows, G, KEYS, S_T, COLS, WIDE, PRECISION)
        acc, m, l = _softmax_step(s, b_vg, acc, m, l, scale2, PRECISION)
    for f in tl.range(i_span * SPAN, tl.minimum((i_span + 1) * SPAN, T), num_stages=STAGES):
        o_c = _offsets(token_c + f * step_c, S_T, WIDE)
        b_q = _read(p_q, _offsets(token_r + f * step_r, S_T, WIDE), patch | m_g, COLS)
        b_k = _read(p_q + s_c, o_c, m_c, COLS)
        b_v = _read(p_q + 2 * s_c, o_c, m_c, COLS)
        s = _scores(b_q, b_k, visible, PRECISION)
        # Patch rows start anew in every frame. A row that does not see the frame keeps its state: exp2(s - 1e30) = 0.
        sees = patch | (m_g & (f % stride == 0))
        m_new = tl.max(s, 1) * scale2
        m_new = tl.where(patch, m_new, tl.where(sees, tl.maximum(m, m_new), m))
        p = tl.exp2(s * scale2 - tl.where(sees, m_new, -common.HIDDEN)[:, None])
        shrink = tl.where(patch, 0.0, tl.exp2(m - m_new))
        acc = _accumulate(acc, shrink, p, b_v, PRECISION)
        l = l * shrink + tl.sum(p, 1)
        m = m_new
        token = token_r + f * step_r
        p_row = p_out + (i_b * S * H + i_h) * D + _offsets(token, H * D, WIDE)
        _finish_rows(p_row, p_lse + i_bh * S + token, acc, m, l, patch, p_out.dtype.element_ty, COLS)
    i_part = i_bh * SPANS + i_span
    p_row = p_part + i_part * G * D + g * D
    p_l = p_part_lse + i_part * G + g
    if SPANS == 1:
        p_row = p_out + (i_b * S * H + i_h) * D + _offsets(token_r, H * D, WIDE)
        p_l = p_lse + i_bh * S + token_r
    _finish_rows(p_row, p_l, acc, m, l, m_g, p_out.dtype.element_ty, COLS)


@triton.jit(do_not_specialize=["T", "PARTS"])
def _combine_kernel(
    p_qkv,
    p_out,
    p_lse,
    p_part,  # (B, H, PARTS, G, D)
    p_part_lse,
    p_rows,
    s_b,
    s_c,
    s_h,
    scale,
    T,
    PARTS,
    H: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S_T: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FRAMES: tl.constexpr,  # parts are frames, and the summary corner is still to be done
):
    TILES: tl.constexpr = (G + ROWS - 1) // ROWS
    i_bh, i_b, i_h = _head(tl.program_id(0) // TILES, H)
    S = G + T * N
    scale2 = scale * common.LOG2E

    g = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    m_g = g < G
    p_part += i_bh * PARTS * (G * D)
    p_part_lse += i_bh * PARTS * G
    stride = 1
    acc, m, l = _no_keys_yet(ROWS, COLS)
    if FRAMES:
        stride = tl.load(p_rows + 3 * g + 2, mask=m_g, other=1)
        p_q = p_qkv + i_b * s_b + i_h * s_h
        b_q = _read(p_q, _offsets(g, S_T, WIDE), m_g, COLS)
        for o in tl.range(0, G, KEYS, num_stages=1):
            s, b_v = _summary_scores(p_q, s_c, b_q, o, g, m_g, p_rows, G, KEYS, S_T, COLS, WIDE, PRECISION)
            acc, m, l = _softmax_step(s, b_v, acc, m, l, scale2, PRECISION)
    for i in tl.range(0, PARTS, num_stages=STAGES):
        sees = m_g & (i % stride == 0)
        b_o = _read(p_part + i * (G * D), g * D, sees, COLS)
        lse = tl.load(p_part_lse + i * G + g, mask=sees, other=common.HIDDEN)
        m_new = tl.maximum(m, lse)
        shrink, weight = tl.exp2(m - m_new), tl.exp2(lse - m_new)
        total = ()
        for j in tl.static_range(len(COLS) - 1):
            total = total + (acc[j] * shrink[:, None] + b_o[j].to(tl.float32) * weight[:, None],)
        acc = total
        l = l * shrink + weight
        m = m_new
    p_row = p_out + (i_b * S * H + i_h) * D + g * (H * D)
    _finish_rows(p_row, p_lse + i_bh * S + g, acc, m, l, m_g, p_out.dtype.element_ty, COLS)


# Backward. `lse` and `delta` come as (rows, 1), and lse as (rows, keys) where some pairs are hidden: a score is hidden by an
# lse of -HIDDEN, which makes P = exp2(score - lse) exactly 0. delta holds the factor scale, and so does dS.


@triton.jit
def _dq_step(q, do, lse, delta, k, v, dq, scale, PRECISION: tl.constexpr):
    """dq += dS @ k. Tiles lie rows x keys."""
    p = tl.exp2(common.dot(q, tl.trans(k), PRECISION) * (scale * common.LOG2E) - lse)
    ds = p * (common.dot(do, tl.trans(v), PRECISION) * scale - delta)
    return dq + common.dot(common.to(ds, k.dtype), k, PRECISION)


@triton.jit
def _dkv_step(k, v, q, do, lse, delta, dk, dv, scale, PRECISION: tl.constexpr):
    """dk += dS^T @ q and dv += P^T @ dO. Tiles lie keys x rows, so nothing is transposed back; lse and delta are (1, rows)."""
    p = tl.exp2(common.dot(k, tl.trans(q), PRECISION) * (scale * common.LOG2E) - lse)
    dv = dv + common.dot(common.to(p, do.dtype), do, PRECISION)
    ds = p * (common.dot(v, tl.trans(do), PRECISION) * scale - delta)
    return dk + common.dot(common.to(ds, q.dtype), q, PRECISION), dv


@triton.jit
def _row_strides(p_rows, r, N: tl.constexpr, G: tl.constexpr):
    """Stride of the frames that query rows r see: of summary rows from p_rows; 1 for patches, which see their own."""
    return tl.load(p_rows + 3 * (r - N) + 2, mask=(r >= N) & (r < N + G), other=1)


@triton.jit
def _row_lse(p_lse, token, stride, r, f, N: tl.constexpr, G: tl.constexpr):
    """lse of query rows r of frame f, and -HIDDEN for summary rows that do not see the frame and for rows behind the last."""
    return tl.where((r < N + G) & (f % stride == 0), tl.load(p_lse + token), -common.HIDDEN)


@triton.jit
def _store_parts(p_part, i_part, dq, dk, dv, g, m_g, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Store the summary rows of a tile's gradients as part i_part."""
    row = i_part.to(tl.int64) * 3 * G + g
    _store(p_part, row * D, dq, m_g, D, BD)
    _store(p_part, (row + G) * D, dk, m_g, D, BD)
    _store(p_part, (row + 2 * G) * D, dv, m_g, D, BD)


@triton.jit(do_not_specialize=["T", "SPAN", "PARTS"])
def _frames_kernel(
    p_qkv,
    p_out,
    p_do,  # (B, S, H, D)
    p_lse,
    p_dqkv,  # (B, S, 3, H, D)
    p_part,  # (B, H, PARTS, 3, G, D) where sums are kept, else (B, H, T, 3, G, D)
    p_rows,
    s_b,
    s_t,
    s_c,
    s_h,
    scale,
    T,
    H,
    SPAN,  # frames that a program walks over
    PARTS,  # programs of a head
    N: tl.constexpr,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_bh, i_b, i_h = _head(tl.program_id(0) // PARTS, H)
    i_part = tl.program_id(0) % PARTS
    S = G + T * N
    p_q = p_qkv + i_b * s_b + i_h * s_h
    p_out += (i_b * S * H + i_h) * D
    p_do += (i_b * S * H + i_h) * D
    p_lse += i_bh * S

    # Row r of the tile, as a query and as a key, is patch r or summary token r - N. Rows behind the last repeat it, hidden.
    r = tl.arange(0, ROWS)
    g = tl.minimum(r - N, G - 1)
    stride = _row_strides(p_rows, r, N, G)
    o_g = tl.maximum(g, 0).to(tl.int64) * (H * D)
    m_g = (r >= N) & (r < N + G)
    delta_g = tl.sum(_load(p_do, o_g, m_g, D, BD).to(tl.float32) * _load(p_out, o_g, m_g, D, BD).to(tl.float32), 1) * scale

    dq = tl.zeros([ROWS, BD], tl.float32)
    dk = tl.zeros([ROWS, BD], tl.float32)
    dv = tl.zeros([ROWS, BD], tl.float32)
    for f in tl.range(i_part * SPAN, tl.minimum(i_part * SPAN + SPAN, T), num_stages=STAGES):
        token = tl.where(r < N, G + f * N + r, g).to(tl.int64)
        b_q = _load(p_q, token * s_t, None, D, BD)
        b_k = _load(p_q + s_c, token * s_t, None, D, BD)
        b_v = _load(p_q + 2 * s_c, token * s_t, None, D, BD)
        b_do = _load(p_do, token * (H * D), None, D, BD)
        lse = _row_lse(p_lse, token, stride, r, f, N, G)
        lse_g = tl.where(r < N, lse, -common.HIDDEN)[:, None]  # for summary keys, hidden from summary rows
        lse = tl.where((r < N)[None], lse[:, None], tl.where(((r >= N + FIRST) & (r < N + G))[None], lse_g, -common.HIDDEN))

        p = tl.exp2(common.dot(b_q, tl.trans(b_k), PRECISION) * (scale * common.LOG2E) - lse)
        dp = common.dot(b_do, tl.trans(b_v), PRECISION) * scale
        # The tile holds all keys of a patch row, so rowsum(P * dP) is its delta and O need not be read.
        delta = tl.where(r < N, tl.sum(p * dp, 1), delta_g)
        ds = common.to(p * (dp - delta[:, None]), b_q.dtype)
        dv += common.dot(tl.trans(common.to(p, b_q.dtype)), b_do, PRECISION)
        dk += common.dot(tl.trans(ds), b_q, PRECISION)
        dq += common.dot(ds, b_k, PRECISION)

        p_f = p_dqkv + ((i_b * S + G + f * N) * 3 * H + i_h) * D
        _store(p_f, r * (3 * H * D), dq, r < N, D, BD)
        _store(p_f + H * D, r * (3 * H * D), dk, r < N, D, BD)
        _store(p_f + 2 * H * D, r * (3 * H * D), dv, r < N, D, BD)
        if KEEP:
            dq = tl.where((r < N)[:, None], 0.0, dq)
            dk = tl.where((r < N)[:, None], 0.0, dk)
            dv = tl.where((r < N)[:, None], 0.0, dv)
        else:
            _store_parts(p_part, i_bh * T + f, dq, dk, dv, g, m_g, G, D, BD)
            dq = tl.zeros([ROWS, BD], tl.float32)
            dk = tl.zeros([ROWS, BD], tl.float32)
            dv = tl.zeros([ROWS, BD], tl.float32)
    if KEEP:
        _store_parts(p_part, tl.program_id(0), dq, dk, dv, g, m_g, G, D, BD)


@triton.jit(do_not_specialize=["T"])
def _rows_kernel(
    p_qkv,
    p_out,
    p_do,
    p_lse,
    p_stat,  # (B, H, T, 2, PAD): lse and delta of a frame's rows, PAD = TILES * ROWS
    p_dqkv,
    p_part,  # (B, H, T, 3, G, D)
    p_rows,
    s_b,
    s_t,
    s_c,
    s_h,
    scale,
    T,
    H,
    N: tl.constexpr,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (N + G + ROWS - 1) // ROWS
    i_tile = tl.program_id(0) % TILES
    f, i_bf, i_bh, i_b, i_h = _frame(tl.program_id(0) // TILES, T, H)
    S = G + T * N
    o_f = (G + f * N).to(tl.int64)
    p_q = p_qkv + i_b * s_b + i_h * s_h
    p_kf = p_q + s_c + o_f * s_t
    p_out += (i_b * S * H + i_h) * D
    p_do += (i_b * S * H + i_h) * D
    p_stat += i_bf * (2 * TILES * ROWS)

    # Rows behind the last repeat it; what they compute is hidden and not stored.
    r = i_tile * ROWS + tl.arange(0, ROWS)
    token = tl.where(r < N, G + f * N + r, tl.minimum(r - N, G - 1)).to(tl.int64)
    b_q = _load(p_q, token * s_t, None, D, BD)
    b_do = _load(p_do, token * (H * D), None, D, BD)
    delta = tl.sum(b_do.to(tl.float32) * _load(p_out, token * (H * D), None, D, BD).to(tl.float32), 1) * scale
    lse = _row_lse(p_lse + i_bh * S, token, _row_strides(p_rows, r, N, G), r, f, N, G)
    tl.store(p_stat + r, lse)
    tl.store(p_stat + TILES * ROWS + r, delta)
    dq = tl.zeros([ROWS, BD], tl.float32)

    o_k = tl.arange(0, KEYS) * s_t
    for i in tl.range(0, _opaque(N // KEYS, T), num_stages=STAGES):
        b_k = _load(p_kf + i * KEYS * s_t, o_k, None, D, BD)
        b_v = _load(p_kf + i * KEYS * s_t + s_c, o_k, None, D, BD)
        dq = _dq_step(b_q, b_do, lse[:, None], delta[:, None], b_k, b_v, dq, scale, PRECISION)
    lse_g = tl.where(r < N, lse, -common.HIDDEN)[:, None]  # for summary keys, hidden from summary rows
    for o in tl.range(N // KEYS * KEYS, _opaque(N + G - FIRST, T), TAIL, num_stages=1):
        c = o + tl.arange(0, TAIL)
        o_c = _key_tokens(tl.minimum(c, N + G - FIRST - 1), f, N, G, FIRST).to(tl.int64) * s_t
        b_k = _load(p_q + s_c, o_c, None, D, BD)
        b_v = _load(p_q + 2 * s_c, o_c, None, D, BD)
        lse_c = tl.where((c < N)[None], lse[:, None], tl.where((c < N + G - FIRST)[None], lse_g, -common.HIDDEN))
        dq = _dq_step(b_q, b_do, lse_c, delta[:, None], b_k, b_v, dq, scale, PRECISION)

    p_dq = p_dqkv + ((i_b * S + o_f) * 3 * H + i_h) * D
    _store(p_dq, r * (3 * H * D), dq, r < N, D, BD)
    if (i_tile + 1) * ROWS > N:  # the tile has summary rows
        _store(p_part + i_bf * (3 * G * D), (r - N) * D, dq, (r >= N) & (r < N + G), D, BD)


@triton.jit(do_not_specialize=["T"])
def _keys_kernel(
    p_qkv,
    p_do,
    p_stat,
    p_dqkv,
    p_part,
    s_b,
    s_t,
    s_c,
    s_h,
    scale,
    T,
    H,
    N: tl.constexpr,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (N + G - FIRST + KEYS - 1) // KEYS
    i_tile = tl.program_id(0) % TILES
    f, i_bf, _, i_b, i_h = _frame(tl.program_id(0) // TILES, T, H)
    S = G + T * N
    o_f = (G + f * N).to(tl.int64)
    p_q = p_qkv + i_b * s_b + i_h * s_h
    p_qf = p_q + o_f * s_t
    p_do += (i_b * S * H + i_h) * D
    p_dof = p_do + o_f * (H * D)
    p_stat += i_bf * (2 * PAD)

    # Keys behind the last repeat it and are not stored.
    c = i_tile * KEYS + tl.arange(0, KEYS)
    o_c = _key_tokens(tl.minimum(c, N + G - FIRST - 1), f, N, G, FIRST).to(tl.int64) * s_t
    b_k = _load(p_q + s_c, o_c, None, D, BD)
    b_v = _load(p_q + 2 * s_c, o_c, None, D, BD)
    dk = tl.zeros([KEYS, BD], tl.float32)
    dv = tl.zeros([KEYS, BD], tl.float32)

    i_r = tl.arange(0, ROWS)
    for i in tl.range(0, _opaque(N // ROWS, T), num_stages=STAGES):
        b_q = _load(p_qf + i * ROWS * s_t, i_r * s_t, None, D, BD)
        b_do = _load(p_dof + i * ROWS * (H * D), i_r * (H * D), None, D, BD)
        lse = tl.load(p_stat + i * ROWS + i_r)[None]
        delta = tl.load(p_stat + PAD + i * ROWS + i_r)[None]
        dk, dv = _dkv_step(b_k, b_v, b_q, b_do, lse, delta, dk, dv, scale, PRECISION)
    for o in tl.range(N // ROWS * ROWS, _opaque(N + G, T), TAIL, num_stages=1):
        r = o + tl.arange(0, TAIL)
        token = tl.where(r < N, G + f * N + r, tl.minimum(r - N, G - 1)).to(tl.int64)
        b_q = _load(p_q, token * s_t, None, D, BD)
        b_do = _load(p_do, token * (H * D), None, D, BD)
        lse = tl.load(p_stat + r, mask=r < N + G, other=-common.HIDDEN)
        delta = tl.load(p_stat + PAD + r, mask=r < N + G, other=0.0)[None]
        lse = tl.where((c < N)[:, None], lse[None], tl.where(r < N, lse, -common.HIDDEN)[None])
        dk, dv = _dkv_step(b_k, b_v, b_q, b_do, lse, delta, dk, dv, scale, PRECISION)

    p_dk = p_dqkv + ((i_b * S + o_f) * 3 * H + H + i_h) * D
    _store(p_dk, c * (3 * H * D), dk, c < N, D, BD)
    _store(p_dk + H * D, c * (3 * H * D), dv, c < N, D, BD)
    if (i_tile + 1) * KEYS > N:
        m_g = (c >= N) & (c < N + G - FIRST)
        p_part += i_bf * (3 * G * D)
        _store(p_part, (c - N + FIRST + G) * D, dk, m_g, D, BD)
        _store(p_part, (c - N + FIRST + 2 * G) * D, dv, m_g, D, BD)


@triton.jit(do_not_specialize=["S", "PARTS"])
def _finish_kernel(
    p_qkv,
    p_out,
    p_do,
    p_lse,
    p_dqkv,
    p_part,  # (B, H, PARTS, 3, G, D)
    p_rows,
    s_b,
    s_t,
    s_c,
    s_h,
    scale,
    S,
    H,
    PARTS,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (G + ROWS - 1) // ROWS
    i_bh, i_b, i_h = _head(tl.program_id(0) // TILES, H)
    p_q = p_qkv + i_b * s_b + i_h * s_h
    p_out += (i_b * S * H + i_h) * D
    p_do += (i_b * S * H + i_h) * D
    p_lse += i_bh * S

    # The tile's tokens x are query rows for dq, and keys for dk and dv; y runs over the other side.
    x = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    m_x = x < G
    first_x = tl.load(p_rows + 3 * x, mask=m_x, other=0)
    end_x = tl.load(p_rows + 3 * x + 1, mask=m_x, other=0)
    lse_x = tl.load(p_lse + x, mask=m_x, other=0.0)
    o_x = x.to(tl.int64)
    b_qx = _load(p_q, o_x * s_t, m_x, D, BD)
    b_kx = _load(p_q + s_c, o_x * s_t, m_x, D, BD)
    b_vx = _load(p_q + 2 * s_c, o_x * s_t, m_x, D, BD)
    b_dox = _load(p_do, o_x * (H * D), m_x, D, BD)
    b_ox = _load(p_out, o_x * (H * D), m_x, D, BD)
    delta_x = tl.sum(b_dox.to(tl.float32) * b_ox.to(tl.float32), 1) * scale
    dq = tl.zeros([ROWS, BD], tl.float32)
    dk = tl.zeros([ROWS, BD], tl.float32)
    dv = tl.zeros([ROWS, BD], tl.float32)

    for o in tl.range(0, G, ROWS, num_stages=1):
        y = o + tl.arange(0, ROWS)
        m_y = y < G
        first_y = tl.load(p_rows + 3 * y, mask=m_y, other=0)
        end_y = tl.load(p_rows + 3 * y + 1, mask=m_y, other=0)
        lse_y = tl.load(p_lse + y, mask=m_y, other=0.0)
        o_y = y.to(tl.int64)
        b_qy = _load(p_q, o_y * s_t, m_y, D, BD)
        b_ky = _load(p_q + s_c, o_y * s_t, m_y, D, BD)
        b_vy = _load(p_q + 2 * s_c, o_y * s_t, m_y, D, BD)
        b_doy = _load(p_do, o_y * (H * D), m_y, D, BD)
        b_oy = _load(p_out, o_y * (H * D), m_y, D, BD)
        delta_y = tl.sum(b_doy.to(tl.float32) * b_oy.to(tl.float32), 1) * scale
        lse = tl.where((y[None] >= first_x[:, None]) & (y[None] < end_x[:, None]), lse_x[:, None], -common.HIDDEN)
        dq = _dq_step(b_qx, b_dox, lse, delta_x[:, None], b_ky, b_vy, dq, scale, PRECISION)
        lse = tl.where((x[:, None] >= first_y[None]) & (x[:, None] < end_y[None]), lse_y[None], -common.HIDDEN)
        dk, dv = _dkv_step(b_kx, b_vx, b_qy, b_doy, lse, delta_y[None], dk, dv, scale, PRECISION)
    for i in tl.range(0, PARTS, num_stages=STAGES):
        row = (i_bh * PARTS + i) * 3 * G + x
        dq += _load(p_part, row * D, m_x, D, BD)
        dk += _load(p_part, (row + G) * D, m_x & (x >= FIRST), D, BD)
        dv += _load(p_part, (row + 2 * G) * D, m_x & (x >= FIRST), D, BD)

    p_dq = p_dqkv + (i_b * S * 3 * H + i_h) * D
    _store(p_dq, o_x * (3 * H * D), dq, m_x, D, BD)
    _store(p_dq + H * D, o_x * (3 * H * D), dk, m_x, D, BD)
    _store(p_dq + 2 * H * D, o_x * (3 * H * D), dv, m_x, D, BD)


# Launchers.


# Programs enough for any GPU: 132 multiprocessors run 2 each, three rounds of them. Small batches cut T to have so many.
_PROGRAMS = 768


@lru_cache(maxsize=64)
def _summary_rows(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """layout.summary_rows where kernels can read it, (G, 3) int32. Cached: a copy to the GPU would wait for it each call."""
    return torch.tensor(layout.summary_rows, dtype=torch.int32, device=device)


def _tail(rest: int, tile: int) -> int:
    """Size of the tiles that cover the `rest` rows behind the whole ones: no larger than needed, 16 at least for tl.dot."""
    return min(tile, max(16, triton.next_power_of_2(rest)))


@lru_cache(maxsize=256)
def _frames_a_program(heads: int, T: int, programs: int) -> int:
    """How many frames a program of `_walk_kernel` walks over: all of them, or fewer where that leaves a GPU idle.

    Args:
        heads: B*H, the programs of one span.
        programs: how many the GPU runs at a time.
    """
    # A round of programs takes its frames, and about one frame's time to start and to end.
    rounds = lambda spans: triton.cdiv(heads * spans, programs) * (triton.cdiv(T, spans) + 1)  # noqa: E731
    return triton.cdiv(T, min(range(1, T + 1), key=rounds))


def _edges(*parts: tuple[int, int]) -> tuple[int, ...]:
    """Edges of consecutive tiles, given as (how many, size)."""
    sizes = [size for count, size in parts for _ in range(count)]
    return (0, *itertools.accumulate(sizes))


def _resident_tiles(tile: tiles.Tile, N: int, G: int, keys: int) -> dict[str, tuple[int, ...]] | None:
    """Edges of the row and key tiles of `_resident_kernel`, or None where a frame does not suit it.

    The rows are at most two tiles. One large key tile, then half ones, lie within the frame's patches; a last one of 16 or 32
    holds what is left of them and the summary keys.
    """
    half = tile.keys // 2
    halves = (N - tile.keys) // half
    rest = keys - tile.keys - halves * half
    if halves < 0 or not 0 < rest <= 32 or 2 * tile.rows < N + G:
        return None
    rows = triton.cdiv(N + G, tile.rows)
    return {"ROWS": _edges((rows, tile.rows)), "KEYS": _edges((1, tile.keys), (halves, half), (1, _tail(rest, half)))}


def forward(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Hierarchical attention of packed queries, keys and values.

    Args:
        qkv: (B, S, 3, H, D), fp16, bf16 or fp32, any strides with D contiguous.
        layout: the order of the tokens and the rule.
        scale: factor on q.k, of either sign.

    Returns:
        out: (B, S, H, D), contiguous, in qkv's dtype.
        lse: (B, H, S) fp32, log-sum-exp of each row's scaled scores in base 2, for the backward.
    """
    B, S, _, H, D = qkv.shape
    T, N, G, first = layout.frames, layout.patches, layout.num_summary, layout.first_key_of_patches
    if scale < 0:  # the kernels take a maximum before they scale
        qkv, scale = torch.cat((-qkv[:, :, :1], qkv[:, :, 1:]), 2), -scale
    scale = max(scale, 1e-20)  # 0 would bring hidden pairs back; at this size every exponential is 1 all the same
    out = torch.empty(B, S, H, D, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=qkv.device)
    s_b, s_t, s_c, s_h = qkv.stride()[:4]
    sizes = dict(
        H=H,
        N=N,
        G=G,
        D=D,
        S_T=s_t,
        COLS=(0, D) if D & (D - 1) == 0 else (0, 64, D),
        WIDE=S * max(s_t, H * D) >= 2**31,
        PRECISION=common.precision(qkv.dtype),
    )
    find = lambda kernel: tiles.lookup("hier_" + kernel, qkv.device, qkv.dtype, D)  # noqa: E731

    def parts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where `count` programs of each head leave their shares of the summary rows: output and log-sum-exp."""
        return (
            torch.empty(B, H, count, G, D, dtype=qkv.dtype, device=qkv.device),
            torch.empty(B, H, count, G, dtype=torch.float32, device=qkv.device),
        )

    def launch(kernel, programs: int, tile: tiles.Tile, *args, **constants) -> None:
        common.launch(kernel, (programs,), qkv, out, lse, *args, **sizes, **constants, **tile.options)

    rows = _summary_rows(layout, qkv.device)
    strides = (s_b, s_c, s_h, scale, T)
    walk, resident = find("forward_walk"), find("forward_resident")
    if walk and walk[0].rows >= N + G:
        tile = walk[0]
        span = _frames_a_program(B * H, T, tile.programs * tiles.multiprocessors(qkv.device))
        count = triton.cdiv(T, span)
        shares = parts(count) if count > 1 else (out, lse)  # not written where one program has all the frames
        edge = max(16, triton.next_power_of_2(N + G))
        launch(
            _walk_kernel,
            B * H * count,
            tile,
            *shares,
            rows,
            *strides,
            span,
            FIRST=first,
            ROWS=edge,
            KEYS=edge,
            STAGES=tile.stages,
        )
        if count == 1:
            return out, lse
    else:
        count, shares = T, parts(T)
        edges = _resident_tiles(resident[0], N, G, N + G - first) if resident else None
        if edges:
            launch(_resident_kernel, B * H * T, resident[0], *shares, *strides, FIRST=first, **edges)
        else:
            tile = find("forward_stream")[0]
            whole, rest = N // tile.keys, N % tile.keys + G - first
            if not rest:
                whole, rest = whole - 1, tile.keys
            launch(
                _stream_kernel,
                B * H * T * triton.cdiv(N + G, tile.rows),
                tile,
                *shares,
                *strides,
                FIRST=first,
                ROWS=tile.rows,
                KEYS=tile.keys,
                WHOLE=whole,
                TAIL=_tail(rest, tile.keys),
                STAGES=tile.stages,
            )
        walk = None
    tile = find("combine")[0]
    launch(
        _combine_kernel,
        B * H * triton.cdiv(G, tile.rows),
        tile,
        *shares,
        rows,
        *strides,
        count,
        ROWS=tile.rows,
        KEYS=tile.keys,
        STAGES=tile.stages,
        FRAMES=not walk,
    )
    return out, lse


def backward(
    grad_out: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, layout: TokenLayout, scale: float
) -> torch.Tensor:
    """Gradient of qkv.

    Args:
        grad_out: (B, S, H, D), contiguous, in qkv's dtype.
        qkv, layout, scale: as in `forward`.
        out, lse: what `forward` returned.

    Returns:
        (B, S, 3, H, D), contiguous, in qkv's dtype.
    """
    B, S, _, H, D = qkv.shape
    T, N, G, first = layout.frames, layout.patches, layout.num_summary, layout.first_key_of_patches
    dqkv = torch.empty(B, S, 3, H, D, dtype=qkv.dtype, device=qkv.device)
    rows = _summary_rows(layout, qkv.device)
    strides = (*qkv.stride()[:4], scale)
    sizes = dict(G=G, FIRST=first, D=D, BD=triton.next_power_of_2(D), PRECISION=common.precision(qkv.dtype))

    whole = tiles.lookup("hier_backward_frames", qkv.device, qkv.dtype, D)
    if whole and whole[0].rows >= N + G:
        tile = whole[0]
        span = triton.cdiv(T, min(T, triton.cdiv(_PROGRAMS, B * H)))
        programs = triton.cdiv(T, span)
        parts = programs if tile.keep else T
        part = torch.empty(B, H, parts, 3, G, D, dtype=torch.float32, device=qkv.device)
        common.launch(
            _frames_kernel,
            (B * H * programs,),
            qkv,
            out,
            grad_out,
            lse,
            dqkv,
            part,
            rows,
            *strides,
            T,
            H,
            span,
            programs,
            N=N,
            **sizes,
            ROWS=tile.rows,
            STAGES=tile.stages,
            KEEP=tile.keep,
            **tile.options,
        )
    else:
        parts = T
        part = torch.empty(B, H, parts, 3, G, D, dtype=torch.float32, device=qkv.device)
        choice = tiles.lookup("hier_backward_rows", qkv.device, qkv.dtype, D)
        tile = min(choice, key=lambda tile: (triton.cdiv(N + G, tile.rows) * tile.rows, -tile.rows))  # the least padding
        n_tiles = triton.cdiv(N + G, tile.rows)
        stat = torch.empty(B, H, T, 2, n_tiles * tile.rows, dtype=torch.float32, device=qkv.device)
        common.launch(
            _rows_kernel,
            (B * H * T * n_tiles,),
            qkv,
            out,
            grad_out,
            lse,
            stat,
            dqkv,
            part,
            rows,
            *strides,
            T,
            H,
            N=N,
            **sizes,
            ROWS=tile.rows,
            KEYS=tile.keys,
            TAIL=_tail(N % tile.keys + G - first, tile.keys),
            STAGES=tile.stages,
            **tile.options,
        )
        choice = tiles.lookup("hier_backward_keys", qkv.device, qkv.dtype, D)
        tile = min(choice, key=lambda tile: (triton.cdiv(N + G - first, tile.keys) * tile.keys, -tile.keys))
        common.launch(
            _keys_kernel,
            (B * H * T * triton.cdiv(N + G - first, tile.keys),),
            qkv,
            grad_out,
            stat,
            dqkv,
            part,
            *strides,
            T,
            H,
            N=N,
            **sizes,
            PAD=stat.shape[-1],
            ROWS=tile.rows,
            KEYS=tile.keys,
            TAIL=_tail(N % tile.rows + G, tile.rows),
            STAGES=tile.stages,
            **tile.options,
        )
    tile = tiles.lookup("hier_finish", qkv.device, qkv.dtype, D)[0]
    common.launch(
        _finish_kernel,
        (B * H * triton.cdiv(G, tile.rows),),
        qkv,
        out,
        grad_out,
        lse,
        dqkv,
        part,
        rows,
        *strides,
        S,
        H,
        parts,
        **sizes,
        ROWS=tile.rows,
        STAGES=tile.stages,
        **tile.options,
    )
    return dqkv
