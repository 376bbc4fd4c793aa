// Quantise and dequantise, every blocked code, row-wise or transposed, nearest or stochastic.
//
// Memory-bound: fp32 -> int8 moves 5 bytes per element (4 read, 1 written). A block is read into L1 once,
// measured there and encoded from there. `transpose` reads 16 columns at a time, a cache line of fp32 from each row,
// and turns them round in registers into row buffers, so each line of x is read once although the result runs the
// other way.
#include "simd.h"
#include "tile.h"

namespace gradmill {
namespace {

constexpr int64_t kSerial = 65536;  // elements below which a parallel region costs more than it saves

void load_row(const QuantizeArgs& a, int64_t row, int64_t col, int64_t n, float* out) {
  const char* base = static_cast<const char*>(a.x) + (row * a.stride + col) * code_bits(a.x_code) / 8;
  decode_floats(a.x_code, base, n, out);
}

float load_one(const QuantizeArgs& a, int64_t row, int64_t col) {
  int64_t i = row * a.stride + col;
  if (a.x_code == kF32) return static_cast<const float*>(a.x)[i];
  uint16_t h = static_cast<const uint16_t*>(a.x)[i];
  return a.x_code == kBF16 ? bf16_to_float(h) : f16_to_float(h);
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
  constexpr int64_t width = 16;  // columns of x taken together: one cache line of fp32
  const int64_t pitch = m.cols + 16;  // of the row buffers: not a power of two, or all rows share a few cache sets
#pragma omp parallel if (m.rows * m.cols > kSerial)
  {
    float* buffer = static_cast<float*>(malloc(static_cast<size_t>(pitch) * 4 * width));
#pragma omp for schedule(static)
    for (int64_t row0 = 0; row0 < m.rows; row0 += width) {
      int64_t w = m.rows - row0 < width ? m.rows - row0 : width;
      if (a.x_code == kF32 && w == width) {
        const float* x = static_cast<const float*>(a.x) + row0;
        int64_t c = 0;
        for (; c + W <= m.cols; c += W)
          for (int64_t r = 0; r < width; r += W) {
            vf square[W];
            for (int i = 0; i < W; ++i) square[i] = load(x + (c + i) * a.stride + r);
            transpose(square);
            for (int i = 0; i < W; ++i) store(buffer + (r + i) * pitch + c, square[i]);
          }
        for (; c < m.cols; ++c)
          for (int64_t r = 0; r < width; ++r) buffer[r * pitch + c] = x[c * a.stride + r];
      } else {
        for (int64_t c = 0; c < m.cols; ++c)
          for (int64_t r = 0; r < w; ++r) buffer[r * pitch + c] = load_one(a, c, row0 + r);
      }
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

}  // namespace

const QuantKernels GM_TABLE(quant) = {quantize, dequantize};

}  // namespace gradmill
