"""projection: a gradient to a packed basis, and an update back into the weight without a full-size product.

project is the packed matmul (kernels/matmul.py): 2 m d rank operations, reads the gradient once and the basis at 4 or 8
bits. project_back: 2 m d rank operations, moves the weight once in its own format, in and out; the (m, d) product lives
in registers, a tile at a time, is added to the decoded weight and encoded again. Limits on an H100, 4096 x 4096, rank 128,
bf16: project 34 MB = 11 us of memory at 3.0 TB/s, 4.3 GFLOP = 5 us at 798 TFLOP/s; project_back of a uint8 weight 34 MB =
11 us, its tf32x3 products 4.3 GFLOP, about 30 us. Expected, never measured on a GPU yet.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradmill.formats import CODES, FLOAT_DTYPES, Format, float_code
from gradmill.kernels._common import (INTERPRETING, KEY_ARGUMENTS, LAUNCH, NONE, STOCHASTIC, as_bits, block_parameters, differs, joined,
                                      key_words, load_floats, load_operand, measure, power_of_two, ready, run_scales, seed_of, store_piece, store_scales)
from gradmill.kernels.matmul import fitting, float_matmul, launch_packed, weight_tile
from gradmill.kernels.optim import store_param
from gradmill.reference import projection as reference

WIDEST = 256     # columns of a tile; a longer block is worked off in chunks, in two passes
ROWS = 16        # weight rows of a tile
DEPTH = 32       # basis vectors at a time


def project(grad, codes, scales, zeros, code, block, left):
    """See gradmill.ops.projection.project: grad B^T, or B grad computed as (grad^T B^T)^T through strides."""
    if code in FLOAT_DTYPES:  # the vendor's library
        return float_matmul(codes, grad, True, None, torch.float32) if left else float_matmul(grad, codes, False, None, torch.float32)
    d = grad.shape[0 if left else 1]
    shape = (codes.shape[0], grad.shape[1]) if left else (grad.shape[0], codes.shape[0])
    out = grad.new_empty(shape, dtype=torch.float32)
    launch_packed(grad.t() if left else grad, codes, scales, zeros, code, block, d, False, None, out.t() if left else out)
    return out


@triton.jit
def product(update, codes, scales, zeros, first_row, first_column, rows, columns, count, rank, block, blocks, CODE: tl.constexpr,
            PER_ROW: tl.constexpr, LEFT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):
    """(BM, BC) tile of update B, or of B^T update when LEFT; ``count`` of its columns exist."""
    rm, rc, rk = first_row + tl.arange(0, BM), first_column + tl.arange(0, BC), tl.arange(0, BK)
    acc = tl.zeros((BM, BC), tl.float32)
    for at in range(0, rank, BK):
        vectors = (at + rk).to(tl.int64)
        if LEFT:
            basis, _ = weight_tile(codes, scales, zeros, vectors, first_row, tl.minimum(BM, rows - first_row), rank, rows, block, blocks,
                                   CODE, PER_ROW, False, BM)
            mask = (vectors < rank)[:, None] & (tl.arange(0, BC) < count)[None, :]
            u = tl.load(update + vectors[:, None] * columns + rc[None, :], mask=mask, other=0.0)
            acc = tl.dot(tl.trans(basis), u, acc, input_precision=PRECISION)
        else:
            basis, _ = weight_tile(codes, scales, zeros, vectors, first_column, count, rank, columns, block, blocks, CODE, PER_ROW, False, BC)
            mask = (rm < rows)[:, None] & (vectors < rank)[None, :]
            u = tl.load(update + rm.to(tl.int64)[:, None] * rank + vectors[None, :], mask=mask, other=0.0)
            acc = tl.dot(u, basis, acc, input_precision=PRECISION)
    return acc


@triton.jit
def moved(old, back, residual, residual_scales, decay, alpha, row, col, limit, columns, R: tl.constexpr, LEFT: tl.constexpr, P2: tl.constexpr):
    """New values of runs of P2: old decayed, plus the update, plus the residual where there is one."""
    new = old * decay + alpha * back
    if R != NONE:
        if LEFT:
            at = col[:, None] + tl.arange(0, P2)[None, :]
            scale = tl.load(residual_scales + at, mask=tl.arange(0, P2)[None, :] < limit[:, None], other=0.0)
        else:
            scale = tl.load(residual_scales + row, mask=limit > 0, other=0.0)[:, None]
        new = new + scale * load_floats(residual, row, col, limit, columns, R, P2)
    return new


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def back_kernel(weight, weight_scales, weight_zeros, update, codes, scales, zeros, residual, residual_scales, decay, alpha, rows, columns, unit, weight_block, rank,
                block, blocks, seed_low, seed_high, step, stream, W: tl.constexpr, CODE: tl.constexpr, R: tl.constexpr,
                LEFT: tl.constexpr, PER_ROW: tl.constexpr, LOOP: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, KB: tl.constexpr, P2: tl.constexpr,
                BK: tl.constexpr):
    """BM rows x one unit of columns: KB whole blocks of P2, one block of up to P2, or (LOOP) one longer block in chunks."""
    key = (seed_of(seed_low, seed_high), step, stream, ALIGNED, 0)
    units = tl.cdiv(columns, unit)
    first_row, first_column = (tl.program_id(0) // units) * BM, (tl.program_id(0) % units) * unit
    # As a tile of runs: run i is block i % KB of row i // KB.
    i = tl.arange(0, BM * KB)
    row, col = (first_row + i // KB).to(tl.int64), first_column + (i % KB) * P2
    size = tl.where(row < rows, tl.maximum(tl.minimum(unit if KB == 1 else P2, columns - col), 0), 0)
    old_scale, old_zero = run_scales(weight_scales, weight_zeros, row, col, size, columns, weight_block, W, False, P2)

    if not LOOP:
        acc = product(update, codes, scales, zeros, first_row, first_column, rows, columns, tl.minimum(unit, columns - first_column), rank, block,
                      blocks, CODE, PER_ROW, LEFT, PRECISION, BM, KB * P2, BK)
        old = load_operand(weight, old_scale, old_zero, row, col, size, columns, W, P2)
        new = moved(old, tl.reshape(acc, (BM * KB, P2)), residual, residual_scales, decay, alpha, row, col, size, columns, R, LEFT, P2)
        store_param(weight, weight_scales, weight_zeros, new, old, key, row, col, size, columns, weight_block, W, False, P2)
    else:
        # Computing the product twice costs less than storing it: the first pass finds the block's parameters.
        none = tl.zeros((BM,), tl.int32)
        stats, changed = (none, none, none), none
        for done in range(0, unit, P2):
            limit = tl.minimum(size - done, P2)
            acc = product(update, codes, scales, zeros, first_row, first_column + done, rows, columns,
                          tl.minimum(P2, tl.minimum(unit - done, columns - first_column - done)), rank, block, blocks, CODE, PER_ROW, LEFT,
                          PRECISION, BM, P2, BK)
            old = load_operand(weight, old_scale, old_zero, row, col + done, limit, columns, W, P2)
            new = moved(old, acc, residual, residual_scales, decay, alpha, row, col + done, limit, columns, R, LEFT, P2)
            valid = tl.arange(0, P2)[None, :] < limit[:, None]
            stats, changed = joined(stats, measure(new, valid)), tl.maximum(changed, differs(new, old, valid))
        scale, zero = block_parameters(stats[0], stats[1], stats[2], W)
        for done in range(0, unit, P2):
            limit = tl.where(changed != 0, tl.minimum(size - done, P2), 0)
            acc = product(update, codes, scales, zeros, first_row, first_column + done, rows, columns,
                          tl.minimum(P2, tl.minimum(unit - done, columns - first_column - done)), rank, block, blocks, CODE, PER_ROW, LEFT,
                          PRECISION, BM, P2, BK)
            old = load_operand(weight, old_scale, old_zero, row, col + done, limit, columns, W, P2)
            tl.debug_barrier()  # the loads above before the stores below, whichever thread does which
            new = moved(old, acc, residual, residual_scales, decay, alpha, row, col + done, limit, columns, R, LEFT, P2)
            store_piece(weight, new, scale, zero, key, row, col, done, limit, columns, W, STOCHASTIC, P2)
        tl.debug_barrier()
        store_scales(weight_scales, weight_zeros, row * tl.cdiv(columns, weight_block) + col // weight_block, scale, zero,
                     (size > 0) & (changed != 0), W)


def project_back(weight, weight_scales, weight_zeros, weight_code, weight_block, columns, update, codes, scales, zeros, code, block,
                 left, scalars, key, stream, residual=None, residual_scales=None, first=0):
    """See gradmill.ops.projection.project_back."""
    if code in FLOAT_DTYPES or first:  # rare: no kernel decodes plain floats, or rounds a shard
        return reference.project_back(weight, weight_scales, weight_zeros, weight_code, weight_block, columns, update, codes, scales, zeros,
                                      code, block, left, scalars, key, stream, residual, residual_scales, first)
    format, rows = Format(weight_code, weight_block), weight.shape[0] if weight.dim() > 1 else 1
    if not rows * columns:
        return
    decay, alpha = scalars.tolist()
    rank, d = codes.shape[0], rows if left else columns
    if format.blocked:
        weight_block = min(weight_block or columns, columns)
        p2 = min(power_of_two(weight_block), max(16, WIDEST))
        runs = max(1, WIDEST // 2 // p2) if p2 == weight_block else 1
        unit = runs * p2 if runs > 1 else weight_block
    else:
        p2 = unit = max(16, WIDEST // 2)
        runs, weight_block = 1, columns
    loop = unit > p2 * runs
    block = min(block or d, d)
    _, per_row = fitting(ROWS, block, d, ROWS) if left else (0, block >= d or (block % p2 == 0 and unit % p2 == 0 and runs == 1))
    aligned = (rows == 1 or columns % 4 == 0) and (unit % 4 == 0 or unit >= columns)
    bits = as_bits(weight)
    extra = (update, update) if residual is None else (as_bits(residual.contiguous()), residual_scales)
    with ready(weight):
        back_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(columns, unit),)](
            bits, bits if weight_scales is None else weight_scales, bits if weight_zeros is None else weight_zeros, update, as_bits(codes), scales,
            zeros, *extra, decay, alpha, rows, columns, unit, weight_block, rank, block, triton.cdiv(d, block), *key_words(key, stream),
            W=CODES[weight_code], CODE=CODES[code], R=NONE.value if residual is None else CODES[float_code(residual.dtype)],
            LEFT=left, PER_ROW=per_row, LOOP=loop, ALIGNED=aligned,
            PRECISION="ieee" if INTERPRETING or torch.version.hip else "tf32x3", BM=ROWS, KB=runs, P2=p2, BK=DEPTH, num_warps=8 if p2 * runs > 128 else 4,
            num_stages=2, **LAUNCH)
