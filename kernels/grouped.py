"""grouped: the products of every expert of a mixture in one launch, and the operands that dW needs.

Where experts begin and end is read on the device: a launch has a program for every tile there can be, and those that no
expert needs find no work. A program reads all ends (4 bytes an expert) and finds its own by a scan: some 100 clocks, against
thousands for a tile. Operations and bytes are those of kernels/matmul.py's and kernels/quant.py's kernels, whose loops these are.
Expected, never measured on a GPU yet.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradmill.formats import CODES, cached, float_code
from gradmill.kernels._common import (KEY_ARGUMENTS, LAUNCH, as_bits, block_parameters, encode, key_words, measure, power_of_two, ready, seed_of,
                                      store_codes, tile_words, warps_for)
from gradmill.kernels.matmul import EXACT_K, fp8_pointer, fp8_sums, int8_sums, load_bias, matmul_int8, matmul_scaled, native_fp8, store_out
from gradmill.kernels.quant import ACROSS, load_strided
from gradmill.kernels.tiles import architecture, choose
from gradmill.reference import grouped as reference
from gradmill.reference.grouped import ragged_blocks

ROWS, EQUAL, SUMMED = (tl.constexpr(i) for i in range(3))  # which form of product: see gradmill.ops.grouped.matmul_grouped


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def spans(offs, experts, tokens, E2: tl.constexpr):
    """Where each expert's tokens begin and end, int32 (E2): held within bounds, whatever offs says."""
    i = tl.arange(0, E2)
    begins = tl.load(offs + i - 1, mask=(i > 0) & (i <= experts), other=0)
    ends = tl.load(offs + i, mask=i < experts, other=0)
    begins = tl.associative_scan(tl.minimum(tl.maximum(begins, 0), tokens), 0, larger)
    return begins, tl.associative_scan(tl.minimum(tl.maximum(ends, 0), tokens), 0, larger)


@triton.jit
def pick(x, e, E2: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, E2) == e, x, 0), axis=0)


@triton.jit
def counted(each, number, E2: tl.constexpr):
    """Whose ``number`` is, where expert i has each[i] of them in a row: the expert (E2 or more experts: nobody's) and how many come before."""
    before = tl.cumsum(each, 0)
    e = tl.sum((before <= number).to(tl.int32), axis=0)
    return e, pick(before, e, E2) - pick(each, e, E2)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def quantize_kernel(x, offs, codes, scales, experts, tokens, columns, block, room, stride_row, stride_column, seed_low, seed_high, step, stream,
                    CODE: tl.constexpr, WHOLE: tl.constexpr, GIVEN: tl.constexpr, STOCHASTIC: tl.constexpr, NB: tl.constexpr, P2: tl.constexpr,
                    E2: tl.constexpr):
    """Block number program % room of NB columns of x (of rows of the result)."""
    index, number = tl.program_id(0) // room, tl.program_id(0) % room
    begins, ends = spans(offs, experts, tokens, E2)
    lengths = ends - begins
    each = tl.where(tl.arange(0, E2) < experts, 1 if WHOLE else tl.cdiv(lengths, block), 0)
    e, first = counted(each, number, E2)
    begin, length, per_row = pick(begins, e, E2).to(tl.int64), pick(lengths, e, E2), pick(each, e, E2)
    start = 0 if WHOLE else (number - first) * block
    size = length if WHOLE else tl.minimum(block, length - start)
    size = tl.where(e < experts, size, 0)
    row = index.to(tl.int64) * NB + tl.arange(0, NB)
    inside = row < tl.where(e < experts, columns, 0)
    absmax, low, high = tl.zeros((NB,), tl.int32), tl.zeros((NB,), tl.int32), tl.zeros((NB,), tl.int32)
    col = tl.zeros_like(row) + begin + start
    for done in range(0, size, P2):
        limit = tl.where(inside, size - done, 0)
        part = load_strided(x, row, col + done, limit, stride_row, stride_column, P2)
        part_absmax, low_part, high_part = measure(part, tl.arange(0, P2)[None, :] < limit[:, None])
        absmax = tl.maximum(absmax, part_absmax)
    at = tl.cast(columns, tl.int64) * first + row * per_row + (number - first)
    scale, zero = block_parameters(absmax, low, high, CODE)
    if GIVEN:
        given = tl.load(scales + at, mask=inside, other=0.0)
        scale = tl.where(absmax >= 0x7F800000, float("nan"), tl.where(size > 0, given, 0.0))
    tl.store(scales + at, scale, mask=inside)
    seed = seed_of(seed_low, seed_high)
    for done in range(0, size, P2):
        limit = tl.where(inside, size - done, 0)
        values = load_strided(x, row, col + done, limit, stride_row, stride_column, P2)
        words = 0
        if STOCHASTIC:
            words = tile_words(seed, step, stream + (e << 8), row * length + start + done, False, P2)
        q = encode(values, scale[:, None], zero[:, None], words, CODE, STOCHASTIC)
        store_codes(codes + columns * begin, q, row, tl.zeros_like(row) + start + done, limit, length, CODE, P2)


@triton.jit
def matmul_kernel(a, b, a_scales, b_scales, bias, out, offs, experts, tokens, m, n, k, a_block, b_block, A: tl.constexpr, B: tl.constexpr,
                  FORM: tl.constexpr, INT8: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, LONG: tl.constexpr,
                  EXACT: tl.constexpr, BLOCKED: tl.constexpr, NATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  E2: tl.constexpr):
    """One tile of one expert's product; blocks of 0 are whole rows."""
    tiles_n = tl.cdiv(n, BN)
    down, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    a_before, b_before = 0, 0  # blocks of a row before the expert's own
    if FORM == ROWS:
        begins, ends = spans(offs, experts, tokens, E2)
        e, first = counted(tl.cdiv(ends - begins, BM), down, E2)
        begin, end = pick(begins, e, E2).to(tl.int64), pick(ends, e, E2)
        rows, tile_m = (end - begin).to(tl.int32), down - first
    else:
        tiles_m = tl.cdiv(m, BM)
        e, tile_m, rows = down // tiles_m, down % tiles_m, m
        begin = e.to(tl.int64) * m
        if FORM == SUMMED:
            begins, ends = spans(offs, experts, tokens, E2)
            lengths, i = ends - begins, tl.arange(0, E2)
            begin, k = pick(begins, e, E2).to(tl.int64), pick(lengths, e, E2)
            a_before = tl.sum(tl.where(i < e, tl.cdiv(lengths, a_block), 0), axis=0) if BLOCKED else e
            b_before = tl.sum(tl.where(i < e, tl.cdiv(lengths, b_block), 0), axis=0) if BLOCKED else e
    rm, rn, rk = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows beyond the end read others again and are not stored.
    row_a, row_b = (rm % tl.maximum(rows, 1)).to(tl.int64), (rn % n).to(tl.int64)
    a_blocks, b_blocks = (tl.cdiv(k, a_block), tl.cdiv(k, b_block)) if BLOCKED else (1, 1)
    e = e.to(tl.int64)
    if FORM == SUMMED:
        a_rows, b_rows = a + begin * m, b + begin * n
        a_scales, b_scales = a_scales + m * a_before + row_a * a_blocks, b_scales + n * b_before + row_b * b_blocks
        first_row = e * m
    else:
        a_rows, b_rows = a + begin * k, b + e * n * k
        a_scales, b_scales = a_scales + (begin + row_a) * a_blocks, b_scales + (e * n + row_b) * b_blocks
        first_row = begin
    depth = tl.where(rows > 0, k, 0)  # a program without an expert reads nothing
    if INT8:
        values = int8_sums(a_rows + row_a[:, None] * k + rk[None, :], b_rows + row_b[:, None] * k + rk[None, :], rk, depth, EVEN_K, LONG, EXACT, BM, BN, BK)
    else:
        values = fp8_sums(fp8_pointer(a_rows, A, NATIVE) + row_a[:, None] * k + rk[None, :], fp8_pointer(b_rows, B, NATIVE) + row_b[:, None] * k + rk[None, :],
                          a_scales, b_scales, rk, depth, a_block, b_block, A, B, EVEN_K, BLOCKED, NATIVE, BM, BN, BK)
    live = (rm < rows)[:, None] & (rn < n)[None, :]
    if not BLOCKED:
        values = values * tl.load(a_scales, mask=rm < rows, other=0.0)[:, None] * tl.load(b_scales, mask=rn < tl.where(rows > 0, n, 0), other=0.0)[None, :]
    if HAS_BIAS:
        values = values + load_bias(bias + e * n, rn, tl.where(rows > 0, n, 0))[None, :]
    store_out(out, values, (first_row + rm)[:, None] * n + rn[None, :], live, OUT)


def grouped_width(bn: int, summed: bool, blocked: bool) -> int:
    """A tile's columns: ragged rows, whose addresses are no multiples of 16 bytes, go through registers, which 256 columns spill, and 128
    beside a second sum and the scales of its columns."""
    return min(bn, 64 if blocked else 128) if summed else bn


def quantize_grouped(x, offs, code, block=0, key=None, stream=0, scales=None):
    """See gradmill.ops.grouped.quantize_grouped."""
    tokens, columns = x.shape
    format = cached(code, block)
    codes = torch.zeros((columns, tokens), dtype=torch.uint8, device=x.device).view(format.code_dtype)
    given, room = scales is not None, ragged_blocks(format, tokens, len(offs))
    own = scales.clone() if given else x.new_zeros((columns, room), dtype=torch.float32)
    if given:
        reference.zero_spare(own, offs, block)
    if columns and len(offs):
        chunk = power_of_two(min(block or tokens, 256))
        with ready(x):
            quantize_kernel[(triton.cdiv(columns, ACROSS) * room,)](
                as_bits(x), offs.contiguous(), as_bits(codes), own, len(offs), tokens, columns, block, room, x.stride(1), x.stride(0), *key_words(key, stream),
                CODE=CODES[code], WHOLE=block == 0, GIVEN=given, STOCHASTIC=key is not None, NB=ACROSS, P2=chunk, E2=power_of_two(len(offs)),
                num_warps=warps_for(ACROSS * chunk), **LAUNCH)
    return codes, own


def matmul_grouped(a, a_scales, a_code, a_block, b, b_scales, b_code, b_block, offs, bias, dtype):
    """See gradmill.ops.grouped.matmul_grouped. Whole rows of int8, and FP8 whose blocks the tiles divide, are one launch; all else, plain
    floats among it, is a product after the other, by the vendor's library where it can."""
    summed, experts = a.dim() == b.dim() == 2, len(b) if b.dim() == 3 else len(offs)
    exact, fp8 = ({a_code, b_code} <= pair for pair in ({"int8", "int7"}, {"e4m3", "e5m2"}))
    m, n = (a.shape[0] if summed else a.shape[-2]), (b.shape[0] if summed else b.shape[1])
    k, tokens = (a.shape[1], a.shape[1]) if summed else (b.shape[2], m)
    blocked = bool(a_block or b_block)
    arch = architecture(a.device)
    per_expert = m if summed or offs is None else triton.cdiv(m, max(experts, 1))
    bm, bn, bk, _, warps, stages, _ = choose("int8" if exact else "fp8_block" if blocked else "fp8", arch, per_expert, n)
    if not (exact and not blocked or fp8 and (not blocked or a_block and b_block and a_block % bk == b_block % bk == 0)):
        return reference.matmul_grouped(a, a_scales, a_code, a_block, b, b_scales, b_code, b_block, offs, bias, dtype, matmul_int8, matmul_scaled)
    bn = grouped_width(bn, summed, blocked)
    long = exact and k > EXACT_K
    if long:
        bm, bn, warps = min(bm, 64), min(bn, 64), 4  # two sums of 12 bytes together in registers
    form = SUMMED if summed else EQUAL if offs is None else ROWS
    shape = (experts, m, n) if form != ROWS else (m, n)
    out = a.new_zeros(shape, dtype=dtype)
    tiles = triton.cdiv(n, bn) * (experts * triton.cdiv(m, bm) if form != ROWS else m // bm + experts)
    if out.numel() and experts:
        with ready(a):
            matmul_kernel[(tiles,)](
                as_bits(a), as_bits(b), a_scales, b_scales, a_scales if bias is None else as_bits(bias.contiguous()), out, a if offs is None else offs.contiguous(),
                experts, tokens, m, n, k, a_block, b_block, A=CODES[a_code], B=CODES[b_code], FORM=form.value, INT8=exact, OUT=CODES[float_code(dtype)],
                HAS_BIAS=bias is not None, EVEN_K=not summed and k % bk == 0, LONG=long, EXACT=EXACT_K, BLOCKED=blocked,
                NATIVE=fp8 and native_fp8(a.device), BM=bm, BN=bn, BK=bk, E2=power_of_two(experts), num_warps=warps, num_stages=stages,
                enable_fp_fusion=not exact)
    return out
