// Indices of 1 to 8 bits into codebooks of floats (kBook in common.h), W of them at a time.
//
// W indices are W * BITS / 8 whole bytes: one broadcast load, a byte shuffle that gives each 32-bit lane the two bytes its
// index lies in, a shift by lanes. The lookup is then a permutation of a register that holds the codebook (up to 8 entries with
// AVX2, 16 and, of two registers, 32 with AVX-512), several of them and blends (up to 64 entries with AVX2, 256 with AVX-512), or a gather
// from L1, which takes Zen 4 11 clocks for 8 lanes and 23 for 16.
#pragma once
#include "kernels.h"
#include "simd.h"
#include "tile.h"

namespace gradmill {
namespace {

// f(Bits<b>) for the number of bits known at run time.
template <int BITS>
struct Bits {
  static constexpr int value = BITS;
};
template <class F>
inline void with_bits(int bits, const F& f) {
  switch (bits) {
    case 1: return f(Bits<1>());
    case 2: return f(Bits<2>());
    case 3: return f(Bits<3>());
    case 4: return f(Bits<4>());
    case 5: return f(Bits<5>());
    case 6: return f(Bits<6>());
    case 7: return f(Bits<7>());
    case 8: return f(Bits<8>());
  }
}

inline const float* book_of(const Matrix& m, int64_t row) { return m.scales + (static_cast<int64_t>(m.zeros[row]) << (m.code - kBook)); }

// Index number i of a row's stream.
template <int BITS>
GM_HD uint32_t book_index(const uint8_t* row, int64_t i) {
  const int64_t at = i * BITS;
  uint32_t two = row[at / 8];
  if (8 % BITS != 0 && at % 8 + BITS > 8) two |= static_cast<uint32_t>(row[at / 8 + 1]) << 8;
  return two >> at % 8 & ((1u << BITS) - 1);
}

#if GM_LEVEL >= 1
// The registers that hold a codebook, W entries in each, or where it lies.
template <int BITS>
struct Lookup {
  static constexpr int held = W == 16 ? 8 : 6;  // up to so many bits fit registers
  static constexpr int parts = BITS > held || (1 << BITS) <= W ? 1 : (1 << BITS) / W;
  const float* table;
  vf part[parts];
  explicit GM_HD Lookup(const float* t) : table(t) {
    if constexpr ((1 << BITS) >= W) {
      for (int p = 0; p < parts; ++p) part[p] = load(t + p * W);
    } else {  // repeated: a permutation looks at the low bits of its indices alone
      float entries[W];
      for (int i = 0; i < W; ++i) entries[i] = t[i & ((1 << BITS) - 1)];
      part[0] = load(entries);
    }
  }
  // Index bits above BITS are ignored.
  GM_HD vf operator()(vi index) const {
    if constexpr (BITS <= held) return chosen<0, parts>(index);
#if GM_LEVEL == 1
    else return _mm256_i32gather_ps(table, _mm256_and_si256(index, _mm256_set1_epi32((1 << BITS) - 1)), 4);
#endif
  }

 private:
  // From COUNT registers, a power of two, halved by the index's highest bit that tells them apart.
  template <int FIRST, int COUNT>
  GM_HD vf chosen(vi index) const {
    constexpr int bit = COUNT == 2 ? 3 : COUNT == 4 ? W == 16 ? 5 : 4 : COUNT == 8 ? W == 16 ? 6 : 5 : 7;
#if GM_LEVEL >= 2
    if constexpr (COUNT == 1) return _mm512_permutexvar_ps(index, part[FIRST]);
    else if constexpr (COUNT == 2) return _mm512_permutex2var_ps(part[FIRST], index, part[FIRST + 1]);
    else return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(1 << bit)), chosen<FIRST, COUNT / 2>(index), chosen<FIRST + COUNT / 2, COUNT / 2>(index));
#else
    if constexpr (COUNT == 1) return _mm256_permutevar8x32_ps(part[FIRST], index);
    else return _mm256_blendv_ps(chosen<FIRST, COUNT / 2>(index), chosen<FIRST + COUNT / 2, COUNT / 2>(index), _mm256_castsi256_ps(_mm256_slli_epi32(index, 31 - bit)));
#endif
  }
};

constexpr int kBookLoad = W;  // bytes that read_indices reads, of which W * BITS / 8 are used
template <int BITS>
GM_HD vi read_indices(const uint8_t* p) {
#define GM_BYTES(l) static_cast<int>(0x80800000u | (l * BITS / 8 + 1) << 8 | l * BITS / 8)
#define GM_SHIFT(l) (l * BITS % 8)
#if GM_LEVEL >= 2
  const vi bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  // Byte 16, which lane 15 of 8-bit indices asks for, is read as byte 0 and ignored.
  const vi order = _mm512_setr_epi32(GM_BYTES(0), GM_BYTES(1), GM_BYTES(2), GM_BYTES(3), GM_BYTES(4), GM_BYTES(5), GM_BYTES(6), GM_BYTES(7), GM_BYTES(8),
                                     GM_BYTES(9), GM_BYTES(10), GM_BYTES(11), GM_BYTES(12), GM_BYTES(13), GM_BYTES(14), GM_BYTES(15));
  const vi shifts = _mm512_setr_epi32(GM_SHIFT(0), GM_SHIFT(1), GM_SHIFT(2), GM_SHIFT(3), GM_SHIFT(4), GM_SHIFT(5), GM_SHIFT(6), GM_SHIFT(7), GM_SHIFT(8),
                                      GM_SHIFT(9), GM_SHIFT(10), GM_SHIFT(11), GM_SHIFT(12), GM_SHIFT(13), GM_SHIFT(14), GM_SHIFT(15));
  return _mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, order), shifts);
#else
  int64_t eight;
  memcpy(&eight, p, 8);
  const vi order = _mm256_setr_epi32(GM_BYTES(0), GM_BYTES(1), GM_BYTES(2), GM_BYTES(3), GM_BYTES(4), GM_BYTES(5), GM_BYTES(6), GM_BYTES(7));
  const vi shifts = _mm256_setr_epi32(GM_SHIFT(0), GM_SHIFT(1), GM_SHIFT(2), GM_SHIFT(3), GM_SHIFT(4), GM_SHIFT(5), GM_SHIFT(6), GM_SHIFT(7));
  return _mm256_srlv_epi32(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight), order), shifts);
#endif
#undef GM_BYTES
#undef GM_SHIFT
}

// How many indices of a row from byte `at` on, at most n, can be read W at a time without reading beyond the matrix.
template <int BITS>
inline int64_t whole_vectors(const Matrix& m, int64_t row, int64_t at, int64_t n) {
  const int64_t left = (m.rows - row) * row_bytes(m) - at;
  const int64_t loads = left < kBookLoad ? 0 : (left - kBookLoad) / (W * BITS / 8) + 1;
  return (n / W < loads ? n / W : loads) * W;
}
#endif

// Elements [from, from + n) of a row; `from` is a multiple of 8.
inline void decode_book(const Matrix& m, int64_t row, int64_t from, int64_t n, float* __restrict out) {
  with_bits(m.code - kBook, [&](auto b) {
    constexpr int bits = decltype(b)::value;
    const float* const table = book_of(m, row);
    const uint8_t* const indices = static_cast<const uint8_t*>(m.codes) + row * row_bytes(m);
    int64_t i = 0;
#if GM_LEVEL >= 1
    const Lookup<bits> lookup(table);
    const int64_t whole = whole_vectors<bits>(m, row, from * bits / 8, n);
    for (; i < whole; i += W) store(out + i, lookup(read_indices<bits>(indices + (from + i) * bits / 8)));
#endif
    for (; i < n; ++i) out[i] = table[book_index<bits>(indices, from + i)];
  });
}

}  // namespace
}  // namespace gradmill
