"""linear: all that a small INT8 layer does forward, and all that it does backward, in one call each.

Called one by one, quantize and matmul_int8 are 3 ops forward and 4 backward: at 16 elements 7 us of native code under 45 us of checks, empty
tensors and dispatch. On CPU the calls are made in native code instead, operands that nobody sees in its own memory.
"""
from __future__ import annotations

import torch

from gradmill.formats import CODES, float_code
from gradmill.ops._registry import Op, key_tuple, native_module, reject, require_key, require_matrix
from gradmill.ops.matmul import _check_out, _fp32_bias, _pointer, matmul_int8
from gradmill.ops.quant import FLOATS, quantize, row_major
from gradmill.reference import linear as reference

#: Codes that both operands of every product can have.
EXACT = ("int8", "int7")


def _composed(function):
    """The reference's calls in whatever backends their ops choose."""
    return lambda *args: function(*args, quantize=quantize, matmul=matmul_int8)


def _plain_tuple(x):
    """A matrix of floats for native code: (address, code, stride, whether its columns are what lies together), and what keeps it alive."""
    x, turned = row_major(x, False)
    return (x.data_ptr(), CODES[float_code(x.dtype)], x.stride(0), turned), x


# --- forward ----------------------------------------------------------------------------------------------
def _check_linear(x, weight, bias, code, keep, dtype):
    op = "linear_int8"
    if code not in EXACT:
        reject(op, "code", code, " or ".join(EXACT))
    require_matrix(op, "x", x, FLOATS)
    require_matrix(op, "weight", weight, FLOATS, (None, x.shape[1]), x.device)
    _check_out(op, bias, dtype, weight.shape[0], x.device)


def _fake_linear(x, weight, bias, code, keep, dtype):
    (tokens, columns), empty, device = x.shape, torch.empty, x.device
    kept = columns if keep else 0
    return (empty(tokens, weight.shape[0], dtype=dtype, device=device), empty(kept, tokens, dtype=torch.int8, device=device),
            empty(kept, 1, dtype=torch.float32, device=device))


def _native_linear(x, weight, bias, code, keep, dtype):
    if not (x.is_cpu and x.numel() and weight.numel()):
        return _composed_linear(x, weight, bias, code, keep, dtype)
    (left, _x), (right, _w), bias = _plain_tuple(x), _plain_tuple(weight), _fp32_bias(bias)
    y, codes, scales = out = _fake_linear(x, weight, bias, code, keep, dtype)
    native_module().linear_int8(x.shape[0], *weight.shape, CODES[code], left, right, _pointer(bias), y.data_ptr(), CODES[float_code(dtype)],
                                codes.data_ptr() if keep else 0, scales.data_ptr())
    return out


_composed_linear = _composed(reference.linear_int8)
linear_int8 = Op(
    "linear_int8", "(Tensor x, Tensor weight, Tensor? bias, str code, bool keep, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _check_linear, _fake_linear,
    backends={"native": _native_linear, "triton": _composed_linear, "reference": reference.linear_int8},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("triton", "native", "reference")})
linear_int8.__doc__ = """linear_int8(x, weight, bias, code, keep, dtype) -> (y, codes, scales)

y = ``matmul_int8`` of x (tokens, in) and weight (out, in), both quantised row by row to ``code``, int8 or int7, plus bias (out) or None: (tokens, out)
of ``dtype``. With ``keep``, codes and scales are x^T quantised the same way, what dW needs of x; else they are empty. The same bits as
:func:`quantize` and :func:`matmul_int8` one after the other, in every backend. Raises TypeError for dtypes, ValueError for shapes and code."""


# --- backward ---------------------------------------------------------------------------------------------
def _check_backward(dy, weight, codes, scales, code, key, stream, turned_stream, dx_dtype, dw_dtype):
    op = "linear_int8_backward"
    if code not in EXACT:
        reject(op, "code", code, " or ".join(EXACT))
    require_matrix(op, "dy", dy, FLOATS)
    require_key(op, key)
    tokens, outputs = dy.shape
    for name, dtype in (("dx_dtype", dx_dtype), ("dw_dtype", dw_dtype)):
        if not (dtype is None or dtype in FLOATS):
            reject(op, name, dtype, "float32, bfloat16, float16 or None", TypeError)
    if dx_dtype is not None:
        if weight is None:
            reject(op, "weight", None, "a tensor: dx needs it", TypeError)
        require_matrix(op, "weight", weight, FLOATS, (outputs, None), dy.device)
    if dw_dtype is not None:
        if codes is None or scales is None:
            reject(op, "codes" if codes is None else "scales", None, "a tensor: dw needs it", TypeError)
        require_matrix(op, "codes", codes, (torch.int8,), (None if dx_dtype is None else weight.shape[1], tokens), dy.device, contiguous=True)
        require_matrix(op, "scales", scales, (torch.float32,), (codes.shape[0], 1), dy.device, contiguous=True)


def _fake_backward(dy, weight, codes, scales, code, key, stream, turned_stream, dx_dtype, dw_dtype):
    (tokens, outputs), empty, device = dy.shape, torch.empty, dy.device
    dx = empty(0, 0, device=device, dtype=torch.float32) if dx_dtype is None else empty(tokens, weight.shape[1], dtype=dx_dtype, device=device)
    return dx, empty(0, 0, device=device, dtype=torch.float32) if dw_dtype is None else empty(outputs, codes.shape[0], dtype=dw_dtype, device=device)


def _native_backward(dy, weight, codes, scales, code, key, stream, turned_stream, dx_dtype, dw_dtype):
    inner = weight.shape[1] if dx_dtype is not None else codes.shape[0] if dw_dtype is not None else 0
    if not (dy.is_cpu and dy.numel() and inner):
        return _composed_backward(dy, weight, codes, scales, code, key, stream, turned_stream, dx_dtype, dw_dtype)
    left, _dy = _plain_tuple(dy)
    right, _w = (left, None) if dx_dtype is None else _plain_tuple(weight)
    dx, dw = out = _fake_backward(dy, weight, codes, scales, code, key, stream, turned_stream, dx_dtype, dw_dtype)
    needs_dw = dw_dtype is not None
    native_module().linear_int8_backward(
        *dy.shape, inner, CODES[code], left, right, codes.data_ptr() if needs_dw else 0, scales.data_ptr() if needs_dw else 0, key_tuple(key, stream),
        key_tuple(key, turned_stream), dx.data_ptr(), CODES[float_code(dx.dtype)], dw.data_ptr(), CODES[float_code(dw.dtype)])
    return out


_composed_backward = _composed(reference.linear_int8_backward)
linear_int8_backward = Op(
    "linear_int8_backward", "(Tensor dy, Tensor? weight, Tensor? codes, Tensor? scales, str code, Tensor? key, int stream, int turned_stream, "
    "ScalarType? dx_dtype, ScalarType? dw_dtype) -> (Tensor, Tensor)",
    _check_backward, _fake_backward,
    backends={"native": _native_backward, "triton": _composed_backward, "reference": reference.linear_int8_backward},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("triton", "native", "reference")})
linear_int8_backward.__doc__ = """linear_int8_backward(dy, weight, codes, scales, code, key, stream, turned_stream, dx_dtype, dw_dtype) -> (dx, dw)

The two products that follow :func:`linear_int8`: dx (tokens, in) = ``matmul_int8`` of dy (tokens, out) by rows and weight^T; dw (out, in) that of dy^T
and the codes (in, tokens) and scales that forward kept. dy is rounded stochastically with ``key``, an int64 CPU tensor [seed, step], under ``stream`` by
rows and ``turned_stream`` transposed. A dtype of None leaves a product out: its result is empty, its operands may be None. The same bits as the calls of
:func:`quantize` and :func:`matmul_int8`, in every backend. Raises TypeError for dtypes, ValueError for shapes and code."""
