"""quant: fp32/bf16/fp16 to and from every blocked code."""
from __future__ import annotations

import torch

from gradmill.formats import CODES, FLOAT_DTYPES, STATE_CODES, Format, cached, float_code, layout
from gradmill.ops._registry import Op, key_tuple, library, native_module, reject, require_key, require_matrix, where
from gradmill.reference import quant as reference

BLOCKED = tuple(code for code in CODES if cached(code).blocked)
FLOATS = tuple(FLOAT_DTYPES.values())
FP32 = (torch.float32,)


_accepted: set[tuple[str, int]] = set()


def check_format(op: str, code: str, block: int) -> Format:
    if (code, block) in _accepted:
        return cached(code, block)
    if code not in BLOCKED:
        reject(op, "code", code, f"one of {', '.join(BLOCKED)}")
    if code == "int4_outlier":
        if not (0 < block <= 256 and block % 2 == 0):
            reject(op, "block", block, "even and 2 to 256 for int4_outlier")
    elif code == "sign":
        if block:
            reject(op, "block", block, "0 (a whole row) for sign")
    elif not (block >= 0 and block % cached(code).multiple == 0):
        reject(op, "block", block, f"0 (a whole row) or positive, and a multiple of {cached(code).multiple} for {code}")
    _accepted.add((code, block))
    return cached(code, block)


def check_packed(op: str, name: str, codes, scales, zeros, code: str, block: int, columns: int, rows: int | None = None):
    """codes, scales and zeros of a (rows, columns) matrix in format (code, block)."""
    format = check_format(op, code, block)
    if not (columns >= 0):
        reject(op, "columns", columns, "0 or more")
    if codes is None:  # torch's dispatcher lets it through
        reject(op, f"{name}codes", None, "a tensor", TypeError)
    (_, width), blocks, zeros_shape, dtype, _, _ = layout(code, block, codes.shape[0] if codes.dim() else 0, columns)
    require_matrix(op, f"{name}codes", codes, (dtype,), (rows, width), contiguous=True)
    device = codes.device
    require_matrix(op, f"{name}scales", scales, FP32, blocks, device, contiguous=True)
    if len(zeros_shape) == 2:
        require_matrix(op, f"{name}zeros", zeros, (torch.uint8,), zeros_shape, device, contiguous=True)
    return format


def matrix_tuple(codes, scales, zeros, format: Format, rows: int, columns: int):
    """A stored matrix for native code: (codes, scales, zeros, code, rows, columns, block)."""
    code, block = layout(format.code, format.block, rows, columns)[4:]
    return (codes.data_ptr(), scales.data_ptr() if scales is not None else 0, zeros.data_ptr() if zeros is not None else 0, code, rows, columns, block)


# --- quantize ---------------------------------------------------------------------------------------------
def _check_quantize(x, code, block=0, transpose=False, key=None, stream=0, scales=None):
    if code == "sign":
        reject("quantize", "code", code, "another: gradmill.ops.pack_signs makes signs")
    format = check_format("quantize", code, block)
    require_matrix("quantize", "x", x, FLOATS)
    require_key("quantize", key)
    if scales is not None:
        if format.has_zero_point or code in ("int4_outlier", *STATE_CODES):
            reject("quantize", "scales", scales, f"None for {code}: only symmetric integer, float8 and fp4 codes take given scales")
        rows, columns = x.shape[::-1] if transpose else x.shape
        require_matrix("quantize", "scales", scales, (torch.float32,), (rows, format.blocks(columns)), x.device)


def empty_quantized(x, code, block, transpose=False, scales=None):
    """codes, scales (a copy of those given) and zeros for x, to be written."""
    rows, columns = x.shape[::-1] if transpose else x.shape
    codes, blocks, zeros, dtype, _, _ = layout(code, block, rows, columns)
    device, empty = x.device, torch.empty  # sizes one by one: a third faster than a tuple of them, or new_empty
    scales = empty(*blocks, dtype=torch.float32, device=device) if scales is None else scales.clone(memory_format=torch.contiguous_format)
    return empty(*codes, dtype=dtype, device=device), scales, empty(*zeros, dtype=torch.uint8, device=device)


def _fake_quantize(x, code, block=0, transpose=False, key=None, stream=0, scales=None):
    return empty_quantized(x, code, block, transpose)


def row_major(x, transpose):
    """x and transpose such that x's rows are contiguous and apart, as native code wants them."""
    if x.is_contiguous():
        return x, transpose
    if x.stride(1) != 1 and x.shape[1] > 1:
        if x.stride(0) == 1 or x.shape[0] == 1:
            x, transpose = x.t(), not transpose  # a transposed view: read it the other way, no copy
        else:
            x = x.contiguous()
    if x.stride(0) < x.shape[1] and x.shape[0] > 1:
        x = x.contiguous()  # an expanded or overlapping view
    return x, transpose


def _native_quantize(x, code, block=0, transpose=False, key=None, stream=0, scales=None):
    if x.is_cuda and code in ("uint3", "int3", "int4_outlier"):  # a thread writes 4 codes, which 3 bits leave in the middle of a byte
        return reference.quantize(x, code, block, transpose, key, stream, scales)
    x, transpose = row_major(x, transpose)
    given = scales is not None
    codes, scales, zeros = empty_quantized(x, code, block, transpose, scales)
    rows, columns = x.shape[::-1] if transpose else x.shape
    if not codes.numel():
        scales.zero_(), zeros.zero_()
    else:
        native_module().quantize(*where(x), x.data_ptr(), CODES[float_code(x.dtype)], x.stride(0),
                                 matrix_tuple(codes, scales, zeros, cached(code, block), rows, columns), transpose,
                                 key_tuple(key, stream), given)
    return codes, scales, zeros


quantize = Op(
    "quantize", "(Tensor x, str code, int block=0, bool transpose=False, Tensor? key=None, int stream=0, Tensor? scales=None) -> (Tensor, Tensor, Tensor)",
    _check_quantize, _fake_quantize,
    backends={"native": _native_quantize, "triton": "gradmill.kernels.quant:quantize", "reference": reference.quantize},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
quantize.__doc__ = """quantize(x, code, block=0, transpose=False, key=None, stream=0, scales=None) -> (codes, scales, zeros)

x (rows, columns) fp32, bf16 or fp16 in the format ``Format(code, block)``; with ``transpose``, x^T (a scale per
column of x when block is 0). Rounds half to even, or stochastically with ``key`` = int64 CPU tensor [seed, step] and
``stream`` = tensor id << 8 | purpose. ``scales`` (rows, blocks) fp32, of the result, are taken instead of measured ones;
values beyond them saturate (:func:`quantize_to` finds them for formats that share scales). zeros is
empty for codes that need none. A nan or inf makes its block's scale nan. Raises TypeError for dtypes, ValueError for
shapes, code and block."""


def quantize_to(x, format: Format, transpose=False, key=None, stream=0):
    """:func:`quantize` of x (rows, columns) fp32, bf16 or fp16 into any :class:`gradmill.formats.Format`, those whose blocks share scales
    included: (codes, scales, zeros). Raises TypeError for dtypes, ValueError for shapes."""
    scales = None
    if format.shared:
        scales = reference.shared_scales(block_absmax(x, format, transpose), format, key is not None)
    return quantize(x, format.code, format.block, transpose, key, stream, scales)


def block_absmax(x, format: Format, transpose=False):
    """The largest magnitude of each block of x (of x^T) as fp32 (..., rows, blocks), nan where there is one; of every matrix if x has several."""
    rows, columns = x.shape[:-3:-1] if transpose else x.shape[-2:]
    blocks = format.blocks(columns)
    if not x.numel():
        return x.new_zeros((*x.shape[:-2], rows, blocks), dtype=torch.float32)
    if format.block == 0 and format.rows == 0:
        return x.abs().flatten(-2).amax(-1)[..., None, None].to(torch.float32).expand(*x.shape[:-2], rows, 1)
    block, along = format.block or columns, -2 if transpose else -1
    pad = blocks * block - columns
    if pad:
        x = torch.nn.functional.pad(x, (0, 0, 0, pad) if transpose else (0, pad))
    absmax = x.abs().unflatten(along, (blocks, block)).amax(along).to(torch.float32)  # 5 to 50 times faster than vector_norm
    return absmax.mT if transpose else absmax


# --- both ways --------------------------------------------------------------------------------------------
#: Codes that quantize_both takes: symmetric, a byte each.
BOTH_WAYS = ("int8", "int7", "e4m3", "e5m2")


def _check_both(x, code, block=0, key=None, stream=0, turned_stream=0):
    if code not in BOTH_WAYS:
        reject("quantize_both", "code", code, f"one of {', '.join(BOTH_WAYS)}")
    check_format("quantize_both", code, block)
    require_matrix("quantize_both", "x", x, FLOATS)
    require_key("quantize_both", key)


def _fake_both(x, code, block=0, key=None, stream=0, turned_stream=0):
    return (*empty_quantized(x, code, block)[:2], *empty_quantized(x, code, block, True)[:2])


def _native_both(x, code, block=0, key=None, stream=0, turned_stream=0):
    x, transposed = row_major(x, False)
    out = _fake_both(x, code, block)
    out[3].zero_()
    if transposed:  # x is the transpose of what was given
        stream, turned_stream = turned_stream, stream
    if not x.numel():
        for t in out:
            t.zero_()
    else:
        rows, columns, format = *x.shape, cached(code, block)
        native_module().quantize_both(*where(x), x.data_ptr(), CODES[float_code(x.dtype)], x.stride(0),
                                      matrix_tuple(out[0], out[1], None, format, rows, columns), matrix_tuple(out[2], out[3], None, format, columns, rows),
                                      key_tuple(key, stream), key_tuple(key, turned_stream))
    return (*out[2:], *out[:2]) if transposed else out


quantize_both = Op(
    "quantize_both", "(Tensor x, str code, int block=0, Tensor? key=None, int stream=0, int turned_stream=0) -> (Tensor, Tensor, Tensor, Tensor)",
    _check_both, _fake_both,
    backends={"native": _native_both, "triton": "gradmill.kernels.quant:quantize_both", "reference": reference.quantize_both},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
quantize_both.__doc__ = """quantize_both(x, code, block=0, key=None, stream=0, turned_stream=0) -> (codes, scales, turned_codes, turned_scales)

x (rows, columns) fp32, bf16 or fp16 and its transpose in the format ``Format(code, block)``, an 8-bit symmetric code, with one
walk through x: what a linear layer needs of X (Y and dW) and of dY (dX and dW). The same bits as
``quantize(x, code, block, False, key, stream)`` and ``quantize(x, code, block, True, key, turned_stream)``. Raises TypeError
for dtypes, ValueError for shapes, code and block."""


# --- dequantize -------------------------------------------------------------------------------------------
def _check_dequantize(codes, scales, zeros, code, block, columns, dtype):
    check_packed("dequantize", "", codes, scales, zeros, code, block, columns)
    if dtype not in FLOATS:
        reject("dequantize", "dtype", dtype, "float32, bfloat16 or float16", TypeError)


def _fake_dequantize(codes, scales, zeros, code, block, columns, dtype):
    return torch.empty(codes.shape[0], columns, dtype=dtype, device=codes.device)


def _native_dequantize(codes, scales, zeros, code, block, columns, dtype):
    out = _fake_dequantize(codes, scales, zeros, code, block, columns, dtype)
    if out.numel():
        native_module().dequantize(*where(codes), matrix_tuple(codes, scales, zeros, cached(code, block), *out.shape),
                                   out.data_ptr(), CODES[float_code(dtype)])
    return out


dequantize = Op(
    "dequantize", "(Tensor codes, Tensor scales, Tensor zeros, str code, int block, int columns, ScalarType dtype) -> Tensor",
    _check_dequantize, _fake_dequantize,
    backends={"native": _native_dequantize, "triton": "gradmill.kernels.quant:dequantize", "reference": reference.dequantize},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
dequantize.__doc__ = """dequantize(codes, scales, zeros, code, block, columns, dtype) -> (rows, columns) of ``dtype``

What :func:`quantize` gave, back in fp32, bf16 or fp16: codes (rows, bytes), scales and zeros fp32 (rows, blocks) of format
``Format(code, block)``, whose rows have ``columns`` elements. Raises TypeError for dtypes, ValueError for shapes, code and block."""


# --- keys -------------------------------------------------------------------------------------------------
# An op, so that a compiled graph keeps the key that forward drew: of what depends on no input torch's partitioner makes another in backward, under whose
# signs dY's Hadamard transform is not X's, and dW = dY^T X is noise. So it depends on the operands, by name only. The seed is drawn by torch's own op:
# two layers' equal calls of ours would be merged.
library.define("key(Tensor seed, Tensor[] operands) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.impl("key", lambda seed, operands: torch.stack((seed, torch.zeros_like(seed))), "CompositeExplicitAutograd")
torch.library.register_fake("gradmill::key", lambda seed, operands: seed.new_empty(2), lib=library)


def draw_key(*operands: torch.Tensor) -> torch.Tensor:
    """[seed, step] int64 on the CPU for the random bits of a step of these operands (plain tensors), the seed drawn from torch's generator."""
    return torch.ops.gradmill.key(torch.randint(-2 ** 63, 2 ** 63 - 1, (), dtype=torch.int64, device="cpu"), operands)


# --- hadamard ---------------------------------------------------------------------------------------------
def _check_hadamard(x, block=16, transpose=False, key=None, stream=0, dtype=None, inverse=False):
    require_matrix("hadamard", "x", x, FLOATS)
    if not (2 <= block <= 1024 and block & (block - 1) == 0):
        reject("hadamard", "block", block, "a power of two from 2 to 1024")
    require_key("hadamard", key)
    if dtype is not None and dtype not in FLOATS:
        reject("hadamard", "dtype", dtype, "float32, bfloat16, float16 or None", TypeError)


def _fake_hadamard(x, block=16, transpose=False, key=None, stream=0, dtype=None, inverse=False):
    return torch.empty(*(x.shape[::-1] if transpose else x.shape), dtype=dtype or x.dtype, device=x.device)


def _native_hadamard(x, block=16, transpose=False, key=None, stream=0, dtype=None, inverse=False):
    out = _fake_hadamard(x, block, transpose, dtype=dtype)
    if out.numel():
        x, transpose = row_major(x, transpose)
        native_module().hadamard(*where(x), x.data_ptr(), CODES[float_code(x.dtype)], x.stride(0), *out.shape, block, transpose, inverse,
                                 key_tuple(key, stream), out.data_ptr(), CODES[float_code(out.dtype)])
    return out


hadamard = Op(
    "hadamard", "(Tensor x, int block=16, bool transpose=False, Tensor? key=None, int stream=0, ScalarType? dtype=None, bool inverse=False) -> Tensor",
    _check_hadamard, _fake_hadamard,
    backends={"native": _native_hadamard, "triton": "gradmill.kernels.quant:hadamard", "reference": reference.hadamard},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
hadamard.__doc__ = """hadamard(x, block=16, transpose=False, key=None, stream=0, dtype=None, inverse=False) -> Tensor

The random Hadamard transform of each row of x (rows, columns) fp32, bf16 or fp16, or with ``transpose`` of each row of
x^T: every run of ``block`` (a power of two, 2 to 1024) elements is multiplied by random signs and by the orthogonal
matrix H / sqrt(block). It spreads an outlier over its block, and two operands transformed alike keep their product:
hadamard(A) hadamard(B)^T = A B^T, so both can be quantised after it. (NVIDIA, "Pretraining Large Language Models with
NVFP4", 2025, section on random Hadamard transforms: blocks of 16 on the operands of dW only, whose contracted dimension
is the tokens: ``hadamard(dy, transpose=True)`` and ``hadamard(x, transpose=True)`` with one key.)

A row's tail is transformed by the largest powers of two that fit into it (13 = 8 + 4 + 1), so that the transform is
orthogonal for any length. Signs are bit 31 of Philox words: ``key`` = int64 CPU tensor [seed, step], ``stream`` = tensor
id << 8 | purpose "hadamard", element = position in the row, the same for every row; without a key there are none.
``inverse`` undoes it: the transform, then the signs. Computed in fp32, butterflies in the order 1, 2, 4, ... apart,
bit-equal in every backend; the result is (rows, columns), (columns, rows) with ``transpose``, of ``dtype`` (default
x's). nan and inf spread over their block. Raises TypeError for dtypes, ValueError for shapes, block and key."""


# --- fake quantisation with a trainable step and zero point per group ---------------------------------------
def check_fake(op: str, weight, bits: int, block: int):
    if not (2 <= bits <= 8):
        reject(op, "bits", bits, "2 to 8")
    if not (block >= 0 and block % 2 == 0):
        reject(op, "block", block, "0 (a whole row), or positive and even")
    require_matrix(op, "weight", weight, FLOATS)


def _check_fake(op, weight, steps, zeros, bits, block):
    check_fake(op, weight, bits, block)
    shape = (weight.shape[0], cached("uint8", block).blocks(weight.shape[1]))
    require_matrix(op, "steps", steps, (torch.float32,), shape, weight.device)
    require_matrix(op, "zeros", zeros, (torch.float32,), shape, weight.device)


def _check_fake_quantize(weight, steps, zeros, bits, block, dtype):
    _check_fake("fake_quantize", weight, steps, zeros, bits, block)
    if dtype not in FLOATS:
        reject("fake_quantize", "dtype", dtype, "float32, bfloat16 or float16", TypeError)


def _fake_fake_quantize(weight, steps, zeros, bits, block, dtype):
    return weight.new_empty(weight.shape, dtype=dtype)


def fake_tuple(weight, steps, zeros, bits, block):
    """(weight, its code, steps, zeros, rows, columns, block, bits) for native code, and the contiguous tensors it points to."""
    weight, steps, zeros = weight.contiguous(), steps.contiguous(), zeros.contiguous()
    rows, columns = weight.shape
    return (weight.data_ptr(), CODES[float_code(weight.dtype)], steps.data_ptr(), zeros.data_ptr(), rows, columns,
            min(block or columns, columns), bits), (weight, steps, zeros)


def _native_fake_quantize(weight, steps, zeros, bits, block, dtype):
    out = _fake_fake_quantize(weight, steps, zeros, bits, block, dtype)
    if out.numel():
        group, _alive = fake_tuple(weight, steps, zeros, bits, block)
        native_module().fake_quantize(*where(weight), group, out.data_ptr(), CODES[float_code(dtype)])
    return out


fake_quantize = Op(
    "fake_quantize", "(Tensor weight, Tensor steps, Tensor zeros, int bits, int block, ScalarType dtype) -> Tensor",
    _check_fake_quantize, _fake_fake_quantize,
    backends={"native": _native_fake_quantize, "triton": "gradmill.kernels.quant:fake_quantize", "reference": reference.fake_quantize},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
fake_quantize.__doc__ = """fake_quantize(weight, steps, zeros, bits, block, dtype) -> (rows, columns) of ``dtype``

The values of the group-wise quantised weight, (q - z) s with q = clamp(round(W / s) + z, 0, 2^bits - 1), rounding half to
even: Chen et al., "EfficientQAT", Block-AP. weight (rows, columns) fp32, bf16 or fp16; steps and zeros fp32 (rows,
ceil(columns / block)), block even or 0 for a whole row; bits 2 to 8. As in the authors' code the zero point is a trained
float, clamped to [0, 2^bits - 1] and rounded before use. Unlike there a step is not held to [1e-4, 1e4],
which would move the steps of small weights: one below 2^-100, zero and negative included, counts as 2^-100. A nan or
inf in the weight and a nan or inf in its group's step or a nan zero point give nan. Raises TypeError for dtypes, ValueError for
shapes, bits and block."""


def _check_fake_quantize_backward(grad, weight, steps, zeros, bits, block):
    _check_fake("fake_quantize_backward", weight, steps, zeros, bits, block)
    require_matrix("fake_quantize_backward", "grad", grad, FLOATS, weight.shape, weight.device)


def _fake_fake_quantize_backward(grad, weight, steps, zeros, bits, block):
    return weight.new_empty(weight.shape), steps.new_empty(steps.shape), zeros.new_empty(zeros.shape)


def _native_fake_quantize_backward(grad, weight, steps, zeros, bits, block):
    dweight, dsteps, dzeros = out = _fake_fake_quantize_backward(grad, weight, steps, zeros, bits, block)
    if not dweight.numel():
        dsteps.zero_(), dzeros.zero_()
    else:
        grad = grad.contiguous()
        group, _alive = fake_tuple(weight, steps, zeros, bits, block)
        native_module().fake_quantize_backward(*where(weight), group, grad.data_ptr(), CODES[float_code(grad.dtype)], dweight.data_ptr(),
                                               dsteps.data_ptr(), dzeros.data_ptr())
    return out


fake_quantize_backward = Op(
    "fake_quantize_backward", "(Tensor grad, Tensor weight, Tensor steps, Tensor zeros, int bits, int block) -> (Tensor, Tensor, Tensor)",
    _check_fake_quantize_backward, _fake_fake_quantize_backward,
    backends={"native": _native_fake_quantize_backward, "triton": "gradmill.kernels.quant:fake_quantize_backward",
              "reference": reference.fake_quantize_backward},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
fake_quantize_backward.__doc__ = """fake_quantize_backward(grad, weight, steps, zeros, bits, block) -> (dweight, dsteps, dzeros)

Gradients of fake_quantize with straight-through rounding, given grad = dW^ (rows, columns) fp32, bf16 or fp16. Where q was not
clamped: dW = dW^, ds = sum dW^ (round(W / s) - W / s), dz = 0; where it was: dW = 0, ds = sum dW^ (q - z), dz = -s sum dW^, sums over
the group. The clamps of step and zero point themselves are passed straight through, so that one that left its range can come
back. dweight has weight's dtype, dsteps and dzeros are fp32. Sums are taken in a fixed order (reference.quant.lane_sums): the
same bits in every backend, whatever the thread count. Raises TypeError for dtypes, ValueError for shapes, bits and block."""
