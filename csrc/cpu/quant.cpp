// Quantise and dequantise, every blocked code, row-wise or transposed, nearest or stochastic; the random Hadamard transform;
// fake quantisation.
//
// Memory-bound: fp32 -> int8 moves 5 bytes per element (4 read, 1 written). A block is read into L1 once,
// measured there and encoded from there: for W values of int8 3 instructions to measure, 4 to round and 1.25 to pack and store (tile.h), of
// which the division, 5 cycles with AVX2, is the longest. Predicted a copy's speed. 4096 x 1024, one core of a Zen 4, its time on a busy machine,
// codes made in loops for gcc to vectorise -> in vectors: int8 AVX2 1.61 -> 0.82 ms, AVX-512 1.05 -> 0.83 (25 GB/s, a copy's); uint4 in 256s 2.93 ->
// 1.30 and 2.22 -> 1.27; uint2 in 64s 6.2 -> 3.3; e2m1 in 16s 6.9 -> 3.4; stochastic int8 4.95 -> 3.45 and 3.24 -> 2.56, the rest of which is Philox.
//
// `transpose` has to know a column's scale before its codes. To nearest x is read twice, in order: its columns' maxima, then 64 x 64
// elements at a time (quantize_both without the rows' codes): AVX2 4.4 -> 3.6 ms, AVX-512 4.3 -> 2.85, bf16 3.9 -> 2.2. Other codes and random
// words go by `turn`: 16 columns at a time, a cache line of fp32 from each row, turned round in registers into row buffers, so that each line of x
// is read once, but from as many pages as x has rows. Both at once: two walks instead of three, the second beside the first one's lines as far as the cache goes.
// By rows and by columns, 2 cores with AVX2: 2.96 -> 2.13 ms (one core 5.47 -> 4.32), AVX-512
// 2.55 -> 1.53; 42 MB moved either way, which a copy does in 0.83: what is saved are floats turned and row buffers.
// Blocks of 128: 1.14x. Tried: random words in this order too (slower than two calls), no prefetches (5.3 instead of 4.3).
#include <omp.h>

#include "../common/hadamard.h"
// FakeGroup<vf>: as a template argument __m256 loses its may_alias, which no value in a register needs.
#pragma GCC diagnostic ignored "-Wignored-attributes"
#include "simd.h"
#include "tile.h"

namespace gradmill {
namespace {

constexpr int64_t kSerial = 65536;  // elements below which a parallel region costs more than it saves

void load_row(const QuantizeArgs& a, int64_t row, int64_t col, int64_t n, float* out) {
  const char* base = static_cast<const char*>(a.x) + (row * a.stride + col) * code_bits(a.x_code) / 8;
  decode_floats(a.x_code, base, n, out);
}

// Codes that quantize_both makes.
bool is_turned(int code) { return code == kInt8 || code == kInt7 || code == kE4M3 || code == kE5M2; }

constexpr int64_t kTurn = 16;  // columns of x turned into rows together: one cache line of fp32

// out[r * pitch + c] = x[row + c, col + r] for c < n and r < w <= kTurn; out has kTurn rows.
void turn(const void* x, int code, int64_t stride, int64_t row, int64_t col, int64_t n, int64_t w, float* out, int64_t pitch) {
  const int64_t bytes = code_bits(code) / 8;
  const char* base = static_cast<const char*>(x) + (row * stride + col) * bytes;
  const bool direct = code == kF32 && w == kTurn, narrow = code == kBF16 && w == kTurn;
  float decoded[W * kTurn] = {};
  for (int64_t c = 0; c < n; c += W) {
    const int64_t rows = n - c < W ? n - c : W;
    const float* from = decoded;
    if (narrow && rows == W) {
      const uint16_t* h = reinterpret_cast<const uint16_t*>(base) + c * stride;
      for (int i = 0; i < W; ++i)
        for (int64_t r = 0; r < kTurn; r += W) store(decoded + i * kTurn + r, (vf)(widened(h + i * stride + r) << 16));
    } else if (direct && rows == W) from = reinterpret_cast<const float*>(base) + c * stride;
    else for (int64_t i = 0; i < rows; ++i) decode_floats(code, base + (c + i) * stride * bytes, w, decoded + i * kTurn);
    const int64_t step = from == decoded ? kTurn : stride;
    if (rows == W) {
      for (int64_t r = 0; r < kTurn; r += W) {
        vf square[W];
        for (int i = 0; i < W; ++i) square[i] = load(from + i * step + r);
        transpose(square);
        for (int i = 0; i < W; ++i) store(out + (r + i) * pitch + c, square[i]);
      }
    } else {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = 0; r < w; ++r) out[r * pitch + c + i] = from[i * step + r];
    }
  }
}

void quantize_both(const QuantizeBothArgs& a);

void quantize(const QuantizeArgs& a) {
  const Matrix& m = a.out;
  if (m.rows == 0 || m.cols == 0) return;
  if (a.transpose && is_turned(m.code) && !a.key && !a.given) {  // x twice, in order, is faster than once in lines pages apart
    const Matrix none{nullptr, nullptr, nullptr, m.code, m.cols, m.rows, m.block < m.cols && m.rows > kWords ? kWords : m.rows};
    return quantize_both({a.x, a.x_code, a.stride, none, m, nullptr, nullptr});
  }
  if (!a.transpose) {
    const int64_t run = m.block < kWords ? kWords / m.block * m.block : m.block, per_row = (m.cols + run - 1) / run;  // short blocks together
#pragma omp parallel if (m.rows * m.cols > kSerial)
    {
      float* buffer = static_cast<float*>(malloc(static_cast<size_t>(run) * 4));
#pragma omp for schedule(static)
      for (int64_t i = 0; i < m.rows * per_row; ++i) {
        const int64_t row = i / per_row, col = i % per_row * run;
        const int64_t n = m.cols - col < run ? m.cols - col : run;
        const float* x = buffer;
        if (a.x_code == kF32) x = static_cast<const float*>(a.x) + row * a.stride + col;  // no copy
        else load_row(a, row, col, n, buffer);
        encode_tile(m, row, col, n, x, a.key, false, a.given);
      }
      free(buffer);
    }
    return;
  }
  const int64_t pitch = m.cols + 16;  // of the row buffers: not a power of two, or all rows share a few cache sets
#pragma omp parallel if (m.rows * m.cols > kSerial)
  {
    float* buffer = static_cast<float*>(malloc(static_cast<size_t>(pitch) * 4 * kTurn));
#pragma omp for schedule(static)
    for (int64_t row0 = 0; row0 < m.rows; row0 += kTurn) {
      int64_t w = m.rows - row0 < kTurn ? m.rows - row0 : kTurn;
      turn(a.x, a.x_code, a.stride, 0, row0, m.cols, w, buffer, pitch);
      for (int64_t r = 0; r < w; ++r) encode_tile(m, row0 + r, 0, m.cols, buffer + r * pitch, a.key, false, a.given);
    }
    free(buffer);
  }
}

// --- both ways --------------------------------------------------------------------------------------------
// Blocks of the result and of its transpose cut x into squares (x itself, where a block is a whole row). A square's rows
// are encoded one by one from L1, its columns' maxima taken on the way; then 64 x 64 elements at a time are encoded
// with their columns' scales: four rows make one 32-bit lane of codes, and lanes, not floats, are turned.
constexpr int64_t kSide = 64;  // elements of a row of the turned result written together: a cache line

struct Square {
  int64_t row, rows, col, cols;
};

// The codes of n <= kSide rows and w <= kSide columns of x at (row, col), rounded to nearest.
template <int CODE>
void encode_turned(const QuantizeBothArgs& a, int64_t row, int64_t col, int64_t n, int64_t w, const float* __restrict scales) {
  alignas(64) static const float nothing[kSide] = {};
  alignas(64) float decoded[4][kSide] = {}, own[kSide] = {};
  memcpy(own, scales, static_cast<size_t>(w) * 4);
  alignas(64) lane codes[kSide / 4][kSide];
  const int64_t bytes = code_bits(a.x_code) / 8;
  // Rows of x and of the result lie pages apart, where the hardware does not guess them.
  for (int64_t c = 0; c < w; ++c) __builtin_prefetch(tile_address(a.turned, col + c, row), 1);
  for (int64_t i = 0; i < kSide; i += 4) {
    const float* x[4];
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k) {
      const char* from = static_cast<const char*>(a.x) + ((row + i + k) * a.stride + col) * bytes;
      if (i + k < n)
        for (int64_t next = kSide * bytes; next < 2 * kSide * bytes; next += 64) __builtin_prefetch(from + next);
      x[k] = decoded[k];
      if (i + k >= n) x[k] = nothing;
      else if (a.x_code == kF32 && w == kSide) x[k] = reinterpret_cast<const float*>(from);
      else decode_floats(a.x_code, from, w, decoded[k]);
    }
    for (int64_t c = 0; c < w; c += W) {
      const vf s = load(own + c);
      vu q[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) q[k] = encode_lanes<CODE, false>(load(x[k] + c), vu{}, s, 0);
      store(codes[i / 4] + c, (vf)(((q[0] & 255u) | (q[1] & 255u) << 8 | (q[2] & 255u) << 16 | q[3] << 24) & (vu)(s > 0.0f)));
    }
  }
  for (int64_t c = 0; c < w; c += W)
    for (int64_t l = 0; l < kSide / 4; l += W) {
      vf square[W];
      for (int i = 0; i < W; ++i) square[i] = load(codes[l + i] + c);
      transpose(square);
      for (int64_t i = 0; i < W && c + i < w; ++i) {
        char* to = tile_address(a.turned, col + c + i, row) + l * 4;
        if (n == kSide) store(to, square[i]);
        else if (l * 4 < n) memcpy(to, &square[i], static_cast<size_t>(n - l * 4 < 4 * W ? n - l * 4 : 4 * W));
      }
    }
}

void encode_by_rows(const QuantizeBothArgs& a, int64_t row, int64_t col, int64_t n, float* buffer, uint32_t* __restrict largest) {
  const char* from = static_cast<const char*>(a.x) + (row * a.stride + col) * code_bits(a.x_code) / 8;
  const float* x = buffer;
  if (a.x_code == kF32) x = reinterpret_cast<const float*>(from);
  else decode_floats(a.x_code, from, n, buffer);
  if (a.out.codes) encode_tile(a.out, row, col, n, x, nullptr);
  for (int64_t c = 0; c < n; ++c) {
    const uint32_t magnitude = magnitude_bits(x[c]);
    largest[c] = magnitude > largest[c] ? magnitude : largest[c];
  }
}

// Scales of the turned blocks of columns [from, to) of a square.
void measure_turned(const QuantizeBothArgs& a, const Square& s, int64_t from, int64_t to, const uint32_t* largest, float* scales) {
  for (int64_t c = from; c < to; ++c) {
    scales[c] = block_of(a.turned.code, largest[c], 0, 0).scale;
    a.turned.scales[(s.col + c) * a.turned.blocks_per_row() + s.row / a.turned.block] = scales[c];
  }
}

// Part number `at` of the turned codes of a square: kSide x kSide elements, from left to right.
void encode_part(const QuantizeBothArgs& a, const Square& s, int64_t at, const float* scales) {
  const int64_t across = (s.cols + kSide - 1) / kSide, row = at / across * kSide, c = at % across * kSide;
  const int64_t n = s.rows - row < kSide ? s.rows - row : kSide, w = s.cols - c < kSide ? s.cols - c : kSide;
  if (a.turned.code == kInt8) encode_turned<kInt8>(a, s.row + row, s.col + c, n, w, scales + c);
  else if (a.turned.code == kInt7) encode_turned<kInt7>(a, s.row + row, s.col + c, n, w, scales + c);
  else if (a.turned.code == kE4M3) encode_turned<kE4M3>(a, s.row + row, s.col + c, n, w, scales + c);
  else encode_turned<kE5M2>(a, s.row + row, s.col + c, n, w, scales + c);
}

int64_t parts_of(const Square& s) { return (s.rows + kSide - 1) / kSide * ((s.cols + kSide - 1) / kSide); }

void quantize_both(const QuantizeBothArgs& a) {
  const Matrix& m = a.out;
  if (m.rows == 0 || m.cols == 0) return;
  if (a.key) {  // random words cost more than reading x
    quantize({a.x, a.x_code, a.stride, a.out, false, a.key, false});
    return quantize({a.x, a.x_code, a.stride, a.turned, true, a.turned_key, false});
  }
  const int64_t across = m.blocks_per_row(), squares = across * a.turned.blocks_per_row(), width = m.block;
  uint32_t* const largest = static_cast<uint32_t*>(calloc(static_cast<size_t>(width), 4));  // of the one square
  float* const scales = static_cast<float*>(malloc(static_cast<size_t>(width) * 4));
#pragma omp parallel if (m.rows * m.cols > kSerial)
  {
    float *buffer = static_cast<float*>(malloc(static_cast<size_t>(width) * 4)), *own_scales = static_cast<float*>(malloc(static_cast<size_t>(width) * 4));
    uint32_t* own = static_cast<uint32_t*>(calloc(static_cast<size_t>(width), 4));
    if (squares == 1) {
      const Square all{0, m.rows, 0, m.cols};
#pragma omp for schedule(static)
      for (int64_t r = 0; r < m.rows; ++r) encode_by_rows(a, r, 0, m.cols, buffer, own);
#pragma omp critical(gradmill_quantize_both)
      for (int64_t c = 0; c < m.cols; ++c) largest[c] = own[c] > largest[c] ? own[c] : largest[c];
#pragma omp barrier
#pragma omp single
      measure_turned(a, all, 0, m.cols, largest, scales);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < parts_of(all); ++i) encode_part(a, all, i, scales);
    } else {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < squares; ++i) {
        const int64_t row = i / across * a.turned.block, col = i % across * m.block;
        const Square s{row, m.rows - row < a.turned.block ? m.rows - row : a.turned.block, col, m.cols - col < m.block ? m.cols - col : m.block};
        memset(own, 0, static_cast<size_t>(width) * 4);
        for (int64_t r = 0; r < s.rows; ++r) encode_by_rows(a, s.row + r, s.col, s.cols, buffer, own);
        measure_turned(a, s, 0, s.cols, own, own_scales);
        for (int64_t k = 0; k < parts_of(s); ++k) encode_part(a, s, k, own_scales);
      }
    }
    free(buffer), free(own_scales), free(own);
  }
  free(largest), free(scales);
}

// Many experts: each a thread's own (a region within a region has one thread); few: one after the other, all threads on it.
void quantize_grouped(const QuantizeGroupedArgs& a) {
#pragma omp parallel for schedule(dynamic) if (a.experts >= 4 * omp_get_max_threads())
  for (int64_t e = 0; e < a.experts; ++e) {
    const Key key = a.key ? expert_key(*a.key, e) : Key{0, 0, 0};
    const Span s = span_of(a.offs, a.tokens, e, a.out.block);
    const void* x = static_cast<const char*>(a.x) + s.begin * a.stride * (code_bits(a.x_code) / 8);
    const Matrix part = ragged_part(a.out, s, a.cols);
    if (part.cols == 0 && a.out.block == 0) memset(part.scales, 0, static_cast<size_t>(a.cols) * 4);
    quantize({x, a.x_code, a.stride, part, true, a.key ? &key : nullptr, a.given});
  }
}

void dequantize(const DequantizeArgs& a) {
  const Matrix& m = a.in;
  const int64_t per_row = m.blocks_per_row(), out_bytes = code_bits(a.out_code) / 8;
#pragma omp parallel if (m.rows * m.cols > kSerial)
  {
    float* buffer = static_cast<float*>(malloc(static_cast<size_t>(m.block) * 4));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m.rows * per_row; ++i) {
      int64_t row = i / per_row, col = i % per_row * m.block;
      int64_t n = m.cols - col < m.block ? m.cols - col : m.block;
      char* out = static_cast<char*>(a.out) + (row * m.cols + col) * out_bytes;
      float* x = a.out_code == kF32 ? reinterpret_cast<float*>(out) : buffer;
      decode_tile(m, row, col, n, x);
      if (a.out_code != kF32) encode_floats(a.out_code, x, nullptr, n, out);
    }
    free(buffer);
  }
}

// --- random Hadamard transform ----------------------------------------------------------------------------
// Memory-bound: 8 bytes per fp32 element (4 read, 4 written). Up to kHeld vectors of a row are held in registers. A
// butterfly of lanes of one vector is a shuffle, a sign flip and an addition, one of two vectors an addition or a
// subtraction each: 14 instructions per AVX2 vector for blocks of 16, 4 to 5 cycles, where memory takes some 10. Blocks
// longer than kHeld vectors go through L1 once more for every factor of 8. The signs are the same for every row: made
// once for a strip of columns, they are read from L1.
// Measured on 2 cores with AVX2, 4096 x 1024: 0.79 ms for any block from 2 to 1024, 43 GB/s, as torch's clone (0.77; its
// matmul with a 16 x 16 matrix: 1.47). Transposed 1.75 ms (torch's t().contiguous() alone: 4.8): reading a line from
// each row and writing a kilobyte to each of 16 rows is what costs; other strips, prefetching either side and turning
// without transforming changed nothing, stores past the cache saved a quarter, at the expense of who reads the result.
// bf16, half the bytes, is bound by instructions: butterflies in fp32 and 8 to round. One core 1.79 -> 1.38 ms with AVX-512 without fp32 copies in
// L1, 1.7 with AVX2 either way; torch's matmul, which has bf16 products but no random signs, takes 0.83.
constexpr int kHeld = 8;

template <int H>
GM_HD vf butterfly(vf x) {  // lanes i and i ^ H: the first gets a + b, the second a - b
#if GM_LEVEL >= 2
  constexpr vu lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vf other = __builtin_shufflevector(x, x, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H, 4 ^ H, 5 ^ H, 6 ^ H, 7 ^ H, 8 ^ H, 9 ^ H, 10 ^ H, 11 ^ H, 12 ^ H,
                                           13 ^ H, 14 ^ H, 15 ^ H);
#elif GM_LEVEL == 1
  constexpr vu lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const vf other = __builtin_shufflevector(x, x, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H, 4 ^ H, 5 ^ H, 6 ^ H, 7 ^ H);
#else
  constexpr vu lane = {0, 1, 2, 3};
  const vf other = __builtin_shufflevector(x, x, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H);
#endif
  return other + (vf)((vu)x ^ (lane & H) * (0x80000000u / H));
}

template <int K>
GM_HD void butterflies(vf (&v)[K]) {  // of vectors 1, 2, 4, ... apart
#pragma GCC unroll 3
  for (int h = 1; h < K; h *= 2)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
      if (!(k & h)) {
        const vf a = v[k], b = v[k + h];
        v[k] = a + b;
        v[k + h] = a - b;
      }
}

// bfloat16 rows go from memory to registers and back, not by way of fp32 copies in L1.
GM_HD vf load_floats(const float* p) { return load(p); }
GM_HD vf load_floats(const uint16_t* p) { return (vf)(widened(p) << 16); }
GM_HD void store_floats(float* p, vf x) { store(p, x); }
GM_HD void store_floats(uint16_t* p, vf x) { store_narrowed(p, bf16_bits(x)); }

GM_HD vf flipped(vf x, const uint32_t* signs) { return signs ? (vf)((vu)x ^ (vu)load(signs)) : x; }

// Blocks of BLOCK elements, n in all, a multiple of W; `before` and `after`: sign bits or null.
template <int BLOCK, class In, class Out>
void hadamard_held(const In* x, const uint32_t* before, const uint32_t* after, float scale, int64_t n, Out* out) {
  constexpr int K = BLOCK > W ? BLOCK / W : 1;
  for (int64_t i = 0; i < n; i += K * W) {
    vf v[K];
    for (int k = 0; k < K; ++k) {
      v[k] = flipped(load_floats(x + i + k * W), before ? before + i + k * W : nullptr);
      if constexpr (BLOCK >= 2) v[k] = butterfly<1>(v[k]);
      if constexpr (BLOCK >= 4) v[k] = butterfly<2>(v[k]);
      if constexpr (BLOCK >= 8 && W >= 8) v[k] = butterfly<4>(v[k]);
      if constexpr (BLOCK >= 16 && W >= 16) v[k] = butterfly<8>(v[k]);
    }
    butterflies(v);
    for (int k = 0; k < K; ++k) store_floats(out + i + k * W, flipped(v[k] * broadcast(scale), after ? after + i + k * W : nullptr));
  }
}

// Of n elements, those h, 2h, ... K/2 h apart.
template <int K>
void hadamard_apart(float* x, int64_t h, const uint32_t* after, float scale, int64_t n) {
  for (int64_t i = 0; i < n; i += K * h)
    for (int64_t j = i; j < i + h; j += W) {
      vf v[K];
      for (int k = 0; k < K; ++k) v[k] = load(x + j + k * h);
      butterflies(v);
      for (int k = 0; k < K; ++k) store(x + j + k * h, flipped(v[k] * broadcast(scale), after ? after + j + k * h : nullptr));
    }
}

// n elements, a multiple of block; x may be out. Only fp32 in blocks of more than kHeld vectors.
template <class In, class Out>
void hadamard_blocks(const In* x, const uint32_t* signs, bool inverse, int64_t block, int64_t n, Out* out) {
  const uint32_t *before = inverse ? nullptr : signs, *after = inverse ? signs : nullptr;
  const float scale = hadamard_scale(block);
  const int64_t whole = n / W * W;
#define GM_HELD(BLOCK) \
  case BLOCK: hadamard_held<BLOCK>(x, before, after, scale, whole, out); break;
  switch (block) {
    GM_HELD(1) GM_HELD(2) GM_HELD(4) GM_HELD(8) GM_HELD(16) GM_HELD(32)
#if GM_LEVEL >= 1
    GM_HELD(64)
#endif
#if GM_LEVEL >= 2
    GM_HELD(128)
#endif
    default:
      if constexpr (sizeof(In) + sizeof(Out) == 8) for (int64_t i = 0; i < n; i += block) {
        hadamard_held<kHeld * W>(x + i, before ? before + i : nullptr, nullptr, 1.0f, block, out + i);
        for (int64_t h = kHeld * W; h < block;) {
          const int64_t k = block / h < 8 ? block / h : 8;
          const bool last = h * k == block;
          (k == 8 ? hadamard_apart<8> : k == 4 ? hadamard_apart<4> : hadamard_apart<2>)(
              out + i, h, last && after ? after + i : nullptr, last ? scale : 1.0f, block);
          h *= k;
        }
      }
  }
#undef GM_HELD
  if (whole < n) {  // less than a vector of short blocks
    const size_t rest = static_cast<size_t>(n - whole);
    In edge[W] = {};
    Out result[W];
    uint32_t edge_signs[W] = {};
    memcpy(edge, x + whole, rest * sizeof(In));
    if (signs) memcpy(edge_signs, signs + whole, rest * 4);
    hadamard_blocks(edge, edge_signs, inverse, block, W, result);
    memcpy(out + whole, result, rest * sizeof(Out));
  }
}

// Whole blocks, then the tail's.
template <class In, class Out>
void hadamard_row(const In* x, const uint32_t* signs, bool inverse, int64_t block, int64_t n, Out* out) {
  for (int64_t done = 0; done < n; block /= 2) {
    const int64_t length = (n - done) / block * block;
    hadamard_blocks(x + done, signs ? signs + done : nullptr, inverse, block, length, out + done);
    done += length;
  }
}

void hadamard(const HadamardArgs& a) {
  // A strip: the columns whose signs are kept. Transposed, kTurn rows of it are kept as well, and a strip of x is
  // read to its end while its pages are at hand.
  const int64_t strip = !a.transpose ? 2048 : a.block > 256 ? a.block : 256, pitch = strip + 16;
  const int64_t height = a.transpose ? kTurn : 1, groups = (a.rows + height - 1) / height, strips = (a.cols + strip - 1) / strip;
#pragma omp parallel if (a.rows * a.cols > kSerial)
  {
    float* buffer = static_cast<float*>(malloc(static_cast<size_t>(pitch * height) * 4));
    uint32_t* signs = a.key ? static_cast<uint32_t*>(malloc(static_cast<size_t>(strip) * 4)) : nullptr;
    int64_t have = -1;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < strips * groups; ++item) {
      const int64_t row0 = item % groups * height, col = item / groups * strip;
      const int64_t n = a.cols - col < strip ? a.cols - col : strip, w = a.rows - row0 < height ? a.rows - row0 : height;
      if (signs && have != col) {
        philox_fill(*a.key, static_cast<uint64_t>(col), n, signs);
        for (int64_t i = 0; i < n; ++i) signs[i] &= 0x80000000u;
        have = col;
      }
      const float* x = buffer;
      const char* source = static_cast<const char*>(a.x) + (row0 * a.stride + col) * code_bits(a.x_code) / 8;
      char* const to = static_cast<char*>(a.out) + (row0 * a.cols + col) * code_bits(a.out_code) / 8;
      const bool narrow = a.out_code == kBF16 && a.block <= kHeld * W;
      if (narrow && !a.transpose && a.x_code == kBF16) {
        hadamard_row(reinterpret_cast<const uint16_t*>(source), signs, a.inverse, a.block, n, reinterpret_cast<uint16_t*>(to));
        continue;
      }
      if (a.transpose) turn(a.x, a.x_code, a.stride, col, row0, n, w, buffer, pitch);
      else if (a.x_code == kF32) x = reinterpret_cast<const float*>(source);
      else decode_floats(a.x_code, source, n, buffer);
      for (int64_t r = 0; r < w; ++r) {
        char* const out = to + r * a.cols * code_bits(a.out_code) / 8;
        if (narrow) {
          hadamard_row(x + r * pitch, signs, a.inverse, a.block, n, reinterpret_cast<uint16_t*>(out));
          continue;
        }
        float* y = a.out_code == kF32 ? reinterpret_cast<float*>(out) : buffer + r * pitch;
        hadamard_row(x + r * pitch, signs, a.inverse, a.block, n, y);
        if (a.out_code != kF32) encode_floats(a.out_code, y, nullptr, n, out);
      }
    }
    free(buffer);
    free(signs);
  }
}

// Fake quantisation: forward reads the weight once and writes its quantised values, backward reads weight and gradient once
// and writes the weight's gradient, sums on the side: 8 and 12 bytes an element in fp32, 20 and 30 instructions for W of
// them, one a division. Rows are walked in tiles that stay in L1; 32 lanes of partial sums are 8, 4 or 2 registers a sum.
// 4096x1024 fp32, groups of 128, one core of a Zen 4, a machine in use: forward 1.4 ms (AVX2 and AVX-512; a copy of the same
// bytes 0.9), backward 2.7 ms with AVX2, whose sixteen registers do not hold it all, and 2.0 with AVX-512 (1.4 at copy speed).
template <class F>
void each_group(const FakeArgs& a, F work) {
  const int64_t per_row = (a.cols + a.block - 1) / a.block;
#pragma omp parallel for schedule(static) if (a.rows * a.cols > kSerial)
  for (int64_t i = 0; i < a.rows * per_row; ++i) {
    const int64_t row = i / per_row, col = i % per_row * a.block;
    const FakeGroup<float> g = fake_group(a.steps[i], a.zeros[i], a.bits);
    work(i, row * a.cols + col, a.cols - col < a.block ? a.cols - col : a.block,
         FakeGroup<vf>{broadcast(g.step), broadcast(g.zero), broadcast(g.top)});
  }
}

// n elements from number `at` on, as fp32, with zeros up to a whole number of lanes; where nothing is to be done, in place.
const float* lanes_of(const void* p, int code, int64_t at, int64_t n, float* buffer) {
  const char* from = static_cast<const char*>(p) + at * (code_bits(code) / 8);
  if (code == kF32 && n % kFakeLanes == 0) return reinterpret_cast<const float*>(from);
  decode_floats(code, from, n, buffer);
  for (int64_t i = n; i % kFakeLanes; ++i) buffer[i] = 0.0f;
  return buffer;
}

struct Output {  // where a tile's fp32 results go: straight to their place, or to a buffer that finish() writes from
  float *values, *buffer;
  char* to;
  int code;
  int64_t n;
  Output(const FakeArgs& a, int64_t at, int64_t count, float* b)
      : buffer(b), to(static_cast<char*>(a.out) + at * (code_bits(a.out_code) / 8)), code(a.out_code), n(count) {
    values = code == kF32 && n % kFakeLanes == 0 ? reinterpret_cast<float*>(to) : buffer;
  }
  void finish() const {
    if (values == buffer) encode_floats(code, buffer, nullptr, n, to);
  }
};

void fake_quantize(const FakeArgs& a) {
  each_group(a, [&a](int64_t, int64_t first, int64_t length, const FakeGroup<vf>& g) {
    alignas(64) float in[kTile], result[kTile];
    for (int64_t done = 0; done < length; done += kTile) {
      const int64_t n = length - done < kTile ? length - done : kTile;
      const float* w = lanes_of(a.weight, a.weight_code, first + done, n, in);
      const Output out(a, first + done, n, result);
      for (int64_t i = 0; i < n; i += W) {
        const vf x = load(w + i);
        store(out.values + i, fake_decode(x, fake_encode(x, g), g));
      }
      out.finish();
    }
  });
}

void fake_quantize_backward(const FakeArgs& a) {
  each_group(a, [&a](int64_t number, int64_t first, int64_t length, const FakeGroup<vf>& g) {
    alignas(64) float in[kTile], grads[kTile], result[kTile];
    vf dstep[kFakeLanes / W] = {}, clipped[kFakeLanes / W] = {};
    for (int64_t done = 0; done < length; done += kTile) {
      const int64_t n = length - done < kTile ? length - done : kTile;
      const float* w = lanes_of(a.weight, a.weight_code, first + done, n, in);
      const float* grad = lanes_of(a.grad, a.grad_code, first + done, n, grads);
      const Output out(a, first + done, n, result);
      for (int64_t i = 0; i < n; i += kFakeLanes)
        for (int v = 0; v < kFakeLanes / W; ++v)
          store(out.values + i + v * W, fake_backward(load(grad + i + v * W), load(w + i + v * W), g, dstep[v], clipped[v]));
      out.finish();
    }
    for (int half = kFakeLanes / W / 2; half > 0; half /= 2)
      for (int v = 0; v < half; ++v) dstep[v] = add(dstep[v], dstep[v + half]), clipped[v] = add(clipped[v], clipped[v + half]);
    a.dsteps[number] = sum(dstep[0]);
    a.dzeros[number] = sum(clipped[0]) * -g.step[0];
  });
}

}  // namespace

const QuantKernels GM_TABLE(quant) = {quantize, quantize_both, quantize_grouped, dequantize, hadamard, fake_quantize, fake_quantize_backward};

}  // namespace gradmill
