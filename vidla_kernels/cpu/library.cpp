// The library's functions, the choice of a version, and the threads of a call.
#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "call.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using vidla::Call;
using vidla::Version;

const Version* versions[] = {&vidla::baseline::version,
#if defined(__x86_64__)
                             &vidla::avx2::version, &vidla::avx512::version
#endif
};

constexpr double WORTH_A_THREAD = 1 << 21;  // multiply-adds, some 50 us: to start a thread takes about as long

bool tube(const Call& call) { return call.which == vidla::TUBE_FORWARD || call.which == vidla::TUBE_BACKWARD; }

int64_t units(const Call& call) { return int64_t(call.batch) * (tube(call) ? call.patches : call.heads); }

}  // namespace

// The best version that this processor runs: 0 is what every one runs, 1 takes AVX2 and FMA, 2 takes AVX-512.
EXPORT int32_t vidla_cpu_best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// What the library was built from (CMakeLists.txt).
EXPORT const char* vidla_cpu_sources() { return VIDLA_SOURCES; }

EXPORT void vidla_cpu_exp2(int32_t version, const float* x, float* y, int64_t count) { versions[version]->exp2(x, y, count); }

// Lowers call.threads to what the call is worth, and returns how many floats of memory it needs.
EXPORT int64_t vidla_cpu_plan(Call* call) {
  const double keys = tube(*call) ? call->frames : call->patches + 2 * call->summary;
  const double products = double(units(*call)) * (tube(*call) ? call->heads : call->frames) * keys * keys * call->head_dim * 2;
  call->threads = int32_t(std::min({double(call->threads), double(units(*call)), 1 + products / WORTH_A_THREAD}));
  return call->threads * versions[call->version]->workspace(*call);
}

// OpenMP's entry to a parallel region, as compilers call it: GOMP_parallel(work, data, threads, flags).
using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Whoever is free takes the next few units: which thread does a unit changes no bit of it. `region` is that of the OpenMP
// runtime that torch has loaded; its threads wait for torch's next operation by spinning, and would be in the way of others.
// Where it is null, threads are started for the call.
EXPORT void vidla_cpu_run(const Call* call, Region region) {
  const Version& version = *versions[call->version];
  const int64_t floats = version.workspace(*call), end = units(*call);
  const int64_t few = tube(*call) ? end / (16 * call->threads) + 1 : 1;  // neighbouring places share pages
  std::atomic<int64_t> next{0}, threads{0};
  auto work = [&] {
    const int64_t thread = threads++;
    if (thread >= call->threads) return;
    for (int64_t unit; (unit = next.fetch_add(few)) < end;)
      for (int64_t i = unit; i < std::min(unit + few, end); ++i) version.run(*call, i, call->workspace + thread * floats);
  };
  if (region && call->threads > 1)
    return region([](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work, unsigned(call->threads), 0);
  std::vector<std::thread> others;
  try {
    for (int64_t thread = 1; thread < call->threads; ++thread) others.emplace_back(work);
  } catch (const std::system_error&) {  // no thread to be had: those that there are do it all
  }
  work();
  for (std::thread& other : others) other.join();
}
