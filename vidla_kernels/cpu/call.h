// What Python hands over (cpu_binding.py, field by field), and what each version of the code offers.
#pragma once
#include <stdint.h>

namespace vidla {

enum Which : int32_t { TUBE_FORWARD, TUBE_BACKWARD, HIERARCHICAL_FORWARD, HIERARCHICAL_BACKWARD };

struct Call {
  const float *qkv, *d_out;  // (B, tokens, 3, H, D) and (B, tokens, H, D), strided, D contiguous
  float *out, *lse, *d_qkv;  // contiguous; lse (B, H, S) in base 2
  const int32_t* rows;       // (G, 3): of each summary row the summary keys first <= k < end, and the stride of its frames
  float* workspace;          // threads * workspace_floats
  int64_t qkv_batch, qkv_token, qkv_third, qkv_head, d_out_batch, d_out_token, d_out_head;  // strides in elements
  int32_t which, batch, heads, head_dim, frames, patches, summary, first_key, threads, version;
  float scale;
};

struct Version {
  int64_t (*workspace)(const Call&);                     // floats that a thread needs
  void (*run)(const Call&, int64_t unit, float* memory);  // a unit: a place of a clip (tube), a head of a clip (hierarchical)
  void (*exp2)(const float* x, float* y, int64_t count);  // for tests; count in whole vectors of 16
};

namespace baseline { extern const Version version; }
namespace avx2 { extern const Version version; }
namespace avx512 { extern const Version version; }

}  // namespace vidla
