// Hierarchical attention, forward, frame by frame, on Hopper: what hierarchical_fwd.cu launches there instead of its own
// kernel where a frame's keys fit. Same arguments, same results, same partial results for the same combine kernel.
//
// Tiling. As there a block stays, owns a head and a run of consecutive frames, and has one stage of shared memory filled while
// it computes from another; but a stage holds all of a frame: K, V and the queries, in rows of 128 bytes with the 128-byte
// swizzle. One warpgroup does nothing but copy, by cp.async, and gives most of its registers to the others. Each of those takes
// every so-manieth tile of 64 query rows, across frames, so that all have the same work and none waits for the others: S = QK'
// from shared memory, all n keys of the frame at once, in registers; one maximum a row and no rescaling; P = exp2, packed to be
// the A operand; O = PV. Two matrix products a tile, each one group of asynchronous instructions; while one warpgroup is in its
// softmax, others multiply. Rows are masked only in the columns that some row of the tile must not see.
// The summary rows are the last of a frame; warps of the last tile that have no rows skip the softmax, not the products.
// Their shares (m, l, acc) leave at every frame. A row of padding is zero in shared memory from the start.
// hierarchical_fwd.cu includes this behind its Problem and Place.
#pragma once

namespace vidla {
constexpr int tile_rows = 64, table_row = 128;  // rows of a warpgroup; bytes of a row of 64 numbers

// The softmax of a warp's 16 rows. [h]: row g, g + 8. Scores of m keys, from number `key` on: float[m / 2], as wgmma leaves them.
struct SoftmaxRows {
  int limit[2];  // the row sees the keys below; 0: nothing in this frame
  int common;    // all of the rows see the keys below, except those that see nothing
  float maximum[2] = {minus_infinity, minus_infinity}, offset[2], sum[2] = {0, 0};  // sum: this lane's columns alone

  template <int half> VIDLA_DEVICE void see(float (&s)[half], int key) {
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
      maximum[h] = fmaxf(maximum[h], fmaxf(even, odd));
    }
  }
  // All keys are seen.
  VIDLA_DEVICE void settle(float scale_log2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      maximum[h] = fmaxf(maximum[h], shuffle_xor(maximum[h], 1));
      maximum[h] = fmaxf(maximum[h], shuffle_xor(maximum[h], 2));
      if (!limit[h]) maximum[h] = minus_infinity;
      offset[h] = limit[h] ? -maximum[h] * scale_log2 : minus_infinity;  // a row that sees nothing: P = 0
    }
  }
  // P, in 16 bits as the A operand of wgmma: two score tiles side by side.
  template <class T, int half> VIDLA_DEVICE void weigh(float (&s)[half], uint32_t (&p)[half / 8][4], float scale_log2) {
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

// n: keys that a stage has room for; groups: warpgroups that compute.
template <class T, int D, int n, int groups, int registers>
VIDLA_KERNEL(128 * (groups + 1), 1) hierarchical_fwd_frames_wgmma(Problem p) {
  if constexpr (!has_wgmma) return;
  constexpr int near = (n / 16 + 1) / 2 * 16, far = n - near;
  const unsigned lane = thread_index() & 31, g = lane / 4, j = lane % 4;
  const int warp = warp_index(), head = block_index() % p.heads, team = block_index() / p.heads;
  const int queries = p.queries(), keys = p.keys(), tiles = (queries + tile_rows - 1) / tile_rows;
  const int stage_bytes = (2 * n + tiles * tile_rows) * table_row;
  const uint32_t stages = shared_base(), full = stages + p.stages * stage_bytes, empty = full + 8 * p.stages;
  Place at{p.run_start(team) / p.frames, p.run_start(team) % p.frames, p.run_start(team + 1) - p.run_start(team)};
  int slot = 0, phase = 0;
  auto next_frame = [&] {
    if (++slot == p.stages) slot = 0, phase ^= 1;
    at.advance(p);
  };

  if (thread_index() < p.stages) {
    mbarrier_init(full + 8 * thread_index(), 128);
    mbarrier_init(empty + 8 * thread_index(), 4 * groups);
  }
  // Padding, for all frames: keys that P multiplies by 0, and queries.
  for (int s = 0; s < p.stages; ++s) {
    auto clear = [&](uint32_t table, int from, int to) {
      for (int i = 8 * from + thread_index() - lane; i < 8 * to; i += 128 * (groups + 1))
        cp_async_16(table + 16 * (i + lane), p.qkv, false, i + lane < 8 * to);
    };
    const uint32_t stage = stages + s * stage_bytes;
    clear(stage, keys, n);
    clear(stage + n * table_row, keys, n);
    clear(stage + 2 * n * table_row, queries, tiles * tile_rows);
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_async();
  block_sync();

  if (warp >= 4 * groups) {  // the warps that copy
    registers_give<32>();
    const int unit = lane % 8, first = (warp - 4 * groups) * 4 + lane / 8;  // 16 rows at a time
    const char* qkv = static_cast<const char*>(p.qkv) + 2 * (head * p.qkv_head + 8 * unit);
    for (int filled = 0; at.left > 0; ++filled) {
      if (filled >= p.stages) mbarrier_wait(empty + 8 * slot, phase ^ 1);
      const char *q_from = qkv + 2 * (at.batch * p.qkv_batch), *k_from = q_from + 2 * p.qkv_third;
      const char* v_from = k_from + 2 * p.qkv_third;
      const uint32_t k_to = stages + slot * stage_bytes, v_to = k_to + n * table_row, q_to = v_to + n * table_row;
      int64_t from = int64_t(p.summary() + at.frame * p.patches + first) * p.token_bytes;
      uint32_t to = Rows<D>::at(first, unit);
#pragma unroll 2
      for (int row = first; row - first < p.patches; row += 16, from += 16 * p.token_bytes, to += 16 * table_row) {
        const bool active = row < p.patches;
        cp_async_16(k_to + to, k_from + from, true, active);
        cp_async_16(q_to + to, q_from + from, true, active);
        cp_async_16(v_to + to, v_from + from, true, active);
      }
#pragma unroll 1
      for (int i = first; i - first < p.summary(); i += 16) {
        const int row = p.patches + i, key = i < p.mst() ? i + 1 : 0;  // a query's and a key's token: other orders
        const uint32_t there = Rows<D>::at(row, unit);
        cp_async_16(k_to + there, k_from + int64_t(key) * p.token_bytes, true, row < keys);
        cp_async_16(q_to + there, q_from + int64_t(i) * p.token_bytes, true, i < p.summary());
        cp_async_16(v_to + there, v_from + int64_t(key) * p.token_bytes, true, row < keys);
      }
      mbarrier_arrive_with_copies(full + 8 * slot);
      next_frame();
    }
    cp_async_commit();
    cp_async_wait<0>();
    return;
  }

  registers_take<registers>();
  int tile = warp / 4;  // this warpgroup's next one in the frame at hand
#pragma unroll 1
  while (at.left > 0) {
    mbarrier_wait(full + 8 * slot, phase);
    fence_async();
    const uint32_t stage = stages + slot * stage_bytes;
    const uint64_t k = matrix_descriptor(stage, Swizzle::b128, 16, 8 * table_row);
    const uint64_t v = advance(k, n * table_row);
#pragma unroll 1
    for (; tile < tiles; tile += groups) {
      const uint64_t q = advance(v, (n + tile * tile_rows) * table_row);
      const int row_0 = tile * tile_rows + warp % 4 * 16;  // the warp's first
      const bool some = row_0 < queries, some_patches = row_0 < p.patches, some_summary = some && row_0 + 16 > p.patches;
      float left[near / 2], right[far / 2];  // scores of the first keys and of the others
      wgmma_fence();
#pragma unroll
      for (int d = 0; d < D / 16; ++d) wgmma<T, near, false, false>(left, advance(q, 32 * d), advance(k, 32 * d), d > 0);
      wgmma_commit();
#pragma unroll
      for (int d = 0; d < D / 16; ++d)
        wgmma<T, far, false, false>(right, advance(q, 32 * d), advance(k, near * table_row + 32 * d), d > 0);
      wgmma_commit();

      SoftmaxRows rows{{keys, keys}, some_summary ? p.patches : keys};
      if (some_summary) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = row_0 + g + 8 * h;
          if (row >= p.patches && row < queries)
            rows.limit[h] = p.frame_visible(at.frame, row - p.patches) ? p.limit(at.frame, row) : 0;
        }
      }
      uint32_t left_p[near / 16][4] = {}, right_p[far / 16][4] = {};
      float o[D / 2];
      wgmma_wait<1>();
      registers_fence(left);
      if (some) rows.see(left, 0);
      wgmma_wait<0>();
      registers_fence(right);
      if (some) {
        rows.see(right, near);
        rows.settle(p.scale_log2);
        rows.weigh<T>(left, left_p, p.scale_log2);
      }
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < near / 16; ++i) wgmma<T, D, true>(o, left_p[i], advance(v, 16 * i * table_row), i > 0);
      wgmma_commit();
      if (some) rows.weigh<T>(right, right_p, p.scale_log2);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < far / 16; ++i) wgmma<T, D, true>(o, right_p[i], advance(v, (near + 16 * i) * table_row), true);
      wgmma_commit();
      rows.add_lanes();
      wgmma_wait<0>();
      registers_fence(o);

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
    next_frame();
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------
template <int D, int n> int wgmma_stage(const Layout& p) {
  return (2 * n + (p.queries() + tile_rows - 1) / tile_rows * tile_rows) * table_row;
}
template <int D, int n> int wgmma_stages(const Layout& p) {
  return least(8, (shared_memory_limit() - 128) / wgmma_stage<D, n>(p));
}

template <class T, int D> int combine(const Problem& p, void* stream);

// With dry: only says whether this configuration can take the call.
template <class T, int D, int n, int groups, int registers> int run_wgmma(Problem p, void* stream, bool dry) {
  if (architecture() / 10 != 9) return other_gpu;
  p.stages = wgmma_stages<D, n>(p);
  if (p.keys() > n || p.stages < 2) return no_room;
  if (dry) return 0;
  p.carry = 0;
  p.shared = p.stages * (wgmma_stage<D, n>(p) + 16);
  const int frames = p.batch * p.frames, slots = multiprocessors();
  p.teams = least(frames, slots > p.heads ? slots / p.heads : 1);
  p.run = frames / p.teams, p.longer = frames % p.teams;
  const int status = launch<hierarchical_fwd_frames_wgmma<T, D, n, groups, registers>>(
      "fwd_frames_wgmma", p.teams * p.heads, 128 * (groups + 1), p.shared, stream, p);
  return status ? status : combine<T, D>(p, stream);
}
}  // namespace vidla
