"""A linear layer whose weight is indices into codebooks."""
from __future__ import annotations

import torch

from gradmill.ops._registry import forced_backend, in_forwards_backend
from gradmill.ops.codebook import codebook_sums, matmul_codebook

ROWS = 256  # of the weight's gradient that exist at a time


def gradient_tiles(pairs, rows: int):
    """(first row, dW of up to ROWS rows) of a weight (rows, columns), dW the sum of dy^T x over ``pairs`` of x (tokens, columns) and dy (tokens, rows)."""
    pairs = [(x.to(torch.float32), dy.to(torch.float32)) for x, dy in pairs]
    for first in range(0, rows, ROWS):
        tile = None
        for x, dy in pairs:
            part = dy[:, first:first + ROWS].t() @ x
            tile = part if tile is None else tile.add_(part)
        yield first, tile


class CodebookProduct(torch.autograd.Function):
    """Y = X W^T + b, W[r, c] = codebooks[row_groups[r], index[r, c]]. dX = dY W from the packed indices. d codebooks[g, k] is the sum of dW over the
    rows of g where the index is k; dW = dY^T X is made ROWS rows at a time. ``kept``, where it is a list, is given X and dY: what a step of
    the indices needs."""

    @staticmethod
    def forward(ctx, x, codebooks, bias, indices, row_groups, bits, dtype, kept):
        ctx.save_for_backward(x, codebooks, indices, row_groups)
        ctx.bits, ctx.kept, ctx.bias = bits, kept, None if bias is None else bias.dtype
        ctx.backend = forced_backend()
        return matmul_codebook(x, indices, codebooks, row_groups, bits, x.shape[1], False, bias, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @in_forwards_backend
    def backward(ctx, dy):
        x, codebooks, indices, row_groups = ctx.saved_tensors
        dx = dbooks = dbias = None
        if ctx.needs_input_grad[0]:
            dx = matmul_codebook(dy, indices, codebooks, row_groups, ctx.bits, x.shape[1], True, None, x.dtype)
        if ctx.needs_input_grad[1]:
            dbooks = codebooks.new_zeros(codebooks.shape, dtype=torch.float64)
            for first, dw in gradient_tiles([(x, dy)], len(indices)):
                rows = slice(first, first + ROWS)
                dbooks += codebook_sums(dw, indices[rows], row_groups[rows], len(codebooks), ctx.bits)
            dbooks = dbooks.to(codebooks.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias)
        if ctx.kept is not None:
            ctx.kept.append((x.detach(), dy))
        return dx, dbooks, dbias, None, None, None, None, None
