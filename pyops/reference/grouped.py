"""Reference of the grouped family: one product per expert of a mixture, in a loop."""
from __future__ import annotations

import torch

from gradmill.formats import FLOAT_DTYPES, cached
from gradmill.reference.matmul import matmul_int8, matmul_scaled
from gradmill.reference.quant import quantize


def spans(offs):
    """(begin, end) of each expert's tokens."""
    ends = offs.tolist()
    return list(zip([0, *ends], ends))


def ragged_blocks(format, tokens, experts):
    """Blocks of a row that (tokens) cut into ``experts`` can have at most: what the scales have room for."""
    return experts if format.block == 0 else tokens // format.block + experts


def ragged_parts(codes, scales, offs, code, block):
    """The experts' (rows, their tokens) matrices of an operand that lies expert after expert: (codes, scales) each."""
    rows, first = codes.shape[0], 0
    for begin, end in spans(offs):
        blocks = cached(code, block).blocks(end - begin)
        yield (codes.reshape(-1)[rows * begin:rows * end].view(rows, end - begin), scales.reshape(-1)[rows * first:rows * (first + blocks)].view(rows, blocks))
        first += blocks


def zero_spare(scales, offs, block):
    """Given scales of blocks that do not exist count as 0."""
    lengths = torch.diff(offs, prepend=offs.new_zeros(1))
    used = (len(offs) if block == 0 else (-(-lengths // block)).sum()) * scales.shape[0]
    scales.view(-1)[torch.arange(scales.numel(), device=scales.device) >= used] = 0


def quantize_grouped(x, offs, code, block=0, key=None, stream=0, scales=None):
    """See gradmill.ops.grouped.quantize_grouped."""
    format, given = cached(code, block), scales
    codes = torch.zeros(x.shape[::-1], dtype=torch.uint8, device=x.device).view(format.code_dtype)
    scales = x.new_zeros((x.shape[1], ragged_blocks(format, x.shape[0], len(offs))), dtype=torch.float32)
    parts = ragged_parts(codes, scales, offs, code, block)
    given_parts = ragged_parts(codes, given, offs, code, block) if given is not None else None
    for e, ((begin, end), (codes_part, scales_part)) in enumerate(zip(spans(offs), parts)):
        own = next(given_parts)[1] if given_parts else None
        c, s, _ = quantize(x[begin:end], code, block, True, key, stream + (e << 8), own)
        codes_part.view(torch.uint8).copy_(c.view(torch.uint8)), scales_part.copy_(s)
    return codes, scales


def matmul_grouped(a, a_scales, a_code, a_block, b, b_scales, b_code, b_block, offs, bias, dtype, matmul_int8=matmul_int8, matmul_scaled=matmul_scaled):
    """See gradmill.ops.grouped.matmul_grouped; the last two: what makes one expert's product."""
    plain = a_code in FLOAT_DTYPES
    exact = {a_code, b_code} <= {"int8", "int7"} and a_block == b_block == 0

    def product(x, x_scales, w, w_scales, e):
        one = None if bias is None else bias[e]
        if exact:
            return matmul_int8(x, w, x_scales, w_scales, one, dtype)
        return matmul_scaled(x, x_scales, None, a_code, a_block, w, w_scales, None, b_code, b_block, w.shape[1], False, one, dtype)

    if a.dim() == b.dim() == 2:
        if plain:
            parts = (((a[i:j].t(), None), (b[i:j].t(), None)) for i, j in spans(offs))
        else:
            parts = zip(ragged_parts(a, a_scales, offs, a_code, a_block), ragged_parts(b, b_scales, offs, b_code, b_block))
        rows = [a.shape[1], b.shape[1]] if plain else [a.shape[0], b.shape[0]]
        out = [product(*x, *w, e) for e, (x, w) in enumerate(parts)]
        return torch.stack(out) if out else torch.zeros((0, *rows), dtype=dtype, device=a.device)
    if offs is None:
        out = [product(a[e], None if plain else a_scales[e], b[e], None if plain else b_scales[e], e) for e in range(len(b))]
        return torch.stack(out) if out else torch.zeros((0, a.shape[1], b.shape[1]), dtype=dtype, device=a.device)
    out = torch.zeros((a.shape[0], b.shape[1]), dtype=dtype, device=a.device)  # tokens beyond the last end are nobody's
    for e, (i, j) in enumerate(spans(offs)):
        out[i:j] = product(a[i:j], None if plain else a_scales[i:j], b[e], None if plain else b_scales[e], e)
    return out
