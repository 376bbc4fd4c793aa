// The interface of the CPU kernels: plain structs and one table of function pointers per instruction set.
// bindings.cpp fills the structs (arguments were checked in Python) and picks the table. Kernel files use no
// std:: templates: their inline functions would be compiled per instruction set and merged by the linker.
#pragma once
#include <cstdint>

#include "../common/codecs.h"
#include "../common/philox.h"

namespace gradmill {

// A matrix stored in some format, row-major: `codes` rows are contiguous, a row takes
// ceil(cols * code_bits / 8) bytes. Blocks run along a row and never cross one; `block` elements each
// (block == cols for "whole row"), the last one of a row may be short. scales (and zeros, uint8, for the
// zero-point codes) are (rows, ceil(cols/block)); a weight in two pieces (is_split) has its low bits in zeros, as codes lies.
struct Matrix {
  void* codes;
  float* scales;
  uint8_t* zeros;
  int code;
  int64_t rows, cols, block;
  int64_t blocks_per_row() const { return block > 0 ? (cols + block - 1) / block : 0; }
};

// x (rows x cols, row stride `stride`, dtype kF32/kBF16/kF16) -> out; `transpose` quantises x^T (out is cols x rows).
struct QuantizeArgs {
  const void* x;
  int x_code;
  int64_t stride;
  Matrix out;
  bool transpose;
  const Key* key;  // null: nearest
  bool given;      // out.scales holds the scales to use; a block with a nan or an inf still gets nan
};
// x (rows x cols) -> out (rows x cols) and turned (cols x rows), the same format, an 8-bit symmetric code. turned.scales: zeros.
struct QuantizeBothArgs {
  const void* x;
  int x_code;
  int64_t stride;
  Matrix out, turned;
  const Key *key, *turned_key;  // both null: nearest
};
struct DequantizeArgs {
  Matrix in;
  void* out;  // contiguous
  int out_code;
};

// out (rows x cols) = x or, with `transpose`, x^T, every run of `block` elements of a row multiplied by random signs (key
// not null) and by the normalised Hadamard matrix; `inverse`: the signs come last.
struct HadamardArgs {
  const void* x;
  int x_code;
  int64_t stride;
  int64_t rows, cols, block;
  bool transpose, inverse;
  const Key* key;
  void* out;  // contiguous
  int out_code;
};

// Group-wise fake quantisation of weight (rows x cols, contiguous) with a trained step and zero point per group; see
// csrc/common/codecs.h. Forward: out = the quantised weight's values. Backward: out = the weight's gradient, in its dtype.
struct FakeArgs {
  const void* weight;
  int weight_code;
  const float *steps, *zeros;  // (rows, ceil(cols / block))
  int64_t rows, cols, block;
  int bits;
  void* out;  // contiguous
  int out_code;
  const void* grad = nullptr;  // from here on backward only
  int grad_code = 0;
  float *dsteps = nullptr, *dzeros = nullptr;
};

// out[i,j] = a_scale[i] * b_scale[j] * sum_k a[i,k] b[j,k] (+ bias[j]); a (m x k), b (n x k) int8 row-major.
struct Int8MatmulArgs {
  int64_t m, n, k;
  const int8_t *a, *b;
  const float *a_scales, *b_scales, *bias;  // bias may be null
  void* out;                                // m x n, contiguous
  int out_code;
};

// transpose=false: out (m x w.rows) = x (m x w.cols) w^T;  transpose=true: out (m x w.cols) = x (m x w.rows) w.
// x may be any stored matrix, plain floats or codes.
struct PackedMatmulArgs {
  Matrix x;
  Matrix w;
  bool transpose;
  const float* bias;  // may be null
  void* out;          // contiguous, dtype out_code
  int out_code;
};

// The products of every expert of a mixture, a_e b_e^T (+ bias_e). `offs`: where each expert's tokens end, cumulative.
// summed = false: a (tokens x k) in the order of the experts, offs null where each has m; b (experts * n x k); out
// (tokens x n). summed: out (experts x m x n), the tokens being what is summed over. Stored operands lie expert after
// expert there, (m x its tokens) each, with blocks of their own; plain floats are (tokens x m) and (tokens x n).
struct GroupedArgs {
  bool summed;
  int64_t experts, tokens, m, n, k;  // m or, summed, k counts for nothing where it is ragged
  const int32_t* offs;
  Matrix a, b;          // codes, scales, code, block (0: a whole row) count
  const float* bias;    // (experts x n), may be null
  void* out;
  int out_code;
};

// One expert's part: m x n x k, its operands, `by_tokens` (k x m) and (k x n).
struct Expert {
  int64_t m, n, k;
  Matrix a, b;
  bool by_tokens;
  const float* bias;
  char* out;
};

// Expert e's tokens, whatever offs holds within bounds, and how many blocks of a row come before its own.
struct Span {
  int64_t begin, end, blocks;
};
GM_HD Span span_of(const int32_t* offs, int64_t tokens, int64_t e, int64_t block) {
  Span s{0, 0, 0};
  for (int64_t i = 0;; ++i) {
    s.begin = s.end;
    s.end = offs[i] < s.begin ? s.begin : offs[i] > tokens ? tokens : offs[i];
    if (i == e) return s;
    s.blocks += block == 0 ? 1 : (s.end - s.begin + block - 1) / block;
  }
}

// Rows [first, first + rows) of a stored (any x cols) matrix; a block of 0 is a row.
GM_HD Matrix rows_of(const Matrix& m, int64_t first, int64_t rows, int64_t cols) {
  const int64_t block = m.block == 0 || m.block > cols ? cols : m.block, per_row = block > 0 ? (cols + block - 1) / block : 0;
  return {static_cast<char*>(m.codes) + first * cols * (code_bits(m.code) / 8), m.scales + (is_blocked(m.code) ? first * per_row : 0), nullptr, m.code,
          rows, cols, block};
}

// An expert's part of a matrix (rows x tokens) that lies expert after expert.
GM_HD Matrix ragged_part(const Matrix& m, const Span& s, int64_t rows) {
  const int64_t cols = s.end - s.begin;
  return {static_cast<char*>(m.codes) + rows * s.begin, m.scales + rows * s.blocks, nullptr, m.code, rows, cols, m.block == 0 || m.block > cols ? cols : m.block};
}

GM_HD Expert expert_of(const GroupedArgs& g, int64_t e) {
  const Span s = g.offs ? span_of(g.offs, g.tokens, e, g.a.block) : Span{e * g.m, (e + 1) * g.m, 0};
  const int64_t tokens = s.end - s.begin;
  char* const out = static_cast<char*>(g.out) + (g.summed ? e * g.m : s.begin) * g.n * (code_bits(g.out_code) / 8);
  const float* const bias = g.bias ? g.bias + e * g.n : nullptr;
  if (!g.summed) return {tokens, g.n, g.k, rows_of(g.a, s.begin, tokens, g.k), rows_of(g.b, e * g.n, g.n, g.k), false, bias, out};
  if (!is_blocked(g.a.code)) return {g.m, g.n, tokens, rows_of(g.a, s.begin, tokens, g.m), rows_of(g.b, s.begin, tokens, g.n), true, bias, out};
  return {g.m, g.n, tokens, ragged_part(g.a, s, g.m), ragged_part(g.b, span_of(g.offs, g.tokens, e, g.b.block), g.n), false, bias, out};
}

// x (tokens x cols) -> out: each expert's tokens transposed, (cols x its tokens), expert after expert. `key` is that of the
// first expert, the others' streams have the next tensor ids.
struct QuantizeGroupedArgs {
  const void* x;
  int x_code;
  int64_t stride, tokens, cols, experts;
  const int32_t* offs;
  Matrix out;
  const Key* key;
  bool given;
};
GM_HD Key expert_key(const Key& key, int64_t e) { return {key.seed, key.step, key.stream + (static_cast<uint32_t>(e) << 8)}; }

// Signs (planes == 0) or short unsigned integers of x (rows x cols after `transpose`, read as QuantizeArgs reads it) as
// packed bits: planes (1 if 0) matrices of rows x ceil(cols / 8) bytes. pyops/ops/binary.py says what scales and offsets are.
struct PackBitsArgs {
  const void* x;
  int x_code;
  int64_t stride, rows, cols;
  bool transpose;
  int planes;
  bool mean;       // signs: scales are means of |x|
  const Key* key;  // planes; null: nearest
  uint8_t* bits;
  float *scales, *offsets;  // offsets: planes only
};
// a (signs if planes == 0, else that many planes of integers q) times b^T, b signs: out (m x n) =
//   (float(sum s s') * a_scales) * b_scales + bias   or   (offsets * float(sum s') + a_scales * float(sum q s')) * b_scales
struct BinaryMatmulArgs {
  int64_t m, n, k;  // k in bits
  int planes;
  const uint8_t *a, *b;
  const float *a_scales, *offsets, *b_scales, *bias;  // bias may be null
  int32_t* counts;                                    // m + n to work with: the q's sum of each row of a, the bits set in each of b
  void* out;
  int out_code;
  int64_t run;  // CPU: 0, or b's rows come in runs of so many: out is (n / run, m, run), bias a number for each row of a
};
// bits (rows x ceil(cols / 8) bytes) to out (cols x ceil(rows / 8) bytes).
struct TransposeBitsArgs {
  const uint8_t* bits;
  int64_t rows, cols;
  uint8_t* out;
};
// A gradient (images, channels, positions): a token is an image's position. Range, zero included, and largest magnitude of each token's x * sizes
// and of each channel's x; inf for a group that is not finite.
struct Gradient {
  const float* x;
  int64_t images, channels, positions;
  const float* sizes;  // one a channel
  int64_t tokens() const { return images * positions; }
};
struct GradientRangesArgs {
  Gradient g;
  float *ranges, *magnitudes, *channel_ranges, *channel_magnitudes;
};
// PackBitsArgs' planes of some tokens (x * sizes) or, if sizes is null, of some channels.
struct PackGradientArgs {
  Gradient g;
  const int64_t* kept;
  int64_t count;
  int planes;
  const Key* key;
  uint8_t* bits;
  float *scales, *offsets;
};
// ceil(groups / bits) of the groups; pyops/ops/binary.py says which.
struct SampleArgs {
  const float* ranges;
  int64_t groups, bits;
  double offset;
  int64_t* kept;
  float* factors;
};

// out[i] = base[i] + alphas[t] x[i] sign_t^T for each row i of x (m x k), t its tenant, none if negative. `order` lists the rows so that
// a tenant's are neighbours, `tenants` their tenants in that order. bits: n x ceil(k / 8) bytes a tenant.
struct TenantsArgs {
  int64_t m, n, k;
  const int64_t *order, *tenants;  // host memory
  const void* x;
  int x_code;
  const uint8_t* bits;
  const float* alphas;
  const void* base;
  void* out;  // base's dtype
  int out_code;
};

// Training of a codebook weight (kBook), of which `w` is a run of rows: dw (w.rows x w.cols) is those rows' dense gradient.
// sums: sums[book, index] += the dw at that index, for groups x 2^bits.
struct BookSumsArgs {
  Matrix w;
  const float* dw;
  int64_t groups;
  double* sums;
};
// Moves indices: an index and its int8 fraction, in 256ths, are one fixed-point number, from which rate * dw * weight(distance) is
// subtracted, rounded stochastically with `key`; csrc/cpu/codebook.cpp has the formula.
struct BookMoveArgs {
  Matrix w;
  int8_t* fractions;  // w.rows x w.cols
  const float *dw, *rates;  // rates: a row's
  Key key;
};

// Gradient projection. The basis B is (rank x d), its rows the basis vectors.
//   side right: grad (m x d), out (m x rank) = grad B^T;   side left: grad (d x n), out (rank x n) = B grad
struct ProjectArgs {
  int64_t m, n;  // shape of grad
  const void* grad;
  int grad_code;
  Matrix basis;
  bool left;
  float* out;
};
// weight <- encode(decay * decode(weight) + alpha * back), back = update B (right) or B^T update (left),
// tile by tile, never stored whole. A quantised weight is rounded stochastically with `key`; a block whose values
// do not change keeps its codes and scale.
struct ProjectBackArgs {
  Matrix weight;
  const float* update;
  Matrix basis;
  bool left;
  float decay, alpha;
  Key key;
  const void* residual;         // floats of residual_code and of the weight's shape, may be null
  int residual_code;
  const float* residual_scales;  // one a column when left, else one a row: the side that is not projected
};

// x D (columns false, x (rows x n)) or D^T x (columns true, x (n x rows)), out like x in fp32, D the orthonormal DCT-III of size n
// (pyops/ops/projection.py). table: pyops/ops/projection.py's dct_table(n).
struct DctArgs {
  int64_t rows, n;
  const void* x;
  int x_code;
  bool columns;
  const float* table;
  int64_t base;  // the size that is not halved
  float* out;
};

// One fused optimizer step over many tensors; see csrc/cpu/optim.cpp.
struct StepTensor {
  Matrix param;
  const void* grad;
  Matrix states[3];
  uint32_t id;
  uint64_t first;  // number of its first element in the whole tensor: above 0 in a shard
};
struct StepArgs {
  int rule;
  int grad_code;
  const StepTensor* tensors;
  int64_t count;
  const float* scalars;  // scalar_rows (1, or one per tensor) rows of kMaxScalars
  int64_t scalar_rows;
  uint64_t seed;
  uint32_t step;
  const float* counts = nullptr;  // CUDA, in device memory as scalars is then, a row per tensor: each one's step, below 0 for none
};

// A step whose rate is, tensor by tensor, a function of the norms of the weight and of its update or gradient.
struct ScaledStepArgs {
  StepArgs step;  // one row of scalars; LAMB's rule turns a weight into its update
  int apply;      // LAMB: the rule (sgd) that applies the update; LARS: -1
  double lr, coefficient, decay, factor;  // coefficient: LAMB's largest ratio, LARS's trust coefficient; factor: |what multiplies the gradient|
};

// A convolution over an already padded image (images, channels, height, width), contiguous.
struct Window {
  int64_t channels, height, width, kernel[2], stride[2], dilation[2], out[2];
  int64_t columns() const { return channels * kernel[0] * kernel[1]; }
};
// out = the image's patches (images * out[0] * out[1], columns), or with `transpose` theirs; out.code may be a plain float or
// a sign. The window is over the padded image, `image` is without its `padding` of zeros.
struct PatchArgs {
  const float* image;
  Window window;
  int64_t padding[2];
  Matrix out;
  bool transpose;
};
// image = the sum of what d (images * out[0] * out[1], columns) holds for each pixel; window, padding and image as above.
struct FoldArgs {
  const float* d;
  Window window;
  int64_t padding[2], images;
  float* image;
};

// Of each pixel's channels, (images * pixels) rows of ceil(channels / 8) bytes: signs, and where |x| > 1. x is (images, channels, pixels), with
// `last` (images, pixels, channels). `bad`: whether any x is a nan or an inf.
struct PackImageArgs {
  const void* x;
  int code;
  bool last;
  int64_t images, channels, pixels;
  uint8_t *signs, *outside;
  bool bad;
};
// Rows of bits, one a pixel, to patches' bits; the window is over the image as it is, `padding` (of zeros) around it.
struct PatchBitsArgs {
  const uint8_t* bits;
  Window window;
  int64_t padding[2], images;
  uint8_t* out;
};
// The patches d (count rows, kernel x channels), rows `kept` (ascending; null: all) of the matrix of patches, added to image (with `last` channels
// last), times 0 where `outside`, if not null, has a bit.
struct FoldKeptArgs {
  const float* d;
  const int64_t* kept;
  int64_t count;
  const uint8_t* outside;
  Window window;
  int64_t padding[2], images;
  void* image;
  int code;
  bool last;
};

// out[i] = (sum of squares, largest magnitude) of tensor i, elements beyond `limit` in magnitude multiplied by `factor` first.
// Squares of fp32 are exact in double. A chunk's go to kMeasureLanes lanes (element j to lane j % lanes) in ascending order
// and lanes are added in halves; chunks' sums are then added in the same way. partials: (chunks of all tensors, 2).
constexpr int64_t kMeasureChunk = 4096;
constexpr int kMeasureLanes = 32;
struct MeasureTensor {
  const void* x;
  int64_t n;
  int64_t first;  // number of its first chunk
  float limit, factor;
};
struct MeasureArgs {
  int code;
  const MeasureTensor* tensors;
  int64_t count;
  double *partials, *out;
};

struct QuantKernels {
  void (*quantize)(const QuantizeArgs&);
  void (*quantize_both)(const QuantizeBothArgs&);
  void (*quantize_grouped)(const QuantizeGroupedArgs&);
  void (*dequantize)(const DequantizeArgs&);
  void (*hadamard)(const HadamardArgs&);
  void (*fake_quantize)(const FakeArgs&);
  void (*fake_quantize_backward)(const FakeArgs&);
};
struct MatmulKernels {
  void (*int8)(const Int8MatmulArgs&);
  void (*packed)(const PackedMatmulArgs&);
  void (*grouped)(const GroupedArgs&);
};
struct ConvKernels {
  void (*quantize_patches)(const PatchArgs&);
  void (*fold_patches)(const FoldArgs&);
  void (*pack_image)(PackImageArgs&);
  void (*patch_bits)(const PatchBitsArgs&);
  void (*fold_kept)(const FoldKeptArgs&);
};
struct BinaryKernels {
  void (*pack)(const PackBitsArgs&);
  void (*matmul)(const BinaryMatmulArgs&);
  void (*tenants)(const TenantsArgs&);
  void (*transpose)(const TransposeBitsArgs&);
  void (*ranges)(const GradientRangesArgs&);
  void (*pack_gradient)(const PackGradientArgs&);
  void (*sample)(const SampleArgs&);
};
struct CodebookKernels {
  void (*sums)(const BookSumsArgs&);
  void (*move)(const BookMoveArgs&);
};
struct OptimKernels {
  void (*step)(const StepArgs&);
  void (*measure)(const MeasureArgs&);
  void (*scaled_step)(const ScaledStepArgs&);
};
struct ProjectionKernels {
  void (*project)(const ProjectArgs&);
  void (*project_back)(const ProjectBackArgs&);
  void (*dct)(const DctArgs&);
};

// Instruction-set levels. Each csrc/cpu/<family>.cpp is compiled once per level with GM_LEVEL set and defines
// <family>_<level>; setup.py's table says which levels a family has.
enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3 };

#define GM_DECLARE(level)                              \
  extern const QuantKernels quant_##level;             \
  extern const MatmulKernels matmul_##level;           \
  extern const ConvKernels conv_##level;               \
  extern const OptimKernels optim_##level;             \
  extern const ProjectionKernels projection_##level;   \
  extern const BinaryKernels binary_##level;           \
  extern const CodebookKernels codebook_##level;
GM_DECLARE(portable)
GM_DECLARE(avx2)
GM_DECLARE(avx512)
GM_DECLARE(avx512_vnni)
#undef GM_DECLARE

}  // namespace gradmill

#define GM_CONCAT2(a, b) a##_##b
#define GM_CONCAT(a, b) GM_CONCAT2(a, b)
// GM_TABLE(quant) -> quant_avx2 etc.; GM_LEVEL_NAME comes from the compiler's command line
#define GM_TABLE(family) GM_CONCAT(family, GM_LEVEL_NAME)
