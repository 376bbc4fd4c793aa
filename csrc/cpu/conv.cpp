// A convolution's patches: quantised straight from the image, row-wise or transposed, and their gradients added back to it.
//
// The image is padded here (a ninth of a 3x3 window's patches at most); no fp32 patch matrix is ever written. A patch element costs a read from L1 or L2, where
// the image's rows are for as long as they are needed, and what encoding it costs; written is what the format stores. Other formats are turned round as floats,
// W positions x W elements, and encoded row by row; transposed (a row for each element of the window, as dW wants them) rows are runs of the image's own.
//
// INT8 of whole rows keeps positions in lanes: a row's magnitude is the largest of its pixels' (each pixel's channels are looked at once, not once for
// every tap), W scales divide W positions, four columns make a lane of codes and lanes are turned, a quarter of the shuffles. The floor is the division, 10
// cycles for 16 lanes: 0.17 ns an element. W positions of a narrow image are several runs of memory, each a masked load (before: a load for each lane).
// dX comes in (window, channels) columns, whose rows of channels fold_kept adds to pixels without turning; in (channels, window) order every store is
// read again one float further on by the next tap's load, which no store buffer forwards. us, one thread's CPU time, least of 36, a Zen 4 in use by others:
//                           64 -> 64, 4x4, batch 64    32 -> 32, 8x8, batch 64    64 -> 64, 14x14, batch 32    (before; AVX-512)
//   by rows, elements          590 k     330 (512)       1180 k     470 (900)        3613 k     1220 (2370)     0.34-0.56 ns an element
//   transposed                           410 (1143)                 560 (1216)                  1560 (2439)     0.43-0.7
//   fold                                 110 (519)                  212 (1104)
//   products Y, dX, dW         231, 323, 249             314, 607, 253              1429, 2254, 1413
// dX is bound by its epilogue and by 4 bytes written and read again for each patch element: pieces of 5 MB stay in cache (window.py).
//
// Counted: batch 32, 128 -> 128 channels, 16x16, 3x3 has patches of 8192 x 1152, 37.7 MB in fp32, 9.4 MB in int8, of a 4.2 MB
// image; each product is 1.2 G multiplications: 5 ms at VNNI's 64 a cycle of one core, 15 ms for three. Measured 6.6 (Y), 10 (dX, whose sums are 128 long and
// 9.4 M) and 6.8 (dW); patches by rows and by columns 2.8 and 2.7, folding 4.3, dY and the weight 1: 34 of the 38 to 50 ms (a call per piece and torch's copy of
// Y to images are the rest). Forward and backward, ms, against torch's conv2d in the same process, one thread's CPU time, least
// of 6, interleaved, a Zen 4 in use by others; before these INT8 kernels in brackets. torch is not held to AVX2.
//                        VNNI: torch  int8            int7    AVX2: torch  int8             int7
//   32 -> 32, 8x8, b 64        3.0     4.9 (6.8)       5.9           2.5    5.3  (9.1)       4.2
//   64 -> 64, 4x4, b 64        3.0     4.4 (4.4)       4.5           2.4    3.7  (6.0)       3.6
//   64 -> 64, 14x14           14.3    12.2 (18.5)     12.4          14.1   18.3 (23.9)      17.0
//   128 -> 128, 16x16         69      50   (52)       54            67     80   (82)        66
//   256 -> 256, 16x16        290     133   (155)     141           279    250   (243)      184
// Few channels stay slower than fp32: every patch row has a scale of its own, so a pixel is divided and rounded nine times by rows and nine times by
// columns for 2 x 32 products each time.
//
// one_bit_fqt has kernels of its own, whose columns are (window, channels): an image is packed once, a bit for each element, pixel by pixel, and a patch is its
// pixels' bytes copied. Counted for 256 -> 256 channels, 8x8, batch 128, forward and backward: 14.5 G products of signs (1.2 G of them, dX's and dW's quarters, with 4
// bits), read of fp32 images 8.4 MB each: X, W, dY five times (ranges, dX's and dW's planes, twice for the scales); written Y, the forward product once more
// and dX; patches 2.4 MB of bits instead of 75.5 MB of floats, made by rows (copies), then turned round as bits. Floor: products at the table's 445 G a second (binary.cpp)
// 30 ms, 60 MB at 10 GB/s 6 ms. Measured 52 ms (AVX2; the same process with nothing else running would show less): products 34, folding 3.2, planes 3.0, ranges 2.8, the image 2.2,
// turning bits round 1.1, copying patches 0.7, sampling 0.1, torch's sums 4. Before (patches of floats made, packed by rows and by columns, dY turned round and read
// six times by torch, dX's patches folded by scalar adds) 104 ms.
// Against torch fp32, batch 32, one thread's CPU time, least of 9, interleaved, the machine full of other work:
//                      AVX2: torch  one_bit_fqt      AVX-512: torch  one_bit_fqt
//   64 channels, 32x32      79 ms   32 ms (2.5x)             76 ms   32 ms (2.4x)
//   128, 16x16              75      19    (4.0x)             70      22    (3.2x)
//   256, 8x8                77      15    (5.1x)             64      15    (4.3x)
//   512, 4x4               124      23    (5.3x)             81      21    (3.9x)
#include "signs.h"
#include "simd.h"
#include "tile.h"

namespace gradmill {
namespace {

constexpr int64_t kSerial = 65536;  // elements below which a parallel region costs more than it saves

// Where element k of a patch lies, from the patch's first.
int64_t* offsets(const Window& v) {
  int64_t* out = static_cast<int64_t*>(malloc(static_cast<size_t>(v.columns()) * 8));
  int64_t k = 0;
  for (int64_t c = 0; c < v.channels; ++c)
    for (int64_t i = 0; i < v.kernel[0]; ++i)
      for (int64_t j = 0; j < v.kernel[1]; ++j) out[k++] = (c * v.height + i * v.dilation[0]) * v.width + j * v.dilation[1];
  return out;
}

int64_t first_of(const Window& v, int64_t token) {  // where a patch begins
  const int64_t ox = token % v.out[1], oy = token / v.out[1] % v.out[0], n = token / (v.out[0] * v.out[1]);
  return n * v.channels * v.height * v.width + oy * v.stride[0] * v.width + ox * v.stride[1];
}

// W positions from `token` on, those past `end` like the last, and the runs of memory that they make: lane l of one lies at base + l. More than
// kRuns of them are read lane by lane.
constexpr int kRuns = GM_LEVEL >= 2 ? 4 : GM_LEVEL == 1 ? 2 : 1;
struct Strip {
  int64_t first[W], base[kRuns];
  uint32_t lanes[kRuns];  // a bit each
  int runs;
};
void find_strip(const Window& v, int64_t token, int64_t end, Strip& s) {
  int64_t ox = token % v.out[1], oy = token / v.out[1] % v.out[0];
  for (int l = 0; l < W; ++l) {
    if (l > 0 && token + l < end) {  // first_of without its divisions
      s.first[l] = s.first[l - 1] + v.stride[1];
      if (++ox == v.out[1]) {
        ox = 0;
        if (++oy == v.out[0]) oy = 0;
        s.first[l] = first_of(v, token + l);
      }
    } else {
      s.first[l] = l > 0 ? s.first[l - 1] : first_of(v, token);
    }
  }
  s.runs = 0;
  for (int l = 0; l < W; ++l) {
    if (l == 0 || s.first[l] != s.first[l - 1] + 1) {
      if (++s.runs > kRuns) return;
      s.base[s.runs - 1] = s.first[l] - l, s.lanes[s.runs - 1] = 0;
    }
    s.lanes[s.runs - 1] |= 1u << l;
  }
}

// Masked lanes touch no memory.
template <int RUNS>
GM_HD vf load_strip(const float* from, const Strip& s) {
  if constexpr (RUNS == 1) return load(from + s.base[0]);
#if GM_LEVEL >= 2
  else if constexpr (RUNS > 0) {
    vf x = _mm512_maskz_loadu_ps(static_cast<__mmask16>(s.lanes[0]), from + s.base[0]);
#pragma GCC unroll 4
    for (int r = 1; r < RUNS; ++r) x = _mm512_mask_loadu_ps(x, static_cast<__mmask16>(s.lanes[r]), from + s.base[r]);
    return x;
  }
#elif GM_LEVEL == 1
  else if constexpr (RUNS == 2) {
    const vu bit = vu{1, 2, 4, 8, 16, 32, 64, 128};
    const __m256i a = (__m256i)((bit & s.lanes[0]) != 0), b = (__m256i)((bit & s.lanes[1]) != 0);
    return _mm256_or_ps(_mm256_maskload_ps(from + s.base[0], a), _mm256_maskload_ps(from + s.base[1], b));
  }
#endif
  else {
    alignas(64) float lanes[W];
    for (int l = 0; l < W; ++l) lanes[l] = from[s.first[l]];
    return load(lanes);
  }
}
template <int RUNS>
GM_HD void store_strip(float* to, const Strip& s, vf x) {
  if constexpr (RUNS == 1) store(to + s.base[0], x);
#if GM_LEVEL >= 2
  else if constexpr (RUNS > 0) {
#pragma GCC unroll 4
    for (int r = 0; r < RUNS; ++r) _mm512_mask_storeu_ps(to + s.base[r], static_cast<__mmask16>(s.lanes[r]), x);
  }
#elif GM_LEVEL == 1
  else if (RUNS == 2 && s.lanes[0] == 15) {
    _mm_storeu_ps(to + s.base[0], _mm256_castps256_ps128(x));
    _mm_storeu_ps(to + s.base[1] + 4, _mm256_extractf128_ps(x, 1));
  }
#endif
  else {
    alignas(64) float lanes[W];
    store(lanes, x);
    for (int l = 0; l < W; ++l) to[s.first[l]] = lanes[l];
  }
}

template <int N>
struct Number {
  static constexpr int value = N;
};
template <class F>
GM_HD void with_runs(int runs, const F& f) {
  switch (runs) {
    case 1: return f(Number<1>());
#if GM_LEVEL >= 1
    case 2: return f(Number<2>());
#endif
#if GM_LEVEL >= 2
    case 3: return f(Number<3>());
    case 4: return f(Number<4>());
#endif
    default: return f(Number<0>());
  }
}

// A row of patches to its format.
inline void encode_row(const Matrix& m, int64_t row, float* x) {
  if (m.code == kSign) m.scales[row] = pack_sign_row(x, m.cols, false, reinterpret_cast<uint8_t*>(tile_address(m, row, 0)));
  else encode_tile(m, row, 0, m.cols, x, nullptr);
}

// The image with its zeros around it, or null where there are none. v is over the padded one.
float* padded(const Window& v, const int64_t (&padding)[2], int64_t images, const float* x) {
  if (padding[0] == 0 && padding[1] == 0) return nullptr;
  const int64_t height = v.height - 2 * padding[0], width = v.width - 2 * padding[1];
  float* const out = static_cast<float*>(malloc(static_cast<size_t>(images * v.channels * v.height * v.width) * 4));
#pragma omp parallel for schedule(static) if (images * v.channels * v.height * v.width > kSerial)
  for (int64_t plane = 0; plane < images * v.channels; ++plane) {
    float* to = out + plane * v.height * v.width;
    const float* from = x + plane * height * width;
    for (int64_t y = 0; y < v.height; ++y, to += v.width) {
      const bool inside = y >= padding[0] && y < v.height - padding[0];
      for (int64_t i = 0; i < (inside ? padding[1] : v.width); ++i) to[i] = 0.0f;
      if (!inside) continue;
      for (int64_t i = 0; i < width; ++i) to[padding[1] + i] = from[i];
      for (int64_t i = padding[1] + width; i < v.width; ++i) to[i] = 0.0f;
      from += width;
    }
  }
  return out;
}

// --- to int8 ----------------------------------------------------------------------------------------------
// What encode does to W floats, in the low byte of each lane: 1.5 * 2^23 more than a rounded float has its integer there.
GM_HD vu low_bytes(vf x, vf scale, float top) { return float_bits(clampf(x / scale, broadcast(-top), broadcast(top)) + 12582912.0f) & 255u; }

// W scales, as block_of has them: 0 where all is 0, nan where something is not finite.
GM_HD vf scales_of(vu largest, float top) { return bits_float(largest >= 0x7f800000u ? (vu{} + 0x7fc00000u) : float_bits(bits_float(largest) / broadcast(top))); }
GM_HD vu larger(vu a, vu b) { return a > b ? a : b; }

struct Int8Patches {
  const Window& v;
  const Matrix& m;
  const float* x;
  const int64_t* offset;
  float top;

  // Rows [token, token + W): four columns make a lane of codes, and lanes, not floats, are turned round. A patch's magnitude is the largest of its
  // pixels', each of which all channels were looked at for once.
  template <int RUNS>
  void rows(const Strip& s, int64_t token, const uint32_t* most) const {
    const int64_t live = m.rows - token < W ? m.rows - token : W, taps = v.kernel[0] * v.kernel[1], step = 4 * W;
    vu largest = {};
    alignas(64) uint32_t measured[W];
    const int64_t plane = v.height * v.width, positions = v.out[0] * v.out[1];
    for (int l = 0; l < W; ++l) {
      const int64_t n = (token + l < m.rows ? token + l : m.rows - 1) / positions;
      const uint32_t* at = most + s.first[l] - n * (v.channels - 1) * plane;
      measured[l] = 0;
      for (int64_t t = 0; t < taps; ++t) measured[l] = at[offset[t]] > measured[l] ? at[offset[t]] : measured[l];
    }
    memcpy(&largest, measured, sizeof largest);
    const vf scale = scales_of(largest, top);
    const vu keep = (vu)(scale > zero());
    const vf divisor = bits_float((float_bits(scale) & keep) | (float_bits(broadcast(1.0f)) & ~keep));
    alignas(64) float scales[W];
    store(scales, scale);
    memcpy(m.scales + token, scales, static_cast<size_t>(live) * 4);
    char *const out = tile_address(m, token, 0), *const end = out + live * m.cols;
    // The last columns first: what their stores write too much falls on rows that come later, and on first columns, which are written after.
    for (int64_t k = (m.cols - 1) / step * step; k >= 0; k -= step) {
      vf square[W];
      for (int i = 0; i < W; ++i) {
        vu codes = {};
        for (int j = 0; j < 4; ++j) {
          const int64_t column = k + 4 * i + j;
          if (column < m.cols) codes |= low_bytes(load_strip<RUNS>(x + offset[column], s), divisor, top) << (8 * j);
        }
        square[i] = bits_float(codes & keep);
      }
      transpose(square);
      for (int64_t r = 0; r < live; ++r) {
        char* const to = out + r * m.cols + k;
        if (end - to >= step) store(to, square[r]);
        else memcpy(to, &square[r], static_cast<size_t>(m.cols - k < step ? m.cols - k : step));
      }
    }
  }

  // A row of the transpose: element k of every patch, whose strips are given.
  void column(const Strip* strips, int64_t k) const {
    const float* const from = x + offset[k];
    vu most = {};
    for (int64_t token = 0; token < m.cols; token += W) {
      const Strip& s = strips[token / W];  // what lies past the end is the last once more
      with_runs(s.runs, [&](auto runs) { most = larger(most, float_bits(load_strip<decltype(runs)::value>(from, s)) & 0x7fffffffu); });
    }
    const Block b = block_of(m.code, largest(most), 0, 0);
    m.scales[k] = b.scale;
    uint8_t* const out = reinterpret_cast<uint8_t*>(tile_address(m, k, 0));
    if (!(b.scale > 0.0f)) {
      memset(out, 0, static_cast<size_t>(m.cols));
      return;
    }
    for (int64_t token = 0; token < m.cols; token += W) {
      const Strip& s = strips[token / W];
      with_runs(s.runs, [&](auto runs) {
        const vu codes = low_bytes(load_strip<decltype(runs)::value>(from, s), broadcast(b.scale), top);
        if (token + W <= m.cols) {
          store_narrowed(out + token, codes);
        } else {
          uint8_t last[W];
          store_narrowed(last, codes);
          memcpy(out + token, last, static_cast<size_t>(m.cols - token));
        }
      });
    }
  }
};

void int8_patches(const Window& v, const Matrix& m, const float* x, const int64_t* offset, bool transpose) {
  const Int8Patches p{v, m, x, offset, code_top(m.code)};
  if (transpose) {
    const int64_t count = (m.cols + W - 1) / W;
    Strip* const strips = static_cast<Strip*>(malloc(static_cast<size_t>(count) * sizeof(Strip)));
#pragma omp parallel if (m.rows * m.cols > kSerial)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i) find_strip(v, i * W, m.cols, strips[i]);
#pragma omp for schedule(static)
      for (int64_t k = 0; k < m.rows; ++k) p.column(strips, k);
    }
    free(strips);
    return;
  }
  const int64_t plane = v.height * v.width, images = m.rows / (v.out[0] * v.out[1]);
  uint32_t* const most = static_cast<uint32_t*>(malloc(static_cast<size_t>(images * plane) * 4));
#pragma omp parallel if (m.rows * m.cols > kSerial)
  {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < images; ++n) {
      uint32_t* __restrict to = most + n * plane;
      const float* __restrict from = x + n * v.channels * plane;
      for (int64_t i = 0; i < plane; ++i) to[i] = magnitude_bits(from[i]);
      for (int64_t c = 1; c < v.channels; ++c) {
        from += plane;
        for (int64_t i = 0; i < plane; ++i) {
          const uint32_t magnitude = magnitude_bits(from[i]);
          to[i] = magnitude > to[i] ? magnitude : to[i];
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t token = 0; token < m.rows; token += W) {
      Strip s;
      find_strip(v, token, m.rows, s);
      with_runs(s.runs, [&](auto runs) { p.rows<decltype(runs)::value>(s, token, most); });
    }
  }
  free(most);
}

void quantize_patches(const PatchArgs& a) {
  const Window& v = a.window;
  const Matrix& m = a.out;
  if (m.rows == 0 || m.cols == 0) return;
  float* const own = padded(v, a.padding, (a.transpose ? m.cols : m.rows) / (v.out[0] * v.out[1]), a.image);
  const float* x = own ? own : a.image;
  int64_t* offset = offsets(v);
  const bool int8 = (m.code == kInt8 || m.code == kInt7) && m.block == m.cols;
  if (int8) int8_patches(v, m, x, offset, a.transpose);
  const int64_t pitch = m.cols + 16;  // not a power of two, or all rows share a few cache sets
#pragma omp parallel if (!int8 && m.rows * m.cols > kSerial)
  if (!int8) {
    float* buffer = static_cast<float*>(malloc(static_cast<size_t>(pitch) * 4 * (a.transpose ? 1 : W)));
    if (a.transpose) {
#pragma omp for schedule(static)
      for (int64_t k = 0; k < m.rows; ++k) {
        float* to = buffer;
        for (int64_t token = 0; token < m.cols; token += v.out[1], to += v.out[1]) {
          const float* from = x + first_of(v, token) + offset[k];
          if (v.stride[1] == 1) memcpy(to, from, static_cast<size_t>(v.out[1]) * 4);
          else for (int64_t i = 0; i < v.out[1]; ++i) to[i] = from[i * v.stride[1]];
        }
        encode_row(m, k, buffer);
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t token = 0; token < m.rows; token += W) {
        Strip s;
        find_strip(v, token, m.rows, s);
        const int64_t rows = m.rows - token < W ? m.rows - token : W, whole = m.cols / W * W;
        with_runs(s.runs, [&](auto runs) {
          for (int64_t k = 0; k < whole; k += W) {
            vf square[W];
            for (int i = 0; i < W; ++i) square[i] = load_strip<decltype(runs)::value>(x + offset[k + i], s);
            transpose(square);
            for (int i = 0; i < W; ++i) store(buffer + i * pitch + k, square[i]);
          }
        });
        for (int64_t k = whole; k < m.cols; ++k)
          for (int64_t l = 0; l < rows; ++l) buffer[l * pitch + k] = x[s.first[l] + offset[k]];
        for (int64_t l = 0; l < rows; ++l) encode_row(m, token + l, buffer + l * pitch);
      }
    }
    free(buffer);
  }
  free(offset), free(own);
}

// Every pixel's sum runs over the window's positions in order, as the reference's does: positions of the output backwards, elements
// of a patch forwards. An item is some channels of an image, whose pixels, padding included, stay in cache until they are written without it.
void fold_patches(const FoldArgs& a) {
  const Window& v = a.window;
  const int64_t positions = v.out[0] * v.out[1], taps = v.kernel[0] * v.kernel[1], columns = v.columns(), plane = v.height * v.width;
  const int64_t height = v.height - 2 * a.padding[0], width = v.width - 2 * a.padding[1];
  if (a.images == 0 || v.channels == 0) return;
  int64_t* offset = offsets(v);
  const int64_t together = 16, blocks = (v.channels + together - 1) / together;
#pragma omp parallel if (a.images * positions * columns > kSerial)
  {
    float* const sums = static_cast<float*>(malloc(static_cast<size_t>(together * plane) * 4));
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.images * blocks; ++item) {
      const int64_t n = item / blocks, c = item % blocks * together, begin = n * positions, live = v.channels - c < together ? v.channels - c : together;
      const int64_t from = c * taps, to = from + live * taps, whole = from + (to - from) / W * W;
      float* const image = sums - c * plane - n * v.channels * plane;  // where offset and first_of count from
      memset(sums, 0, static_cast<size_t>(live * plane) * 4);
      for (int64_t done = (positions + W - 1) / W * W - W; done >= 0; done -= W) {
        Strip s;
        find_strip(v, begin + done, begin + positions, s);
        const int64_t rows = positions - done < W ? positions - done : W;
        const float* d = a.d + (begin + done) * columns;
        int64_t k = from;
        if (rows == W)
          with_runs(s.runs, [&](auto runs) {
            for (; k < whole; k += W) {
              vf square[W];
              for (int i = 0; i < W; ++i) square[i] = load(d + i * columns + k);
              transpose(square);
              for (int i = 0; i < W; ++i) {
                float* pixel = image + offset[k + i];
                store_strip<decltype(runs)::value>(pixel, s, add(load_strip<decltype(runs)::value>(pixel, s), square[i]));
              }
            }
          });
        for (; k < to; ++k)
          for (int64_t l = 0; l < rows; ++l) image[s.first[l] + offset[k]] += d[l * columns + k];
      }
      for (int64_t row = 0; row < live * height; ++row)
        memcpy(a.image + ((n * v.channels + c) * height + row) * width, sums + (row / height * v.height + row % height + a.padding[0]) * v.width + a.padding[1],
               static_cast<size_t>(width) * 4);
    }
    free(sums);
  }
  free(offset);
}

// --- an image's signs -------------------------------------------------------------------------------------
// Bits of up to 32 channels of one pixel, those of the next pixels in the next words.
struct Words {
  uint32_t *signs, *outside;
};

// Up to 8 pixels of `channels` (at most 32) channels, `pitch` floats apart; whether any is not finite.
bool pack_channels(const float* x, int64_t pitch, int64_t pixels, int64_t channels, Words out) {
#if GM_LEVEL >= 1
  const __m256 size = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX)), one = _mm256_set1_ps(1.0f), largest = _mm256_set1_ps(kLargest);
  __m256 bad = _mm256_setzero_ps();
  __m256i signs = _mm256_setzero_si256(), outside = signs;
  float few[8] = {};
  for (int64_t c = 0; c < channels; ++c, x += pitch) {
    if (pixels < 8) memcpy(few, x, static_cast<size_t>(pixels) * 4);
    const __m256 v = _mm256_loadu_ps(pixels < 8 ? few : x), m = _mm256_and_ps(v, size);
    const __m256i bit = _mm256_set1_epi32(static_cast<int32_t>(1u << c));
    signs = _mm256_or_si256(signs, _mm256_and_si256(bit, _mm256_castps_si256(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ))));
    outside = _mm256_or_si256(outside, _mm256_and_si256(bit, _mm256_castps_si256(_mm256_cmp_ps(m, one, _CMP_GT_OQ))));
    bad = _mm256_or_ps(bad, _mm256_cmp_ps(m, largest, _CMP_NLE_UQ));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.signs), signs);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.outside), outside);
  return _mm256_movemask_ps(bad) != 0;
#else
  int bad = 0;
  for (int i = 0; i < 8; ++i) out.signs[i] = out.outside[i] = 0;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < pixels; ++i) {
      const float v = x[c * pitch + i], m = fabsf(v);
      out.signs[i] |= static_cast<uint32_t>(v < 0.0f) << c;
      out.outside[i] |= static_cast<uint32_t>(m > 1.0f) << c;
      bad |= !(m <= kLargest);
    }
  return bad != 0;
#endif
}

void pack_image(PackImageArgs& p) {
  const int64_t bytes = bytes_of(p.channels), size = code_bits(p.code) / 8, image = p.channels * p.pixels;
  const bool last = p.last || p.pixels == 1;
  int bad = 0;
#pragma omp parallel if (p.images * image > kSerial) reduction(| : bad)
  {
    const int64_t floats = p.code == kF32 ? 0 : last ? p.channels : image;
    float* buffer = static_cast<float*>(malloc(static_cast<size_t>(floats) * 4 + 4));
    if (last) {
      const int64_t whole = p.channels / 32 * 32;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.images * p.pixels; ++i) {
        const char* at = static_cast<const char*>(p.x) + i * p.channels * size;
        if (floats) decode_floats(p.code, at, p.channels, buffer);
        const float* x = floats ? buffer : reinterpret_cast<const float*>(at);
        uint8_t *signs = p.signs + i * bytes, *outside = p.outside + i * bytes;
        float rest[32] = {};
        memcpy(rest, x + whole, static_cast<size_t>(p.channels - whole) * 4);
        for (int64_t c = 0; c < p.channels; c += 8) {
          const float* v = c < whole ? x + c : rest + (c - whole);
          float above[8];
          for (int k = 0; k < 8; ++k) above[k] = 1.0f - fabsf(v[k]), bad |= !(fabsf(v[k]) <= kLargest);
          signs[c / 8] = negative_bits(v), outside[c / 8] = negative_bits(above);
        }
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < p.images; ++n) {
        const char* at = static_cast<const char*>(p.x) + n * image * size;
        if (floats) decode_floats(p.code, at, image, buffer);
        const float* x = floats ? buffer : reinterpret_cast<const float*>(at);
        for (int64_t c = 0; c < p.channels; c += 32) {
          const int64_t channels = p.channels - c < 32 ? p.channels - c : 32;
          const size_t count = static_cast<size_t>(bytes_of(channels));
          for (int64_t done = 0; done < p.pixels; done += 8) {
            const int64_t live = p.pixels < 8 ? p.pixels : 8, i = done + live > p.pixels ? p.pixels - live : done;  // the last ones may be made twice
            uint32_t signs[8], outside[8];
            bad |= pack_channels(x + c * p.pixels + i, p.pixels, live, channels, {signs, outside});
            uint8_t *to = p.signs + (n * p.pixels + i) * bytes + c / 8, *far = p.outside + (n * p.pixels + i) * bytes + c / 8;
            if (count == 4)
              for (int64_t k = 0; k < live; ++k) memcpy(to + k * bytes, signs + k, 4), memcpy(far + k * bytes, outside + k, 4);
            else
              for (int64_t k = 0; k < live; ++k) memcpy(to + k * bytes, signs + k, count), memcpy(far + k * bytes, outside + k, count);
          }
        }
      }
    }
    free(buffer);
  }
  p.bad = bad != 0;
}

// `count` bits to out, from its bit `at` on, of which it has none set yet.
inline void append_bits(uint8_t* out, int64_t at, const uint8_t* from, int64_t count) {
  out += at / 8;
  const int shift = static_cast<int>(at % 8);
  for (int64_t i = 0; i < bytes_of(count); ++i) {
    const int byte = count - 8 * i < 8 ? from[i] & ((1 << (count - 8 * i)) - 1) : from[i];
    out[i] = static_cast<uint8_t>(out[i] | byte << shift);
    if (shift && 8 * i + 8 - shift < count) out[i + 1] = static_cast<uint8_t>(byte >> (8 - shift));
  }
}

void patch_bits(const PatchBitsArgs& p) {
  const Window& v = p.window;
  const int64_t pixel = bytes_of(v.channels), bytes = bytes_of(v.columns()), tokens = p.images * v.out[0] * v.out[1];
  const bool whole = v.channels % 8 == 0;
#pragma omp parallel for schedule(static) if (tokens * v.columns() > 1 << 20)
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t ox = t % v.out[1], oy = t / v.out[1] % v.out[0], n = t / (v.out[0] * v.out[1]);
    const int64_t left = ox * v.stride[1] - p.padding[1];
    uint8_t* const out = p.out + t * bytes;
    if (!whole) memset(out, 0, static_cast<size_t>(bytes));
    for (int64_t i = 0; i < v.kernel[0]; ++i) {
      const int64_t y = oy * v.stride[0] + i * v.dilation[0] - p.padding[0];
      const bool inside = y >= 0 && y < v.height;
      const uint8_t* const row = p.bits + (n * v.height + (inside ? y : 0)) * v.width * pixel;
      uint8_t* const to = out + i * v.kernel[1] * pixel;
      if (whole && inside && v.dilation[1] == 1 && left >= 0 && left + v.kernel[1] <= v.width) {
        memcpy(to, row + left * pixel, static_cast<size_t>(v.kernel[1] * pixel));
        continue;
      }
      for (int64_t j = 0; j < v.kernel[1]; ++j) {
        const int64_t x = left + j * v.dilation[1];
        const bool seen = inside && x >= 0 && x < v.width;
        if (whole && seen) memcpy(to + j * pixel, row + x * pixel, static_cast<size_t>(pixel));
        else if (whole) memset(to + j * pixel, 0, static_cast<size_t>(pixel));
        else if (seen) append_bits(out, (i * v.kernel[1] + j) * v.channels, row + x * pixel, v.channels);
      }
    }
  }
}

// As fold_patches, pixel by pixel in runs of channels, over the patches that there are. An item is some channels of an image, in L1.
void fold_kept(const FoldKeptArgs& p) {
  const Window& v = p.window;
  const int64_t pixels = v.height * v.width, positions = v.out[0] * v.out[1], columns = v.columns(), size = code_bits(p.code) / 8;
  const int64_t fit = 8192 / pixels / 32 * 32, together = fit > 64 ? fit : 64, blocks = (v.channels + together - 1) / together;
#pragma omp parallel if (p.count * columns > kSerial)
  {
    const int64_t room = pixels * together;
    float *sums = static_cast<float*>(malloc(static_cast<size_t>(2 * room) * 4)), *turned = sums + room;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < p.images * blocks; ++item) {
      const int64_t n = item / blocks, c = item % blocks * together, live = v.channels - c < together ? v.channels - c : together, begin = n * positions;
      memset(sums, 0, static_cast<size_t>(pixels * live) * 4);
      int64_t row = p.kept ? p.count : begin + positions;
      if (p.kept)
        for (int64_t step = p.count; step > 0; step /= 2)  // the first of the next image
          while (row - step >= 0 && p.kept[row - step] >= begin + positions) row -= step;
      while (--row >= 0 && (p.kept ? p.kept[row] : row) >= begin) {
        const int64_t at = (p.kept ? p.kept[row] : row) - begin, ox = at % v.out[1], oy = at / v.out[1];
        const float* d = p.d + row * columns + c;
        for (int64_t i = 0; i < v.kernel[0]; ++i)
          for (int64_t j = 0; j < v.kernel[1]; ++j, d += v.channels) {
            const int64_t y = oy * v.stride[0] + i * v.dilation[0] - p.padding[0], x = ox * v.stride[1] + j * v.dilation[1] - p.padding[1];
            if (y < 0 || y >= v.height || x < 0 || x >= v.width) continue;
            float* __restrict to = sums + (y * v.width + x) * live;
            int64_t k = 0;
            for (; k + W <= live; k += W) store(to + k, add(load(to + k), load(d + k)));
            for (; k < live; ++k) to[k] += d[k];
          }
      }
      for (int64_t i = 0; i < (p.outside ? pixels : 0); ++i) {
        const uint8_t* bits = p.outside + (n * pixels + i) * bytes_of(v.channels) + c / 8;
        float* __restrict at = sums + i * live;
        int64_t k = 0;
#if GM_LEVEL >= 1
        const SignDecoder half(0, 0.5f);
        for (; k + W <= live; k += W) store(at + k, load(at + k) * (half(bits + k / 8) + broadcast(0.5f)));
#endif
        for (; k < live; ++k) at[k] *= static_cast<float>(1 - (bits[k / 8] >> k % 8 & 1));
      }
      if (p.last || pixels == 1) {
        for (int64_t i = 0; i < pixels; ++i)
          encode_floats(p.code, sums + i * live, nullptr, live, static_cast<char*>(p.image) + ((n * pixels + i) * v.channels + c) * size);
        continue;
      }
      const int64_t square_pixels = pixels / W * W, square_channels = live / W * W;
      for (int64_t k = 0; k < square_channels; k += W)
        for (int64_t i = 0; i < square_pixels; i += W) {
          vf square[W];
          for (int r = 0; r < W; ++r) square[r] = load(sums + (i + r) * live + k);
          transpose(square);
          for (int r = 0; r < W; ++r) store(turned + (k + r) * pixels + i, square[r]);
        }
      for (int64_t i = 0; i < pixels; ++i)
        for (int64_t k = i < square_pixels ? square_channels : 0; k < live; ++k) turned[k * pixels + i] = sums[i * live + k];
      encode_floats(p.code, turned, nullptr, live * pixels, static_cast<char*>(p.image) + (n * v.channels + c) * pixels * size);
    }
    free(sums);
  }
}

}  // namespace

const ConvKernels GM_TABLE(conv) = {quantize_patches, fold_patches, pack_image, patch_bits, fold_kept};

}  // namespace gradmill
