"""codebook: products with weights that are packed indices into codebooks, the codebooks' gradient, and steps of the indices."""
from __future__ import annotations

import torch

from gradmill.formats import CODES, float_code
from gradmill.ops._registry import Op, key_tuple, native_module, reject, require_key, require_matrix, where
from gradmill.ops.matmul import _check_out, _fp32_bias, _pointer
from gradmill.ops.quant import FLOATS
from gradmill.reference import codebook as reference

#: Groups of rows: a row's is one byte.
MAX_GROUPS = 256
BOOK = 64  # csrc/common/common.h: kBook + bits is a matrix of indices


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of ``columns`` indices."""
    return -(-columns * bits // 8)


def _check_indices(op, indices, row_groups, bits, columns, groups):
    if bits not in range(1, 9):
        reject(op, "bits", bits, "1 to 8")
    if columns < 0:
        reject(op, "columns", columns, "at least 0")
    require_matrix(op, "indices", indices, (torch.uint8,), (None, row_bytes(columns, bits)), contiguous=True)
    if row_groups.dtype != torch.uint8:
        reject(op, "row_groups", row_groups, "uint8", TypeError)
    if not (row_groups.shape == indices.shape[:1] and row_groups.device == indices.device and row_groups.is_contiguous()):
        reject(op, "row_groups", row_groups, f"contiguous, of shape ({indices.shape[0]},) on {indices.device}")
    if not 1 <= groups <= MAX_GROUPS:
        reject(op, "groups", groups, f"1 to {MAX_GROUPS}")


def _check_books(op, codebooks, bits, device):
    require_matrix(op, "codebooks", codebooks, (torch.float32,), (None, 1 << bits), device, contiguous=True)


def _check_groups(op, row_groups, groups):
    """What row_groups holds; on CUDA it is not read, which would wait for the device."""
    if not row_groups.is_cuda and row_groups.numel() and int(row_groups.max()) >= groups:
        reject(op, "row_groups", int(row_groups.max()), f"below {groups}, the number of groups, everywhere")


def _weight_tuple(indices, codebooks, row_groups, bits, rows, columns):
    return indices.data_ptr(), codebooks.data_ptr(), row_groups.data_ptr(), BOOK + bits, rows, columns, columns


# --- product ----------------------------------------------------------------------------------------------
def _check_matmul(x, indices, codebooks, row_groups, bits, columns, transpose, bias, dtype):
    op = "matmul_codebook"
    _check_indices(op, indices, row_groups, bits, columns, codebooks.shape[0] if codebooks.dim() == 2 else 1)
    _check_books(op, codebooks, bits, indices.device)
    require_matrix(op, "x", x, FLOATS, (None, indices.shape[0] if transpose else columns), indices.device)
    _check_out(op, bias, dtype, columns if transpose else indices.shape[0], x.device)


def _fake_matmul(x, indices, codebooks, row_groups, bits, columns, transpose, bias, dtype):
    return x.new_empty((x.shape[0], columns if transpose else indices.shape[0]), dtype=dtype)


def _native_matmul(x, indices, codebooks, row_groups, bits, columns, transpose, bias, dtype):
    x, bias = x.contiguous(), _fp32_bias(bias)
    out = _fake_matmul(x, indices, codebooks, row_groups, bits, columns, transpose, bias, dtype)
    if out.numel():
        native_module().matmul_packed(
            *where(x), (x.data_ptr(), 0, 0, CODES[float_code(x.dtype)], *x.shape, x.shape[1]),
            _weight_tuple(indices, codebooks, row_groups, bits, indices.shape[0], columns), transpose, _pointer(bias), out.data_ptr(), CODES[float_code(dtype)])
    return out


matmul_codebook = Op(
    "matmul_codebook", "(Tensor x, Tensor indices, Tensor codebooks, Tensor row_groups, int bits, int columns, bool transpose, Tensor? bias, "
    "ScalarType dtype) -> Tensor", _check_matmul, _fake_matmul,
    backends={"native": _native_matmul, "triton": "gradmill.kernels.codebook:matmul_codebook", "reference": reference.matmul_codebook},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")},
    values=lambda x, indices, codebooks, row_groups, *rest, **named: _check_groups("matmul_codebook", row_groups, codebooks.shape[0]))
matmul_codebook.__doc__ = """matmul_codebook(x, indices, codebooks, row_groups, bits, columns, transpose, bias, dtype)

x (m, columns) times the transpose of a (rows, columns) weight -> (m, rows); with ``transpose``, x (m, rows) times the weight itself ->
(m, columns). Row r of the weight has the values ``codebooks[row_groups[r]]`` at its indices: indices (rows, ceil(columns * bits / 8)) uint8, each
row one little-endian stream of 1 to 8 bits an index; codebooks (groups, 2^bits) fp32; row_groups (rows,) uint8. fp32 accumulation; x fp32,
bf16 or fp16. Raises TypeError for dtypes, ValueError for shapes, layout, bits and (on CPU) a group that is not there."""


# --- training ---------------------------------------------------------------------------------------------
def _check_sums(dw, indices, row_groups, groups, bits):
    op = "codebook_sums"
    require_matrix(op, "dw", dw, (torch.float32,), (indices.shape[0], None), indices.device, contiguous=True)
    _check_indices(op, indices, row_groups, bits, dw.shape[1], groups)


def _fake_sums(dw, indices, row_groups, groups, bits):
    return dw.new_empty((groups, 1 << bits), dtype=torch.float64)


def _native_sums(dw, indices, row_groups, groups, bits):
    sums = _fake_sums(dw, indices, row_groups, groups, bits).zero_()
    if dw.numel():
        native_module().codebook_sums((indices.data_ptr(), 0, row_groups.data_ptr(), BOOK + bits, *dw.shape, dw.shape[1]), dw.data_ptr(), groups, sums.data_ptr())
    return sums


codebook_sums = Op(
    "codebook_sums", "(Tensor dw, Tensor indices, Tensor row_groups, int groups, int bits) -> Tensor", _check_sums, _fake_sums,
    backends={"native": _native_sums, "reference": reference.codebook_sums},
    order={"cpu": ("native", "reference"), "cuda": ("reference",)},
    values=lambda dw, indices, row_groups, groups, bits: _check_groups("codebook_sums", row_groups, groups))
codebook_sums.__doc__ = """codebook_sums(dw, indices, row_groups, groups, bits) -> (groups, 2^bits) fp64

The sum of dw (rows, columns) fp32 over the places where a row's group is g and its index k: the gradient of codebook entry (g, k), dw being the
weight's gradient or a run of its rows, with that run of indices and row_groups. Added in fp64, on CPU in an order that threads do not
change; on CUDA torch's index_add_ adds. Raises TypeError for dtypes, ValueError for shapes, layout, bits and (on CPU) groups."""


def _check_move(indices, fractions, codebooks, row_groups, dw, rates, bits, key, stream, first):
    op = "move_indices"
    require_matrix(op, "dw", dw, (torch.float32,), (indices.shape[0], None), indices.device, contiguous=True)
    _check_indices(op, indices, row_groups, bits, dw.shape[1], codebooks.shape[0] if codebooks.dim() == 2 else 1)
    _check_books(op, codebooks, bits, indices.device)
    require_matrix(op, "fractions", fractions, (torch.int8,), tuple(dw.shape), dw.device, contiguous=True)
    require_matrix(op, "rates", rates, (torch.float32,), (dw.shape[0], 1), dw.device, contiguous=True)
    require_key(op, key)
    if first < 0:
        reject(op, "first", first, "at least 0")


def _fake_move(*args, **kwargs):
    return None


def _native_move(indices, fractions, codebooks, row_groups, dw, rates, bits, key, stream, first):
    if dw.numel():
        native_module().move_indices(_weight_tuple(indices, codebooks, row_groups, bits, *dw.shape), fractions.data_ptr(), dw.data_ptr(), rates.data_ptr(),
                                     key_tuple(key, stream), first * dw.shape[1])


move_indices = Op(
    "move_indices", "(Tensor(a!) indices, Tensor(b!) fractions, Tensor codebooks, Tensor row_groups, Tensor dw, Tensor rates, int bits, Tensor key, "
    "int stream, int first) -> ()", _check_move, _fake_move,
    backends={"native": _native_move, "reference": reference.move_indices},
    order={"cpu": ("native", "reference"), "cuda": ("reference",)},
    values=lambda indices, fractions, codebooks, row_groups, *rest, **named: _check_groups("move_indices", row_groups, codebooks.shape[0]))
move_indices.__doc__ = """move_indices(indices, fractions, codebooks, row_groups, dw, rates, bits, key, stream, first)

One proximal step of the indices of a run of rows, in place. An index and its fraction (rows, columns) int8, in 256ths, are one number with 8 binary
digits after the point: where a weight stands among its codewords, which must ascend. With g = dw * rates (rates (rows, 1) fp32), d the distance from
its codeword to the neighbour that -g drives it to and mean that of all neighbours in its codebook, it moves by

    -g * 2 mean / (d + mean),   at most 1 either way,

rounded stochastically to 256ths (Philox, ``key`` = int64 CPU tensor [seed, step], ``stream`` = tensor id << 8 | purpose, ``first`` = the number of
the run's first row in the whole weight); the index changes where the fraction leaves [-128, 127]. So a gradient counts the less for an
index the farther the next codeword is. At both ends of a codebook it stays; elements with g = 0, nan or inf are left alone, and rows whose
codewords do not ascend. Bit-equal in every backend (CUDA: torch). Raises TypeError for dtypes, ValueError for shapes, layout and bits."""
