"""conv: a convolution's patches, quantised straight from the image, and their gradients added back to it."""
from __future__ import annotations

import torch

from gradmill.formats import FLOAT_DTYPES, cached
from gradmill.ops._registry import Op, native_module, reject, require_matrix, short
from gradmill.ops.binary import pack_signs
from gradmill.ops.quant import FLOATS, check_format, empty_quantized, matrix_tuple, quantize
from gradmill.reference import conv as reference


def check_geometry(function: str, height: int, width: int, kernel, stride, padding, dilation):
    """ValueError for numbers that make no convolution."""
    for name, value, least in (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(value) != 2 or min(value) < least:
            raise ValueError(f"gradmill {function}: {name} is {tuple(value)}; it must be two integers of at least {least}")
    for size, k, p, d in zip((height, width), kernel, padding, dilation):
        if size + 2 * p < d * (k - 1) + 1:
            raise ValueError(f"gradmill {function}: kernel is {tuple(kernel)}, dilation {tuple(dilation)}; they must fit into the padded image, "
                             f"{height} x {width} with padding {tuple(padding)}")


def _window(channels, height, width, kernel, stride, padding, dilation):
    """The geometry over the padded image, for native code."""
    height, width = height + 2 * padding[0], width + 2 * padding[1]
    return (channels, height, width, *kernel, *stride, *dilation, *reference.output_size(height, width, kernel, stride, (0, 0), dilation))


# --- image to quantised patches ---------------------------------------------------------------------------
def _check_patches(x, kernel, stride, padding, dilation, code, block=0, transpose=False):
    op = "quantize_patches"
    if code not in FLOAT_DTYPES:
        check_format(op, code, block)
    if x.dtype not in FLOATS:
        reject(op, "x", x, short(FLOATS), TypeError)
    if x.dim() != 4:
        reject(op, "x", x, "4-D (n, channels, height, width)")
    check_geometry(op, *x.shape[2:], kernel, stride, padding, dilation)


def _fake_patches(x, kernel, stride, padding, dilation, code, block=0, transpose=False):
    oh, ow = reference.output_size(*x.shape[2:], kernel, stride, padding, dilation)
    rows, columns = x.shape[0] * oh * ow, x.shape[1] * kernel[0] * kernel[1]
    if code in FLOAT_DTYPES:
        return (x.new_empty((columns, rows) if transpose else (rows, columns), dtype=FLOAT_DTYPES[code]),
                *(x.new_empty((0,), dtype=dtype) for dtype in (torch.float32, torch.uint8)))
    return empty_quantized(x.new_empty(()).expand(rows, columns), code, block, transpose)


def _native_patches(x, kernel, stride, padding, dilation, code, block=0, transpose=False):
    if x.is_cuda:
        return _quantize_unfolded(x, kernel, stride, padding, dilation, code, block, transpose)
    codes, scales, zeros = out = _fake_patches(x, kernel, stride, padding, dilation, code, block, transpose)
    if not codes.numel():
        scales.fill_(code == "sign"), zeros.zero_()
        return out
    geometry = _window(*x.shape[1:], kernel, stride, padding, dilation)
    image = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    image = image.to(torch.float32).contiguous()
    matrix = x.shape[0] * geometry[9] * geometry[10], x.shape[1] * kernel[0] * kernel[1]
    rows, columns = matrix[::-1] if transpose else matrix
    native_module().quantize_patches(image.data_ptr(), geometry, matrix_tuple(codes, scales, zeros, cached(code, block), rows, columns), transpose)
    return out


def _quantize_unfolded(x, kernel, stride, padding, dilation, code, block=0, transpose=False):
    """Where there is no fused kernel: torch unfolds, ``quantize`` reads."""
    if code in FLOAT_DTYPES:
        return reference.quantize_patches(x, kernel, stride, padding, dilation, code, block, transpose)
    matrix = reference.patches(x, kernel, stride, padding, dilation)
    return (*pack_signs(matrix, transpose), x.new_empty((0,), dtype=torch.uint8)) if code == "sign" else quantize(matrix, code, block, transpose)


quantize_patches = Op(
    "quantize_patches", "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, str code, int block=0, bool transpose=False) "
    "-> (Tensor, Tensor, Tensor)",
    _check_patches, _fake_patches,
    backends={"native": _native_patches, "triton": _quantize_unfolded, "reference": reference.quantize_patches},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
quantize_patches.__doc__ = """quantize_patches(x, kernel, stride, padding, dilation, code, block=0, transpose=False) -> (codes, scales, zeros)

``quantize`` of a convolution's patches, the matrix (n oh ow, c kh kw) of x (n, c, height, width) fp32, bf16 or fp16, or with
``transpose`` of its transpose, rounded to nearest; on CPU without making that matrix. The window's sizes are (vertical, horizontal)
each. A plain float code gives the patches themselves, scales and zeros empty; "sign" what :func:`pack_signs` makes of them. Bit-equal in every backend. Raises TypeError
for dtypes, ValueError for shapes, geometry, code and block."""


# --- patches' gradients to the image's --------------------------------------------------------------------
def _check_fold(d, n, channels, height, width, kernel, stride, padding, dilation, dtype, kept=None):
    op = "fold_patches"
    check_geometry(op, height, width, kernel, stride, padding, dilation)
    oh, ow = reference.output_size(height, width, kernel, stride, padding, dilation)
    if kept is not None and not (kept.dtype == torch.int64 and kept.dim() == 1 and kept.device == d.device):
        reject(op, "kept", kept, f"int64 of one dimension on {d.device}")
    require_matrix(op, "d", d, FLOATS, (n * oh * ow if kept is None else len(kept), channels * kernel[0] * kernel[1]))
    if dtype not in FLOATS:
        reject(op, "dtype", dtype, "float32, bfloat16 or float16", TypeError)


def _kept_values(d, n, channels, height, width, kernel, stride, padding, dilation, dtype, kept=None):
    if kept is not None and len(kept):
        oh, ow = reference.output_size(height, width, kernel, stride, padding, dilation)
        if int(kept[0]) < 0 or int(kept[-1]) >= n * oh * ow or not bool((kept.diff() > 0).all()):
            reject("fold_patches", "kept", kept.tolist(), f"ascending, 0 to {n * oh * ow - 1}")


def _fake_fold(d, n, channels, height, width, kernel, stride, padding, dilation, dtype, kept=None):
    return d.new_empty((n, channels, height, width), dtype=dtype)


def _native_fold(d, n, channels, height, width, kernel, stride, padding, dilation, dtype, kept=None):
    if d.is_cuda:
        return reference.fold_patches(d, n, channels, height, width, kernel, stride, padding, dilation, dtype, kept)
    kept = None if kept is None else kept.contiguous()
    d, geometry = d.to(torch.float32).contiguous(), _window(channels, height, width, kernel, stride, padding, dilation)
    image = d.new_empty((n, *geometry[:3]))
    if not d.numel():
        image.zero_()
    elif image.numel():
        native_module().fold_patches(d.data_ptr(), *((0, 0) if kept is None else (kept.data_ptr(), len(kept))), geometry, n, image.data_ptr())
    return image[:, :, padding[0]:padding[0] + height, padding[1]:padding[1] + width].to(dtype).contiguous()


fold_patches = Op(
    "fold_patches", "(Tensor d, int n, int channels, int height, int width, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "ScalarType dtype, Tensor? kept=None) -> Tensor",
    _check_fold, _fake_fold, values=_kept_values,
    backends={"native": _native_fold, "triton": reference.fold_patches, "reference": reference.fold_patches},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
fold_patches.__doc__ = """fold_patches(d, n, channels, height, width, kernel, stride, padding, dilation, dtype, kept=None) -> (n, channels, height, width) of ``dtype``

The gradient of an image, given that of its patches, d (n oh ow, channels kh kw) fp32, bf16 or fp16: each element is added to the
pixel it came from, in fp32, in the order of the window's elements: the same bits in every backend, whatever the thread count.
With ``kept`` (rows,) int64, ascending, d has only these of the patches' rows, the others being zeros.
Raises TypeError for dtypes, ValueError for shapes and geometry."""
