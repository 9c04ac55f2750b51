// Hierarchical attention, forward. qkv (B, S, 3, H, D) -> out (B, S, H, D), bf16 or fp16, sums in fp32.
//
// Tiling. The queries of a frame (hierarchical.cuh) are cut into strips of 16 rows, of which a warp has one at a time.
// A block owns a head and a run of consecutive frames, which may reach from one clip into the next. The frames are shared
// out evenly, once, to teams of blocks whose heads lie side by side in memory, so that every block is resident from the
// start, all get the same work, and the heads of a token are read at about the same time.
// K and V of a frame come into shared memory once, by cp.async, for all of its queries: a warp or more does nothing but
// copy, and runs ahead by as many stages as fit. mbarriers say that a stage is full and that all warps are done with it, so
// no warp waits for the others: each takes every warps-th strip, from frame to frame, which loads the quarters of a
// multiprocessor alike. Where two stages of whole frames don't fit, they hold pieces, and pass once for each turn of the
// warps. The query rows of a strip are loaded as fragments while the strip before it leaves.
// A warp walks over the keys `chunk` at a time: S = QK' in registers, P = exp2, packed in place to be the A operand of PV.
// Softmax is the same whatever is subtracted from the scores, as long as nothing overflows. So patch rows subtract the
// maximum of a frame's first chunk all along: behind it nothing is compared, shuffled or rescaled. The sum of weights tells
// at the end whether one may have outgrown its type; only then the strip goes over the frame again, by maxima that grow.
// Those are what summary rows have always, rescaled only when one has grown by more than a factor of 2^8, which fp32 and
// both 16-bit types hold without loss. Keys that every row sees are not tested; what chunks leave over goes by 16.
// Patch rows are final and written once. If the warps are a multiple of a frame's strips, a warp always has the same rows,
// and its summary rows stay in registers for all frames of a clip that it sees; else for one frame. Then they leave
// (m, l, acc) for the second kernel, which adds them up in frame order, and CLS's own key to the CLS row. No atomics: the
// same bits every run on one kind of GPU (how the frames are shared out, so where sums are split, depends on its size).
// Beside the output goes the log-sum-exp of every row, from which the backward gets P back without a second softmax.
#include "hierarchical.cuh"

namespace vidla {

struct Problem : Layout {
  const void* qkv;
  void* out;
  float* lse;         // (B, H, S) base 2: log2 of each row's sum of exp(scale * score)
  float* sums;        // (B, H, T, G, D) unnormalised partial outputs, at the first frame of those they are of
  float* statistics;  // (B, H, T, G, 2) maximum score, sum of weights; the maximum is -inf where nothing was seen
  int token_bytes;    // from a token to the next in qkv
  float scale_log2;   // softmax scale * log2(e): exp(scale * x) = exp2(scale_log2 * x); > 0
  float slack;        // how far a score may exceed the maximum in use before sums are scaled down
  float headroom;     // what patch rows put on top of their first keys' maximum
  float largest_sum;  // of their weights: below, nothing has overflown
  int warps;          // in a block
  int teams, side;    // of `side` blocks each, whose heads lie side by side
  int run, longer;    // see run_start
  int piece, pieces;  // keys in a stage, stages that hold a frame
  int stages, shared; // of K and V; bytes of a block
  int wrap;           // rows from a frame's first strip to the next frame's
  int carry;          // summary rows stay in registers: the warps have so many frames at a time; 0: they don't

  // Teams of as many heads as leave few of the GPU's `slots` for blocks without one.
  void share_out(int slots) {
    for (side = heads; heads % side || 64 * (slots % side) > slots || side > slots; --side) {}
    const int all = heads / side * batch * frames;
    teams = least(all, slots / side);
    run = all / teams, longer = all % teams;
  }
  // The frames of all clips for `side` heads, then for the next ones: `longer` teams get run + 1 of them, the others run.
  VIDLA_HOST_DEVICE int run_start(int team) const { return team * run + least(team, longer); }
  // Whether partial results are stored at this frame: at every one, or at the first `carry` of a clip or a team's share.
  VIDLA_HOST_DEVICE bool starts_part(int head, int clip, int frame) const {
    const int x = (head / side * batch + clip) * frames + frame, split = longer * (run + 1);
    return !carry || frame < carry || (x < split ? x % (run + 1) : (x - split) % run) < carry;
  }
};

// A frame of a head's clip, and how many the block has left from there on.
struct Place {
  int head, batch, frame, left;
  VIDLA_DEVICE static Place first(const Problem& p) {  // of this block
    const int team = block_index() / p.side, begin = p.run_start(team), clip = begin / p.frames;
    return {clip / p.batch * p.side + block_index() % p.side, clip % p.batch, begin - clip * p.frames,
            p.run_start(team + 1) - begin};
  }
  VIDLA_DEVICE void advance(const Problem& p) {
    --left;
    if (++frame < p.frames) return;
    frame = 0;
    if (++batch == p.batch) batch = 0, head += p.side;
  }
};

}  // namespace vidla
#include "hierarchical_fwd_sm90.cuh"
namespace vidla {

// 16 query rows of one warp on their way over the keys. [h]: rows g and g + 8.
template <class T, int D> struct Strip {
  uint32_t q[D / 16][4];
  float acc[D / 8][4];
  float maximum[2], sum[2];  // sum: this lane's columns alone
  int limit[2];              // the row sees keys below; 0: nothing in this frame

  VIDLA_DEVICE void start(int h, int keys) {
    maximum[h] = minus_infinity, sum[h] = 0, limit[h] = keys;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) acc[n][2 * h] = acc[n][2 * h + 1] = 0;
  }

  // S = QK' of `chunk` keys; k: this lane's ldmatrix address.
  template <int chunk> VIDLA_DEVICE void score(float (&s)[chunk / 8][4], uint32_t k) const {
#pragma unroll
    for (int n = 0; n < chunk / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {  // matrices: keys 0-7, dims 0-7; 0-7, 8-15; 8-15, 0-7; 8-15, 8-15
      const uint32_t at = Rows<D>::along(k, 2 * d);
#pragma unroll
      for (int n = 0; n < chunk / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, at + 16 * n * Rows<D>::bytes);
        mma_m16n8k16<T>(s[2 * n], q[d], b[0], b[1]);
        mma_m16n8k16<T>(s[2 * n + 1], q[d], b[2], b[3]);
      }
    }
  }

  // Scores that a row does not see, among the last 16 of a chunk that begins at `key`: the others are below every limit.
  template <int chunk> VIDLA_DEVICE void hide(float (&s)[chunk / 8][4], int key) const {
    const int column = key + chunk - 16 + thread_index() % 4 * 2;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float& score = s[chunk / 8 - 2 + e / 4][e % 4];
      if (column + e / 4 * 8 + e % 2 >= limit[e / 2 % 2]) score = minus_infinity;
    }
  }

  template <int chunk> VIDLA_DEVICE static float most(const float (&s)[chunk / 8][4], int h) {  // of a row
    float even = s[0][2 * h], odd = s[0][2 * h + 1];  // two chains, half as long
#pragma unroll
    for (int n = 1; n < chunk / 8; ++n) even = fmaxf(even, s[n][2 * h]), odd = fmaxf(odd, s[n][2 * h + 1]);
    const float pair = fmaxf(even, odd), four = fmaxf(pair, shuffle_xor(pair, 1));
    return fmaxf(four, shuffle_xor(four, 2));
  }

  // The sums are scaled down where a maximum has grown; `begins`: some row begins here, at -inf.
  template <int chunk> VIDLA_DEVICE void rescale(const float (&s)[chunk / 8][4], bool begins, const Problem& p) {
    float top[2];
    bool grown = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float here = most<chunk>(s, h);
      top[h] = limit[h] ? fmaxf(maximum[h], here) : maximum[h];
      grown |= top[h] - maximum[h] > p.slack;
    }
    if (begins || warp_any(grown)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float shrink = top[h] > maximum[h] ? exp2_fast((maximum[h] - top[h]) * p.scale_log2) : 1;
        maximum[h] = top[h];
        sum[h] *= shrink;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) acc[n][2 * h] *= shrink, acc[n][2 * h + 1] *= shrink;
      }
    }
  }

  // P = exp2 of the scores, less the maximum: two score tiles side by side are one A operand.
  template <int chunk, bool may_be_blind>
  VIDLA_DEVICE void weigh(uint32_t (&w)[chunk / 16][4], float (&s)[chunk / 8][4], const Problem& p) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float offset = !may_be_blind || limit[h] ? -maximum[h] * p.scale_log2 : minus_infinity;  // sees nothing: P = 0
#pragma unroll
      for (int n = 0; n < chunk / 8; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          s[n][e] = exp2_fast(s[n][e] * p.scale_log2 + offset);
          sum[h] += s[n][e];
        }
        w[n / 2][n % 2 * 2 + h] = pack<T>(s[n][2 * h], s[n][2 * h + 1]);
      }
    }
  }

  // acc += PV; v: this lane's ldmatrix address.
  template <int chunk> VIDLA_DEVICE void add(const uint32_t (&w)[chunk / 16][4], uint32_t v) {
#pragma unroll
    for (int n = 0; n < chunk / 16; ++n) {
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {  // transposed: keys 0-7, dims 0-7; 8-15, 0-7; 0-7, 8-15; 8-15, 8-15
        uint32_t b[4];
        ldmatrix_x4_trans(b, Rows<D>::along(v, 2 * d) + 16 * n * Rows<D>::bytes);
        mma_m16n8k16<T>(acc[2 * d], w[n], b[0], b[1]);
        mma_m16n8k16<T>(acc[2 * d + 1], w[n], b[2], b[3]);
      }
    }
  }

  // A chunk for rows of any kind.
  template <int chunk, bool tested> VIDLA_DEVICE void step(int key, uint32_t k, uint32_t v, bool begins, const Problem& p) {
    float s[chunk / 8][4];
    uint32_t w[chunk / 16][4];
    score<chunk>(s, k);
    if (tested) hide<chunk>(s, key);
    rescale<chunk>(s, begins, p);
    weigh<chunk, true>(w, s, p);
    add<chunk>(w, v);
  }
  // The first chunk of patch rows, all of which every row sees: its maximum stands for all of a frame's keys.
  template <int chunk> VIDLA_DEVICE void open(uint32_t k, uint32_t v, const Problem& p) {
    float s[chunk / 8][4];
    uint32_t w[chunk / 16][4];
    score<chunk>(s, k);
#pragma unroll
    for (int h = 0; h < 2; ++h) start(h, limit[h]), maximum[h] = most<chunk>(s, h) + p.headroom;
    weigh<chunk, false>(w, s, p);
    add<chunk>(w, v);
  }
  // And the chunks that follow.
  template <int chunk> VIDLA_DEVICE void follow(int key, int keys, uint32_t k, uint32_t v, const Problem& p) {
    float s[chunk / 8][4];
    uint32_t w[chunk / 16][4];
    score<chunk>(s, k);
    if (key + chunk > keys) hide<chunk>(s, key);
    weigh<chunk, false>(w, s, p);
    add<chunk>(w, v);
  }
};

template <class T, int D, int chunk, int most_warps, int copiers, int blocks_per_sm>
VIDLA_KERNEL(32 * (most_warps + copiers), blocks_per_sm) hierarchical_fwd_frames(Problem p) {
  constexpr int rows = 16;
  const unsigned lane = thread_index() & 31, g = lane / 4, j = lane % 4;
  const int warp = warp_index();
  const int queries = p.queries(), keys = p.keys(), padded = p.padded_keys(), stride = p.warps * rows;
  const char* qkv = static_cast<const char*>(p.qkv);

  const uint32_t tables = shared_base(), stage_bytes = 2 * p.piece * Rows<D>::bytes;  // stages of K and V,
  const uint32_t full = tables + p.stages * stage_bytes, empty = full + 8 * p.stages;  // their mbarriers,
  const uint32_t limits = empty + 8 * p.stages;  // and a summary row's end, stride of frames

  Place at = Place::first(p);
  int first = warp * rows;  // the warp's next strip begins at this row of the frame at hand or, from wrap on, a later one
  int piece = 0, slot = 0, phase = 0;

  if (thread_index() < p.stages) {
    mbarrier_init(full + 8 * thread_index(), 32 * copiers);
    mbarrier_init(empty + 8 * thread_index(), p.warps);
  }
  for (int base = 32 * warp; base < p.summary(); base += 32 * (p.warps + copiers)) {
    const int* row = p.rows + 3 * least(base + lane, p.summary() - 1);
    store_shared(limits + 8 * (base + lane), load_constant(row + 1));
    store_shared(limits + 8 * (base + lane) + 4, load_constant(row + 2));
  }
  block_sync();

  // A step: one piece of a frame's keys, for all of its strips or, where there are more pieces, for one of each warp.
  auto next_step = [&] {
    if (++slot == p.stages) slot = 0, phase ^= 1;
    if (++piece < p.pieces) return;
    piece = 0;
    if (p.pieces > 1 && (first += stride) < p.wrap) return;
    first -= p.wrap;
    at.advance(p);
  };

  if (warp >= p.warps) {  // the copying warps
    constexpr int units = D / 8, lanes = units > 8 ? 16 : units, by = copiers * 32 / lanes;  // lanes to a row, rows at a time
    const int unit = lane % lanes, lane_row = (warp - p.warps) * (32 / lanes) + lane / lanes;
    first = 0;
    for (int n = 0; at.left > 0; ++n) {
      if (n >= p.stages) mbarrier_wait(empty + 8 * slot, phase ^ 1);
      const char* k_from = qkv + 2 * (at.batch * p.qkv_batch + at.head * p.qkv_head + p.qkv_third + 8 * unit);
      const char* v_from = k_from + 2 * p.qkv_third;
      const uint32_t k_to = tables + slot * stage_bytes, v_to = k_to + p.piece * Rows<D>::bytes;
      const int key_0 = piece * p.piece, count = least(p.piece, padded - key_0);
      const int patches = key_0 < p.patches ? least(count, p.patches - key_0) : 0;
      int64_t from = int64_t(p.summary() + at.frame * p.patches + key_0 + lane_row) * p.token_bytes;
#pragma unroll 2
      for (int row_0 = 0; row_0 < patches; row_0 += by, from += by * p.token_bytes) {
        const uint32_t to = by % 8 ? Rows<D>::at(row_0 + lane_row, unit) : Rows<D>::at(lane_row, unit) + row_0 * Rows<D>::bytes;
        const bool active = row_0 + lane_row < patches && unit < units;
        cp_async_16(k_to + to, k_from + from, true, active);
        cp_async_16(v_to + to, v_from + from, true, active);
      }
#pragma unroll 1
      for (int row_0 = patches; row_0 < count; row_0 += by) {
        const int row = row_0 + lane_row, key = key_0 + row;  // padding is zero, because 0 * NaN would spoil PV
        from = int64_t(key < p.patches + p.mst() ? key - p.patches + 1 : 0) * p.token_bytes;
        const bool active = row < count && unit < units;
        cp_async_16(k_to + Rows<D>::at(row, unit), k_from + from, key < keys, active);
        cp_async_16(v_to + Rows<D>::at(row, unit), v_from + from, key < keys, active);
      }
      mbarrier_arrive_with_copies(full + 8 * slot);
      next_step();
    }
    cp_async_commit();
    cp_async_wait<0>();  // no thread leaves with copies on their way
    return;
  }

  int segment = -1;  // the first frame that the summary rows in registers have seen; -1: there are none
  Strip<T, D> strip;
  auto load_queries = [&](int row_0) {  // of the strip that begins there, as fragments
    Place to = at;
    for (; row_0 >= p.wrap; row_0 -= p.wrap) to.advance(p);
    if (to.left <= 0) return;
    const char* from = qkv + 2 * (to.batch * p.qkv_batch + to.head * p.qkv_head + 2 * j);
    const int patch_0 = p.summary() + to.frame * p.patches;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_0 + 8 * h + g;
      const bool there = row < queries;
      const char* row_from = from + int64_t(row + (row < p.patches ? patch_0 : -p.patches)) * p.token_bytes;
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        strip.q[d][h] = load_global<uint32_t>(row_from + 32 * d, there);
        strip.q[d][2 + h] = load_global<uint32_t>(row_from + 32 * d + 16, there);
      }
    }
  };
  load_queries(first);
#pragma unroll 1
  while (at.left > 0) {
    mbarrier_wait(full + 8 * slot, phase);
    const int key_0 = piece * p.piece, key_end = least(key_0 + p.piece, padded);
#pragma unroll 1
    while (first < p.wrap) {
      const bool some_patches = first < p.patches, some_summary = first + rows > p.patches;
      bool patient = some_summary || p.pieces > 1 || keys < chunk;  // maxima may grow
      if (piece == 0) {
        strip.limit[0] = strip.limit[1] = keys;
        if (patient) {
          const bool continues = some_summary && segment >= 0;
          if (some_summary && !continues) segment = at.frame;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = first + 8 * h + g;
            const bool summary = row >= p.patches && row < queries;
            if (!continues || !summary) strip.start(h, keys);
            if (summary) {
              const uint32_t entry = limits + 8 * (row - p.patches);
              strip.limit[h] = at.frame == 0 ? p.patches + load_shared(entry) - 1
                               : at.frame % load_shared(entry + 4) ? 0 : p.patches;
            }
          }
        }
      }

      uint32_t k = tables + slot * stage_bytes + Rows<D>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
      uint32_t v = tables + slot * stage_bytes + p.piece * Rows<D>::bytes + Rows<D>::at(lane % 16, lane / 16);
      int key = key_0;
      auto by = [&](int count) { key += count, k += count * Rows<D>::bytes, v += count * Rows<D>::bytes; };
      if (!patient) {
        strip.template open<chunk>(k, v, p), by(chunk);
#pragma unroll 1
        for (; key + chunk <= keys; by(chunk)) strip.template follow<chunk>(key, keys, k, v, p);
#pragma unroll 1
        for (; key < padded; by(16)) strip.template follow<16>(key, keys, k, v, p);
        patient = warp_any(!(strip.sum[0] < p.largest_sum && strip.sum[1] < p.largest_sum));  // may have overflown: once more
        if (patient) {
          by(-key);
          for (int h = 0; h < 2; ++h) strip.start(h, keys);
        }
      }
      if (patient) {
        const int common = some_summary ? p.patches : keys;  // every row of the strip sees these first keys
#pragma unroll 1
        for (; key + chunk <= least(common, key_end); by(chunk)) strip.template step<chunk, false>(key, k, v, key == 0, p);
        if (key + chunk <= key_end && key + chunk - 16 <= common)
          strip.template step<chunk, true>(key, k, v, key == 0, p), by(chunk);
#pragma unroll 1
        for (; key < key_end; by(16)) strip.template step<16, true>(key, k, v, key == 0, p);
        if (piece + 1 < p.pieces) break;
      }

      load_queries(first + stride);  // they come while this strip leaves
      const bool ends = some_summary && (!p.carry || at.left <= p.carry || at.frame + p.carry >= p.frames);  // their last frame
      const int row = first + g;
      float sum[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] = strip.sum[h] + shuffle_xor(strip.sum[h], 1);
        sum[h] += shuffle_xor(sum[h], 2);
      }
      if (some_patches) {
        const int token = p.summary() + at.frame * p.patches + row;
        T* out = static_cast<T*>(p.out) + int64_t(at.batch * p.sequence() + token) * (p.heads * D) + at.head * D;
        float* lse = p.lse + int64_t(at.batch * p.heads + at.head) * p.sequence() + token;
        out += j / 2 * 4 + j % 2 * 8;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float over = reciprocal(sum[h]);
          const bool mine = row + 8 * h < p.patches;
#pragma unroll
          for (int d = 0; d < D / 16; ++d) {  // two lanes trade: 4 columns a lane, a full 32-byte sector in 4 lanes
            const float *l = strip.acc[2 * d] + 2 * h, *r = strip.acc[2 * d + 1] + 2 * h;
            const uint32_t left = pack<T>(l[0] * over, l[1] * over), right = pack<T>(r[0] * over, r[1] * over);
            const uint32_t other = shuffle_xor(j % 2 ? left : right, 1);
            store_global(out + 8 * h * (p.heads * D) + 16 * d, Word2{{j % 2 ? other : left, j % 2 ? right : other}}, mine);
          }
          store_global(lse + 8 * h, as_word(strip.maximum[h] * p.scale_log2 + log2_fast(sum[h])), mine && j == 0);
        }
      }
      if (ends) {
        const int64_t part = ((int64_t(at.batch) * p.heads + at.head) * p.frames + segment) * p.summary() + row - p.patches;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool mine = row + 8 * h >= p.patches && row + 8 * h < queries, seen = strip.maximum[h] > minus_infinity;
          float* sums = p.sums + (part + 8 * h) * D + 2 * j;
#pragma unroll
          for (int n = 0; n < D / 8; ++n) {
            const float* two = strip.acc[n] + 2 * h;
            store_global(sums + 8 * n, Word2{{as_word(two[0]), as_word(two[1])}}, mine && seen);
          }
          const Word2 statistics{{as_word(strip.maximum[h]), as_word(sum[h])}};
          store_global(p.statistics + 2 * (part + 8 * h), statistics, mine && j == 0);
        }
      }
      if (ends) segment = -1;
      if (p.pieces > 1) break;
      first += stride;
    }
    mbarrier_arrive(empty + 8 * slot);
    next_step();
  }
}

// A warp owns one summary row of one (batch, head): lane l weighs frame l, and holds columns 4l to 4l + 3.
template <class T, int D> VIDLA_KERNEL(128, 1) hierarchical_fwd_combine(Problem p) {
  const int lane = thread_index() % 32, row = block_index() * 4 + warp_index();
  const int token = row % p.summary(), head = row / p.summary() % p.heads, batch = row / p.summary() / p.heads;
  if (batch >= p.batch) return;  // a whole warp leaves
  const bool active = lane < D / 4;
  const int64_t partial = (int64_t(batch) * p.heads + head) * p.frames * p.summary() + token;
  auto statistics = [&](int frame) {
    const bool there = frame < p.frames && p.starts_part(head, batch, frame);
    const Word2 s = load_global<Word2>(p.statistics + (partial + int64_t(frame) * p.summary()) * 2, there);
    return there ? s : Word2{{as_word(minus_infinity), 0}};
  };

  float top = minus_infinity, own[4] = {};  // CLS's score for itself, and its value
  if (token == 0) {
    const T* cls = static_cast<const T*>(p.qkv) + batch * p.qkv_batch + head * p.qkv_head + 4 * lane;
    const Word2 q = load_global<Word2>(cls, active), k = load_global<Word2>(cls + p.qkv_third, active);
    const Word2 v = load_global<Word2>(cls + 2 * p.qkv_third, active);
    top = 0;
    for (int e = 0; e < 4; ++e) {
      top += unpack<T>(q.x[e / 2], e % 2) * unpack<T>(k.x[e / 2], e % 2);
      own[e] = unpack<T>(v.x[e / 2], e % 2);
    }
    for (int mask = 16; mask; mask /= 2) top += shuffle_xor(top, mask);
  }
  const float self = top;
  for (int first = 0; first < p.frames; first += 32) top = fmaxf(top, as_float(statistics(first + lane).x[0]));
  for (int mask = 16; mask; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));

  const float weight_self = exp2_fast((self - top) * p.scale_log2);
  float sum = 0, acc[4];
  for (int e = 0; e < 4; ++e) acc[e] = weight_self * own[e];
  for (int first = 0; first < p.frames; first += 32) {
    const Word2 s = statistics(first + lane);
    const float weight = exp2_fast((as_float(s.x[0]) - top) * p.scale_log2);
    sum += weight * as_float(s.x[1]);
    const int count = least(32, p.frames - first);
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float w = shuffle(weight, i);
      const float* from = p.sums + (partial + int64_t(first + i) * p.summary()) * D + 4 * lane;
      const Word4 a = load_global<Word4>(from, active && w > 0);
      for (int e = 0; e < 4; ++e) acc[e] += w * as_float(a.x[e]);
    }
  }
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  sum += weight_self;
  const float over = reciprocal(sum);
  const Word2 o = {{pack<T>(acc[0] * over, acc[1] * over), pack<T>(acc[2] * over, acc[3] * over)}};
  const int64_t at = int64_t(batch) * p.sequence() + token;
  store_global(static_cast<T*>(p.out) + (at * p.heads + head) * D + 4 * lane, o, active);
  float* lse = p.lse + (int64_t(batch) * p.heads + head) * p.sequence() + token;
  store_global(lse, as_word(top * p.scale_log2 + log2_fast(sum)), lane == 0);
}

// ---- host ----------------------------------------------------------------------------------------------------------
inline int64_t forward_workspace(const Call& c) {  // bytes of Problem's sums and statistics
  return int64_t(c.batch) * c.heads * c.frames * c.summary * (c.head_dim + 2) * 4;
}

template <class T, int D> int combine(const Problem& p, void* stream) {
  const int summary_rows = p.batch * p.heads * p.summary();
  return launch<hierarchical_fwd_combine<T, D>>("fwd_combine", (summary_rows + 3) / 4, 128, 0, stream, p);
}

// With dry: only says whether this configuration can take the call.
template <class T, int D, int chunk, int most_warps, int copiers, int blocks_per_sm>
int run(Problem p, void* stream, bool dry) {
  const int rows = 16, strips = (p.queries() + rows - 1) / rows, turns = (strips + most_warps - 1) / most_warps;
  const int even = most_warps / strips * strips;  // warps whose rows are always the same
  const int table = (p.summary() + 31) / 32 * 32 * 8;  // of limits, in whole warps
  const int room = blocks_per_sm > 1 ? (shared_memory_limit() + 1024) / blocks_per_sm - 1024 : shared_memory_limit();
  for (p.pieces = 1;; ++p.pieces) {
    // Where a step has all of a frame, warps that are done go on to the next one; else they go together.
    p.warps = p.pieces > 1 ? (strips + turns - 1) / turns : 4 * even < 3 * most_warps ? most_warps : even;
    p.wrap = (p.pieces > 1 ? p.warps * turns : strips) * rows;
    p.piece = ((p.padded_keys() + p.pieces - 1) / p.pieces + 15) / 16 * 16;
    p.stages = least(4, (room - 64 - table) / (2 * p.piece * Rows<D>::bytes));
    if (p.stages > 1) break;
    if (p.piece == 16) return no_room;
  }
  p.shared = p.stages * (2 * p.piece * Rows<D>::bytes + 16) + table;
  p.carry = p.pieces == 1 || turns == 1 ? (p.warps % strips ? 0 : p.warps / strips) : 0;
  if (dry) return 0;
  p.share_out(multiprocessors() * blocks_per_sm);
  const int status = launch<hierarchical_fwd_frames<T, D, chunk, most_warps, copiers, blocks_per_sm>>(
      "fwd_frames", p.teams * p.side, 32 * (p.warps + copiers), p.shared, stream, p);
  if (status) return status;
  return combine<T, D>(p, stream);
}

// The configurations, in one list: V(variant, D, chunk, most_warps, copiers, blocks_per_sm). 16 warps leave 128 registers a
// thread, which chunks of 32 fit at D=64 without a spill. 0 of D=64 is the choice on A100 and H100 alike: its replays are
// the lowest of those tried at N=196 and 256, and about equal to the others at 49.
#define VIDLA_FORWARD_VARIANTS(V)                                                      \
  V(0, 64, 32, 12, 4, 1)  /* strips take turns: 3 warps on each quarter, and a copier */ \
  V(1, 64, 32, 15, 1, 1)                                                               \
  V(2, 64, 64, 11, 1, 1)  /* half the trips, fewer warps */                             \
  V(0, 32, 64, 12, 4, 1)                                                               \
  V(0, 80, 64, 11, 1, 1)  /* fewer warps from here on: accumulators need the registers */ \
  V(0, 96, 32, 11, 1, 1)                                                               \
  V(0, 128, 64, 7, 1, 1)

// And those of hierarchical_fwd_sm90.cuh, whose numbers follow: V(D, most keys, keys a chunk, warpgroups that compute, their
// registers). Of 272 keys, chunks of 144 are too many scores for 160 registers: ptxas then waits for each wgmma.
#define VIDLA_FORWARD_WGMMA(V) \
  V(64, 64, 64, 3, 160)        \
  V(64, 128, 128, 3, 160)      \
  V(64, 208, 112, 3, 160)      \
  V(64, 272, 96, 3, 160)
constexpr int mma_variants(int dim) {
  int count = 0;
#define VIDLA_COUNT(n, D, ...) count += dim == D;
  VIDLA_FORWARD_VARIANTS(VIDLA_COUNT)
#undef VIDLA_COUNT
  return count;
}

template <class T> int dispatch(const Problem& p, int dim, int variant, void* stream, bool dry) {
  bool served = false;
#define VIDLA_RUN(n, D, ...)                                                  \
  if (dim == D && variant == n) return run<T, D, __VA_ARGS__>(p, stream, dry); \
  served |= dim == D;
  VIDLA_FORWARD_VARIANTS(VIDLA_RUN)
#undef VIDLA_RUN
  int number = mma_variants(dim);
#define VIDLA_RUN(D, ...) \
  if (dim == D && number++ == variant) return run_wgmma<T, D, __VA_ARGS__>(p, stream, dry);
  VIDLA_FORWARD_WGMMA(VIDLA_RUN)
#undef VIDLA_RUN
  return served ? unknown_variant : unsupported_dim;
}

// See the lists.
inline int choose(const Call& c) {
  const Layout layout = layout_of(c);
  if (!wgmma_runs() || layout.keys() <= 64) return 0;  // so small frames' summary rows stay in registers: fewer bytes
  int number = mma_variants(c.head_dim);
#define VIDLA_FITS(D, n, chunk, groups, registers)                                                 \
  if (c.head_dim == D) {                                                                    \
    if (layout.keys() <= n && wgmma_tables<D, n, groups>() > 2) return number;              \
    ++number;                                                                               \
  }
  VIDLA_FORWARD_WGMMA(VIDLA_FITS)
#undef VIDLA_FITS
  return 0;
}

inline int forward(const Call& c, void* stream, bool dry) {
  if (const int status = wrong_sizes(c)) return status;
  if (!(c.scale >= 0)) return bad_layout;  // the maximum is taken before the scale
  if (c.qkv_token >= 1 << 24 || c.qkv_token <= -(1 << 24)) return bad_layout;  // offsets of some tokens are 32 bits
  float* sums = static_cast<float*>(c.workspace);
  Problem p{layout_of(c), c.qkv, c.out, c.lse, sums};
  p.token_bytes = int(2 * c.qkv_token);
  p.scale_log2 = c.scale > 1e-30f ? c.scale * log2_e : 1e-30f;  // of 0 the kernel would make 0 * inf
  p.slack = 8 / p.scale_log2;
  p.headroom = c.type ? p.slack : 0;  // of exponent bf16 has enough
  p.largest_sum = c.type ? 0x1p15f : 0x1p40f;
  if (!dry) {
    if (const int status = wrong_pointers(c, forward_workspace(c))) return status;
    p.statistics = sums + int64_t(c.batch) * c.heads * c.frames * c.summary * c.head_dim;
    watch_buffers(c);
  }
  const int variant = c.variant < 0 ? choose(c) : c.variant;
  return c.type ? dispatch<fp16>(p, c.head_dim, variant, stream, dry) : dispatch<bf16>(p, c.head_dim, variant, stream, dry);
}
}  // namespace vidla

// Enqueues the forward on `stream` of the current device. Returns 0, a Status (< 0) or a cudaError_t.
VIDLA_EXPORT int vidla_hierarchical_forward(const vidla::Call* c, void* stream) { return vidla::forward(*c, stream, false); }

// Bytes of workspace the call needs, or why it can't be served (a Status, < 0). Pointers aren't looked at.
VIDLA_EXPORT int64_t vidla_hierarchical_forward_workspace(const vidla::Call* c) {
  const int status = vidla::forward(*c, nullptr, true);
  return status ? status : vidla::forward_workspace(*c);
}

// The variant that -1 stands for, and all there are for a head dimension, in words (null past the last).
VIDLA_EXPORT int vidla_hierarchical_forward_choice(const vidla::Call* c) { return vidla::choose(*c); }
VIDLA_EXPORT const char* vidla_hierarchical_forward_variant(int head_dim, int variant) {
#define VIDLA_NAME(n, D, chunk, warps, copiers, blocks)                                              \
  if (head_dim == D && variant == n)                                                                               \
    return #chunk " keys a chunk, " #warps " warps, " #copiers " that copy, " #blocks " blocks";
  VIDLA_FORWARD_VARIANTS(VIDLA_NAME)
#undef VIDLA_NAME
  int number = vidla::mma_variants(head_dim);
#define VIDLA_NAME(D, n, chunk, groups, registers)      \
  if (head_dim == D && number++ == variant)      \
    return "wgmma, H100: up to " #n " keys a frame, " #chunk " at a time, " #groups " warpgroups of " #registers " registers";
  VIDLA_FORWARD_WGMMA(VIDLA_NAME)
#undef VIDLA_NAME
  return nullptr;
}
