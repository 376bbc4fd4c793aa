// Matrix products on low-precision operands: int8 x int8 (exact) and float x packed weight.
#include "gemm.h"

namespace gradmill {
namespace {

constexpr int64_t kFewRows = 16, kFewInt8Rows = 64;  // up to here dot products beat packed panels

// Stores n floats at element `at` of a matrix of plain floats.
inline void store_floats(void* out, int code, int64_t at, const float* x, int64_t n) {
  encode_floats(code, x, nullptr, n, static_cast<char*>(out) + at * code_bits(code) / 8);
}

// --- int8 -------------------------------------------------------------------------------------------------
// What a lane holds, by level: portable one code as a float (no sum of fewer than 1024 products leaves fp32's exact
// range), AVX2 and AVX-512 two as int16 for vpmaddwd, VNNI four as bytes for vpdpbusd.
constexpr int kPerLane = GM_LEVEL == kPortable ? 1 : GM_LEVEL < kAvx512Vnni ? 2 : 4;
// vpdpbusd wants its first operand unsigned, so a is read as a + 128. The products of a row of zeros, 128 *
// sum_k b[j,k], are then what every row's sums have too much.
constexpr bool kOffset = GM_LEVEL == kAvx512Vnni;
// Up to here a sum of products, 255 * 128 each at worst, fits int32. Longer ones are kept in int64.
constexpr int64_t kInt32Products = 65536;

#if GM_LEVEL == 0
typedef float Element;
#elif GM_LEVEL < 3
typedef int16_t Element;
#else
typedef int8_t Element;
#endif

template <class S>
struct Int8Lanes {
  typedef S Sum;
#if GM_LEVEL == 0
  typedef vf Vector;
  static GM_HD Vector none() { return zero(); }
  static GM_HD Vector load_lanes(const lane* p) { return load(p); }
  static GM_HD Vector same(const lane* p) { return broadcast(bits_float(*p)); }
  static GM_HD Vector madd(Vector acc, Vector a, Vector b) { return fma(a, b, acc); }
  static GM_HD Sum total(Vector acc) { return static_cast<int32_t>(sum(acc)); }
  static GM_HD void put(Sum* out, Vector acc, bool first) {
    for (int i = 0; i < W; ++i) out[i] = (first ? 0 : out[i]) + static_cast<int32_t>(acc[i]);
  }
#else
  typedef vi Vector;
  static GM_HD Vector none() { return zero_int(); }
  static GM_HD Vector load_lanes(const lane* p) { return load_int(p); }
  static GM_HD Vector same(const lane* p) { return broadcast_int(static_cast<int32_t>(*p)); }
#if GM_LEVEL >= 3
  static GM_HD Vector madd(Vector acc, Vector a, Vector b) { return madd_quads(acc, a, b); }
#else
  static GM_HD Vector madd(Vector acc, Vector a, Vector b) { return madd_pairs(acc, a, b); }
#endif
  static GM_HD Sum total(Vector acc) { return sum(acc); }
  static GM_HD void put(Sum* out, Vector acc, bool first) {
    if constexpr (sizeof(Sum) == 4) {
      store(out, first ? acc : add(load_int(out), acc));
    } else {
      int32_t part[W];
      store(part, acc);
      for (int i = 0; i < W; ++i) out[i] = (first ? 0 : out[i]) + part[i];
    }
  }
#endif
};

// Rows of k int8 as lanes. With `zero_row`, row 0 is zeros and the stored rows follow it.
template <bool UNSIGNED>
struct Int8Reader {
  const int8_t* codes;
  int64_t k;
  bool zero_row;
  const lane* read(int64_t row, int64_t from, int64_t lanes, lane* buffer) const {
    Element* __restrict out = reinterpret_cast<Element*>(buffer);
    constexpr int offset = UNSIGNED ? 128 : 0;
    const int64_t at = from * kPerLane, n = min_of(lanes * kPerLane, k - at);
    if (zero_row && row == 0) {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Element>(offset);
    } else {
      const int8_t* in = codes + (row - zero_row) * k + at;
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Element>(in[i] + offset);
    }
    for (int64_t i = n; i < lanes * kPerLane; ++i) out[i] = 0;
    return buffer;
  }
};

// out = (float(sum) * a_scale) * b_scale (+ bias): the exact sum is rounded once, then each product once.
template <class Sum>
struct ScaleSums {
  const Int8MatmulArgs& p;
  Sum* too_much;  // with kOffset: for each column
  bool zero_row;
  void operator()(int64_t row, int64_t col, int64_t n, const Sum* __restrict sums, Sum* spare) const {
    if (zero_row && row == 0) {
      memcpy(too_much + col, sums, static_cast<size_t>(n) * sizeof(Sum));
      return;
    }
    row -= zero_row;
    float* __restrict out = reinterpret_cast<float*>(spare);
    const float a_scale = p.a_scales[row], *b_scales = p.b_scales + col, *bias = p.bias ? p.bias + col : nullptr;
    const Sum* extra = too_much + col;
    for (int64_t j = 0; j < n; ++j) out[j] = (static_cast<float>(sums[j] - (kOffset ? extra[j] : 0)) * a_scale) * b_scales[j];
    if (bias)
      for (int64_t j = 0; j < n; ++j) out[j] += bias[j];
    store_floats(p.out, p.out_code, row * p.n + col, out, n);
  }
};

template <class Sum>
void int8_matmul_as(const Int8MatmulArgs& p) {
  typedef Int8Lanes<Sum> Lanes;
  const int64_t lanes = divide_up(p.k, kPerLane);
  const Rows<Int8Reader<false>> b{{p.b, p.k, false}};
  Scratch too_much(kOffset ? p.n * static_cast<int64_t>(sizeof(Sum) / sizeof(lane)) : 0);
  Sum* const extra = reinterpret_cast<Sum*>(too_much.data);
  if (p.m <= kFewInt8Rows) {
    const Rows<Int8Reader<kOffset>> a{{p.a, p.k, kOffset}};
    dot_products<Lanes>({p.m + kOffset, p.n, lanes}, a, b, ScaleSums<Sum>{p, extra, kOffset});
    return;
  }
  if (kOffset) {
    const Rows<Int8Reader<kOffset>> zeros{{nullptr, p.k, true}};
    dot_products<Lanes>({1, p.n, lanes}, zeros, b, ScaleSums<Sum>{p, extra, true});
  }
  const Rows<Int8Reader<kOffset>> a{{p.a, p.k, false}};
  gemm<Lanes>({p.m, p.n, lanes}, a, b, ScaleSums<Sum>{p, extra, false});
}

void int8_matmul(const Int8MatmulArgs& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.k <= kInt32Products) int8_matmul_as<int32_t>(p);
  else int8_matmul_as<int64_t>(p);
}

// --- packed weight ----------------------------------------------------------------------------------------
struct StoreFloats {
  void* out;
  int code;
  int64_t columns;
  const float* bias;
  void operator()(int64_t row, int64_t col, int64_t n, float* __restrict sums, float*) const {
    if (bias)
      for (int64_t j = 0; j < n; ++j) sums[j] += bias[col + j];
    store_floats(out, code, row * columns + col, sums, n);
  }
};

void packed_matmul(const PackedMatmulArgs& p) {
  const int64_t n = p.transpose ? p.w.cols : p.w.rows, k = p.transpose ? p.w.rows : p.w.cols;
  const Extent extent{p.m, n, k};
  const Rows<FloatReader> x{{plain_matrix(p.x, p.x_code, p.m, k)}}, rows{{p.w}};
  const Columns<FloatReader> columns{{p.w}};
  const StoreFloats epilogue{p.out, p.out_code, n, p.bias};
  if (p.transpose && p.m <= kFewRows) add_scaled_rows(extent, x, columns, epilogue);
  else if (p.transpose) gemm<FloatLanes>(extent, x, columns, epilogue);
  else if (p.m <= kFewRows) dot_products<FloatLanes>(extent, x, rows, epilogue);
  else gemm<FloatLanes>(extent, x, rows, epilogue);
}

}  // namespace

const MatmulKernels GM_TABLE(matmul) = {int8_matmul, packed_matmul};

}  // namespace gradmill
