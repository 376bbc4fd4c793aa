// Gradient projection onto a packed basis, and the update back into the weight.
//
// project reads the gradient once per 64 basis vectors and the packed basis once per 64 rows: 2 m d rank operations, so
// for rank 128 and a bf16 gradient the fp32 units (60 TFLOP/s on H100), not its memory, are the limit: 4096 x 4096 to
// rank 128 is 4.3 GFLOP = 0.07 ms at best, against 0.01 ms of memory traffic at 3.0 TB/s.
//
// project_back computes 32 x 256 tiles of back = update B (or B^T update) in registers and turns each at once into new
// weight values, so that back is never stored: the weight is read and written once (2 bytes per element for 8-bit
// codes). Blocks up to 256 elements are measured and encoded from shared memory, a warp each. Longer ones (whole rows)
// take two rounds over their tiles: the first measures, the second computes the same values again and encodes; old scales
// stay until the end. Same limit: 2 m n rank operations, twice that for long blocks.
// Never run on a GPU yet.
#include "gemm.cuh"

namespace gradmill::cuda {
namespace {

constexpr int kBandRows = 32, kBandCols = 256, kRowsPerThread = 8;
using BackTile = FmaTile<kBandRows, kBandCols, 16, kRowsPerThread, 4>;

struct Back {
  Matrix weight;
  Operand a, b;  // back = a b^T
  int64_t k;
  int64_t unit;  // columns a thread block takes: whole blocks up to 256 columns, or one long block
  float decay, alpha;
  Key key;
  const char* residual;
  int residual_code;
  const float* residual_scales;
  bool by_column;
};

__global__ void __launch_bounds__(kGemmThreads, 2) back_kernel(const __grid_constant__ Back p) {
  constexpr int floats = BackTile::kFloats > kBandRows * kBandCols ? BackTile::kFloats : kBandRows * kBandCols;
  alignas(16) __shared__ float shared[floats];  // tiles of a and b, then the new values of short blocks
  __shared__ uint32_t absmax[kBandRows], changed[kBandRows];
  __shared__ int32_t lo[kBandRows], hi[kBandRows];
  const Matrix& w = p.weight;
  const bool blocked = is_blocked(w.code), is_long = blocked && w.block > kBandCols, is_short = blocked && !is_long;
  const int64_t per_row = divide_up(w.cols, p.unit), work = per_row * divide_up(w.rows, kBandRows);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t band = divide(item, per_row), row0 = band * kBandRows, begin = (item - band * per_row) * p.unit;
    const int64_t end = min_of(w.cols, begin + p.unit);
    const int rows = static_cast<int>(min_of(kBandRows, w.rows - row0));
    if (threadIdx.x < kBandRows) absmax[threadIdx.x] = changed[threadIdx.x] = 0, lo[threadIdx.x] = hi[threadIdx.x] = 0;
    // (run starts with __syncthreads unless k is 0; the one below covers that)
    __syncthreads();
    for (int round = is_long ? 0 : 1; round < 2; ++round) {
      for (int64_t col0 = begin; col0 < end; col0 += kBandCols) {
        float sums[kRowsPerThread][kChunk];
        BackTile::run(p.a, p.b, row0, col0, p.k, shared, sums);
        const int64_t col = col0 + BackTile::col();
        const int n = chunk_length(col, end);
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
          const int at = BackTile::row() + r;  // the same for a whole warp
          if (at >= rows) continue;
          const int64_t row = row0 + at;
          float old[kChunk] = {0.0f, 0.0f, 0.0f, 0.0f}, v[kChunk];
          if (n > 0) read_chunk(w, row, col, n, old);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) v[i] = old[i] * p.decay + p.alpha * sums[r][i];
          if (p.residual && n > 0) {
            float residual[kChunk] = {0.0f, 0.0f, 0.0f, 0.0f};
            load_floats(p.residual_code, p.residual + (row * w.cols + col) * (code_bits(p.residual_code) / 8), n, residual);
#pragma unroll
            for (int i = 0; i < kChunk; ++i)
              if (i < n) v[i] += p.residual_scales[p.by_column ? col + i : row] * residual[i];
          }
          if (is_short) {
            *reinterpret_cast<float4*>(shared + at * kBandCols + BackTile::col()) = make_float4(v[0], v[1], v[2], v[3]);
          } else if (!blocked) {
            if (n > 0) store_floats(w.code, address(w, row, col), n, v, true, p.key, static_cast<uint64_t>(row * w.cols + col));
          } else if (round == 0) {
            Stats stats;
            stats.add(v, n);
            stats.compare(old, v, n);
            stats = reduce_lanes<32>(stats);
            if (lane == 0) {
              atomicMax(&absmax[at], stats.absmax);
              atomicMin(&lo[at], stats.lo);
              atomicMax(&hi[at], stats.hi);
              atomicMax(&changed[at], stats.changed);
            }
          } else if (changed[at] && n > 0) {
            write_codes(w, row, col, n, block_of(w.code, absmax[at], lo[at], hi[at]), v, kStochastic, p.key, 0);
          }
        }
        __syncthreads();  // short: the values are complete and every old scale was read; long: statistics are complete
        if (is_short) {
          const int block = static_cast<int>(w.block), length = static_cast<int>(min_of(kBandCols, end - col0));
          const int blocks = (length + block - 1) / block;
          for (int number = warp; number < rows * blocks; number += kGemmThreads / 32) {
            const int at = number / blocks, start = number % blocks * block, part = static_cast<int>(min_of(block, length - start));
            const int64_t row = row0 + at;
            const float* values = shared + at * kBandCols + start;
            Stats stats;
            float v[kChunk], old[kChunk];
            for (int i = lane * kChunk; i < part; i += 32 * kChunk) {
              const int m = chunk_length(i, part);
              load_floats(kF32, reinterpret_cast<const char*>(values + i), m, v);
              stats.add(v, m);
              read_chunk(w, row, col0 + start + i, m, old);
              stats.compare(old, v, m);
            }
            stats = reduce_lanes<32>(stats);
            __syncwarp();  // every lane has read the old scale
            if (!stats.changed) continue;
            const Block b = stats.block(w.code);
            for (int i = lane * kChunk; i < part; i += 32 * kChunk) {
              const int m = chunk_length(i, part);
              load_floats(kF32, reinterpret_cast<const char*>(values + i), m, v);
              write_codes(w, row, col0 + start + i, m, b, v, kStochastic, p.key, 0);
            }
            if (lane == 0) store_block(w, row, col0 + start, b);
          }
          __syncthreads();  // shared memory is free again
        }
      }
    }
    if (is_long && static_cast<int>(threadIdx.x) < rows && changed[threadIdx.x])
      store_block(w, row0 + threadIdx.x, begin, block_of(w.code, absmax[threadIdx.x], lo[threadIdx.x], hi[threadIdx.x]));
    __syncthreads();  // the statistics may be reset
  }
}

}  // namespace

void project(const ProjectArgs& a, const Launch& where) {
  const Matrix grad = plain_matrix(a.grad, a.grad_code, a.m, a.n);
  Product p{};
  if (a.left) p = {{a.basis, true}, {grad, false}, a.basis.rows, a.n, a.basis.cols, nullptr, reinterpret_cast<char*>(a.out), kF32};
  else p = {{grad, true}, {a.basis, true}, a.m, a.basis.rows, a.basis.cols, nullptr, reinterpret_cast<char*>(a.out), kF32};
  product(a.left ? "project (left)" : "project (right)", p, where);
}

void project_back(const ProjectBackArgs& a, const Launch& where) {
  if (a.weight.rows == 0 || a.weight.cols == 0) return;
  Back p{};
  p.weight = a.weight;
  p.weight.block = is_blocked(a.weight.code) ? min_of(a.weight.block, a.weight.cols) : 1;
  p.k = a.basis.rows;
  const Operand basis{a.basis, false};
  if (a.left) p.a = basis, p.b = {plain_matrix(a.update, kF32, p.k, a.weight.cols), false};
  else p.a = {plain_matrix(a.update, kF32, a.weight.rows, p.k), true}, p.b = basis;
  p.unit = p.weight.block > kBandCols ? p.weight.block : kBandCols / p.weight.block * p.weight.block;
  p.decay = a.decay, p.alpha = a.alpha, p.key = a.key;
  p.residual = static_cast<const char*>(a.residual), p.residual_code = a.residual_code, p.residual_scales = a.residual_scales, p.by_column = a.left;
  launch("project_back", back_kernel, divide_up(a.weight.rows, kBandRows) * divide_up(a.weight.cols, p.unit), dim3(kGemmThreads), where, p);
}

}  // namespace gradmill::cuda
