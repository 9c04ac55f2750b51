// Vectors of W floats by the compiler's vector extensions, and what is built of them: 2^x, log2, small products, transposes.
// Compiled once for each instruction set, each time into a namespace of its own (VIDLA_VERSION). No header of the standard
// library with inline functions is included: the linker keeps one copy of such a function, perhaps the one that needs AVX-512.
#pragma once
#include <stdint.h>

namespace vidla {
namespace VIDLA_VERSION {

#if defined(__AVX512F__)
constexpr int W = 16, COLUMNS = 4;  // 24 sums, 4 vectors and a broadcast fit 32 registers
#elif defined(__AVX__)
constexpr int W = 8, COLUMNS = 2;  // 12 sums in 16 registers
#else
constexpr int W = 4, COLUMNS = 2;
#endif
constexpr int ROWS = 6;

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef float Four __attribute__((vector_size(16)));
template <class V> struct Loose { V x; } __attribute__((packed, may_alias));  // at any address

template <class V = Vec> inline V load(const float* x) { return reinterpret_cast<const Loose<V>*>(x)->x; }
template <class V> inline void store(float* x, V value) { reinterpret_cast<Loose<V>*>(x)->x = value; }
inline Vec splat(float x) { return x - Vec{}; }
inline Vec largest(Vec x, Vec y) { return x > y ? x : y; }  // y where one is NaN

// 2^x for x < 128, 0 below -126.5. Within 1.25 ulp: a polynomial on [-1/2, 1/2], error 2e-9, times a power of two.
inline Vec exp2(Vec x) {
  const Vec round = splat(12582912.f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = largest(splat(-127.f), x);        // NaN stays NaN
  Vec shifted = x + round;
  Vec f = x - (shifted - round);
  Vec p = f * 1.5345812e-4f + 1.339993e-3f;
  p = p * f + 9.618489e-3f;
  p = p * f + 5.5503286e-2f;
  p = p * f + 2.4022646e-1f;
  p = p * f + 6.931472e-1f;
  p = p * f + 1.f;
  return p * (Vec)(((Ints)shifted + 127) << 23);
}

// log2 of x >= 1: the bits give a first guess (within 0.09), and each step of Newton's for 2^y = x squares its error.
inline Vec log2(Vec x) {
  Vec y = __builtin_convertvector((Ints)x, Vec) * (1.f / 8388608) - 127.f;
  for (int step = 0; step < 3; ++step) y += (x * exp2(-y) - 1.f) * 1.44269504f;
  return y;
}

// c (R, C*W) (+)= a (R, depth) * b (depth, C*W), all sums in registers: each over `depth` in order, whatever the tile.
template <int R, int C>
void tile(int depth, const float* a, long a_row, long a_step, const float* b, long b_row, float* c, long c_row, bool add) {
  Vec sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) sum[r][j] = Vec{};
  for (int k = 0; k < depth; ++k, a += a_step, b += b_row) {
    Vec right[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) right[j] = load(b + j * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec left = splat(a[r * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sum[r][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      float* at = c + r * c_row + j * W;
      store(at, add ? load(at) + sum[r][j] : sum[r][j]);
    }
}

template <int C> using Tile = void (*)(int, const float*, long, long, const float*, long, float*, long, bool);

template <int C>
void column(int rows, int depth, const float* a, long a_row, long a_step, const float* b, long b_row, float* c, long c_row,
            bool add) {
  static constexpr Tile<C> tiles[ROWS] = {tile<1, C>, tile<2, C>, tile<3, C>, tile<4, C>, tile<5, C>, tile<6, C>};
  for (int left = (rows + ROWS - 1) / ROWS; left; --left) {  // as even as can be: 49 rows are no 8 * 6 and a lone one
    int height = (rows + left - 1) / left;
    tiles[height - 1](depth, a, a_row, a_step, b, b_row, c, c_row, add);
    a += height * a_row, c += height * c_row, rows -= height;
  }
}

// c (rows, vectors*W) (+)= a (rows, depth) * b (depth, vectors*W). `a` has any strides, b and c have rows of whole vectors.
inline void product(int rows, int vectors, int depth, const float* a, long a_row, long a_step, const float* b, long b_row,
                    float* c, long c_row, bool add = false) {
  for (; vectors > 0; vectors -= COLUMNS, b += COLUMNS * W, c += COLUMNS * W) switch (vectors) {
      case 1: column<1>(rows, depth, a, a_row, a_step, b, b_row, c, c_row, add); break;
#if defined(__AVX512F__)
      case 2: column<2>(rows, depth, a, a_row, a_step, b, b_row, c, c_row, add); break;
      case 3: column<3>(rows, depth, a, a_row, a_step, b, b_row, c, c_row, add); break;
#endif
      default: column<COLUMNS>(rows, depth, a, a_row, a_step, b, b_row, c, c_row, add);
    }
}

#if defined(__clang__)
#define VIDLA_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define VIDLA_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Ints4{__VA_ARGS__})
#endif
typedef int32_t Ints4 __attribute__((vector_size(16)));

// to (columns, to_row) = factor * x (rows, columns) transposed; both sizes rounded up to four.
inline void transpose(const float* x, long x_row, int rows, int columns, float factor, float* to, long to_row) {
  for (int i = 0; i < rows; i += 4)
    for (int j = 0; j < columns; j += 4) {
      const float* from = x + i * x_row + j;
      Four a = load<Four>(from), b = load<Four>(from + x_row), c = load<Four>(from + 2 * x_row), d = load<Four>(from + 3 * x_row);
      Four ab = VIDLA_SHUFFLE(a, b, 0, 4, 1, 5), AB = VIDLA_SHUFFLE(a, b, 2, 6, 3, 7);
      Four cd = VIDLA_SHUFFLE(c, d, 0, 4, 1, 5), CD = VIDLA_SHUFFLE(c, d, 2, 6, 3, 7);
      float* at = to + j * to_row + i;
      store(at, VIDLA_SHUFFLE(ab, cd, 0, 1, 4, 5) * factor);
      store(at + to_row, VIDLA_SHUFFLE(ab, cd, 2, 3, 6, 7) * factor);
      store(at + 2 * to_row, VIDLA_SHUFFLE(AB, CD, 0, 1, 4, 5) * factor);
      store(at + 3 * to_row, VIDLA_SHUFFLE(AB, CD, 2, 3, 6, 7) * factor);
    }
}

}  // namespace VIDLA_VERSION
}  // namespace vidla
