"""Reference of the binary family: signs and short unsigned integers as packed bits, and their exact products."""
from __future__ import annotations

import torch

from gradmill.reference import philox
from gradmill.reference.quant import SMALLEST_STEP, divide, lane_sums, pack_bits, round_even, round_stochastic, unpack_bits


def pack_signs(x, transpose=False, mean=False):
    """See gradmill.ops.binary.pack_signs."""
    x = (x.t() if transpose else x).to(torch.float32)
    rows, columns = x.shape
    bits = pack_bits((x < 0).to(torch.int64), 1) if x.numel() else torch.zeros((rows, -(-columns // 8)), dtype=torch.uint8, device=x.device)
    if not mean:
        return bits, torch.where(torch.isfinite(x).all(-1, keepdim=True), 1.0, torch.nan).to(torch.float32)
    if not columns:
        return bits, x.new_zeros((rows, 1))
    return bits, divide(lane_sums(x.abs()), float(columns))[:, None]


def pack_planes(x, bits, transpose=False, key=None, stream=0):
    """See gradmill.ops.binary.pack_planes."""
    x = (x.t() if transpose else x).to(torch.float32)
    rows, columns = x.shape
    if not x.numel():
        return torch.zeros((bits, rows, -(-columns // 8)), dtype=torch.uint8, device=x.device), x.new_zeros((rows, 1)), x.new_zeros((rows, 1))
    top = 2.0 ** bits - 1
    low, high = x.amin(-1, keepdim=True) + 0.0, x.amax(-1, keepdim=True)
    scale = divide(high * 0.5 - low * 0.5, top * 0.5)  # halves: the difference of two large values may overflow
    scale = torch.where(scale < SMALLEST_STEP, 0.0, scale)
    bad = ~torch.isfinite(x).all(-1, keepdim=True)
    y = ((x * 0.5 - low * 0.5) / (scale * 0.5)).clamp(0, top)
    if key is None:
        q = round_even(y)
    else:
        q = round_stochastic(y, philox.words(*key.tolist(), stream, 0, x.numel(), x.device).view(rows, columns))
    q = torch.where(bad | (scale == 0), 0.0, q).to(torch.int64)
    planes = torch.stack([pack_bits(q >> p & 1, 1) for p in range(bits)])
    return planes, torch.where(bad, torch.nan, scale), torch.where(bad, torch.nan, low)


def transpose_bits(bits, columns):
    """See gradmill.ops.binary.transpose_bits."""
    rows = bits.shape[0]
    return pack_bits(unpack_bits(bits, 1, columns, False).t(), 1) if rows and columns else bits.new_zeros((columns, -(-rows // 8)))


# --- gradients --------------------------------------------------------------------------------------------
def _ranges(x):
    """Of each row: its range, made to include zero, and its largest magnitude; inf for one with a nan or an inf."""
    if not x.shape[1]:
        return x.new_zeros(len(x)), x.new_zeros(len(x))
    low, high, fine = x.amin(1).clamp(max=0) + 0.0, x.amax(1).clamp(min=0) + 0.0, x.isfinite().all(1)
    return torch.where(fine, high - low, torch.inf), torch.where(fine, torch.maximum(high, -low) + 0.0, torch.inf)


def _by_token(dy, sizes):
    return (dy * sizes[:, None]).transpose(1, 2).reshape(dy.shape[0] * dy.shape[2], dy.shape[1])


def _by_channel(dy):
    return dy.transpose(0, 1).reshape(dy.shape[1], dy.shape[0] * dy.shape[2])


def gradient_ranges(dy, sizes):
    """See gradmill.ops.binary.gradient_ranges."""
    return (*_ranges(_by_token(dy, sizes)), *_ranges(_by_channel(dy)))


def pack_gradient(dy, sizes, kept, bits, key=None, stream=0):
    """See gradmill.ops.binary.pack_gradient."""
    return pack_planes((_by_channel(dy) if sizes is None else _by_token(dy, sizes))[kept], bits, False, key, stream)


def inclusion(ranges, count):
    """Probabilities proportional to ``ranges`` (groups,), at most 1, that add up to ``count``, or to all the groups that have a range."""
    ranges = ranges.to(torch.float64)
    ranges = torch.where(ranges.isfinite(), ranges, torch.inf)  # a nan is always kept
    order = ranges.argsort(descending=True)
    sizes, index = ranges[order], torch.arange(len(ranges), device=ranges.device)
    rest = sizes.flip(0).cumsum(0).flip(0)
    factor = (count - index).clamp(min=0) / rest  # if the first `index` are certain, for the others
    fits = sizes * factor <= 1
    certain = torch.where(fits.any(), fits.to(torch.uint8).argmax(), (sizes > 0).sum())
    others = torch.where(sizes > 0, sizes * factor.index_select(0, certain.clamp(max=len(sizes) - 1).view(1)), 0.0)
    return torch.zeros_like(sizes).scatter(0, order, torch.where(index < certain, 1.0, others.clamp(0, 1)))


def sample_groups(ranges, bits, offset):
    """See gradmill.ops.binary.sample_groups."""
    groups = len(ranges)
    count = -(-groups // bits)
    if not groups:
        return ranges.new_empty(0, dtype=torch.int64), ranges.new_empty(0)
    p = inclusion(ranges, max(groups / bits, 1.0))
    steps = torch.floor(torch.where(p < 1, p, 0.0).cumsum(0) + offset)
    hit = (p >= 1) | (steps != torch.nn.functional.pad(steps, (1, 0))[:-1])
    kept = hit.to(torch.uint8).argsort(descending=True, stable=True)[:count].sort().values
    return kept, torch.where(hit, 1 / p, 0.0)[kept].to(torch.float32)


# --- products ---------------------------------------------------------------------------------------------
def _signs(bits, columns):
    return (1 - 2 * unpack_bits(bits, 1, columns, False)).to(torch.float64)  # float64 adds integers below 2^53 exactly


def _exact(product):
    return (product + 0.0).to(torch.float32)  # + 0.0: an integer sum has no -0


def matmul_binary(a, b, columns, a_scales, b_scales, bias, dtype, run=0):
    """out = (float(sum of +-1 products) * a_scales) * b_scales^T (+ bias): see gradmill.ops.binary."""
    out = _exact(_signs(a, columns) @ _signs(b, columns).t()) * a_scales * b_scales.view(1, -1)
    if bias is not None:
        out = out + (bias[:, None] if run else bias).to(torch.float32)
    return in_runs(out.to(dtype), run) if run else out.to(dtype)


def in_runs(out, run):
    """(m, n) as (n / run, m, run)."""
    return out.view(len(out), out.shape[1] // run, run).transpose(0, 1).contiguous()


def matmul_planes(a, b, columns, scales, offsets, b_scales, dtype):
    """out = (offsets * float(sum s) + scales * float(sum q s)) * b_scales^T: see gradmill.ops.binary."""
    signs = _signs(b, columns)
    q = sum((unpack_bits(plane, 1, columns, False) << p for p, plane in enumerate(a))).to(torch.float64)
    out = offsets * _exact(signs.sum(-1)) + scales * _exact(q @ signs.t())
    return (out * b_scales.view(1, -1)).to(dtype)


def matmul_tenants(x, base, bits, alphas, tenants, columns):
    """out[i] = base[i] + alphas[t] * x[i] sign_t^T with t = tenants[i], base[i] alone where t < 0: see gradmill.ops.binary."""
    out = base.to(torch.float64)
    for t in tenants.unique().tolist():
        if t >= 0:
            rows = tenants == t
            out[rows] += alphas[t].to(torch.float64) * (x[rows].to(torch.float64) @ _signs(bits[t], columns).t())
    return out.to(base.dtype)
