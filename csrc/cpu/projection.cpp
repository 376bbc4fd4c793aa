// Gradient projections: into a smaller space, and back into the weight.
//
// project: 2 m n rank operations; the gradient is read from memory once, the basis is small, decoded and packed once (gemm.h): bound by multiplies.
// 1024 x 4096, rank 128, Zen 4, one thread's CPU time: 10.7-11.0 ms with an fp32, INT8 or INT4 basis, right or left,
// against 11.8-12.3 for one torch fp32 matmul of that shape in the same run.
//
// project_back: as many operations, and the weight is read and written once, in its own format; the update exists only
// as the sums of one gemm tile. A residual (what of the gradient the basis does not span) is added in the same pass: its own bytes more.
//
// A Q-GaLore step 4096 x 1024, rank 128, UINT8 weight: 2.15 Gop in the products, 20 ms of one thread at its fp32 peak. Profile of the 31 ms
// (AVX2) before its rounding was written in vectors: multiplying 19.1, measuring and encoding the weight 4.9, Philox 2.4, packing 1.7, the rule 0.6,
// decoding 0.9, Python 0.3. Predicted from instruction counts: encoding 1.9, Philox 2.0. Measured (busy), one thread's CPU time, before -> after,
// AVX2 and AVX-512: project_back 18.1 -> 14.6 and 15.1 -> 13.8 ms, the step 31.2 -> 27.5 and 28.4 -> 26.4; project 11.3 as before; fp32
// weight, updated where it lies, 11.9 -> 11.5 and 12.1 -> 11.4, torch's addmm_ 12.9 to 13.3. Tried and dropped: prefetching the gradient or the
// weight (no difference), packing rows as they lie (packing 1 ms less, multiplying 1 ms more), tiles of 512 columns (fp32 8 to 10% slower).
#include "gemm.h"

namespace gradmill {
namespace {

struct StoreRows {
  float* out;
  int64_t columns;
  void operator()(int64_t row, int64_t col, int64_t n, const float* sums, float*) const {
    memcpy(out + row * columns + col, sums, static_cast<size_t>(n) * sizeof(float));
  }
};

void project(const ProjectArgs& p) {
  const FloatReader grad{plain_matrix(p.grad, p.grad_code, p.m, p.n)}, basis{p.basis};
  const int64_t rank = p.basis.rows;
  if (p.left) gemm<FloatLanes>({rank, p.n, p.m}, Rows<FloatReader>{basis}, Columns<FloatReader>{grad}, StoreRows{p.out, p.n});
  else gemm<FloatLanes>({p.m, rank, p.n}, Rows<FloatReader>{grad}, Rows<FloatReader>{basis}, StoreRows{p.out, rank});
}

// Receives rows of `back`, whole blocks of the weight at a time.
struct UpdateWeight {
  const ProjectBackArgs& p;
  void add_residual(int64_t row, int64_t col, int64_t n, float* __restrict values) const {
    constexpr int64_t part = 64;
    const char* from = static_cast<const char*>(p.residual) + (row * p.weight.cols + col) * code_bits(p.residual_code) / 8;
    for (int64_t at = 0; at < n; at += part) {
      const int64_t count = min_of(part, n - at);
      float residual[part];
      decode_floats(p.residual_code, from + at * code_bits(p.residual_code) / 8, count, residual);
      if (p.left)
        for (int64_t j = 0; j < count; ++j) values[at + j] += p.residual_scales[col + at + j] * residual[j];
      else
        for (int64_t j = 0; j < count; ++j) values[at + j] += p.residual_scales[row] * residual[j];
    }
  }
  void operator()(int64_t row, int64_t col, int64_t n, float* __restrict back, float* __restrict old_values) const {
    if (p.weight.code == kF32 && !p.residual) {  // where it lies: two copies less
      float* const weight = reinterpret_cast<float*>(tile_address(p.weight, row, col));
      for (int64_t j = 0; j < n; ++j) weight[j] = weight[j] * p.decay + p.alpha * back[j];
      return;
    }
    decode_tile(p.weight, row, col, n, old_values);
    for (int64_t j = 0; j < n; ++j) back[j] = old_values[j] * p.decay + p.alpha * back[j];
    if (p.residual) add_residual(row, col, n, back);
    update_tile(p.weight, row, col, n, old_values, back, &p.key);
  }
};

void project_back(const ProjectBackArgs& p) {
  const Matrix& w = p.weight;
  const int64_t rank = p.basis.rows;
  const Extent extent{w.rows, w.cols, rank, is_blocked(w.code) ? w.block : NR};
  const FloatReader basis{p.basis};
  const UpdateWeight epilogue{p};
  if (p.left) {
    const FloatReader update{plain_matrix(p.update, kF32, rank, w.cols)};
    gemm<FloatLanes>(extent, Columns<FloatReader>{basis}, Columns<FloatReader>{update}, epilogue);
  } else {
    const FloatReader update{plain_matrix(p.update, kF32, w.rows, rank)};
    gemm<FloatLanes>(extent, Rows<FloatReader>{update}, Columns<FloatReader>{basis}, epilogue);
  }
}

// --- discrete cosine transform ----------------------------------------------------------------------------
// A vector holds an element of W rows; arrays of vectors are transformed as a scalar program would. With c3(x)_j = sum_i x_i cos(i (2j+1) pi / 2n)
// and c4(x)_j = sum_i x_i cos((2i+1) (2j+1) pi / 4n), both without scale, h = n/2 and t = (2j+1) pi / 4n:
//   c3(x)_j, c3(x)_(n-1-j) = a_j +- b_j,  a = c3(even x), b = c4(odd x);
//   c4(x)_j = cos t u_j + sin t v_j, c4(x)_(n-1-j) = sin t u_j - cos t v_j,  u = c3(x_0, x_2k + x_(2k-1)), v_j = (-1)^j c3(x_(n-1), x_(2(h-k)-1) - x_(2(h-k))),
// sums and rotations only, so rounding stays as small as an FFT's. Sizes that are odd or at most 4 are products with a small matrix.
//
// Counted for 4096 x 1024: 2.5 n log2 n operations a row, 105 M, and 34 MB of memory, half of it new pages. Predicted 2.5 ms of one thread; measured beside
// busy neighbours 5.4 with AVX-512, 6.1 with AVX2, against 20.2 of an FFT of torch's with its twiddles and reordering, cache-blocked too.
struct Dct {
  const float* table;
  int64_t n, base;

  void product(const vf* x, int64_t stride, vf* __restrict out, const float* matrix) const {
    if (base == 4) {
      const vf x0 = x[0], x1 = x[stride], x2 = x[2 * stride], x3 = x[3 * stride];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        out[j] = fma(x0, broadcast(matrix[4 * j]), x1 * broadcast(matrix[4 * j + 1])) + fma(x2, broadcast(matrix[4 * j + 2]), x3 * broadcast(matrix[4 * j + 3]));
      return;
    }
    for (int64_t j = 0; j < base; ++j) {
      vf sum = zero();
      for (int64_t i = 0; i < base; ++i) sum = fma(x[i * stride], broadcast(matrix[j * base + i]), sum);
      out[j] = sum;
    }
  }
  void c3(const vf* x, int64_t stride, vf* __restrict out, int64_t m, vf* room) const {
    if (m == base) return product(x, stride, out, table + n);
    const int64_t h = m / 2;
    c3(x, 2 * stride, out, h, room);
    c4(x + stride, 2 * stride, out + h, h, room);
    for (int64_t j = 0, k = h - 1; j <= k; ++j, --k) {
      const vf a = out[j], b = out[h + j], c = out[k], d = out[h + k];
      out[j] = a + b, out[h + k] = a - b;
      out[k] = c + d, out[h + j] = c - d;
    }
  }
  void c4(const vf* x, int64_t stride, vf* __restrict out, int64_t m, vf* __restrict room) const {
    if (m == base) return product(x, stride, out, table + n + base * base);
    const int64_t h = m / 2;
    const float *const cosines = table + n - 2 * m, *const sines = cosines + h;
    room[0] = x[0], room[h] = x[(m - 1) * stride];
    for (int64_t k = 1; k < h; ++k) {
      const vf before = x[(2 * k - 1) * stride], after = x[2 * k * stride];
      room[k] = before + after, room[m - k] = before - after;
    }
    c3(room, 1, out, h, room + m);
    c3(room + h, 1, out + h, h, room + m);
    for (int64_t j = 0, k = h - 1; j <= k; ++j, --k) {
      const vf u = out[j], v = out[h + j], s = out[k], t = out[h + k];
      const float even = j % 2 ? -1.0f : 1.0f, last = k % 2 ? -1.0f : 1.0f;
      out[j] = fma(broadcast(cosines[j]), u, broadcast(even * sines[j]) * v), out[h + k] = fma(broadcast(sines[j]), u, broadcast(-even * cosines[j]) * v);
      out[k] = fma(broadcast(cosines[k]), s, broadcast(last * sines[k]) * t), out[h + j] = fma(broadcast(sines[k]), s, broadcast(-last * cosines[k]) * t);
    }
  }
};

void dct(const DctArgs& p) {
  const int64_t n = p.n, size = code_bits(p.x_code) / 8, padded = round_up(n, W);
  const char* const x = static_cast<const char*>(p.x);
  const Dct transform{p.table, n, p.base};
  const vf scale = broadcast(static_cast<float>(sqrt(2.0 / static_cast<double>(n))));
#pragma omp parallel if (p.rows * n > 1 << 14)
  {
    Scratch scratch((2 * padded + 2 * n) * W);
    vf *const in = reinterpret_cast<vf*>(scratch.data), *const out = in + padded, *const room = out + padded;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; row += W) {
      const int64_t live = min_of(W, p.rows - row);
      for (int64_t i = 0; i < n; i += p.columns ? 1 : W) {
        const int64_t wide = min_of(W, n - i), vectors = p.columns ? 1 : live, values = p.columns ? live : wide;
        vf square[W];
        for (int r = 0; r < W; ++r) {
          if (r >= vectors) {
            square[r] = zero();
            continue;
          }
          const char* const at = x + (p.columns ? i * p.rows + row : (row + r) * n + i) * size;
          if (p.x_code == kF32 && values == W) {
            square[r] = load(at);
          } else {
            float line[W] = {};
            decode_floats(p.x_code, at, values, line);
            square[r] = load(line);
          }
        }
        if (p.columns) {
          in[i] = square[0];
          continue;
        }
        transpose(square);
        for (int64_t r = 0; r < wide; ++r) in[i + r] = square[r];
      }
      in[0] = in[0] * broadcast(0.70710678f);
      transform.c3(in, 1, out, n, room);
      for (int64_t i = 0; i < n; i += p.columns ? 1 : W) {
        float line[W];
        const int64_t wide = min_of(W, n - i);
        if (p.columns) {
          store(line, out[i] * scale);
          memcpy(p.out + i * p.rows + row, line, static_cast<size_t>(live) * 4);
          continue;
        }
        vf square[W];
        for (int r = 0; r < W; ++r) square[r] = r < wide ? out[i + r] * scale : zero();
        transpose(square);
        for (int64_t r = 0; r < live; ++r) {
          float* const to = p.out + (row + r) * n + i;
          if (wide == W) store(to, square[r]);
          else store(line, square[r]), memcpy(to, line, static_cast<size_t>(wide) * 4);
        }
      }
    }
  }
}

}  // namespace

const ProjectionKernels GM_TABLE(projection) = {project, project_back, dct};

}  // namespace gradmill
