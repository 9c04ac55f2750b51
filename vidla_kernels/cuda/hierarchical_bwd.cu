// Hierarchical attention, backward. qkv, dqkv (B, S, 3, H, D), out, dO (B, S, H, D), log-sum-exp (B, H, S); bf16 or
// fp16, sums in fp32. Five products: S = QK', dP = dO V', dV = P' dO, dK = dS' Q, dQ = dS K, with dS = P (dP - delta).
//
// Tiling. A block takes one (batch, head, frame) after the other; its keys, its queries and who sees whom:
// hierarchical.cuh. Q and dO of all its queries are in shared memory. Each warp owns 16 * tiles query rows: their Q and
// dO are fragments in registers, and so is their dQ. K and V pass by in a ring, `chunk` keys at a time:
//     phase 1  a warp: S and dP of its rows, P = exp2(S - lse), dS; dQ += dS K straight from registers; P and dS in
//              16 bits to the strips, two tables (queries x chunk) in shared memory
//     phase 2  a warp: 32 keys (fewer in a small or last chunk) and a share of the 2 D columns of dK and dV; it
//              multiplies the strips, transposed on the way by ldmatrix, with Q and dO. All queries are there, so the
//              sums are whole when they leave the registers: a key's gradient is written once, and by nobody else.
// With one pair of strips there are two block barriers a chunk; with two pairs phase 2 runs a chunk behind phase 1: one
// barrier a chunk, and warps in either phase.
// With two sets of tables, Q and dO of the next item arrive during this one; so do, in any case, its first keys and its
// rows of O. delta = rowsum(dO * O) comes from registers: O is loaded in the layout of dO's fragments. That is one unit
// of traffic (8 instead of 7); summing P * dP needs S and dP of a whole row first, two products more.
// Rows that see nothing here (an MST level in a frame it skips, spare rows) have lse = +inf, so P = 0 without a test.
// More queries than the warps own: several turns; dK and dV of a turn wait in `carry`, where the thread that wrote a
// sum is the one that takes it up again.
// Patch gradients are final. Summary rows' dQ, MST's and CLS's dK and dV are left for each frame, in fp32; the second
// kernel adds them up in frame order, and CLS's attention to itself. No atomics: the same bits every run.
#include "hierarchical.cuh"

namespace vidla {

struct Gradient : Layout {
  const void *qkv, *out, *d_out;
  const float* lse;  // (B, H, S), base 2, as the forward leaves it
  void* d_qkv;
  float* partials;  // (B, H, T, G, 3, D) summary tokens' dQ, dK, dV by frame
  float* carry;     // (B, H, T, padded keys, 2, D) dK, dV between turns; untouched where one turn is enough
  float scale, scale_log2;
  int blocks;  // of the grid; each takes every blocks-th (batch, head, frame)

  // Query rows a turn has room for.
  VIDLA_HOST_DEVICE int turn_rows(int warps, int rows) const {
    const int needed = (queries() + rows - 1) / rows * rows;
    return needed < warps * rows ? needed : warps * rows;
  }
};

// Where things lie in a block's shared memory.
template <int D, int chunk, int buffers, int stages, int sets> struct Places {
  int capacity;  // rows of a turn
  static constexpr int stage = 2 * chunk * Rows<D>::bytes;

  VIDLA_HOST_DEVICE int table() const { return capacity * Rows<D>::bytes; }
  VIDLA_HOST_DEVICE int q(int set) const { return 2 * set * table(); }
  VIDLA_HOST_DEVICE int d_out(int set) const { return q(set) + table(); }
  VIDLA_HOST_DEVICE int k(int slot) const { return q(sets) + slot * stage; }
  VIDLA_HOST_DEVICE int v(int slot) const { return k(slot) + stage / 2; }
  VIDLA_HOST_DEVICE int d_s(int buffer) const { return k(stages) + 2 * buffer * capacity * Rows<chunk>::bytes; }
  VIDLA_HOST_DEVICE int p(int buffer) const { return d_s(buffer) + capacity * Rows<chunk>::bytes; }
  VIDLA_HOST_DEVICE int bytes() const { return d_s(buffers); }
};

// What a warp knows of its query rows. [i]: tile, [h]: rows g and g + 8 of it.
template <class T, int D, int tiles> struct Queries {
  uint32_t q[tiles][D / 16][4], d_out[tiles][D / 16][4];
  float d_q[tiles][D / 8][4];
  float lse[tiles][2], delta[tiles][2];  // lse in units of log 2
  int limit[tiles][2];

  // Phase 1 for 16 keys: `key` in the block's order, `local` in the ring's slot and the strips; `row` in the tables.
  template <int chunk, bool masked>
  VIDLA_DEVICE void step(int key, int local, int row, uint32_t k_at, uint32_t v_at, uint32_t ds_at, uint32_t p_after_ds,
                         float scale_log2) {
    const int lane = not_ahead(thread_index()) & 31, g = lane / 4, j = lane % 4;
    float s[tiles][2][4] = {}, t[tiles][2][4] = {};  // scores, then P; dP, then dS
    const int b_at = Rows<D>::at(local + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4(b, Rows<D>::along(k_at + b_at, 2 * d));
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        mma_m16n8k16<T>(s[i][0], q[i][d], b[0], b[1]);
        mma_m16n8k16<T>(s[i][1], q[i][d], b[2], b[3]);
      }
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4(b, Rows<D>::along(v_at + b_at, 2 * d));
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        mma_m16n8k16<T>(t[i][0], d_out[i][d], b[0], b[1]);
        mma_m16n8k16<T>(t[i][1], d_out[i][d], b[2], b[3]);
      }
    }

    uint32_t ds[tiles][4];
    const uint32_t strip = ds_at + Rows<chunk>::at(row + g, local / 8) + 4 * j;
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // register e of an A operand: rows g + 8 * (e % 2), columns 8 * (e / 2) + 2 j
        float *x = s[i][e / 2] + e % 2 * 2, *y = t[i][e / 2] + e % 2 * 2;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x[c] = exp2_fast(x[c] * scale_log2 - lse[i][e % 2]);
          if (masked && key + e / 2 * 8 + 2 * j + c >= limit[i][e % 2]) x[c] = 0;
          y[c] = x[c] * (y[c] - delta[i][e % 2]);
        }
        ds[i][e] = pack<T>(y[0], y[1]);
        const uint32_t to = Rows<chunk>::along(strip, e / 2) + (16 * i + e % 2 * 8) * Rows<chunk>::bytes;
        store_shared(to, ds[i][e]);
        store_shared(to + p_after_ds, pack<T>(x[0], x[1]));
      }
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, Rows<D>::along(k_at + Rows<D>::at(local + lane % 16, lane / 16), 2 * d));
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        mma_m16n8k16<T>(d_q[i][2 * d], ds[i], b[0], b[1]);
        mma_m16n8k16<T>(d_q[i][2 * d + 1], ds[i], b[2], b[3]);
      }
    }
  }
};

// Phase 2: acc (16 * m keys from `local`, 16 * n columns from `unit`) = strip' * table, over `rows` queries.
template <class T, int D, int chunk, int m, int n>
VIDLA_DEVICE void transposed_product(float (&acc)[m][2 * n][4], uint32_t strip_at, uint32_t table_at, int local,
                                     int unit, int rows) {
  const int lane = not_ahead(thread_index()) & 31;
  strip_at += Rows<chunk>::at(lane % 8 + lane / 16 * 8, local / 8 + lane / 8 % 2);
  table_at += Rows<D>::at(lane % 16, unit + lane / 16);
#pragma unroll 2
  for (int row = 0; row < rows; row += 16) {
    uint32_t a[m][4];
#pragma unroll
    for (int i = 0; i < m; ++i)  // stored by query: the transposed matrices of keys 0-7, 8-15, for queries 0-7, 8-15
      ldmatrix_x4_trans(a[i], Rows<chunk>::along(strip_at + row * Rows<chunk>::bytes, 2 * i));
#pragma unroll
    for (int c = 0; c < n; ++c) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, Rows<D>::along(table_at + row * Rows<D>::bytes, 2 * c));
#pragma unroll
      for (int i = 0; i < m; ++i) {
        mma_m16n8k16<T>(acc[i][2 * c], a[i], b[0], b[1]);
        mma_m16n8k16<T>(acc[i][2 * c + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// Two columns of each of two neighbouring 8-column tiles; lanes trade so that each stores 4 columns, 4 lanes a full
// 32-byte sector. `row` is where the 16 columns begin.
template <class T>
VIDLA_DEVICE void store_16_columns(T* row, const float* l, const float* r, float factor, bool active) {
  const int j = thread_index() & 3;
  const uint32_t left = pack<T>(l[0] * factor, l[1] * factor), right = pack<T>(r[0] * factor, r[1] * factor);
  const uint32_t other = shuffle_xor(j % 2 ? left : right, 1);
  store_global(row + (j % 2 ? 8 + 2 * (j - 1) : 2 * j), j % 2 ? Word2{{other, right}} : Word2{{left, other}}, active);
}

template <class T, int D, int warps, int tiles, int chunk, int buffers, int stages, int sets, int blocks_per_sm>
VIDLA_KERNEL(32 * warps, blocks_per_sm) hierarchical_bwd_frames(Gradient p) {
  constexpr int rows = 16 * tiles, units = D / 8;
  constexpr int key_groups = chunk > 32 ? chunk / 32 : 1, m = chunk / 16 / key_groups;  // phase 2: keys, in 16s, and
  constexpr int columns = 2 * D * key_groups / warps, n = columns / 16;                 // columns a warp
  static_assert(columns % 16 == 0 && D % columns == 0, "a warp's columns are of dK or of dV");
  const int thread = thread_index(), warp = thread >> 5;
  const int third = p.heads * D, token_stride = 3 * third;  // of out, d_out, d_qkv
  const int queries = p.queries(), keys = p.keys(), padded = p.padded_keys();
  const int chunks = (padded + chunk - 1) / chunk;
  const Places<D, chunk, buffers, stages, sets> places{p.turn_rows(warps, rows)};
  const uint32_t base = shared_base();
  const int mine = warp * rows;  // in the tables

  // A round is one turn over one (batch, head, frame). The block takes every p.blocks-th of those.
  const int turns = (queries + places.capacity - 1) / places.capacity;
  const int rounds = (p.batch * p.heads * p.frames - block_index() + p.blocks - 1) / p.blocks * turns;
  struct Item {
    int batch, head, frame;
  };
  auto item_of = [&](int round) {
    const int index = block_index() + round / turns * p.blocks;
    return Item{index / p.heads / p.frames, index % p.heads, index / p.heads % p.frames};
  };
  // Where an item begins, in elements; told afresh at each use, for 64-bit bases kept in registers spill.
  auto in_d_qkv = [&](const Item& o) { return (int64_t(not_ahead(o.batch)) * p.sequence() * 3 * p.heads + o.head) * D; };
  auto in_qkv = [&](const Item& o) { return not_ahead(o.batch) * p.qkv_batch + o.head * p.qkv_head; };
  auto in_out = [&](const Item& o) { return (int64_t(not_ahead(o.batch)) * p.sequence() * p.heads + o.head) * D; };
  auto of_head = [&](const Item& o) { return int64_t(not_ahead(o.batch)) * p.heads + o.head; };

  auto fetch_queries = [&](int round) {  // this warp's
    const Item item = item_of(round);
    const int first = round % turns * places.capacity + mine;
    if (first >= queries || mine >= places.capacity) return;
    const T *q = static_cast<const T*>(p.qkv) + in_qkv(item), *d_out = static_cast<const T*>(p.d_out) + in_out(item);
    const uint32_t q_at = base + places.q(round % sets), d_out_at = base + places.d_out(round % sets);
#pragma unroll 1
    for (int i = not_ahead(thread) & 31; i < rows * units; i += 32) {
      const int row = i / units, unit = i % units;
      const bool valid = first + row < queries;
      const int64_t token = valid ? p.query_token(item.frame, first + row) : 0;
      const int to = Rows<D>::at(mine + row, unit);
      cp_async_16(q_at + to, q + token * p.qkv_token + 8 * unit, valid);
      cp_async_16(d_out_at + to, d_out + token * third + 8 * unit, valid);
    }
  };
  int to_round = 0, to_chunk = 0, to_slot = 0;  // the next chunk of keys for the ring, across rounds
  Item to_item = item_of(0);
  auto fetch_keys = [&] {
    if (to_round >= rounds) return;
    const int left = padded - to_chunk * chunk, count = left < chunk ? left : chunk;
    const T* k = static_cast<const T*>(p.qkv) + in_qkv(to_item) + p.qkv_third;
    const uint32_t k_at = base + places.k(to_slot), v_at = base + places.v(to_slot);
#pragma unroll 1
    for (int i = not_ahead(thread); i < count * units; i += 32 * warps) {  // whole warps leave together
      const int row = i / units, unit = i % units, key = to_chunk * chunk + row;
      const bool valid = key < keys;  // padding is zero, because 0 * NaN would spoil dQ
      const T* from = k + (valid ? p.key_token(to_item.frame, key) : 0) * p.qkv_token + 8 * unit;
      cp_async_16(k_at + Rows<D>::at(row, unit), from, valid);
      cp_async_16(v_at + Rows<D>::at(row, unit), from + p.qkv_third, valid);
    }
    to_slot = to_slot + 1 < stages ? to_slot + 1 : 0;
    if (++to_chunk == chunks) to_chunk = 0, to_item = item_of(++to_round);
  };

  uint32_t o[tiles][D / 16][4];  // the output in this warp's rows, held like the fragments of dO
  auto load_out = [&](int round) {  // all zero past the last round: left as they were, they'd be live all the while
    const Item item = item_of(round);
    const int lane = not_ahead(thread) & 31, first = round % turns * places.capacity + mine;
    const T* out = static_cast<const T*>(p.out) + in_out(item) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first + 16 * i + 8 * h + lane / 4;
        const bool valid = round < rounds && row < queries && mine < places.capacity;
        const T* from = out + int64_t(valid ? p.query_token(item.frame, row) : 0) * third;
#pragma unroll
        for (int c = 0; c < D / 8; ++c) o[i][c / 2][c % 2 * 2 + h] = load_global<uint32_t>(from + 8 * c, valid);
      }
    }
  };

  if (sets == 2) fetch_queries(0);
  cp_async_commit();
#pragma unroll 1
  for (int c = 0; c < stages - 1; ++c) {
    fetch_keys();
    cp_async_commit();
  }

  load_out(0);
  int slot = 0;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const Item item = item_of(round);
    const int frame = item.frame, turn = round % turns, set = round % sets;
    const int begin = turn * places.capacity, left = queries - begin;
    const int used = left < places.capacity ? (left + 15) / 16 * 16 : places.capacity;  // rows with something in them
    const int first = begin + mine;
    const bool owner = first < queries && mine < places.capacity;
    if (sets == 1) {
      if (round) block_sync();  // phase 2 has read the tables and the strips
      fetch_queries(round);
      cp_async_commit();
    }
    cp_async_wait<0>();
    warp_sync();

    Queries<T, D, tiles> own{};  // also where a warp owns nothing: left as it was, it would be live all the while
    if (owner) {
      const int lane = not_ahead(thread) & 31, g = lane / 4;
      const int in_table = Rows<D>::at(mine + lane % 16, lane / 16);
      const float* lse = p.lse + of_head(item) * p.sequence();
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        float delta[2] = {};
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          const uint32_t at = Rows<D>::along(base + in_table + 16 * i * Rows<D>::bytes, 2 * d);
          ldmatrix_x4(own.d_out[i][d], at + places.d_out(set));
#pragma unroll
          for (int e = 0; e < 4; ++e) {
#pragma unroll
            for (int c = 0; c < 2; ++c) delta[e % 2] += unpack<T>(o[i][d][e], c) * unpack<T>(own.d_out[i][d][e], c);
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          delta[h] += shuffle_xor(delta[h], 1);
          delta[h] += shuffle_xor(delta[h], 2);
          own.delta[i][h] = delta[h];
          const int row = first + 16 * i + 8 * h + g, token = p.query_token(frame, row);
          const bool sees = row < p.patches || (row < queries && p.frame_visible(frame, token));
          const float x = as_float(load_global<uint32_t>(lse + token, sees));
          own.lse[i][h] = sees ? x : -minus_infinity;
          own.limit[i][h] = p.limit(frame, row);
        }
      }
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int d = 0; d < D / 16; ++d)
          ldmatrix_x4(own.q[i][d], Rows<D>::along(base + in_table + 16 * i * Rows<D>::bytes, 2 * d) + places.q(set));
      }
    }

    auto phase_1 = [&](int c) {
      const int buffer = c % buffers;
      const int common = first + rows <= p.patches ? keys : p.patches;  // every row that sees a key sees these
#pragma unroll 1
      for (int local = 0; local < chunk && c * chunk + local < padded; local += 16) {
        const int key = c * chunk + local;
        const uint32_t k_at = base + places.k(slot), v_at = base + places.v(slot);
        const uint32_t ds_at = base + places.d_s(buffer), p_after_ds = places.p(0) - places.d_s(0);
        if (key + 16 <= common)
          own.template step<chunk, false>(key, local, mine, k_at, v_at, ds_at, p_after_ds, p.scale_log2);
        else
          own.template step<chunk, true>(key, local, mine, k_at, v_at, ds_at, p_after_ds, p.scale_log2);
      }
    };

    auto leave = [&](auto& acc, int key0, int part, int column) {  // a warp's dK or dV
      constexpr int count = sizeof acc / sizeof acc[0];
      const int lane = not_ahead(thread_index()) & 31, g = lane / 4, j = lane % 4;
      const float factor = part == 1 ? p.scale : 1;
      const bool last = begin + places.capacity >= queries;
      const int64_t index = of_head(item) * p.frames + frame;
      T* d_qkv = static_cast<T*>(p.d_qkv) + in_d_qkv(item) + part * third + column;
      float* partials = p.partials + (index * p.summary() * 3 + part) * D + column + 2 * j;
      float* carries = p.carry + (index * padded * 2 + part - 1) * D + column + 2 * j;
#pragma unroll
      for (int i = 0; i < count; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int key = key0 + 16 * i + 8 * h + g, token = p.key_token(frame, key);
          float* carry = carries + key * 2 * D;
#pragma unroll
          for (int c = 0; c < n; ++c) {
            float *l = acc[i][2 * c] + 2 * h, *r = acc[i][2 * c + 1] + 2 * h;
#pragma unroll
            for (int side = 0; side < 2; ++side) {
              float* two = side ? r : l;
              const int at = 16 * c + 8 * side;
              if (turn) {
                const Word2 before = load_global<Word2>(carry + at, key < keys);
                two[0] += as_float(before.x[0]), two[1] += as_float(before.x[1]);
              }
              if (!last) store_global(carry + at, Word2{{as_word(two[0]), as_word(two[1])}}, key < keys);
              if (last && key0 + 16 * count > p.patches) {
                const Word2 w{{as_word(two[0] * factor), as_word(two[1] * factor)}};
                store_global(partials + token * 3 * D + at, w, key >= p.patches && key < keys);
              }
            }
            if (last && key0 < p.patches) {
              T* row = d_qkv + int64_t(token) * token_stride + 16 * c;
              store_16_columns(row, l, r, factor, key < p.patches);
            }
          }
        }
      }
    };

    auto phase_2 = [&](int c) {
      const int warp = not_ahead(thread) >> 5;
      const int buffer = c % buffers, local = warp % key_groups * (16 * m), key0 = c * chunk + local;
      const int column = warp / key_groups * columns, part = column < D ? 1 : 2, of_part = column % D;
      const uint32_t strip_at = base + (part == 1 ? places.d_s(buffer) : places.p(buffer));
      const uint32_t table_at = base + (part == 1 ? places.q(set) : places.d_out(set));
      const int count = (padded - key0) / 16;
      if (count >= m) {
        float acc[m][2 * n][4] = {};
        transposed_product<T, D, chunk, m, n>(acc, strip_at, table_at, local, of_part / 8, used);
        leave(acc, key0, part, of_part);
      } else if (count == 1) {
        float acc[1][2 * n][4] = {};
        transposed_product<T, D, chunk, 1, n>(acc, strip_at, table_at, local, of_part / 8, used);
        leave(acc, key0, part, of_part);
      }
    };

#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      cp_async_wait<stages - 2>();
      block_sync();  // chunk c is there; phase 1 is done with chunk c - 1, phase 2 with chunk c - buffers
      if (sets == 2 && c == 0 && round + 1 < rounds) fetch_queries(round + 1);
      fetch_keys();
      cp_async_commit();
      if (owner) phase_1(c);
      slot = slot + 1 < stages ? slot + 1 : 0;
      if (buffers == 1 && c + 1 < chunks) block_sync();
      const int behind = c + 1 - buffers;
      if (behind >= 0 && behind + 1 < chunks) phase_2(behind);
    }
    block_sync();
    load_out(round + 1);  // on its way during phase 2, in registers that held Q and dO
    phase_2(chunks - 1);

    if (!owner) continue;
    const int lane = not_ahead(thread) & 31, g = lane / 4, j = lane % 4;
    T* d_q = static_cast<T*>(p.d_qkv) + in_d_qkv(item);
    float* partials = p.partials + (of_head(item) * p.frames + frame) * p.summary() * 3 * D + 2 * j;
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first + 16 * i + 8 * h + g, token = p.query_token(frame, row);
        if (first < p.patches) {  // some patch rows
          T* to = d_q + int64_t(token) * token_stride;
#pragma unroll
          for (int d = 0; d < D / 16; ++d)
            store_16_columns(to + 16 * d, own.d_q[i][2 * d] + 2 * h, own.d_q[i][2 * d + 1] + 2 * h, p.scale,
                             row < p.patches);
        }
        if (first + rows > p.patches) {  // some summary rows
          const bool seen = row >= p.patches && row < queries && p.frame_visible(frame, token);
#pragma unroll
          for (int c = 0; c < D / 8; ++c) {
            const float* two = own.d_q[i][c] + 2 * h;
            const Word2 w{{as_word(two[0] * p.scale), as_word(two[1] * p.scale)}};
            store_global(partials + token * 3 * D + 8 * c, w, seen);
          }
        }
      }
    }
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
  for (int t = 0; t < p.frames; ++t) {
    if (part ? token == 0 && !p.patches_see_cls : !p.frame_visible(t, token)) continue;
    const int64_t from = (((of_head * p.frames + t) * p.summary() + token) * 3 + part) * D + 4 * lane;
    const Word4 a = load_global<Word4>(p.partials + from, active);
    for (int e = 0; e < 4; ++e) acc[e] += as_float(a.x[e]);
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
// With `needed`: only says whether this configuration can take the call, and how many bytes of workspace it needs.
template <class T, int D, int warps, int tiles, int chunk, int buffers, int stages, int sets, int blocks_per_sm>
int run(Gradient p, const Call& c, void* stream, int64_t* needed) {
  const Places<D, chunk, buffers, stages, sets> places{p.turn_rows(warps, 16 * tiles)};
  const int items = p.batch * p.heads * p.frames, room = multiprocessors() * blocks_per_sm;
  const int64_t partials = int64_t(items) * p.summary() * 3 * D;
  const int64_t carry = places.capacity < p.queries() ? int64_t(items) * p.padded_keys() * 2 * D : 0;
  if (places.bytes() > shared_memory_limit()) return no_room;
  if (needed) return *needed = 4 * (partials + carry), 0;
  if (const int status = wrong_pointers(c, 4 * (partials + carry))) return status;
  watch_buffers(c);
  p.carry = p.partials + partials;
  p.blocks = items < room ? items : room;
  const int status = launch<hierarchical_bwd_frames<T, D, warps, tiles, chunk, buffers, stages, sets, blocks_per_sm>>(
      "bwd_frames", p.blocks, 32 * warps, places.bytes(), stream, p);
  if (status) return status;
  const int outputs = p.batch * p.heads * p.summary() * 3;
  return launch<hierarchical_bwd_combine<T, D>>("bwd_combine", (outputs + 3) / 4, 128, 0, stream, p);
}

// Configurations: warps, tiles, chunk, pairs of strips, slots of the ring, sets of tables, blocks an SM.
template <class T> int dispatch(const Gradient& p, int variant, const Call& c, void* stream, int64_t* needed) {
  const int dim = c.head_dim;
  if (dim == 64) {
    if (variant == 0) return run<T, 64, 8, 2, 64, 1, 2, 2, 1>(p, c, stream, needed);
    if (variant == 1) return run<T, 64, 8, 2, 32, 2, 2, 2, 1>(p, c, stream, needed);
    if (variant == 2) return run<T, 64, 8, 2, 32, 1, 2, 2, 1>(p, c, stream, needed);
    if (variant == 3) return run<T, 64, 8, 2, 64, 1, 2, 1, 1>(p, c, stream, needed);
    if (variant == 4) return run<T, 64, 4, 2, 32, 1, 3, 1, 2>(p, c, stream, needed);
    if (variant == 5) return run<T, 64, 4, 1, 32, 1, 2, 1, 3>(p, c, stream, needed);
    return unknown_variant;
  }
  if (variant) return unknown_variant;
  if (dim == 32) return run<T, 32, 4, 2, 32, 2, 2, 1, 2>(p, c, stream, needed);
  if (dim == 80) return run<T, 80, 10, 1, 32, 1, 2, 1, 1>(p, c, stream, needed);
  if (dim == 96) return run<T, 96, 12, 1, 32, 1, 2, 1, 1>(p, c, stream, needed);
  if (dim == 128) return run<T, 128, 8, 1, 32, 2, 2, 1, 1>(p, c, stream, needed);
  return unsupported_dim;
}

inline int backward(const Call& c, int variant, void* stream, int64_t* needed) {
  if (const int status = wrong_sizes(c)) return status;
  Gradient p{layout_of(c), c.qkv,   c.out,   c.d_out, c.lse, c.d_qkv, static_cast<float*>(c.workspace),
             nullptr,      c.scale, c.scale * log2_e, 0};
  return c.type ? dispatch<fp16>(p, variant, c, stream, needed) : dispatch<bf16>(p, variant, c, stream, needed);
}

inline int choose_backward(const Call& c) {  // the first that fits into shared memory
  if (c.head_dim != 64) return 0;
  if (c.patches + c.summary <= 64) return 5;
  int64_t needed;
  int variant = 0;
  while (backward(c, variant, nullptr, &needed) == no_room && variant < 5) ++variant;
  return variant;
}
}  // namespace vidla

// Enqueues the backward on `stream` of the current device. Returns 0, a Status (< 0) or a cudaError_t.
VIDLA_EXPORT int vidla_hierarchical_backward(const vidla::Call* c, void* stream) {
  using namespace vidla;
  return backward(*c, c->variant < 0 ? choose_backward(*c) : c->variant, stream, nullptr);
}

// Bytes of workspace the call needs, or why it can't be served (a Status, < 0). Pointers aren't looked at.
VIDLA_EXPORT int64_t vidla_hierarchical_backward_workspace(const vidla::Call* c) {
  using namespace vidla;
  int64_t needed = 0;
  const int status = backward(*c, c->variant < 0 ? choose_backward(*c) : c->variant, nullptr, &needed);
  return status ? status : needed;
}

// The variant that -1 stands for, and all there are for a head dimension, in words (null past the last).
VIDLA_EXPORT int vidla_hierarchical_backward_choice(const vidla::Call* c) { return vidla::choose_backward(*c); }
VIDLA_EXPORT const char* vidla_hierarchical_backward_variant(int head_dim, int variant) {
  static const char* d64[] = {"8 warps, 2 tiles, 64 keys, 2 sets",          "8 warps, 2 tiles, 32 keys, 2 sets, 2 strips",
                              "8 warps, 2 tiles, 32 keys, 2 sets",          "8 warps, 2 tiles, 64 keys",
                              "4 warps, 2 tiles, 32 keys, 2 blocks, turns", "4 warps, 1 tile, 32 keys, 3 blocks"};
  if (head_dim == 64) return variant >= 0 && variant < 6 ? d64[variant] : nullptr;
  return variant == 0 ? "the only one" : nullptr;
}
