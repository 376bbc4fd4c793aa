// The fused optimizer step: rule x state format x weight format, many tensors in one launch.
//
// The rule is the only template parameter; formats are run-time values around it (common.cuh). A tensor is cut into
// units, one thread block each: a run of whole quantisation blocks of one row (a tensor without blocks counts as one
// long row). The new values of a quantised operand wait in shared memory as fp32 until the unit is done; then a warp
// per quantisation block measures and encodes them. Blocks longer than a tile holds ("long", whole rows mostly) take
// two rounds: the first computes the new values only to measure them, the second computes them again and writes
// codes; the old scale stays in place until the last of its codes has been read.
//
// The table of tensors travels in the kernel's parameters (4 KB, 17 tensors a launch, after apex's multi_tensor_apply):
// no allocation, no copy, capturable in a CUDA graph. What changes from replay to replay (scalars, the step that random bits depend on, whether a
// tensor is stepped at all) may be in device memory: `live` and `counts`. For that a unit's scalars are first read into registers, in either case:
// on sm_90a AdamW spills 528 bytes instead of 508 (stored once a unit, in place of constants loaded again), in 128 registers as before.
//
// Bytes per element: fp32 AdamW reads 16 and writes 12: 107 Gelement/s at 3.0 TB/s (H100, measured copy). 8-bit states
// read 10 and write 6 (+ 16/256 of scales): 187 Gelement/s. Long blocks read everything twice, partly from L2.
// Never run on a GPU yet.
#include "../common/rules.h"
#include "common.cuh"

namespace gradmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTile = 2048;           // elements of a tile
constexpr int64_t kShort = kTile / 2;     // longest block that is encoded from shared memory; a tile holds two, so that
                                          // it can always be an even number of elements (a byte holds two 4-bit codes)
constexpr int kOperands = 1 + kMaxStates; // the weight, then the states

struct Entry {
  void* codes[kOperands];
  float* scales[kOperands];
  uint8_t* zeros;
  const void* grad;
  int64_t cols;              // rows * cols for a tensor without blocks
  int64_t end;               // units of this launch up to and including this tensor
  int64_t unit, inner;       // elements a thread block takes; inner: length of the second-longest long block, or unit
  int64_t block[kOperands];  // at most cols
  uint64_t first;            // element number of its first element, for the random words
  uint32_t id;
  uint16_t tile;             // elements of a tile, a multiple of every short block
  uint8_t code[kOperands];
  // sets of operands, bit o for operand o: blocks of length `unit` when that is long, of length `inner`, and short ones
  uint8_t outer_set, inner_set, short_set;
};

constexpr int kEntries = 17;
struct StepTable {
  Entry entries[kEntries];
  float scalars[kEntries][kMaxScalars];
  int64_t units;
  uint64_t seed;
  uint32_t step;
  int grad_code;
  const float *live, *counts;  // in device memory, from this launch's first tensor on: in place of `scalars` and `step`
};
static_assert(kWeightRounding == 0, "first_dither");
static_assert(sizeof(StepTable) <= 4096, "kernel parameters of every driver");

// --- weights in two pieces --------------------------------------------------------------------------------
// n neighbouring elements from number `at` on. Called, not inlined, for the reason given at decode_call.
__device__ __noinline__ float4 load_split(int code, const uint16_t* high, const uint8_t* low, int64_t at, int n) {
  float x[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const uint16_t h = i < n ? high[at + i] : 0;
    const bool bytes = code == kBF16Plus8 || code == kF16Plus8;
    const uint32_t l = i >= n ? 0u : bytes ? low[at + i] : reinterpret_cast<const uint16_t*>(low)[at + i];
    x[i] = code == kBF16Plus8 ? join_float<kBF16Plus8>(h, l) : code == kBF16Plus16 ? join_float<kBF16Plus16>(h, l)
         : code == kF16Plus8 ? join_float<kF16Plus8>(h, l) : join_float<kF16Plus16>(h, l);
  }
  return make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __noinline__ void store_split(int code, uint16_t* high, uint8_t* low, int64_t at, int n, float4 v, uint64_t seed, uint32_t step,
                                         uint32_t stream, uint64_t element) {
  const float x[kChunk] = {v.x, v.y, v.z, v.w};
  const bool bytes = code == kBF16Plus8 || code == kF16Plus8;
  uint32_t w[kChunk] = {0, 0, 0, 0};
  if (bytes) words_of(Key{seed, step, stream}, element, w);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i >= n) continue;
    const Pieces p = code == kBF16Plus8 ? split_float<kBF16Plus8>(x[i], w[i]) : code == kBF16Plus16 ? split_float<kBF16Plus16>(x[i], 0u)
                   : code == kF16Plus8 ? split_float<kF16Plus8>(x[i], w[i]) : split_float<kF16Plus16>(x[i], 0u);
    high[at + i] = p.high;
    if (bytes) low[at + i] = static_cast<uint8_t>(p.low);
    else reinterpret_cast<uint16_t*>(low)[at + i] = p.low;
  }
}

// --- the step ---------------------------------------------------------------------------------------------
// Weights are rounded stochastically, second moments with dither words (see kDitherStep), other states to nearest.
__device__ __forceinline__ Rounding rounding_of(int operand, int code) { return operand == 0 ? kStochastic : is_square(code) ? kDithered : kNearest; }

// The dither word of the first element of a block.
__device__ __forceinline__ uint32_t first_dither(Key key, int64_t row, int64_t cols, int64_t col) {
  key.stream |= kDither;  // the weight's purpose is 0
  return philox_word(key, static_cast<uint64_t>(row * cols + col));
}

// Encodes the short blocks of an operand of a tile whose new values wait in `values`: a warp per block.
__device__ __forceinline__ void encode_tile(const Matrix& m, int operand, const Key& key, int64_t row, int64_t begin, int length, const float* values) {
  const bool is_weight = operand == 0;
  const Rounding rounding = rounding_of(operand, m.code);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = static_cast<int>(m.block);
  for (int start = warp * block; start < length; start += kThreads / 32 * block) {
    const int part = static_cast<int>(min_of(block, length - start));
    const int64_t col = begin + start;
    Stats stats;
    float v[kChunk], before[kChunk];
    for (int i = lane * kChunk; i < part; i += 32 * kChunk) {
      const int n = chunk_length(i, part);
      load_floats(kF32, reinterpret_cast<const char*>(values + start + i), n, v);
      stats.add(v, n);
      if (is_weight) {
        read_chunk(m, row, col + i, n, before);
        stats.compare(before, v, n);
      }
    }
    stats = reduce_lanes<32>(stats);
    __syncwarp();  // every lane has read the old scale
    if (is_weight && !stats.changed) continue;
    const Block b = stats.block(m.code);
    const uint32_t dither = rounding == kDithered ? first_dither(key, row, m.cols, col) : 0;
    for (int i = lane * kChunk; i < part; i += 32 * kChunk) {
      const int n = chunk_length(i, part);
      load_floats(kF32, reinterpret_cast<const char*>(values + start + i), n, v);
      write_codes(m, row, col + i, n, b, v, rounding, key, dither + static_cast<uint32_t>(i) * kDitherStep);
    }
    if (lane == 0) store_block(m, row, col, b);
  }
}

// What a pass over some elements of a row does with their new values: measure long blocks, or write.
enum Pass { kMeasureOuter, kMeasureInner, kWrite };

template <class R>
__global__ void __launch_bounds__(kThreads, 2) step_kernel(const __grid_constant__ StepTable a) {
  constexpr int operands = 1 + R::states;
  alignas(16) __shared__ float values[operands][kTile];
  for (int64_t unit = blockIdx.x; unit < a.units; unit += gridDim.x) {
    int number = 0;
    int64_t first = 0;
    while (unit >= a.entries[number].end) first = a.entries[number++].end;
    const Entry& e = a.entries[number];
    if (a.counts != nullptr && a.counts[number] < 0.0f) continue;  // the same for the whole thread block
    float scalars[kMaxScalars];  // in registers, those that the rule reads: the compiler cannot know that nothing is stored over `live`
#pragma unroll
    for (int k = 0; k < kMaxScalars; ++k) scalars[k] = a.live != nullptr ? a.live[number * kMaxScalars + k] : a.scalars[number][k];
    const Key key{a.seed, a.counts != nullptr ? static_cast<uint32_t>(a.counts[number]) : a.step, e.id << 8 | kWeightRounding, e.first};
    auto matrix = [&](int o) { return Matrix{e.codes[o], e.scales[o], e.zeros, e.code[o], 0, e.cols, e.block[o]}; };
    const int64_t per_row = divide_up(e.cols, e.unit), row = divide(unit - first, per_row);
    const int64_t begin = (unit - first - row * per_row) * e.unit, end = min_of(e.cols, begin + e.unit);
    const int long_set = e.outer_set | e.inner_set;

    Block blocks[operands] = {};  // new scales of the long blocks
    uint32_t dither[operands] = {};
    bool changed = true;          // whether the weight's long block is written at all
    const Pass inner_start = e.inner_set != 0 ? kMeasureInner : kWrite;
    Pass pass = e.outer_set != 0 ? kMeasureOuter : inner_start;
    int64_t inner = begin, at = begin;
    while (inner < end) {
      const int64_t inner_end = min_of(end, inner + e.inner);
      const int64_t from = pass == kMeasureOuter ? begin : pass == kMeasureInner ? inner : at;
      const int64_t to = pass == kMeasureOuter ? end : pass == kMeasureInner ? inner_end : min_of(inner_end, at + e.tile);
      Stats stats[operands];
      for (int64_t col = from + threadIdx.x * kChunk; col < to; col += kThreads * kChunk) {
        const int n = chunk_length(col, to);
        float v[kOperands][kChunk] = {}, g[kChunk], before[kChunk];
        load_floats(a.grad_code, static_cast<const char*>(e.grad) + (row * e.cols + col) * (code_bits(a.grad_code) / 8), n, g);
#pragma unroll
        for (int o = 0; o < operands; ++o) {
          if (o == 0 && is_split(e.code[0])) {
            const float4 w = load_split(e.code[0], static_cast<const uint16_t*>(e.codes[0]), e.zeros, row * e.cols + col, n);
            v[0][0] = w.x, v[0][1] = w.y, v[0][2] = w.z, v[0][3] = w.w;
          } else {
            read_chunk(matrix(o), row, col, n, v[o]);
          }
        }
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          before[i] = v[0][i];
          R::apply(v[0][i], g[i] * scalars[0], v[1][i], v[2][i], v[3][i], scalars);
        }
        if (pass != kWrite) {
          stats[0].compare(before, v[0], n);
#pragma unroll
          for (int o = 0; o < operands; ++o) stats[o].add(v[o], n);
          continue;
        }
#pragma unroll
        for (int o = 0; o < operands; ++o) {
          const Matrix m = matrix(o);
          if (e.short_set >> o & 1)
            *reinterpret_cast<float4*>(&values[o][col - at]) = make_float4(v[o][0], v[o][1], v[o][2], v[o][3]);
          else if (o == 0 && is_split(m.code))
            store_split(m.code, static_cast<uint16_t*>(m.codes), m.zeros, row * e.cols + col, n, make_float4(v[o][0], v[o][1], v[o][2], v[o][3]),
                        key.seed, key.step, key.stream, key.first + static_cast<uint64_t>(row * e.cols + col));
          else if (!(long_set >> o & 1))
            store_floats(m.code, address(m, row, col), n, v[o], o == 0, key, static_cast<uint64_t>(row * e.cols + col));
          else if (o > 0 || changed)
            write_codes(m, row, col, n, blocks[o], v[o], rounding_of(o, m.code), key,
                        dither[o] + static_cast<uint32_t>(col - (e.outer_set >> o & 1 ? begin : inner)) * kDitherStep);
        }
      }
      if (pass != kWrite) {
        const int set = pass == kMeasureOuter ? e.outer_set : e.inner_set;
#pragma unroll
        for (int o = 0; o < operands; ++o)
          if (set >> o & 1) {
            const Stats all = reduce_block<kThreads>(stats[o]);
            blocks[o] = all.block(e.code[o]);
            if (rounding_of(o, e.code[o]) == kDithered) dither[o] = first_dither(key, row, e.cols, from);
            if (o == 0) changed = all.changed != 0;
          }
        pass = pass == kMeasureOuter ? inner_start : kWrite;
        continue;
      }
      if (e.short_set != 0) {
        __syncthreads();  // the tile is complete, and every old scale has been read
#pragma unroll 1
        for (int o = 0; o < operands; ++o)
          if (e.short_set >> o & 1) encode_tile(matrix(o), o, key, row, at, static_cast<int>(to - at), values[o]);
        __syncthreads();  // the tile may be overwritten
      }
      at = to;
      if (at < inner_end) continue;
      // The end of a block of the inner set, perhaps of the outer one too: now the old scales may go.
      const int done = e.inner_set | (inner_end == end ? e.outer_set : 0);
      if (done != 0) {
        __syncthreads();
#pragma unroll
        for (int o = 0; o < operands; ++o)
          if (threadIdx.x == 0 && (done >> o & 1) && (o > 0 || changed))
            store_block(matrix(o), row, e.outer_set >> o & 1 ? begin : inner, blocks[o]);
      }
      inner = inner_end;
      pass = inner_start;
    }
  }
}

// --- norms ------------------------------------------------------------------------------------------------
// Reads every byte once: bound by memory (in double: one multiply and one add an element, a sixth of an H100's rate at
// 3 TB/s of bf16). Eight threads take a chunk, four neighbouring lanes of kMeasureLanes each; then a warp adds the chunks up.
constexpr int kMeasureEntries = 100;
struct MeasureTable {
  MeasureTensor entries[kMeasureEntries];
  int64_t first, chunks;  // this launch's
  double *partials, *out;
  int count, code;
};
static_assert(sizeof(MeasureTable) <= 4096 && kMeasureLanes == 8 * kChunk, "measure_kernel");

__global__ void __launch_bounds__(kThreads) measure_kernel(const __grid_constant__ MeasureTable a) {
  constexpr int per_block = kThreads / 8;
  const int part = threadIdx.x % 8;
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * per_block; start < a.chunks; start += static_cast<int64_t>(gridDim.x) * per_block) {
    const int64_t chunk = a.first + start + threadIdx.x / 8;
    const bool exists = start + threadIdx.x / 8 < a.chunks;
    int number = 0;
    while (number + 1 < a.count && a.entries[number + 1].first <= chunk) ++number;
    const MeasureTensor& t = a.entries[number];
    const int64_t begin = (chunk - t.first) * kMeasureChunk, end = exists ? min_of(t.n, begin + kMeasureChunk) : begin;
    double sums[kChunk] = {};
    uint32_t largest = 0;
    for (int64_t at = begin + part * kChunk; at < end; at += kMeasureLanes) {
      float x[kChunk];
      const int n = chunk_length(at, end);
      load_floats(a.code, static_cast<const char*>(t.x) + at * (code_bits(a.code) / 8), n, x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float v = i >= n ? 0.0f : fabsf(x[i]) > t.limit ? x[i] * t.factor : x[i];
        sums[i] += static_cast<double>(v) * static_cast<double>(v);
        largest = magnitude_bits(v) > largest ? magnitude_bits(v) : largest;
      }
    }
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], offset);
      const uint32_t other = __shfl_xor_sync(kAllLanes, largest, offset);
      largest = other > largest ? other : largest;
    }
    if (part == 0 && exists) {
      a.partials[2 * chunk] = (sums[0] + sums[2]) + (sums[1] + sums[3]);
      a.partials[2 * chunk + 1] = static_cast<double>(bits_float(largest));
    }
  }
}

__global__ void __launch_bounds__(32) measure_total_kernel(const __grid_constant__ MeasureTable a, int64_t before) {
  static_assert(kMeasureLanes == 32, "a lane each");
  for (int64_t i = blockIdx.x; i < a.count; i += gridDim.x) {
    const MeasureTensor& t = a.entries[i];
    double sum = 0.0;
    uint32_t largest = 0;
    for (int64_t c = threadIdx.x; c < divide_up(t.n, kMeasureChunk); c += 32) {
      const double* partial = a.partials + 2 * (t.first + c);
      const uint32_t magnitude = magnitude_bits(static_cast<float>(partial[1]));
      sum += partial[0];
      largest = magnitude > largest ? magnitude : largest;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
      const uint32_t other = __shfl_xor_sync(kAllLanes, largest, offset);
      largest = other > largest ? other : largest;
    }
    if (threadIdx.x == 0) a.out[2 * (before + i)] = sum, a.out[2 * (before + i) + 1] = static_cast<double>(bits_float(largest));
  }
}

// --- host -------------------------------------------------------------------------------------------------
// Fills all but `end`; returns how many units the tensor has.
int64_t plan(const StepTensor& t, int states, Entry& e) {
  const int operands = 1 + states;
  const Matrix* m[kOperands] = {&t.param, &t.states[0], &t.states[1], &t.states[2]};
  e = Entry{};
  e.zeros = t.param.zeros;
  e.grad = t.grad;
  e.id = t.id;
  e.first = t.first;
  bool blocked = false;
  for (int o = 0; o < operands; ++o) {
    e.codes[o] = m[o]->codes;
    e.scales[o] = m[o]->scales;
    e.code[o] = static_cast<uint8_t>(m[o]->code);
    blocked |= is_blocked(m[o]->code);
  }
  const int64_t rows = blocked ? t.param.rows : 1, cols = blocked ? t.param.cols : t.param.rows * t.param.cols;
  e.cols = cols;
  int64_t longest = 0, second = 0, longest_short = 0;
  for (int o = 0; o < operands; ++o) {
    e.block[o] = is_blocked(m[o]->code) ? min_of(m[o]->block, cols) : 1;
    if (!is_blocked(m[o]->code)) continue;
    if (e.block[o] <= kShort) {
      e.short_set |= static_cast<uint8_t>(1 << o);
      if (e.block[o] > longest_short) longest_short = e.block[o];
    } else if (e.block[o] > longest) {
      longest = e.block[o];
    }
  }
  for (int o = 0; o < operands; ++o)
    if (is_blocked(m[o]->code) && e.block[o] > kShort && e.block[o] != longest) {
      if (second != 0 && e.block[o] != second)
        throw std::runtime_error("gradmill: fused_step on CUDA handles at most two different block lengths above 1024 per tensor");
      second = e.block[o];
    }
  e.tile = static_cast<uint16_t>(kTile);
  if (longest_short > 0) {
    int64_t count = kTile / longest_short;
    if (longest_short % 2 != 0 && count % 2 != 0) --count;
    e.tile = static_cast<uint16_t>(count * longest_short);
  }
  e.unit = longest > 0 ? longest : e.tile;
  e.inner = second > 0 ? second : e.unit;
  for (int o = 0; o < operands; ++o)
    if (is_blocked(m[o]->code) && e.block[o] > kShort) (e.block[o] == longest ? e.outer_set : e.inner_set) |= static_cast<uint8_t>(1 << o);
  return rows * divide_up(cols, e.unit);
}

template <class R>
void step_all(const StepArgs& a, const Launch& where) {
  StepTable table = {};
  int count = 0;
  auto flush = [&] {
    if (count > 0) launch("fused_step", step_kernel<R>, table.units, dim3(kThreads), where, table);
    count = 0;
  };
  table.seed = a.seed;
  table.step = a.step;
  table.grad_code = a.grad_code;
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.tensors[i].param.rows * a.tensors[i].param.cols == 0) continue;
    if (count == 0) table.units = 0;
    Entry& e = table.entries[count];
    table.units += plan(a.tensors[i], R::states, e);
    e.end = table.units;
    if (a.counts != nullptr) {  // no tensor is empty then
      if (count == 0) table.live = a.scalars + i * kMaxScalars, table.counts = a.counts + i;
    } else {
      const float* h = a.scalars + (a.scalar_rows > 1 ? i * kMaxScalars : 0);
      for (int k = 0; k < kMaxScalars; ++k) table.scalars[count][k] = h[k];
    }
    if (++count == kEntries) flush();
  }
  flush();
}

}  // namespace

void measure(const MeasureArgs& a, const Launch& where) {
  for (int64_t before = 0; before < a.count; before += kMeasureEntries) {
    MeasureTable table = {};
    table.count = static_cast<int>(min_of(kMeasureEntries, a.count - before));
    table.code = a.code;
    table.partials = a.partials;
    table.out = a.out;
    for (int i = 0; i < table.count; ++i) {
      table.entries[i] = a.tensors[before + i];
      table.chunks += divide_up(table.entries[i].n, kMeasureChunk);
    }
    table.first = table.entries[0].first;
    launch("measure", measure_kernel, divide_up(table.chunks, kThreads / 8), dim3(kThreads), where, table);
    launch("measure", measure_total_kernel, table.count, dim3(32), where, table, before);
  }
}

void fused_step(const StepArgs& a, const Launch& where) {
  int number = 0;
#define GM_STEP(name, R) \
  if (a.rule == number++) return step_all<R>(a, where);
  GM_RULES(GM_STEP)
#undef GM_STEP
  throw std::runtime_error("gradmill: fused_step: no rule number " + std::to_string(a.rule));
}

}  // namespace gradmill::cuda
