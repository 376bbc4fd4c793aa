// gradmill._C: the only file that knows pybind11. Arguments are pointers and sizes that pyops/ops checked; each
// function fills the kernel's struct and calls the CPU table in use, or the CUDA launcher (device >= 0).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "../csrc/common/rules.h"
#include "../csrc/cpu/kernels.h"
#include "build_info.h"
#ifdef GRADMILL_WITH_CUDA
#include "../csrc/cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace gradmill;

namespace {

// --- instruction sets -------------------------------------------------------------------------------------
struct Table {
  const QuantKernels* quant;
  const MatmulKernels* matmul;
  const ConvKernels* conv;
  const OptimKernels* optim;
  const ProjectionKernels* projection;
  const BinaryKernels* binary;
  const CodebookKernels* codebook;
};
const char* const kLevelNames[] = {"portable", "avx2", "avx512", "avx512_vnni"};
const Table kTables[] = {
    {&quant_portable, &matmul_portable, &conv_portable, &optim_portable, &projection_portable, &binary_portable, &codebook_portable},
#if defined(__x86_64__)
    {&quant_avx2, &matmul_avx2, &conv_avx2, &optim_avx2, &projection_avx2, &binary_avx2, &codebook_avx2},
    {&quant_avx512, &matmul_avx512, &conv_avx512, &optim_avx512, &projection_avx512, &binary_avx512, &codebook_avx2},
    {&quant_avx512, &matmul_avx512_vnni, &conv_avx512, &optim_avx512, &projection_avx512, &binary_avx512, &codebook_avx2},
#endif
};

int detected_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512vnni") ? kAvx512Vnni : kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

int level_from_name(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == kLevelNames[i]) return i;
  throw py::value_error("the instruction set is '" + name + "'; it must be portable, avx2, avx512 or avx512_vnni");
}

int active_level = kPortable;

// Sets the highest level used; what the processor lacks is never used. Returns the level now in use.
std::string set_isa(const std::string& cap) {
  int level = level_from_name(cap), found = detected_level();
  active_level = level < found ? level : found;
  return kLevelNames[active_level];
}

const Table& cpu() { return kTables[active_level]; }

// --- argument helpers -------------------------------------------------------------------------------------
template <class T = void>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// (codes, scales, zeros, code, rows, cols, block)
using MatrixTuple = std::tuple<uint64_t, uint64_t, uint64_t, int, int64_t, int64_t, int64_t>;
Matrix matrix(const MatrixTuple& t) {
  auto [codes, scales, zeros, code, rows, cols, block] = t;
  return {pointer(codes), pointer<float>(scales), pointer<uint8_t>(zeros), code, rows, cols, block};
}

// (seed, step, stream) or None
using KeyTuple = std::optional<std::tuple<uint64_t, uint32_t, uint32_t>>;
Key make_key(const KeyTuple& k) {
  if (!k) return {0, 0, 0};
  auto [seed, step, stream] = *k;
  return {seed, step, stream};
}

// Calls the CPU kernel (device < 0) or the CUDA launcher, without holding the interpreter's lock.
#ifdef GRADMILL_WITH_CUDA
#define GM_RUN(cpu_call, cuda_call)                 \
  py::gil_scoped_release release;                   \
  if (device < 0) {                                 \
    cpu_call;                                       \
  } else {                                          \
    cuda::Launch launch{device, pointer(stream)};   \
    cuda_call;                                      \
  }
#else
#define GM_RUN(cpu_call, cuda_call)                                                   \
  py::gil_scoped_release release;                                                     \
  if (device >= 0) throw std::runtime_error("this gradmill was built without CUDA");  \
  (void)stream;                                                                       \
  cpu_call;
#endif

// --- ops --------------------------------------------------------------------------------------------------
void quantize(int device, uint64_t stream, uint64_t x, int x_code, int64_t stride, const MatrixTuple& out, bool transpose, const KeyTuple& key,
              bool given) {
  Key k = make_key(key);
  QuantizeArgs a{pointer(x), x_code, stride, matrix(out), transpose, key ? &k : nullptr, given};
  GM_RUN(cpu().quant->quantize(a), cuda::quantize(a, launch))
}

void quantize_both(int device, uint64_t stream, uint64_t x, int x_code, int64_t stride, const MatrixTuple& out, const MatrixTuple& turned,
                   const KeyTuple& key, const KeyTuple& turned_key) {
  Key k = make_key(key), t = make_key(turned_key);
  QuantizeBothArgs a{pointer(x), x_code, stride, matrix(out), matrix(turned), key ? &k : nullptr, key ? &t : nullptr};
  GM_RUN(cpu().quant->quantize_both(a), cuda::quantize_both(a, launch))
}

void dequantize(int device, uint64_t stream, const MatrixTuple& in, uint64_t out, int out_code) {
  DequantizeArgs a{matrix(in), pointer(out), out_code};
  GM_RUN(cpu().quant->dequantize(a), cuda::dequantize(a, launch))
}

void hadamard(int device, uint64_t stream, uint64_t x, int x_code, int64_t stride, int64_t rows, int64_t cols, int64_t block, bool transpose,
              bool inverse, const KeyTuple& key, uint64_t out, int out_code) {
  Key k = make_key(key);
  HadamardArgs a{pointer(x), x_code, stride, rows, cols, block, transpose, inverse, key ? &k : nullptr, pointer(out), out_code};
  GM_RUN(cpu().quant->hadamard(a), cuda::hadamard(a, launch))
}

// (weight, its code, steps, zeros, rows, cols, block, bits)
using FakeTuple = std::tuple<uint64_t, int, uint64_t, uint64_t, int64_t, int64_t, int64_t, int>;
FakeArgs fake(const FakeTuple& t, uint64_t out, int out_code) {
  auto [weight, code, steps, zeros, rows, cols, block, bits] = t;
  return {pointer(weight), code, pointer<const float>(steps), pointer<const float>(zeros), rows, cols, block, bits, pointer(out), out_code};
}

void fake_quantize(int device, uint64_t stream, const FakeTuple& group, uint64_t out, int out_code) {
  FakeArgs a = fake(group, out, out_code);
  GM_RUN(cpu().quant->fake_quantize(a), cuda::fake_quantize(a, launch))
}

void fake_quantize_backward(int device, uint64_t stream, const FakeTuple& group, uint64_t grad, int grad_code, uint64_t dweight, uint64_t dsteps,
                            uint64_t dzeros) {
  FakeArgs a = fake(group, dweight, std::get<1>(group));
  a.grad = pointer(grad), a.grad_code = grad_code, a.dsteps = pointer<float>(dsteps), a.dzeros = pointer<float>(dzeros);
  GM_RUN(cpu().quant->fake_quantize_backward(a), cuda::fake_quantize_backward(a, launch))
}

// (channels, height, width, kernel, stride, dilation, output): CPU only, tensors on CUDA are unfolded by torch
Window window(const std::array<int64_t, 11>& t) {
  return {t[0], t[1], t[2], {t[3], t[4]}, {t[5], t[6]}, {t[7], t[8]}, {t[9], t[10]}};
}

void quantize_patches(uint64_t image, const std::array<int64_t, 11>& geometry, const std::array<int64_t, 2>& padding, const MatrixTuple& out, bool transpose) {
  PatchArgs a{pointer<const float>(image), window(geometry), {padding[0], padding[1]}, matrix(out), transpose};
  py::gil_scoped_release release;
  cpu().conv->quantize_patches(a);
}

void fold_patches(uint64_t d, const std::array<int64_t, 11>& geometry, const std::array<int64_t, 2>& padding, int64_t images, uint64_t image) {
  FoldArgs a{pointer<const float>(d), window(geometry), {padding[0], padding[1]}, images, pointer<float>(image)};
  py::gil_scoped_release release;
  cpu().conv->fold_patches(a);
}

bool pack_image(uint64_t x, int code, bool last, int64_t images, int64_t channels, int64_t pixels, uint64_t signs, uint64_t outside) {
  PackImageArgs a{pointer(x), code, last, images, channels, pixels, pointer<uint8_t>(signs), pointer<uint8_t>(outside), false};
  py::gil_scoped_release release;
  cpu().conv->pack_image(a);
  return a.bad;
}

void patch_bits(uint64_t bits, const std::array<int64_t, 11>& geometry, const std::array<int64_t, 2>& padding, int64_t images, uint64_t out) {
  PatchBitsArgs a{pointer<const uint8_t>(bits), window(geometry), {padding[0], padding[1]}, images, pointer<uint8_t>(out)};
  py::gil_scoped_release release;
  cpu().conv->patch_bits(a);
}

void fold_kept(uint64_t d, uint64_t kept, int64_t count, uint64_t outside, int64_t images, const std::array<int64_t, 11>& geometry,
               const std::array<int64_t, 2>& padding, uint64_t image, int code, bool last) {
  FoldKeptArgs a{pointer<const float>(d), pointer<const int64_t>(kept), count, pointer<const uint8_t>(outside), window(geometry),
                 {padding[0], padding[1]}, images, pointer(image), code, last};
  py::gil_scoped_release release;
  cpu().conv->fold_kept(a);
}

void matmul_int8(int device, uint64_t stream, int64_t m, int64_t n, int64_t k, uint64_t a, uint64_t b, uint64_t a_scales, uint64_t b_scales,
                 uint64_t bias, uint64_t out, int out_code) {
  Int8MatmulArgs args{m, n, k, pointer<const int8_t>(a), pointer<const int8_t>(b), pointer<const float>(a_scales),
                      pointer<const float>(b_scales), pointer<const float>(bias), pointer(out), out_code};
  GM_RUN(cpu().matmul->int8(args), cuda::matmul_int8(args, launch))
}

void matmul_packed(int device, uint64_t stream, const MatrixTuple& x, const MatrixTuple& w, bool transpose, uint64_t bias, uint64_t out, int out_code) {
  const Matrix left = matrix(x);
  PackedMatmulArgs args{left, matrix(w), transpose, pointer<const float>(bias), pointer(out), out_code};
  GM_RUN(cpu().matmul->packed(args), cuda::matmul_packed(args, launch))
}

// --- whole layers -----------------------------------------------------------------------------------------
// Calls of kernels that Python would make one by one, on CPU: operands that nobody sees live in memory of their own.
struct Int8Operand {
  Matrix m;
  Int8Operand(int code, int64_t rows, int64_t cols) : m{malloc(bytes(rows, cols)), nullptr, nullptr, code, rows, cols, cols} {
    if (!m.codes) throw std::bad_alloc();
    m.scales = reinterpret_cast<float*>(static_cast<char*>(m.codes) + scales_at(rows, cols));
  }
  ~Int8Operand() { free(m.codes); }
  Int8Operand(const Int8Operand&) = delete;
  static size_t scales_at(int64_t rows, int64_t cols) { return (static_cast<size_t>(rows) * static_cast<size_t>(cols) + 63) / 64 * 64; }
  static size_t bytes(int64_t rows, int64_t cols) { return scales_at(rows, cols) + static_cast<size_t>(rows) * sizeof(float); }
};

// (address, code, stride, turned): floats, a row every `stride`; `turned`: it is the transpose that lies there
using FloatsTuple = std::tuple<uint64_t, int, int64_t, bool>;
void quantize_floats(const FloatsTuple& x, const Matrix& out, bool transpose, const Key* key) {
  auto [address, code, stride, turned] = x;
  cpu().quant->quantize({pointer(address), code, stride, out, transpose != turned, key, false});
}
void quantize_floats_both(const FloatsTuple& x, const Matrix& rows, const Matrix& columns, const Key* key, const Key* columns_key) {
  auto [address, code, stride, turned] = x;
  if (turned) cpu().quant->quantize_both({pointer(address), code, stride, columns, rows, columns_key, key});
  else cpu().quant->quantize_both({pointer(address), code, stride, rows, columns, key, columns_key});
}
void multiply(const Matrix& a, const Matrix& b, uint64_t bias, uint64_t out, int out_code) {
  cpu().matmul->int8({a.rows, b.rows, a.cols, static_cast<const int8_t*>(a.codes), static_cast<const int8_t*>(b.codes), a.scales, b.scales,
                      pointer<const float>(bias), pointer(out), out_code});
}

// kept_codes 0: nothing is kept
void linear_int8(int64_t tokens, int64_t out, int64_t in, int code, const FloatsTuple& x, const FloatsTuple& w, uint64_t bias, uint64_t y, int y_code,
                 uint64_t kept_codes, uint64_t kept_scales) {
  py::gil_scoped_release release;
  const Int8Operand left(code, tokens, in), right(code, out, in);
  if (kept_codes) quantize_floats_both(x, left.m, {pointer(kept_codes), pointer<float>(kept_scales), nullptr, code, in, tokens, tokens}, nullptr, nullptr);
  else quantize_floats(x, left.m, false, nullptr);
  quantize_floats(w, right.m, false, nullptr);
  multiply(left.m, right.m, bias, y, y_code);
}

// dx or dw 0: it is not wanted, nor what only it needs
void linear_int8_backward(int64_t tokens, int64_t out, int64_t in, int code, const FloatsTuple& dy, const FloatsTuple& w, uint64_t kept_codes,
                          uint64_t kept_scales, const KeyTuple& key, const KeyTuple& turned_key, uint64_t dx, int dx_code, uint64_t dw, int dw_code) {
  const Key row_key = make_key(key), column_key = make_key(turned_key);
  const Key *by_row = key ? &row_key : nullptr, *by_column = key ? &column_key : nullptr;
  py::gil_scoped_release release;
  const Int8Operand rows(code, dx ? tokens : 0, out), columns(code, dw ? out : 0, tokens);
  if (dx && dw) quantize_floats_both(dy, rows.m, columns.m, by_row, by_column);
  else if (dx) quantize_floats(dy, rows.m, false, by_row);
  else quantize_floats(dy, columns.m, true, by_column);
  if (dx) {
    const Int8Operand right(code, in, out);
    quantize_floats(w, right.m, true, nullptr);
    multiply(rows.m, right.m, 0, dx, dx_code);
  }
  if (dw) multiply(columns.m, {pointer(kept_codes), pointer<float>(kept_scales), nullptr, code, in, tokens, tokens}, 0, dw, dw_code);
}

// (codes, scales, code, block), block 0 for a whole row: which rows and columns there are is the expert's business
using StoredTuple = std::tuple<uint64_t, uint64_t, int, int64_t>;
Matrix stored(const StoredTuple& t) {
  auto [codes, scales, code, block] = t;
  return {pointer(codes), pointer<float>(scales), nullptr, code, 0, 0, block};
}

void matmul_grouped(int device, uint64_t stream, bool summed, int64_t experts, int64_t tokens, int64_t m, int64_t n, int64_t k, uint64_t offs,
                    const StoredTuple& a, const StoredTuple& b, uint64_t bias, uint64_t out, int out_code) {
  GroupedArgs args{summed, experts, tokens, m, n, k, pointer<const int32_t>(offs), stored(a), stored(b), pointer<const float>(bias), pointer(out), out_code};
  GM_RUN(cpu().matmul->grouped(args), cuda::matmul_grouped(args, launch))
}

void quantize_grouped(int device, uint64_t stream, uint64_t x, int x_code, int64_t stride, int64_t tokens, int64_t cols, int64_t experts, uint64_t offs,
                      const StoredTuple& out, const KeyTuple& key, bool given) {
  Key k = make_key(key);
  QuantizeGroupedArgs a{pointer(x), x_code, stride, tokens, cols, experts, pointer<const int32_t>(offs), stored(out), key ? &k : nullptr, given};
  GM_RUN(cpu().quant->quantize_grouped(a), cuda::quantize_grouped(a, launch))
}

void pack_bits(int device, uint64_t stream, uint64_t x, int x_code, int64_t stride, int64_t rows, int64_t cols, bool transpose, int planes, bool mean,
               const KeyTuple& key, uint64_t bits, uint64_t scales, uint64_t offsets) {
  Key k = make_key(key);
  PackBitsArgs args{pointer(x), x_code, stride, rows, cols, transpose, planes, mean, key ? &k : nullptr, pointer<uint8_t>(bits),
                    pointer<float>(scales), pointer<float>(offsets)};
  GM_RUN(cpu().binary->pack(args), cuda::pack_bits(args, launch))
}

void matmul_binary(int device, uint64_t stream, int64_t m, int64_t n, int64_t k, int planes, uint64_t a, uint64_t b, uint64_t a_scales, uint64_t offsets,
                   uint64_t b_scales, uint64_t bias, uint64_t counts, uint64_t out, int out_code, int64_t run) {
  BinaryMatmulArgs args{m, n, k, planes, pointer<const uint8_t>(a), pointer<const uint8_t>(b), pointer<const float>(a_scales),
                        pointer<const float>(offsets), pointer<const float>(b_scales), pointer<const float>(bias), pointer<int32_t>(counts),
                        pointer(out), out_code, run};
  GM_RUN(cpu().binary->matmul(args), cuda::matmul_binary(args, launch))
}

void transpose_bits(uint64_t bits, int64_t rows, int64_t cols, uint64_t out) {
  TransposeBitsArgs args{pointer<const uint8_t>(bits), rows, cols, pointer<uint8_t>(out)};
  py::gil_scoped_release release;
  cpu().binary->transpose(args);
}

void gradient_ranges(uint64_t x, int64_t images, int64_t channels, int64_t positions, uint64_t sizes, uint64_t ranges, uint64_t magnitudes,
                     uint64_t channel_ranges, uint64_t channel_magnitudes) {
  GradientRangesArgs args{{pointer<const float>(x), images, channels, positions, pointer<const float>(sizes)}, pointer<float>(ranges),
                          pointer<float>(magnitudes), pointer<float>(channel_ranges), pointer<float>(channel_magnitudes)};
  py::gil_scoped_release release;
  cpu().binary->ranges(args);
}

void pack_gradient(uint64_t x, int64_t images, int64_t channels, int64_t positions, uint64_t sizes, uint64_t kept, int64_t count, int planes,
                   const KeyTuple& key, uint64_t bits, uint64_t scales, uint64_t offsets) {
  Key k = make_key(key);
  PackGradientArgs args{{pointer<const float>(x), images, channels, positions, pointer<const float>(sizes)}, pointer<const int64_t>(kept), count, planes,
                        key ? &k : nullptr, pointer<uint8_t>(bits), pointer<float>(scales), pointer<float>(offsets)};
  py::gil_scoped_release release;
  cpu().binary->pack_gradient(args);
}

void sample_groups(uint64_t ranges, int64_t groups, int64_t bits, double offset, uint64_t kept, uint64_t factors) {
  SampleArgs args{pointer<const float>(ranges), groups, bits, offset, pointer<int64_t>(kept), pointer<float>(factors)};
  py::gil_scoped_release release;
  cpu().binary->sample(args);
}

void matmul_tenants(int device, uint64_t stream, int64_t m, int64_t n, int64_t k, const std::vector<int64_t>& order, const std::vector<int64_t>& tenants,
                    uint64_t x, int x_code, uint64_t bits, uint64_t alphas, uint64_t base, uint64_t out, int out_code) {
  TenantsArgs args{m, n, k, order.data(), tenants.data(), pointer(x), x_code, pointer<const uint8_t>(bits), pointer<const float>(alphas),
                   pointer(base), pointer(out), out_code};
  GM_RUN(cpu().binary->tenants(args), cuda::matmul_tenants(args, launch))
}

// Training of codebooks: on CUDA torch does both.
void codebook_sums(const MatrixTuple& w, uint64_t dw, int64_t groups, uint64_t sums) {
  BookSumsArgs args{matrix(w), pointer<const float>(dw), groups, pointer<double>(sums)};
  py::gil_scoped_release release;
  cpu().codebook->sums(args);
}

void move_indices(const MatrixTuple& w, uint64_t fractions, uint64_t dw, uint64_t rates, const KeyTuple& key, uint64_t first) {
  BookMoveArgs args{matrix(w), pointer<int8_t>(fractions), pointer<const float>(dw), pointer<const float>(rates), make_key(key)};
  args.key.first = first;
  py::gil_scoped_release release;
  cpu().codebook->move(args);
}

void project(int device, uint64_t stream, int64_t m, int64_t n, uint64_t grad, int grad_code, const MatrixTuple& basis, bool left, uint64_t out) {
  ProjectArgs args{m, n, pointer(grad), grad_code, matrix(basis), left, pointer<float>(out)};
  GM_RUN(cpu().projection->project(args), cuda::project(args, launch))
}

void project_back(int device, uint64_t stream, const MatrixTuple& weight, uint64_t update, const MatrixTuple& basis, bool left, float decay,
                  float alpha, const KeyTuple& key, uint64_t first, uint64_t residual, int residual_code, uint64_t residual_scales) {
  ProjectBackArgs args{matrix(weight), pointer<const float>(update), matrix(basis), left, decay, alpha, make_key(key),
                       pointer(residual), residual_code, pointer<const float>(residual_scales)};
  args.key.first = first;
  GM_RUN(cpu().projection->project_back(args), cuda::project_back(args, launch))
}

void dct(int64_t rows, int64_t n, uint64_t x, int x_code, bool columns, uint64_t table, int64_t base, uint64_t out) {
  const DctArgs args{rows, n, pointer(x), x_code, columns, pointer<const float>(table), base, pointer<float>(out)};
  py::gil_scoped_release release;
  cpu().projection->dct(args);
}

// The fp32 step counters' common value; 0 if they differ.
int64_t count(const std::vector<uint64_t>& counters) {
  for (uint64_t at : counters)
    if (*pointer<float>(at) != *pointer<float>(counters[0])) return 0;
  return counters.empty() ? 0 : static_cast<int64_t>(*pointer<float>(counters[0]));
}
// Adds 1 to every fp32 step counter and returns the last. (torch._foreach_add_ takes 1.8 us for each.)
int64_t advance(const std::vector<uint64_t>& counters) {
  float last = 0.0f;
  for (uint64_t at : counters) last = *pointer<float>(at) += 1.0f;
  return static_cast<int64_t>(last);
}

// `table` holds per tensor: param codes, scales, zeros (or low bits), rows, cols, grad, id, first, then (codes, scales) per state.
std::vector<StepTensor> step_tensors(int param_code, int64_t param_block, const std::vector<int>& state_codes, int64_t state_block,
                                     const std::vector<int64_t>& table) {
  const size_t width = 8 + 2 * state_codes.size();
  std::vector<StepTensor> tensors(table.size() / width);
  // A block longer than a row is the whole row.
  auto block_of_row = [](int code, int64_t block, int64_t cols) { return is_blocked(code) && (block == 0 || block > cols) ? cols : block; };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t* t = table.data() + i * width;
    StepTensor& s = tensors[i];
    s.param = {pointer(t[0]), pointer<float>(t[1]), pointer<uint8_t>(t[2]), param_code, t[3], t[4], block_of_row(param_code, param_block, t[4])};
    s.grad = pointer(t[5]);
    s.id = static_cast<uint32_t>(t[6]);
    s.first = static_cast<uint64_t>(t[7]);
    for (size_t k = 0; k < state_codes.size(); ++k)
      s.states[k] = {pointer(t[8 + 2 * k]), pointer<float>(t[9 + 2 * k]), nullptr, state_codes[k], t[3], t[4],
                     block_of_row(state_codes[k], state_block, t[4])};
  }
  return tensors;
}

void fused_step(int device, uint64_t stream, int rule, int param_code, int64_t param_block, int grad_code, const std::vector<int>& state_codes,
                int64_t state_block, const std::vector<int64_t>& table, const std::vector<float>& scalars, uint64_t seed, uint32_t step) {
  const std::vector<StepTensor> tensors = step_tensors(param_code, param_block, state_codes, state_block, table);
  StepArgs args{rule, grad_code, tensors.data(), static_cast<int64_t>(tensors.size()), scalars.data(),
                static_cast<int64_t>(scalars.size() / kMaxScalars), seed, step};
  GM_RUN(cpu().optim->step(args), cuda::fused_step(args, launch))
}

// fused_step on the CPU, scaled by norms of whole tensors, on the CPU: ScaledStepArgs. One row of scalars.
void scaled_step(int rule, int param_code, int64_t param_block, int grad_code, const std::vector<int>& state_codes, int64_t state_block,
                 const std::vector<int64_t>& table, const std::vector<float>& scalars, uint64_t seed, uint32_t step, int apply, double lr,
                 double coefficient, double decay, double factor) {
  const std::vector<StepTensor> tensors = step_tensors(param_code, param_block, state_codes, state_block, table);
  const StepArgs args{rule, grad_code, tensors.data(), static_cast<int64_t>(tensors.size()), scalars.data(), 1, seed, step};
  py::gil_scoped_release release;
  cpu().optim->scaled_step({args, apply, lr, coefficient, decay, factor});
}

// fused_step with a row of scalars and a step per tensor in device memory, read when the kernel runs. CUDA only.
void fused_step_live(int device, uint64_t stream, int rule, int param_code, int64_t param_block, int grad_code, const std::vector<int>& state_codes,
                     int64_t state_block, const std::vector<int64_t>& table, uint64_t scalars, uint64_t counts, uint64_t seed) {
  const std::vector<StepTensor> tensors = step_tensors(param_code, param_block, state_codes, state_block, table);
  const int64_t count = static_cast<int64_t>(tensors.size());
  [[maybe_unused]] const StepArgs args{rule, grad_code, tensors.data(), count, pointer<const float>(scalars), count, seed, 0, pointer<const float>(counts)};
  GM_RUN(throw std::runtime_error("fused_step_live runs on CUDA only"), cuda::fused_step(args, launch))
}

// `table` holds per tensor: address, elements; `limits`: limit, factor.
void measure(int device, uint64_t stream, int code, const std::vector<int64_t>& table, const std::vector<float>& limits, uint64_t partials, uint64_t out) {
  std::vector<MeasureTensor> tensors(table.size() / 2);
  int64_t chunks = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i] = {pointer(table[2 * i]), table[2 * i + 1], chunks, limits[2 * i], limits[2 * i + 1]};
    chunks += (tensors[i].n + kMeasureChunk - 1) / kMeasureChunk;
  }
  MeasureArgs args{code, tensors.data(), static_cast<int64_t>(tensors.size()), pointer<double>(partials), pointer<double>(out)};
  GM_RUN(cpu().optim->measure(args), cuda::measure(args, launch))
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gradmill's native kernels; call them through gradmill.ops";
  const char* cap = std::getenv("GRADMILL_ISA");
  set_isa(cap && *cap ? cap : kLevelNames[kAvx512Vnni]);
  m.def("set_isa", &set_isa);
  m.def("isa", [] { return std::string(kLevelNames[active_level]); });
  m.def("detected_isa", [] { return std::string(kLevelNames[detected_level()]); });
  // Whether torch's bf16 matmul has instructions for it here (twice our fp32 sums; without them it is 4 to 6 times slower).
  m.def("cpu_has_bf16", [] {
#if defined(__x86_64__)
    return active_level >= kAvx512 && __builtin_cpu_supports("avx512bf16") != 0;
#else
    return false;
#endif
  });
  m.attr("compiler") = GM_BUILD_CXX;
  m.attr("nvcc") = GM_BUILD_NVCC;
  m.attr("cuda_archs") = GM_BUILD_CUDA_ARCHS;
  py::dict rules;
  int number = 0;
#define GM_NAME(name, R) rules[name] = py::make_tuple(number++, R::states);
  GM_RULES(GM_NAME)
  m.attr("rules") = rules;  // name -> (number, how many states)
  m.attr("max_scalars") = kMaxScalars;
#ifdef GRADMILL_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("cuda_problem", &cuda::problem);  // why the compiled CUDA part cannot run on this machine, or ""
#else
  m.attr("has_cuda") = false;
  m.def("cuda_problem", [] { return std::string("this gradmill was built without CUDA"); });
#endif
  m.def("quantize", &quantize);
  m.def("quantize_both", &quantize_both);
  m.def("dequantize", &dequantize);
  m.def("quantize_patches", &quantize_patches);
  m.def("fold_patches", &fold_patches);
  m.def("pack_image", &pack_image);
  m.def("patch_bits", &patch_bits);
  m.def("fold_kept", &fold_kept);
  m.def("hadamard", &hadamard);
  m.def("fake_quantize", &fake_quantize);
  m.def("fake_quantize_backward", &fake_quantize_backward);
  m.def("matmul_int8", &matmul_int8);
  m.def("matmul_packed", &matmul_packed);
  m.def("linear_int8", &linear_int8);
  m.def("linear_int8_backward", &linear_int8_backward);
  m.def("matmul_grouped", &matmul_grouped);
  m.def("quantize_grouped", &quantize_grouped);
  m.def("pack_bits", &pack_bits);
  m.def("matmul_binary", &matmul_binary);
  m.def("transpose_bits", &transpose_bits);
  m.def("gradient_ranges", &gradient_ranges);
  m.def("pack_gradient", &pack_gradient);
  m.def("sample_groups", &sample_groups);
  m.def("matmul_tenants", &matmul_tenants);
  m.def("codebook_sums", &codebook_sums);
  m.def("move_indices", &move_indices);
  m.def("project", &project);
  m.def("project_back", &project_back);
  m.def("dct", &dct);
  m.def("count", &count);
  m.def("advance", &advance);
  m.def("fused_step", &fused_step);
  m.def("scaled_step", &scaled_step);
  m.def("fused_step_live", &fused_step_live);
  m.def("measure", &measure);
}
