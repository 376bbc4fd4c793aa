"""Formats: how numbers are stored. A format is data; kernels read its code and block at run time."""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

__all__ = ["Format", "CODES", "FLOAT_DTYPES", "float_code", "get", "FORMATS"]

#: Element codes and their numbers in native code (csrc/common/common.h: append, never renumber).
CODES = {
    "fp32": 0, "bf16": 1, "fp16": 2,   # plain floats, no scale
    "int8": 3,       # symmetric, scale = absmax/127, codes in [-127, 127]
    "uint8": 4,      # zero point, scale = (max-min)/255 over a range that includes 0
    "int4": 5,       # symmetric, scale = absmax/7, two's-complement nibbles, low nibble first
    "uint4": 6,      # zero point, scale = (max-min)/15, low nibble first
    "moment8": 7,    # signed 8-bit float code of a first moment (sign, 3 exponent bits, 4 mantissa bits)
    "square8": 8,    # 8-bit float code of sqrt(second moment) (3 exponent, 5 mantissa bits), never 0 in a nonzero block
    "delta": 9,      # fused_step's params only: read as 0, the update is left there in fp32
    "e4m3": 10,      # float8_e4m3fn, saturating, scale = absmax/448
    "e5m2": 11,      # float8_e5m2, saturating, scale = absmax/57344
    "e2m1": 12,      # fp4: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, scale = absmax/6, low nibble first
    "int7": 13,      # int8 with codes in [-63, 63], scale = absmax/63: products add up in 16 bits
    "uint3": 14,     # zero point, scale = (max-min)/7, a row is one little-endian stream of 3-bit codes
    "uint2": 15,     # zero point, scale = (max-min)/3, lowest bits first
    "int3": 16,      # symmetric, scale = absmax/3, codes in [-3, 3], two's complement
    "int2": 17,      # symmetric, scale = absmax, codes in [-1, 1], two's complement
    "int4_outlier": 18,  # int4 whose two largest magnitudes per block are kept in fp32 beside it (Stable-SPAM)
    "moment4": 19,   # moment8 in 4 bits: sign, 2 exponent bits, 1 mantissa bit: 0, .5, 1, 2, 3, 5, 7, 11 of scale
    "square4": 20,   # square8 in 4 bits: roots .25, .5, .75, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 9, 11, 13 of scale, never 0
    "bf16+8": 21, "bf16+16": 22, "fp16+8": 23, "fp16+16": 24,  # fused_step's params only: fp32 weights in two pieces, see SPLIT
    "sign": 25,      # one bit, 1 = negative, lowest bits first, a scale per row: what pack_signs makes
}
#: fp32 weights in two pieces: the dtype of the nearest 16-bit float, and of the low bits it lacks, as many as fit.
SPLIT = {"bf16+8": (torch.bfloat16, torch.uint8), "bf16+16": (torch.bfloat16, torch.int16), "fp16+8": (torch.float16, torch.uint8),
         "fp16+16": (torch.float16, torch.int16)}
#: Codes of optimizer states alone ("offset floats", csrc/common/codecs.h).
STATE_CODES = ("moment8", "square8", "moment4", "square4")
#: What fused_step and project_back can write, and project can read, in every backend; the others are matmul operands.
STEPPED = (*tuple(CODES)[:CODES["delta"] + 1], "e4m3", "moment4", "square4")
FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BITS = {"fp32": 32, "delta": 32, "bf16": 16, "fp16": 16, "int4": 4, "uint4": 4, "e2m1": 4, "int4_outlier": 4, "moment4": 4, "square4": 4, **dict.fromkeys(SPLIT, 16),
         "int3": 3, "uint3": 3, "int2": 2, "uint2": 2, "sign": 1}  # every other code has 8
_DTYPES = {"int8": torch.int8, "int7": torch.int8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}  # every other blocked code: uint8
#: Bytes an int4_outlier block keeps beside its codes: two fp32 values, their two positions, two bytes unused.
OUTLIER_BYTES = 12
#: code -> Format's bits, multiple, blocked, has_zero_point, code_dtype
_OF_CODE = {code: (bits := _BITS.get(code, 8), {4: 2, 3: 8, 2: 4, 1: 8}.get(bits, 1), (blocked := code not in ("fp32", "bf16", "fp16", "delta", *SPLIT)),
                   code in ("uint8", "uint4", "uint3", "uint2"),
                   SPLIT[code][0] if code in SPLIT else _DTYPES.get(code, torch.uint8) if blocked else FLOAT_DTYPES.get(code, torch.float32)) for code in CODES}
_FLOAT_CODES = {dtype: code for code, dtype in FLOAT_DTYPES.items()}


def float_code(dtype: torch.dtype) -> str | None:
    """"fp32", "bf16" or "fp16" for a dtype kernels read directly, None for any other."""
    return _FLOAT_CODES.get(dtype)


@dataclass(frozen=True)
class Format:
    """How a tensor of (rows, columns) is stored.

    Args:
        code: element code, a key of :data:`CODES`.
        block: elements sharing one scale, along the last dimension and never across rows; 0 for a whole row.
            The last block of a row may be shorter. A block fills whole bytes: even for 4-bit codes, a multiple of 4 for
            2-bit and of 8 for 3-bit ones; at most 256, and not 0, for int4_outlier.
        rows: rows that share their blocks' scales (0: all of them), as FP8's 128 x 128 weight blocks do. Every row still
            stores its scales, so that kernels know one layout only.
        scale: "fp32" (the largest magnitude decides), "pow2" (the next power of two up: MX formats' e8m0) or "e4m3"
            (rounded to float8 under one fp32 scale for the whole tensor: NVFP4).

    Stored as ``codes`` (rows, ceil(columns * bits / 8)), fp32 ``scales`` (rows, ceil(columns / block)) and ``zeros``:
    uint8 zero points of the same shape for the codes that have one, for int4_outlier 12 bytes a block. A block of zeros
    has scale 0; a block that holds a nan or an inf has scale nan, so that it decodes to nan.
    """

    code: str
    block: int = 0
    rows: int = 1
    scale: str = "fp32"

    def __post_init__(self):
        if self.code not in CODES:
            raise ValueError(f"code is {self.code!r}; it must be one of {', '.join(CODES)}")
        if self.block < 0 or self.block * self.bits % 8:
            raise ValueError(f"block is {self.block}; it must be 0 (a whole row) or positive, and fill whole bytes: a multiple of {self.multiple}")
        if self.code == "int4_outlier" and self.block > 256:
            raise ValueError(f"block is {self.block}; int4_outlier needs 2 to 256, because positions are stored in a byte")
        if self.code == "sign" and self.block:
            raise ValueError(f"block is {self.block}; it must be 0 for sign, which has a scale per row")
        if self.rows < 0 or self.scale not in ("fp32", "pow2", "e4m3"):
            raise ValueError(f"rows and scale are {self.rows} and {self.scale!r}; they must be 0 or more, and 'fp32', 'pow2' or 'e4m3'")
        if self.shared and (self.has_zero_point or self.code in ("int4_outlier", "sign", *STATE_CODES) or not self.blocked):
            raise ValueError(f"code is {self.code!r}; rows and scale need a symmetric integer or a float8 or fp4 code")

    # Looked up by code: every op asks several times a call.
    @property
    def bits(self) -> int:
        """Bits per code."""
        return _OF_CODE[self.code][0]

    @property
    def multiple(self) -> int:
        """Blocks are multiples of so many elements: whole bytes."""
        return _OF_CODE[self.code][1]

    @property
    def blocked(self) -> bool:
        """Whether the codes need scales."""
        return _OF_CODE[self.code][2]

    @property
    def shared(self) -> bool:
        """Whether a scale depends on more than its own block."""
        return self.rows != 1 or self.scale != "fp32"

    @property
    def has_zero_point(self) -> bool:
        return _OF_CODE[self.code][3]

    @property
    def code_dtype(self) -> torch.dtype:
        """torch dtype of the stored codes."""
        return _OF_CODE[self.code][4]

    def blocks(self, columns: int) -> int:
        """How many blocks a row of ``columns`` elements has (a whole-row block is there even when the row is empty)."""
        return 1 if self.block == 0 else -(-columns // self.block)

    def code_columns(self, columns: int) -> int:
        """How many elements of ``code_dtype`` store a row of ``columns``."""
        return columns if self.bits >= 8 else -(-columns * self.bits // 8)

    def zeros_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of ``zeros`` for (rows, columns): (0,) for codes that need none."""
        if self.has_zero_point:
            return rows, self.blocks(columns)
        return (rows, self.blocks(columns) * OUTLIER_BYTES) if self.code == "int4_outlier" else (0,)

    def nbytes(self, rows: int, columns: int) -> int:
        """Exact bytes of codes, scales and zero points (or low bits) for (rows, columns)."""
        blocks = self.blocks(columns) if self.blocked else 0
        if self.code in SPLIT:
            return rows * columns * (2 + SPLIT[self.code][1].itemsize)
        return rows * (-(-columns * self.bits // 8) + blocks * 4) + math.prod(self.zeros_shape(rows, columns))


@functools.lru_cache(maxsize=None, typed=True)
def cached(code: str, block: int = 0) -> Format:
    """Format(code, block), made once: for the paths that run at every step."""
    return Format(code, block)


@functools.lru_cache(maxsize=4096, typed=True)
def _layout(code: str, block: int, rows: int, columns: int):
    format = cached(code, block)
    return ((rows, format.code_columns(columns)), (rows, format.blocks(columns)), format.zeros_shape(rows, columns), format.code_dtype,
            CODES[code], min(block or columns, columns))


def layout(code: str, block: int, rows: int, columns: int):
    """How a (rows, columns) matrix in Format(code, block) is stored: the shapes of codes, scales and zeros, the codes' dtype, and what native
    code calls code and block. Worked out once, for symbolic sizes (torch.compile's) each time."""
    return (_layout if type(rows) is int and type(columns) is int else _layout.__wrapped__)(code, block, rows, columns)


#: Named formats.
FORMATS = {
    "fp32": Format("fp32"),
    "bf16": Format("bf16"),
    "fp16": Format("fp16"),
    "int8_row": Format("int8"),             # matmul operands
    "int7_row": Format("int7"),
    "int8_tensor": Format("int8", 0, rows=0),
    "e4m3_row": Format("e4m3"),
    "e4m3_row_pow2": Format("e4m3", scale="pow2"),
    "e4m3_tensor": Format("e4m3", 0, rows=0),
    "e5m2_tensor": Format("e5m2", 0, rows=0),
    "e4m3_1x128": Format("e4m3", 128),
    "e4m3_128x128": Format("e4m3", 128, rows=128),
    "nvfp4": Format("e2m1", 16, scale="e4m3"),
    "nvfp4_16x16": Format("e2m1", 16, rows=16, scale="e4m3"),
    "mxfp4": Format("e2m1", 32, scale="pow2"),
    "int4_outlier": Format("int4_outlier", 256),
    "int8": Format("uint8", 256),           # trainable INT8 weights (Q-GaLore)
    "int4": Format("uint4", 256),           # projection bases (Q-GaLore)
    "w8": Format("uint8", 128),             # weight-only
    "w4": Format("uint4", 128),
    "w3": Format("uint3", 128),
    "w2": Format("uint2", 64),
    "moment8": Format("moment8", 256),      # optimizer states
    "square8": Format("square8", 256),
    "moment4": Format("moment4", 128),
    "square4": Format("square4", 128),
}


def get(format: str | Format) -> Format:
    """The format of that name, or ``format`` itself. ValueError for an unknown name."""
    if isinstance(format, Format):
        return format
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be a Format or one of {', '.join(FORMATS)}")
    return FORMATS[format]
