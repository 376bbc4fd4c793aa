// What the CPU's and the GPU's random Hadamard transform share; pyops/reference/quant.py is the specification.
#pragma once
#include "common.h"

namespace gradmill {
namespace {

// 1 / sqrt(size) for a power of two, rounded to fp32.
GM_HD float hadamard_scale(int64_t size) {
  float scale = 1.0f;
  for (; size >= 4; size /= 4) scale *= 0.5f;
  return size == 2 ? scale * 0.70710678118654752f : scale;
}

// How long the block is that holds element `at` of a row of n: `block`, or, in the tail, one of the powers of two that
// add up to it, the largest first. They end where at and n part ways: the highest bit that n's tail has and at's has not.
GM_HD int64_t hadamard_size(int64_t at, int64_t n, int64_t block) {
  const int64_t tail = n / block * block;
  if (at < tail) return block;
  int64_t size = 1;
  for (int64_t different = (at ^ n) & (block - 1); different > 1; different >>= 1) size <<= 1;
  return size;
}

}  // namespace
}  // namespace gradmill
