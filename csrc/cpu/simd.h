// A thin vector wrapper, one per instruction-set level: W lanes of 32 bits, as floats (vf) or integers (vi).
// Only what the matrix kernels use. The portable one is written in the vector extensions of GCC and clang, so
// that any CPU can compile it.
#pragma once
#include "../common/common.h"

#if GM_LEVEL >= 1
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace gradmill {
namespace {

// 32 bits of anything: a float, two int16 or four int8. Buffers are moved and transposed in this unit.
typedef uint32_t lane __attribute__((may_alias));

#if GM_LEVEL >= 1
GM_HD float sum8(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
GM_HD int32_t sum8(__m256i x) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
#endif

// Shuffles of 512-bit vectors are written with __builtin_shufflevector: gcc 12 warns inside its own intrinsics.
#if GM_LEVEL >= 2

constexpr int W = 16;
typedef __m512 vf;
typedef __m512i vi;

GM_HD vf load(const void* p) { return _mm512_loadu_ps(p); }
GM_HD void store(void* p, vf x) { _mm512_storeu_ps(p, x); }
GM_HD vf zero() { return _mm512_setzero_ps(); }
GM_HD vf broadcast(float x) { return _mm512_set1_ps(x); }
GM_HD vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
GM_HD vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
GM_HD float sum(vf x) {
  return sum8(_mm256_add_ps(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15)));
}

GM_HD vi load_int(const void* p) { return _mm512_loadu_si512(p); }
GM_HD void store(void* p, vi x) { _mm512_storeu_si512(p, x); }
GM_HD vi zero_int() { return _mm512_setzero_si512(); }
GM_HD vi broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
GM_HD vi add(vi a, vi b) { return _mm512_add_epi32(a, b); }
GM_HD int32_t sum(vi x) {
  return sum8(_mm256_add_epi32(__builtin_shufflevector(x, x, 0, 1, 2, 3), __builtin_shufflevector(x, x, 4, 5, 6, 7)));
}
// acc + a0*b0 + a1*b1 over the int16 pairs of each lane
GM_HD vi madd_pairs(vi acc, vi a, vi b) { return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
// the two sums of two products (uint8 a) * (int8 b) of each lane, in 16 bits
GM_HD vi multiply_bytes(vi a, vi b) { return _mm512_maddubs_epi16(a, b); }
GM_HD vi add_pairs(vi a, vi b) { return _mm512_add_epi16(a, b); }
GM_HD vi one_pairs() { return _mm512_set1_epi16(1); }
#if GM_LEVEL >= 3
// acc + the four products (uint8 a) * (int8 b) of each lane, modulo 2^32
GM_HD vi madd_quads(vi acc, vi a, vi b) { return _mm512_dpbusd_epi32(acc, a, b); }
#endif

GM_HD void transpose(vf (&r)[W]) {
  vf t[W];
  for (int i = 0; i < W; i += 2) {  // pairs of rows
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int i = 0; i < W; i += 4)  // fours: r[i + c] has column 4q + c in its 128-bit part q
    for (int h = 0; h < 2; ++h) {
      r[i + 2 * h] = __builtin_shufflevector(t[i + h], t[i + h + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      r[i + 2 * h + 1] = __builtin_shufflevector(t[i + h], t[i + h + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  for (int c = 0; c < 4; ++c) {  // the 128-bit parts themselves, 4 x 4
    vf a = __builtin_shufflevector(r[c], r[c + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    vf b = __builtin_shufflevector(r[c], r[c + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    vf d = __builtin_shufflevector(r[c + 8], r[c + 12], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    vf e = __builtin_shufflevector(r[c + 8], r[c + 12], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    t[c] = __builtin_shufflevector(a, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    t[c + 4] = __builtin_shufflevector(b, e, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    t[c + 8] = __builtin_shufflevector(a, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    t[c + 12] = __builtin_shufflevector(b, e, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  for (int i = 0; i < W; ++i) r[i] = t[i];
}

// W codes of a block to (code - zero) * scale.
template <bool SIGNED>
struct ByteDecoder {
  vi zero;
  vf scale;
  GM_HD ByteDecoder(int z, float x) : zero(_mm512_set1_epi32(z)), scale(_mm512_set1_ps(x)) {}
  static constexpr int bits = 8;
  GM_HD vf operator()(const void* p) const {
    const __m128i codes = _mm_loadu_si128(static_cast<const __m128i*>(p));
    const vi value = SIGNED ? _mm512_cvtepi8_epi32(codes) : _mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), zero);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(value), scale);
  }
};
// Codes of 4, 3 or 2 bits, 16 of them a stream of bits. The values they can stand for are a table of 16 in a register,
// repeated for the shorter codes; vpermps, which looks at the low four bits of its indices, picks them.
template <int BITS>
struct TableDecoder {
  static constexpr int bits = BITS;
  vf table;
  GM_HD vf operator()(const void* p) const {
    const vi shifts = _mm512_setr_epi32(0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS, 0, BITS, 2 * BITS, 3 * BITS, 4 * BITS,
                                        5 * BITS, 6 * BITS, 7 * BITS);
    int32_t low = 0, high = 0;
    memcpy(&low, p, BITS);
    memcpy(&high, static_cast<const char*>(p) + BITS, BITS);
    const vi both = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shifts), table);
  }
};
template <int BITS, bool SIGNED>
struct BitsDecoder : TableDecoder<BITS> {
  GM_HD BitsDecoder(int zero, float scale) {
    const vi index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const vi top = _mm512_slli_epi32(index, 32 - BITS);
    const vi code = SIGNED ? _mm512_srai_epi32(top, 32 - BITS) : _mm512_srli_epi32(top, 32 - BITS);
    this->table = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(zero))), _mm512_set1_ps(scale));
  }
};
struct SignDecoder {
  static constexpr int bits = 1;
  vf scale, minus;
  GM_HD SignDecoder(int, float x) : scale(_mm512_set1_ps(x)), minus(_mm512_set1_ps(-x)) {}
  GM_HD vf operator()(const void* p) const {
    uint16_t codes;
    memcpy(&codes, p, 2);
    return _mm512_mask_mov_ps(scale, codes, minus);
  }
};
struct Float4Decoder : TableDecoder<4> {
  GM_HD Float4Decoder(int, float scale) {
    const vf values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    table = _mm512_mul_ps(values, _mm512_set1_ps(scale));
  }
};
// e4m3 (MANTISSA 3) and e5m2 (2): moved into place as float16, which vcvtph2ps reads exactly, denormals included; e4m3's
// smaller exponent bias is made up by 2^8 in the scale.
template <int MANTISSA>
struct Float8Decoder {
  static constexpr int bits = 8;
  vf scale;
  GM_HD Float8Decoder(int, float x) : scale(_mm512_set1_ps(MANTISSA == 3 ? x * 256.0f : x)) {}
  GM_HD vf operator()(const void* p) const {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    const __m256i half = MANTISSA == 2 ? _mm256_slli_epi16(wide, 8)
                                       : _mm256_or_si256(_mm256_and_si256(wide, _mm256_set1_epi16(-32768)),
                                                         _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(127)), 7));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), scale);
  }
};

#elif GM_LEVEL == 1

constexpr int W = 8;
typedef __m256 vf;
typedef __m256i vi;

GM_HD vf load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
GM_HD void store(void* p, vf x) { _mm256_storeu_ps(static_cast<float*>(p), x); }
GM_HD vf zero() { return _mm256_setzero_ps(); }
GM_HD vf broadcast(float x) { return _mm256_set1_ps(x); }
GM_HD vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
GM_HD vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
GM_HD float sum(vf x) { return sum8(x); }

GM_HD vi load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
GM_HD void store(void* p, vi x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
GM_HD vi zero_int() { return _mm256_setzero_si256(); }
GM_HD vi broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }
GM_HD vi add(vi a, vi b) { return _mm256_add_epi32(a, b); }
GM_HD int32_t sum(vi x) { return sum8(x); }
// acc + a0*b0 + a1*b1 over the int16 pairs of each lane
GM_HD vi madd_pairs(vi acc, vi a, vi b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
// the two sums of two products (uint8 a) * (int8 b) of each lane, in 16 bits
GM_HD vi multiply_bytes(vi a, vi b) { return _mm256_maddubs_epi16(a, b); }
GM_HD vi add_pairs(vi a, vi b) { return _mm256_add_epi16(a, b); }
GM_HD vi one_pairs() { return _mm256_set1_epi16(1); }

GM_HD void transpose(vf (&r)[W]) {
  __m256 t[W];
  for (int i = 0; i < W; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < W; i += 4)
    for (int h = 0; h < 2; ++h) {
      r[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0x44);
      r[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0xee);
    }
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm256_permute2f128_ps(r[c], r[c + 4], 0x20);
    t[c + 4] = _mm256_permute2f128_ps(r[c], r[c + 4], 0x31);
  }
  for (int i = 0; i < W; ++i) r[i] = t[i];
}

// W codes of a block to (code - zero) * scale.
template <bool SIGNED>
struct ByteDecoder {
  vi zero;
  vf scale;
  GM_HD ByteDecoder(int z, float x) : zero(_mm256_set1_epi32(z)), scale(_mm256_set1_ps(x)) {}
  static constexpr int bits = 8;
  GM_HD vf operator()(const void* p) const {
    const __m128i codes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
    const vi value = SIGNED ? _mm256_cvtepi8_epi32(codes) : _mm256_sub_epi32(_mm256_cvtepu8_epi32(codes), zero);
    return _mm256_mul_ps(_mm256_cvtepi32_ps(value), scale);
  }
};
// Codes of 4 bits or fewer, 8 of them a stream of bits: the same 32 bits in every lane, shifted until the lane's own code
// is at the top, then down again, with or without its sign.
template <int BITS>
GM_HD vi codes_on_top(const void* p) {
  int32_t codes = 0;
  memcpy(&codes, p, BITS);
  constexpr int top = 32 - BITS;
  return _mm256_sllv_epi32(_mm256_set1_epi32(codes), _mm256_setr_epi32(top, top - BITS, top - 2 * BITS, top - 3 * BITS, top - 4 * BITS,
                                                                       top - 5 * BITS, top - 6 * BITS, top - 7 * BITS));
}
template <int BITS, bool SIGNED>
struct BitsDecoder {
  static constexpr int bits = BITS;
  vi zero;
  vf scale;
  GM_HD BitsDecoder(int z, float x) : zero(_mm256_set1_epi32(z)), scale(_mm256_set1_ps(x)) {}
  GM_HD vf operator()(const void* p) const {
    const vi top = codes_on_top<BITS>(p);
    const vi value = SIGNED ? _mm256_srai_epi32(top, 32 - BITS) : _mm256_sub_epi32(_mm256_srli_epi32(top, 32 - BITS), zero);
    return _mm256_mul_ps(_mm256_cvtepi32_ps(value), scale);
  }
};
struct SignDecoder {
  static constexpr int bits = 1;
  vf scale;
  GM_HD SignDecoder(int, float x) : scale(_mm256_set1_ps(x)) {}
  GM_HD vf operator()(const void* p) const {
    return _mm256_xor_ps(scale, _mm256_castsi256_ps(_mm256_and_si256(codes_on_top<1>(p), _mm256_set1_epi32(INT32_MIN))));
  }
};
// The eight magnitudes are a table; vpermps looks at the low three bits of its indices. The sign is already in place.
struct Float4Decoder {
  static constexpr int bits = 4;
  vf table;
  GM_HD Float4Decoder(int, float scale)
      : table(_mm256_mul_ps(_mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f), _mm256_set1_ps(scale))) {}
  GM_HD vf operator()(const void* p) const {
    const vi top = codes_on_top<4>(p);
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, _mm256_srli_epi32(top, 28)),
                         _mm256_castsi256_ps(_mm256_and_si256(top, _mm256_set1_epi32(INT32_MIN))));
  }
};
// e4m3 (MANTISSA 3) and e5m2 (2): moved into place as float16, which vcvtph2ps reads exactly, denormals included; e4m3's
// smaller exponent bias is made up by 2^8 in the scale.
template <int MANTISSA>
struct Float8Decoder {
  static constexpr int bits = 8;
  vf scale;
  GM_HD Float8Decoder(int, float x) : scale(_mm256_set1_ps(MANTISSA == 3 ? x * 256.0f : x)) {}
  GM_HD vf operator()(const void* p) const {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
    const __m128i half = MANTISSA == 2 ? _mm_slli_epi16(wide, 8)
                                       : _mm_or_si128(_mm_and_si128(wide, _mm_set1_epi16(-32768)),
                                                      _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(127)), 7));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), scale);
  }
};

#else

constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));

GM_HD vf load(const void* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
GM_HD void store(void* p, vf x) { memcpy(p, &x, sizeof x); }
GM_HD vf zero() { return vf{}; }
GM_HD vf broadcast(float x) { return vf{x, x, x, x}; }
GM_HD vf fma(vf a, vf b, vf c) { return a * b + c; }  // rounds twice: there may be no fused instruction
GM_HD vf add(vf a, vf b) { return a + b; }
GM_HD float sum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }

GM_HD void transpose(vf (&r)[W]) {
  vf c0{r[0][0], r[1][0], r[2][0], r[3][0]}, c1{r[0][1], r[1][1], r[2][1], r[3][1]};
  vf c2{r[0][2], r[1][2], r[2][2], r[3][2]}, c3{r[0][3], r[1][3], r[2][3], r[3][3]};
  r[0] = c0, r[1] = c1, r[2] = c2, r[3] = c3;
}

#endif

// The same lanes as unsigned integers, for code written in the compilers' vector extensions.
typedef uint32_t vu __attribute__((vector_size(4 * W)));
GM_HD vu float_bits(vf x) { return (vu)x; }
GM_HD vf bits_float(vu x) { return (vf)x; }
GM_HD vf root(vf x) {
#if GM_LEVEL >= 2
  return _mm512_sqrt_ps(x);
#elif GM_LEVEL == 1
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
// W bytes to and from lanes (gcc 12 takes __builtin_convertvector apart into single bytes).
GM_HD vu widened(const uint8_t* p) {
#if GM_LEVEL >= 2
  return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif GM_LEVEL == 1
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return vu{p[0], p[1], p[2], p[3]};
#endif
}
GM_HD vf converted(vu x) {  // of less than 2^31
#if GM_LEVEL >= 2
  return _mm512_cvtepi32_ps((vi)x);
#elif GM_LEVEL == 1
  return _mm256_cvtepi32_ps((vi)x);
#else
  return vf{static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2]), static_cast<float>(x[3])};
#endif
}
// Lanes of at most 2^22 in magnitude as integers, halves to even.
GM_HD vu rounded(vf x) {
#if GM_LEVEL >= 2
  return (vu)_mm512_cvtps_epi32(x);
#elif GM_LEVEL == 1
  return (vu)_mm256_cvtps_epi32(x);
#else
  return (vu)(x + 12582912.0f) - 0x4b400000u;
#endif
}
GM_HD vf rounded_down(vf x) {
#if GM_LEVEL >= 2
  return _mm512_floor_ps(x);
#elif GM_LEVEL == 1
  return _mm256_floor_ps(x);
#else
  const vf nearest = (x + 12582912.0f) - 12582912.0f;
  return nearest > x ? nearest - 1.0f : nearest;
#endif
}
// float_to_bf16: the low halves of the lanes are the bits.
GM_HD vu bf16_bits(vf x) {
  const vu u = (vu)x, high = u >> 16;
  return x != x ? high | 0x40u : (u + 0x7fffu + (high & 1u)) >> 16;
}
GM_HD void store_narrowed(uint8_t* p, vu x) {
#if GM_LEVEL >= 2
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((vi)x));
#elif GM_LEVEL == 1
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((vi)x), _mm256_extracti128_si256((vi)x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < W; ++i) p[i] = static_cast<uint8_t>(x[i]);
#endif
}

// The same for 16 bits.
GM_HD vu widened(const uint16_t* p) {
#if GM_LEVEL >= 2
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif GM_LEVEL == 1
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return vu{p[0], p[1], p[2], p[3]};
#endif
}
GM_HD void store_narrowed(uint16_t* p, vu x) {
#if GM_LEVEL >= 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((vi)x));
#elif GM_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128((vi)x), _mm256_extracti128_si256((vi)x, 1)));
#else
  for (int i = 0; i < W; ++i) p[i] = static_cast<uint16_t>(x[i]);
#endif
}
// W codes of 4 bits, low nibble first, to and from lanes.
GM_HD vu widened_nibbles(const uint8_t* p) {
#if GM_LEVEL >= 2
  int32_t low, high;
  memcpy(&low, p, 4);
  memcpy(&high, p + 4, 4);
  const vu both = (vu)_mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
  return both >> vu{0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28} & 15u;
#elif GM_LEVEL == 1
  return (vu)codes_on_top<4>(p) >> 28;
#else
  const uint32_t a = p[0], b = p[1];
  return vu{a & 15u, a >> 4, b & 15u, b >> 4};
#endif
}
GM_HD void store_narrowed_nibbles(uint8_t* p, vu x) {
#if GM_LEVEL >= 2
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(_mm512_or_si512((vi)x, _mm512_srli_epi64((vi)x, 28))));
#elif GM_LEVEL == 1
  const __m256i pairs = _mm256_or_si256((vi)x, _mm256_srli_epi64((vi)x, 28));  // the first byte of each 64 bits
  const __m256i bytes = _mm256_shuffle_epi8(pairs, _mm256_set1_epi64x(0x0800));
  const __m128i both = _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  const int32_t four = _mm_cvtsi128_si32(both);
  memcpy(p, &four, 4);
#else
  for (int i = 0; i < W / 2; ++i) p[i] = static_cast<uint8_t>(x[2 * i] | x[2 * i + 1] << 4);
#endif
}
// W bytes to lanes with their top bits as signs.
GM_HD vu widened_signed(const uint8_t* p) {
#if GM_LEVEL >= 2
  return (vu)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif GM_LEVEL == 1
  return (vu)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return (widened(p) ^ 128u) - 128u;
#endif
}
// Lanes whose low four bits are W codes of 4 bits, low nibble first; the bits above are anything.
GM_HD vu nibbles(const uint8_t* p) {
#if GM_LEVEL >= 2
  int32_t low, high;
  memcpy(&low, p, 4);
  memcpy(&high, p + 4, 4);
  return (vu)_mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high) >> vu{0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
#elif GM_LEVEL == 1
  int32_t codes;
  memcpy(&codes, p, 4);
  return (vu)_mm256_set1_epi32(codes) >> vu{0, 4, 8, 12, 16, 20, 24, 28};
#else
  return widened_nibbles(p);
#endif
}

// Bytes of four vectors' lanes. They lie as the instructions that pack leave them, mixed within 128 bits, until they are stored in order.
typedef uint8_t vb __attribute__((vector_size(4 * W)));
// The lanes, all of [-2^31, BASE + 2^15), less BASE; 0 for what is less, 255 for what is more.
template <int BASE>
GM_HD vb packed(vu a, vu b, vu c, vu d) {
#if GM_LEVEL >= 1
  typedef uint16_t words __attribute__((vector_size(4 * W)));
#if GM_LEVEL >= 2
  const words ab = (words)_mm512_packus_epi32((vi)a, (vi)b) - static_cast<uint16_t>(BASE), cd = (words)_mm512_packus_epi32((vi)c, (vi)d) - static_cast<uint16_t>(BASE);
  return (vb)_mm512_packus_epi16((vi)ab, (vi)cd);
#else
  const words ab = (words)_mm256_packus_epi32((vi)a, (vi)b) - static_cast<uint16_t>(BASE), cd = (words)_mm256_packus_epi32((vi)c, (vi)d) - static_cast<uint16_t>(BASE);
  return (vb)_mm256_packus_epi16((vi)ab, (vi)cd);
#endif
#else
  const vu all[4] = {a - BASE, b - BASE, c - BASE, d - BASE};
  vb x{};
  for (int i = 0; i < 4 * W; ++i) {
    const int32_t lane = static_cast<int32_t>(all[i / W][i % W]);
    x[i] = static_cast<uint8_t>(lane < 0 ? 0 : lane > 255 ? 255 : lane);
  }
  return x;
#endif
}
// The lanes, all of [-128, 127].
GM_HD vb packed_signed(vu a, vu b, vu c, vu d) {
#if GM_LEVEL >= 2
  return (vb)_mm512_packs_epi16(_mm512_packs_epi32((vi)a, (vi)b), _mm512_packs_epi32((vi)c, (vi)d));
#elif GM_LEVEL == 1
  return (vb)_mm256_packs_epi16(_mm256_packs_epi32((vi)a, (vi)b), _mm256_packs_epi32((vi)c, (vi)d));
#else
  return packed<0>(a & 255u, b & 255u, c & 255u, d & 255u);
#endif
}
// Their top bits are the lanes' signs, the others anything.
GM_HD vb packed_signs(vf a, vf b, vf c, vf d) {
#if GM_LEVEL >= 1
  return packed_signed((vu)a, (vu)b, (vu)c, (vu)d);
#else
  return packed<0>((vu)a >> 24, (vu)b >> 24, (vu)c >> 24, (vu)d >> 24);
#endif
}
GM_HD void store_in_order(uint8_t* p, vb x) {
#if GM_LEVEL >= 2
  store(p, (vi)__builtin_shufflevector((vu)x, (vu)x, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
#elif GM_LEVEL == 1
  store(p, (vi)__builtin_shufflevector((vu)x, (vu)x, 0, 4, 1, 5, 2, 6, 3, 7));
#else
  memcpy(p, &x, sizeof x);
#endif
}
// The low four bits of eight vectors' lanes, the others being 0, the first in the low half of a byte.
GM_HD void store_in_order(uint8_t* p, vb x, vb y) {
#if GM_LEVEL >= 2
  typedef uint16_t words __attribute__((vector_size(64)));
  const vi both = _mm512_set1_epi16(0x1001);
  const words z = (words)_mm512_packus_epi16(_mm512_maddubs_epi16((vi)x, both), _mm512_maddubs_epi16((vi)y, both));
  store(p, (vi)__builtin_shufflevector(z, z, 0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27, 4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15,
                                       23, 31));
#elif GM_LEVEL == 1
  const vi both = _mm256_set1_epi16(0x1001), z = _mm256_packus_epi16(_mm256_maddubs_epi16((vi)x, both), _mm256_maddubs_epi16((vi)y, both));
  const __m128i low = _mm256_castsi256_si128(z), high = _mm256_extracti128_si256(z, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi16(low, high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, _mm_unpackhi_epi16(low, high));
#else
  for (int i = 0; i < 2 * W; ++i) {
    p[i] = static_cast<uint8_t>(x[2 * i] | x[2 * i + 1] << 4);
    p[2 * W + i] = static_cast<uint8_t>(y[2 * i] | y[2 * i + 1] << 4);
  }
#endif
}

GM_HD vu lane_numbers() {
  vu x{};
  for (int i = 0; i < W; ++i) x[i] = static_cast<uint32_t>(i);
  return x;
}
// The largest lane.
GM_HD uint32_t largest(vu x) {
#if GM_LEVEL >= 2
  return _mm512_reduce_max_epu32((vi)x);
#elif GM_LEVEL == 1
  __m128i y = _mm_max_epu32(_mm256_castsi256_si128((vi)x), _mm256_extracti128_si256((vi)x, 1));
  y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(y, _mm_shuffle_epi32(y, 0xb1))));
#else
  uint32_t most = 0;
  for (int i = 0; i < W; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}
// Sixteen floats that the low four bits of lanes choose from.
struct Table16 {
  vf part[16 / W];
  GM_HD vf operator[](vu q) const {
#if GM_LEVEL >= 2
    return _mm512_permutexvar_ps((vi)q, part[0]);
#elif GM_LEVEL == 1
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(part[0], (vi)q), _mm256_permutevar8x32_ps(part[1], (vi)q), (vf)(q << 28));
#else
    vf x{};
    for (int i = 0; i < W; ++i) x[i] = part[q[i] % 16 / W][q[i] % W];
    return x;
#endif
  }
};

// An empty instruction that wants x in a register here: it keeps gcc from reordering an unrolled loop so that its
// accumulators, which fill the register file exactly, spill to the stack.
template <class V>
GM_HD void in_register(V& x) {
#if GM_LEVEL >= 1
  asm volatile("" : "+v"(x));
#else
  (void)x;
#endif
}

}  // namespace
}  // namespace gradmill
