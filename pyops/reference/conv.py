"""conv reference: a convolution's patches as a matrix, and back."""
from __future__ import annotations

import torch

from gradmill.formats import FLOAT_DTYPES
from gradmill.reference import binary, quant


def output_size(height, width, kernel, stride, padding, dilation):
    """(oh, ow), each floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1."""
    return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation))


def patches(x, kernel, stride, padding, dilation):
    """im2col: x (n, c, h, w) -> (n oh ow, c kh kw), columns in the order of ``weight.flatten(1)``, rows in that of the output
    positions; a transposed view: the memory is (c kh kw, n oh ow), whose rows are runs of the image's."""
    if any(padding):
        x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    for dim in (0, 1):
        x = x.unfold(2 + dim, dilation[dim] * (kernel[dim] - 1) + 1, stride[dim])[..., ::dilation[dim]]
    n, c, oh, ow, kh, kw = x.shape
    return x.permute(1, 4, 5, 0, 2, 3).reshape(c * kh * kw, n * oh * ow).t()


def quantize_patches(x, kernel, stride, padding, dilation, code, block=0, transpose=False):
    matrix = patches(x, kernel, stride, padding, dilation)
    if code in FLOAT_DTYPES:
        return ((matrix.t() if transpose else matrix).to(FLOAT_DTYPES[code]).contiguous(),
                *(x.new_empty((0,), dtype=dtype) for dtype in (torch.float32, torch.uint8)))
    if code == "sign":
        return (*binary.pack_signs(matrix, transpose), x.new_empty((0,), dtype=torch.uint8))
    return quant.quantize(matrix, code, block, transpose)


def patch_scales(x, kernel, stride, padding, dilation):
    """(n oh ow, 1) and (kh kw c, 1): nan for each patch, and for each element of the window, that sees a nan or an inf, else 1."""
    bad = ~x.isfinite()
    rows, columns = (patches(bad.any(dim, keepdim=True).to(torch.float32), kernel, stride, padding, dilation) > 0 for dim in (1, 0))
    columns = by_pixel(columns.any(0, keepdim=True), x.shape[1]).reshape(-1, 1)
    return *(torch.where(b, torch.nan, 1.0).to(torch.float32) for b in (rows.any(1, keepdim=True), columns)),


def by_pixel(matrix, channels):
    """Columns (c, window) as (window, c)."""
    return matrix.view(len(matrix), channels, -1 if matrix.numel() else 1).transpose(1, 2).reshape(matrix.shape)


def pack_image(x, kernel, stride, padding, dilation):
    """See gradmill.ops.conv.pack_image."""
    n, c, h, w = x.shape
    rows = x.to(torch.float32).permute(0, 2, 3, 1).reshape(n * h * w, c)
    return binary.pack_signs(rows)[0], binary.pack_signs(1 - rows.abs())[0], *patch_scales(x, kernel, stride, padding, dilation)


def patch_bits(bits, n, channels, height, width, kernel, stride, padding, dilation):
    """See gradmill.ops.conv.patch_bits."""
    image = quant.unpack_bits(bits, 1, channels, False).view(n, height, width, channels).permute(0, 3, 1, 2)
    matrix = by_pixel(patches(image, kernel, stride, padding, dilation), channels)
    return quant.pack_bits(matrix, 1) if matrix.numel() else bits.new_zeros((len(matrix), -(-matrix.shape[1] // 8)))


def fold_kept(d, kept, outside, n, channels, height, width, kernel, stride, padding, dilation, dtype, last):
    """See gradmill.ops.conv.fold_kept."""
    oh, ow = output_size(height, width, kernel, stride, padding, dilation)
    taps = kernel[0] * kernel[1]
    d = d.view(len(d), taps, channels).transpose(1, 2).reshape(d.shape)
    if kept is not None:
        d = d.new_zeros((n * oh * ow, d.shape[1])).index_copy_(0, kept, d)
    image = fold_patches(d, n, channels, height, width, kernel, stride, padding, dilation, torch.float32)
    inside = 1 if outside is None else 1 - quant.unpack_bits(outside, 1, channels, False).view(n, height, width, channels).permute(0, 3, 1, 2)
    return (image * inside).to(dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def fold_patches(d, n, channels, height, width, kernel, stride, padding, dilation, dtype):
    """col2im, the transpose of ``patches``: every element of d (n oh ow, c kh kw) is added to the pixel it came from. Sums in
    fp32, kernel positions in order."""
    oh, ow = output_size(height, width, kernel, stride, padding, dilation)
    out = d.new_zeros((n, channels, height + 2 * padding[0], width + 2 * padding[1]), dtype=torch.float32)
    d = d.to(torch.float32).reshape(n, oh, ow, channels, *kernel).permute(0, 3, 4, 5, 1, 2)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * dilation[0], j * dilation[1]
            out[:, :, top:top + (oh - 1) * stride[0] + 1:stride[0], left:left + (ow - 1) * stride[1] + 1:stride[1]] += d[:, :, i, j]
    return out[:, :, padding[0]:padding[0] + height, padding[1]:padding[1] + width].to(dtype).contiguous()
