// Hierarchical attention: who sees whom, and how a table of rows lies in shared memory. Forward and backward share it.
//
// A block owns one (batch, head, frame). Its keys are the frame's N patches, then the U*V MST tokens by level, then CLS
// if patches see it. In that order every query row sees a prefix of them:
//     patch row                    all keys
//     CLS row                      N patches; in frame 0 the MST tokens as well
//     MST row of level u           N patches; in frame 0 the MST tokens of levels 0..u as well
// so the whole visibility rule is one number a row, its limit. Its queries are the N patches, then the G = 1 + U*V
// summary tokens. CLS's own key belongs to no frame: the combine kernels add it.
//
// Names: g, j = lane / 4, lane % 4 (the row and column pair a lane holds in an mma tile); _at = byte offset in shared
// memory; row, key = index in the block's queries, keys; token = index in the sequence.
#pragma once
#include "device.cuh"

namespace vidla {

struct Layout {
  int batch, heads, frames, patches, levels, tokens_per_level, temporal_scale, patches_see_cls;

  VIDLA_HOST_DEVICE int mst() const { return levels * tokens_per_level; }
  VIDLA_HOST_DEVICE int summary() const { return 1 + mst(); }
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
  VIDLA_HOST_DEVICE int level(int mst_token) const { return (mst_token - 1) / tokens_per_level; }
  // The row sees keys 0 .. limit-1. Spare rows of the last tile count as patches.
  VIDLA_HOST_DEVICE int limit(int frame, int row) const {
    if (row < patches || row >= queries()) return keys();
    if (frame > 0) return patches;
    return row == patches ? patches + mst() : patches + (level(row - patches) + 1) * tokens_per_level;
  }
  VIDLA_HOST_DEVICE bool frame_visible(int frame, int summary_token) const {
    if (summary_token == 0) return true;
    int stride = 1;
    for (int u = level(summary_token); u > 0 && stride < frames; --u) stride *= temporal_scale;
    return frame % stride == 0;
  }
};

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

enum Status {
  bad_layout = -1,
  unsupported_dim = -2,
  unsupported_type = -3,
  small_workspace = -4,
  unknown_variant = -5
};
}  // namespace vidla

#define VIDLA_EXPORT extern "C" __attribute__((visibility("default")))
