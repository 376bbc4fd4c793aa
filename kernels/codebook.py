"""codebook: float x a weight of packed indices into codebooks.

Reads the indices as they lie, 1 to 8 bits each, two bytes an index (the second only where an index can straddle), and gathers their values from
the row's codebook, at most 1 KiB that stays in L1. 2 m n k operations; n k bits / 8 bytes. A gather a weight costs more than decoding an integer
code, shared by the m rows of a tile: for m = 1 expect it, not memory, to be the limit; for large m that of the fp32 or 16-bit
product, less the gathers of n k (m / BM) weights. Expected, never measured on a GPU.
"""
from __future__ import annotations

import triton
import triton.language as tl

from gradmill.formats import CODES, float_code
from gradmill.kernels._common import BF16, INTERPRETED, INTERPRETING, LAUNCH, as_bits, ready, round_to_bf16
from gradmill.kernels.matmul import load_bias, load_turned, store_out, tile_of
from gradmill.kernels.tiles import architecture, choose, grid


@triton.jit
def book_tile(indices, codebooks, row_groups, rows, columns, mask, bytes, BITS: tl.constexpr):
    """The values of a tile of the weight, rows and columns in two dimensions that broadcast to mask's; 0 where the mask is."""
    at = columns * BITS
    here = indices + rows * bytes + at // 8
    q = tl.load(here, mask=mask, other=0).to(tl.int32) >> (at % 8)
    if 8 % BITS != 0:
        more = tl.load(here + 1, mask=mask & (at % 8 + BITS > 8), other=0).to(tl.int32)
        q = q | (more << (8 - at % 8))
    group = tl.load(row_groups + rows + tl.zeros_like(at), mask=mask, other=0).to(tl.int32)
    return tl.load(codebooks + group * (1 << BITS) + (q & ((1 << BITS) - 1)), mask=mask, other=0.0)


@triton.jit
def codebook_kernel(x, indices, codebooks, row_groups, bias, out, m, n, k, bytes, stride_xm, stride_xk, BITS: tl.constexpr, X: tl.constexpr, OUT: tl.constexpr,
                    HAS_BIAS: tl.constexpr, TRANSPOSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """out (m, n) = x (m, k) w^T for w (n, k), or x w for w (k, n) with TRANSPOSE; the tile is computed transposed, as packed_kernel's."""
    for number in tl.range(tl.program_id(0), tl.cdiv(m, BM) * tl.cdiv(n, BN), tl.num_programs(0)):
        tile_m, tile_n = tile_of(number, m, n, BM, BN, GROUP)
        rm, rn, rk = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
        acc = tl.zeros((BN, BM), tl.float32)
        for at in range(0, k, BK):
            xt = load_turned(x, rm, rk, at, m, k, stride_xm, stride_xk)
            inside = (rn < n)[:, None] & (rk < k - at)[None, :]
            if TRANSPOSE:
                w = book_tile(indices, codebooks, row_groups, (at + rk).to(tl.int64)[None, :], rn.to(tl.int64)[:, None], inside, bytes, BITS)
            else:
                w = book_tile(indices, codebooks, row_groups, rn.to(tl.int64)[:, None], (at + rk).to(tl.int64)[None, :], inside, bytes, BITS)
            # fp32: full precision. bf16: the weight in bf16. fp16: tf32, which holds every fp16, and no codeword leaves its range.
            if X == BF16:
                if INTERPRETED:
                    acc += tl.dot(round_to_bf16(w), xt.to(tl.float32), input_precision="ieee")
                else:
                    acc = tl.dot(w.to(tl.bfloat16), xt, acc)
            elif x.dtype.element_ty == tl.float16:
                acc = tl.dot(w, xt.to(tl.float32), acc, input_precision="tf32")
            else:
                acc = tl.dot(w, xt, acc, input_precision="ieee")
        values = tl.trans(acc)
        if HAS_BIAS:
            values = values + load_bias(bias, rn, n)[None, :]
        store_out(out, values, rm.to(tl.int64)[:, None] * n + rn.to(tl.int64)[None, :], (rm < m)[:, None] & (rn < n)[None, :], OUT)


def matmul_codebook(x, indices, codebooks, row_groups, bits, columns, transpose, bias, dtype):
    """See gradmill.ops.codebook.matmul_codebook."""
    (m, k), n = x.shape, columns if transpose else indices.shape[0]
    out = x.new_empty((m, n), dtype=dtype)
    if not out.numel():
        return out
    tile = choose("fp32" if float_code(x.dtype) == "fp32" else "gather", architecture(x.device), m, n)
    with ready(x):
        codebook_kernel[grid(m, n, tile, x.device)](
            as_bits(x) if INTERPRETING else x, indices, codebooks, row_groups, codebooks if bias is None else as_bits(bias.contiguous()), out, m, n, k,
            indices.shape[1], *x.stride(), BITS=bits, X=CODES[float_code(x.dtype)], OUT=CODES[float_code(dtype)], HAS_BIAS=bias is not None,
            TRANSPOSE=transpose, **tile.launch, **LAUNCH)
    return out
