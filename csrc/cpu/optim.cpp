// The fused optimizer step: rule x state format x weight format, many tensors in one call.
//
// The rule is the only template parameter. Formats are decoded and encoded around it on tiles that stay in L1,
// chosen at run time with a branch per block; a plain fp32 operand is not copied, the rule works on it in place,
// so that fp32 AdamW is one bare loop. Counts per element: fp32 AdamW reads 16 and writes 12 bytes; int8 states
// read 10 and write 6 (+ 16/256 for scales): 0.57 of the bytes. Predicted: memory binds both, so 0.57 of the time.
// Measured on 2 cores of a Zen 4, AVX-512, 20M parameters, of the time of torch's fused fp32 step: in minutes of fast memory
// (torch 7.6 ms) fp32 0.91, bf16 0.77; of slow memory (torch 13 ms) 0.96, 0.71. 8- and 4-bit states are bound by arithmetic, not by
// bytes (apply_rule_coded says how far). One thread's CPU time beside other work (busy), before and after the codes were made four
// vectors at a time: int8 1.08-1.16 -> 0.95-1.03, int4 1.12-1.27 -> 1.06, fp8 2.0 -> 1.25, Sophia int8 1.03-1.10 -> 0.86-0.92; AVX2 int8
// 1.46 -> 1.18, int4 1.59 -> 1.31. Quiet, after it, both threads: int8 0.70, int4 0.68, fp8 0.75 of fp32's time in a minute of slow memory,
// int8 1.05 of torch's in one of fast memory, 0.83 held to AVX2; in a whole run later int8 0.69, int4 0.87 of torch's.
// Tried and dropped: prefetching the next unit (a third slower), units of 256 and 1024 elements, handing out chunks in turn.
#include <omp.h>
#include <sched.h>
#include <sys/mman.h>

#include <new>

#include "simd.h"  // before the rules: they call root()

#include "../common/rules.h"
#include "tile.h"

namespace gradmill {
namespace {

// States held as fp32 or bf16, in vectors.
inline vf load_state(const float* p) { return load(p); }
inline vf load_state(const uint16_t* p) { return (vf)(widened(p) << 16); }
inline void store_state(float* p, vf x) { store(p, x); }
inline void store_state(uint16_t* p, vf x) {
  store_narrowed(p, bf16_bits(x));
}

// Written in vectors: left to gcc, a rule with a branch on a scalar (CLASSP's power) stays scalar, ten times slower.
template <class R, class State>
void apply_rule(float* p, const float* g, void* s0, void* s1, void* s2, int64_t n, const float* scalars) {
  float h[kMaxScalars];
  for (int i = 0; i < kMaxScalars; ++i) h[i] = scalars[i];  // known not to alias: stays in registers
  State* const states[kMaxStates] = {static_cast<State*>(s0), static_cast<State*>(s1), static_cast<State*>(s2)};
  auto apply = [&](float* weight, const float* grad, State* const* state, int64_t i) __attribute__((always_inline)) {
    vf w = load(weight + i), s[kMaxStates] = {};
#pragma GCC unroll 3
    for (int k = 0; k < R::states; ++k) s[k] = load_state(state[k] + i);
    R::apply(w, load(grad + i) * h[0], s[0], s[1], s[2], h);
    store(weight + i, w);
#pragma GCC unroll 3
    for (int k = 0; k < R::states; ++k) store_state(state[k] + i, s[k]);
  };
  const int64_t whole = n / W * W, rest = n - whole;
  for (int64_t i = 0; i < whole; i += W) apply(p, g, states, i);
  if (rest) {  // a tail shorter than a vector works on zero-padded copies
    const size_t count = static_cast<size_t>(rest);
    float weight[W] = {}, grad[W] = {};
    State copies[kMaxStates][W] = {};
    State* const state[kMaxStates] = {copies[0], copies[1], copies[2]};
    memcpy(weight, p + whole, count * 4);
    memcpy(grad, g + whole, count * 4);
    for (int k = 0; k < R::states; ++k) memcpy(copies[k], states[k] + whole, count * sizeof(State));
    apply(weight, grad, state, 0);
    memcpy(p + whole, weight, count * 4);
    for (int k = 0; k < R::states; ++k) memcpy(states[k] + whole, copies[k], count * sizeof(State));
  }
}

// Bit s: state s is a second moment, whose 8-bit code is square8; moment8 for the others.
template <class R>
constexpr int kSquares = 6;
template <>
constexpr int kSquares<Adagrad> = 1;
template <>
constexpr int kSquares<Classp> = 1;
template <>
constexpr int kSquares<DiffGrad> = 2;
// Bit s: state s stays bf16 where the others are coded (pyops/optim/rules.py says why).
template <class R>
constexpr int kPlain = 0;
template <>
constexpr int kPlain<Sophia> = 2;

// The codes of a block of states as values, and values as codes. What a second moment's values are encoded from are their roots.
//
// Decoding reads (y - 1) * scale with y a float whose top bits are the code. Here 2y, a whole exponent above it: its lowest exponent
// bits are 0, so the code is put there by an `or`; and as 2y - 2 is exact, one fma gives the very bits of the difference and the product.
// Sixteen values fit a table in registers, made once a block.
template <int CODE>
struct StateCodec {
  typedef OffsetFloat<CODE> F;
  static constexpr int bits = kBits<CODE>;
  float half = 0.0f, scale = 0.0f;
  Table16 table;
  inline void set(float x) {
    half = 0.5f * x, scale = x;
    if (bits != 4) return;
    for (int i = 0; i < 16 / W; ++i) {
      const vu q = lane_numbers() + static_cast<uint32_t>(i * W);
      table.part[i] = value(F::root ? q : q | (0u - (q & 8u)));
    }
  }
  inline vf value(vu q) const {  // a moment's sign is in the lane's top bit
    const vf twice = (vf)((F::root ? q << F::shift : q << F::shift & F::last << F::shift) | 0x40000000u);
#if GM_LEVEL >= 1
    const vf x = fma(twice, broadcast(half), broadcast(-scale));
#else
    const vf x = (twice - 2.0f) * half;
#endif
    return F::root ? x * x : (vf)((vu)x | (q & 0x80000000u));
  }
  inline vf at(const uint8_t* p) const { return bits == 4 ? table[nibbles(p)] : value(F::root ? widened(p) : widened_signed(p)); }

  // Four vectors. A moment's code needs no clamp: the largest of its block has top - 1 + 1/2 of the last step at most.
  static inline vb encoded(const float* x, Block b, vu& word) {
    vf v[4];
    vu k[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = load(x + i * W);
      const vu y = (vu)((F::root ? v[i] : (vf)((vu)v[i] & 0x7fffffffu)) * b.inverse + 1.0f);
      k[i] = (F::root ? y + (word >> (32 - F::shift)) : y - (0x3f800000u - (1u << (F::shift - 1)))) >> F::shift;
      if (F::root) word += W * kDitherStep;
    }
    if (F::root) {
      vb q = packed<(0x3f800000 >> F::shift)>(k[0], k[1], k[2], k[3]);
      constexpr uint8_t last = F::last;
      if (bits == 4) q = q > last ? q * 0 + last : q;
      return q > 1 ? q : q * 0 + 1;
    }
    constexpr uint8_t sign = 1u << (bits - 1);
    vb signs = packed_signs(v[0], v[1], v[2], v[3]);
    if (bits == 4) signs = (vb)((vu)signs >> 4);
    return (packed<0>(k[0], k[1], k[2], k[3]) & static_cast<uint8_t>(~sign)) | (signs & sign);
  }
};

// float8_e4m3fn moments (states="fp8").
template <>
struct StateCodec<kE4M3> {
  static constexpr int bits = 8;
  float scale = 0.0f;
  inline void set(float x) { scale = x; }
  inline vf at(const uint8_t* p) const {
#if GM_LEVEL >= 1
    return Float8Decoder<3>(0, scale)(p);
#else
    vf x;
    for (int i = 0; i < W; ++i) x[i] = decode<kE4M3>(p[i], Block{scale, 0, 0.0f});
    return x;
#endif
  }
  static inline vb encoded(const float* x, Block b, vu&) {
    vu k[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) k[i] = encode_small_float<kE4M3, false>(load(x + i * W), vu{}, b.scale);
    return packed<0>(k[0], k[1], k[2], k[3]);
  }
};

// The dither words' offsets of consecutive blocks, block `at` on: philox_word of each one's first element, many at a time
// (one by one they took 0.07 of int8's 0.75 ns an element).
struct DitherOffsets {
  const Key& key;
  int64_t first, block;
  int64_t begin = 0, end = 0;  // the blocks that words[] holds
  uint32_t words[4 * kGroups];
  inline DitherOffsets(const Key& k, int64_t element, int64_t size) : key(k), first(element + static_cast<int64_t>(k.first)), block(size) {}
  inline uint32_t operator[](int64_t at) {
    const uint64_t element = static_cast<uint64_t>(first + at * block);
    if (block % 4) return philox_word(key, element - key.first);
    if (at >= end) philox_groups(key, element >> 2, words, static_cast<uint64_t>(block) >> 2), begin = at, end = at + kGroups;
    return words[4 * (at - begin) + static_cast<int64_t>(element & 3)];
  }
};

// The same for states in their 8- or 4-bit codes (kSquares), by far the commonest. One pass over
// a block decodes, applies the rule and measures the new block, a second encodes it from L1; the root that the rule took of
// a second moment is kept, because its code stores the root. The second pass comes a block late: what the last vectors of the
// first pass still compute, and the scales, are not waited for (2 to 7% of int8). Written in vectors: in a loop of mixed widths gcc falls back
// to 16-byte vectors.
//
// Counted, vector instructions for W elements of AdamW, AVX-512, int8: decode 5 + 5, rule 15, measure 3, stores 3, encode 7 + 8: 46, of
// 60 before; 41 of them for one of the two 512 bits' worth of pipes: 21 cycles, and 17 for root and division, which run beside.
// Measured in L2, one thread of a Zen 4 whose other threads were busy, ns an element, AVX-512 / AVX2, before and after: AdamW int8 0.68 / 0.90
// -> 0.57 / 0.78, int4 0.75 / 1.01 -> 0.64 / 0.88; Lion int8 0.42 / 0.53 -> 0.36 / 0.45; fp8 1.29 -> 0.80. fp32 states 0.29 / 0.31, bound by
// root and division; bf16 0.43 / 0.66. In such minutes int8 takes 33 cycles, not 21. Tried and dropped: a block's codes made inside the
// next block's pass, vector by vector or four by four (int8 3 to 25% slower).
template <class R, int MOMENT, int SQUARE>
void apply_rule_coded(float* p, const float* g, const Matrix* states, int64_t row, int64_t col, int64_t n, float* scratch,
                      const Key& dither, const float* scalars) {
  typedef StateCodec<MOMENT> M;
  typedef StateCodec<SQUARE> S;
  constexpr int bits = M::bits;
  constexpr int64_t group = 4 * W * 8 / bits;  // values whose codes are made at a time
  float h[kMaxScalars];
  for (int i = 0; i < kMaxScalars; ++i) h[i] = scalars[i];
  constexpr auto square = [](int s) { return (kSquares<R> >> s & 1) != 0; };
  constexpr auto plain = [](int s) { return (kPlain<R> >> s & 1) != 0; };
  const int64_t block = states[0].block, padded = (block + group - 1) / group * group;
  DitherOffsets offsets(dither, row * states[0].cols + col, block);
  // The block that waits to be encoded; as single variables, for in a struct gcc keeps them in memory (a fifth slower).
  uint8_t* before_codes[kMaxStates] = {};
  Block before_blocks[kMaxStates] = {};
  uint32_t before_offset = 0;
  int64_t before = 0;
  float *values = scratch, *before_values = scratch + R::states * padded;
  for (int64_t at = 0; at < n || before > 0; at += block) {
    const int64_t part = at >= n ? 0 : n - at < block ? n - at : block, index = row * states[0].blocks_per_row() + (col + at) / block;
    const int64_t whole = part / W * W, rest = part - whole;
    uint8_t* codes[kMaxStates] = {};
    M moments[kMaxStates];
    S squares[kMaxStates];
    vu absmax[kMaxStates] = {};
#pragma GCC unroll 3
    for (int s = 0; s < R::states && part > 0; ++s) {
      codes[s] = reinterpret_cast<uint8_t*>(tile_address(states[s], row, col + at));
      if (!plain(s)) square(s) ? squares[s].set(states[s].scales[index]) : moments[s].set(states[s].scales[index]);
    }
    auto apply = [&](float* weight, const float* grad, uint8_t* const* from, int64_t i, int64_t scratch_at) __attribute__((always_inline)) {
      vf w = load(weight), state[kMaxStates] = {};
#pragma GCC unroll 3
      for (int s = 0; s < R::states; ++s)
        state[s] = plain(s) ? load_state(reinterpret_cast<uint16_t*>(from[s]) + i) : square(s) ? squares[s].at(from[s] + i * bits / 8) : moments[s].at(from[s] + i * bits / 8);
      R::apply(w, load(grad) * h[0], state[0], state[1], state[2], h);
      store(weight, w);
#pragma GCC unroll 3
      for (int s = 0; s < R::states; ++s) {
        if (plain(s)) {
          store_state(reinterpret_cast<uint16_t*>(from[s]) + i, state[s]);
          continue;
        }
        const vu magnitude = square(s) ? (vu)state[s] : (vu)state[s] & 0x7fffffffu;  // a second moment is never negative
        absmax[s] = magnitude > absmax[s] ? magnitude : absmax[s];
        store(values + s * padded + scratch_at, square(s) ? root(state[s]) : state[s]);
      }
    };
    for (int64_t i = 0; i < whole; i += W) apply(p + at + i, g + at + i, codes, i, i);
    if (rest) {  // a tail shorter than a vector works on zero-padded copies
      float weight[W] = {}, grad[W] = {};
      uint8_t bytes[kMaxStates][2 * W] = {};
      uint8_t* const from[kMaxStates] = {bytes[0], bytes[1], bytes[2]};
      memcpy(weight, p + at + whole, static_cast<size_t>(rest) * 4);
      memcpy(grad, g + at + whole, static_cast<size_t>(rest) * 4);
      const auto bytes_of = [&](int s, int64_t count) { return static_cast<size_t>(count * (plain(s) ? 16 : bits) + 7) / 8; };
      for (int s = 0; s < R::states; ++s) memcpy(bytes[s], codes[s] + bytes_of(s, whole), bytes_of(s, rest));
      apply(weight, grad, from, 0, whole);
      memcpy(p + at + whole, weight, static_cast<size_t>(rest) * 4);
      for (int s = 0; s < R::states; ++s)
        if (plain(s)) memcpy(codes[s] + bytes_of(s, whole), bytes[s], bytes_of(s, rest));
    }
#pragma GCC unroll 3
    for (int s = 0; s < R::states; ++s) {
      const Block b = before_blocks[s];
      if (plain(s) || !(b.scale > 0.0f)) continue;
      vu word = lane_numbers() * kDitherStep + before_offset;
      for (int64_t i = 0; i < before; i += group) {
        uint8_t last[4 * W], *to = i + group <= before ? before_codes[s] + i * bits / 8 : last;
        const float* x = before_values + s * padded + i;
        const vb q = square(s) ? S::encoded(x, b, word) : M::encoded(x, b, word);
        if constexpr (bits == 4) store_in_order(to, q, square(s) ? S::encoded(x + 4 * W, b, word) : M::encoded(x + 4 * W, b, word));
        else store_in_order(to, q);
        if (i + group <= before) continue;
        if (bits == 4 && before % 2) last[(before - i) / 2] &= 15;  // no code in the other half
        memcpy(before_codes[s] + i * bits / 8, last, static_cast<size_t>((before - i) * bits + 7) / 8);
      }
    }
#pragma GCC unroll 3
    for (int s = 0; s < R::states && part > 0; ++s) {
      if (plain(s)) continue;
      before_blocks[s] = block_of(square(s) ? SQUARE : MOMENT, largest(absmax[s]) & 0x7fffffffu, 0, 0);
      states[s].scales[index] = before_blocks[s].scale;
      before_codes[s] = codes[s];
      if (!(before_blocks[s].scale > 0.0f)) memset(codes[s], 0, static_cast<size_t>(part * bits + 7) / 8);
    }
    if (part > 0 && kSquares<R> % (1 << R::states) != 0) before_offset = offsets[at / block];
    before = part;
    float* const other = values;
    values = before_values, before_values = other;
  }
}

using ApplyFn = void (*)(float*, const float*, void*, void*, void*, int64_t, const float*);
using CodedFn = void (*)(float*, const float*, const Matrix*, int64_t, int64_t, int64_t, float*, const Key&, const float*);
struct RuleEntry {
  ApplyFn apply, apply_bf16;  // states in fp32, in bf16
  CodedFn apply_8bit, apply_4bit, apply_fp8;
  int states, squares, plains;
};
const RuleEntry kRules[] = {
#define GM_ENTRY(name, R) {apply_rule<R, float>, apply_rule<R, uint16_t>, apply_rule_coded<R, kMoment8, kSquare8>, apply_rule_coded<R, kMoment4, kSquare4>, \
                              apply_rule_coded<R, kE4M3, kSquare8>, R::states, kSquares<R>, kPlain<R>},
    GM_RULES(GM_ENTRY)
#undef GM_ENTRY
};

// A tensor's work is cut into units of `unit` elements of one row; units are the smallest piece that can be
// encoded alone (whole blocks). Tensors whose formats have no blocks count as one long row.
struct Shape {
  int64_t rows, cols, unit, per_row;
};

Shape shape_of(const StepTensor& t, int states) {
  bool blocked = is_blocked(t.param.code);
  int64_t unit = blocked ? t.param.block : 0;
  for (int s = 0; s < states; ++s)
    if (is_blocked(t.states[s].code)) {
      blocked = true;
      if (t.states[s].block > unit) unit = t.states[s].block;  // Python checked that they divide each other
    }
  // Blocks that fill rows, and rows that fill bytes, lie in memory as in one long row.
  auto fills = [](const Matrix& m) { return !is_blocked(m.code) || (m.cols % m.block == 0 && m.cols * code_bits(m.code) % 8 == 0); };
  bool whole = fills(t.param);
  for (int s = 0; s < states; ++s) whole &= fills(t.states[s]);
  if (whole) blocked = false;
  Shape shape;
  shape.rows = blocked ? t.param.rows : 1;
  shape.cols = blocked ? t.param.cols : t.param.rows * t.param.cols;
  if (!unit) {
    unit = kTile;
  } else {
    int64_t blocks = unit;
    while (unit < kTile && unit < shape.cols) unit += blocks;
  }
  shape.unit = unit;
  shape.per_row = (shape.cols + unit - 1) / unit;
  return shape;
}

Matrix flattened(Matrix m) {
  m.cols *= m.rows;
  m.rows = 1;
  return m;
}

void step_units(const StepTensor& t, const StepArgs& a, const float* h, Shape shape, int64_t begin, int64_t end, float* scratch) {
  const RuleEntry& rule = kRules[a.rule];
  StepTensor view = t;
  if (shape.rows == 1) {
    view.param = flattened(t.param);
    for (int s = 0; s < rule.states; ++s) view.states[s] = flattened(t.states[s]);
  }
  const Key key{a.seed, a.step, t.id << 8 | kWeightRounding, t.first}, dither{a.seed, a.step, t.id << 8 | kDither, t.first};
  float *p_buffer = scratch, *old_buffer = scratch + shape.unit, *g_buffer = scratch + 2 * shape.unit, *s_buffer = scratch + 3 * shape.unit;
  const bool p_plain = view.param.code == kF32, p_blocked = is_blocked(view.param.code);
  auto stored_as = [&](int moment, int square, int plain) {
    for (int i = 0; i < rule.states; ++i) {
      const bool is_plain = (rule.plains >> i & 1) != 0;
      if (view.states[i].code != (is_plain ? plain : (rule.squares >> i & 1) != 0 ? square : moment)) return false;
      if (!is_plain && view.states[i].block != view.states[0].block) return false;
    }
    return true;
  };
  const bool plain = stored_as(kF32, kF32, kF32), bf16 = !plain && stored_as(kBF16, kBF16, kBF16);
  const CodedFn coded = plain || bf16                           ? nullptr
                        : stored_as(kMoment8, kSquare8, kBF16) ? rule.apply_8bit
                        : stored_as(kMoment4, kSquare4, kBF16) ? rule.apply_4bit
                        : stored_as(kE4M3, kSquare8, kBF16)    ? rule.apply_fp8
                                                               : nullptr;
  for (int64_t u = begin; u < end; ++u) {
    int64_t row = u / shape.per_row, col = u % shape.per_row * shape.unit;
    int64_t n = shape.cols - col < shape.unit ? shape.cols - col : shape.unit;
    if (p_plain && a.grad_code == kF32 && (coded || bf16 || plain)) {  // nothing to decode here: one loop over the row's units
      const int64_t more = end - u < shape.per_row - u % shape.per_row ? end - u : shape.per_row - u % shape.per_row;
      n = shape.cols - col < more * shape.unit ? shape.cols - col : more * shape.unit;
      u += more - 1;
    }
    float* p = p_plain ? reinterpret_cast<float*>(tile_address(view.param, row, col)) : p_buffer;
    if (!p_plain) decode_tile(view.param, row, col, n, p);
    if (p_blocked) memcpy(old_buffer, p, static_cast<size_t>(n) * 4);
    auto store_param = [&] {
      if (p_plain) return;
      const bool rounds = p_blocked || view.param.code == kBF16 || is_split(view.param.code);
      update_tile(view.param, row, col, n, p_blocked ? old_buffer : nullptr, p, rounds ? &key : nullptr);
    };
    const char* grad = static_cast<const char*>(t.grad) + (row * shape.cols + col) * code_bits(a.grad_code) / 8;
    const float* g = reinterpret_cast<const float*>(grad);
    if (a.grad_code != kF32) decode_floats(a.grad_code, grad, n, g_buffer), g = g_buffer;
    if (coded) {
      coded(p, g, view.states, row, col, n, s_buffer, dither, h);
      store_param();
      continue;
    }
    if (plain || bf16) {
      char* at[kMaxStates] = {};
      for (int s = 0; s < rule.states; ++s) at[s] = tile_address(view.states[s], row, col);
      (plain ? rule.apply : rule.apply_bf16)(p, g, at[0], at[1], at[2], n, h);
      store_param();
      continue;
    }
    float* states[kMaxStates] = {s_buffer, s_buffer, s_buffer};
    for (int s = 0; s < rule.states; ++s) {
      const Matrix& m = view.states[s];
      states[s] = m.code == kF32 ? reinterpret_cast<float*>(tile_address(m, row, col)) : s_buffer + s * shape.unit;
      if (m.code != kF32) decode_tile(m, row, col, n, states[s]);
    }
    rule.apply(p, g, states[0], states[1], states[2], n, h);
    for (int s = 0; s < rule.states; ++s)
      if (view.states[s].code != kF32)
        encode_tile(view.states[s], row, col, n, states[s], is_square(view.states[s].code) ? &dither : nullptr, true);
    store_param();
  }
}

struct Task {
  int64_t tensor, begin, end;
};

void step(const StepArgs& a) {
  const int states = kRules[a.rule].states;
  int64_t tasks_count = 0, elements = 0, unit_max = 0;
  for (int64_t i = 0; i < a.count; ++i) elements += a.tensors[i].param.rows * a.tensors[i].param.cols;
  // Elements of a task: at most 1.8 MB of fp32 AdamW's traffic, and some tasks for every thread, that all end together.
  int64_t chunk = elements / (8 * omp_get_max_threads());
  chunk = chunk < 1 << 11 ? 1 << 11 : chunk > 1 << 16 ? 1 << 16 : chunk;
  for (int64_t i = 0; i < a.count; ++i) {
    Shape s = shape_of(a.tensors[i], states);
    int64_t units = s.rows * s.per_row, per_task = chunk / s.unit > 0 ? chunk / s.unit : 1;
    tasks_count += (units + per_task - 1) / per_task;
    if (s.unit > unit_max) unit_max = s.unit;
  }
  if (tasks_count == 0) return;
  Task* tasks = static_cast<Task*>(malloc(sizeof(Task) * static_cast<size_t>(tasks_count)));
  int64_t at = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    Shape s = shape_of(a.tensors[i], states);
    int64_t units = s.rows * s.per_row, per_task = chunk / s.unit > 0 ? chunk / s.unit : 1;
    for (int64_t u = 0; u < units; u += per_task) tasks[at++] = {i, u, u + per_task < units ? u + per_task : units};
  }
#pragma omp parallel if (elements > 16384)
  {
    const size_t floats = static_cast<size_t>(unit_max + 8 * W + 15) / 16 * 16 * (3 + 2 * kMaxStates);  // + 8 W: padded tails
    float* scratch = static_cast<float*>(aligned_alloc(64, floats * 4));  // a vector across two cache lines costs double
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tasks_count; ++i) {
      const StepTensor& t = a.tensors[tasks[i].tensor];
      const float* h = a.scalars + (a.scalar_rows > 1 ? tasks[i].tensor * kMaxScalars : 0);
      step_units(t, a, h, shape_of(t, states), tasks[i].begin, tasks[i].end, scratch);
    }
    free(scratch);
  }
  free(tasks);
}

// --- norms ------------------------------------------------------------------------------------------------
// Reads every byte once and computes next to nothing: bound by memory, predicted 1.0 ms for 10.5M fp32 values at 41 GB/s. Measured, one busy thread of a
// Zen 4, ns a value beyond the cache: 0.30 as gcc vectorised it, 0.2 to 0.25 in vectors; in the cache 0.12.
void halve(double (&sums)[kMeasureLanes]) {
  for (int half = kMeasureLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
}

// Squares are exact in double, so that a fused multiply-add rounds as product and sum do.
struct Squares {
  typedef float half __attribute__((vector_size(2 * W)));
  typedef double wide __attribute__((vector_size(4 * W)));
  static constexpr int parts = 2 * kMeasureLanes / W;
  wide sums[parts] = {};
  inline void add(const float* from) {  // a value for every lane
#pragma GCC unroll 16
    for (int k = 0; k < parts; ++k) {
      half h;
      memcpy(&h, from + k * W / 2, sizeof h);
      const wide v = __builtin_convertvector(h, wide);
#if GM_LEVEL >= 2
      sums[k] = _mm512_fmadd_pd(v, v, sums[k]);
#elif GM_LEVEL == 1
      sums[k] = _mm256_fmadd_pd(v, v, sums[k]);
#else
      sums[k] += v * v;
#endif
    }
  }
  inline double sum() const {
    double lanes[kMeasureLanes];
    memcpy(lanes, sums, sizeof lanes);
    halve(lanes);
    return lanes[0];
  }
};

// n <= kMeasureChunk values of a chunk.
void measure_values(const float* x, int64_t n, double* out) {
  Squares squares;
  vu top{};
  auto add = [&](const float* from) __attribute__((always_inline)) {
    squares.add(from);
#pragma GCC unroll 8
    for (int k = 0; k < kMeasureLanes; k += W) {
      const vu magnitude = (vu)load(from + k) & 0x7fffffffu;
      top = magnitude > top ? magnitude : top;
    }
  };
  int64_t i = 0;
  for (; i + kMeasureLanes <= n; i += kMeasureLanes) add(x + i);
  if (i < n) {  // zeros add nothing
    float rest[kMeasureLanes] = {};
    memcpy(rest, x + i, static_cast<size_t>(n - i) * 4);
    add(rest);
  }
  out[0] = squares.sum();
  out[1] = static_cast<double>(bits_float(largest(top)));
}

void measure_chunk(const MeasureTensor& t, int code, int64_t begin, double* out) {
  float buffer[kMeasureChunk];
  const int64_t n = t.n - begin < kMeasureChunk ? t.n - begin : kMeasureChunk;
  const char* at = static_cast<const char*>(t.x) + begin * code_bits(code) / 8;
  const float* x = reinterpret_cast<const float*>(at);
  if (code != kF32) decode_floats(code, at, n, buffer), x = buffer;
  const float limit = t.limit, factor = t.factor;
  if (limit < INFINITY) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = fabsf(x[i]) > limit ? x[i] * factor : x[i];
    x = buffer;
  }
  measure_values(x, n, out);
}

// A tensor's two numbers from those of its chunks.
void add_chunks(const double* partial, int64_t count, double* out) {
  double sums[kMeasureLanes] = {};
  uint32_t largest = 0;
  for (int64_t c = 0; c < count; ++c) {
    const uint32_t magnitude = magnitude_bits(static_cast<float>(partial[2 * c + 1]));
    sums[c % kMeasureLanes] += partial[2 * c];
    largest = magnitude > largest ? magnitude : largest;
  }
  halve(sums);
  out[0] = sums[0];
  out[1] = static_cast<double>(bits_float(largest));
}

void measure(const MeasureArgs& a) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < a.count; ++i) chunks += (a.tensors[i].n + kMeasureChunk - 1) / kMeasureChunk;
#pragma omp parallel for schedule(static) if (chunks > 4)
  for (int64_t c = 0; c < chunks; ++c) {
    int64_t low = 0, high = a.count;  // the last tensor that starts at this chunk or before
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (a.tensors[middle].first > c ? high : low) = middle;
    }
    measure_chunk(a.tensors[low], a.code, (c - a.tensors[low].first) * kMeasureChunk, a.partials + 2 * c);
  }
  for (int64_t i = 0; i < a.count; ++i)
    add_chunks(a.partials + 2 * a.tensors[i].first, (a.tensors[i].n + kMeasureChunk - 1) / kMeasureChunk, a.out + 2 * i);
}

// --- steps scaled by norms --------------------------------------------------------------------------------
// LAMB and LARS: a tensor's rate follows from norms of the whole tensor. What the norms need (LAMB: the update, left in `room`; LARS: the
// gradient) comes first, piece by piece, and the tensor's own step when all of it is there, in the opposite order, each piece by the thread
// that had it first: of a tensor that fits the cache the second pass finds weight and update there. Small tensors share one wait.
//
// Whose cache matters: the pieces used to change hands in the second pass, and where the two processors of this machine share no L3 (AdamW is
// fastest then, with the bandwidth of both: 0.4 ns) LAMB took 2.0 to 2.3 ns a parameter and LARS 1.4 to 1.9; now 0.7 to 1.3 and 0.55 to 1.0 whatever
// the minute. Nor are there OpenMP barriers, 40 in a step of 19 weights: a thread whose partner had been sent off its processor span there for
// whole time slices. With five other processes on two processors (AdamW 2 to 3) LAMB went from 5 to 23 to 2.2 to 5, LARS from 4 to 33 to 1.7 to 4.
//
// A piece holds whole measuring chunks and whole units: the norms are those of `measure` to the last bit.
//
// Counted, bytes an element with fp32 states. LAMB: read weight, gradient, moments and write moments and update, 28; apply it, 12: 40 of memory
// beyond the cache, 28 within, where the two halves as ops of their own took 56 (a copy of the weight and two norms more). LARS: two norms 8, the
// step 20; within the cache 20. Predicted, of the ops' time: LAMB 0.5 to 0.71, LARS 0.71 to 1. Measured on one thread of a Zen 4 whose others
// were busy, ns an element, 19.9M in tensors of 1M (AdamW fp32 0.57 to 0.62; an in-place pass over 28 bytes 0.55 to 0.62): LAMB fp32 1.81 ->
// 0.94 to 0.99, int8 1.89 -> 1.40; LARS fp32 0.90 -> 0.65 to 0.77, int8 0.91 -> 0.69 to 0.73. LAMB's first pass copied, measured and stepped chunk by chunk instead
// (one loop over four streams each) took 1.5: the copies and the loops wait for memory in turn. So int8 and other formats, whose
// weights are decoded first, still do.
struct Piece {
  Shape shape;
  int64_t units, tasks;  // units of a task; tasks of the tensor
};

Piece piece_of(const StepTensor& t, int states) {
  constexpr int64_t aim = 1 << 15;
  Piece p{shape_of(t, states), 0, 0};
  const Shape& s = p.shape;
  int64_t units = s.rows == 1 ? 1 : s.per_row, elements = s.rows == 1 ? s.unit : s.cols, common = elements, rest = kMeasureChunk;
  while (rest != 0) {
    const int64_t r = common % rest;
    common = rest, rest = r;
  }
  units *= kMeasureChunk / common, elements *= kMeasureChunk / common;  // the least common multiple
  p.units = units * (elements < aim ? aim / elements : 1);
  p.tasks = (s.rows * s.per_row + p.units - 1) / p.units;
  return p;
}

// Number of the first element of unit u.
int64_t element_of(const Shape& s, int64_t u) {
  const int64_t row = u / s.per_row, col = u % s.per_row * s.unit;
  return row * s.cols + (col < s.cols ? col : s.cols);
}

// out: a pair for every chunk of [begin, end)
void measure_elements(const void* x, int code, int64_t begin, int64_t end, double* out) {
  const MeasureTensor whole{x, end, 0, INFINITY, 1.0f};
  for (int64_t at = begin; at < end; at += kMeasureChunk, out += 2) measure_chunk(whole, code, at, out);
}

void decode_units(const StepTensor& t, const Shape& s, int64_t begin, int64_t end, float* out) {
  const Matrix m = s.rows == 1 ? flattened(t.param) : t.param;
  if (!is_blocked(m.code) && s.rows == 1) return decode_tile(m, 0, begin * s.unit, element_of(s, end) - begin * s.unit, out);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t col = u % s.per_row * s.unit, n = s.cols - col < s.unit ? s.cols - col : s.unit;
    decode_tile(m, u / s.per_row, col, n, out);
    out += n;
  }
}

// apply_rule on copies u of the weights p, and the squares of both for every chunk: one pass over memory.
template <class R, class State>
void update_and_measure(const float* p, float* u, const float* g, void* s0, void* s1, int64_t n, const float* scalars, double* weights, double* updates) {
  float h[kMaxScalars];
  for (int i = 0; i < kMaxScalars; ++i) h[i] = scalars[i];
  State *const m = static_cast<State*>(s0), *const v = static_cast<State*>(s1);
  for (int64_t begin = 0; begin < n; begin += kMeasureChunk, weights += 2, updates += 2) {
    const int64_t end = begin + kMeasureChunk < n ? begin + kMeasureChunk : n;
    Squares of_p, of_u;
    int64_t i = begin;
    for (; i + kMeasureLanes <= end; i += kMeasureLanes) {
      of_p.add(p + i);
#pragma GCC unroll 8
      for (int64_t k = i; k < i + kMeasureLanes; k += W) {
        vf w = load(p + k), first = load_state(m + k), second = load_state(v + k), unused{};
        R::apply(w, load(g + k) * h[0], first, second, unused, h);
        store(u + k, w);
        store_state(m + k, first);
        store_state(v + k, second);
      }
      of_u.add(u + i);
    }
    if (i < end) {
      float rest[kMeasureLanes] = {};
      memcpy(rest, p + i, static_cast<size_t>(end - i) * 4);
      of_p.add(rest);
      memcpy(u + i, rest, static_cast<size_t>(end - i) * 4);
      apply_rule<R, State>(u + i, g + i, m + i, v + i, nullptr, end - i, scalars);
      memcpy(rest, u + i, static_cast<size_t>(end - i) * 4);
      of_u.add(rest);
    }
    weights[0] = of_p.sum(), weights[1] = 0.0;
    updates[0] = of_u.sum(), updates[1] = 0.0;
  }
}

// The rate of one tensor from the sums of squares of its weight and of its update or gradient, in double as Python computes it.
double scaled_rate(const ScaledStepArgs& a, double weight, double other) {
  const double w = sqrt(weight), o = sqrt(other);
  if (!(w > 0.0 && o > 0.0)) return a.lr;
  if (a.apply < 0) return a.lr * (a.coefficient * w / (a.factor * o + a.decay * w));
  const double ratio = w / o;
  return a.lr * (a.coefficient < ratio ? a.coefficient : ratio);  // a nan stays
}

// Waits until the count has come to `least`. The one it waits for may have lost its processor to this very thread: OpenMP's barriers spin a time
// slice away there.
void wait_for(const int64_t* counter, int64_t least) {
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < least; ++spins) {
    if (spins > 256)
      sched_yield();
#if defined(__x86_64__)
    else
      __builtin_ia32_pause();
#endif
  }
}

void scaled_step(const ScaledStepArgs& a) {
  constexpr int64_t together = 1 << 18;  // elements of small tensors between two barriers
  const bool lamb = a.apply >= 0;
  const int states = kRules[a.step.rule].states;
  const int64_t count = a.step.count;
  const auto elements = [&](int64_t i) { return a.step.tensors[i].param.rows * a.step.tensors[i].param.cols; };
  int64_t unit_max = 1, most = 0, chunks_most = 0, run_first = 0, run = 0, chunks = 0, tasks_most = 0, piece_most = 0;
  struct Place {
    Piece piece;
    int64_t room, chunk, task;  // where it begins in the room, among its run's chunks and among its run's tasks
    int64_t first;              // of its run
  };
  Place* const places = static_cast<Place*>(malloc(sizeof(Place) * static_cast<size_t>(count > 0 ? count : 1)));
  if (!places) throw std::bad_alloc();
  int64_t task = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = elements(i);
    if (run >= together) run = 0, chunks = 0, task = 0, run_first = i;
    Place& p = places[i];
    p.piece = piece_of(a.step.tensors[i], states);
    p.room = run, p.chunk = chunks, p.task = task, p.first = run_first;
    run += (n + 15) / 16 * 16, chunks += (n + kMeasureChunk - 1) / kMeasureChunk, task += p.piece.tasks;
    most = run > most ? run : most, chunks_most = chunks > chunks_most ? chunks : chunks_most, tasks_most = task > tasks_most ? task : tasks_most;
    const int64_t unit = p.piece.shape.unit, size = element_of(p.piece.shape, p.piece.units);
    unit_max = unit > unit_max ? unit : unit_max, piece_most = size > piece_most ? size : piece_most;
  }
  // Of a tensor beyond glibc's 32 MB the room is fresh memory in every call: huge pages, or the kernel faults in 4 KB at a time.
  const size_t huge = size_t{1} << 21, room_bytes = static_cast<size_t>(most + 16) / 16 * 64, room_align = room_bytes < 8 * huge ? 64 : huge;
  float* const room = lamb ? static_cast<float*>(aligned_alloc(room_align, (room_bytes + room_align - 1) / room_align * room_align)) : nullptr;
#ifdef MADV_HUGEPAGE
  if (room && room_align == huge) madvise(room, room_bytes, MADV_HUGEPAGE);
#endif
  double* const partials = static_cast<double*>(malloc(static_cast<size_t>(chunks_most + 1) * 32));  // of weights, then of the others
  struct Turn {
    int64_t pass, owner;  // the last pass that a thread took the task in; who took it in a first one
  };
  Turn* const turns = static_cast<Turn*>(calloc(static_cast<size_t>(tasks_most + 1), sizeof(Turn)));
  if (!partials || !turns || (lamb && !room)) {  // nothing is written yet
    free(partials);
    free(turns);
    free(room);
    free(places);
    throw std::bad_alloc();
  }
  StepArgs apply = a.step;
  apply.rule = a.apply, apply.grad_code = kF32;
  alignas(64) int64_t done = 0;  // tasks of all passes
#pragma omp parallel if (most > 16384)
  {
    const size_t floats = static_cast<size_t>(unit_max + 8 * W + 15) / 16 * 16 * (3 + 2 * kMaxStates);
    float* const scratch = static_cast<float*>(aligned_alloc(64, floats * 4));
    float* decoded = nullptr;  // LARS's weights where they are not floats
    int64_t known = -1;        // the tensor that h belongs to; every thread finds it for itself
    float h[kMaxScalars];
    const auto find = [&](int64_t i) {
      double w[2], o[2];
      const int64_t chunks_of = (elements(i) + kMeasureChunk - 1) / kMeasureChunk;
      add_chunks(partials + 2 * places[i].chunk, chunks_of, w);
      add_chunks(partials + 2 * (chunks_most + places[i].chunk), chunks_of, o);
      const float rate = static_cast<float>(scaled_rate(a, w[0], o[0]));
      memcpy(h, a.step.scalars, sizeof h);
      if (lamb) {  // Sgd's: of the update as it is, without decay
        memset(h, 0, sizeof h);
        h[0] = h[1] = 1.0f, h[2] = rate;
      } else {
        h[3] = rate;
      }
      known = i;
    };
    const auto measure_piece = [&](const StepTensor& t, const Place& p, int64_t u0, int64_t u1) {
      const int64_t begin = element_of(p.piece.shape, u0), end = element_of(p.piece.shape, u1);
      double* const weights = partials + 2 * (p.chunk + begin / kMeasureChunk);
      double* const others = weights + 2 * chunks_most;
      if (lamb) {
        StepTensor update = t;
        update.param = {room + p.room, nullptr, nullptr, kF32, t.param.rows, t.param.cols, 0};
        const int code = t.states[0].code;
        if (t.param.code == kF32 && a.step.grad_code == kF32 && code == t.states[1].code && (code == kF32 || code == kBF16)) {
          const auto at_begin = [&](void* x, int bits) { return static_cast<char*>(x) + begin * bits / 8; };
          return (code == kF32 ? update_and_measure<Lamb, float> : update_and_measure<Lamb, uint16_t>)(
              reinterpret_cast<const float*>(at_begin(t.param.codes, 32)), room + p.room + begin, static_cast<const float*>(t.grad) + begin,
              at_begin(t.states[0].codes, code_bits(code)), at_begin(t.states[1].codes, code_bits(code)), end - begin, a.step.scalars, weights, others);
        }
        decode_units(t, p.piece.shape, u0, u1, room + p.room + begin);
        measure_elements(room + p.room, kF32, begin, end, weights);
        step_units(update, a.step, a.step.scalars, p.piece.shape, u0, u1, scratch);
        return measure_elements(room + p.room, kF32, begin, end, others);
      }
      if (t.param.code == kF32 || t.param.code == kBF16 || t.param.code == kF16) {
        measure_elements(t.param.codes, t.param.code, begin, end, weights);
      } else {
        if (!decoded) decoded = static_cast<float*>(aligned_alloc(64, static_cast<size_t>(piece_most + 15) / 16 * 64));
        decode_units(t, p.piece.shape, u0, u1, decoded);
        measure_elements(decoded, kF32, 0, end - begin, weights);
      }
      measure_elements(t.grad, a.step.grad_code, begin, end, others);
    };
    const auto step_piece = [&](int64_t i, StepTensor t, const Place& p, int64_t u0, int64_t u1) {
      if (i != known) find(i);
      if (lamb) t.grad = room + p.room;
      step_units(t, lamb ? apply : a.step, h, p.piece.shape, u0, u1, scratch);
    };
    const int me = omp_get_thread_num(), threads = omp_get_num_threads();
    int64_t before = 0;  // tasks of the passes so far
    for (int64_t first = 0, last, pass = 1; first < count; first = last) {
      for (last = first + 1; last < count && places[last].first == first;) ++last;
      const int64_t tasks = places[last - 1].task + places[last - 1].piece.tasks, start = tasks * me / threads;
      for (int second = 0; second < 2; ++second, ++pass, before += tasks) {
        wait_for(&done, before);
        int64_t taken = 0;
        for (int stealing = 0; stealing <= second; ++stealing)  // of a second pass what is in this thread's cache, then the rest
          for (int64_t n = 0; n < tasks; ++n) {
            const int64_t at = (second ? tasks - 1 - n + start : n + start) % tasks;
            int64_t seen = __atomic_load_n(&turns[at].pass, __ATOMIC_RELAXED);
            if (seen >= pass || (second && !stealing && turns[at].owner != me) ||
                !__atomic_compare_exchange_n(&turns[at].pass, &seen, pass, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
              continue;
            if (!second) turns[at].owner = me;
            ++taken;
            int64_t i = first, behind = last;  // the last tensor that starts at this task or before
            while (behind - i > 1) (places[(i + behind) / 2].task > at ? behind : i) = (i + behind) / 2;
            const Place& p = places[i];
            const int64_t all = p.piece.shape.rows * p.piece.shape.per_row, u0 = (at - p.task) * p.piece.units, u1 = u0 + p.piece.units < all ? u0 + p.piece.units : all;
            if (second) step_piece(i, a.step.tensors[i], p, u0, u1);
            else measure_piece(a.step.tensors[i], p, u0, u1);
          }
        __atomic_fetch_add(&done, taken, __ATOMIC_RELEASE);
      }
    }
    free(scratch);
    free(decoded);
  }
  free(partials);
  free(turns);
  free(room);
  free(places);
}

}  // namespace

const OptimKernels GM_TABLE(optim) = {step, measure, scaled_step};

}  // namespace gradmill
