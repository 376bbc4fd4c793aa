// The part of nvcuda::wmma that csrc/cuda uses, for the emulation: every lane holds the whole matrix.
#pragma once
#include "cuda_runtime.h"

namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
namespace precision { struct tf32 {}; }
enum layout_t { mem_row_major, mem_col_major };

template <class Use> struct Shape;  // rows and columns of the 16 x 16 x 8 product's operands
template <> struct Shape<matrix_a> { static constexpr int rows = 16, cols = 8; };
template <> struct Shape<matrix_b> { static constexpr int rows = 8, cols = 16; };
template <> struct Shape<accumulator> { static constexpr int rows = 16, cols = 16; };

template <class Use, int M, int N, int K, class T, class Layout = row_major>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 8, "tf32");
  static constexpr int rows = Shape<Use>::rows, cols = Shape<Use>::cols, num_elements = rows * cols;
  float x[num_elements];
};
template <class F> void fill_fragment(F& f, float v) { for (float& x : f.x) x = v; }
template <class Use, int M, int N, int K, class T>
void load_matrix_sync(fragment<Use, M, N, K, T, row_major>& f, const float* p, unsigned pitch) {
  if (reinterpret_cast<uintptr_t>(p) % 32 || pitch % 4) abort();
  for (int r = 0; r < f.rows; ++r) for (int c = 0; c < f.cols; ++c) f.x[r * f.cols + c] = p[r * pitch + c];
  __syncwarp();
}
template <class Use, int M, int N, int K, class T>
void load_matrix_sync(fragment<Use, M, N, K, T, col_major>& f, const float* p, unsigned pitch) {
  if (reinterpret_cast<uintptr_t>(p) % 32 || pitch % 4) abort();
  for (int r = 0; r < f.rows; ++r) for (int c = 0; c < f.cols; ++c) f.x[r * f.cols + c] = p[c * pitch + r];
  __syncwarp();
}
template <class D, class A, class B, class C>
void mma_sync(D& d, const A& a, const B& b, const C& c) {
  for (const float& v : a.x) { uint32_t u; memcpy(&u, &v, 4); if (u & 0x1fff && v == v) abort(); }  // not a tf32 number
  for (const float& v : b.x) { uint32_t u; memcpy(&u, &v, 4); if (u & 0x1fff && v == v) abort(); }
  D out = c;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 8; ++k)
      for (int j = 0; j < 16; ++j) out.x[i * 16 + j] += a.x[i * 8 + k] * b.x[k * 16 + j];
  d = out;
}
template <class F>
void store_matrix_sync(float* p, const F& f, unsigned pitch, layout_t) {
  for (int r = 0; r < 16; ++r) for (int c = 0; c < 16; ++c) p[r * pitch + c] = f.x[r * 16 + c];
  __syncwarp();
}
}  // namespace nvcuda::wmma
