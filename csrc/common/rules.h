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
template <class T>
GM_HD T magnitude(T x) {
  return x < T{} ? -x : x;
}

// The gradient with a decay in it, and as it is where there is none: 0 times a weight of inf (a mask, say) is nan.
template <class T>
GM_HD T with_decay(T g, float decay, T p) {
  return decay != 0.0f ? g + decay * p : g;
}

// 2^x and log2(x) by polynomials (least squares on Chebyshev nodes, relative errors 2e-9 and 7e-10), so that every backend
// has the same bits. exp2_of saturates at 2^-126 and 2^127.75; log2_of wants a normal x > 0. A nan or an inf gives any number.
template <class T>
GM_HD T exp2_of(T x) {
  const T low = T{} - 126.0f, high = T{} + 127.75f;
  x = x < low ? low : x > high ? high : x;
  const T shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits are the nearest whole number
  const T f = x - (shifted - 12582912.0f);
  const T p = (((((f * 1.53533663e-4f + 1.33988797e-3f) * f + 9.61843692e-3f) * f + 5.55033237e-2f) * f + 0.240226477f) * f + 0.693147182f) * f + 1.0f;
  return bits_float(float_bits(p) + (float_bits(shifted) << 23));
}
template <class T>
GM_HD T log2_of(T x) {
  const auto bits = float_bits(x) + (0x3f800000u - 0x3f3504f3u);  // the mantissa m in [sqrt(1/2), sqrt(2))
  const T m = bits_float((bits & 0x7fffffu) + 0x3f3504f3u);
  const T e = bits_float((bits >> 23) + 0x4b400000u) - (12582912.0f + 127.0f);
  const T s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  return e + (((s2 * 0.431735814f + 0.576714396f) * s2 + 0.961798847f) * s2 + 2.88539004f) * s;
}
// x^y for x >= 0. Exact products and roots for y of 1, 2 and 1/2; else within (4 + |y log2 x|) 2^-23 of itself. inf and nan stay.
template <class T>
GM_HD T power(T x, float y) {
  if (y == 1.0f) return x;
  if (y == 2.0f) return x * x;
  if (y == 0.5f) return root(x);
  const T tiny = T{} + 1.17549435e-38f;
  const T result = exp2_of(log2_of(x) * y);
  return x - x != T{} ? x : x < tiny ? T{} : result;
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

// Kingma and Ba, "Adam", in torch.optim.Adam's form: the decay is part of the gradient. h: as AdamW with decay 1, 8 = wd
struct Adam {
  static constexpr int states = 2;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T& v, T& unused, const float* h) {
    AdamW::apply(p, g + h[8] * p, m, v, unused, h);
  }
};
struct AdamAmsgrad {
  static constexpr int states = 3;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T& v, T& vmax, const float* h) {
    AdamWAmsgrad::apply(p, g + h[8] * p, m, v, vmax, h);
  }
};

// torch.optim.SGD. h: 1 = factor on p (1, or a decoupled decay), 2 = lr, 3 = wd (part of the gradient)
struct Sgd {
  static constexpr int states = 0;
  template <class T>
  GM_HD static void apply(T& p, T g, T&, T&, T&, const float* h) {
    p = p * h[1] - h[2] * with_decay(g, h[3], p);
  }
};

// The same with momentum; with dampening = momentum Muon's and AuON's moving average.
// h: as Sgd, 4 = momentum, 5 = 1-dampening, 6 = 1-dampening for Nesterov's update, else 0
struct SgdMomentum {
  static constexpr int states = 1;
  template <class T>
  GM_HD static void apply(T& p, T g, T& b, T&, T&, const float* h) {
    g = with_decay(g, h[3], p);
    b = h[4] * b + h[5] * g;
    p = p * h[1] - h[2] * (h[6] != 0.0f ? h[6] * g + h[4] * b : b);
  }
};

// Duchi, Hazan and Singer, "Adaptive Subgradient Methods", in torch.optim.Adagrad's form.
// h: 1 = lr/(1+(t-1) lr_decay), 2 = wd (part of the gradient), 3 = eps
struct Adagrad {
  static constexpr int states = 1;
  template <class T>
  GM_HD static void apply(T& p, T g, T& sum, T&, T&, const float* h) {
    g = with_decay(g, h[2], p);
    sum = sum + g * g;
    p = p - h[1] * (g / (root(sum) + h[3]));
  }
};

// Zhuang et al., "AdaBelief Optimizer". h: 1 decay, 2 = 1-beta1, 3 = beta2, 4 = 1-beta2, 5 = step size, 6, 7: the
// denominator is root(s) * h[6] + h[7] (0 and 1: a rectified step that is still SGD's), 8 = eps added to s, 9 = coupled wd
struct AdaBelief {
  static constexpr int states = 2;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T& s, T&, const float* h) {
    g = with_decay(g, h[9], p);
    m = m + h[2] * (g - m);
    const T d = g - m;
    s = (s * h[3] + (h[4] * d) * d) + h[8];
    p = p * h[1] - h[5] * (m / (root(s) * h[6] + h[7]));
  }
};

// Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural Networks". The friction 1/(1 + exp(-|x|)).
// h: 1 = wd (part of the gradient), 2 = 1-beta1, 3 = beta2, 4 = 1-beta2, 5 = lr sqrt(1-beta2^t)/(1-beta1^t), 6 = eps
struct DiffGrad {
  static constexpr int states = 3;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T& v, T& previous, const float* h) {
    g = with_decay(g, h[1], p);
    m = m + h[2] * (g - m);
    v = v * h[3] + (h[4] * g) * g;
    const T x = magnitude(previous - g);
    const T friction = 1.0f / (1.0f + exp2_of(x * -1.44269504f));
    p = p - h[5] * ((friction * m) / (root(v) + h[6]));
    previous = g;
  }
};

// Cao et al., "Grams: Gradient Descent with Adaptive Momentum Scaling".
// h: 1 decay, 2 = 1-beta1, 3 = beta2, 4 = 1-beta2, 5 = lr sqrt(1-beta2^t)/(1-beta1^t), 6 = eps
struct Grams {
  static constexpr int states = 2;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T& v, T&, const float* h) {
    m = m + h[2] * (g - m);
    v = v * h[3] + (h[4] * g) * g;
    p = p * h[1] - h[5] * (sign_of(g) * (magnitude(m) / (root(v) + h[6])));
  }
};

// Liu et al., "Sophia", Algorithm 3. h: 1 decay, 2 = 1-beta1, 3 = rho, 4 = eps, 5 = lr
struct Sophia {
  static constexpr int states = 2;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T& hessian, T&, const float* h) {
    const T one = T{} + 1.0f, least = T{} + h[4];
    m = m + h[2] * (g - m);
    T d = h[3] * hessian;
    d = d < least ? least : d;
    const T u = m / d;
    p = p * h[1] - h[5] * (u > one ? one : u < -one ? -one : u);
  }
};
// Its moving average of the Hessian's diagonal; p stays. h: 1 = beta2, 2 on an estimate, 3 on the square of a gradient
struct SophiaHessian {
  static constexpr int states = 1;
  template <class T>
  GM_HD static void apply(T&, T g, T& hessian, T&, T&, const float* h) {
    hessian = hessian * h[1] + (h[2] != 0.0f ? h[2] * g : (h[3] * g) * g);
  }
};

// Ludwig, "CLASSP". h: 1 = lr, 2 = threshold, 3 = eps, 4 = power, 5 = 1/power
struct Classp {
  static constexpr int states = 1;
  template <class T>
  GM_HD static void apply(T& p, T g, T& sum, T&, T&, const float* h) {
    const T square = g * g, threshold = T{} + h[2], grown = sum + power(magnitude(g), h[4]);
    const T stepped = p - h[1] * (g / power(grown + h[3], h[5]));
    p = square <= threshold ? p : stepped;
    sum = square <= threshold ? sum : grown;
  }
};

// You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", Algorithm 2 (LAMB), first half: p, a
// copy of the weight, becomes the update; Sgd applies it times the trust ratio.
// h: 1 = wd, 2 = 1-beta1, 3 = beta2, 4 = 1-beta2, 5 = 1/(1-beta1^t), 6 = 1/sqrt(1-beta2^t), 7 = eps
struct Lamb {
  static constexpr int states = 2;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T& v, T&, const float* h) {
    m = m + h[2] * (g - m);
    v = v * h[3] + (h[4] * g) * g;
    p = h[1] * p + h[5] * (m / (root(v) * h[6] + h[7]));
  }
};

// You et al., "Large Batch Training of Convolutional Networks", Algorithm 1 (LARS). h: 1 = wd, 2 = momentum, 3 = lr times trust ratio
struct Lars {
  static constexpr int states = 1;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T&, T&, const float* h) {
    m = h[2] * m + h[3] * (g + h[1] * p);
    p = p - m;
  }
};

// Huang et al., "Stable-SPAM", Algorithm 1: AdamW after clipping single elements and scaling the tensor's gradient.
// h: AdamW's, 9 = largest magnitude left alone, 10 = factor of larger elements, 11 = factor of all
struct StableSPAM {
  static constexpr int states = 2;
  template <class T>
  GM_HD static void apply(T& p, T g, T& m, T& v, T& unused, const float* h) {
    const T limit = T{} + h[9];
    AdamW::apply(p, h[11] * (magnitude(g) > limit ? h[10] * g : g), m, v, unused, h);
  }
};

// name in Python, struct: the number native code uses is the place in this list.
#define GM_RULES(X)                \
  X("adamw", AdamW)                \
  X("adamw_amsgrad", AdamWAmsgrad) \
  X("lion", Lion)                  \
  X("adam", Adam)                  \
  X("adam_amsgrad", AdamAmsgrad)   \
  X("sgd", Sgd)                    \
  X("sgd_momentum", SgdMomentum)   \
  X("adagrad", Adagrad)            \
  X("adabelief", AdaBelief)        \
  X("diffgrad", DiffGrad)          \
  X("grams", Grams)                \
  X("sophia", Sophia)              \
  X("sophia_hessian", SophiaHessian) \
  X("classp", Classp)              \
  X("lamb", Lamb)                  \
  X("lars", Lars)                  \
  X("stable_spam", StableSPAM)

}  // namespace
}  // namespace gradmill
