"""Hierarchical attention, forward and backward. Legend: triton_common.py. Who sees whom: layout.py.

Seen from one frame the rule is small. Its query rows are its N patches, then the G summary rows (CLS and MST) as far as
they look at this frame; its keys are its N patches, then the summary keys that patches see. All of these rows see all of
the frame's patches, and patch rows see the summary keys besides. So a frame is a dense (N + G) x (N + G) attention whose
last corner, summary rows by summary keys, is hidden. That corner is attention over summary tokens alone; it doesn't belong
to a frame and is done once a head by the small kernel that also joins the frames.

Forward
  _forward_kernel   Owns one tile of query rows of one (frame, head, batch). Reads its q once and every key and value of the
                    frame once; the row tiles of a frame lie next to each other in the grid and share them through L2. Keeps
                    q, the output in fp32 and the running maximum and sum on chip. Patch rows end here. For a summary row it
                    writes the frame's share of the softmax (output not yet divided, maximum, sum) in fp32. The last patches
                    and the summary rows share a tile, so summary rows cost no further pass over keys and values.
  _combine_kernel   Owns a tile of summary rows of one (head, batch): the summary corner, then the shares of the frames it
                    sees, in frame order.
  Whole tiles of patch keys carry no masks. What is left of the frame and the summary keys form the tail tiles, which do.

Backward, P recomputed from the log-sum-exp that the forward saved
  _dq_kernel        The forward's grid. delta = rowsum(dO * O), kept for the next two kernels; dQ of its rows.
  _dkv_kernel       Owns one tile of keys of one (frame, head, batch), reads q, dO of the frame's rows; dK, dV of its keys.
  _finish_kernel    Owns a tile of summary tokens of one (head, batch): the gradients of the summary corner, then the frames'
                    shares in frame order: dQ of summary rows, dK and dV of summary keys.

Reduction: every element has one owner, what is summed over frames is summed in frame order. No atomics, the same bits every
run. Shares of summary tokens take B*H*T*G*(D+2) floats in the forward and 3*B*H*T*G*D in the backward: linear in T.
"""

from __future__ import annotations

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
def _softmax_step(q, k, v, visible, acc, m, l, scale2):
    """Fold one tile of keys into the running softmax (maximum m in base 2, sum l, output acc not yet divided by l)."""
    s = common.dot(q, tl.trans(k))
    if visible is None:  # scale2 >= 0: the maximum can be taken before scaling
        m_new = tl.maximum(m, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - m_new[:, None])
    else:
        s = tl.where(visible, s * scale2, common.HIDDEN)
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    acc = acc * shrink[:, None] + common.dot(common.to(p, v.dtype), v)
    return acc, m_new, l * shrink + tl.sum(p, 1)


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


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    p_qkv,  # (B, S, 3, H, D), strides s_b, s_t, s_c, s_h
    p_out,  # (B, S, H, D)
    p_lse,  # (B, H, S)
    p_part,  # (B, H, T, G, D)
    p_part_ml,  # (B, H, T, G, 2): maximum, sum
    p_rows,  # (G, 3)
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
    b_q = _load(p_q, token.to(tl.int64) * s_t, sees, D, BD)
    m = tl.full([ROWS], common.HIDDEN, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BD], tl.float32)

    o_k = tl.arange(0, KEYS) * s_t
    for i in tl.range(0, _opaque(WHOLE, T), num_stages=STAGES):
        p_ki = p_k + (G + f * N + i * KEYS).to(tl.int64) * s_t
        b_k = _load(p_ki, o_k, None, D, BD)
        b_v = _load(p_ki + s_c, o_k, None, D, BD)
        acc, m, l = _softmax_step(b_q, b_k, b_v, None, acc, m, l, scale2)
    for o in tl.range(WHOLE * KEYS, _opaque(N + G - FIRST, T), TAIL, num_stages=1):
        c = o + tl.arange(0, TAIL)
        m_c = c < N + G - FIRST
        o_c = _key_tokens(c, f, N, G, FIRST).to(tl.int64) * s_t
        b_k = _load(p_k, o_c, m_c, D, BD)
        b_v = _load(p_k + s_c, o_c, m_c, D, BD)
        visible = m_c[None] & ((r < N)[:, None] | (c < N)[None])
        acc, m, l = _softmax_step(b_q, b_k, b_v, visible, acc, m, l, scale2)

    p_o = p_out + (i_b * S * H + i_h) * D
    _store(p_o, token.to(tl.int64) * (H * D), acc * (1.0 / l)[:, None], r < N, D, BD)
    tl.store(p_lse + i_bh * S + token, m + tl.log2(l), mask=r < N)
    if (i_tile + 1) * ROWS > N:  # the tile has summary rows
        row = i_bf * G + token
        m_g = sees & (r >= N)
        _store(p_part, row * D, acc, m_g, D, BD)
        tl.store(p_part_ml + 2 * row, m, mask=m_g)
        tl.store(p_part_ml + 2 * row + 1, l, mask=m_g)


@triton.jit(do_not_specialize=["T"])
def _combine_kernel(
    p_qkv,
    p_out,
    p_lse,
    p_part,
    p_part_ml,
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
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILES: tl.constexpr = (G + ROWS - 1) // ROWS
    i_bh, i_b, i_h = _head(tl.program_id(0) // TILES, H)
    S = G + T * N
    p_q = p_qkv + i_b * s_b + i_h * s_h
    p_k = p_q + s_c
    scale2 = scale * common.LOG2E

    g = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    m_g = g < G
    first = tl.load(p_rows + 3 * g, mask=m_g, other=0)
    end = tl.load(p_rows + 3 * g + 1, mask=m_g, other=0)
    stride = tl.load(p_rows + 3 * g + 2, mask=m_g, other=1)
    b_q = _load(p_q, g.to(tl.int64) * s_t, m_g, D, BD)
    m = tl.full([ROWS], common.HIDDEN, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BD], tl.float32)

    for o in tl.range(0, G, KEYS, num_stages=1):
        c = o + tl.arange(0, KEYS)
        o_c = c.to(tl.int64) * s_t
        b_k = _load(p_k, o_c, c < G, D, BD)
        b_v = _load(p_k + s_c, o_c, c < G, D, BD)
        visible = (c[None] >= first[:, None]) & (c[None] < end[:, None])
        acc, m, l = _softmax_step(b_q, b_k, b_v, visible, acc, m, l, scale2)
    for f in tl.range(0, T, num_stages=STAGES):
        sees = m_g & (f % stride == 0)
        row = (i_bh * T + f) * G + g
        m_f = tl.load(p_part_ml + 2 * row, mask=sees, other=common.HIDDEN)
        l_f = tl.load(p_part_ml + 2 * row + 1, mask=sees, other=0.0)
        acc_f = _load(p_part, row * D, sees, D, BD)
        m_new = tl.maximum(m, m_f)
        shrink, shrink_f = tl.exp2(m - m_new), tl.exp2(m_f - m_new)
        acc = acc * shrink[:, None] + acc_f * shrink_f[:, None]
        l = l * shrink + l_f * shrink_f
        m = m_new

    p_o = p_out + (i_b * S * H + i_h) * D
    _store(p_o, g * (H * D), acc * (1.0 / l)[:, None], m_g, D, BD)
    tl.store(p_lse + i_bh * S + g, m + tl.log2(l), mask=m_g)


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
    if scale < 0:  # the kernel takes a maximum before it scales
        qkv, scale = torch.cat((-qkv[:, :, :1], qkv[:, :, 1:]), 2), -scale
    out = torch.empty(B, S, H, D, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=qkv.device)
    part = torch.empty(B, H, T, G, D, dtype=torch.float32, device=qkv.device)
    part_ml = torch.empty(B, H, T, G, 2, dtype=torch.float32, device=qkv.device)
    args = (qkv, out, lse, part, part_ml, _summary_rows(layout, qkv.device), *qkv.stride()[:4], scale, T, H)
    sizes = dict(N=N, G=G, D=D, BD=triton.next_power_of_2(D))

    tile = tiles.lookup("hier_forward", qkv.device, qkv.dtype, D)[0]
    common.launch(
        _forward_kernel,
        (B * H * T * triton.cdiv(N + G, tile.rows),),
        *args,
        **sizes,
        FIRST=first,
        ROWS=tile.rows,
        KEYS=tile.keys,
        TAIL=_tail(N % tile.keys + G - first, tile.keys),
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    tile = tiles.lookup("hier_combine", qkv.device, qkv.dtype, D)[0]
    common.launch(
        _combine_kernel,
        (B * H * triton.cdiv(G, tile.rows),),
        *args,
        **sizes,
        ROWS=tile.rows,
        KEYS=tile.keys,
        STAGES=tile.stages,
        num_warps=tile.warps,
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
