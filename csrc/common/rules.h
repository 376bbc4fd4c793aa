// Optimizer rules: the update formula of one element, written once for CPU and CUDA.
//
// A rule says how many states it has and how one weight `p` moves given its gradient `g`. Formats are not its
// business: the step kernels hand it fp32 and store what it leaves. `h` are the group's scalars, computed in
// Python in double precision (pyops/optim/rules.py) and rounded once; h[0] multiplied the gradient already
// (1/grad_scale, or -1 for maximize). No fused multiply-add: the reference and Triton do the same operations.
// pyops/reference/optim.py is the specification.
//
// To add a rule: a struct here, its name in GM_RULES, and the same few lines in kernels/optim.py and
// pyops/reference/optim.py (CONTRIBUTING.md has the recipe).
#pragma once
#include <math.h>

#include "common.h"

namespace gradmill {
namespace {

constexpr int kMaxStates = 3;
constexpr int kMaxScalars = 16;

// Rules are templates on T, a float or a CPU vector of them (csrc/cpu/optim.cpp), so `?:` takes whole Ts.
GM_HD float root(float x) { return sqrtf(x); }
template <class T>
GM_HD T sign_of(T x) {  // nan stays nan
  const T zero = T{}, one = zero + 1.0f, minus_one = zero - 1.0f;
  return x > zero ? one : x < zero ? minus_one : x != x ? x : zero;
}

// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", Algorithm 2, in torch.optim.AdamW's form.
// h: 1 decay = 1 - lr*wd, 2 = 1-beta1, 3 = beta2, 4 = 1-beta2, 5 = lr/(1-beta1^t), 6 = 1/sqrt(1-beta2^t), 7 = eps
struct AdamW {
  static constexpr int states = 2;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T& v, T&, const float* h) {
    m = m + h[2] * (g - m);
    v = v * h[3] + (h[4] * g) * g;
    p = p * h[1] - h[5] * (m / (root(v) * h[6] + h[7]));
  }
};

// AdamW with the maximum of past v in the denominator (Reddi et al., "On the Convergence of Adam and Beyond").
struct AdamWAmsgrad {
  static constexpr int states = 3;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T& v, T& vmax, const float* h) {
    m = m + h[2] * (g - m);
    v = v * h[3] + (h[4] * g) * g;
    vmax = v > vmax || v != v ? v : vmax;
    p = p * h[1] - h[5] * (m / (root(vmax) * h[6] + h[7]));
  }
};

// Chen et al., "Symbolic Discovery of Optimization Algorithms", Algorithm 2 (Lion).
// h: 1 decay = 1 - lr*wd, 2 = 1-beta1, 3 = 1-beta2, 4 = lr
struct Lion {
  static constexpr int states = 1;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T&, T&, const float* h) {
    p = p * h[1] - h[4] * sign_of(m + h[2] * (g - m));
    m = m + h[3] * (g - m);
  }
};

// name in Python, struct: the number native code uses is the place in this list.
#define GM_RULES(X)                \
  X("adamw", AdamW)                \
  X("adamw_amsgrad", AdamWAmsgrad) \
  X("lion", Lion)

}  // namespace
}  // namespace gradmill
