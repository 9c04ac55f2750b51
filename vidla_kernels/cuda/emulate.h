// The primitives of device.cuh on a CPU. Each CUDA thread is a fiber; a warp primitive is a rendezvous: 31 lanes leave
// their arguments and hand over, the 32nd acts for all. A warp runs until a block barrier, then another one runs (in
// a shuffled order, VIDLA_EMULATE_SEED). Blocks are dealt out to VIDLA_EMULATE_THREADS operating-system threads.
//
// What it is strict about, beyond the values:
//   shared memory   starts as NaN; reading what nobody wrote is an error, as is any access outside the allocation
//   cp.async        lands at the wait_group that covers it, not before; touching its destination earlier is an error
//   wgmma           is computed at the wait that covers it, from descriptors decoded bit by bit and shared memory as it is
//                   then. Until then accumulators hold a NaN; writing them, registers that are an operand, or shared memory
//                   that a descriptor tells of, is an error, and so are a fence, commit or wait that is missing, operands
//                   that no fence_async made visible, and warps of a warpgroup that issue different products
//   races           each 4-byte word remembers its last writer and reader as (thread, barriers passed, warp syncs
//                   passed); an access that no block_sync, or warp_sync inside a warp, puts after those is an error
//   global memory   accesses outside a watched buffer are errors, and so is what one block writes and another one of
//                   the same launch reads or writes; bytes are counted, in all and distinct
//   control flow    lanes that meet at different primitives, a barrier not reached by all, a lost cp.async: errors
// What it can't see: time, registers, the memory model between blocks, ex2's and mma's last bits.
// Needs ucontext (glibc); tried on x86-64 Linux.
#pragma once
#if defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0
#error "compile with -U_FORTIFY_SOURCE: its longjmp takes a jump to another fiber's stack for an attack"
#endif
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#define VIDLA_KERNEL(threads, blocks) static void
#define VIDLA_DEVICE inline __attribute__((always_inline))
#define VIDLA_HOST_DEVICE inline

namespace vidla {
namespace emulate {

// ---- 16-bit floats -------------------------------------------------------------------------------------------------
inline float from_bits(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline uint32_t to_bits(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);
  const float x = exponent ? std::ldexp(1024.f + fraction, int(exponent) - 25) : std::ldexp(float(fraction), -24);
  return from_bits(sign | to_bits(x));
}
inline uint16_t float_to_half(float x) {  // round to nearest even: let a float of the right exponent do the rounding
  const uint32_t sign = to_bits(x) >> 16 & 0x8000u, magnitude = to_bits(x) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;
  if (magnitude < 0x38800000u) return sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f));
  return sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1)) - 0x38000000u) >> 13;
}
inline uint16_t float_to_bf16(float x) {
  const uint32_t u = to_bits(x);
  return (u & 0x7fffffffu) > 0x7f800000u ? uint16_t(u >> 16 | 64) : uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
template <class T> float widen(uint16_t x);
template <> inline float widen<bf16>(uint16_t x) { return from_bits(uint32_t(x) << 16); }
template <> inline float widen<fp16>(uint16_t x) {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (int i = 0; i < 65536; ++i) t[i] = half_to_float(uint16_t(i));
    return t;
  }();
  return table[x];
}

// ---- what a launch leaves behind -----------------------------------------------------------------------------------
struct Counters {
  int64_t blocks = 0, mma = 0, exp2 = 0, shuffles = 0, barriers = 0, warp_syncs = 0;
  int64_t ldmatrix = 0, cp_async = 0, store_shared = 0, wgmma = 0;                   // warp instructions; mma: wgmma's too
  int64_t ldmatrix_conflicts = 0, cp_async_conflicts = 0, store_conflicts = 0;       // extra passes (store: load_shared's too)
  int64_t shared_read = 0, shared_written = 0, global_read = 0, global_written = 0;  // bytes
  int64_t sectors_read = 0, sectors_written = 0;                                     // of 32 bytes, by warp instruction
  void add(const Counters& o) {
    auto* to = reinterpret_cast<int64_t*>(this);
    auto* from = reinterpret_cast<const int64_t*>(&o);
    for (size_t i = 0; i < sizeof(Counters) / 8; ++i) to[i] += from[i];
  }
};

struct Buffer {  // a stretch of global memory; counts per 4-byte word
  std::string name;
  const char* base;
  int64_t bytes;
  std::vector<uint16_t> reads, writes;
  std::vector<int32_t> writer;  // the block that has written it during this launch; -1 where none has
};

struct Record {  // all of it behind `lock` except the atomic increments in Buffer
  std::mutex lock;
  std::vector<Buffer> buffers;
  std::map<std::string, Counters> kernels;
  std::map<std::string, int64_t> errors;  // kind -> count
  std::vector<std::string> messages;      // the first few, in words
  std::atomic<int> told{0};               // how many those are
};
inline Record& record() {
  static Record r;
  return r;
}

inline void error(const char* kind, const std::string& detail) {
  std::lock_guard<std::mutex> hold(record().lock);
  ++record().errors[kind];
  if (record().told < 8) ++record().told, record().messages.push_back(std::string(kind) + ": " + detail);
}
inline bool all_told() { return record().told >= 8; }  // errors come by the thousand, and words take time

// ---- a block in flight ---------------------------------------------------------------------------------------------
enum class Op {
  mma, ldmatrix, ldmatrix_trans, cp_async, store_shared, load_shared, shuffle, vote, arrive, wait, load, store, warp_sync,
  block_sync, wgmma, wgmma_fence, wgmma_commit, wgmma_wait, barrier_sync, stmatrix
};
inline const char* name(Op op) {
  static const char* names[] = {"mma",     "ldmatrix", "ldmatrix.trans",  "cp.async",      "store_shared", "load_shared",
                                "shuffle", "vote",     "mbarrier_arrive", "mbarrier_wait", "load_global",  "store_global",
                                "warp_sync", "block_sync", "wgmma", "wgmma_fence", "wgmma_commit", "wgmma_wait",
                                "barrier_sync", "stmatrix"};
  return names[int(op)];
}

struct Async {
  uint32_t to;
  const void* from;
  bool valid;
  int group;
  int64_t serial;  // of the copy
};

struct Fence {  // a fence_async: orders what was written at an earlier time
  uint32_t time, epoch, syncs;
};

// One of a warp: its 16 of the 64 rows.
struct Wgmma {
  int n, group;
  bool a_shared, a_mn, b_mn, accumulate;
  uint64_t a, b;
  float* c[32];
  uint32_t rows[32][4];         // a in registers, as it was,
  const uint32_t* rows_at[32];  // and where
  float (*widen)(uint16_t);
};
struct Accumulator {  // under way, by the address of lane 0's
  int n, pending;
  float* c[32];
  std::vector<float> values;  // 16 rows of n
};

struct Warp;
struct Lane {
  jmp_buf where;
  ucontext_t first;
  bool started = false, finished = false;
  int thread = 0;
  Warp* warp = nullptr;
  std::vector<Async> in_flight;
  int groups = 0;
  std::vector<Fence> fences;
  bool packed = false;  // since the last wgmma_fence
  float* c_at;
  const uint32_t* a_at;
  // arguments and results of the primitive at hand
  uint32_t a[4], b[2], address;
  float c[4];
  const void* pointer;
  bool active;
};

struct Mbarrier {  // one that some thread has initialised
  int count = 0, missing = 0, phase = 0;
  std::vector<std::pair<Lane*, Async>> copies;  // that its phase waits for
};

struct Warp {
  Lane lanes[32];
  const Mbarrier* waits_for = nullptr;  // in mbarrier_wait, for the end of phase `waits_phase`
  int waits_phase = 0;
  int index = 0, arrived = 0, finished = 0, resume = 0;
  Op op = Op::mma;
  bool at_barrier = false;
  int barrier = 0;  // the named one it is at; 0: block_sync
  uint32_t syncs = 0;
  std::vector<Wgmma> wgmmas;  // under way, oldest first
  std::map<float*, Accumulator> accumulators;
  int wgmma_groups = 0;
  size_t wgmmas_issued = 0;
  bool wgmma_fenced = false;
};

struct Word {  // shadow of 4 bytes of shared memory
  static constexpr uint16_t nobody = 0xffff, several = 0xfffe;
  uint32_t write_epoch, write_syncs, read_epoch, read_syncs, write_time;
  uint16_t writer, reader, read_warp, wgmmas;  // wgmmas: under way that read it
  bool in_flight;
};

struct Worker {
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<int> order;  // in which warps get their turn
  std::vector<uint8_t> shared;
  std::vector<Word> shadow;
  std::map<uint32_t, Mbarrier> mbarriers;  // by offset
  std::vector<void*> stacks;  // one for each thread of a block; kept for the next launch
  std::function<void()> kernel;
  ucontext_t starter;
  jmp_buf home;
  Lane* lane = nullptr;
  int threads = 0, block = 0, warps_waiting = 0;
  uint32_t epoch = 0, time = 0;
  std::map<int, int> named;  // barrier -> warps that wait at it
  std::map<int, std::vector<std::array<uint64_t, 3>>> products;  // what each warpgroup does, in order: a, b, shape; or a wait
  int64_t copies = 0;
  Counters count;
};
inline thread_local Worker* worker = nullptr;
constexpr size_t stack_bytes = 128 * 1024;

// Fibers can't be unwound: they are dropped, and start afresh with the next block.
[[noreturn]] inline void abandon_block(const char* kind, const std::string& detail) {
  error(kind, detail);
  for (auto& w : worker->warps)
    for (Lane& l : w->lanes) l.started = false;
  _longjmp(worker->home, 2);
}

inline void lane_main();
[[noreturn]] inline void resume(Lane& to) {
  worker->lane = &to;
  if (to.started) _longjmp(to.where, 1);
  to.started = true;
  if (worker->stacks.size() <= size_t(to.thread)) worker->stacks.resize(to.thread + 1);
  void*& stack = worker->stacks[to.thread];
  if (!stack) stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  getcontext(&to.first);
  to.first.uc_stack.ss_sp = stack;
  to.first.uc_stack.ss_size = stack_bytes;
  to.first.uc_link = nullptr;
  makecontext(&to.first, lane_main, 0);
  setcontext(&to.first);
  abort();
}
__attribute__((noinline)) inline void switch_to(Lane& to) {
  Lane& from = *worker->lane;
  if (!_setjmp(from.where)) resume(to);
}

inline std::string place(const Lane& l) {
  return "block " + std::to_string(worker->block) + " warp " + std::to_string(l.thread / 32) + " lane " +
         std::to_string(l.thread % 32);
}

inline bool phase_over(const Mbarrier& b, int phase) { return (b.phase ^ phase) & 1; }
inline Warp* runnable_warp() {
  for (int i : worker->order) {
    Warp& w = *worker->warps[i];
    if (w.waits_for && !phase_over(*w.waits_for, w.waits_phase)) continue;
    if (!w.at_barrier && w.finished == 0) return &w;
  }
  return nullptr;
}

inline void lane_main() {
  for (;;) {  // once for each block
    Lane& me = *worker->lane;
    worker->kernel();
    me.finished = true;
    if (!me.in_flight.empty()) error("cp.async never waited for", place(me));
    Warp& w = *me.warp;
    if (!w.wgmmas.empty()) error("wgmma never waited for", place(me)), w.wgmmas.clear();
    if (w.arrived) abandon_block("divergence", place(me) + " has ended while its warp meets at " + name(w.op));
    if (++w.finished < 32) {
      switch_to(w.lanes[(me.thread + 1) % 32]);
    } else if (Warp* next = runnable_warp()) {
      switch_to(next->lanes[next->resume]);
    } else if (worker->warps_waiting || !worker->named.empty()) {
      abandon_block("barrier", place(me) + " has ended while other warps wait at a barrier");
    } else if (!_setjmp(me.where)) {
      _longjmp(worker->home, 1);
    }
  }
}

// The last lane to arrive runs `act` for the whole warp.
template <class Act> inline void rendezvous(Op op, Act act) {
  Lane& me = *worker->lane;
  Warp& w = *me.warp;
  if (w.arrived == 0) w.op = op;
  if (w.op != op) abandon_block("divergence", place(me) + " is at " + name(op) + ", its warp at " + name(w.op));
  if (++w.arrived == 32) {
    w.arrived = 0;
    act(w);
    return;
  }
  Lane& next = w.lanes[(me.thread + 1) % 32];
  if (next.finished) abandon_block("divergence", place(next) + " has ended while its warp meets at " + name(op));
  switch_to(next);
}

// ---- shared memory -------------------------------------------------------------------------------------------------
inline bool shared_in_range(uint32_t at, int bytes, const char* what) {
  if (uint64_t(at) + bytes <= worker->shared.size() && at % bytes == 0) return true;
  error("shared memory out of range", std::string(what) + " at " + std::to_string(at) + ", " + place(*worker->lane));
  return false;
}
inline bool ordered(uint32_t epoch, uint32_t syncs, bool same_thread, bool same_warp, const Warp& w) {
  return epoch < worker->epoch || same_thread || (same_warp && syncs < w.syncs);
}
// A lane other than the one that wrote may be the one that gets the data, so ldmatrix passes reader = several.
inline void note_read(const Warp& w, uint16_t reader, uint32_t at, int bytes, const char* what) {
  for (uint32_t i = at / 4; i < (at + bytes) / 4; ++i) {
    Word& s = worker->shadow[i];
    auto tell = [&](const char* kind) {
      if (all_told()) return error(kind, "");
      error(kind, std::string(what) + " of byte " + std::to_string(4 * i) + " by warp " + std::to_string(w.index) +
                      ", written by thread " + std::to_string(s.writer) + ", block " + std::to_string(worker->block));
    };
    if (s.in_flight) tell("read of bytes still in flight");
    else if (s.writer == Word::nobody) tell("read of bytes nobody wrote");
    else if (!ordered(s.write_epoch, s.write_syncs, s.writer == reader, s.writer / 32 == w.index, w))
      tell("race: read after write");
    const bool fresh = s.reader == Word::nobody || s.read_epoch < worker->epoch;
    s.read_warp = fresh || s.read_warp == w.index ? uint16_t(w.index) : Word::several;
    s.reader = fresh || s.reader == reader ? reader : Word::several;
    s.read_epoch = worker->epoch;
    s.read_syncs = w.syncs;
  }
}
inline void note_write(const Lane& me, uint32_t at, int bytes, bool in_flight, const char* what) {
  const Warp& w = *me.warp;
  for (uint32_t i = at / 4; i < (at + bytes) / 4; ++i) {
    Word& s = worker->shadow[i];
    auto tell = [&](const char* kind) {
      error(kind, all_told() ? "" : std::string(what) + " of byte " + std::to_string(4 * i) + " by " + place(me));
    };
    if (s.in_flight) tell("write over bytes in flight");
    if (s.wgmmas) tell("write over the operand of a wgmma under way");
    if (s.writer != Word::nobody &&
        !ordered(s.write_epoch, s.write_syncs, s.writer == me.thread, s.writer / 32 == w.index, w))
      tell("race: write after write");
    if (s.reader != Word::nobody &&
        !ordered(s.read_epoch, s.read_syncs, s.reader == me.thread, s.read_warp == w.index, w))
      tell("race: write after read");
    s.writer = uint16_t(me.thread);
    s.write_epoch = worker->epoch;
    s.write_syncs = w.syncs;
    s.write_time = worker->time;
    s.in_flight = in_flight;
  }
}
constexpr uint32_t none = ~0u;  // address of an inactive lane
// Extra passes a group of lanes costs: 32 banks of 4 bytes, one distinct 16-byte row a bank group and pass.
inline int conflicts(const uint32_t* address, int n) {
  int worst = 1;
  for (int g = 0; g < 8; ++g) {
    uint32_t seen[32];
    int distinct = 0;
    for (int i = 0; i < n; ++i)
      if (int(address[i] / 16 % 8) == g && std::find(seen, seen + distinct, address[i]) == seen + distinct)
        seen[distinct++] = address[i];
    worst = std::max(worst, distinct);
  }
  return worst - 1;
}

// The same for 4 bytes a lane: one distinct word a bank and pass.
inline int word_conflicts(const Warp& w) {
  int passes[32] = {};
  for (int l = 0; l < 32; ++l) {
    const uint32_t a = w.lanes[l].address;
    bool repeated = a == none;
    for (int i = 0; i < l; ++i) repeated |= w.lanes[i].address == a;
    passes[a / 4 % 32] += !repeated;
  }
  return std::max(1, *std::max_element(passes, passes + 32)) - 1;
}
// And for 8 bytes of each active lane, which go 16 lanes at a time; lanes that name one address read it together.
inline int pair_conflicts(const Warp& w) {
  int worst[2] = {1, 1};
  for (int half = 0; half < 2; ++half) {
    int passes[16] = {};
    for (int l = 16 * half; l < 16 * half + 16; ++l) {
      bool repeated = !w.lanes[l].active;
      for (int i = 16 * half; i < l; ++i) repeated |= w.lanes[i].active && w.lanes[i].address == w.lanes[l].address;
      if (!repeated) worst[half] = std::max(worst[half], ++passes[w.lanes[l].address / 8 % 16]);
    }
  }
  return worst[0] + worst[1] - 2;
}

// ---- global memory -------------------------------------------------------------------------------------------------
inline Buffer* buffer_of(const void* p, int bytes) {
  const char* at = static_cast<const char*>(p);
  for (Buffer& b : record().buffers)
    if (at >= b.base && at + bytes <= b.base + b.bytes) return &b;
  return nullptr;
}
inline bool global_in_range(const void* p, int bytes, const char* what) {
  const Buffer* b = buffer_of(p, bytes);
  if (!b) error("global memory out of range", std::string(what) + ", " + place(*worker->lane));
  else if (reinterpret_cast<uintptr_t>(p) % bytes) error("misaligned global access", b->name + ", " + place(*worker->lane));
  else return true;
  return false;
}
// What a warp instruction moves: lanes that name one address move it once. Returns the bytes.
inline int note_global(const Warp& w, int bytes, bool write) {
  int moved = 0;
  for (int l = 0; l < 32; ++l) {
    const void* p = w.lanes[l].pointer;
    bool counts = w.lanes[l].active, shared = false;
    for (int i = 0; i < l && counts && !shared; ++i) shared = w.lanes[i].active && w.lanes[i].pointer == p;
    if (shared && write) error("two lanes write one address", place(w.lanes[l]));
    counts &= !shared;
    Buffer* b = counts ? buffer_of(p, bytes) : nullptr;
    if (!b) continue;
    moved += bytes;
    const int64_t first = (static_cast<const char*>(p) - b->base) / 4;
    for (int64_t i = first; i < first + bytes / 4; ++i) {
      __atomic_fetch_add(&(write ? b->writes : b->reads)[i], 1, __ATOMIC_RELAXED);
      const int before = write ? __atomic_exchange_n(&b->writer[i], worker->block, __ATOMIC_RELAXED)
                               : __atomic_load_n(&b->writer[i], __ATOMIC_RELAXED);
      if (before >= 0 && before != worker->block)
        error("race between blocks", std::string(write ? "write" : "read") + " of byte " + std::to_string(4 * i) + " of " +
                                         b->name + ", written by block " + std::to_string(before) + ", " +
                                         place(w.lanes[l]));
    }
  }
  return moved;
}
inline int sectors(const Warp& w) {
  uintptr_t seen[32];
  int n = 0;
  for (const Lane& l : w.lanes) {
    const uintptr_t s = reinterpret_cast<uintptr_t>(l.pointer) / 32;
    if (l.active && std::find(seen, seen + n, s) == seen + n) seen[n++] = s;
  }
  return n;
}

// ---- launches ------------------------------------------------------------------------------------------------------
inline int environment(const char* key, int otherwise) {
  const char* s = getenv(key);
  return s ? atoi(s) : otherwise;
}

inline void run_block(Worker& k, int block, int shared) {
  worker = &k;
  k.block = block;
  k.warps_waiting = 0;
  k.epoch = 1;
  k.mbarriers.clear();
  k.named.clear();
  k.products.clear();
  k.shared.assign(shared, 0xff);
  k.shadow.assign(shared / 4, Word{0, 0, 0, 0, 0, Word::nobody, Word::nobody, Word::nobody, 0, false});
  for (auto& w : k.warps) {
    w->arrived = w->finished = w->resume = 0;
    w->at_barrier = false;
    w->waits_for = nullptr;
    w->syncs = 1;
    w->wgmmas.clear(), w->accumulators.clear();
    w->wgmma_groups = 0, w->wgmmas_issued = 0, w->wgmma_fenced = false;
    for (Lane& l : w->lanes) l.finished = l.packed = false, l.groups = 0, l.in_flight.clear(), l.fences.clear();
  }
  std::mt19937 random(environment("VIDLA_EMULATE_SEED", 0) + block);
  std::shuffle(k.order.begin(), k.order.end(), random);
  ++k.count.blocks;
  const int way = _setjmp(k.home);
  if (!way) resume(k.warps[k.order[0]]->lanes[0]);
  for (const auto& w : k.warps)
    if (way == 1 && w->wgmmas_issued != k.warps[w->index / 4 * 4]->wgmmas_issued)
      error("wgmma", "warps of a warpgroup end after different numbers of products and waits, block " + std::to_string(block));
}

inline void run(const char* kernel_name, int blocks, int threads, int shared, const std::function<void()>& kernel) {
  static std::mutex one_launch;
  std::lock_guard<std::mutex> hold(one_launch);
  for (Buffer& b : record().buffers) std::fill(b.writer.begin(), b.writer.end(), -1);
  static std::vector<std::unique_ptr<Worker>> pool;
  const int n = std::min(blocks, environment("VIDLA_EMULATE_THREADS", int(std::thread::hardware_concurrency())));
  std::atomic<int> next{0};
  auto work = [&](Worker& k) {
    k.kernel = kernel;
    k.threads = threads;
    k.count = Counters{};
    k.warps.clear();
    k.order.clear();
    for (int i = 0; i < threads / 32; ++i) {
      k.warps.push_back(std::make_unique<Warp>());
      k.order.push_back(i);
      k.warps[i]->index = i;
      for (int j = 0; j < 32; ++j)
        k.warps[i]->lanes[j].thread = 32 * i + j, k.warps[i]->lanes[j].warp = k.warps[i].get();
    }
    for (int b; (b = next++) < blocks;) run_block(k, b, shared);
  };
  while (int(pool.size()) < n) pool.push_back(std::make_unique<Worker>());
  std::vector<std::thread> others;
  for (int i = 1; i < n; ++i) others.emplace_back(work, std::ref(*pool[i]));
  work(*pool[0]);
  for (auto& t : others) t.join();
  for (int i = 0; i < n; ++i) record().kernels[kernel_name].add(pool[i]->count);
}
}  // namespace emulate

// ---- the primitives ------------------------------------------------------------------------------------------------
VIDLA_DEVICE int thread_index() { return emulate::worker->lane->thread; }
VIDLA_DEVICE int block_index() { return emulate::worker->block; }
VIDLA_DEVICE int warp_index() { return thread_index() / 32; }
VIDLA_DEVICE uint32_t shared_base() { return 0; }
template <class T> VIDLA_DEVICE T not_ahead(T x) { return x; }

inline void warp_sync() {
  emulate::rendezvous(emulate::Op::warp_sync, [](emulate::Warp& w) { ++w.syncs, ++emulate::worker->count.warp_syncs; });
}

inline void block_sync() {
  using namespace emulate;
  rendezvous(Op::block_sync, [](Warp& w) {
    Worker& k = *worker;
    ++w.syncs;
    w.resume = k.lane->thread % 32;
    w.at_barrier = true;
    w.barrier = 0;
    if (++k.warps_waiting == int(k.warps.size())) {
      ++k.epoch;
      ++k.count.barriers;
      k.warps_waiting = 0;
      for (auto& other : k.warps) other->at_barrier = false;
    } else if (Warp* other = runnable_warp()) {
      switch_to(other->lanes[other->resume]);
    } else {
      abandon_block("barrier", place(*k.lane) + " waits at a block_sync that another warp has passed by");
    }
  });
}

inline void cp_async_16(uint32_t shared, const void* global, bool valid, bool active = true) {
  using namespace emulate;
  Lane& me = *worker->lane;
  me.address = active ? shared : none, me.pointer = global, me.active = valid && active;
  if (active && shared_in_range(shared, 16, "cp.async")) {
    note_write(me, shared, 16, true, "cp.async");
    memset(&worker->shared[shared], 0xff, 16);
    me.in_flight.push_back({shared, global, valid && global_in_range(global, 16, "cp.async"), me.groups, ++worker->copies});
  }
  rendezvous(Op::cp_async, [](Warp& w) {
    Counters& n = worker->count;
    ++n.cp_async;
    n.sectors_read += sectors(w);
    for (int q = 0; q < 32; q += 8) {  // 8 lanes of 16 bytes a pass
      uint32_t rows[8];
      int some = 0;
      for (int i = 0; i < 8; ++i)
        if (w.lanes[q + i].address != none) rows[some++] = w.lanes[q + i].address;
      n.cp_async_conflicts += conflicts(rows, some);
    }
    n.global_read += note_global(w, 16, false);
    for (const Lane& l : w.lanes) n.shared_written += l.address == none ? 0 : 16;
  });
}
inline void cp_async_commit() { ++emulate::worker->lane->groups; }
namespace emulate {
inline void land(const Async& a, const Warp& w) {
  if (a.valid) memcpy(&worker->shared[a.to], a.from, 16);
  else memset(&worker->shared[a.to], 0, 16);
  for (uint32_t i = a.to / 4; i < a.to / 4 + 4; ++i) {
    Word& s = worker->shadow[i];
    s.in_flight = false, s.write_epoch = worker->epoch, s.write_syncs = w.syncs, s.write_time = worker->time;
  }
}
}  // namespace emulate
template <int newest> inline void cp_async_wait() {
  using namespace emulate;
  Lane& me = *worker->lane;
  auto waits = [&](const Async& a) { return a.group >= me.groups - newest; };
  for (const Async& a : me.in_flight) {
    if (waits(a)) continue;
    land(a, *me.warp);
  }
  me.in_flight.erase(std::remove_if(me.in_flight.begin(), me.in_flight.end(), [&](auto& a) { return !waits(a); }),
                     me.in_flight.end());
}

// The end of a phase orders all that was done before for all that comes after, as a block_sync does: of threads that have
// not arrived, or do not wait, that is more than the GPU promises.
namespace emulate {
inline Mbarrier* mbarrier(uint32_t at) {
  auto found = worker->mbarriers.find(at);
  if (found == worker->mbarriers.end()) abandon_block("mbarrier nobody initialised", place(*worker->lane));
  return &found->second;
}
inline void arrive(Mbarrier& b, int arrivals) {
  b.missing -= arrivals;
  if (b.missing < 0) abandon_block("mbarrier", place(*worker->lane) + " arrives at a phase that is over");
  if (b.missing) return;
  for (auto& [lane, copy] : b.copies) {
    auto& flying = lane->in_flight;
    const auto same = [serial = copy.serial](const Async& a) { return a.serial == serial; };
    const auto it = std::find_if(flying.begin(), flying.end(), same);
    if (it == flying.end()) continue;  // landed by a wait_group, or with another mbarrier
    land(copy, *lane->warp);
    flying.erase(it);
  }
  b.copies.clear();
  b.missing = b.count, ++b.phase, ++worker->epoch;
}
}  // namespace emulate
inline void mbarrier_init(uint32_t at, int count) {
  auto& b = emulate::worker->mbarriers[at];
  b.count = b.missing = count;
}
inline void mbarrier_arrive(uint32_t at) {
  using namespace emulate;
  rendezvous(Op::arrive, [at](Warp&) { arrive(*mbarrier(at), 1); });
}
inline void mbarrier_arrive_with_copies(uint32_t at) {
  using namespace emulate;
  rendezvous(Op::arrive, [at](Warp& w) {
    Mbarrier& b = *mbarrier(at);
    for (Lane& l : w.lanes)
      for (const Async& a : l.in_flight) b.copies.push_back({&l, a});  // a wait_group may still be what brings them
    arrive(b, 32);
  });
}
inline void mbarrier_wait(uint32_t at, int phase) {
  using namespace emulate;
  rendezvous(Op::wait, [at, phase](Warp& w) {
    const Mbarrier& b = *mbarrier(at);
    ++w.syncs;
    if (phase_over(b, phase)) return;
    w.waits_for = &b, w.waits_phase = phase, w.resume = worker->lane->thread % 32;
    Warp* other = runnable_warp();
    if (!other) abandon_block("mbarrier", place(*worker->lane) + " waits for a phase that cannot end");
    switch_to(other->lanes[other->resume]);
    w.waits_for = nullptr;
  });
}

namespace emulate {
inline void ldmatrix(uint32_t (&r)[4], uint32_t row, bool trans) {
  Lane& me = *worker->lane;
  me.address = row;
  rendezvous(trans ? Op::ldmatrix_trans : Op::ldmatrix, [trans](Warp& w) {
    Counters& n = worker->count;
    ++n.ldmatrix;
    n.shared_read += 512;
    for (int m = 0; m < 4; ++m) {
      uint16_t tile[8][8];
      uint32_t rows[8];
      for (int i = 0; i < 8; ++i) {
        rows[i] = w.lanes[8 * m + i].address;
        memset(tile[i], 0xff, 16);
        if (!shared_in_range(rows[i], 16, "ldmatrix")) continue;
        note_read(w, Word::several, rows[i], 16, trans ? "ldmatrix.trans" : "ldmatrix");
        memcpy(tile[i], &worker->shared[rows[i]], 16);
      }
      n.ldmatrix_conflicts += conflicts(rows, 8);
      for (int l = 0; l < 32; ++l) {
        const int i = l / 4, j = l % 4 * 2;
        w.lanes[l].a[m] =
            trans ? tile[j][i] | uint32_t(tile[j + 1][i]) << 16 : tile[i][j] | uint32_t(tile[i][j + 1]) << 16;
      }
    }
  });
  memcpy(r, me.a, sizeof r);
}
}  // namespace emulate
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { emulate::ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { emulate::ldmatrix(r, row, true); }

inline void store_shared(uint32_t shared, uint32_t word, bool active) {
  using namespace emulate;
  Lane& me = *worker->lane;
  me.address = active ? shared : none;
  if (active && shared_in_range(shared, 4, "store_shared")) {
    note_write(me, shared, 4, false, "store_shared");
    memcpy(&worker->shared[shared], &word, 4);
  }
  rendezvous(Op::store_shared, [](Warp& w) {
    Counters& n = worker->count;
    ++n.store_shared;
    n.store_conflicts += word_conflicts(w);
    for (const Lane& l : w.lanes) n.shared_written += l.address == none ? 0 : 4;
  });
}
inline void store_shared(uint32_t shared, uint32_t word) { store_shared(shared, word, true); }
inline void store_shared(uint32_t shared, Word2 word, bool active) {
  using namespace emulate;
  Lane& me = *worker->lane;
  me.address = shared, me.active = active;
  if (active && shared_in_range(shared, 8, "store_shared")) {
    note_write(me, shared, 8, false, "store_shared");
    memcpy(&worker->shared[shared], &word, 8);
  }
  rendezvous(Op::store_shared, [](Warp& w) {
    Counters& n = worker->count;
    ++n.store_shared;
    n.store_conflicts += pair_conflicts(w);
    for (const Lane& l : w.lanes) n.shared_written += l.active ? 8 : 0;
  });
}
inline Word2 load_shared(uint32_t shared, bool active) {
  using namespace emulate;
  Lane& me = *worker->lane;
  me.address = shared, me.active = active;
  Word2 word{};
  if (active) memset(&word, 0xff, 8);
  if (active && shared_in_range(shared, 8, "load_shared")) {
    note_read(*me.warp, uint16_t(me.thread), shared, 8, "load_shared");
    memcpy(&word, &worker->shared[shared], 8);
  }
  rendezvous(Op::load_shared, [](Warp& w) {
    Counters& n = worker->count;
    n.store_conflicts += pair_conflicts(w);
    for (const Lane& l : w.lanes) n.shared_read += l.active ? 8 : 0;
  });
  return word;
}

inline Word4 load_shared_16(uint32_t shared) {
  using namespace emulate;
  Lane& me = *worker->lane;
  me.address = shared;
  Word4 word;
  memset(&word, 0xff, 16);
  if (shared_in_range(shared, 16, "load_shared_16")) {
    note_read(*me.warp, uint16_t(me.thread), shared, 16, "load_shared_16");
    memcpy(&word, &worker->shared[shared], 16);
  }
  rendezvous(Op::load_shared, [](Warp& w) {
    worker->count.shared_read += 512;
    for (int q = 0; q < 32; q += 8) {  // 8 lanes a pass
      uint32_t rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = w.lanes[q + i].address;
      worker->count.store_conflicts += conflicts(rows, 8);
    }
  });
  return word;
}
inline uint32_t load_shared(uint32_t shared) {
  using namespace emulate;
  Lane& me = *worker->lane;
  uint32_t word = ~0u;
  if (shared_in_range(shared, 4, "load_shared")) {
    note_read(*me.warp, uint16_t(me.thread), shared, 4, "load_shared");
    memcpy(&word, &worker->shared[shared], 4);
  }
  worker->count.shared_read += 4;
  return word;
}

template <class T> inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulate;
  Lane& me = *worker->lane;
  memcpy(me.a, a, sizeof a), memcpy(me.c, c, sizeof c);
  me.b[0] = b0, me.b[1] = b1;
  rendezvous(Op::mma, [](Warp& w) {
    ++worker->count.mma;
    float A[16][16], B[16][8], C[16][8];
    for (int l = 0; l < 32; ++l) {
      const Lane& x = w.lanes[l];
      const int g = l / 4, j = l % 4 * 2;
      for (int h = 0; h < 2; ++h) {  // lower and upper half of a register
        for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][j + h + i / 2 * 8] = widen<T>(uint16_t(x.a[i] >> 16 * h));
        for (int i = 0; i < 2; ++i) B[j + h + 8 * i][g] = widen<T>(uint16_t(x.b[i] >> 16 * h));
        for (int i = 0; i < 2; ++i) C[g + 8 * i][j + h] = x.c[2 * i + h];
      }
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) C[i][n] += A[i][k] * B[k][n];
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) w.lanes[l].c[i] = C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  });
  memcpy(c, me.c, sizeof c);
}

template <class T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&add)[4]) {
  float sum[4] = {add[0], add[1], add[2], add[3]};
  mma_m16n8k16<T>(sum, a, b0, b1);
  memcpy(c, sum, sizeof sum);
}

inline uint32_t shuffle_xor(uint32_t x, int mask) {
  using namespace emulate;
  Lane& me = *worker->lane;
  me.a[0] = x, me.address = uint32_t(mask);
  rendezvous(Op::shuffle, [](Warp& w) {
    ++worker->count.shuffles;
    for (int l = 0; l < 32; ++l) w.lanes[l].a[1] = w.lanes[(l ^ w.lanes[l].address) % 32].a[0];
  });
  return me.a[1];
}
inline float shuffle_xor(float x, int mask) { return emulate::from_bits(shuffle_xor(emulate::to_bits(x), mask)); }

inline float shuffle(float x, int lane) {
  using namespace emulate;
  Lane& me = *worker->lane;
  me.a[0] = to_bits(x), me.address = uint32_t(lane);
  rendezvous(Op::shuffle, [](Warp& w) {
    ++worker->count.shuffles;
    for (int l = 0; l < 32; ++l) w.lanes[l].a[1] = w.lanes[w.lanes[l].address % 32].a[0];
  });
  return from_bits(me.a[1]);
}
inline bool warp_any(bool x) {
  using namespace emulate;
  Lane& me = *worker->lane;
  me.a[0] = x;
  rendezvous(Op::vote, [](Warp& w) {
    uint32_t any = 0;
    for (const Lane& l : w.lanes) any |= l.a[0];
    for (Lane& l : w.lanes) l.a[1] = any;
  });
  return me.a[1];
}

inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float exp2_fast(float x) { return ++emulate::worker->count.exp2, std::exp2(x); }
template <class T> uint32_t pack(float low, float high);
template <> inline uint32_t pack<bf16>(float low, float high) {
  emulate::worker->lane->packed = true;
  return emulate::float_to_bf16(low) | uint32_t(emulate::float_to_bf16(high)) << 16;
}
template <> inline uint32_t pack<fp16>(float low, float high) {
  emulate::worker->lane->packed = true;
  return emulate::float_to_half(low) | uint32_t(emulate::float_to_half(high)) << 16;
}
template <class T> inline float unpack(uint32_t pair, int which) {
  return emulate::widen<T>(uint16_t(which ? pair >> 16 : pair));
}
inline float as_float(uint32_t x) { return emulate::from_bits(x); }
inline uint32_t as_word(float x) { return emulate::to_bits(x); }

template <class W> inline W load_global(const void* from, bool active) {
  using namespace emulate;
  Lane& me = *worker->lane;
  me.pointer = from, me.active = active;
  W w;
  memset(&w, active ? 0xff : 0, sizeof w);
  if (active && global_in_range(from, sizeof w, "load")) memcpy(&w, from, sizeof w);
  rendezvous(Op::load, [](Warp& warp) {
    worker->count.sectors_read += sectors(warp);
    worker->count.global_read += note_global(warp, sizeof(W), false);
  });
  return w;
}
template <class W> inline void store_global(void* to, W w, bool active) {
  using namespace emulate;
  Lane& me = *worker->lane;
  me.pointer = to, me.active = active;
  if (active && global_in_range(to, sizeof w, "store")) memcpy(to, &w, sizeof w);
  rendezvous(Op::store, [](Warp& warp) {
    worker->count.sectors_written += sectors(warp);
    worker->count.global_written += note_global(warp, sizeof(W), true);
  });
}

inline int load_constant(const int* from) { return *from; }

// ---- Hopper --------------------------------------------------------------------------------------------------------
constexpr bool has_wgmma = true;
inline bool wgmma_runs();
template <int count> inline void registers_give() {}
template <int count> inline void registers_take() {}

inline void barrier_sync(int id, int threads) {
  using namespace emulate;
  rendezvous(Op::barrier_sync, [id, threads](Warp& w) {
    Worker& k = *worker;
    if (id < 1 || id > 15 || threads % 32) abandon_block("barrier", place(*k.lane) + ": no such barrier_sync");
    ++w.syncs;
    w.resume = k.lane->thread % 32;
    w.at_barrier = true;
    w.barrier = id;
    if (++k.named[id] == threads / 32) {
      ++k.epoch;  // as of an mbarrier: more than the GPU promises those that are not part of it
      ++k.count.barriers;
      k.named.erase(id);
      for (auto& other : k.warps)
        if (other->at_barrier && other->barrier == id) other->at_barrier = false;
    } else if (Warp* other = runnable_warp()) {
      switch_to(other->lanes[other->resume]);
    } else {
      abandon_block("barrier", place(*k.lane) + " waits at a barrier_sync that others do not reach");
    }
  });
}

namespace emulate {
inline void stmatrix(uint32_t row, const uint32_t (&r)[4], bool trans) {
  Lane& me = *worker->lane;
  me.address = row;
  memcpy(me.a, r, sizeof r);
  rendezvous(Op::stmatrix, [trans](Warp& w) {
    Counters& n = worker->count;
    ++n.store_shared;
    n.shared_written += 512;
    for (int m = 0; m < 4; ++m) {
      uint32_t rows[8];
      for (int i = 0; i < 8; ++i) {
        Lane& owner = w.lanes[8 * m + i];
        rows[i] = owner.address;
        if (!shared_in_range(rows[i], 16, "stmatrix")) continue;
        note_write(owner, rows[i], 16, false, "stmatrix");
        for (int j = 0; j < 8; ++j) {
          const uint32_t pair = trans ? w.lanes[4 * j + i / 2].a[m] : w.lanes[4 * i + j / 2].a[m];
          const uint16_t bits = uint16_t(pair >> (trans ? i : j) % 2 * 16);
          memcpy(&worker->shared[rows[i] + 2 * j], &bits, 2);
        }
      }
      n.store_conflicts += conflicts(rows, 8);
    }
  });
}
}  // namespace emulate
inline void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) { emulate::stmatrix(row, r, false); }
inline void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) { emulate::stmatrix(row, r, true); }
}  // namespace vidla
#include "emulate_wgmma.h"
namespace vidla {

// The GPU that is played: VIDLA_EMULATE_ARCH 80 or 90, with VIDLA_EMULATE_SMS multiprocessors.
inline int multiprocessors() { return emulate::environment("VIDLA_EMULATE_SMS", 2); }
inline int architecture() { return emulate::environment("VIDLA_EMULATE_ARCH", 80); }
inline bool wgmma_runs() { return architecture() / 10 == 9; }
inline int shared_memory_limit() { return (architecture() == 80 ? 163 : architecture() / 10 == 9 ? 227 : 99) * 1024; }
template <auto kernel, class P> int launch(const char* name, int blocks, int threads, int shared, void*, P p) {
  if (shared > shared_memory_limit()) return 1;  // cudaErrorInvalidValue
  emulate::run(name, blocks, threads, shared, [=] { kernel(p); });
  return 0;
}
inline int device_status() { return 0; }
inline const char* error_name(int) { return "the emulated launch was refused"; }
inline void watch_buffer(const char* name, const void* base, int64_t bytes) {
  auto& all = emulate::record().buffers;
  all.erase(std::remove_if(all.begin(), all.end(), [&](auto& b) { return b.name == name; }), all.end());
  const size_t words = bytes / 4;
  all.push_back({name, static_cast<const char*>(base), bytes, std::vector<uint16_t>(words), std::vector<uint16_t>(words),
                 std::vector<int32_t>(words, -1)});
}
}  // namespace vidla

// Everything since the last call as JSON; the text stays valid until the next one.
extern "C" __attribute__((used, visibility("default"))) inline const char* vidla_emulation_report() {
  using namespace vidla::emulate;
  static std::string text;
  Record& r = record();
  auto field = [](const char* key, int64_t value) { return "\"" + std::string(key) + "\": " + std::to_string(value); };
  auto list = [](const std::vector<std::string>& parts) {
    std::string s;
    for (auto& p : parts) s += (s.empty() ? "" : ", ") + p;
    return s;
  };
  std::vector<std::string> kernels, buffers, errors, messages;
  for (auto& [kernel, c] : r.kernels)
    kernels.push_back(
        "\"" + kernel + "\": {" +
        list({field("blocks", c.blocks), field("mma", c.mma), field("exp2", c.exp2), field("shuffles", c.shuffles),
              field("barriers", c.barriers), field("warp_syncs", c.warp_syncs), field("ldmatrix", c.ldmatrix),
              field("ldmatrix_conflicts", c.ldmatrix_conflicts), field("cp_async", c.cp_async),
              field("cp_async_conflicts", c.cp_async_conflicts), field("store_shared", c.store_shared),
              field("store_conflicts", c.store_conflicts), field("wgmma", c.wgmma), field("shared_read", c.shared_read),
              field("shared_written", c.shared_written), field("global_read", c.global_read),
              field("global_written", c.global_written), field("sectors_read", c.sectors_read),
              field("sectors_written", c.sectors_written)}) +
        "}");
  for (auto& b : r.buffers) {
    int64_t read = 0, written = 0, all_read = 0, all_written = 0, most_read = 0, most_written = 0;
    for (auto n : b.reads) all_read += n, read += n > 0, most_read = std::max<int64_t>(most_read, n);
    for (auto n : b.writes) all_written += n, written += n > 0, most_written = std::max<int64_t>(most_written, n);
    buffers.push_back(
        "\"" + b.name + "\": {" +
        list({field("bytes", b.bytes), field("read", 4 * all_read), field("written", 4 * all_written),
              field("distinct_read", 4 * read), field("distinct_written", 4 * written),
              field("most_read", most_read), field("most_written", most_written)}) +
        "}");
  }
  for (auto& [kind, n] : r.errors) errors.push_back(field(kind.c_str(), n));
  for (auto& m : r.messages) messages.push_back("\"" + m + "\"");
  text = "{\"kernels\": {" + list(kernels) + "}, \"buffers\": {" + list(buffers) + "}, \"errors\": {" + list(errors) +
         "}, \"messages\": [" + list(messages) + "]}";
  r.kernels.clear(), r.buffers.clear(), r.errors.clear(), r.messages.clear(), r.told = 0;
  return text.c_str();
}
