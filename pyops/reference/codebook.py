"""Reference of the codebook family: weights stored as indices into codebooks of floats, a codebook for each group of rows."""
from __future__ import annotations

import torch

from gradmill.reference import philox
from gradmill.reference.quant import pack_bits, round_stochastic, unpack_bits


def values(indices, codebooks, row_groups, bits, columns):
    """The weight (rows, columns) that packed indices stand for, in the codebooks' dtype."""
    books = codebooks[row_groups.to(torch.int64)]
    return books.gather(1, unpack_bits(indices, bits, columns, False))


def matmul_codebook(x, indices, codebooks, row_groups, bits, columns, transpose, bias, dtype):
    """x w^T (+ bias), or x w if ``transpose``, w the values of the indices: see gradmill.ops.codebook."""
    w = values(indices, codebooks.to(torch.float64), row_groups, bits, columns)
    out = x.to(torch.float64) @ (w if transpose else w.t())
    if bias is not None:
        out = out + bias.to(torch.float64)
    return out.to(dtype)


def codebook_sums(dw, indices, row_groups, groups, bits):
    """sums[g, k] = the sum of dw where the row's group is g and its index k: see gradmill.ops.codebook."""
    entries = 1 << bits
    index = unpack_bits(indices, bits, dw.shape[1], False) + row_groups.to(torch.int64)[:, None] * entries
    sums = torch.zeros(groups * entries, dtype=torch.float64, device=dw.device)
    return sums.index_add_(0, index.flatten(), dw.to(torch.float64).flatten()).view(groups, entries)


def move_indices(indices, fractions, codebooks, row_groups, dw, rates, bits, key, stream, first):
    """One proximal step of indices and their fractions, in place: see gradmill.ops.codebook."""
    columns, last = dw.shape[1], (1 << bits) - 1
    if not dw.numel():
        return
    books, q = codebooks[row_groups.to(torch.int64)], unpack_bits(indices, bits, columns, False)
    mean = ((books[:, -1] - books[:, 0]) / last)[:, None]
    g = dw * rates
    other = torch.where(g > 0, q - 1, q + 1)
    d = (books.gather(1, other.clamp(0, last)) - books.gather(1, q)).abs()
    d = torch.where((other < 0) | (other > last), mean, d)
    step = (-g * ((2 * mean) / (d + mean)) * 256).clamp(-256, 256)
    moves = ((g > 0) | (g < 0)) & g.isfinite() & (mean > 0) & mean.isfinite() & ~step.isnan()
    seed, count = key.tolist()
    words = philox.words(seed, count, stream, first * columns, dw.numel(), dw.device).view(dw.shape)
    f = fractions.to(torch.int64) + round_stochastic(torch.where(moves, step, torch.zeros_like(step)), words).to(torch.int64)
    up, down = (f > 127) & (q < last), (f < -128) & (q > 0)
    f = (f - 256 * up + 256 * down).clamp(-128, 127)
    fractions.copy_(torch.where(moves, f, fractions.to(torch.int64)))
    indices.copy_(pack_bits(torch.where(moves, q + up.to(q.dtype) - down.to(q.dtype), q), bits))
