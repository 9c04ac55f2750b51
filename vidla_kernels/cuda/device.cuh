// The primitives the attention kernels are written in. A kernel that touches shared and global memory only through
// these compiles twice from one source: with nvcc (inline PTX, this file) and with any C++17 compiler (emulate.h),
// where every CUDA thread is a fiber and every mistake in ordering is a report instead of a rare wrong number.
//
// Three rules make that possible. Shared memory is named by 32-bit offsets, never by pointers. Every primitive marked
// "warp" is reached by all 32 lanes of a warp together; a lane with nothing to do passes active = false.
// 16-bit matrix elements travel as uint32_t, two to a register, the lower column in the lower half.
#pragma once
#include <cstdint>

namespace vidla {
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct alignas(8) Word2 {
  uint32_t x[2];
};
struct alignas(16) Word4 {
  uint32_t x[4];
};
enum class Swizzle { none, b32, b64, b128 };  // of a matrix in shared memory, see matrix_descriptor
}  // namespace vidla

#if defined(VIDLA_EMULATE) || !defined(__CUDACC__)
#include "emulate.h"
#else
#include <cuda_runtime.h>

#include <atomic>

#define VIDLA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define VIDLA_DEVICE __device__ __forceinline__
#define VIDLA_HOST_DEVICE __host__ __device__ __forceinline__

namespace vidla {
VIDLA_DEVICE int thread_index() { return threadIdx.x; }
VIDLA_DEVICE int block_index() { return blockIdx.x; }
// warp: thread_index() / 32, but the compiler knows that it is the same in all lanes, and so are the branches on it.
VIDLA_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }
VIDLA_DEVICE void block_sync() { __syncthreads(); }
VIDLA_DEVICE void warp_sync() { __syncwarp(); }

// x, but what is computed from it can't be computed ahead, outside a loop, and kept in registers across it.
VIDLA_DEVICE int not_ahead(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <class T> VIDLA_DEVICE T* not_ahead(T* x) {
  asm volatile("" : "+l"(x));
  return x;
}

VIDLA_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}

// warp: 16 bytes from global to shared memory without a register; zeros where not valid, nothing where not active. Lands by
// cp_async_wait.
VIDLA_DEVICE void cp_async_16(uint32_t shared, const void* global, bool valid, bool active = true) {
  if (!active) return;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
VIDLA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `newest` of this thread's committed groups are on their way. Other threads need a sync as well.
template <int newest> VIDLA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// A barrier in shared memory (8 bytes) that counts arrivals and does not make who arrives wait. Its phases are numbered
// from 0: a phase is over when `count` have arrived. One thread initialises it, before a block_sync.
VIDLA_DEVICE void mbarrier_init(uint32_t at, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
// warp: one arrival for the warp, after all of its accesses before.
VIDLA_DEVICE void mbarrier_arrive(uint32_t at) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(at) : "memory");
}
// warp: 32 arrivals, each when all earlier cp_async of its thread have landed.
VIDLA_DEVICE void mbarrier_arrive_with_copies(uint32_t at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at) : "memory");
}
// warp: until the phase is over; `phase` may be given by its lowest bit.
VIDLA_DEVICE void mbarrier_wait(uint32_t at, int phase) {
  asm volatile(
      "{ .reg .pred p; again%=: mbarrier.test_wait.parity.shared.b64 p, [%0], %1; @!p bra again%=; }" ::"r"(at), "r"(phase & 1)
      : "memory");
}

// warp: four 8x8 matrices of 16-bit elements; lane 8i+j gives the address of row j of matrix i.
VIDLA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
VIDLA_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// warp: 4 bytes from each lane's register to shared memory.
VIDLA_DEVICE void store_shared(uint32_t shared, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(word) : "memory");
}
VIDLA_DEVICE void store_shared(uint32_t shared, uint32_t word, bool active) {
  if (active) asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(word) : "memory");
}
// warp: 8 bytes for each active lane, aligned to 8.
VIDLA_DEVICE void store_shared(uint32_t shared, Word2 w, bool active) {
  if (active) asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(w.x[0]), "r"(w.x[1]) : "memory");
}
VIDLA_DEVICE Word2 load_shared(uint32_t shared, bool active) {
  Word2 w{};
  if (active) asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(w.x[0]), "=r"(w.x[1]) : "r"(shared) : "memory");
  return w;
}

// warp: 16 bytes for each lane, aligned to 16.
VIDLA_DEVICE Word4 load_shared_16(uint32_t shared) {
  Word4 w;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x[0]), "=r"(w.x[1]), "=r"(w.x[2]), "=r"(w.x[3])
               : "r"(shared)
               : "memory");
  return w;
}
// 4 bytes of shared memory. Any lanes.
VIDLA_DEVICE uint32_t load_shared(uint32_t shared) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(shared) : "memory");
  return word;
}

// warp: c (16x8, fp32) += a (16x16, row major) * b (16x8, column major).
template <class T> VIDLA_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> VIDLA_DEVICE void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> VIDLA_DEVICE void mma_m16n8k16<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// warp: c = add + a * b; add may be c.
template <class T>
VIDLA_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&add)[4]);
template <>
VIDLA_DEVICE void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                     const float (&add)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, "
      "%11, %12, %13};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(add[0]), "f"(add[1]), "f"(add[2]), "f"(add[3]));
}
template <>
VIDLA_DEVICE void mma_m16n8k16<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                     const float (&add)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, "
      "%11, %12, %13};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(add[0]), "f"(add[1]), "f"(add[2]), "f"(add[3]));
}

// warp
VIDLA_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
VIDLA_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

VIDLA_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }  // that lane's x
VIDLA_DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }

// To about 1, 2 and 1 units in the last place.
VIDLA_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VIDLA_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VIDLA_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T> VIDLA_DEVICE uint32_t pack(float low, float high);
template <> VIDLA_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <> VIDLA_DEVICE uint32_t pack<fp16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <class T> VIDLA_DEVICE float unpack(uint32_t pair, int which);
template <> VIDLA_DEVICE float unpack<bf16>(uint32_t pair, int which) {
  return __uint_as_float(which ? pair & 0xffff0000u : pair << 16);
}
template <> VIDLA_DEVICE float unpack<fp16>(uint32_t pair, int which) {
  float y;
  asm("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, lo; }" : "=f"(y) : "r"(which ? pair >> 16 : pair));
  return y;
}
VIDLA_DEVICE float as_float(uint32_t x) { return __uint_as_float(x); }
VIDLA_DEVICE uint32_t as_word(float x) { return __float_as_uint(x); }

// 4 bytes that nobody writes while the kernel runs: a table of the host. Any lanes.
VIDLA_DEVICE int load_constant(const int* from) { return __ldg(from); }

// warp: one load or store of sizeof(W) bytes for each active lane, aligned to its size.
template <class W> VIDLA_DEVICE W load_global(const void* from, bool active) {
  W w{};
  if (active) w = *static_cast<const W*>(from);
  return w;
}
template <class W> VIDLA_DEVICE void store_global(void* to, W w, bool active) {
  if (active) *static_cast<W*>(to) = w;
}

// ---- Hopper (sm_90a) alone: products of a warpgroup, asynchronous, with operands in shared memory ---------------------------
// A warpgroup is 4 warps, the first of which has an index that is a multiple of 4; all its lanes reach these together. What
// they do: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". On other GPUs they trap; `if constexpr (has_wgmma)`
// keeps what can't run there from being compiled, and wgmma_runs, of the host, says where it does.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool has_wgmma = true;
#define VIDLA_HOPPER(...) asm volatile(__VA_ARGS__)
#else
constexpr bool has_wgmma = false;
#define VIDLA_HOPPER(...) asm volatile("trap;")
#endif

// A matrix in shared memory, as wgmma is told of it. In units of 16 bytes, of 8 numbers of 16 bits, lying 8 by 8:
//   by k    a row's two units lie side by side, or `leading_bytes` apart without swizzle. 8 rows have the pitch of the swizzle
//           (16 bytes without), the next 8 begin `stride_bytes` further on.
//   by m/n  a k has the units of as many rows (columns) as the swizzle is wide side by side, the next ones `leading_bytes`
//           further on; 8 k have that pitch, the next 8 begin `stride_bytes` further on. Without swizzle the two change places.
// The swizzle exchanges units within 128, 64 or 32 bytes by the address bits above (7-9, 7-8, 7), so that what lies as
// Rows<64> of hierarchical.cuh is b128, from a multiple of 1024 bytes.
VIDLA_HOST_DEVICE uint64_t matrix_descriptor(uint32_t at, Swizzle swizzle, int leading_bytes, int stride_bytes) {
  return (at & 0x3ffff) >> 4 | uint64_t(leading_bytes >> 4 & 0x3fff) << 16 | uint64_t(stride_bytes >> 4 & 0x3fff) << 32 |
         uint64_t(4 - int(swizzle) & 3) << 62;
}
VIDLA_HOST_DEVICE uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// n, its n / 2 accumulators as text, numbers of the operands behind them, the accumulators as operands.
#define VIDLA_D2(t) "%" #t "0, %" #t "1"
#define VIDLA_D4(t) VIDLA_D2(t) ", %" #t "2, %" #t "3"
#define VIDLA_D6(t) VIDLA_D4(t) ", %" #t "4, %" #t "5"
#define VIDLA_D8(t) VIDLA_D6(t) ", %" #t "6, %" #t "7"
#define VIDLA_D10(t) VIDLA_D8(t) ", %" #t "8, %" #t "9"
#define VIDLA_T1 VIDLA_D10() ", "
#define VIDLA_T2 VIDLA_T1 VIDLA_D10(1) ", "
#define VIDLA_T3 VIDLA_T2 VIDLA_D10(2) ", "
#define VIDLA_T4 VIDLA_T3 VIDLA_D10(3) ", "
#define VIDLA_T5 VIDLA_T4 VIDLA_D10(4) ", "
#define VIDLA_T6 VIDLA_T5 VIDLA_D10(5) ", "
#define VIDLA_T7 VIDLA_T6 VIDLA_D10(6) ", "
#define VIDLA_T8 VIDLA_T7 VIDLA_D10(7) ", "
#define VIDLA_T9 VIDLA_T8 VIDLA_D10(8) ", "
#define VIDLA_T10 VIDLA_T9 VIDLA_D10(9) ", "
#define VIDLA_T11 VIDLA_T10 VIDLA_D10(10) ", "
#define VIDLA_T12 VIDLA_T11 VIDLA_D10(11) ", "
#define VIDLA_F4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define VIDLA_F8(i) VIDLA_F4(i), VIDLA_F4(i + 4)
#define VIDLA_F16(i) VIDLA_F8(i), VIDLA_F8(i + 8)
#define VIDLA_F32(i) VIDLA_F16(i), VIDLA_F16(i + 16)
#define VIDLA_F64(i) VIDLA_F32(i), VIDLA_F32(i + 32)
#define VIDLA_WGMMA_SHAPES(V) \
  V(8, VIDLA_D4(), 4, 5, 6, 7, 8, 9, 10, VIDLA_F4(0)) \
  V(16, VIDLA_D8(), 8, 9, 10, 11, 12, 13, 14, VIDLA_F8(0)) \
  V(24, VIDLA_T1 VIDLA_D2(1), 12, 13, 14, 15, 16, 17, 18, VIDLA_F8(0), VIDLA_F4(8)) \
  V(32, VIDLA_T1 VIDLA_D6(1), 16, 17, 18, 19, 20, 21, 22, VIDLA_F16(0)) \
  V(40, VIDLA_T1 VIDLA_D10(1), 20, 21, 22, 23, 24, 25, 26, VIDLA_F16(0), VIDLA_F4(16)) \
  V(48, VIDLA_T2 VIDLA_D4(2), 24, 25, 26, 27, 28, 29, 30, VIDLA_F16(0), VIDLA_F8(16)) \
  V(56, VIDLA_T2 VIDLA_D8(2), 28, 29, 30, 31, 32, 33, 34, VIDLA_F16(0), VIDLA_F8(16), VIDLA_F4(24)) \
  V(64, VIDLA_T3 VIDLA_D2(3), 32, 33, 34, 35, 36, 37, 38, VIDLA_F32(0)) \
  V(72, VIDLA_T3 VIDLA_D6(3), 36, 37, 38, 39, 40, 41, 42, VIDLA_F32(0), VIDLA_F4(32)) \
  V(80, VIDLA_T3 VIDLA_D10(3), 40, 41, 42, 43, 44, 45, 46, VIDLA_F32(0), VIDLA_F8(32)) \
  V(88, VIDLA_T4 VIDLA_D4(4), 44, 45, 46, 47, 48, 49, 50, VIDLA_F32(0), VIDLA_F8(32), VIDLA_F4(40)) \
  V(96, VIDLA_T4 VIDLA_D8(4), 48, 49, 50, 51, 52, 53, 54, VIDLA_F32(0), VIDLA_F16(32)) \
  V(104, VIDLA_T5 VIDLA_D2(5), 52, 53, 54, 55, 56, 57, 58, VIDLA_F32(0), VIDLA_F16(32), VIDLA_F4(48)) \
  V(112, VIDLA_T5 VIDLA_D6(5), 56, 57, 58, 59, 60, 61, 62, VIDLA_F32(0), VIDLA_F16(32), VIDLA_F8(48)) \
  V(120, VIDLA_T5 VIDLA_D10(5), 60, 61, 62, 63, 64, 65, 66, VIDLA_F32(0), VIDLA_F16(32), VIDLA_F8(48), VIDLA_F4(56)) \
  V(128, VIDLA_T6 VIDLA_D4(6), 64, 65, 66, 67, 68, 69, 70, VIDLA_F64(0)) \
  V(136, VIDLA_T6 VIDLA_D8(6), 68, 69, 70, 71, 72, 73, 74, VIDLA_F64(0), VIDLA_F4(64)) \
  V(144, VIDLA_T7 VIDLA_D2(7), 72, 73, 74, 75, 76, 77, 78, VIDLA_F64(0), VIDLA_F8(64)) \
  V(152, VIDLA_T7 VIDLA_D6(7), 76, 77, 78, 79, 80, 81, 82, VIDLA_F64(0), VIDLA_F8(64), VIDLA_F4(72)) \
  V(160, VIDLA_T7 VIDLA_D10(7), 80, 81, 82, 83, 84, 85, 86, VIDLA_F64(0), VIDLA_F16(64)) \
  V(168, VIDLA_T8 VIDLA_D4(8), 84, 85, 86, 87, 88, 89, 90, VIDLA_F64(0), VIDLA_F16(64), VIDLA_F4(80)) \
  V(176, VIDLA_T8 VIDLA_D8(8), 88, 89, 90, 91, 92, 93, 94, VIDLA_F64(0), VIDLA_F16(64), VIDLA_F8(80)) \
  V(184, VIDLA_T9 VIDLA_D2(9), 92, 93, 94, 95, 96, 97, 98, VIDLA_F64(0), VIDLA_F16(64), VIDLA_F8(80), VIDLA_F4(88)) \
  V(192, VIDLA_T9 VIDLA_D6(9), 96, 97, 98, 99, 100, 101, 102, VIDLA_F64(0), VIDLA_F32(64)) \
  V(200, VIDLA_T9 VIDLA_D10(9), 100, 101, 102, 103, 104, 105, 106, VIDLA_F64(0), VIDLA_F32(64), VIDLA_F4(96)) \
  V(208, VIDLA_T10 VIDLA_D4(10), 104, 105, 106, 107, 108, 109, 110, VIDLA_F64(0), VIDLA_F32(64), VIDLA_F8(96)) \
  V(216, VIDLA_T10 VIDLA_D8(10), 108, 109, 110, 111, 112, 113, 114, VIDLA_F64(0), VIDLA_F32(64), VIDLA_F8(96), VIDLA_F4(104)) \
  V(224, VIDLA_T11 VIDLA_D2(11), 112, 113, 114, 115, 116, 117, 118, VIDLA_F64(0), VIDLA_F32(64), VIDLA_F16(96)) \
  V(232, VIDLA_T11 VIDLA_D6(11), 116, 117, 118, 119, 120, 121, 122, VIDLA_F64(0), VIDLA_F32(64), VIDLA_F16(96), VIDLA_F4(112)) \
  V(240, VIDLA_T11 VIDLA_D10(11), \
    120, 121, 122, 123, 124, 125, 126, VIDLA_F64(0), VIDLA_F32(64), VIDLA_F16(96), VIDLA_F8(112)) \
  V(248, VIDLA_T12 VIDLA_D4(12), \
    124, 125, 126, 127, 128, 129, 130, VIDLA_F64(0), VIDLA_F32(64), VIDLA_F16(96), VIDLA_F8(112), VIDLA_F4(120)) \
  V(256, VIDLA_T12 VIDLA_D8(12), 128, 129, 130, 131, 132, 133, 134, VIDLA_F64(0), VIDLA_F64(64))

template <class T> constexpr bool is_bf16 = false;
template <> constexpr bool is_bf16<bf16> = true;

// c (64 x n, fp32) = a (64 x 16) * b (16 x n), + c where accumulate; n a multiple of 8. Warp w % 4 of the warpgroup holds the
// rows from 16 (w % 4) on, its lanes as in n / 8 tiles of mma_m16n8k16. a_mn, b_mn: the operand lies by m/n, else by k.
// All of it happens between here and the wait: until then nobody reads or writes c, or writes what the descriptors tell of.
// ptxas makes every wgmma of a kernel wait at once (warnings C7510, C7514) if it sees an accumulator touched in between:
// begin a sum with accumulate = false instead of zeros, unroll all loops over c.
template <class T, int n, bool a_mn, bool b_mn>
VIDLA_DEVICE void wgmma(float (&c)[n / 2], uint64_t a, uint64_t b, bool accumulate) {
#define VIDLA_ISSUE(types, N, text, p0, p1, p2, p3, p4, p5, p6, ...)                                             \
  VIDLA_HOPPER("{ .reg .pred p; setp.ne.b32 p, %" #p2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." types \
               " {" text "}, %" #p0 ", %" #p1 ", p, 1, 1, %" #p3 ", %" #p4 "; }"                                  \
               : __VA_ARGS__                                                                                      \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(a_mn)), "n"(int(b_mn)))
#define VIDLA_CASE(N, ...)                                                  \
  if constexpr (n == N && is_bf16<T>) VIDLA_ISSUE("bf16.bf16", N, __VA_ARGS__); \
  if constexpr (n == N && !is_bf16<T>) VIDLA_ISSUE("f16.f16", N, __VA_ARGS__);
  VIDLA_WGMMA_SHAPES(VIDLA_CASE)
#undef VIDLA_ISSUE
}
// The same with a in registers: each warp has its 16 rows, as mma_m16n8k16 has them. They stay as they are until the wait.
template <class T, int n, bool b_mn>
VIDLA_DEVICE void wgmma(float (&c)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
#define VIDLA_ISSUE(types, N, text, p0, p1, p2, p3, p4, p5, p6, ...)                                             \
  VIDLA_HOPPER("{ .reg .pred p; setp.ne.b32 p, %" #p5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." types \
               " {" text "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", p, 1, 1, %" #p6 "; }"            \
               : __VA_ARGS__                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(b_mn)))
  VIDLA_WGMMA_SHAPES(VIDLA_CASE)
#undef VIDLA_ISSUE
#undef VIDLA_CASE
}
// Before the first wgmma, and again before one whose accumulator or registers of a other instructions have written.
VIDLA_DEVICE void wgmma_fence() { VIDLA_HOPPER("wgmma.fence.sync.aligned;" ::: "memory"); }
// Makes a group of the wgmma since the last one.
VIDLA_DEVICE void wgmma_commit() { VIDLA_HOPPER("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `newest` groups are on their way.
template <int newest> VIDLA_DEVICE void wgmma_wait() {
  VIDLA_HOPPER("wgmma.wait_group.sync.aligned %0;" ::"n"(newest) : "memory");
}
// The compiler may not move what reads or writes c from before this to behind it, or the other way.
template <int size> VIDLA_DEVICE void registers_fence(float (&c)[size]) {
#pragma unroll
  for (int i = 0; i < size; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
// Of shared memory that stores or cp_async have written, wgmma sees what was there for the thread at a fence_async of its own,
// or of the thread that wrote, before the barrier between the two.
VIDLA_DEVICE void fence_async() { VIDLA_HOPPER("fence.proxy.async.shared::cta;" ::: "memory"); }

// warpgroup: so many registers for each of its threads from here on; to have more, others must have given theirs first.
template <int count> VIDLA_DEVICE void registers_give() { VIDLA_HOPPER("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)); }
template <int count> VIDLA_DEVICE void registers_take() { VIDLA_HOPPER("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)); }

// warp: a block_sync for as many threads as say so, in whole warps. id 1 to 15; one barrier serves one set of warps at a time.
VIDLA_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// warp: the reverse of ldmatrix_x4; lane 8i+j gives the address of row j of matrix i.
VIDLA_DEVICE void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  VIDLA_HOPPER("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
}
VIDLA_DEVICE void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
  VIDLA_HOPPER("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
#undef VIDLA_HOPPER

// Host side; all of it is about the current device, and nothing waits for the GPU.
constexpr int most_devices = 64;
inline int current_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && device < most_devices ? device : 0;
}
inline int device_attribute(cudaDeviceAttr attribute) {  // 0 without a device
  int n = 0;
  return cudaDeviceGetAttribute(&n, attribute, current_device()) == cudaSuccess ? n : 0;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }  // bytes a block
inline int architecture() {  // 80, 90, ...
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}
// Whether kernels that multiply by wgmma run here: on compute capability 9.x, if the library has code for it.
inline bool wgmma_runs() {
  for (int built : {__CUDA_ARCH_LIST__})
    if (built == 900) return architecture() / 10 == 9;
  return false;
}

// Returns a cudaError_t as int; 0 is success. Asks once a kernel and device for shared memory above 48 KB.
template <auto kernel, class P> int launch(const char*, int blocks, int threads, int shared, void* stream, P p) {
  static std::atomic<int> granted[most_devices];
  const int device = current_device();
  if (shared > 48 * 1024 && granted[device].load(std::memory_order_relaxed) < shared) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (e != cudaSuccess) return cudaGetLastError(), e;
    granted[device].store(shared, std::memory_order_relaxed);
  }
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}
inline int device_status() {
  int n = 0, device = 0;
  const cudaError_t e = cudaGetDevice(&device);
  return e != cudaSuccess ? e : cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
}
inline const char* error_name(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
inline void watch_buffer(const char*, const void*, int64_t) {}  // the emulator's bounds and byte counts
}  // namespace vidla
#endif
