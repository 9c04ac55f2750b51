// What the library says of itself: what it was built from, whether it can work here, its errors in words.
#include "hierarchical.cuh"

#ifndef VIDLA_SOURCES
#define VIDLA_SOURCES ""
#endif

// The hash of the sources (CMakeLists.txt), or nothing.
VIDLA_EXPORT const char* vidla_sources() { return VIDLA_SOURCES; }

// Of the current device: 0, or the cudaError_t that keeps it from being asked anything (an old driver, for one).
VIDLA_EXPORT int vidla_device_status() { return vidla::device_status(); }

// A launcher's return value in words.
VIDLA_EXPORT const char* vidla_error_text(int status) {
  switch (status) {
    case vidla::bad_layout: return "a size or scale that is not positive, 2**30 frames in all, or tokens 2**24 numbers apart";
    case vidla::unsupported_dim: return "there is no kernel for this head dimension";
    case vidla::unsupported_type: return "there is no kernel for this dtype";
    case vidla::small_workspace: return "the workspace is too small";
    case vidla::unknown_variant: return "there is no such variant for this head dimension";
    case vidla::misaligned: return "a pointer is no multiple of 16 bytes, or a stride no multiple of 8 elements";
    case vidla::other_gpu: return "this tiling is for H100 (compute capability 9.x), which multiplies from shared memory";
    case vidla::no_room: return "a frame's tables do not fit into this GPU's shared memory";
  }
  return status < 0 ? "an unknown status" : vidla::error_name(status);
}
