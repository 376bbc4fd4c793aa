"""Which 8-bit code for block-wise quantised Adam moments?

    python bench/state_codes.py --out docs/results/state_codes.md
    python bench/state_codes.py --formats --out docs/results/state_formats.md

The second form trains the same model with gradmill's own optimizers in every
state format instead, against fp32 states.

Every candidate code is emulated in plain torch (encode, then decode) on blocks
of 256 elements with one fp32 scale each, and judged four ways:

* static: round trip of real m and v snapshots (fp32 AdamW training of a small
  byte-level LM on the Python standard library's sources); errors of m, v,
  sqrt(v) and of the update m / (sqrt(v) + eps);
* freezing: a long average of synthetic gradients through every v code;
* drift: the same training with the states round-tripped after every step; a
  shadow copy of m and v gets the same gradients without rounding, and the
  difference at the end shows what rounding does over time (a static round trip
  cannot show that a slow average freezes below half a code step);
* loss: final training and validation loss of those runs against fp32 states
  with the same seed. "fp32, init + 1e-6 noise" is the chaos floor: differences
  of its size mean nothing.

All matrices of the model have rows that are multiples of 256, so every block
is full, and a flat [blocks, 256] view never crosses a row.
"""
import argparse
import math
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
import torch.nn.functional as F

BLOCK = 256
EPS = 1e-8

# ----------------------------------------------------------------- the codes
# A code is a function [n, 256] float32 -> the decoded [n, 256] float32; one
# with the attribute `dithered` takes the step as well.


def round_trip(code, x, step):
    return code(x, step) if hasattr(code, "dithered") else code(x)


def absmax(x):
    return x.abs().amax(1, keepdim=True)


def recip(top, a):
    """top / a per block, 0 for an all-zero block.

    Not `top / a`: torch computes number / tensor as number * (1 / tensor).
    """
    return torch.where(a > 0, torch.full_like(a, top) / a, 0.0)


def root(x):
    """Correctly rounded sqrt; torch.sqrt(float32) on CPU (MKL) is not."""
    return x.double().sqrt().float()


def bits(x):
    return x.view(torch.int32)


def linear_m(x):
    a = absmax(x)
    return torch.round(x * recip(127.0, a)) * (a / 127.0)


def linear_v(x):
    a = absmax(x)
    return torch.round(x * recip(255.0, a)) * (a / 255.0)


def compand_m(x):
    """FlashOptim: y = 2x / (1 + |x|), linear int8 in y."""
    a = absmax(x)
    x = x * recip(1.0, a)
    y = torch.round(127.0 * (2.0 * x / (1.0 + x.abs()))) / 127.0
    return y / (2.0 - y.abs()) * a


def root_v(degree, low):
    """FlashOptim at degree=2, low=0: uint8 linear in the root of v / max."""
    def code(x):
        a = absmax(x)
        u = root(x * recip(1.0, a))
        if degree == 4:
            u = root(u)
        u = torch.round(255.0 * u).clamp_(low, 255.0) * (1.0 / 255.0)
        u = u * u
        if degree == 4:
            u = u * u
        return u * a
    return code


def round_bits(y, shift):
    """float bit pattern cut to 23 - shift mantissa bits, half to even."""
    b = bits(y)
    return (b + ((1 << (shift - 1)) - 1) + ((b >> shift) & 1)) >> shift


def minifloat(man, nbits, zero, pow2=False):
    """Float with `man` mantissa bits, no subnormals, top code = block's max.

    zero: code 0 is the value 0 (signed m); otherwise all codes are nonzero and
    everything small is clamped to the smallest one (v).
    pow2: scale is a power of two, so the block's max is rounded too.
    """
    shift, n = 23 - man, (1 << nbits) - 1
    top = 2.0 - 2.0 ** -man
    top_code = int(bits(torch.tensor([top]))[0]) >> shift
    base = top_code - n

    def code(x):
        a = absmax(x)
        if pow2:
            s = (bits(a) & 0x7F800000).view(torch.float32)
            inv = recip(1.0, s)
        else:
            s, inv = a / top, recip(top, a)
        y = x.abs() * inv
        q = (round_bits(y, shift) - base).clamp_(1 if zero else 0, n)
        d = ((q + base) << shift).view(torch.float32)
        if zero:
            low = torch.tensor([1 + base], dtype=torch.int32) << shift
            d = torch.where(y < 0.5 * low.view(torch.float32), 0.0, d)
            d = torch.copysign(d, x)
        return d * s
    return code


def subnormal_float(exp, man):
    """Signed float, `exp` exponent and `man` mantissa bits, with subnormals."""
    top, emin = 2.0 - 2.0 ** -man, 2 - 2 ** exp

    def code(x):
        a = absmax(x)
        y = x.abs() * recip(top, a)
        e = ((bits(y) >> 23) - 127).clamp_(emin, 0)
        step = torch.ldexp(torch.ones_like(y), e - man)
        d = (torch.round(y / step) * step).clamp_(max=top)
        return torch.copysign(d, x) * (a / top)
    return code


def weyl(shape, step, shift):
    """Dither below 1 << shift: top bits of index * odd + step * odd mod 2^32."""
    i = torch.arange(math.prod(shape), dtype=torch.int64).view(shape)
    w = (i * 0x9E3779B1 + step * 0x85EBCA6B) & 0xFFFFFFFF
    return (w >> (32 - shift)).int()


def offset_levels(x, a, man, nbits, low, step=None):
    """|x| coded as the cut bit pattern of 1 + |x| * top / a.

    Nearest (half up), or with a step: dithered by a Weyl sequence.
    """
    shift, n, base = 23 - man, (1 << nbits) - 1, 0x3F800000 >> (23 - man)
    top = (2.0 - 2.0 ** -man) * 2.0 ** ((1 << (nbits - man)) - 1) - 1.0
    y = x.abs() * recip(top, a) + 1.0
    half = 1 << (shift - 1) if step is None else weyl(x.shape, step, shift)
    q = (((bits(y) + half) >> shift) - base).clamp_(low, n)
    return (((q + base) << shift).view(torch.float32) - 1.0), a / top


def offset_m(man):
    """Signed offset float: sign bit and 7 bits with `man` mantissa bits."""
    def code(x):
        d, s = offset_levels(x, absmax(x), man, 7, 0)
        return torch.copysign(d, x) * s
    return code


def offset_v(man):
    """Unsigned offset float of v itself, never 0."""
    def code(x):
        d, s = offset_levels(x, absmax(x), man, 8, 1)
        return d * s
    return code


def offset_r(man, dithered=False):
    """Unsigned offset float of r = sqrt(v), never 0; the rule has r anyway."""
    def code(x, step=None):
        d, s = offset_levels(root(x), root(absmax(x)), man, 8, 1, step)
        r = d * s
        return r * r
    if dithered:
        code.dithered = True
    return code


def dynamic_map(signed):
    """bitsandbytes' create_dynamic_map: dynamic tree, 7 exponent bits."""
    values = [0.0, 1.0]
    for i in range(7):
        edge = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        mean = (10 ** (i - 6) * ((edge[:-1] + edge[1:]) / 2)).tolist()
        values += mean + ([-z for z in mean] if signed else [])
    assert len(values) == 256
    return torch.tensor(sorted(values))


def dynamic(signed):
    table = dynamic_map(signed)
    middle = (table[1:] + table[:-1]) / 2

    def code(x):
        a = absmax(x)
        return table[torch.bucketize(x * recip(1.0, a), middle)] * a
    return code


def exact(x):
    return x


M_CODES = {
    "linear": linear_m,
    "compand": compand_m,
    "s1e4m3": minifloat(3, 7, True),
    "s1e3m4": minifloat(4, 7, True),
    "s1e4m3 sub": subnormal_float(4, 3),
    "s1e3m4 sub": subnormal_float(3, 4),
    "offset e4m3": offset_m(3),
    "offset e3m4": offset_m(4),
    "offset e2m5": offset_m(5),
    "bnb dynamic": dynamic(True),
}
V_CODES = {
    "linear": linear_v,
    "sqrt": root_v(2, 0),
    "sqrt >=1": root_v(2, 1),
    "root4 >=1": root_v(4, 1),
    "e5m3": minifloat(3, 8, False),
    "e4m4": minifloat(4, 8, False),
    "e4m4 pow2 scale": minifloat(4, 8, False, pow2=True),
    "offset e4m4": offset_v(4),
    "offset sqrt e3m5": offset_r(5),
    "offset sqrt e2m6": offset_r(6),
    "offset sqrt e3m5 dithered": offset_r(5, True),
    "bnb dynamic": dynamic(False),
}
# (code of m, code of v, trained too?)
PAIRS = [
    ("linear", "linear", True),
    ("compand", "sqrt", True),
    ("compand", "sqrt >=1", True),
    ("compand", "root4 >=1", False),
    ("s1e4m3", "e5m3", True),
    ("s1e4m3", "e4m4", False),
    ("s1e3m4", "e4m4", False),
    ("s1e4m3 sub", "e4m4", False),
    ("s1e3m4 sub", "e4m4", True),
    ("offset e3m4", "root4 >=1", True),
    ("offset e3m4", "e4m4", True),
    ("offset e3m4", "e4m4 pow2 scale", False),
    ("offset e3m4", "offset e4m4", False),
    ("offset e3m4", "offset sqrt e3m5", True),
    ("offset e2m5", "sqrt >=1", True),
    ("offset e2m5", "offset sqrt e3m5", True),
    ("offset e2m5", "offset sqrt e2m6", True),
    ("offset e3m4", "offset sqrt e3m5 dithered", True),
    ("offset e2m5", "offset sqrt e3m5 dithered", True),
    ("offset e4m3", "offset sqrt e3m5", False),
    ("bnb dynamic", "bnb dynamic", True),
]
# Hand count of vector operations per vector of elements; the absmax scan and
# memory traffic are left out: (C name, encode, decode, div + sqrt in both,
# operations). The scale's reciprocal is taken once per block.
COST_M = {
    "linear": ("linear", 3, 4, 0, "mul add pack; widen cvt mul"),
    "compand": ("compand", 9, 9, 2, "mul add and add div mul add pack; "
                "widen cvt mul and sub div mul"),
    "s1e3m4 sub": ("", 17, 11, 0, "offset's, and exponent max, magic add, "
                   "blend; blend"),
    "offset": ("off_m", 9, 9, 0, "and mul add iadd shr shr and or pack; "
               "widen and shl iadd sub and shl or mul"),
    "bnb dynamic": ("", 34, 3, 0, "8 dependent gather + cmp steps; gather"),
}
COST_V = {
    "linear": ("linear", 3, 4, 0, "mul add pack; widen cvt mul"),
    "sqrt >=1": ("sqrt1", 5, 4, 0, "(rule's sqrt) mul add and max pack; "
                 "widen cvt mul mul"),
    "root4 >=1": ("root4", 7, 6, 1, "(rule's sqrt) sqrt mul add and max pack; "
                  "widen cvt mul mul mul mul"),
    "e4m4": ("e4m4", 8, 4, 0, "mul shr and iadd iadd shr max pack; "
             "widen iadd shl mul"),
    "offset sqrt": ("off_r", 6, 6, 0, "(rule's sqrt) mul add iadd shr max "
                    "pack; widen shl iadd sub mul mul"),
    "offset sqrt dithered": ("off_rd", 9, 6, 0, "and two more to step and "
                             "shift the dither, and min"),
    "bnb dynamic": ("", 34, 3, 0, "8 dependent gather + cmp steps; gather"),
}
C_BENCH = r"""
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#define N 256
static inline uint32_t fb(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float bf(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
#define CODE(name, enc, dec) \
  __attribute__((noinline)) static void e_##name(const float *restrict p, \
      uint8_t *restrict o, float inv, uint32_t d) { \
    for (int i = 0; i < N; i++) { float x = p[i]; int32_t k; enc; o[i] = k; } } \
  __attribute__((noinline)) static void d_##name(const uint8_t *restrict p, \
      float *restrict o, float s) { \
    for (int i = 0; i < N; i++) { uint32_t q = p[i]; float y; dec; o[i] = y; } }
CODE(linear, k = fb(x * inv + 12582912.f), y = (float)(int8_t)q * s)
CODE(compand, float a = x * inv;
     k = fb(127.f * ((a + a) / (1.f + fabsf(a))) + 12582912.f),
     float a = (float)(int8_t)q * (1.f / 127.f); y = a / (2.f - fabsf(a)) * s)
CODE(off_m, uint32_t u = fb(x); float a = bf(u & 0x7fffffff) * inv + 1.f;
     k = ((fb(a) - (0x3f800000u - 0x20000u)) >> 18) | (u >> 24 & 0x80),
     float a = bf(((q & 127) << 18) + 0x3f800000u) - 1.f;
     y = bf(fb(a) | (q & 128) << 24) * s)
CODE(sqrt1, k = fb(x * inv + 12582912.f) & 511; k = k > 1 ? k : 1,
     float r = (float)(int32_t)q * s; y = r * r)
CODE(root4, k = fb(sqrtf(x * inv) * 255.f + 12582912.f) & 511;
     k = k > 1 ? k : 1,
     float r = (float)(int32_t)q * (1.f / 255.f); r = r * r; y = r * r * s)
CODE(e4m4, uint32_t u = fb(x * inv);
     k = (int32_t)((u + 0x3ffff + (u >> 19 & 1)) >> 19) - 1792;
     k = k > 1 ? k : 1, y = bf((q + 1792) << 19) * s)
CODE(off_r, k = (fb(x * inv + 1.f) - (0x3f800000u - 0x20000u)) >> 18;
     k = k > 1 ? k : 1,
     float r = (bf((q << 18) + 0x3f800000u) - 1.f) * s; y = r * r)
CODE(off_rd, uint32_t w = ((uint32_t)i * 0x9E3779B1u + d) >> 14;
     k = (fb(x * inv + 1.f) - 0x3f800000u + w) >> 18;
     k = k < 255 ? k : 255; k = k > 1 ? k : 1,
     float r = (bf((q << 18) + 0x3f800000u) - 1.f) * s; y = r * r)
__attribute__((noinline)) static void rule(float *restrict p,
    const float *restrict g, float *restrict m, float *restrict v) {
  for (int i = 0; i < N; i++) {
    float a = .9f * m[i] + .1f * g[i], b = .999f * v[i] + .001f * g[i] * g[i];
    m[i] = a; v[i] = b;
    p[i] = p[i] * .99f - 1e-3f * (a / (sqrtf(b) * 1.1f + 1e-8f));
  }
}
static float X[N], Y[N], P[N], G[N], M[N], V[N];
static uint8_t Q[N];
static double now(void) {
  struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e9 + t.tv_nsec;
}
static double best(double a, double b) { return a < b ? a : b; }
#define TIME(name, inv) { double e = 1e99, d = 1e99; \
  for (int r = 0; r < 40; r++) { \
    double a = now(); \
    for (int k = 0; k < 2000; k++) e_##name(X, Q, inv, k * 0x85EBCA6Bu); \
    double b = now(); \
    for (int k = 0; k < 2000; k++) d_##name(Q, Y, 1.f); \
    e = best(e, b - a); d = best(d, now() - b); } \
  printf(#name " %.3f %.3f\n", e / 2000 / N, d / 2000 / N); }
int main(void) {
  for (int i = 0; i < N; i++) G[i] = X[i] = (i + 1) / 256.f;
  TIME(linear, 127.f) TIME(compand, 1.f) TIME(off_m, 14.75f)
  TIME(sqrt1, 255.f) TIME(root4, 1.f) TIME(e4m4, 1.9375f)
  TIME(off_r, 251.f) TIME(off_rd, 251.f)
  double e = 1e99;
  for (int r = 0; r < 40; r++) {
    double a = now();
    for (int k = 0; k < 2000; k++) rule(P, G, M, V);
    e = best(e, now() - a);
  }
  printf("rule %.3f 0\n", e / 2000 / N);
}
"""


def c_times(flag):
    """ns per element (encode, decode) of the C codes on data in L1; or {}."""
    cc = shutil.which("gcc") or shutil.which("cc")
    if not cc:
        return {}
    with tempfile.TemporaryDirectory() as tmp:
        src, exe = pathlib.Path(tmp, "c.c"), pathlib.Path(tmp, "c")
        src.write_text(C_BENCH)
        subprocess.run([cc, "-O3", flag, "-ffp-contract=off", "-fno-math-errno",
                        src, "-o", exe, "-lm"], check=True)
        out = subprocess.run([exe], check=True, capture_output=True, text=True)
    return {k: (float(e), float(d)) for k, e, d in
            (line.split() for line in out.stdout.splitlines())}


# ----------------------------------------------------------------- the model
DIM, LAYERS, HEADS, HIDDEN, VOCAB, SEQ, BATCH = 256, 2, 4, 256, 256, 128, 4


def shapes():
    layer = [(3 * DIM, DIM), (DIM, DIM), (2 * HIDDEN, DIM), (DIM, HIDDEN)]
    return [(VOCAB, DIM)] + LAYERS * layer + [(VOCAB, DIM)]


def views(flat):
    out, at = [], 0
    for r, c in shapes():
        out.append(flat[at:at + r * c].view(r, c))
        at += r * c
    return out


def initial(seed):
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(s, generator=g) * (0.02 if i == 0 else s[1] ** -0.5)
             for i, s in enumerate(shapes())]
    return torch.cat([p.flatten() for p in parts])


def norm(x):
    return F.rms_norm(x, (DIM,))


def loss_of(w, ids):
    """Mean next-byte loss of a pre-norm decoder; norms have no weights."""
    x = w[0][ids[:, :-1]]
    x = x + SEQ_CODE
    b, t, _ = x.shape
    for i in range(LAYERS):
        qkv, proj, up, down = w[1 + 4 * i:5 + 4 * i]
        q, k, v = (norm(x) @ qkv.T).view(b, t, 3, HEADS, -1).permute(
            2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + a.transpose(1, 2).reshape(b, t, DIM) @ proj.T
        gate, lin = (norm(x) @ up.T).chunk(2, -1)
        x = x + (F.silu(gate) * lin) @ down.T
    logits = norm(x) @ w[-1].T
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def sinusoids():
    t = torch.arange(SEQ)[:, None]
    f = torch.exp(-math.log(1e4) * torch.arange(DIM // 2) / (DIM // 2))
    return 0.02 * torch.cat([torch.sin(t * f), torch.cos(t * f)], 1)


SEQ_CODE = sinusoids()


def corpus():
    lib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(lib.glob("*.py"))

    def join(part):
        raw = b"".join(f.read_bytes() for f in part)
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return (join([f for i, f in enumerate(files) if i % 10]),
            join(files[::10]))


def sample(data, gen, n):
    at = torch.randint(len(data) - SEQ - 1, (n,), generator=gen)
    return torch.stack([data[i:i + SEQ + 1] for i in at.tolist()]).long()


def update_of(m, v, betas, t):
    c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
    return (m / c1) / ((v / c2).sqrt() + EPS)


def rel(x, ref):
    """Relative RMS error."""
    return ((x - ref).double().norm() / ref.double().norm()).item()


def train(mcode, vcode, seed, steps, betas, lr=1e-3, wd=0.01, jitter=0.0,
          decay=False, snap_at=()):
    """AdamW with the states round-tripped through the codes at each step.

    decay: linear to 0 over the second half, which makes final losses of runs
    that differ only by chaos comparable.
    """
    torch.set_num_threads(1)
    began = time.time()
    enc_m = M_CODES.get(mcode, exact)
    enc_v = V_CODES.get(vcode, exact)
    coded = enc_m is not exact or enc_v is not exact
    text, held = corpus()
    p = initial(seed)
    if jitter:
        g = torch.Generator().manual_seed(5)
        p = p * (1 + jitter * torch.randn(p.shape, generator=g))
    w = views(p)
    gen = torch.Generator().manual_seed(1000 + seed)
    val = sample(held, torch.Generator().manual_seed(7), 64)
    m, v = (torch.zeros(p.numel() // BLOCK, BLOCK) for _ in range(2))
    m0, v0 = m.clone(), v.clone()
    b1, b2 = betas
    losses, snaps, flat = [], [], p.view(-1, BLOCK)
    for t in range(1, steps + 1):
        for q in w:
            q.requires_grad_(True)
        loss = loss_of(w, sample(text, gen, BATCH))
        grads = torch.autograd.grad(loss, w)
        for q in w:
            q.requires_grad_(False)
        g = torch.cat([q.flatten() for q in grads]).view(-1, BLOCK)
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        if coded:
            m0.mul_(b1).add_(g, alpha=1 - b1)
            v0.mul_(b2).addcmul_(g, g, value=1 - b2)
        up = update_of(m, v, betas, t)
        rate = lr * min(1.0, 2 * (1 - (t - 1) / steps) if decay else 1.0)
        flat.mul_(1 - rate * wd).add_(up, alpha=-rate)
        losses.append(loss.item())
        if t in snap_at:
            snaps.append((t, m.clone(), v.clone()))
        if t < steps:
            m, v = enc_m(m), round_trip(enc_v, v, t)
    with torch.no_grad():
        vloss = loss_of(w, val).item()
    out = dict(seed=seed, train=sum(losses[-30:]) / len(losses[-30:]), val=vloss,
               secs=time.time() - began)
    if coded:
        live = v0 > 0
        out["drift_r"] = rel(v.sqrt(), v0.sqrt())
        # gain > 1: coded updates are larger than the exact ones
        out["gain"] = (v0[live].sqrt() / v[live].sqrt().clamp_min(1e-30)
                       ).clamp_max(1e6).log2().mean().exp2().item()
        out["drift_up"] = rel(up, update_of(m0, v0, betas, steps))
    if snaps:
        out["snaps"] = snaps
    return out


def train_format(rule, states, seed, steps):
    """The same training by one of gradmill's optimizers."""
    from gradmill import optim
    torch.set_num_threads(1)
    text, held = corpus()
    w = [torch.nn.Parameter(p.clone()) for p in views(initial(seed))]
    # Lion as its paper advises: a third of the rate
    opt = (optim.AdamW(w, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01,
                       states=states, seed=seed) if rule == "AdamW" else
           optim.Lion(w, lr=3e-4, weight_decay=0.03, states=states, seed=seed))
    rate = opt.param_groups[0]["lr"]
    gen = torch.Generator().manual_seed(1000 + seed)
    val = sample(held, torch.Generator().manual_seed(7), 64)
    losses = []
    for t in range(1, steps + 1):
        loss = loss_of(w, sample(text, gen, BATCH))
        opt.zero_grad()
        loss.backward()
        opt.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - (t - 1) / steps))
        opt.step()
        losses.append(loss.item())
    with torch.no_grad():
        vloss = loss_of(w, val).item()
    return dict(seed=seed, train=sum(losses[-30:]) / len(losses[-30:]),
                val=vloss, bytes=optim.state_nbytes(opt) / initial(0).numel())


def formats(args):
    """The table of --formats."""
    seeds = range(args.seeds)
    doc = ["# Training with quantised optimizer states", "",
           f"Command: `python {' '.join(sys.argv)}`  ",
           f"Machine: {machine()}; torch {torch.__version__}, one thread.  ",
           f"The model and text of [state_codes.md](state_codes.md), "
           f"{args.steps} steps, rate constant, then linear to 0; seeds "
           f"{', '.join(map(str, seeds))}. Train: mean loss of the last 30 "
           "steps; val: 64 held-out sequences; change: to fp32 states with "
           "the same seed, each seed's.", ""]
    for rule in ("AdamW", "Lion"):
        doc += [f"## {rule}", "", "| states | bytes a weight | train | val | "
                "change of train | change of val |", "|" + " --- |" * 6]
        exact = {}
        for states in ("fp32", "bf16", "fp8", "int8", "int4"):
            runs = [train_format(rule, states, s, args.steps) for s in seeds]
            exact = exact or {r["seed"]: r for r in runs}
            cells = [f"{sum(r[k] for r in runs) / len(runs):.4f}"
                     for k in ("bytes", "train", "val")]
            cells += [", ".join(f"{100 * (r[k] / exact[r['seed']][k] - 1):+.2f}%"
                                for r in runs) for k in ("train", "val")]
            doc.append(f"| {states} | {' | '.join(cells)} |")
            print(doc[-1], flush=True)
        doc.append("")
    return "\n".join(doc)


def static(pair, snaps, betas):
    """Round-trip errors of one pair of codes over all snapshots."""
    rows = []
    for t, m, v in snaps:
        mq = M_CODES[pair[0]](m)
        vq = round_trip(V_CODES[pair[1]], v, t)
        up, uq = update_of(m, v, betas, t), update_of(mq, vq, betas, t)
        um = update_of(mq, v, betas, t)
        uv = update_of(m, vq, betas, t)
        live = m != 0
        lost = (vq == 0) & live
        rows.append([rel(mq, m), rel(vq, v), rel(vq.sqrt(), v.sqrt()),
                     rel(um, up), rel(uv, up), rel(uq, up),
                     (uq - up).abs().max().item(),
                     lost.sum().item() / live.sum().item(),
                     ((mq == 0) & live).sum().item() / live.sum().item()])
    out = torch.tensor(rows, dtype=torch.float64)
    mean = out.mean(0).tolist()
    mean[6] = out[:, 6].max().item()
    return mean


def freeze(vcode, steps=4000, beta=0.999):
    """A long average of synthetic gradients through a code of v.

    64 blocks, each element with its own fixed gradient scale (log-normal, one
    binade and a half of sigma); halfway the scales are shuffled in each block
    and all divided by 8. Gives (gain, RMS of log2 of coded / exact sqrt(v)) at
    the end of both halves: an element that froze cannot follow.
    """
    g = torch.Generator().manual_seed(3)
    code = V_CODES[vcode]
    scale = torch.exp2(1.5 * torch.randn(64, BLOCK, generator=g)) * 1e-3
    v, v0, out = torch.zeros(64, BLOCK), torch.zeros(64, BLOCK), []
    for t in range(1, steps + 1):
        x = torch.randn(64, BLOCK, generator=g) * scale
        v.mul_(beta).addcmul_(x, x, value=1 - beta)
        v0.mul_(beta).addcmul_(x, x, value=1 - beta)
        if t % (steps // 2) == 0:
            z = (v / v0).clamp_min(1e-12).log2() / 2
            out += [(-z.mean()).exp2().item(), z.square().mean().sqrt().item()]
            scale = scale.roll(BLOCK // 2, 1) / 8
        v = round_trip(code, v, t)
    return out


def spread(snaps):
    """Quantiles of max / x inside blocks, in binades."""
    out = []
    for t, m, v in snaps:
        cells = []
        for x in (m.abs(), v):
            a = absmax(x)
            z = torch.where(x > 0, torch.log2(a / x), torch.nan)
            z = z[~z.isnan()]
            z = z[torch.randperm(len(z), generator=torch.Generator()
                                 .manual_seed(0))[:500000]]
            q = torch.quantile(z, torch.tensor([0.5, 0.99, 0.9999]))
            cells.append(" / ".join(f"{k:.1f}" for k in q.tolist()))
        out.append((t, *cells))
    return out


def num(x):
    return f"{x:.2e}" if x and (abs(x) >= 100 or abs(x) < 1e-4) else f"{x:.4f}"


def machine():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {platform.system()}"
    return platform.platform()


def main():
    cli = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cli.add_argument("--out", type=pathlib.Path,
                     help="markdown file to write (default: print)")
    cli.add_argument("--formats", action="store_true",
                     help="train with gradmill's state formats instead")
    cli.add_argument("--steps", type=int, default=300)
    cli.add_argument("--seeds", type=int, default=2)
    cli.add_argument("--jobs", type=int, default=1,
                     help="training runs at once, one thread each")
    args = cli.parse_args()
    if args.formats:
        text = formats(args)
        if args.out:
            args.out.write_text(text)
        return
    torch.set_num_threads(1)
    began = time.time()
    n = sum(r * c for r, c in shapes())
    doc = [
        "# 8-bit codes for block-wise Adam moments", "",
        f"Command: `python {' '.join(sys.argv)}`  ",
        f"Machine: {machine()}; torch {torch.__version__}, Python "
        f"{platform.python_version()}, one thread per run.  ",
        f"Model: byte-level decoder, {n / 1e6:.2f} M parameters, d={DIM}, "
        f"{LAYERS} layers, batch {BATCH} x {SEQ}; AdamW lr 1e-3, wd 0.01, "
        f"eps 1e-8; text: the Python standard library's sources. Blocks of "
        f"{BLOCK}, fp32 scale, nearest rounding "
        "unless dithered.", ""]

    def table(head, rows):
        doc.append("| " + " | ".join(head) + " |")
        doc.append("|" + " --- |" * len(head))
        doc.extend("| " + " | ".join(map(str, r)) + " |" for r in rows)
        doc.append("")

    at = [k for k in (20, 100, 250) if k <= args.steps]
    for betas in ((0.9, 0.999), (0.9, 0.95)):
        snaps = train("", "", 0, at[-1], betas, snap_at=at)["snaps"]
        doc += [f"## Round trip of snapshots, betas {betas}", "",
                f"Steps {', '.join(map(str, at))}, mean of the steps (max for "
                "the max column). Update errors: with only m coded, only v "
                "coded, both.", ""]
        table(["log2(max/x) in a block: step", "m 50 / 99 / 99.99 %",
               "v 50 / 99 / 99.99 %"], spread(snaps))
        rows = [[a, b] + [num(z) for z in static((a, b), snaps, betas)]
                for a, b, _ in PAIRS]
        table(["m code", "v code", "rel m", "rel v", "rel sqrt(v)",
               "update, m only", "update, v only", "rel update",
               "max abs update err", "v lost (m != 0)", "m lost"], rows)
        print(f"snapshots {betas}: {time.time() - began:.0f} s", flush=True)

    doc += ["## Long averages (freezing), synthetic gradients", "",
            freeze.__doc__.split("\n\n")[1].replace("\n    ", " ").strip(),
            "beta2 0.999, 2 x 2000 steps.", ""]
    table(["v code", "gain, steady", "RMS log2 error, steady",
           "gain, after the change", "RMS log2 error, after the change"],
          [[k] + [num(z) for z in freeze(k)] for k in V_CODES])
    print(f"freezing: {time.time() - began:.0f} s", flush=True)

    betas = (0.9, 0.999)
    names = [("fp32", "fp32", 0.0), ("fp32", "fp32, init + 1e-6 noise", 1e-6)]
    names += [("fp32", "fp32, init + 1e-5 noise", 1e-5)]
    names += [(a, b, 0.0) for a, b, on in PAIRS if on]
    runs = {k: [] for k in names}
    with ProcessPoolExecutor(args.jobs) as pool:
        todo = {pool.submit(train, a, b, s, args.steps, betas, jitter=j,
                            decay=True):
                (a, b, j) for s in range(args.seeds) for a, b, j in names}
        for i, f in enumerate(as_completed(todo)):
            r = f.result()
            runs[todo[f]].append(r)
            print(f"[{i + 1}/{len(todo)} {time.time() - began:.0f} s]",
                  todo[f], {k: round(z, 5) for k, z in r.items()}, flush=True)
    for k in runs:
        runs[k].sort(key=lambda r: r["seed"])

    def mean(k, what, ref=None):
        z = [r[what] - (runs[ref][i][what] if ref else 0)
             for i, r in enumerate(runs[k])]
        return sum(z) / len(z)

    doc += [f"## Training with coded states, betas {betas}", "",
            f"{args.steps} steps, lr constant, then linear to 0 over the second half, "
            f"{args.seeds} seed(s); train = mean of the "
            "last 30 steps, val = 64 held-out sequences; differences are to "
            "fp32 states with the same seed, then averaged (each seed's in "
            "brackets). Drift: coded states against an unrounded shadow fed "
            "the same gradients, last step. Gain: geometric mean of "
            "sqrt(v exact) / sqrt(v coded); above 1 the steps are too "
            "long.", ""]
    ref, rows = names[0], []
    for k in names:
        each = ", ".join(f"{r['val'] - runs[ref][i]['val']:+.4f}"
                         for i, r in enumerate(runs[k]))
        row = [k[0], k[1], f"{mean(k, 'train'):.4f}", f"{mean(k, 'val'):.4f}",
               f"{mean(k, 'train', ref):+.4f}",
               f"{mean(k, 'val', ref):+.4f} ({each})"]
        if "gain" in runs[k][0]:
            row += [num(mean(k, z)) for z in ("drift_r", "drift_up", "gain")]
        else:
            row += ["-"] * 3
        rows.append(row)
    table(["m code", "v code", "train", "val", "train diff", "val diff",
           "drift sqrt(v)", "drift update", "gain"], rows)

    times = [c_times(flag) for flag in ("-mavx2", "-march=native")]
    doc += ["## Cost", "",
            "Vector operations per vector of elements, counted by hand, beyond "
            "the rule's own sqrt and div, absmax scan and loads/stores left "
            "out; and ns per element of encode + decode in C (gcc -O3, one "
            "core, data in L1, plain loops).", ""]
    if times[0]:
        doc += ["The fp32 AdamW rule itself: " + ", ".join(
            f"{t['rule'][0]:.3f}" for t in times)
            + " ns per element (AVX2, native).", ""]
    for title, cost in (("m code", COST_M), ("v code", COST_V)):
        table([title, "encode ops", "decode ops", "extra div + sqrt",
               "AVX2 ns", "native ns", "operations"],
              [[k, *z[1:4]] + [f"{t[z[0]][0]:.3f} + {t[z[0]][1]:.3f}"
                               if z[0] in t else "-" for t in times] + [z[4]]
               for k, z in cost.items()])
    doc.append(f"Whole run: {time.time() - began:.0f} s.")
    text = "\n".join(doc) + "\n"
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
