// Signs and short integers as packed bits, and their products.
//
// pack: reads 4 bytes an element and writes one bit (a plane): bound by memory. 2048 x 2048: signs 0.75 ms, by columns 5.5 ms; four
// planes 3.3 ms, with stochastic rounding 6.4 ms (Philox), by columns 11.8 ms.
//
// matmul, signs x signs: sum_k s s' = k - 2 popcount(a xor b). Per core and cycle, AVX2: xor, two nibbles, two vpshufb and two adds (8
// instructions) count 256 products: 100 measured in registers, 8.8x torch's fp32. Here a nibble of a is turned into the table of its
// distances to all 16 nibbles of b, and one vpshufb looks up 32 columns of b at once: vpshufb and vpaddb for 128 products. Two vpshufb
// and four vpaddb a cycle make 256 products, 943 G a second at 3.68 GHz. The microkernel, sums of 248 bits widened to memory included,
// does 677; all of it, packing 31-byte blocks of both operands included, 445 G at 2048 cubed: 9.8x torch's fp32 (one thread's CPU time in the
// same run, 19.3 ms against 189), with packing both operands from fp32 9.15x.
//
// With VPOPCNTDQ (xor, vpopcntd and vpaddd for 512 products, 1137 G in registers) a step reads 64 columns' words of 32 bits against a word of each of
// six rows: sums stay in 32-bit lanes and a row needs no tables, so little is lost beside the three instructions. Predicted 900 G; measured
// beside busy neighbours 852 against the tables' 420 at 2048 cubed (20x torch's fp32), 16 rows of 4096 -> 4096 640 against 240, sums of 64 bits
// 120 to 200 against 80 to 150. Planes stay with tables: four of them would be four counts (213 G against 313). Carry-save adders save 8 %
// of the instructions of the popcount form at three words, 18 % at fifteen: nothing beside the tables.
//
// matmul, integers of 2 to 4 bits x signs: sum_k q s' = sum q - 2 sum_k q [s' < 0]. The table's entries are then sums of up to four q, so
// all planes cost one lookup; they reach 60, so bytes are widened every four steps: 2.75 instructions for 2 (677 -> 484 G in the
// microkernel). 2048 cubed, four planes: 6.7x torch's fp32, where four binary products would be 2.4x.
//
// A table costs a 16-byte store a nibble, a nibble a share of a byte transpose, so the shorter operand should be the one in tables: Y = W X^T (256 rows of tables, 8192 columns,
// 6 % of the time in tables) instead of X W^T (8192 rows, 256 columns, 24 %); with `run` it is written as an image at once. dX has short sums (64 to 512 bits): at 64 bits
// a sum's own 5 instructions' worth of lookups are nothing beside the 4 bytes it is written as (78 G a second, 18.9 MB of which every page is new); rows of which k fits one
// block are finished while their sums are in L1.
//
// Gradients: one pass gives every group's range (4 bytes read an element); planes are packed from the groups that were kept alone, gathered where
// they lie. Sampling is a few passes over the groups' ranges in float64 (0.1 ms for 8192; torch's sort, sums and searches take 1.9).
//
// One or two rows (one with VPOPCNTDQ): 64-bit popcounts of the rows as they lie, which the portable level uses for all shapes. 8 rows of
// 4096 -> 4096: 1.3 ms so, 0.6 by tables, 0.25 with VPOPCNTDQ, packing included (one busy thread).
// gcc keeps the accumulators in memory unless every loop over them is unrolled (1.8 times the time).
#include "gemm.h"
#include "signs.h"

namespace gradmill {
namespace {

// --- packing ----------------------------------------------------------------------------------------------
// Bit `plane` of 32 integers as four bytes.
inline void plane_bits(const uint8_t* q, int plane, uint8_t* out, int64_t bytes) {
  uint32_t word = 0;
#if GM_LEVEL >= 1
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
  word = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_sll_epi16(v, _mm_cvtsi32_si128(7 - plane))));
#else
  for (int i = 0; i < 32; ++i) word |= static_cast<uint32_t>(q[i] >> plane & 1) << i;
#endif
  memcpy(out, &word, static_cast<size_t>(bytes));
}

// One row's integers over its own range.
template <bool STOCHASTIC>
void pack_plane_row(const PackBitsArgs& p, const float* __restrict x, int64_t row) {
  const int64_t n = p.cols, bytes = bytes_of(n), plane = p.rows * bytes;
  uint8_t* const bits = p.bits + row * bytes;
  uint32_t absmax = 0;
  int32_t lo = INT32_MAX, hi = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t a = magnitude_bits(x[i]);
    const int32_t o = ordered_bits(x[i]);
    absmax = a > absmax ? a : absmax;
    lo = o < lo ? o : lo;
    hi = o > hi ? o : hi;
  }
  const float top = static_cast<float>((1 << p.planes) - 1), low = from_ordered_bits(lo) + 0.0f, high = from_ordered_bits(hi);
  const bool bad = absmax >= 0x7f800000u;
  float scale = (high * 0.5f - low * 0.5f) / (top * 0.5f);
  scale = scale < kSmallestStep ? 0.0f : scale;
  p.scales[row] = bad ? bits_float(0x7fc00000u) : scale;
  p.offsets[row] = bad ? bits_float(0x7fc00000u) : low;
  if (bad || scale == 0.0f) {
    for (int k = 0; k < p.planes; ++k) memset(bits + k * plane, 0, static_cast<size_t>(bytes));
    return;
  }
  constexpr int64_t part = 512;
  const float from = low * 0.5f, step = scale * 0.5f;
  uint32_t words[part];
  uint8_t q[part];
  for (int64_t i = 0; i < n; i += part) {
    const int64_t live = min_of(part, n - i);
    if (STOCHASTIC) philox_fill(*p.key, static_cast<uint64_t>(row * n + i), live, words);
    for (int64_t k = 0; k < live; ++k) {
      const float y = clampf((x[i + k] * 0.5f - from) / step, 0.0f, top);
      q[k] = static_cast<uint8_t>(static_cast<int>(STOCHASTIC ? round_stochastic(y, words[k]) : round_even(y)));
    }
    for (int64_t k = live; k % 32 != 0; ++k) q[k] = 0;
    for (int64_t k = 0; k < live; k += 32)
      for (int b = 0; b < p.planes; ++b) plane_bits(q + k, b, bits + b * plane + (i + k) / 8, min_of(4, bytes_of(live - k)));
  }
}

inline void pack_row(const PackBitsArgs& p, const float* x, int64_t row) {
  if (p.planes == 0) p.scales[row] = pack_sign_row(x, p.cols, p.mean, p.bits + row * bytes_of(p.cols));
  else if (p.key) pack_plane_row<true>(p, x, row);
  else pack_plane_row<false>(p, x, row);
}

void pack(const PackBitsArgs& p) {
  const char* const x = static_cast<const char*>(p.x);
  const int64_t size = code_bits(p.x_code) / 8;
  const bool parallel = p.rows * p.cols > 1 << 15;
  if (!p.transpose) {
#pragma omp parallel if (parallel)
    {
      Scratch buffer(p.x_code == kF32 ? 0 : p.cols);
      float* const floats = reinterpret_cast<float*>(buffer.data);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < p.rows; ++row) {
        const char* in = x + row * p.stride * size;
        if (p.x_code != kF32) decode_floats(p.x_code, in, p.cols, floats);
        pack_row(p, p.x_code == kF32 ? reinterpret_cast<const float*>(in) : floats, row);
      }
    }
    return;
  }
  // Sixteen columns of x at a time, a cache line of each of its rows, become rows.
  constexpr int64_t wide = 16;
  const int64_t depth = round_up(p.cols, W) + W;  // not a power of two apart
#pragma omp parallel if (parallel)
  {
    Scratch buffer(wide * depth);
    float* const rows = reinterpret_cast<float*>(buffer.data);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < divide_up(p.rows, wide); ++t) {
      const int64_t first = t * wide, live = min_of(wide, p.rows - first);
      for (int64_t k = 0; k < p.cols; k += W) {
        float lines[W][wide] = {};
        for (int64_t r = 0; r < min_of(W, p.cols - k); ++r) decode_floats(p.x_code, x + ((k + r) * p.stride + first) * size, live, lines[r]);
        for (int64_t c = 0; c < wide; c += W) {
          vf square[W];
          for (int r = 0; r < W; ++r) square[r] = load(lines[r] + c);
          transpose(square);
          for (int r = 0; r < W; ++r) store(rows + (c + r) * depth + k, square[r]);
        }
      }
      for (int64_t r = 0; r < live; ++r) pack_row(p, rows + r * depth, first + r);
    }
  }
}

#if GM_LEVEL >= 1
// Transposes 16 x 16 bytes: each stage is a perfect shuffle of the 256, four are the transpose.
inline void turn_bytes(__m128i x[16]) {
  __m128i y[16];
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; ++stage) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]), y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
}
#endif

// --- bits turned round ------------------------------------------------------------------------------------
// An item is 16 bytes of columns of up to 512 rows: a line of out for each of 128 columns, made in L1.
void transpose_bits(const TransposeBitsArgs& p) {
  constexpr int64_t together = 512, wide = 16;
  const int64_t bytes = bytes_of(p.cols), out_bytes = bytes_of(p.rows), across = divide_up(bytes, wide), down = divide_up(p.rows, together);
#pragma omp parallel for schedule(static) if (p.rows * p.cols > 1 << 20)
  for (int64_t t = 0; t < down * across; ++t) {
    const int64_t row = t / across * together, rows = min_of(together, p.rows - row), byte = t % across * wide, count = min_of(wide, bytes - byte);
    alignas(64) uint8_t lines[wide * 8][together / 8] = {};
    for (int64_t r = 0; r < rows; r += 32) {
      alignas(32) uint8_t square[wide][32] = {};  // byte by byte, 32 rows
      const int64_t live = min_of(32, rows - r);
      const uint8_t* const in = p.bits + (row + r) * bytes + byte;
#if GM_LEVEL >= 1
      for (int half = 0; half < 2; ++half) {
        __m128i x[16];
        for (int i = 0; i < 16; ++i) {
          if (16 * half + i >= live) x[i] = _mm_setzero_si128();
          else if (count == wide) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + (16 * half + i) * bytes));
          else {
            uint8_t line[wide] = {};
            memcpy(line, in + (16 * half + i) * bytes, static_cast<size_t>(count));
            x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line));
          }
        }
        turn_bytes(x);
        for (int i = 0; i < 16; ++i) _mm_store_si128(reinterpret_cast<__m128i*>(square[i] + 16 * half), x[i]);
      }
#else
      for (int64_t i = 0; i < live; ++i)
        for (int64_t k = 0; k < count; ++k) square[k][i] = in[i * bytes + k];
#endif
      for (int64_t k = 0; k < count; ++k)
        for (int b = 0; b < 8; ++b) {
          uint8_t word[4];
          plane_bits(square[k], b, word, 4);
          memcpy(lines[8 * k + b] + r / 8, word, 4);
        }
    }
    for (int64_t c = 0; c < min_of(8 * wide, p.cols - 8 * byte); ++c)
      memcpy(p.out + (8 * byte + c) * out_bytes + row / 8, lines[c], static_cast<size_t>(bytes_of(rows)));
  }
}

// --- gradients --------------------------------------------------------------------------------------------
// What is left of a group's low, high and x - x (nan once x is not finite) in the end.
inline void range_of(float low, float high, float bad, float* range, float* magnitude) {
  const bool fine = bad == 0.0f;
  *range = fine ? high - low : bits_float(0x7f800000u);
  *magnitude = fine ? (high >= -low ? high : -low) : bits_float(0x7f800000u);
}

inline void widen(float x, float& low, float& high, float& bad) {
  low = x < low ? x : low;
  high = x > high ? x : high;
  bad += x - x;
}

// Each thread's images have tokens of their own and add to its channels' three numbers, which then come together: no order matters.
void gradient_ranges(const GradientRangesArgs& p) {
  const int64_t images = p.g.images, channels = p.g.channels, positions = p.g.positions;
  Scratch together(3 * channels);
  float* const all = reinterpret_cast<float*>(together.data);
  memset(all, 0, static_cast<size_t>(3 * channels) * 4);
#pragma omp parallel if (images * channels * positions > 1 << 15)
  {
    Scratch buffer(3 * channels), tokens(3 * positions);
    float *__restrict low = reinterpret_cast<float*>(buffer.data), *__restrict high = low + channels, *__restrict bad = high + channels;
    float *__restrict t_low = reinterpret_cast<float*>(tokens.data), *__restrict t_high = t_low + positions, *__restrict t_bad = t_high + positions;
    memset(low, 0, static_cast<size_t>(3 * channels) * 4);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < images; ++n) {
      const float* __restrict x = p.g.x + n * channels * positions;
      if (positions == 1) {
        float lows[kMeanLanes] = {}, highs[kMeanLanes] = {}, bads[kMeanLanes] = {};
        int64_t c = 0;
        for (; c + kMeanLanes <= channels; c += kMeanLanes)
          for (int l = 0; l < kMeanLanes; ++l) {
            widen(x[c + l], low[c + l], high[c + l], bad[c + l]);
            widen(x[c + l] * p.g.sizes[c + l], lows[l], highs[l], bads[l]);
          }
        for (; c < channels; ++c) widen(x[c], low[c], high[c], bad[c]), widen(x[c] * p.g.sizes[c], lows[0], highs[0], bads[0]);
        for (int l = 1; l < kMeanLanes; ++l) {
          lows[0] = lows[l] < lows[0] ? lows[l] : lows[0];
          highs[0] = highs[l] > highs[0] ? highs[l] : highs[0];
          bads[0] += bads[l];
        }
        range_of(lows[0], highs[0], bads[0], p.ranges + n, p.magnitudes + n);
        continue;
      }
      memset(t_low, 0, static_cast<size_t>(3 * positions) * 4);
      for (int64_t c = 0; c < channels; ++c, x += positions) {
        constexpr int lanes = 16;
        const float size = p.g.sizes[c];
        float lows[lanes] = {}, highs[lanes] = {}, bads[lanes] = {};
        int64_t i = 0;
        for (; i + lanes <= positions; i += lanes)
          for (int l = 0; l < lanes; ++l) {
            widen(x[i + l], lows[l], highs[l], bads[l]);
            widen(x[i + l] * size, t_low[i + l], t_high[i + l], t_bad[i + l]);
          }
        for (; i < positions; ++i) widen(x[i], lows[0], highs[0], bads[0]), widen(x[i] * size, t_low[i], t_high[i], t_bad[i]);
        for (int l = 0; l < lanes; ++l) {
          low[c] = lows[l] < low[c] ? lows[l] : low[c];
          high[c] = highs[l] > high[c] ? highs[l] : high[c];
          bad[c] += bads[l];
        }
      }
      for (int64_t i = 0; i < positions; ++i) range_of(t_low[i], t_high[i], t_bad[i], p.ranges + n * positions + i, p.magnitudes + n * positions + i);
    }
#pragma omp critical
    for (int64_t c = 0; c < channels; ++c) {
      all[c] = low[c] < all[c] ? low[c] : all[c];
      all[channels + c] = high[c] > all[channels + c] ? high[c] : all[channels + c];
      all[2 * channels + c] += bad[c];
    }
  }
  for (int64_t c = 0; c < channels; ++c) range_of(all[c], all[channels + c], all[2 * channels + c], p.channel_ranges + c, p.channel_magnitudes + c);
}

void pack_gradient(const PackGradientArgs& p) {
  const Gradient& g = p.g;
  const int64_t cols = g.sizes ? g.channels : g.tokens();
  const PackBitsArgs rows{nullptr, kF32, cols, p.count, cols, false, p.planes, false, p.key, p.bits, p.scales, p.offsets};
#pragma omp parallel if (p.count * cols > 1 << 15)
  {
    Scratch buffer(cols);
    float* const row = reinterpret_cast<float*>(buffer.data);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.count; ++i) {
      if (g.sizes) {
        const float* const x = g.x + p.kept[i] / g.positions * g.channels * g.positions + p.kept[i] % g.positions;
        for (int64_t c = 0; c < cols; ++c) row[c] = x[c * g.positions] * g.sizes[c];
      } else {
        for (int64_t n = 0; n < g.images; ++n)
          memcpy(row + n * g.positions, g.x + (n * g.channels + p.kept[i]) * g.positions, static_cast<size_t>(g.positions) * 4);
      }
      pack_row(rows, row, i);
    }
  }
}

// Which groups are certain: those whose share of what is left would be above 1, until there is none.
void sample_groups(const SampleArgs& p) {
  const int64_t count = divide_up(p.groups, p.bits);
  const double wanted = p.groups > p.bits ? static_cast<double>(p.groups) / static_cast<double>(p.bits) : 1.0;
  const auto certain = [&](double size, double factor) { return !(size * factor <= 1.0) && size > 0.0; };
  const auto size_of = [&](int64_t i) { return magnitude_bits(p.ranges[i]) < 0x7f800000u ? static_cast<double>(p.ranges[i]) : HUGE_VAL; };
  double factor = 0.0;  // so that only what is infinite is certain
  for (int64_t before = 0, now = -1; now != before;) {
    double rest = 0.0;
    before = now, now = 0;
    for (int64_t i = 0; i < p.groups; ++i) {
      const double size = size_of(i);
      if (certain(size, factor)) ++now;
      else rest += size;
    }
    const double left = wanted - static_cast<double>(now);
    factor = left <= 0.0 ? 0.0 : rest > 0.0 ? left / rest : HUGE_VAL;
  }
  double sum = 0.0, step = 0.0;
  int64_t hits = 0;
  for (int64_t i = 0; i < p.groups && hits < count; ++i) {
    const double size = size_of(i);
    double share = certain(size, factor) ? 1.0 : size > 0.0 ? size * factor : 0.0;
    share = share < 1.0 ? share : 1.0;
    if (share < 1.0) sum += share;
    const double now = floor(sum + p.offset);
    if (share >= 1.0 || now != step) p.kept[hits] = i, p.factors[hits++] = static_cast<float>(1.0 / share);
    step = now;
  }
  // The first that were not hit fill up, in order.
  for (int64_t i = 0; hits < count; ++i) {
    int64_t at = 0;
    while (at < hits && p.kept[at] < i) ++at;
    if (at < hits && p.kept[at] == i) continue;
    for (int64_t k = hits; k > at; --k) p.kept[k] = p.kept[k - 1], p.factors[k] = p.factors[k - 1];
    p.kept[at] = i, p.factors[at] = 0.0f;
    ++hits;
  }
}

// --- counts and dot products ------------------------------------------------------------------------------
// Both operands' last byte is masked where it is read: what unused bits hold does not matter.
inline uint8_t last_mask(int64_t k) { return static_cast<uint8_t>(k % 8 ? (1 << k % 8) - 1 : 255); }

inline uint64_t popcount(uint64_t x) {
#if GM_LEVEL >= 1
  return static_cast<uint64_t>(__builtin_popcountll(x));
#else
  x -= x >> 1 & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return x * 0x0101010101010101u >> 56;
#endif
}

// Bits set in a ^ b, or in a & b, of k bits; b null: in a.
template <bool XOR>
int32_t count_bits(const uint8_t* a, const uint8_t* b, int64_t k) {
  const int64_t bytes = bytes_of(k);
  uint64_t total = 0;
  int64_t i = 0;
  for (; i + 8 < bytes; i += 8) {
    uint64_t x, y;
    memcpy(&x, a + i, 8), memcpy(&y, b + i, 8);
    total += popcount(XOR ? x ^ y : x & y);
  }
  for (; i < bytes; ++i) {
    const uint8_t x = XOR ? a[i] ^ b[i] : a[i] & b[i];
    total += popcount(x & (i + 1 == bytes ? last_mask(k) : 255u));
  }
  return static_cast<int32_t>(total);
}

// The sums q of every row of a, and the bits set in every row of b.
void count_rows(const BinaryMatmulArgs& p) {
  const int64_t bytes = bytes_of(p.k), plane = p.m * bytes;
#pragma omp parallel for schedule(static) if ((p.m + p.n) * p.k > 1 << 18)
  for (int64_t i = 0; i < p.m + p.n; ++i) {
    int32_t count = 0;
    if (i < p.m)
      for (int q = 0; q < p.planes; ++q) count += count_bits<false>(p.a + q * plane + i * bytes, p.a + q * plane + i * bytes, p.k) << q;
    else
      count = count_bits<false>(p.b + (i - p.m) * bytes, p.b + (i - p.m) * bytes, p.k);
    p.counts[i] = count;
  }
}

// sums[j], the bits that differ (signs) or the q that meet a set bit (planes), to n columns of a row of out.
void finish(const BinaryMatmulArgs& p, int64_t row, int64_t col, int64_t n, const int32_t* __restrict sums, float* __restrict out) {
  const float scale = p.a_scales[row], *b_scales = p.b_scales + col;
  if (p.planes == 0) {
    const int32_t k = static_cast<int32_t>(p.k);
    for (int64_t j = 0; j < n; ++j) out[j] = (static_cast<float>(k - 2 * sums[j]) * scale) * b_scales[j];
    if (p.bias && p.run)
      for (int64_t j = 0; j < n; ++j) out[j] += p.bias[row];
    else if (p.bias)
      for (int64_t j = 0; j < n; ++j) out[j] += p.bias[col + j];
  } else {
    const int32_t k = static_cast<int32_t>(p.k), total = p.counts[row], *counts = p.counts + p.m + col;
    const float offset = p.offsets[row];
    for (int64_t j = 0; j < n; ++j)
      out[j] = (offset * static_cast<float>(k - 2 * counts[j]) + scale * static_cast<float>(total - 2 * sums[j])) * b_scales[j];
  }
  char* const to = static_cast<char*>(p.out);
  const int64_t size = code_bits(p.out_code) / 8;
  if (p.run == 0) return encode_floats(p.out_code, out, nullptr, n, to + (row * p.n + col) * size);
  for (int64_t j = 0; j < n;) {
    const int64_t image = (col + j) / p.run, at = (col + j) % p.run, live = min_of(p.run - at, n - j);
    encode_floats(p.out_code, out + j, nullptr, live, to + ((image * p.m + row) * p.run + at) * size);
    j += live;
  }
}

void dot_rows(const BinaryMatmulArgs& p) {
  constexpr int64_t chunk = 64;
  const int64_t bytes = bytes_of(p.k), plane = p.m * bytes;
#pragma omp parallel for schedule(static) if (p.m * p.n * p.k > 1 << 18)
  for (int64_t t = 0; t < divide_up(p.n, chunk); ++t) {
    const int64_t col = t * chunk, n = min_of(chunk, p.n - col);
    for (int64_t i = 0; i < p.m; ++i) {
      int32_t sums[chunk];
      float out[chunk];
      const uint8_t* a = p.a + i * bytes;
      for (int64_t j = 0; j < n; ++j) {
        const uint8_t* b = p.b + (col + j) * bytes;
        sums[j] = p.planes == 0 ? count_bits<true>(a, b, p.k) : 0;
        for (int q = 0; q < p.planes; ++q) sums[j] += count_bits<false>(a + q * plane, b, p.k) << q;
      }
      finish(p, i, col, n, sums, out);
    }
  }
}

#if GM_LEVEL >= 1
// --- products by table ------------------------------------------------------------------------------------
typedef __m256i bytes32;
constexpr int kBlock = 31, kPlaneBlock = 64;  // bytes of k at a time: 62 nibbles, so a byte holds the bits that differ; planes add up in words
constexpr int kPanel = 64;             // columns of a microkernel, two vectors of bytes
constexpr int kTileRows = 192, kPlaneTileRows = 96, kTileColumns = 1024;

inline bytes32 load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline bytes32 table(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p))); }

// sums += or = 32 unsigned bytes or words.
inline void put_bytes(int32_t* out, bytes32 x, bool first) {
  const __m128i halves[2] = {_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)};
  for (int i = 0; i < 4; ++i) {
    __m256i wide = _mm256_cvtepu8_epi32(i % 2 ? _mm_srli_si128(halves[i / 2], 8) : halves[i / 2]);
    __m256i* const at = reinterpret_cast<__m256i*>(out + 8 * i);
    _mm256_storeu_si256(at, first ? wide : _mm256_add_epi32(wide, _mm256_loadu_si256(at)));
  }
}
// even and odd: the sums of the even and of the odd bytes.
inline void put_words(int32_t* out, bytes32 even, bytes32 odd, bool first) {
  const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);  // of each 128-bit part
  for (int i = 0; i < 4; ++i) {
    const __m256i from = i % 2 ? high : low;
    const __m128i half = i < 2 ? _mm256_castsi256_si128(from) : _mm256_extracti128_si256(from, 1);
    __m256i wide = _mm256_cvtepu16_epi32(half);
    __m256i* const at = reinterpret_cast<__m256i*>(out + 8 * i);
    _mm256_storeu_si256(at, first ? wide : _mm256_add_epi32(wide, _mm256_loadu_si256(at)));
  }
}

// LIVE of a panel's ROWS rows of tables times 64 columns of nibbles.
template <int ROWS, int LIVE>
void multiply_signs(int64_t nibbles, const uint8_t* __restrict a, const uint8_t* __restrict b, int32_t* out, int64_t stride, bool first) {
  bytes32 acc[LIVE][2];
#pragma GCC unroll 8
  for (int r = 0; r < LIVE; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  for (int64_t t = 0; t < nibbles; ++t, a += ROWS * 16, b += kPanel) {
    const bytes32 b0 = load_bytes(b), b1 = load_bytes(b + 32);
#pragma GCC unroll 8
    for (int r = 0; r < LIVE; ++r) {
      const bytes32 entries = table(a + r * 16);
      acc[r][0] = _mm256_add_epi8(acc[r][0], _mm256_shuffle_epi8(entries, b0));
      acc[r][1] = _mm256_add_epi8(acc[r][1], _mm256_shuffle_epi8(entries, b1));
      in_register(acc[r][0]), in_register(acc[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < LIVE; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2; ++v) put_bytes(out + r * stride + 32 * v, acc[r][v], first);
}

// The same for integers: a table's entries are up to 60, so byte sums go to words every four steps. A word of `all` is
// even + 256 odd, modulo 2^16.
template <int ROWS, int LIVE>
void multiply_planes(int64_t nibbles, const uint8_t* __restrict a, const uint8_t* __restrict b, int32_t* out, int64_t stride, bool first) {
  bytes32 all[LIVE][2], odd[LIVE][2];
#pragma GCC unroll 8
  for (int r = 0; r < LIVE; ++r) all[r][0] = all[r][1] = odd[r][0] = odd[r][1] = _mm256_setzero_si256();
  for (int64_t t = 0; t < nibbles; t += 4) {
    bytes32 acc[LIVE][2];
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step, a += ROWS * 16, b += kPanel) {
      if (t + step >= nibbles) break;
      const bytes32 b0 = load_bytes(b), b1 = load_bytes(b + 32);
#pragma GCC unroll 8
      for (int r = 0; r < LIVE; ++r) {
        const bytes32 entries = table(a + r * 16), x = _mm256_shuffle_epi8(entries, b0), y = _mm256_shuffle_epi8(entries, b1);
        acc[r][0] = step == 0 ? x : _mm256_add_epi8(acc[r][0], x);
        acc[r][1] = step == 0 ? y : _mm256_add_epi8(acc[r][1], y);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < LIVE; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < 2; ++v) {
        all[r][v] = _mm256_add_epi16(all[r][v], acc[r][v]);
        odd[r][v] = _mm256_add_epi16(odd[r][v], _mm256_srli_epi16(acc[r][v], 8));
        in_register(all[r][v]), in_register(odd[r][v]);
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < LIVE; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2; ++v)
      put_words(out + r * stride + 32 * v, _mm256_sub_epi16(all[r][v], _mm256_slli_epi16(odd[r][v], 8)), odd[r][v], first);
}

// What a nibble of a becomes: for each nibble of b the bits that differ, or, of plane p, 2^p for each bit set in both.
struct Tables {
  alignas(16) uint8_t differ[16][16], both[4][16][16];
  constexpr Tables() : differ(), both() {
    for (int a = 0; a < 16; ++a)
      for (int b = 0; b < 16; ++b) {
        for (int i = 0; i < 4; ++i) {
          differ[a][b] = static_cast<uint8_t>(differ[a][b] + ((a ^ b) >> i & 1));
          for (int p = 0; p < 4; ++p) both[p][a][b] = static_cast<uint8_t>(both[p][a][b] + ((a & b) >> i & 1) * (1 << p));
        }
      }
  }
};
constexpr Tables kTables;

// Bytes [from, from + count) of k of rows [first, first + live) of a as tables, [nibble][ROWS][16].
template <int ROWS>
void pack_tables(const BinaryMatmulArgs& p, int64_t first, int64_t live, int64_t from, int64_t count, uint8_t* out) {
  const int64_t bytes = bytes_of(p.k), plane = p.m * bytes;
  for (int r = 0; r < ROWS; ++r, out += 16) {
    uint8_t* at = out;
    if (r >= live) continue;  // never multiplied
    const uint8_t* a = p.a + (first + r) * bytes + from;
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t mask = from + i + 1 == bytes ? last_mask(p.k) : 255;
      for (int half = 0; half < 2; ++half, at += ROWS * 16) {
        __m128i entries;
        if (p.planes == 0) {
          entries = _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.differ[(a[i] & mask) >> 4 * half & 15]));
        } else {
          entries = _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.both[0][a[i] >> 4 * half & 15]));
          for (int q = 1; q < p.planes; ++q)
            entries = _mm_add_epi8(entries, _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.both[q][a[q * plane + i] >> 4 * half & 15])));
        }
        _mm_store_si128(reinterpret_cast<__m128i*>(at), entries);
      }
    }
  }
}

// Bytes [from, from + count) of 64 rows of b, those past `live` as zeros, to nibbles [nibble][64].
void pack_nibbles(const BinaryMatmulArgs& p, int64_t first, int64_t live, int64_t from, int64_t count, uint8_t* out) {
  const int64_t bytes = bytes_of(p.k);
  const __m128i low = _mm_set1_epi8(15);
  for (int group = 0; group < kPanel; group += 16)
    for (int64_t part = 0; part < count; part += 16) {
      const int64_t n = min_of(16, count - part);
      __m128i r[16];
      if (group + 16 <= live && from + part + 16 < bytes) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p.b + (first + group + i) * bytes + from + part));
      } else {
        for (int i = 0; i < 16; ++i) {
          uint8_t line[16] = {};
          if (group + i < live) {
            memcpy(line, p.b + (first + group + i) * bytes + from + part, static_cast<size_t>(n));
            if (from + part + n == bytes) line[n - 1] &= last_mask(p.k);
          }
          r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line));
        }
      }
      turn_bytes(r);
      for (int64_t i = 0; i < n; ++i) {
        uint8_t* at = out + (part + i) * 2 * kPanel + group;
        _mm_store_si128(reinterpret_cast<__m128i*>(at), _mm_and_si128(r[i], low));
        _mm_store_si128(reinterpret_cast<__m128i*>(at + kPanel), _mm_and_si128(_mm_srli_epi16(r[i], 4), low));
      }
    }
}

// How a product is made: tables of a and nibbles of b, for signs or for planes.
template <bool PLANES>
struct ByTable {
  static constexpr int rows = PLANES ? 2 : 6, panel = kPanel, tile_rows = PLANES ? kPlaneTileRows : kTileRows;
  static constexpr int64_t block = PLANES ? kPlaneBlock : kBlock, a_step = 16 * rows, b_step = panel;  // bytes of k at a time; of a panel's step
  static int64_t steps(int64_t count) { return 2 * count; }
  static void pack_a(const BinaryMatmulArgs& p, int64_t first, int64_t live, int64_t from, int64_t count, uint8_t* out) {
    pack_tables<rows>(p, first, live, from, count, out);
  }
  static void pack_b(const BinaryMatmulArgs& p, int64_t first, int64_t live, int64_t from, int64_t count, uint8_t* out) {
    pack_nibbles(p, first, live, from, count, out);
  }
  static void multiply(int64_t live, int64_t steps, const uint8_t* a, const uint8_t* b, int32_t* out, int64_t stride, bool first) {
    if constexpr (PLANES) {
      if (live == 1) multiply_planes<rows, 1>(steps, a, b, out, stride, first);
      else multiply_planes<rows, rows>(steps, a, b, out, stride, first);
    } else {
      if (live == 1) multiply_signs<rows, 1>(steps, a, b, out, stride, first);
      else if (live <= 3) multiply_signs<rows, 3>(steps, a, b, out, stride, first);
      else multiply_signs<rows, rows>(steps, a, b, out, stride, first);
    }
  }
};

#if GM_LEVEL >= 2
// --- products by VPOPCNTDQ --------------------------------------------------------------------------------
constexpr int kWordRows = 6;

// LIVE of kWordRows rows of words, [word][kWordRows], times 64 columns of words, [word][64].
template <int LIVE>
__attribute__((target("avx512vpopcntdq"))) void count_words(int64_t words, const uint32_t* __restrict a, const uint32_t* __restrict b, int32_t* out,
                                                            int64_t stride, bool first) {
  __m512i acc[LIVE][4];
#pragma GCC unroll 8
  for (int r = 0; r < LIVE; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[r][v] = first ? _mm512_setzero_si512() : _mm512_loadu_si512(out + r * stride + 16 * v);
  for (int64_t t = 0; t < words; ++t, a += kWordRows, b += kPanel) {
    __m512i columns[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) columns[v] = _mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < LIVE; ++r) {
      const __m512i word = _mm512_set1_epi32(static_cast<int>(a[r]));
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        acc[r][v] = _mm512_add_epi32(acc[r][v], _mm512_popcnt_epi32(_mm512_xor_si512(word, columns[v])));
        in_register(acc[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < LIVE; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_storeu_si512(out + r * stride + 16 * v, acc[r][v]);
}

// Bytes [from, from + count) of a row, bits beyond k as zeros, and zeros up to `room`.
inline void copy_bytes(const uint8_t* row, int64_t from, int64_t count, int64_t k, uint8_t* out, int64_t room) {
  memcpy(out, row + from, static_cast<size_t>(count));
  memset(out + count, 0, static_cast<size_t>(room - count));
  if (from + count == bytes_of(k)) out[count - 1] &= last_mask(k);
}

struct ByCount {
  static constexpr int rows = kWordRows, panel = kPanel, tile_rows = kTileRows;
  static constexpr int64_t block = 256, a_step = 4 * rows, b_step = 4 * panel;
  static int64_t steps(int64_t count) { return divide_up(count, 4); }
  static void pack_a(const BinaryMatmulArgs& p, int64_t first, int64_t live, int64_t from, int64_t count, uint8_t* out) {
    uint32_t line[block / 4], *const words = reinterpret_cast<uint32_t*>(out);
    for (int64_t r = 0; r < min_of(rows, live); ++r) {
      copy_bytes(p.a + (first + r) * bytes_of(p.k), from, count, p.k, reinterpret_cast<uint8_t*>(line), 4 * steps(count));
      for (int64_t t = 0; t < steps(count); ++t) words[t * rows + r] = line[t];
    }
  }
  static void pack_b(const BinaryMatmulArgs& p, int64_t first, int64_t live, int64_t from, int64_t count, uint8_t* out) {
    const int64_t whole = from + count == bytes_of(p.k) && p.k % 8 ? count - 1 : count;  // bytes that can be taken as they are
    for (int64_t group = 0; group < panel; group += W)
      for (int64_t t = 0; t < steps(count); t += W) {
        vf square[W];
        for (int64_t i = 0; i < W; ++i) {
          const uint8_t* const row = p.b + (first + group + i) * bytes_of(p.k);
          float line[W];
          if (group + i >= live) {
            square[i] = zero();
          } else if (4 * (t + W) <= whole) {
            square[i] = load(reinterpret_cast<const float*>(row + from + 4 * t));
          } else {
            copy_bytes(row, from + 4 * t, min_of(4 * W, count - 4 * t), p.k, reinterpret_cast<uint8_t*>(line), 4 * W);
            square[i] = load(line);
          }
        }
        transpose(square);
        for (int64_t i = 0; i < min_of(W, steps(count) - t); ++i) store(reinterpret_cast<float*>(out) + (t + i) * panel + group, square[i]);
      }
  }
  static void multiply(int64_t live, int64_t words, const uint8_t* a, const uint8_t* b, int32_t* out, int64_t stride, bool first) {
    const uint32_t *const x = reinterpret_cast<const uint32_t*>(a), *const y = reinterpret_cast<const uint32_t*>(b);
    if (live == 1) count_words<1>(words, x, y, out, stride, first);
    else if (live <= 3) count_words<3>(words, x, y, out, stride, first);
    else count_words<rows>(words, x, y, out, stride, first);
  }
};
#endif

template <class How>
void by_tiles(const BinaryMatmulArgs& p) {
  int64_t rows = min_of(How::tile_rows / How::rows * How::rows, round_up(p.m, How::rows)), cols = min_of(kTileColumns, round_up(p.n, How::panel));
  const int64_t wanted = omp_get_max_threads() > 1 ? 4 * omp_get_max_threads() : 1;
  while (divide_up(p.m, rows) * divide_up(p.n, cols) < wanted) {
    if (cols >= 4 * How::panel && cols >= rows) cols = round_up(cols / 2, How::panel);
    else if (rows >= 8 * How::rows) rows = round_up(rows / 2, How::rows);
    else break;
  }
  const int64_t down = divide_up(p.m, rows), across = divide_up(p.n, cols), bytes = bytes_of(p.k), block = How::block;
  const bool once = bytes <= block;  // then rows are finished while their sums are in L1
#pragma omp parallel if (p.m * p.n * p.k > 1 << 20)
  {
    Scratch a(rows / How::rows * How::steps(block) * How::a_step / 4), b(cols / How::panel * How::steps(block) * How::b_step / 4), tile((once ? How::rows + 1 : rows + 1) * cols);
    uint8_t *const left = reinterpret_cast<uint8_t*>(a.data), *const right = reinterpret_cast<uint8_t*>(b.data);
    int32_t* const sums = reinterpret_cast<int32_t*>(tile.data);
    float* const line = reinterpret_cast<float*>(sums + (once ? How::rows : rows) * cols);
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < down * across; ++t) {
      const int64_t row = t / across * rows, m = min_of(rows, p.m - row), col = t % across * cols, n = min_of(cols, p.n - col);
      if (bytes == 0) memset(sums, 0, static_cast<size_t>(How::rows * cols) * 4);
      for (int64_t k = 0; k < bytes; k += block) {
        const int64_t count = min_of(block, bytes - k), steps = How::steps(count), a_panel = steps * How::a_step, b_panel = steps * How::b_step;
        for (int64_t j = 0; j < n; j += How::panel) How::pack_b(p, col + j, n - j, k, count, right + j / How::panel * b_panel);
        for (int64_t i = 0; i < m; i += How::rows) {
          uint8_t* const panel = left + i / How::rows * a_panel;
          How::pack_a(p, row + i, m - i, k, count, panel);
          for (int64_t j = 0; j < n; j += How::panel)
            How::multiply(m - i, steps, panel, right + j / How::panel * b_panel, sums + (once ? 0 : i * cols) + j, cols, k == 0);
          for (int64_t r = 0; once && r < min_of(How::rows, m - i); ++r) finish(p, row + i + r, col, n, sums + r * cols, line);
        }
      }
      for (int64_t i = 0; i < m && (!once || bytes == 0); ++i) finish(p, row + i, col, n, sums + (once ? 0 : i * cols), line);
    }
  }
}
#endif

void matmul(const BinaryMatmulArgs& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.planes) count_rows(p);
#if GM_LEVEL >= 1
#if GM_LEVEL >= 2
  if (p.m > 1 && p.planes == 0 && __builtin_cpu_supports("avx512vpopcntdq")) return by_tiles<ByCount>(p);
#endif
  if (p.m > 2 || p.planes > 1) return p.planes ? by_tiles<ByTable<true>>(p) : by_tiles<ByTable<false>>(p);
#endif
  dot_rows(p);
}

// --- a delta of signs for each row ------------------------------------------------------------------------
constexpr int kTenantRows = 4;

// ROWS rows of x (zeros up to a multiple of 2 W) times one row of signs.
template <int ROWS>
void dot_signs(const float* __restrict x, int64_t stride, const uint8_t* bits, int64_t k, float* sums) {
  constexpr int vectors = 2;
#if GM_LEVEL >= 1
  const SignDecoder decoder(0, 1.0f);
#endif
  vf acc[ROWS][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = zero();
  for (int64_t i = 0; i < k; i += vectors * W) {
    uint8_t last[vectors * W / 8] = {};
    const uint8_t* p = bits + i / 8;
    if (i + vectors * W > k) memcpy(last, p, static_cast<size_t>(bytes_of(k - i))), p = last;  // not beyond the row
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
#if GM_LEVEL >= 1
      const vf sign = decoder(p + v * W / 8);
#else
      vf sign;
      for (int j = 0; j < W; ++j) sign[j] = p[(v * W + j) / 8] >> (v * W + j) % 8 & 1 ? -1.0f : 1.0f;
#endif
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) acc[r][v] = fma(load(x + r * stride + i + v * W), sign, acc[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) sums[r] = sum(add(acc[r][0], acc[r][1]));
}

void tenants(const TenantsArgs& p) {
  constexpr int64_t chunk = 32;
  const int64_t bytes = bytes_of(p.k), stride = round_up(p.k, 2 * W), size = code_bits(p.x_code) / 8, out_size = code_bits(p.out_code) / 8;
  Scratch buffer(p.m * stride), starts(2 * (p.m + 1));
  float* const x = reinterpret_cast<float*>(buffer.data);
  int64_t* const group = reinterpret_cast<int64_t*>(starts.data);  // runs of up to kTenantRows rows of one tenant, in order
  int64_t groups = 0;
  for (int64_t i = 0; i < p.m; ++i) {
    if (i == 0 || p.tenants[i] != p.tenants[i - 1] || i - group[groups - 1] == kTenantRows) group[groups++] = i;
    decode_floats(p.x_code, static_cast<const char*>(p.x) + p.order[i] * p.k * size, p.k, x + i * stride);
    for (int64_t j = p.k; j < stride; ++j) x[i * stride + j] = 0.0f;
  }
  group[groups] = p.m;
  const int64_t chunks = divide_up(p.n, chunk);
#pragma omp parallel for schedule(dynamic, 4) if (p.m * p.n * p.k > 1 << 16)
  for (int64_t t = 0; t < groups * chunks; ++t) {
    const int64_t first = group[t / chunks], rows = group[t / chunks + 1] - first, col = t % chunks * chunk, live = min_of(chunk, p.n - col);
    const int64_t tenant = p.tenants[first];
    float sums[kTenantRows][chunk] = {};
    for (int64_t j = 0; j < live && tenant >= 0; ++j) {
      const uint8_t* bits = p.bits + (tenant * p.n + col + j) * bytes;
      const float* in = x + first * stride;
      float row[kTenantRows];
      if (rows == 1) dot_signs<1>(in, stride, bits, p.k, row);
      else if (rows == 2) dot_signs<2>(in, stride, bits, p.k, row);
      else if (rows == 3) dot_signs<3>(in, stride, bits, p.k, row);
      else dot_signs<4>(in, stride, bits, p.k, row);
      for (int64_t r = 0; r < rows; ++r) sums[r][j] = row[r];
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (p.order[first + r] * p.n + col) * out_size;
      float out[chunk];
      decode_floats(p.out_code, static_cast<const char*>(p.base) + at, live, out);
      if (tenant >= 0)
        for (int64_t j = 0; j < live; ++j) out[j] += p.alphas[tenant] * sums[r][j];
      encode_floats(p.out_code, out, nullptr, live, static_cast<char*>(p.out) + at);
    }
  }
}

}  // namespace

const BinaryKernels GM_TABLE(binary) = {pack, matmul, tenants, transpose_bits, gradient_ranges, pack_gradient, sample_groups};

}  // namespace gradmill
