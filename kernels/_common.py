"""Device functions shared by every Triton kernel: Philox words, rounding, block parameters, codes, tiles.

csrc/common/*.h are the C++ twins, pyops/reference/{philox,quant}.py the specification. Every floating point operation
here is an IEEE fp32 add, multiply, divide or square root in the order written: kernels are launched with
enable_fp_fusion=False and divide with tl.div_rn, so that the interpreter, NVIDIA, AMD and C++ give the same bits.
Rounding to 16 bits is integer arithmetic for the same reason (the interpreter's bf16 casts truncate).

A *tile* is NB runs of up to P2 neighbouring elements, each within one row: int64 row[NB], the first column col[NB] and
the number of valid elements limit[NB] (0 for a run that does not exist). Values of a tile are fp32 (NB, P2).
"""
from __future__ import annotations

import contextlib
import os

import torch
import triton
import triton.language as tl

from gradmill.formats import CODES, cached
from gradmill.reference.quant import SMALL_FLOATS, TOPS

# Read once, as triton itself does: it must be set before triton is imported.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED = tl.constexpr(INTERPRETING)

F32, BF16, F16 = (tl.constexpr(CODES[c]) for c in ("fp32", "bf16", "fp16"))
MOMENT8, SQUARE8, DELTA, E4M3, SIGNS = (tl.constexpr(CODES[c]) for c in ("moment8", "square8", "delta", "e4m3", "sign"))
NONE = tl.constexpr(-1)  # no such operand
#: Codes that straddle bytes, or are corrected by position: no kernel here, their ops run the reference.
UNALIGNED = ("uint3", "int3", "int4_outlier")
# What the codes are, by number: tuples, because every launch compares the globals its kernel uses.
_NUMBERED = [{n: code for code, n in CODES.items()}.get(n, "fp32") for n in range(max(CODES.values()) + 1)]  # numbers without a code count as fp32
_BITS = tuple(cached(code).bits for code in _NUMBERED)
_ZERO_POINT = tuple(cached(code).has_zero_point for code in _NUMBERED)
_SIGNED = tuple(code.startswith("int") for code in _NUMBERED)
_TOPS = tuple(TOPS.get(code, 0.0) for code in _NUMBERED)
_SMALL_FLOATS = tuple(SMALL_FLOATS.get(code, (0, 0)) for code in _NUMBERED)
NEAREST, STOCHASTIC, DITHER = (tl.constexpr(i) for i in range(3))  # how a blocked operand is rounded

#: Every launch: multiply and add must not fuse (Triton 3.9 warns that the default will change, so it is explicit).
LAUNCH = {"enable_fp_fusion": False}


# --- host side --------------------------------------------------------------------------------------------
def ready(tensor: torch.Tensor):
    """A context for launching on ``tensor``'s device; refuses CPU tensors unless Triton interprets."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if not INTERPRETING:
        from gradmill.ops._registry import BackendError  # late: gradmill.ops imports this package lazily
        raise BackendError("Triton runs on CPU tensors only with TRITON_INTERPRET=1, set before triton is imported")
    return contextlib.nullcontext()


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """bf16 tensors as int16, float8 as uint8, others as they are: kernels convert those with integer operations."""
    if x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return x.view(torch.uint8)
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def power_of_two(n: int, at_least: int = 16) -> int:
    return max(at_least, 1 << max(n - 1, 0).bit_length())


def signed32(x: int) -> int:
    """The same 32 bits as a Python int Triton passes as i32, whatever the value."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def key_words(key: torch.Tensor | None, stream: int) -> tuple[int, int, int, int]:
    """(seed low, seed high, step, stream) as i32 arguments."""
    seed, step = key.tolist() if key is not None else (0, 0)
    return signed32(seed), signed32(seed >> 32), signed32(step), signed32(stream)


KEY_ARGUMENTS = ("seed_low", "seed_high", "step", "stream")  # never specialised: a new seed must not recompile


def warps_for(elements: int) -> int:
    """16 elements a thread, so that 16-byte loads of every dtype fit."""
    return min(16, max(1, elements // 512))


# --- random words -----------------------------------------------------------------------------------------
@triton.jit
def seed_of(seed_low, seed_high):
    return (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def philox_groups(seed, step, stream, group):
    """The four words of each group (= element // 4)."""
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)  # all four counters 32 bits wide and of one shape
    return tl.philox(seed, low, high, zero + stream.to(tl.uint32, bitcast=True), zero + step.to(tl.uint32, bitcast=True))


@triton.jit
def tile_words(seed, step, stream, first, ALIGNED: tl.constexpr, P2: tl.constexpr):
    """The random words (NB, P2) of runs that start at elements first[NB] (int64).

    ALIGNED: every run starts at a multiple of 4, so that one Philox call makes four neighbours; otherwise every
    element makes its own group and takes one word of it, four times the arithmetic.
    """
    if ALIGNED:
        group = (first >> 2)[:, None] + tl.arange(0, P2 // 4)[None, :]
        w0, w1, w2, w3 = philox_groups(seed, step, stream, group)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (first.shape[0], P2))
    else:
        words = element_words(seed, step, stream, first[:, None] + tl.arange(0, P2)[None, :])
    return words


@triton.jit
def element_words(seed, step, stream, element):
    """One word per element: its group's Philox call, word element % 4."""
    w0, w1, w2, w3 = philox_groups(seed, step, stream, element >> 2)
    i = (element & 3).to(tl.int32)
    return tl.where(i == 0, w0, tl.where(i == 1, w1, tl.where(i == 2, w2, w3)))


@triton.jit
def dither_words(seed, step, stream, first, i):
    """Word of each block's i-th element: one Philox word a block (of its first element), plus i * 2^32 / golden ratio."""
    return element_words(seed, step, stream, first)[:, None] + i.to(tl.uint32) * 0x9E3779B1


# --- rounding ---------------------------------------------------------------------------------------------
@triton.jit
def round_even(x):
    """Half to even for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_stochastic(x, word):
    """Up with probability x - floor(x), from the word's top 24 bits."""
    nearest = round_even(x)
    down = tl.where(nearest > x, nearest - 1.0, nearest)
    u = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return tl.where(x - down > u, down + 1.0, down)


@triton.jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))  # nan stays


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def magnitude(x):
    """|x| as an integer: nan > inf > finite, so that an integer maximum is nan-proof."""
    return bits(x) & 0x7FFFFFFF


@triton.jit
def ordered(x):
    """An integer that orders as x does."""
    b = bits(x)
    return b ^ ((b >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(b):
    return (b ^ ((b >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def from_bf16_bits(h):
    """int16 bits of a bf16 -> fp32."""
    return (h.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(x):
    """fp32 -> bf16 bits (int16): half to even, nan stays nan."""
    u = bits(x)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, (u >> 16) | 0x40, rounded).to(tl.int16)


@triton.jit
def bf16_bits_stochastic(x, word):
    """fp32 -> bf16 bits: the word's top 16 bits are added below the cut; inf and nan are left alone."""
    u = bits(x)
    rounded = (u + (word >> 16).to(tl.int32)) >> 16
    special = (u >> 16) | tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x40, 0)
    return tl.where((u & 0x7FFFFFFF) >= 0x7F800000, special, rounded).to(tl.int16)


@triton.jit
def f16_bits(x):
    """fp32 -> fp16 bits (int16): half to even, overflow to inf, nan stays nan."""
    u = bits(x)
    mag = u & 0x7FFFFFFF
    normal = (mag - 0x38000000 + 0xFFF + ((mag >> 13) & 1)) >> 13
    # Below 2^-14: adding 0.5 aligns the value so that the float unit does the rounding.
    subnormal = bits(mag.to(tl.float32, bitcast=True) + 0.5) - 0x3F000000
    h = tl.where(mag < 0x38800000, subnormal, normal)
    h = tl.where(mag >= 0x477FF000, 0x7C00, h)
    h = tl.where(mag > 0x7F800000, 0x7E00, h)
    return (h | ((u >> 16) & 0x8000)).to(tl.int16)


@triton.jit
def round_to_bf16(x):
    """fp32 -> the fp32 value of its nearest bf16 (for dots in the interpreter, where a bf16 dot is garbage)."""
    return from_bf16_bits(bf16_bits(x))


# --- codes: how one number becomes a code and back --------------------------------------------------------
@triton.constexpr_function
def bits_of(code):
    return _BITS[code]


@triton.constexpr_function
def has_zero_point(code):
    return code >= 0 and _ZERO_POINT[code]


@triton.constexpr_function
def is_signed(code):
    """Two's complement."""
    return _SIGNED[code]


@triton.constexpr_function
def top_of(code):
    """The largest code of integers and small floats, 0 for all others."""
    return _TOPS[code] if code >= 0 else 0.0


@triton.constexpr_function
def is_small_float(code):
    return code >= 0 and _SMALL_FLOATS[code][0] > 0


@triton.constexpr_function
def mantissa_of(code):
    return _SMALL_FLOATS[code][0]


@triton.constexpr_function
def first_normal(code):
    """A small float's smallest normal number: the top bits of that fp32, down to the small float's last mantissa bit."""
    mantissa, exponent = _SMALL_FLOATS[code]
    return (exponent + 127) << mantissa


@triton.jit
def encode_small(x, scale, word, CODE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Below the smallest normal number, adding it lines the value up so that its top bits are the code as well."""
    MANTISSA: tl.constexpr = mantissa_of(CODE)
    SHIFT: tl.constexpr = 23 - MANTISSA
    FIRST: tl.constexpr = first_normal(CODE)
    TOP: tl.constexpr = top_of(CODE)
    y = tl.abs(tl.div_rn(x, scale + tl.zeros_like(x)))
    y = tl.where(y > TOP, TOP, y)
    normal = tl.full(y.shape, FIRST << SHIFT, tl.int32).to(tl.float32, bitcast=True)
    small = y < normal
    b = bits(tl.where(small, y + normal, y))
    if STOCHASTIC:
        b += (word >> (9 + MANTISSA)).to(tl.int32)
    else:
        b += (1 << (SHIFT - 1)) - 1 + ((b >> SHIFT) & 1)  # half to even
    SIGN: tl.constexpr = 1 << (bits_of(CODE) - 1)
    return ((b >> SHIFT) - tl.where(small, FIRST, FIRST - (1 << MANTISSA))) | ((bits(x) >> 31) & SIGN)


@triton.jit
def decode_small(q, CODE: tl.constexpr):
    """What a small float's code stands for, in units of its scale: exact in bf16 and fp16 too."""
    MANTISSA: tl.constexpr = mantissa_of(CODE)
    SHIFT: tl.constexpr = 23 - MANTISSA
    FIRST: tl.constexpr = first_normal(CODE)
    SIGN_BIT: tl.constexpr = bits_of(CODE) - 1
    mag = q & ((1 << SIGN_BIT) - 1)
    small = mag < (1 << MANTISSA)
    y = ((mag + tl.where(small, FIRST, FIRST - (1 << MANTISSA))) << SHIFT).to(tl.float32, bitcast=True)
    y = tl.where(small, y - tl.full(y.shape, FIRST << SHIFT, tl.int32).to(tl.float32, bitcast=True), y)
    return (bits(y) | ((q & (1 << SIGN_BIT)) << (31 - SIGN_BIT))).to(tl.float32, bitcast=True)


# The two 8-bit float codes of optimizer moments ("offset floats"): adding 1 to |x| * inverse makes a float of exponent
# 0..7 whose top bits are the code, so that neither way needs a division. ``inverse`` is top / root, made once a block.
MOMENT_TOP = tl.constexpr(1.9375 * 128 - 1)
SQUARE_TOP = tl.constexpr(1.96875 * 128 - 1)


@triton.jit
def float_code_parameters(amax, CODE: tl.constexpr):
    """scale and inverse; a block below 2^-100 counts as zero, so that the inverse stays finite."""
    if CODE == SQUARE8:
        top: tl.constexpr = SQUARE_TOP
        root = tl.sqrt_rn(amax)
    else:
        top: tl.constexpr = MOMENT_TOP
        root = amax
    enough = amax >= 7.888609052210118e-31  # 2^-100
    return tl.where(enough, tl.div_rn(root, top), 0.0), tl.where(enough, tl.div_rn(top, root), 0.0)


@triton.jit
def encode_moment8(x, inverse, word, STOCHASTIC: tl.constexpr):
    y = tl.abs(x) * inverse
    y = y + 1.0
    half: tl.constexpr = 0x40000
    k = (bits(y) - 0x3F800000 + ((word >> 13).to(tl.int32) if STOCHASTIC else half)).to(tl.uint32, bitcast=True) >> 19
    return tl.minimum(k, 127).to(tl.int32) | ((bits(x) >> 24) & 0x80)


@triton.jit
def decode_moment8(q, scale):
    y = (((q & 127) << 19) + 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    return (bits(y) | ((q & 128) << 24)).to(tl.float32, bitcast=True) * scale


@triton.jit
def encode_square8(x, inverse, word, STOCHASTIC: tl.constexpr):
    """Never 0, so that no update divides by eps alone."""
    y = tl.sqrt_rn(x) * inverse
    y = y + 1.0
    half: tl.constexpr = 0x20000
    k = (bits(y) - 0x3F800000 + ((word >> 14).to(tl.int32) if STOCHASTIC else half)).to(tl.uint32, bitcast=True) >> 18
    return tl.maximum(tl.minimum(k, 255), 1).to(tl.int32)


@triton.jit
def decode_square8(q, scale):
    r = (((q << 18) + 0x3F800000).to(tl.float32, bitcast=True) - 1.0) * scale
    return r * r


@triton.jit
def block_parameters(absmax, low, high, CODE: tl.constexpr):
    """Each block's scale and, both fp32, its zero point (for the float codes: the inverse that encode multiplies by),
    from its statistics: see measure()."""
    amax = absmax.to(tl.float32, bitcast=True)
    zero = tl.zeros_like(amax)
    if has_zero_point(CODE):
        top: tl.constexpr = top_of(CODE)
        least, most = from_ordered(low), from_ordered(high)
        scale = tl.div_rn(most * 0.5 - least * 0.5, top * 0.5)  # halves: most - least may overflow
        zero = tl.where(scale > 0.0, clamp(-round_even(tl.div_rn(least, scale)), 0.0, top), 0.0)
    elif top_of(CODE) > 0:
        scale = tl.div_rn(amax, top_of(CODE))
    elif CODE == MOMENT8 or CODE == SQUARE8:
        scale, zero = float_code_parameters(amax, CODE)
    else:
        scale = zero  # a plain code, asked in passing: no parameters
    bad = absmax >= 0x7F800000  # a nan or an inf inside
    return tl.where(bad, float("nan"), scale), tl.where(bad, 0.0, zero)


@triton.jit
def encode(x, scale, zero, word, CODE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """int32 codes. scale and zero broadcast; word is not read unless STOCHASTIC."""
    if CODE == MOMENT8:
        q = encode_moment8(x, zero, word, STOCHASTIC)
    elif CODE == SQUARE8:
        q = encode_square8(x, zero, word, STOCHASTIC)
    elif is_small_float(CODE):
        q = encode_small(x, scale, word, CODE, STOCHASTIC)
    else:
        top: tl.constexpr = top_of(CODE)
        y = clamp(tl.div_rn(x, scale + tl.zeros_like(x)), -top, top)
        if STOCHASTIC:
            y = round_stochastic(y, word)
        else:
            y = round_even(y)
        if has_zero_point(CODE):
            y = clamp(y + zero, 0.0, top)
        q = tl.where(scale > 0.0, y, 0.0).to(tl.int32)
    return tl.where(scale > 0.0, q, 0)  # an all-zero block, or one with a nan or an inf: codes 0


@triton.jit
def centred(q, zero, CODE: tl.constexpr):
    """Values in units of the scale. Integers less their zero point have at most 8 bits: all are exact in bf16 and fp16."""
    if has_zero_point(CODE):
        return q.to(tl.float32) - zero
    elif is_small_float(CODE):
        return decode_small(q, CODE)
    elif CODE == SIGNS:
        return 1.0 - 2.0 * q.to(tl.float32)
    else:
        return q.to(tl.float32)


@triton.jit
def decode(q, scale, zero, CODE: tl.constexpr):
    """fp32 values of int32 codes; scale and zero broadcast."""
    if CODE == MOMENT8:
        return decode_moment8(q, scale)
    elif CODE == SQUARE8:
        return decode_square8(q, scale)
    else:
        return centred(q, zero, CODE) * scale


# --- tiles ------------------------------------------------------------------------------------------------
@triton.jit
def halves(packed, BITS: tl.constexpr):
    """int32 (NB, P) of two codes of BITS each -> (NB, 2 P), the low one first."""
    MASK: tl.constexpr = (1 << BITS) - 1
    return tl.reshape(tl.join(packed & MASK, (packed >> BITS) & MASK), (packed.shape[0], 2 * packed.shape[1]))


@triton.jit
def paired(q, BITS: tl.constexpr):
    """The inverse of halves()."""
    low, high = tl.split(tl.reshape(q, (q.shape[0], q.shape[1] // 2, 2)))
    return low | (high << BITS)


@triton.jit
def load_codes(pointer, row, col, limit, columns, CODE: tl.constexpr, P2: tl.constexpr):
    """int32 codes (NB, P2) of a tile; 0 beyond the limit."""
    BITS: tl.constexpr = bits_of(CODE)
    EACH: tl.constexpr = 8 // BITS  # codes a byte
    k = tl.arange(0, P2 // EACH)[None, :]
    first = (row * tl.cdiv(columns, EACH) + col // EACH)[:, None]
    if BITS == 8 and is_signed(CODE):
        return tl.load(pointer.to(tl.pointer_type(tl.int8)) + (first + k), mask=k < limit[:, None], other=0).to(tl.int32)
    else:
        q = tl.load(pointer.to(tl.pointer_type(tl.uint8)) + (first + k), mask=EACH * k < limit[:, None], other=0).to(tl.int32)
        if BITS < 8:
            q = halves(q, 4)
        if BITS <= 2:
            q = halves(q, 2)
        if BITS == 1:
            q = halves(q, 1)
        if is_signed(CODE):
            SIGN: tl.constexpr = 1 << (BITS - 1)
            q = (q ^ SIGN) - SIGN
        return q


@triton.jit
def store_codes(pointer, q, row, col, limit, columns, CODE: tl.constexpr, P2: tl.constexpr):
    """Stores int32 codes (NB, P2); the spare bits of a row's last byte are 0."""
    BITS: tl.constexpr = bits_of(CODE)
    EACH: tl.constexpr = 8 // BITS
    if BITS < 8:
        q = tl.where(tl.arange(0, P2)[None, :] < limit[:, None], q & ((1 << BITS) - 1), 0)
    if BITS == 2:
        q = paired(q, 2)
    if BITS < 8:
        q = paired(q, 4)
    k = tl.arange(0, P2 // EACH)[None, :]
    first = (row * tl.cdiv(columns, EACH) + col // EACH)[:, None]
    tl.store(pointer.to(tl.pointer_type(tl.uint8)) + (first + k), q.to(tl.uint8), mask=EACH * k < limit[:, None])


@triton.jit
def load_floats(pointer, row, col, limit, columns, CODE: tl.constexpr, P2: tl.constexpr):
    """fp32 values (NB, P2) of a plain tensor's tile; DELTA reads as 0."""
    k = tl.arange(0, P2)[None, :]
    mask = k < limit[:, None]
    at = (row * columns + col)[:, None] + k
    if CODE == F32:
        return tl.load(pointer.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    elif CODE == BF16:
        return from_bf16_bits(tl.load(pointer.to(tl.pointer_type(tl.int16)) + at, mask=mask, other=0))
    elif CODE == F16:
        return tl.load(pointer.to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.zeros((row.shape[0], P2), tl.float32)


@triton.jit
def store_floats(pointer, values, words, row, col, limit, columns, CODE: tl.constexpr, STOCHASTIC: tl.constexpr, P2: tl.constexpr):
    """Stores fp32 values as fp32 (or DELTA), bf16 or fp16; only bf16 rounds stochastically."""
    k = tl.arange(0, P2)[None, :]
    mask = k < limit[:, None]
    at = (row * columns + col)[:, None] + k
    if CODE == BF16:
        if STOCHASTIC:
            h = bf16_bits_stochastic(values, words)
        else:
            h = bf16_bits(values)
        tl.store(pointer.to(tl.pointer_type(tl.int16)) + at, h, mask=mask)
    elif CODE == F16:
        tl.store(pointer.to(tl.pointer_type(tl.int16)) + at, f16_bits(values), mask=mask)
    else:
        tl.store(pointer.to(tl.pointer_type(tl.float32)) + at, values, mask=mask)


@triton.jit
def measure(x, valid):
    """Statistics of each run (NB): largest magnitude(), least and largest ordered(), the last two from 0."""
    absmax = tl.max(tl.where(valid, magnitude(x), 0), axis=1)
    o = tl.where(valid, ordered(x), 0)
    return absmax, tl.minimum(tl.min(o, axis=1), 0), tl.maximum(tl.max(o, axis=1), 0)


@triton.jit
def differs(a, b, valid):
    """int32 (NB): 1 where any valid bit of the run differs."""
    return tl.max(tl.where(valid & (bits(a) != bits(b)), 1, 0), axis=1)


# --- one operand of a tile --------------------------------------------------------------------------------
# An operand's block is the whole run of the tile (SPLIT False: one scale per run) or shorter (SPLIT True: scales are
# gathered per element, statistics taken block by block).
@triton.jit
def block_scales(scales, zeros, row, col, limit, columns, block, CODE: tl.constexpr, SPLIT: tl.constexpr, P2: tl.constexpr):
    """Scale and zero point, (NB, 1) or (NB, P2)."""
    per_row = tl.cdiv(columns, block)
    if SPLIT:
        k = tl.arange(0, P2)[None, :]
        at = (row * per_row)[:, None] + (col[:, None] + k) // block
        mask = k < limit[:, None]
    else:
        at = (row * per_row + col // block)[:, None]
        mask = limit[:, None] > 0
    scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    zero = tl.zeros_like(scale)
    if has_zero_point(CODE):
        zero = tl.load(zeros.to(tl.pointer_type(tl.uint8)) + at, mask=mask, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def run_scales(scales, zeros, row, col, limit, columns, block, CODE: tl.constexpr, SPLIT: tl.constexpr, P2: tl.constexpr):
    """The scales a whole run shares, read before anything of the tile is written; zeros where there are none."""
    if CODE >= 3 and CODE != DELTA and not SPLIT:
        return block_scales(scales, zeros, row, col, limit, columns, block, CODE, False, P2)
    else:
        nothing = tl.zeros((row.shape[0], 1), tl.float32)
        return nothing, nothing


@triton.jit
def load_operand(codes, scale, zero, row, col, limit, columns, CODE: tl.constexpr, P2: tl.constexpr):
    """fp32 (NB, P2) of an operand stored in CODE, plain or blocked."""
    if CODE <= F16 or CODE == DELTA:  # includes NONE: load_floats returns zeros
        return load_floats(codes, row, col, limit, columns, CODE, P2)
    else:
        return decode(load_codes(codes, row, col, limit, columns, CODE, P2), scale, zero, CODE)


@triton.jit
def store_scales(scales, zeros, at, scale, zero, mask, CODE: tl.constexpr):
    tl.store(scales.to(tl.pointer_type(tl.float32)) + at, scale, mask=mask)
    if has_zero_point(CODE):
        tl.store(zeros.to(tl.pointer_type(tl.uint8)) + at, zero.to(tl.int32).to(tl.uint8), mask=mask)


@triton.jit
def store_blocks(codes, scales, zeros, values, old, key, row, col, limit, columns, block, CODE: tl.constexpr, SPLIT: tl.constexpr,
                 ROUND: tl.constexpr, KEEP: tl.constexpr, P2: tl.constexpr):
    """Encodes a tile whose blocks lie inside it. KEEP: a block none of whose bits changed keeps codes and scale.
    key = (seed, step, stream, ALIGNED), the last a constexpr: see tile_words."""
    k = tl.arange(0, P2)[None, :]
    valid = k < limit[:, None]
    at = row * tl.cdiv(columns, block) + col // block
    words = rounding_words(key, row, col, 0, columns, ROUND, P2)
    if SPLIT:
        tl.debug_barrier()  # every thread has read the old scales
        scale = tl.zeros_like(values)
        zero = tl.zeros_like(values)
        keep = tl.zeros_like(values)
        for b in range(0, tl.cdiv(tl.max(limit, axis=0), block)):
            inside = valid & (k // block == b)
            absmax, low, high = measure(values, inside)
            scale_b, zero_b = block_parameters(absmax, low, high, CODE)
            write = limit > b * block
            if KEEP:
                changed = differs(values, old, inside)
                write = write & (changed != 0)
                keep = tl.where(inside & (changed == 0)[:, None], 1.0, keep)
            if ROUND == DITHER:
                words = tl.where(inside, dither_words(key[0], key[1], key[2], row * columns + col + b * block, k - b * block), words)
            store_scales(scales, zeros, at + b, scale_b, zero_b, write, CODE)
            scale = tl.where(inside, scale_b[:, None], scale)
            zero = tl.where(inside, zero_b[:, None], zero)
        q = encode(values, scale, zero, words, CODE, ROUND != NEAREST)
        if KEEP:  # rewrite what was there
            q = tl.where(keep > 0.0, load_codes(codes, row, col, limit, columns, CODE, P2), q)
        store_codes(codes, q, row, col, limit, columns, CODE, P2)
    else:
        absmax, low, high = measure(values, valid)
        scale, zero = block_parameters(absmax, low, high, CODE)
        if KEEP:
            limit = tl.where(differs(values, old, valid) != 0, limit, 0)
        tl.debug_barrier()  # every thread has read the old scales
        store_scales(scales, zeros, at, scale, zero, limit > 0, CODE)
        q = encode(values, scale[:, None], zero[:, None], words, CODE, ROUND != NEAREST)
        store_codes(codes, q, row, col, limit, columns, CODE, P2)


@triton.jit
def rounding_words(key, row, col, done, columns, ROUND: tl.constexpr, P2: tl.constexpr):
    """Words of the tile that starts ``done`` elements into the blocks at (row, col)."""
    if ROUND == STOCHASTIC:
        return tile_words(key[0], key[1], key[2], row * columns + col + done, key[3], P2)
    elif ROUND == DITHER:
        return dither_words(key[0], key[1], key[2], row * columns + col, done + tl.arange(0, P2)[None, :])
    else:
        return 0


@triton.jit
def joined(a, b):
    """Statistics of two pieces of one block."""
    absmax, low, high = a
    absmax_b, low_b, high_b = b
    return tl.maximum(absmax, absmax_b), tl.minimum(low, low_b), tl.maximum(high, high_b)


@triton.jit
def store_piece(codes, values, scale, zero, key, row, col, done, limit, columns, CODE: tl.constexpr, ROUND: tl.constexpr, P2: tl.constexpr):
    """Encodes the piece ``done`` elements into a block whose parameters are known."""
    q = encode(values, scale[:, None], zero[:, None], rounding_words(key, row, col, done, columns, ROUND, P2), CODE, ROUND != NEAREST)
    store_codes(codes, q, row, col + done, limit, columns, CODE, P2)
