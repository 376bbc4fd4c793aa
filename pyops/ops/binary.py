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


# --- bits -------------------------------------------------------------------------------------------------
def _check_transpose_bits(bits, columns):
    if columns < 0:
        reject("transpose_bits", "columns", columns, "0 or more")
    require_matrix("transpose_bits", "bits", bits, (torch.uint8,), (None, row_bytes(columns)), contiguous=True)


def _fake_transpose_bits(bits, columns):
    return bits.new_empty((columns, row_bytes(bits.shape[0])))


def unpacked(bits, columns):
    """The bits as uint8 (rows, columns)."""
    return (bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1).flatten(1)[:, :columns]


def _transposed(bits, columns):
    return pack_signs(-unpacked(bits, columns).to(torch.bfloat16), True)[0]


def _native_transpose_bits(bits, columns):
    if bits.is_cuda:
        return _transposed(bits, columns)
    out = _fake_transpose_bits(bits, columns)
    if out.numel():
        native_module().transpose_bits(bits.data_ptr(), bits.shape[0], columns, out.data_ptr())
    return out


_CPU_CUDA = {"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")}
transpose_bits = Op(
    "transpose_bits", "(Tensor bits, int columns) -> Tensor", _check_transpose_bits, _fake_transpose_bits,
    backends={"native": _native_transpose_bits, "triton": _transposed, "reference": reference.transpose_bits}, order=_CPU_CUDA)
transpose_bits.__doc__ = """transpose_bits(bits, columns) -> (columns, ceil(rows / 8)) uint8

Packed bits (rows, ceil(columns / 8)) uint8, lowest first, turned round; unused bits of the result are 0. Raises TypeError for dtypes, ValueError for shapes."""


# --- gradients --------------------------------------------------------------------------------------------
def _check_gradient(op, dy, sizes):
    if dy.dtype != torch.float32 or sizes is not None and sizes.dtype != torch.float32:
        reject(op, *(("dy", dy) if dy.dtype != torch.float32 else ("sizes", sizes)), "float32", TypeError)
    if dy.dim() != 3 or not dy.is_contiguous():
        reject(op, "dy", dy, "contiguous, of shape (images, channels, positions)")
    if sizes is not None and not (sizes.shape == dy.shape[1:2] and sizes.is_contiguous() and sizes.device == dy.device):
        reject(op, "sizes", sizes, f"contiguous, of shape ({dy.shape[1]},) on {dy.device}")


def _check_ranges(dy, sizes):
    _check_gradient("gradient_ranges", dy, sizes)


def _fake_ranges(dy, sizes):
    return tuple(dy.new_empty(n) for n in (dy.shape[0] * dy.shape[2],) * 2 + (dy.shape[1],) * 2)


def _native_ranges(dy, sizes):
    if dy.is_cuda:
        return reference.gradient_ranges(dy, sizes)
    out = _fake_ranges(dy, sizes)
    if not dy.numel():
        return tuple(t.zero_() for t in out)
    native_module().gradient_ranges(dy.data_ptr(), *dy.shape, sizes.data_ptr(), *(t.data_ptr() for t in out))
    return out


gradient_ranges = Op(
    "gradient_ranges", "(Tensor dy, Tensor sizes) -> (Tensor, Tensor, Tensor, Tensor)", _check_ranges, _fake_ranges,
    backends={"native": _native_ranges, "triton": reference.gradient_ranges, "reference": reference.gradient_ranges}, order=_CPU_CUDA)
gradient_ranges.__doc__ = """gradient_ranges(dy, sizes) -> (ranges, magnitudes, channel_ranges, channel_magnitudes)

Of a gradient dy (images, channels, positions) fp32: for each token, an image's position (images * positions,), the range of its channels' dy * sizes, made to include
zero, and the largest magnitude; for each channel (channels,) the same of dy itself. sizes (channels,) fp32. A group with a nan or an inf has inf. Bit-equal in every
backend. Raises TypeError for dtypes, ValueError for shapes."""


def _check_pack_gradient(dy, sizes, kept, bits, key=None, stream=0):
    op = "pack_gradient"
    _check_gradient(op, dy, sizes)
    if not (kept.dtype == torch.int64 and kept.dim() == 1 and kept.device == dy.device):
        reject(op, "kept", kept, f"int64 of one dimension on {dy.device}")
    if not 1 <= bits <= 4:
        reject(op, "bits", bits, "1 to 4")
    require_key(op, key)


def _groups_of(dy, sizes):
    """(groups, elements of each)"""
    images, channels, positions = dy.shape
    return (channels, images * positions) if sizes is None else (images * positions, channels)


def _kept_groups(dy, sizes, kept, bits, key=None, stream=0):
    groups = _groups_of(dy, sizes)[0]
    if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < groups:
        reject("pack_gradient", "kept", kept.tolist(), f"0 to {groups - 1}")


def _fake_pack_gradient(dy, sizes, kept, bits, key=None, stream=0):
    columns = _groups_of(dy, sizes)[1]
    return (dy.new_empty((bits, len(kept), row_bytes(columns)), dtype=torch.uint8), dy.new_empty((len(kept), 1)), dy.new_empty((len(kept), 1)))


def _native_pack_gradient(dy, sizes, kept, bits, key=None, stream=0):
    if dy.is_cuda or sizes is None and dy.shape[2] == 1:  # channels last: one after the other they would all read the same lines
        return _pack_kept(dy, sizes, kept, bits, key, stream)
    planes, scales, offsets = _fake_pack_gradient(dy, sizes, kept, bits, key, stream)
    if not planes.numel():
        return planes, scales.zero_(), offsets.zero_()
    kept = kept.contiguous()
    native_module().pack_gradient(dy.data_ptr(), *dy.shape, 0 if sizes is None else sizes.data_ptr(), kept.data_ptr(), len(kept), bits, key_tuple(key, stream),
                                  planes.data_ptr(), scales.data_ptr(), offsets.data_ptr())
    return planes, scales, offsets


def _pack_kept(dy, sizes, kept, bits, key=None, stream=0):
    images, channels, positions = dy.shape
    if sizes is None:
        matrix = dy.index_select(1, kept).transpose(0, 1).reshape(len(kept), images * positions) if positions > 1 else dy[:, :, 0].index_select(1, kept).t()
        return pack_planes(matrix, bits, False, key, stream)
    rows = dy.transpose(1, 2).reshape(images * positions, channels)[kept] * sizes
    return pack_planes(rows, bits, False, key, stream)


pack_gradient = Op(
    "pack_gradient", "(Tensor dy, Tensor? sizes, Tensor kept, int bits, Tensor? key=None, int stream=0) -> (Tensor, Tensor, Tensor)",
    _check_pack_gradient, _fake_pack_gradient, values=_kept_groups,
    backends={"native": _native_pack_gradient, "triton": _pack_kept, "reference": reference.pack_gradient}, order=_CPU_CUDA)
pack_gradient.__doc__ = """pack_gradient(dy, sizes, kept, bits, key=None, stream=0) -> (planes, scales, offsets)

:func:`pack_planes` of some groups of a gradient dy (images, channels, positions) fp32. With sizes (channels,) fp32 a group is a token (images * positions of them), its
channels' dy * sizes; without, a channel, its dy of all tokens. kept (rows,) int64: which groups. Raises TypeError for dtypes, ValueError for shapes, bits and kept."""


def _check_sample(ranges, bits, offset):
    op = "sample_groups"
    if ranges.dtype != torch.float32 or ranges.dim() != 1:
        reject(op, "ranges", ranges, "float32 of one dimension", TypeError if ranges.dtype != torch.float32 else ValueError)
    if bits < 1:
        reject(op, "bits", bits, "1 or more")
    if offset.dtype != torch.float64 or offset.dim() != 0:
        reject(op, "offset", offset, "a float64 number", TypeError if offset.dtype != torch.float64 else ValueError)


def _fake_sample(ranges, bits, offset):
    count = -(-len(ranges) // bits)
    return ranges.new_empty(count, dtype=torch.int64), ranges.new_empty(count)


def _native_sample(ranges, bits, offset):
    if ranges.is_cuda:
        return reference.sample_groups(ranges, bits, offset)
    kept, factor = _fake_sample(ranges, bits, offset)
    if len(ranges):
        ranges = ranges.contiguous()
        native_module().sample_groups(ranges.data_ptr(), len(ranges), bits, float(offset), kept.data_ptr(), factor.data_ptr())
    return kept, factor


sample_groups = Op(
    "sample_groups", "(Tensor ranges, int bits, Tensor offset) -> (Tensor, Tensor)", _check_sample, _fake_sample,
    backends={"native": _native_sample, "triton": reference.sample_groups, "reference": reference.sample_groups}, order=_CPU_CUDA)
sample_groups.__doc__ = """sample_groups(ranges, bits, offset) -> (kept, factor)

1 / bits of the groups, ceil(groups / bits), each with a probability p proportional to its range (groups,) fp32 and at most 1, and 1 / p. Gao et al., "1-Bit FQT" (AGP), draws
each for itself; here one random number in [0, 1), ``offset`` (a float64 scalar, may be on the CPU), places a comb over the running sum of the p (systematic sampling): the same probabilities, and a number
of groups that is known before; if one too few is hit, the first that is not fills up, with the factor 0. kept ascends. A range that is inf or nan is always kept. In float64, whose sums'
order differs between backends: a factor is within 2^-23 of its value, and which group is hit may differ where the comb falls within 1e-12 of a group's border. Raises TypeError for dtypes, ValueError for shapes."""


# --- products ---------------------------------------------------------------------------------------------
LONGEST = 1 << 27  # columns: sums of so many products of 4 bits and a sign fit an int32


def _check_bits(op, a, b, columns, b_scales):
    if not 0 <= columns <= LONGEST:
        reject(op, "columns", columns, f"0 to {LONGEST}")
    require_matrix(op, "b", b, (torch.uint8,), (None, row_bytes(columns)), a.device, contiguous=True)
    require_matrix(op, "b_scales", b_scales, (torch.float32,), (b.shape[0], 1), a.device, contiguous=True)


def _check_binary(a, b, columns, a_scales, b_scales, bias, dtype, run=0):
    op = "matmul_binary"
    require_matrix(op, "a", a, (torch.uint8,), (None, row_bytes(columns)), contiguous=True)
    _check_bits(op, a, b, columns, b_scales)
    require_matrix(op, "a_scales", a_scales, (torch.float32,), (a.shape[0], 1), a.device, contiguous=True)
    _check_out(op, bias, dtype, (a if run else b).shape[0], a.device)
    if run < 0 or run and b.shape[0] % run:
        reject(op, "run", run, f"0 or a divisor of {b.shape[0]}, b's rows")


def _fake_binary(a, b, columns, a_scales, b_scales, bias, dtype, run=0):
    m, n = a.shape[0], b.shape[0]
    return a.new_empty((n // run, m, run) if run else (m, n), dtype=dtype)


def _native(out, a, b, columns, planes, a_scales, offsets, b_scales, bias, run=0):
    if out.numel():
        m, n = a.shape[-2], b.shape[0]
        counts = torch.empty(m + n, dtype=torch.int32, device=a.device)  # bits set in each row of a and of b
        native_module().matmul_binary(*where(a), m, n, columns, planes, a.data_ptr(), b.data_ptr(), a_scales.data_ptr(), _pointer(offsets),
                                      b_scales.data_ptr(), _pointer(bias), counts.data_ptr(), out.data_ptr(), CODES[float_code(out.dtype)], run)
    return out


def _native_binary(a, b, columns, a_scales, b_scales, bias, dtype, run=0):
    if run and a.is_cuda:
        return _binary_in_runs(_native_binary, a, b, columns, a_scales, b_scales, bias, dtype, run)
    return _native(_fake_binary(a, b, columns, a_scales, b_scales, bias, dtype, run), a, b, columns, 0, a_scales, None, b_scales, _fp32_bias(bias), run)


def _triton_binary(a, b, columns, a_scales, b_scales, bias, dtype, run=0):
    from gradmill.kernels.binary import matmul_binary as multiply
    return _binary_in_runs(multiply, a, b, columns, a_scales, b_scales, bias, dtype, run) if run else multiply(a, b, columns, a_scales, b_scales, bias, dtype)


def _binary_in_runs(multiply, a, b, columns, a_scales, b_scales, bias, dtype, run):
    """Where the kernel writes matrices only; the bias belongs to the columns of the transposed product."""
    return multiply(b, a, columns, b_scales, a_scales, bias, dtype).view(len(b) // run, run, len(a)).transpose(1, 2).contiguous()


matmul_binary = Op(
    "matmul_binary", "(Tensor a, Tensor b, int columns, Tensor a_scales, Tensor b_scales, Tensor? bias, ScalarType dtype, int run=0) -> Tensor",
    _check_binary, _fake_binary,
    backends={"native": _native_binary, "triton": _triton_binary, "reference": reference.matmul_binary},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
matmul_binary.__doc__ = """matmul_binary(a, b, columns, a_scales, b_scales, bias, dtype, run=0) -> (m, n), or with run (n / run, m, run)

a (m, ceil(columns / 8)) and b (n, same) uint8 packed signs, a_scales (m, 1) and b_scales (n, 1) fp32: out = (sum of +-1 products *
a_scales) * b_scales + bias, the sum (columns - 2 popcount(a xor b)) exact. With ``run`` b's rows come in
runs of so many, an image's positions: out is (images, channels, positions), and the bias belongs to a's rows. Unused bits of the last byte are ignored. Bit-equal in
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
