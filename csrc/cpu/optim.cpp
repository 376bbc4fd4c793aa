// The fused optimizer step: rule x state format x weight format, many tensors in one call.
//
// The rule is the only template parameter. Formats are decoded and encoded around it on tiles that stay in L1,
// chosen at run time with a branch per block; a plain fp32 operand is not copied, the rule works on it in place,
// so that fp32 AdamW is one bare loop. Counts per element: fp32 AdamW reads 16 and writes 12 bytes; int8 states
// read 10 and write 6 (+ 16/256 for scales): 0.57 of the bytes.
#include "../common/rules.h"
#include "tile.h"

namespace gradmill {
namespace {

template <class R>
void apply_rule(float* __restrict p, const float* __restrict g, float* __restrict s0, float* __restrict s1,
                float* __restrict s2, int64_t n, const float* __restrict scalars) {
  float h[kMaxScalars];
  for (int i = 0; i < kMaxScalars; ++i) h[i] = scalars[i];  // known not to alias: stays in registers
  for (int64_t i = 0; i < n; ++i) {
    float w = p[i], m0 = 0.0f, m1 = 0.0f, m2 = 0.0f;
    if constexpr (R::states > 0) m0 = s0[i];
    if constexpr (R::states > 1) m1 = s1[i];
    if constexpr (R::states > 2) m2 = s2[i];
    R::apply(w, g[i] * h[0], m0, m1, m2, h);
    p[i] = w;
    if constexpr (R::states > 0) s0[i] = m0;
    if constexpr (R::states > 1) s1[i] = m1;
    if constexpr (R::states > 2) s2[i] = m2;
  }
}

using ApplyFn = void (*)(float*, const float*, float*, float*, float*, int64_t, const float*);
struct RuleEntry {
  ApplyFn apply;
  int states;
};
const RuleEntry kRules[] = {
#define GM_ENTRY(name, R) {apply_rule<R>, R::states},
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
  Shape shape;
  shape.rows = blocked ? t.param.rows : 1;
  shape.cols = blocked ? t.param.cols : t.param.rows * t.param.cols;
  if (!blocked) {
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
  const Key key{a.seed, a.step, t.id << 8 | kWeightRounding}, dither{a.seed, a.step, t.id << 8 | kDither};
  float *p_buffer = scratch, *old_buffer = scratch + shape.unit, *g_buffer = scratch + 2 * shape.unit, *s_buffer = scratch + 3 * shape.unit;
  const bool p_plain = view.param.code == kF32, p_blocked = is_blocked(view.param.code);
  for (int64_t u = begin; u < end; ++u) {
    int64_t row = u / shape.per_row, col = u % shape.per_row * shape.unit;
    int64_t n = shape.cols - col < shape.unit ? shape.cols - col : shape.unit;
    if (p_plain && a.grad_code == kF32 && begin + 1 < end && shape.rows == 1) {
      bool all_plain = true;  // everything fp32: one loop over the whole run of units
      for (int s = 0; s < rule.states; ++s) all_plain &= view.states[s].code == kF32;
      if (all_plain) n = (end * shape.unit < shape.cols ? end * shape.unit : shape.cols) - col, u = end;
    }
    float* p = p_plain ? reinterpret_cast<float*>(tile_address(view.param, row, col)) : p_buffer;
    if (!p_plain) decode_tile(view.param, row, col, n, p);
    if (p_blocked) memcpy(old_buffer, p, static_cast<size_t>(n) * 4);
    const char* grad = static_cast<const char*>(t.grad) + (row * shape.cols + col) * code_bits(a.grad_code) / 8;
    const float* g = reinterpret_cast<const float*>(grad);
    if (a.grad_code != kF32) decode_floats(a.grad_code, grad, n, g_buffer), g = g_buffer;
    float* states[kMaxStates] = {s_buffer, s_buffer, s_buffer};
    for (int s = 0; s < rule.states; ++s) {
      const Matrix& m = view.states[s];
      states[s] = m.code == kF32 ? reinterpret_cast<float*>(tile_address(m, row, col)) : s_buffer + s * shape.unit;
      if (m.code != kF32) decode_tile(m, row, col, n, states[s]);
    }
    rule.apply(p, g, states[0], states[1], states[2], n, h);
    for (int s = 0; s < rule.states; ++s)
      if (view.states[s].code != kF32)
        encode_tile(view.states[s], row, col, n, states[s], view.states[s].code == kSquare8 ? &dither : nullptr, true);
    if (!p_plain) {
      const bool rounds = p_blocked || view.param.code == kBF16;
      update_tile(view.param, row, col, n, p_blocked ? old_buffer : nullptr, p, rounds ? &key : nullptr);
    }
  }
}

struct Task {
  int64_t tensor, begin, end;
};

void step(const StepArgs& a) {
  constexpr int64_t chunk = 1 << 16;  // elements a task holds: 1.8 MB of fp32 AdamW traffic
  const int states = kRules[a.rule].states;
  int64_t tasks_count = 0, elements = 0, unit_max = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    Shape s = shape_of(a.tensors[i], states);
    int64_t units = s.rows * s.per_row, per_task = chunk / s.unit > 0 ? chunk / s.unit : 1;
    tasks_count += (units + per_task - 1) / per_task;
    elements += s.rows * s.cols;
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
    float* scratch = static_cast<float*>(malloc(static_cast<size_t>(unit_max) * 4 * (3 + kMaxStates)));
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

}  // namespace

const OptimKernels GM_TABLE(optim) = {step};

}  // namespace gradmill
