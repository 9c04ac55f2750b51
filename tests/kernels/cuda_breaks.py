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
    Break("forward", "keys are not waited for", "    mbarrier_wait(full + 8 * slot, phase);\n", "", "emulation", quick=True),
    Break(
        "forward",
        "the wrong phase of keys is waited for",
        "mbarrier_wait(full + 8 * slot, phase);",
        "mbarrier_wait(full + 8 * slot, phase ^ 1);",
        "emulation",
    ),
    Break("forward", "copies do not arrive", "      mbarrier_arrive_with_copies(full + 8 * slot);\n", "", "emulation"),
    Break(
        "forward",
        "a stage is filled before all have left it",
        "      if (n >= p.stages) mbarrier_wait(empty + 8 * slot, phase ^ 1);\n",
        "",
        "emulation",
        quick=True,
    ),
    Break(
        "forward",
        "a stage is left before its last use",
        "    mbarrier_wait(full + 8 * slot, phase);\n",
        ("    mbarrier_wait(full + 8 * slot, phase);\n    mbarrier_arrive(empty + 8 * slot);\n"),
        "emulation",
    ),
    Break("forward", "a stage is never left", "    mbarrier_arrive(empty + 8 * slot);\n", "", "emulation"),
    Break(
        "forward",
        "barriers in use before they are made",
        "  block_sync();\n\n  // A step",
        "\n  // A step",
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
        "limit[i][h] = at.frame == 0 ? p.patches",
        "limit[i][h] = true ? p.patches",
        "values",
        quick=True,
    ),
    Break(
        "forward",
        "mask: an MST row sees one key more than its level's",
        "p.patches + load_shared(entry) - 1",
        "p.patches + load_shared(entry)",
        "values",
    ),
    Break("forward", "mask: every level sees every frame", "load_constant(row + 2));", "1);", "values"),
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
        "v_from + from, key < keys, active",
        "v_from + from, true, active",
        "counters",
    ),
    Break(
        "forward",
        "tail: padding is not written",
        "const bool active = row < count && unit < units;",
        "const bool active = row < count && key < keys && unit < units;",
        "emulation",
    ),
    Break("forward", "tail: one query too many", "p.token_bytes, row < queries,", "p.token_bytes, row <= queries,", "counters"),
    Break("forward", "lanes part ways", "          if (some_patches) {", "          if (row < p.patches) {", "emulation"),
    Break("forward", "outgrown sums are not scaled down", "          sum[i][h] *= shrink;\n", "", "values"),
    Break(
        "forward",
        "summary rows go on into the next clip",
        "p.carry && segment_batch == at.batch;",
        "p.carry && segment_batch >= 0;",
        "values",
    ),
    Break("forward", "summary rows start afresh with each frame", "p.carry && segment_batch == at.batch;", "false;", "values"),
    Break(
        "forward",
        "combine: parts that nobody wrote",
        "frame < p.frames && p.starts_part(batch, frame);",
        "frame < p.frames;",
        "values",
    ),
    Break(
        "forward",
        "combine: CLS does not see itself",
        ("  if (token == 0) {\n    const T* cls"),
        ("  if (false) {\n    const T* cls"),
        "values",
    ),
    Break(
        "backward",
        "missing barrier after the tables are filled",
        ("    cp_async_wait<0>();\n    block_sync();  // Q, dO"),
        "    cp_async_wait<0>();  // Q, dO",
        "emulation",
    ),
    Break(
        "backward",
        "missing wait for the tables",
        ("    cp_async_wait<0>();\n    block_sync();  // Q, dO"),
        "    block_sync();  // Q, dO",
        "emulation",
    ),
    Break(
        "backward",
        "missing barrier of a chunk",
        ("        cp_async_wait<0>();\n        block_sync();  // chunk c"),
        "        cp_async_wait<0>();  // chunk c",
        "emulation",
        quick=True,
    ),
    Break(
        "backward",
        "missing wait for a chunk",
        ("        cp_async_wait<0>();\n        block_sync();  // chunk c"),
        "        block_sync();  // chunk c",
        "emulation",
        quick=True,
    ),
    Break(
        "backward",
        "wait for a chunk after the barrier",
        ("        cp_async_wait<0>();\n        block_sync();  // chunk c"),
        ("        block_sync();\n        cp_async_wait<0>();  // chunk c"),
        "emulation",
    ),
    Break(
        "backward",
        "wait for one group too few",
        ("        cp_async_wait<0>();\n        block_sync();  // chunk c"),
        ("        cp_async_wait<1>();\n        block_sync();  // chunk c"),
        "emulation",
    ),
    Break(
        "backward",
        "missing barrier between the phases",
        "      if (C::buffers == 1 && c + 1 < chunks) block_sync();\n",
        "",
        "emulation",
        quick=True,
    ),
    Break(
        "backward",
        "missing barrier before the last phase 2",
        ("    block_sync();\n    phase_2(chunks - 1);"),
        "    phase_2(chunks - 1);",
        "emulation",
    ),
    Break(
        "backward",
        "missing barrier before one set is filled again",
        "      block_sync();  // phase 2 has read the tables and the strips\n",
        "",
        "emulation",
    ),
    Break(
        "backward",
        "missing barrier before sums go out",
        ("      block_sync();\n#pragma unroll 1\n      for (int i = not_ahead(thread); i < (3"),
        ("#pragma unroll 1\n      for (int i = not_ahead(thread); i < (3"),
        "emulation",
    ),
    Break("backward", "ring of one slot", "more ? c + 1 : 0, 1 - slot);", "more ? c + 1 : 0, slot);", "emulation"),
    Break("backward", "this frame's keys for the next", "fetch_keys(more ? item : next,", "fetch_keys(item,", "emulation"),
    Break("backward", "next queries over these", "next_turn, 1 - set, from, to);", "next_turn, set, from, to);", "emulation"),
    Break(
        "backward", "a part of the next queries is not fetched", "c < parts) fetch_queries", "c + 1 < parts) fetch_queries", ""
    ),
    Break(
        "backward",
        "output of another frame",
        "load_rows(next.unit < p.units() ? next : item, next_turn);",
        "load_rows(item, turn);",
        "values",
    ),
    Break(
        "backward",
        "phase 2 reads the strips of phase 1",
        "strips_at = base + C::strips_at + c % C::buffers",
        "strips_at = base + C::strips_at + (c + 1) % C::buffers",
        "",
    ),
    Break(
        "backward", "strips are not transposed", "ldmatrix_x4_trans(a[i], a_at[i]);", "ldmatrix_x4(a[i], a_at[i]);", "values"
    ),
    Break(
        "backward",
        "strips swizzled on the reading side only",
        "const uint32_t ds_at = C::Strip::along(strip_at, local / 8);",
        "const uint32_t ds_at = strip_at + 2 * local;",
        "emulation",
        quick=True,
    ),
    Break("backward", "no swizzle", "    if (units % 8 == 0) unit ^= row & 7;\n", "", "counters"),
    Break("backward", "no swizzle of 64-byte rows", "    if (units == 4) unit ^= row >> 1 & 3;\n", "", "counters"),
    Break(
        "backward", "summary sums on the same banks", "(column + 8 * (D == 32 ? token >> 1 : token)) % D", "column", "counters"
    ),
    Break("backward", "no delta", "own.minus_delta[i][2 * h + 1] = -delta;", "own.minus_delta[i][2 * h + 1] = 0;", "values"),
    Break("backward", "delta of another row", "          delta += shuffle_xor(delta, 2);\n", "", "values"),
    Break("backward", "rows that see nothing weigh", "own.lse[i][h] = -minus_infinity;", "own.lse[i][h] = 0;", "values"),
    Break(
        "backward",
        "lse in another base",
        "own.lse[i][h] = next_lse[i][h];",
        "own.lse[i][h] = next_lse[i][h] * log2_e;",
        "values",
    ),
    Break("backward", "no mask", "if (masked && e / 2", "if (false && e / 2", "values", quick=True),
    Break(
        "backward",
        "mask: summary rows see summary keys in every frame",
        "return frame ? patches :",
        "return false ? patches :",
        "values",
    ),
    Break(
        "backward",
        "mask: an MST row sees one key more than its level's",
        "(row - patches) + 1) - 1;",
        "(row - patches) + 1);",
        "values",
    ),
    Break("backward", "mask: one key too many", "+ c >= limits[", "+ c > limits[", "values"),
    Break("backward", "dP from Q", "d_out[i][d], b[2], b[3], d ? t[i][1]", "q[i][d], b[2], b[3], d ? t[i][1]", "values"),
    Break(
        "backward", "P and dS change places", "(part == 1 ? 0 : C::p_after_ds);", "(part == 2 ? 0 : C::p_after_ds);", "values"
    ),
    Break("backward", "dK without the scale", "part == 1 ? p.scale : 1;", "1;", "values"),
    Break(
        "backward",
        "tail: the last 16 keys lost",
        "half < 32 && key0 + half < padded;",
        "half < 32 && key0 + half + 16 < padded;",
        "emulation",
        quick=True,
    ),
    Break("backward", "tail: the last rows lost", "(left + 15) / 16 * 16", "left / 16 * 16", "values"),
    Break(
        "backward",
        "tail: one row too many",
        "const bool valid = number < end;",
        "const bool valid = number <= end;",
        "counters",
    ),
    Break(
        "backward",
        "carry is not taken up",
        "load_global<Word2>(at(i, c), turn > 0);",
        "load_global<Word2>(at(i, c), false);",
        "values",
    ),
    Break(
        "backward",
        "a segment's sums start anew with each frame",
        "const bool more = active && !opens;",
        "const bool more = active && false;",
        "values",
    ),
    Break(
        "backward",
        "a segment's sums start from what was there",
        "const bool more = active && !opens;",
        "const bool more = active;",
        "emulation",
    ),
    Break(
        "backward",
        "combine: CLS does not see itself",
        "  if (token == 0) {  // CLS sees",
        "  if (false) {  // CLS sees",
        "values",
    ),
    Break(
        "backward", "combine: CLS's key in every layout", "if (part == 0 || token || p.patches_see_cls)", "if (true)", "values"
    ),
    Break(
        "backward",
        "combine: the first segment alone",
        "for (int s = 0; s < p.segments; ++s)",
        "for (int s = 0; s < 1; ++s)",
        "values",
    ),
    Break(
        "backward", "lanes part ways", "        if (first + 8 * i < p.patches) {", "        if (row < p.patches) {", "emulation"
    ),
)
