// Quantise and dequantise, every blocked code, row-wise or transposed, nearest or stochastic; the random Hadamard transform;
// fake quantisation.
//
// Memory-bound: fp32 -> int8 moves 5 bytes per element (4 read, 1 written). A block is read into L1 once,
// measured there and encoded from there. `transpose` reads 16 columns at a time, a cache line of fp32 from each row,
// and turns them round in registers into row buffers, so each line of x is read once although the result runs the
// other way.
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

constexpr int64_t kTurn = 16;  // columns of x turned into rows together: one cache line of fp32

// out[r * pitch + c] = x[row + c, col + r] for c < n and r < w <= kTurn; out has kTurn rows.
void turn(const void* x, int code, int64_t stride, int64_t row, int64_t col, int64_t n, int64_t w, float* out, int64_t pitch) {
  const int64_t bytes = code_bits(code) / 8;
  const char* base = static_cast<const char*>(x) + (row * stride + col) * bytes;
  const bool direct = code == kF32 && w == kTurn;
  float decoded[W * kTurn] = {};
  for (int64_t c = 0; c < n; c += W) {
    const int64_t rows = n - c < W ? n - c : W;
    const float* from = decoded;
    if (direct && rows == W) from = reinterpret_cast<const float*>(base) + c * stride;
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

void quantize(const QuantizeArgs& a) {
  const Matrix& m = a.out;
  if (m.rows == 0 || m.cols == 0) return;
  if (!a.transpose) {
#pragma omp parallel if (m.rows * m.cols > kSerial)
    {
      float* buffer = static_cast<float*>(malloc(static_cast<size_t>(m.block) * 4));
      const int64_t per_row = m.blocks_per_row();
#pragma omp for schedule(static)
      for (int64_t i = 0; i < m.rows * per_row; ++i) {
        int64_t row = i / per_row, col = i % per_row * m.block;
        int64_t n = m.cols - col < m.block ? m.cols - col : m.block;
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

GM_HD vf flipped(vf x, const uint32_t* signs) { return signs ? (vf)((vu)x ^ (vu)load(signs)) : x; }

// Blocks of BLOCK elements, n in all, a multiple of W; `before` and `after`: sign bits or null.
template <int BLOCK>
void hadamard_held(const float* x, const uint32_t* before, const uint32_t* after, float scale, int64_t n, float* out) {
  constexpr int K = BLOCK > W ? BLOCK / W : 1;
  for (int64_t i = 0; i < n; i += K * W) {
    vf v[K];
    for (int k = 0; k < K; ++k) {
      v[k] = flipped(load(x + i + k * W), before ? before + i + k * W : nullptr);
      if constexpr (BLOCK >= 2) v[k] = butterfly<1>(v[k]);
      if constexpr (BLOCK >= 4) v[k] = butterfly<2>(v[k]);
      if constexpr (BLOCK >= 8 && W >= 8) v[k] = butterfly<4>(v[k]);
      if constexpr (BLOCK >= 16 && W >= 16) v[k] = butterfly<8>(v[k]);
    }
    butterflies(v);
    for (int k = 0; k < K; ++k) store(out + i + k * W, flipped(v[k] * broadcast(scale), after ? after + i + k * W : nullptr));
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

// n elements, a multiple of block; x may be out.
void hadamard_blocks(const float* x, const uint32_t* signs, bool inverse, int64_t block, int64_t n, float* out) {
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
      for (int64_t i = 0; i < n; i += block) {
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
    float edge[W] = {};
    uint32_t edge_signs[W] = {};
    const size_t bytes = static_cast<size_t>(n - whole) * 4;
    memcpy(edge, x + whole, bytes);
    if (signs) memcpy(edge_signs, signs + whole, bytes);
    hadamard_blocks(edge, edge_signs, inverse, block, W, edge);
    memcpy(out + whole, edge, bytes);
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
      if (a.transpose) turn(a.x, a.x_code, a.stride, col, row0, n, w, buffer, pitch);
      else if (a.x_code == kF32) x = reinterpret_cast<const float*>(source);
      else decode_floats(a.x_code, source, n, buffer);
      for (int64_t r = 0; r < w; ++r) {
        char* out = static_cast<char*>(a.out) + ((row0 + r) * a.cols + col) * code_bits(a.out_code) / 8;
        float* y = a.out_code == kF32 ? reinterpret_cast<float*>(out) : buffer + r * pitch;
        for (int64_t done = 0, size = a.block; done < n; size /= 2) {  // whole blocks, then the tail's
          const int64_t length = (n - done) / size * size;
          hadamard_blocks(x + r * pitch + done, signs ? signs + done : nullptr, a.inverse, size, length, y + done);
          done += length;
        }
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

const QuantKernels GM_TABLE(quant) = {quantize, dequantize, hadamard, fake_quantize, fake_quantize_backward};

}  // namespace gradmill
