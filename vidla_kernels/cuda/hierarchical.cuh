// Hierarchical attention: who sees whom, and how a table of rows lies in shared memory. Forward and backward share it.
//
// A block owns one (batch, head, frame). Its keys are the frame's N patches, then the U*V MST tokens by level, then CLS
// if patches see it. In that order every query row sees a prefix of them, so the whole visibility rule is one number a
// row, its limit: all keys for a patch; for a summary row the N patches, and in frame 0 the summary keys up to its `end`
// as well. Its queries are the N patches, then the G summary tokens. CLS's own key belongs to no frame: the combine
// kernels add it. Which summary row ends where, and which frames it sees, is a table in device memory, `rows`, written
// by vidla_kernels.layout.TokenLayout: nothing here knows levels.
//
// Names: g, j = lane / 4, lane % 4 (the row and column pair a lane holds in an mma tile); _at = byte offset in shared
// memory; row, key = index in the block's queries, keys; token = index in the sequence.
#pragma once
#include "device.cuh"

namespace vidla {

VIDLA_HOST_DEVICE int least(int a, int b) { return a < b ? a : b; }

// The arguments of every launcher and of every workspace query. vidla_kernels/cuda_binding.py mirrors it field by field.
// Strides in elements. out, d_out (B, S, H, D) and d_qkv (B, S, 3, H, D) are contiguous; qkv's rows of D are, and begin at
// multiples of 16 bytes, which makes every stride a multiple of 8.
struct Call {
  const void* qkv;
  void* out;         // forward writes it, backward reads it
  float* lse;        // (B, H, S), base 2: log2(sum exp(scale * score)); forward writes it, backward reads it
  const void* d_out;
  void* d_qkv;
  void* workspace;   // at least as many bytes as the workspace query asks for
  const int* rows;   // TokenLayout.summary_rows in device memory, (G, 3): first summary key, end, stride of frames
  int64_t workspace_bytes;
  int64_t qkv_batch, qkv_token, qkv_third, qkv_head;
  int32_t type;      // 0 bf16, 1 fp16
  int32_t batch, heads, head_dim, frames, patches, summary, patches_see_cls;
  int32_t variant;   // -1: the source's own choice for this architecture and shape
  float scale;       // forward: > 0
};

enum Status {  // what a launcher returns beside 0 and a cudaError_t (> 0); words: library.cu
  bad_layout = -1,
  unsupported_dim = -2,
  unsupported_type = -3,
  small_workspace = -4,
  unknown_variant = -5,
  misaligned = -6,
  no_room = -7,
  other_gpu = -8
};

struct Layout {
  int batch, heads, frames, patches, summary_tokens, patches_see_cls;
  const int* rows;
  int64_t qkv_batch, qkv_token, qkv_third, qkv_head;

  VIDLA_HOST_DEVICE int summary() const { return summary_tokens; }
  VIDLA_HOST_DEVICE int mst() const { return summary_tokens - 1; }
  VIDLA_HOST_DEVICE int sequence() const { return summary() + frames * patches; }
  VIDLA_HOST_DEVICE int keys() const { return patches + mst() + patches_see_cls; }
  VIDLA_HOST_DEVICE int padded_keys() const { return (keys() + 15) / 16 * 16; }
  VIDLA_HOST_DEVICE int queries() const { return patches + summary(); }
  VIDLA_HOST_DEVICE int query_token(int frame, int row) const {
    return row < patches ? summary() + frame * patches + row : row - patches;
  }
  VIDLA_HOST_DEVICE int key_token(int frame, int key) const {
    return key < patches ? summary() + frame * patches + key : key < patches + mst() ? 1 + key - patches : 0;
  }
  // The row sees keys 0 .. limit-1. Spare rows of the last tile count as patches.
  VIDLA_DEVICE int limit(int frame, int row) const {
    if (row < patches || row >= queries()) return keys();
    return frame ? patches : patches + load_constant(rows + 3 * (row - patches) + 1) - 1;
  }
  VIDLA_DEVICE bool frame_visible(int frame, int summary_token) const {
    return frame % load_constant(rows + 3 * summary_token + 2) == 0;
  }
};

inline Layout layout_of(const Call& c) {
  return {c.batch, c.heads, c.frames, c.patches, c.summary, c.patches_see_cls, c.rows,
          c.qkv_batch, c.qkv_token, c.qkv_third, c.qkv_head};
}

// 0, or why no kernel can take this call.
inline int wrong_sizes(const Call& c) {
  const bool sizes = c.batch > 0 && c.heads > 0 && c.frames > 0 && c.patches > 0 && c.summary > 0;
  if (!sizes || c.scale != c.scale || int64_t(c.batch) * c.heads * c.frames >= 1 << 30) return bad_layout;
  return c.type == 0 || c.type == 1 ? 0 : unsupported_type;
}
inline int wrong_pointers(const Call& c, int64_t workspace_needed) {
  const void* all[] = {c.qkv, c.out, c.lse, c.workspace, c.d_out, c.d_qkv};
  for (const void* p : all)
    if (reinterpret_cast<uintptr_t>(p) % 16) return misaligned;
  for (int64_t stride : {c.qkv_batch, c.qkv_token, c.qkv_third, c.qkv_head})
    if (stride % 8) return misaligned;
  return c.workspace_bytes < workspace_needed ? small_workspace : 0;
}

// For the emulation: the stretches of memory this call may touch.
inline void watch_buffers(const Call& c) {
  const int64_t S = c.summary + int64_t(c.frames) * c.patches, unit = c.batch * S * c.heads * c.head_dim * 2;
  watch_buffer("qkv", c.qkv, 2 * ((c.batch - 1) * c.qkv_batch + (S - 1) * c.qkv_token + 2 * c.qkv_third +
                                  (c.heads - 1) * c.qkv_head + c.head_dim));
  watch_buffer("out", c.out, unit);
  watch_buffer("lse", c.lse, c.batch * c.heads * S * 4);
  if (c.d_out) watch_buffer("d_out", c.d_out, unit);
  if (c.d_qkv) watch_buffer("d_qkv", c.d_qkv, 3 * unit);
  watch_buffer("workspace", c.workspace, c.workspace_bytes);
}

// A table of rows of D 16-bit numbers in shared memory, in units of 16 bytes. The 8 rows of an ldmatrix phase fall on
// the 8 bank groups: units change places where the rows fill whole 128-byte lines (D 32, 64, 128), and an odd pitch
// does it elsewhere (D 80, 96; there a cp.async phase, 8 units in a row, pays one pass more where it crosses a row).
template <int D> struct Rows {
  static constexpr int units = D / 8;
  static constexpr int pitch = units % 8 == 0 || units == 4 ? units : units | 1;
  static constexpr int bytes = 16 * pitch;
  VIDLA_HOST_DEVICE static int at(int row, int unit) {
    if (units % 8 == 0) unit ^= row & 7;
    if (units == 4) unit ^= row >> 1 & 3;
    return 16 * (row * pitch + unit);
  }
  // From an address, `further` units along its row; the unit it stands for has zeros in the bits `further` has ones in.
  // Needs the table at a multiple of a row pair's bytes. One exclusive or, so no address need be kept.
  VIDLA_HOST_DEVICE static uint32_t along(uint32_t at, int further) {
    return units % 8 == 0 || units == 4 ? at ^ 16 * further : at + 16 * further;
  }
};

constexpr float minus_infinity = -__builtin_huge_valf();
constexpr float log2_e = 1.44269504088896f;

}  // namespace vidla

#define VIDLA_EXPORT extern "C" __attribute__((visibility("default")))
