// Signs and short integers as packed bits, and their products.
//
// pack_bits: reads x once (signs) or twice (planes: the range comes first), writes 1/32 of it a plane: bound by memory. By
// rows a warp takes a row, a ballot makes 32 bits; by columns a thread takes a column, so that a warp reads whole lines.
//
// matmul_binary: mma.sync m16n8k256 .and.popc (every chip from sm_80 on; .xor is emulated from sm_90 on) on tiles of 128 x 128 x 512
// bits, which lie in shared memory as int8's 128 x 128 x 64 bytes do. popcount(a xor b) = |a| + |b| - 2 popcount(a and b), so one
// instruction serves signs and planes; planes are added from the highest down, the sums doubled in between.
// An A100 is said to do 4992 TOP/s in b1; nothing here is pipelined, so expect a fraction. Never run on a GPU yet.
#include "gemm.cuh"

namespace gradmill::cuda {
namespace {

constexpr int kPackThreads = 128;

__device__ __forceinline__ float load_float(const PackBitsArgs& p, int64_t row, int64_t col) {
  float x[kChunk];
  load_floats(p.x_code, static_cast<const char*>(p.x) + (row * p.stride + col) * (code_bits(p.x_code) / 8), 1, x);
  return x[0];
}

// A row's range, and what its integers are made with.
struct Range {
  uint32_t absmax = 0;
  int32_t low = INT32_MAX, high = INT32_MIN;
  __device__ __forceinline__ void add(float x) {
    const uint32_t a = magnitude_bits(x);
    const int32_t o = ordered_bits(x);
    absmax = a > absmax ? a : absmax;
    low = o < low ? o : low;
    high = o > high ? o : high;
  }
};
struct Grid {
  float low, scale, top;
  bool none;  // every integer is 0
};
__device__ __forceinline__ Grid grid_of_range(const PackBitsArgs& p, const Range& r, int64_t row, bool store) {
  const float top = static_cast<float>((1 << p.planes) - 1), low = from_ordered_bits(r.low) + 0.0f, high = from_ordered_bits(r.high);
  const bool bad = r.absmax >= 0x7f800000u;
  float scale = (high * 0.5f - low * 0.5f) / (top * 0.5f);
  scale = scale < kSmallestStep ? 0.0f : scale;
  if (store) {
    p.scales[row] = bad ? bits_float(0x7fc00000u) : scale;
    p.offsets[row] = bad ? bits_float(0x7fc00000u) : low;
  }
  return {low * 0.5f, scale * 0.5f, top, bad || scale == 0.0f};
}
__device__ __forceinline__ uint32_t integer(const PackBitsArgs& p, const Grid& g, float x, int64_t element, const Key& key, bool random) {
  if (g.none) return 0;
  const float y = clampf((x * 0.5f - g.low) / g.scale, 0.0f, g.top);
  return static_cast<uint32_t>(static_cast<int>(random ? round_stochastic(y, philox_word(key, static_cast<uint64_t>(element))) : round_even(y)));
}

struct PackBits {
  PackBitsArgs p;  // its key is host memory
  Key key;
  bool random;
};

__global__ void __launch_bounds__(kPackThreads) pack_rows_kernel(const __grid_constant__ PackBits a) {
  const PackBitsArgs& p = a.p;
  const int lane = threadIdx.x % 32;
  const int64_t bytes = divide_up(p.cols, 8);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * (kPackThreads / 32)) {
    Range range;
    if (p.planes)
      for (int64_t i = lane; i < p.cols; i += 32) range.add(load_float(p, row, i));
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const uint32_t m = __shfl_xor_sync(kAllLanes, range.absmax, offset);
      const int32_t l = __shfl_xor_sync(kAllLanes, range.low, offset), h = __shfl_xor_sync(kAllLanes, range.high, offset);
      range.absmax = m > range.absmax ? m : range.absmax;
      range.low = l < range.low ? l : range.low;
      range.high = h > range.high ? h : range.high;
    }
    const Grid grid = p.planes ? grid_of_range(p, range, row, lane == 0) : Grid{};
    float sum = 0.0f;
    bool bad = false;
    for (int64_t base = 0; base < p.cols; base += 32) {
      const bool live = base + lane < p.cols;
      const float x = live ? load_float(p, row, base + lane) : 0.0f;
      sum += fabsf(x);
      bad = bad || !(fabsf(x) < INFINITY);
      const uint32_t q = p.planes == 0 ? x < 0.0f : live ? integer(p, grid, x, row * p.cols + base + lane, a.key, a.random) : 0u;
      for (int b = 0; b < (p.planes ? p.planes : 1); ++b) {
        const uint32_t word = __ballot_sync(kAllLanes, (q >> b & 1u) != 0);
        if (lane < 4 && base / 8 + lane < bytes) p.bits[(b * p.rows + row) * bytes + base / 8 + lane] = static_cast<uint8_t>(word >> 8 * lane);
      }
    }
    if (p.planes) continue;
    bad = __ballot_sync(kAllLanes, bad) != 0;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    if (lane == 0) p.scales[row] = p.mean ? sum / static_cast<float>(p.cols) : bad ? bits_float(0x7fc00000u) : 1.0f;
  }
}

// Row `row` of the result is column `row` of x, and one thread's.
__global__ void __launch_bounds__(kPackThreads) pack_columns_kernel(const __grid_constant__ PackBits a) {
  const PackBitsArgs& p = a.p;
  const int64_t bytes = divide_up(p.cols, 8);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x; row < p.rows; row += static_cast<int64_t>(gridDim.x) * kPackThreads) {
    Range range;
    if (p.planes)
      for (int64_t i = 0; i < p.cols; ++i) range.add(load_float(p, i, row));
    const Grid grid = p.planes ? grid_of_range(p, range, row, true) : Grid{};
    float lanes[32];
#pragma unroll
    for (int k = 0; k < 32; ++k) lanes[k] = 0.0f;
    bool bad = false;
    for (int64_t base = 0; base < p.cols; base += 32) {
      uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int k = 0; k < 32; ++k) {
        if (base + k >= p.cols) continue;
        const float x = load_float(p, base + k, row);
        lanes[k] += fabsf(x);
        bad = bad || !(fabsf(x) < INFINITY);
        const uint32_t q = p.planes == 0 ? x < 0.0f : integer(p, grid, x, row * p.cols + base + k, a.key, a.random);
#pragma unroll
        for (int b = 0; b < 4; ++b) words[b] |= (q >> b & 1u) << k;
      }
#pragma unroll
      for (int b = 0; b < 4; ++b)
        for (int i = 0; i < 4; ++i)
          if (b < (p.planes ? p.planes : 1) && base / 8 + i < bytes) p.bits[(b * p.rows + row) * bytes + base / 8 + i] = static_cast<uint8_t>(words[b] >> 8 * i);
    }
    if (p.planes) continue;
#pragma unroll
    for (int half = 16; half > 0; half /= 2)
#pragma unroll
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    p.scales[row] = p.mean ? lanes[0] / static_cast<float>(p.cols) : bad ? bits_float(0x7fc00000u) : 1.0f;
  }
}

// --- products ---------------------------------------------------------------------------------------------
__device__ __forceinline__ uint8_t last_mask(int64_t k) { return static_cast<uint8_t>(k % 8 ? (1 << k % 8) - 1 : 255); }

// A warp a row: the sum of the q of each row of a, the bits set in each row of b.
__global__ void __launch_bounds__(kPackThreads) count_kernel(const __grid_constant__ BinaryMatmulArgs p) {
  const int lane = threadIdx.x % 32;
  const int64_t bytes = divide_up(p.k, 8);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32; i < p.m + p.n;
       i += static_cast<int64_t>(gridDim.x) * (kPackThreads / 32)) {
    int count = 0;
    for (int q = 0; q < (i < p.m && p.planes ? p.planes : 1); ++q) {
      const uint8_t* x = i < p.m ? p.a + (q * p.m + i) * bytes : p.b + (i - p.m) * bytes;
      for (int64_t j = lane; j < bytes; j += 32) count += __popc(j + 1 == bytes ? x[j] & last_mask(p.k) : x[j]) << q;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) count += __shfl_xor_sync(kAllLanes, count, offset);
    if (lane == 0) p.counts[i] = count;
  }
}

// sums += popcount(a & b): a 16 x 256 bits, b 8 x 256, in the fragment layout of matmul.cu's mma_int8 with 32 bits for 4 bytes.
__device__ __forceinline__ void mma_bits(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulated_mma_b1(sums, a, b);
#endif
}

__global__ void __launch_bounds__(kGemmThreads) binary_kernel(const __grid_constant__ BinaryMatmulArgs p) {
  alignas(16) __shared__ uint32_t sa[kByteTile * kBytePitch / 4], sb[kByteTile * kBytePitch / 4];
  constexpr int pitch = kBytePitch / 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_row = warp / 4 * 64, warp_col = warp % 4 * 32;  // 8 warps: 2 x 4, each 64 x 32 = 4 x 4 mma tiles
  const int64_t bytes = divide_up(p.k, 8), across = divide_up(p.n, kByteTile), tiles = across * divide_up(p.m, kByteTile);
  const int planes = p.planes ? p.planes : 1;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t down = divide(tile, across), row0 = down * kByteTile, col0 = (tile - down * across) * kByteTile;
    int sums[4][4][4] = {};
    for (int plane = planes - 1; plane >= 0; --plane) {
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[i / 16][i / 4 % 4][i % 4] *= 2;
      for (int64_t k0 = 0; k0 < bytes; k0 += kByteDepth) {
        __syncthreads();  // the last tile has been used
        stage_bytes(p.a + plane * p.m * bytes, p.m, bytes, row0, k0, sa);
        stage_bytes(p.b, p.n, bytes, col0, k0, sb, last_mask(p.k));
        __syncthreads();
#pragma unroll
        for (int step = 0; step < kByteDepth / 32; ++step) {
          uint32_t b[4][2];
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) b[j][h] = sb[(warp_col + j * 8 + g) * pitch + step * 8 + h * 4 + t];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t a[4];
#pragma unroll
            for (int h = 0; h < 4; ++h) a[h] = sa[(warp_row + i * 16 + h % 2 * 8 + g) * pitch + step * 8 + h / 2 * 4 + t];
#pragma unroll
            for (int j = 0; j < 4; ++j) mma_bits(sums[i][j], a, b[j]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t row = row0 + warp_row + i * 16 + h * 8 + g, col = col0 + warp_col + j * 8 + 2 * t;
          if (row >= p.m || col >= p.n) continue;
          float v[kChunk] = {0.0f, 0.0f, 0.0f, 0.0f};
          const int n = col + 1 < p.n ? 2 : 1, k = static_cast<int>(p.k), in_a = p.counts[row];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (c >= n) continue;
            const int in_b = p.counts[p.m + col + c], both = sums[i][j][2 * h + c];
            if (p.planes == 0) {
              v[c] = (static_cast<float>(k - 2 * (in_a + in_b - 2 * both)) * p.a_scales[row]) * p.b_scales[col + c];
              if (p.bias) v[c] += p.bias[col + c];
            } else {
              v[c] = (p.offsets[row] * static_cast<float>(k - 2 * in_b) + p.a_scales[row] * static_cast<float>(in_a - 2 * both)) * p.b_scales[col + c];
            }
          }
          store_floats(p.out_code, static_cast<char*>(p.out) + (row * p.n + col) * (code_bits(p.out_code) / 8), n, v, false, Key{0, 0, 0}, 0);
        }
  }
}

// --- a delta of signs for each row ------------------------------------------------------------------------
// A warp takes one row of x and eight rows of its tenant's signs, 32 columns at a time. Rows of a tenant read its bits from L2.
constexpr int kTenantWarps = 4, kTenantColumns = 8, kTenantBatch = 128;
struct Tenants {
  TenantsArgs p;
  int64_t rows;
  int32_t order[kTenantBatch], tenant[kTenantBatch];
};

__global__ void __launch_bounds__(kTenantWarps * 32) tenants_kernel(const __grid_constant__ Tenants a) {
  const TenantsArgs& p = a.p;
  const int lane = threadIdx.x % 32;
  const int64_t groups = divide_up(p.n, kTenantColumns), bytes = divide_up(p.k, 8), size = code_bits(p.x_code) / 8, out_size = code_bits(p.out_code) / 8;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kTenantWarps + threadIdx.x / 32; unit < a.rows * groups;
       unit += static_cast<int64_t>(gridDim.x) * kTenantWarps) {
    const int64_t i = divide(unit, groups), col = (unit - i * groups) * kTenantColumns, row = a.order[i], tenant = a.tenant[i];
    float sums[kTenantColumns] = {};
    for (int64_t base = 0; base < p.k && tenant >= 0; base += 32) {
      if (base + lane >= p.k) continue;
      float x[kChunk];
      load_floats(p.x_code, static_cast<const char*>(p.x) + (row * p.k + base + lane) * size, 1, x);
#pragma unroll
      for (int c = 0; c < kTenantColumns; ++c) {
        if (col + c >= p.n) continue;
        const uint32_t bit = p.bits[(tenant * p.n + col + c) * bytes + base / 8 + lane / 8] >> lane % 8 & 1u;
        sums[c] += bit ? -x[0] : x[0];
      }
    }
#pragma unroll
    for (int c = 0; c < kTenantColumns; ++c) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sums[c] += __shfl_xor_sync(kAllLanes, sums[c], offset);
      if (lane != c || col + c >= p.n) continue;
      const int64_t at = (row * p.n + col + c) * out_size;
      float v[kChunk];
      load_floats(p.out_code, static_cast<const char*>(p.base) + at, 1, v);
      if (tenant >= 0) v[0] += p.alphas[tenant] * sums[c];
      store_floats(p.out_code, static_cast<char*>(p.out) + at, 1, v, false, Key{0, 0, 0}, 0);
    }
  }
}

}  // namespace

void matmul_tenants(const TenantsArgs& p, const Launch& where) {
  for (int64_t first = 0; first < p.m; first += kTenantBatch) {
    Tenants a{p, min_of(kTenantBatch, p.m - first), {}, {}};
    for (int64_t i = 0; i < a.rows; ++i) a.order[i] = static_cast<int32_t>(p.order[first + i]), a.tenant[i] = static_cast<int32_t>(p.tenants[first + i]);
    launch("matmul_tenants", tenants_kernel, divide_up(a.rows * divide_up(p.n, kTenantColumns), kTenantWarps), dim3(kTenantWarps * 32), where, a);
  }
}

void pack_bits(const PackBitsArgs& p, const Launch& where) {
  const PackBits a{p, p.key ? *p.key : Key{0, 0, 0}, p.key != nullptr};
  if (p.transpose) launch("pack_bits (transposed)", pack_columns_kernel, divide_up(p.rows, kPackThreads), dim3(kPackThreads), where, a);
  else launch("pack_bits", pack_rows_kernel, divide_up(p.rows, kPackThreads / 32), dim3(kPackThreads), where, a);
}

void matmul_binary(const BinaryMatmulArgs& p, const Launch& where) {
  launch("matmul_binary (counts)", count_kernel, divide_up(p.m + p.n, kPackThreads / 32), dim3(kPackThreads), where, p);
  launch("matmul_binary", binary_kernel, divide_up(p.m, kByteTile) * divide_up(p.n, kByteTile), dim3(kGemmThreads), where, p);
}

}  // namespace gradmill::cuda
