// One warp that runs one primitive of device.cuh on words from memory, or a warpgroup that multiplies what it finds in shared
// memory: the same program emulated and on a GPU.
// Compiled by test_cuda_primitives.py, which says what each should give.
#include <type_traits>

#include "device.cuh"

namespace vidla {
struct Words {
  const uint32_t* in;  // 512 of them
  uint32_t* out;       // 512
  int what;
};

template <class T> VIDLA_KERNEL(32, 1) primitive(Words p) {
  const int lane = thread_index();
  const uint32_t base = shared_base();
  auto in = [&](int i) { return load_global<uint32_t>(p.in + i, true); };
  auto put = [&](int i, uint32_t x) { store_global(p.out + i, x, true); };

  if (p.what == 0) {  // a: 4 words a lane, b: 2, c: 4
    const uint32_t a[4] = {in(4 * lane), in(4 * lane + 1), in(4 * lane + 2), in(4 * lane + 3)};
    const uint32_t b[2] = {in(128 + 2 * lane), in(129 + 2 * lane)};
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = as_float(in(192 + 4 * lane + i));
    mma_m16n8k16<T>(c, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) put(4 * lane + i, as_word(c[i]));
  }
  if (p.what == 1 || p.what == 2) {  // 32 rows of 4 words; the row whose address a lane gives
    cp_async_16(base + 16 * lane, p.in + 4 * lane, true);
    cp_async_commit();
    cp_async_wait<0>();
    warp_sync();
    uint32_t r[4];
    const uint32_t row = base + 16 * (in(128 + lane) % 32);
    if (p.what == 1) ldmatrix_x4(r, row);
    if (p.what == 2) ldmatrix_x4_trans(r, row);
    for (int i = 0; i < 4; ++i) put(4 * lane + i, r[i]);
  }
  if (p.what == 3) {  // two floats a lane, packed, and unpacked again
    const uint32_t both = pack<T>(as_float(in(2 * lane)), as_float(in(2 * lane + 1)));
    put(lane, both);
    put(32 + lane, as_word(unpack<T>(both, 0)));
    put(64 + lane, as_word(unpack<T>(both, 1)));
  }
  if (p.what == 4) {  // a 16-bit pattern in each half, unpacked
    for (int i = 0; i < 8; ++i) {
      put(32 * i + lane, as_word(unpack<T>(in(32 * i + lane), 0)));
      put(256 + 32 * i + lane, as_word(unpack<T>(in(32 * i + lane), 1)));
    }
  }
  if (p.what == 5) {
    for (int mask = 1, i = 0; mask < 32; mask *= 2, ++i) put(32 * i + lane, shuffle_xor(in(lane), mask));
  }
  if (p.what == 6) {
    for (int i = 0; i < 16; ++i) put(32 * i + lane, as_word(exp2_fast(as_float(in(32 * i + lane)))));
  }
  if (p.what == 7) {  // words a lane stores, 4 bytes each, come back as rows; a copy that isn't valid brings zeros
    for (int i = 0; i < 4; ++i) store_shared(base + 4 * (32 * i + 31 - lane), in(32 * i + lane));
    cp_async_16(base + 512 + 16 * lane, p.in, false);
    cp_async_commit();
    cp_async_wait<0>();
    warp_sync();
    uint32_t r[4], zero[4];
    ldmatrix_x4(r, base + 16 * lane);
    ldmatrix_x4(zero, base + 512 + 16 * lane);
    for (int i = 0; i < 4; ++i) put(4 * lane + i, r[i]), put(128 + 4 * lane + i, zero[i]);
  }
  if (p.what == 8) {  // lanes that are not active read zero and store nothing
    const bool active = lane % 3 == 0;
    const Word2 two = load_global<Word2>(p.in + 2 * lane, active);
    const Word4 four = load_global<Word4>(p.in + 64 + 4 * lane, active);
    put(256 + lane, two.x[0] + two.x[1] + four.x[0] + four.x[1] + four.x[2] + four.x[3]);
    store_global(p.out + 2 * lane, two, active);
    store_global(p.out + 64 + 4 * lane, four, active);
  }
  if (p.what == 9) store_shared(base + in(0) * lane, lane);  // at a stride: bank conflicts, and a race at none
  if (p.what == 10 || p.what == 11) {  // 4 words a lane, stored as 8x8 matrices to the rows whose addresses lanes give
    const uint32_t r[4] = {in(4 * lane), in(4 * lane + 1), in(4 * lane + 2), in(4 * lane + 3)};
    const uint32_t row = base + 16 * ((in(128) * lane + in(129)) % 32);
    if (p.what == 10) stmatrix_x4(row, r);
    if (p.what == 11) stmatrix_x4_trans(row, r);
    warp_sync();
    for (int i = 0; i < 4; ++i) put(32 * i + lane, load_shared(base + 4 * (32 * i + lane)));
  }
}

// A warpgroup multiplies twice and adds: c = a b + a' b'. What it does wrong if asked to, and only then:
enum Mistake {
  nothing, no_fence, no_commit, no_wait, no_proxy_fence, no_barrier, accumulator_written, a_written, b_written, warps_differ,
  packed_after_fence, barrier_too_small
};
struct Product {
  const uint32_t* shared;  // 64 KB, to be copied to shared memory
  const uint32_t* a;       // 2 times 4 words of each of 128 threads, where a is in registers
  uint32_t* out;           // n / 2 words of each
  uint64_t a_at, b_at;     // descriptors, from the beginning of shared memory
  int a_step, b_step;      // bytes to a' and b'
  int mistake;
};

template <class T, int n, bool a_shared, bool a_mn, bool b_mn> VIDLA_KERNEL(128, 1) product(Product p) {
  if constexpr (!has_wgmma) return;
  const int thread = thread_index(), warp = warp_index();
  const uint32_t base = shared_base();
  for (int i = thread; i < 4096; i += 128) cp_async_16(base + 16 * i, p.shared + 4 * i, true);
  cp_async_commit();
  cp_async_wait<0>();
  if (p.mistake != no_proxy_fence) fence_async();
  if (p.mistake == barrier_too_small) barrier_sync(1, 96);
  else if (p.mistake != no_barrier) barrier_sync(1, 128);
  uint32_t rows[2][4];
  for (int i = 0; i < 8; ++i) rows[i / 4][i % 4] = load_global<uint32_t>(p.a + 8 * thread + i, true);
  const uint64_t a = advance(p.a_at, base), b = advance(p.b_at, base + (p.mistake == warps_differ && warp == 2 ? 16 : 0));
  float c[n / 2];

  if (p.mistake != no_fence) wgmma_fence();
  if (p.mistake == packed_after_fence) rows[0][0] = pack<T>(1, 1);
  if constexpr (a_shared) {
    wgmma<T, n, a_mn, b_mn>(c, a, b, false);
    wgmma<T, n, a_mn, b_mn>(c, advance(a, p.a_step), advance(b, p.b_step), true);
  } else {
    wgmma<T, n, b_mn>(c, rows[0], b, false);
    wgmma<T, n, b_mn>(c, rows[1], advance(b, p.b_step), true);
  }
  if (p.mistake != no_commit) wgmma_commit();
  if (p.mistake == accumulator_written) c[0] = 1;
  if (p.mistake == a_written) rows[0][0] ^= 1;
  if (p.mistake == b_written && warp == 0) store_shared(base + uint32_t((p.b_at & 0x3fff) << 4), Word2{}, thread == 0);
  if (p.mistake != no_wait) wgmma_wait<0>();
  registers_fence(c);
  for (int i = 0; i < n / 2; ++i) store_global(p.out + n / 2 * thread + i, as_word(c[i]), true);
}

// Six kernels of one n: a by k or by m or in registers, b by k or by n.
template <class T, int n> int multiply(const Product& p, int a, int b_mn, void* stream) {
  auto run = [&](auto a_shared, auto a_mn, auto mn) {
    return launch<product<T, n, a_shared.value, a_mn.value, mn.value>>("product", 1, 128, 65536, stream, p);
  };
  using yes = std::integral_constant<bool, true>;
  using no = std::integral_constant<bool, false>;
  if (a == 0) return b_mn ? run(yes(), no(), yes()) : run(yes(), no(), no());
  if (a == 1) return b_mn ? run(yes(), yes(), yes()) : run(yes(), yes(), no());
  return b_mn ? run(no(), no(), yes()) : run(no(), no(), no());
}
}  // namespace vidla

extern "C" __attribute__((visibility("default"))) uint64_t descriptor(uint32_t at, int swizzle, int leading, int stride) {
  return vidla::matrix_descriptor(at, vidla::Swizzle(swizzle), leading, stride);
}

extern "C" __attribute__((visibility("default"))) int run_product(const vidla::Product* p, int n, int a, int b_mn, int type,
                                                                  void* stream) {
  using namespace vidla;
  watch_buffer("shared", p->shared, 65536);
  watch_buffer("a", p->a, 4096);
  watch_buffer("out", p->out, 256 * n);
#define VIDLA_N(N) \
  if (n == N) return type ? multiply<fp16, N>(*p, a, b_mn, stream) : multiply<bf16, N>(*p, a, b_mn, stream);
  VIDLA_N(8) VIDLA_N(24) VIDLA_N(64) VIDLA_N(104) VIDLA_N(256)
#undef VIDLA_N
  return -1;
}

extern "C" __attribute__((visibility("default"))) int run(const uint32_t* in, uint32_t* out, int what, int type,
                                                          void* stream) {
  using namespace vidla;
  watch_buffer("in", in, 2048);
  watch_buffer("out", out, 2048);
  const Words p{in, out, what};
  return type ? launch<primitive<fp16>>("primitive", 1, 32, 4096, stream, p)
              : launch<primitive<bf16>>("primitive", 1, 32, 4096, stream, p);
}
