"""Formats: how numbers are stored. A format is data; kernels read its code and block at run time."""
from __future__ import annotations

import functools
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
}
FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BITS = {"fp32": 32, "delta": 32, "bf16": 16, "fp16": 16, "int4": 4, "uint4": 4}  # every other code has 8
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
            The last block of a row may be shorter. Even, for the 4-bit codes.

    Stored as ``codes`` (rows, ceil(columns * bits / 8)), fp32 ``scales`` (rows, ceil(columns / block)) and, for the
    codes with a zero point, uint8 ``zeros`` of the same shape. A block of zeros has scale 0; a block that holds a
    nan or an inf has scale nan, so that it decodes to nan.
    """

    code: str
    block: int = 0

    def __post_init__(self):
        if self.code not in CODES:
            raise ValueError(f"code is {self.code!r}; it must be one of {', '.join(CODES)}")
        if self.block < 0 or (self.bits == 4 and self.block % 2):
            raise ValueError(f"block is {self.block}; it must be 0 (a whole row) or positive, and even for 4-bit codes")

    @property
    def bits(self) -> int:
        """Bits per code."""
        return _BITS.get(self.code, 8)

    @property
    def blocked(self) -> bool:
        """Whether the codes need scales."""
        return self.code not in ("fp32", "bf16", "fp16", "delta")

    @property
    def has_zero_point(self) -> bool:
        return self.code in ("uint8", "uint4")

    @property
    def code_dtype(self) -> torch.dtype:
        """torch dtype of the stored codes."""
        if not self.blocked:
            return FLOAT_DTYPES.get(self.code, torch.float32)
        return torch.int8 if self.code == "int8" else torch.uint8

    def blocks(self, columns: int) -> int:
        """How many blocks a row of ``columns`` elements has (a whole-row block is there even when the row is empty)."""
        return 1 if self.block == 0 else -(-columns // self.block)

    def code_columns(self, columns: int) -> int:
        """How many elements of ``code_dtype`` store a row of ``columns``."""
        return -(-columns // 2) if self.bits == 4 else columns

    def nbytes(self, rows: int, columns: int) -> int:
        """Exact bytes of codes, scales and zero points for (rows, columns)."""
        blocks = self.blocks(columns) if self.blocked else 0
        return rows * (-(-columns * self.bits // 8) + blocks * (5 if self.has_zero_point else 4))


@functools.lru_cache(maxsize=None)
def cached(code: str, block: int = 0) -> Format:
    """Format(code, block), made once: for the paths that run at every step."""
    return Format(code, block)


#: Named formats.
FORMATS = {
    "fp32": Format("fp32"),
    "bf16": Format("bf16"),
    "fp16": Format("fp16"),
    "int8_row": Format("int8"),             # matmul operands
    "int8": Format("uint8", 256),           # trainable INT8 weights (Q-GaLore)
    "int4": Format("uint4", 256),           # projection bases (Q-GaLore)
    "moment8": Format("moment8", 256),      # optimizer states
    "square8": Format("square8", 256),
}


def get(format: str | Format) -> Format:
    """The format of that name, or ``format`` itself. ValueError for an unknown name."""
    if isinstance(format, Format):
        return format
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be a Format or one of {', '.join(FORMATS)}")
    return FORMATS[format]
