"""Deliberate errors in the CUDA sources, for test_cuda_breaks.py. Each is text that stands there once, and what replaces it.

A change of the kernels that moves such a text makes the test say so: put the break where the text went.
"""

from typing import NamedTuple


class Break(NamedTuple):
    kernel: str  # forward or backward: whose library is built from the broken sources
    what: str
    old: str
    new: str
    seen_by: str = ""  # how it must be noticed: "emulation" raises, "values" are off, or "counters"; may be several
    quick: bool = False  # part of every run of the tests


BREAKS = (
    Break("forward", "keys are not waited for", "    mbarrier_wait(full + 8 * slot, n >> 1);\n", "", "emulation", quick=True),
    Break(
        "forward",
        "the wrong phase of keys is waited for",
        "mbarrier_wait(full + 8 * slot, n >> 1);",
        "mbarrier_wait(full + 8 * slot, (n >> 1) + 1);",
        "emulation",
    ),
    Break("forward", "copies do not arrive", "    mbarrier_arrive_with_copies(full + 8 * slot);\n", "", "emulation"),
    Break(
        "forward",
        "a stage is filled before all have left it",
        "      if (n) mbarrier_wait(empty + 8 * (slot ^ 1), (n - 1) >> 1);\n",
        "",
        "emulation",
        quick=True,
    ),
    Break(
        "forward",
        "a stage is left before its last use",
        "    mbarrier_wait(full + 8 * slot, n >> 1);\n",
        ("    mbarrier_wait(full + 8 * slot, n >> 1);\n    mbarrier_arrive(empty + 8 * slot);\n"),
        "emulation",
    ),
    Break("forward", "a stage is never left", "    mbarrier_arrive(empty + 8 * slot);\n", "", "emulation"),
    Break(
        "forward",
        "barriers in use before they are made",
        ("  block_sync();\n  fetch_keys(at, 0, 0);"),
        "  fetch_keys(at, 0, 0);",
        "emulation",
        quick=True,
    ),
    Break(
        "forward",
        "missing wait for the queries",
        ("        cp_async_wait<0>();\n        warp_sync();\n"),
        "        warp_sync();\n",
        "emulation",
        quick=True,
    ),
    Break(
        "forward",
        "wait for one group of queries too few",
        ("        cp_async_wait<0>();\n        warp_sync();\n"),
        ("        cp_async_wait<1>();\n        warp_sync();\n"),
        "emulation",
    ),
    Break(
        "forward",
        "missing warp sync after that wait",
        ("        cp_async_wait<0>();\n        warp_sync();\n"),
        "        cp_async_wait<0>();\n",
        "emulation",
    ),
    Break(
        "forward",
        "queries never committed",
        ("row < queries, unit < units);\n    }\n    cp_async_commit();\n"),
        ("row < queries, unit < units);\n    }\n"),
        "emulation",
    ),
    Break(
        "forward",
        "missing warp sync before the refill",
        "        warp_sync();  // all lanes have their fragments: the buffer is free\n",
        "",
        "emulation",
        quick=True,
    ),
    Break(
        "forward",
        "next keys over these",
        "next, last_piece ? 0 : piece + 1, slot ^ 1);",
        "next, last_piece ? 0 : piece + 1, slot);",
        "",
    ),
    Break("forward", "no swizzle", "    if (units % 8 == 0) unit ^= row & 7;\n", "", "counters", quick=True),
    Break(
        "forward",
        "swizzle on the writing side only",
        ("Rows<D>::at(lane % 16, lane / 16);\n      int key"),
        ("16 * (lane % 16 * Rows<D>::pitch + lane / 16);\n      int key"),
        "values",
        quick=True,
    ),
    Break("forward", "swizzle of 4 rows", "unit ^= row & 7;", "unit ^= row & 3;", "counters"),
    Break("forward", "no swizzle of 64-byte rows", "    if (units == 4) unit ^= row >> 1 & 3;\n", "", "counters"),
    Break(
        "forward",
        "mask: summary rows see summary keys in every frame",
        "return frame ? patches :",
        "return false ? patches :",
        "values",
        quick=True,
    ),
    Break(
        "forward",
        "mask: an MST row sees one key more than its level's",
        "(row - patches) + 1) - 1;",
        "(row - patches) + 1);",
        "values",
    ),
    Break("forward", "mask: every level sees every frame", "rows + 3 * summary_token + 2", "rows + 2", "values"),
    Break(
        "forward",
        "mask: a row that sees nothing weighs",
        "limit[i][h] ? -maximum[i][h] * p.scale_log2 : minus_infinity;",
        "-maximum[i][h] * p.scale_log2;",
        "values",
    ),
    Break(
        "forward",
        "tail: the last 16 keys lost",
        "for (; key < key_end; by(16))",
        "for (; key + 16 < key_end; by(16))",
        "values",
        quick=True,
    ),
    Break("forward", "tail: one key too many", ">= limit[i][e / 2 % 2]", "> limit[i][e / 2 % 2]", "values"),
    Break(
        "forward",
        "tail: padding of V is not zero",
        "from + 2 * p.qkv_third, key < keys,",
        "from + 2 * p.qkv_third, true,",
        "counters",
    ),
    Break(
        "forward",
        "tail: padding is not written",
        "row < count; row +=",
        "row < count && key_0 + row < keys; row +=",
        "emulation",
    ),
    Break("forward", "tail: one query too many", "p.token_bytes, row < queries,", "p.token_bytes, row <= queries,", "counters"),
    Break("forward", "lanes part ways", "          if (some_patches) {", "          if (row < p.patches) {", "emulation"),
    Break("forward", "outgrown sums are not scaled down", "          sum[i][h] *= shrink;\n", "", "values"),
    Break(
        "forward",
        "summary rows go on into the next clip",
        "at.left == 1 || at.frame + 1 == p.frames;",
        "at.left == 1;",
        "values",
    ),
    Break("forward", "summary rows start afresh with each frame", "p.carry && segment != at.frame;", "false;", "values"),
    Break(
        "forward",
        "combine: parts that nobody wrote",
        "(frame == 0 || p.starts_part(batch * p.frames + frame))",
        "true",
        "values",
    ),
    Break(
        "forward",
        "combine: CLS does not see itself",
        ("  if (token == 0) {\n    const T* cls"),
        ("  if (false) {\n    const T* cls"),
        "values",
    ),
    Break("backward", "missing barrier of a chunk", "      block_sync();  // chunk c", "      // chunk c", ""),
    Break(
        "backward", "missing barrier between the phases", "      if (buffers == 1 && c + 1 < chunks) block_sync();\n", "", ""
    ),
    Break("backward", "missing barrier before the last phase 2", ("    block_sync();\n    load_out"), "    load_out", ""),
    Break("backward", "missing barrier between rounds", "      if (round) block_sync();", "     ", ""),
    Break("backward", "missing wait for a chunk", "      cp_async_wait<stages - 2>();\n", "", ""),
    Break("backward", "wait for one group too few", "cp_async_wait<stages - 2>", "cp_async_wait<stages - 1>", ""),
    Break(
        "backward", "missing wait for the queries", ("    cp_async_wait<0>();\n    warp_sync();\n"), "    warp_sync();\n", ""
    ),
    Break(
        "backward",
        "missing warp sync after that wait",
        ("    cp_async_wait<0>();\n    warp_sync();\n"),
        "    cp_async_wait<0>();\n",
        "",
    ),
    Break("backward", "ring of one slot", "to_slot = to_slot + 1 < stages ? to_slot + 1 : 0", "to_slot = 0", ""),
    Break(
        "backward",
        "this item's keys for the next",
        "to_chunk = 0, to_item = item_of(++to_round)",
        "to_chunk = 0, ++to_round",
        "",
    ),
    Break(
        "backward", "next queries over this item's", "base + places.q(round % sets)", "base + places.q((round + 1) % sets)", ""
    ),
    Break(
        "backward",
        "next queries before the barrier",
        (
            "      block_sync();  // chunk c is there; phase 1 is done with chunk c - 1, phase 2 with chunk c - buffers\n"
            "      if (sets == 2 && c == 0 && round + 1 < rounds) fetch_queries(round + 1);\n"
        ),
        ("      if (sets == 2 && c == 0 && round + 1 < rounds) fetch_queries(round + 1);\n      block_sync();\n"),
        "",
    ),
    Break("backward", "output of another item", "    load_out(round + 1);", "    load_out(round);", ""),
    Break(
        "backward",
        "phase 2 reads the strips of phase 1",
        "const int buffer = c % buffers, local",
        "const int buffer = (c + 1) % buffers, local",
        "",
    ),
    Break("backward", "strips not transposed", "ldmatrix_x4_trans(a[i]", "ldmatrix_x4(a[i]", ""),
    Break(
        "backward",
        "strips swizzled on the reading side only",
        "Rows<chunk>::at(row + g, local / 8)",
        "(row + g) * Rows<chunk>::bytes + 2 * local",
        "",
    ),
    Break("backward", "no swizzle", "    if (units % 8 == 0) unit ^= row & 7;\n", "", ""),
    Break("backward", "no swizzle of 64-byte rows", "    if (units == 4) unit ^= row >> 1 & 3;\n", "", ""),
    Break("backward", "no delta", "(y[c] - delta[i][e % 2])", "y[c]", ""),
    Break(
        "backward",
        "delta of half a row",
        ("for (int e = 0; e < 4; ++e) {\n#pragma unroll\n            for"),
        ("for (int e = 0; e < 2; ++e) {\n#pragma unroll\n            for"),
        "",
    ),
    Break("backward", "rows that see nothing weigh", ": -minus_infinity;", ": 0.f;", ""),
    Break("backward", "lse in another base", "sees ? x : -minus_infinity", "sees ? x * log2_e : -minus_infinity", ""),
    Break("backward", "no mask", "          if (masked && key", "          if (false && key", ""),
    Break("backward", "mask: one key too many", ">= limit[i]", "> limit[i]", ""),
    Break("backward", "dP from V by Q", "t[i][1], d_out[i][d]", "t[i][1], q[i][d]", ""),
    Break("backward", "P and dS change places", "part == 1 ? places.d_s(buffer)", "part == 2 ? places.d_s(buffer)", ""),
    Break("backward", "dK without the scale", "part == 1 ? p.scale : 1;", "1;", ""),
    Break("backward", "a lone key tile lost", "} else if (count == 1) {", "} else if (false) {", ""),
    Break("backward", "last rows lost", "(left + 15) / 16 * 16", "left / 16 * 16", ""),
    Break("backward", "strips of 64-byte rows not swizzled", "Rows<chunk>::along(strip, e / 2)", "strip + 16 * (e / 2)", ""),
    Break("backward", "carry not taken up", "              if (turn) {", "              if (false) {", ""),
    Break("backward", "tail: keys past the end", "const bool valid = key < keys;", "const bool valid = key < padded;", ""),
    Break(
        "backward",
        "tail: one query too many",
        "const bool valid = first + row < queries;",
        "const bool valid = first + row <= queries;",
        "",
    ),
    Break("backward", "CLS does not see itself", "  if (token == 0) {  // CLS sees", "  if (false) {  // CLS sees", ""),
    Break("backward", "combine: CLS's key in every layout", "token == 0 && !p.patches_see_cls", "false", ""),
    Break("backward", "combine: unseen frames", ": !p.frame_visible(t, token)) continue", ": false) continue", ""),
    Break("backward", "lanes part ways", "if (first < p.patches) {  // some", "if (row < p.patches) {  // some", ""),
)
