"""Reference of the quant family: what a code, a scale and a rounding mean (csrc/common/codecs.h is the native twin)."""
from __future__ import annotations

import torch

from gradmill.formats import FLOAT_DTYPES, OUTLIER_BYTES, SPLIT, Format
from gradmill.reference import philox


def sqrt(x):
    """Correctly rounded fp32 square root. torch's own is off by one ulp for a fifth of all inputs on CPU (2.13, with
    MKL); through float64 the result is exact, because 53 bits are more than twice 24 plus 1. A float64 root is torch's."""
    return x.to(torch.float64).sqrt().to(x.dtype)


def round_even(x):
    return torch.round(x)


def round_stochastic(x, words):
    """Up with probability x - floor(x), from the top 24 bits of each word."""
    down = torch.floor(x)
    u = (words >> 8).to(torch.float32) * 2.0 ** -24
    return torch.where(x - down > u, down + 1, down)


def tops() -> dict[str, float]:
    """TOPS, made anew: torch.compile(dynamic=True) takes a float out of a global for one that may change, and fails on it inside an autograd Function."""
    return {"int8": 127.0, "int7": 63.0, "int4": 7.0, "int4_outlier": 7.0, "int3": 3.0, "int2": 1.0, "uint8": 255.0, "uint4": 15.0, "uint3": 7.0,
            "uint2": 3.0, "e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}


#: The largest magnitude of each integer and small-float code, in units of its scale.
TOPS = tops()
#: Small floats: mantissa bits and the exponent of the smallest normal number.
SMALL_FLOATS = {"e4m3": (3, -6), "e5m2": (2, -14), "e2m1": (1, 0)}
ZERO_POINT = ("uint8", "uint4", "uint3", "uint2")
SYMMETRIC = ("int8", "int7", "int4", "int4_outlier", "int3", "int2")


#: Offset floats, the codes of optimizer states: mantissa bits and the largest value in units of the scale. 1 + |x| / scale
#: is a float whose exponent's low bits and first mantissa bits are the code; squares store the root, moments a sign on top.
OFFSET_FLOATS = {"moment8": (4, 1.9375 * 128 - 1), "square8": (5, 1.96875 * 128 - 1), "moment4": (1, 1.5 * 8 - 1), "square4": (2, 1.75 * 8 - 1)}


def divide(a, b):
    """a / b elementwise. A Python number on either side becomes a tensor first: torch multiplies by a rounded
    reciprocal for ``number / tensor`` on CPU and for ``tensor / number`` on CUDA."""
    like = a if isinstance(a, torch.Tensor) else b
    return torch.as_tensor(a, dtype=like.dtype, device=like.device).expand_as(like) / torch.as_tensor(b, dtype=like.dtype, device=like.device).expand_as(like)


def float_code_root(absmax, code):
    """What the offset floats scale by: the largest magnitude, or its root; below 2^-100 a block counts as zero."""
    absmax = torch.where(absmax >= 2.0 ** -100, absmax, 0)
    return sqrt(absmax) if code.startswith("square") else absmax


def range_parameters(x, top):
    """Scale and zero point that spread codes 0..top over each block's range: x (..., block) fp32 -> (...), (...)."""
    # The range includes zero: otherwise the zero point's clamp destroys a one-sided block. Halves: the difference of
    # two large values may overflow.
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    scale = divide(high * 0.5 - low * 0.5, top * 0.5)
    scale = torch.where(torch.isfinite(x).all(-1), scale, torch.nan)
    return scale, torch.where(scale > 0, (0 - round_even(low / scale)).clamp(0, top), 0)


def block_parameters(x, code):
    """Scale and zero point of each block: x (..., block) fp32 -> (...), (...)."""
    absmax = x.abs().amax(-1)
    if code in ZERO_POINT:
        return range_parameters(x, TOPS[code])
    scale = divide(absmax, TOPS[code]) if code in TOPS else divide(float_code_root(absmax, code), OFFSET_FLOATS[code][1])
    scale = torch.where(torch.isfinite(absmax), scale, torch.nan)
    return scale, torch.zeros_like(scale)


def power_of_two_up(scale):
    """The next power of two, of fp32 numbers that are not negative; nan stays."""
    up = ((scale.contiguous().view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(torch.isnan(scale), scale, up)


def shared_scales(x, format, stochastic=False):
    """Scales (rows, blocks) fp32 of a format whose scales depend on more than their own block, from the blocks' largest
    magnitudes x (rows, blocks). Plain torch, the same in every backend.

    "e4m3" rounds each scale to float8 under the tensor's scale, amax / (448 * top): to nearest, so that a block's largest
    value may saturate by up to 1/16, as NVFP4 has it; up if the codes are to be rounded stochastically, which saturation
    would bias."""
    rows, top = x.shape[0], tops()[format.code]
    absmax = x
    if format.rows != 1:
        group = format.rows or max(rows, 1)
        padded = torch.nn.functional.pad(absmax, (0, 0, 0, -rows % group)).view(-1, group, absmax.shape[1])
        absmax = padded.amax(1).repeat_interleave(group, 0)[:rows]  # amax keeps nan
    scale = divide(absmax, top)
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    if format.scale == "pow2":  # the next power of two up: nothing saturates
        scale = power_of_two_up(scale)
    elif format.scale == "e4m3":
        tensor = divide(absmax.amax() if absmax.numel() else absmax.new_zeros(()), 448.0 * top)
        share = divide(scale, tensor).clamp(max=448.0)
        rounded = share.to(torch.float8_e4m3fn)
        if stochastic:
            above = (rounded.view(torch.uint8) + 1).clamp(max=0x7E).view(torch.float8_e4m3fn)
            rounded = torch.where(rounded.to(torch.float32) < share, above.to(torch.float32), rounded.to(torch.float32))
        scale = torch.where(scale > 0, rounded.to(torch.float32) * tensor, scale)
    return scale.contiguous()


def _bits(x):
    return x.contiguous().view(torch.int32).to(torch.int64) & philox.MASK


def _from_bits(bits):
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def encode(x, scale, zero, code, words=None):
    """Codes (int64) of blocks x (..., block), given their scale and zero (..., 1)."""
    def rounded(y):
        return round_even(y) if words is None else round_stochastic(y, words)

    if code in SYMMETRIC:
        q = rounded((x / scale).clamp(-TOPS[code], TOPS[code]))
    elif code in ZERO_POINT:
        q = (rounded((x / scale).clamp(-TOPS[code], TOPS[code])) + zero).clamp(0, TOPS[code])
    elif code in SMALL_FLOATS:
        # Below the smallest normal number, adding it lines the value up so that its top bits are the code as well.
        mantissa, exponent = SMALL_FLOATS[code]
        shift, normal = 23 - mantissa, 2.0 ** exponent
        y = (x / scale).abs().clamp(max=TOPS[code])
        small = y < normal
        bits = _bits(torch.where(small, y + normal, y))
        half = (1 << shift - 1) - 1 + (bits >> shift & 1)  # half to even
        base = (exponent + 127 << mantissa) - torch.where(small, 0, 1 << mantissa)
        q = (bits + (half if words is None else words >> 9 + mantissa) >> shift) - base
        q = q | torch.where(_bits(x) >> 31 == 1, 128 if code != "e2m1" else 8, 0)
    else:
        # Adding 1 turns the value into a float of exponent 0..7 (4 bits: 0..3) whose top bits are the code ("offset float").
        mantissa, top = OFFSET_FLOATS[code]
        shift, square = 23 - mantissa, code.startswith("square")
        y = (sqrt(x) if square else x.abs()) * divide(top, float_code_root(x.abs().amax(-1, keepdim=True), code)) + 1
        q = _bits(y) - 0x3F800000 + (1 << shift - 1 if words is None else words >> 32 - shift) >> shift
        last = (1 << Format(code).bits - (not square)) - 1
        if square:
            q = q.clamp(1, last)  # never 0 in a block that is not all zero: no update divides by eps alone
        else:
            q = q.clamp(max=last) | torch.where(_bits(x) >> 31 == 1, last + 1, 0)
    q = torch.where(scale > 0, q, 0)  # an all-zero block, or one with a nan or an inf
    return q.to(torch.int64)


def decode(q, scale, zero, code):
    """fp32 values of integer codes q."""
    if code == "sign":
        return torch.where(q != 0, -scale, scale)
    if code in OFFSET_FLOATS:
        shift, square = 23 - OFFSET_FLOATS[code][0], code.startswith("square")
        sign = 0 if square else 1 << Format(code).bits - 1
        y = _from_bits(((q & ~sign) << shift) + 0x3F800000) - 1
        if square:
            return (y * scale) * (y * scale)
        return _from_bits(_bits(y) | torch.where(q & sign != 0, 1 << 31, 0)) * scale
    if code in SMALL_FLOATS:
        mantissa, exponent = SMALL_FLOATS[code]
        sign = 8 if code == "e2m1" else 128
        mag = q & sign - 1
        small = mag < 1 << mantissa
        y = _from_bits(mag + (exponent + 127 << mantissa) - torch.where(small, 0, 1 << mantissa) << 23 - mantissa)
        y = torch.where(small, y - 2.0 ** exponent, y)
        return torch.where(q & sign != 0, -y, y) * scale
    q = q.to(torch.float32)
    if code in ZERO_POINT:
        return (q - zero) * scale
    return q * scale


def dither_words(key, stream, rows, columns, block, device, first=0):
    """(rows, blocks, block) words: one Philox word per block, plus i * 0x9E3779B1 for its i-th element."""
    seed, step = key.tolist()
    block = block or columns
    blocks = -(-columns // block)
    starts = philox.words(seed, step, stream, first, rows * columns, device).view(rows, columns)[:, ::block]
    return (starts.reshape(rows, blocks, 1) + torch.arange(block, device=device) * 0x9E3779B1) & philox.MASK


def _blocks(x, block):
    """(rows, columns) -> (rows, blocks, block), the tail padded with zeros."""
    rows, columns = x.shape
    block = block or columns
    padded = -(-columns // block) * block
    return torch.nn.functional.pad(x, (0, padded - columns)).view(rows, padded // block, block)


def pack_bits(q, bits):
    """Integers (rows, columns) -> uint8 (rows, ceil(columns * bits / 8)): each row one little-endian stream of codes,
    so that 4-bit codes lie low nibble first."""
    rows, columns = q.shape
    stream = (q[..., None] >> torch.arange(bits, device=q.device)) & 1
    stream = torch.nn.functional.pad(stream.reshape(rows, columns * bits), (0, -columns * bits % 8)).view(rows, -(-columns * bits // 8), 8)
    return (stream << torch.arange(8, device=q.device)).sum(-1).to(torch.uint8)


def unpack_bits(packed, bits, columns, signed):
    """uint8 (rows, ceil(columns * bits / 8)) -> int64 (rows, columns)."""
    stream = (packed[..., None].to(torch.int64) >> torch.arange(8, device=packed.device)) & 1
    stream = stream.flatten(1)[:, :columns * bits].reshape(packed.shape[0], columns, bits)
    q = (stream << torch.arange(bits, device=packed.device)).sum(-1)
    return (q ^ 1 << bits - 1) - (1 << bits - 1) if signed else q


def _outliers(blocks, sizes):
    """The two largest magnitudes of each block (..., block), the first of equals first: values (..., 2), positions (..., 2).
    A block of one element has it twice. Sizes (...): elements that exist."""
    mag = (_bits(blocks) & 0x7FFFFFFF).masked_fill(torch.arange(blocks.shape[-1], device=blocks.device) >= sizes[..., None], -1)
    first = mag.max(-1).values
    i = (mag == first[..., None]).to(torch.uint8).argmax(-1)
    rest = mag.scatter(-1, i[..., None], -1)
    j = (rest == rest.max(-1).values[..., None]).to(torch.uint8).argmax(-1)
    at = torch.stack((i, torch.where(sizes > 1, j, i)), -1)
    return blocks.gather(-1, at), at


def _pack_outliers(values, at):
    """(rows, blocks, 2) twice -> (rows, blocks * 12) uint8: two fp32, two positions, two zeros."""
    positions = torch.nn.functional.pad(at.to(torch.uint8), (0, 2))
    return torch.cat((values.contiguous().view(torch.uint8), positions), -1).flatten(1)


def quantize(x, code, block=0, transpose=False, key=None, stream=0, scales=None, dither=False, first=0):
    """See gradmill.ops.quant.quantize; ``dither`` is how fused_step rounds second moments, ``first`` a shard's first element."""
    format = Format(code, block)
    x = (x.t() if transpose else x).to(torch.float32).contiguous()
    rows, columns = x.shape
    if x.numel() == 0:
        return (x.new_empty((rows, format.code_columns(columns)), dtype=format.code_dtype),
                x.new_zeros((rows, format.blocks(columns))), x.new_zeros(format.zeros_shape(rows, columns), dtype=torch.uint8))
    blocks = _blocks(x, block)
    words = None
    if dither:
        words = dither_words(key, stream, rows, columns, block, x.device, first)
    elif key is not None:
        seed, step = key.tolist()
        words = _blocks(philox.words(seed, step, stream, first, x.numel(), x.device).view(rows, columns), block)
    zeros = x.new_empty(0, dtype=torch.uint8)
    rest = blocks
    if code == "int4_outlier":
        sizes = (columns - torch.arange(blocks.shape[1], device=x.device) * block).clamp(max=block).expand(rows, -1)
        values, at = _outliers(blocks, sizes)
        zeros = _pack_outliers(values, at)
        rest = blocks.scatter(-1, at, 0.0)  # their codes are 0, and the others have the range to themselves
    scale, zero = block_parameters(rest, code)
    bad = ~torch.isfinite(blocks).all(-1)
    if scales is not None:
        scale = scales
    scale = torch.where(bad, torch.nan, scale)
    q = encode(rest, scale[..., None], zero[..., None], code, words).flatten(1)[:, :columns]
    if format.bits < 8:
        codes = pack_bits(q, format.bits)
    else:
        codes = q.to(torch.int8 if format.code_dtype == torch.int8 else torch.uint8).view(format.code_dtype)
    if format.has_zero_point:
        zeros = zero.to(torch.uint8)
    return codes, scale, zeros


def quantize_both(x, code, block=0, key=None, stream=0, turned_stream=0):
    """See gradmill.ops.quant.quantize_both."""
    return (*quantize(x, code, block, False, key, stream)[:2], *quantize(x, code, block, True, key, turned_stream)[:2])


def dequantize(codes, scales, zeros, code, block, columns, dtype):
    """See gradmill.ops.quant.dequantize."""
    format = Format(code, block)
    if codes.numel() == 0:
        return codes.new_empty((codes.shape[0], columns), dtype=dtype)
    if format.bits < 8:
        q = unpack_bits(codes, format.bits, columns, code in SYMMETRIC)
    else:
        q = (codes if codes.dtype == torch.int8 else codes.view(torch.uint8)).to(torch.int64)
    q = _blocks(q, block)
    zero = zeros[..., None] if format.has_zero_point else None
    values = decode(q, scales[..., None], zero, code)
    if code == "int4_outlier":
        stored = zeros.view(*scales.shape, OUTLIER_BYTES)
        with_them = values.scatter(-1, stored[..., 8:10].to(torch.int64), stored[..., :8].contiguous().view(torch.float32))
        values = torch.where(scales.isnan()[..., None], values, with_them)
    return values.flatten(1)[:, :columns].to(dtype).contiguous()


# --- random Hadamard transform ----------------------------------------------------------------------------
def hadamard_blocks(x):
    """The last dimension, a power of two long, times the Hadamard matrix and the fp32 1 / sqrt(length): butterflies
    (a + b, a - b) of neighbours 1, 2, 4, ... apart, then one product."""
    size, h = x.shape[-1], 1
    while h < size:
        a, b = x.unflatten(-1, (size // (2 * h), 2, h)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        h *= 2
    return x * torch.tensor(size ** -0.5, dtype=torch.float32, device=x.device)


def hadamard(x, block=16, transpose=False, key=None, stream=0, dtype=None, inverse=False):
    """See gradmill.ops.quant.hadamard."""
    dtype = dtype or x.dtype
    x = (x.t() if transpose else x).to(torch.float32)
    rows, columns = x.shape

    def signed(x):
        if key is None:
            return x
        negative = philox.words(*key.tolist(), stream, 0, columns, x.device) >> 31 == 1
        return torch.where(negative, -x, x)

    x = x if inverse else signed(x)
    parts, done, size = [], 0, block
    while done < columns:  # the whole blocks, then the powers of two that fit into the tail
        length = (columns - done) // size * size
        parts.append(hadamard_blocks(x[:, done:done + length].reshape(rows, length // size, size)).flatten(1))
        done, size = done + length, size // 2
    x = torch.cat(parts, 1) if parts else x
    return (signed(x) if inverse else x).to(dtype).contiguous()


def round_bf16_stochastic(x, words):
    """fp32 -> bfloat16: add the word's top 16 bits below the cut, then truncate; inf and nan are left alone."""
    bits = x.contiguous().view(torch.int32).to(torch.int64) & philox.MASK
    rounded = (bits + (words >> 16)) >> 16
    special = (bits & 0x7FFFFFFF) >= 0x7F800000
    kept = (bits >> 16) | torch.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x40, 0)
    out = torch.where(special, kept, rounded)
    return torch.where(out >= 0x8000, out - 0x10000, out).to(torch.int16).view(torch.bfloat16)


def split_float(x, code, words=None):
    """fp32 x in two pieces: the 16-bit float nearest to it (ties away from zero) and the low bits that lacks.

    The magnitude is an integer q that continues the 16-bit float's bits by 8 or 16 more. With 8, q is rounded stochastically
    by ``words``; 16 hold fp32 exactly for bfloat16; for float16 from 2^-17 on, below that q (2^-40 each) is truncated."""
    high_dtype, low_dtype = SPLIT[code]
    low = 8 * low_dtype.itemsize
    sign, mag = _bits(x) >> 31 << 15, _bits(x) & 0x7FFFFFFF
    words = torch.zeros_like(mag) if words is None else words
    if high_dtype == torch.bfloat16:
        q, plain = mag + (words >> 24) >> 8 if low == 8 else mag, mag < 0x7F800000
        special = mag >> 16 | torch.where(mag > 0x7F800000, 0x40, 0)
    else:
        normal = (mag - 0x38000000 + (words >> 27)) >> 5 if low == 8 else (mag - 0x38000000) << 3
        small = mag < 0x38800000
        y = torch.where(small, _from_bits(mag), 0) * 2.0 ** (24 + low) + ((words >> 8).to(torch.float32) * 2.0 ** -24 if low == 8 else 0)
        q, plain = torch.where(small, y.to(torch.int64), normal), mag < 0x477FF000
        special = torch.where(mag > 0x7F800000, 0x7E00, 0x7C00)
    high = torch.where(plain, q + (1 << low - 1) >> low, special) | sign
    return _wrapped(high, torch.int16).view(high_dtype), _wrapped(torch.where(plain, q & (1 << low) - 1, 0), low_dtype)


def join_float(high, low, code):
    """The fp32 value of split_float's pieces."""
    bits = 8 * SPLIT[code][1].itemsize
    high, low = high.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF, low.to(torch.int64) & (1 << bits) - 1
    sign, mag = high >> 15 << 31, high & 0x7FFF
    top = mag - torch.where(mag > 0, low >> bits - 1, 0)  # a weight set to 0 elsewhere has stale low bits
    q = top << bits | low
    if code.startswith("bf16"):
        return _from_bits(q << 16 - bits | sign)
    small = q.to(torch.float32) * 2.0 ** -(24 + bits)
    normal = (q << 5 if bits == 8 else q >> 3) + 0x38000000
    return _from_bits(torch.where(top >= 0x7C00, 0x7F800000 | mag << 13, torch.where(top < 0x400, _bits(small), normal)) | sign)


def _wrapped(x, dtype):
    """int64 -> the integer dtype of the same low bits."""
    return x.to(torch.uint8) if dtype == torch.uint8 else torch.where(x >= 0x8000, x - 0x10000, x).to(torch.int16)


def store(values, format, key=None, stream=0, dither=False, first=0):
    """values (rows, columns) fp32 in ``format`` as (codes, scales, zeros); the last two are None for plain floats, and for
    weights in two pieces None and the low bits.

    With a key, rounding is stochastic for bf16, the blocked codes and low bits of 8; ``first`` is a shard's first element."""
    if format.blocked:
        codes, scales, zeros = quantize(values, format.code, format.block, key=key, stream=stream, dither=dither, first=first)
        return codes, scales, zeros
    words = None
    if key is not None and format.code in ("bf16", *SPLIT):
        seed, step = key.tolist()
        words = philox.words(seed, step, stream, first, values.numel(), values.device).view(values.shape)
    if format.code in SPLIT:
        high, low = split_float(values, format.code, words)
        return high, None, low
    if words is not None:
        return round_bf16_stochastic(values, words), None, None
    return values.to(FLOAT_DTYPES.get(format.code, torch.float32)), None, None


# --- fake quantisation ------------------------------------------------------------------------------------
#: A smaller step (or one that training took below zero) counts as this; a nan stays.
SMALLEST_STEP = 2.0 ** -100
#: The first step of a group of zeros: any positive one holds it exactly, this one lets it learn.
EMPTY_STEP = 1e-4
#: Sums over a group go to this many lanes, element i to lane i % LANES in ascending order, and lanes are then added in
#: halves (j and j + 16, j and j + 8, ...): an order every backend can take at full speed.
LANES = 32


def lane_sums(x):
    """Sums over the last dimension in that order."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % LANES))
    sums = x.new_zeros((*x.shape[:-1], LANES))
    for part in x.split(LANES, -1):
        sums = sums + part
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, -1)
        sums = low + high
    return sums[..., 0]


def fake_quantize_parameters(weight, bits, block):
    """See gradmill.functional.fake_quantize_parameters."""
    rows, columns = weight.shape
    if weight.numel() == 0:
        shape = (rows, Format("uint8", block).blocks(columns))
        return weight.new_full(shape, EMPTY_STEP, dtype=torch.float32), weight.new_zeros(shape, dtype=torch.float32)
    steps, zeros = range_parameters(_blocks(weight.to(torch.float32), block), 2.0 ** bits - 1)
    return torch.where(steps < SMALLEST_STEP, EMPTY_STEP, steps), zeros


def _fake_codes(weight, steps, zeros, bits, block):
    """Per element, in blocks (rows, blocks, block): w / s, rounded; z and s broadcast; the code; whether it is in range."""
    top = 2.0 ** bits - 1
    step = torch.where(steps < SMALLEST_STEP, SMALLEST_STEP, steps)[..., None]
    zero = round_even(zeros.clamp(0, top))[..., None]
    w = _blocks(weight.to(torch.float32), block)
    ratio = w / step
    rounded = round_even(ratio.clamp(-256, 256))  # beyond 2^8 every ratio is out of range
    code = (rounded + zero).clamp(0, top)
    return w, step, zero, ratio, rounded, code, rounded + zero == code


def fake_quantize(weight, steps, zeros, bits, block, dtype):
    """See gradmill.ops.quant.fake_quantize."""
    if weight.numel() == 0:
        return weight.new_empty(weight.shape, dtype=dtype)
    w, step, zero, _, _, code, _ = _fake_codes(weight, steps, zeros, bits, block)
    values = (code - zero) * step + (w - w)  # w - w: 0, or nan where w is not finite
    return values.flatten(1)[:, :weight.shape[1]].to(dtype).contiguous()


def fake_quantize_backward(grad, weight, steps, zeros, bits, block):
    """See gradmill.ops.quant.fake_quantize_backward."""
    if weight.numel() == 0:
        return torch.empty_like(weight), torch.zeros_like(steps), torch.zeros_like(zeros)
    _, step, zero, ratio, rounded, code, inside = _fake_codes(weight, steps, zeros, bits, block)
    g = _blocks(grad.to(torch.float32), block)
    dweight = torch.where(inside, g, 0).flatten(1)[:, :weight.shape[1]].to(weight.dtype).contiguous()
    dsteps = lane_sums(g * torch.where(inside, rounded - ratio, code - zero))
    dzeros = lane_sums(torch.where(inside, 0, g)) * -step[..., 0]
    return dweight, dsteps, dzeros
