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


def _signs(bits, columns):
    return (1 - 2 * unpack_bits(bits, 1, columns, False)).to(torch.float64)  # float64 adds integers below 2^53 exactly


def _exact(product):
    return (product + 0.0).to(torch.float32)  # + 0.0: an integer sum has no -0


def matmul_binary(a, b, columns, a_scales, b_scales, bias, dtype):
    """out = (float(sum of +-1 products) * a_scales) * b_scales^T (+ bias): see gradmill.ops.binary."""
    out = _exact(_signs(a, columns) @ _signs(b, columns).t()) * a_scales * b_scales.view(1, -1)
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(dtype)


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
