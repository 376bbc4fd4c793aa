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


def block_parameters(x, code):
    """Scale and zero point of each block: x (..., block) fp32 -> (...), (...)."""
    absmax = x.abs().amax(-1)
    if code in ("int8", "int4"):
        scale = absmax / _top(code)
    elif code in ("uint8", "uint4"):
        # The range includes zero: otherwise the zero point's clamp destroys a one-sided block. Halves: the
        # difference of two large values may overflow.
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scale = (high * 0.5 - low * 0.5) / (_top(code) * 0.5)
    else:
        scale = absmax
    bad = ~torch.isfinite(absmax)
    scale = torch.where(bad, torch.nan, scale)
    zero = torch.zeros_like(scale)
    if code in ("uint8", "uint4"):
        zero = torch.where(scale > 0, (-round_even(low / scale)).clamp(0, _top(code)), zero)
    return scale, zero


def encode(x, scale, zero, code, words=None):
    """Codes (int64) of x, given its blocks' scale and zero (broadcastable)."""
    def rounded(y):
        return round_even(y) if words is None else round_stochastic(y, words)

    if code in ("int8", "int4"):
        q = rounded((x / scale).clamp(-_top(code), _top(code)))
    elif code in ("uint8", "uint4"):
        q = (rounded((x / scale).clamp(-_top(code), _top(code))) + zero).clamp(0, _top(code))
    elif code == "moment8":
        y = x / scale
        q = rounded((y + y) / (1 + y.abs()) * 127)
    elif code == "square8":
        q = rounded(sqrt(x / scale) * 255).clamp(1, 255)
    q = torch.where(scale > 0, q, 0)  # an all-zero block, or one with a nan or an inf
    return q.to(torch.int64)


def decode(q, scale, zero, code):
    """fp32 values of integer codes q."""
    q = q.to(torch.float32)
    if code in ("uint8", "uint4"):
        return (q - zero) * scale
    if code == "moment8":
        y = q / 127
        return y / (2 - y.abs()) * scale
    if code == "square8":
        y = q / 255
        return y * y * scale
    return q * scale


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


def quantize(x, code, block=0, transpose=False, key=None, stream=0):
    """See gradmill.ops.quant.quantize."""
    format = Format(code, block)
    x = (x.t() if transpose else x).to(torch.float32).contiguous()
    rows, columns = x.shape
    zeros_shape = (rows, format.blocks(columns)) if format.has_zero_point else (0,)
    if x.numel() == 0:
        return (x.new_empty((rows, format.code_columns(columns)), dtype=format.code_dtype),
                x.new_empty((rows, format.blocks(columns))), x.new_empty(zeros_shape, dtype=torch.uint8))
    blocks = _blocks(x, block)
    words = None
    if key is not None:
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


def round_bf16_stochastic(x, words):
    """fp32 -> bfloat16: add the word's top 16 bits below the cut, then truncate; inf and nan are left alone."""
    bits = x.contiguous().view(torch.int32).to(torch.int64) & philox.MASK
    rounded = (bits + (words >> 16)) >> 16
    special = (bits & 0x7FFFFFFF) >= 0x7F800000
    kept = (bits >> 16) | torch.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x40, 0)
    out = torch.where(special, kept, rounded)
    return torch.where(out >= 0x8000, out - 0x10000, out).to(torch.int16).view(torch.bfloat16)


def store(values, format, key=None, stream=0):
    """values (rows, columns) fp32 in ``format`` as (codes, scales, zeros); the last two are None for plain floats.

    With a key, rounding is stochastic for bf16 and the blocked codes."""
    if format.blocked:
        codes, scales, zeros = quantize(values, format.code, format.block, key=key, stream=stream)
        return codes, scales, zeros
    if format.code == "bf16" and key is not None:
        seed, step = key.tolist()
        words = philox.words(seed, step, stream, 0, values.numel(), values.device).view(values.shape)
        return round_bf16_stochastic(values, words), None, None
    return values.to(FLOAT_DTYPES.get(format.code, torch.float32)), None, None
