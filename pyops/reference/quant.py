"""Reference of the quant family: what a code, a scale and a rounding mean (csrc/common/codecs.h is the native twin)."""
from __future__ import annotations

import torch

from gradmill.formats import FLOAT_DTYPES, Format
from gradmill.reference import philox


def sqrt(x):
    """Correctly rounded fp32 square root. torch's own is off by one ulp for a fifth of all inputs on CPU (2.13, with
    MKL); through float64 the result is exact, because 53 bits are more than twice 24 plus 1."""
    return x.to(torch.float64).sqrt().to(torch.float32)


def round_even(x):
    return torch.round(x)


def round_stochastic(x, words):
    """Up with probability x - floor(x), from the top 24 bits of each word."""
    down = torch.floor(x)
    u = (words >> 8).to(torch.float32) * 2.0 ** -24
    return torch.where(x - down > u, down + 1, down)


def _top(code: str) -> float:
    return {"int8": 127.0, "uint8": 255.0, "int4": 7.0, "uint4": 15.0}[code]


#: The largest values the two float codes stand for, in units of their scale.
MOMENT_TOP, SQUARE_TOP = 1.9375 * 128 - 1, 1.96875 * 128 - 1


def divide(a, b):
    """a / b elementwise. A Python number on either side becomes a tensor first: torch multiplies by a rounded
    reciprocal for ``number / tensor`` on CPU and for ``tensor / number`` on CUDA."""
    like = a if isinstance(a, torch.Tensor) else b
    return torch.as_tensor(a, dtype=like.dtype, device=like.device).expand_as(like) / torch.as_tensor(b, dtype=like.dtype, device=like.device).expand_as(like)


def float_code_root(absmax, code):
    """What the float codes scale by: the largest magnitude, or its root; below 2^-100 a block counts as zero."""
    absmax = torch.where(absmax >= 2.0 ** -100, absmax, 0)
    return sqrt(absmax) if code == "square8" else absmax


def block_parameters(x, code):
    """Scale and zero point of each block: x (..., block) fp32 -> (...), (...)."""
    absmax = x.abs().amax(-1)
    if code in ("int8", "int4"):
        scale = divide(absmax, _top(code))
    elif code in ("uint8", "uint4"):
        # The range includes zero: otherwise the zero point's clamp destroys a one-sided block. Halves: the
        # difference of two large values may overflow.
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scale = divide(high * 0.5 - low * 0.5, _top(code) * 0.5)
    else:
        scale = divide(float_code_root(absmax, code), SQUARE_TOP if code == "square8" else MOMENT_TOP)
    bad = ~torch.isfinite(absmax)
    scale = torch.where(bad, torch.nan, scale)
    zero = torch.zeros_like(scale)
    if code in ("uint8", "uint4"):
        zero = torch.where(scale > 0, (-round_even(low / scale)).clamp(0, _top(code)), zero)
    return scale, zero


def _bits(x):
    return x.contiguous().view(torch.int32).to(torch.int64) & philox.MASK


def _from_bits(bits):
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def encode(x, scale, zero, code, words=None):
    """Codes (int64) of blocks x (..., block), given their scale and zero (..., 1)."""
    def rounded(y):
        return round_even(y) if words is None else round_stochastic(y, words)

    if code in ("int8", "int4"):
        q = rounded((x / scale).clamp(-_top(code), _top(code)))
    elif code in ("uint8", "uint4"):
        q = (rounded((x / scale).clamp(-_top(code), _top(code))) + zero).clamp(0, _top(code))
    else:
        # Adding 1 turns the value into a float of exponent 0..7 whose top bits are the code ("offset float").
        root = float_code_root(x.abs().amax(-1, keepdim=True), code)
        if code == "moment8":
            y = x.abs() * divide(MOMENT_TOP, root) + 1
            q = (_bits(y) - 0x3F800000 + (0x40000 if words is None else words >> 13)) >> 19
            q = q.clamp(max=127) | (_bits(x) >> 24) & 0x80
        else:
            y = sqrt(x) * divide(SQUARE_TOP, root) + 1
            q = (_bits(y) - 0x3F800000 + (0x20000 if words is None else words >> 14)) >> 18
            q = q.clamp(1, 255)  # never 0 in a block that is not all zero: no update divides by eps alone
    q = torch.where(scale > 0, q, 0)  # an all-zero block, or one with a nan or an inf
    return q.to(torch.int64)


def decode(q, scale, zero, code):
    """fp32 values of integer codes q."""
    if code == "moment8":
        y = _from_bits(((q & 127) << 19) + 0x3F800000) - 1
        return _from_bits(_bits(y) | (q & 128) << 24) * scale
    if code == "square8":
        r = (_from_bits((q << 18) + 0x3F800000) - 1) * scale
        return r * r
    q = q.to(torch.float32)
    if code in ("uint8", "uint4"):
        return (q - zero) * scale
    return q * scale


def dither_words(key, stream, rows, columns, block, device):
    """(rows, blocks, block) words: one Philox word per block, plus i * 0x9E3779B1 for its i-th element."""
    seed, step = key.tolist()
    block = block or columns
    blocks = -(-columns // block)
    first = philox.words(seed, step, stream, 0, rows * columns, device).view(rows, columns)[:, ::block]
    return (first.reshape(rows, blocks, 1) + torch.arange(block, device=device) * 0x9E3779B1) & philox.MASK


def _blocks(x, block):
    """(rows, columns) -> (rows, blocks, block), the tail padded with zeros."""
    rows, columns = x.shape
    block = block or columns
    padded = -(-columns // block) * block
    return torch.nn.functional.pad(x, (0, padded - columns)).view(rows, padded // block, block)


def pack_nibbles(q):
    """Integers (rows, columns) -> uint8 (rows, ceil(columns / 2)), low nibble first."""
    q = torch.nn.functional.pad(q & 15, (0, q.shape[1] % 2)).view(q.shape[0], -1, 2)
    return (q[..., 0] | q[..., 1] << 4).to(torch.uint8)


def unpack_nibbles(packed, columns, signed):
    """uint8 (rows, ceil(columns / 2)) -> int64 (rows, columns)."""
    q = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns].to(torch.int64)
    return (q ^ 8) - 8 if signed else q


def quantize(x, code, block=0, transpose=False, key=None, stream=0, dither=False):
    """See gradmill.ops.quant.quantize; ``dither`` is how fused_step rounds second moments."""
    format = Format(code, block)
    x = (x.t() if transpose else x).to(torch.float32).contiguous()
    rows, columns = x.shape
    zeros_shape = (rows, format.blocks(columns)) if format.has_zero_point else (0,)
    if x.numel() == 0:
        return (x.new_empty((rows, format.code_columns(columns)), dtype=format.code_dtype),
                x.new_zeros((rows, format.blocks(columns))), x.new_zeros(zeros_shape, dtype=torch.uint8))
    blocks = _blocks(x, block)
    words = None
    if dither:
        words = dither_words(key, stream, rows, columns, block, x.device)
    elif key is not None:
        seed, step = key.tolist()
        words = _blocks(philox.words(seed, step, stream, 0, x.numel(), x.device).view(rows, columns), block)
    scale, zero = block_parameters(blocks, code)
    q = encode(blocks, scale[..., None], zero[..., None], code, words).flatten(1)[:, :columns]
    codes = pack_nibbles(q) if format.bits == 4 else q.to(format.code_dtype)
    zeros = zero.to(torch.uint8) if format.has_zero_point else x.new_empty(0, dtype=torch.uint8)
    return codes, scale, zeros


def dequantize(codes, scales, zeros, code, block, columns, dtype):
    """See gradmill.ops.quant.dequantize."""
    format = Format(code, block)
    if codes.numel() == 0:
        return codes.new_empty((codes.shape[0], columns), dtype=dtype)
    q = unpack_nibbles(codes, columns, code == "int4") if format.bits == 4 else codes.to(torch.int64)
    q = _blocks(q, block)
    zero = zeros[..., None] if format.has_zero_point else None
    return decode(q, scales[..., None], zero, code).flatten(1)[:, :columns].to(dtype).contiguous()


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


def store(values, format, key=None, stream=0, dither=False):
    """values (rows, columns) fp32 in ``format`` as (codes, scales, zeros); the last two are None for plain floats.

    With a key, rounding is stochastic for bf16 and the blocked codes."""
    if format.blocked:
        codes, scales, zeros = quantize(values, format.code, format.block, key=key, stream=stream, dither=dither)
        return codes, scales, zeros
    if format.code == "bf16" and key is not None:
        seed, step = key.tolist()
        words = philox.words(seed, step, stream, 0, values.numel(), values.device).view(values.shape)
        return round_bf16_stochastic(values, words), None, None
    return values.to(FLOAT_DTYPES.get(format.code, torch.float32)), None, None
