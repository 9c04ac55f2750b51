// The library's functions, the choice of a version, and the threads of a call.
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

bool tube(const Call& call) { return call.pass == vidla::TUBE_FORWARD || call.pass == vidla::TUBE_BACKWARD; }

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

EXPORT int64_t vidla_cpu_workspace(const Call* call) { return versions[call->version]->workspace(*call); }

EXPORT void vidla_cpu_exp2(int32_t version, const float* x, float* y, int64_t count) { versions[version]->exp2(x, y, count); }

// Whoever is free takes the next few units: which thread does a unit changes no bit of it.
EXPORT void vidla_cpu_run(const Call* call) {
  const Version& version = *versions[call->version];
  const int64_t floats = version.workspace(*call);
  const int64_t units = int64_t(call->batch) * (tube(*call) ? call->patches : call->heads);
  const int64_t few = tube(*call) ? units / (16 * call->threads) + 1 : 1;
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t thread) {
    for (int64_t unit; (unit = next.fetch_add(few)) < units;)
      for (int64_t end = unit + few < units ? unit + few : units; unit < end; ++unit)
        version.run(*call, unit, call->workspace + thread * floats);
  };
  std::vector<std::thread> others;
  try {
    for (int64_t thread = 1; thread < call->threads; ++thread) others.emplace_back(work, thread);
  } catch (const std::system_error&) {  // no thread to be had: those that there are do it all
  }
  work(0);
  for (std::thread& other : others) other.join();
}
