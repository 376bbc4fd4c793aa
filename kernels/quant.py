"""quant: fp32, bf16 or fp16 to and from every blocked code; the random Hadamard transform; fake quantisation.

Bytes: quantize reads the input once (a whole row longer than a tile: twice, the second time mostly from L2) and
writes bits/8 per element + 4 (5 with a zero point) per block; dequantize the reverse. Both are limited by memory:
bf16 -> uint8, block 256, moves 3.02 bytes per element, at 3.0 TB/s (H100 copy) about 1.0 T elements/s; stochastic
rounding adds some 25 integer operations per element, below that limit. Expected, never measured on a GPU yet.

quantize_both of bf16 moves 4 bytes per element where blocks fit a tile (two calls of quantize: 6) and 6 for whole rows, whose scales cost a
walk of their own (two calls: 6 to 10, rows longer than a tile being read twice).

hadamard moves 8 bytes per fp32 element and 4 per bf16; its 2 additions per element and butterfly step do not count, the
exchanges between threads do: a step that leaves a thread's own elements goes through shuffles or shared memory.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradmill.formats import CODES, Format, float_code
from gradmill.kernels._common import (KEY_ARGUMENTS, LAUNCH, UNALIGNED, as_bits, bits, block_parameters, clamp, decode, encode, from_bf16_bits,
                                      has_zero_point, key_words, load_codes, load_floats, magnitude, measure, power_of_two, ready, round_even,
                                      seed_of, signed32, store_codes, store_floats, tile_words, warps_for)
from gradmill.reference import quant as reference

TILE = 4096    # elements a program holds in registers
ACROSS = 32    # neighbouring rows read together where the input is contiguous along rows
SQUARE = 64    # side of a tile that is quantised both ways, at the least


@triton.jit
def load_strided(x, row, col, limit, stride_row, stride_column, P2: tl.constexpr):
    k = tl.arange(0, P2)[None, :]
    at = (row * stride_row)[:, None] + (col[:, None] + k).to(tl.int64) * stride_column
    mask = k < limit[:, None]
    if x.dtype.element_ty == tl.int16:  # bf16 bits: the interpreter's bf16 casts flush denormals
        return from_bf16_bits(tl.load(x + at, mask=mask, other=0))
    else:
        return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def quantize_kernel(x, codes, scales, zeros, rows, columns, block, blocks, stride_row, stride_column, seed_low, seed_high, step, stream,
                    CODE: tl.constexpr, GIVEN: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, ACROSS_ROWS: tl.constexpr,
                    LOOP: tl.constexpr, NB: tl.constexpr, P2: tl.constexpr):
    """NB blocks of the (rows, columns) input. LOOP: a block is longer than P2, its chunks are visited twice. GIVEN: the
    scales are there already, only a block with a nan or an inf changes its own."""
    index = tl.program_id(0) * NB + tl.arange(0, NB)
    exists = index < rows * blocks
    # Neighbouring blocks of a tile are neighbours in memory, whichever way the input lies.
    if ACROSS_ROWS:
        row, b = (index % rows).to(tl.int64), index // rows
    else:
        row, b = (index // blocks).to(tl.int64), index % blocks
    col = b * block
    size = tl.where(exists, tl.minimum(block, columns - col), 0)  # the last block of a row may be shorter
    seed = seed_of(seed_low, seed_high)

    values = load_strided(x, row, col, size, stride_row, stride_column, P2)
    absmax, low, high = measure(values, tl.arange(0, P2)[None, :] < size[:, None])
    if LOOP:
        for done in range(P2, block, P2):
            part = load_strided(x, row, col + done, size - done, stride_row, stride_column, P2)
            absmax_part, low_part, high_part = measure(part, tl.arange(0, P2)[None, :] < (size - done)[:, None])
            absmax, low, high = tl.maximum(absmax, absmax_part), tl.minimum(low, low_part), tl.maximum(high, high_part)
    at = row * blocks + b
    if GIVEN:
        scale = tl.where(absmax >= 0x7F800000, float("nan"), tl.load(scales + at, mask=exists, other=0.0))
        zero = tl.zeros_like(scale)
    else:
        scale, zero = block_parameters(absmax, low, high, CODE)
    tl.store(scales + at, scale, mask=exists)
    if has_zero_point(CODE):
        tl.store(zeros + at, zero.to(tl.int32).to(tl.uint8), mask=exists)

    for done in range(0, block if LOOP else 1, P2):
        if LOOP:
            values = load_strided(x, row, col + done, size - done, stride_row, stride_column, P2)
        words = 0
        if STOCHASTIC:
            words = tile_words(seed, step, stream, row * columns + col + done, ALIGNED, P2)
        q = encode(values, scale[:, None], zero[:, None], words, CODE, STOCHASTIC)
        store_codes(codes, q, row, col + done, size - done, columns, CODE, P2)


# Both ways: square tiles, encoded by rows and, turned in shared memory, by columns. A program has one tile, or the four of a block twice as
# long, which it then reads twice, from L1 the second time. Scales of whole rows and columns need a walk before.
@triton.jit
def square(x, top, left, rows, columns, stride_row, stride_column, SIDE: tl.constexpr):
    """A tile's values; 0 outside."""
    row = top + tl.arange(0, SIDE)
    limit = tl.where(row < rows, tl.minimum(columns - left, SIDE), 0)
    return load_strided(x, row, tl.zeros_like(row) + left, limit, stride_row, stride_column, SIDE)


@triton.jit
def corner(columns, SIDE: tl.constexpr):
    """First row and column of this program's square, int64."""
    across = tl.cdiv(columns, SIDE)
    return (tl.program_id(0) // across).to(tl.int64) * SIDE, (tl.program_id(0) % across).to(tl.int64) * SIDE


@triton.jit
def most_kernel(x, most, rows, columns, stride_row, stride_column, SIDE: tl.constexpr):
    """The largest magnitude() of every row, then of every column, in any order: an integer maximum."""
    top, left = corner(columns, SIDE)
    size = magnitude(square(x, top, left, rows, columns, stride_row, stride_column, SIDE))
    row, column = top + tl.arange(0, SIDE), left + tl.arange(0, SIDE)
    tl.atomic_max(most + row, tl.max(size, axis=1), mask=row < rows, sem="relaxed")
    tl.atomic_max(most + rows + column, tl.max(size, axis=0), mask=column < columns, sem="relaxed")


@triton.jit
def encode_square(values, most, codes, scales, top, left, rows, columns, seed, step, stream, CODE: tl.constexpr, BLOCK: tl.constexpr,
                  STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, SIDE: tl.constexpr):
    """One side of a tile: most (SIDE, blocks), the largest magnitude of each of its blocks."""
    row, nothing = top + tl.arange(0, SIDE), tl.zeros_like(most)
    scale, zero = block_parameters(most, nothing, nothing, CODE)
    if BLOCK == 0:
        at, exists = row[:, None], (row < tl.where(left == 0, rows, 0))[:, None]
    elif BLOCK >= SIDE:
        first = tl.where(left % BLOCK == 0, tl.where(left < columns, rows, 0), 0)  # a block's scale is stored once
        at, exists = (row * tl.cdiv(columns, BLOCK) + left // BLOCK)[:, None], (row < first)[:, None]
    else:
        b = tl.arange(0, SIDE // BLOCK)[None, :]
        at, exists = row[:, None] * tl.cdiv(columns, BLOCK) + left // BLOCK + b, (row < rows)[:, None] & (left + b * BLOCK < columns)
    tl.store(scales + at, scale, mask=exists)
    if BLOCK != 0 and BLOCK < SIDE:
        scale = tl.reshape(tl.broadcast_to(tl.expand_dims(scale, 2), (SIDE, SIDE // BLOCK, BLOCK)), (SIDE, SIDE))
    words = 0
    if STOCHASTIC:
        words = tile_words(seed, step, stream, row * columns + left, ALIGNED, SIDE)
    q = encode(values, scale, tl.zeros_like(scale), words, CODE, STOCHASTIC)
    limit = tl.where(row < rows, tl.minimum(columns - left, SIDE), 0)
    store_codes(codes, q, row, tl.zeros_like(row) + left, limit, columns, CODE, SIDE)


@triton.jit
def most_of(values, BLOCK: tl.constexpr, SIDE: tl.constexpr):
    """(SIDE, blocks): of a tile's own blocks, which a tile has whole."""
    if BLOCK == SIDE:
        return tl.max(magnitude(values), axis=1)[:, None]
    else:
        return tl.max(tl.reshape(magnitude(values), (SIDE, SIDE // BLOCK, BLOCK)), axis=2)


@triton.jit(do_not_specialize=(*KEY_ARGUMENTS, "turned_stream"))
def both_kernel(x, most, codes, scales, turned, turned_scales, rows, columns, stride_row, stride_column, seed_low, seed_high, step, stream, turned_stream,
                CODE: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, TURNED_ALIGNED: tl.constexpr,
                SIDE: tl.constexpr):
    """BLOCK 0 (whole rows and columns): most_kernel was here before. BLOCK is 2 SIDE at the most."""
    PARTS: tl.constexpr = 2 if BLOCK > SIDE else 1
    top, left = corner(columns, SIDE * PARTS)
    if PARTS == 2:
        a = magnitude(square(x, top, left, rows, columns, stride_row, stride_column, SIDE))
        b = magnitude(square(x, top, left + SIDE, rows, columns, stride_row, stride_column, SIDE))
        first_columns, second_columns = tl.max(a, axis=0), tl.max(b, axis=0)
        first_rows = tl.maximum(tl.max(a, axis=1), tl.max(b, axis=1))
        a = magnitude(square(x, top + SIDE, left, rows, columns, stride_row, stride_column, SIDE))
        b = magnitude(square(x, top + SIDE, left + SIDE, rows, columns, stride_row, stride_column, SIDE))
        first_columns, second_columns = tl.maximum(first_columns, tl.max(a, axis=0)), tl.maximum(second_columns, tl.max(b, axis=0))
        second_rows = tl.maximum(tl.max(a, axis=1), tl.max(b, axis=1))
    seed = seed_of(seed_low, seed_high)
    for part in range(PARTS * PARTS):
        up, side = top + part // PARTS * SIDE, left + part % PARTS * SIDE
        values = square(x, up, side, rows, columns, stride_row, stride_column, SIDE)
        across = tl.trans(values)
        if BLOCK == 0:
            row, column = up + tl.arange(0, SIDE), side + tl.arange(0, SIDE)
            by_rows = tl.load(most + row, mask=row < rows, other=0)[:, None]
            by_columns = tl.load(most + rows + column, mask=column < columns, other=0)[:, None]
        elif PARTS == 2:
            by_rows = tl.where(part // PARTS == 0, first_rows, second_rows)[:, None]
            by_columns = tl.where(part % PARTS == 0, first_columns, second_columns)[:, None]
        else:
            by_rows, by_columns = most_of(values, BLOCK, SIDE), most_of(across, BLOCK, SIDE)
        encode_square(values, by_rows, codes, scales, up, side, rows, columns, seed, step, stream, CODE, BLOCK, STOCHASTIC, ALIGNED, SIDE)
        encode_square(across, by_columns, turned, turned_scales, side, up, columns, rows, seed, step, turned_stream, CODE, BLOCK, STOCHASTIC, TURNED_ALIGNED,
                      SIDE)


@triton.jit
def root_bits(LOG: tl.constexpr):
    """The bits of the fp32 2^(-LOG/2): 1 or sqrt(1/2), LOG // 2 less in the exponent."""
    return (0x3F3504F3 if LOG % 2 else 0x3F800000) - ((LOG // 2) << 23)


@triton.jit
def hadamard_lengths(at, columns, BLOCK: tl.constexpr, LOG: tl.constexpr):
    """How long the block is that holds each element of a row, and its 1 / sqrt(length); csrc/common/hadamard.h explains."""
    different = ((at ^ columns) & (BLOCK - 1)).to(tl.int32)
    size = tl.zeros_like(different) + 1
    scale = tl.zeros_like(different) + root_bits(0)
    for i in tl.static_range(LOG):
        here = ((different >> i) & 1) != 0
        size, scale = tl.where(here, 1 << i, size), tl.where(here, root_bits(i), scale)
    whole = at < columns // BLOCK * BLOCK
    size, scale = tl.where(whole, BLOCK, size), tl.where(whole, root_bits(LOG), scale)
    return size, scale.to(tl.float32, bitcast=True)


@triton.jit
def flip_signs(x, words):
    return (bits(x) ^ ((words >> 31) << 31).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def hadamard_kernel(x, out, rows, columns, groups, chunks, stride_row, stride_column, seed_low, seed_high, step, stream, BLOCK: tl.constexpr,
                    LOG: tl.constexpr, OUT: tl.constexpr, RANDOM: tl.constexpr, INVERSE: tl.constexpr, TAIL: tl.constexpr, ACROSS_ROWS: tl.constexpr,
                    NB: tl.constexpr, P2: tl.constexpr):
    """NB rows of P2 columns, a multiple of BLOCK. TAIL: columns is none."""
    index = tl.program_id(0)
    # Neighbouring tiles are neighbours in memory, whichever way the input lies.
    group, chunk = (index % groups, index // groups) if ACROSS_ROWS else (index // chunks, index % chunks)
    row = group.to(tl.int64) * NB + tl.arange(0, NB)
    first = chunk.to(tl.int64) * P2 + tl.arange(0, 1)
    col = tl.zeros_like(row) + first
    limit = tl.where(row < rows, columns - col, 0)
    v = load_strided(x, row, col, limit, stride_row, stride_column, P2)
    if RANDOM:
        words = tile_words(seed_of(seed_low, seed_high), step, stream, first, True, P2)  # the same for every row
        if not INVERSE:
            v = flip_signs(v, words)
    size, scale = hadamard_lengths(first[:, None] + tl.arange(0, P2)[None, :], columns, BLOCK, LOG)
    for i in tl.static_range(LOG):
        a, b = tl.split(tl.permute(tl.reshape(v, (NB * P2 // (2 << i), 2, 1 << i)), (0, 2, 1)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (NB, P2))
        v = tl.where(size > 1 << i, y, v) if TAIL else y
    v = v * scale
    if RANDOM and INVERSE:
        v = flip_signs(v, words)
    store_floats(out, v, 0, row, col, limit, columns, OUT, False, P2)


@triton.jit
def dequantize_kernel(codes, scales, zeros, out, rows, columns, block, blocks, pieces, CODE: tl.constexpr, OUT: tl.constexpr,
                      NB: tl.constexpr, P2: tl.constexpr):
    """NB pieces of blocks; a block longer than P2 is cut into ``pieces``."""
    index = tl.program_id(0).to(tl.int64) * NB + tl.arange(0, NB)
    at = index // pieces  # number of the block
    done = (index % pieces) * P2
    row = at // blocks
    exists = row < rows
    col = (at % blocks) * block + done
    limit = tl.where(exists, tl.minimum(block - done, columns - col), 0)
    scale = tl.load(scales + at, mask=exists, other=0.0)
    zero = tl.zeros_like(scale)
    if has_zero_point(CODE):
        zero = tl.load(zeros + at, mask=exists, other=0).to(tl.float32)
    q = load_codes(codes, row, col, limit, columns, CODE, P2)
    store_floats(out, decode(q, scale[:, None], zero[:, None], CODE), 0, row, col, limit, columns, OUT, False, P2)


# Fake quantisation: csrc/common/codecs.h and pyops/reference/quant.py say what and in which order sums are taken. A program
# takes NB groups, LANES columns of each at a time, which keeps one accumulator per group and lane. Forward moves 8 bytes per
# fp32 element, backward 12; 20 and 30 operations an element stay below that limit.
LANES = tl.constexpr(32)
GROUPS = 32    # groups a program takes


@triton.jit
def fake_codes(w, step, zero, TOP: tl.constexpr):
    """w / step; the nearest integer; the code, 0..TOP; whether it was not clamped."""
    ratio = tl.div_rn(w, step + tl.zeros_like(w))
    rounded = round_even(clamp(ratio, -256.0, 256.0))  # beyond 2^8 every ratio is out of range
    code = clamp(rounded + zero, 0.0, TOP)
    return ratio, rounded, code, rounded + zero == code


@triton.jit
def halves(sums, NB: tl.constexpr, HALF: tl.constexpr):
    """(NB, 2 HALF) -> (NB, HALF): lane j + lane j + HALF."""
    low, high = tl.split(tl.permute(tl.reshape(sums, (NB, 2, HALF)), (0, 2, 1)))
    return low + high


@triton.jit
def fold(sums, NB: tl.constexpr):
    """(NB, LANES) -> (NB)."""
    return tl.reshape(halves(halves(halves(halves(halves(sums, NB, 16), NB, 8), NB, 4), NB, 2), NB, 1), (NB,))


@triton.jit
def fake_kernel(weight, grad, steps, zeros, out, dsteps, dzeros, rows, columns, block, blocks, TOP: tl.constexpr, W: tl.constexpr,
                G: tl.constexpr, OUT: tl.constexpr, BACKWARD: tl.constexpr, NB: tl.constexpr):
    """NB groups; TOP = 2^bits - 1, the largest code."""
    index = tl.program_id(0).to(tl.int64) * NB + tl.arange(0, NB)
    row, col = index // blocks, (index % blocks) * block
    exists = row < rows
    size = tl.where(exists, tl.minimum(block, columns - col), 0)  # the last group of a row may be shorter
    step = tl.load(steps + index, mask=exists, other=1.0)
    step = tl.where(step < 7.888609052210118e-31, 7.888609052210118e-31, step)  # 2^-100
    zero = round_even(clamp(tl.load(zeros + index, mask=exists, other=0.0), 0.0, TOP))
    dstep, clipped = tl.zeros((NB, LANES), tl.float32), tl.zeros((NB, LANES), tl.float32)
    for done in range(0, block, LANES):
        w = load_floats(weight, row, col + done, size - done, columns, W, LANES)
        ratio, rounded, code, inside = fake_codes(w, step[:, None], zero[:, None], TOP)
        if BACKWARD:
            g = load_floats(grad, row, col + done, size - done, columns, G, LANES)
            dstep += g * tl.where(inside, rounded - ratio, code - zero[:, None])  # beyond the end g is 0
            clipped += tl.where(inside, 0.0, g)
            y = tl.where(inside, g, 0.0)
        else:
            y = (code - zero[:, None]) * step[:, None] + (w - w)  # w - w: 0, or nan where w is not finite
        store_floats(out, y, 0, row, col + done, size - done, columns, OUT, False, LANES)
    if BACKWARD:
        tl.store(dsteps + index, fold(dstep, NB), mask=exists)
        tl.store(dzeros + index, fold(clipped, NB) * -step, mask=exists)


def quantize(x, code, block=0, transpose=False, key=None, stream=0, scales=None):
    """See gradmill.ops.quant.quantize."""
    if code in UNALIGNED:  # codes across bytes, or positions beside them: rare formats, plain torch serves them
        return reference.quantize(x, code, block, transpose, key, stream, scales)
    format = Format(code, block)
    if transpose:
        x = x.t()  # strides do the rest
    rows, columns = x.shape
    blocks = format.blocks(columns)
    codes = x.new_empty((rows, format.code_columns(columns)), dtype=format.code_dtype)
    given = scales is not None
    scales = scales.clone(memory_format=torch.contiguous_format) if given else x.new_empty((rows, blocks), dtype=torch.float32)
    zeros = x.new_empty((rows, blocks) if format.has_zero_point else (0,), dtype=torch.uint8)
    if not x.numel():
        return codes, scales.zero_(), zeros.zero_()
    if rows * blocks >= 1 << 31:
        raise ValueError(f"gradmill.quantize: {rows * blocks} blocks; the Triton kernel counts them in 31 bits: take a larger block")
    size = min(block or columns, columns)
    across = x.stride(0) == 1 and x.stride(1) != 1
    chunk = min(power_of_two(size), max(16, TILE // ACROSS * 2 if across else TILE))
    runs = ACROSS if across else max(1, TILE // chunk)
    aligned = (rows == 1 or columns % 4 == 0) and (blocks == 1 or size % 4 == 0)
    with ready(x):
        quantize_kernel[(triton.cdiv(rows * blocks, runs),)](
            as_bits(x), as_bits(codes), scales, zeros, rows, columns, size, blocks, *x.stride(), *key_words(key, stream), CODE=CODES[code],
            GIVEN=given, STOCHASTIC=key is not None, ALIGNED=aligned, ACROSS_ROWS=across, LOOP=size > chunk, NB=runs, P2=chunk,
            num_warps=warps_for(runs * chunk), **LAUNCH)
    return codes, scales, zeros


def quantize_both(x, code, block=0, key=None, stream=0, turned_stream=0):
    """See gradmill.ops.quant.quantize_both. Blocks that no square tile can hold whole both ways take two launches of quantize."""
    rows, columns = x.shape
    if not x.numel() or block and not (16 <= block <= 128 and block & (block - 1) == 0):
        return (*quantize(x, code, block, False, key, stream)[:2], *quantize(x, code, block, True, key, turned_stream)[:2])
    format, side = Format(code, block), max(SQUARE, block // 2)
    out = [x.new_empty(shape, dtype=dtype) for n, m in ((rows, columns), (columns, rows))
           for shape, dtype in (((n, m), format.code_dtype), ((n, format.blocks(m)), torch.float32))]
    across = max(side, block)   # columns and rows of a program
    tiles = triton.cdiv(rows, side) * triton.cdiv(columns, side)
    if tiles >= 1 << 31:
        raise ValueError(f"gradmill.quantize_both: {rows} x {columns} is {tiles} tiles; the Triton kernel counts them in 31 bits")
    most = x.new_zeros(rows + columns if block == 0 else 0, dtype=torch.int32)
    shape, given = (rows, columns, *x.stride()), as_bits(x)
    with ready(x):
        if block == 0:
            most_kernel[(tiles,)](given, most, *shape, SIDE=side, num_warps=warps_for(side * side), **LAUNCH)
        both_kernel[(triton.cdiv(rows, across) * triton.cdiv(columns, across),)](given, most, *map(as_bits, out), *shape, *key_words(key, stream), signed32(turned_stream), CODE=CODES[code], BLOCK=block,
                          STOCHASTIC=key is not None, ALIGNED=columns % 4 == 0, TURNED_ALIGNED=rows % 4 == 0, SIDE=side,
                          num_warps=warps_for(side * side), **LAUNCH)
    return tuple(out)


def dequantize(codes, scales, zeros, code, block, columns, dtype):
    """See gradmill.ops.quant.dequantize."""
    if code in UNALIGNED:
        return reference.dequantize(codes, scales, zeros, code, block, columns, dtype)
    rows = codes.shape[0]
    out = codes.new_empty((rows, columns), dtype=dtype)
    if not out.numel():
        return out
    size = min(block or columns, columns)
    blocks = triton.cdiv(columns, size)
    chunk = min(power_of_two(size), max(16, TILE))
    pieces, runs = triton.cdiv(size, chunk), max(1, TILE // chunk)
    with ready(codes):
        dequantize_kernel[(triton.cdiv(rows * blocks * pieces, runs),)](
            as_bits(codes), scales, zeros, out, rows, columns, size, blocks, pieces, CODE=CODES[code], OUT=CODES[float_code(dtype)], NB=runs,
            P2=chunk, num_warps=warps_for(runs * chunk), **LAUNCH)
    return out


def hadamard_tile(rows, columns, block, across):
    """(NB, P2): as many whole blocks as are worth a read, and rows to fill a tile or, across, a line of memory."""
    chunk = max(block, min(power_of_two(columns), 128 if across else 256))
    return max(ACROSS // 2 if across else 1, TILE // chunk), chunk


def hadamard(x, block=16, transpose=False, key=None, stream=0, dtype=None, inverse=False):
    """See gradmill.ops.quant.hadamard."""
    if transpose:
        x = x.t()  # strides do the rest
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=dtype or x.dtype, device=x.device)
    if not x.numel():
        return out
    across = x.stride(0) == 1 and x.stride(1) != 1
    runs, chunk = hadamard_tile(rows, columns, block, across)
    groups, chunks = triton.cdiv(rows, runs), triton.cdiv(columns, chunk)
    if groups * chunks >= 1 << 31:
        raise ValueError(f"gradmill.hadamard: {rows} x {columns} is {groups * chunks} tiles; the Triton kernel counts them in 31 bits")
    with ready(x):
        hadamard_kernel[(groups * chunks,)](
            as_bits(x), out, rows, columns, groups, chunks, *x.stride(), *key_words(key, stream), BLOCK=block, LOG=block.bit_length() - 1,
            OUT=CODES[float_code(out.dtype)], RANDOM=key is not None, INVERSE=inverse, TAIL=columns % block != 0, ACROSS_ROWS=across, NB=runs,
            P2=chunk, num_warps=warps_for(runs * chunk), **LAUNCH)
    return out


def _fake(weight, grad, steps, zeros, out, dsteps, dzeros, bits, block):
    rows, columns = weight.shape
    size = min(block or columns, columns)
    blocks = triton.cdiv(columns, size)
    with ready(weight):
        fake_kernel[(triton.cdiv(rows * blocks, GROUPS),)](
            weight.contiguous(), grad.contiguous(), steps.contiguous(), zeros.contiguous(), out, dsteps, dzeros, rows, columns, size, blocks,
            TOP=2.0 ** bits - 1, W=CODES[float_code(weight.dtype)], G=CODES[float_code(grad.dtype)], OUT=CODES[float_code(out.dtype)],
            BACKWARD=dsteps is not steps, NB=GROUPS, num_warps=warps_for(GROUPS * 64), **LAUNCH)


def fake_quantize(weight, steps, zeros, bits, block, dtype):
    """See gradmill.ops.quant.fake_quantize."""
    out = weight.new_empty(weight.shape, dtype=dtype)
    if out.numel():
        _fake(weight, weight, steps, zeros, out, steps, zeros, bits, block)
    return out


def fake_quantize_backward(grad, weight, steps, zeros, bits, block):
    """See gradmill.ops.quant.fake_quantize_backward."""
    out = weight.new_empty(weight.shape), steps.new_empty(steps.shape), zeros.new_empty(zeros.shape)
    if weight.numel():
        _fake(weight, grad, steps, zeros, *out, bits, block)
    else:
        out[1].zero_(), out[2].zero_()
    return out
