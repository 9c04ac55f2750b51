// Hierarchical attention, forward. qkv (B, S, 3, H, D) -> out (B, S, H, D), bf16 or fp16, sums in fp32.
//
// Tiling. A block owns one (batch, head, frame); its keys, its queries and who sees whom: hierarchical.cuh. The queries
// are cut into tiles of 16 rows; a warp takes `tiles` of them at a time, so that a fragment of K or V read from shared
// memory feeds that many mma.
// K and V come into shared memory once, by cp.async, and stay: one block barrier in the whole program. A warp's query
// rows have a small buffer of its own, refilled for the next turn as soon as the fragments are in registers.
// A warp walks over the keys `chunk` at a time: S = QK' in registers, running maximum, P = exp2, packed in place to be
// the A operand of PV. What chunks leave over goes in steps of 16. Chunks that every row sees whole test nothing.
// Patch rows are final and written once. Summary rows leave (m, l, acc) for each frame they see; the second kernel adds
// them up in frame order, and CLS's own key to the CLS row. No atomics: the same bits every run. Beside the output goes
// the log-sum-exp of every row, from which the backward gets P back without a second softmax.
#include "hierarchical.cuh"

namespace vidla {

struct Problem : Layout {
  const void* qkv;
  void* out;
  float* lse;         // (B, H, S) base 2: log2 of each row's sum of exp(scale * score)
  float* sums;        // (B, H, T, G, D) unnormalised partial outputs
  float* statistics;  // (B, H, T, G, 2) maximum score, sum of weights
  float scale_log2;   // softmax scale * log2(e): exp(scale * x) = exp2(scale_log2 * x)
};

template <int D> int shared_bytes(const Problem& p, int warps, int tiles) {
  return (2 * p.padded_keys() + 16 * tiles * warps) * Rows<D>::bytes;
}

// The softmax of one warp's rows on its way over the keys. [i]: tile, [h]: rows g and g + 8 of it.
template <class T, int D, int tiles> struct Strip {
  uint32_t q[tiles][D / 16][4];
  float acc[tiles][D / 8][4];
  float maximum[tiles][2], sum[tiles][2];
  int limit[tiles][2];

  // Keys [key, key + chunk).
  template <int chunk, bool masked> VIDLA_DEVICE void step(int key, uint32_t k_at, uint32_t v_at, float scale_log2) {
    const int lane = thread_index() % 32, j = lane % 4;
    float s[tiles][chunk / 8][4] = {};
#pragma unroll
    for (int n = 0; n < chunk / 16; ++n) {
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {  // matrices: keys 0-7, dims 0-7; 0-7, 8-15; 8-15, 0-7; 8-15, 8-15
        uint32_t b[4];
        ldmatrix_x4(b, k_at + Rows<D>::at(key + 16 * n + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          mma_m16n8k16<T>(s[i][2 * n], q[i][d], b[0], b[1]);
          mma_m16n8k16<T>(s[i][2 * n + 1], q[i][d], b[2], b[3]);
        }
      }
    }

#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = maximum[i][h];
#pragma unroll
        for (int n = 0; n < chunk / 8; ++n) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            if (masked && key + 8 * n + 2 * j + e % 2 >= limit[i][h]) s[i][n][e] = minus_infinity;
            top = fmaxf(top, s[i][n][e]);
          }
        }
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));  // finite from the first chunk on: every row sees key 0
        const float shrink = exp2_fast((maximum[i][h] - top) * scale_log2);
        maximum[i][h] = top;
        sum[i][h] *= shrink;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) acc[i][n][2 * h] *= shrink, acc[i][n][2 * h + 1] *= shrink;
#pragma unroll
        for (int n = 0; n < chunk / 8; ++n) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[i][n][e] = exp2_fast(s[i][n][e] * scale_log2 - top * scale_log2);
            sum[i][h] += s[i][n][e];
          }
        }
      }
    }

#pragma unroll
    for (int n = 0; n < chunk / 16; ++n) {
      uint32_t p[tiles][4];  // two score tiles side by side are one A operand
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* pair = s[i][2 * n + e / 2] + e % 2 * 2;
          p[i][e] = pack<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {  // transposed: keys 0-7, dims 0-7; 8-15, 0-7; 0-7, 8-15; 8-15, 8-15
        uint32_t b[4];
        ldmatrix_x4_trans(b, v_at + Rows<D>::at(key + 16 * n + lane % 16, 2 * d + lane / 16));
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          mma_m16n8k16<T>(acc[i][2 * d], p[i], b[0], b[1]);
          mma_m16n8k16<T>(acc[i][2 * d + 1], p[i], b[2], b[3]);
        }
      }
    }
  }
};

template <class T, int D, int warps, int tiles, int chunk, int blocks_per_sm>
VIDLA_KERNEL(32 * warps, blocks_per_sm) hierarchical_fwd_frames(Problem p) {
  constexpr int rows = 16 * tiles, units = D / 8;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, g = lane / 4, j = lane % 4;
  const int head = block_index() % p.heads, frame = block_index() / p.heads % p.frames;
  const int batch = block_index() / p.heads / p.frames;
  const int out_token = p.heads * D;
  const T* qkv = static_cast<const T*>(p.qkv) + batch * p.qkv_batch + head * p.qkv_head;
  T* out = static_cast<T*>(p.out) + int64_t(batch) * p.sequence() * out_token + head * D;
  const int64_t partial = (int64_t(batch) * p.heads + head) * p.frames + frame;

  const int queries = p.queries(), keys = p.keys(), padded = p.padded_keys();
  const uint32_t k_at = shared_base(), v_at = k_at + padded * Rows<D>::bytes;
  const uint32_t q_at = v_at + (padded + warp * rows) * Rows<D>::bytes;

  auto fetch_queries = [&](int first) {
#pragma unroll 1  // unrolled, its addresses are computed ahead, kept across the main loop, and spilled
    for (int i = lane; i < rows * units; i += 32) {
      const int row = i / units, unit = i % units;
      const bool valid = first + row < queries;
      const T* from = qkv + (valid ? p.query_token(frame, first + row) : 0) * p.qkv_token + 8 * unit;
      cp_async_16(q_at + Rows<D>::at(row, unit), from, valid);
    }
    cp_async_commit();
  };

  for (int i = thread; i < padded * units; i += 32 * warps) {  // padded is a multiple of 16: whole warps leave together
    const int key = i / units, unit = i % units;
    const bool valid = key < keys;  // padding is zero, because 0 * NaN would spoil PV
    const T* from = qkv + (valid ? p.key_token(frame, key) : 0) * p.qkv_token + p.qkv_third + 8 * unit;
    cp_async_16(k_at + Rows<D>::at(key, unit), from, valid);
    cp_async_16(v_at + Rows<D>::at(key, unit), from + p.qkv_third, valid);
  }
  cp_async_commit();
  if (warp * rows < queries) fetch_queries(warp * rows);
  cp_async_wait<0>();
  block_sync();

#pragma unroll 1
  for (int first = warp * rows; first < queries; first += warps * rows) {
    Strip<T, D, tiles> strip;
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int d = 0; d < D / 16; ++d)
        ldmatrix_x4(strip.q[i][d], q_at + Rows<D>::at(16 * i + lane % 16, 2 * d + lane / 16));
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) strip.acc[i][n][e] = 0;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        strip.maximum[i][h] = minus_infinity, strip.sum[i][h] = 0;
        strip.limit[i][h] = p.limit(frame, first + 16 * i + 8 * h + g);
      }
    }
    warp_sync();  // all lanes have their fragments: the buffer is free
    if (first + warps * rows < queries) fetch_queries(first + warps * rows);

    const int common = first + rows <= p.patches ? keys : p.patches;  // every row of the strip sees these first keys
    int key = 0;
#pragma unroll 1
    for (; key + chunk <= common; key += chunk) strip.template step<chunk, false>(key, k_at, v_at, p.scale_log2);
#pragma unroll 1
    for (; key + chunk <= padded; key += chunk) strip.template step<chunk, true>(key, k_at, v_at, p.scale_log2);
#pragma unroll 1
    for (; key < padded; key += 16) strip.template step<16, true>(key, k_at, v_at, p.scale_log2);

#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first + 16 * i + 8 * h + g, token = p.query_token(frame, row);
        float sum = strip.sum[i][h];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (first < p.patches) {  // some patch rows
          const float over = 1 / sum;
#pragma unroll
          for (int d = 0; d < D / 16; ++d) {  // two lanes trade: 4 columns a lane, a full 32-byte sector in 4 lanes
            const float *l = strip.acc[i][2 * d] + 2 * h, *r = strip.acc[i][2 * d + 1] + 2 * h;
            const uint32_t left = pack<T>(l[0] * over, l[1] * over), right = pack<T>(r[0] * over, r[1] * over);
            const uint32_t other = shuffle_xor(j % 2 ? left : right, 1);
            const int column = 16 * d + (j % 2 ? 8 + 2 * (j - 1) : 2 * j);
            const Word2 four = j % 2 ? Word2{{other, right}} : Word2{{left, other}};
            store_global(out + int64_t(token) * out_token + column, four, row < p.patches);
          }
          const bool keep = row < p.patches && j == 0;
          float* lse = p.lse + (int64_t(not_ahead(batch)) * p.heads + head) * p.sequence() + token;
          store_global(lse, as_word(strip.maximum[i][h] * p.scale_log2 + log2f(sum)), keep);
        }
        if (first + rows > p.patches) {  // some summary rows
          const bool mine = row >= p.patches && row < queries && p.frame_visible(frame, token);
          const int64_t to = partial * p.summary() + token;
#pragma unroll
          for (int n = 0; n < D / 8; ++n) {
            const float* two = strip.acc[i][n] + 2 * h;
            store_global(p.sums + to * D + 8 * n + 2 * j, Word2{{as_word(two[0]), as_word(two[1])}}, mine);
          }
          const Word2 statistics{{as_word(strip.maximum[i][h]), as_word(sum)}};
          store_global(p.statistics + to * 2, statistics, mine && j == 0);
        }
      }
    }
    cp_async_wait<0>();
    warp_sync();
  }
}

// A warp owns one summary row of one (batch, head); a lane holds 4 of its columns.
template <class T, int D> VIDLA_KERNEL(128, 1) hierarchical_fwd_combine(Problem p) {
  const int lane = thread_index() % 32, row = block_index() * 4 + thread_index() / 32;
  const int token = row % p.summary(), head = row / p.summary() % p.heads, batch = row / p.summary() / p.heads;
  if (batch >= p.batch) return;  // a whole warp leaves
  const int out_token = p.heads * D;
  const bool active = lane < D / 4;
  const int64_t partial = (int64_t(batch) * p.heads + head) * p.frames;
  const int64_t at = int64_t(batch) * p.sequence() + token;

  float own = minus_infinity, v[4] = {};  // CLS's score for itself, and its value
  if (token == 0) {
    const T* cls = static_cast<const T*>(p.qkv) + batch * p.qkv_batch + head * p.qkv_head + 4 * lane;
    const Word2 q = load_global<Word2>(cls, active), k = load_global<Word2>(cls + p.qkv_third, active);
    const Word2 w = load_global<Word2>(cls + 2 * p.qkv_third, active);
    own = 0;
    for (int e = 0; e < 4; ++e) {
      own += unpack<T>(q.x[e / 2], e % 2) * unpack<T>(k.x[e / 2], e % 2);
      v[e] = unpack<T>(w.x[e / 2], e % 2);
    }
    for (int mask = 16; mask; mask /= 2) own += shuffle_xor(own, mask);
  }
  float top = own;
  for (int t = 0; t < p.frames; ++t) {
    if (!p.frame_visible(t, token)) continue;
    const Word2 s = load_global<Word2>(p.statistics + ((partial + t) * p.summary() + token) * 2, true);
    top = fmaxf(top, as_float(s.x[0]));
  }
  float sum = exp2_fast((own - top) * p.scale_log2), acc[4];
  for (int e = 0; e < 4; ++e) acc[e] = sum * v[e];
  for (int t = 0; t < p.frames; ++t) {
    if (!p.frame_visible(t, token)) continue;
    const int64_t from = (partial + t) * p.summary() + token;
    const Word2 s = load_global<Word2>(p.statistics + from * 2, true);
    const Word4 a = load_global<Word4>(p.sums + from * D + 4 * lane, active);
    const float weight = exp2_fast((as_float(s.x[0]) - top) * p.scale_log2);
    sum += weight * as_float(s.x[1]);
    for (int e = 0; e < 4; ++e) acc[e] += weight * as_float(a.x[e]);
  }
  const Word2 o = {{pack<T>(acc[0] / sum, acc[1] / sum), pack<T>(acc[2] / sum, acc[3] / sum)}};
  store_global(static_cast<T*>(p.out) + at * out_token + head * D + 4 * lane, o, active);
  float* lse = p.lse + (int64_t(batch) * p.heads + head) * p.sequence() + token;
  store_global(lse, as_word(top * p.scale_log2 + log2f(sum)), lane == 0);
}

// ---- host ----------------------------------------------------------------------------------------------------------
inline int64_t forward_workspace(const Call& c) {  // bytes of Problem's sums and statistics
  return int64_t(c.batch) * c.heads * c.frames * c.summary * (c.head_dim + 2) * 4;
}

// With dry: only says whether this configuration can take the call.
template <class T, int D, int warps, int tiles, int chunk, int blocks_per_sm>
int run(const Problem& p, void* stream, bool dry) {
  const int shared = shared_bytes<D>(p, warps, tiles);
  if (shared > shared_memory_limit()) return no_room;
  if (dry) return 0;
  const int status = launch<hierarchical_fwd_frames<T, D, warps, tiles, chunk, blocks_per_sm>>(
      "fwd_frames", p.batch * p.heads * p.frames, 32 * warps, shared, stream, p);
  if (status) return status;
  const int rows = p.batch * p.heads * p.summary();
  return launch<hierarchical_fwd_combine<T, D>>("fwd_combine", (rows + 3) / 4, 128, 0, stream, p);
}

// Configurations: warps, tiles, chunk, blocks an SM.
template <class T> int dispatch(const Problem& p, int dim, int variant, void* stream, bool dry) {
  if (dim == 64) {
    if (variant == 0) return run<T, 64, 4, 1, 64, 3>(p, stream, dry);
    if (variant == 1) return run<T, 64, 4, 2, 32, 2>(p, stream, dry);
    if (variant == 2) return run<T, 64, 7, 1, 32, 2>(p, stream, dry);
    if (variant == 3) return run<T, 64, 4, 2, 16, 3>(p, stream, dry);
    if (variant == 4) return run<T, 64, 4, 1, 208, 2>(p, stream, dry);
    return unknown_variant;
  }
  if (variant) return unknown_variant;
  if (dim == 32) return run<T, 32, 4, 1, 64, 4>(p, stream, dry);
  if (dim == 80) return run<T, 80, 4, 1, 64, 2>(p, stream, dry);
  if (dim == 96) return run<T, 96, 4, 1, 64, 2>(p, stream, dry);
  if (dim == 128) return run<T, 128, 4, 1, 64, 2>(p, stream, dry);
  return unsupported_dim;
}
inline int choose(const Call&) { return 0; }

inline int forward(const Call& c, void* stream, bool dry) {
  if (const int status = wrong_sizes(c)) return status;
  if (!(c.scale > 0)) return bad_layout;  // the maximum is taken before the scale
  float* sums = static_cast<float*>(c.workspace);
  Problem p{layout_of(c), c.qkv, c.out, c.lse, sums, nullptr, c.scale * log2_e};
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
  static const char* d64[] = {"4 warps, 1 tile, 64 keys, 3 blocks", "4 warps, 2 tiles, 32 keys, 2 blocks",
                              "7 warps, 1 tile, 32 keys, 2 blocks", "4 warps, 2 tiles, 16 keys, 3 blocks",
                              "4 warps, 1 tile, 208 keys, 2 blocks"};
  if (head_dim == 64) return variant >= 0 && variant < 5 ? d64[variant] : nullptr;
  return variant == 0 ? "4 warps, 1 tile, 64 keys" : nullptr;
}
