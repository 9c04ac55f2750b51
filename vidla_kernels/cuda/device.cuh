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
// warp: 8 bytes for each active lane, aligned to 8.
VIDLA_DEVICE void store_shared(uint32_t shared, Word2 w, bool active) {
  if (active) asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(w.x[0]), "r"(w.x[1]) : "memory");
}
VIDLA_DEVICE Word2 load_shared(uint32_t shared, bool active) {
  Word2 w{};
  if (active) asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(w.x[0]), "=r"(w.x[1]) : "r"(shared) : "memory");
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
