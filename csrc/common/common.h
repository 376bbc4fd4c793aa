// Words shared by every kernel, CPU and CUDA: qualifiers, storage codes, bit casts.
//
// Everything in csrc/common is in an unnamed namespace on purpose. The CPU files are compiled once per
// instruction set; with external linkage the linker would keep ONE copy of each inline function, perhaps the
// AVX-512 one, and the portable kernels would call it.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GM_HD __host__ __device__ __forceinline__
#else
#define GM_HD inline __attribute__((always_inline))
#endif

namespace gradmill {
namespace {

// How one element is stored. The numbers are the wire format between pyops/formats.py and native code:
// append, never renumber.
enum Code : int {
  kF32 = 0,      // plain fp32
  kBF16 = 1,     // plain bfloat16
  kF16 = 2,      // plain float16
  kInt8 = 3,     // symmetric, scale = absmax/127, codes in [-127, 127]
  kUInt8 = 4,    // zero point, scale = (max-min)/255, codes in [0, 255]
  kInt4 = 5,     // symmetric, scale = absmax/7, codes in [-7, 7] as two's-complement nibbles, low first
  kUInt4 = 6,    // zero point, scale = (max-min)/15, codes in [0, 15], low nibble first
  kMoment8 = 7,  // signed 8-bit float code (state exp_avg): sign, 3 exponent bits, 4 mantissa bits
  kSquare8 = 8,  // 8-bit float code of the square root (state exp_avg_sq): 3 exponent bits, 5 mantissa bits
  kDelta = 9,    // weights only: reads as 0 and stores fp32, so that a step leaves its update there
  kE4M3 = 10,    // float8_e4m3fn, saturating, scale = absmax/448
  kE5M2 = 11,    // float8_e5m2, saturating, scale = absmax/57344
  kE2M1 = 12,    // fp4 {0, .5, 1, 1.5, 2, 3, 4, 6} and sign, scale = absmax/6, low nibble first
  kInt7 = 13,    // int8 with codes in [-63, 63], scale = absmax/63
  kUInt3 = 14,   // zero point, scale = (max-min)/7; a row is one little-endian stream of 3-bit codes
  kUInt2 = 15,   // zero point, scale = (max-min)/3, lowest bits first
  kInt3 = 16,    // symmetric, scale = absmax/3, two's complement
  kInt2 = 17,    // symmetric, scale = absmax, codes in [-1, 1], two's complement
  kInt4Outlier = 18,  // int4, the two largest magnitudes of a block apart: Outliers, where others have zero points
  kMoment4 = 19,  // moment8 in 4 bits: sign, 2 exponent bits, 1 mantissa bit
  kSquare4 = 20,  // square8 in 4 bits: 2 exponent bits, 2 mantissa bits
  kBF16Plus8 = 21,   // fp32 weights in two pieces: the nearest bfloat16, and 8 of the 16 bits that lacks (Matrix::zeros)
  kBF16Plus16 = 22,  // all 16 of them: exactly fp32
  kF16Plus8 = 23,    // the nearest float16 and the 8 bits that follow
  kF16Plus16 = 24,   // 16 bits: fp32 exactly from 2^-17 up to 65504
  kSign = 25,    // one bit, 1 = negative, lowest bits first; a scale per row; made by pack_signs, not by quantize
  kBook = 64,    // kBook + bits, 1 to 8: indices, a row is one little-endian stream of them, into codebooks of 2^bits floats, which stand
                 // in Matrix::scales; Matrix::zeros says for each row which. Operands of matmul_packed only: not in pyops/formats.py
};

// What an int4 block with outliers keeps in Matrix::zeros, 12 bytes a block.
struct Outliers {
  float value[2];
  uint8_t position[2];
  uint8_t unused[2];
};

// What a random word is used for (DESIGN: "purposes are numbered in one table"; the Python one is
// pyops/reference/philox.py).
enum Purpose : uint32_t {
  kWeightRounding = 0,
  kStateRounding = 1,
  kGradientRounding = 2,
  kBasis = 3,
  kDither = 4,
  kHadamardSigns = 5,
};

GM_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
#endif
}

GM_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, 4);
  return x;
#endif
}

GM_HD bool is_book(int code) { return code > kBook; }
GM_HD bool is_split(int code) { return code >= kBF16Plus8 && code <= kF16Plus16; }
GM_HD bool is_blocked(int code) { return code >= kInt8 && code != kDelta && !is_split(code); }  // has scales
GM_HD bool has_zero_point(int code) { return code == kUInt8 || code == kUInt4 || code == kUInt3 || code == kUInt2; }
GM_HD bool is_square(int code) { return code == kSquare8 || code == kSquare4; }  // a second moment, stored as its root
GM_HD bool is_offset_float(int code) { return is_square(code) || code == kMoment8 || code == kMoment4; }
GM_HD int code_bits(int code) {
  if (code == kF32 || code == kDelta) return 32;
  if (is_book(code)) return code - kBook;
  if (code == kBF16 || code == kF16 || is_split(code)) return 16;
  if (code == kInt4 || code == kUInt4 || code == kE2M1 || code == kInt4Outlier || code == kMoment4 || code == kSquare4) return 4;
  if (code == kSign) return 1;
  return code == kUInt3 || code == kInt3 ? 3 : code == kUInt2 || code == kInt2 ? 2 : 8;
}
// The largest magnitude of a symmetric integer or small-float code, or the largest zero-point code, in units of the scale.
GM_HD constexpr float code_top(int code) {
  return code == kInt8 ? 127.0f : code == kInt7 ? 63.0f : code == kInt4 || code == kInt4Outlier || code == kUInt3 ? 7.0f
       : code == kUInt8 ? 255.0f : code == kUInt4 ? 15.0f : code == kInt3 || code == kUInt2 ? 3.0f : code == kInt2 ? 1.0f
       : code == kE4M3 ? 448.0f : code == kE5M2 ? 57344.0f : 6.0f;
}

}  // namespace
}  // namespace gradmill
