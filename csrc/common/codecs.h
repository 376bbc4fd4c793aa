// The element codecs: how one number becomes a code and back, given its block's scale and zero point.
// One source for CPU and CUDA; pyops/reference/quant.py is the specification. Every operation below is an
// IEEE fp32 add, multiply, divide or square root, or an integer operation, in the order written, so that all
// backends give the same bits (compile with -ffp-contract=off / -fmad=false).
#pragma once
#include <math.h>

#include "common.h"

namespace gradmill {
namespace {

struct Block {
  float scale;    // nan: the block held a nan or an inf; 0: the block is all zero
  int zero;       // zero point, 0 where the code has none
  float inverse;  // encoding an offset float only: multiplies instead of a division per element
};

// Round half to even for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits. Vectorises everywhere.
// (V is float, or a vector of them in the compilers' extensions; in clampf too, which lets nan through.)
template <class V>
GM_HD V round_even(V x) {
  return (x + 12582912.0f) - 12582912.0f;
}

// Stochastic rounding for |x| < 2^22 with 24 of the word's bits: up with probability x - floor(x).
GM_HD float round_stochastic(float x, uint32_t word) {
  float nearest = round_even(x);
  float down = nearest > x ? nearest - 1.0f : nearest;
  float u = static_cast<float>(static_cast<int32_t>(word >> 8)) * 5.9604644775390625e-08f;  // 2^-24
  return (x - down) > u ? down + 1.0f : down;
}

template <class V>
GM_HD V clampf(V x, V lo, V hi) {
  return x < lo ? lo : x > hi ? hi : x;
}

// --- block statistics -------------------------------------------------------------------------------------
// Integer forms of |x|, min and max: associative (any thread count gives the same bits) and nan-proof.
GM_HD uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }  // nan > inf > finite
GM_HD int32_t ordered_bits(float x) {
  int32_t b = static_cast<int32_t>(float_bits(x));
  return b ^ ((b >> 31) & 0x7fffffff);
}
GM_HD float from_ordered_bits(int32_t b) { return bits_float(static_cast<uint32_t>(b ^ ((b >> 31) & 0x7fffffff))); }

// Offset floats, the codes of optimizer states: 1 + |x| * inverse is a float whose exponent's low bits and first mantissa
// bits are the code. Their largest value in units of the scale is (2 - 2^-mantissa) * 2^largest exponent - 1.
template <int CODE>
struct OffsetFloat {
  static constexpr bool root = CODE == kSquare8 || CODE == kSquare4, is = root || CODE == kMoment8 || CODE == kMoment4;
  static constexpr int mantissa = CODE == kMoment8 ? 4 : CODE == kSquare8 ? 5 : CODE == kMoment4 ? 1 : 2;
  static constexpr int shift = 23 - mantissa;
  static constexpr uint32_t last = CODE == kMoment8 ? 127 : CODE == kSquare8 ? 255 : CODE == kMoment4 ? 7 : 15;  // a moment's sign lies above
};
GM_HD constexpr float offset_float_top(int code) { return code == kMoment8 ? 247.0f : code == kSquare8 ? 251.0f : code == kMoment4 ? 11.0f : 13.0f; }

// absmax: largest magnitude_bits; lo, hi: smallest and largest ordered_bits, both started at 0 so that the
// range always includes zero (without it the zero point's clamp would destroy a one-sided block).
GM_HD Block block_of(int code, uint32_t absmax, int32_t lo, int32_t hi) {
  Block b{0.0f, 0, 0.0f};
  if (absmax >= 0x7f800000u) {
    b.scale = bits_float(0x7fc00000u);
    return b;
  }
  float amax = bits_float(absmax);
  if (!is_offset_float(code) && !has_zero_point(code)) {
    b.scale = amax / code_top(code);
  } else if (has_zero_point(code)) {
    float top = code_top(code);
    float min = from_ordered_bits(lo), max = from_ordered_bits(hi);
    b.scale = (max * 0.5f - min * 0.5f) / (top * 0.5f);  // halves: max - min may overflow
    if (b.scale > 0.0f) b.zero = static_cast<int>(clampf(-round_even(min / b.scale), 0.0f, top));
  } else if (absmax >= 0x0d800000u) {  // 2^-100: below, the block counts as zero and its inverse stays finite
    float root = is_square(code) ? sqrtf(amax) : amax, top = offset_float_top(code);
    b.scale = root / top;
    b.inverse = top / root;
  }
  return b;
}

// --- one element ------------------------------------------------------------------------------------------
// Callers handle scale == 0 and scale == nan (every code is then 0).
template <int CODE>
GM_HD int encode_root(float root, Block b, uint32_t word) {
  typedef OffsetFloat<CODE> F;
  constexpr int last = static_cast<int>(F::last);
  float y = root * b.inverse;
  y = y + 1.0f;
  int k = static_cast<int>((float_bits(y) - 0x3f800000u + (word >> (32 - F::shift))) >> F::shift);
  return k < 1 ? 1 : k > last ? last : k;
}

// Small floats: mantissa bits and the exponent of the smallest normal number.
template <int CODE>
struct SmallFloat {
  static constexpr bool is = CODE == kE4M3 || CODE == kE5M2 || CODE == kE2M1;
  static constexpr int mantissa = CODE == kE4M3 ? 3 : CODE == kE5M2 ? 2 : 1;
  static constexpr int exponent = CODE == kE4M3 ? -6 : CODE == kE5M2 ? -14 : 0;
  static constexpr int shift = 23 - mantissa;
  static constexpr uint32_t sign = CODE == kE2M1 ? 8u : 128u;
  static constexpr uint32_t first_normal = static_cast<uint32_t>(exponent + 127) << mantissa;  // the float's top bits
};
template <int CODE>
constexpr bool kZeroPoint = CODE == kUInt8 || CODE == kUInt4 || CODE == kUInt3 || CODE == kUInt2;

template <int CODE, bool STOCHASTIC>
GM_HD int encode(float x, Block b, uint32_t word) {
  if constexpr (SmallFloat<CODE>::is) {
    // Below the smallest normal number, adding it lines the value up so that its top bits are the code as well.
    typedef SmallFloat<CODE> F;
    constexpr float top = code_top(CODE);
    const float normal = bits_float(F::first_normal << F::shift);
    float y = fabsf(x / b.scale);
    y = y > top ? top : y;
    const bool small = y < normal;
    const uint32_t bits = float_bits(small ? y + normal : y);
    const uint32_t rounding = STOCHASTIC ? word >> (9 + F::mantissa) : (1u << (F::shift - 1)) - 1u + (bits >> F::shift & 1u);
    const uint32_t base = F::first_normal - (small ? 0u : 1u << F::mantissa);
    const uint32_t magnitude = ((bits + rounding) >> F::shift) - base;
    return static_cast<int>(magnitude | (float_bits(x) >> 31 ? F::sign : 0u));
  } else if constexpr (kZeroPoint<CODE>) {
    constexpr float top = code_top(CODE);
    float y = clampf(x / b.scale, -top, top);
    y = STOCHASTIC ? round_stochastic(y, word) : round_even(y);
    return static_cast<int>(clampf(y + static_cast<float>(b.zero), 0.0f, top));
  } else if constexpr (!OffsetFloat<CODE>::is) {  // symmetric integers
    constexpr float top = code_top(CODE);
    float y = clampf(x / b.scale, -top, top);
    return static_cast<int>(STOCHASTIC ? round_stochastic(y, word) : round_even(y));
  } else if constexpr (!OffsetFloat<CODE>::root) {
    // Adding 1 turns the value into a float of exponent 0..7 (moment4: 0..3) whose top bits are the code ("offset float"): steps are
    // fine near zero, 1/32 of the value from there on, and encoding costs no division, root or table. Chosen against
    // linear, companded and bitsandbytes' dynamic codes on real Adam moments: docs/results/state_codes.md.
    typedef OffsetFloat<CODE> F;
    float y = fabsf(x) * b.inverse;
    y = y + 1.0f;
    uint32_t k = (float_bits(y) - 0x3f800000u + (STOCHASTIC ? word >> (32 - F::shift) : 1u << (F::shift - 1))) >> F::shift;
    return static_cast<int>((k > F::last ? F::last : k) | (float_bits(x) >> 31 ? F::last + 1u : 0u));
  } else {  // the same code for sqrt(x); never 0, so that no update divides by eps alone
    return encode_root<CODE>(sqrtf(x), b, STOCHASTIC ? word : 0x80000000u);  // half a step: to nearest
  }
}

template <int CODE>
GM_HD float decode(int q, Block b) {
  if constexpr (kZeroPoint<CODE>) {
    return static_cast<float>(q - b.zero) * b.scale;
  } else if constexpr (CODE == kSign) {
    return q ? -b.scale : b.scale;
  } else if constexpr (SmallFloat<CODE>::is) {
    typedef SmallFloat<CODE> F;
    const uint32_t magnitude = static_cast<uint32_t>(q) & (F::sign - 1u);
    const bool small = magnitude < (1u << F::mantissa);
    float y = bits_float((magnitude + F::first_normal - (small ? 0u : 1u << F::mantissa)) << F::shift);
    if (small) y = y - bits_float(F::first_normal << F::shift);
    return bits_float(float_bits(y) | (static_cast<uint32_t>(q) & F::sign ? 0x80000000u : 0u)) * b.scale;
  } else if constexpr (OffsetFloat<CODE>::is) {
    typedef OffsetFloat<CODE> F;
    const uint32_t k = static_cast<uint32_t>(q);
    float y = bits_float(((k & F::last) << F::shift) + 0x3f800000u) - 1.0f;
    if (F::root) return (y * b.scale) * (y * b.scale);
    return bits_float(float_bits(y) | (k > F::last ? 0x80000000u : 0u)) * b.scale;
  } else {
    return static_cast<float>(q) * b.scale;
  }
}

// --- fake quantisation (pyops/reference/quant.py, fake_quantize) ------------------------------------------
// V is float, or a vector of floats in the compilers' extensions: the arithmetic is element-wise.
constexpr float kSmallestStep = 7.888609052210118e-31f;  // 2^-100
constexpr int kFakeLanes = 32;  // lanes a group's sums go to: element i to lane i % 32; lanes are then added in halves

template <class V>
struct FakeGroup {  // one group's parameters
  V step, zero, top;
};
GM_HD FakeGroup<float> fake_group(float step, float zero, int bits) {
  const float top = static_cast<float>((1 << bits) - 1);
  return {step < kSmallestStep ? kSmallestStep : step, round_even(clampf(zero, 0.0f, top)), top};
}

template <class V>
struct FakeCode {
  V ratio, rounded, code;  // w / step; the nearest integer; the code, 0..top
};
template <class V>
GM_HD FakeCode<V> fake_encode(V w, const FakeGroup<V>& g) {
  const V ratio = w / g.step, limit = V() + 256.0f;  // beyond 2^8 every ratio is out of range
  const V rounded = round_even(clampf(ratio, -limit, limit));
  return {ratio, rounded, clampf(rounded + g.zero, V(), g.top)};
}
template <class V>
GM_HD V fake_decode(V w, const FakeCode<V>& c, const FakeGroup<V>& g) {
  return (c.code - g.zero) * g.step + (w - w);  // w - w: 0, or nan where w is not finite
}
// Gradients of one element, grad being that of its value: returns the weight's, adds the step's to dstep and to
// `clipped` the gradients whose sum times -step is the zero point's.
template <class V>
GM_HD V fake_backward(V grad, V w, const FakeGroup<V>& g, V& dstep, V& clipped) {
  const FakeCode<V> c = fake_encode(w, g);
  const auto inside = c.rounded + g.zero == c.code;
  dstep = dstep + grad * (inside ? c.rounded - c.ratio : c.code - g.zero);
  clipped = clipped + (inside ? V() : grad);
  return inside ? grad : V();
}

// Dither words: word of element i of a block = offset + i * 2^32/golden ratio, the offset one Philox word per block.
// Each element's word is uniform and new at every step, so rounding with it is unbiased, for an addition per element.
// A second moment needs that: at beta2 = 0.999 it moves by less than half a code a step, and nearest rounding would
// freeze it (docs/results/state_codes.md, column "freeze").
constexpr uint32_t kDitherStep = 0x9E3779B1u;

// --- plain 16-bit floats ----------------------------------------------------------------------------------
GM_HD float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

GM_HD uint16_t float_to_bf16(float x) {  // round half to even, nan stays nan
  uint32_t u = float_bits(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

GM_HD uint16_t float_to_bf16_stochastic(float x, uint32_t word) {  // inf and nan are left alone
  uint32_t u = float_bits(x);
  uint32_t rounded = (u + (word >> 16)) >> 16;
  uint32_t special = (u >> 16) | ((u & 0x7fffffffu) > 0x7f800000u ? 0x40u : 0u);
  return static_cast<uint16_t>((u & 0x7fffffffu) >= 0x7f800000u ? special : rounded);
}

// float16 through integer operations: no hardware type needed, so the portable build and every compiler agree.
GM_HD float f16_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, mag = h & 0x7fffu;
  // Shift exponent and mantissa into place and rescale by 2^112; a half's subnormals become normal floats.
  float f = bits_float(mag << 13) * 5.192296858534828e+33f;
  uint32_t special = 0x7f800000u | (mag << 13);
  return bits_float((mag >= 0x7c00u ? special : float_bits(f)) | sign);
}

GM_HD uint16_t float_to_f16(float x) {  // round half to even, overflow to inf, nan stays nan
  uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
  uint32_t normal = (mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 aligns the value so that the float unit does the rounding.
  uint32_t subnormal = float_bits(bits_float(mag) + 0.5f) - 0x3f000000u;
  uint32_t h = mag < 0x38800000u ? subnormal : normal;
  h = mag >= 0x477ff000u ? 0x7c00u : h;
  h = mag > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(h | sign);
}

// --- fp32 weights in two pieces ---------------------------------------------------------------------------
// The value's magnitude as an integer q that continues the 16-bit float's bits by LOW more; `high` is q rounded to nearest
// (ties away from zero, so that the low bits say which way), `low` the last LOW bits of q. With 8 bits q itself is rounded
// stochastically, so that small updates are not lost; q of 16 is exact for bfloat16, truncated below 2^-17 for float16.
template <int CODE>
struct SplitFloat {
  static constexpr bool bf16 = CODE == kBF16Plus8 || CODE == kBF16Plus16;
  static constexpr int low = CODE == kBF16Plus8 || CODE == kF16Plus8 ? 8 : 16;
  static constexpr float subnormal = low == 8 ? 4294967296.0f : 1099511627776.0f;  // 2^(24 + low): a float16's subnormals
};
struct Pieces {
  uint16_t high, low;
};

template <int CODE>
GM_HD Pieces split_float(float x, uint32_t word) {
  typedef SplitFloat<CODE> F;
  const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000u, mag = u & 0x7fffffffu;
  uint32_t q;
  if (F::bf16) {
    q = F::low == 8 ? (mag + (word >> 24)) >> 8 : mag;
  } else {
    const float y = bits_float(mag) * F::subnormal;
    const float up = F::low == 8 ? static_cast<float>(static_cast<int32_t>(word >> 8)) * 5.9604644775390625e-08f : 0.0f;  // 2^-24
    const uint32_t normal = F::low == 8 ? (mag - 0x38000000u + (word >> 27)) >> 5 : (mag - 0x38000000u) << 3;
    q = mag < 0x38800000u ? static_cast<uint32_t>(static_cast<int32_t>(mag < 0x38800000u ? y + up : 0.0f)) : normal;
  }
  const uint32_t special = F::bf16 ? mag >> 16 | (mag > 0x7f800000u ? 0x40u : 0u) : mag > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const bool plain = mag < (F::bf16 ? 0x7f800000u : 0x477ff000u);  // else inf, nan, or too large for float16
  const uint32_t high = plain ? (q + (1u << (F::low - 1))) >> F::low : special, low = plain ? q & ((1u << F::low) - 1u) : 0u;
  return {static_cast<uint16_t>(high | sign), static_cast<uint16_t>(low)};
}

template <int CODE>
GM_HD float join_float(uint16_t high, uint32_t low) {
  typedef SplitFloat<CODE> F;
  const uint32_t sign = static_cast<uint32_t>(high & 0x8000u) << 16, mag = high & 0x7fffu;
  const uint32_t top = mag - (mag > 0u ? low >> (F::low - 1) : 0u);  // a weight set to 0 elsewhere has stale low bits
  const uint32_t q = top << F::low | low;
  if (F::bf16) return bits_float(q << (16 - F::low) | sign);
  const float small = static_cast<float>(static_cast<int32_t>(q)) * (1.0f / F::subnormal);
  const uint32_t normal = (F::low == 8 ? q << 5 : q >> 3) + 0x38000000u, special = 0x7f800000u | mag << 13;
  return bits_float((top >= 0x7c00u ? special : top < 0x400u ? float_bits(small) : normal) | sign);
}

}  // namespace
}  // namespace gradmill
