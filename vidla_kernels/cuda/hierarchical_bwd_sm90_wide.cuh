// Hierarchical attention, backward, on Hopper (sm_90a), with wgmma, for frames of up to 256 patches: what
// hierarchical_bwd.cu launches there where hierarchical_bwd_sm90.cuh has not enough keys. Same arguments, same results.
//
// Tiling. As in hierarchical_bwd_sm90.cuh, but all of four warpgroups own 64 keys, whose dK and dV stay in their registers, and
// none is left for the last 16 keys, which are summary tokens, and for dQ. Those are jobs of 64 queries that the four take in
// turn: a pair of tiles of 32 queries begins with one's S, P, dP and dS of the last keys, of which it adds the narrow dK and dV
// to the segment's sums in shared memory, pair after pair: an mbarrier hands them on. Where the first tile of the next pair
// ends, dS of this pair is whole, and who has that pair computes dQ = dS K and writes it.
// Two tables of K, as dQ needs all of them to the end of a frame. Of V there is one: its 64 rows are their warpgroup's alone,
// which fetches the next ones when it has done its last dP', while it writes dK and dV. Only the last 16 are there twice.
// The four fetch Q, dO, O and lse in turn, each for its own slot of the ring.
#pragma once
#include "hierarchical_bwd_sm90.cuh"

namespace vidla {

// keys: rows of the tables; ring: tiles of Q and dO; ahead: so many tiles before it is needed one is asked for.
template <int keys_, int ring_, int ahead_> struct WideWarpgroups {
  static constexpr int D = 64, keys = keys_, ring = ring_, ahead = ahead_;
  static constexpr int groups = 4, warps = 4 * groups, threads = 32 * warps, blocks = 1;
  static constexpr int strips = groups, rest = 64 * strips;  // warpgroups that own 64 keys; the first key of the others
  static constexpr int tile = 32, slots = 2;
  static constexpr int capacity = 320;  // query rows
  // Slots of the ring are each a warpgroup's, and two tiles in a row make one table.
  static_assert(keys == rest + 16 && ring == groups && ring > ahead);

  using Row = Rows<D>;
  static constexpr int table = keys * Row::bytes, tile_bytes = tile * Row::bytes;
  static constexpr int v_at = 2 * table, v_rest_at = v_at + rest * Row::bytes;  // K twice, V, V of the other keys twice
  static constexpr int rest_bytes = 16 * Row::bytes;
  static constexpr int q_at = v_rest_at + 2 * rest_bytes, d_out_after_q = ring * tile_bytes;
  static constexpr int ds_at = q_at + 2 * d_out_after_q;
  static constexpr int p_at = ds_at + slots * table;                         // P of the other keys, for each warpgroup
  static constexpr int stats_at = p_at + groups * rest_bytes, stats = 8 * tile;  // of a tile's rows: lse, then -delta
  static constexpr int limits_at = stats_at + ring * stats;                      // keys that a row sees
  static constexpr int items_at = limits_at + ring * 4 * tile, item = 32;        // two for each warp
  static constexpr int full = items_at + warps * 2 * item, empty = full + 8 * ring;  // barriers: of tiles,
  static constexpr int keys_full = empty + 8 * ring, keys_empty = keys_full + 16;    // of the two tables of keys, and by turns
  static constexpr int ds_full = keys_empty + 16, ds_empty = ds_full + 8 * groups;  // of dS of a pair,
  static constexpr int rest_added = ds_empty + 8 * groups;  // dK and dV of the other keys
  static constexpr int sums_at = rest_added + 8 * groups;
  static_assert(sums_at % 8 == 0);

  VIDLA_HOST_DEVICE static uint32_t in_sums(unsigned row, unsigned token, unsigned column) {
    return sums_at + 4 * (row * D + (column + 8 * token) % D);
  }
  // Whether it can take such frames, here: tiles are fetched no further ahead than the next frame.
  static bool serves(const Layout& p) {
    const bool sizes = p.keys() <= keys && p.patches <= rest && p.queries() > 2 * tile && p.queries() <= capacity;
    return sizes && sums_at + 12 * D * p.summary() <= shared_memory_limit();
  }
  static constexpr bool wgmma = true;
  static int needs(const Layout&) { return sums_at; }  // bytes, without the sums
  static int whole_chunks(int) { return 0; }           // all keys in one turn
  static void describe(char* text, size_t size) {
    snprintf(text, size, "wgmma, H100: %d warps, %d rows, %d keys, %d tiles in a ring", warps, capacity, keys, ring);
  }
};

template <class T, class C> VIDLA_KERNEL(C::threads, 1) hierarchical_bwd_frames_wide_wgmma(Tiles p) {
  if constexpr (!has_wgmma) return wgmma_fence();  // traps
  constexpr int D = C::D, ring = C::ring, ahead = C::ahead, row_bytes = C::Row::bytes;
  const int thread = thread_index(), warp = warp_index(), group = warp / 4;
  const uint32_t base = shared_base();

  if (thread == 0) {
    for (int i = 0; i < ring; ++i) {
      mbarrier_init(base + C::full + 8 * i, 4);
      mbarrier_init(base + C::empty + 8 * i, C::warps);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(base + C::keys_full + 8 * i, C::warps);
      mbarrier_init(base + C::keys_empty + 8 * i, C::warps);
    }
    for (int i = 0; i < C::groups; ++i) {
      mbarrier_init(base + C::ds_full + 8 * i, 4 * C::strips);
      mbarrier_init(base + C::ds_empty + 8 * i, 4);
      mbarrier_init(base + C::rest_added + 8 * i, 4);
    }
  }
  // What is never fetched or written: keys past the last, and their dS.
#pragma unroll 1
  for (int i = thread; i < C::q_at / 8; i += C::threads) {
    int row = i / (row_bytes / 8);
    row = row < 2 * C::keys ? row % C::keys : row - 2 * C::keys;  // of K; of V
    store_shared(base + 8 * i, Word2{}, (row < C::keys ? row : row - 16) >= p.key_rows);
  }
#pragma unroll 1
  for (int i = thread; i < C::slots * C::table / 8; i += C::threads) store_shared(base + C::ds_at + 8 * i, Word2{}, true);
  fence_async();
  block_sync();

  // The frames at hand and to come, which would take too many registers: each warp keeps its own in shared memory.
  struct Origin {  // where its tensors begin, in elements; head: of all
    int64_t in_qkv, in_out;
    int head, frame;
    bool opens;  // a segment
  };
  const uint32_t items_at = base + C::items_at + warp * 2 * C::item;
  auto origin = [&](int which) {
    const uint32_t at = items_at + which * C::item;
    auto wide = [](Word2 w) { return int64_t(w.x[0] | uint64_t(w.x[1]) << 32); };
    const Word2 last = load_shared(at + 16, true);
    return Origin{wide(load_shared(at, true)), wide(load_shared(at + 8, true)), int(last.x[0]), int(last.x[1]),
                  load_shared(at + 24) != 0};
  };
  auto keep = [&](int which, const Origin& o) {
    const uint32_t at = items_at + which * C::item;
    const bool one = thread % 32 == 0;
    auto wide = [](int64_t x) { return Word2{{uint32_t(x), uint32_t(x >> 32)}}; };
    warp_sync();
    store_shared(at, wide(o.in_qkv), one);
    store_shared(at + 8, wide(o.in_out), one);
    store_shared(at + 16, Word2{{uint32_t(o.head), uint32_t(o.frame)}}, one);
    store_shared(at + 24, o.opens, one);
    warp_sync();
  };
  auto keep_first = [&](int which, const Item& o) {
    keep(which, {o.batch * p.qkv_batch + o.head * p.qkv_head, (int64_t(o.batch) * p.sequence() * p.heads + o.head) * D,
                 o.batch * p.heads + o.head, o.frame, true});
  };

  // A warpgroup's rows of K, or of V. The last one fetches those of the other keys, of K and V, with its own of K.
  auto fetch_strip = [&](int which, int part, uint32_t table_at) {
    const Origin item = origin(which);
    const int index = not_ahead(thread), unit = index % 8, first = 64 * group + index / 8 % 16;
    const uint32_t to = base + table_at + C::Row::at(first, unit);
    const T* from = static_cast<const T*>(p.qkv) + item.in_qkv + part * p.qkv_third + 8 * unit;
    const T* x = from + p.key_token(item.frame, first) * p.qkv_token;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + 16 * i;
      if (i) x += 16 * p.qkv_token;
      if (key >= p.patches) x = from + p.key_token(item.frame, key) * p.qkv_token;
      cp_async_16(to + 16 * i * row_bytes, x, true, key < p.key_rows);
    }
    if (part == 1 && group == C::strips - 1) {
      const int row = index / 8 % 16, key = C::rest + row;
      x = from + p.key_token(item.frame, key) * p.qkv_token;
      cp_async_16(base + table_at + C::Row::at(key, unit), x, true, key < p.key_rows);
      cp_async_16(base + C::v_rest_at + which * C::rest_bytes + C::Row::at(row, unit), x + p.qkv_third, true, key < p.key_rows);
    }
  };
  auto fetch_keys = [&](int which) { fetch_strip(which, 1, which * C::table); };
  auto fetch_values = [&](int which) { fetch_strip(which, 2, C::v_at); };

  // A tile, by one warpgroup: Q and dO, 2 rows by 16 bytes of each a thread.
  auto fetch_tile = [&](int which, int t, int slot) {
    const Origin item = origin(which);
    const int index = not_ahead(thread) & 127, unit = index % 8;
    const T* q = static_cast<const T*>(p.qkv) + item.in_qkv + 8 * unit;
    const T* d_out = static_cast<const T*>(p.d_out) + item.in_out + 8 * unit;
    const uint32_t to = base + C::q_at + slot * C::tile_bytes + C::Row::at(index / 8, unit);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = t * C::tile + 16 * i + index / 8;
      const bool valid = query < p.query_rows;
      const int token = valid ? p.query_token(item.frame, query) : 0;
      cp_async_16(to + 16 * i * row_bytes, q + token * p.qkv_token, valid);
      cp_async_16(to + 16 * i * row_bytes + C::d_out_after_q, d_out + int64_t(token) * p.heads * D, valid);
    }
    if (warp % 4 == 0 && (t + 1) * C::tile > p.patches) {
      const int row = index & 31;
      const uint32_t limit = p.limit(item.frame, t * C::tile + row);
      store_shared(base + C::limits_at + slot * 4 * C::tile + 4 * row, limit);
    }
    cp_async_commit();
  };
  // O of these rows, and one row's lse and limit: on their way while this thread's warpgroup waits for products.
  struct OnTheirWay {
    Word4 out[2];
    float lse;
    bool hidden;  // sees nothing here
  };
  auto load_rows = [&](OnTheirWay& rows, int which, int t) {
    const Origin item = origin(which);
    const int index = not_ahead(thread) & 127;
    const T* from = static_cast<const T*>(p.out) + item.in_out + index % 8 * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = t * C::tile + 16 * i + index / 8;
      const bool valid = query < p.query_rows;
      rows.out[i] = load_global<Word4>(from + int64_t(valid ? p.query_token(item.frame, query) : 0) * p.heads * D, valid);
    }
    if (warp % 4 == 0) {
      const int query = t * C::tile + (index & 31), token = query < p.query_rows ? p.query_token(item.frame, query) : -1;
      rows.lse = as_float(load_global<uint32_t>(p.lse + int64_t(item.head) * p.sequence() + token, token >= 0));
      rows.hidden = token < 0 || (token < p.summary() && !p.frame_visible(item.frame, token));
    }
  };
  auto finish_tile = [&](const OnTheirWay& rows, int slot) {
    const int index = not_ahead(thread) & 127;
    const uint32_t stats_at = base + C::stats_at + slot * C::stats;
    cp_async_wait<0>();
    const uint32_t at = base + C::q_at + slot * C::tile_bytes + C::d_out_after_q + C::Row::at(index / 8, index % 8);
    float delta[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Word4 d_out = load_shared_16(at + 16 * i * row_bytes);
#pragma unroll
      for (int e = 0; e < 8; ++e) delta[i] += unpack<T>(d_out.x[e / 2], e % 2) * unpack<T>(rows.out[i].x[e / 2], e % 2);
    }
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) {
      delta[0] += shuffle_xor(delta[0], mask);
      delta[1] += shuffle_xor(delta[1], mask);
    }
    store_shared(stats_at + 4 * (C::tile + index / 8 + index % 2 * 16), as_word(-(index % 2 ? delta[1] : delta[0])), index % 8 < 2);
    if (warp % 4 == 0) {
      store_shared(stats_at + 4 * (index & 31), as_word(rows.hidden ? -minus_infinity : rows.lse));
    }
    fence_async();
    mbarrier_arrive(base + C::full + 8 * slot);
  };

  int unit = block_index(), left;  // frames of its segment, from the next to begin on
  if (unit >= p.units()) return;
  {
    const Item item = Item::first(p, unit);
    left = item.end - item.frame;
    keep_first(0, item);
  }
  fetch_keys(0);
  fetch_values(0);
  OnTheirWay first_rows;
  if (group < ahead) {
    fetch_tile(0, group, group);
    load_rows(first_rows, 0, group);
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_async();
  mbarrier_arrive(base + C::keys_full);
  if (group < ahead) finish_tile(first_rows, group);

  const int strip_warp = warp % 4 * 16, mine = 64 * group + strip_warp;  // the warp's first key
  int slot = 0, phase = 0;  // of the ring
  int count = 0;            // of pairs, in all frames
  uint32_t ds_at = base + C::ds_at;  // the slot at hand
  const uint32_t both_ds = 2 * ds_at + C::table;
  int n = -1, buffer = 1;  // the frame's number of all, where its keys are
  bool closes, more = true;  // whether it is its segment's last; whether there is another one to come
  uint32_t keys_at;
  auto begin_frame = [&] {
    ++n, buffer = n & 1;
    closes = --left == 0;
    if (!closes) {
      Origin next = origin(buffer);
      ++next.frame, next.opens = false;
      keep(1 - buffer, next);
    } else {
      unit += p.blocks;
      const Item next = Item::first(p, unit);
      left = next.end - next.frame;
      keep_first(1 - buffer, next);
      more = unit < p.units();
    }
    keys_at = base + buffer * C::table;
    mbarrier_wait(base + C::keys_full + 8 * buffer, n >> 1);
  };
  auto turn_of = [&](int barriers, int pair) { return base + barriers + 8 * (pair & 3); };  // of a pair of all
  auto await = [&](int barriers, int pair) { mbarrier_wait(turn_of(barriers, pair), pair >> 2); };
  auto await_ds_empty = [&] { await(C::ds_empty, count - C::slots); };  // dQ of what was in the slot is done
  // Who has the other keys and dQ of the pair at hand: neither who fetches, nor who finishes a tile, at its first tile.
  auto is_mine = [&] { return 2 * (count & 1) + (count >> 1 & 1) == group; };
  auto go_on = [&] {
    if (slot % 2) ds_at = both_ds - ds_at, ++count;  // a pair's second tile
    ++slot;
    if (slot == ring) slot = 0, phase ^= 1;
  };

    // 16 rows by 64 columns that a warp has of dQ, dK or dV: rows of d_qkv, or of summary tokens' sums, which are each the
    // same thread's in all frames.
    auto leave = [&](float(&acc)[D / 2], int part, int row0, int begin, int end, float factor) {
      const Origin item = origin(buffer);
      const int lane = not_ahead(thread) & 31, g = lane / 4, j = lane % 4;
      T* to = static_cast<T*>(p.d_qkv) + 3 * item.in_out - item.head % p.heads * (2 * D) + part * p.heads * D;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + 8 * h + not_ahead(g);
        const int token = part ? p.key_token(item.frame, row) : p.query_token(item.frame, row);
        T* at = to + int64_t(token) * 3 * p.heads * D;
#pragma unroll
        for (int c = 0; c < D / 16; ++c)
          store_16_columns(at + 16 * c + (j % 2 ? 2 * j + 6 : 2 * j), acc + 8 * c + 2 * h, acc + 8 * c + 4 + 2 * h, factor,
                           row >= begin && row < p.patches);
        registers_fence(acc);
      }
      if (row0 + 16 <= p.patches || row0 < begin || row0 >= end) return;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const unsigned token = row0 + 8 * h + not_ahead(g) - p.patches;  // as a negative number, not one of them
        const bool summary = token < unsigned(end - p.patches);
#pragma unroll
        for (int c = 0; c < D / 8; ++c) {
          const uint32_t at = base + C::in_sums(part * p.summary() + token, token, 8 * c + 2 * j);
          const Word2 before = load_shared(at, summary && !item.opens);
          const Word2 sum{{as_word(acc[4 * c + 2 * h] * factor + as_float(before.x[0])),
                           as_word(acc[4 * c + 2 * h + 1] * factor + as_float(before.x[1]))}};
          store_shared(at, sum, summary);
        }
      }
      if (!closes) return;
      const int64_t segment = int64_t(item.head) * p.segments + item.frame / p.segment_frames;
#pragma unroll 1
      for (int i = 0; i < D / 4; ++i) {  // the segment's sums go out
        const unsigned token = row0 + i % 2 * 8 + g - p.patches, row = part * p.summary() + token, column = i / 2 * 8 + 2 * j;
        const bool summary = token < unsigned(end - p.patches);
        const Word2 sum = load_shared(base + C::in_sums(row, token, column), summary);
        store_global(p.partials + (segment * 3 * p.summary() + row) * D + column, sum, summary);
      }
    };

  auto group_sync = [&] { barrier_sync(1 + group, 128); };

  // dQ of the pair before the one at hand, whose dS is in the other slot.
  auto d_q_of = [&](int pair) {
    await(C::ds_full, count - 1);
    const uint64_t a = matrix_descriptor(both_ds - ds_at, Swizzle::b128, 16, 8 * row_bytes);
    const uint64_t b = matrix_descriptor(keys_at, Swizzle::b128, 16, 8 * row_bytes);
    float d_q[D / 2];
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::keys / 16; ++i)
      wgmma<T, D, true, true>(d_q, advance(a, 16 * row_bytes * i), advance(b, 16 * row_bytes * i), i > 0);
    wgmma_commit();
    wgmma_wait<0>();
    registers_fence(d_q);
    mbarrier_arrive(turn_of(C::ds_empty, count - 1));
    leave(d_q, 0, 64 * pair + strip_warp, 0, p.query_rows, p.scale);
  };

  // 16 keys by 16 columns that a warp has of the other keys' dK or dV, transposed: rows are columns, two columns two keys.
  auto add_rest = [&](float(&acc)[8], int part, int pair, float factor) {
    const Origin item = origin(buffer);
    const int lane = not_ahead(thread) & 31, g = lane / 4, j = lane % 4;
    const bool opens = item.opens && pair == 0;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int column = strip_warp + i / 2 % 2 * 8 + g, key = C::rest + i / 4 * 8 + 2 * j;
      const float x = acc[i] * factor, y = acc[i + 1] * factor;
#pragma unroll
      for (int c = 0; c < 2; ++c) {  // in an order in which lanes fall on different banks
        const int which = c ^ j / 2, token = key + which - p.patches, row = part * p.summary() + token;
        const bool summary = key + which < p.key_rows;
        const uint32_t at = base + C::in_sums(row, token, column);
        const float sum = (which ? y : x) + (summary && !opens ? as_float(load_shared(at)) : 0);
        store_shared(at, as_word(sum), summary);
      }
    }
    if (!closes || pair + 1 < p.pairs) return;
    const int64_t segment = int64_t(item.head) * p.segments + item.frame / p.segment_frames;
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {  // the segment's sums go out
      const int column = strip_warp + i / 2 % 2 * 8 + g, token = C::rest + i / 4 * 8 + 2 * j + (i % 2 ^ j / 2) - p.patches;
      const int row = part * p.summary() + token;
      const bool summary = token < p.key_rows - p.patches;
      const uint32_t sum = summary ? load_shared(base + C::in_sums(row, token, column)) : 0;
      store_global(p.partials + (segment * 3 * p.summary() + row) * D + column, sum, summary);
    }
  };

  // The other keys, by 64 queries.
  auto rest_of = [&](int pair) {
    const uint32_t p_at = base + C::p_at + group * C::rest_bytes;
    const uint64_t q = matrix_descriptor(base + C::q_at + slot * C::tile_bytes, Swizzle::b128, 16, 8 * row_bytes);
    const uint64_t k = matrix_descriptor(keys_at + C::rest * row_bytes, Swizzle::b128, 16, 8 * row_bytes);
    const uint64_t v = matrix_descriptor(base + C::v_rest_at + buffer * C::rest_bytes, Swizzle::b128, 16, 8 * row_bytes);
    const uint64_t d_out = advance(q, C::d_out_after_q);
    float s[8], ds[8], n_v[8], n_k[8];
    mbarrier_wait(base + C::full + 8 * slot, phase);
    mbarrier_wait(base + C::full + 8 * slot + 8, phase);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < D / 16; ++d) wgmma<T, 16, false, false>(s, advance(q, 32 * d), advance(k, 32 * d), d > 0);
#pragma unroll
    for (int d = 0; d < D / 16; ++d) wgmma<T, 16, false, false>(ds, advance(d_out, 32 * d), advance(v, 32 * d), d > 0);
    wgmma_commit();

    const int lane = not_ahead(thread) & 31, g = lane / 4, j = lane % 4;
    float lse[2], minus_delta[2];
    int limit[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = strip_warp + 8 * h + g, of = slot + row / C::tile, in = row % C::tile;
      const uint32_t at = base + C::stats_at + of * C::stats + 4 * in;
      lse[h] = as_float(load_shared(at)), minus_delta[h] = as_float(load_shared(at + 4 * C::tile));
      limit[h] = p.key_rows;
      if (64 * pair + row >= p.patches) limit[h] = load_shared(base + C::limits_at + (of * C::tile + in) * 4);
    }
    wgmma_wait<0>();
    registers_fence(s);
    registers_fence(ds);
    uint32_t a_p[4], a_ds[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = i % 2, e = i / 2 * 4 + 2 * h, key = C::rest + i / 2 * 8 + 2 * j;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        s[e + c] = key + c < limit[h] ? exp2_fast(s[e + c] * p.scale_log2 - lse[h]) : 0;
        ds[e + c] = s[e + c] * (ds[e + c] + minus_delta[h]);
      }
      a_p[i] = pack<T>(s[e], s[e + 1]);
      a_ds[i] = pack<T>(ds[e], ds[e + 1]);
    }
    // Transposed, keys by queries: matrix lane / 8 has 8 keys by 8 queries.
    const int key = lane / 16 * 8 + lane % 8, unit = strip_warp / 8 + lane / 8 % 2;
    await_ds_empty();
    stmatrix_x4_trans(p_at + C::Row::at(key, unit), a_p);
    stmatrix_x4_trans(ds_at + C::Row::at(C::rest + key, unit), a_ds);
    fence_async();
    group_sync();
    const uint64_t b_p = matrix_descriptor(p_at, Swizzle::b128, 16, 8 * row_bytes);
    const uint64_t b_ds = matrix_descriptor(ds_at + C::rest * row_bytes, Swizzle::b128, 16, 8 * row_bytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      wgmma<T, 16, true, false>(n_v, advance(d_out, 16 * row_bytes * i), advance(b_p, 32 * i), i > 0);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      wgmma<T, 16, true, false>(n_k, advance(q, 16 * row_bytes * i), advance(b_ds, 32 * i), i > 0);
    wgmma_commit();
    await(C::rest_added, count - 1);  // by who had the pair before
    wgmma_wait<0>();
    registers_fence(n_v);
    registers_fence(n_k);
    add_rest(n_v, 2, pair, 1);
    add_rest(n_k, 1, pair, p.scale);
    mbarrier_arrive(turn_of(C::rest_added, count));
  };

#pragma unroll 1
  while (more) {
    begin_frame();
    float d_k[D / 2], d_v[D / 2];
#pragma unroll 1
    for (int t = 0; t < 2 * p.pairs; ++t) {
      const int there = slot + ahead - 1 < ring ? slot + ahead - 1 : slot + ahead - 1 - ring;
      const bool finishes = there == group && (n || t) && (more || t + ahead - 1 < 2 * p.pairs);
      const bool last = t + 1 == 2 * p.pairs;
      OnTheirWay rows;
      auto load = [&] {
        const bool of_next = t + ahead - 1 >= 2 * p.pairs;
        if (finishes) load_rows(rows, of_next ? 1 - buffer : buffer, of_next ? t + ahead - 1 - 2 * p.pairs : t + ahead - 1);
      };
      // The tile that was asked for last is there, another one is asked for, and keys of the next frame.
      auto fetch = [&] {
        if (finishes) finish_tile(rows, there);
        if (more && last) {
          cp_async_wait<0>();
          fence_async();
          mbarrier_arrive(base + C::keys_full + 8 * (1 - buffer));
        }
        const bool wraps = slot + ahead >= ring, of_next = t + ahead >= 2 * p.pairs;
        const int to = wraps ? slot + ahead - ring : slot + ahead;
        if (to == group && (more || !of_next)) {
          mbarrier_wait(base + C::empty + 8 * to, phase ^ wraps ^ 1);
          fetch_tile(of_next ? 1 - buffer : buffer, of_next ? t + ahead - 2 * p.pairs : t + ahead, to);
        }
        if (more && t == least(1 + group, 2 * p.pairs - 2)) {
          mbarrier_wait(base + C::keys_empty + 8 * (1 - buffer), ((n + 1) >> 1) ^ 1);
          fetch_keys(1 - buffer);
          cp_async_commit();
        }
        // V of the next frame, in the place of this one's.
        if (more && last) {
          group_sync();
          fetch_values(1 - buffer);
          cp_async_commit();
        }
      };
      const bool has_turn = t % 2 == 0 && is_mine();
      if (has_turn) rest_of(t / 2);
      mbarrier_wait(base + C::full + 8 * slot, phase);
      if (t >= p.tiles) {  // an odd number of tiles is made even by one without rows
        mbarrier_arrive(base + C::empty + 8 * slot);
        load();
        fetch();
        go_on();
        break;
      }

      const uint64_t k = matrix_descriptor(keys_at + 64 * group * row_bytes, Swizzle::b128, 16, 8 * row_bytes);
      const uint64_t q = matrix_descriptor(base + C::q_at + slot * C::tile_bytes, Swizzle::b128, 16, 8 * row_bytes);
      const uint64_t v = advance(k, C::v_at - buffer * C::table), d_out = advance(q, C::d_out_after_q);
      const int lane = not_ahead(thread) & 31, g = lane / 4, j = lane % 4;
      const uint32_t stats_at = base + C::stats_at + slot * C::stats + 8 * j;
      float s[C::tile / 2], ds[C::tile / 2];
#pragma unroll
      for (int i = 0; i < C::tile / 8; ++i) {
        const Word2 minus_delta = load_shared(stats_at + 4 * C::tile + 32 * i, true);
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[4 * i + e] = as_float(minus_delta.x[e % 2]);
      }
      registers_fence(ds);
      wgmma_fence();
#pragma unroll
      for (int d = 0; d < D / 16; ++d) wgmma<T, C::tile, false, false>(s, advance(k, 32 * d), advance(q, 32 * d), d > 0);
      wgmma_commit();
#pragma unroll
      for (int d = 0; d < D / 16; ++d) wgmma<T, C::tile, false, false>(ds, advance(v, 32 * d), advance(d_out, 32 * d), true);
      wgmma_commit();

      load();
      wgmma_wait<1>();
      registers_fence(s);
#pragma unroll
      for (int i = 0; i < C::tile / 8; ++i) {
        const Word2 lse = load_shared(stats_at + 32 * i, true);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[4 * i + e] = exp2_fast(s[4 * i + e] * p.scale_log2 - as_float(lse.x[e % 2]));
      }
      if ((t + 1) * C::tile > p.patches && mine + 16 > p.patches) {  // summary rows, summary keys
        const uint32_t limits_at = base + C::limits_at + slot * 4 * C::tile + 8 * j;
#pragma unroll
        for (int i = 0; i < C::tile / 8; ++i) {
          const Word2 limits = load_shared(limits_at + 32 * i, true);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (mine + g + e / 2 * 8 >= int(limits.x[e % 2])) s[4 * i + e] = 0;
        }
      }
      wgmma_wait<0>();
      registers_fence(ds);
      uint32_t a_p[C::tile / 16][4], a_ds[C::tile / 16][4];
#pragma unroll
      for (int i = 0; i < C::tile / 8; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float *x = s + 4 * i + 2 * h, *y = ds + 4 * i + 2 * h;
#pragma unroll
          for (int e = 0; e < 2; ++e) y[e] *= x[e];
          a_p[i / 2][i % 2 * 2 + h] = pack<T>(x[0], x[1]);
          a_ds[i / 2][i % 2 * 2 + h] = pack<T>(y[0], y[1]);
        }
      }
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < C::tile / 16; ++i)
        wgmma<T, D, true>(d_v, a_p[i], advance(d_out, 16 * row_bytes * i), t > 0 || i > 0);
#pragma unroll
      for (int i = 0; i < C::tile / 16; ++i)
        wgmma<T, D, true>(d_k, a_ds[i], advance(q, 16 * row_bytes * i), t > 0 || i > 0);
      wgmma_commit();

      if (t % 2 == 0) await_ds_empty();
      if (mine < p.key_rows) {
        if (mine + 16 <= p.key_rows) {
          const uint32_t to = ds_at + C::Row::at(mine + lane % 16, t % 2 * 4 + lane / 16);  // matrices: 8 keys by 8 queries
#pragma unroll
          for (int i = 0; i < C::tile / 16; ++i) stmatrix_x4(C::Row::along(to, 2 * i), a_ds[i]);
        } else {
          const uint32_t to = ds_at + C::Row::at(mine + g, t % 2 * 4) + 4 * j;
#pragma unroll
          for (int i = 0; i < C::tile / 4; ++i)
            store_shared(C::Row::along(to, i / 2) + i % 2 * 8 * row_bytes, a_ds[i / 4][i / 2 % 2 * 2 + i % 2],
                         mine + g + i % 2 * 8 < p.key_rows);
        }
      }
      if (t % 2 || t + 1 == p.tiles) {
        fence_async();
        mbarrier_arrive(turn_of(C::ds_full, count));
      }

      fetch();
      wgmma_wait<0>();
      registers_fence(d_v);
      registers_fence(d_k);
      mbarrier_arrive(base + C::empty + 8 * slot);
      if (has_turn && t) d_q_of(t / 2 - 1);  // by now the others are done with it
      go_on();
    }
    leave(d_v, 2, mine, 0, p.key_rows, 1);
    leave(d_k, 1, mine, 0, p.key_rows, p.scale);
    if (is_mine()) d_q_of(p.pairs - 1);
    mbarrier_arrive(base + C::keys_empty + 8 * buffer);
    if (more) {  // V is there
      cp_async_wait<0>();
      fence_async();
      group_sync();
    }
  }
}

}  // namespace vidla
