// Training of codebook weights, from a run of rows of the dense gradient dW at a time (pyops/autograd/codebook.py makes it, 256
// rows of it, so that it never exists whole).
//
// Both are bound by instructions, not by the 0.3 ns an element of reading dw. `move` makes its random words a thousand at a time and has no
// branches, which the signs of gradients would mispredict: a step of 1024 x 1024 indices, dW of 64 tokens included, one core of a busy Zen 4,
// 29.8 -> 21.0 ms.
#include "book.h"

#include <stdlib.h>

namespace gradmill {
namespace {

// Sums of each row first, in four parts, so that neighbours with the same index do not wait for each other, then of the rows in
// ascending order: threads do not matter.
void sums(const BookSumsArgs& p) {
  const int64_t entries = int64_t{1} << (p.w.code - kBook), rows = p.w.rows, cols = p.w.cols;
  constexpr int parts = 4;
  double* const all = static_cast<double*>(calloc(static_cast<size_t>(rows * entries * parts + 1), sizeof(double)));
  if (!all) abort();
  with_bits(p.w.code - kBook, [&](auto b) {
    constexpr int bits = decltype(b)::value;
#pragma omp parallel for schedule(static) if (rows * cols > 1 << 16)
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* const indices = static_cast<const uint8_t*>(p.w.codes) + r * row_bytes(p.w);
      double* const own = all + r * entries * parts;
      for (int64_t i = 0; i < cols; ++i) own[book_index<bits>(indices, i) * parts + i % parts] += p.dw[r * cols + i];
    }
  });
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < entries; ++e) {
      const double* const own = all + (r * entries + e) * parts;
      p.sums[p.w.zeros[r] * entries + e] += (own[0] + own[1]) + (own[2] + own[3]);
    }
  free(all);
}

// The index that a row's stream has at i, replaced.
template <int BITS>
inline void put_index(uint8_t* row, int64_t i, uint32_t index) {
  const int64_t at = i * BITS;
  const uint32_t mask = ((1u << BITS) - 1) << at % 8;
  row[at / 8] = static_cast<uint8_t>((row[at / 8] & ~mask) | index << at % 8);
  if (8 % BITS != 0 && at % 8 + BITS > 8) row[at / 8 + 1] = static_cast<uint8_t>((row[at / 8 + 1] & ~(mask >> 8)) | (index << at % 8) >> 8);
}

// Index + fraction / 256 is where a weight stands among its codewords c, which ascend. A step, with g = dw * rate:
//   d    = |c[j] - c[index]|, j the neighbour that g drives to, index - 1 for g > 0, or mean where there is none
//   mean = (c[last] - c[0]) / last
//   p    = -g * (2 mean / (d + mean)) * 256, within [-256, 256], rounded stochastically, added to the fraction
// and the index moves where the fraction leaves [-128, 127]: beyond the first and the last codeword it stays there. Left alone:
// where g is 0, nan or inf, and where mean is not positive.
template <int BITS>
void move_row(const BookMoveArgs& p, int64_t r) {
  constexpr int last = (1 << BITS) - 1;
  const float *const c = book_of(p.w, r), *const dw = p.dw + r * p.w.cols, rate = p.rates[r], mean = (c[last] - c[0]) / static_cast<float>(last);
  if (!(mean > 0.0f && mean < __builtin_inff())) return;
  uint8_t* const indices = static_cast<uint8_t*>(p.w.codes) + r * row_bytes(p.w);
  int8_t* const fractions = p.fractions + r * p.w.cols;
  uint32_t words[kWords];
  int32_t index[kWords];
  for (int64_t from = 0; from < p.w.cols; from += kWords) {
    const int64_t n = p.w.cols - from < kWords ? p.w.cols - from : kWords;
    philox_fill(p.key, static_cast<uint64_t>(r * p.w.cols + from), n, words);
    for (int64_t i = 0; i < n; ++i) index[i] = static_cast<int32_t>(book_index<BITS>(indices, from + i));
    for (int64_t i = 0; i < n; ++i) {  // without branches, which gradients' signs would mispredict
      const float g = dw[from + i] * rate;
      const int at = index[i], j = g > 0.0f ? at - 1 : at + 1, inside = j < 0 ? 0 : j > last ? last : j;
      const float d = inside == j ? __builtin_fabsf(c[inside] - c[at]) : mean;
      float step = clampf(-g * ((2.0f * mean) / (d + mean)) * 256.0f, -256.0f, 256.0f);
      step = g - g == 0.0f && step == step ? step : 0.0f;  // a gradient that is not finite, a codeword that is not a number
      const int f = fractions[from + i] + static_cast<int>(round_stochastic(step, words[i]));
      const int up = f > 127, down = f < -128, to = at + up - down, stays = to < 0 || to > last;
      index[i] = stays ? at : to;
      fractions[from + i] = static_cast<int8_t>(stays ? (up ? 127 : -128) : f - 256 * up + 256 * down);
    }
    for (int64_t i = 0; i < n; ++i) put_index<BITS>(indices, from + i, static_cast<uint32_t>(index[i]));
  }
}

void move(const BookMoveArgs& p) {
  with_bits(p.w.code - kBook, [&](auto b) {
#pragma omp parallel for schedule(static) if (p.w.rows * p.w.cols > 1 << 14)
    for (int64_t r = 0; r < p.w.rows; ++r) move_row<decltype(b)::value>(p, r);
  });
}

}  // namespace

const CodebookKernels GM_TABLE(codebook) = {sums, move};

}  // namespace gradmill
