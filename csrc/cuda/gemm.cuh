// Matrix products whose operands are stored matrices of any format: one fp32 skeleton for matmul_packed, project and
// project_back. Tiles are decoded into shared memory, products accumulated with fmaf in the order of k, so the sum of
// K products has the usual bound K * 2^-24 * sum |a b|. No tensor cores and no double buffering: written to be right.
// Limit: 2 m n k / 60 TFLOP/s (H100, fp32 without tensor cores); shared memory is read 0.5 floats per product, so half of
// that is the most to expect. Never run on a GPU yet.
#pragma once
#include "common.cuh"

namespace gradmill::cuda {
namespace {

constexpr int kGemmThreads = 256;

// One side of a product: element (outer, k) is m(outer, k) if along_k, else m(k, outer).
struct Operand {
  Matrix m;
  bool along_k;
};

inline Matrix plain_matrix(const void* data, int code, int64_t rows, int64_t cols) {
  return {const_cast<void*>(data), nullptr, nullptr, code, rows, cols, 1};
}

// Copies elements (outer0 .. + OUTER, k0 .. + DEPTH) to shared memory as fp32, zeros outside the matrix:
// element (i, k) goes to s[k * PITCH + i] if K_FIRST, else to s[i * PITCH + k].
template <int OUTER, int DEPTH, int PITCH, bool K_FIRST>
__device__ __forceinline__ void stage(const Operand& a, int64_t outer0, int64_t k0, float* s) {
  const int per_line = (a.along_k ? DEPTH : OUTER) / kChunk;  // chunks of a stored row
  for (int c = threadIdx.x; c < OUTER * DEPTH / kChunk; c += kGemmThreads) {
    const int line = c / per_line, at = c % per_line * kChunk;
    const int64_t row = (a.along_k ? outer0 : k0) + line, col = (a.along_k ? k0 : outer0) + at;
    float x[kChunk] = {0.0f, 0.0f, 0.0f, 0.0f};
    const int n = row < a.m.rows ? chunk_length(col, a.m.cols) : 0;
    if (n > 0) read_chunk(a.m, row, col, n, x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int outer = a.along_k ? line : at + i, k = a.along_k ? at + i : line;
      s[K_FIRST ? k * PITCH + outer : outer * PITCH + k] = i < n ? x[i] : 0.0f;
    }
  }
}

// A tile of a b^T, ROWS x COLS, by 256 threads: thread t has rows t / (COLS / C) * R + 0 .. R-1 and columns
// t % (COLS / C) * C + 0 .. C-1.
template <int ROWS, int COLS, int DEPTH, int R, int C>
struct FmaTile {
  static_assert(ROWS / R * (COLS / C) == kGemmThreads && R % 4 == 0 && C == 4, "one tile per thread block");
  static constexpr int kPitchA = ROWS + 4, kPitchB = COLS + 4;  // rows stay 16-byte aligned
  static constexpr int kFloats = DEPTH * (kPitchA + kPitchB);   // shared memory

  __device__ __forceinline__ static int row() { return threadIdx.x / (COLS / C) * R; }
  __device__ __forceinline__ static int col() { return threadIdx.x % (COLS / C) * C; }

  __device__ __forceinline__ static void run(const Operand& a, const Operand& b, int64_t row0, int64_t col0, int64_t k_end, float* shared, float (&sums)[R][C]) {
    float *sa = shared, *sb = shared + DEPTH * kPitchA;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) sums[r][c] = 0.0f;
    for (int64_t k0 = 0; k0 < k_end; k0 += DEPTH) {
      __syncthreads();  // the last tile has been used
      stage<ROWS, DEPTH, kPitchA, true>(a, row0, k0, sa);
      stage<COLS, DEPTH, kPitchB, true>(b, col0, k0, sb);
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < DEPTH; ++k) {
        const float4 y = *reinterpret_cast<const float4*>(sb + k * kPitchB + col());
#pragma unroll
        for (int r = 0; r < R; r += 4) {
          const float4 x = *reinterpret_cast<const float4*>(sa + k * kPitchA + row() + r);
          const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int c = 0; c < C; ++c) sums[r + i][c] = fmaf(xs[i], ys[c], sums[r + i][c]);
        }
      }
    }
    __syncthreads();  // shared memory is free again
  }
};

// --- operands of bytes: int8 codes, packed bits ------------------------------------------------------------
constexpr int kByteTile = 128, kByteDepth = 64;
constexpr int kBytePitch = kByteDepth + 16;  // bytes: 20 words a row, so that 8 rows x 4 words fall into 32 banks

// Copies rows row0 .. + 128, bytes k0 .. + 64 to shared memory, zeros outside the matrix; of a row's last byte the bits in
// `last` count.
__device__ __forceinline__ void stage_bytes(const void* matrix, int64_t rows, int64_t k, int64_t row0, int64_t k0, uint32_t* s, uint8_t last = 255) {
  const uint8_t* const x = static_cast<const uint8_t*>(matrix);
  constexpr int pieces = kByteDepth / 16;
  for (int c = threadIdx.x; c < kByteTile * pieces; c += kGemmThreads) {
    const int line = c / pieces;
    const int64_t row = row0 + line, at = k0 + c % pieces * 16;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < rows && at < k) {
      const uint8_t* p = x + row * k + at;
      if (k - at >= (last == 255 ? 16 : 17) && aligned(p, 16)) {
        v = *reinterpret_cast<const uint4*>(p);
      } else {
        uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 16; ++i)
          if (at + i < k) word[i / 4] |= static_cast<uint32_t>(at + i + 1 == k ? p[i] & last : p[i]) << 8 * (i % 4);
        v = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
    *reinterpret_cast<uint4*>(s + line * (kBytePitch / 4) + c % pieces * 4) = v;
  }
}

// out (m x n, row-major, dtype out_code) = a b^T (+ bias)
struct Product {
  Operand a, b;
  int64_t m, n, k;
  const float* bias;  // may be null
  char* out;
  int out_code;
};

__device__ __forceinline__ void store_product(const Product& p, int64_t row, int64_t col, float (&v)[kChunk]) {
  const int n = row < p.m ? chunk_length(col, p.n) : 0;
  if (n == 0) return;
  if (p.bias) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < n) v[i] += p.bias[col + i];
  }
  store_floats(p.out_code, p.out + (row * p.n + col) * (code_bits(p.out_code) / 8), n, v, false, Key{0, 0, 0}, 0);
}

constexpr int kProductTile = 64;

__device__ __forceinline__ void product_tile(const Product& p, int64_t row0, int64_t col0) {
  using Tile = FmaTile<kProductTile, kProductTile, 32, 4, 4>;
  alignas(16) __shared__ float shared[Tile::kFloats];
  float sums[4][4];
  Tile::run(p.a, p.b, row0, col0, p.k, shared, sums);
#pragma unroll
  for (int r = 0; r < 4; ++r) store_product(p, row0 + Tile::row() + r, col0 + Tile::col(), sums[r]);
}

__global__ void __launch_bounds__(kGemmThreads) product_kernel(const __grid_constant__ Product p) {
  const int64_t across = divide_up(p.n, kProductTile), tiles = across * divide_up(p.m, kProductTile);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t down = divide(tile, across);
    product_tile(p, down * kProductTile, (tile - down * across) * kProductTile);
  }
}

inline void product(const char* name, const Product& p, const Launch& where) {
  launch(name, product_kernel, divide_up(p.m, kProductTile) * divide_up(p.n, kProductTile), dim3(kGemmThreads), where, p);
}

}  // namespace
}  // namespace gradmill::cuda
