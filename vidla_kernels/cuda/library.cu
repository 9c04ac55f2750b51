// What the library says of itself: its errors in words, and the layout of Call, which the Python side mirrors.
#include "hierarchical.cuh"

VIDLA_EXPORT int vidla_call_bytes() { return sizeof(vidla::Call); }

// A launcher's return value in words; null for 0.
VIDLA_EXPORT const char* vidla_error_text(int status) {
  switch (status) {
    case 0: return nullptr;
    case vidla::bad_layout: return "a size that is not positive, 2**30 (batch, head, frame) or more, or a scale the kernel does not take";
    case vidla::unsupported_dim: return "there is no kernel for this head dimension";
    case vidla::unsupported_type: return "there is no kernel for this type";
    case vidla::small_workspace: return "the workspace is too small";
    case vidla::unknown_variant: return "there is no such variant for this head dimension";
    case vidla::misaligned: return "a pointer is not a multiple of 16 bytes, or a stride no multiple of 8 elements";
    case vidla::no_room: return "a frame's tables do not fit into this GPU's shared memory";
  }
  return status < 0 ? "an unknown status" : vidla::error_name(status);
}
