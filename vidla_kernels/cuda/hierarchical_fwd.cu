// Hierarchical attention, forward. qkv (B, S, 3, H, D) -> out (B, S, H, D), bf16 or fp16, sums in fp32.
//
// Tiling. The queries of a frame (hierarchical.cuh) are cut into tiles of 16 rows; a warp takes `tiles` of them at a time,
// a strip, so that a fragment of K or V read from shared memory feeds that many mma.
// A block owns a head and a run of consecutive frames, which may reach from one clip into the next: the (batch, frame)
// pairs are shared out evenly, once to each team of H blocks, so that every block is resident from the start, all get
// the same work, and the heads of a token, which lie side by side in memory, are read at about the same time.
// K and V of a frame come into shared memory once, by cp.async, for all of its queries: one or two warps do nothing but
// copy, and run ahead by as many stages as fit. mbarriers say that a stage is full and that all warps are done with it,
// so no warp waits for the others, and those without a strip left in this frame begin the next. Where two stages of whole
// frames don't fit, they hold pieces, and pass once for each turn of the warps. A warp's own query rows have a small
// buffer, refilled as soon as the fragments are in registers.
// A warp walks over the keys `chunk` at a time: S = QK' in registers, maximum, P = exp2, packed in place to be the A
// operand of PV. The accumulator is rescaled only when a maximum has grown by more than a factor of 2^8, which fp32 and
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
  float slack;        // how far a score may exceed the maximum in use
  int warps, teams;   // in a block; of H blocks each
  int run, longer;    // see run_start
  int piece, pieces;  // keys in a stage, stages that hold a frame
  int stages, shared; // of K and V; bytes of a block
  int wrap;           // rows from a frame's first strip to the next frame's
  int carry;          // summary rows stay in registers: the warps have so many frames at a time; 0: they don't

  // The B*T frames are shared out in order: `longer` teams get run + 1 of them, the others run.
  VIDLA_HOST_DEVICE int run_start(int team) const { return team * run + least(team, longer); }
  // Whether partial results are stored at this frame: at every one, or at the first `carry` of a clip or a team's share.
  VIDLA_HOST_DEVICE bool starts_part(int batch, int frame) const {
    const int x = batch * frames + frame, split = longer * (run + 1);
    return !carry || frame < carry || (x < split ? x % (run + 1) : (x - split) % run) < carry;
  }
};

// A frame of a clip, and how many the block has left from there on.
struct Place {
  int batch, frame, left;
  VIDLA_DEVICE void advance(const Layout& p) {
    --left;
    if (++frame == p.frames) frame = 0, ++batch;
  }
};

}  // namespace vidla
#include "hierarchical_fwd_sm90.cuh"
namespace vidla {

// The softmax of one warp's rows on its way over the keys. [i]: tile, [h]: rows g and g + 8 of it.
template <class T, int D, int tiles> struct Strip {
  uint32_t q[tiles][D / 16][4];
  float acc[tiles][D / 8][4];
  float maximum[tiles][2], sum[tiles][2];  // sum: this lane's columns alone
  int limit[tiles][2];                     // the row sees keys below; 0: nothing in this frame

  VIDLA_DEVICE void start(int i, int h, int keys) {
    maximum[i][h] = minus_infinity, sum[i][h] = 0, limit[i][h] = keys;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) acc[i][n][2 * h] = acc[i][n][2 * h + 1] = 0;
  }

  // `chunk` keys, the first of which is number `key` of the frame; K and V as this lane's ldmatrix addresses.
  template <int chunk, bool tested> VIDLA_DEVICE void step(int key, uint32_t k, uint32_t v, const Problem& p) {
    float s[tiles][chunk / 8][4] = {};
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {  // matrices: keys 0-7, dims 0-7; 0-7, 8-15; 8-15, 0-7; 8-15, 8-15
      const uint32_t at = Rows<D>::along(k, 2 * d);
#pragma unroll
      for (int n = 0; n < chunk / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, at + 16 * n * Rows<D>::bytes);
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          mma_m16n8k16<T>(s[i][2 * n], q[i][d], b[0], b[1]);
          mma_m16n8k16<T>(s[i][2 * n + 1], q[i][d], b[2], b[3]);
        }
      }
    }
    if (tested) {  // the last 16 keys alone: the others are below every limit
      const int column = key + chunk - 16 + thread_index() % 4 * 2;
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& score = s[i][chunk / 8 - 2 + e / 4][e % 4];
          if (column + e / 4 * 8 + e % 2 >= limit[i][e / 2 % 2]) score = minus_infinity;
        }
      }
    }

    float top[tiles][2], offset[tiles][2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float even = s[i][0][2 * h], odd = s[i][0][2 * h + 1];  // two chains, half as long
#pragma unroll
        for (int n = 1; n < chunk / 8; ++n) even = fmaxf(even, s[i][n][2 * h]), odd = fmaxf(odd, s[i][n][2 * h + 1]);
        float most = fmaxf(even, odd);
        most = fmaxf(most, shuffle_xor(most, 1));
        most = fmaxf(most, shuffle_xor(most, 2));
        top[i][h] = limit[i][h] ? fmaxf(maximum[i][h], most) : maximum[i][h];
        grown |= top[i][h] - maximum[i][h] > p.slack;  // always at the first keys a row sees: finite - -inf
      }
    }
    if (warp_any(grown)) {
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float shrink = top[i][h] > maximum[i][h] ? exp2_fast((maximum[i][h] - top[i][h]) * p.scale_log2) : 1;
          maximum[i][h] = top[i][h];
          sum[i][h] *= shrink;
#pragma unroll
          for (int n = 0; n < D / 8; ++n) acc[i][n][2 * h] *= shrink, acc[i][n][2 * h + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        offset[i][h] = limit[i][h] ? -maximum[i][h] * p.scale_log2 : minus_infinity;  // a row that sees nothing: P = 0
#pragma unroll
        for (int n = 0; n < chunk / 8; ++n) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[i][n][e] = exp2_fast(s[i][n][e] * p.scale_log2 + offset[i][h]);
            sum[i][h] += s[i][n][e];
          }
        }
      }
    }

    uint32_t w[chunk / 16][tiles][4];  // P in 16 bits: two score tiles side by side are one A operand
#pragma unroll
    for (int n = 0; n < chunk / 16; ++n) {
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* pair = s[i][2 * n + e / 2] + e % 2 * 2;
          w[n][i][e] = pack<T>(pair[0], pair[1]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < chunk / 16; ++n) {
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {  // transposed: keys 0-7, dims 0-7; 8-15, 0-7; 0-7, 8-15; 8-15, 8-15
        uint32_t b[4];
        ldmatrix_x4_trans(b, Rows<D>::along(v, 2 * d) + 16 * n * Rows<D>::bytes);
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          mma_m16n8k16<T>(acc[i][2 * d], w[n][i], b[0], b[1]);
          mma_m16n8k16<T>(acc[i][2 * d + 1], w[n][i], b[2], b[3]);
        }
      }
    }
  }
};

template <class T, int D, int tiles, int chunk, int most_warps, int copiers, int blocks_per_sm>
VIDLA_KERNEL(32 * (most_warps + copiers), blocks_per_sm) hierarchical_fwd_frames(Problem p) {
  constexpr int rows = 16 * tiles, units = D / 8, lanes = units > 8 ? 16 : units;  // copies: so many lanes a row
  const unsigned lane = thread_index() & 31, g = lane / 4, j = lane % 4, unit = lane % lanes;
  const int warp = warp_index(), head = block_index() % p.heads, team = block_index() / p.heads;
  const int queries = p.queries(), keys = p.keys(), padded = p.padded_keys(), stride = p.warps * rows;
  const char* qkv = static_cast<const char*>(p.qkv) + 2 * (head * p.qkv_head + 8 * unit);

  const uint32_t tables = shared_base(), stage_bytes = 2 * p.piece * Rows<D>::bytes;  // stages of K and V,
  const uint32_t q_at = tables + p.stages * stage_bytes + warp * rows * Rows<D>::bytes;  // each warp's query rows,
  const uint32_t full = tables + p.stages * stage_bytes + stride * Rows<D>::bytes;       // mbarriers of the stages
  const uint32_t empty = full + 8 * p.stages, limits = empty + 8 * p.stages;  // and a summary row's end, stride of frames

  Place at{p.run_start(team) / p.frames, p.run_start(team) % p.frames, p.run_start(team + 1) - p.run_start(team)};
  int first = warp * rows;  // the warp's next strip begins at this row of the frame at hand or, from wrap on, a later one
  int piece = 0, slot = 0, phase = 0;

  auto fetch_queries = [&](int row_0) {
    Place to = at;
    for (; row_0 >= p.wrap; row_0 -= p.wrap) to.advance(p);
    if (to.left <= 0) return;
    const char* q_from = qkv + 2 * (to.batch * p.qkv_batch);
    const int patch_0 = p.summary() + to.frame * p.patches;
#pragma unroll 1  // unrolled, its addresses are computed ahead, kept across the main loop, and spilled
    for (unsigned i = lane / lanes; i < rows; i += 32 / lanes) {
      const int row = row_0 + i, token = row < queries ? row + (row < p.patches ? patch_0 : -p.patches) : 0;
      cp_async_16(q_at + Rows<D>::at(i, unit), q_from + int64_t(token) * p.token_bytes, row < queries, unit < units);
    }
    cp_async_commit();
  };

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
    constexpr int by = copiers * 32 / lanes;  // rows at a time
    const int lane_row = (warp - p.warps) * (32 / lanes) + lane / lanes;
    first = 0;
    for (int n = 0; at.left > 0; ++n) {
      if (n >= p.stages) mbarrier_wait(empty + 8 * slot, phase ^ 1);
      const char* k_from = qkv + 2 * (at.batch * p.qkv_batch + p.qkv_third);
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
    return;
  }

  fetch_queries(first);
  int segment = 0, segment_batch = -1;  // the first frame that the summary rows in registers have seen, and its clip
  Strip<T, D, tiles> strip;
#pragma unroll 1
  while (at.left > 0) {
    mbarrier_wait(full + 8 * slot, phase);
    const int key_0 = piece * p.piece, key_end = least(key_0 + p.piece, padded);
#pragma unroll 1
    while (first < p.wrap) {
      const bool some_patches = first < p.patches, some_summary = first + rows > p.patches;
      if (piece == 0) {
        cp_async_wait<0>();
        warp_sync();
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
#pragma unroll
          for (int d = 0; d < D / 16; ++d)
            ldmatrix_x4(strip.q[i][d], q_at + Rows<D>::at(16 * i + lane % 16, 2 * d + lane / 16));
        }
        const bool continues = some_summary && p.carry && segment_batch == at.batch;  // its summary rows do
        if (!continues) segment = at.frame, segment_batch = at.batch;
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (!continues) strip.start(i, h, keys);
            if (some_summary) {
              const int row = first + 16 * i + 8 * h + g;
              if (row >= p.patches && row < queries) {
                const uint32_t entry = limits + 8 * (row - p.patches);
                strip.limit[i][h] = at.frame == 0 ? p.patches + load_shared(entry) - 1
                                    : at.frame % load_shared(entry + 4) ? 0 : p.patches;
              } else if (continues) strip.start(i, h, keys);
            }
          }
        }
        warp_sync();  // all lanes have their fragments: the buffer is free
        fetch_queries(first + stride);
      }

      const int common = some_summary ? p.patches : keys;  // every row of the strip sees these first keys
      uint32_t k = tables + slot * stage_bytes + Rows<D>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
      uint32_t v = tables + slot * stage_bytes + p.piece * Rows<D>::bytes + Rows<D>::at(lane % 16, lane / 16);
      int key = key_0;
      auto by = [&](int count) { key += count, k += count * Rows<D>::bytes, v += count * Rows<D>::bytes; };
#pragma unroll 1
      for (; key + chunk <= least(common, key_end); by(chunk)) strip.template step<chunk, false>(key, k, v, p);
      if (key + chunk <= key_end && key + chunk - 16 <= common) strip.template step<chunk, true>(key, k, v, p), by(chunk);
#pragma unroll 1
      for (; key < key_end; by(16)) strip.template step<16, true>(key, k, v, p);
      if (piece + 1 < p.pieces) break;

      const bool ends = !p.carry || at.left <= p.carry || at.frame + p.carry >= p.frames;  // these rows' last frame
      const int token_0 = at.batch * p.sequence();
      const int64_t partial = ((int64_t(at.batch) * p.heads + head) * p.frames + segment) * p.summary();
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = first + 16 * i + 8 * h + g;
          float sum = strip.sum[i][h];
          sum += shuffle_xor(sum, 1);
          sum += shuffle_xor(sum, 2);
          if (some_patches) {
            const int token = p.summary() + at.frame * p.patches + row;
            T* out = static_cast<T*>(p.out) + head * D + (j / 2 * 4 + j % 2 * 8) + int64_t(token_0 + token) * (p.heads * D);
            const float over = reciprocal(sum);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {  // two lanes trade: 4 columns a lane, a full 32-byte sector in 4 lanes
              const float *l = strip.acc[i][2 * d] + 2 * h, *r = strip.acc[i][2 * d + 1] + 2 * h;
              const uint32_t left = pack<T>(l[0] * over, l[1] * over), right = pack<T>(r[0] * over, r[1] * over);
              const uint32_t other = shuffle_xor(j % 2 ? left : right, 1);
              store_global(out + 16 * d, Word2{{j % 2 ? other : left, j % 2 ? right : other}}, row < p.patches);
            }
            float* lse = p.lse + (int64_t(at.batch * p.heads + head) * p.sequence() + token);
            store_global(lse, as_word(strip.maximum[i][h] * p.scale_log2 + log2_fast(sum)), row < p.patches && j == 0);
          }
          if (some_summary && ends) {
            const bool mine = row >= p.patches && row < queries, seen = strip.maximum[i][h] > minus_infinity;
            const int64_t to = partial + row - p.patches;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
              const float* two = strip.acc[i][n] + 2 * h;
              store_global(p.sums + to * D + 8 * n + 2 * j, Word2{{as_word(two[0]), as_word(two[1])}}, mine && seen);
            }
            const Word2 statistics{{as_word(strip.maximum[i][h]), as_word(sum)}};
            store_global(p.statistics + to * 2, statistics, mine && j == 0);
          }
        }
      }
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
    const bool there = frame < p.frames && p.starts_part(batch, frame);
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
template <class T, int D, int tiles, int chunk, int most_warps, int copiers, int blocks_per_sm>
int run(Problem p, void* stream, bool dry) {
  const int rows = 16 * tiles, strips = (p.queries() + rows - 1) / rows, turns = (strips + most_warps - 1) / most_warps;
  const int table = (p.summary() + 31) / 32 * 32 * 8;  // of limits, in whole warps
  const int room = blocks_per_sm > 1 ? (shared_memory_limit() + 1024) / blocks_per_sm - 1024 : shared_memory_limit();
  for (p.pieces = 1;; ++p.pieces) {
    // Where a step has all of a frame, warps that are done go on to the next one; else they go together.
    p.warps = p.pieces > 1 ? (strips + turns - 1) / turns : strips > most_warps ? most_warps : most_warps / strips * strips;
    p.wrap = (p.pieces > 1 ? p.warps * turns : strips) * rows;
    p.piece = ((p.padded_keys() + p.pieces - 1) / p.pieces + 15) / 16 * 16;
    p.stages = least(4, (room - 64 - table - rows * p.warps * Rows<D>::bytes) / (2 * p.piece * Rows<D>::bytes));
    if (p.stages > 1) break;
    if (p.pieces == 1) {  // rather some warps fewer than pieces
      const int fit = ((room - 64 - table) / Rows<D>::bytes - 4 * p.piece) / rows;
      if (2 * fit >= most_warps) {
        p.warps = fit, p.stages = 2;
        break;
      }
    }
    if (p.piece == 16) return no_room;
  }
  p.shared = (2 * p.stages * p.piece + rows * p.warps) * Rows<D>::bytes + 16 * p.stages + table;
  p.carry = p.pieces == 1 || turns == 1 ? (p.warps % strips ? 0 : p.warps / strips) : 0;
  if (dry) return 0;
  const int frames = p.batch * p.frames, slots = multiprocessors() * blocks_per_sm;
  p.teams = least(frames, slots > p.heads ? slots / p.heads : 1);
  p.run = frames / p.teams, p.longer = frames % p.teams;
  const int status = launch<hierarchical_fwd_frames<T, D, tiles, chunk, most_warps, copiers, blocks_per_sm>>(
      "fwd_frames", p.teams * p.heads, 32 * (p.warps + copiers), p.shared, stream, p);
  if (status) return status;
  return combine<T, D>(p, stream);
}

// The configurations, in one list: V(variant, D, tiles, chunk, most_warps, copiers, blocks_per_sm). 16 warps leave 128
// registers a thread, which chunks of 32 fit at D=64 without a spill (64 and 48: 32 to 144 bytes, and no faster in replay).
// 0 of D=64 is the choice on A100 and H100 alike, at N=49 as at 196: its replays are the lowest of those tried.
#define VIDLA_FORWARD_VARIANTS(V)                                                         \
  V(0, 64, 1, 32, 15, 1, 1)                                                               \
  V(1, 64, 1, 32, 7, 1, 2)  /* two small blocks */                                        \
  V(2, 64, 2, 32, 7, 1, 1)  /* half the bytes from shared memory, half the warps */       \
  V(0, 32, 1, 64, 15, 1, 1)                                                               \
  V(0, 80, 1, 64, 7, 1, 1)  /* from here on 8 warps: accumulators need the registers */   \
  V(0, 96, 1, 64, 7, 1, 1)                                                                \
  V(0, 128, 1, 64, 7, 1, 1)

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
  if (!wgmma_runs()) return 0;
  const Layout layout = layout_of(c);
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
#define VIDLA_NAME(n, D, tiles, chunk, warps, copiers, blocks)                                                      \
  if (head_dim == D && variant == n)                                                                               \
    return #tiles " tiles a strip, " #chunk " keys a chunk, " #warps " warps, " #copiers " that copy, " #blocks " blocks";
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
