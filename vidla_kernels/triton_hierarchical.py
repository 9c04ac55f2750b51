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

Backward, P recomputed from the log-sum-exp that the forward saved
  _dq_kernel        The forward's grid. delta = rowsum(dO * O), kept for the next two kernels; dQ of its rows.
  _dkv_kernel       Owns one tile of keys of one (frame, head, batch), reads q, dO of the frame's rows; dK, dV of its keys.
  _finish_kernel    Owns a tile of summary tokens of one (head, batch): the gradients of the summary corner, then the frames'
                    shares in frame order: dQ of summary rows, dK and dV of summary keys.

Reduction: every element has one owner, what is summed over frames is summed in frame order. No atomics, the same bits every
run. Shares of summary tokens take B*H*T*G output rows in the forward (fewer in the walk) and 3*B*H*T*G*D floats in the
backward: linear in T.
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


# One step each of forward and backward. `visible` is None where every row of the tile sees every key.


@triton.jit
def _dq_step(q, do, lse, delta, k, v, visible, dq, scale2):
    """dq += dS @ k, without the factor scale. Tiles lie rows x keys."""
    s = common.dot(q, tl.trans(k)) * scale2
    if visible is not None:
        s = tl.where(visible, s, common.HIDDEN)
    ds = tl.exp2(s - lse[:, None]) * (common.dot(do, tl.trans(v)) - delta[:, None])
    return dq + common.dot(common.to(ds, k.dtype), k)


@triton.jit
def _dkv_step(k, v, q, do, lse, delta, visible, dk, dv, scale2):
    """dk += dS^T @ q, without the factor scale, and dv += P^T @ dO. Tiles lie keys x rows, so nothing is transposed back."""
    s = common.dot(k, tl.trans(q)) * scale2
    if visible is not None:
        s = tl.where(visible, s, common.HIDDEN)
    p = tl.exp2(s - lse[None])
    dv = dv + common.dot(common.to(p, do.dtype), do)
    ds = p * (common.dot(v, tl.trans(do)) - delta[None])
    return dk + common.dot(common.to(ds, q.dtype), q), dv


# Forward.


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


# Backward.


@triton.jit(do_not_specialize=["T"])
def _dq_kernel(
    p_qkv,
    p_out,
    p_do,  # (B, S, H, D)
    p_lse,
    p_delta,  # (B, H, S)
    p_dqkv,  # (B, S, 3, H, D)
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
):
    TILES: tl.constexpr = (N + G + ROWS - 1) // ROWS
    WHOLE: tl.constexpr = N // KEYS
    i_tile = tl.program_id(0) % TILES
    f, i_bf, i_bh, i_b, i_h = _frame(tl.program_id(0) // TILES, T, H)
    S = G + T * N
    p_q = p_qkv + i_b * s_b + i_h * s_h
    p_k = p_q + s_c
    scale2 = scale * common.LOG2E

    r = i_tile * ROWS + tl.arange(0, ROWS)
    token, sees = _query_rows(r, f, p_rows, N, G)
    o_out = (i_b * S * H + i_h) * D + token.to(tl.int64) * (H * D)
    b_q = _load(p_q, token.to(tl.int64) * s_t, sees, D, BD)
    b_do = _load(p_do, o_out, sees, D, BD)
    delta = tl.sum(b_do.to(tl.float32) * _load(p_out, o_out, sees, D, BD).to(tl.float32), 1)
    # All summary rows see frame 0, which owns their delta.
    tl.store(p_delta + i_bh * S + token, delta, mask=tl.where(f == 0, (r < N) | sees, r < N))
    # A row that does not see the frame gets P = exp2(score - lse) = 0 and so adds nothing.
    lse = tl.load(p_lse + i_bh * S + token, mask=sees, other=-common.HIDDEN)
    dq = tl.zeros([ROWS, BD], tl.float32)

    o_k = tl.arange(0, KEYS) * s_t
    for i in tl.range(0, _opaque(WHOLE, T), num_stages=STAGES):
        p_ki = p_k + (G + f * N + i * KEYS).to(tl.int64) * s_t
        b_k = _load(p_ki, o_k, None, D, BD)
        b_v = _load(p_ki + s_c, o_k, None, D, BD)
        dq = _dq_step(b_q, b_do, lse, delta, b_k, b_v, None, dq, scale2)
    for o in tl.range(WHOLE * KEYS, _opaque(N + G - FIRST, T), TAIL, num_stages=1):
        c = o + tl.arange(0, TAIL)
        m_c = c < N + G - FIRST
        o_c = _key_tokens(c, f, N, G, FIRST).to(tl.int64) * s_t
        b_k = _load(p_k, o_c, m_c, D, BD)
        b_v = _load(p_k + s_c, o_c, m_c, D, BD)
        visible = m_c[None] & ((r < N)[:, None] | (c < N)[None])
        dq = _dq_step(b_q, b_do, lse, delta, b_k, b_v, visible, dq, scale2)

    dq = dq * scale
    p_dq = p_dqkv + (i_b * S * 3 * H + i_h) * D
    _store(p_dq, token.to(tl.int64) * (3 * H * D), dq, r < N, D, BD)
    if (i_tile + 1) * ROWS > N:
        _store(p_part, (i_bf * 3 * G + token) * D, dq, sees & (r >= N), D, BD)


@triton.jit(do_not_specialize=["T"])
def _dkv_kernel(
    p_qkv,
    p_do,
    p_lse,
    p_delta,
    p_dqkv,
    p_part,
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
):
    TILES: tl.constexpr = (N + G - FIRST + KEYS - 1) // KEYS
    WHOLE: tl.constexpr = N // ROWS
    i_tile = tl.program_id(0) % TILES
    f, i_bf, i_bh, i_b, i_h = _frame(tl.program_id(0) // TILES, T, H)
    S = G + T * N
    p_q = p_qkv + i_b * s_b + i_h * s_h
    p_do += (i_b * S * H + i_h) * D
    p_lse += i_bh * S
    p_delta += i_bh * S
    scale2 = scale * common.LOG2E

    c = i_tile * KEYS + tl.arange(0, KEYS)
    # Keys behind the last one repeat it and are not stored. (A key of zeros could overflow: exp2(0 - lse).)
    token_c = _key_tokens(tl.minimum(c, N + G - FIRST - 1), f, N, G, FIRST).to(tl.int64)
    b_k = _load(p_q + s_c, token_c * s_t, None, D, BD)
    b_v = _load(p_q + 2 * s_c, token_c * s_t, None, D, BD)
    dk = tl.zeros([KEYS, BD], tl.float32)
    dv = tl.zeros([KEYS, BD], tl.float32)

    i_r = tl.arange(0, ROWS)
    for i in tl.range(0, _opaque(WHOLE, T), num_stages=STAGES):
        token = (G + f * N + i * ROWS).to(tl.int64)
        b_q = _load(p_q + token * s_t, i_r * s_t, None, D, BD)
        b_do = _load(p_do + token * (H * D), i_r * (H * D), None, D, BD)
        lse = tl.load(p_lse + token + i_r)
        delta = tl.load(p_delta + token + i_r)
        dk, dv = _dkv_step(b_k, b_v, b_q, b_do, lse, delta, None, dk, dv, scale2)
    for o in tl.range(WHOLE * ROWS, _opaque(N + G, T), TAIL, num_stages=1):
        r = o + tl.arange(0, TAIL)
        token, sees = _query_rows(r, f, p_rows, N, G)
        b_q = _load(p_q, token.to(tl.int64) * s_t, sees, D, BD)
        b_do = _load(p_do, token.to(tl.int64) * (H * D), sees, D, BD)
        lse = tl.load(p_lse + token, mask=sees, other=-common.HIDDEN)
        delta = tl.load(p_delta + token, mask=sees, other=0.0)
        visible = (r < N)[None] | (c < N)[:, None]
        dk, dv = _dkv_step(b_k, b_v, b_q, b_do, lse, delta, visible, dk, dv, scale2)

    dk = dk * scale
    p_dk = p_dqkv + (i_b * S * 3 * H + H + i_h) * D
    _store(p_dk, token_c * (3 * H * D), dk, c < N, D, BD)
    _store(p_dk + H * D, token_c * (3 * H * D), dv, c < N, D, BD)
    if (i_tile + 1) * KEYS > N:
        m_g = (c >= N) & (c < N + G - FIRST)
        _store(p_part, ((i_bf * 3 + 1) * G + token_c) * D, dk, m_g, D, BD)
        _store(p_part, ((i_bf * 3 + 2) * G + token_c) * D, dv, m_g, D, BD)


@triton.jit(do_not_specialize=["T"])
def _finish_kernel(
    p_qkv,
    p_do,
    p_lse,
    p_delta,
    p_dqkv,
    p_part,
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
    STAGES: tl.constexpr,
):
    TILES: tl.constexpr = (G + ROWS - 1) // ROWS
    i_bh, i_b, i_h = _head(tl.program_id(0) // TILES, H)
    S = G + T * N
    p_q = p_qkv + i_b * s_b + i_h * s_h
    p_do += (i_b * S * H + i_h) * D
    p_lse += i_bh * S
    p_delta += i_bh * S
    scale2 = scale * common.LOG2E

    # The tile's tokens x are query rows for dq, and keys for dk and dv; y runs over the other side.
    x = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    m_x = x < G
    first_x = tl.load(p_rows + 3 * x, mask=m_x, other=0)
    end_x = tl.load(p_rows + 3 * x + 1, mask=m_x, other=0)
    stride = tl.load(p_rows + 3 * x + 2, mask=m_x, other=1)
    lse_x = tl.load(p_lse + x, mask=m_x, other=-common.HIDDEN)
    delta_x = tl.load(p_delta + x, mask=m_x, other=0.0)
    o_x = x.to(tl.int64)
    b_qx = _load(p_q, o_x * s_t, m_x, D, BD)
    b_kx = _load(p_q + s_c, o_x * s_t, m_x, D, BD)
    b_vx = _load(p_q + 2 * s_c, o_x * s_t, m_x, D, BD)
    b_dox = _load(p_do, o_x * (H * D), m_x, D, BD)
    dq = tl.zeros([ROWS, BD], tl.float32)
    dk = tl.zeros([ROWS, BD], tl.float32)
    dv = tl.zeros([ROWS, BD], tl.float32)

    for o in tl.range(0, G, ROWS, num_stages=1):
        y = o + tl.arange(0, ROWS)
        m_y = y < G
        first_y = tl.load(p_rows + 3 * y, mask=m_y, other=0)
        end_y = tl.load(p_rows + 3 * y + 1, mask=m_y, other=0)
        lse_y = tl.load(p_lse + y, mask=m_y, other=-common.HIDDEN)
        delta_y = tl.load(p_delta + y, mask=m_y, other=0.0)
        o_y = y.to(tl.int64)
        b_qy = _load(p_q, o_y * s_t, m_y, D, BD)
        b_ky = _load(p_q + s_c, o_y * s_t, m_y, D, BD)
        b_vy = _load(p_q + 2 * s_c, o_y * s_t, m_y, D, BD)
        b_doy = _load(p_do, o_y * (H * D), m_y, D, BD)
        visible = (y[None] >= first_x[:, None]) & (y[None] < end_x[:, None])
        dq = _dq_step(b_qx, b_dox, lse_x, delta_x, b_ky, b_vy, visible, dq, scale2)
        visible = (x[:, None] >= first_y[None]) & (x[:, None] < end_y[None])
        dk, dv = _dkv_step(b_kx, b_vx, b_qy, b_doy, lse_y, delta_y, visible, dk, dv, scale2)
    dq = dq * scale
    dk = dk * scale
    for f in tl.range(0, T, num_stages=STAGES):
        row = (i_bh * T + f) * 3 * G + x
        dq += _load(p_part, row * D, m_x & (f % stride == 0), D, BD)
        dk += _load(p_part, (row + G) * D, m_x & (x >= FIRST), D, BD)
        dv += _load(p_part, (row + 2 * G) * D, m_x & (x >= FIRST), D, BD)

    p_dq = p_dqkv + (i_b * S * 3 * H + i_h) * D
    _store(p_dq, o_x * (3 * H * D), dq, m_x, D, BD)
    _store(p_dq + H * D, o_x * (3 * H * D), dk, m_x, D, BD)
    _store(p_dq + 2 * H * D, o_x * (3 * H * D), dv, m_x, D, BD)


# Launchers.


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
        limit = {"maxnreg": tile.registers} if tile.registers else {}
        common.launch(kernel, (programs,), qkv, out, lse, *args, **sizes, **constants, num_warps=tile.warps, **limit)

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
    delta = torch.empty(B, H, S, dtype=torch.float32, device=qkv.device)
    part = torch.empty(B, H, T, 3, G, D, dtype=torch.float32, device=qkv.device)
    results = (lse, delta, dqkv, part, _summary_rows(layout, qkv.device))
    strides = (*qkv.stride()[:4], scale, T, H)
    sizes = dict(N=N, G=G, FIRST=first, D=D, BD=triton.next_power_of_2(D))

    tile = tiles.lookup("hier_dq", qkv.device, qkv.dtype, D)[0]
    common.launch(
        _dq_kernel,
        (B * H * T * triton.cdiv(N + G, tile.rows),),
        qkv,
        out,
        grad_out,
        *results,
        *strides,
        **sizes,
        ROWS=tile.rows,
        KEYS=tile.keys,
        TAIL=_tail(N % tile.keys + G - first, tile.keys),
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    tile = tiles.lookup("hier_dkv", qkv.device, qkv.dtype, D)[0]
    common.launch(
        _dkv_kernel,
        (B * H * T * triton.cdiv(N + G - first, tile.keys),),
        qkv,
        grad_out,
        *results,
        *strides,
        **sizes,
        ROWS=tile.rows,
        KEYS=tile.keys,
        TAIL=_tail(N % tile.rows + G, tile.rows),
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    tile = tiles.lookup("hier_finish", qkv.device, qkv.dtype, D)[0]
    common.launch(
        _finish_kernel,
        (B * H * triton.cdiv(G, tile.rows),),
        qkv,
        grad_out,
        *results,
        *strides,
        **sizes,
        ROWS=tile.rows,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return dqkv
