// Hierarchical attention, backward. qkv (B, S, 3, H, D), out, dO (B, S, H, D), log-sum-exp (B, H, S) in base 2 ->
// d_qkv (B, S, 3, H, D); bf16 or fp16, sums in fp32. Five products: S = QK', dP = dO V', dV = P' dO, dK = dS' Q,
// dQ = dS K, with P = exp2(scale_log2 S - lse) and dS = P (dP - delta), delta = rowsum(dO * O).
//
// Tiling. A block takes frame after frame of one (batch, head); a frame's keys, its queries and who sees whom:
// hierarchical.cuh. Its warps have one of two duties, and wait for each other at mbarriers alone:
//     key warps       own up to 16 * tiles keys each. V's fragments stay in registers, of one tile K's too (of another they are
//                     read again), and so do dK and dV. Q and dO pass by, 32 rows at a time. Scores are computed transposed,
//                     keys by queries, for then P' and dS' are A operands of dV and dK as they stand in registers: S' = K Q',
//                     dP' = V dO' (from -delta), P', dS'; dV += P' dO, dK += dS' Q. dS' goes, in 16 bits, to a strip
//                     (keys x 32 queries) in shared memory.
//     the query warp  multiplies strips with K: dQ of 32 rows, in registers.
// So four of the five products pass nothing from warp to warp. Nobody waits where a frame ends: a key warp brings K and V
// of its keys in the next frame while it works on this one (two tables of K, for dQ needs it to the end; one of V), and one
// warp brings Q, dO and O of the rows to come into a ring of slots, computes delta, the diagonal of dO O' by mma, and hands
// both over.
// The query warp is as busy as two key warps; so that one warp is the key warp with the fewest keys, if it has room for another
// tile, and it sits beside the query warp on its quarter of the multiprocessor.
// Rows that see nothing here (an MST level in a frame it skips, spare rows) have lse = +inf, so P = 0 without a test.
// Delta from O is one unit of traffic (8 instead of 7); it is kept for the frames and turns that see the same rows again.
//
// Patch gradients are final. What a frame adds to a summary token's dQ, dK and dV (MST's, and CLS's key if patches see
// it) is summed up in shared memory, over the frames of a segment: (batch, head) has `segments` of them, as few as keep
// all blocks busy. A segment's sums go out in fp32, and the second kernel adds them up in order, with CLS's attention to
// itself. No atomics: the same bits every run. Where shared memory has no room, the sums wait in global memory, in L2.
// More keys than the warps own: several turns; dQ waits in `carry`, where the thread that wrote a sum is the one that
// takes it up again, in a place of the block's own that L2 keeps.
#include "hierarchical_bwd_sm90_wide.cuh"


namespace vidla {

// What a block works on: a segment of frames of a (batch, head). Heads change fastest from block to block: they lie side by
// side.
struct Unit {
  int batch, head, begin;
  VIDLA_DEVICE static Unit number(const Gradient& p, int n) {
    return {n / p.heads / p.segments, n % p.heads, n / p.heads % p.segments * p.segment_frames};
  }
  VIDLA_DEVICE int64_t of_head(const Gradient& p) const { return int64_t(batch) * p.heads + head; }
  // Where its (batch, head) begins, in elements.
  VIDLA_DEVICE int64_t in_qkv(const Gradient& p) const { return batch * p.qkv_batch + head * p.qkv_head; }
  VIDLA_DEVICE int64_t in_out(const Gradient& p, int D) const {
    return (int64_t(batch) * p.sequence() * p.heads + head) * D;
  }
  VIDLA_DEVICE int64_t in_d_qkv(const Gradient& p, int D) const {
    return (int64_t(batch) * p.sequence() * 3 * p.heads + head) * D;
  }
};

// A turn over a frame of a unit, `left` frames before the unit's end.
struct Pass {
  int unit, frame, left, turn;
  VIDLA_DEVICE static Pass first(const Gradient& p, int unit) {
    const int begin = Unit::number(p, unit).begin;
    return {unit, begin, least(p.segment_frames, p.frames - begin), 0};
  }
  VIDLA_DEVICE bool some(const Gradient& p) const { return unit < p.units(); }
  VIDLA_DEVICE Pass next(const Gradient& p) const {
    if (turn + 1 < p.turns) return {unit, frame, left, turn + 1};
    if (left > 1) return {unit, frame + 1, left - 1, 0};
    return first(p, unit + p.blocks);
  }
};

// A place in a ring of so many, and the phase its mbarriers are in.
template <int places> struct Place {
  int turn = 0;  // below `places` in even phases
  VIDLA_DEVICE int at() const { return turn < places ? turn : turn - places; }
  VIDLA_DEVICE int phase() const { return turn >= places; }
  VIDLA_DEVICE Place next() const { return {turn + 1 < 2 * places ? turn + 1 : 0}; }
};

// What is fixed at compile time, and where things lie in a block's shared memory: constants, which instructions carry.
template <int D_, int owners_, int tiles_, int slots_, int strips_, int blocks_> struct Tiling {
  static constexpr int D = D_, tiles = tiles_, slots = slots_, strips = strips_;
  static constexpr int owners = owners_;    // key warps, of 16 * tiles keys
  static constexpr int warps = owners + 1, blocks = blocks_;  // blocks: a multiprocessor
  static constexpr int k_kept = D > 96 ? 0 : 1;  // tiles of which K's fragments stay in registers; others are read again
  static constexpr int keys = 16 * tiles * owners, chunk = 32;  // keys a turn; query rows in a slot

  using Row = Rows<D>;
  using Strip = Rows<chunk>;
  static constexpr int table = keys * Row::bytes;  // of K or V
  static constexpr int v_at = 2 * table;
  static constexpr int rows = chunk * Row::bytes;  // of Q or dO in a slot, side by side
  static constexpr int slots_at = 3 * table, out_at = slots_at + 2 * rows * slots;
  static constexpr int strips_at = out_at + rows, strip = keys * Strip::bytes;
  static constexpr int stats_at = strips_at + strips * strip, stats = 3 * 4 * chunk;  // a slot's lse, -delta, limits
  static constexpr int kept_at = stats_at + slots * stats;  // a unit's numbers, by key warp
  static constexpr int barriers_at = kept_at + 16 * owners;
  static constexpr int deltas_at = (barriers_at + 8 * (2 * slots + 2 * strips + 2) + 15) / 16 * 16;  // of a frame's queries

  static constexpr bool wgmma = false;
  static int whole_chunks(int queries) { return (queries + chunk - 1) / chunk * chunk; }
  static int needs(const Layout& p) { return deltas_at + 4 * whole_chunks(p.queries()); }  // bytes, without the sums
  static bool serves(const Layout&) { return true; }
  static void describe(char* text, size_t size) {
    snprintf(text, size, "%d keys a turn, %d + 1 warps, %d tiles, %d slots, %d strips, %d blocks", keys, owners, tiles, slots,
             strips, blocks);
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

// What warps of both duties know.
template <class T, class C> struct Block {
  static constexpr int D = C::D, tiles = C::tiles, chunk = C::chunk, units = D / 8;
  const Gradient& p;
  const uint32_t base = shared_base();
  const int lane = thread_index() & 31, g = lane / 4, j = lane % 4;
  const int queries = p.queries(), keys = p.keys(), chunks = (queries + chunk - 1) / chunk;
  const uint32_t full = base + C::barriers_at, empty = full + 8 * C::slots;  // mbarriers: slots,
  const uint32_t stored = empty + 8 * C::slots, taken = stored + 8 * C::strips;  // strips,
  const uint32_t k_empty = taken + 8 * C::strips;  // tables of K
  const uint32_t sums = base + C::deltas_at + 4 * chunks * chunk;  // of summary tokens, (3, G, D) in fp32
  const Lane<C> in{lane};

  VIDLA_DEVICE explicit Block(const Gradient& problem) : p(problem) {}

  // The first tile of 16 keys that a key warp has in a turn, if there are so many: shares differ by one at most.
  VIDLA_DEVICE int first_tile(int owner) const {
    return owner * (p.turn_tiles / C::owners) + least(owner, p.turn_tiles % C::owners);
  }
  // Whether the last key warp fetches the query rows, having fewer tiles than it can; else the query warp does.
  VIDLA_DEVICE bool keys_fetch() const { return p.turn_tiles < C::owners * C::tiles; }
  VIDLA_DEVICE int tiles_of(const Pass& at) const {  // of 16 keys, in a turn
    return least(p.turn_tiles, p.padded_keys() / 16 - at.turn * p.turn_tiles);
  }

  // Rows `first` + g, `first` + g + 8, ... of a gradient: patches are final. A summary token's are added to its segment's
  // sum, where there may be some. A sum is always the same thread's; with the segment's last frame it goes out.
  template <bool some_summary, int count>
  VIDLA_DEVICE void leave(const Unit& of, const Pass& at, const float (&acc)[count][D / 8][4], int part, int first, int end,
                          float factor) const {
    const int lane = not_ahead(thread_index()) & 31, g = lane / 4, j = lane % 4;
    T* to = static_cast<T*>(p.d_qkv) + of.in_d_qkv(p, D) + part * p.heads * D;
    to += int64_t(p.query_token(at.frame, 0) + first + g) * (3 * p.heads * D) + (j % 2 ? 2 * j + 6 : 2 * j);
#pragma unroll
    for (int i = 0; i < 2 * count; ++i) {
      const int row = first + 8 * i + g;
      if (!some_summary || first + 8 * i < p.patches) {
#pragma unroll
        for (int d = 0; d < D / 16; ++d)
          store_16_columns(to + 16 * d, acc[i / 2][2 * d] + i % 2 * 2, acc[i / 2][2 * d + 1] + i % 2 * 2, factor,
                           !some_summary || row < p.patches);
      }
      if (some_summary && first + 8 * i + 8 > p.patches && first + 8 * i < end) {
        const bool active = row >= p.patches && row < end, more = active && at.frame > of.begin;
        const bool stays = p.sums_stay && at.left > 1;
        const int token = row - p.patches, sum = part * p.summary() + token;
        const int64_t segment = of.of_head(p) * p.segments + of.begin / p.segment_frames;
        float* out = p.partials + (segment * 3 * p.summary() + sum) * D + 2 * j;
        // Turned by the token, so that 8 rows of 4 lanes fall on different banks.
        auto here = [&](int c) { return sums + 4 * (sum * D + (8 * c + 2 * j + 8 * (D == 32 ? token >> 1 : token)) % D); };
        Word2 before[D / 8];  // all of it asked for before any is waited for
#pragma unroll
        for (int c = 0; c < D / 8; ++c)
          before[c] = p.sums_stay ? load_shared(here(c), more) : load_global<Word2>(out + 8 * c, more);
#pragma unroll
        for (int c = 0; c < D / 8; ++c) {
          const float* two = acc[i / 2][c] + i % 2 * 2;
          const float x = two[0] * factor + as_float(before[c].x[0]), y = two[1] * factor + as_float(before[c].x[1]);
          if (stays) store_shared(here(c), Word2{{as_word(x), as_word(y)}}, active);
          else store_global(out + 8 * c, Word2{{as_word(x), as_word(y)}}, active);
        }
      }
      to += int64_t(8) * 3 * p.heads * D;
    }
  }

  // copy(offset in the table, token, rows further than it, unit, valid) for 16 rows of a table: `number` of a frame
  // and following. token(n): the n-th that is no patch; from `end` on there are none.
  template <class Copy, class Token>
  VIDLA_DEVICE void copy_16_rows(int frame, int number, int end, Copy copy, Token token) const {
    constexpr int at_once = 32 % units ? 1 : 32 / units;  // rows
    const int lane = not_ahead(thread_index()) & 31;
    if (32 % units == 0 && number + 16 <= p.patches) {
      const int row = lane / units, unit = lane % units, first = p.query_token(frame, number);
#pragma unroll
      for (int i = 0; i < 16; i += at_once) copy(C::Row::at(row + i, unit), first + row, i, unit, true);
      return;
    }
#pragma unroll 1
    for (int i = lane; i < 16 * units; i += 32) {
      const int row = i / units, unit = i % units, n = number + row;
      const int of_row = n >= end ? 0 : n < p.patches ? p.query_token(frame, n) : token(n - p.patches);
      copy(C::Row::at(row, unit), of_row, 0, unit, n < end);
    }
  }
};

// Brings query rows into the slots, two chunks ahead of the one that is multiplied, and delta with them.
template <class T, class C> struct Fetcher : Block<T, C> {
  using B = Block<T, C>;
  using B::p, B::base, B::in, B::g, B::j, B::D, B::chunk, B::queries, B::chunks;
  // The chunk to be fetched next, from where and where to.
  Pass ahead;
  const T *q, *d_out, *out;  // of its head
  const float* lse;
  int first_frame;
  int ahead_chunk = 0;
  Place<C::slots> ahead_slot;
  // Of the chunk on its way: this lane's row is 8 j + g.
  bool on_its_way = false, way_fresh = false;
  int way_slot = 0, way_limit = 0, way_row = 0;
  float way_lse = 0;

  VIDLA_DEVICE explicit Fetcher(const Gradient& problem) : B(problem), ahead(Pass::first(problem, block_index())) { begin(); }

  VIDLA_DEVICE void begin() {  // a unit
    const Unit of = Unit::number(p, ahead.unit);
    q = static_cast<const T*>(p.qkv) + of.in_qkv(p);
    d_out = static_cast<const T*>(p.d_out) + of.in_out(p, D), out = static_cast<const T*>(p.out) + of.in_out(p, D);
    lse = p.lse + of.of_head(p) * p.sequence();
    first_frame = of.begin;
  }
  VIDLA_DEVICE bool fresh(int token) const {  // its delta isn't known yet
    return ahead.turn == 0 && (ahead.frame == first_frame || token >= p.summary());
  }

  VIDLA_DEVICE void fetch_rows() {
    if (!(on_its_way = ahead.some(p))) return;
    mbarrier_wait(B::empty + 8 * ahead_slot.at(), ahead_slot.phase() ^ 1);
    const int first = ahead_chunk * chunk, q_stride = int(p.qkv_token), stride = p.heads * D;
#pragma unroll 1
    for (int i = 0; i < chunk; i += 16) {
      const uint32_t to = base + C::slots_at + ahead_slot.at() * 2 * C::rows + i * C::Row::bytes;
      const uint32_t out_to = base + C::out_at + i * C::Row::bytes;
      auto copy = [&](uint32_t here, int token, int further, int unit, bool valid) {
        const int64_t from = (int64_t(token) * stride + 8 * unit) + int64_t(further) * stride;
        cp_async_16(to + here, q + (int64_t(token) * q_stride + 8 * unit) + int64_t(further) * q_stride, valid);
        cp_async_16(to + C::rows + here, d_out + from, valid);
        cp_async_16(out_to + here, out + from, valid && fresh(token));
      };
      B::copy_16_rows(ahead.frame, first + i, queries, copy, [](int n) { return n; });
    }
    const int row = first + 8 * j + g;
    const int token = row < queries ? p.query_token(ahead.frame, row) : 0;
    way_lse = as_float(load_global<uint32_t>(lse + token, true));
    if (row >= queries || (row >= p.patches && !p.frame_visible(ahead.frame, token))) way_lse = -minus_infinity;
    way_limit = p.limit(ahead.frame, row);
    way_row = row, way_fresh = fresh(token);
    way_slot = ahead_slot.at();
    ahead_slot = ahead_slot.next();
    if (++ahead_chunk == chunks) {
      const Pass next = ahead.next(p);
      const bool other = next.unit != ahead.unit;
      ahead_chunk = 0, ahead = next;
      if (other) begin();
    }
  }

  // The rows on their way have landed: delta, and what else key warps must know of them.
  VIDLA_DEVICE void hand_over_rows() const {
    const uint32_t d_out_at = base + C::slots_at + way_slot * 2 * C::rows + C::rows;
    float delta = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float products[2][4] = {};
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t a[4], b[4];
        ldmatrix_x4(a, C::Row::along(d_out_at + in.b_trans, 2 * d) + 16 * i * C::Row::bytes);
        ldmatrix_x4(b, C::Row::along(base + C::out_at + in.b, 2 * d) + 16 * i * C::Row::bytes);
        mma_m16n8k16<T>(products[0], a, b[0], b[1]);
        mma_m16n8k16<T>(products[1], a, b[2], b[3]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // row g + 8 h by column g: with the lane whose columns are 2 j and 2 j + 1
        const float mine = g % 2 ? products[h][2 * h + 1] : products[h][2 * h];
        const float of_row = shuffle(mine, 4 * g + g / 2);
        if (j == 2 * i + h) delta = of_row;
      }
    }
    const uint32_t known = base + C::deltas_at + 4 * way_row;
    if (way_row >= queries) delta = 0;
    else if (!way_fresh) delta = as_float(load_shared(known));
    const uint32_t stats = base + C::stats_at + way_slot * C::stats + 4 * (8 * j + g);
    store_shared(stats, as_word(way_lse));
    store_shared(stats + 4 * chunk, as_word(-delta));
    store_shared(stats + 8 * chunk, uint32_t(way_limit));
    store_shared(known, as_word(delta));
    mbarrier_arrive(B::full + 8 * way_slot);
  }

  // Hands over what was fetched the last time and fetches what comes next.
  VIDLA_DEVICE void fetch() {
    cp_async_wait<0>();
    warp_sync();
    if (on_its_way) hand_over_rows();
    fetch_rows();
    cp_async_commit();
  }

  VIDLA_DEVICE void start() { fetch(), fetch(); }
};

// A key warp. `count`: tiles of 16 keys it has in a turn.
template <class T, class C> struct KeyWarp : Block<T, C> {
  using B = Block<T, C>;
  using B::p, B::base, B::in, B::g, B::j, B::D;
  const int tile, share;  // its tiles of 16 keys in every turn, as far as there are so many
  const uint32_t kept;    // where it keeps the unit
  int passes = 0, number = 0;  // so far, and chunks; from which the places in the rings follow

  VIDLA_DEVICE KeyWarp(const Gradient& problem, int owner)
      : B(problem),
        tile(B::first_tile(owner)),
        share(B::first_tile(owner + 1) - tile),
        kept(B::base + C::kept_at + 16 * owner) {}

  // A unit's numbers, kept in shared memory.
  VIDLA_DEVICE void enter(const Unit& of) const {
    warp_sync();
    store_shared(kept, Word2{{uint32_t(of.batch), uint32_t(of.head)}}, B::lane == 0);
    store_shared(kept + 8, Word2{{uint32_t(of.begin), 0}}, B::lane == 0);
    warp_sync();
  }
  VIDLA_DEVICE Unit unit() const {
    const Word2 a = load_shared(kept, true), b = load_shared(kept + 8, true);
    return {int(a.x[0]), int(a.x[1]), int(b.x[0])};
  }

  VIDLA_DEVICE Place<C::slots> slot() const { return {int(unsigned(number) % (2 * C::slots))}; }
  VIDLA_DEVICE Place<C::strips> strip() const { return {int(unsigned(number) % (2 * C::strips))}; }
  VIDLA_DEVICE Place<2> table() const { return {passes & 3}; }  // of K

  VIDLA_DEVICE int count_in(const Pass& at) const {
    const int left = B::tiles_of(at) - tile;
    return left < 0 ? 0 : least(left, share);
  }

  // 16 query rows from `row` of the slot on. k, v: fragments; row_0: where the warp's keys begin in a strip; key_0: its first
  // key in the frame.
  template <bool masked, int count>
  VIDLA_DEVICE void step(const uint32_t (&k)[1][D / 16][4], const uint32_t (&v)[count][D / 16][4],
                         float (&d_k)[count][D / 8][4], float (&d_v)[count][D / 8][4], int row, int row_0, int key_0) const {
    const int lane = not_ahead(thread_index()) & 31, g = lane / 4, j = lane % 4;
    const Lane<C> in(lane);
    const uint32_t q_at = base + C::slots_at + slot().at() * 2 * C::rows + row * C::Row::bytes;
    const uint32_t stats = base + C::stats_at + slot().at() * C::stats + 4 * (row + 2 * j);
    const uint32_t strip_at = base + C::strips_at + strip().at() * C::strip + row_0 * C::Strip::bytes + in.strip;
    const uint32_t ds_at = C::Strip::along(strip_at, row / 8);
    const uint32_t k_at = base + table().at() * C::table + row_0 * C::Row::bytes + in.b_trans;
    float s[count][2][4] = {}, t[count][2][4];  // [n]: 8 columns; scores, then P'; dP' - delta, then dS'
    float lse[2][2], minus_delta[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Word2 l = load_shared(stats + 32 * n, true), d = load_shared(stats + 4 * C::chunk + 32 * n, true);
#pragma unroll
      for (int e = 0; e < 4; ++e) lse[n][e % 2] = as_float(l.x[e % 2]), minus_delta[n][e] = as_float(d.x[e % 2]);
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4(b, C::Row::along(q_at + in.b, 2 * d));
#pragma unroll
      for (int i = 0; i < count; ++i) {
        uint32_t a[4];
        if (i >= C::k_kept) ldmatrix_x4(a, C::Row::along(k_at, 2 * d) + 16 * i * C::Row::bytes);
        else for (int e = 0; e < 4; ++e) a[e] = k[i][d][e];
        mma_m16n8k16<T>(s[i][0], a, b[0], b[1]);
        mma_m16n8k16<T>(s[i][1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4(b, C::Row::along(q_at + in.b, 2 * d) + C::rows);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        mma_m16n8k16<T>(t[i][0], v[i][d], b[0], b[1], d ? t[i][0] : minus_delta[0]);
        mma_m16n8k16<T>(t[i][1], v[i][d], b[2], b[3], d ? t[i][1] : minus_delta[1]);
      }
    }

    uint32_t w[count][4], ds[count][4];  // P' and dS' in 16 bits
#pragma unroll
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // register e of an A operand: rows g + 8 * (e % 2), columns 8 * (e / 2) + 2 j
        const int n = e / 2;
        float *x = s[i][n] + e % 2 * 2, *y = t[i][n] + e % 2 * 2;
        Word2 limit;
        if (masked) limit = load_shared(stats + 8 * C::chunk + 32 * n, true);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x[c] = exp2_fast(x[c] * p.scale_log2 - lse[n][c]);
          if (masked && key_0 + 16 * i + e % 2 * 8 + g >= int(limit.x[c])) x[c] = 0;
          y[c] *= x[c];
        }
        w[i][e] = pack<T>(x[0], x[1]);
        ds[i][e] = pack<T>(y[0], y[1]);
        store_shared(C::Strip::along(ds_at, n) + (16 * i + e % 2 * 8) * C::Strip::bytes, ds[i][e]);
      }
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, C::Row::along(q_at + in.b_trans, 2 * d) + C::rows);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        mma_m16n8k16<T>(d_v[i][2 * d], w[i], b[0], b[1]);
        mma_m16n8k16<T>(d_v[i][2 * d + 1], w[i], b[2], b[3]);
      }
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, C::Row::along(q_at + in.b_trans, 2 * d));
#pragma unroll
      for (int i = 0; i < count; ++i) {
        mma_m16n8k16<T>(d_k[i][2 * d], ds[i], b[0], b[1]);
        mma_m16n8k16<T>(d_k[i][2 * d + 1], ds[i], b[2], b[3]);
      }
    }
  }

  // K and V of the warp's keys in a turn, for its next pass.
  VIDLA_DEVICE void fetch(const Unit& of, const Pass& at, int to_table) const {
    const T* k = static_cast<const T*>(p.qkv) + of.in_qkv(p) + p.qkv_third;
    const int key_0 = 16 * (at.turn * p.turn_tiles + tile), stride = int(p.qkv_token);
#pragma unroll 1
    for (int i = 0; i < 16 * count_in(at); i += 16) {
      const uint32_t to = base + (16 * tile + i) * C::Row::bytes;
      auto copy = [&](uint32_t here, int token, int further, int unit, bool valid) {
        const T* from = k + (int64_t(token) * stride + 8 * unit) + int64_t(further) * stride;
        cp_async_16(to + to_table * C::table + here, from, valid);
        cp_async_16(to + C::v_at + here, from + p.qkv_third, valid);
      };
      // Padding is zero, because 0 * NaN would spoil dQ.
      B::copy_16_rows(at.frame, key_0 + i, B::keys, copy, [&](int n) { return n < p.mst() ? 1 + n : 0; });
    }
    cp_async_commit();
  }

  // All query rows of the frame, for one chunk after another; work(row) for 16 of them.
  template <class Work, class Ahead> VIDLA_DEVICE void walk(const Pass& at, Ahead ahead, Work work) {
#pragma unroll 1
    for (; number < (passes + 1) * B::chunks; ++number) {
      const int c = number - passes * B::chunks;
      ahead();
      mbarrier_wait(B::full + 8 * slot().at(), slot().phase());
      mbarrier_wait(B::taken + 8 * strip().at(), strip().phase() ^ 1);
      if (c == least(1, B::chunks - 1)) {
        const Pass next = at.next(p);
        warp_sync();  // all lanes have V's fragments
        const Place<2> other = table().next();
        mbarrier_wait(B::k_empty + 8 * other.at(), other.phase() ^ 1);
        if (next.some(p)) fetch(next.unit == at.unit ? unit() : Unit::number(p, next.unit), next, other.at());
      }
#pragma unroll 1
      for (int row = 0; row < C::chunk && c * C::chunk + row < B::queries; row += 16) work(row);
      mbarrier_arrive(B::stored + 8 * strip().at());
      mbarrier_arrive(B::empty + 8 * slot().at());
    }
  }

  template <bool masked, int count, class Ahead> VIDLA_DEVICE void pass(const Pass& at, Ahead ahead) {
    const int row_0 = 16 * tile, key_0 = 16 * (at.turn * p.turn_tiles + tile);
    // Of one tile K stays in registers, where there are enough; else it is read again.
    uint32_t k[1][D / 16][4], v[count][D / 16][4];
    float d_k[count][D / 8][4] = {}, d_v[count][D / 8][4] = {};
    const Lane<C> in(not_ahead(thread_index()) & 31);
    const uint32_t k_at = base + table().at() * C::table + row_0 * C::Row::bytes + in.b_trans;
    const uint32_t v_from = base + C::v_at + row_0 * C::Row::bytes + in.b_trans;
#pragma unroll
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        if (i < C::k_kept) ldmatrix_x4(k[i][d], C::Row::along(k_at, 2 * d) + 16 * i * C::Row::bytes);
        ldmatrix_x4(v[i][d], C::Row::along(v_from, 2 * d) + 16 * i * C::Row::bytes);
      }
    }
    walk(at, ahead, [&](int row) { step<masked>(k, v, d_k, d_v, row, row_0, key_0); });
    const Unit of = unit();
    B::template leave<masked>(of, at, d_k, 1, key_0, B::keys, p.scale);
    B::template leave<masked>(of, at, d_v, 2, key_0, B::keys, 1.f);
  }

  template <bool fetches> VIDLA_DEVICE void run() {
    Fetcher<T, C> rows(p);
    auto ahead = [&] {
      if (fetches) rows.fetch();
    };
    Pass at = Pass::first(p, block_index());
    enter(Unit::number(p, at.unit));
    fetch(unit(), at, 0);
    if (fetches) rows.start();
#pragma unroll 1
    while (at.some(p)) {
      const int count = count_in(at);
      const bool masked = 16 * (at.turn * p.turn_tiles + tile + count) > p.patches;
      cp_async_wait<0>();
      warp_sync();  // its keys are there; for the query warp, when dS' is stored
      if (!fetches && count == C::tiles && !masked) pass<false, C::tiles>(at, ahead);
      else if (!fetches && count == C::tiles) pass<true, C::tiles>(at, ahead);
      else if (C::tiles > 1 && count == 1) pass<true, 1>(at, ahead);
      else walk(at, ahead, [](int) {});
      ++passes;
      const Pass next = at.next(p);
      if (next.unit != at.unit) enter(Unit::number(p, next.unit));
      at = next;
    }
  }
};

template <class T, class C> struct QueryWarp : Block<T, C> {
  using B = Block<T, C>;
  using B::p, B::base, B::in, B::g, B::j, B::D, B::chunk, B::queries, B::chunks;
  Place<C::strips> strip;
  Place<2> table;  // of K

  using B::B;

  // 16 * m rows of dQ: those of chunk c. begun: by a turn before.
  template <int m, bool begun> VIDLA_DEVICE void multiply(const Unit& of, const Pass& at, int c) {
    float d_q[m][D / 8][4], zero[4] = {};
    const uint32_t ds_at = base + C::strips_at + strip.at() * C::strip + in.strip_trans;
    const uint32_t k_at = base + table.at() * C::table + in.b_trans;
    // A tile of 16 keys is multiplied while another is loaded, or two, where there are registers for them.
    constexpr int halves = D > 96 ? 1 : 2;
    uint32_t a[halves][m][4], b[halves][D / 16][4];
    const int tiles = B::tiles_of(at);
    int next = 0;  // the tile to be loaded; past the last, the last once more, for nothing
    float* carry = p.carry + ((int64_t(block_index()) * chunks + c) * chunk + g) * D + 2 * j;
    auto in_carry = [&](int i, int n) { return carry + 8 * i * D + 8 * n; };
    if (begun) {
#pragma unroll
      for (int i = 0; i < 2 * m; ++i) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          const Word2 two = load_global<Word2>(in_carry(i, n), true);
          d_q[i / 2][n][i % 2 * 2] = as_float(two.x[0]), d_q[i / 2][n][i % 2 * 2 + 1] = as_float(two.x[1]);
        }
      }
    }
    mbarrier_wait(B::stored + 8 * strip.at(), strip.phase());
    auto load_a = [&](int half) {
#pragma unroll
      for (int i = 0; i < m; ++i)
        ldmatrix_x4_trans(a[half][i], C::Strip::along(ds_at + 16 * next * C::Strip::bytes, 2 * i));
    };
    auto load_b = [&](int half, int d) {
      ldmatrix_x4_trans(b[half][d], C::Row::along(k_at + 16 * next * C::Row::bytes, 2 * d));
    };
    auto go_on = [&] { next = least(next + 1, tiles - 1); };
    // Multiplies a tile and loads a later one to its place.
    auto product = [&](int half, bool first) {
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
#pragma unroll
        for (int i = 0; i < m; ++i) {
          mma_m16n8k16<T>(d_q[i][2 * d], a[half][i], b[half][d][0], b[half][d][1], first ? zero : d_q[i][2 * d]);
          mma_m16n8k16<T>(d_q[i][2 * d + 1], a[half][i], b[half][d][2], b[half][d][3], first ? zero : d_q[i][2 * d + 1]);
        }
        load_b(half, d);
      }
      load_a(half);
      go_on();
    };
    for (int half = 0; half < halves; ++half) {
      load_a(half);
#pragma unroll
      for (int d = 0; d < D / 16; ++d) load_b(half, d);
      go_on();
    }
    product(0, !begun);
#pragma unroll 1
    for (int tile = 1; tile + 1 < tiles; tile += 2) product(1 % halves, false), product(0, false);
    if (tiles % 2 == 0) product(1 % halves, false);
    mbarrier_arrive(B::taken + 8 * strip.at());
    strip = strip.next();

    const int first = c * chunk;
    if (at.turn + 1 < p.turns) {
#pragma unroll
      for (int i = 0; i < 2 * m; ++i) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          const float* two = d_q[i / 2][n] + i % 2 * 2;
          store_global(in_carry(i, n), Word2{{as_word(two[0]), as_word(two[1])}}, true);
        }
      }
      return;
    }
    if (first + 16 * m <= p.patches) B::template leave<false>(of, at, d_q, 0, first, queries, p.scale);
    else B::template leave<true>(of, at, d_q, 0, first, queries, p.scale);
  }

  VIDLA_DEVICE void run() {
    Fetcher<T, C> rows(p);
    const bool fetches = !B::keys_fetch();
    if (fetches) rows.start();
#pragma unroll 1
    for (Pass at = Pass::first(p, block_index()); at.some(p);) {
      const Unit of = Unit::number(p, at.unit);
#pragma unroll 1
      for (int c = 0; c < chunks; ++c) {
        if (fetches) rows.fetch();
        const bool two = c * chunk + 16 < queries;
        if (at.turn == 0) two ? multiply<2, false>(of, at, c) : multiply<1, false>(of, at, c);
        else two ? multiply<2, true>(of, at, c) : multiply<1, true>(of, at, c);
      }
      mbarrier_arrive(B::k_empty + 8 * table.at());
      table = table.next();
      at = at.next(p);
    }
  }
};

template <class T, class C> VIDLA_KERNEL(32 * C::warps, C::blocks) hierarchical_bwd_frames(Gradient p) {
  const int warp = warp_index();
  if (thread_index() == 0) {
    const Block<T, C> in(p);
    for (int i = 0; i < C::slots; ++i) mbarrier_init(in.full + 8 * i, 1), mbarrier_init(in.empty + 8 * i, C::owners);
    for (int i = 0; i < C::strips; ++i) mbarrier_init(in.stored + 8 * i, C::owners), mbarrier_init(in.taken + 8 * i, 1);
    for (int i = 0; i < 2; ++i) mbarrier_init(in.k_empty + 8 * i, 1);
  }
  block_sync();
  // The last key warp has the fewest keys; it shares a quarter of the multiprocessor with the query warp.
  const int owner = (warp + 3) % C::owners;
  if (warp == C::owners) QueryWarp<T, C>(p).run();
  else if (owner == C::owners - 1 && Block<T, C>(p).keys_fetch()) KeyWarp<T, C>(p, owner).template run<true>();
  else KeyWarp<T, C>(p, owner).template run<false>();
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
template <class T, int... sizes>
int launch_frames(const Gradient& p, Tiling<sizes...> tiling, int shared, void* stream) {
  using C = decltype(tiling);
  return launch<hierarchical_bwd_frames<T, C>>("bwd_frames", p.blocks, 32 * C::warps, shared, stream, p);
}
template <class T, int... sizes>
int launch_frames(const Gradient& p, Warpgroups<sizes...> tiling, int shared, void* stream) {
  using C = decltype(tiling);
  return launch<hierarchical_bwd_frames_wgmma<T, C>>("bwd_frames_wgmma", p.blocks, C::threads, shared, stream,
                                                     Tiles::of(p, tiling));
}

template <class T, int... sizes>
int launch_frames(const Gradient& p, WideWarpgroups<sizes...> tiling, int shared, void* stream) {
  using C = decltype(tiling);
  return launch<hierarchical_bwd_frames_wide_wgmma<T, C>>("bwd_frames_wide_wgmma", p.blocks, C::threads, shared, stream,
                                                          Tiles::of(p, tiling));
}

// With `needed`: only says whether this tiling can take the call, and how many bytes of workspace it needs.
template <class T, class C> int run(Gradient p, const Call& c, void* stream, int64_t* needed) {
  const int heads = p.batch * p.heads, limit = shared_memory_limit(), sums = 12 * C::D * p.summary();
  const int needs = C::needs(p);
  if (C::wgmma && !wgmma_runs()) return other_gpu;
  if (needs > limit || !C::serves(p)) return no_room;
  p.sums_stay = (needs + sums + 1024) * C::blocks <= limit + 1024;  // a block takes 1 KB more than it asks for
  const int shared = needs + (p.sums_stay ? sums : 0), fit = (limit + 1024) / (shared + 1024);
  const int room = multiprocessors() * (fit < C::blocks ? fit : C::blocks);

  const int tiles = p.padded_keys() / 16;
  p.turns = (tiles + C::keys / 16 - 1) / (C::keys / 16), p.turn_tiles = (tiles + p.turns - 1) / p.turns;

  // Segments as long as possible, where the busiest block's frames are at most 5 % more than the least there can be.
  auto busiest = [&](int length) {
    return (int64_t(heads) * ((p.frames + length - 1) / length) + room - 1) / room * length;
  };
  for (p.segment_frames = p.frames; 20 * busiest(p.segment_frames) > 21 * busiest(1);) --p.segment_frames;
  p.segments = (p.frames + p.segment_frames - 1) / p.segment_frames;
  p.blocks = p.units() < room ? p.units() : room;

  const int64_t partials = int64_t(heads) * p.segments * p.summary() * 3 * C::D;
  const int64_t carry = p.turns > 1 ? int64_t(p.blocks) * C::whole_chunks(p.queries()) * C::D : 0;
  if (needed) return *needed = 4 * (partials + carry), 0;
  if (const int status = wrong_pointers(c, 4 * (partials + carry))) return status;
  watch_buffers(c);
  p.carry = p.partials + partials;
  if (const int status = launch_frames<T>(p, C{}, shared, stream)) return status;
  const int outputs = heads * p.summary() * 3;
  return launch<hierarchical_bwd_combine<T, C::D>>("bwd_combine", (outputs + 3) / 4, 128, 0, stream, p);
}

// The tilings of a head dimension. The choice is the first one that owns as many keys as a frame has, with all its blocks
// in a multiprocessor's shared memory; where there is none, the last that fits, in turns. Key warps, query warps, tiles,
// slots, strips, blocks a multiprocessor.
template <class...> struct List {};
template <int D> struct Tilings;
template <> struct Tilings<64> {
  using type = List<Tiling<64, 2, 2, 4, 2, 2>,   // to 64 keys, N=49
                    Warpgroups<208, 6, 3>,       // to 256 rows and 208 keys, N=196, on Hopper; 211 KB
                    WideWarpgroups<272, 4, 3>,   // to 256 patches and 272 keys, N=256, on Hopper; 226 KB
                    Tiling<64, 7, 2, 4, 2, 1>>;  // to 224 keys, N=196, and more in turns
};
template <> struct Tilings<32> {
  using type = List<Tiling<32, 2, 2, 4, 2, 2>, Tiling<32, 7, 2, 4, 2, 1>>;
};
template <> struct Tilings<80> { using type = List<Tiling<80, 7, 1, 4, 2, 1>>; };
template <> struct Tilings<96> { using type = List<Tiling<96, 7, 1, 4, 2, 1>>; };
template <> struct Tilings<128> { using type = List<Tiling<128, 7, 1, 3, 2, 1>>; };

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
      const Layout p = layout_of(c);
      const bool room = (C::needs(p) + 1024) * C::blocks <= shared_memory_limit() + 1024;  // a block takes 1 KB more than it asks for
      fits = room && C::serves(p) && (!C::wgmma || wgmma_runs());
      whole = C::keys >= p.padded_keys();
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
                   nullptr,      c.scale, c.scale * log2_e, 0, 0, 0, 0, 0, false};
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
    C::describe(text, sizeof text);
  });
  return missing ? nullptr : text;
}
