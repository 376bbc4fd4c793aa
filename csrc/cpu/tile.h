// Tiles: runs of elements of one row, decoded to fp32 in L1, worked on, encoded again. The one place on the
// CPU where storage formats are read and written; the code is a run-time value, one branch per block.
#pragma once
#include <stdlib.h>

#include "kernels.h"

namespace gradmill {
namespace {

constexpr int64_t kTile = 1024;  // elements a tile holds when the format has no blocks: 4 KB, three fit in L1

inline int64_t row_bytes(const Matrix& m) { return (m.cols * code_bits(m.code) + 7) / 8; }
inline char* tile_address(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<char*>(m.codes) + row * row_bytes(m) + col * code_bits(m.code) / 8;
}

// The Philox words of elements [first, first + n). Groups of four words are made sixteen at a time, a lane
// each, so that the compiler vectorises the rounds.
inline void philox_fill(const Key& key, uint64_t first, int64_t n, uint32_t* __restrict out) {
  constexpr int lanes = 16;
  uint32_t words[4][lanes];
  const uint64_t end = first + static_cast<uint64_t>(n);
  for (uint64_t group = first >> 2; (group << 2) < end; group += lanes) {
#pragma omp simd
    for (int i = 0; i < lanes; ++i) philox4(key, group + i, words[0][i], words[1][i], words[2][i], words[3][i]);
    if ((group << 2) >= first && (group << 2) + 4 * lanes <= end) {
      uint32_t* o = out + ((group << 2) - first);
      for (int i = 0; i < lanes; ++i)
        for (int w = 0; w < 4; ++w) o[4 * i + w] = words[w][i];
    } else {
      for (int i = 0; i < lanes; ++i)
        for (int w = 0; w < 4; ++w) {
          uint64_t e = ((group + i) << 2) + w;
          if (e >= first && e < end) out[e - first] = words[w][i];
        }
    }
  }
}

// --- one block --------------------------------------------------------------------------------------------
template <int CODE>
inline void decode_block(const char* codes, Block b, int64_t n, float* __restrict out) {
  if constexpr (CODE == kInt4 || CODE == kUInt4) {
    const uint8_t* c = reinterpret_cast<const uint8_t*>(codes);
    for (int64_t i = 0; i < n / 2; ++i) {
      int low = c[i] & 15, high = c[i] >> 4;
      if (CODE == kInt4) low = (low ^ 8) - 8, high = (high ^ 8) - 8;
      out[2 * i] = decode<CODE>(low, b);
      out[2 * i + 1] = decode<CODE>(high, b);
    }
    if (n & 1) {
      int low = c[n / 2] & 15;
      out[n - 1] = decode<CODE>(CODE == kInt4 ? (low ^ 8) - 8 : low, b);
    }
  } else if constexpr (CODE != kInt8) {
    const uint8_t* c = reinterpret_cast<const uint8_t*>(codes);
    for (int64_t i = 0; i < n; ++i) out[i] = decode<CODE>(c[i], b);
  } else {
    const int8_t* c = reinterpret_cast<const int8_t*>(codes);
    for (int64_t i = 0; i < n; ++i) out[i] = decode<CODE>(c[i], b);
  }
}

template <int CODE, bool STOCHASTIC>
inline void encode_block(const float* __restrict x, const uint32_t* __restrict words, Block b, int64_t n, char* codes) {
  uint8_t* __restrict c = reinterpret_cast<uint8_t*>(codes);
  if constexpr (CODE == kInt4 || CODE == kUInt4) {
    for (int64_t i = 0; i < n / 2; ++i) {
      int low = encode<CODE, STOCHASTIC>(x[2 * i], b, STOCHASTIC ? words[2 * i] : 0);
      int high = encode<CODE, STOCHASTIC>(x[2 * i + 1], b, STOCHASTIC ? words[2 * i + 1] : 0);
      c[i] = static_cast<uint8_t>((low & 15) | (high << 4));
    }
    if (n & 1) c[n / 2] = static_cast<uint8_t>(encode<CODE, STOCHASTIC>(x[n - 1], b, STOCHASTIC ? words[n - 1] : 0) & 15);
  } else {
    for (int64_t i = 0; i < n; ++i) c[i] = static_cast<uint8_t>(encode<CODE, STOCHASTIC>(x[i], b, STOCHASTIC ? words[i] : 0));
  }
}

inline Block measure_block(int code, const float* x, int64_t n) {
  uint32_t absmax = 0;
  int32_t lo = 0, hi = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t a = magnitude_bits(x[i]);
    absmax = a > absmax ? a : absmax;
  }
  if (has_zero_point(code))
    for (int64_t i = 0; i < n; ++i) {
      int32_t o = ordered_bits(x[i]);
      lo = o < lo ? o : lo;
      hi = o > hi ? o : hi;
    }
  return block_of(code, absmax, lo, hi);
}

// words: n random words, or null for round-to-nearest.
inline Block encode_one_block(int code, const float* x, const uint32_t* words, int64_t n, char* codes) {
  Block b = measure_block(code, x, n);
  if (!(b.scale > 0.0f)) {  // all zero, or a nan or inf inside: every code is 0
    memset(codes, 0, static_cast<size_t>((n * code_bits(code) + 7) / 8));
    return b;
  }
#define GM_ENCODE(CODE)                                  \
  case CODE:                                             \
    if (words)                                           \
      encode_block<CODE, true>(x, words, b, n, codes);   \
    else                                                 \
      encode_block<CODE, false>(x, nullptr, b, n, codes); \
    break;
  switch (code) {
    GM_ENCODE(kInt8) GM_ENCODE(kUInt8) GM_ENCODE(kInt4) GM_ENCODE(kUInt4) GM_ENCODE(kMoment8) GM_ENCODE(kSquare8)
  }
#undef GM_ENCODE
  return b;
}

inline void decode_one_block(int code, const char* codes, Block b, int64_t n, float* out) {
  switch (code) {
    case kInt8: return decode_block<kInt8>(codes, b, n, out);
    case kUInt8: return decode_block<kUInt8>(codes, b, n, out);
    case kInt4: return decode_block<kInt4>(codes, b, n, out);
    case kUInt4: return decode_block<kUInt4>(codes, b, n, out);
    case kMoment8: return decode_block<kMoment8>(codes, b, n, out);
    case kSquare8: return decode_block<kSquare8>(codes, b, n, out);
  }
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
  else if (code == kBF16) for (int64_t i = 0; i < n; ++i) h[i] = float_to_bf16(in[i]);
  else if (code == kF16) for (int64_t i = 0; i < n; ++i) h[i] = float_to_f16(in[i]);
  else memcpy(out, in, static_cast<size_t>(n) * 4);
}

// Elements [col, col + n) of a row; for a blocked code col is a multiple of the block and the run ends at a
// block's or the row's end.
inline void decode_tile(const Matrix& m, int64_t row, int64_t col, int64_t n, float* out) {
  if (!is_blocked(m.code)) return decode_floats(m.code, tile_address(m, row, col), n, out);
  for (int64_t i = 0; i < n; i += m.block) {
    int64_t at = row * m.blocks_per_row() + (col + i) / m.block;
    Block b{m.scales[at], has_zero_point(m.code) ? m.zeros[at] : 0, 0.0f};
    decode_one_block(m.code, tile_address(m, row, col + i), b, n - i < m.block ? n - i : m.block, out + i);
  }
}

constexpr int64_t kWords = 1024;  // random words made at a time, kept in L1

inline void encode_block_at(const Matrix& m, int64_t row, int64_t col, int64_t n, const float* in, const uint32_t* words) {
  int64_t at = row * m.blocks_per_row() + col / m.block;
  Block b = encode_one_block(m.code, in, words, n, tile_address(m, row, col));
  m.scales[at] = b.scale;
  if (has_zero_point(m.code)) m.zeros[at] = static_cast<uint8_t>(b.zero);
}

// The same words for a whole block from one Philox word: see kDitherStep.
inline void dither_fill(const Key& key, uint64_t first, int64_t n, uint32_t* __restrict out) {
  uint32_t offset = philox_word(key, first);
  for (int64_t i = 0; i < n; ++i) out[i] = offset + static_cast<uint32_t>(i) * kDitherStep;
}

// Writes a tile. old_values non-null: a block none of whose values changed keeps its codes and its scale
// (rounding it again would move codes although nothing was learnt). key null: round to nearest; dither: with dither
// words instead of a Philox word per element.
inline void store_tile(const Matrix& m, int64_t row, int64_t col, int64_t n, const float* old_values, const float* in, const Key* key, bool dither) {
  uint32_t stack_words[kWords];
  const uint64_t first = static_cast<uint64_t>(row * m.cols + col);
  if (!is_blocked(m.code)) {
    for (int64_t i = 0; i < n; i += kWords) {
      int64_t part = n - i < kWords ? n - i : kWords;
      bool random = key && m.code == kBF16;
      if (random) philox_fill(*key, first + static_cast<uint64_t>(i), part, stack_words);
      encode_floats(m.code, in + i, random ? stack_words : nullptr, part, tile_address(m, row, col + i));
    }
    return;
  }
  uint32_t* words = m.block <= kWords ? stack_words : nullptr;
  if (key && !words) words = static_cast<uint32_t*>(malloc(static_cast<size_t>(m.block) * 4));
  for (int64_t i = 0; i < n; i += m.block) {
    int64_t part = n - i < m.block ? n - i : m.block;
    if (old_values && memcmp(old_values + i, in + i, static_cast<size_t>(part) * 4) == 0) continue;
    if (key) (dither ? dither_fill : philox_fill)(*key, first + static_cast<uint64_t>(i), part, words);
    encode_block_at(m, row, col + i, part, in + i, key ? words : nullptr);
  }
  if (words != stack_words) free(words);
}

inline void encode_tile(const Matrix& m, int64_t row, int64_t col, int64_t n, const float* in, const Key* key, bool dither = false) {
  store_tile(m, row, col, n, nullptr, in, key, dither);
}
inline void update_tile(const Matrix& m, int64_t row, int64_t col, int64_t n, const float* old_values, const float* new_values, const Key* key) {
  store_tile(m, row, col, n, old_values, new_values, key, false);
}

}  // namespace
}  // namespace gradmill
