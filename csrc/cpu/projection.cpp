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

}  // namespace

const ProjectionKernels GM_TABLE(projection) = {project, project_back};

}  // namespace gradmill
