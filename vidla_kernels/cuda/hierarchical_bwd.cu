// Hierarchical attention, backward. qkv (B, S, 3, H, D), out, dO (B, S, H, D), log-sum-exp (B, H, S) in base 2 ->
// d_qkv (B, S, 3, H, D); bf16 or fp16, sums in fp32. Five products: S = QK', dP = dO V', dV = P' dO, dK = dS' Q,
// dQ = dS K, with P = exp2(scale_log2 S - lse) and dS = P (dP - delta), delta = rowsum(dO * O).
//
// Tiling. A block takes frame after frame of one (batch, head); a frame's keys, its queries and who sees whom:
// hierarchical.cuh. Q and dO of all its queries are in shared memory. Each warp owns 16 * tiles query rows: their Q and
// dO are fragments in registers, and so is their dQ. K and V pass by in a ring, `chunk` keys at a time:
//     phase 1  a warp: S and dP of its rows (dP starts from -delta), P, dS; dQ += dS K straight from registers; P and dS
//              in 16 bits to the strips, two tables (queries x chunk) in shared memory
//     phase 2  a warp: 32 keys (16 at the end of a frame) by `columns` of the 2 D columns of dK and dV; it multiplies
//              the strips, transposed on the way by ldmatrix, with Q and dO. All queries are there, so the sums are
//              whole when they leave the registers: a key's gradient is written once, and by nobody else.
// With one pair of strips there are two block barriers a chunk; with two pairs phase 2 runs a chunk behind phase 1: one
// barrier a chunk, and warps in either phase.
// With two sets of tables, Q and dO of the next frame arrive during this one; so do, in any case, its first keys. Its O
// and lse are loaded while dQ leaves; delta is the diagonal of dO O', by mma. Delta from O is one unit of traffic (8 instead
// of 7); from P and dP it would be two products more, for it needs a whole row first.
// Where a warp is left over (7 warps own the 224 rows of N=196), it alone fetches, while the others multiply.
// Rows that see nothing here (an MST level in a frame it skips, spare rows) have lse = +inf, so P = 0 without a test.
//
// Patch gradients are final. What a frame adds to a summary token's dQ, dK and dV (MST's, and CLS's key if patches see
// it) is summed up in shared memory, over the frames of a segment: (batch, head) has `segments` of them, as few as keep
// all blocks busy. A segment's sums go out in fp32, and the second kernel adds them up in order, with CLS's attention to
// itself. No atomics: the same bits every run. Where shared memory has no room, the sums wait in global memory, in L2.
// More queries than the warps own: several turns; dK and dV wait in `carry`, where the thread that wrote a sum is the one
// that takes it up again, in a place of the block's own that L2 keeps.
#include "hierarchical_bwd_sm90.cuh"

#include <cstdio>
#include <type_traits>

namespace vidla {

// What is fixed at compile time, and where things lie in a block's shared memory: all of it constants, which instructions
// carry as they are.
template <int D_, int warps_, int owners_, int tiles_, int chunk_, int columns_, int buffers_, int sets_, int blocks_>
struct Tiling {
  static constexpr int D = D_, warps = warps_, tiles = tiles_, chunk = chunk_, columns = columns_;
  static constexpr int owners = owners_;    // warps that own query rows; all of them multiply in phase 2
  static constexpr int buffers = buffers_;  // pairs of strips
  static constexpr int sets = sets_;        // of tables of Q and dO
  static constexpr int blocks = blocks_;    // a multiprocessor
  static constexpr int rows = 16 * tiles;   // a warp
  static constexpr int capacity = owners * rows;
  static_assert(chunk % 32 == 0 && columns % 16 == 0 && D % columns == 0, "phase 2: 32 keys by columns of dK or of dV");

  using Row = Rows<D>;
  using Strip = Rows<chunk>;
  static constexpr int table = capacity * Row::bytes;             // of Q or dO; those of a set side by side
  static constexpr int keys_at = 2 * sets * table;                // the ring's two slots; K and V side by side
  static constexpr int slot = 2 * chunk * Row::bytes, v_after_k = chunk * Row::bytes;
  static constexpr int strips_at = keys_at + 2 * slot;       // pairs; dS and P side by side
  static constexpr int p_after_ds = capacity * Strip::bytes, pair = 2 * p_after_ds;
  static constexpr int sums_at = strips_at + buffers * pair;      // of summary tokens, (3, G, D) in fp32
  // Where a summary token's columns lie: turned by the token, so that 8 rows of 4 lanes fall on different banks.
  VIDLA_HOST_DEVICE static int in_sums(int row, int token, int column) {
    return sums_at + 4 * (row * D + (column + 8 * (D == 32 ? token >> 1 : token)) % D);
  }
};

// Where a lane's part of a fragment lies: in 16 rows of a table, as it is for ldmatrix and to be transposed by it (an A
// operand as it is lies where a B operand to be transposed does); in 8 rows of a strip, as a C fragment and transposed.
template <class C> struct Lane {
  uint32_t b, b_trans, strip, strip_trans;
  VIDLA_DEVICE explicit Lane(int lane) {
    b = C::Row::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    b_trans = C::Row::at(lane % 16, lane / 16);
    strip = C::Strip::at(lane / 4, 0) + lane % 4 * 4;
    strip_trans = C::Strip::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
};

// What a warp knows of its query rows. [i]: tile, [h]: rows g and g + 8 of it.
template <class T, class C> struct Queries {
  static constexpr int D = C::D, tiles = C::tiles, chunk = C::chunk;
  uint32_t q[tiles][D / 16][4], d_out[tiles][D / 16][4];
  float d_q[tiles][D / 8][4];
  float lse[tiles][2], minus_delta[tiles][4];  // the latter as an accumulator: a row's number in both columns

  // Phase 1 for 16 keys. k_at: 16 rows of K in the ring; ds_at: where this lane's part of dS goes, in the strip. limit(i,
  // h): the keys that row of this lane sees, counted from this lane's first; asked only where masked.
  template <bool masked, class Limit>
  VIDLA_DEVICE void step(uint32_t k_at, uint32_t ds_at, const Lane<C>& in, float scale_log2, Limit limit) {
    float s[tiles][2][4] = {}, t[tiles][2][4];  // scores, then P; dP - delta, then dS
    const uint32_t b_at = k_at + in.b;
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4(b, Rows<D>::along(b_at, 2 * d));
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        mma_m16n8k16<T>(s[i][0], q[i][d], b[0], b[1]);
        mma_m16n8k16<T>(s[i][1], q[i][d], b[2], b[3]);
      }
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4(b, Rows<D>::along(b_at, 2 * d) + C::v_after_k);
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        mma_m16n8k16<T>(t[i][0], d_out[i][d], b[0], b[1], d ? t[i][0] : minus_delta[i]);
        mma_m16n8k16<T>(t[i][1], d_out[i][d], b[2], b[3], d ? t[i][1] : minus_delta[i]);
      }
    }

    uint32_t ds[tiles][4], b[D / 16][4];
    auto load_k = [&](int d) { ldmatrix_x4_trans(b[d], Rows<D>::along(k_at + in.b_trans, 2 * d)); };
#pragma unroll
    for (int d = 0; d < D / 16 && tiles > 1; ++d) load_k(d);  // where there are registers for it, before they are waited for
    int limits[tiles][2];  // each asked for once, all before any is waited for: in a clip's first frame they are in memory
    if (masked) {
#pragma unroll
      for (int i = 0; i < 2 * tiles; ++i) limits[i / 2][i % 2] = limit(i / 2, i % 2);
    }
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // register e of an A operand: rows g + 8 * (e % 2), columns 8 * (e / 2) + 2 j
        float *x = s[i][e / 2] + e % 2 * 2, *y = t[i][e / 2] + e % 2 * 2;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x[c] = exp2_fast(x[c] * scale_log2 - lse[i][e % 2]);
          if (masked && e / 2 * 8 + c >= limits[i][e % 2]) x[c] = 0;
          y[c] *= x[c];
        }
        ds[i][e] = pack<T>(y[0], y[1]);
        const uint32_t to = Rows<chunk>::along(ds_at, e / 2) + (16 * i + e % 2 * 8) * Rows<chunk>::bytes;
        store_shared(to, ds[i][e]);
        store_shared(to + C::p_after_ds, pack<T>(x[0], x[1]));
      }
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      if (tiles == 1) load_k(d);
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        mma_m16n8k16<T>(d_q[i][2 * d], ds[i], b[d][0], b[d][1]);
        mma_m16n8k16<T>(d_q[i][2 * d + 1], ds[i], b[d][2], b[d][3]);
      }
    }
  }
};

// Phase 2: acc (16 * m keys, 16 * n columns) = strip' * table, over `rows` queries; where this lane reads them.
template <class T, class C, int m, int n>
VIDLA_DEVICE void transposed_product(float (&acc)[m][2 * n][4], uint32_t strip_at, uint32_t table_at, int rows) {
  using Strip = Rows<C::chunk>;
  using Table = Rows<C::D>;
  uint32_t a_at[m], b_at[n];
#pragma unroll
  for (int i = 0; i < m; ++i) a_at[i] = Strip::along(strip_at, 2 * i);
#pragma unroll
  for (int c = 0; c < n; ++c) b_at[c] = Table::along(table_at, 2 * c);
#pragma unroll 2
  for (int row = 0; row < rows; row += 16) {
    uint32_t a[m][4];
#pragma unroll
    for (int i = 0; i < m; ++i) {  // stored by query: the transposed matrices of keys 0-7, 8-15, for queries 0-7, 8-15
      ldmatrix_x4_trans(a[i], a_at[i]);
      a_at[i] += 16 * Strip::bytes;
    }
#pragma unroll
    for (int c = 0; c < n; ++c) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, b_at[c]);
      b_at[c] += 16 * Table::bytes;
#pragma unroll
      for (int i = 0; i < m; ++i) {
        mma_m16n8k16<T>(acc[i][2 * c], a[i], b[0], b[1]);
        mma_m16n8k16<T>(acc[i][2 * c + 1], a[i], b[2], b[3]);
      }
    }
  }
}

template <class T, class C> VIDLA_KERNEL(32 * C::warps, C::blocks) hierarchical_bwd_frames(Gradient p) {
  constexpr int D = C::D, warps = C::warps, tiles = C::tiles, rows = C::rows, chunk = C::chunk, units = D / 8;
  const int thread = thread_index(), warp = thread >> 5;
  const int third = p.heads * D, token_stride = 3 * third, qkv_token = int(p.qkv_token);
  const int queries = p.queries(), keys = p.keys(), padded = p.padded_keys();
  const int chunks = (padded + chunk - 1) / chunk, turns = (queries + C::capacity - 1) / C::capacity;
  const uint32_t base = shared_base();
  const int mine = warp * rows;  // in the tables

  // Where an item begins, in elements; told afresh at each use, for 64-bit bases kept in registers spill.
  auto in_qkv = [&](const Item& o) { return not_ahead(o.batch) * p.qkv_batch + o.head * p.qkv_head; };
  auto in_d_qkv = [&](const Item& o) { return (int64_t(not_ahead(o.batch)) * p.sequence() * 3 * p.heads + o.head) * D; };
  auto in_out = [&](const Item& o) { return (int64_t(not_ahead(o.batch)) * p.sequence() * p.heads + o.head) * D; };
  auto of_head = [&](const Item& o) { return int64_t(not_ahead(o.batch)) * p.heads + o.head; };

  // Who fetches: the warps without rows of their own, or else all. 16 bytes a thread, by cp.async.
  using First = std::integral_constant<int, C::owners < warps ? C::owners : 0>;
  const bool fetches = warp >= First::value;

  // Rows `from` to `to` of a tile of two tables, `apart` bytes after one another at `at`, whose row 0 is number `origin` of
  // a frame; rows from `end` on are zeros. a(), b(): the tensors at token 0. Whole warps go round the loops together.
  // Warps from first_warp on do it.
  auto fetch = [&](auto first_warp, uint32_t at, int apart, auto a, int a_token, auto b, int b_token, int frame,
                   int origin, int from, int to, int end, auto summary_token) {
    constexpr int fetchers = warps - decltype(first_warp)::value;
    const int index = not_ahead(thread) - 32 * (warps - fetchers), to_patch = p.query_token(frame, 0);
    constexpr int step = 32 * fetchers / units, group = step < 8 ? 8 : step;
    if constexpr (32 * fetchers % units == 0 && group % 8 == 0) {  // patches: neighbouring tokens, nothing but sums
      const int row = from + index / units, token = to_patch + origin + row, last = p.patches - origin;
      const T *from_a = a() + (int64_t(token) * a_token + index % units * 8);
      const T *from_b = b() + (int64_t(token) * b_token + index % units * 8);
#pragma unroll 1
      for (; from + group <= (to < last ? to : last); from += group) {
#pragma unroll
        for (int i = 0; i < group; i += step) {
          const uint32_t here = at + C::Row::at(from + i + index / units, index % units);
          cp_async_16(here, from_a, true);
          cp_async_16(here + apart, from_b, true);
          from_a += int64_t(step) * a_token, from_b += int64_t(step) * b_token;
        }
      }
    }
#pragma unroll 1
    for (int i = from * units + index; i < to * units; i += 32 * fetchers) {
      const int row = i / units, unit = i % units, number = origin + row;
      const bool valid = number < end;
      const int token = !valid ? 0 : number < p.patches ? to_patch + number : summary_token(number - p.patches);
      const uint32_t here = at + C::Row::at(row, unit);
      cp_async_16(here, a() + (int64_t(token) * a_token + 8 * unit), valid);
      cp_async_16(here + apart, b() + (int64_t(token) * b_token + 8 * unit), valid);
    }
  };
  auto fetch_queries = [&](auto first_warp, const Item& item, int turn, int set, int from, int to) {
    if (item.unit >= p.units()) return;
    auto q = [&] { return static_cast<const T*>(p.qkv) + in_qkv(item); };
    auto d_out = [&] { return static_cast<const T*>(p.d_out) + in_out(item); };
    fetch(first_warp, base + 2 * set * C::table, C::table, q, qkv_token, d_out, third, item.frame, turn * C::capacity,
          from, to, queries, [](int i) { return i; });
  };
  auto fetch_keys = [&](const Item& item, int chunk_number, int slot) {
    if (item.unit >= p.units()) return;
    const int left = padded - chunk_number * chunk;  // padding is zero, because 0 * NaN would spoil dQ
    auto k = [&] { return static_cast<const T*>(p.qkv) + in_qkv(item) + p.qkv_third; };
    auto v = [&] { return static_cast<const T*>(p.qkv) + in_qkv(item) + 2 * p.qkv_third; };
    fetch(First{}, base + C::keys_at + slot * C::slot, C::v_after_k, k, qkv_token, v, qkv_token, item.frame,
          chunk_number * chunk, 0, left < chunk ? left : chunk, keys, [&](int i) { return i < p.mst() ? 1 + i : 0; });
  };

  // Output and lse of this warp's rows. The output is held like a B operand whose columns are the rows, so that the
  // diagonal of dO times its transpose is delta. Spare rows load another row, and are left out of delta.
  uint32_t o[tiles][D / 16][4];
  float next_lse[tiles][2];
  int next_stride[tiles][2];  // the row sees every so-manieth frame; 0: no row
  auto load_rows = [&](const Item& item, int turn) {
    const int lane = not_ahead(thread) & 31, first = turn * C::capacity + mine + lane / 4;
    const T* out = static_cast<const T*>(p.out) + in_out(item) + lane % 4 * 2;
    const float* lse = p.lse + of_head(item) * p.sequence();
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first + 16 * i + 8 * h;
        const bool valid = row < queries && mine < C::capacity;
        const int token = valid ? p.query_token(item.frame, row) : 0;
        next_lse[i][h] = as_float(load_global<uint32_t>(lse + token, true));
        next_stride[i][h] = valid ? 1 : 0;
        if (valid && row >= p.patches) next_stride[i][h] = load_constant(p.rows + 3 * token + 2);
        const T* from = out + int64_t(token) * third;
#pragma unroll
        for (int c = 0; c < D / 8; ++c) o[i][c / 2][2 * h + c % 2] = load_global<uint32_t>(from + 8 * c, true);
      }
    }
  };

  Item item = Item::first(p, block_index());
  int turn = 0, set = 0, slot = 0;
  if (fetches) {
    if (C::sets == 2) fetch_queries(First{}, item, turn, set, 0, C::capacity);
    fetch_keys(item, 0, slot);
  }
  cp_async_commit();
  load_rows(item, turn);

#pragma unroll 1
  while (item.unit < p.units()) {  // a turn over one frame
    const bool last_turn = turn + 1 == turns;
    const Item next = last_turn ? item.next(p) : item;
    const int next_turn = last_turn ? 0 : turn + 1;
    const int frame = item.frame, begin = turn * C::capacity, left = queries - begin;
    const int used = left < C::capacity ? (left + 15) / 16 * 16 : C::capacity;  // rows with something in them
    const int first = begin + mine;
    const bool owner = first < queries && mine < C::capacity;
    const uint32_t tables_at = base + 2 * set * C::table;
    if (C::sets == 1) {
      block_sync();  // phase 2 has read the tables and the strips
      fetch_queries(std::integral_constant<int, 0>{}, item, turn, 0, 0, C::capacity);  // by all warps
      cp_async_commit();
    }
    cp_async_wait<0>();
    block_sync();  // Q, dO and the first keys are there; all are done with the item before

    Queries<T, C> own;
    if (!owner) own = {};  // left as it was, it would be live all the while
#pragma unroll
    for (int i = 0; i < tiles * D / 2; ++i) own.d_q[i / (D / 2)][i / 4 % (D / 8)][i % 4] = 0;
    if (owner) {
      const int lane = not_ahead(thread) & 31, g = lane / 4, j = lane % 4;
      const uint32_t mine_at = tables_at + mine * C::Row::bytes + Lane<C>(lane).b_trans;
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        float products[2][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          const uint32_t at = Rows<D>::along(mine_at, 2 * d) + 16 * i * Rows<D>::bytes;
          ldmatrix_x4(own.q[i][d], at);
          ldmatrix_x4(own.d_out[i][d], at + C::table);
          mma_m16n8k16<T>(products[0], own.d_out[i][d], o[i][d][0], o[i][d][1]);
          mma_m16n8k16<T>(products[1], own.d_out[i][d], o[i][d][2], o[i][d][3]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // row g + 8 h by column g: with the lane whose columns are 2 j and 2 j + 1
          const float mine = g % 2 ? products[h][2 * h + 1] : products[h][2 * h];
          float delta = g / 2 == j && next_stride[i][h] ? mine : 0;
          delta += shuffle_xor(delta, 1);
          delta += shuffle_xor(delta, 2);
          own.minus_delta[i][2 * h] = own.minus_delta[i][2 * h + 1] = -delta;
          own.lse[i][h] = next_lse[i][h];
          if (first + rows > p.patches && (!next_stride[i][h] || frame % next_stride[i][h])) own.lse[i][h] = -minus_infinity;
        }
      }
    }

    // The next item's rows are fetched in parts, one with every chunk but the last.
    const int parts = chunks > 1 ? chunks - 1 : 1, part_rows = (C::capacity / 16 + parts - 1) / parts * 16;
    auto phase_1 = [&](int c) {
      const Lane<C> in(not_ahead(thread) & 31);
      const int common = first + rows <= p.patches ? keys : p.patches;  // every row that sees a key sees these
      const uint32_t strip_at = base + C::strips_at + c % C::buffers * C::pair + mine * C::Strip::bytes + in.strip;
      uint32_t k_at = base + C::keys_at + slot * C::slot;
#pragma unroll 1
      for (int local = 0; local < chunk && c * chunk + local < padded; local += 16) {
        const int key = c * chunk + local;
        const uint32_t ds_at = C::Strip::along(strip_at, local / 8);
        auto limit = [&](int i, int h) {
          const int lane = not_ahead(thread) & 31;
          return p.limit(frame, first + 16 * i + 8 * h + lane / 4) - key - lane % 4 * 2;
        };
        if (key + 16 <= common) own.template step<false>(k_at, ds_at, in, p.scale_log2, limit);
        else own.template step<true>(k_at, ds_at, in, p.scale_log2, limit);
        k_at += 16 * C::Row::bytes;
      }
    };

    // Adds two neighbouring columns of a summary token's gradient to its segment's sum. A sum is always the same thread's.
    const bool opens = frame % p.segment_frames == 0;
    const int64_t segment = of_head(item) * p.segments + frame / p.segment_frames;
    auto add_to_sum = [&](float x, float y, int part, int token, int column, bool active) {
      const int row = part * p.summary() + token;
      const uint32_t at = base + C::in_sums(row, token, column);
      float* to = p.partials + (segment * 3 * p.summary() + row) * D + column;
      const bool more = active && !opens;
      const Word2 before = p.sums_stay ? load_shared(at, more) : load_global<Word2>(to, more);
      const Word2 sum{{as_word(x + as_float(before.x[0])), as_word(y + as_float(before.x[1]))}};
      if (p.sums_stay) store_shared(at, sum, active);
      else store_global(to, sum, active);
    };

    auto leave = [&](auto& acc, int key0, int part, int column) {  // a warp's dK or dV
      constexpr int count = sizeof acc / sizeof acc[0], n = C::columns / 16;
      const int lane = not_ahead(thread_index()) & 31, g = lane / 4, j = lane % 4;
      const float factor = part == 1 ? p.scale : 1;
      if (turns > 1) {
        float* carry = p.carry + ((int64_t(block_index()) * padded + key0 + g) * 2 + part - 1) * D + column + 2 * j;
        auto at = [&](int i, int c) { return carry + 16 * D * i + 8 * c; };
        Word2 before[2 * count][2 * n];  // all of it asked for before any is waited for
#pragma unroll
        for (int i = 0; i < 2 * count; ++i) {
#pragma unroll
          for (int c = 0; c < 2 * n; ++c) before[i][c] = load_global<Word2>(at(i, c), turn > 0);
        }
#pragma unroll
        for (int i = 0; i < 2 * count; ++i) {
#pragma unroll
          for (int c = 0; c < 2 * n; ++c) {
            float* two = acc[i / 2][c] + i % 2 * 2;
            two[0] += as_float(before[i][c].x[0]), two[1] += as_float(before[i][c].x[1]);
            store_global(at(i, c), Word2{{as_word(two[0]), as_word(two[1])}}, !last_turn);
          }
        }
        if (!last_turn) return;
      }
      T* row = static_cast<T*>(p.d_qkv) + in_d_qkv(item) + part * third + column;
      row += int64_t(p.key_token(frame, 0) + key0 + g) * token_stride;
#pragma unroll
      for (int i = 0; i < 2 * count; ++i) {
        const int key = key0 + 8 * i + g;
#pragma unroll
        for (int c = 0; c < n; ++c) {
          const float *l = acc[i / 2][2 * c] + i % 2 * 2, *r = acc[i / 2][2 * c + 1] + i % 2 * 2;
          store_16_columns(row + 16 * c, l, r, factor, count == 2 || key < p.patches);
        }
        row += 8 * token_stride;
      }
      if (count == 2 || key0 + 16 <= p.patches) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = key0 + 8 * i + g;
#pragma unroll
        for (int c = 0; c < 2 * n; ++c)
          add_to_sum(acc[0][c][2 * i] * factor, acc[0][c][2 * i + 1] * factor, part, key - p.patches,
                     column + 8 * c + 2 * j, key >= p.patches && key < keys);
      }
    };

    auto phase_2 = [&](int c) {
      const Lane<C> in(not_ahead(thread) & 31);
      constexpr int per_keys = 2 * D / C::columns, n = C::columns / 16;  // shares of 32 keys
#pragma unroll 1
      for (int share = not_ahead(thread) >> 5; share < chunk / 32 * per_keys; share += warps) {
        const int local = share / per_keys * 32, key0 = c * chunk + local;
        const int column = share % per_keys * C::columns, part = column < D ? 1 : 2, of_part = column % D;
        const uint32_t strips_at = base + C::strips_at + c % C::buffers * C::pair + (part == 1 ? 0 : C::p_after_ds);
        const uint32_t strip_at = C::Strip::along(strips_at + in.strip_trans, local / 8);
        const uint32_t table_at = C::Row::along(tables_at + (part == 1 ? 0 : C::table) + in.b_trans, of_part / 8);
        if (key0 + 32 <= p.patches) {
          float acc[2][2 * n][4] = {};
          transposed_product<T, C, 2, n>(acc, strip_at, table_at, used);
          leave(acc, key0, part, of_part);
          continue;
        }
#pragma unroll 1
        for (int half = 0; half < 32 && key0 + half < padded; half += 16) {  // summary keys take more code
          float acc[1][2 * n][4] = {};
          transposed_product<T, C, 1, n>(acc, C::Strip::along(strip_at, half / 8), table_at, used);
          leave(acc, key0 + half, part, of_part);
        }
      }
    };

#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      if (c) {
        cp_async_wait<0>();
        block_sync();  // chunk c is there; phase 1 is done with chunk c - 1, phase 2 with chunk c - buffers
      }
      if (fetches) {
        const int from = c * part_rows, to = from + part_rows < C::capacity ? from + part_rows : C::capacity;
        if (C::sets == 2 && c < parts) fetch_queries(First{}, next, next_turn, 1 - set, from, to);
        const bool more = c + 1 < chunks;
        fetch_keys(more ? item : next, more ? c + 1 : 0, 1 - slot);
      }
      cp_async_commit();
      if (owner) phase_1(c);
      slot = 1 - slot;
      if (C::buffers == 1 && c + 1 < chunks) block_sync();
      const int behind = c + 1 - C::buffers;
      if (behind >= 0 && behind + 1 < chunks) phase_2(behind);
    }
    block_sync();
    phase_2(chunks - 1);
    load_rows(next.unit < p.units() ? next : item, next_turn);  // on their way while dQ leaves, in registers that held Q and dO

    if (owner) {  // dQ
      const int lane = not_ahead(thread) & 31, g = lane / 4, j = lane % 4;
      T* d_q = static_cast<T*>(p.d_qkv) + in_d_qkv(item);
#pragma unroll
      for (int i = 0; i < 2 * tiles; ++i) {
        const int row = first + 8 * i + g;
        if (first + 8 * i < p.patches) {
          T* to = d_q + int64_t(p.query_token(frame, row)) * token_stride;
#pragma unroll
          for (int d = 0; d < D / 16; ++d)
            store_16_columns(to + 16 * d, own.d_q[i / 2][2 * d] + i % 2 * 2, own.d_q[i / 2][2 * d + 1] + i % 2 * 2,
                             p.scale, row < p.patches);
        }
        if (first + 8 * i + 8 > p.patches && first + 8 * i < queries) {
#pragma unroll
          for (int c = 0; c < D / 8; ++c) {
            const float* two = own.d_q[i / 2][c] + i % 2 * 2;
            const bool summary = row >= p.patches && row < queries;
            add_to_sum(two[0] * p.scale, two[1] * p.scale, 0, row - p.patches, 8 * c + 2 * j, summary);
          }
        }
      }
    }
    if (p.sums_stay && last_turn && frame + 1 == item.end) {  // the segment's sums go out
      block_sync();
#pragma unroll 1
      for (int i = not_ahead(thread); i < (3 * p.summary() * (D / 2) + 31) / 32 * 32; i += 32 * warps) {
        const int row = i / (D / 2), column = i % (D / 2) * 2;
        const bool active = row < 3 * p.summary() && row % p.summary() < (row < p.summary() ? p.summary() : keys - p.patches);
        const uint32_t at = base + C::in_sums(row, row % p.summary(), column);
        store_global(p.partials + (segment * 3 * p.summary() + row) * D + column, load_shared(at, active), active);
      }
    }
    item = next, turn = next_turn;
    set = C::sets == 2 ? 1 - set : 0;
  }
}

// A warp owns dQ, dK or dV of one summary token of one (batch, head); a lane holds 4 of its columns.
template <class T, int D> VIDLA_KERNEL(128, 1) hierarchical_bwd_combine(Gradient p) {
  const int lane = thread_index() % 32, index = block_index() * 4 + thread_index() / 32;
  const int part = index % 3, token = index / 3 % p.summary(), head = index / 3 / p.summary() % p.heads;
  const int batch = index / 3 / p.summary() / p.heads;
  if (batch >= p.batch) return;  // a whole warp leaves
  const int third = p.heads * D;
  const bool active = lane < D / 4;
  const int64_t of_head = int64_t(batch) * p.heads + head, at = int64_t(batch) * p.sequence() + token;

  float acc[4] = {};
  if (part == 0 || token || p.patches_see_cls) {
    const int row = part == 0 ? token : token ? token - 1 : p.mst();
    for (int s = 0; s < p.segments; ++s) {
      const int64_t from = (((of_head * p.segments + s) * 3 + part) * p.summary() + row) * D + 4 * lane;
      const Word4 a = load_global<Word4>(p.partials + from, active);
      for (int e = 0; e < 4; ++e) acc[e] += as_float(a.x[e]);
    }
  }
  if (token == 0) {  // CLS sees itself
    const T* cls = static_cast<const T*>(p.qkv) + batch * p.qkv_batch + head * p.qkv_head + 4 * lane;
    const int64_t of_out = at * third + head * D + 4 * lane;
    const Word2 q = load_global<Word2>(cls, active), k = load_global<Word2>(cls + p.qkv_third, active);
    const Word2 v = load_global<Word2>(cls + 2 * p.qkv_third, active);
    const Word2 o = load_global<Word2>(static_cast<const T*>(p.out) + of_out, active);
    const Word2 d_o = load_global<Word2>(static_cast<const T*>(p.d_out) + of_out, active);
    auto dot = [](const Word2& a, const Word2& b) {
      float x = 0;
      for (int e = 0; e < 4; ++e) x += unpack<T>(a.x[e / 2], e % 2) * unpack<T>(b.x[e / 2], e % 2);
      for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
      return x;
    };
    const float lse = as_float(load_global<uint32_t>(p.lse + of_head * p.sequence(), true));
    const float weight = exp2_fast(dot(q, k) * p.scale_log2 - lse);
    const float d_score = weight * (dot(d_o, v) - dot(d_o, o)) * p.scale;
    const Word2 with = part == 0 ? k : part == 1 ? q : d_o;
    const float factor = part == 2 ? weight : d_score;
    for (int e = 0; e < 4; ++e) acc[e] += factor * unpack<T>(with.x[e / 2], e % 2);
  }
  const Word2 w = {{pack<T>(acc[0], acc[1]), pack<T>(acc[2], acc[3])}};
  store_global(static_cast<T*>(p.d_qkv) + at * 3 * third + part * third + head * D + 4 * lane, w, active);
}

// ---- host ----------------------------------------------------------------------------------------------------------
template <class C> constexpr bool wants_wgmma = false;
template <int... sizes> constexpr bool wants_wgmma<Warpgroups<sizes...>> = true;
template <class C> bool serves(const Layout& p) {
  if constexpr (wants_wgmma<C>) return C::serves(p);
  return true;
}
template <class T, class C> int launch_frames(const Gradient& p, int shared, void* stream) {
  if constexpr (wants_wgmma<C>)
    return launch<hierarchical_bwd_frames_wgmma<T, C>>("bwd_frames_wgmma", p.blocks, C::threads, shared, stream,
                                                         Tiles::of(p, C{}));
  else
    return launch<hierarchical_bwd_frames<T, C>>("bwd_frames", p.blocks, 32 * C::warps, shared, stream, p);
}

// With `needed`: only says whether this tiling can take the call, and how many bytes of workspace it needs.
template <class T, class C> int run(Gradient p, const Call& c, void* stream, int64_t* needed) {
  const int heads = p.batch * p.heads, limit = shared_memory_limit(), sums = 12 * C::D * p.summary();
  if (wants_wgmma<C> && architecture() / 10 != 9) return other_gpu;
  if (C::sums_at > limit || !serves<C>(p)) return no_room;
  p.sums_stay = sums <= limit - C::sums_at;
  const int shared = C::sums_at + (p.sums_stay ? sums : 0), fit = (limit + 1024) / (shared + 1024);
  const int room = multiprocessors() * (fit < C::blocks ? fit : C::blocks);

  // Segments as long as possible, where the busiest block's frames are at most 5 % more than the least there can be.
  auto busiest = [&](int length) {
    return (int64_t(heads) * ((p.frames + length - 1) / length) + room - 1) / room * length;
  };
  for (p.segment_frames = p.frames; 20 * busiest(p.segment_frames) > 21 * busiest(1);) --p.segment_frames;
  p.segments = (p.frames + p.segment_frames - 1) / p.segment_frames;
  p.blocks = p.units() < room ? p.units() : room;

  const int64_t partials = int64_t(heads) * p.segments * p.summary() * 3 * C::D;
  const int64_t carry = C::capacity < p.queries() ? int64_t(p.blocks) * p.padded_keys() * 2 * C::D : 0;
  if (needed) return *needed = 4 * (partials + carry), 0;
  if (const int status = wrong_pointers(c, 4 * (partials + carry))) return status;
  watch_buffers(c);
  p.carry = p.partials + partials;
  if (const int status = launch_frames<T, C>(p, shared, stream)) return status;
  const int outputs = heads * p.summary() * 3;
  return launch<hierarchical_bwd_combine<T, C::D>>("bwd_combine", (outputs + 3) / 4, 128, 0, stream, p);
}

// The tilings of a head dimension. The choice is the first one that owns as many rows as a frame has queries, with all its
// blocks in a multiprocessor's shared memory; where there is none, the last that fits, in turns. Warps, those that own
// rows, tiles, chunk, columns, pairs of strips, sets of tables, blocks a multiprocessor.
template <class...> struct List {};
template <int D> struct Tilings;
// Two tiles a warp, so that what is read from shared memory feeds two mma, take 250 registers: 8 warps a multiprocessor.
template <> struct Tilings<64> {
  using type = List<Tiling<64, 4, 4, 1, 32, 32, 1, 2, 3>,   // to 64 rows, N=49: the next frame is on its way; 65 KB
                    Tiling<64, 4, 4, 1, 32, 32, 1, 1, 3>,   // the same in a third of an A100's shared memory
                    Tiling<64, 4, 4, 2, 32, 32, 1, 1, 2>,   // to 128 rows: two blocks
                    Warpgroups<208, 6, 3>,                  // to 256 rows and 208 keys, N=196, on Hopper; 211 KB
                    Tiling<64, 8, 7, 2, 64, 32, 1, 2, 1>,   // to 224 rows, N=196: the next frame is on its way; 209 KB
                    Tiling<64, 8, 7, 2, 64, 32, 1, 1, 1>,   // the same in an A100's shared memory
                    Tiling<64, 8, 8, 2, 64, 32, 1, 1, 1>>;  // to 256 rows, and more in turns
};
template <> struct Tilings<32> {
  using type = List<Tiling<32, 4, 4, 2, 32, 16, 2, 1, 2>, Tiling<32, 8, 8, 2, 64, 16, 1, 2, 1>>;
};
// Two tiles would spill here.
template <> struct Tilings<80> { using type = List<Tiling<80, 10, 10, 1, 32, 16, 1, 1, 1>>; };
template <> struct Tilings<96> { using type = List<Tiling<96, 12, 12, 1, 32, 16, 1, 1, 1>>; };
template <> struct Tilings<128> { using type = List<Tiling<128, 8, 8, 1, 32, 32, 2, 1, 1>>; };

// Calls f with the numbered tiling, if there is one.
template <class F, class... Cs> bool visit(List<Cs...>, int variant, F f) {
  int i = 0;
  return ((i++ == variant && (f(Cs{}), true)) || ...);
}
template <class F> int visit(int head_dim, int variant, F f) {
  auto found = [&](auto tilings) { return visit(typename decltype(tilings)::type{}, variant, f) ? 0 : unknown_variant; };
  if (head_dim == 32) return found(Tilings<32>{});
  if (head_dim == 64) return found(Tilings<64>{});
  if (head_dim == 80) return found(Tilings<80>{});
  if (head_dim == 96) return found(Tilings<96>{});
  if (head_dim == 128) return found(Tilings<128>{});
  return unsupported_dim;
}

inline int choose_backward(const Call& c) {
  int turns = -1;
  for (int variant = 0;; ++variant) {
    bool fits = false, whole = false;
    auto look = [&](auto tiling) {
      using C = decltype(tiling);
      fits = (C::sums_at + 1024) * C::blocks <= shared_memory_limit() + 1024;  // a block takes 1 KB more than it asks for
      fits = fits && serves<C>(layout_of(c));
      whole = C::capacity >= c.patches + c.summary;
    };
    if (visit(c.head_dim, variant, look)) break;  // past the last
    if (fits && whole) return variant;
    if (fits) turns = variant;
  }
  return turns < 0 ? 0 : turns;
}

inline int backward(const Call& c, void* stream, int64_t* needed) {
  if (const int status = wrong_sizes(c)) return status;
  if (c.qkv_token != int32_t(c.qkv_token)) return bad_layout;
  const Gradient p{layout_of(c), c.qkv,   c.out,   c.d_out, c.lse, c.d_qkv, static_cast<float*>(c.workspace),
                   nullptr,      c.scale, c.scale * log2_e, 0, 0, 0, false};
  int status = 0;
  const int unserved = visit(c.head_dim, c.variant < 0 ? choose_backward(c) : c.variant, [&](auto tiling) {
    using C = decltype(tiling);
    status = c.type ? run<fp16, C>(p, c, stream, needed) : run<bf16, C>(p, c, stream, needed);
  });
  return unserved ? unserved : status;
}
}  // namespace vidla

// Enqueues the backward on `stream` of the current device. Returns 0, a Status (< 0) or a cudaError_t.
VIDLA_EXPORT int vidla_hierarchical_backward(const vidla::Call* c, void* stream) {
  return vidla::backward(*c, stream, nullptr);
}

// Bytes of workspace the call needs, or why it can't be served (a Status, < 0). Pointers aren't looked at.
VIDLA_EXPORT int64_t vidla_hierarchical_backward_workspace(const vidla::Call* c) {
  int64_t needed = 0;
  const int status = vidla::backward(*c, nullptr, &needed);
  return status ? status : needed;
}

// The variant that -1 stands for, and all there are for a head dimension, in words (null past the last).
VIDLA_EXPORT int vidla_hierarchical_backward_choice(const vidla::Call* c) { return vidla::choose_backward(*c); }
VIDLA_EXPORT const char* vidla_hierarchical_backward_variant(int head_dim, int variant) {
  static thread_local char text[128];
  const int missing = vidla::visit(head_dim, variant, [&](auto tiling) {
    using C = decltype(tiling);
    if constexpr (vidla::wants_wgmma<C>)
      snprintf(text, sizeof text, "wgmma, %d warps, %d rows, %d keys, %d tiles in a ring", C::warps, C::capacity, C::keys, C::ring);
    else
      snprintf(text, sizeof text, "%d rows a turn, %d warps, %d tiles, %d keys, %d strips, %d sets, %d blocks", C::capacity,
               C::warps, C::tiles, C::chunk, C::buffers, C::sets, C::blocks);
  });
  return missing ? nullptr : text;
}
