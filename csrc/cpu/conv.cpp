// A convolution's patches: quantised straight from the image, row-wise or transposed, and their gradients added back to it.
//
// The image is padded (by torch, a ninth of a 3x3 window's patches at most); no fp32 patch matrix is ever written. A patch
// element costs a read from L1 or L2, where the image's rows are for as long as they are needed, half a dozen shuffles that turn
// W positions x W elements round, and what encoding it costs; written is what the format stores. Transposed (a row for each
// element of the window, as dW wants them) rows are runs of the image's own and nothing is turned.
//
// Counted: batch 32, 128 -> 128 channels, 16x16, 3x3 has patches of 8192 x 1152, 37.7 MB in fp32, 9.4 MB in int8, of a 4.2 MB
// image; each product is 2.4 Gop. Forward and backward against torch's conv2d in the same process, one thread's CPU time, least of
// 7, interleaved, a Zen 4 in use by others (torch and gradmill both held to AVX2 in the second row of a pair):
//                       torch   int8            int7            bf16
//   128 -> 128  VNNI    66 ms   53 ms (1.26x)   58 ms (1.15x)   66 ms (1.00x)
//               AVX2    74 ms   81 ms (0.90x)   67 ms (1.10x)  114 ms (0.64x)
//   256 -> 256  VNNI   269 ms  159 ms (1.69x)  181 ms (1.49x)  203 ms (1.32x)
//               AVX2   293 ms  282 ms (1.04x)  211 ms (1.39x)  366 ms (0.80x)
// Forward alone: int8 1.52x and 2.13x with VNNI, 0.98x and 1.20x with AVX2. Of int8's time at 128 channels with VNNI the products are
// 6/10, quantising patches twice 2/10, folding 1/10. Before these kernels (torch unfolds, quantize reads, torch adds up) int8 was at
// 0.86x there. Signs (code kSign) go from the image to packed bits, no patch matrix in between; of a gradient of which a quarter of the
// patches was sampled, only these are folded (a scalar add an element, a quarter of the elements, instead of a matrix of zeros written, filled
// and read). one_bit_fqt forward + backward, batch 32, one thread's CPU time: 64 channels at 32x32 160 -> 75 ms (torch fp32 73), 128 at 16x16 59 -> 41
// (66), 256 at 8x8 37 -> 29 (62), 512 at 4x4 28 -> 26 (70), AVX-512; held to AVX2 66 (75), 37 (72), 26 (73), 24 (95). With two threads nothing could be measured: other processes had 80 % of the machine.
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

// W positions from `token` on, those past `end` like the last; whether they are neighbours in memory.
bool strip(const Window& v, int64_t token, int64_t end, int64_t (&first)[W]) {
  bool run = true;
  for (int l = 0; l < W; ++l) {
    first[l] = first_of(v, token + l < end ? token + l : end - 1);
    run = run && first[l] == first[0] + l;
  }
  return run;
}

// A row of patches to its format.
inline void encode_row(const Matrix& m, int64_t row, float* x) {
  if (m.code == kSign) m.scales[row] = pack_sign_row(x, m.cols, false, reinterpret_cast<uint8_t*>(tile_address(m, row, 0)));
  else encode_tile(m, row, 0, m.cols, x, nullptr);
}

void quantize_patches(const PatchArgs& a) {
  const Window& v = a.window;
  const Matrix& m = a.out;
  if (m.rows == 0 || m.cols == 0) return;
  const float* x = a.image;
  int64_t* offset = offsets(v);
  const int64_t pitch = m.cols + 16;  // not a power of two, or all rows share a few cache sets
#pragma omp parallel if (m.rows * m.cols > kSerial)
  {
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
        int64_t first[W];
        const bool run = strip(v, token, m.rows, first);
        const int64_t rows = m.rows - token < W ? m.rows - token : W, whole = m.cols / W * W;
        for (int64_t k = 0; k < whole; k += W) {
          vf square[W];
          for (int i = 0; i < W; ++i) {
            const float* from = x + offset[k + i];
            if (run) {
              square[i] = load(from + first[0]);
            } else {
              alignas(64) float lanes[W];
              for (int l = 0; l < W; ++l) lanes[l] = from[first[l]];
              square[i] = load(lanes);
            }
          }
          transpose(square);
          for (int i = 0; i < W; ++i) store(buffer + i * pitch + k, square[i]);
        }
        for (int64_t k = whole; k < m.cols; ++k)
          for (int64_t l = 0; l < rows; ++l) buffer[l * pitch + k] = x[first[l] + offset[k]];
        for (int64_t l = 0; l < rows; ++l) encode_row(m, token + l, buffer + l * pitch);
      }
    }
    free(buffer);
  }
  free(offset);
}

// Every pixel's sum runs over the window's positions in order, as the reference's does: positions of the output backwards, elements
// of a patch forwards. An item is some channels of an image, whose pixels stay in cache.
void fold_patches(const FoldArgs& a) {
  const Window& v = a.window;
  const int64_t positions = v.out[0] * v.out[1], taps = v.kernel[0] * v.kernel[1], columns = v.columns(), plane = v.height * v.width;
  memset(a.image, 0, static_cast<size_t>(a.images * v.channels * plane) * 4);
  if (a.images == 0 || columns == 0) return;
  int64_t* offset = offsets(v);
  const int64_t together = 16, blocks = (v.channels + together - 1) / together;
#pragma omp parallel for schedule(static) if (a.images * positions * columns > kSerial)
  for (int64_t item = 0; item < a.images * blocks; ++item) {
    const int64_t n = item / blocks, c = item % blocks * together, begin = n * positions;
    const int64_t from = c * taps, to = (c + together < v.channels ? c + together : v.channels) * taps, whole = from + (to - from) / W * W;
    if (a.kept) {
      int64_t row = a.count;
      for (int64_t step = a.count; step > 0; step /= 2)  // the first of the next image
        while (row - step >= 0 && a.kept[row - step] >= begin + positions) row -= step;
      while (--row >= 0 && a.kept[row] >= begin) {
        float* pixels = a.image + first_of(v, a.kept[row]);
        for (int64_t k = from; k < to; ++k) pixels[offset[k]] += a.d[row * columns + k];
      }
      continue;
    }
    for (int64_t done = (positions + W - 1) / W * W - W; done >= 0; done -= W) {
      int64_t first[W];
      const bool run = strip(v, begin + done, begin + positions, first);
      const int64_t rows = positions - done < W ? positions - done : W;
      const float* d = a.d + (begin + done) * columns;
      int64_t k = from;
      for (; k < whole && rows == W; k += W) {
        vf square[W];
        for (int i = 0; i < W; ++i) square[i] = load(d + i * columns + k);
        transpose(square);
        for (int i = 0; i < W; ++i) {
          float* pixel = a.image + offset[k + i];
          if (run) {
            store(pixel + first[0], add(load(pixel + first[0]), square[i]));
          } else {
            alignas(64) float lanes[W];
            store(lanes, square[i]);
            for (int l = 0; l < W; ++l) pixel[first[l]] += lanes[l];
          }
        }
      }
      for (; k < to; ++k)
        for (int64_t l = 0; l < rows; ++l) a.image[first[l] + offset[k]] += d[l * columns + k];
    }
  }
  free(offset);
}

}  // namespace

const ConvKernels GM_TABLE(conv) = {quantize_patches, fold_patches};

}  // namespace gradmill
