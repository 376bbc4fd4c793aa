"""binary: signs and short integers packed from floats, and their exact products on the int8 tensor cores.

pack: reads x once (signs) or twice (planes) and writes 1/32 of it a plane: bound by memory.
matmul: the packed bits are read from memory and become int8 in registers, +-1 and the q themselves, for one int8 dot whatever the number
of planes. Counted: an H100's SM multiplies 4096 int8 pairs a clock; popcounts in integer arithmetic (12 operations for 32 pairs, 64 lanes) would give
170, its popc instruction (16 a clock) 512. Unpacking costs 3 operations a value and is shared by a tile's other side. Expected, never
measured on a GPU.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradmill.formats import CODES, float_code
from gradmill.kernels._common import INTERPRETING, KEY_ARGUMENTS, LAUNCH, as_bits, element_words, from_bf16_bits, key_words, ready, round_even, round_stochastic, seed_of
from gradmill.kernels.matmul import load_bias, store_out, tile_of
from gradmill.kernels.quant import fold
from gradmill.kernels.tiles import architecture, choose

WIDTH = 1024  # elements of a row packed at a time


# --- packing ----------------------------------------------------------------------------------------------
@triton.jit
def load_values(x, at, mask):
    if x.dtype.element_ty == tl.int16:
        return from_bf16_bits(tl.load(x + at, mask=mask, other=0))
    else:
        return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def pack_kernel(x, out, scales, offsets, rows, columns, bytes, stride_row, stride_column, seed_low, seed_high, step, stream,
                PLANES: tl.constexpr, MEAN: tl.constexpr, RANDOM: tl.constexpr, WIDTH: tl.constexpr):
    """One row a program: PLANES 0 for signs."""
    row = tl.program_id(0).to(tl.int64)
    source = row * stride_row
    i = tl.arange(0, WIDTH)
    if PLANES > 0:
        low = tl.full((WIDTH,), float("inf"), tl.float32)
        high = tl.full((WIDTH,), float("-inf"), tl.float32)
        bad = tl.zeros((WIDTH,), tl.int32)
        for start in range(0, columns, WIDTH):
            mask = i < columns - start
            v = load_values(x, source + (start + i).to(tl.int64) * stride_column, mask)
            bad = bad | tl.where(mask & ((v - v) != 0.0), 1, 0)
            low = tl.where(mask, tl.minimum(low, v), low)
            high = tl.where(mask, tl.maximum(high, v), high)
        least, most = tl.min(low, 0) + 0.0, tl.max(high, 0)
        top = (1 << PLANES) - 1.0
        broken = tl.max(bad, 0) != 0
        scale = tl.div_rn(most * 0.5 - least * 0.5, top * 0.5 + tl.zeros_like(most))
        scale = tl.where(scale < 7.888609052210118e-31, 0.0, scale)
        tl.store(scales + row, tl.where(broken, float("nan"), scale))
        tl.store(offsets + row, tl.where(broken, float("nan"), least))
        half = tl.where(broken | (scale == 0.0), 1.0, scale * 0.5)
        none = broken | (scale == 0.0)
    else:
        sums = tl.zeros((32,), tl.float32)
        bad = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, columns, WIDTH):
        mask = i < columns - start
        v = load_values(x, source + (start + i).to(tl.int64) * stride_column, mask)
        if PLANES > 0:
            y = tl.div_rn(v * 0.5 - least * 0.5, half + tl.zeros_like(v))
            y = tl.where(y < 0.0, 0.0, tl.where(y > top, top, y))
            if RANDOM:
                y = round_stochastic(y, element_words(seed_of(seed_low, seed_high), step, stream, row * columns + start + i))
            else:
                y = round_even(y)
            q = tl.where(none | (mask == 0), 0.0, y).to(tl.int32)
        else:
            q = tl.where(v < 0.0, 1, 0)
            bad = bad | tl.where((v - v) != 0.0, 1, 0)
        b = start // 8 + tl.arange(0, WIDTH // 8)
        for plane in tl.static_range(PLANES if PLANES > 0 else 1):
            bits = tl.reshape((q >> plane) & 1, (WIDTH // 8, 8)) << tl.arange(0, 8)[None, :]
            tl.store(out + (row + plane * (row * 0 + rows)) * bytes + b, tl.sum(bits, 1).to(tl.uint8), mask=b < bytes)
    if PLANES == 0:
        if MEAN:
            j = tl.arange(0, 32)
            for start in range(0, columns, 32):  # in the order of reference.quant.lane_sums
                sums += tl.abs(load_values(x, source + (start + j).to(tl.int64) * stride_column, j < columns - start))
            total = fold(tl.reshape(sums, (1, 32)), 1)
            tl.store(scales + row + tl.arange(0, 1), tl.div_rn(total, tl.zeros_like(total) + columns))
        else:
            tl.store(scales + row, tl.where(tl.max(bad, 0) != 0, float("nan"), 1.0))


def _pack(x, transpose, planes, mean, key, stream):
    x = x.t() if transpose else x
    rows, columns = x.shape
    bytes = -(-columns // 8)
    out = x.new_empty((max(planes, 1), rows, bytes), dtype=torch.uint8)
    scales, offsets = (x.new_full((rows, 1), float(not (mean or planes)), dtype=torch.float32) for _ in range(2))
    if x.numel():
        seed_low, seed_high, step, stream = key_words(key, stream)
        with ready(x):
            pack_kernel[(rows,)](as_bits(x), out, scales, offsets, rows, columns, bytes, x.stride(0), x.stride(1), seed_low, seed_high, step, stream,
                                 PLANES=planes, MEAN=mean, RANDOM=key is not None, WIDTH=WIDTH, num_warps=4, **LAUNCH)
    return out, scales, offsets


def pack_signs(x, transpose=False, mean=False):
    """See gradmill.ops.binary.pack_signs."""
    bits, scales, _ = _pack(x, transpose, 0, mean, None, 0)
    return bits[0], scales


def pack_planes(x, bits, transpose=False, key=None, stream=0):
    """See gradmill.ops.binary.pack_planes."""
    return _pack(x, transpose, bits, False, key, stream)


# --- products ---------------------------------------------------------------------------------------------
@triton.jit
def unpacked(bits, rows, at, rows_total, bytes, columns, B: tl.constexpr):
    """Bits at .. at + B bytes of some rows as (rows, 8 B) int32 0 or 1; 0 outside."""
    k = tl.arange(0, 8 * B)
    byte = at + k // 8
    mask = (rows < rows_total)[:, None] & (byte * 8 + k % 8 < columns)[None, :]
    value = tl.load(bits + rows.to(tl.int64)[:, None] * bytes + byte[None, :], mask=mask, other=0).to(tl.int32)
    return (value >> (k % 8)[None, :]) & 1, mask


@triton.jit
def binary_kernel(a, b, a_scales, offsets, b_scales, bias, out, m, n, columns, bytes, PLANES: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    tile_m, tile_n = tile_of(tl.program_id(0), m, n, BM, BN, GROUP)
    rm, rn = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.int32)
    total = tl.zeros((BN,), tl.int32)
    for at in range(0, bytes, BK):
        y, mask = unpacked(b, rn, at, n, bytes, columns, BK)
        y = tl.where(mask, 1 - 2 * y, 0)
        if PLANES > 0:
            x, _ = unpacked(a, rm, at, m, bytes, columns, BK)
            for plane in tl.static_range(1, PLANES):
                more, _ = unpacked(a + plane * (tl.program_id(0).to(tl.int64) * 0 + m) * bytes, rm, at, m, bytes, columns, BK)
                x += more << plane
            total += tl.sum(y, 1)
        else:
            x, inside = unpacked(a, rm, at, m, bytes, columns, BK)
            x = tl.where(inside, 1 - 2 * x, 0)
        acc = tl.dot(x.to(tl.int8), tl.trans(y.to(tl.int8)), acc, out_dtype=tl.int32)
    scale = tl.load(a_scales + rm, mask=rm < m, other=0.0)[:, None]
    if PLANES > 0:
        values = tl.load(offsets + rm, mask=rm < m, other=0.0)[:, None] * total.to(tl.float32)[None, :] + scale * acc.to(tl.float32)
    else:
        values = acc.to(tl.float32) * scale
    values = values * tl.load(b_scales + rn, mask=rn < n, other=0.0)[None, :]
    if HAS_BIAS:
        values = values + load_bias(bias, rn, n)[None, :]
    store_out(out, values, rm.to(tl.int64)[:, None] * n + rn[None, :], (rm < m)[:, None] & (rn < n)[None, :], OUT)


def _multiply(a, b, columns, planes, a_scales, offsets, b_scales, bias, dtype):
    m, n = a.shape[-2], b.shape[0]
    out = a.new_empty((m, n), dtype=dtype)
    if not out.numel():
        return out
    tile = choose("binary", architecture(a.device), m, n)
    with ready(a):
        binary_kernel[(triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn),)](
            a, b, a_scales, offsets, b_scales, a_scales if bias is None else as_bits(bias.contiguous()), out, m, n, columns,
            a.shape[-1], PLANES=planes, OUT=CODES[float_code(dtype)], HAS_BIAS=bias is not None, **tile.launch, **LAUNCH)
    return out


def matmul_binary(a, b, columns, a_scales, b_scales, bias, dtype):
    """See gradmill.ops.binary.matmul_binary."""
    return _multiply(a, b, columns, 0, a_scales, a_scales, b_scales, bias, dtype)


def matmul_planes(a, b, columns, scales, offsets, b_scales, dtype):
    """See gradmill.ops.binary.matmul_planes."""
    return _multiply(a, b, columns, a.shape[0], scales, offsets, b_scales, None, dtype)


# --- a delta of signs for each row ------------------------------------------------------------------------
@triton.jit
def tenants_kernel(x, base, bits, alphas, tenants, out, n, columns, bytes, OUT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One row of x and BN rows of its tenant's signs, BK bytes of each at a time."""
    row = tl.program_id(0).to(tl.int64)
    rn, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, 8 * BK)
    tenant = tl.load(tenants + row)
    acc = tl.zeros((BN,), tl.float32)
    if tenant >= 0:
        for at in range(0, bytes, BK):
            q, _ = unpacked(bits + tenant * n * bytes, rn, at, n, bytes, columns, BK)
            v = load_values(x, row * columns + at * 8 + k, at * 8 + k < columns)
            acc += tl.sum(tl.where(q != 0, -v[None, :], v[None, :]), 1)
        acc *= tl.load(alphas + tenant)
    values = load_values(base, row * n + rn, rn < n) + acc
    store_out(out, values, row * n + rn, rn < n, OUT)


def matmul_tenants(x, base, bits, alphas, tenants, columns):
    """See gradmill.ops.binary.matmul_tenants."""
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    if out.numel():
        bn, bk = (32, 8) if INTERPRETING else (64, 16)
        with ready(x):
            tenants_kernel[(x.shape[0], triton.cdiv(out.shape[1], bn))](
                as_bits(x.contiguous()), as_bits(base.contiguous()), bits, alphas, tenants.to(x.device), out, out.shape[1], columns, bits.shape[2],
                OUT=CODES[float_code(out.dtype)], BN=bn, BK=bk, num_warps=4, **LAUNCH)
    return out
