// Quantise and dequantise, every blocked code, any block length, row-wise or transposed, nearest or stochastic; the random
// Hadamard transform; fake quantisation.
//
// Memory-bound: fp32 -> int8 moves 5 bytes per element (bf16 -> int8 3, fp32 -> int4 4.5), plus 4/block for the
// scales. At 3.0 TB/s (H100, measured copy) that is 600 Gelement/s. A team of 8 or 32 lanes or a whole thread block
// takes one quantisation block: it reads it for the statistics and again to encode; the second read comes from L1 or
// L2. Transposed, a thread block takes 32 rows of the result (32 columns of x) and turns tiles in shared memory, so
// that both sides are read and written in full 32-byte sectors or more.
// Never run on a GPU yet.
#include "../common/hadamard.h"
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

// Part of out = x^T, by a thread block of (32, 8 or 32): 32 rows of out, one quantisation block long. measured: where the scales will be
// lie the bits of the largest magnitudes.
constexpr int kTileRows = 32, kTileCols = 64;

__device__ __forceinline__ void quantize_strip(const Input& x, const Matrix& out, const Key& key, bool stochastic, bool given, bool measured, int64_t strip,
                                               int64_t index) {
  __shared__ float tile[kTileRows][kTileCols + 1];  // odd pitch: no bank conflicts, written by column or read by row
  __shared__ uint32_t absmax[32][kTileRows];
  __shared__ int32_t lo[32][kTileRows], hi[32][kTileRows];
  const int threads = 32 * blockDim.y, number = threadIdx.y * 32 + threadIdx.x;
  const int64_t row0 = strip * kTileRows, begin = index * out.block;
  const int64_t end = min_of(out.cols, begin + out.block);
  const int rows = static_cast<int>(min_of(kTileRows, out.rows - row0));
  // Statistics: lane = row of out, so that a warp reads a piece of one row of x.
  Stats stats;
  float v[kChunk];
  if (static_cast<int>(threadIdx.x) < rows) {
    if (measured) {
      if (threadIdx.y == 0) stats.absmax = float_bits(out.scales[(row0 + threadIdx.x) * blocks_in_row(out) + index]);
    } else {
      for (int64_t col = begin + threadIdx.y; col < end; col += blockDim.y) {
        load_floats(x.code, x.at(col, row0 + threadIdx.x), 1, v);
        stats.add(v[0]);
      }
    }
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

__global__ void __launch_bounds__(1024) quantize_transposed_kernel(Input x, Matrix out, Key key, bool stochastic, bool given, bool measured) {
  const int64_t per_row = blocks_in_row(out), work = divide_up(out.rows, kTileRows) * per_row;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t strip = divide(item, per_row);
    quantize_strip(x, out, key, stochastic, given, measured, strip, item - strip * per_row);
  }
}

// The same for the tokens of every expert; `room`: how many blocks a row has at most, those of all experts together.
__global__ void __launch_bounds__(1024) quantize_grouped_kernel(const __grid_constant__ QuantizeGroupedArgs a, Key key, bool stochastic, int64_t room) {
  const int64_t work = divide_up(a.cols, kTileRows) * room;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t strip = divide(item, room), index = item - strip * room;
    int64_t e = 0;
    Span s{0, 0, 0};
    int64_t blocks = 0;
    for (; e < a.experts; ++e) {
      s = span_of(a.offs, a.tokens, e, a.out.block);
      blocks = a.out.block == 0 ? 1 : divide_up(s.end - s.begin, a.out.block);
      if (index < s.blocks + blocks) break;
    }
    if (e == a.experts) continue;  // room that nobody needs
    const Matrix part = ragged_part(a.out, s, a.cols);
    if (part.cols == 0) {
      const int64_t row = strip * kTileRows + threadIdx.x;
      if (threadIdx.y == 0 && row < a.cols) part.scales[row] = 0.0f;
      continue;
    }
    const Input x{static_cast<const char*>(a.x) + s.begin * a.stride * (code_bits(a.x_code) / 8), a.x_code, a.stride};
    quantize_strip(x, part, expert_key(key, e), stochastic, a.given, false, strip, index - s.blocks);
  }
}

// Whole rows of x to out, a warp each, and the bits of the largest magnitudes of x's columns to turned.scales, zeros before:
// what is read again for the columns a thread block has just read.
constexpr int kBothRows = 32;

__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(Input x, Matrix out, Matrix turned) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t row0 = static_cast<int64_t>(blockIdx.x) * kBothRows; row0 < out.rows; row0 += static_cast<int64_t>(gridDim.x) * kBothRows) {
    const int64_t end = min_of(out.rows, row0 + kBothRows);
    float v[kChunk];
    for (int64_t row = row0 + warp; row < end; row += kThreads / 32) {
      Stats stats;
      for (int64_t col = lane * kChunk; col < out.cols; col += 32 * kChunk) {
        const int n = chunk_length(col, out.cols);
        load_floats(x.code, x.at(row, col), n, v);
        stats.add(v, n);
      }
      const Block b = reduce_lanes<32>(stats).block(out.code);
      for (int64_t col = lane * kChunk; col < out.cols; col += 32 * kChunk) {
        const int n = chunk_length(col, out.cols);
        load_floats(x.code, x.at(row, col), n, v);
        encode_chunk(out.code, reinterpret_cast<uint8_t*>(address(out, row, col)), n, b, v, kNearest, Key{0, 0, 0}, 0, 0);
      }
      if (lane == 0) store_block(out, row, 0, b);
    }
    for (int64_t col = threadIdx.x; col < out.cols; col += kThreads) {
      Stats stats;
      for (int64_t row = row0; row < end; ++row) {
        load_floats(x.code, x.at(row, col), 1, v);
        stats.add(v[0]);
      }
      atomicMax(reinterpret_cast<uint32_t*>(turned.scales) + col, stats.absmax);
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

// --- random Hadamard transform ----------------------------------------------------------------------------
// Memory-bound: 8 bytes per fp32 element, 4 per bf16, 375 or 750 Gelement/s at 3.0 TB/s. A warp holds CHUNKS * 128
// neighbouring elements of a row, every lane a chunk of each 128: butterflies 1 and 2 apart stay in a thread, 4 to 64
// apart are shuffles between lanes, longer ones again in a thread. For blocks of 16 that is some 2 shuffles and 25 other
// instructions per element. The signs are the same for every row: a warp makes them once for kSignRows rows.
constexpr int kSignRows = 8;

// What a warp does to its elements, the first of them number `at0` of a row of n.
template <int CHUNKS>
struct Butterflies {
  uint32_t word[CHUNKS][kChunk];  // bit 31: the sign; the others: how long the block is that holds the element
  float scale[CHUNKS][kChunk];

  __device__ __forceinline__ static int64_t column(int64_t at0, int j) { return at0 + j * 32 * kChunk + threadIdx.x % 32 * kChunk; }

  __device__ __forceinline__ Butterflies(int64_t at0, int64_t n, int block, const Key& key, bool random) {
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j) {
      const int64_t at = column(at0, j);
      uint32_t w[kChunk] = {0, 0, 0, 0};
      if (random) words_of(key, static_cast<uint64_t>(at), w);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const int64_t size = at + i < n ? hadamard_size(at + i, n, block) : 1;
        word[j][i] = (w[i] & 0x80000000u) | static_cast<uint32_t>(size);
        scale[j][i] = hadamard_scale(size);
      }
    }
  }
  __device__ __forceinline__ void flip_signs(float (&v)[CHUNKS][kChunk]) const {
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[j][i] = bits_float(float_bits(v[j][i]) ^ (word[j][i] & 0x80000000u));
  }
  // All 32 lanes must call.
  __device__ __forceinline__ void apply(float (&v)[CHUNKS][kChunk], int block, bool inverse) const {
    if (!inverse) flip_signs(v);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 1; h < CHUNKS * 32 * kChunk; h *= 2) {
      if (h >= block) break;
      float other[CHUNKS][kChunk];
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j)
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
          other[j][i] = h < kChunk ? v[j][i ^ (h % kChunk)] : h < 32 * kChunk ? __shfl_xor_sync(kAllLanes, v[j][i], h / kChunk) : v[j ^ (h / (32 * kChunk))][i];
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j)
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const bool second = ((j * 32 * kChunk + lane * kChunk + i) & h) != 0;
          const float y = second ? other[j][i] - v[j][i] : v[j][i] + other[j][i];
          v[j][i] = static_cast<uint32_t>(h) < (word[j][i] & 0x7fffffffu) ? y : v[j][i];
        }
    }
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[j][i] *= scale[j][i];
    if (inverse) flip_signs(v);
  }
};

struct Output {  // contiguous
  char* data;
  int code;
  int64_t rows, cols;
  __device__ __forceinline__ void store(int64_t row, int64_t col, const float (&v)[kChunk]) const {
    store_floats(code, data + (row * cols + col) * (code_bits(code) / 8), chunk_length(col, cols), v, false, Key{0, 0, 0}, 0);
  }
};

template <int CHUNKS>
__global__ void __launch_bounds__(kThreads) hadamard_kernel(Input x, Output out, int block, bool inverse, Key key, bool random) {
  constexpr int length = CHUNKS * 32 * kChunk;
  const int64_t segments = divide_up(out.cols, length), work = segments * divide_up(out.rows, kSignRows);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; item < work;
       item += static_cast<int64_t>(gridDim.x) * (kThreads / 32)) {
    const int64_t group = divide(item, segments), at0 = (item - group * segments) * length, row0 = group * kSignRows;
    const Butterflies<CHUNKS> transform(at0, out.cols, block, key, random);
    for (int64_t row = row0; row < min_of(out.rows, row0 + kSignRows); ++row) {
      float v[CHUNKS][kChunk];
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j) {
        const int64_t col = transform.column(at0, j);
        const int n = chunk_length(col, out.cols);
        load_floats(x.code, n > 0 ? x.at(row, col) : x.data, n, v[j]);
      }
      transform.apply(v, block, inverse);
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j) out.store(row, transform.column(at0, j), v[j]);
    }
  }
}

// out = x^T: a thread block turns COLS columns of x, CHUNKS * 128 rows long, in shared memory. With blocks of 512 and
// 1024 a row of x is read 64 or 32 bytes at a time in fp32, half of that in 16 bits.
template <int CHUNKS>
__global__ void __launch_bounds__(kThreads) hadamard_transposed_kernel(Input x, Output out, int block, bool inverse, Key key, bool random) {
  constexpr int length = CHUNKS * 32 * kChunk, COLS = CHUNKS <= 2 ? 32 : 64 / CHUNKS;
  __shared__ float tile[COLS][length + 1];  // odd pitch: written without bank conflicts, read with four
  const int64_t strips = divide_up(out.rows, COLS), work = strips * divide_up(out.cols, length);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t segment = divide(item, strips), at0 = segment * length, row0 = (item - segment * strips) * COLS;
    const int rows = static_cast<int>(min_of(COLS, out.rows - row0)), cols = static_cast<int>(min_of(length, out.cols - at0));
    __syncthreads();  // the last item's tile has been read
    const int r = threadIdx.x % COLS;
    if (r < rows)
      for (int c = threadIdx.x / COLS; c < cols; c += kThreads / COLS) {
        float v[kChunk];
        load_floats(x.code, x.at(at0 + c, row0 + r), 1, v);
        tile[r][c] = v[0];
      }
    __syncthreads();
    const Butterflies<CHUNKS> transform(at0, out.cols, block, key, random);
    for (int row = warp; row < rows; row += kThreads / 32) {
      float v[CHUNKS][kChunk];
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j)
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const int c = j * 32 * kChunk + lane * kChunk + i;
          v[j][i] = c < cols ? tile[row][c] : 0.0f;
        }
      transform.apply(v, block, inverse);
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j) out.store(row0 + row, transform.column(at0, j), v[j]);
    }
  }
}

template <int CHUNKS>
void launch_hadamard(const HadamardArgs& a, const Launch& where) {
  constexpr int length = CHUNKS * 32 * kChunk, cols = CHUNKS <= 2 ? 32 : 64 / CHUNKS;
  const Input x{static_cast<const char*>(a.x), a.x_code, a.stride};
  const Output out{static_cast<char*>(a.out), a.out_code, a.rows, a.cols};
  const Key key = a.key ? *a.key : Key{0, 0, 0};
  const int64_t segments = divide_up(a.cols, length);
  if (a.transpose)
    launch("hadamard (transposed)", hadamard_transposed_kernel<CHUNKS>, segments * divide_up(a.rows, cols), dim3(kThreads), where, x, out,
           static_cast<int>(a.block), a.inverse, key, a.key != nullptr);
  else
    launch("hadamard", hadamard_kernel<CHUNKS>, divide_up(segments * divide_up(a.rows, kSignRows), kThreads / 32), dim3(kThreads), where, x, out,
           static_cast<int>(a.block), a.inverse, key, a.key != nullptr);
}

// Fake quantisation: 8 lanes take one group, 32 neighbouring elements (a cache line of fp32) at a time, so that thread m of
// the team holds lanes 4 m to 4 m + 3 of the sums, whose order is then that of csrc/common/codecs.h. Forward moves 8 bytes per
// fp32 element (375 Gelement/s at 3.0 TB/s), backward 12 (250); a division is some ten instructions, the sums 24
// shuffles a team and group.
constexpr int kTeam = kFakeLanes / kChunk;

template <bool BACKWARD>
__global__ void __launch_bounds__(kThreads) fake_kernel(FakeArgs a) {
  constexpr int teams = kThreads / kTeam;
  const int member = threadIdx.x % kTeam;
  const int64_t per_row = divide_up(a.cols, a.block), groups = a.rows * per_row;
  const char* weight = static_cast<const char*>(a.weight);
  const char* grad = static_cast<const char*>(a.grad);
  char* out = static_cast<char*>(a.out);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < groups; first += static_cast<int64_t>(gridDim.x) * teams) {
    const int64_t number = first + threadIdx.x / kTeam;
    const bool live = number < groups;  // lanes without a group take part in the shuffles
    const int64_t row = live ? divide(number, per_row) : 0, begin = live ? (number - row * per_row) * a.block : 0;
    const int64_t end = live ? min_of(a.cols, begin + a.block) : 0;
    const FakeGroup<float> g = live ? fake_group(a.steps[number], a.zeros[number], a.bits) : FakeGroup<float>{1.0f, 0.0f, 0.0f};
    float dstep[kChunk] = {0.0f, 0.0f, 0.0f, 0.0f}, clipped[kChunk] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int64_t col = begin + member * kChunk; col < end; col += kFakeLanes) {
      const int n = chunk_length(col, end);
      const int64_t at = row * a.cols + col;
      float w[kChunk], y[kChunk];
      load_floats(a.weight_code, weight + at * (code_bits(a.weight_code) / 8), n, w);
      if constexpr (BACKWARD) {
        load_floats(a.grad_code, grad + at * (code_bits(a.grad_code) / 8), n, y);
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
          if (i < n) y[i] = fake_backward(y[i], w[i], g, dstep[i], clipped[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) y[i] = fake_decode(w[i], fake_encode(w[i], g), g);
      }
      store_floats(a.out_code, out + at * (code_bits(a.out_code) / 8), n, y, false, Key{0, 0, 0}, 0);
    }
    if constexpr (BACKWARD) {
#pragma unroll
      for (int offset = kTeam / 2; offset > 0; offset /= 2)
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          dstep[i] += __shfl_xor_sync(kAllLanes, dstep[i], offset);
          clipped[i] += __shfl_xor_sync(kAllLanes, clipped[i], offset);
        }
      if (live && member == 0) {
        a.dsteps[number] = (dstep[0] + dstep[2]) + (dstep[1] + dstep[3]);
        a.dzeros[number] = ((clipped[0] + clipped[2]) + (clipped[1] + clipped[3])) * -g.step;
      }
    }
  }
}

}  // namespace

void fake_quantize(const FakeArgs& a, const Launch& where) {
  if (a.rows == 0 || a.cols == 0) return;
  launch("fake_quantize", fake_kernel<false>, divide_up(a.rows * divide_up(a.cols, a.block), kThreads / kTeam), dim3(kThreads), where, a);
}

void fake_quantize_backward(const FakeArgs& a, const Launch& where) {
  if (a.rows == 0 || a.cols == 0) return;
  launch("fake_quantize_backward", fake_kernel<true>, divide_up(a.rows * divide_up(a.cols, a.block), kThreads / kTeam), dim3(kThreads), where, a);
}

void quantize(const QuantizeArgs& a, const Launch& where) {
  const Matrix& out = a.out;
  if (out.rows == 0 || out.cols == 0) return;
  const Input x{static_cast<const char*>(a.x), a.x_code, a.stride};
  const Key key = a.key ? *a.key : Key{0, 0, 0};
  const bool stochastic = a.key != nullptr;
  const int64_t length = min_of(out.block, out.cols), blocks = out.rows * blocks_in_row(out);
  if (a.transpose) {
    const int64_t work = divide_up(out.rows, kTileRows) * blocks_in_row(out);
    launch("quantize (transposed)", quantize_transposed_kernel, work, dim3(32, length > 1024 ? 32 : 8), where, x, out, key, stochastic, a.given, false);
  } else if (length <= 64) {
    launch("quantize", quantize_kernel<8>, divide_up(blocks, kThreads / 8), dim3(kThreads), where, x, out, key, stochastic, a.given);
  } else if (length <= 1024) {
    launch("quantize", quantize_kernel<32>, divide_up(blocks, kThreads / 32), dim3(kThreads), where, x, out, key, stochastic, a.given);
  } else {
    launch("quantize", quantize_kernel<kThreads>, blocks, dim3(kThreads), where, x, out, key, stochastic, a.given);
  }
}

// Whole rows: x is read once from memory for both maxima and the rows' codes, once (from L2, as far as it goes) for the
// columns' codes, where two calls read it three times. Shorter blocks are two calls: each finds its block in L1.
void quantize_both(const QuantizeBothArgs& a, const Launch& where) {
  if (a.key || a.out.block < a.out.cols || a.turned.block < a.turned.cols) {
    quantize({a.x, a.x_code, a.stride, a.out, false, a.key, false}, where);
    return quantize({a.x, a.x_code, a.stride, a.turned, true, a.turned_key, false}, where);
  }
  const Input x{static_cast<const char*>(a.x), a.x_code, a.stride};
  launch("quantize (rows of both)", quantize_rows_kernel, divide_up(a.out.rows, kBothRows), dim3(kThreads), where, x, a.out, a.turned);
  launch("quantize (columns of both)", quantize_transposed_kernel, divide_up(a.turned.rows, kTileRows), dim3(32, a.turned.cols > 1024 ? 32 : 8), where,
         x, a.turned, Key{0, 0, 0}, false, false, true);
}

void quantize_grouped(const QuantizeGroupedArgs& a, const Launch& where) {
  const int64_t room = a.out.block == 0 ? a.experts : a.tokens / a.out.block + a.experts;
  const int64_t length = a.out.block == 0 ? divide_up(a.tokens, a.experts) : a.out.block;  // of a block, on average
  launch("quantize_grouped", quantize_grouped_kernel, divide_up(a.cols, kTileRows) * room, dim3(32, length > 1024 ? 32 : 8), where, a,
         a.key ? *a.key : Key{0, 0, 0}, a.key != nullptr, room);
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

void hadamard(const HadamardArgs& a, const Launch& where) {
  if (a.block <= 128) launch_hadamard<1>(a, where);
  else if (a.block == 256) launch_hadamard<2>(a, where);
  else if (a.block == 512) launch_hadamard<4>(a, where);
  else launch_hadamard<8>(a, where);
}

}  // namespace gradmill::cuda
