"""Reference of the projection family.

The basis B is (rank, d), its rows the basis vectors, stored packed. side "right" projects the columns of the
gradient G (m, d): R = G B^T; side "left" its rows, G (d, n): R = B G.
Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection"; Zhang et al., "Q-GaLore".
"""
from __future__ import annotations

import math

import torch

from gradmill.formats import Format
from gradmill.reference import optim, philox
from gradmill.reference.quant import dequantize


def _basis(codes, scales, zeros, code, block, side):
    return dequantize(codes, scales, zeros, code, block, side, torch.float64) if Format(code).blocked else codes.to(torch.float64)


def dct_matrix(n: int) -> torch.Tensor:
    """The orthonormal DCT-III (n, n), fp64: D_ij = sqrt(2/n) cos(i (2j+1) pi / 2n), its first row over sqrt 2."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    matrix = torch.cos(((2 * j + 1) * i % (4 * n)).to(torch.float64) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    matrix[:1] *= math.sqrt(0.5)
    return matrix


def dct(x, columns):
    """See gradmill.ops.projection.dct."""
    matrix = dct_matrix(x.shape[0 if columns else 1]).to(x.device)
    return (matrix.t() @ x.double() if columns else x.double() @ matrix).to(torch.float32)


def project(grad, codes, scales, zeros, code, block, left):
    """See gradmill.ops.projection.project."""
    d = grad.shape[0] if left else grad.shape[1]
    basis = _basis(codes, scales, zeros, code, block, d)
    grad = grad.to(torch.float64)
    return (basis @ grad if left else grad @ basis.t()).to(torch.float32)


def project_back(weight, weight_scales, weight_zeros, weight_code, weight_block, columns, update, codes, scales, zeros, code, block,
                 left, scalars, key, stream, residual=None, residual_scales=None, first=0):
    """See gradmill.ops.projection.project_back."""
    format = Format(weight_code, weight_block)
    decay, alpha = scalars.tolist()
    matrix = optim.as_matrix(weight)
    d = matrix.shape[0] if left else columns
    basis = _basis(codes, scales, zeros, code, block, d)
    back = (basis.t() @ update.double() if left else update.double() @ basis).to(torch.float32)
    old = optim.load(matrix, weight_scales, weight_zeros, format, columns)
    rounding = key if weight_code not in ("fp32", "fp16") else None
    new = old * decay + alpha * back
    if residual is not None:
        new = new + residual_scales[None if left else ..., ... if left else None] * residual.to(torch.float32)
    optim.write(matrix, weight_scales, weight_zeros, format, new, rounding, stream, old=old, first=first)


def random_basis(rank, d, key, stream):
    """(rank, d) fp32 standard normals from Philox (Box-Muller), rows then orthonormalised."""
    seed, step = key.tolist()
    words = philox.words(seed, step, stream, 0, 2 * rank * d).view(2, rank, d).to(torch.float64)
    u = (words + 0.5) * 2.0 ** -32
    return (torch.sqrt(-2 * torch.log(u[0])) * torch.cos(2 * torch.pi * u[1])).to(torch.float32)


def power_iteration(g, previous, rank, iterations, key, stream, orthonormal):
    """Q (d, rank) <- orthonormal(G^T G Q), ``iterations`` times, in g's precision.

    A vector of the last basis that the gradient no longer reaches (G q = 0: units that woke up, rows of an embedding)
    would stay lost for ever; such vectors start anew from random ones."""
    def fresh():
        return random_basis(rank, g.shape[1], key, stream).to(g).t()

    q = fresh() if previous is None else previous.to(g.dtype).t()
    for i in range(iterations):
        y = g.t() @ (g @ q)
        if i == 0 and previous is not None:
            norms = y.norm(dim=0)
            lost = norms <= 1e-7 * g.norm() ** 2
            if bool(lost.any()):
                y = g.t() @ (g @ torch.where(lost, fresh(), q))
        q = orthonormal(y)
    return q


def subspace_basis(grad, previous, rank, iterations, left, key, stream):
    """See gradmill.ops.projection.subspace_basis: block power iteration in float64 with Householder QR."""
    g = grad.to(torch.float64)
    if left:
        g = g.t()  # now the projected side is columns: (m, d)
    q = power_iteration(g, previous, rank, iterations, key, stream, lambda y: torch.linalg.qr(y).Q)
    return q.t().to(torch.float32).contiguous()
