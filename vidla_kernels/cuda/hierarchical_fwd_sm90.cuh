// Hierarchical attention, forward, frame by frame, on Hopper: what hierarchical_fwd.cu launches there instead of its own
// kernel where a frame's keys fit. Same arguments, same results, partial results for the same combine kernel.
//
// Tiling. As there a block stays, and owns a head and a run of consecutive frames. Its last warpgroup does nothing but copy, by
// cp.async, and gives most of its registers to the others. K and V of a frame are tables in a ring of as many as fit, rows of
// 128 bytes with the 128-byte swizzle, which wgmma reads as they are; a table comes in once for all queries of the frame, and
// is free again when the last warpgroup is done with it: K before V. mbarriers say that a table is full, and that it is free.
// The other warpgroups take 64 query rows at a time, a tile, in turns and from frame to frame, so that all have the same work
// and none waits for the others. A warpgroup has two buffers for queries: its warps fill one while it works on the other.
// It walks over the keys in chunks: S = QK' of a chunk by wgmma into registers, while PV of the chunk before is added up;
// maximum, P = exp2, packed to be the A operand. Sums are rescaled only when a maximum has grown by more than a factor of 2^8.
// Columns are masked, 16 at a time, only where some row of the warp must not see them.
// The summary rows are the last of a frame. Warps of the last tile that have no rows skip the softmax, not the products. Patch
// rows are final and written once; summary rows leave (m, l, acc) at every frame. Padding of tables is zero from the start.
// hierarchical_fwd.cu includes this behind its Problem and Place.
#pragma once

namespace vidla {
constexpr int tile_rows = 64, table_row = 128;  // rows of a warpgroup; bytes of a row of 64 numbers

// The softmax of a warp's 16 rows. [h]: row g, g + 8. Scores of m keys, from number `key` on, are float[m / 2], as wgmma leaves
// them.
struct SoftmaxRows {
  int limit[2];  // the row sees the keys below; 0: nothing in this frame
  int common;    // all of the rows see the keys below, except those that see nothing
  float maximum[2] = {minus_infinity, minus_infinity}, offset[2], sum[2] = {0, 0};  // sum: this lane's columns alone

  // Hides what is not to be seen. top: the rows' maxima.
  template <int half> VIDLA_DEVICE void see(float (&s)[half], int key, float (&top)[2]) {
    const int column = key + thread_index() % 4 * 2;
#pragma unroll
    for (int b = half / 8 - 1; b >= 0; --b) {  // 16 keys at a time, from the last ones
      if (key + 16 * b + 16 <= common) break;
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (column + 16 * b + e / 4 * 8 + e % 2 >= limit[e / 2 % 2]) s[8 * b + e] = minus_infinity;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float even = s[2 * h], odd = s[2 * h + 1];
#pragma unroll
      for (int b = 1; b < half / 4; ++b) even = fmaxf(even, s[4 * b + 2 * h]), odd = fmaxf(odd, s[4 * b + 2 * h + 1]);
      top[h] = fmaxf(even, odd);
      top[h] = fmaxf(top[h], shuffle_xor(top[h], 1));
      top[h] = fmaxf(top[h], shuffle_xor(top[h], 2));
    }
  }
  VIDLA_DEVICE bool grown(const float (&top)[2], float slack) const {
    return (limit[0] && top[0] - maximum[0] > slack) || (limit[1] && top[1] - maximum[1] > slack);
  }
  VIDLA_DEVICE void settle(const float (&top)[2], float scale_log2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      maximum[h] = limit[h] ? fmaxf(maximum[h], top[h]) : minus_infinity;
      offset[h] = limit[h] ? -maximum[h] * scale_log2 : minus_infinity;  // a row that sees nothing: P = 0
    }
  }
  // P, in 16 bits as the A operand of wgmma: two score tiles side by side.
  template <class T, int half, int blocks>
  VIDLA_DEVICE void weigh(float (&s)[half], uint32_t (&p)[blocks][4], float scale_log2) {
#pragma unroll
    for (int b = 0; b < half / 4; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x = exp2_fast(s[4 * b + 2 * h] * scale_log2 + offset[h]);
        const float y = exp2_fast(s[4 * b + 2 * h + 1] * scale_log2 + offset[h]);
        sum[h] += x + y;
        p[b / 2][b % 2 * 2 + h] = pack<T>(x, y);
      }
    }
  }
  VIDLA_DEVICE void add_lanes() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += shuffle_xor(sum[h], 1);
      sum[h] += shuffle_xor(sum[h], 2);
    }
  }
};

// What a tile is computed from.
struct Tables {
  uint64_t q, k, v;          // descriptors
  uint32_t v_full, k_empty;  // mbarriers: V is there; K is done with,
  int v_phase;
  bool last;  // with this tile
};

// 64 query rows of a warpgroup and all n keys of a frame, `chunk` at a time. The scores of a chunk and PV of the one before are
// under way together.
template <class T, int D, int n, int chunk> struct Tile {
  static constexpr int chunks = (n + chunk - 1) / chunk;
  SoftmaxRows rows;
  float o[D / 2];
  uint32_t p[chunks][chunk / 16][4];

  template <int i> static constexpr int size = i + 1 < chunks ? chunk : n - i * chunk;

  template <int i> VIDLA_DEVICE void add_values(uint64_t v) {
#pragma unroll
    for (int b = 0; b < size<i> / 16; ++b)
      wgmma<T, D, true>(o, p[i][b], advance(v, (i * chunk + 16 * b) * table_row), i + b > 0);
    wgmma_commit();
  }

  // some: the warp has rows, if not, it takes part in the products alone.
  template <int i> VIDLA_DEVICE void attend(const Tables& tables, bool some, const Problem& problem) {
    float s[size<i> / 2];
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
      wgmma<T, size<i>, false, false>(s, advance(tables.q, 32 * d), advance(tables.k, i * chunk * table_row + 32 * d), d > 0);
    wgmma_commit();
    if constexpr (i > 0) add_values<i - 1>(tables.v);
    wgmma_wait<(i > 0)>();
    registers_fence(s);
    if (i + 1 == chunks && tables.last) mbarrier_arrive(tables.k_empty);
    bool grown = false;
    float shrink[2];
    if (some) {
      float top[2];
      rows.see(s, i * chunk, top);
      if (i == 0) rows.settle(top, problem.scale_log2);
      else if ((grown = warp_any(rows.grown(top, problem.slack)))) {
        const float before[2] = {rows.offset[0], rows.offset[1]};
        rows.settle(top, problem.scale_log2);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          shrink[h] = rows.limit[h] ? exp2_fast(rows.offset[h] - before[h]) : 1;
          rows.sum[h] *= shrink[h];
        }
      }
      rows.weigh<T>(s, p[i], problem.scale_log2);
    } else {
#pragma unroll
      for (int b = 0; b < chunk / 4; ++b) p[i][b / 4][b % 4] = 0;
    }
    if constexpr (i == 0) {
      mbarrier_wait(tables.v_full, tables.v_phase);
      fence_async();
    } else {
      wgmma_wait<0>();
      registers_fence(o);
      if (grown) {
#pragma unroll
        for (int e = 0; e < D / 2; ++e) o[e] *= shrink[e / 2 % 2];
      }
    }
    if constexpr (i + 1 < chunks) {
      attend<i + 1>(tables, some, problem);
    } else {
      wgmma_fence();
      add_values<i>(tables.v);
      rows.add_lanes();
      wgmma_wait<0>();
      registers_fence(o);
    }
  }
};

// n: keys that a table has room for; groups: warpgroups that compute; registers: of each of their threads. p.stages: tables.
template <class T, int D, int n, int chunk, int groups, int registers>
VIDLA_KERNEL(128 * (groups + 1), 1) hierarchical_fwd_frames_wgmma(Problem p) {
  if constexpr (!has_wgmma) return wgmma_fence();  // traps
  const unsigned lane = thread_index() & 31, g = lane / 4, j = lane % 4;
  const int warp = warp_index(), head = block_index() % p.heads, team = block_index() / p.heads;
  const int queries = p.queries(), keys = p.keys(), tiles = (queries + tile_rows - 1) / tile_rows;
  constexpr int table_bytes = n * table_row, tile_bytes = tile_rows * table_row;
  const uint32_t tables = shared_base(), q_at = tables + p.stages * table_bytes;  // two query tiles of each warpgroup
  const uint32_t full = q_at + 2 * groups * tile_bytes, empty = full + 8 * p.stages;
  Place at{p.run_start(team) / p.frames, p.run_start(team) % p.frames, p.run_start(team + 1) - p.run_start(team)};
  int slot = 0, phase = 0;
  auto next_table = [&] {
    if (++slot == p.stages) slot = 0, phase ^= 1;
  };

  if (thread_index() < p.stages) {
    mbarrier_init(full + 8 * thread_index(), 128);
    mbarrier_init(empty + 8 * thread_index(), 4 * groups);
  }
  for (int s = 0; s < p.stages; ++s)  // keys of padding are zero for all frames, because P multiplies them by 0
    for (int i = 8 * keys + thread_index() - lane; i < 8 * n; i += 128 * (groups + 1))
      cp_async_16(tables + s * table_bytes + 16 * (i + lane), p.qkv, false, i + lane < 8 * n);
  cp_async_commit();
  cp_async_wait<0>();
  fence_async();
  block_sync();

  if (warp >= 4 * groups) {  // the warps that copy
    registers_give<32>();
    const int unit = lane % 8, first = (warp - 4 * groups) * 4 + lane / 8;  // 16 rows at a time
    const char* qkv = static_cast<const char*>(p.qkv) + 2 * (head * p.qkv_head + 8 * unit);
    for (int filled = 0; at.left > 0; ++filled) {  // K of a frame, V, K of the next
      if (filled >= p.stages) mbarrier_wait(empty + 8 * slot, phase ^ 1);
      const char* from = qkv + 2 * (at.batch * p.qkv_batch + (1 + filled % 2) * p.qkv_third);
      const char* patches = from + int64_t(p.summary() + at.frame * p.patches + first) * p.token_bytes;
      const uint32_t table = tables + slot * table_bytes;
      uint32_t to = table + Rows<D>::at(first, unit);
#pragma unroll 4
      for (int row = first; row - first < p.patches; row += 16, patches += 16 * p.token_bytes, to += 16 * table_row)
        cp_async_16(to, patches, true, row < p.patches);
#pragma unroll 1
      for (int key = p.patches + first; key - first < keys; key += 16) {
        const int token = key < p.patches + p.mst() ? 1 + key - p.patches : 0;
        cp_async_16(table + Rows<D>::at(key, unit), from + int64_t(token) * p.token_bytes, true, key < keys);
      }
      mbarrier_arrive_with_copies(full + 8 * slot);
      next_table();
      if (filled % 2) at.advance(p);
    }
    cp_async_commit();
    cp_async_wait<0>();
    return;
  }

  registers_take<registers>();
  int tile = warp / 4, buffer = 0;  // this warpgroup's next tile in the frame at hand, and where its queries are
  auto fetch_queries = [&](int t, int where) {  // the warp's rows of a tile in this frame or a later one
    Place to = at;
    for (; t >= tiles; t -= tiles) to.advance(p);
    if (to.left <= 0) return;
    const int unit = lane % 8, first = warp % 4 * 16 + lane / 8;
    const char* from = static_cast<const char*>(p.qkv) + 2 * (to.batch * p.qkv_batch + head * p.qkv_head + 8 * unit);
    const uint32_t q_to = q_at + (warp / 4 * 2 + where) * tile_bytes;
    const int row_0 = t * tile_rows + first, patch_0 = p.summary() + to.frame * p.patches;
    if ((t + 1) * tile_rows <= p.patches) {
      from += int64_t(patch_0 + row_0) * p.token_bytes;
#pragma unroll
      for (int i = 0; i < 4; ++i, from += 4 * p.token_bytes) cp_async_16(q_to + Rows<D>::at(first + 4 * i, unit), from, true);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row_0 + 4 * i, token = row < queries ? row + (row < p.patches ? patch_0 : -p.patches) : 0;
        cp_async_16(q_to + Rows<D>::at(first + 4 * i, unit), from + int64_t(token) * p.token_bytes, row < queries);
      }
    }
    cp_async_commit();
  };
  fetch_queries(tile, 0);
#pragma unroll 1
  while (at.left > 0) {
    mbarrier_wait(full + 8 * slot, phase);
    const uint64_t k = matrix_descriptor(tables + slot * table_bytes, Swizzle::b128, 16, 8 * table_row);
    const uint32_t k_empty = empty + 8 * slot;
    next_table();
    const uint64_t v = matrix_descriptor(tables + slot * table_bytes, Swizzle::b128, 16, 8 * table_row);
    if (tile >= tiles) mbarrier_wait(full + 8 * slot, phase), mbarrier_arrive(k_empty);  // not this warpgroup's frame
#pragma unroll 1
    for (; tile < tiles; tile += groups, buffer ^= 1) {
      cp_async_wait<0>();
      fence_async();
      barrier_sync(1 + warp / 4, 128);  // the warpgroup has this tile's queries, and has read the one's before
      fetch_queries(tile + groups, buffer ^ 1);
      const uint64_t q = matrix_descriptor(q_at + (warp / 4 * 2 + buffer) * tile_bytes, Swizzle::b128, 16, 8 * table_row);
      const int row_0 = tile * tile_rows + warp % 4 * 16;  // the warp's first
      const bool some = row_0 < queries, some_patches = row_0 < p.patches, some_summary = some && row_0 + 16 > p.patches;
      Tile<T, D, n, chunk> t{{{keys, keys}, some_summary ? p.patches : keys}};
      SoftmaxRows& rows = t.rows;
      if (some_summary) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = row_0 + g + 8 * h;
          if (row >= p.patches && row < queries)
            rows.limit[h] = p.frame_visible(at.frame, row - p.patches) ? p.limit(at.frame, row) : 0;
        }
      }
      t.template attend<0>({q, k, v, full + 8 * slot, k_empty, phase, tile + groups >= tiles}, some, p);
      float(&o)[D / 2] = t.o;

      const int64_t clip = int64_t(at.batch) * p.heads + head;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_0 + 8 * h + g;
        if (some_patches) {
          const int token = p.summary() + at.frame * p.patches + row;
          T* out = static_cast<T*>(p.out) + head * D + (j / 2 * 4 + j % 2 * 8);
          out = not_ahead(out + (int64_t(at.batch) * p.sequence() + token) * (p.heads * D));
          const float over = reciprocal(rows.sum[h]);
          Word2 two[D / 16];  // lanes trade: 4 columns a lane, a full 32-byte sector in 4 lanes
#pragma unroll
          for (int d = 0; d < D / 16; ++d) {
            const float *l = o + 8 * d + 2 * h, *r = l + 4;
            const uint32_t a = pack<T>(l[0] * over, l[1] * over), b = pack<T>(r[0] * over, r[1] * over);
            const uint32_t other = shuffle_xor(j % 2 ? a : b, 1);
            two[d] = {{j % 2 ? other : a, j % 2 ? b : other}};
          }
#pragma unroll
          for (int d = 0; d < D / 16; ++d) store_global(out + 16 * d, two[d], row < p.patches);
          const float lse = rows.maximum[h] * p.scale_log2 + log2_fast(rows.sum[h]);
          store_global(p.lse + clip * p.sequence() + token, as_word(lse), row < p.patches && j == 0);
        }
        if (some_summary) {
          const bool mine = row >= p.patches && row < queries, seen = rows.maximum[h] > minus_infinity;
          const int64_t to = (clip * p.frames + at.frame) * p.summary() + row - p.patches;
          float* sums = not_ahead(p.sums + to * D + 2 * j);
#pragma unroll
          for (int b = 0; b < D / 8; ++b) {
            const float* two = o + 4 * b + 2 * h;
            store_global(sums + 8 * b, Word2{{as_word(two[0]), as_word(two[1])}}, mine && seen);
          }
          const Word2 statistics{{as_word(rows.maximum[h]), as_word(rows.sum[h])}};
          store_global(p.statistics + to * 2, statistics, mine && j == 0);
        }
      }
    }
    tile -= tiles;
    mbarrier_arrive(empty + 8 * slot);
    next_table();
    at.advance(p);
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------
constexpr int wgmma_table(int n) { return n * table_row + 16; }  // bytes, mbarriers included
template <int D, int n, int groups> int wgmma_tables() {
  return least(16, (shared_memory_limit() - 2 * groups * tile_rows * table_row) / wgmma_table(n));
}

template <class T, int D> int combine(const Problem& p, void* stream);

// With dry: only says whether this configuration can take the call.
template <class T, int D, int n, int chunk, int groups, int registers> int run_wgmma(Problem p, void* stream, bool dry) {
  if (!wgmma_runs()) return other_gpu;
  p.stages = wgmma_tables<D, n, groups>();
  if (p.keys() > n || p.stages < 3) return no_room;
  if (dry) return 0;
  p.carry = 0;
  p.shared = p.stages * wgmma_table(n) + 2 * groups * tile_rows * table_row;
  const int frames = p.batch * p.frames, slots = multiprocessors();
  p.teams = least(frames, slots > p.heads ? slots / p.heads : 1);
  p.run = frames / p.teams, p.longer = frames % p.teams;
  const int status = launch<hierarchical_fwd_frames_wgmma<T, D, n, chunk, groups, registers>>(
      "fwd_frames_wgmma", p.teams * p.heads, 128 * (groups + 1), p.shared, stream, p);
  return status ? status : combine<T, D>(p, stream);
}
}  // namespace vidla
