"""binary: signs and bit planes packed from floats, and exact products of packed operands."""
from __future__ import annotations

import torch

from gradmill.formats import CODES, float_code
from gradmill.ops._registry import Op, key_tuple, native_module, reject, require_key, require_matrix, where
from gradmill.ops.matmul import _check_out, _fp32_bias, _pointer, matmul_packed
from gradmill.ops.quant import FLOATS, row_major
from gradmill.reference import binary as reference


def row_bytes(columns: int) -> int:
    return -(-columns // 8)


# --- packing ----------------------------------------------------------------------------------------------
def _check_pack_signs(x, transpose=False, mean=False):
    require_matrix("pack_signs", "x", x, FLOATS)


def _fake_pack_signs(x, transpose=False, mean=False):
    rows, columns = x.shape[::-1] if transpose else x.shape
    return x.new_empty((rows, row_bytes(columns)), dtype=torch.uint8), x.new_empty((rows, 1), dtype=torch.float32)


def _native_pack_signs(x, transpose=False, mean=False):
    x, transpose = row_major(x, transpose)
    bits, scales = _fake_pack_signs(x, transpose)
    if not bits.numel():
        return bits, scales.fill_(not mean)
    native_module().pack_bits(*where(x), x.data_ptr(), CODES[float_code(x.dtype)], x.stride(0), *(x.shape[::-1] if transpose else x.shape), transpose,
                              0, mean, None, bits.data_ptr(), scales.data_ptr(), 0)
    return bits, scales


pack_signs = Op(
    "pack_signs", "(Tensor x, bool transpose=False, bool mean=False) -> (Tensor, Tensor)", _check_pack_signs, _fake_pack_signs,
    backends={"native": _native_pack_signs, "triton": "gradmill.kernels.binary:pack_signs", "reference": reference.pack_signs},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
pack_signs.__doc__ = """pack_signs(x, transpose=False, mean=False) -> (bits, scales)

Signs of x (rows, columns) fp32, bf16 or fp16, or of x^T: bits (rows, ceil(columns / 8)) uint8, least significant bit first, 1 where x < 0; 0, -0 and
nan count as +1, unused bits of the last byte are 0. scales (rows, 1) fp32: 1, or with ``mean`` the mean of |x| over the row (added
in 32 lanes as gradmill.reference.quant.lane_sums does; 0 for an empty row). A row with a nan or an inf has the scale nan
(with ``mean`` inf for an inf), so that it shows in every product made of it. Bit-equal in every backend. Raises TypeError for dtypes, ValueError for shapes."""


def _check_pack_planes(x, bits, transpose=False, key=None, stream=0):
    require_matrix("pack_planes", "x", x, FLOATS)
    if not 1 <= bits <= 4:
        reject("pack_planes", "bits", bits, "1 to 4")
    require_key("pack_planes", key)


def _fake_pack_planes(x, bits, transpose=False, key=None, stream=0):
    rows, columns = x.shape[::-1] if transpose else x.shape
    return (x.new_empty((bits, rows, row_bytes(columns)), dtype=torch.uint8), x.new_empty((rows, 1), dtype=torch.float32),
            x.new_empty((rows, 1), dtype=torch.float32))


def _native_pack_planes(x, bits, transpose=False, key=None, stream=0):
    x, transpose = row_major(x, transpose)
    planes, scales, offsets = _fake_pack_planes(x, bits, transpose)
    if not planes.numel():
        return planes, scales.zero_(), offsets.zero_()
    native_module().pack_bits(*where(x), x.data_ptr(), CODES[float_code(x.dtype)], x.stride(0), *(x.shape[::-1] if transpose else x.shape), transpose,
                              bits, False, key_tuple(key, stream), planes.data_ptr(), scales.data_ptr(), offsets.data_ptr())
    return planes, scales, offsets


pack_planes = Op(
    "pack_planes", "(Tensor x, int bits, bool transpose=False, Tensor? key=None, int stream=0) -> (Tensor, Tensor, Tensor)",
    _check_pack_planes, _fake_pack_planes,
    backends={"native": _native_pack_planes, "triton": "gradmill.kernels.binary:pack_planes", "reference": reference.pack_planes},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
pack_planes.__doc__ = """pack_planes(x, bits, transpose=False, key=None, stream=0) -> (planes, scales, offsets)

x (rows, columns) fp32, bf16 or fp16, or x^T, as unsigned integers of ``bits`` (1 to 4) bits over each row's range: x ~ offset + q scale, offset the
row's minimum, scale = (max - min) / (2^bits - 1); q rounded half to even, or stochastically with ``key`` and ``stream`` as in
:func:`quantize`. planes (bits, rows, ceil(columns / 8)) uint8: bit p of every q, packed as :func:`pack_signs` packs. scales and
offsets (rows, 1) fp32. A row whose scale would be below 2^-100 has scale 0 and every q 0; one with a nan or an inf has scale
and offset nan. Bit-equal in every backend. Raises TypeError for dtypes, ValueError for shapes and bits."""


# --- products ---------------------------------------------------------------------------------------------
LONGEST = 1 << 27  # columns: sums of so many products of 4 bits and a sign fit an int32


def _check_bits(op, a, b, columns, b_scales):
    if not 0 <= columns <= LONGEST:
        reject(op, "columns", columns, f"0 to {LONGEST}")
    require_matrix(op, "b", b, (torch.uint8,), (None, row_bytes(columns)), a.device, contiguous=True)
    require_matrix(op, "b_scales", b_scales, (torch.float32,), (b.shape[0], 1), a.device, contiguous=True)


def _check_binary(a, b, columns, a_scales, b_scales, bias, dtype):
    op = "matmul_binary"
    require_matrix(op, "a", a, (torch.uint8,), (None, row_bytes(columns)), contiguous=True)
    _check_bits(op, a, b, columns, b_scales)
    require_matrix(op, "a_scales", a_scales, (torch.float32,), (a.shape[0], 1), a.device, contiguous=True)
    _check_out(op, bias, dtype, b.shape[0], a.device)


def _fake_binary(a, b, columns, a_scales, b_scales, bias, dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def _native(out, a, b, columns, planes, a_scales, offsets, b_scales, bias):
    if out.numel():
        m, n = out.shape
        counts = torch.empty(m + n, dtype=torch.int32, device=a.device)  # bits set in each row of a and of b
        native_module().matmul_binary(*where(a), m, n, columns, planes, a.data_ptr(), b.data_ptr(), a_scales.data_ptr(), _pointer(offsets),
                                      b_scales.data_ptr(), _pointer(bias), counts.data_ptr(), out.data_ptr(), CODES[float_code(out.dtype)])
    return out


def _native_binary(a, b, columns, a_scales, b_scales, bias, dtype):
    return _native(_fake_binary(a, b, columns, a_scales, b_scales, bias, dtype), a, b, columns, 0, a_scales, None, b_scales, _fp32_bias(bias))


matmul_binary = Op(
    "matmul_binary", "(Tensor a, Tensor b, int columns, Tensor a_scales, Tensor b_scales, Tensor? bias, ScalarType dtype) -> Tensor",
    _check_binary, _fake_binary,
    backends={"native": _native_binary, "triton": "gradmill.kernels.binary:matmul_binary", "reference": reference.matmul_binary},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
matmul_binary.__doc__ = """matmul_binary(a, b, columns, a_scales, b_scales, bias, dtype) -> (m, n)

a (m, ceil(columns / 8)) and b (n, same) uint8 packed signs, a_scales (m, 1) and b_scales (n, 1) fp32: out = (sum of +-1 products *
a_scales) * b_scales + bias, the sum (columns - 2 popcount(a xor b)) exact. Unused bits of the last byte are ignored. Bit-equal in
every backend. Raises TypeError for dtypes, ValueError for shapes, layout and columns above 2^27."""


def _check_planes(a, b, columns, scales, offsets, b_scales, dtype):
    op = "matmul_planes"
    if a.dtype != torch.uint8:
        reject(op, "a", a, "uint8", TypeError)
    if not (a.dim() == 3 and 1 <= a.shape[0] <= 4 and a.shape[2] == row_bytes(columns)):
        reject(op, "a", a, f"of shape (1 to 4, any, {row_bytes(columns)})")
    if not a.is_contiguous():
        reject(op, "a", f"a tensor with strides {a.stride()}", "contiguous")
    _check_bits(op, a, b, columns, b_scales)
    for name, t in (("scales", scales), ("offsets", offsets)):
        require_matrix(op, name, t, (torch.float32,), (a.shape[1], 1), a.device, contiguous=True)
    _check_out(op, None, dtype, b.shape[0], a.device)


def _fake_planes(a, b, columns, scales, offsets, b_scales, dtype):
    return a.new_empty((a.shape[1], b.shape[0]), dtype=dtype)


def _native_planes(a, b, columns, scales, offsets, b_scales, dtype):
    return _native(_fake_planes(a, b, columns, scales, offsets, b_scales, dtype), a, b, columns, a.shape[0], scales, offsets, b_scales, None)


matmul_planes = Op(
    "matmul_planes", "(Tensor a, Tensor b, int columns, Tensor scales, Tensor offsets, Tensor b_scales, ScalarType dtype) -> Tensor",
    _check_planes, _fake_planes,
    backends={"native": _native_planes, "triton": "gradmill.kernels.binary:matmul_planes", "reference": reference.matmul_planes},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
matmul_planes.__doc__ = """matmul_planes(a, b, columns, scales, offsets, b_scales, dtype) -> (m, n)

a (bits, m, ceil(columns / 8)) as :func:`pack_planes` makes it, with its scales and offsets (m, 1); b (n, ceil(columns / 8)) packed signs with
b_scales (n, 1). What a stands for, offset + q scale, times the signs: out = (offsets * sum s + scales * sum q s) * b_scales, both sums
exact, then one fp32 product each, one addition, one product. Bit-equal in every backend. Raises TypeError for dtypes, ValueError for
shapes, layout and columns above 2^27."""


# --- a delta of signs for each row ------------------------------------------------------------------------
def _check_tenants(x, base, bits, alphas, tenants, columns):
    op = "matmul_tenants"
    require_matrix(op, "x", x, FLOATS, (None, columns))
    if bits.dtype != torch.uint8:
        reject(op, "bits", bits, "uint8", TypeError)
    if not (bits.dim() == 3 and bits.shape[2] == row_bytes(columns) and bits.is_contiguous() and bits.device == x.device):
        reject(op, "bits", bits, f"contiguous, of shape (tenants, rows, {row_bytes(columns)}) on {x.device}")
    require_matrix(op, "base", base, FLOATS, (x.shape[0], bits.shape[1]), x.device)
    if alphas.dtype != torch.float32:
        reject(op, "alphas", alphas, "float32", TypeError)
    if not (alphas.shape == bits.shape[:1] and alphas.device == x.device):
        reject(op, "alphas", alphas, f"of shape ({bits.shape[0]},) on {x.device}")
    if tenants.dtype != torch.int64:
        reject(op, "tenants", tenants, "int64", TypeError)
    if not (tenants.shape == x.shape[:1] and tenants.device.type in ("cpu", "meta")):
        reject(op, "tenants", tenants, f"of shape ({x.shape[0]},) on the CPU: rows are grouped by it")
    if tenants.device.type == "cpu" and not isinstance(tenants, torch._subclasses.FakeTensor) and tenants.numel() and not -1 <= int(tenants.min()) <= int(tenants.max()) < bits.shape[0]:
        reject(op, "tenants", tenants.tolist(), f"-1 (none) to {bits.shape[0] - 1}")


def _fake_tenants(x, base, bits, alphas, tenants, columns):
    return torch.empty_like(base, memory_format=torch.contiguous_format)


MANY_ROWS = 64  # beyond, a group's rows are worth packed panels


def _native_tenants(x, base, bits, alphas, tenants, columns):
    x, alphas = x.contiguous(), alphas.contiguous()
    if x.shape[0] > MANY_ROWS:
        out = base.clone(memory_format=torch.contiguous_format)
        for t in tenants.unique().tolist():
            if t >= 0:
                rows = (tenants == t).nonzero().flatten().to(x.device)
                scales = alphas[t].expand(bits.shape[1], 1).contiguous()
                delta = matmul_packed(x[rows], bits[t], scales, scales.new_empty(0, dtype=torch.uint8), "sign", 0, columns, False, None, torch.float32)
                out.index_copy_(0, rows, (out[rows].to(torch.float32) + delta).to(out.dtype))
        return out
    out, base = _fake_tenants(x, base, bits, alphas, tenants, columns), base.contiguous()
    if out.numel():
        order = tenants.argsort(stable=True)
        native_module().matmul_tenants(*where(x), *out.shape, columns, order.tolist(), tenants[order].tolist(), x.data_ptr(), CODES[float_code(x.dtype)],
                                       bits.data_ptr(), alphas.data_ptr(), base.data_ptr(), out.data_ptr(), CODES[float_code(out.dtype)])
    return out


matmul_tenants = Op(
    "matmul_tenants", "(Tensor x, Tensor base, Tensor bits, Tensor alphas, Tensor tenants, int columns) -> Tensor", _check_tenants, _fake_tenants,
    backends={"native": _native_tenants, "triton": "gradmill.kernels.binary:matmul_tenants", "reference": reference.matmul_tenants},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
matmul_tenants.__doc__ = """matmul_tenants(x, base, bits, alphas, tenants, columns) -> (m, rows)

Each row of x (m, columns) fp32, bf16 or fp16 times the transposed signs of its own tenant, added to base (m, rows): out[i] = base[i] +
alphas[t] * x[i] sign_t^T, t = tenants[i], int64 on the CPU; -1 leaves base[i]. bits (tenants, rows, ceil(columns / 8)) uint8 as :func:`pack_signs` makes them
for each tenant, alphas (tenants,) fp32. fp32 sums, base's dtype. Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit",
served without unpacking. Raises TypeError for dtypes, ValueError for shapes, layout and tenants."""
