// Quantise and dequantise, every blocked code, any block length, row-wise or transposed, nearest or stochastic.
//
// Memory-bound: fp32 -> int8 moves 5 bytes per element (bf16 -> int8 3, fp32 -> int4 4.5), plus 4/block for the
// scales. At 3.0 TB/s (H100, measured copy) that is 600 Gelement/s. A team of 8 or 32 lanes or a whole thread block
// takes one quantisation block: it reads it for the statistics and again to encode; the second read comes from L1 or
// L2. Transposed, a thread block takes 32 rows of the result (32 columns of x) and turns tiles in shared memory, so
// that both sides are read and written in full 32-byte sectors or more.
// Never run on a GPU yet.
#include "common.cuh"

namespace gradmill::cuda {
namespace {

constexpr int kThreads = 256;

struct Input {  // x: row-major with a stride
  const char* data;
  int code;
  int64_t stride;
  __device__ __forceinline__ const char* at(int64_t row, int64_t col) const {
    return data + (row * stride + col) * (code_bits(code) / 8);
  }
};

// The scale that out.scales was given beforehand, but for a block with a nan or an inf.
__device__ __forceinline__ Block with_given_scale(const Matrix& out, int64_t row, int64_t col, Block measured) {
  if (measured.scale == measured.scale) measured.scale = block_at(out, row, col).scale;
  return measured;
}

// TEAM 8 or 32 lanes, or kThreads: a thread block.
template <int TEAM>
__global__ void __launch_bounds__(kThreads) quantize_kernel(Input x, Matrix out, Key key, bool stochastic, bool given) {
  constexpr int teams = kThreads / TEAM;
  const int member = threadIdx.x % TEAM;
  const int64_t per_row = blocks_in_row(out), blocks = out.rows * per_row;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < blocks; first += static_cast<int64_t>(gridDim.x) * teams) {
    const int64_t number = first + threadIdx.x / TEAM;
    const bool live = number < blocks;  // lanes without a block take part in the reductions
    const int64_t row = live ? divide(number, per_row) : 0, begin = live ? (number - row * per_row) * out.block : 0;
    const int64_t end = live ? min_of(out.cols, begin + out.block) : 0;
    float v[kChunk];
    Stats stats;
    for (int64_t col = begin + member * kChunk; col < end; col += TEAM * kChunk) {
      const int n = chunk_length(col, end);
      load_floats(x.code, x.at(row, col), n, v);
      stats.add(v, n);
    }
    if constexpr (TEAM == kThreads) stats = reduce_block<kThreads>(stats);
    else stats = reduce_lanes<TEAM>(stats);
    Block b = stats.block(out.code);
    if (given && live) b = with_given_scale(out, row, begin, b);
    for (int64_t col = begin + member * kChunk; col < end; col += TEAM * kChunk) {
      const int n = chunk_length(col, end);
      load_floats(x.code, x.at(row, col), n, v);
      encode_chunk(out.code, reinterpret_cast<uint8_t*>(address(out, row, col)), n, b, v, stochastic ? kStochastic : kNearest, key,
                   static_cast<uint64_t>(row * out.cols + col), 0);
    }
    if (live && member == 0) store_block(out, row, begin, b);
  }
}

// out = x^T. Thread block (32, 8 or 32): 32 rows of out, one quantisation block long.
constexpr int kTileRows = 32, kTileCols = 64;

__global__ void __launch_bounds__(1024) quantize_transposed_kernel(Input x, Matrix out, Key key, bool stochastic, bool given) {
  __shared__ float tile[kTileRows][kTileCols + 1];  // odd pitch: no bank conflicts, written by column or read by row
  __shared__ uint32_t absmax[32][kTileRows];
  __shared__ int32_t lo[32][kTileRows], hi[32][kTileRows];
  const int64_t per_row = blocks_in_row(out), strips = divide_up(out.rows, kTileRows), work = strips * per_row;
  const int threads = 32 * blockDim.y, number = threadIdx.y * 32 + threadIdx.x;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t strip = divide(item, per_row), row0 = strip * kTileRows, begin = (item - strip * per_row) * out.block;
    const int64_t end = min_of(out.cols, begin + out.block);
    const int rows = static_cast<int>(min_of(kTileRows, out.rows - row0));
    // Statistics: lane = row of out, so that a warp reads a piece of one row of x.
    Stats stats;
    float v[kChunk];
    if (static_cast<int>(threadIdx.x) < rows)
      for (int64_t col = begin + threadIdx.y; col < end; col += blockDim.y) {
        load_floats(x.code, x.at(col, row0 + threadIdx.x), 1, v);
        stats.add(v[0]);
      }
    __syncthreads();  // the last item's statistics have been read
    absmax[threadIdx.y][threadIdx.x] = stats.absmax;
    lo[threadIdx.y][threadIdx.x] = stats.lo, hi[threadIdx.y][threadIdx.x] = stats.hi;
    __syncthreads();
    // Tiles: written to shared memory with lanes along x's rows, read with 8 lanes along a row of out, 4 rows a warp.
    const int chunk_lane = number % 8;
    for (int64_t col0 = begin; col0 < end; col0 += kTileCols) {
      const int cols = static_cast<int>(min_of(kTileCols, end - col0));
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < rows)
        for (int c = threadIdx.y; c < cols; c += blockDim.y) {
          load_floats(x.code, x.at(col0 + c, row0 + threadIdx.x), 1, v);
          tile[threadIdx.x][c] = v[0];
        }
      __syncthreads();
      for (int r = number / 8; r < rows; r += threads / 8) {
        Stats all;
        for (int y = 0; y < static_cast<int>(blockDim.y); ++y) {
          Stats part;
          part.absmax = absmax[y][r], part.lo = lo[y][r], part.hi = hi[y][r];
          all.add(part);
        }
        Block b = all.block(out.code);
        if (given) b = with_given_scale(out, row0 + r, begin, b);
        if (col0 == begin && chunk_lane == 0) store_block(out, row0 + r, begin, b);
        for (int c = chunk_lane * kChunk; c < cols; c += 8 * kChunk) {
          const int n = chunk_length(c, cols);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) v[i] = i < n ? tile[r][c + i] : 0.0f;
          encode_chunk(out.code, reinterpret_cast<uint8_t*>(address(out, row0 + r, col0 + c)), n, b, v, stochastic ? kStochastic : kNearest, key,
                       static_cast<uint64_t>((row0 + r) * out.cols + col0 + c), 0);
        }
      }
    }
  }
}

// A team takes a piece of a block: all of it, or 4096 elements.
constexpr int64_t kPiece = 4096;

template <int TEAM>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(Matrix in, char* out, int out_code, int64_t per_block, int64_t pieces) {
  constexpr int teams = kThreads / TEAM;
  const int64_t per_row = blocks_in_row(in);
  for (int64_t number = static_cast<int64_t>(blockIdx.x) * teams + threadIdx.x / TEAM; number < pieces;
       number += static_cast<int64_t>(gridDim.x) * teams) {
    const int64_t block = divide(number, per_block), row = divide(block, per_row), start = (block - row * per_row) * in.block;
    const int64_t begin = start + (number - block * per_block) * kPiece;
    const int64_t end = min_of(min_of(in.cols, start + in.block), begin + kPiece);
    if (begin >= end) continue;
    const Block b = block_at(in, row, start);
    for (int64_t col = begin + threadIdx.x % TEAM * kChunk; col < end; col += TEAM * kChunk) {
      const int n = chunk_length(col, end);
      int q[kChunk];
      float v[kChunk];
      load_codes(in.code, reinterpret_cast<const uint8_t*>(address(in, row, col)), n, q, bit_offset(in, col));
      decode_chunk(in.code, q, b, v);
      if (in.code == kInt4Outlier) put_outliers(in, row, col, n, v);
      store_floats(out_code, out + (row * in.cols + col) * (code_bits(out_code) / 8), n, v, false, Key{0, 0, 0}, 0);
    }
  }
}

}  // namespace

void quantize(const QuantizeArgs& a, const Launch& where) {
  const Matrix& out = a.out;
  if (out.rows == 0 || out.cols == 0) return;
  const Input x{static_cast<const char*>(a.x), a.x_code, a.stride};
  const Key key = a.key ? *a.key : Key{0, 0, 0};
  const bool stochastic = a.key != nullptr;
  const int64_t length = min_of(out.block, out.cols), blocks = out.rows * blocks_in_row(out);
  if (a.transpose) {
    const int64_t work = divide_up(out.rows, kTileRows) * blocks_in_row(out);
    launch("quantize (transposed)", quantize_transposed_kernel, work, dim3(32, length > 1024 ? 32 : 8), where, x, out, key, stochastic, a.given);
  } else if (length <= 64) {
    launch("quantize", quantize_kernel<8>, divide_up(blocks, kThreads / 8), dim3(kThreads), where, x, out, key, stochastic, a.given);
  } else if (length <= 1024) {
    launch("quantize", quantize_kernel<32>, divide_up(blocks, kThreads / 32), dim3(kThreads), where, x, out, key, stochastic, a.given);
  } else {
    launch("quantize", quantize_kernel<kThreads>, blocks, dim3(kThreads), where, x, out, key, stochastic, a.given);
  }
}

void dequantize(const DequantizeArgs& a, const Launch& where) {
  const Matrix& in = a.in;
  if (in.rows == 0 || in.cols == 0) return;
  const int64_t length = min_of(in.block, in.cols), per_block = divide_up(length, kPiece);
  const int64_t pieces = in.rows * blocks_in_row(in) * per_block;
  char* out = static_cast<char*>(a.out);
  if (length <= 64)
    launch("dequantize", dequantize_kernel<8>, divide_up(pieces, kThreads / 8), dim3(kThreads), where, in, out, a.out_code, per_block, pieces);
  else if (length <= 1024)
    launch("dequantize", dequantize_kernel<32>, divide_up(pieces, kThreads / 32), dim3(kThreads), where, in, out, a.out_code, per_block, pieces);
  else
    launch("dequantize", dequantize_kernel<kThreads>, pieces, dim3(kThreads), where, in, out, a.out_code, per_block, pieces);
}

}  // namespace gradmill::cuda
