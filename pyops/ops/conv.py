"""conv: a convolution's patches, quantised straight from the image, and their gradients added back to it."""
from __future__ import annotations

import torch

from gradmill.formats import CODES, FLOAT_DTYPES, cached, float_code
from gradmill.ops._registry import Op, native_module, reject, require_matrix, short
from gradmill.ops.binary import pack_signs, row_bytes
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
    image = x.to(torch.float32).contiguous()
    matrix = x.shape[0] * geometry[9] * geometry[10], x.shape[1] * kernel[0] * kernel[1]
    rows, columns = matrix[::-1] if transpose else matrix
    native_module().quantize_patches(image.data_ptr(), geometry, tuple(padding), matrix_tuple(codes, scales, zeros, cached(code, block), rows, columns), transpose)
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
def _check_fold(d, n, channels, height, width, kernel, stride, padding, dilation, dtype):
    op = "fold_patches"
    check_geometry(op, height, width, kernel, stride, padding, dilation)
    oh, ow = reference.output_size(height, width, kernel, stride, padding, dilation)
    require_matrix(op, "d", d, FLOATS, (n * oh * ow, channels * kernel[0] * kernel[1]))
    if dtype not in FLOATS:
        reject(op, "dtype", dtype, "float32, bfloat16 or float16", TypeError)


def _fake_fold(d, n, channels, height, width, kernel, stride, padding, dilation, dtype):
    return d.new_empty((n, channels, height, width), dtype=dtype)


def _native_fold(d, n, channels, height, width, kernel, stride, padding, dilation, dtype):
    if d.is_cuda:
        return reference.fold_patches(d, n, channels, height, width, kernel, stride, padding, dilation, dtype)
    d, geometry = d.to(torch.float32).contiguous(), _window(channels, height, width, kernel, stride, padding, dilation)
    image = d.new_empty((n, channels, height, width))
    if not d.numel():
        image.zero_()
    elif image.numel():
        native_module().fold_patches(d.data_ptr(), geometry, tuple(padding), n, image.data_ptr())
    return image.to(dtype)


fold_patches = Op(
    "fold_patches", "(Tensor d, int n, int channels, int height, int width, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "ScalarType dtype) -> Tensor",
    _check_fold, _fake_fold,
    backends={"native": _native_fold, "triton": reference.fold_patches, "reference": reference.fold_patches},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
fold_patches.__doc__ = """fold_patches(d, n, channels, height, width, kernel, stride, padding, dilation, dtype) -> (n, channels, height, width) of ``dtype``

The gradient of an image, given that of its patches, d (n oh ow, channels kh kw) fp32, bf16 or fp16: each element is added to the
pixel it came from, in fp32, in the order of the window's elements: the same bits in every backend, whatever the thread count.
Raises TypeError for dtypes, ValueError for shapes and geometry."""


# --- an image's signs -------------------------------------------------------------------------------------
def _check_pack_image(x, kernel, stride, padding, dilation):
    op = "pack_image"
    if x.dtype not in FLOATS:
        reject(op, "x", x, short(FLOATS), TypeError)
    if x.dim() != 4:
        reject(op, "x", x, "4-D (n, channels, height, width)")
    check_geometry(op, *x.shape[2:], kernel, stride, padding, dilation)


def _fake_pack_image(x, kernel, stride, padding, dilation):
    n, channels, height, width = x.shape
    oh, ow = reference.output_size(height, width, kernel, stride, padding, dilation)
    signs = x.new_empty((n * height * width, row_bytes(channels)), dtype=torch.uint8)
    return (signs, torch.empty_like(signs), x.new_empty((n * oh * ow, 1), dtype=torch.float32),
            x.new_empty((channels * kernel[0] * kernel[1], 1), dtype=torch.float32))


def _native_pack_image(x, kernel, stride, padding, dilation):
    if x.is_cuda:
        return _pack_rows(x, kernel, stride, padding, dilation)
    x, last = _image(x)
    signs, outside, rows, columns = out = _fake_pack_image(x, kernel, stride, padding, dilation)
    if signs.numel() and native_module().pack_image(x.data_ptr(), CODES[float_code(x.dtype)], last, len(x), x.shape[1], x[0, 0].numel(), signs.data_ptr(), outside.data_ptr()):
        return signs, outside, *reference.patch_scales(x, kernel, stride, padding, dilation)
    rows.fill_(1), columns.fill_(1)
    return out


def _image(x):
    """x as native code reads it, and whether channels come last."""
    last = x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous(), last


def _pack_rows(x, kernel, stride, padding, dilation):
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(n * h * w, c)
    return pack_signs(rows)[0], pack_signs(1 - rows.to(torch.float32).abs())[0], *reference.patch_scales(x, kernel, stride, padding, dilation)


_CPU_CUDA = {"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")}
pack_image = Op(
    "pack_image", "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation) -> (Tensor, Tensor, Tensor, Tensor)", _check_pack_image, _fake_pack_image,
    backends={"native": _native_pack_image, "triton": _pack_rows, "reference": reference.pack_image}, order=_CPU_CUDA)
pack_image.__doc__ = """pack_image(x, kernel, stride, padding, dilation) -> (signs, outside, rows, columns)

What 1-bit training keeps of an image x (n, c, height, width) fp32, bf16 or fp16, in either memory format: for each pixel, a row of (n height width,
ceil(c / 8)) uint8, its channels' signs as :func:`pack_signs` packs them, and in the same way whether |x| > 1 (nan counts as not). rows (n oh ow, 1) and columns
(kh kw c, 1) fp32: 1, or nan for each patch, and for each element of the window, that sees a nan or an inf anywhere: the scales of :func:`patch_bits`' rows and
columns. Bit-equal in every backend. Raises TypeError for dtypes, ValueError for shapes and geometry."""


def _check_patch_bits(bits, n, channels, height, width, kernel, stride, padding, dilation):
    op = "patch_bits"
    check_geometry(op, height, width, kernel, stride, padding, dilation)
    require_matrix(op, "bits", bits, (torch.uint8,), (n * height * width, row_bytes(channels)), contiguous=True)


def _fake_patch_bits(bits, n, channels, height, width, kernel, stride, padding, dilation):
    oh, ow = reference.output_size(height, width, kernel, stride, padding, dilation)
    return bits.new_empty((n * oh * ow, row_bytes(channels * kernel[0] * kernel[1])))


def _native_patch_bits(bits, n, channels, height, width, kernel, stride, padding, dilation):
    if bits.is_cuda:
        return _patch_bytes(bits, n, channels, height, width, kernel, stride, padding, dilation)
    out = _fake_patch_bits(bits, n, channels, height, width, kernel, stride, padding, dilation)
    if out.numel():
        size = reference.output_size(height, width, kernel, stride, padding, dilation)
        native_module().patch_bits(bits.data_ptr(), (channels, height, width, *kernel, *stride, *dilation, *size), tuple(padding), n, out.data_ptr())
    return out


def _patch_bytes(bits, n, channels, height, width, kernel, stride, padding, dilation):
    if channels % 8:
        return reference.patch_bits(bits, n, channels, height, width, kernel, stride, padding, dilation)
    image = bits.view(n, height, width, channels // 8).permute(0, 3, 1, 2)
    return reference.by_pixel(reference.patches(image, kernel, stride, padding, dilation), channels // 8).contiguous()


patch_bits = Op(
    "patch_bits", "(Tensor bits, int n, int channels, int height, int width, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
    _check_patch_bits, _fake_patch_bits,
    backends={"native": _native_patch_bits, "triton": _patch_bytes, "reference": reference.patch_bits}, order=_CPU_CUDA)
patch_bits.__doc__ = """patch_bits(bits, n, channels, height, width, kernel, stride, padding, dilation) -> (n oh ow, ceil(kh kw channels / 8)) uint8

The patches of an image whose pixels are rows of packed bits (n height width, ceil(channels / 8)), as :func:`pack_image` makes them: each row one patch, the window's
elements in order and of each all channels (not channels first, as in ``weight.flatten(1)``); what lies in the padding is 0, a plus. Raises TypeError for
dtypes, ValueError for shapes and geometry."""


# --- gradients of some patches to the image's -------------------------------------------------------------
def _check_fold_kept(d, kept, outside, n, channels, height, width, kernel, stride, padding, dilation, dtype, last):
    op = "fold_kept"
    check_geometry(op, height, width, kernel, stride, padding, dilation)
    oh, ow = reference.output_size(height, width, kernel, stride, padding, dilation)
    if kept is not None and not (kept.dtype == torch.int64 and kept.dim() == 1 and kept.device == d.device):
        reject(op, "kept", kept, f"int64 of one dimension on {d.device}")
    require_matrix(op, "d", d, (torch.float32,), (n * oh * ow if kept is None else len(kept), channels * kernel[0] * kernel[1]), contiguous=True)
    if outside is not None:
        require_matrix(op, "outside", outside, (torch.uint8,), (n * height * width, row_bytes(channels)), d.device, contiguous=True)
    if dtype not in FLOATS:
        reject(op, "dtype", dtype, "float32, bfloat16 or float16", TypeError)


def _kept_values(d, kept, outside, n, channels, height, width, kernel, stride, padding, dilation, dtype, last):
    if kept is not None and len(kept):
        oh, ow = reference.output_size(height, width, kernel, stride, padding, dilation)
        if int(kept[0]) < 0 or int(kept[-1]) >= n * oh * ow or not bool((kept.diff() > 0).all()):
            reject("fold_kept", "kept", kept.tolist(), f"ascending, 0 to {n * oh * ow - 1}")


def _fake_fold_kept(d, kept, outside, n, channels, height, width, kernel, stride, padding, dilation, dtype, last):
    return d.new_empty((n, channels, height, width), dtype=dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _native_fold_kept(d, kept, outside, n, channels, height, width, kernel, stride, padding, dilation, dtype, last):
    if d.is_cuda:
        return reference.fold_kept(d, kept, outside, n, channels, height, width, kernel, stride, padding, dilation, dtype, last)
    out = torch.empty((n, channels, height, width), dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
    if not len(d):
        out.zero_()
    elif out.numel():
        size = reference.output_size(height, width, kernel, stride, padding, dilation)
        kept = None if kept is None else kept.contiguous()
        native_module().fold_kept(d.data_ptr(), 0 if kept is None else kept.data_ptr(), len(d), 0 if outside is None else outside.data_ptr(), n,
                                  (channels, height, width, *kernel, *stride, *dilation, *size), tuple(padding), out.data_ptr(), CODES[float_code(dtype)], last)
    return out


fold_kept = Op(
    "fold_kept", "(Tensor d, Tensor? kept, Tensor? outside, int n, int channels, int height, int width, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "ScalarType dtype, bool last) -> Tensor",
    _check_fold_kept, _fake_fold_kept, values=_kept_values,
    backends={"native": _native_fold_kept, "triton": reference.fold_kept, "reference": reference.fold_kept}, order=_CPU_CUDA)
fold_kept.__doc__ = """fold_kept(d, kept, outside, n, channels, height, width, kernel, stride, padding, dilation, dtype, last) -> (n, channels, height, width) of ``dtype``

The gradient of an image, given that of some of its patches: :func:`fold_patches` of d (rows, kh kw channels) fp32, columns as :func:`patch_bits` has them, rows being
the patches ``kept`` (rows,) int64, ascending (None: all), the others zeros; times 0 where ``outside``, as :func:`pack_image` makes it, has a bit (None: nowhere), so that a nan
shows there too. With ``last`` in channels-last memory. Sums in fp32 in the order of the window's elements: the same bits in every backend, whatever the thread count. Raises
TypeError for dtypes, ValueError for shapes, geometry and kept."""
