// Tiles: runs of elements of one row, decoded to fp32 in L1, worked on, encoded again. The one place on the
// CPU where storage formats are read and written; the code is a run-time value, one branch per block.
#pragma once
#include <stdlib.h>

#include "kernels.h"
#include "simd.h"

namespace gradmill {
namespace {

constexpr int64_t kTile = 512;  // elements a tile aims at: 2 KB, so a rule's five or six stay in L1 (1024 was 25% slower)

inline int64_t row_bytes(const Matrix& m) { return (m.cols * code_bits(m.code) + 7) / 8; }
inline char* tile_address(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<char*>(m.codes) + row * row_bytes(m) + col * code_bits(m.code) / 8;
}

// The words of kGroups groups of four, every `stride`th from group `group` on, in order.
//
// Each group sits in a 64-bit lane of which only the low half counts: vpmuludq reads just that half, so a round is two
// multiplies, two shifts and four xors, and the low words of the products are used where they are. 1.73 -> 0.56 ns a
// word with AVX2 and 0.93 -> 0.35 with AVX-512 against the loop the compiler makes of 32-bit lanes (one core, Zen 4);
// one chain alone was bound by latency: 1.43 and 0.94; four instead of two with AVX2 took 0.56 to 0.52 (busy).
#if GM_LEVEL >= 1
#if GM_LEVEL >= 2
typedef __m512i wide;
inline wide wide_of(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
inline wide multiply_low(wide a, wide b) { return _mm512_mul_epu32(a, b); }
// low halves of a and b side by side: a's in the low half
inline wide paired(wide a, wide b) { return _mm512_mask_mov_epi32(a, 0xaaaa, b << 32); }
inline void store_groups(wide a, wide b, uint32_t* out) {
  store(out, __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
  store(out + 16, __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
}
#else
typedef __m256i wide;
inline wide wide_of(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
inline wide multiply_low(wide a, wide b) { return _mm256_mul_epu32(a, b); }
inline wide paired(wide a, wide b) { return _mm256_blend_epi32(a, b << 32, 0xaa); }
inline void store_groups(wide a, wide b, uint32_t* out) {
  store(out, __builtin_shufflevector(a, b, 0, 4, 1, 5));
  store(out + 8, __builtin_shufflevector(a, b, 2, 6, 3, 7));
}
#endif
constexpr int kChains = 4;  // independent chains that hide the latency of a round, some 7 cycles
constexpr int kWide = sizeof(wide) / 8;
constexpr int kGroups = kChains * kWide;

// The rounds' keys, in all lanes: made once for a run of groups (from registers they cost a fifth of AVX2's instructions).
struct RoundKeys {
  alignas(64) uint64_t of[10][2][kWide];
  explicit RoundKeys(const Key& key) {
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
      for (int i = 0; i < kWide; ++i) of[round][0][i] = k0, of[round][1][i] = k1;
  }
};

inline void philox_groups(const Key& key, const RoundKeys& keys, uint64_t group, uint32_t* out, uint64_t stride = 1) {
  typedef unsigned long long lanes __attribute__((vector_size(sizeof(wide))));  // shifts without sign
  const wide m0 = wide_of(0xD2511F53), m1 = wide_of(0xCD9E8D57);
  wide c0[kChains], c1[kChains], c2[kChains], c3[kChains];
  uint64_t lane[kWide];
  for (int i = 0; i < kWide; ++i) lane[i] = static_cast<uint64_t>(i) * stride;
  for (int i = 0; i < kChains; ++i) {
    c0[i] = load_int(lane) + wide_of(group + static_cast<uint64_t>(i * kWide) * stride);
    c1[i] = (wide)((lanes)c0[i] >> 32);
    c2[i] = wide_of(key.stream);
    c3[i] = wide_of(key.step);
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const wide k0 = load_int(keys.of[round][0]), k1 = load_int(keys.of[round][1]);
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const wide p0 = multiply_low(c0[i], m0), p1 = multiply_low(c2[i], m1);
      c0[i] = (wide)((lanes)p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = (wide)((lanes)p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = p1;
      c3[i] = p0;
    }
  }
  for (int i = 0; i < kChains; ++i) store_groups(paired(c0[i], c1[i]), paired(c2[i], c3[i]), out + 4 * kWide * i);
}
#else
constexpr int kGroups = 16;
struct RoundKeys {
  explicit RoundKeys(const Key&) {}
};

inline void philox_groups(const Key& key, const RoundKeys&, uint64_t group, uint32_t* out, uint64_t stride = 1) {
  uint32_t w[4][kGroups];
#pragma omp simd
  for (int i = 0; i < kGroups; ++i) philox4(key, group + static_cast<uint64_t>(i) * stride, w[0][i], w[1][i], w[2][i], w[3][i]);
  for (int i = 0; i < kGroups; ++i)
    for (int k = 0; k < 4; ++k) out[4 * i + k] = w[k][i];
}
#endif

inline void philox_groups(const Key& key, uint64_t group, uint32_t* out, uint64_t stride = 1) { philox_groups(key, RoundKeys(key), group, out, stride); }

// The Philox words of elements [first, first + n).
inline void philox_fill(const Key& key, uint64_t first, int64_t n, uint32_t* __restrict out) {
  constexpr int words = 4 * kGroups;
  const RoundKeys keys(key);
  first += key.first;
  const uint64_t end = first + static_cast<uint64_t>(n);
  uint64_t at = first & ~uint64_t{3};  // the first word of the group that holds `first`
  for (; at < end; at += words) {
    if (at >= first && at + words <= end) {
      philox_groups(key, keys, at >> 2, out + (at - first));
    } else {
      uint32_t edge[words];
      philox_groups(key, keys, at >> 2, edge);
      for (uint64_t e = at < first ? first : at; e < end && e < at + words; ++e) out[e - first] = edge[e - at];
    }
  }
}

// --- one block --------------------------------------------------------------------------------------------
// Codes of fewer than 8 bits are one little-endian stream of bits: eight of them fill BITS bytes.
template <int CODE>
constexpr int kBits = CODE == kSign ? 1 : CODE == kUInt3 || CODE == kInt3 ? 3 : CODE == kUInt2 || CODE == kInt2 ? 2 : CODE == kInt4 || CODE == kUInt4 || CODE == kE2M1 || CODE == kMoment4 || CODE == kSquare4 ? 4 : 8;
template <int CODE>
constexpr bool kSigned = CODE == kInt8 || CODE == kInt7 || CODE == kInt4 || CODE == kInt3 || CODE == kInt2;

template <int CODE>
inline void decode_block(const char* codes, Block b, int64_t n, float* __restrict out) {
  constexpr int bits = kBits<CODE>;
  if constexpr (bits < 8) {
    int64_t i = 0;
    if constexpr (CODE == kInt4 || CODE == kUInt4)  // left to the compiler, byte by byte: five times slower
      for (; i + W <= n; i += W, codes += W / 2) {
        const vu q = widened_nibbles(reinterpret_cast<const uint8_t*>(codes));
        store(out + i, (kSigned<CODE> ? converted(q ^ 8u) - 8.0f : converted(q) - static_cast<float>(b.zero)) * b.scale);
      }
    for (; i < n; i += 8, codes += bits) {
      const int live = static_cast<int>(n - i < 8 ? n - i : 8);
      uint32_t stream = 0;
      memcpy(&stream, codes, static_cast<size_t>(live * bits + 7) / 8);
      for (int k = 0; k < live; ++k) {
        int q = static_cast<int>(stream >> k * bits & ((1u << bits) - 1u));
        if (kSigned<CODE>) q = (q ^ 1 << (bits - 1)) - (1 << (bits - 1));
        out[i + k] = decode<CODE>(q, b);
      }
    }
  } else if constexpr (!kSigned<CODE>) {
    const uint8_t* c = reinterpret_cast<const uint8_t*>(codes);
    for (int64_t i = 0; i < n; ++i) out[i] = decode<CODE>(c[i], b);
  } else {
    const int8_t* c = reinterpret_cast<const int8_t*>(codes);
    for (int64_t i = 0; i < n; ++i) out[i] = decode<CODE>(c[i], b);
  }
}

// encode<CODE> of W values. FP4's blocks are short: 16 elements took 70 ns as a loop for the compiler to vectorise.
template <int CODE, bool STOCHASTIC, class Scale>
inline vu encode_small_float(vf x, vu words, Scale scale) {
  typedef SmallFloat<CODE> F;
  const vf normal = zero() + bits_float(F::first_normal << F::shift), top = zero() + code_top(CODE);
  vf y = (vf)((vu)(x / scale) & 0x7fffffffu);
  y = y > top ? top : y;
  const vu small = (vu)(y < normal), bits = (vu)(y + (vf)(small & (vu)normal));
  const vu rounding = STOCHASTIC ? words >> (9 + F::mantissa) : (bits >> F::shift & 1u) + ((1u << (F::shift - 1)) - 1u);
  const vu magnitude = ((bits + rounding) >> F::shift) - (F::first_normal - (~small & (1u << F::mantissa)));
  return magnitude | ((vu)x >> (CODE == kE2M1 ? 28 : 24) & F::sign);
}

// encode<CODE> of W values, by integers and small floats; signed 8-bit codes as 32-bit integers. Left to gcc, narrowing to bytes took more
// than the rounding.
template <int CODE>
constexpr bool kInLanes = !OffsetFloat<CODE>::is;
// PACKED: they go on to `packed`, which clamps 8-bit codes by itself where it has instructions for it.
template <int CODE, bool STOCHASTIC, bool PACKED = false, class Scale>
inline vu encode_lanes(vf x, vu words, Scale scale, int zero_point) {
  if constexpr (SmallFloat<CODE>::is) return encode_small_float<CODE, STOCHASTIC>(x, words, scale);
  const vf top = zero() + code_top(CODE), y = clampf(x / scale, -top, top);
  vu q;
  if constexpr (STOCHASTIC) {  // round_stochastic
    const vf down = rounded_down(y);
    q = rounded(down) - (vu)(y - down > converted(words >> 8) * 5.9604644775390625e-08f);
  } else {
    q = rounded(y);
  }
  if constexpr (kZeroPoint<CODE>) {
    typedef int32_t ints __attribute__((vector_size(4 * W)));
    const ints code = (ints)q + zero_point, most = ints{} + static_cast<int>(code_top(CODE));
    return PACKED && kBits<CODE> == 8 && GM_LEVEL >= 1 ? (vu)code : (vu)(code < 0 ? ints{} : code > most ? most : code);
  }
  return kBits<CODE> < 8 ? q & ((1u << kBits<CODE>) - 1u) : q;
}

template <int CODE, bool STOCHASTIC>
inline vu encode_one(const float* x, const uint32_t* words, Block b) {
  return encode_lanes<CODE, STOCHASTIC>(load(x), STOCHASTIC ? (vu)load(words) : vu{}, b.scale, b.zero) & 255u;
}

// Of four vectors.
template <int CODE, bool STOCHASTIC>
inline vb encode_four(const float* x, const uint32_t* words, Block b) {
  vu q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) q[i] = encode_lanes<CODE, STOCHASTIC, true>(load(x + i * W), STOCHASTIC ? (vu)load(words + i * W) : vu{}, b.scale, b.zero);
  return kSigned<CODE> && kBits<CODE> == 8 ? packed_signed(q[0], q[1], q[2], q[3]) : packed<0>(q[0], q[1], q[2], q[3]);
}

// n codes, a byte each.
template <int CODE, bool STOCHASTIC>
inline void encode_bytes(const float* __restrict x, const uint32_t* __restrict words, Block b, int64_t n, uint8_t* __restrict c) {
  if constexpr (kInLanes<CODE>) {
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) store_in_order(c + i, encode_four<CODE, STOCHASTIC>(x + i, words + i, b));
    for (; i + W <= n; i += W) store_narrowed(c + i, encode_one<CODE, STOCHASTIC>(x + i, words + i, b));
    if (i < n) {
      float values[W] = {};
      uint32_t random[W] = {};
      uint8_t rest[W];
      memcpy(values, x + i, static_cast<size_t>(n - i) * 4);
      if (STOCHASTIC) memcpy(random, words + i, static_cast<size_t>(n - i) * 4);
      store_narrowed(rest, encode_one<CODE, STOCHASTIC>(values, random, b));
      memcpy(c + i, rest, static_cast<size_t>(n - i));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) c[i] = static_cast<uint8_t>(encode<CODE, STOCHASTIC>(x[i], b, STOCHASTIC ? words[i] : 0));
  }
}

template <int CODE, bool STOCHASTIC>
inline void encode_block(const float* __restrict x, const uint32_t* __restrict words, Block b, int64_t n, char* codes) {
  constexpr int bits = kBits<CODE>;
  uint8_t* __restrict c = reinterpret_cast<uint8_t*>(codes);
  if constexpr (bits == 8) return encode_bytes<CODE, STOCHASTIC>(x, words, b, n, c);
  int64_t done = 0;
  if constexpr (bits == 4 && kInLanes<CODE>) {
    for (; done + 8 * W <= n; done += 8 * W, c += 4 * W)
      store_in_order(c, encode_four<CODE, STOCHASTIC>(x + done, words + done, b), encode_four<CODE, STOCHASTIC>(x + done + 4 * W, words + done + 4 * W, b));
    for (; done + W <= n; done += W, c += W / 2) store_narrowed_nibbles(c, encode_one<CODE, STOCHASTIC>(x + done, words + done, b));
  }
  constexpr int part = 256;
  uint8_t q[part + 8];
  for (int64_t i = done; i < n; i += part) {
    const int64_t live = n - i < part ? n - i : part;
    encode_bytes<CODE, STOCHASTIC>(x + i, words + i, b, live, q);
    memset(q + live, 0, 8);
    for (int64_t k = 0; k < live; k += 8, c += bits) {  // eight bytes to their low bits, side by side
      uint64_t stream;
      memcpy(&stream, q + k, 8);
      stream = (stream | stream >> (8 - bits)) & (0x0001000100010001u * ((1u << 2 * bits) - 1u));
      stream = (stream | stream >> (16 - 2 * bits)) & (0x0000000100000001u * ((uint64_t{1} << 4 * bits) - 1u));
      stream = stream | stream >> (32 - 4 * bits);
      if (k + 8 <= live) memcpy(c, &stream, bits);
      else memcpy(c, &stream, static_cast<size_t>((live - k) * bits + 7) / 8);
    }
  }
}

template <int CODE>
inline Block measure_block(const float* x, int64_t n) {
  if constexpr (kZeroPoint<CODE>) {  // floats' bits, as integers: positive ones in order; negative ones, unsigned, above them, the lowest first
    int32_t high = 0;
    uint32_t low = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = float_bits(x[i]);
      high = static_cast<int32_t>(bits) > high ? static_cast<int32_t>(bits) : high;
      low = bits > low ? bits : low;
    }
    const bool negative = low >> 31;
    const uint32_t largest = negative && (low & 0x7fffffffu) > static_cast<uint32_t>(high) ? low & 0x7fffffffu : static_cast<uint32_t>(high);
    return block_of(CODE, largest, negative ? ordered_bits(bits_float(low)) : 0, high);
  }
  int64_t i = 0;
  vu most{};
  for (; i + W <= n; i += W) {
    const vu a = (vu)load(x + i) & 0x7fffffffu;
    most = a > most ? a : most;
  }
  uint32_t absmax = largest(most);
  for (; i < n; ++i) absmax = magnitude_bits(x[i]) > absmax ? magnitude_bits(x[i]) : absmax;
  return block_of(CODE, absmax, 0, 0);
}

// The two largest magnitudes of a block, the first of equals first; rest: the block without them.
inline Outliers find_outliers(const float* x, int64_t n, float* rest) {
  int64_t at[2] = {0, 0};
  for (int k = 0; k < 2; ++k) {
    uint32_t largest = 0;
    bool found = false;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t magnitude = magnitude_bits(x[i]);
      if ((k == 1 && i == at[0]) || (found && magnitude <= largest)) continue;
      largest = magnitude, at[k] = i, found = true;
    }
    if (!found) at[k] = at[0];
  }
  memcpy(rest, x, static_cast<size_t>(n) * 4);
  rest[at[0]] = rest[at[1]] = 0.0f;
  return {{x[at[0]], x[at[1]]}, {static_cast<uint8_t>(at[0]), static_cast<uint8_t>(at[1])}, {0, 0}};
}

inline void decode_one_block(int code, const char* codes, Block b, int64_t n, float* out) {
#define GM_DECODE(CODE) \
  case CODE: return decode_block<CODE>(codes, b, n, out);
  switch (code) {
    GM_DECODE(kInt8) GM_DECODE(kUInt8) GM_DECODE(kInt4) GM_DECODE(kUInt4) GM_DECODE(kMoment8) GM_DECODE(kSquare8)
    GM_DECODE(kE4M3) GM_DECODE(kE5M2) GM_DECODE(kE2M1) GM_DECODE(kUInt3) GM_DECODE(kUInt2) GM_DECODE(kInt3) GM_DECODE(kInt2)
    GM_DECODE(kMoment4) GM_DECODE(kSquare4) GM_DECODE(kSign)
    case kInt7: return decode_block<kInt8>(codes, b, n, out);
    case kInt4Outlier: return decode_block<kInt4>(codes, b, n, out);
  }
#undef GM_DECODE
}

// Block `at` of a matrix: what its codes are decoded with.
inline Block block_at(const Matrix& m, int64_t at) { return {m.scales[at], has_zero_point(m.code) ? m.zeros[at] : 0, 0.0f}; }
// Puts the outliers of block `at` into out, which holds its elements [from, from + n).
inline void put_outliers(const Matrix& m, int64_t at, int64_t from, int64_t n, float* out) {
  if (m.scales[at] != m.scales[at]) return;  // a block with a nan or an inf is all nan
  const Outliers& o = reinterpret_cast<const Outliers*>(m.zeros)[at];
  for (int k = 0; k < 2; ++k)
    if (o.position[k] >= from && o.position[k] < from + n) out[o.position[k] - from] = o.value[k];
}

// --- tiles ------------------------------------------------------------------------------------------------
inline void decode_floats(int code, const void* in, int64_t n, float* __restrict out) {
  const uint16_t* h = static_cast<const uint16_t*>(in);
  if (code == kF32) memcpy(out, in, static_cast<size_t>(n) * 4);
  else if (code == kBF16) for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(h[i]);
  else if (code == kF16) for (int64_t i = 0; i < n; ++i) out[i] = f16_to_float(h[i]);
  else memset(out, 0, static_cast<size_t>(n) * 4);  // kDelta
}

inline void encode_floats(int code, const float* __restrict in, const uint32_t* __restrict words, int64_t n, void* out) {
  uint16_t* __restrict h = static_cast<uint16_t*>(out);
  if (code == kBF16 && words) for (int64_t i = 0; i < n; ++i) h[i] = float_to_bf16_stochastic(in[i], words[i]);
  else if (code == kBF16) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store_narrowed(h + i, bf16_bits(load(in + i)));
    for (; i < n; ++i) h[i] = float_to_bf16(in[i]);
  }
  else if (code == kF16) for (int64_t i = 0; i < n; ++i) h[i] = float_to_f16(in[i]);
  else memcpy(out, in, static_cast<size_t>(n) * 4);
}

// A case for each code whose values lie in two pieces.
#define GM_SPLIT_CODES(DO) DO(kBF16Plus8, uint8_t) DO(kBF16Plus16, uint16_t) DO(kF16Plus8, uint8_t) DO(kF16Plus16, uint16_t)

inline void decode_split(const Matrix& m, int64_t at, int64_t n, float* __restrict out) {
  const uint16_t* __restrict high = static_cast<const uint16_t*>(m.codes) + at;
#define GM_JOIN(CODE, Low)                                              \
  case CODE: {                                                          \
    const Low* __restrict low = reinterpret_cast<const Low*>(m.zeros) + at; \
    for (int64_t i = 0; i < n; ++i) out[i] = join_float<CODE>(high[i], low[i]); \
    break;                                                              \
  }
  switch (m.code) { GM_SPLIT_CODES(GM_JOIN) }
#undef GM_JOIN
}

inline void encode_split(const Matrix& m, int64_t at, int64_t n, const float* __restrict in, const uint32_t* __restrict words) {
  uint16_t* __restrict high = static_cast<uint16_t*>(m.codes) + at;
#define GM_PART(CODE, Low)                                              \
  case CODE: {                                                          \
    Low* __restrict low = reinterpret_cast<Low*>(m.zeros) + at;         \
    for (int64_t i = 0; i < n; ++i) {                                   \
      const Pieces p = split_float<CODE>(in[i], words ? words[i] : 0u); \
      high[i] = p.high, low[i] = static_cast<Low>(p.low);               \
    }                                                                   \
    break;                                                              \
  }
  switch (m.code) { GM_SPLIT_CODES(GM_PART) }
#undef GM_PART
}

// Elements [col, col + n) of a row; for a blocked code col is a multiple of the block and the run ends at a
// block's or the row's end.
inline void decode_tile(const Matrix& m, int64_t row, int64_t col, int64_t n, float* out) {
  if (is_split(m.code)) return decode_split(m, row * m.cols + col, n, out);
  if (!is_blocked(m.code)) return decode_floats(m.code, tile_address(m, row, col), n, out);
  for (int64_t i = 0; i < n; i += m.block) {
    const int64_t at = row * m.blocks_per_row() + (col + i) / m.block, part = n - i < m.block ? n - i : m.block;
    decode_one_block(m.code, tile_address(m, row, col + i), block_at(m, at), part, out + i);
    if (m.code == kInt4Outlier) put_outliers(m, at, 0, part, out + i);
  }
}

constexpr int64_t kWords = 1024;  // random words made at a time, kept in L1

// Blocks of a row, n elements from col on. words: n random words, or null for round-to-nearest. given: m.scales holds the scales to use.
// One function a code, so that what short blocks take is not spent between them.
template <int CODE, bool STOCHASTIC>
inline void encode_blocks(const Matrix& m, int64_t row, int64_t col, int64_t n, const float* x, const uint32_t* words, bool given) {
  const int64_t block = m.block, bytes = block * kBits<CODE> / 8;  // a block before a row's last is whole bytes
  float* scale = m.scales + row * m.blocks_per_row() + col / block;
  uint8_t* zero = kZeroPoint<CODE> ? m.zeros + (scale - m.scales) : nullptr;
  char* codes = tile_address(m, row, col);
  for (int64_t i = 0; i < n; i += block, ++scale, codes += bytes) {
    const int64_t part = n - i < block ? n - i : block;
    Block b = measure_block<CODE>(x + i, part);
    if (given && b.scale == b.scale) b.scale = *scale;
    if (b.scale > 0.0f) encode_block<CODE, STOCHASTIC>(x + i, words + i, b, part, codes);
    else memset(codes, 0, static_cast<size_t>(part * kBits<CODE> + 7) / 8);  // all zero, or a nan or inf inside: every code is 0
    *scale = b.scale;
    if constexpr (kZeroPoint<CODE>) *zero++ = static_cast<uint8_t>(b.zero);
  }
}

// A block whose two largest values are stored apart.
inline void encode_outlier_block(const Matrix& m, int64_t row, int64_t col, int64_t n, const float* x, const uint32_t* words) {
  float rest[256];
  Matrix plain = m;
  plain.code = kInt4;
  Outliers& outliers = reinterpret_cast<Outliers*>(m.zeros)[row * m.blocks_per_row() + col / m.block];
  outliers = find_outliers(x, n, rest);
  if (magnitude_bits(outliers.value[0]) >= 0x7f800000u) rest[0] = outliers.value[0];  // the block counts as one with a nan or an inf
  (words ? encode_blocks<kInt4, true> : encode_blocks<kInt4, false>)(plain, row, col, n, rest, words, false);
}

inline void encode_some_blocks(const Matrix& m, int64_t row, int64_t col, int64_t n, const float* x, const uint32_t* words, bool given) {
#define GM_ENCODE(CODE) \
  case CODE: return (words ? encode_blocks<CODE, true> : encode_blocks<CODE, false>)(m, row, col, n, x, words, given);
  switch (m.code) {
    GM_ENCODE(kInt8) GM_ENCODE(kUInt8) GM_ENCODE(kInt4) GM_ENCODE(kUInt4) GM_ENCODE(kMoment8) GM_ENCODE(kSquare8)
    GM_ENCODE(kE4M3) GM_ENCODE(kE5M2) GM_ENCODE(kE2M1) GM_ENCODE(kInt7) GM_ENCODE(kUInt3) GM_ENCODE(kUInt2) GM_ENCODE(kInt3) GM_ENCODE(kInt2)
    GM_ENCODE(kMoment4) GM_ENCODE(kSquare4)
    case kInt4Outlier: return encode_outlier_block(m, row, col, n, x, words);
  }
#undef GM_ENCODE
}

// The same words for a whole block from one Philox word: see kDitherStep.
inline void dither_fill(const Key& key, uint64_t first, int64_t n, uint32_t* __restrict out) {
  uint32_t offset = philox_word(key, first);
  for (int64_t i = 0; i < n; ++i) out[i] = offset + static_cast<uint32_t>(i) * kDitherStep;
}

// Writes a tile. old_values non-null: a block none of whose values changed keeps its codes and its scale
// (rounding it again would move codes although nothing was learnt). key null: round to nearest; dither: with dither
// words instead of a Philox word per element. given: m.scales holds the scales to use.
inline void store_tile(const Matrix& m, int64_t row, int64_t col, int64_t n, const float* old_values, const float* in, const Key* key, bool dither,
                       bool given = false) {
  uint32_t stack_words[kWords];
  const uint64_t first = static_cast<uint64_t>(row * m.cols + col);
  if (!is_blocked(m.code)) {
    for (int64_t i = 0; i < n; i += kWords) {
      int64_t part = n - i < kWords ? n - i : kWords;
      bool random = key && (m.code == kBF16 || m.code == kBF16Plus8 || m.code == kF16Plus8);
      if (random) philox_fill(*key, first + static_cast<uint64_t>(i), part, stack_words);
      if (is_split(m.code)) {
        encode_split(m, row * m.cols + col + i, part, in + i, random ? stack_words : nullptr);
        continue;
      }
      encode_floats(m.code, in + i, random ? stack_words : nullptr, part, tile_address(m, row, col + i));
    }
    return;
  }
  uint32_t* words = m.block <= kWords ? stack_words : nullptr;
  if (key && !words) words = static_cast<uint32_t*>(malloc(static_cast<size_t>(m.block) * 4));
  const int64_t run = m.block < kWords && !old_values && !dither && m.code != kInt4Outlier ? kWords / m.block * m.block : m.block;  // encoded together
  for (int64_t i = 0; i < n; i += run) {
    int64_t part = n - i < run ? n - i : run;
    if (old_values && memcmp(old_values + i, in + i, static_cast<size_t>(part) * 4) == 0) continue;
    if (key) (dither ? dither_fill : philox_fill)(*key, first + static_cast<uint64_t>(i), part, words);
    encode_some_blocks(m, row, col + i, part, in + i, key ? words : nullptr, given);
  }
  if (words != stack_words) free(words);
}

inline void encode_tile(const Matrix& m, int64_t row, int64_t col, int64_t n, const float* in, const Key* key, bool dither = false, bool given = false) {
  store_tile(m, row, col, n, nullptr, in, key, dither, given);
}
inline void update_tile(const Matrix& m, int64_t row, int64_t col, int64_t n, const float* old_values, const float* new_values, const Key* key) {
  store_tile(m, row, col, n, old_values, new_values, key, false);
}

}  // namespace
}  // namespace gradmill
