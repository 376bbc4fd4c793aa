"""Reference of the matmul family."""
from __future__ import annotations

import torch

from gradmill.reference.quant import dequantize


def matmul_int8(a, b, a_scales, b_scales, bias, dtype):
    """out = (float(a b^T) * a_scales) * b_scales^T (+ bias), the integer sum exact: see gradmill.ops.matmul."""
    # float64 adds integers below 2^53 exactly, far faster than an integer matmul in torch
    total = (a.to(torch.float64) @ b.to(torch.float64).t() + 0.0).to(torch.float32)  # + 0.0: an integer sum has no -0
    out = total * a_scales.view(-1, 1) * b_scales.view(1, -1)
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(dtype)


def matmul_packed(x, codes, scales, zeros, code, block, columns, transpose, bias, dtype):
    """x (dequantised w)^T (+ bias), or x w if ``transpose``: see gradmill.ops.matmul."""
    return matmul_scaled(x, None, None, None, 0, codes, scales, zeros, code, block, columns, transpose, bias, dtype)


def matmul_scaled(a, a_scales, a_zeros, a_code, a_block, b, b_scales, b_zeros, b_code, b_block, columns, transpose, bias, dtype):
    """The values of a times those of b^T (of b if ``transpose``), plus bias: see gradmill.ops.matmul."""
    def values(codes, scales, zeros, code, block, columns):
        return codes.to(torch.float64) if scales is None else dequantize(codes, scales, zeros, code, block, columns, torch.float64)

    x = values(a, a_scales, a_zeros, a_code, a_block, b.shape[0] if transpose else columns)
    w = values(b, b_scales, b_zeros, b_code, b_block, columns)
    out = x @ (w if transpose else w.t())
    if bias is not None:
        out = out + bias.to(torch.float64)
    return out.to(dtype)
