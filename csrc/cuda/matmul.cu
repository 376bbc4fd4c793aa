// Matrix products on low-precision operands: int8 x int8 (exact) and float x packed weight.
//
// matmul_int8: mma.sync m16n8k32 on 128 x 128 x 64 tiles, int32 sums. 2 m n k operations; an H100 does 1980 TOP/s in
// int8 with wgmma, mma.sync reaches about 60 % of that at best, and this kernel, which neither pipelines nor swizzles, well
// below. It is the fallback: Triton and torch._int_mm come first.
//
// matmul_packed, up to 16 rows of x: memory-bound, the packed weight is read once in 16-byte pieces: n k / 2 bytes for
// 4-bit codes (4096 x 4096: 8.4 MB, 2.8 us at 3.0 TB/s; unpacking costs 4 instructions per weight, so expect 4-bit at
// half of that limit). More rows: tiles of the weight are decoded in shared memory; bf16 and fp16 x use tensor cores in
// tf32 (which holds both exactly), each weight as the sum of two tf32 numbers, so 21 bits of it count; fp32 x uses fmaf.
// Never run on a GPU yet.
#include <mma.h>

#include "gemm.cuh"

namespace gradmill::cuda {
namespace {

// --- int8 -------------------------------------------------------------------------------------------------
constexpr int64_t kInt32Products = 65536;    // so many products of at most 128 * 128 fit an int32; longer sums go to int64

// sums += a b^T: a 16 x 32 (row-major), b 8 x 32 (row-major), in the fragment layout of the PTX manual:
// with g = lane / 4, t = lane % 4: a = rows g, g+8, g, g+8 at bytes 4t (first two) and 4t + 16; b = row g at bytes 4t and
// 4t + 16; sums = (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
__device__ __forceinline__ void mma_int8(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulated_mma_int8(sums, a, b);
#endif
}

// One tile of a product. WIDE: k > kInt32Products; int32 sums are added to int64 totals every so often.
template <bool WIDE>
__device__ __forceinline__ void int8_tile(const Int8MatmulArgs& p, int64_t row0, int64_t col0) {
  alignas(16) __shared__ uint32_t sa[kByteTile * kBytePitch / 4], sb[kByteTile * kBytePitch / 4];
  constexpr int pitch = kBytePitch / 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_row = warp / 4 * 64, warp_col = warp % 4 * 32;  // 8 warps: 2 x 4, each 64 x 32 = 4 x 4 mma tiles
  int sums[4][4][4] = {};
  long long totals[WIDE ? 4 : 1][WIDE ? 4 : 1][WIDE ? 4 : 1] = {};
  for (int64_t k0 = 0; k0 < p.k; k0 += kByteDepth) {
    if constexpr (WIDE) {
      if (k0 % kInt32Products == 0) {
#pragma unroll
        for (int i = 0; i < 64; ++i) totals[i / 16][i / 4 % 4][i % 4] += sums[i / 16][i / 4 % 4][i % 4], sums[i / 16][i / 4 % 4][i % 4] = 0;
      }
    }
    __syncthreads();  // the last tile has been used
    stage_bytes(p.a, p.m, p.k, row0, k0, sa);
    stage_bytes(p.b, p.n, p.k, col0, k0, sb);
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
        for (int j = 0; j < 4; ++j) mma_int8(sums[i][j], a, b[j]);
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
        const int n = col + 1 < p.n ? 2 : 1;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (c >= n) continue;
          float sum;
          if constexpr (WIDE) sum = static_cast<float>(totals[i][j][2 * h + c] + sums[i][j][2 * h + c]);
          else sum = static_cast<float>(sums[i][j][2 * h + c]);
          v[c] = (sum * p.a_scales[row]) * p.b_scales[col + c];
          if (p.bias) v[c] += p.bias[col + c];
        }
        store_floats(p.out_code, static_cast<char*>(p.out) + (row * p.n + col) * (code_bits(p.out_code) / 8), n, v, false, Key{0, 0, 0}, 0);
      }
}

template <bool WIDE>
__global__ void __launch_bounds__(kGemmThreads) int8_kernel(const __grid_constant__ Int8MatmulArgs p) {
  const int64_t across = divide_up(p.n, kByteTile), tiles = across * divide_up(p.m, kByteTile);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t down = divide(tile, across);
    int8_tile<WIDE>(p, down * kByteTile, (tile - down * across) * kByteTile);
  }
}

// --- float x packed weight, few rows ----------------------------------------------------------------------
// Integer codes of 8, 4, 3 and 2 bits, whose value is (u - offset) * scale with u the stored bits as an unsigned number
// (the sign bit flipped for the signed codes). A thread takes pieces of 16 bytes (12 for 3 bits: whole words of codes), each
// within one block, of NROWS neighbouring weight rows, sums (u - offset) * x over a piece and multiplies by the scale once.
constexpr int kFewRows = 16, kFewThreads = 128;

struct FewRows {
  PackedMatmulArgs p;
  int64_t k;
};

__host__ __device__ constexpr int piece_words(int bits) { return bits == 3 ? 3 : 4; }

template <int M, int NROWS, int BITS>
__global__ void __launch_bounds__(kFewThreads) few_rows_kernel(const __grid_constant__ FewRows a) {
  constexpr int warps = kFewThreads / 32, words = piece_words(BITS), per_piece = 32 * words / BITS;
  __shared__ float partial[warps][NROWS][M];
  const Matrix& w = a.p.w;
  const int m = static_cast<int>(a.p.x.rows);
  const int64_t k = a.k, groups = divide_up(w.rows, NROWS), per_row = blocks_in_row(w), x_bytes = code_bits(a.p.x.code) / 8;
  const bool unsigned_codes = has_zero_point(w.code);
  const uint32_t flip = unsigned_codes ? 0u : 1u << (BITS - 1);
  const bool whole = w.block >= w.cols;
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const int64_t row0 = group * NROWS;
    float sums[NROWS][M] = {};
    for (int64_t piece = threadIdx.x; piece < k / per_piece; piece += kFewThreads) {
      const int64_t at = piece * per_piece;
      uint32_t packed[NROWS][words];
      float scale[NROWS], offset[NROWS], part[NROWS][M] = {};
#pragma unroll
      for (int r = 0; r < NROWS; ++r) {
        const int64_t row = min_of(row0 + r, w.rows - 1);  // rows past the end repeat the last one and are not stored
        const char* const codes = address(w, row, at);
        if constexpr (words == 4) {
          const uint4 all = *reinterpret_cast<const uint4*>(codes);
          packed[r][0] = all.x, packed[r][1] = all.y, packed[r][2] = all.z, packed[r][3] = all.w;
        } else {
#pragma unroll
          for (int i = 0; i < words; ++i) packed[r][i] = reinterpret_cast<const uint32_t*>(codes)[i];
        }
        const int64_t block = row * per_row + (whole ? 0 : divide(at, w.block));
        scale[r] = w.scales[block];
        offset[r] = static_cast<float>(unsigned_codes ? w.zeros[block] : flip);
      }
#pragma unroll
      for (int i = 0; i < per_piece; i += kChunk) {
        float v[NROWS][kChunk];
#pragma unroll
        for (int r = 0; r < NROWS; ++r) {
#pragma unroll
          for (int c = 0; c < kChunk; ++c) {
            const int word = (i + c) * BITS / 32, shift = (i + c) * BITS % 32;
            uint32_t bits = packed[r][word] >> shift;
            if (shift + BITS > 32) bits |= packed[r][word + 1 < words ? word + 1 : word] << (32 - shift);  // a 3-bit code in two words
            const uint32_t u = (bits & ((1u << BITS) - 1u)) ^ flip;
            v[r][c] = (bits_float(0x4b000000u | u) - 8388608.0f) - offset[r];  // 2^23 + u, exactly
          }
        }
#pragma unroll
        for (int j = 0; j < M; ++j) {
          if (j >= m) break;
          float x[kChunk];
          load_floats(a.p.x.code, static_cast<const char*>(a.p.x.codes) + (j * k + at + i) * x_bytes, kChunk, x);
#pragma unroll
          for (int r = 0; r < NROWS; ++r)
#pragma unroll
            for (int c = 0; c < kChunk; ++c) part[r][j] = fmaf(v[r][c], x[c], part[r][j]);
        }
      }
#pragma unroll
      for (int r = 0; r < NROWS; ++r)
#pragma unroll
        for (int j = 0; j < M; ++j) sums[r][j] = fmaf(scale[r], part[r][j], sums[r][j]);
    }
#pragma unroll
    for (int r = 0; r < NROWS; ++r)
#pragma unroll
      for (int j = 0; j < M; ++j) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sums[r][j] += __shfl_xor_sync(kAllLanes, sums[r][j], offset);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][r][j] = sums[r][j];
      }
    __syncthreads();
    for (int i = threadIdx.x; i < NROWS * M; i += kFewThreads) {
      const int r = i / M, j = i % M;
      const int64_t row = row0 + r;
      if (row >= w.rows || j >= m) continue;
      float v[kChunk] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int s = 0; s < warps; ++s) v[0] += partial[s][r][j];
      if (a.p.bias) v[0] += a.p.bias[row];
      store_floats(a.p.out_code, static_cast<char*>(a.p.out) + (j * w.rows + row) * (code_bits(a.p.out_code) / 8), 1, v, false, Key{0, 0, 0}, 0);
    }
    __syncthreads();  // partial may be overwritten
  }
}

template <int BITS>
void few_rows(const PackedMatmulArgs& p, const Launch& where) {
  const FewRows a{p, p.w.cols};
  const auto name = "matmul_packed (few rows)";
  if (p.x.rows == 1) launch(name, few_rows_kernel<1, 4, BITS>, divide_up(p.w.rows, 4), dim3(kFewThreads), where, a);
  else if (p.x.rows <= 4) launch(name, few_rows_kernel<4, 4, BITS>, divide_up(p.w.rows, 4), dim3(kFewThreads), where, a);
  else launch(name, few_rows_kernel<kFewRows, 2, BITS>, divide_up(p.w.rows, 2), dim3(kFewThreads), where, a);
}

bool fits_few_rows(const PackedMatmulArgs& p) {
  if (p.transpose || p.x.rows > kFewRows || is_blocked(p.x.code)) return false;
  switch (p.w.code) {
    case kInt8: case kUInt8: case kInt4: case kUInt4: case kInt3: case kUInt3: case kInt2: case kUInt2: break;
    default: return false;
  }
  const int bits = code_bits(p.w.code), per_piece = 32 * piece_words(bits) / bits;
  return p.w.cols > 0 && p.w.cols % per_piece == 0 && (p.w.block >= p.w.cols || p.w.block % per_piece == 0) &&
         reinterpret_cast<uintptr_t>(p.w.codes) % 16 == 0;
}

// --- float x indices into codebooks, one to four rows -----------------------------------------------------
// A warp takes a row of the weight: lanes read 8 indices each, `bits` bytes, and look them up; a codebook, 4 to 1024 bytes, stays in L1.
constexpr int kBookRows = 4, kBookWarps = 4;

__global__ void __launch_bounds__(kBookWarps * 32) book_rows_kernel(const __grid_constant__ PackedMatmulArgs p) {
  const int lane = threadIdx.x % 32, bits = p.w.code - kBook;
  const int64_t k = p.w.cols, bytes = divide_up(k * bits, 8), x_bytes = code_bits(p.x.code) / 8;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kBookWarps + threadIdx.x / 32; row < p.w.rows; row += static_cast<int64_t>(gridDim.x) * kBookWarps) {
    const float* const book = book_of(p.w, row);
    const uint8_t* const indices = static_cast<const uint8_t*>(p.w.codes) + row * bytes;
    float sums[kBookRows] = {};
    for (int64_t at = lane * 8; at < k; at += 32 * 8) {
      uint64_t packed = 0;
      for (int b = 0; b < bits; ++b)
        if (at / 8 * bits + b < bytes) packed |= static_cast<uint64_t>(indices[at / 8 * bits + b]) << 8 * b;
#pragma unroll
      for (int half = 0; half < 8; half += kChunk) {
        const int n = chunk_length(at + half, k);
        if (n == 0) continue;
        float w[kChunk];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) w[i] = i < n ? book[packed >> (half + i) * bits & ((1u << bits) - 1u)] : 0.0f;
#pragma unroll
        for (int r = 0; r < kBookRows; ++r) {
          if (r >= p.x.rows) continue;
          float x[kChunk];
          load_floats(p.x.code, static_cast<const char*>(p.x.codes) + (r * k + at + half) * x_bytes, n, x);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) sums[r] = fmaf(x[i], w[i], sums[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kBookRows; ++r) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sums[r] += __shfl_xor_sync(kAllLanes, sums[r], offset);
      if (lane != r || r >= p.x.rows) continue;
      const float v[kChunk] = {sums[r] + (p.bias ? p.bias[row] : 0.0f), 0.0f, 0.0f, 0.0f};
      store_floats(p.out_code, static_cast<char*>(p.out) + (r * p.w.rows + row) * (code_bits(p.out_code) / 8), 1, v, false, Key{0, 0, 0}, 0);
    }
  }
}

// --- float x packed weight, tensor cores ------------------------------------------------------------------
// For bf16 and fp16 x: both are tf32 numbers already, and a weight is split into two, so the products lose nothing but
// the last bits of the weight.
namespace wmma = nvcuda::wmma;
constexpr int kTfTile = 64, kTfDepth = 32, kTfPitch = kTfDepth + 4, kTfOutPitch = kTfTile + 4;

__global__ void __launch_bounds__(kGemmThreads) tf32_kernel(const __grid_constant__ Product p) {
  constexpr int inputs = 2 * kTfTile * kTfPitch, outputs = kTfTile * kTfOutPitch;
  alignas(32) __shared__ float shared[inputs > outputs ? inputs : outputs];
  float *sa = shared, *sb = shared + kTfTile * kTfPitch;
  const int warp = threadIdx.x / 32, warp_row = warp / 2 * 16, warp_col = warp % 2 * 32;  // 8 warps: 4 x 2, each 16 x 32
  const int64_t across = divide_up(p.n, kTfTile), tiles = across * divide_up(p.m, kTfTile);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t down = divide(tile, across), row0 = down * kTfTile, col0 = (tile - down * across) * kTfTile;
    wmma::fragment<wmma::accumulator, 16, 16, 8, float> sums[2];
    wmma::fill_fragment(sums[0], 0.0f);
    wmma::fill_fragment(sums[1], 0.0f);
    for (int64_t k0 = 0; k0 < p.k; k0 += kTfDepth) {
      __syncthreads();  // the last tile has been used
      stage<kTfTile, kTfDepth, kTfPitch, false>(p.a, row0, k0, sa);
      stage<kTfTile, kTfDepth, kTfPitch, false>(p.b, col0, k0, sb);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kTfDepth; k += 8) {
        wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major> a;
        wmma::load_matrix_sync(a, sa + warp_row * kTfPitch + k, kTfPitch);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::col_major> high, low;
          wmma::load_matrix_sync(high, sb + (warp_col + j * 16) * kTfPitch + k, kTfPitch);
#pragma unroll
          for (int i = 0; i < high.num_elements; ++i) {
            const float v = high.x[i];
            // Cut, not rounded, to 11 significant bits: the rest is then exact, and finite where v is.
            const float top = bits_float(float_bits(v) & 0xffffe000u), rest = v - top;
            const bool special = (float_bits(v) & 0x7f800000u) == 0x7f800000u;  // nan and inf go whole into `high`
            high.x[i] = special ? v : top;
            low.x[i] = special ? 0.0f : bits_float(float_bits(rest) & 0xffffe000u);
          }
          wmma::mma_sync(sums[j], a, low, sums[j]);
          wmma::mma_sync(sums[j], a, high, sums[j]);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 2; ++j) wmma::store_matrix_sync(shared + warp_row * kTfOutPitch + warp_col + j * 16, sums[j], kTfOutPitch, wmma::mem_row_major);
    __syncthreads();
    for (int c = threadIdx.x; c < kTfTile * kTfTile / kChunk; c += kGemmThreads) {
      const int row = c / (kTfTile / kChunk), col = c % (kTfTile / kChunk) * kChunk;
      float v[kChunk];
      load_floats(kF32, reinterpret_cast<const char*>(shared + row * kTfOutPitch + col), kChunk, v);
      store_product(p, row0 + row, col0 + col, v);
    }
    __syncthreads();  // shared memory is free again
  }
}

// --- experts ----------------------------------------------------------------------------------------------
// Tiles are numbered expert by expert; offs is read on the device, so there may be fewer than were launched.
int64_t grouped_tiles(const GroupedArgs& g, int64_t side) {
  const int64_t down = g.summed || !g.offs ? g.experts * divide_up(g.m, side) : g.tokens / side + g.experts;
  return down * divide_up(g.n, side);
}

// The expert that tile `number` belongs to (experts: none), its part of the work and the tile's corner.
__device__ __forceinline__ int64_t grouped_tile(const GroupedArgs& g, int64_t number, int64_t side, Expert& x, int64_t& row0, int64_t& col0) {
  const int64_t across = divide_up(g.n, side);
  int64_t down = divide(number, across), e = 0;
  col0 = (number - down * across) * side;
  for (; e < g.experts; ++e) {
    x = expert_of(g, e);
    const int64_t own = divide_up(x.m, side);
    if (down < own) break;
    down -= own;
  }
  row0 = down * side;
  return e;
}

template <bool WIDE>
__global__ void __launch_bounds__(kGemmThreads) int8_grouped_kernel(const __grid_constant__ GroupedArgs g, int64_t tiles) {
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Expert x;
    int64_t row0, col0;
    if (grouped_tile(g, tile, kByteTile, x, row0, col0) == g.experts) return;
    int8_tile<WIDE>({x.m, x.n, x.k, static_cast<const int8_t*>(x.a.codes), static_cast<const int8_t*>(x.b.codes), x.a.scales, x.b.scales, x.bias, x.out,
                     g.out_code}, row0, col0);
  }
}

__global__ void __launch_bounds__(kGemmThreads) grouped_kernel(const __grid_constant__ GroupedArgs g, int64_t tiles) {
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Expert x;
    int64_t row0, col0;
    if (grouped_tile(g, tile, kProductTile, x, row0, col0) == g.experts) return;
    product_tile({{x.a, !x.by_tokens}, {x.b, !x.by_tokens}, x.m, x.n, x.k, x.bias, x.out, g.out_code}, row0, col0);
  }
}

bool exact(const Matrix& m) { return (m.code == kInt8 || m.code == kInt7) && m.block == 0; }

}  // namespace

void matmul_grouped(const GroupedArgs& g, const Launch& where) {
  if (exact(g.a) && exact(g.b)) {
    const int64_t tiles = grouped_tiles(g, kByteTile);
    if ((g.summed ? g.tokens : g.k) <= kInt32Products) launch("matmul_grouped", int8_grouped_kernel<false>, tiles, dim3(kGemmThreads), where, g, tiles);
    else launch("matmul_grouped (long k)", int8_grouped_kernel<true>, tiles, dim3(kGemmThreads), where, g, tiles);
  } else {
    const int64_t tiles = grouped_tiles(g, kProductTile);
    launch("matmul_grouped (fp32)", grouped_kernel, tiles, dim3(kGemmThreads), where, g, tiles);
  }
}

void matmul_int8(const Int8MatmulArgs& p, const Launch& where) {
  const int64_t tiles = divide_up(p.m, kByteTile) * divide_up(p.n, kByteTile);
  if (p.k <= kInt32Products) launch("matmul_int8", int8_kernel<false>, tiles, dim3(kGemmThreads), where, p);
  else launch("matmul_int8 (long k)", int8_kernel<true>, tiles, dim3(kGemmThreads), where, p);
}

void matmul_packed(const PackedMatmulArgs& p, const Launch& where) {
  if (fits_few_rows(p)) switch (code_bits(p.w.code)) {
    case 8: return few_rows<8>(p, where);
    case 4: return few_rows<4>(p, where);
    case 3: return few_rows<3>(p, where);
    default: return few_rows<2>(p, where);
  }
  if (is_book(p.w.code) && !p.transpose && p.x.rows <= kBookRows)
    return launch("matmul_codebook (few rows)", book_rows_kernel, divide_up(p.w.rows, kBookWarps), dim3(kBookWarps * 32), where, p);
  const int64_t n = p.transpose ? p.w.cols : p.w.rows, k = p.transpose ? p.w.rows : p.w.cols;
  const Product product_args{{p.x, true}, {p.w, !p.transpose}, p.x.rows, n, k, p.bias, static_cast<char*>(p.out), p.out_code};
  if (p.x.code != kBF16 && p.x.code != kF16) return product("matmul_packed", product_args, where);
  launch("matmul_packed (tensor cores)", tf32_kernel, divide_up(p.x.rows, kTfTile) * divide_up(n, kTfTile), dim3(kGemmThreads), where, product_args);
}

}  // namespace gradmill::cuda
