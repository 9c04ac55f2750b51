"""Hierarchical attention, backward. Legend: triton_common.py. A frame's rows and keys: triton_frames.py. Who sees whom:
layout.py.

P is recomputed from the log-sum-exp that the forward saved. A pair is hidden by an lse of 10^30, which makes its P
zero, so main loops carry no masks. delta = rowsum(dO * O) = rowsum(P * dP) never has a pass of its own.
  Frames whose N + G rows fit one tile (B/32), where tiles.py has that tile:
  _frames_kernel    Owns several frames of one (head, batch) and walks over them; the next frame arrives meanwhile. Reads q,
                    k, v, dO of a frame once, makes all five products of the tile, and so dQ, dK, dV. The tile holds all keys
                    of a patch row: its delta comes from P and dP, and O is read for summary rows only. What summary rows and
                    keys gain is summed over frames in registers (KEEP), or written frame by frame where these are short.
  Frames of just under 256 rows on wgmma (B/16: 196 + 13):
  _frame_kernel     Owns one (frame, head, batch). All rows of q and dO stay in shared memory, their dQ in registers, and the
                    frame's keys pass by in tiles: a tile's dK and dV have all rows at once and leave. Every tensor is read
                    once; delta from O. P and dS go to shared memory, where the products over rows take them from.
  Other frames, where dQ, dK and dV of a frame exceed the registers of a multiprocessor, in two:
  _rows_kernel      Owns a tile of query rows of one (frame, head, batch) and walks over the frame's keys.
                    delta from O; it and lse are left for the next kernel in the order of the tile's rows. dQ of its rows.
  _keys_kernel      Owns a tile of keys of one (frame, head, batch) and walks over the frame's rows; dK, dV of its keys.
  Then for all:
  _finish_kernel    Owns a tile of summary tokens of one (head, batch): the gradients of the summary corner, then the parts
                    that the frames left, in their order: dQ of summary rows, dK and dV of summary keys.

Reduction: every element has one owner, what is summed over frames is summed in frame order. No atomics, the same bits every
run. Shares of summary tokens take at most 3*B*H*T*G*D floats: linear in T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from . import triton_common as common
from . import triton_frames as frames
from .layout import TokenLayout, summary_table

# Programs enough for any GPU: 132 multiprocessors run 2 each, three rounds of them. Small batches cut T to have so many.
_PROGRAMS = 768


@triton.jit
def _frame_at(p_qkv, p_dqkv, p_part, s_b, s_h, i_frame, T, H, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """The i_frame-th of all frames: its index in the clip, (batch, head, frame), (batch, head), its first patch's token; q of
    token 0, the offset of token 0 in out and dO, the gradient of q of its first patch, its part."""
    f, i_bf, i_bh, i_b, i_h = frames.frame(i_frame, T, H)
    S = G + T * N
    o_f = (G + f * N).to(tl.int64)
    p_q = p_qkv + i_b * s_b + i_h * s_h
    p_dq = p_dqkv + ((i_b * S + o_f) * 3 * H + i_h) * D
    return f, i_bf, i_bh, o_f, p_q, (i_b * S * H + i_h) * D, p_dq, p_part + i_bf * (3 * G * D)


@triton.jit
def _row_tokens(r, f, N: tl.constexpr, G: tl.constexpr):
    """Tokens of query rows r of frame f: its patches, then the summary tokens, the last of them again behind."""
    return tl.where(r < N, G + f * N + r, tl.minimum(r - N, G - 1)).to(tl.int64)


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


# `lse` and `delta` come as (rows, 1), and lse as (rows, keys) where some pairs are hidden: a score is hidden by an
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
    s_t: tl.constexpr,
    s_c,
    s_h,
    scale,
    T,
    H: tl.constexpr,
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
    i_bh, i_b, i_h = frames.head(tl.program_id(0) // PARTS, H)
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


@triton.jit
def _frame_step(q, do, lse, delta, k, v, dq, scale, PRECISION: tl.constexpr):
    """dq += dS @ k, and dk = dS^T @ q and dv = P^T @ dO of these keys, which have all their rows here."""
    p = tl.exp2(common.dot(q, tl.trans(k), PRECISION) * (scale * common.LOG2E) - lse)
    b_p = common.to(p, do.dtype)
    ds = common.to(p * (common.dot(do, tl.trans(v), PRECISION) * scale - delta), q.dtype)
    # By columns, so that P and dS are operands as they lie and not transposed: D are rows enough for wgmma.
    dv = common.dot(tl.trans(do), b_p, PRECISION)
    dk = common.dot(tl.trans(q), ds, PRECISION)
    return dq + common.dot(ds, k, PRECISION), tl.trans(dk), tl.trans(dv)


@triton.jit(do_not_specialize=["T"])
def _frame_kernel(
    p_qkv,
    p_out,
    p_do,
    p_lse,
    p_dqkv,
    p_part,  # (B, H, T, 3, G, D)
    p_rows,
    s_b,
    s_t: tl.constexpr,  # a constant as H is: addresses of runtime strides would spill
    s_c,
    s_h,
    scale,
    T,
    H: tl.constexpr,
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
    f, _, i_bh, o_f, p_q, o_0, p_dq, p_part = _frame_at(p_qkv, p_dqkv, p_part, s_b, s_h, tl.program_id(0), T, H, N, G, D)
    p_kf = p_q + s_c + o_f * s_t
    p_out += o_0
    p_do += o_0
    p_dk = p_dq + H * D

    # Rows behind the last are zeros, hidden, and not stored.
    r = tl.arange(0, ROWS)
    m_r = r < N + G
    token = _row_tokens(r, f, N, G)
    stride = _row_strides(p_rows, r, N, G)
    b_q = _load(p_q, token * s_t, m_r, D, BD)
    b_o = _load(p_out, token * (H * D), m_r, D, BD)
    b_do = _load(p_do, token * (H * D), m_r, D, BD)
    lse = _row_lse(p_lse + i_bh * (G + T * N), token, stride, r, f, N, G)
    delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1) * scale
    dq = tl.zeros([ROWS, BD], tl.float32)

    o_k = tl.arange(0, KEYS)
    for i in tl.range(0, frames.opaque(N // KEYS, T), num_stages=STAGES):
        b_k = _load(p_kf + i * KEYS * s_t, o_k * s_t, None, D, BD)
        b_v = _load(p_kf + i * KEYS * s_t + s_c, o_k * s_t, None, D, BD)
        dq, dk, dv = _frame_step(b_q, b_do, lse[:, None], delta[:, None], b_k, b_v, dq, scale, PRECISION)
        c = i * KEYS + o_k
        _store(p_dk, c * (3 * H * D), dk, c < N, D, BD)
        _store(p_dk + H * D, c * (3 * H * D), dv, c < N, D, BD)
    lse_g = tl.where(r < N, lse, -common.HIDDEN)[:, None]  # for summary keys, hidden from summary rows
    for o in tl.range(N // KEYS * KEYS, frames.opaque(N + G - FIRST, T), TAIL, num_stages=1):
        c_t = o + tl.arange(0, TAIL)
        o_c = _key_tokens(tl.minimum(c_t, N + G - FIRST - 1), f, N, G, FIRST).to(tl.int64) * s_t
        b_kt = _load(p_q + s_c, o_c, None, D, BD)
        b_vt = _load(p_q + 2 * s_c, o_c, None, D, BD)
        lse_c = tl.where((c_t < N)[None], lse[:, None], tl.where((c_t < N + G - FIRST)[None], lse_g, -common.HIDDEN))
        dq, dk_t, dv_t = _frame_step(b_q, b_do, lse_c, delta[:, None], b_kt, b_vt, dq, scale, PRECISION)
        _store(p_dk, c_t * (3 * H * D), dk_t, c_t < N, D, BD)
        _store(p_dk + H * D, c_t * (3 * H * D), dv_t, c_t < N, D, BD)
        m_g = (c_t >= N) & (c_t < N + G - FIRST)
        _store(p_part, (c_t - N + FIRST + G) * D, dk_t, m_g, D, BD)
        _store(p_part, (c_t - N + FIRST + 2 * G) * D, dv_t, m_g, D, BD)

    _store(p_dq, r * (3 * H * D), dq, r < N, D, BD)
    _store(p_part, (r - N) * D, dq, (r >= N) & (r < N + G), D, BD)


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
    s_t: tl.constexpr,
    s_c,
    s_h,
    scale,
    T,
    H: tl.constexpr,
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
    i_f = tl.program_id(0) // TILES
    f, i_bf, i_bh, o_f, p_q, o_0, p_dq, p_part = _frame_at(p_qkv, p_dqkv, p_part, s_b, s_h, i_f, T, H, N, G, D)
    p_kf = p_q + s_c + o_f * s_t
    p_out += o_0
    p_do += o_0
    p_stat += i_bf * (2 * TILES * ROWS)

    # Rows behind the last repeat it; what they compute is hidden and not stored.
    r = i_tile * ROWS + tl.arange(0, ROWS)
    token = _row_tokens(r, f, N, G)
    b_q = _load(p_q, token * s_t, None, D, BD)
    b_do = _load(p_do, token * (H * D), None, D, BD)
    delta = tl.sum(b_do.to(tl.float32) * _load(p_out, token * (H * D), None, D, BD).to(tl.float32), 1) * scale
    lse = _row_lse(p_lse + i_bh * (G + T * N), token, _row_strides(p_rows, r, N, G), r, f, N, G)
    tl.store(p_stat + r, lse)
    tl.store(p_stat + TILES * ROWS + r, delta)
    dq = tl.zeros([ROWS, BD], tl.float32)

    o_k = tl.arange(0, KEYS) * s_t
    for i in tl.range(0, frames.opaque(N // KEYS, T), num_stages=STAGES):
        b_k = _load(p_kf + i * KEYS * s_t, o_k, None, D, BD)
        b_v = _load(p_kf + i * KEYS * s_t + s_c, o_k, None, D, BD)
        dq = _dq_step(b_q, b_do, lse[:, None], delta[:, None], b_k, b_v, dq, scale, PRECISION)
    lse_g = tl.where(r < N, lse, -common.HIDDEN)[:, None]  # for summary keys, hidden from summary rows
    for o in tl.range(N // KEYS * KEYS, frames.opaque(N + G - FIRST, T), TAIL, num_stages=1):
        c = o + tl.arange(0, TAIL)
        o_c = _key_tokens(tl.minimum(c, N + G - FIRST - 1), f, N, G, FIRST).to(tl.int64) * s_t
        b_k = _load(p_q + s_c, o_c, None, D, BD)
        b_v = _load(p_q + 2 * s_c, o_c, None, D, BD)
        lse_c = tl.where((c < N)[None], lse[:, None], tl.where((c < N + G - FIRST)[None], lse_g, -common.HIDDEN))
        dq = _dq_step(b_q, b_do, lse_c, delta[:, None], b_k, b_v, dq, scale, PRECISION)

    _store(p_dq, r * (3 * H * D), dq, r < N, D, BD)
    if (i_tile + 1) * ROWS > N:  # the tile has summary rows
        _store(p_part, (r - N) * D, dq, (r >= N) & (r < N + G), D, BD)


@triton.jit(do_not_specialize=["T"])
def _keys_kernel(
    p_qkv,
    p_do,
    p_stat,
    p_dqkv,
    p_part,
    s_b,
    s_t: tl.constexpr,
    s_c,
    s_h,
    scale,
    T,
    H: tl.constexpr,
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
    i_f = tl.program_id(0) // TILES
    f, i_bf, _, o_f, p_q, o_0, p_dq, p_part = _frame_at(p_qkv, p_dqkv, p_part, s_b, s_h, i_f, T, H, N, G, D)
    p_qf = p_q + o_f * s_t
    p_do += o_0
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
    for i in tl.range(0, frames.opaque(N // ROWS, T), num_stages=STAGES):
        b_q = _load(p_qf + i * ROWS * s_t, i_r * s_t, None, D, BD)
        b_do = _load(p_dof + i * ROWS * (H * D), i_r * (H * D), None, D, BD)
        lse = tl.load(p_stat + i * ROWS + i_r)[None]
        delta = tl.load(p_stat + PAD + i * ROWS + i_r)[None]
        dk, dv = _dkv_step(b_k, b_v, b_q, b_do, lse, delta, dk, dv, scale, PRECISION)
    for o in tl.range(N // ROWS * ROWS, frames.opaque(N + G, T), TAIL, num_stages=1):
        r = o + tl.arange(0, TAIL)
        token = _row_tokens(r, f, N, G)
        b_q = _load(p_q, token * s_t, None, D, BD)
        b_do = _load(p_do, token * (H * D), None, D, BD)
        lse = tl.load(p_stat + r, mask=r < N + G, other=-common.HIDDEN)
        delta = tl.load(p_stat + PAD + r, mask=r < N + G, other=0.0)[None]
        lse = tl.where((c < N)[:, None], lse[None], tl.where(r < N, lse, -common.HIDDEN)[None])
        dk, dv = _dkv_step(b_k, b_v, b_q, b_do, lse, delta, dk, dv, scale, PRECISION)

    p_dk = p_dq + H * D
    _store(p_dk, c * (3 * H * D), dk, c < N, D, BD)
    _store(p_dk + H * D, c * (3 * H * D), dv, c < N, D, BD)
    if (i_tile + 1) * KEYS > N:
        m_g = (c >= N) & (c < N + G - FIRST)
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
    i_bh, i_b, i_h = frames.head(tl.program_id(0) // TILES, H)
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


# Launcher.


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
    rows = summary_table(layout, qkv.device)
    strides = (*qkv.stride()[:4], scale)
    sizes = dict(G=G, FIRST=first, D=D, BD=triton.next_power_of_2(D), PRECISION=common.precision(qkv.dtype))

    whole = tiles.lookup("hier_backward_frames", qkv.device, qkv.dtype, D)
    resident = tiles.lookup("hier_backward_frame", qkv.device, qkv.dtype, D)
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
    elif resident and resident[0].rows - 64 < N + G <= resident[0].rows:  # more padding would cost more than reading twice
        tile, parts = resident[0], T
        part = torch.empty(B, H, parts, 3, G, D, dtype=torch.float32, device=qkv.device)
        common.launch(
            _frame_kernel,
            (B * H * T,),
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
            N=N,
            **sizes,
            ROWS=tile.rows,
            KEYS=tile.keys,
            TAIL=frames.tail(N % tile.keys + G - first, tile.keys),
            STAGES=tile.stages,
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
            TAIL=frames.tail(N % tile.keys + G - first, tile.keys),
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
            TAIL=frames.tail(N % tile.rows + G, tile.rows),
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
