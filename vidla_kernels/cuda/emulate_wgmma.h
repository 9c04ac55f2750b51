// The part of emulate.h, which includes it, that plays Hopper's asynchronous products. A warp does its 16 of the 64 rows alone;
// that the four of a warpgroup do the same is checked, and that each sees all that the warpgroup reads.
#pragma once

namespace vidla {
inline uint64_t matrix_descriptor(uint32_t at, Swizzle swizzle, int leading_bytes, int stride_bytes) {
  return (at & 0x3ffff) >> 4 | uint64_t(leading_bytes >> 4 & 0x3fff) << 16 | uint64_t(stride_bytes >> 4 & 0x3fff) << 32 |
         uint64_t((4 - int(swizzle)) & 3) << 62;
}
inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

namespace emulate {
// What a descriptor says, taken apart as the hardware does; see matrix_descriptor in device.cuh.
struct Matrix {
  uint32_t start, leading, stride;
  int width;  // units of 16 bytes that are exchanged among themselves: 1 (no swizzle), 2, 4, 8
  bool mn;
  Matrix(uint64_t d, bool mn)
      : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4),
        width(d >> 62 ? 16 >> (d >> 62) : 1), mn(mn) {
    if (d >> 49 & 7) error("wgmma", "a descriptor with a base offset, which is not emulated, " + place(*worker->lane));
    if (start >> 7 & (width - 1)) error("wgmma", "a matrix begins inside its swizzle's pattern, " + place(*worker->lane));
  }
  // Address of the 16 bytes that hold a row's (column's) numbers k to k + 7, or of a k rows (columns) i to i + 7.
  uint32_t unit(int i, int k) const {
    uint32_t at = start;
    if (!mn) at += i % 8 * 16 * width + i / 8 * stride + (width == 1 ? k / 8 * leading : k / 8 * 16);
    else if (width == 1) at += k % 8 * 16 + k / 8 * leading + i / 8 * stride;
    else at += i / 8 % width * 16 + i / 8 / width * leading + k % 8 * 16 * width + k / 8 * stride;
    return at ^ ((at >> 7 & (width - 1)) << 4);
  }
  template <class Act> void units(int rows, Act act) const {  // all that `rows` rows (columns) and 16 k need
    for (int i = 0; i < rows; i += mn ? 8 : 1)
      for (int k = 0; k < 16; k += mn ? 1 : 8) act(unit(i, k));
  }
  float at(int i, int k, float (*widen)(uint16_t)) const {
    const uint32_t byte = mn ? unit(i / 8 * 8, k) + i % 8 * 2 : unit(i, k / 8 * 8) + k % 8 * 2;
    uint16_t bits = 0xffff;
    if (uint64_t(byte) + 2 <= worker->shared.size()) memcpy(&bits, &worker->shared[byte], 2);
    return widen(bits);
  }
};

constexpr uint32_t poison = 0x7fa5a5a5;  // what an accumulator holds while a wgmma is under way

// Whether the warp's async proxy sees what was written last: the thread that wrote or all lanes of the warp have fenced since.
inline bool fenced(const Word& s, const Warp& w, const Fence& latest) {
  if (s.write_epoch < latest.epoch || (s.writer / 32 == w.index && s.write_syncs < latest.syncs)) return true;
  const auto& all = worker->warps[s.writer / 32]->lanes[s.writer % 32].fences;
  const auto it = std::upper_bound(all.begin(), all.end(), s.write_time, [](uint32_t t, const Fence& f) { return t < f.time; });
  return it != all.end() && ordered(it->epoch, it->syncs, false, s.writer / 32 == w.index, w);
}
// All 64 rows of a, because the product is the warpgroup's. by: +1 at the issue, -1 at the wait.
inline void operands(const Warp& w, const Wgmma& x, int by) {
  Fence latest{~0u, ~0u, ~0u};
  for (const Lane& l : w.lanes) {
    const Fence f = l.fences.empty() ? Fence{0, 0, 0} : l.fences.back();
    latest = {0, std::min(latest.epoch, f.epoch), std::min(latest.syncs, f.syncs)};
  }
  auto see = [&](uint32_t at) {
    if (!shared_in_range(at, 16, "wgmma")) return;
    if (by > 0) note_read(w, Word::several, at, 16, "wgmma");
    bool visible = true;
    for (uint32_t i = at / 4; i < at / 4 + 4; ++i) {
      Word& s = worker->shadow[i];
      s.wgmmas += by;
      if (by > 0 && s.writer != Word::nobody) visible &= fenced(s, w, latest);
      if (by < 0) s.read_warp = s.read_epoch < worker->epoch || s.read_warp == w.index ? uint16_t(w.index) : Word::several;
      if (by < 0) s.reader = Word::several, s.read_epoch = worker->epoch, s.read_syncs = w.syncs;
    }
    if (!visible)
      error("no fence_async between a write and wgmma",
            all_told() ? "" : "of byte " + std::to_string(at) + ", " + place(*worker->lane));
  };
  if (x.a_shared) Matrix(x.a, x.a_mn).units(64, see);
  Matrix(x.b, x.b_mn).units(x.n, see);
}
// Where lane l has element e of n / 2: row and column of the warp's 16 x n.
inline int row_of(int l, int e) { return l / 4 + e / 2 % 2 * 8; }
inline int column_of(int l, int e) { return e / 4 * 8 + l % 4 * 2 + e % 2; }

// wgmma and its fences, commits and waits are for all warps of a warpgroup, which must not part ways.
inline void same_in_warpgroup(Warp& w, const std::array<uint64_t, 3>& mine) {
  auto& all = worker->products[w.index / 4];
  if (w.wgmmas_issued == all.size()) all.push_back(mine);
  else if (all[w.wgmmas_issued] != mine)
    error("wgmma", "differs from that of another warp of its warpgroup, " + place(*worker->lane));
  ++w.wgmmas_issued;
}

inline void issue(Warp& w, Wgmma x) {
  const std::string here = place(*worker->lane);
  if (!wgmma_runs()) error("wgmma", "on a GPU that has none, " + here);
  if (w.index / 4 * 4 + 4 > int(worker->warps.size())) abandon_block("wgmma", here + " is of no whole warpgroup");
  if (!w.wgmma_fenced) error("wgmma without a wgmma_fence since the last wait", here);
  const uint64_t shape = uint64_t(x.n) << 4 | x.a_shared << 3 | x.a_mn << 2 | x.b_mn << 1 | x.accumulate;
  same_in_warpgroup(w, {x.a_shared ? x.a : 0, x.b, shape});
  x.group = w.wgmma_groups;
  bool packed = false;
  for (int l = 0; l < 32; ++l) {
    x.c[l] = w.lanes[l].c_at, x.rows_at[l] = w.lanes[l].a_at, packed |= w.lanes[l].packed;
    if (!x.a_shared) memcpy(x.rows[l], x.rows_at[l], 16);
  }
  if (!x.a_shared && packed) error("wgmma of registers packed after the last wgmma_fence", here);
  for (auto& [at, other] : w.accumulators)
    if (at != x.c[0] && at < x.c[0] + x.n / 2 && x.c[0] < at + other.n / 2)
      error("wgmma", "two products under way share accumulators, " + here);
  Accumulator& sum = w.accumulators[x.c[0]];
  if (sum.pending && sum.n != x.n) abandon_block("wgmma", here + " adds to an accumulator under way with another n");
  if (!sum.pending) {
    sum.n = x.n, sum.values.assign(16 * x.n, from_bits(~0u));
    for (int l = 0; l < 32; ++l) {
      sum.c[l] = x.c[l];
      for (int e = 0; e < x.n / 2; ++e) {
        sum.values[row_of(l, e) * x.n + column_of(l, e)] = x.c[l][e];
        memcpy(&x.c[l][e], &poison, 4);
      }
    }
  }
  ++sum.pending;
  operands(w, x, 1);
  ++worker->count.wgmma;
  worker->count.mma += x.n / 8;
  worker->count.shared_read += (x.a_shared ? 512 : 0) + 8 * x.n;  // a quarter of what the warpgroup reads
  w.wgmmas.push_back(x);
}
inline void multiply(const Warp& w, const Wgmma& x, std::vector<float>& C) {
  const Matrix A(x.a_shared ? x.a : 0, x.a_mn), B(x.b, x.b_mn);
  float a[16][16];
  std::vector<float> b(x.n);
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      a[i][k] = x.a_shared ? A.at(w.index % 4 * 16 + i, k, x.widen)
                           : x.widen(uint16_t(x.rows[i % 8 * 4 + k % 8 / 2][i / 8 + k / 8 * 2] >> k % 2 * 16));
  if (!x.accumulate) std::fill(C.begin(), C.end(), 0.f);
  for (int k = 0; k < 16; ++k) {
    for (int j = 0; j < x.n; ++j) b[j] = B.at(j, k, x.widen);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < x.n; ++j) C[i * x.n + j] += a[i][k] * b[j];
  }
}
inline void finish(Warp& w, const Wgmma& x) {
  const std::string here = place(*worker->lane);
  if (!x.a_shared)
    for (int l = 0; l < 32; ++l)
      if (memcmp(x.rows[l], x.rows_at[l], 16)) {
        error("registers of a written while a wgmma was under way", here);
        break;
      }
  Accumulator& sum = w.accumulators[x.c[0]];
  multiply(w, x, sum.values);
  operands(w, x, -1);
  if (--sum.pending) return;
  bool touched = false;
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < x.n / 2; ++e) {
      touched |= to_bits(sum.c[l][e]) != poison;
      sum.c[l][e] = sum.values[row_of(l, e) * x.n + column_of(l, e)];
    }
  if (touched) error("accumulators written while a wgmma was under way", here);
  w.accumulators.erase(x.c[0]);
}
inline void issue_by_all(float* c, const uint32_t* a, Wgmma x) {
  Lane& me = *worker->lane;
  me.c_at = c, me.a_at = a;
  rendezvous(Op::wgmma, [&x](Warp& w) { issue(w, x); });
}
}  // namespace emulate

template <class T, int n, bool a_mn, bool b_mn> inline void wgmma(float (&c)[n / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(n % 8 == 0 && n >= 8 && n <= 256, "no such wgmma");
  emulate::Wgmma x{n, 0, true, a_mn, b_mn, accumulate, a, b};
  x.widen = emulate::widen<T>;
  emulate::issue_by_all(c, nullptr, x);
}
template <class T, int n, bool b_mn>
inline void wgmma(float (&c)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(n % 8 == 0 && n >= 8 && n <= 256, "no such wgmma");
  emulate::Wgmma x{n, 0, false, false, b_mn, accumulate, 0, b};
  x.widen = emulate::widen<T>;
  emulate::issue_by_all(c, a, x);
}
inline void wgmma_fence() {
  using namespace emulate;
  worker->lane->packed = false;
  rendezvous(Op::wgmma_fence, [](Warp& w) { w.wgmma_fenced = true, same_in_warpgroup(w, {0, 0, 1}); });
}
inline void wgmma_commit() {
  using namespace emulate;
  rendezvous(Op::wgmma_commit, [](Warp& w) { ++w.wgmma_groups, same_in_warpgroup(w, {0, 0, 2}); });
}
template <int newest> inline void wgmma_wait() {
  using namespace emulate;
  rendezvous(Op::wgmma_wait, [](Warp& w) {
    same_in_warpgroup(w, {newest, 0, 3});
    if (!w.wgmmas.empty() && w.wgmmas.back().group == w.wgmma_groups)
      error("wgmma waited for but not committed", place(*worker->lane));
    size_t done = 0;
    while (done < w.wgmmas.size() && w.wgmmas[done].group < w.wgmma_groups - newest) finish(w, w.wgmmas[done++]);
    w.wgmmas.erase(w.wgmmas.begin(), w.wgmmas.begin() + done);
    if (done) w.wgmma_fenced = false;
  });
}
template <int size> inline void registers_fence(float (&)[size]) {}
inline void fence_async() {
  using namespace emulate;
  Lane& me = *worker->lane;
  me.fences.push_back({++worker->time, worker->epoch, me.warp->syncs});
}
}  // namespace vidla
