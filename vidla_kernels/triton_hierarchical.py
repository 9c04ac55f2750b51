"""Hierarchical attention, forward. Legend: triton_common.py. A frame's rows and keys: triton_frames.py. Backward:
triton_hierarchical_backward.py. Who sees whom: layout.py.

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
                    next to each other in the grid and share its keys through L2. Where few rows lie behind a frame's whole
                    tiles (L/14: 13 behind 2 x 128), a program beside them owns those of several frames, a frame for each of
                    its warps: in a tile of their own they would cost as much as 128 patches.
  _combine_kernel   Owns a tile of summary rows of one (head, batch): the summary corner, then the programs' shares, in order.
  Patch keys carry no mask; what is left of the frame and the summary keys form the tail, which does where it must. A score
  costs one fused multiply-add before its exponential: maxima are taken before scaling, all is in base 2. For a summary row
  the kernels write a share of the softmax in place of a result: its output among these keys, divided and rounded like any
  output, and its log-sum-exp. So all rows of a tile end alike, and summary rows cost no pass of their own.

Reduction: every element has one owner, what is summed over frames is summed in frame order. No atomics, the same bits every
run. Shares of summary tokens take B*H*T*G output rows, fewer in the walk: linear in T.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import tiles
from . import triton_common as common
from . import triton_frames as frames
from .layout import TokenLayout, summary_table

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


# The steps of the softmax take tiles of rows of one frame, (rows, columns), or of several frames, (frames, rows, columns).


@triton.jit
def _transposed(x):
    """Rows and columns exchanged, of each frame where there are several."""
    if len(x.shape) == 3:
        y = tl.trans(x, 0, 2, 1)
    else:
        y = tl.trans(x)
    return y


@triton.jit
def _scores(b_q, b_k, visible, PRECISION: tl.constexpr):
    """q @ k^T, not scaled; HIDDEN where not visible. `visible` is None where every row sees every key."""
    s = common.dot(b_q[0], _transposed(b_k[0]), PRECISION)
    for i in tl.static_range(1, len(b_q)):
        s += common.dot(b_q[i], _transposed(b_k[i]), PRECISION)
    if visible is not None:
        s = tl.where(visible, s, common.HIDDEN)
    return s


@triton.jit
def _accumulate(acc, shrink, p, b_v, PRECISION: tl.constexpr):
    """acc * shrink + p @ v, tile by tile of columns."""
    b = ()
    for i in tl.static_range(len(b_v)):
        b = b + (acc[i] * tl.expand_dims(shrink, -1) + common.dot(common.to(p, b_v[i].dtype), b_v[i], PRECISION),)
    return b


@triton.jit
def _softmax_step(s, b_v, acc, m, l, scale2, PRECISION: tl.constexpr):
    """Fold the scores of one tile of keys into the running softmax: maximum m in base 2, sum l, output acc not yet divided.

    The maximum is taken before scaling (scale2 > 0), so that scaling and subtracting it are one instruction a score.
    """
    m_new = tl.maximum(m, tl.max(s, -1) * scale2)
    p = tl.exp2(s * scale2 - tl.expand_dims(m_new, -1))
    shrink = tl.exp2(m - m_new)
    return _accumulate(acc, shrink, p, b_v, PRECISION), m_new, l * shrink + tl.sum(p, -1)


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
    f, i_bf, i_bh, i_b, i_h = frames.frame(tl.program_id(0), T, H)
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


@triton.jit
def _row_tile(
    p_qkv,
    p_out,
    p_lse,
    p_part,
    p_part_lse,
    s_b,
    s_c,
    s_h,
    scale2,
    T,
    i_frame,
    i_tile,
    H: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    S_T: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    TAIL: tl.constexpr,
    PATCHES: tl.constexpr,  # the tile has no other rows
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Row tile i_tile of a frame, over all of the frame's keys."""
    f, i_bf, i_bh, i_b, i_h = frames.frame(i_frame, T, H)
    p_q = p_qkv + i_b * s_b + i_h * s_h + _offsets(G + f * N, S_T, WIDE)
    p_k = p_q + s_c

    r = i_tile * ROWS + tl.arange(0, ROWS)
    m_r = None
    if PATCHES:
        b_q = _read(p_q, _offsets(r, S_T, WIDE), None, COLS)
    else:
        m_r = r < N + G
        b_q = _frame_queries(p_q, r, f, N, G, S_T, COLS, WIDE)
    acc, m, l = _no_keys_yet(ROWS, COLS)
    # The tail first: its loads share their latency with those of q and of the pipeline. Rows that see none of it are put right
    # by the patches: exp2(HIDDEN - m) = 0.
    for o in tl.static_range(WHOLE * KEYS, N + G - FIRST, TAIL):
        c = o + tl.arange(0, TAIL)
        b_kt, b_vt = _frame_keys(p_k, s_c, f, o, o + TAIL, N, G, FIRST, S_T, COLS, WIDE)
        visible = (c < N + G - FIRST)[None]
        if not PATCHES:
            visible = visible & ((r < N)[:, None] | (c < N)[None])
        acc, m, l = _softmax_step(_scores(b_q, b_kt, visible, PRECISION), b_vt, acc, m, l, scale2, PRECISION)
    o_k = _offsets(tl.arange(0, KEYS), S_T, WIDE)
    for i in tl.range(0, frames.opaque(WHOLE, T), num_stages=STAGES):
        p_ki = p_k + _offsets(i * KEYS, S_T, WIDE)
        b_k = _read(p_ki, o_k, None, COLS)
        b_v = _read(p_ki + s_c, o_k, None, COLS)
        acc, m, l = _softmax_step(_scores(b_q, b_k, None, PRECISION), b_v, acc, m, l, scale2, PRECISION)
    p_row, p_l = _frame_rows(p_out, p_lse, p_part, p_part_lse, f, i_bf, i_bh, i_b, i_h, r, T, H, N, G, D)
    _finish_rows(p_row, p_l, acc, m, l, m_r, p_out.dtype.element_ty, COLS)


@triton.jit
def _read_each(p, o_row, m_row, COLS: tl.constexpr):
    """`_read` in several frames: rows that start at p[:, None] + o_row."""
    b = ()
    for i in tl.static_range(len(COLS) - 1):
        p_i = p[:, None, None] + (o_row[:, :, None] + (COLS[i] + tl.arange(0, COLS[i + 1] - COLS[i]))[None, None])
        if m_row is None:
            b = b + (tl.load(p_i),)
        else:
            b = b + (tl.load(p_i, mask=m_row[:, :, None], other=0.0),)
    return b


@triton.jit
def _last_rows(
    p_qkv,
    p_out,
    p_lse,
    p_part,
    p_part_lse,
    s_b,
    s_c,
    s_h,
    scale2,
    T,
    i_frame,
    COUNT,
    H: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    S_T: tl.constexpr,
    COLS: tl.constexpr,
    FROM: tl.constexpr,
    LAST: tl.constexpr,
    EACH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows FROM..N+G, at most LAST of them, of the EACH frames from i_frame on: a warp has the rows and keys of one frame."""
    # Small tiles of keys, for those of several frames are in flight. Stages hide their way from L2 (predicted for L/14 on
    # H100: 387 us; with two stages 399, with one 409).
    KEYS: tl.constexpr = 16
    STAGES: tl.constexpr = 3
    i_f = i_frame + tl.arange(0, EACH)
    there = i_f < COUNT
    f, i_bf, i_bh, i_b, i_h = frames.frame(tl.minimum(i_f, COUNT - 1), T, H)
    p_q = p_qkv + i_b * s_b + i_h * s_h + _offsets(G + f * N, S_T, WIDE)
    p_k = p_q + s_c

    r = FROM + tl.arange(0, LAST)
    m_r = there[:, None] & (r < N + G)[None]
    o_r = tl.where((r < N)[None], r[None], r[None] - N - G - f[:, None] * N)
    b_q = _read_each(p_q, _offsets(o_r, S_T, WIDE), m_r, COLS)
    acc = ()
    for i in tl.static_range(len(COLS) - 1):
        acc = acc + (tl.zeros([EACH, LAST, COLS[i + 1] - COLS[i]], tl.float32),)
    m = tl.full([EACH, LAST], common.HIDDEN, tl.float32)
    l = tl.zeros([EACH, LAST], tl.float32)
    END: tl.constexpr = N + G - FIRST if FROM < N else N  # summary rows see patches alone
    for o in tl.static_range(N // KEYS * KEYS, END, KEYS):
        c = o + tl.arange(0, KEYS)
        o_c = _offsets(tl.where((c < N)[None], c[None], c[None] - N + FIRST - G - f[:, None] * N), S_T, WIDE)
        m_c = there[:, None] & (c < N + G - FIRST)[None]
        b_kt = _read_each(p_k, o_c, m_c, COLS)
        b_vt = _read_each(p_k + s_c, o_c, m_c, COLS)
        visible = (c < N + G - FIRST)[None, None] & ((r < N)[None, :, None] | (c < N)[None, None])
        acc, m, l = _softmax_step(_scores(b_q, b_kt, visible, PRECISION), b_vt, acc, m, l, scale2, PRECISION)
    o_k = _offsets(tl.arange(0, KEYS), S_T, WIDE)[None]
    for i in tl.range(0, frames.opaque(N // KEYS, T), num_stages=STAGES):
        p_ki = p_k + _offsets(i * KEYS, S_T, WIDE)
        b_k = _read_each(p_ki, o_k, None, COLS)
        b_v = _read_each(p_ki + s_c, o_k, None, COLS)
        acc, m, l = _softmax_step(_scores(b_q, b_k, None, PRECISION), b_v, acc, m, l, scale2, PRECISION)

    # What is written is one list of rows.
    i_r = tl.arange(0, EACH * LAST)
    i_f, r = i_frame + i_r // LAST, FROM + i_r % LAST
    f, i_bf, i_bh, i_b, i_h = frames.frame(tl.minimum(i_f, COUNT - 1), T, H)
    p_row, p_l = _frame_rows(p_out, p_lse, p_part, p_part_lse, f, i_bf, i_bh, i_b, i_h, r, T, H, N, G, D)
    rows = ()
    for i in tl.static_range(len(COLS) - 1):
        rows = rows + (tl.reshape(acc[i], [EACH * LAST, COLS[i + 1] - COLS[i]]),)
    m, l = tl.reshape(m, [EACH * LAST]), tl.reshape(l, [EACH * LAST])
    _finish_rows(p_row, p_l, rows, m, l, (i_f < COUNT) & (r < N + G), p_out.dtype.element_ty, COLS)


@triton.jit(do_not_specialize=["T", "COUNT"])
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
    COUNT,  # B * H * T, frames of all heads
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
    LAST: tl.constexpr,  # 0, or the size of the tile for rows behind the whole tiles
    EACH: tl.constexpr,  # frames that share a program for those
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i = tl.program_id(0)
    scale2 = scale * common.LOG2E
    if LAST:
        TILES: tl.constexpr = (N + G) // ROWS
        i_frame = i // (EACH * TILES + 1) * EACH
        i_tile = i % (EACH * TILES + 1)
        if i_tile < tl.minimum(EACH, COUNT - i_frame) * TILES:
            _row_tile(
                p_qkv, p_out, p_lse, p_part, p_part_lse, s_b, s_c, s_h, scale2, T, i_frame + i_tile // TILES, i_tile % TILES,
                H, N, G, FIRST, D, S_T, COLS, ROWS, KEYS, WHOLE, TAIL, TILES * ROWS <= N, STAGES, WIDE, PRECISION,
            )  # fmt: skip
        else:
            _last_rows(
                p_qkv, p_out, p_lse, p_part, p_part_lse, s_b, s_c, s_h, scale2, T, i_frame, COUNT,
                H, N, G, FIRST, D, S_T, COLS, TILES * ROWS, LAST, EACH, WIDE, PRECISION,
            )  # fmt: skip
    else:
        TILES: tl.constexpr = (N + G + ROWS - 1) // ROWS
        _row_tile(
            p_qkv, p_out, p_lse, p_part, p_part_lse, s_b, s_c, s_h, scale2, T, i // TILES, i % TILES,
            H, N, G, FIRST, D, S_T, COLS, ROWS, KEYS, WHOLE, TAIL, False, STAGES, WIDE, PRECISION,
        )  # fmt: skip


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
    i_bh, i_b, i_h = frames.head(tl.program_id(0) // SPANS, H)
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
    i_bh, i_b, i_h = frames.head(tl.program_id(0) // TILES, H)
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


# Launchers.


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
    return {"ROWS": _edges((rows, tile.rows)), "KEYS": _edges((1, tile.keys), (halves, half), (1, frames.tail(rest, half)))}


def _stream_tile(choice: Iterable[tiles.Tile], rows: int) -> tuple[tiles.Tile, int]:
    """The tile that pads a frame of so many rows least, of equals the largest, for which keys come from L2 less often; and the
    size of the tile for the rows behind its whole tiles, 0 where they take a whole one."""

    def behind(tile: tiles.Tile) -> int:
        over = rows % tile.rows
        return frames.tail(over, tile.rows) if rows > tile.rows and 0 < over <= tile.over else 0

    def padded(tile: tiles.Tile) -> int:
        last = behind(tile)
        return rows // tile.rows * tile.rows + last if last else triton.cdiv(rows, tile.rows) * tile.rows

    tile = min(choice, key=lambda tile: (padded(tile), -tile.rows))
    return tile, behind(tile)


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

    rows = summary_table(layout, qkv.device)
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
            tile, last = _stream_tile(find("forward_stream"), N + G)
            whole, rest = N // tile.keys, N % tile.keys + G - first
            if not rest:
                whole, rest = whole - 1, tile.keys
            programs = B * H * T * triton.cdiv(N + G, tile.rows)
            if last:
                programs = B * H * T * ((N + G) // tile.rows) + triton.cdiv(B * H * T, tile.warps)
            launch(
                _stream_kernel,
                programs,
                tile,
                *shares,
                *strides,
                B * H * T,
                FIRST=first,
                ROWS=tile.rows,
                KEYS=tile.keys,
                WHOLE=whole,
                TAIL=frames.tail(rest, tile.keys),
                LAST=last,
                EACH=tile.warps,
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
