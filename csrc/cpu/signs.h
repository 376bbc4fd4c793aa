// Signs of floats as packed bits, the lowest first, 1 = negative.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace gradmill {
namespace {

constexpr float kLargest = 3.40282346638528859811704183484516925e+38f;
constexpr int kMeanLanes = 32;  // element i of a row is added to lane i % 32; lanes are then added in halves

inline int64_t bytes_of(int64_t bits) { return (bits + 7) / 8; }

// Eight signs as a byte, the first lowest.
inline uint8_t negative_bits(const float* x) {
#if GM_LEVEL >= 1
  return static_cast<uint8_t>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_setzero_ps(), _CMP_LT_OQ)));
#else
  uint32_t byte = 0;
  for (int i = 0; i < 8; ++i) byte |= static_cast<uint32_t>(x[i] < 0.0f) << i;
  return static_cast<uint8_t>(byte);
#endif
}

// One row's signs; returns its scale.
inline float pack_sign_row(const float* __restrict x, int64_t n, bool mean, uint8_t* bits) {
  float lanes[kMeanLanes] = {};
  int bad = 0;
  int64_t i = 0;
  for (; i + kMeanLanes <= n; i += kMeanLanes) {
    for (int b = 0; b < kMeanLanes / 8; ++b) bits[i / 8 + b] = negative_bits(x + i + 8 * b);
    if (mean)
      for (int k = 0; k < kMeanLanes; ++k) lanes[k] += fabsf(x[i + k]);
    else
      for (int k = 0; k < kMeanLanes; ++k) bad |= !(fabsf(x[i + k]) <= kLargest);
  }
  if (i < n) {
    float rest[kMeanLanes] = {};
    memcpy(rest, x + i, static_cast<size_t>(n - i) * 4);
    for (int64_t b = 0; b < bytes_of(n - i); ++b) bits[i / 8 + b] = negative_bits(rest + 8 * b);
    for (int k = 0; k < kMeanLanes; ++k) lanes[k] += fabsf(rest[k]), bad |= !(fabsf(rest[k]) <= kLargest);
  }
  if (!mean) return bad ? bits_float(0x7fc00000u) : 1.0f;
  for (int half = kMeanLanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0] / static_cast<float>(n);
}

}  // namespace
}  // namespace gradmill
