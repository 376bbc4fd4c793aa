"""matmul: INT8 x INT8 with scales in the epilogue, and float x packed weight."""
from __future__ import annotations

import torch

from gradmill.formats import CODES, FLOAT_DTYPES, SPLIT, STATE_CODES, cached, float_code
from gradmill.ops._registry import Op, native_module, reject, require_matrix, where
from gradmill.ops.quant import FLOATS, check_packed, matrix_tuple
from gradmill.reference import matmul as reference


def _check_out(op, bias, dtype, columns, device):
    if dtype not in FLOATS:
        reject(op, "dtype", dtype, "float32, bfloat16 or float16", TypeError)
    if bias is not None:
        if bias.dtype not in FLOATS:
            reject(op, "bias", bias, "float32, bfloat16 or float16", TypeError)
        if not (bias.shape == (columns,) and bias.device == device):
            reject(op, "bias", bias, f"of shape ({columns},) on {device}")


def _fp32_bias(bias):
    return bias if bias is None or bias.dtype == torch.float32 and bias.is_contiguous() else bias.to(torch.float32).contiguous()


def _pointer(t):
    return 0 if t is None else t.data_ptr()


# --- int8 -------------------------------------------------------------------------------------------------
def _check_int8(a, b, a_scales, b_scales, bias, dtype):
    op = "matmul_int8"
    require_matrix(op, "a", a, (torch.int8,), contiguous=True)
    require_matrix(op, "b", b, (torch.int8,), (None, a.shape[1]), a.device, contiguous=True)
    require_matrix(op, "a_scales", a_scales, (torch.float32,), (a.shape[0], 1), a.device, contiguous=True)
    require_matrix(op, "b_scales", b_scales, (torch.float32,), (b.shape[0], 1), a.device, contiguous=True)
    _check_out(op, bias, dtype, b.shape[0], a.device)


def _fake_int8(a, b, a_scales, b_scales, bias, dtype):
    return torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)


def _native_int8(a, b, a_scales, b_scales, bias, dtype):
    out, bias = _fake_int8(a, b, a_scales, b_scales, bias, dtype), _fp32_bias(bias)
    if out.numel():
        native_module().matmul_int8(*where(a), a.shape[0], b.shape[0], a.shape[1], a.data_ptr(), b.data_ptr(), a_scales.data_ptr(),
                                    b_scales.data_ptr(), _pointer(bias), out.data_ptr(), CODES[float_code(dtype)])
    return out


def _torch_int8(a, b, a_scales, b_scales, bias, dtype):
    """torch._int_mm: cuBLAS on CUDA (its shape limits padded away); int32, so K is split where it could overflow."""
    chunk = 1 << 16  # 2^16 products of -128 * -128 fit an int32
    total = None
    for k in range(0, max(a.shape[1], 1), chunk):
        part = torch._int_mm(_padded(a[:, k:k + chunk], 32), _padded(b[:, k:k + chunk], 32).t())[:a.shape[0], :b.shape[0]]
        total = part if a.shape[1] <= chunk else part.to(torch.float64) + (0 if total is None else total)
    out = total.to(torch.float32) * a_scales * b_scales.view(1, -1)
    return (out if bias is None else out + bias.to(torch.float32)).to(dtype)


def _padded(x, multiple):
    rows, columns = (-x.shape[0]) % multiple, (-x.shape[1]) % multiple
    if x.shape[1] == 0:
        columns = multiple
    return torch.nn.functional.pad(x, (0, columns, 0, rows)) if rows or columns else x.contiguous()


matmul_int8 = Op(
    "matmul_int8", "(Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias, ScalarType dtype) -> Tensor",
    _check_int8, _fake_int8,
    backends={"native": _native_int8, "triton": "gradmill.kernels.matmul:matmul_int8", "torch": _torch_int8,
              "reference": reference.matmul_int8},
    order={"cpu": ("native", "triton", "torch", "reference"), "cuda": ("triton", "torch", "native", "reference")})
matmul_int8.__doc__ = """matmul_int8(a, b, a_scales, b_scales, bias, dtype) -> (m, n)

a (m, k) and b (n, k) int8, a_scales (m, 1) and b_scales (n, 1) fp32: out = (sum a b * a_scales) * b_scales + bias, the
sum exact for any k. Bit-equal in every backend. On CPUs without VNNI operands whose codes all lie in [-64, 63] (the
format int7 makes such) are multiplied about 1.4 times as fast; the kernel looks, the result is the same. Raises TypeError for dtypes, ValueError for shapes and layout."""


# --- packed weight ----------------------------------------------------------------------------------------
def _check_packed_matmul(x, codes, scales, zeros, code, block, columns, transpose, bias, dtype):
    op = "matmul_packed"
    check_packed(op, "", codes, scales, zeros, code, block, columns)
    require_matrix(op, "x", x, FLOATS, (None, codes.shape[0] if transpose else columns), codes.device)
    _check_out(op, bias, dtype, columns if transpose else codes.shape[0], x.device)


def _fake_packed_matmul(x, codes, scales, zeros, code, block, columns, transpose, bias, dtype):
    return torch.empty(x.shape[0], columns if transpose else codes.shape[0], dtype=dtype, device=x.device)


def _native_packed_matmul(x, codes, scales, zeros, code, block, columns, transpose, bias, dtype):
    x = x.contiguous()
    m, k = x.shape
    return _product(x, (x.data_ptr(), 0, 0, CODES[float_code(x.dtype)], m, k, k),
                    matrix_tuple(codes, scales, zeros, cached(code, block), codes.shape[0], columns), transpose, bias, dtype)


def _product(a, left, right, transpose, bias, dtype):
    """a, and so the result's rows and device, times b; left and right: both for native code."""
    out, bias = torch.empty(a.shape[0], right[5] if transpose else right[4], dtype=dtype, device=a.device), _fp32_bias(bias)
    if out.numel():
        native_module().matmul_packed(*where(a), left, right, transpose, _pointer(bias), out.data_ptr(), CODES[float_code(dtype)])
    return out


matmul_packed = Op(
    "matmul_packed", "(Tensor x, Tensor codes, Tensor scales, Tensor zeros, str code, int block, int columns, bool transpose, "
    "Tensor? bias, ScalarType dtype) -> Tensor",
    _check_packed_matmul, _fake_packed_matmul,
    backends={"native": _native_packed_matmul, "triton": "gradmill.kernels.matmul:matmul_packed", "reference": reference.matmul_packed},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
matmul_packed.__doc__ = """matmul_packed(x, codes, scales, zeros, code, block, columns, transpose, bias, dtype)

x (m, columns) times the transpose of a packed (rows, columns) weight -> (m, rows); with ``transpose``, x (m, rows)
times the weight itself -> (m, columns). fp32 accumulation; x and the result's ``dtype`` fp32, bf16 or fp16; codes (rows, bytes), scales and
zeros as :func:`quantize` gives them; bias one float for each column of the result, or None. Raises TypeError for dtypes, ValueError for shapes,
code, block and device."""


# --- two stored operands ----------------------------------------------------------------------------------
def _check_operand(op, name, codes, scales, zeros, code, block, columns, device=None):
    if code in FLOAT_DTYPES:
        require_matrix(op, f"{name}codes", codes, (FLOAT_DTYPES[code],), (None, columns), device, contiguous=True)
    else:
        if scales is None:
            reject(op, f"{name}scales", scales, f"a tensor: {code} needs scales")
        check_packed(op, name, codes, scales, zeros, code, block, columns)
        if device is not None and codes.device != device:
            reject(op, f"{name}codes", codes, f"on {device}")


def _check_scaled(a, a_scales, a_zeros, a_code, a_block, b, b_scales, b_zeros, b_code, b_block, columns, transpose, bias, dtype):
    op = "matmul_scaled"
    for name, code in (("a_code", a_code), ("b_code", b_code)):
        if code not in OPERAND_CODES:
            reject(op, name, code, f"one of {', '.join(OPERAND_CODES)}")
    _check_operand(op, "b ", b, b_scales, b_zeros, b_code, b_block, columns)
    _check_operand(op, "a ", a, a_scales, a_zeros, a_code, a_block, b.shape[0] if transpose else columns, b.device)
    _check_out(op, bias, dtype, columns if transpose else b.shape[0], a.device)


def _fake_scaled(a, a_scales, a_zeros, a_code, a_block, b, b_scales, b_zeros, b_code, b_block, columns, transpose, bias, dtype):
    return torch.empty(a.shape[0], columns if transpose else b.shape[0], dtype=dtype, device=a.device)


def _native_scaled(a, a_scales, a_zeros, a_code, a_block, b, b_scales, b_zeros, b_code, b_block, columns, transpose, bias, dtype):
    left = matrix_tuple(a, a_scales, a_zeros, cached(a_code, a_block), a.shape[0], b.shape[0] if transpose else columns)
    return _product(a, left, matrix_tuple(b, b_scales, b_zeros, cached(b_code, b_block), b.shape[0], columns), transpose, bias, dtype)


OPERAND_CODES = tuple(code for code in CODES if code not in ("delta", "sign", *STATE_CODES, *SPLIT))
matmul_scaled = Op(
    "matmul_scaled", "(Tensor a, Tensor? a_scales, Tensor? a_zeros, str a_code, int a_block, Tensor b, Tensor? b_scales, Tensor? b_zeros, "
    "str b_code, int b_block, int columns, bool transpose, Tensor? bias, ScalarType dtype) -> Tensor",
    _check_scaled, _fake_scaled,
    backends={"native": _native_scaled, "triton": "gradmill.kernels.matmul:matmul_scaled", "reference": reference.matmul_scaled},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("triton", "native", "reference")})
matmul_scaled.__doc__ = """matmul_scaled(a, a_scales, a_zeros, a_code, a_block, b, b_scales, b_zeros, b_code, b_block, columns, transpose, bias, dtype)

a (m, k) times the transpose of b (n, k) -> (m, n), both stored in any format (plain floats: scales and zeros None);
``columns`` are b's, so k; with ``transpose``, a (m, k) times b (k, columns) -> (m, columns). The values that the codes
stand for are multiplied and added in fp32. Raises TypeError for dtypes, ValueError for shapes, layout and codes."""
