// Hierarchical attention, backward: what its kernels share. The tilings with mma.sync are in hierarchical_bwd.cu, with the
// launchers and the kernel that adds up what summary tokens get; those with Hopper's wgmma in hierarchical_bwd_sm90.cuh and,
// for wider frames, hierarchical_bwd_sm90_wide.cuh.
#pragma once
#include "hierarchical.cuh"

#include <cstdio>

namespace vidla {

struct Gradient : Layout {
  const void *qkv, *out, *d_out;
  const float* lse;  // (B, H, S), base 2, as the forward leaves it
  void* d_qkv;
  float* partials;  // (B, H, segments, 3, G, D) summary tokens' dQ, dK, dV; dK and dV by key: MST, then CLS
  float* carry;     // (blocks, queries in whole chunks, D) dQ between turns; untouched where one turn is enough
  float scale, scale_log2;
  int blocks;    // of the grid; each takes every blocks-th (batch, segment, head)
  int segments, segment_frames;  // frames are taken up in segments of so many; the last may have fewer
  int turns, turn_tiles;         // over a frame's keys, so many tiles of 16 a turn; the last may have fewer
  bool sums_stay;  // in shared memory until the segment ends; else in `partials`

  VIDLA_HOST_DEVICE int units() const { return batch * segments * heads; }
};

// A frame to work on, and where its segment ends. Heads change fastest from block to block: they lie side by side.
struct Item {
  int unit, batch, head, frame, end;

  VIDLA_DEVICE static Item first(const Gradient& p, int unit) {
    const int begin = unit / p.heads % p.segments * p.segment_frames;
    const int end = begin + p.segment_frames < p.frames ? begin + p.segment_frames : p.frames;
    return {unit, unit / p.heads / p.segments, unit % p.heads, begin, end};
  }
  VIDLA_DEVICE Item next(const Gradient& p) const {
    if (frame + 1 == end) return first(p, unit + p.blocks);
    return {unit, batch, head, frame + 1, end};
  }
};

// Two columns of each of two neighbouring 8-column tiles; lanes trade so that each stores 4 columns, 4 lanes a full
// 32-byte sector. `to`: column 2 j of the 16, or 2 j + 6 where j is odd.
template <class T>
VIDLA_DEVICE void store_16_columns(T* to, const float* l, const float* r, float factor, bool active) {
  const bool odd = thread_index() & 1;
  const uint32_t left = pack<T>(l[0] * factor, l[1] * factor), right = pack<T>(r[0] * factor, r[1] * factor);
  const uint32_t other = shuffle_xor(odd ? left : right, 1);
  store_global(to, odd ? Word2{{other, right}} : Word2{{left, other}}, active);
}

}  // namespace vidla
