// One matrix product for every format: out[i,j] = sum_k a[i,k] * b[k,j].
//
// Three stages, of which only the middle one is fixed:
//   load       an operand (Rows or Columns over a reader) decodes whatever is stored into panels of 32-bit lanes;
//   multiply   one microkernel, ROWS x NR accumulators in registers, whatever a lane holds;
//   epilogue   receives finished rows of an output tile and does what it likes with them (scale, round, store,
//              update a weight): the product itself is never stored.
//
// A "lane" is 32 bits along k: one float, two int16 or four int8. The Lanes types below say what it holds and how
// two of them are multiplied and added to an accumulator, so that fp32, vpmaddwd and vpdpbusd share every loop.
//
// Blocking: a thread owns an output tile (<= 392 x 1024 sums) and walks k in steps of KC = 256 lanes. Its packed
// part of a (392 KB) stays in L2 while the micropanel of b (NR x KC, 16-32 KB) stays in L1 or streams from L2 at
// a few bytes per cycle. Each tile packs its own operands: no barrier, and at these sizes packing costs 1/392 +
// 1/1024 of an element's work per element, 2-4 % of the time, in exchange. An operand of 2 MB or less is packed once for all tiles instead:
// tiles are then low (MS rows), many and evenly spread, and their sums stay in L2 until the epilogue has read them.
//
// Measured, Zen 4, 2048 cubed fp32, one thread's CPU time: AVX2 170 ms (101 GFLOP/s), AVX-512 178 ms, torch's matmul
// in the same run 185 ms; with an INT4 b to decode 168, 175 and 180. in_register matters as much as the blocking: with
// half of the accumulators spilled by gcc the int8 products took 1.6 (AVX2) and 2 times (VNNI) as long.
//
// The sums are added in an order that depends on k alone: KC by KC, never on tiles or threads.
#pragma once
#include <omp.h>
#include <stdlib.h>

#include "book.h"
#include "kernels.h"
#include "simd.h"
#include "tile.h"

namespace gradmill {
namespace {

// Register tile: MR x NV vectors of accumulators, NV vectors of b and a broadcast of a fill the register file.
constexpr int MR = GM_LEVEL >= 2 ? 14 : GM_LEVEL == 1 ? 6 : 4;
constexpr int NV = GM_LEVEL >= 1 ? 2 : 3;
constexpr int NR = NV * W;
constexpr int KC = 256;
constexpr int MC = 28 * 14, NC = 1024;
constexpr int MS = (GM_LEVEL >= 2 ? 4 : 8) * MR;  // rows of a tile where b is packed once for all

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Aligned working memory of one thread; freed at the end of its scope.
struct Scratch {
  lane* data;
  explicit Scratch(int64_t lanes) {
    data = static_cast<lane*>(aligned_alloc(64, static_cast<size_t>(round_up(lanes * 4 + 64, 64))));
    if (!data) abort();  // inside a parallel region there is nobody to tell
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// --- lanes ------------------------------------------------------------------------------------------------
struct FloatLanes {
  typedef float Sum;
  typedef vf Vector;
  static constexpr int rows = MR, step = 1;
  static GM_HD Vector none() { return zero(); }
  static GM_HD Vector load_lanes(const lane* p) { return load(p); }
  static GM_HD Vector same(const lane* p) { return broadcast(bits_float(*p)); }
  static GM_HD Vector madd(Vector acc, Vector a, Vector b) { return fma(a, b, acc); }
  static GM_HD Sum total(Vector acc) { return sum(acc); }
  static GM_HD void put(Sum* out, Vector acc, bool first) { store(out, first ? acc : add(load(out), acc)); }
};

// --- operands ---------------------------------------------------------------------------------------------
// pack<R>(first, count, k0, kc, panels): lanes [k0, k0+kc) of rows [first, first+count) as panels of R rows, each
// laid out [k][R], missing rows as zeros. May write up to W lanes past the end.
//
// A reader has  const lane* read(row, from, lanes, buffer):  a run of one stored row, decoded into the buffer or
// where it already lies.

// The stored rows are the operand's rows, contiguous along k: panels are its transpose, W x W at a time.
template <class Reader>
struct Rows {
  Reader reader;
  template <int R>
  void pack(int64_t first, int64_t count, int64_t k0, int64_t kc, lane* panels) const {
    static_assert(R <= W || R % W == 0, "a panel is part of one transposed square or several whole ones");
    constexpr int group = R < W ? R : W;
    lane buffer[group][KC];
    for (int64_t panel = 0; panel < count; panel += R, panels += R * kc)
      for (int sub = 0; sub < R; sub += group) {
        const lane* rows[group];
        const int live = static_cast<int>(min_of(group, count - panel - sub));
        for (int r = 0; r < live; ++r) rows[r] = reader.read(first + panel + sub + r, k0, kc, buffer[r]);
        int64_t k = 0;
        for (; k + W <= kc; k += W) {
          vf square[W];
          for (int r = 0; r < W; ++r) square[r] = r < group && r < live ? load(rows[r] + k) : zero();
          transpose(square);
          // Where R < W each store's surplus lanes are overwritten by the next.
          for (int r = 0; r < W; ++r) store(panels + (k + r) * R + sub, square[r]);
        }
        for (; k < kc; ++k)
          for (int r = 0; r < group; ++r) panels[k * R + sub + r] = r < live ? rows[r][k] : 0;
      }
  }
};

// The stored rows run across the panels, one for each k: panels are slices of them. Eight rows are decoded before
// their slices are copied: a panel then receives whole runs of cache lines rather than one here and there.
template <class Reader>
struct Columns {
  Reader reader;
  template <int R>
  void pack(int64_t first, int64_t count, int64_t k0, int64_t kc, lane* panels) const {
    constexpr int group = 8;
    const int64_t stride = count + W;  // not a power of two: eight rows a page apart would share a cache set
    Scratch buffer(group * stride);
    for (int64_t k = 0; k < kc; k += group) {
      const int live = static_cast<int>(min_of(group, kc - k));
      const lane* rows[group];
      for (int r = 0; r < live; ++r) rows[r] = reader.read(k0 + k + r, first, count, buffer.data + r * stride);
      for (int64_t i = 0; i < count; i += R) {
        lane* out = panels + i * kc + k * R;
        if (i + R <= count)
          for (int r = 0; r < live; ++r) memcpy(out + r * R, rows[r] + i, R * sizeof(lane));
        else
          for (int r = 0; r < live; ++r)
            for (int c = 0; c < R; ++c) out[r * R + c] = i + c < count ? rows[r][i + c] : 0;
      }
    }
  }
};

// decode_one_block with the codes of weights by hand: gcc interleaves nibbles several times slower.
#if GM_LEVEL >= 1
template <class Decoder>
inline int64_t decode_vectors(const char* codes, Block b, int64_t n, float* __restrict out) {
  const Decoder decoder(b.zero, b.scale);
  int64_t i = 0;
  for (; i + W <= n; i += W, codes += W * Decoder::bits / 8) store(out + i, decoder(codes));
  return i;
}
#endif
inline void decode_run(int code, const char* codes, Block b, int64_t n, float* __restrict out) {
  int64_t done = 0;
#if GM_LEVEL >= 1
  switch (code) {
    case kInt4: case kInt4Outlier: done = decode_vectors<BitsDecoder<4, true>>(codes, b, n, out); break;
    case kUInt4: done = decode_vectors<BitsDecoder<4, false>>(codes, b, n, out); break;
    case kInt3: done = decode_vectors<BitsDecoder<3, true>>(codes, b, n, out); break;
    case kUInt3: done = decode_vectors<BitsDecoder<3, false>>(codes, b, n, out); break;
    case kInt2: done = decode_vectors<BitsDecoder<2, true>>(codes, b, n, out); break;
    case kUInt2: done = decode_vectors<BitsDecoder<2, false>>(codes, b, n, out); break;
    case kSign: done = decode_vectors<SignDecoder>(codes, b, n, out); break;
    case kInt8: case kInt7: done = decode_vectors<ByteDecoder<true>>(codes, b, n, out); break;
    case kUInt8: done = decode_vectors<ByteDecoder<false>>(codes, b, n, out); break;
    case kE4M3: done = decode_vectors<Float8Decoder<3>>(codes, b, n, out); break;
    case kE5M2: done = decode_vectors<Float8Decoder<2>>(codes, b, n, out); break;
    case kE2M1: done = decode_vectors<Float4Decoder>(codes, b, n, out); break;
  }
#endif
  decode_one_block(code, codes + done * code_bits(code) / 8, b, n - done, out + done);
}

// Reads any stored matrix as floats. `from` must be a multiple of 8 where codes share bytes.
struct FloatReader {
  Matrix m;
  const lane* read(int64_t row, int64_t from, int64_t n, lane* buffer) const {
    const char* codes = tile_address(m, row, from);
    if (m.code == kF32) return reinterpret_cast<const lane*>(codes);
    float* out = reinterpret_cast<float*>(buffer);
    if (!is_blocked(m.code)) {
      decode_floats(m.code, codes, n, out);
      return buffer;
    }
    if (is_book(m.code)) {
      decode_book(m, row, from, n, out);
      return buffer;
    }
    for (int64_t at = from, end = from + n; at < end;) {
      const int64_t index = at / m.block, stop = min_of(end, (index + 1) * m.block);
      const int64_t number = row * m.blocks_per_row() + index;
      decode_run(m.code, tile_address(m, row, at), block_at(m, number), stop - at, out + (at - from));
      if (m.code == kInt4Outlier) put_outliers(m, number, at - index * m.block, stop - at, out + (at - from));
      at = stop;
    }
    return buffer;
  }
  // Brings the same run of another row closer, if there is such a row.
  void prefetch(int64_t row, int64_t from, int64_t n) const {
    if (row >= m.rows) return;
    const char *at = tile_address(m, row, from), *end = at + n * code_bits(m.code) / 8;
    for (; at < end; at += 64) __builtin_prefetch(at);
  }
};

inline Matrix plain_matrix(const void* data, int code, int64_t rows, int64_t cols) {
  return Matrix{const_cast<void*>(data), nullptr, nullptr, code, rows, cols, 0};
}

// --- multiply ---------------------------------------------------------------------------------------------
// ROWS x NR sums over kc lanes of two panels; `first` starts the tile's sums, later steps add to them. Lanes of step 2
// add the products of two lanes in 16 bits before they widen them: kc is then even.
template <class Lanes, int ROWS>
void multiply_panels(int64_t kc, const lane* __restrict a, const lane* __restrict b, typename Lanes::Sum* out,
                     int64_t stride, bool first) {
  typename Lanes::Vector acc[ROWS][NV];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = Lanes::none();
  constexpr int step = Lanes::step, rows = Lanes::rows;
  for (int64_t k = 0; k < kc; k += step, a += step * rows, b += step * NR) {
    typename Lanes::Vector bv[step][NV];
#pragma GCC unroll 2
    for (int s = 0; s < step; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[s][v] = Lanes::load_lanes(b + s * NR + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const typename Lanes::Vector av = Lanes::same(a + r);
      if constexpr (step == 1) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          acc[r][v] = Lanes::madd(acc[r][v], av, bv[0][v]);
          in_register(acc[r][v]);
        }
      } else {
        typename Lanes::Vector part[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) part[v] = Lanes::products(av, bv[0][v]);
        const typename Lanes::Vector next = Lanes::same(a + rows + r);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          acc[r][v] = Lanes::madd(acc[r][v], part[v], next, bv[1][v]);
          in_register(acc[r][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) Lanes::put(out + r * stride + v * W, acc[r][v], first);
}

struct Extent {
  int64_t m, n, k;    // k in lanes
  int64_t unit = GM_LEVEL == 0 ? 2 * NR : NR;  // an epilogue's rows start at multiples of this (of 8: see FloatReader) and end there or at n
};

// epilogue(row, col, n, sums, spare): the finished sums of columns [col, col + n) of one row, to read or overwrite,
// and as much memory again.
template <class A, class B, class Epilogue>
struct Problem {
  Extent e;
  A a;
  B b;
  Epilogue epilogue;
};

// Where tiles share an operand of at most so many lanes (2 MB: it stays in L2 and L3), it is packed once for all of them.
constexpr int64_t kShared = 1 << 19;

// `count` products, make(i) being a Problem: threads take the tiles of all of them, so that small ones do not wait for
// each other.
template <class Lanes, class Make>
void gemm_all(int64_t count, const Make& make) {
  constexpr int PR = Lanes::rows;  // of a panel of a
  struct Plan {
    int64_t first, rows, cols, across;  // the number of its first tile, a tile's shape, tiles side by side
  };
  Plan* const plans = static_cast<Plan*>(malloc(static_cast<size_t>(count) * sizeof(Plan)));
  if (!plans) abort();
  int64_t tiles = 0, most_rows = 0, most_columns = 0, depth = 0;
  double work = 0.0;
  bool share_a = false, share_b = false;
  for (int64_t i = 0; i < count; ++i) {
    const Extent e = make(i).e;
    plans[i] = {tiles, 0, 0, 0};
    if (e.m <= 0 || e.n <= 0) continue;
    // Tiles: as large as the caches hold, but four to a thread where there is enough work, and evenly cut.
    int64_t rows = min_of(MC, round_up(e.m, PR)), cols = round_up(min_of(NC, e.n), e.unit);
    if (count == 1 && e.n * e.k <= kShared && e.m > MS && e.unit % NR == 0) rows = MS, share_b = true;
    if (rows * cols > MC * NC) rows = round_up(divide_up(MC * NC, cols), PR);
    rows = min_of(rows, round_up(e.m, PR));
    const int64_t wanted = omp_get_max_threads() > 1 ? divide_up(4 * omp_get_max_threads(), count) : 1;
    while (divide_up(e.m, rows) * divide_up(e.n, cols) < wanted) {
      if (rows >= 4 * PR && rows * 2 > cols) rows = round_up(rows / 2, PR);
      else if (cols >= 8 * NR && cols >= 2 * e.unit) cols = round_up(cols / 2, e.unit);
      else break;
    }
    rows = round_up(divide_up(e.m, divide_up(e.m, rows)), PR);
    plans[i] = {tiles, rows, cols, divide_up(e.n, cols)};
    share_a = count == 1 && e.m * e.k <= kShared && plans[i].across > 1;
    tiles += divide_up(e.m, rows) * plans[i].across;
    most_rows = rows > most_rows ? rows : most_rows, most_columns = cols > most_columns ? cols : most_columns;
    depth = e.k > depth ? e.k : depth;
    work += static_cast<double>(e.m) * static_cast<double>(e.n) * static_cast<double>(e.k + 8);
  }
  const int64_t steps = divide_up(depth, KC);
  depth = min_of(KC, depth);
  const int64_t stride = round_up(most_columns, NR);
  // A shared a is cut as its tiles are, with room for what Rows writes past the end of each; a shared b, whose panels are whole vectors
  // wide, lies in one row of panels.
  const int64_t part_of_a = most_rows * depth + W, columns_of_b = share_b ? round_up(make(0).e.n, NR) : 0;
  const int64_t parts_a = share_a ? divide_up(make(0).e.m, most_rows) : 0, parts_b = divide_up(columns_of_b, 8 * NR);
  Scratch shared_a(parts_a * steps * part_of_a), shared_b(columns_of_b * steps * depth);

#pragma omp parallel if (work > 1e5)
  if (tiles > 0) {
    typedef typename Lanes::Sum Sum;
    constexpr int64_t lanes_per_sum = sizeof(Sum) / sizeof(lane);
    Scratch packed_a(share_a ? 0 : most_rows * depth + W), packed_b(share_b ? 0 : stride * depth + W), tile((most_rows + 1) * stride * lanes_per_sum);
    Sum* const sums = reinterpret_cast<Sum*>(tile.data);
    const auto panels_a = [&](int64_t row, int64_t k) { return share_a ? shared_a.data + (row / most_rows * steps + k / KC) * part_of_a : packed_a.data; };
    const auto panels_b = [&](int64_t col, int64_t k, int64_t kc) { return share_b ? shared_b.data + k * columns_of_b + col * kc : packed_b.data; };
    if (parts_a + parts_b > 0) {
      const auto p = make(0);
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < (parts_a + parts_b) * steps; ++t) {
        const int64_t k = t % steps * KC, kc = min_of(KC, p.e.k - k), part = t / steps;
        const int64_t row = part * most_rows, col = (part - parts_a) * 8 * NR;
        if (part < parts_a) p.a.template pack<PR>(row, min_of(most_rows, p.e.m - row), k, kc, panels_a(row, k));
        else p.b.template pack<NR>(col, min_of(8 * NR, p.e.n - col), k, kc, panels_b(col, k, kc));
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t number = 0; number < tiles; ++number) {
      int64_t which = 0;
      while (which + 1 < count && plans[which + 1].first <= number) ++which;
      const auto p = make(which);
      const Plan& plan = plans[which];
      const int64_t t = number - plan.first;
      const int64_t row = t / plan.across * plan.rows, m = min_of(plan.rows, p.e.m - row);
      const int64_t col = t % plan.across * plan.cols, n = min_of(plan.cols, p.e.n - col);
      for (int64_t k = 0; k < p.e.k; k += KC) {
        const int64_t kc = min_of(KC, p.e.k - k);
        lane *const a = panels_a(row, k), *const b = panels_b(col, k, kc);
        if (!share_a) p.a.template pack<PR>(row, m, k, kc, a);
        if (!share_b) p.b.template pack<NR>(col, n, k, kc, b);
        for (int64_t j = 0; j < n; j += NR)
          for (int64_t i = 0; i < m; i += PR) {
            const lane *pa = a + i * kc, *pb = b + j * kc;
            Sum* const out = sums + i * stride + j;
            if (m - i == 1) multiply_panels<Lanes, 1>(kc, pa, pb, out, stride, k == 0);
            else if (m - i <= 4) multiply_panels<Lanes, 4>(kc, pa, pb, out, stride, k == 0);
            else multiply_panels<Lanes, PR>(kc, pa, pb, out, stride, k == 0);
          }
      }
      if (p.e.k == 0) memset(sums, 0, static_cast<size_t>(plan.rows * stride) * sizeof(Sum));
      for (int64_t i = 0; i < m; ++i) p.epilogue(row + i, col, n, sums + i * stride, sums + most_rows * stride);
    }
  }
  free(plans);
}

template <class Lanes, class A, class B, class Epilogue>
void gemm(const Extent& e, const A& a, const B& b, const Epilogue& epilogue) {
  gemm_all<Lanes>(1, [&](int64_t) { return Problem<A, B, Epilogue>{e, a, b, epilogue}; });
}

// --- few rows ---------------------------------------------------------------------------------------------
// The same product for small m, where packing b would cost more than multiplying: dot products along k. b's rows
// are read once, kDotColumns at a time, KD lanes of each decoded to L1 and multiplied with every row of a.
constexpr int KD = 1024;
constexpr int kDotRows = GM_LEVEL >= 2 ? 4 : GM_LEVEL == 1 ? 6 : 2;
constexpr int kDotColumns = GM_LEVEL == 1 ? 2 : 4;  // sums of one step: enough to hide an fma's latency, and no spill

template <class Lanes, int ROWS>
GM_HD void dot_rows(int64_t lanes, const lane* __restrict a, int64_t a_stride, const lane* const* b,
                    typename Lanes::Sum* out, int64_t out_stride) {
  typename Lanes::Vector acc[ROWS][kDotColumns];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kDotColumns; ++c) acc[r][c] = Lanes::none();
  for (int64_t k = 0; k < lanes; k += W) {
    typename Lanes::Vector bv[kDotColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kDotColumns; ++c) bv[c] = Lanes::load_lanes(b[c] + k);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const typename Lanes::Vector av = Lanes::load_lanes(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int c = 0; c < kDotColumns; ++c) {
        acc[r][c] = Lanes::madd(acc[r][c], av, bv[c]);
        in_register(acc[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kDotColumns; ++c) out[r * out_stride + c] += Lanes::total(acc[r][c]);
}

// Rows [0, m) as lanes, each padded with zeros to `stride`.
template <class Reader>
void read_rows(const Rows<Reader>& a, int64_t m, int64_t k, int64_t stride, lane* out) {
  if (k == 0) return;  // there may be no memory behind a
  for (int64_t i = 0; i < m; ++i, out += stride) {
    const lane* in = a.reader.read(i, 0, k, out);
    if (in != out) memcpy(out, in, static_cast<size_t>(k) * sizeof(lane));
    for (int64_t pad = k; pad < stride; ++pad) out[pad] = 0;
  }
}

template <class Lanes, class A, class B, class Epilogue>
void dot_products(const Extent& e, const Rows<A>& a, const Rows<B>& b, const Epilogue& epilogue) {
  if (e.m <= 0 || e.n <= 0) return;
  typedef typename Lanes::Sum Sum;
  constexpr int64_t chunk = 32;  // columns of one epilogue call
  const int64_t stride = round_up(e.k, W);
  Scratch all_a(e.m * stride);
  read_rows(a, e.m, e.k, stride, all_a.data);
  const bool parallel = static_cast<double>(e.n) * static_cast<double>(e.k) > 3e4;
#pragma omp parallel if (parallel)
  {
    constexpr int64_t lanes_per_sum = sizeof(Sum) / sizeof(lane);
    Scratch buffers(kDotColumns * (KD + W)), sums_scratch((e.m + 1) * chunk * lanes_per_sum);
    Sum* const sums = reinterpret_cast<Sum*>(sums_scratch.data);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < divide_up(e.n, chunk); ++t) {
      const int64_t col = t * chunk, n = min_of(chunk, e.n - col);
      memset(sums, 0, static_cast<size_t>(e.m * chunk) * sizeof(Sum));
      for (int64_t c = 0; c < n; c += kDotColumns)
        for (int64_t k = 0; k < e.k; k += KD) {
          const int64_t kd = min_of(KD, e.k - k), padded = round_up(kd, W);
          const lane* rows[kDotColumns];
          for (int r = 0; r < kDotColumns; ++r) {
            lane* buffer = buffers.data + r * (KD + W);
            // The last columns may be missing: their sums are made of the last row and never looked at.
            rows[r] = b.reader.read(col + min_of(c + r, n - 1), k, kd, buffer);
            if (padded == kd) continue;
            if (rows[r] != buffer) memcpy(buffer, rows[r], static_cast<size_t>(kd) * sizeof(lane));
            for (int64_t i = kd; i < padded; ++i) buffer[i] = 0;
            rows[r] = buffer;
          }
          for (int64_t i = 0; i < e.m;) {
            const lane* in = all_a.data + i * stride + k;
            Sum* const out = sums + i * chunk + c;
            if (e.m - i >= kDotRows) dot_rows<Lanes, kDotRows>(padded, in, stride, rows, out, chunk), i += kDotRows;
            else if (e.m - i >= 4) dot_rows<Lanes, 4>(padded, in, stride, rows, out, chunk), i += 4;
            else if (e.m - i >= 2) dot_rows<Lanes, 2>(padded, in, stride, rows, out, chunk), i += 2;
            else dot_rows<Lanes, 1>(padded, in, stride, rows, out, chunk), i += 1;
          }
        }
      for (int64_t i = 0; i < e.m; ++i) epilogue(i, col, n, sums + i * chunk, sums + e.m * chunk);
    }
  }
}

// The same for small m where b's stored rows run across (Columns): each is decoded once, eight at a time, and added,
// times its factors, to all rows of sums.
template <class B, class Epilogue>
void add_scaled_rows(const Extent& e, const Rows<FloatReader>& a, const Columns<B>& b, const Epilogue& epilogue) {
  if (e.m <= 0 || e.n <= 0) return;
  constexpr int group = 8;
  const int64_t chunk = e.n >= 1024 * omp_get_max_threads() ? 512 : 128, stride = chunk + W;
  Scratch all_a(e.m * e.k);
  read_rows(a, e.m, e.k, e.k, all_a.data);
  const float* factors = reinterpret_cast<const float*>(all_a.data);
  const bool parallel = static_cast<double>(e.n) * static_cast<double>(e.k) > 3e4;
#pragma omp parallel if (parallel)
  {
    Scratch buffers(group * stride), sums_scratch((e.m + 1) * stride);
    float* const sums = reinterpret_cast<float*>(sums_scratch.data);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < divide_up(e.n, chunk); ++t) {
      const int64_t col = t * chunk, n = min_of(chunk, e.n - col), padded = round_up(n, W);
      memset(sums, 0, static_cast<size_t>(e.m * stride) * sizeof(float));
      for (int64_t k = 0; k < e.k; k += group) {
        const int live = static_cast<int>(min_of(group, e.k - k));
        for (int r = 0; r < group; ++r) {
          lane* buffer = buffers.data + r * stride;
          // Runs of different rows lie far apart, where the hardware does not guess them.
          b.reader.prefetch(k + r + 2 * group, col, n);
          const lane* row = r < live ? b.reader.read(k + r, col, n, buffer) : nullptr;
          if (!row) memset(buffer, 0, static_cast<size_t>(padded) * sizeof(lane));
          else if (row != buffer) memcpy(buffer, row, static_cast<size_t>(n) * sizeof(lane));
        }
        for (int64_t i = 0; i < e.m; ++i) {
          vf factor[group];
#pragma GCC unroll 8
          for (int r = 0; r < group; ++r) factor[r] = broadcast(r < live ? factors[i * e.k + k + r] : 0.0f);
          float* const out = sums + i * stride;
          for (int64_t c = 0; c < padded; c += W) {
            vf acc = load(out + c);
#pragma GCC unroll 8
            for (int r = 0; r < group; ++r) acc = fma(factor[r], load(buffers.data + r * stride + c), acc);
            store(out + c, acc);
          }
        }
      }
      for (int64_t i = 0; i < e.m; ++i) epilogue(i, col, n, sums + i * stride, sums + e.m * stride);
    }
  }
}

}  // namespace
}  // namespace gradmill
