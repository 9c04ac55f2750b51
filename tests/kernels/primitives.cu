// One warp that runs one primitive of device.cuh on words from memory: the same program emulated and on a GPU.
// Compiled by test_cuda_primitives.py, which says what each should give.
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
}
}  // namespace vidla

extern "C" __attribute__((visibility("default"))) int run(const uint32_t* in, uint32_t* out, int what, int type,
                                                          void* stream) {
  using namespace vidla;
  watch_buffer("in", in, 2048);
  watch_buffer("out", out, 2048);
  const Words p{in, out, what};
  return type ? launch<primitive<fp16>>("primitive", 1, 32, 4096, stream, p)
              : launch<primitive<bf16>>("primitive", 1, 32, 4096, stream, p);
}
