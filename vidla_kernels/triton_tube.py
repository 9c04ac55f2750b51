"""Tube attention in Triton: patch (t, n) sees (t', n) for every frame t'. Forward and backward. Legend: triton_common.py.

A tube is the T rows of one place n; in memory they lie N tokens apart. Two ways to cut the work:

packed (T fits a tile)  A program owns ROWS // T neighbouring tubes of one (batch, head): at 64 rows T=12 packs 5 (60 rows
    used), T=16 packs 4. Row r of the tile is frame r % T of tube r // T, read by stride where it lies, so no permuted copy
    of qkv is made. The ROWS x ROWS scores are masked to equal tube. Softmax rows are whole in the tile: no running maximum.
    Spare rows at the end of a tile read as zeros and are never stored.
long (T exceeds every tile)  A program owns one tile of one tube's rows and walks over the tube's others, with the usual
    running maximum. The backward is two launches, one owning query rows, one owning key rows; the first leaves each row's
    maximum, sum and delta (12 bytes a row and head) for the second. (One launch needs dK and dV of all keys in registers,
    beside scores of all keys: tried with 128 keys, it spills on sm_80 and is predicted slower than a 128-row tile on sm_90.)

Backward: needs qkv and the output's gradient alone. P is computed again, and delta = rowsum(P * dP) replaces the product of
the output with its gradient, so the forward saves nothing. The packed form is one launch that reads every row once.
Reduction across programs: none. Every row of every gradient has one owner: no atomics, the same bits on every run.

A row of D columns is held as D / C tiles of C columns, C being the largest power of two that divides D: 80 is 5 x 16 and
96 is 3 x 32, with no padded column to load, mask or multiply.

T, N and H are runtime values: a kernel is compiled per dtype, D and tile (tiles.py). A new T compiles something only when
it is the first that needs its tile. float32 is multiplied at full precision or in TF32, as torch's setting says.

Bound by memory: 4 units of B*T*N*H*D elements forward, 7 backward, all compulsory in the packed form. A prototype of that
form with tiles of 64 rows, timed on an H100 80GB (Triton 3.6, bf16, D=64, H=12, B=32, T=12), took 1.06 (forward) and 1.05
(backward) of the time to move those bytes at N=196, and 1.29 and 1.13 at N=49. This file itself has not been timed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from . import triton_common as common
from .layout import TokenLayout

# What the kernels take besides tensors. Nothing is gained from compiling for a value of these, and much time is lost.
_RUNTIME = ["T", "N", "H"]


@triton.jit
def _load(p_tile, m_row, D: tl.constexpr, C: tl.constexpr):
    """D columns of some rows as D / C tiles of C columns. Absent rows read as zeros."""
    b_tiles = ()
    for o_c in tl.static_range(0, D, C):
        b_tiles = b_tiles + (tl.load(p_tile + o_c, mask=m_row[:, None], other=0.0),)
    return b_tiles


@triton.jit
def _store(p_tile, b_tiles, m_row, C: tl.constexpr):
    """The inverse of `_load`, rounding to the dtype of the memory."""
    for c in tl.static_range(len(b_tiles)):
        tl.store(p_tile + c * C, common.to(b_tiles[c], p_tile.dtype.element_ty), mask=m_row[:, None])


@triton.jit
def _inner(b_x, b_y, PRECISION: tl.constexpr):
    """x @ y^T over all D columns."""
    b_s = common.dot(b_x[0], tl.trans(b_y[0]), PRECISION)
    for c in tl.static_range(1, len(b_x)):
        b_s += common.dot(b_x[c], tl.trans(b_y[c]), PRECISION)
    return b_s


@triton.jit
def _outer(b_w, b_x, PRECISION: tl.constexpr):
    """w @ x, tile by tile of columns."""
    b_tiles = ()
    for c in tl.static_range(len(b_x)):
        b_tiles = b_tiles + (common.dot(b_w, b_x[c], PRECISION),)
    return b_tiles


@triton.jit
def _scaled(b_x, b_factor):
    """Rows of x times one factor each."""
    b_tiles = ()
    for c in tl.static_range(len(b_x)):
        b_tiles = b_tiles + (b_x[c] * b_factor[:, None],)
    return b_tiles


@triton.jit
def _plus(b_x, b_y):
    b_tiles = ()
    for c in tl.static_range(len(b_x)):
        b_tiles = b_tiles + (b_x[c] + b_y[c],)
    return b_tiles


@triton.jit
def _zeros(ROWS: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    b_tiles = ()
    for _ in tl.static_range(0, D, C):
        b_tiles = b_tiles + (tl.zeros((ROWS, C), tl.float32),)
    return b_tiles


@triton.jit
def _scores(b_q, b_k, m_pair, scale, PRECISION: tl.constexpr):
    """Scores in base 2 where the pair may see each other. The select keeps a later `- maximum` from being fused with the
    product, so that the winner of a row has the weight 1 exactly."""
    return tl.where(m_pair, _inner(b_q, b_k, PRECISION) * (scale * common.LOG2E), common.HIDDEN)


# ---------------------------------------------------------------------------------------------------------------- packed


@triton.jit
def _packed_rows(T, N, H, ROWS: tl.constexpr):
    """Which rows a program owns: batch, head, and per row its tube within the tile, its token, whether it is real."""
    # x // T for x and T up to 2**8, as x * inverse >> 16: a division costs 20 instructions for each column of a thread.
    inverse = tl.cdiv(65536, T)
    pack = ROWS * inverse >> 16
    count = tl.cdiv(N, pack)
    i_bh = tl.program_id(0) // count
    o_row = tl.arange(0, ROWS)
    o_tube = o_row * inverse >> 16
    o_n = (tl.program_id(0) % count) * pack + o_tube
    o_token = (o_row - o_tube * T) * N + o_n
    # int64: the offset of a batch row passes 2^31, and with unusual strides so does that of a token or a head.
    return (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), o_tube, o_token.to(tl.int64), (o_tube < pack) & (o_n < N)


@triton.jit
def _packed_weights(b_q, b_k, o_tube, scale, PRECISION: tl.constexpr):
    """The softmax before division, and its row sums. Spare tubes are zeros that see each other: no row is empty."""
    b_s = _scores(b_q, b_k, o_tube[:, None] == o_tube[None], scale, PRECISION)
    b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
    return b_p, tl.sum(b_p, 1)


@triton.jit(do_not_specialize=_RUNTIME)
def forward_packed(
    p_qkv, p_out, qkv_sb, qkv_ss, qkv_s3, qkv_sh, scale, T, N, H, D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr
):
    i_b, i_h, o_tube, o_token, m_row = _packed_rows(T, N, H, ROWS)
    C: tl.constexpr = D & -D
    o_c = tl.arange(0, C)[None]

    p_q = p_qkv + i_b * qkv_sb + i_h * qkv_sh + o_token[:, None] * qkv_ss + o_c
    # v, needed last, is asked for first: else the compiler lets its loads wait for q and k.
    b_v = _load(p_q + qkv_s3 + qkv_s3, m_row, D, C)
    b_q = _load(p_q, m_row, D, C)
    b_k = _load(p_q + qkv_s3, m_row, D, C)

    b_p, b_sum = _packed_weights(b_q, b_k, o_tube, scale, PRECISION)
    b_out = _scaled(_outer(common.to(b_p, b_q[0].dtype), b_v, PRECISION), 1 / b_sum)
    _store(p_out + ((i_b * T * N + o_token[:, None]) * H + i_h) * D + o_c, b_out, m_row, C)


@triton.jit(do_not_specialize=_RUNTIME)
def backward_packed(
    p_do,
    p_qkv,
    p_dqkv,
    qkv_sb,
    qkv_ss,
    qkv_s3,
    qkv_sh,
    scale,
    T,
    N,
    H,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b, i_h, o_tube, o_token, m_row = _packed_rows(T, N, H, ROWS)
    C: tl.constexpr = D & -D
    o_c = tl.arange(0, C)[None]
    o_out = i_b * T * N + o_token[:, None]  # row in the contiguous gradients

    p_q = p_qkv + i_b * qkv_sb + i_h * qkv_sh + o_token[:, None] * qkv_ss + o_c
    # As in the forward, what is needed last is asked for first.
    b_v = _load(p_q + qkv_s3 + qkv_s3, m_row, D, C)
    b_do = _load(p_do + (o_out * H + i_h) * D + o_c, m_row, D, C)
    b_q = _load(p_q, m_row, D, C)
    b_k = _load(p_q + qkv_s3, m_row, D, C)

    # The gradient of a spare row's output reads as zero, and so are its dP, delta and dS: it adds nothing to dK and dV.
    b_p, b_sum = _packed_weights(b_q, b_k, o_tube, scale, PRECISION)
    b_p = b_p * (1 / b_sum)[:, None]
    b_dp = _inner(b_do, b_v, PRECISION)
    b_delta = tl.sum(b_p * b_dp, 1)
    b_ds = common.to(b_p * (b_dp - b_delta[:, None]) * scale, b_q[0].dtype)
    b_p = common.to(b_p, b_q[0].dtype)

    p_dq = p_dqkv + (o_out * 3 * H + i_h) * D + o_c
    _store(p_dq, _outer(b_ds, b_k, PRECISION), m_row, C)
    _store(p_dq + H * D, _outer(tl.trans(b_ds), b_q, PRECISION), m_row, C)
    _store(p_dq + 2 * H * D, _outer(tl.trans(b_p), b_do, PRECISION), m_row, C)


# ------------------------------------------------------------------------------------------------------------------ long


@triton.jit
def _long_place(T, N, H, ROWS: tl.constexpr):
    """Which rows a program owns: batch, head, place n of its tube, first frame. Tiles of a tube are neighbours."""
    count = tl.cdiv(T, ROWS)
    i_tube = tl.program_id(0) // count
    i_bh = i_tube // N
    return (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), i_tube % N, (tl.program_id(0) % count) * ROWS


@triton.jit
def _long_rows(o_t, i_n, T, N):
    """Tokens of the tube's rows of frames o_t, as a column, and whether the rows are real."""
    return (o_t * N + i_n).to(tl.int64)[:, None], o_t < T


@triton.jit(do_not_specialize=_RUNTIME)
def forward_long(
    p_qkv,
    p_out,
    qkv_sb,
    qkv_ss,
    qkv_s3,
    qkv_sh,
    scale,
    T,
    N,
    H,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b, i_h, i_n, i_t = _long_place(T, N, H, ROWS)
    C: tl.constexpr = D & -D
    o_c = tl.arange(0, C)[None]
    o_token, m_row = _long_rows(i_t + tl.arange(0, ROWS), i_n, T, N)

    p_tube = p_qkv + i_b * qkv_sb + i_h * qkv_sh + o_c
    b_q = _load(p_tube + o_token * qkv_ss, m_row, D, C)
    b_max = tl.full((ROWS,), common.HIDDEN, tl.float32)
    b_sum = tl.zeros((ROWS,), tl.float32)
    b_out = _zeros(ROWS, D, C)
    for i_key in range(0, T, KEYS):
        o_key, m_key = _long_rows(i_key + tl.arange(0, KEYS), i_n, T, N)
        p_k = p_tube + o_key * qkv_ss + qkv_s3
        b_k = _load(p_k, m_key, D, C)
        b_v = _load(p_k + qkv_s3, m_key, D, C)
        b_s = _scores(b_q, b_k, m_key[None], scale, PRECISION)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_old = tl.exp2(b_max - b_new)
        b_p = tl.exp2(b_s - b_new[:, None])
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_out = _plus(_scaled(b_out, b_old), _outer(common.to(b_p, b_q[0].dtype), b_v, PRECISION))
        b_max = b_new
    _store(p_out + ((i_b * T * N + o_token) * H + i_h) * D + o_c, _scaled(b_out, 1 / b_sum), m_row, C)


@triton.jit(do_not_specialize=_RUNTIME)
def backward_long_queries(
    p_do,
    p_qkv,
    p_dqkv,
    p_stat,
    qkv_sb,
    qkv_ss,
    qkv_s3,
    qkv_sh,
    scale,
    T,
    N,
    H,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of a tile of query rows, and for `backward_long_keys` their maximum, 1 / sum and delta, (B, H, N, 3, T)."""
    i_b, i_h, i_n, i_t = _long_place(T, N, H, ROWS)
    C: tl.constexpr = D & -D
    o_c = tl.arange(0, C)[None]
    o_token, m_row = _long_rows(i_t + tl.arange(0, ROWS), i_n, T, N)
    o_out = i_b * T * N + o_token  # row in the contiguous gradients

    p_tube = p_qkv + i_b * qkv_sb + i_h * qkv_sh + o_c
    b_q = _load(p_tube + o_token * qkv_ss, m_row, D, C)
    b_do = _load(p_do + (o_out * H + i_h) * D + o_c, m_row, D, C)

    # First walk: maximum, sum, and delta relative to both.
    b_max = tl.full((ROWS,), common.HIDDEN, tl.float32)
    b_sum = tl.zeros((ROWS,), tl.float32)
    b_delta = tl.zeros((ROWS,), tl.float32)
    for i_key in range(0, T, KEYS):
        o_key, m_key = _long_rows(i_key + tl.arange(0, KEYS), i_n, T, N)
        p_k = p_tube + o_key * qkv_ss + qkv_s3
        b_k = _load(p_k, m_key, D, C)
        b_v = _load(p_k + qkv_s3, m_key, D, C)
        b_s = _scores(b_q, b_k, m_key[None], scale, PRECISION)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_old = tl.exp2(b_max - b_new)
        b_p = tl.exp2(b_s - b_new[:, None])
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_delta = b_delta * b_old + tl.sum(b_p * _inner(b_do, b_v, PRECISION), 1)
        b_max = b_new
    b_norm = 1 / b_sum
    b_delta *= b_norm
    p_row = p_stat + ((i_b * H + i_h) * N + i_n) * 3 * T + i_t + tl.arange(0, ROWS)
    tl.store(p_row, b_max, mask=m_row)
    tl.store(p_row + T, b_norm, mask=m_row)
    tl.store(p_row + 2 * T, b_delta, mask=m_row)

    # Second walk: dQ.
    b_dq = _zeros(ROWS, D, C)
    for i_key in range(0, T, KEYS):
        o_key, m_key = _long_rows(i_key + tl.arange(0, KEYS), i_n, T, N)
        p_k = p_tube + o_key * qkv_ss + qkv_s3
        b_k = _load(p_k, m_key, D, C)
        b_v = _load(p_k + qkv_s3, m_key, D, C)
        b_p = tl.exp2(_scores(b_q, b_k, m_key[None], scale, PRECISION) - b_max[:, None]) * b_norm[:, None]
        b_ds = b_p * (_inner(b_do, b_v, PRECISION) - b_delta[:, None]) * scale
        b_dq = _plus(b_dq, _outer(common.to(b_ds, b_q[0].dtype), b_k, PRECISION))
    _store(p_dqkv + (o_out * 3 * H + i_h) * D + o_c, b_dq, m_row, C)


@triton.jit(do_not_specialize=_RUNTIME)
def backward_long_keys(
    p_do,
    p_qkv,
    p_dqkv,
    p_stat,
    qkv_sb,
    qkv_ss,
    qkv_s3,
    qkv_sh,
    scale,
    T,
    N,
    H,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of a tile of key rows, walking over the tube's query rows. Runs after `backward_long_queries`."""
    i_b, i_h, i_n, i_t = _long_place(T, N, H, KEYS)
    C: tl.constexpr = D & -D
    o_c = tl.arange(0, C)[None]
    o_token, m_key = _long_rows(i_t + tl.arange(0, KEYS), i_n, T, N)

    p_tube = p_qkv + i_b * qkv_sb + i_h * qkv_sh + o_c
    b_k = _load(p_tube + o_token * qkv_ss + qkv_s3, m_key, D, C)
    b_v = _load(p_tube + o_token * qkv_ss + qkv_s3 + qkv_s3, m_key, D, C)
    p_row = p_stat + ((i_b * H + i_h) * N + i_n) * 3 * T + tl.arange(0, ROWS)
    b_dk = _zeros(KEYS, D, C)
    b_dv = _zeros(KEYS, D, C)
    for i_row in range(0, T, ROWS):
        # Absent query rows read zeros everywhere, 1 / sum included: their P and dS are zero.
        o_query, m_row = _long_rows(i_row + tl.arange(0, ROWS), i_n, T, N)
        b_q = _load(p_tube + o_query * qkv_ss, m_row, D, C)
        b_do = _load(p_do + ((i_b * T * N + o_query) * H + i_h) * D + o_c, m_row, D, C)
        b_max = tl.load(p_row + i_row, mask=m_row, other=0.0)
        b_norm = tl.load(p_row + i_row + T, mask=m_row, other=0.0)
        b_delta = tl.load(p_row + i_row + 2 * T, mask=m_row, other=0.0)
        b_p = tl.exp2(_scores(b_q, b_k, m_key[None], scale, PRECISION) - b_max[:, None]) * b_norm[:, None]
        b_ds = b_p * (_inner(b_do, b_v, PRECISION) - b_delta[:, None]) * scale
        b_dk = _plus(b_dk, _outer(tl.trans(common.to(b_ds, b_k[0].dtype)), b_q, PRECISION))
        b_dv = _plus(b_dv, _outer(tl.trans(common.to(b_p, b_k[0].dtype)), b_do, PRECISION))
    p_dk = p_dqkv + ((i_b * T * N + o_token) * 3 * H + H + i_h) * D + o_c
    _store(p_dk, b_dk, m_key, C)
    _store(p_dk + H * D, b_dv, m_key, C)


# ------------------------------------------------------------------------------------------------------------------ host


def forward(qkv: torch.Tensor, layout: TokenLayout, scale: float) -> torch.Tensor:
    """Tube attention, paper equation 1 without norm, projections and residual.

    Args:
        qkv: (B, T*N, 3, H, D), any strides with the last dimension contiguous; dtype and D as `tiles.unsupported` admits.
        layout: gives T and N; no other field is read.
        scale: factor on q.k.

    Returns:
        (B, T*N, H, D), contiguous, in qkv's dtype.
    """
    B, tokens, _, H, D = qkv.shape
    T, N = layout.frames, layout.patches
    out = torch.empty(B, tokens, H, D, dtype=qkv.dtype, device=qkv.device)
    args = (qkv, out, *qkv.stride()[:4], float(scale), T, N, H)
    if tile := tiles.holding("tube_forward", qkv.device, qkv.dtype, D, T):
        grid = (B * H * triton.cdiv(N, tile.rows // T),)
        sizes = {"D": D, "ROWS": tile.rows, "PRECISION": common.precision(qkv.dtype)}
        common.launch(forward_packed, grid, *args, **sizes, num_warps=tile.warps)
    else:
        (tile,) = tiles.lookup("tube_forward_long", qkv.device, qkv.dtype, D)
        grid = (B * H * N * triton.cdiv(T, tile.rows),)
        sizes = {"D": D, "ROWS": tile.rows, "KEYS": tile.keys, "PRECISION": common.precision(qkv.dtype)}
        common.launch(forward_long, grid, *args, **sizes, num_warps=tile.warps, num_stages=tile.stages)
    return out


def backward(grad_out: torch.Tensor, qkv: torch.Tensor, layout: TokenLayout, scale: float) -> torch.Tensor:
    """Gradient of `forward` by qkv, from qkv and the contiguous gradient of the output alone.

    Args:
        grad_out: (B, T*N, H, D), contiguous.
        qkv, layout, scale: as in `forward`.

    Returns:
        (B, T*N, 3, H, D), contiguous, in qkv's dtype.
    """
    B, tokens, _, H, D = qkv.shape
    T, N = layout.frames, layout.patches
    dqkv = torch.empty(B, tokens, 3, H, D, dtype=qkv.dtype, device=qkv.device)
    args = (*qkv.stride()[:4], float(scale), T, N, H)
    if tile := tiles.holding("tube_backward", qkv.device, qkv.dtype, D, T):
        grid = (B * H * triton.cdiv(N, tile.rows // T),)
        sizes = {"D": D, "ROWS": tile.rows, "PRECISION": common.precision(qkv.dtype)}
        common.launch(backward_packed, grid, grad_out, qkv, dqkv, *args, **sizes, num_warps=tile.warps)
    else:
        stat = torch.empty(B, H, N, 3, T, dtype=torch.float32, device=qkv.device)
        for kernel, name in ((backward_long_queries, "tube_backward_queries"), (backward_long_keys, "tube_backward_keys")):
            (tile,) = tiles.lookup(name, qkv.device, qkv.dtype, D)
            owned = tile.rows if kernel is backward_long_queries else tile.keys
            grid = (B * H * N * triton.cdiv(T, owned),)
            sizes = {"D": D, "ROWS": tile.rows, "KEYS": tile.keys, "PRECISION": common.precision(qkv.dtype)}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            common.launch(kernel, grid, grad_out, qkv, dqkv, stat, *args, **sizes, **options)
    return dqkv
