"""linear reference: a whole INT8 layer, forward and backward, as the calls of quantize and matmul_int8 that it stands for."""
from __future__ import annotations

import torch

from gradmill.reference.matmul import matmul_int8
from gradmill.reference.quant import quantize


def linear_int8(x, weight, bias, code, keep, dtype, quantize=quantize, matmul=matmul_int8):
    """See gradmill.ops.linear. quantize, matmul: other backends' functions for the same."""
    (a, a_scales, _), (b, b_scales, _) = quantize(x, code), quantize(weight, code)
    kept = quantize(x, code, 0, True)[:2] if keep else (a.new_empty(0, x.shape[0]), a_scales.new_empty(0, 1))
    return matmul(a, b, a_scales, b_scales, bias, dtype), *kept


def linear_int8_backward(dy, weight, codes, scales, code, key, stream, turned_stream, dx_dtype, dw_dtype, quantize=quantize, matmul=matmul_int8):
    """See gradmill.ops.linear."""
    dx, dw = (dy.new_empty(0, 0, dtype=torch.float32) for _ in range(2))
    if dx_dtype is not None:
        (a, a_scales, _), (b, b_scales, _) = quantize(dy, code, 0, False, key, stream), quantize(weight, code, 0, True)
        dx = matmul(a, b, a_scales, b_scales, None, dx_dtype)
    if dw_dtype is not None:
        a, a_scales, _ = quantize(dy, code, 0, True, key, turned_stream)
        dw = matmul(a, codes, a_scales, scales, None, dw_dtype)
    return dx, dw
