"""matmul: INT8 x INT8 and FP8 x FP8 on the tensor cores, and float x packed weight decoded on the way to them.

matmul_int8: 2 m n k operations on m k + n k bytes; limit on an H100: the int8 tensor cores, nominally twice bf16, of which
798 TFLOP/s were reached there: some 1.5 POP/s at best for large square shapes; memory (3.0 TB/s) below about m = 256.
matmul_packed: 2 m n k operations; reads the weight at 4 or 8 bits, the point of it: at m = 1 a 4096 x 4096 uint4
weight with block 256 is 8.7 MB = 2.9 us, against 11 us in bf16; for large m the limit is the bf16 matmul's 798 TFLOP/s,
less the decoding (some 5 integer operations per weight element and row tile). Expected, never measured on a GPU yet.
matmul_scaled, FP8 x FP8: bytes and operations as matmul_int8. Hopper's tensor cores add FP8 products with some 14 bits, so
sums are moved to fp32 every 128 products: per 128 x 128 x 128 tile 2.1 M products take 512 clocks of a tensor core, the
16384 additions 128 clocks of the other units, with scales per 128 (a product and a fused multiply-add) 256: they overlap
with the next tile's products of another warp group, at best. Expected, never measured on a GPU yet.

One skeleton: as many programs as run at a time walk the tiles (tile_of), load what their format stores, sum, and store through one
epilogue. The walk is one loop with the sum over k (flatten): the first loads of a tile are on their way while the last one's
results are stored, 128 x 256 x 2 bytes that would leave the tensor cores idle for 66 KB x 132 / 3.0 TB/s = 2.9 us after a tile's
24 us (k = 4096, int8). Tiles come from kernels/tiles.json, never from autotuning.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradmill.formats import CODES, FLOAT_DTYPES, STATE_CODES, float_code
from gradmill.kernels._common import (BF16, E4M3, F16, INTERPRETED, INTERPRETING, LAUNCH, UNALIGNED, as_bits, bf16_bits, centred, decode,
                                      decode_small, f16_bits, from_bf16_bits, has_zero_point, load_codes, ready, round_to_bf16)
from gradmill.kernels.quant import dequantize
from gradmill.kernels.tiles import architecture, choose, grid, torch_is_faster

EXACT_K = 1 << 16  # products in one int32 sum: 2^16 * 128 * 128 = 2^30, whatever the codes


# --- shared -----------------------------------------------------------------------------------------------
@triton.jit
def tile_of(number, m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles are walked column by column, so that their operands stay in L2."""
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    first = number // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    inside = number % (GROUP * tiles_n)
    return first + inside % rows, inside // rows


@triton.jit
def load_turned(x, rm, rk, at, m, k, stride_xm, stride_xk):
    """Rows rm and columns at + rk of a float x, transposed; 0 outside."""
    mask = (rm < m)[:, None] & (rk < k - at)[None, :]
    source = x + rm.to(tl.int64)[:, None] * stride_xm + (at + rk).to(tl.int64)[None, :] * stride_xk
    if x.dtype.element_ty == tl.int16:  # bf16 bits, in the interpreter only
        return tl.trans(from_bf16_bits(tl.load(source, mask=mask, other=0)))
    else:
        return tl.trans(tl.load(source, mask=mask, other=0.0))


@triton.jit
def load_bias(bias, rn, n):
    if bias.dtype.element_ty == tl.int16:
        return from_bf16_bits(tl.load(bias + rn, mask=rn < n, other=0))
    else:
        return tl.load(bias + rn, mask=rn < n, other=0.0).to(tl.float32)


@triton.jit
def store_out(out, values, at, mask, OUT: tl.constexpr):
    if OUT == BF16:
        tl.store(out.to(tl.pointer_type(tl.int16)) + at, bf16_bits(values), mask=mask)
    elif OUT == F16:
        tl.store(out.to(tl.pointer_type(tl.int16)) + at, f16_bits(values), mask=mask)
    else:
        tl.store(out + at, values, mask=mask)


# --- int8 -------------------------------------------------------------------------------------------------
@triton.jit
def int8_sums(a_rows, b_rows, rk, k, EVEN_K: tl.constexpr, LONG: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              BK: tl.constexpr):
    """A tile of a b^T from the pointers to its first BK columns: the exact sums, in fp32."""
    if LONG:
        total = tl.zeros((BM, BN), tl.int64)
        for start in range(0, k, EXACT):
            acc = tl.zeros((BM, BN), tl.int32)
            for at in range(start, tl.minimum(start + EXACT, k), BK):
                mask = rk[None, :] < k - at
                acc = tl.dot(tl.load(a_rows + at, mask=mask, other=0), tl.trans(tl.load(b_rows + at, mask=mask, other=0)), acc,
                             out_dtype=tl.int32)
            total += acc.to(tl.int64)
        return total.to(tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.int32)
        for at in range(0, k, BK):
            if EVEN_K:
                a_tile, b_tile = tl.load(a_rows + at), tl.load(b_rows + at)
            else:
                mask = rk[None, :] < k - at
                a_tile, b_tile = tl.load(a_rows + at, mask=mask, other=0), tl.load(b_rows + at, mask=mask, other=0)
            acc = tl.dot(a_tile, tl.trans(b_tile), acc, out_dtype=tl.int32)
        return acc.to(tl.float32)


@triton.jit
def store_scaled(sums, a_scales, b_scales, bias, out, rm, rn, m, n, OUT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The epilogue of whole-row scales: out = (sums * a_scales) * b_scales + bias."""
    values = sums * tl.load(a_scales + rm, mask=rm < m, other=0.0)[:, None] * tl.load(b_scales + rn, mask=rn < n, other=0.0)[None, :]
    if HAS_BIAS:
        values = values + load_bias(bias, rn, n)[None, :]
    store_out(out, values, rm.to(tl.int64)[:, None] * n + rn[None, :], (rm < m)[:, None] & (rn < n)[None, :], OUT)


@triton.jit
def int8_kernel(a, b, a_scales, b_scales, bias, out, m, n, k, OUT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
                LONG: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """out = (a b^T * a_scales) * b_scales + bias. LONG: k exceeds EXACT, partial sums are added in int64."""
    for number in tl.range(tl.program_id(0), tl.cdiv(m, BM) * tl.cdiv(n, BN), tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of(number, m, n, BM, BN, GROUP)
        rm, rn, rk = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
        # Rows beyond the end read row 0's neighbours again (no mask in the loop) and are not stored.
        a_rows = a + (rm % m).to(tl.int64)[:, None] * k + rk[None, :]
        b_rows = b + (rn % n).to(tl.int64)[:, None] * k + rk[None, :]
        sums = int8_sums(a_rows, b_rows, rk, k, EVEN_K, LONG, EXACT, BM, BN, BK)
        store_scaled(sums, a_scales, b_scales, bias, out, rm, rn, m, n, OUT, HAS_BIAS)


@triton.jit
def epilogue_kernel(sums, a_scales, b_scales, bias, out, m, n, OUT: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """int8_kernel's end alone, for sums that torch made: 6 bytes an element of a bf16 result."""
    number, across = tl.program_id(0), tl.cdiv(n, BN)
    rm, rn = number // across * BM + tl.arange(0, BM), number % across * BN + tl.arange(0, BN)
    at = rm.to(tl.int64)[:, None] * n + rn[None, :]
    x = tl.load(sums + at, mask=(rm < m)[:, None] & (rn < n)[None, :], other=0).to(tl.float32)
    store_scaled(x, a_scales, b_scales, bias, out, rm, rn, m, n, OUT, HAS_BIAS)


def matmul_int8(a, b, a_scales, b_scales, bias, dtype):
    """See gradmill.ops.matmul.matmul_int8."""
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty((m, n), dtype=dtype)
    if not out.numel():
        return out
    arch, long = architecture(a.device), k > EXACT_K
    tile, bias_given = choose("int8", arch, m, n), bias is not None
    operands = a_scales, b_scales, as_bits(bias.contiguous()) if bias_given else a_scales, out, m, n
    shared = {"OUT": CODES[float_code(dtype)], "HAS_BIAS": bias_given}
    # torch's own limits: m above 16, n and k multiples of 8; 16 keeps every row aligned.
    if torch_is_faster("int8", arch, m, n) and m > 16 and n % 16 == k % 16 == 0 and k and not long:
        with ready(a):
            epilogue_kernel[(triton.cdiv(m, 16) * triton.cdiv(n, 256),)](torch._int_mm(a, b.t()), *operands, **shared, BM=16, BN=256, num_warps=8, **LAUNCH)
        return out
    if long:
        tile = tile._replace(bm=min(tile.bm, 64), bn=min(tile.bn, 64), warps=4)  # two sums of 12 bytes together in registers
    with ready(a):
        int8_kernel[grid(m, n, tile, a.device)](a, b, *operands, k, **shared, EVEN_K=k % tile.bk == 0, LONG=long, EXACT=EXACT_K, **tile.launch, **LAUNCH)
    return out


# --- packed weight ----------------------------------------------------------------------------------------
@triton.jit
def weight_scales(scales, zeros, rows, first_column, limit, block, blocks, CODE: tl.constexpr, PER_ROW: tl.constexpr, P2: tl.constexpr):
    """Scale and zero of a weight tile (rows, P2): one per row where the tile lies in one block, else gathered."""
    if PER_ROW:
        at = (rows * blocks + first_column // block)[:, None]
        mask = limit[:, None] > 0
    else:
        k = tl.arange(0, P2)[None, :]
        at = (rows * blocks)[:, None] + (first_column + k) // block
        mask = k < limit[:, None]
    scale = tl.load(scales + at, mask=mask, other=0.0)
    zero = tl.zeros_like(scale)
    if has_zero_point(CODE):
        zero = tl.load(zeros + at, mask=mask, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def weight_tile(codes, scales, zeros, rows, first_column, count, rows_total, columns, block, blocks, CODE: tl.constexpr, PER_ROW: tl.constexpr,
                FACTOR: tl.constexpr, P2: tl.constexpr):
    """A (rows, P2) tile of a packed weight as fp32, and the scale it still has to be multiplied by (FACTOR: then the
    tile holds the exact integers code - zero)."""
    limit = tl.where(rows < rows_total, count, 0)
    q = load_codes(codes, rows, tl.zeros_like(rows) + first_column, limit, columns, CODE, P2)
    scale, zero = weight_scales(scales, zeros, rows, first_column, limit, block, blocks, CODE, PER_ROW, P2)
    if FACTOR:
        return centred(q, zero, CODE), scale
    else:
        return decode(q, scale, zero, CODE), scale


@triton.jit
def packed_kernel(x, codes, scales, zeros, bias, out, m, n, k, columns, block, blocks, stride_xm, stride_xk, stride_om, stride_on,
                  CODE: tl.constexpr, X: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr, TRANSPOSE: tl.constexpr,
                  PER_ROW: tl.constexpr, FACTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """out (m, n) = x (m, k) w^T for w (n, k), or x w for w (k, n) with TRANSPOSE.

    The tile is computed transposed, (BN, BK) weight times (BK, BM) input: the decoded weight is the instruction's first
    operand, which may come from registers, and a small m is its narrow side. FACTOR (w^T, block a multiple of BK): the
    dot runs on the integers code - zero, exact in 16 bits, and each partial sum is multiplied by the block's scale in fp32.
    """
    for number in tl.range(tl.program_id(0), tl.cdiv(m, BM) * tl.cdiv(n, BN), tl.num_programs(0)):
        tile_m, tile_n = tile_of(number, m, n, BM, BN, GROUP)
        rm, rn, rk = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
        acc = tl.zeros((BN, BM), tl.float32)
        for at in range(0, k, BK):
            xt = load_turned(x, rm, rk, at, m, k, stride_xm, stride_xk)
            if TRANSPOSE:
                w, scale = weight_tile(codes, scales, zeros, (at + rk).to(tl.int64), tile_n * BN, tl.minimum(BN, n - tile_n * BN), k, columns,
                                       block, blocks, CODE, PER_ROW, FACTOR, BN)
                w = tl.trans(w)
            else:
                w, scale = weight_tile(codes, scales, zeros, rn.to(tl.int64), at, tl.minimum(BK, k - at), n, columns, block, blocks, CODE,
                                       PER_ROW, FACTOR, BK)
            # fp32: full precision. bf16: the weight in bf16. fp16: exact integers in fp16; a weight already scaled might
            # leave fp16's range, so tf32, which holds every fp16 exactly.
            if X == BF16:
                if INTERPRETED:
                    part = tl.dot(round_to_bf16(w), xt.to(tl.float32), input_precision="ieee")
                else:
                    part = tl.dot(w.to(tl.bfloat16), xt)
            elif X == F16 and FACTOR:
                part = tl.dot(w.to(tl.float16), xt)
            elif X == F16:
                part = tl.dot(w, xt.to(tl.float32), input_precision="tf32")
            else:
                part = tl.dot(w, xt, input_precision="ieee")
            if FACTOR:
                acc += part * scale
            else:
                acc += part
        values = tl.trans(acc)
        if HAS_BIAS:
            values = values + load_bias(bias, rn, n)[None, :]
        store_out(out, values, rm.to(tl.int64)[:, None] * stride_om + rn.to(tl.int64)[None, :] * stride_on, (rm < m)[:, None] & (rn < n)[None, :],
                  OUT)


def fitting(tile: int, block: int, columns: int, least: int) -> tuple[int, bool]:
    """(tile, True) where a tile of that width, or of a smaller power of two, lies inside one block; else (tile, False)."""
    if block >= columns:
        return tile, True
    width = min(tile, block & -block)
    return (width, True) if width >= least else (tile, False)


def launch_packed(x, codes, scales, zeros, code, block, columns, transpose, bias, out):
    """x and out may have any strides."""
    m, k = x.shape
    n = out.shape[1]
    if not out.numel():
        return
    if not k:
        out.copy_(torch.zeros_like(out) if bias is None else bias.expand_as(out))
        return
    if code in UNALIGNED:
        w = dequantize(codes, scales, zeros, code, block, columns, torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
        out.copy_(float_matmul(x, w, transpose, bias, out.dtype))
        return
    block = min(block or columns, columns)
    arch = architecture(x.device)
    tile = choose("fp32" if x.dtype == torch.float32 else "packed", arch, m, n)
    if transpose:
        bn, per_row = fitting(tile.bn, block, columns, 32)
        tile, factor = tile._replace(bn=bn), False  # the scale belongs to the summed index
    else:
        bk, per_row = fitting(tile.bk, block, columns, 16)
        tile, factor = tile._replace(bk=bk), per_row and code not in STATE_CODES
    if not per_row:
        tile = choose("fp32" if x.dtype == torch.float32 else "gather", arch, m, n)
    with ready(x):
        packed_kernel[grid(m, n, tile, x.device)](
            as_bits(x) if INTERPRETING else x, as_bits(codes), scales, scales if zeros is None else zeros, scales if bias is None else as_bits(bias.contiguous()),
            out, m, n, k, columns, block, triton.cdiv(columns, block), *x.stride(), *out.stride(), CODE=CODES[code], X=CODES[float_code(x.dtype)],
            OUT=CODES[float_code(out.dtype)], HAS_BIAS=bias is not None, TRANSPOSE=transpose, PER_ROW=per_row, FACTOR=factor, **tile.launch,
            **LAUNCH)


def matmul_packed(x, codes, scales, zeros, code, block, columns, transpose, bias, dtype):
    """See gradmill.ops.matmul.matmul_packed."""
    out = x.new_empty((x.shape[0], columns if transpose else codes.shape[0]), dtype=dtype)
    launch_packed(x, codes, scales, zeros, code, block, columns, transpose, bias, out)
    return out


# --- two stored operands ----------------------------------------------------------------------------------
@triton.jit
def fp8_pointer(pointer, CODE: tl.constexpr, NATIVE: tl.constexpr):
    if NATIVE and CODE == E4M3:
        return pointer.to(tl.pointer_type(tl.float8e4nv))
    elif NATIVE:
        return pointer.to(tl.pointer_type(tl.float8e5))
    else:
        return pointer


@triton.jit
def fp8_tile(rows, mask, EVEN_K: tl.constexpr, CODE: tl.constexpr, NATIVE: tl.constexpr):
    """A tile as the dot takes it: fp8, else its values in bf16, which holds them (in the interpreter in fp32)."""
    if EVEN_K:
        tile = tl.load(rows)
    else:
        tile = tl.load(rows, mask=mask, other=0.0)
    if NATIVE:
        return tile
    elif INTERPRETED:
        return decode_small(tile.to(tl.int32), CODE)
    else:
        return decode_small(tile.to(tl.int32), CODE).to(tl.bfloat16)


@triton.jit
def fp8_sums(a_rows, b_rows, a_scales, b_scales, rk, k, a_block, b_block, A: tl.constexpr, B: tl.constexpr, EVEN_K: tl.constexpr,
             BLOCKED: tl.constexpr, NATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A tile of a b^T from the pointers to its first BK columns and first scales, which are applied if BLOCKED."""
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(0, k, BK):
        mask = rk[None, :] < k - at
        a_tile = fp8_tile(a_rows + at, mask, EVEN_K, A, NATIVE)
        b_tile = tl.trans(fp8_tile(b_rows + at, mask, EVEN_K, B, NATIVE))
        if BLOCKED:
            part = tl.dot(a_tile, b_tile, input_precision="ieee")
            acc += part * tl.load(a_scales + at // a_block)[:, None] * tl.load(b_scales + at // b_block)[None, :]
        elif NATIVE:
            acc = tl.dot(a_tile, b_tile, acc, max_num_imprecise_acc=BK)
        else:
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def fp8_kernel(a, b, a_scales, b_scales, bias, out, m, n, k, a_block, b_block, A: tl.constexpr, B: tl.constexpr, OUT: tl.constexpr,
               HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, BLOCKED: tl.constexpr, NATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr, GROUP: tl.constexpr):
    """out = a b^T + bias, both FP8. Scales of whole rows are applied at the end, BLOCKED ones (a_block and b_block are
    multiples of BK, or k) to each step's sum, which is fp32 from there on. Whole rows: fp32 after every step of BK too."""
    for number in tl.range(tl.program_id(0), tl.cdiv(m, BM) * tl.cdiv(n, BN), tl.num_programs(0), flatten=not BLOCKED):
        tile_m, tile_n = tile_of(number, m, n, BM, BN, GROUP)
        rm, rn, rk = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
        row_a, row_b = (rm % m).to(tl.int64), (rn % n).to(tl.int64)  # rows beyond the end read others again and are not stored
        a_rows = fp8_pointer(a, A, NATIVE) + row_a[:, None] * k + rk[None, :]
        b_rows = fp8_pointer(b, B, NATIVE) + row_b[:, None] * k + rk[None, :]
        scales_a, scales_b = a_scales + row_a * tl.cdiv(k, a_block), b_scales + row_b * tl.cdiv(k, b_block)
        acc = fp8_sums(a_rows, b_rows, scales_a, scales_b, rk, k, a_block, b_block, A, B, EVEN_K, BLOCKED, NATIVE, BM, BN, BK)
        if BLOCKED:
            if HAS_BIAS:
                acc = acc + load_bias(bias, rn, n)[None, :]
            store_out(out, acc, rm.to(tl.int64)[:, None] * n + rn[None, :], (rm < m)[:, None] & (rn < n)[None, :], OUT)
        else:
            store_scaled(acc, a_scales, b_scales, bias, out, rm, rn, m, n, OUT, HAS_BIAS)


def native_fp8(device: torch.device) -> bool:
    """Whether tl.dot takes float8_e4m3fn there (gfx942 converts it to 16 bits)."""
    return not INTERPRETING and (torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 9))


def float_matmul(x, w, transpose, bias, dtype):
    """x w^T, or x w with ``transpose``, of plain floats: the vendor's library; sums and bias in fp32."""
    w = w if transpose else w.t()
    if x.dtype == w.dtype == dtype and (bias is None or bias.dtype == dtype):
        return x @ w if bias is None else torch.addmm(bias, x, w)
    if x.is_cuda and x.dtype == w.dtype != torch.float32 and torch.version.hip is None:
        out = torch.mm(x, w, out_dtype=torch.float32)  # no fp32 copies; CUDA only
    else:
        out = x.to(torch.float32) @ w.to(torch.float32)
    return (out if bias is None else out + bias.to(torch.float32)).to(dtype)


def matmul_scaled(a, a_scales, a_zeros, a_code, a_block, b, b_scales, b_zeros, b_code, b_block, columns, transpose, bias, dtype):
    """See gradmill.ops.matmul.matmul_scaled. FP8 pairs (whole rows, or blocks the tiles divide) and whole rows of int8 run on
    the codes; for every other pair and for ``transpose`` a is decoded to bf16 (fp32 where out is) for the packed kernel."""
    m, k = a.shape[0], b.shape[0] if transpose else columns
    n = columns if transpose else b.shape[0]
    out = a.new_empty((m, n), dtype=dtype)
    if not out.numel():
        return out
    a_size, b_size = min(a_block or k, k), min(b_block or k, k)
    whole = a_size == b_size == k
    if k and whole and not transpose and {a_code, b_code} <= {"int8", "int7"}:
        return matmul_int8(a, b, a_scales, b_scales, bias, dtype)
    if k and not transpose and {a_code, b_code} <= {"e4m3", "e5m2"}:
        arch, format = architecture(a.device), "fp8" if whole else "fp8_block"
        # torch's own limits: row-wise scales and a bf16 result; it has no product of two e5m2.
        if whole and torch_is_faster("fp8", arch, m, n) and dtype == torch.bfloat16 and bias is None and n % 16 == k % 16 == 0 and a_code + b_code != "e5m2e5m2":
            return torch._scaled_mm(a, b.t(), a_scales, b_scales.t(), out_dtype=dtype, use_fast_accum=False)
        tile = choose(format, arch, m, n)
        if all(block in (k, block // tile.bk * tile.bk) for block in (a_size, b_size)):
            with ready(a):  # results are within a bound, not bit-equal: multiply and add may fuse
                fp8_kernel[grid(m, n, tile, a.device)](
                    as_bits(a), as_bits(b), a_scales, b_scales, a_scales if bias is None else as_bits(bias.contiguous()), out, m, n, k, a_size,
                    b_size, A=CODES[a_code], B=CODES[b_code], OUT=CODES[float_code(dtype)], HAS_BIAS=bias is not None, EVEN_K=k % tile.bk == 0,
                    BLOCKED=not whole, NATIVE=native_fp8(a.device), **tile.launch, enable_fp_fusion=True)
            return out
    x = a if a_code in FLOAT_DTYPES else dequantize(a, a_scales, a_zeros, a_code, a_block, k, torch.float32 if dtype == torch.float32 else torch.bfloat16)
    if b_code in FLOAT_DTYPES:
        return float_matmul(x, b, transpose, bias, dtype)
    launch_packed(x, b, b_scales, b_zeros, b_code, b_block, columns, transpose, bias, out)
    return out
