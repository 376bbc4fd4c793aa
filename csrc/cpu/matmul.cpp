// Matrix products on low-precision operands.
//
// int8: out = (float(sum_k a*b) * a_scale) * b_scale (+ bias), the sum exact for every int8 and any k, so all levels
// give the same bits. 2 m n k operations, (m + n) k bytes in, 4 m n out: bound by multiplies, not memory, above
// m = 16 or so. Per core and cycle: fp32 FMA 16 multiply-adds; vpmaddwd + vpaddd at 256 or 512 bits 32, both taking
// all four vector pipes of a Zen 4 core; vpdpbusd 64. So the limit is 2x fp32 without VNNI and 4x with.
// Measured at 2048 cubed, Zen 4, one thread's CPU time, against torch's fp32 matmul in the same run:
// AVX2 1.77x (105 ms against 186), AVX-512 1.62x, VNNI 4.2x; m = 1 to 64 at 4096 x 4096: AVX2 1.5-2.6x, VNNI 4.3-6.6x.
// In registers vpmaddwd + vpaddd do 95 G products a second, not the 117 that two multiplies a cycle would be: some adds
// take the multipliers' pipes, in whatever order they are written (eight tried). So AVX2 is at 86 % of what can be had;
// packing takes 6 % of the rest.
//
// Codes that all lie in [-64, 63] (format int7): two vpmaddubsw, vpaddw, vpmaddwd, vpaddd for 64 products, 5 instructions
// and 3 multiplies against 8 and 4: 1.33-1.6x predicted, 142 G products a second in registers, 1.5x. Measured: AVX2 2.56x
// torch's fp32 (72.5 ms, 118 G a second, 83 % of that), AVX-512 2.54x. Whether codes fit is looked up, not promised: one pass
// over both operands, which ends at once on codes quantised to 127, so that a result is exact whatever comes in.
// Tried: int16 sums of eight products that may wrap, set right by a term packed with b, widened every four lanes into sums
// in L1: 10 instructions and 5 multiplies for 128 products, 149 G a second in registers, but 136-143 as a microkernel
// against 139 of this one, and b grows by a quarter. Widening every two lanes into L1: 125.
// Counted and dropped: vpmaddubsw with the sign trick needs vpsignb, vpmaddubsw, vpmaddwd and vpaddd for 32 products,
// as many instructions as two vpmaddwd and two vpaddd, and saturates at -128.
//
// packed: float x times an INT8/UINT8/INT4/UINT4 (or plain) weight, accumulated in fp32. Three ways by shape:
//   m <= 4   gemv: 8.4 MB of INT4 at 4096 x 4096 against fp32's 67, but bound by instructions: seven to turn W codes into
//            floats and add them (six with AVX-512), three for codes of 4 or 2 bits at few rows (Fields, below): predicted 2x
//            there. One thread's time at batch 1 on a busy machine: INT4 AVX2 1.48 -> 1.01 ms, AVX-512 1.08 -> 0.85; INT2
//            1.97 -> 1.37 and 1.63 -> 1.24; torch's fp32 3.4-3.6. Two chains of fma waited for each other (4.3 of 4 cycles a span); four, and zero points
//            paid in vectors: groups of 128 1.10 -> 0.83 and 0.89 -> 0.77, as fast from the cache: bound by instructions, and prefetches change nothing.
//   m <= 16  dot products on decoded rows, or added rows when transposed. INT4, m = 16: AVX2 1.4x, AVX-512 1.8x.
//   beyond   the fp32 gemm, dequantising while it packs. INT4, 2048 cubed: AVX2 1.07x, AVX-512 1.03x.
//            Weak: m = 32 is at 1.0x, where packing is not yet paid for.
// Tried: decoding to L1 before the dot product at m = 1 (2.8 ms), gcc's own code for nibbles there (3.6 ms); two sums a
// row instead of four in the gemv (no difference).
#include "gemm.h"

namespace gradmill {
namespace {

constexpr int64_t kFewRows = 16, kFewInt8Rows = 64;  // up to here dot products beat packed panels

// Stores n floats at element `at` of a matrix of plain floats.
inline void store_floats(void* out, int code, int64_t at, const float* x, int64_t n) {
  encode_floats(code, x, nullptr, n, static_cast<char*>(out) + at * code_bits(code) / 8);
}

// --- int8 -------------------------------------------------------------------------------------------------
// What a lane holds, by level: portable one code as a float (no sum of up to 1024 products leaves fp32's exact
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
  static constexpr int rows = MR, step = 1;
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
template <class Sum, bool OFFSET = kOffset>
struct ScaleSums {
  const Int8MatmulArgs& p;
  Sum* too_much;  // with OFFSET: for each column
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
    for (int64_t j = 0; j < n; ++j) out[j] = (static_cast<float>(sums[j] - (OFFSET ? extra[j] : 0)) * a_scale) * b_scales[j];
    if (bias)
      for (int64_t j = 0; j < n; ++j) out[j] += bias[j];
    store_floats(p.out, p.out_code, row * p.n + col, out, n);
  }
};

#if GM_LEVEL == 1 || GM_LEVEL == 2
// Codes of 7 bits, [-64, 63]: four to a lane as bytes, a read as a + 64, 0..127. A vpmaddubsw then gives at most
// 2 * 127 * 64 = 16256 in 16 bits, and two of them add up to 32512 without overflow before vpmaddwd with ones widens
// them. The offset's 64 * sum_k b[j,k] comes from seven_bit.
struct SevenBitLanes : Int8Lanes<int32_t> {
  static constexpr int rows = GM_LEVEL == 1 ? 4 : 12, step = 2;  // registers: sums, four of b, two parts, one of a
  static GM_HD vi products(vi a, vi b) { return multiply_bytes(a, b); }
  static GM_HD vi madd(vi acc, vi part, vi a, vi b) { return madd_pairs(acc, add_pairs(part, multiply_bytes(a, b)), one_pairs()); }
};
constexpr int kSevenBitOffset = 64, kSevenBitPerLane = 4;

template <int OFFSET>
struct SevenBitReader {
  const int8_t* codes;
  int64_t k;
  const lane* read(int64_t row, int64_t from, int64_t lanes, lane* buffer) const {
    int8_t* __restrict out = reinterpret_cast<int8_t*>(buffer);
    const int64_t at = from * kSevenBitPerLane, n = min_of(lanes * kSevenBitPerLane, k - at);
    const int8_t* in = codes + row * k + at;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int8_t>(in[i] + OFFSET);
    for (int64_t i = n; i < lanes * kSevenBitPerLane; ++i) out[i] = 0;
    return buffer;
  }
};

// Whether all codes of the rows are 7-bit ones; if so and `sums` is given, kSevenBitOffset times each row's sum. Ends
// at the first row with another code: an operand quantised to 127 has one in its first row that is not all zero.
bool seven_bit(const int8_t* codes, int64_t rows, int64_t k, int32_t* sums) {
  bool all = true;
#pragma omp parallel for schedule(static) if (rows * k > 1 << 18)
  for (int64_t r = 0; r < rows; ++r) {
    bool so_far;
#pragma omp atomic read
    so_far = all;
    if (!so_far) continue;
    const int8_t* in = codes + r * k;
    uint8_t seen = 0;
    for (int64_t i = 0; i < k; ++i) seen |= static_cast<uint8_t>(in[i] + kSevenBitOffset);
    if (seen & 128) {
#pragma omp atomic write
      all = false;
    } else if (sums) {
      int32_t total = 0;
      for (int64_t i = 0; i < k; ++i) total += in[i];
      sums[r] = kSevenBitOffset * total;
    }
  }
  return all;
}

// Whether the product can be had in 16-bit partial sums; if so, `extra` is what its sums will have too much.
bool seven_bit_product(const Int8MatmulArgs& p, int32_t* extra) {
  return p.m > kFewInt8Rows && p.k > 0 && p.k <= kInt32Products && seven_bit(p.a, 1, p.k, nullptr) && seven_bit(p.b, 1, p.k, nullptr) &&
         seven_bit(p.a, p.m, p.k, nullptr) && seven_bit(p.b, p.n, p.k, extra);
}
#endif

// Few rows: all there is to do, and true. More: what the gemm needs, `extra`.
template <class Sum>
bool few_int8_rows(const Int8MatmulArgs& p, Sum* extra) {
  typedef Int8Lanes<Sum> Lanes;
  const int64_t lanes = divide_up(p.k, kPerLane);
  const Rows<Int8Reader<false>> b{{p.b, p.k, false}};
  if (p.m <= kFewInt8Rows) {
    const Rows<Int8Reader<kOffset>> a{{p.a, p.k, kOffset}};
    dot_products<Lanes>({p.m + kOffset, p.n, lanes}, a, b, ScaleSums<Sum>{p, extra, kOffset});
    return true;
  }
  if (kOffset) {
    const Rows<Int8Reader<kOffset>> zeros{{nullptr, p.k, true}};
    dot_products<Lanes>({1, p.n, lanes}, zeros, b, ScaleSums<Sum>{p, extra, true});
  }
  return false;
}

enum Way : char { kDone, kSevenBits, kShort, kLong };  // how the gemm adds: nothing left to do, in 16, 32 or 64 bits

template <class Sum>
void int8_gemms(const Int8MatmulArgs* p, int64_t count, const Way* ways, Way way, Sum* extra, int64_t pitch) {
  gemm_all<Int8Lanes<Sum>>(count, [=](int64_t i) {
    const Extent e{ways[i] == way ? p[i].m : 0, p[i].n, divide_up(p[i].k, kPerLane)};
    return Problem<Rows<Int8Reader<kOffset>>, Rows<Int8Reader<false>>, ScaleSums<Sum>>{
        e, {{p[i].a, p[i].k, false}}, {{p[i].b, p[i].k, false}}, {p[i], extra + i * pitch, false}};
  });
}

// `count` products of one n.
void int8_matmuls(const Int8MatmulArgs* p, int64_t count) {
  if (count == 0 || p->n == 0) return;
  const int64_t n = p->n;
  Scratch too_much(2 * count * n), all_ways(count);
  int32_t* const extra = reinterpret_cast<int32_t*>(too_much.data);
  int64_t* const long_extra = reinterpret_cast<int64_t*>(too_much.data);
  Way* const ways = reinterpret_cast<Way*>(all_ways.data);
  bool any[4] = {};
  for (int64_t i = 0; i < count; ++i) {
    Way& way = ways[i] = kDone;
    if (p[i].m == 0) continue;
#if GM_LEVEL == 1 || GM_LEVEL == 2
    // extra of 32 bits in the place of long ones: no two products share theirs
    if (seven_bit_product(p[i], extra + 2 * i * n)) way = kSevenBits;
    else
#endif
    if (p[i].k <= kInt32Products) way = few_int8_rows(p[i], extra + 2 * i * n) ? kDone : kShort;
    else way = few_int8_rows(p[i], long_extra + i * n) ? kDone : kLong;
    any[way] = true;
  }
#if GM_LEVEL == 1 || GM_LEVEL == 2
  if (any[kSevenBits])
    gemm_all<SevenBitLanes>(count, [=](int64_t i) {
      const Extent e{ways[i] == kSevenBits ? p[i].m : 0, n, round_up(divide_up(p[i].k, kSevenBitPerLane), SevenBitLanes::step)};
      return Problem<Rows<SevenBitReader<kSevenBitOffset>>, Rows<SevenBitReader<0>>, ScaleSums<int32_t, true>>{
          e, {{p[i].a, p[i].k}}, {{p[i].b, p[i].k}}, {p[i], extra + 2 * i * n, false}};
    });
#endif
  if (any[kShort]) int8_gemms<int32_t>(p, count, ways, kShort, extra, 2 * n);
  if (any[kLong]) int8_gemms<int64_t>(p, count, ways, kLong, long_extra, n);
}

void int8_matmul(const Int8MatmulArgs& p) { int8_matmuls(&p, 1); }

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

#if GM_LEVEL >= 1
// One to kGemvRows rows of x: bound by how fast codes come in, so they go from memory to register, are decoded there
// and multiplied with every row of x on the spot. At least four sums at a time hide the latency of the fma.
constexpr int kGemvRows = 4;

template <class Decoder, int ROWS>
void dot_packed_row(const PackedMatmulArgs& p, const float* x, int64_t j, float* sums, int64_t stride) {
  constexpr int vectors = ROWS <= 2 ? 4 : 2, step = vectors * W;
  constexpr int bytes = W * Decoder::bits / 8;  // of one vector's codes
  const Matrix& w = p.w;
  vf acc[ROWS][vectors];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < vectors; ++v) acc[r][v] = zero();
  for (int64_t start = 0, index = j * w.blocks_per_row(); start < w.cols; start += w.block, ++index) {
    const Block b{w.scales[index], has_zero_point(w.code) ? w.zeros[index] : 0, 0.0f};
    const Decoder decoder(b.zero, b.scale);
    const char* codes = tile_address(w, j, start);
    const int64_t end = min_of(start + w.block, w.cols);
    int64_t k = start;
    for (; k + step <= end; k += step, codes += vectors * bytes)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const vf value = decoder(codes + v * bytes);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) acc[r][v] = fma(load(x + r * w.cols + k + v * W), value, acc[r][v]);
      }
    for (; k < end; k += W, codes += bytes) {
      const int64_t n = min_of(W, end - k);
      float values[W] = {}, xs[W] = {};
      decode_one_block(w.code, codes, b, n, values);
      for (int r = 0; r < ROWS; ++r) {
        memcpy(xs, x + r * w.cols + k, static_cast<size_t>(n) * sizeof(float));
        acc[r][0] = fma(load(xs), load(values), acc[r][0]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 1; v < vectors; ++v) acc[r][0] = add(acc[r][0], acc[r][v]);
    sums[r * stride] = sum(acc[r][0]);
  }
}

// Codes of 4 or 2 bits need not be taken apart. A byte holds `fields` codes q_f; with v_f = its low f + 1 fields,
//   sum_f x_f q_f = sum_f y_f v_f   where y_f = x_f 2^(-f BITS) - x_(f+1) 2^(-(f+1) BITS),
// because every q_f counts 2^(f BITS) in v_f and all later ones. The y are made once for all rows of w, and the zero point
// is paid once a block, from the sum of its x: 4 bits cost one widening, one `and`, two conversions and two fma for 2 W
// weights, 6 instructions instead of 14 (AVX-512: 12). Signed codes are read with their top bit flipped, zero point 2^(BITS - 1).
template <int BITS, bool SIGNED>
struct Fields {
  static constexpr int fields = 8 / BITS, span = fields * W;

  // The y of every whole span of a block, where its x are, and -sum x of each block's spans.
  static void prepare(const Matrix& w, int64_t rows, const float* x, float* y, float* block_sums) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t start = 0; start < w.cols; start += w.block) {
        const int64_t end = min_of(start + w.block, w.cols);
        float total = 0.0f;
        for (int64_t k = r * w.cols + start; k + span <= r * w.cols + end; k += span)
          for (int64_t lane = 0; lane < W; ++lane)
            for (int f = 0; f < fields; ++f) {
              const float here = x[k + lane * fields + f], next = f + 1 < fields ? x[k + lane * fields + f + 1] : 0.0f;
              y[k + f * W + lane] = here * (1.0f / (1 << f * BITS)) - next * (1.0f / (1 << ((f + 1) * BITS & 31)));
              total -= here;
            }
        *block_sums++ = total;
      }
  }

  // What is left of a block after its whole spans. Out of line, so that nothing of it lives in the registers of the loop.
  static float __attribute__((noinline)) rest(int code, const char* codes, Block b, const float* x, int64_t n) {
    float values[span], total = 0.0f;
    decode_one_block(code, codes, b, n, values);
    for (int64_t i = 0; i < n; ++i) total += x[i] * values[i];
    return total;
  }

  template <int ROWS>
  static void dot(const PackedMatmulArgs& p, const float* x, const float* y, const float* block_sums, int64_t j, float* sums, int64_t stride) {
    constexpr int chains = ROWS == 1 ? 4 : 2, together = ROWS == 1 && fields == 2 ? 2 : 1;  // spans; a chain's fma take 4 cycles each
    const Matrix& w = p.w;
    const int64_t blocks = w.blocks_per_row();
    const float* const scales = w.scales + j * blocks;
    const uint8_t* const zero_points = SIGNED ? nullptr : w.zeros + j * blocks;
    vf total[ROWS];
    float zeros[ROWS] = {};
    for (int r = 0; r < ROWS; ++r) {
      total[r] = zero();
      const float* const sums_of = block_sums + r * blocks;
      int64_t b = 0;
      for (; b + W <= blocks; b += W) {
        const vf zero_point = SIGNED ? broadcast(1 << (BITS - 1)) : converted(widened(zero_points + b));
        total[r] = fma(load(scales + b) * zero_point, load(sums_of + b), total[r]);
      }
      for (; b < blocks; ++b) zeros[r] += scales[b] * static_cast<float>(SIGNED ? 1 << (BITS - 1) : zero_points[b]) * sums_of[b];
    }
    for (int64_t start = 0, b = 0; start < w.cols; start += w.block, ++b) {
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(tile_address(w, j, start));
      const int64_t end = min_of(start + w.block, w.cols);
      vf acc[ROWS][chains];
      for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < chains; ++c) acc[r][c] = zero();
      int64_t k = start;
      const auto add_span = [&](int first) __attribute__((always_inline)) {
        const vu bytes = SIGNED ? widened(codes) ^ (BITS == 4 ? 0x88u : 0xaau) : widened(codes);
#pragma GCC unroll 4
        for (int f = 0; f < fields; ++f) {
          const vf value = converted(f + 1 < fields ? bytes & ((1u << (f + 1) * BITS) - 1) : bytes);
          const int chain = (first + f) % chains;
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) acc[r][chain] = fma(load(y + r * w.cols + k + f * W), value, acc[r][chain]);
        }
        k += span, codes += W;
      };
      for (; k + together * span <= end;)
#pragma GCC unroll 2
        for (int t = 0; t < together; ++t) add_span(t * fields);
      if (together > 1 && k + span <= end) add_span(0);
      for (int r = 0; r < ROWS; ++r) {
        if (chains == 4) acc[r][0] = add(acc[r][0], acc[r][chains - 2]), acc[r][1] = add(acc[r][1], acc[r][chains - 1]);
        total[r] = fma(add(acc[r][0], acc[r][1]), broadcast(scales[b]), total[r]);
      }
      if (k < end)
        for (int r = 0; r < ROWS; ++r)
          zeros[r] += rest(w.code, reinterpret_cast<const char*>(codes), block_at(w, j * blocks + b), x + r * w.cols + k, end - k);
    }
    for (int r = 0; r < ROWS; ++r) sums[r * stride] = sum(total[r]) + zeros[r];
  }
};

// rows(j, sums, stride) leaves the sums of x's rows with row j of w.
template <class RowSums>
void each_row(const PackedMatmulArgs& p, const StoreFloats& epilogue, const RowSums& rows) {
  constexpr int64_t chunk = 32;
  const int64_t n = p.w.rows;
  const bool parallel = static_cast<double>(n) * static_cast<double>(p.w.cols) > 3e4;
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t t = 0; t < divide_up(n, chunk); ++t) {
    const int64_t col = t * chunk, live = min_of(chunk, n - col);
    float sums[kGemvRows][chunk];
    for (int64_t j = 0; j < live; ++j) rows(col + j, &sums[0][j], chunk);
    for (int64_t i = 0; i < p.x.rows; ++i) epilogue(i, col, live, sums[i], nullptr);
  }
}

template <class Decoder>
void gemv(const PackedMatmulArgs& p, const float* x, const StoreFloats& epilogue) {
  each_row(p, epilogue, [&](int64_t j, float* sums, int64_t stride) {
    if (p.x.rows == 1) dot_packed_row<Decoder, 1>(p, x, j, sums, stride);
    else if (p.x.rows == 2) dot_packed_row<Decoder, 2>(p, x, j, sums, stride);
    else if (p.x.rows == 3) dot_packed_row<Decoder, 3>(p, x, j, sums, stride);
    else dot_packed_row<Decoder, 4>(p, x, j, sums, stride);
  });
}

template <int BITS, bool SIGNED>
void gemv_fields(const PackedMatmulArgs& p, const float* x, const StoreFloats& epilogue) {
  const int64_t size = p.x.rows * p.w.cols;
  if (BITS == 4 && p.x.rows > 2) return gemv<BitsDecoder<BITS, SIGNED>>(p, x, epilogue);  // as fast there: bound by the fma and loads of x
  for (int64_t i = 0; i < size; ++i)  // an infinite or nearly infinite x must not meet its own negative in the y
    if (!(x[i] < 1e37f && x[i] > -1e37f)) return gemv<BitsDecoder<BITS, SIGNED>>(p, x, epilogue);
  Scratch differences(size), sums(p.x.rows * p.w.blocks_per_row());
  float *const y = reinterpret_cast<float*>(differences.data), *const block_sums = reinterpret_cast<float*>(sums.data);
  Fields<BITS, SIGNED>::prepare(p.w, p.x.rows, x, y, block_sums);
  each_row(p, epilogue, [&](int64_t j, float* out, int64_t stride) {
    using Dot = Fields<BITS, SIGNED>;
    if (p.x.rows == 1) Dot::template dot<1>(p, x, y, block_sums, j, out, stride);
    else if (p.x.rows == 2) Dot::template dot<2>(p, x, y, block_sums, j, out, stride);
    else if (p.x.rows == 3) Dot::template dot<3>(p, x, y, block_sums, j, out, stride);
    else Dot::template dot<4>(p, x, y, block_sums, j, out, stride);
  });
}

// Codebooks. 4-bit indices are used as they lie, a span of them at a time, in whatever order their values come out; x is put into that
// order, y, once for all rows of w.
//   AVX-512  lane l of a vector of 32-bit words has numbers 8 l to 8 l + 7 of a span of 8 W: a shift brings the next W of them to
//            the bottom, a permutation looks them up: 3 instructions with the fma for W weights.
//   AVX2     32 bytes, low nibbles, then high ones: four vpshufb look up the bytes of 32 floats in a codebook cut into bytes, eight vpunpck
//            put them together: 17.5 instructions, 12 of them shuffles, for 4 W weights. Two vpermps and a blend for W took 7.
// Other bits: five and more instructions (book.h). One thread's CPU time at batch 1, 4096 x 4096, on a busy machine, torch's fp32 3.1 to 3.4 ms in the same
// run: AVX2 1 to 4 bits 0.9 to 1.07 ms (4 bits 1.24 with permutations), 5 bits 2.8, 6 bits 5.3, gathers 6.0; AVX-512 4 bits 0.63, others up to 5 bits
// 1.06, 6, 7 and 8 bits 2.1, 2.9 and 4.4 (gathers 6.3 to 6.8). Predicted for 4 bits with AVX2: 524288 runs of 4 W at 6 clocks, 0.85 ms.
#if GM_LEVEL >= 2
constexpr int64_t kBookSpan = 8 * W;
inline int64_t book_order(int64_t i) { return i % W * 8 + i / W; }
#else
constexpr int64_t kBookSpan = 64;
inline int64_t book_order(int64_t i) { return 2 * (i / W % 4 * 4 + i % 4 + i / 4 % 2 * 16) + i / 32; }
#endif

// A codebook of 16 floats as four tables of their first, second, third and fourth bytes.
inline void cut_book(const float* book, uint8_t* out) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t u = float_bits(book[i]);
    for (int b = 0; b < 4; ++b) out[16 * b + i] = static_cast<uint8_t>(u >> 8 * b);
  }
}

template <int ROWS, int CHAINS>
GM_HD void add_book_span(const uint8_t* indices, const float* y, int64_t stride, const Lookup<4>& lookup, const uint8_t* cut, vf (&acc)[ROWS][CHAINS]) {
#if GM_LEVEL >= 2
  (void)cut;
  const vu words = (vu)load_int(indices);
#pragma GCC unroll 8
  for (int f = 0; f < 8; ++f) {
    const vf value = lookup((vi)(words >> 4 * f));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) acc[r][f % CHAINS] = fma(load(y + r * stride + f * W), value, acc[r][f % CHAINS]);
  }
#else
  (void)lookup;
  const vi packed = load_int(indices), low = _mm256_set1_epi8(15);
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const vi index = _mm256_and_si256(h == 0 ? packed : _mm256_srli_epi16(packed, 4), low);
    vi byte[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) byte[b] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(cut) + b)), index);
    const vi lows[2] = {_mm256_unpacklo_epi8(byte[0], byte[1]), _mm256_unpackhi_epi8(byte[0], byte[1])};
    const vi tops[2] = {_mm256_unpacklo_epi8(byte[2], byte[3]), _mm256_unpackhi_epi8(byte[2], byte[3])};
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const vi four = q % 2 == 0 ? _mm256_unpacklo_epi16(lows[q / 2], tops[q / 2]) : _mm256_unpackhi_epi16(lows[q / 2], tops[q / 2]);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) acc[r][q % CHAINS] = fma(load(y + r * stride + (4 * h + q) * W), _mm256_castsi256_ps(four), acc[r][q % CHAINS]);
    }
  }
#endif
}

template <int BITS, int ROWS>
void dot_book_row(const PackedMatmulArgs& p, const float* x, const float* y, const uint8_t* cuts, int64_t j, float* sums, int64_t stride) {
  constexpr int vectors = ROWS <= 2 ? 4 : 2, bytes = W * BITS / 8;
  const int64_t k_end = p.w.cols, whole = whole_vectors<BITS>(p.w, j, 0, k_end);
  const float* const table = book_of(p.w, j);
  const uint8_t* const indices = reinterpret_cast<const uint8_t*>(tile_address(p.w, j, 0));
  const Lookup<BITS> lookup(table);
  vf acc[ROWS][vectors];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < vectors; ++v) acc[r][v] = zero();
  int64_t k = 0;
  if constexpr (BITS == 4)
    for (; k + kBookSpan <= k_end; k += kBookSpan) add_book_span<ROWS, vectors>(indices + k / 2, y + k, k_end, lookup, cuts + 64 * p.w.zeros[j], acc);
  for (; k + vectors * W <= whole; k += vectors * W)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const vf value = lookup(read_indices<BITS>(indices + k * BITS / 8 + v * bytes));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) acc[r][v] = fma(load(x + r * k_end + k + v * W), value, acc[r][v]);
    }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 1; v < vectors; ++v) acc[r][0] = add(acc[r][0], acc[r][v]);
    sums[r * stride] = sum(acc[r][0]);
    for (int64_t i = k; i < k_end; ++i) sums[r * stride] += x[r * k_end + i] * table[book_index<BITS>(indices, i)];
  }
}

void gemv_book(const PackedMatmulArgs& p, const float* x, const StoreFloats& epilogue) {
  const int bits = p.w.code - kBook;
  Scratch ordered(bits == 4 ? p.x.rows * p.w.cols : 0), cut(256 * 16);
  float* const y = reinterpret_cast<float*>(ordered.data);
  uint8_t* const cuts = reinterpret_cast<uint8_t*>(cut.data);
  if (bits == 4) {
    for (int64_t r = 0; r < p.x.rows; ++r)
      for (int64_t k = r * p.w.cols; k + kBookSpan <= (r + 1) * p.w.cols; k += kBookSpan)
        for (int64_t i = 0; i < kBookSpan; ++i) y[k + i] = x[k + book_order(i)];
    int groups = 0;
    for (int64_t j = 0; j < p.w.rows; ++j)
      for (; groups <= p.w.zeros[j]; ++groups) cut_book(p.w.scales + 16 * groups, cuts + 64 * groups);
  }
  with_bits(bits, [&](auto b) {
    constexpr int BITS = decltype(b)::value;
    each_row(p, epilogue, [&](int64_t j, float* sums, int64_t stride) {
      if (p.x.rows == 1) dot_book_row<BITS, 1>(p, x, y, cuts, j, sums, stride);
      else if (p.x.rows == 2) dot_book_row<BITS, 2>(p, x, y, cuts, j, sums, stride);
      else if (p.x.rows == 3) dot_book_row<BITS, 3>(p, x, y, cuts, j, sums, stride);
      else dot_book_row<BITS, 4>(p, x, y, cuts, j, sums, stride);
    });
  });
}
#endif

// Few rows: all there is to do, and true.
bool few_packed_rows(const PackedMatmulArgs& p) {
  if (p.x.rows > kFewRows) return false;
  const int64_t n = p.transpose ? p.w.cols : p.w.rows, k = p.transpose ? p.w.rows : p.w.cols;
  const StoreFloats epilogue{p.out, p.out_code, n, p.bias};
#if GM_LEVEL >= 1
  if (!p.transpose && p.x.rows > 0 && p.x.rows <= kGemvRows && k > 0 && !is_blocked(p.x.code)) {
    Scratch scratch(p.x.rows * k);
    float* const floats = reinterpret_cast<float*>(scratch.data);
    decode_floats(p.x.code, p.x.codes, p.x.rows * k, floats);
    if (is_book(p.w.code)) {
      gemv_book(p, floats, epilogue);
      return true;
    }
    switch (p.w.code) {
      case kInt4: gemv_fields<4, true>(p, floats, epilogue); return true;
      case kUInt4: gemv_fields<4, false>(p, floats, epilogue); return true;
      case kInt3: gemv<BitsDecoder<3, true>>(p, floats, epilogue); return true;
      case kUInt3: gemv<BitsDecoder<3, false>>(p, floats, epilogue); return true;
      case kInt2: gemv_fields<2, true>(p, floats, epilogue); return true;
      case kUInt2: gemv_fields<2, false>(p, floats, epilogue); return true;
      case kSign: gemv<SignDecoder>(p, floats, epilogue); return true;
      case kInt8: case kInt7: gemv<ByteDecoder<true>>(p, floats, epilogue); return true;
      case kUInt8: gemv<ByteDecoder<false>>(p, floats, epilogue); return true;
      case kE4M3: gemv<Float8Decoder<3>>(p, floats, epilogue); return true;
      case kE5M2: gemv<Float8Decoder<2>>(p, floats, epilogue); return true;
      case kE2M1: gemv<Float4Decoder>(p, floats, epilogue); return true;
    }
  }
#endif
  const Rows<FloatReader> x{{p.x}};
  if (p.transpose) add_scaled_rows({p.x.rows, n, k}, x, Columns<FloatReader>{{p.w}}, epilogue);
  else dot_products<FloatLanes>({p.x.rows, n, k}, x, Rows<FloatReader>{{p.w}}, epilogue);
  return true;
}

void packed_matmul(const PackedMatmulArgs& p) {
  if (few_packed_rows(p)) return;
  const int64_t n = p.transpose ? p.w.cols : p.w.rows, k = p.transpose ? p.w.rows : p.w.cols;
  const Rows<FloatReader> x{{p.x}};
  const StoreFloats epilogue{p.out, p.out_code, n, p.bias};
  if (p.transpose) gemm<FloatLanes>({p.x.rows, n, k}, x, Columns<FloatReader>{{p.w}}, epilogue);
  else gemm<FloatLanes>({p.x.rows, n, k}, x, Rows<FloatReader>{{p.w}}, epilogue);
}

// --- experts ----------------------------------------------------------------------------------------------
bool exact(const Matrix& m) { return (m.code == kInt8 || m.code == kInt7) && m.block == 0; }

void grouped_matmul(const GroupedArgs& g) {
  if (g.experts <= 0) return;
  if (exact(g.a) && exact(g.b)) {
    Int8MatmulArgs* const p = static_cast<Int8MatmulArgs*>(malloc(static_cast<size_t>(g.experts) * sizeof(Int8MatmulArgs)));
    if (!p) abort();
    for (int64_t e = 0; e < g.experts; ++e) {
      const Expert x = expert_of(g, e);
      p[e] = {x.m, x.n, x.k, static_cast<const int8_t*>(x.a.codes), static_cast<const int8_t*>(x.b.codes), x.a.scales, x.b.scales, x.bias, x.out, g.out_code};
    }
    int8_matmuls(p, g.experts);
    free(p);
    return;
  }
  Scratch flags(g.experts);
  bool* const done = reinterpret_cast<bool*>(flags.data);
  for (int64_t e = 0; e < g.experts; ++e) {
    const Expert x = expert_of(g, e);
    done[e] = x.m == 0 || x.n == 0 || (!x.by_tokens && few_packed_rows({x.a, x.b, false, x.bias, x.out, g.out_code}));
  }
  const auto extent = [=](const Expert& x, int64_t e) { return Extent{done[e] ? 0 : x.m, x.n, x.k}; };
  const auto store = [=](const Expert& x) { return StoreFloats{x.out, g.out_code, x.n, x.bias}; };
  if (g.summed && !is_blocked(g.a.code))
    gemm_all<FloatLanes>(g.experts, [&](int64_t e) {
      const Expert x = expert_of(g, e);
      return Problem<Columns<FloatReader>, Columns<FloatReader>, StoreFloats>{extent(x, e), {{x.a}}, {{x.b}}, store(x)};
    });
  else
    gemm_all<FloatLanes>(g.experts, [&](int64_t e) {
      const Expert x = expert_of(g, e);
      return Problem<Rows<FloatReader>, Rows<FloatReader>, StoreFloats>{extent(x, e), {{x.a}}, {{x.b}}, store(x)};
    });
}

}  // namespace

const MatmulKernels GM_TABLE(matmul) = {int8_matmul, packed_matmul, grouped_matmul};

}  // namespace gradmill
