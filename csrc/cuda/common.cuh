// What every CUDA kernel here shares: checked launches, the device guard, and chunks.
//
// A chunk is up to four neighbouring elements of one row: a 16-byte access in fp32, 8 bytes in bf16/fp16, 4 bytes of
// 8-bit codes, 2 bytes of 4-bit codes, one Philox group. A thread reads a chunk, works on it in registers and writes
// it; neighbouring lanes take neighbouring chunks, so a warp's accesses are coalesced in every format. Where the
// address is not aligned or the row ends, the same chunk is read element by element. Formats are run-time values: one
// uniform branch per chunk. Never run on a GPU yet; tests/test_cuda.py runs these sources on the CPU (emulation/).
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace gradmill::cuda {
namespace {

// --- host: errors, device, launch -------------------------------------------------------------------------
inline void check(cudaError_t error, const char* call, const char* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not left behind for the next call to find
  throw std::runtime_error(std::string("gradmill: ") + call + " for " + kernel + " failed: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Makes `device` current and puts the old one back. Always sets: torch has its own copy of the runtime.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* kernel) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice", kernel);
    check(cudaSetDevice(device), "cudaSetDevice", kernel);
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

// Blocks for `units` pieces of work. Kernels loop with the grid as stride, so the cap loses nothing.
inline unsigned grid_of(int64_t units) {
  constexpr int64_t cap = int64_t{1} << 30;
  return static_cast<unsigned>(units < cap ? units : cap);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t units, dim3 threads, const Launch& where, Arguments&&... arguments) {
  if (units <= 0) return;
  DeviceGuard guard(where.device, name);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid_of(units));
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(where.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "cudaLaunchKernelEx", name);
}

// --- small things -----------------------------------------------------------------------------------------
constexpr int kChunk = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

GM_HD int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
GM_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__device__ __forceinline__ bool aligned(const void* p, uintptr_t bytes) { return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0; }

// a / b for a >= 0, b > 0: a 64-bit division costs some 70 instructions, a 32-bit one 20.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

// How many elements (0 to 4) of the chunk at `at` lie before `end`.
__device__ __forceinline__ int chunk_length(int64_t at, int64_t end) {
  return end - at >= kChunk ? kChunk : end > at ? static_cast<int>(end - at) : 0;
}

__device__ __forceinline__ char* address(const Matrix& m, int64_t row, int64_t col) {
  const int bits = code_bits(m.code);
  return static_cast<char*>(m.codes) + row * ((m.cols * bits + 7) / 8) + col * bits / 8;
}

// --- random words -----------------------------------------------------------------------------------------
// The words of elements [element, element + 4): one Philox call where element is a multiple of 4, else two.
__device__ __forceinline__ void words_of(const Key& key, uint64_t element, uint32_t (&w)[kChunk]) {
  uint32_t a0, a1, a2, a3;
  element += key.first;
  philox4(key, element >> 2, a0, a1, a2, a3);
  const int shift = static_cast<int>(element & 3);
  w[0] = a0, w[1] = a1, w[2] = a2, w[3] = a3;
  if (shift != 0) {
    uint32_t b0, b1, b2, b3;
    philox4(key, (element >> 2) + 1, b0, b1, b2, b3);
    w[0] = shift == 1 ? a1 : shift == 2 ? a2 : a3;
    w[1] = shift == 1 ? a2 : shift == 2 ? a3 : b0;
    w[2] = shift == 1 ? a3 : shift == 2 ? b0 : b1;
    w[3] = shift == 1 ? b0 : shift == 2 ? b1 : b2;
  }
}

// --- plain floats -----------------------------------------------------------------------------------------
// n elements at p; the rest of x is 0. kDelta reads as 0.
__device__ __forceinline__ void load_floats(int code, const char* p, int n, float (&x)[kChunk]) {
  if (code == kF32) {
    const float* f = reinterpret_cast<const float*>(p);
    if (n == kChunk && aligned(p, 16)) {
      const float4 v = *reinterpret_cast<const float4*>(p);
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = i < n ? f[i] : 0.0f;
    }
  } else if (code == kDelta) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = 0.0f;
  } else {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
    uint32_t low = 0, high = 0;
    if (n == kChunk && aligned(p, 8)) {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      low = v.x, high = v.y;
    } else {
      if (n > 0) low = h[0];
      if (n > 1) low |= static_cast<uint32_t>(h[1]) << 16;
      if (n > 2) high = h[2];
      if (n > 3) high |= static_cast<uint32_t>(h[3]) << 16;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const uint16_t u = static_cast<uint16_t>((i < 2 ? low : high) >> (i % 2 * 16));
      x[i] = code == kBF16 ? bf16_to_float(u) : f16_to_float(u);
    }
  }
}

// stochastic: bf16 is rounded with the words of `key`, `element` being the index of x[0]. kDelta stores fp32.
__device__ __forceinline__ void store_floats(int code, char* p, int n, const float (&x)[kChunk], bool stochastic, const Key& key, uint64_t element) {
  if (code == kF32 || code == kDelta) {
    if (n == kChunk && aligned(p, 16)) {
      *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (i < n) reinterpret_cast<float*>(p)[i] = x[i];
    }
    return;
  }
  uint32_t h[kChunk];
  if (code == kBF16 && stochastic) {
    uint32_t w[kChunk];
    words_of(key, element, w);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) h[i] = float_to_bf16_stochastic(x[i], w[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) h[i] = code == kBF16 ? float_to_bf16(x[i]) : float_to_f16(x[i]);
  }
  if (n == kChunk && aligned(p, 8)) {
    *reinterpret_cast<uint2*>(p) = make_uint2(h[0] | h[1] << 16, h[2] | h[3] << 16);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < n) reinterpret_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(h[i]);
  }
}

// --- blocked codes ----------------------------------------------------------------------------------------
template <int CODE>
__device__ __forceinline__ void decode_all(const int (&q)[kChunk], Block b, float (&x)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = decode<CODE>(q[i], b);
}

__device__ __forceinline__ void decode_chunk(int code, const int (&q)[kChunk], Block b, float (&x)[kChunk]) {
  switch (code) {
    case kInt8: return decode_all<kInt8>(q, b, x);
    case kUInt8: return decode_all<kUInt8>(q, b, x);
    case kInt4: return decode_all<kInt4>(q, b, x);
    case kUInt4: return decode_all<kUInt4>(q, b, x);
    case kMoment8: return decode_all<kMoment8>(q, b, x);
    case kSquare8: return decode_all<kSquare8>(q, b, x);
    case kMoment4: return decode_all<kMoment4>(q, b, x);
    case kSquare4: return decode_all<kSquare4>(q, b, x);
    case kE4M3: return decode_all<kE4M3>(q, b, x);
    case kE5M2: return decode_all<kE5M2>(q, b, x);
    case kE2M1: return decode_all<kE2M1>(q, b, x);
    case kUInt3: case kUInt2: return decode_all<kUInt8>(q, b, x);
    case kSign: return decode_all<kSign>(q, b, x);
    default: return decode_all<kInt8>(q, b, x);  // every symmetric integer decodes alike
  }
}

template <int CODE>
__device__ __forceinline__ void encode_all(const float (&x)[kChunk], Block b, bool stochastic, const uint32_t (&w)[kChunk], int (&q)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) q[i] = stochastic ? encode<CODE, true>(x[i], b, w[i]) : encode<CODE, false>(x[i], b, 0);
}

// The codes of n elements at p as integers; the rest 0. A chunk of 2- or 4-bit codes fills one or two bytes; of 3-bit
// codes 12 bits, which start in the middle of a byte where `shift` is 4, as other odd numbers of bits do.
__device__ __forceinline__ void load_codes(int code, const uint8_t* p, int n, int (&q)[kChunk], int shift = 0) {
  const int bits = code_bits(code), bytes = (shift + n * bits + 7) / 8;
  uint32_t raw = 0;
  if (bits == 8 && n == kChunk && aligned(p, 4)) {
    raw = *reinterpret_cast<const uint32_t*>(p);
  } else if (bits == 4 && n == kChunk && aligned(p, 2)) {
    raw = *reinterpret_cast<const uint16_t*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < bytes) raw |= static_cast<uint32_t>(p[i]) << 8 * i;
  }
  raw >>= shift;
  const int sign = code == kInt8 || code == kInt7 || code == kInt4 || code == kInt4Outlier || code == kInt3 || code == kInt2 ? 1 << (bits - 1) : 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) q[i] = i < n ? (static_cast<int>(raw >> bits * i & ((1u << bits) - 1u)) ^ sign) - sign : 0;
}

__device__ __forceinline__ void store_codes(int code, uint8_t* p, int n, const int (&q)[kChunk]) {
  const int bits = code_bits(code), bytes = (n * bits + 7) / 8;
  uint32_t raw = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) raw |= i < n ? (static_cast<uint32_t>(q[i]) & ((1u << bits) - 1u)) << bits * i : 0u;
  if (bits == 8 && n == kChunk && aligned(p, 4)) {
    *reinterpret_cast<uint32_t*>(p) = raw;
  } else if (bits == 4 && n == kChunk && aligned(p, 2)) {
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(raw);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < bytes) p[i] = static_cast<uint8_t>(raw >> 8 * i);
  }
}

GM_HD int64_t blocks_in_row(const Matrix& m) { return divide_up(m.cols, m.block); }

__device__ __forceinline__ Block block_at(const Matrix& m, int64_t row, int64_t col) {
  const int64_t at = row * divide(m.cols + m.block - 1, m.block) + divide(col, m.block);
  return {m.scales[at], has_zero_point(m.code) ? static_cast<int>(m.zeros[at]) : 0, 0.0f};
}

__device__ __forceinline__ void store_block(const Matrix& m, int64_t row, int64_t col, Block b) {
  const int64_t at = row * divide(m.cols + m.block - 1, m.block) + divide(col, m.block);
  m.scales[at] = b.scale;
  if (has_zero_point(m.code)) m.zeros[at] = static_cast<uint8_t>(b.zero);
}

// Functions that are called, not inlined: kernels read and write several operands in any of nine formats, and a copy
// of the switch for each would cost registers and compile time; a call is some 30 instructions per four elements.
// Arguments are scalars, so that they travel in registers.
__device__ __noinline__ float4 decode_call(int code, const uint8_t* p, int n, float scale, int zero, int shift) {
  int q[kChunk];
  float x[kChunk];
  load_codes(code, p, n, q, shift);
  decode_chunk(code, q, Block{scale, zero, 0.0f}, x);
  return make_float4(x[0], x[1], x[2], x[3]);
}

// The same where every element may have another scale: blocks whose length is no multiple of 4.
__device__ __noinline__ float4 decode_mixed_call(int code, const uint8_t* p, int n, const float* scales, const uint8_t* zeros, int64_t col, int64_t block) {
  int q[kChunk];
  float x[kChunk] = {0.0f, 0.0f, 0.0f, 0.0f};
  load_codes(code, p, n, q);
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const int64_t at = divide(col + i, block);
    float y[kChunk];
    decode_chunk(code, q, Block{scales[at], has_zero_point(code) ? static_cast<int>(zeros[at]) : 0, 0.0f}, y);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) x[k] = k == i ? y[k] : x[k];
  }
  return make_float4(x[0], x[1], x[2], x[3]);
}

// Replaces what a chunk holds of its block's outliers. A block with a nan or an inf is all nan.
__device__ __forceinline__ void put_outliers(const Matrix& m, int64_t row, int64_t col, int n, float (&x)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int64_t block = divide(col + i, m.block), at = row * divide(m.cols + m.block - 1, m.block) + block;
    if (i >= n || m.scales[at] != m.scales[at]) continue;
    const Outliers& o = reinterpret_cast<const Outliers*>(m.zeros)[at];
    for (int k = 0; k < 2; ++k)
      if (o.position[k] == col + i - block * m.block) x[i] = o.value[k];
  }
}

// Where in its first byte a chunk begins: 0 but for odd numbers of bits.
GM_HD int bit_offset(const Matrix& m, int64_t col) { return static_cast<int>(col * code_bits(m.code) % 8); }

// A chunk of indices into a codebook.
__device__ __noinline__ float4 book_call(int code, const uint8_t* p, int n, const float* book, int shift) {
  int q[kChunk];
  load_codes(code, p, n, q, shift);
  return make_float4(book[q[0]], book[q[1]], book[q[2]], book[q[3]]);
}
__device__ __forceinline__ const float* book_of(const Matrix& m, int64_t row) { return m.scales + (static_cast<int64_t>(m.zeros[row]) << (m.code - kBook)); }

// Any stored matrix as fp32: elements [col, col + n) of a row, the rest of x is unspecified, but 0 for n = 0. The
// chunk starts a multiple of 4 after the start of a block, so with block % 4 == 0 it has one scale.
__device__ __forceinline__ void read_chunk(const Matrix& m, int64_t row, int64_t col, int n, float (&x)[kChunk]) {
  const char* p = address(m, row, col);
  if (!is_blocked(m.code)) return load_floats(m.code, p, n, x);
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (n > 0) {
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(p);
    const int64_t first = row * blocks_in_row(m);
    if (is_book(m.code)) {
      v = book_call(m.code, codes, n, book_of(m, row), bit_offset(m, col));
    } else if (m.block % kChunk == 0 || m.block >= m.cols) {
      const int64_t at = first + divide(col, m.block);
      v = decode_call(m.code, codes, n, m.scales[at], has_zero_point(m.code) ? static_cast<int>(m.zeros[at]) : 0, bit_offset(m, col));
    } else {
      v = decode_mixed_call(m.code, codes, n, m.scales + first, m.zeros + (has_zero_point(m.code) ? first : 0), col, m.block);
    }
  }
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  if (m.code == kInt4Outlier && n > 0) put_outliers(m, row, col, n, x);
}

// How codes are rounded: kStochastic with a Philox word per element, kDithered with words that differ by kDitherStep
// from element to element, `word` being the first one's.
enum Rounding { kNearest, kStochastic, kDithered };

// Encodes n elements of one block, the first of them number `element` of the matrix, and writes them at p.
__device__ __forceinline__ void encode_chunk(int code, uint8_t* p, int n, Block b, const float (&x)[kChunk], Rounding rounding, const Key& key,
                                             uint64_t element, uint32_t word) {
  int q[kChunk] = {0, 0, 0, 0};
  if (b.scale > 0.0f) {  // else all zero, or a nan or inf inside: every code is 0
    uint32_t w[kChunk];
    if (rounding == kStochastic) {
      words_of(key, element, w);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) w[i] = word + static_cast<uint32_t>(i) * kDitherStep;
    }
    const bool stochastic = rounding != kNearest;
    switch (code) {
      case kInt8: encode_all<kInt8>(x, b, stochastic, w, q); break;
      case kUInt8: encode_all<kUInt8>(x, b, stochastic, w, q); break;
      case kInt4: encode_all<kInt4>(x, b, stochastic, w, q); break;
      case kUInt4: encode_all<kUInt4>(x, b, stochastic, w, q); break;
      case kMoment8: encode_all<kMoment8>(x, b, stochastic, w, q); break;
      case kMoment4: encode_all<kMoment4>(x, b, stochastic, w, q); break;
      case kSquare4: encode_all<kSquare4>(x, b, stochastic, w, q); break;
      case kE4M3: encode_all<kE4M3>(x, b, stochastic, w, q); break;
      case kE5M2: encode_all<kE5M2>(x, b, stochastic, w, q); break;
      case kE2M1: encode_all<kE2M1>(x, b, stochastic, w, q); break;
      case kInt7: encode_all<kInt7>(x, b, stochastic, w, q); break;
      case kUInt2: encode_all<kUInt2>(x, b, stochastic, w, q); break;
      case kInt2: encode_all<kInt2>(x, b, stochastic, w, q); break;
      default: encode_all<kSquare8>(x, b, stochastic, w, q); break;
    }
  }
  store_codes(code, p, n, q);
}

__device__ __noinline__ void encode_call(int code, uint8_t* p, int n, float scale, int zero, float inverse, float4 v, Rounding rounding, uint64_t seed,
                                         uint32_t step, uint32_t stream, uint64_t element, uint32_t word) {
  const float x[kChunk] = {v.x, v.y, v.z, v.w};
  encode_chunk(code, p, n, Block{scale, zero, inverse}, x, rounding, Key{seed, step, stream}, element, word);
}

// A chunk of a matrix with blocks; b is its block's, fresh from block_of.
__device__ __forceinline__ void write_codes(const Matrix& m, int64_t row, int64_t col, int n, Block b, const float (&x)[kChunk], Rounding rounding,
                                            const Key& key, uint32_t word) {
  encode_call(m.code, reinterpret_cast<uint8_t*>(address(m, row, col)), n, b.scale, b.zero, b.inverse, make_float4(x[0], x[1], x[2], x[3]), rounding,
              key.seed, key.step, key.stream, key.first + static_cast<uint64_t>(row * m.cols + col), word);
}

// --- block statistics -------------------------------------------------------------------------------------
// Maxima and minima of integers: the order of a reduction does not matter.
struct Stats {
  uint32_t absmax = 0;
  int32_t lo = 0, hi = 0;
  uint32_t changed = 0;  // some bit differs from the stored value (weights only)

  __device__ __forceinline__ void add(float x) {
    const uint32_t a = magnitude_bits(x);
    const int32_t o = ordered_bits(x);
    absmax = a > absmax ? a : absmax;
    lo = o < lo ? o : lo;
    hi = o > hi ? o : hi;
  }
  __device__ __forceinline__ void add(const float (&x)[kChunk], int n) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < n) add(x[i]);
  }
  __device__ __forceinline__ void compare(const float (&before)[kChunk], const float (&after)[kChunk], int n) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < n && float_bits(before[i]) != float_bits(after[i])) changed = 1;
  }
  __device__ __forceinline__ void add(const Stats& s) {
    absmax = s.absmax > absmax ? s.absmax : absmax;
    lo = s.lo < lo ? s.lo : lo;
    hi = s.hi > hi ? s.hi : hi;
    changed |= s.changed;
  }
  __device__ __forceinline__ Block block(int code) const { return block_of(code, absmax, lo, hi); }
};

// Over groups of LANES (a power of two up to 32) neighbouring lanes; all 32 lanes must call. Every lane gets the result.
template <int LANES>
__device__ __forceinline__ Stats reduce_lanes(Stats s) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) {
    Stats other;
    other.absmax = __shfl_xor_sync(kAllLanes, s.absmax, offset);
    other.lo = __shfl_xor_sync(kAllLanes, s.lo, offset);
    other.hi = __shfl_xor_sync(kAllLanes, s.hi, offset);
    other.changed = __shfl_xor_sync(kAllLanes, s.changed, offset);
    s.add(other);
  }
  return s;
}

// Over a thread block of THREADS; all must call. Every thread gets the result.
template <int THREADS>
__device__ __forceinline__ Stats reduce_block(Stats s) {
  constexpr int warps = THREADS / 32;
  __shared__ uint32_t absmax[warps], changed[warps];
  __shared__ int32_t lo[warps], hi[warps];
  s = reduce_lanes<32>(s);
  __syncthreads();  // an earlier call's results have been read
  if (threadIdx.x % 32 == 0) {
    absmax[threadIdx.x / 32] = s.absmax, changed[threadIdx.x / 32] = s.changed;
    lo[threadIdx.x / 32] = s.lo, hi[threadIdx.x / 32] = s.hi;
  }
  __syncthreads();
  Stats all;
  for (int w = 0; w < warps; ++w) {
    Stats part;
    part.absmax = absmax[w], part.changed = changed[w], part.lo = lo[w], part.hi = hi[w];
    all.add(part);
  }
  return all;
}

}  // namespace
}  // namespace gradmill::cuda
