"""Integers with power-of-two scales: the arithmetic of gradmill.bct, in plain torch integer operations.

A tensor is q (int64) and an exponent e (int64, last dimension 1): q * 2^e. Nothing here is a float but :func:`from_float`, which reads one,
:func:`to_float`, which makes one, and the tables, made once. BCT publishes that every step has block-wise shift scales, not its formulas: these are
ours.
"""
from __future__ import annotations

import functools
import math

import torch

FAR = 62  # no shift is longer: an int64 has 63 bits


def bit_length(v):
    """Binary digits of v >= 0."""
    return torch.bucketize(v, torch.tensor([1 << i for i in range(63)], device=v.device), right=True)


def shift(v, by):
    """v * 2^by, halves rounded up. A shift to the left must leave v within 63 bits."""
    right = (-by).clamp(0, FAR)
    return ((v << by.clamp(0, FAR)) + ((1 << right) >> 1)) >> right


def narrow(v, e, bits, dims=(-1,)):
    """The most digits of v that fit ``bits`` with a sign, one exponent along ``dims``: (q, e)."""
    drop = (bit_length(v.abs().amax(dims, keepdim=True)) - (bits - 1)).clamp(min=0)
    top = (1 << bits - 1) - 1
    return shift(v, -drop).clamp(-top, top), e + drop


def add(a, a_e, b, b_e):
    """The sum, to 30 digits below the larger exponent: (q, e)."""
    (a, a_e), (b, b_e) = narrow(a, a_e, 31), narrow(b, b_e, 31)
    e = torch.maximum(torch.minimum(a_e, b_e), torch.maximum(a_e, b_e) - 30)
    return shift(a, a_e - e) + shift(b, b_e - e), e


def root(v):
    """floor(sqrt(v)) of v >= 0 by Newton's method: from above, until it can only be right or one too large."""
    x = 1 << ((bit_length(v) + 1) >> 1)
    for _ in range(6):  # from at most twice the root: relative errors 1, 1/4, 1/40, 3e-4, 5e-8, 1e-15
        x = (x + v // x.clamp(min=1)) >> 1
    x = x + 1
    for _ in range(2):
        x = torch.where(x * x > v, x - 1, x)
    return x


def divide(a, b):
    """a / b for b > 0, halves rounded up."""
    return (2 * a + b) // (2 * b)


def from_float(x, bits):
    """The nearest (q, e), one exponent a row. ValueError for a nan or an inf, which no integer stands for."""
    if not x.is_floating_point():
        raise TypeError(f"gradmill.bct: x is {x.dtype} of shape {tuple(x.shape)}; it must be floating point")
    x = x.to(torch.float32)
    if not x.isfinite().all():
        raise ValueError("gradmill.bct: an input has a nan or an inf, which shift-quantised integers cannot hold")
    _, exponent = torch.frexp(x.abs().amax(-1, keepdim=True)) if x.shape[-1] else (None, torch.zeros((*x.shape[:-1], 1), dtype=torch.int32, device=x.device))
    e = exponent.to(torch.int64).clamp(min=-100) - (bits - 1)
    top = (1 << bits - 1) - 1
    return torch.ldexp(x.to(torch.float64), -e).round().to(torch.int64).clamp(-top, top), e


def to_float(q, e, dtype):
    return torch.ldexp(q.to(torch.float64), e).to(dtype)


# --- LayerNorm --------------------------------------------------------------------------------------------
def normalise(q, e, eps, centre):
    """(q - mean) / sqrt(variance + eps) over the last dimension, or without the mean: (y, -14). q has at most 16 bits."""
    n = q.shape[-1]
    c = q << 8
    if centre:
        c = c - divide(c.sum(-1, keepdim=True), torch.full_like(e, n))
    # c counts 2^(e - 8): eps in units of its square
    small = shift(torch.full_like(e, round(eps * 2 ** 40)), (-40 - 2 * (e - 8)).clamp(max=30))
    std = root(divide(c.square().sum(-1, keepdim=True), torch.full_like(e, n)) + small)
    return divide(c << 14, std.clamp(min=1)), torch.full_like(e, -14)


# --- GELU and its kin -------------------------------------------------------------------------------------
RANGE, STEP, DIGITS = 16, 6, 16  # activations differ from ReLU within +-RANGE; a table has 2^STEP intervals to 1, its values DIGITS binary digits


@functools.lru_cache(maxsize=None)
def bend(name: str) -> torch.Tensor:
    """What an activation is more than ReLU at the ends of the table's intervals, in 2^-DIGITS: 16-bit integers."""
    x = torch.arange(-RANGE << STEP, (RANGE << STEP) + 1, dtype=torch.float64) / 2 ** STEP
    f = {"gelu": torch.nn.functional.gelu, "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"), "silu": torch.nn.functional.silu}[name]
    return ((f(x) - x.clamp(min=0)) * 2 ** DIGITS).round().to(torch.int64)


def activate(q, e, name):
    """ReLU, and for the others what a table with linear interpolation adds to it: (y, e). q has at most 16 bits."""
    positive = q.clamp(min=0)
    if name == "relu":
        return positive, e
    table, digits = bend(name).to(q.device), DIGITS
    at = shift(q, (e + digits).clamp(max=40)).clamp(-RANGE << digits, (RANGE << digits) - 1) + (RANGE << digits)
    i, rest = at >> (digits - STEP), at & ((1 << digits - STEP) - 1)
    y = table[i] + shift((table[i + 1] - table[i]) * rest, torch.full_like(e, STEP - digits))
    return add(positive, e, y, torch.full_like(e, -DIGITS))


# --- softmax ----------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=None)
def powers() -> torch.Tensor:
    """2^-x in the middle of 256 intervals of [0, 1), in 2^-14."""
    return (2.0 ** (14 - (torch.arange(256, dtype=torch.float64) + 0.5) / 256)).round().to(torch.int64)


def exponentials(q, e, scale, masked=None):
    """exp(scale * (q 2^e - its row's largest)) in 2^-14, at most 2^14 - 1; 0 where ``masked``. A row that is masked whole is 0."""
    q, e = narrow(q, e, 24)
    q, e = q * round(scale * math.log2(math.e) * 2 ** 20), e - 20
    if masked is not None:
        q = q.masked_fill(masked, -(1 << 50))
    below = (q.amax(-1, keepdim=True) - q).clamp(max=1 << 46)
    t = shift(below, (e + 8).clamp(max=16)).clamp(max=40 << 8)
    p = powers().to(q.device)[t & 255] >> (t >> 8)
    p = p.clamp(max=(1 << 14) - 1)
    return p if masked is None else p.masked_fill(masked, 0)
